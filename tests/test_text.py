"""Sentences: vocabularies and files, and the synthetic languages against arithmetic that shares nothing with them."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_z

from gae_core.languages import MODES, RECIPES, Recipe, SyntheticLanguage, synthetic
from gae_core.text import END, PAD, SIGNS, UNKNOWN, Vocabulary, load_sentences

# ---- vocabulary and files ---------------------------------------------------------------------------------------


def test_words_come_by_frequency_and_there_and_back():
    sentences = [["a", "b"], ["b"], ["c", "b", "a"]]
    vocabulary = Vocabulary.of(sentences)
    assert vocabulary.words == (*SIGNS, "b", "a", "c") and len(vocabulary) == 6
    tokens = vocabulary.encode(sentences)
    assert tokens.tolist() == [[4, 3, END, PAD], [3, END, PAD, PAD], [5, 3, 4, END]] and tokens.dtype == torch.int64
    assert vocabulary.decode(tokens) == sentences


def test_ties_go_by_the_alphabet_and_rare_words_become_unknown():
    vocabulary = Vocabulary.of([["y", "x", "z", "z"]], max_words=2)
    assert vocabulary.words == (*SIGNS, "z", "x")
    assert vocabulary.encode([["y", "x", "new"]], length=6).tolist() == [[UNKNOWN, 4, UNKNOWN, END, PAD, PAD]]


def test_a_word_spelled_like_a_sign_is_unknown():
    vocabulary = Vocabulary.of([["a", "</s>", "<pad>", "<unk>"]])
    assert vocabulary.words == (*SIGNS, "a")
    assert vocabulary.encode([["a", "</s>", "<pad>", "<unk>"]]).tolist() == [[3, UNKNOWN, UNKNOWN, UNKNOWN, END]]


@pytest.mark.parametrize(
    ("sentences", "length"), [([], None), ([["a"], []], None), ([["a", "a"]], 2)], ids=["none", "empty", "too long"]
)
def test_sentences_that_cannot_be_encoded_are_refused(sentences, length):
    with pytest.raises(ValueError, match="sentences must be at least one, each of 1 to"):
        Vocabulary.of([["a"]]).encode(sentences, length=length)


@pytest.mark.parametrize("words", [("a", "b"), SIGNS, (*SIGNS, "a", "a")])
def test_a_vocabulary_has_the_signs_and_no_word_twice(words):
    with pytest.raises(ValueError, match="words must be"):
        Vocabulary(words)


def file(folder, text, encoding="utf-8"):
    path = folder / "lines.txt"
    path.write_bytes(text.encode(encoding))
    return path


def test_a_file_is_split_and_the_test_part_has_unknown_words(tmp_path):
    path = file(tmp_path, "\n".join(["", "  ", *(f"w{i} x" for i in range(20)), "\t", "one two three four"]))
    sentences = load_sentences(path, test_share=0.25, max_length=3)
    assert sentences.name == "lines.txt" and sentences.left_out == 1 and sentences.z_train is None
    assert (len(sentences.train), len(sentences.test)) == (15, 5)
    assert sentences.train.shape[1] == sentences.test.shape[1] == 3
    assert len(sentences.vocabulary) == 3 + 16 and (sentences.train != UNKNOWN).all()
    x = sentences.vocabulary.words.index("x")
    assert sentences.test.tolist() == [[UNKNOWN, x, END]] * 5
    other = load_sentences(path, test_share=0.25, max_length=3, seed=1)
    assert set(sentences.vocabulary.words) != set(other.vocabulary.words)


def test_characters_of_a_language_without_spaces(tmp_path):
    sentences = load_sentences(file(tmp_path, "\ufeff山高\n水長\n"), tokenize=list, test_share=0.5)
    words = sentences.vocabulary.decode(sentences.train)
    assert words in ([["山", "高"]], [["水", "長"]])


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "at least 2 sentences .* it has 0 among 0 lines"),
        ("\n \n\n", {}, "it has 0 among 3 lines, 0 are longer"),
        ("a b c\na b c\na", {"max_length": 2}, "it has 1 among 3 lines, 2 are longer"),
        ("a\nb", {"test_share": 1.0}, "test_share must be between 0 and 1"),
        ("a\nb", {"max_length": 0}, "max_length and max_words at least 1"),
        ("a\nb", {"max_words": 0}, "max_length and max_words at least 1"),
    ],
)
def test_a_file_without_sentences_and_bad_arguments_are_refused(content, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_sentences(file(tmp_path, content), **options)


def test_another_encoding_is_refused_and_a_missing_file_named(tmp_path):
    with pytest.raises(ValueError, match=r"lines\.txt must be UTF-8, byte 1 is not"):
        load_sentences(file(tmp_path, "für\nzwei", encoding="latin-1"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_sentences(tmp_path / "nowhere.txt")


# ---- synthetic languages ----------------------------------------------------------------------------------------

TINY = Recipe(words=3, length=3, embedding=4, hidden=5, code_scale=1.0)


def by_hand(language, x, z):
    """-log p(x | z) in numpy, gate by gate (torch's order: input, forget, cell, output)."""
    w = {name: value.double().numpy() for name, value in language.state_dict().items()}
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    words, z = x.numpy() - 3, z.double().numpy()
    c = w["initial.weight"] @ z
    h, total = np.tanh(c), math.log(language.recipe.words)
    for word, following in itertools.pairwise(words):
        inputs = np.concatenate([w["embed.weight"][word], z])
        gates = (
            w["lstm.weight_ih_l0"] @ inputs + w["lstm.bias_ih_l0"] + w["lstm.weight_hh_l0"] @ h + w["lstm.bias_hh_l0"]
        )
        i, f, g, o = np.split(gates, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        logits = w["out.weight"] @ h + w["out_code.weight"] @ z
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[following]
    return total


def test_the_likelihood_is_that_of_the_recipe_written_out():
    data, language = synthetic("learnable", train=1, test=20), SyntheticLanguage(RECIPES["learnable"])
    found = language.log_likelihood(data.test, data.z_test)
    for x, z, value in zip(data.test, data.z_test, found, strict=True):
        assert -value == pytest.approx(by_hand(language, x, z), rel=1e-5)


def test_weights_are_uniform_in_their_ranges_and_depend_on_the_seed():
    language = SyntheticLanguage(Recipe())
    for name, parameter in language.named_parameters():
        scale = 5 if name.startswith("out_code") else 1
        assert 0.9 * scale < parameter.abs().max() <= scale and not parameter.requires_grad
    assert language.embed.weight.shape == (1000, 100) and language.lstm.hidden_size == 100
    assert not torch.equal(language.out.weight, SyntheticLanguage(Recipe(seed=1)).out.weight)


def everything(recipe):
    return torch.tensor(list(itertools.product(range(3, 3 + recipe.words), repeat=recipe.length)))


def test_the_probabilities_of_all_sentences_add_up_to_one_and_are_those_of_the_samples():
    language, x = SyntheticLanguage(TINY), everything(TINY)
    z = torch.tensor([0.7, -1.2])
    p = language.log_likelihood(x, z.expand(len(x), 2)).exp()
    assert p.sum() == pytest.approx(1, abs=1e-5)
    drawn = language.sample(z.expand(20_000, 2), generator=torch.Generator().manual_seed(0))
    index = ((drawn - 3) * torch.tensor([9, 3, 1])).sum(1)
    for i in range(len(x)):
        assert_z((index == i).double(), float(p[i]))


def test_codes_are_the_mixture_of_four():
    z = SyntheticLanguage(TINY).sample_codes(40_000, generator=torch.Generator().manual_seed(0)).double()
    for j in range(2):
        assert_z(z[:, j], 0.0)
        assert_z(z[:, j].square(), 1 + 4)
        assert_z(z[:, j] ** 4, 16 + 6 * 4 + 3)  # of a normal with mean ±2
    assert_z(z[:, 0] * z[:, 1], 0.0)
    assert MODES.sum(0).tolist() == [0, 0] and MODES.abs().unique().tolist() == [2]


def test_the_bracket_holds_the_true_value_found_by_quadrature():
    """p(x) of all 27 sentences on a grid in the plane, where the density is written out."""
    language, x = SyntheticLanguage(TINY), everything(TINY)
    line = torch.linspace(-8, 8, 161)
    grid = torch.cartesian_prod(line, line)
    density = sum(torch.exp(-(grid - mode).square().sum(1) / 2) for mode in MODES) / (4 * 2 * math.pi) * 0.1**2
    p = torch.stack([(language.log_likelihood(row.expand(len(grid), 3), grid).exp() * density).sum() for row in x])
    assert p.sum() == pytest.approx(1, abs=1e-3)
    generator = torch.Generator().manual_seed(0)
    z = language.sample_codes(600, generator=generator)
    drawn = language.sample(z, generator=generator)
    index = ((drawn - 3) * torch.tensor([9, 3, 1])).sum(1)
    exact = -p[index].log().double()
    few = language.optimum(drawn, z, samples=4, generator=generator)
    many = language.optimum(drawn, z, samples=300, generator=generator)
    for gaps in (few.nll - exact, exact - few.nll_below):  # with few codes the sides are apart
        assert gaps.mean() > 4 * gaps.std() / math.sqrt(len(gaps))
    assert_z((exact - few.nll).exp(), 1.0)  # the first estimate is p(x) on average,
    assert_z((few.nll_below - exact).exp(), 1.0)  # the inverse of the second 1 / p(x)
    assert_z(many.nll - exact, 0.0)
    assert abs(many.nll.mean() - exact.mean()) < 0.01
    torch.testing.assert_close(many.given_code, -language.log_likelihood(drawn, z).double())
    assert many.information == pytest.approx(float((exact - many.given_code).mean()), abs=0.01)


def test_the_published_recipe_has_the_entropy_and_information_that_it_is_known_for():
    """About 26.4 to 27.1 nats given the code, by the seed of the weights, 30.4 to 31.1 without, 4 between."""
    data, language = synthetic("he2019", train=1, test=1500), SyntheticLanguage(RECIPES["he2019"])
    given = -language.log_likelihood(data.test, data.z_test)
    assert given.mean() == pytest.approx(26.7, abs=0.8)
    x, z = data.test[:60], data.z_test[:60]
    optimum = language.optimum(x, z, samples=600, generator=torch.Generator().manual_seed(0))
    assert (optimum.nll - optimum.nll_below).mean() < 0.5
    assert optimum.information == pytest.approx(4.1, abs=0.8)


def test_synthetic_sentences_are_reproducible_and_the_test_part_is_the_same_for_any_training_part():
    a, b = synthetic("learnable", train=50, test=30), synthetic("learnable", train=80, test=30)
    assert torch.equal(a.test, b.test) and torch.equal(a.z_test, b.z_test)
    assert a.train.shape == (50, 10) and a.z_train.shape == (50, 2) and len(a.vocabulary) == 53
    assert not torch.equal(a.test, synthetic("learnable", train=50, test=30, seed=1).test)
    assert (a.test > UNKNOWN).all()
    with pytest.raises(ValueError, match="name must be one of he2019, learnable, got 'klingon'"):
        synthetic("klingon")


@pytest.mark.parametrize("x", [torch.full((2, 3), 2), torch.full((2, 3), 6), torch.full((2, 4), 3)])
def test_sentences_of_another_language_are_refused(x):
    with pytest.raises(ValueError, match=r"x must have shape \(n, 3\) and tokens 3 to 5"):
        SyntheticLanguage(TINY).log_likelihood(x, torch.zeros(2, 2))


def test_a_seed_of_the_recipe_is_another_language():
    z = torch.zeros(1, 2)
    x = torch.full((1, 3), 3)
    a, b = (SyntheticLanguage(replace(TINY, seed=seed)).log_likelihood(x, z) for seed in (0, 1))
    assert a != b
