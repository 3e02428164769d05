"""Codes of sentences: the identities of the chapter in exact arithmetic, the model against enumeration, the records."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mpmath
import pytest
import sympy
import torch
from helpers import assert_z
from torch import nn

from gae_core import nets, train
from gae_core.gaussian import kl_to_standard_normal
from gae_core.languages import RECIPES, SyntheticLanguage, synthetic
from gae_core.metrics import ImportanceWeighted, importance_weighted_nll
from gae_core.models.text_vae import CodeReader, CommittedRate, TextVAE
from gae_core.normalization import CoupledBatchNorm, FixedScaleBatchNorm
from gae_core.records import less as paired
from gae_core.studies import bn_vae_text as study
from gae_core.text import Sentences

# ---- the chapter's equations: finite x and z, thirty digits -----------------------------------------------------


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(40):
        yield


def law(*shape, seed):
    """A random distribution over a finite set; conditional on the first index where there are two."""
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.05).tolist()
    rows = weights if len(shape) == 2 else [weights]
    rows = [[mpmath.mpf(w) / mpmath.fsum(map(mpmath.mpf, row)) for w in row] for row in rows]
    return rows if len(shape) == 2 else rows[0]


def total(values):
    return mpmath.fsum(values)


def divergence(p, q):
    return total(a * mpmath.log(a / b) for a, b in zip(p, q, strict=True))


def posterior(prior, likelihood, x):
    """Evidence p(x) and p(z | x), of likelihood[z][x]."""
    joint = [w * row[x] for w, row in zip(prior, likelihood, strict=True)]
    return total(joint), [j / total(joint) for j in joint]


def close(a, b):
    return abs(a - b) < mpmath.mpf(10) ** -30 and a != 0


X, Z = 4, 3


@pytest.mark.checks("eq-bn_vae_text-split", how="exact")
def test_the_mean_loss_is_entropy_and_two_divergences():
    data, prior, likelihood, q = law(X, seed=0), law(Z, seed=1), law(Z, X, seed=2), law(X, Z, seed=3)
    loss = total(
        data[x] * (total(-q[x][z] * mpmath.log(likelihood[z][x]) for z in range(Z)) + divergence(q[x], prior))
        for x in range(X)
    )
    entropy = -total(p * mpmath.log(p) for p in data)
    found = [posterior(prior, likelihood, x) for x in range(X)]
    inference = total(data[x] * divergence(q[x], found[x][1]) for x in range(X))
    assert close(loss, entropy + divergence(data, [evidence for evidence, _ in found]) + inference)
    collapsed = entropy + divergence(prior, prior)  # a decoder that is the data's law, and q the prior
    assert loss > collapsed


def test_erratum_collapse_needs_no_noise_in_the_code():
    """The source blames the noise. Codes without any, each encoder with its best decoder: none beats collapse."""
    data, prior = law(X, seed=0), law(Z, seed=1)
    entropy, gaps = -total(p * mpmath.log(p) for p in data), []
    for code in itertools.product(range(Z), repeat=X):  # z = code[x]
        share = [total(p for p, z in zip(data, code, strict=True) if z == k) for k in range(Z)]
        words = total(-p * mpmath.log(p / share[z]) for p, z in zip(data, code, strict=True))
        rate = total(-p * mpmath.log(prior[z]) for p, z in zip(data, code, strict=True))
        gaps.append(words + rate - entropy)  # KL of the used codes from the prior
    assert min(gaps) > 0 and len(gaps) == Z**X


@pytest.mark.checks("eq-bn_vae_text-sandwich", how="exact")
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_estimate_errs_to_the_side_of_its_draws(samples):
    """All draws enumerated, with their probabilities."""
    prior, likelihood, x = law(Z, seed=4), law(Z, X, seed=5), 2
    evidence, right = posterior(prior, likelihood, x)
    above, below, inverse = [], [], []
    for draws in itertools.product(range(Z), repeat=samples):
        estimate = total(likelihood[z][x] for z in draws) / samples
        rest = mpmath.fprod(prior[z] for z in draws[1:])
        above.append(-prior[draws[0]] * rest * mpmath.log(estimate))
        below.append(-right[draws[0]] * rest * mpmath.log(estimate))
        inverse.append(right[draws[0]] * rest / estimate)
    assert total(above) > -mpmath.log(evidence) > total(below)
    assert close(total(inverse), 1 / evidence)  # the step of the proof that makes the right side a bound


@pytest.mark.checks("eq-bn_vae_text-floor", how="exact")
def test_the_readers_floor_is_its_own_likelihood_and_what_its_posterior_misses():
    prior, language, reader = law(Z, seed=6), law(Z, X, seed=7), law(Z, X, seed=8)
    pairs = list(itertools.product(range(Z), range(X)))
    true, read = ([posterior(prior, of, x) for x in range(X)] for of in (language, reader))
    given = total(-prior[z] * language[z][x] * mpmath.log(reader[z][x]) for z, x in pairs)
    information = total(prior[z] * language[z][x] * mpmath.log(language[z][x] / true[x][0]) for z, x in pairs)
    marginal = total(-true[x][0] * mpmath.log(read[x][0]) for x in range(X))
    missed = total(true[x][0] * divergence(true[x][1], read[x][1]) for x in range(X))
    assert close(given + information, marginal + missed) and missed > 0


@pytest.mark.checks("eq-bn_vae_text-gain", how="exact")
def test_the_gain_from_z_is_information_and_lautum_information():
    prior, language = law(Z, seed=9), law(Z, X, seed=10)
    evidence = [posterior(prior, language, x)[0] for x in range(X)]
    pairs = list(itertools.product(range(Z), range(X)))
    gain = total(prior[z] * (language[z][x] - evidence[x]) * mpmath.log(language[z][x]) for z, x in pairs)
    joint = [prior[z] * language[z][x] for z, x in pairs]
    product = [prior[z] * evidence[x] for z, x in pairs]
    assert close(gain, divergence(joint, product) + divergence(product, joint))


@pytest.mark.checks("eq-bn_vae_text-committed", how="symbolic")
def test_the_committed_rate_is_delta_and_half_of_what_is_added():
    delta, s2, m = sympy.symbols("delta sigma2 m", positive=True)
    for added in (m, sympy.Integer(0)):  # relu of a positive and of a negative output
        mu = sympy.sqrt(2 * delta + 1 + sympy.log(s2) - s2 + added)
        k = (mu**2 + s2 - sympy.log(s2) - 1) / 2
        assert sympy.simplify(k - delta - added / 2) == 0


@pytest.mark.checks("eq-bn_vae_text-committed", how="exact")
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 0.001, 0.1, 0.25, 3.0, 50.0, 350.0])
def test_the_range_of_the_variance_has_the_roots_of_lambert(delta):
    low, high = (-mpmath.lambertw(-mpmath.exp(-1 - 2 * mpmath.mpf(delta)), branch).real for branch in (0, -1))
    for root in (low, high):
        assert close(root - mpmath.log(root), 1 + 2 * mpmath.mpf(delta))
    assert low < 1 < high
    norm = CommittedRate(delta)
    rounding = 1e-15 + 1e-16 / delta  # for small delta that of 1 + 2 delta
    assert norm.low == pytest.approx(float(mpmath.log(low)), rel=rounding)
    assert norm.high == pytest.approx(float(mpmath.log(high)), rel=rounding)


@pytest.mark.checks("eq-bn_vae_text-overspread", how="exact")
@pytest.mark.parametrize("gamma", [1.0, 1.2, 1.8])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_an_aggregate_with_too_much_spread_pays_for_it(gamma, sigma):
    """Half of the means at gamma, half at -gamma: the aggregate has two humps, its divergence by quadrature."""
    gamma, sigma = mpmath.mpf(str(gamma)), mpmath.mpf(str(sigma))

    def log_q(z):
        return mpmath.log((mpmath.npdf(z, gamma, sigma) + mpmath.npdf(z, -gamma, sigma)) / 2)

    def integrand(z):
        return mpmath.exp(log_q(z)) * (log_q(z) - mpmath.log(mpmath.npdf(z)))

    edges = [-gamma - 14 * sigma, -gamma, 0, gamma, gamma + 14 * sigma]
    bound = (gamma**2 - 1 - mpmath.log(gamma**2)) / 2
    assert mpmath.quad(integrand, edges) > bound
    # It is the divergence of the normal law with that variance, so that it can't be raised ...
    normal = mpmath.quad(
        lambda z: mpmath.npdf(z, 0, gamma) * (mpmath.log(mpmath.npdf(z, 0, gamma)) - mpmath.log(mpmath.npdf(z))),
        [-14 * gamma, 0, 14 * gamma],
    )
    assert abs(normal - bound) < mpmath.mpf(10) ** -30
    # ... and it grows with any variance that sigma adds.
    s2 = sympy.symbols("s2", positive=True)
    slope = sympy.diff((s2 - 1 - sympy.log(s2)) / 2, s2)
    assert sympy.solve(slope, s2) == [1] and slope.subs(s2, 2) > 0


def test_the_numbers_in_the_chapter():
    def overspread(gamma):
        return 4 * (gamma**2 - 1 - math.log(gamma**2))

    assert [round(overspread(g), 1) for g in (1.2, 1.5, 1.8)] == [0.3, 1.8, 4.3]
    bounds = [round(8 * g**2 / 2, 2) for g in (0.3, 0.5, 0.7, 1.0, 1.2, 1.5, 1.8)]
    assert bounds == [0.36, 1.0, 1.96, 4.0, 5.76, 9.0, 12.96]
    assert [round(-4 * math.log(1 - tau), 2) for tau in (0.2, 0.5, 0.8)] == [0.89, 2.77, 6.44]
    assert round(math.sqrt(2), 2) == 1.41  # two dimensions, two nats
    assert (round(-math.log(1 - 0.49) / 2, 3), round(0.49 / 2, 3)) == (0.337, 0.245)
    assert (round(math.log(32), 2), round(math.log(1000), 2)) == (3.47, 6.91)
    assert math.log(1000) == pytest.approx(6.91, abs=0.005)  # the uniform first word of the published recipe


def test_the_exercise_with_a_smaller_scale_of_the_code():
    found = []
    for scale in (5.0, 1.0):
        language = SyntheticLanguage(replace(RECIPES["learnable"], code_scale=scale))
        generator = torch.Generator().manual_seed(0)
        z = language.sample_codes(300, generator=generator)
        found.append(language.optimum(language.sample(z, generator=generator), z, samples=500, generator=generator))
    assert found[0].information - found[1].information == pytest.approx(1 / 3, abs=0.15)
    assert found[1].nll.mean() / found[0].nll.mean() == pytest.approx(2, abs=0.15)


# ---- the model --------------------------------------------------------------------------------------------------

TOKENS, DIM, LENGTH = 5, 2, 3


def build(tokens=TOKENS, dim=DIM, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    encoder = nets.LSTMEncoder(tokens, 2 * dim, embedding=4, hidden=6)
    decoder = nets.LSTMDecoder(tokens, dim, embedding=4, hidden=6)
    model = TextVAE(encoder, decoder, dim, **options).to(dtype)
    with torch.no_grad():
        for parameter in model.decoder.parameters():  # larger than usual, so that words and codes matter
            parameter.mul_(3)
    return model.eval()


def batch(n=12, length=LENGTH, tokens=TOKENS, seed=0):
    """Sentences of 1 to length tokens, padded."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, tokens, (n, length), generator=generator)
    size = torch.randint(1, length + 1, (n, 1), generator=generator)
    return x.masked_fill(torch.arange(length) >= size, 0)


def codes(n, dim=DIM, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_networks_are_the_recurrences_written_out():
    model, x, z = build(), batch(), codes(12)
    cell = nn.LSTMCell(4 + DIM, 6).double()
    decoder, encoder = model.decoder, model.encoder
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in decoder.lstm.state_dict().items()})
    c = z @ decoder.initial.weight.T
    h, before = c.tanh(), torch.zeros(12, dtype=torch.int64)
    for t in range(LENGTH):
        h, c = cell(torch.cat([decoder.embed.weight[before], z], 1), (h, c))
        torch.testing.assert_close(decoder(x, z)[:, t], decoder.out(h))
        before = x[:, t]
    cell = nn.LSTMCell(4, 6).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in encoder.lstm.state_dict().items()})
    for row, output in zip(x, encoder(x), strict=True):
        state = (torch.zeros(1, 6).double(), torch.zeros(1, 6).double())
        for token in row[row > 0]:
            state = cell(encoder.embed.weight[token][None], state)
        torch.testing.assert_close(output, encoder.out(state[0])[0])


def test_all_sentences_of_a_length_have_probability_one_and_padding_counts_nothing():
    model, z = build(), codes(1)
    x = torch.tensor(list(itertools.product(range(1, TOKENS), repeat=LENGTH)))
    assert model.log_likelihood(x, z.expand(len(x), DIM)).exp().sum().item() == pytest.approx(1, abs=1e-12)
    x = batch()
    longer = nn.functional.pad(x, (0, 4))
    z = codes(12)
    torch.testing.assert_close(model.log_likelihood(longer, z), model.log_likelihood(x, z))
    for a, b in zip(model.posterior(longer), model.posterior(x), strict=True):
        torch.testing.assert_close(a, b)


def test_the_loss_has_its_terms():
    model, x = build(beta=0.4), batch()
    loss = model.loss(x, generator=torch.Generator().manual_seed(1))
    mu, logvar = model.posterior(x)
    z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=torch.Generator().manual_seed(1), dtype=mu.dtype)
    torch.testing.assert_close(loss.reconstruction, -model.log_likelihood(x, z))
    torch.testing.assert_close(loss.kl, 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum(1))
    torch.testing.assert_close(loss.total, loss.reconstruction + 0.4 * loss.kl)
    assert loss.total.shape == (12,)


def test_free_bits_charge_a_dimension_beyond_its_threshold_on_the_mean_of_the_batch():
    x = batch(40)
    mu, logvar = build().posterior(x)
    typical = kl_to_standard_normal(mu[..., None], logvar[..., None]).mean().item()  # single values on either side
    for free in (0.001, typical, 5.0):
        model = build(free_bits=free)
        loss = model.loss(x, generator=torch.Generator().manual_seed(1))
        mu, logvar = model.posterior(x)
        means = (0.5 * (mu**2 + logvar.exp() - logvar - 1)).mean(0)
        expected = sum(max(free, k) for k in means.tolist())
        assert (loss.total - loss.reconstruction).mean().item() == pytest.approx(expected)
    (pull,) = torch.autograd.grad((loss.total - loss.reconstruction).mean(), [model.encoder.out.weight])
    assert not pull.any()  # all are below 5 nats


def test_the_weight_rises_over_steps_of_training_alone():
    model, x = build(warmup=4, beta=0.5), batch()
    for step in range(6):
        for training in (False, True):  # looking does not count
            model.train(training)
            loss = model.loss(x, generator=torch.Generator().manual_seed(1))
            expected = loss.reconstruction + 0.5 * min(1, step / 4) * loss.kl
            torch.testing.assert_close(loss.total, expected)
    assert int(model.steps) == 6


FIT = dict(batch_size=4, lr=0.1, optimizer="sgd", device="cpu", progress=False)


def test_annealing_resumes_exactly(tmp_path):
    x, options = batch(16), dict(warmup=20)
    whole, part, resumed = (build(**options) for _ in range(3))
    expected = train.fit(whole, x, epochs=4, **FIT).history
    train.fit(part, x, epochs=2, checkpoint=tmp_path / "a.pt", **FIT)
    found = train.fit(resumed, x, epochs=4, checkpoint=tmp_path / "a.pt", resume=True, **FIT).history
    assert torch.equal(found["total"], expected["total"]) and int(resumed.steps) == 16
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_encoder_and_its_norm_run_ahead_of_the_decoder():
    model = build(encoder_steps=3, norm=FixedScaleBatchNorm(DIM, 0.7).double())
    names = dict(model.named_parameters())
    inference = {id(p) for p in model.players["encoder"][0]}
    assert {name.split(".")[0] for name, p in names.items() if id(p) in inference} == {"encoder", "norm"}
    assert inference.isdisjoint(map(id, model.players["decoder"][0]))
    assert len(names) == len(inference) + len(model.players["decoder"][0])
    history = train.fit(model, batch(16), epochs=2, **FIT).history
    assert (len(history["encoder total"]), len(history["decoder total"])) == (6, 2)
    before = [p.clone() for p in model.decoder.parameters()]
    train.fit(model, batch(12), epochs=1, **FIT)  # three steps, all of them the encoder's
    assert all(torch.equal(a, b) for a, b in zip(before, model.decoder.parameters(), strict=True))


@pytest.mark.parametrize("delta", [0.01, 0.25, 2.0])
def test_no_sentence_pays_less_than_the_committed_rate(delta):
    ends = torch.tensor([-100.0, -3.0, 0.0, 3.0, 100.0], dtype=torch.float64)
    mu, raw = torch.cartesian_prod(ends, ends).requires_grad_().split(1, 1)
    found, logvar = CommittedRate(delta)(mu, raw)
    kl = kl_to_standard_normal(found, logvar)
    assert (kl > delta - 1e-9).all()
    inner = raw[:, 0].abs() < 50
    torch.testing.assert_close(kl[inner], delta + mu.relu()[inner, 0] / 2)
    (gradient,) = torch.autograd.grad(kl.sum(), [mu])
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("delta", [0.0, -1.0, math.inf, math.nan, 1e-9, 351.0])
def test_a_rate_is_positive(delta):
    with pytest.raises(ValueError, match="delta must be a positive number of nats"):
        CommittedRate(delta)


def test_the_estimated_likelihood_is_that_of_a_grid_and_bounds_nest():
    """One dimension, where p(x) is a sum over a grid; on the same draws more samples never give more on average."""
    model, x = build(dim=1), batch(30)
    z = torch.linspace(-9, 9, 1801, dtype=torch.float64)[:, None]
    density = torch.exp(-(z[:, 0] ** 2) / 2) / math.sqrt(2 * math.pi) * 0.01
    exact = torch.stack([-(model.log_likelihood(row.expand(len(z), -1), z).exp() * density).sum().log() for row in x])
    found = importance_weighted_nll(model, x, samples=4000, generator=torch.Generator().manual_seed(0)).nll
    difference = (found - exact).detach()  # of single sentences 0.02 and more, of the mean a fifth of it
    assert difference.abs().max() < 0.1 and abs(difference.mean()) < 0.015
    eps = torch.randn(30, 500, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = model.log_weights(x, eps).detach()
    elbo = -weights.mean(1)
    groups = [math.log(k) - weights.view(30, -1, k).logsumexp(2).mean(1) for k in (5, 50, 500)]
    for looser, tighter in itertools.pairwise([elbo, *groups]):
        assert (looser >= tighter - 1e-12).all()
    assert elbo.mean() > groups[-1].mean() + 1e-4


def test_drawn_sentences_have_the_models_probabilities_and_stop_at_their_end():
    model, z = build(), codes(1)
    drawn = model.decode(z.expand(6000, DIM), 2, greedy=False, generator=torch.Generator().manual_seed(0))
    ends = drawn[:, 0] == 1
    assert ends.any() and not drawn[ends, 1].any() and (drawn[~ends] > 0).all()
    for row in [[1, 0], *itertools.product(range(2, TOKENS), range(1, TOKENS))]:
        p = model.log_likelihood(torch.tensor([list(row)]), z).exp()
        assert_z((drawn == torch.tensor(row)).all(1).double(), p.item())
    free = model.decode(z.expand(50, DIM), 5, greedy=False, end=None, generator=torch.Generator().manual_seed(0))
    assert (free > 0).all()


def test_the_greedy_sentence_takes_the_likeliest_word_each_time():
    model, z = build(), codes(9)
    x = model.decode(z, 4, end=None)
    assert torch.equal(x, model.decoder(x, z).argmax(2) + 1)


def test_samples_depend_on_the_generator_alone():
    model = build(dtype=torch.float32)
    a, b, c = (model.sample(20, length=6, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert a.shape == (20, 6) and a.dtype == torch.int64 and torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[3, 1], [0, 0]]), "none of the sentences empty"),
        (torch.rand(2, 3), "got torch.float32"),
        (torch.tensor([3, 1]), r"got torch.int64 \(2,\)"),
    ],
    ids=["an empty sentence", "no tokens", "one sentence"],
)
def test_what_is_no_batch_of_sentences_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        build().loss(x)


@pytest.mark.parametrize("norm", [FixedScaleBatchNorm(DIM, 0.7), CoupledBatchNorm(DIM, 0.5)])
def test_a_batch_of_one_has_no_statistics_and_a_plain_model_needs_none(norm):
    model = build(norm=norm).train()
    with pytest.raises(ValueError, match="2 rows in training, got 1"):
        model.loss(batch(1))
    assert torch.isfinite(build().train().loss(batch(1)).total).all()
    assert torch.isfinite(model.eval().loss(batch(1)).total).all()


@pytest.mark.parametrize(("logvar", "finite"), [(-100.0, True), (0.0, True), (100.0, False)])
def test_extreme_variances(logvar, finite):
    """A variance of exp(-100) has a divergence; one of exp(100) is none that float32 holds, and training says so."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor([0.0, 0.0, logvar, logvar]))

        def forward(self, x):
            return self.value.expand(len(x), 4)

    model = TextVAE(Constant(), nets.LSTMDecoder(TOKENS, DIM), DIM)
    if finite:
        assert torch.isfinite(model.loss(batch()).total).all()
    else:
        with pytest.raises(FloatingPointError, match="'total' is inf"):
            train.fit(model, batch(), epochs=1, **FIT)


@pytest.mark.parametrize("name", ["beta", "warmup", "free_bits", "encoder_steps"])
def test_negative_settings_are_refused(name):
    with pytest.raises(ValueError, match="must be at least 0"):
        build(**{name: -1})


def test_an_encoder_of_another_shape_is_named():
    model = build()
    model.encoder.out = nn.Linear(6, 3).double()
    with pytest.raises(ValueError, match=r"encoder must give shape \(12, 4\), got \(12, 3\)"):
        model.loss(batch())


def test_the_reader_is_given_the_codes():
    model, x, z = build(), batch(), codes(12)
    loss = CodeReader(model.decoder).loss(x, z)
    torch.testing.assert_close(loss.total, -model.log_likelihood(x, z))


# ---- the study --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text_floor", "text_bn_0.7", "text_aggressive", "text_annealed"])
def test_a_short_study_gives_its_metrics(name):
    what = study.STUDIES[name]
    outcome = what.run("learnable", "short", 0, torch.device("cpu"))
    json.dumps([outcome.metrics, outcome.curves])
    assert all(math.isfinite(value) for value in outcome.metrics.values()) and outcome.parameters > 1000
    if name == "text_floor":
        assert outcome.metrics["optimum of NLL"] > outcome.metrics["optimum given z"]
        assert outcome.samples == 320
        floor, integrated = (outcome.metrics[key] for key in ("reachable floor", "reader, z integrated"))
        assert outcome.metrics["optimum of NLL"] < integrated < floor + 1
    else:
        assert outcome.metrics["MI by batches of 32"] <= math.log(32) < outcome.metrics["cap of MI"]
        assert outcome.samples == (640 if name == "text_aggressive" else 320)  # one epoch, or one ahead and one
    if name == "text_bn_0.7":
        assert outcome.metrics["KL on batches"] > 0.999 * 8 * 0.7**2 / 2


def test_methods_are_made_as_they_are_named():
    def made(name, steps=100):
        return study.build(10, steps=steps, seed=0, **study.METHODS[name][1])

    assert made("bn_1.2").norm.gamma == 1.2 and made("coupled_0.2").norm.tau == 0.2
    assert made("delta").norm.delta == 0.25 and made("annealed").warmup == 50
    assert made("beta").beta == 0.4 and made("free_bits").free_bits == 0.25 and made("plain").norm is None
    assert made("aggressive").players["encoder"][1] == made("aggressive_half").players["encoder"][1] == 10
    assert study.settings(study.METHODS["bn_0.7_adam"][1], "learnable", "medium")["lr"] == 3e-3
    assert torch.equal(made("plain").decoder.out.weight, made("bn_0.7").decoder.out.weight)  # the same start


TABLE = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, -3.0]])  # the code of a first word


class KnownModel(nn.Module):
    """Codes without noise, to be read off the first word; a sentence costs the squared distance from its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def posterior(self, x):
        return TABLE[x[:, 0]], torch.full((len(x), 2), -40.0)

    def encode(self, x):
        return self.posterior(x)[0]

    def log_likelihood(self, x, z):
        return -(z - TABLE[x[:, 0]]).square().sum(1)

    def loss(self, x, generator=None):
        return SimpleNamespace(kl=torch.full((len(x),), 7.0 if self.training else 3.0))


def test_what_a_study_measures_of_a_known_model(monkeypatch):
    """Training sentences have four codes, test sentences two of them, and their true codes have another sign."""
    words, new = torch.arange(1, 5).repeat(100), torch.arange(1, 3).repeat(48)
    train_, test = (torch.stack([w, torch.ones_like(w)], 1) for w in (words, new))
    data = Sentences("known", None, train_, test, z_train=TABLE[words], z_test=-TABLE[new])
    seen = []

    def nll(model, x, *, samples, generator):
        seen.append((x, samples))
        return ImportanceWeighted(torch.full((len(x),), 5.0), torch.full((len(x),), 5.5))

    monkeypatch.setattr(study.metrics, "importance_weighted_nll", nll)
    found = study.measure(KnownModel().eval(), data, samples=11, coded=320, seed=0)
    ((x, samples),) = seen
    assert torch.equal(x, test) and samples == 11
    assert (found["NLL"], found["NLL, fall on doubling"]) == (5, 0.5)
    assert found["gain from z"] == pytest.approx(4, rel=1e-6)  # each sentence's neighbour has the other code
    kl = 0.5 * (4 / 2 + 2 * (40 - 1))
    assert found["KL"] == pytest.approx(kl) == found["negative ELBO"]
    assert found["KL on batches"] == 7  # in training mode
    assert found["MI"] == pytest.approx(math.log(4), abs=1e-6) and found["cap of MI"] == math.log(320)
    assert found["KL of aggregate"] == pytest.approx(0.5 * (23 / 4 + 2 * (40 - 1)) - math.log(4), rel=1e-5)
    assert found["MI by batches of 32"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["AU"] == 1  # of test sentences
    assert found["R² of z"] == pytest.approx(1 - 8, rel=1e-4)  # a map fitted to the test sentences would have 1


@pytest.mark.parametrize("name", study.METHODS)
def test_every_method_gets_the_training_that_the_settings_say(name, monkeypatch):
    """Ten epochs of two steps: all sentences of the training, the recipe, and as many steps of the decoder for all."""
    monkeypatch.setitem(study.EPOCHS, "short", 10)
    monkeypatch.setitem(study.SENTENCES, "short", 64)
    monkeypatch.setattr(study, "sentences", lambda name, size: LITTLE)
    monkeypatch.setattr(study, "measure", lambda *arguments, **options: {})
    calls, fit = [], train.fit

    def watched(model, x, y=None, **how):
        calls.append((model, x, how, fit(model, x, y, **how)))
        return calls[-1][-1]

    monkeypatch.setattr(study.train, "fit", watched)
    method = study.METHODS[name][1]
    outcome = study.run(method, "learnable", "short", 0, torch.device("cpu"))
    said = study.settings(method, "learnable", "short")
    assert said["epochs"] == 10 and said["sentences"] == 64 == len(LITTLE.train)
    *own, reference = calls
    ahead, decoder = "encoder_steps" in method, 0
    assert len(own) == 1 + ahead
    for phase, (model, x, how, history) in enumerate(own):
        assert model is own[0][0] and torch.equal(x, LITTLE.train)
        assert (how["batch_size"], how["lr"], how["clip"]) == (said["batch_size"], said["lr"], said["clip"])
        assert how["optimizer"] == method.get("optimizer", "sgd")
        decoder += len(history["decoder total" if ahead and phase == 0 else "kl"])
    assert decoder == 10 * 2
    assert outcome.samples == sum(how["epochs"] for _, _, how, _ in own) * 64
    assert len(outcome.curves["kl"]) == own[-1][2]["epochs"] <= 10
    assert [own[-1][2]["schedule"](t) for t in (0.0, 0.5, 1.0)] == [1, 0.5, 0]
    assert reference[0] is not own[0][0]  # of the times


LITTLE = synthetic("learnable", train=64, test=4)


# ---- the records ------------------------------------------------------------------------------------------------

RESULTS = Path(__file__).parents[1] / "book" / "results"


def recorded(name, key, data="learnable"):
    """Mean over seeds and its standard error, of the tables."""
    metric = json.loads((RESULTS / f"text_{name}" / f"{data}-medium.json").read_text(encoding="utf-8"))["metrics"][key]
    return metric["mean"], metric["standard error"] or 0.0


def metrics(name, data):
    """All that a record measured."""
    return json.loads((RESULTS / f"text_{name}" / f"{data}-medium.json").read_text(encoding="utf-8"))["metrics"]


def less(first, second, by=0.0, data="learnable"):
    """Whether one mean is clearly below another, four standard errors and ``by``."""
    (a, error_a), (b, error_b) = recorded(*first, data), recorded(*second, data)
    return a + by + 4 * math.hypot(error_a, error_b) < b


def test_the_chapters_reading_of_the_languages_optimum():
    assert recorded("floor", "its bracket")[0] < 0.03 and recorded("floor", "error of the bracket")[0] < 0.1
    optimum, floor, integrated = (
        recorded("floor", key)[0] for key in ("optimum of NLL", "reachable floor", "reader, z integrated")
    )
    assert optimum < integrated < floor and floor - optimum == pytest.approx(0.25, abs=0.03)
    assert less(("floor", "reader, z integrated"), ("floor", "reachable floor"))


def test_the_chapters_reading_of_what_learning_misses():
    """The plain model's divergence is 0, so that its loss on training sentences is a likelihood."""
    record = json.loads((RESULTS / "text_plain" / "he2019-medium.json").read_text(encoding="utf-8"))
    last = [
        words[-1] + kl[-1]
        for words, kl in zip(*(record["curves"][key] for key in ("reconstruction", "kl")), strict=True)
    ]
    training, new = sum(last) / len(last), record["metrics"]["NLL"]["mean"]
    assert training == pytest.approx(35.7, abs=0.05) and new == pytest.approx(38.3, abs=0.05)
    optimum = recorded("floor", "optimum of NLL", data="he2019")[0]
    assert (new - training) / (new - optimum) == pytest.approx(1 / 3, abs=0.03)


def test_the_chapters_reading_of_the_recorded_runs():
    """The sentences below the tables."""
    for name in ("plain", "plain_adam", "aggressive"):  # collapse, whose likelihood is near the optimum
        assert recorded(name, "KL")[0] < 0.01 and abs(recorded(name, "gain from z")[0]) < 0.03
        assert recorded(name, "AU")[0] == 0
        assert recorded(name, "NLL")[0] < recorded("floor", "optimum of NLL")[0] + 0.2
        assert recorded(name, "R² of z")[0] > 0.4
    assert recorded("aggressive", "training time / plain")[0] == pytest.approx(1.8, abs=0.15)
    assert recorded("aggressive_half", "training time / plain")[0] > 5 and recorded("aggressive_half", "AU")[0] == 1
    assert 0.05 < recorded("aggressive_half", "KL")[0] < 0.1
    assert recorded("annealed", "KL")[0] == pytest.approx(0.5, abs=0.15)
    assert recorded("free_bits", "KL")[0] == pytest.approx(2.08, abs=0.05)
    assert recorded("free_bits", "MI")[0] > 0.85 * recorded("free_bits", "KL")[0]
    assert recorded("delta", "KL")[0] == pytest.approx(2, abs=0.01)
    assert recorded("delta", "MI")[0] == pytest.approx(0.55 * 2, abs=0.1)
    assert recorded("beta", "MI")[0] > recorded("floor", "I(x; z)")[0] + 1
    assert recorded("beta", "MI by batches of 32")[0] == pytest.approx(3.0, abs=0.05)
    assert less(("plain", "NLL"), ("beta", "NLL"), by=0.01)
    assert recorded("beta", "NLL")[0] - recorded("plain", "NLL")[0] == pytest.approx(0.1, abs=0.05)
    assert recorded("beta", "MI")[0] == pytest.approx(4, abs=0.1)
    for name in ("beta", "bn_1.8", "coupled_0.8"):
        assert recorded(name, "R² of z")[0] <= recorded("plain_adam", "R² of z")[0]
    assert recorded("delta", "AU")[0] == 8
    assert recorded("bn_0.7", "KL on batches")[0] > 8 * 0.7**2 / 2 and recorded("bn_0.7", "AU")[0] == 8
    assert recorded("bn_0.7", "MI")[0] > 0.8 * recorded("bn_0.7", "KL")[0]
    assert less(("bn_0.7", "NLL"), ("floor", "reachable floor"))
    assert recorded("bn_0.7", "training time / plain")[0] < 1.1
    assert less(("bn_0.7_adam", "NLL"), ("floor", "reachable floor"))
    for key in ("KL", "MI", "gain from z"):
        assert recorded("bn_0.7_adam", key)[0] == pytest.approx(recorded("bn_0.7", key)[0], rel=0.05)
    assert not less(("plain_adam", "NLL"), ("bn_0.7_adam", "NLL"))
    for name in ("free_bits", "beta", "bn_0.3", "bn_0.5", "bn_0.7"):
        assert recorded(name, "MI")[0] > 0.75 * recorded(name, "KL")[0]
    for name in ("annealed", "free_bits", "delta", "beta", "bn_0.7"):
        assert less((name, "MI"), (name, "gain from z"))


GAMMAS = (0.3, 0.5, 0.7, 1.0, 1.2, 1.5, 1.8)
COUPLED = ("coupled_0.2", "coupled_0.5", "coupled_0.8")


def test_the_chapters_reading_of_the_norms():
    def of(key, *names):
        return [recorded(name, key)[0] for name in names]

    def paid(name):
        return recorded(name, "NLL")[0] - recorded("bn_0.7", "NLL")[0]

    for gamma in GAMMAS:
        assert recorded(f"bn_{gamma}", "KL on batches")[0] > 8 * gamma**2 / 2
    for tau in (0.2, 0.5, 0.8):
        assert recorded(f"coupled_{tau}", "KL on batches")[0] > -4 * math.log(1 - tau)

    def seeds(name):
        return metrics(name, "learnable")["NLL"]["by seed"]

    # Free up to 0.7, dear above 1.
    free = ("bn_0.3", "bn_0.5", "bn_0.7")
    assert all(less((name, "NLL"), ("floor", "reachable floor")) for name in free)
    assert max(of("NLL", *free)) - min(of("NLL", *free)) < 0.02
    assert of("MI", *free) == pytest.approx([1 / 3, 1, 1.8], abs=0.06)
    assert recorded("bn_1.0", "MI")[0] == pytest.approx(3, abs=0.05) and 0.01 < paid("bn_1.0") < 0.1
    assert 4.5 < recorded("bn_1.8", "MI")[0] < 5 and recorded("bn_1.8", "KL")[0] == pytest.approx(13, abs=0.5)
    assert 1.8 < recorded("bn_1.8", "KL of aggregate")[0] / 4.26 < 2
    assert paid("bn_1.8") == pytest.approx(0.7, abs=0.05) and paired(seeds("bn_0.7"), seeds("bn_1.8"))
    recorded_ones = [n for n in study.METHODS if (RESULTS / f"text_{n}" / "learnable-medium.json").exists()]
    assert len(recorded_ones) > 15
    others = [name for name in recorded_ones if name != "bn_1.8"]
    assert all(recorded(name, "gain from z")[0] < recorded("bn_1.8", "gain from z")[0] for name in others)
    # The coupled extension: as good for little information, ...
    assert of("MI", "coupled_0.2", "coupled_0.5") == pytest.approx([0.9, 2.4], abs=0.1)
    assert all(abs(paid(name)) < 0.01 for name in ("coupled_0.2", "coupled_0.5"))
    # ... better for much.
    assert recorded("coupled_0.8", "MI")[0] == pytest.approx(4.7, abs=0.05)
    assert recorded("bn_1.8", "MI")[0] - recorded("coupled_0.8", "MI")[0] == pytest.approx(0.2, abs=0.05)
    assert recorded("bn_1.5", "MI")[0] < recorded("coupled_0.8", "MI")[0] - 0.3
    assert paid("coupled_0.8") == pytest.approx(1 / 6, abs=0.02) and paid("bn_1.5") > 2 * paid("coupled_0.8")
    assert paired(seeds("coupled_0.8"), seeds("bn_1.8")) and paired(seeds("coupled_0.8"), seeds("bn_1.5"))
    mismatch = of("KL of aggregate", "coupled_0.8", "bn_1.5", "bn_1.8")
    assert mismatch == pytest.approx([1.85, 4.9, 8.2], abs=0.15)
    # The true code.
    small = of("R² of z", *free, "coupled_0.2", "coupled_0.5")
    assert min(small) > max(of("R² of z", "bn_1.0", "bn_1.2", "bn_1.5", "bn_1.8", "coupled_0.8")) + 0.05


def test_the_chapters_reading_of_the_published_language():
    def of(name, key="NLL"):
        return recorded(name, key, data="he2019")[0]

    def seeds(name, key="NLL"):
        path = RESULTS / f"text_{name}" / "he2019-medium.json"
        return json.loads(path.read_text(encoding="utf-8"))["metrics"][key]["by seed"]

    def clear(first, second, key="NLL"):
        return paired(seeds(first, key), seeds(second, key))

    optimum, integrated = of("floor", "optimum of NLL"), of("floor", "reader, z integrated")
    floor, plain = of("floor", "reachable floor"), of("plain")
    assert of("floor", "its bracket") < 0.1 and of("floor", "error of the bracket") < 0.1
    assert plain - optimum == pytest.approx(7.4, abs=0.05) and integrated - optimum == pytest.approx(7.2, abs=0.05)
    assert floor - integrated == pytest.approx(1.5, abs=0.1) and floor - plain > 1
    known = [n for n in study.METHODS if (RESULTS / f"text_{n}" / "he2019-medium.json").exists()]
    by_mixture = [n for n in known if "NLL, fall on doubling" in metrics(n, "he2019")]
    assert {"plain", "bn_0.7", "bn_1.0", "bn_1.5", "bn_1.8", "coupled_0.2", "coupled_0.5", "coupled_0.8"} <= set(
        by_mixture
    )
    assert all(of(name) < floor for name in by_mixture)
    for name in ("plain", "plain_adam", "aggressive", "aggressive_half"):
        assert of(name, "KL") < 0.0025 and of(name, "AU") == 0
    for gamma in GAMMAS:
        assert of(f"bn_{gamma}", "KL on batches") > 8 * gamma**2 / 2
    # A code costs nothing, ...
    for name in ("annealed", "free_bits", "beta", "bn_0.3", "bn_0.5", "bn_0.7", "bn_1.0", *COUPLED):
        assert of(name) < plain
    for name, by in (("bn_1.0", 0.13), ("coupled_0.5", 0.14), ("coupled_0.5_annealed", 0.2)):
        assert clear(name, "plain") and plain - of(name) == pytest.approx(by, abs=0.03)
    for name in ("bn_0.7_annealed", "coupled_0.5_annealed"):
        assert clear(name, "plain") and 0.2 < plain - of(name) < 0.24
    assert not clear("bn_0.7_annealed", "coupled_0.5_annealed")
    assert not clear("coupled_0.5_adam", "plain") and abs(of("coupled_0.5_adam") - of("coupled_0.5_annealed")) < 0.02
    assert of("bn_1.0", "MI") == pytest.approx(2.86, abs=0.1) == of("coupled_0.5", "MI")
    # ... a committed rate and too much spread do.
    assert of("delta", "MI") < 2 / 3 and of("delta") - plain == pytest.approx(0.25, abs=0.05)
    paid = [of(f"bn_{gamma}") - plain for gamma in (1.5, 1.8)]
    assert paid == pytest.approx([0.15, 0.65], abs=0.03)
    assert not clear("plain", "bn_1.5") and clear("plain", "bn_1.8")
    # The coupled extension.
    assert not clear("coupled_0.5", "bn_1.0") and not clear("bn_1.0", "coupled_0.5")
    assert clear("coupled_0.8", "bn_1.8") and of("bn_1.8") - of("coupled_0.8") == pytest.approx(0.7, abs=0.05)
    assert of("coupled_0.8", "MI") == pytest.approx(of("bn_1.8", "MI"), abs=0.1) == pytest.approx(5.6, abs=0.15)
    assert [of(name, "gain from z") for name in ("coupled_0.8", "bn_1.8")] == pytest.approx([9, 27], abs=0.5)
    assert sorted(seeds("coupled_0.5", "MI")) == pytest.approx([1.9, 2.7, 4.0], abs=0.05)
    assert seeds("coupled_0.5_annealed", "MI") == pytest.approx([2.3] * 3, abs=0.05)
    assert max(of(n, "NLL, fall on doubling") for n in by_mixture) < 0.1  # far less than the 0.7 nats
