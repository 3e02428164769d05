"""Streams of randomness: named, repeatable, and no two of a run share draws."""

import itertools
import math
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

from gae_core import seeds, train
from gae_core.models.vae import VAE
from gae_core.nets import mlp_pair
from gae_core.seeds import STREAMS, fresh, seed_of, stream
from gae_core.studies import registry


def test_a_stream_is_its_seed_and_name():
    for name in STREAMS:
        first, again, other = (torch.randn(9, generator=stream(seed, name)) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)
    numbers = {seed_of(seed, name, i) for seed in range(50) for name in STREAMS for i in range(3)}
    assert len(numbers) == 50 * len(STREAMS) * 3 and all(0 <= n < 2**32 for n in numbers)


def correlation(a, b):
    return abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]))


@pytest.mark.parametrize("seed", [0, 3])
def test_no_two_streams_of_a_run_share_draws(seed):
    n = 4096
    normal = {name: torch.randn(n, generator=stream(seed, name)) for name in STREAMS}
    uniform = {name: torch.rand(n, generator=stream(seed, name)) for name in STREAMS}
    for (a, x), (b, y) in itertools.product(normal.items(), (normal | uniform).items()):
        if a != b and uniform.get(b) is y:
            assert correlation(x, y) < 5 / math.sqrt(n), (a, b)
    for a, b in itertools.combinations(STREAMS, 2):
        assert correlation(normal[a], normal[b]) < 5 / math.sqrt(n), (a, b)
        assert not set(map(tuple, uniform[a].view(-1, 2).tolist())) & set(map(tuple, uniform[b].view(-1, 2).tolist()))


@pytest.mark.parametrize("separate", [True, False])
def test_a_trainings_noise_is_no_function_of_its_weights(separate):
    """The log-radius of pairs of the first noise beside the first weights, which one state for both makes equal."""
    seed = 3
    with fresh(seed):
        model = VAE(*mlp_pair((1, 28, 28), 8, hidden=(256, 128), heads=2), 8)
    weights = next(model.parameters()).detach().flatten()[:512]
    if not separate:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights = nn.Linear(784, 256).weight.detach().flatten()[:512]
    drawn = []

    class Listening(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def loss(self, x, y=None, *, generator):
            drawn.append(torch.randn(512, generator=generator.clone_state()))
            return self.model.loss(x, generator=generator)

    if separate:
        train.fit(Listening(), torch.rand(8, 1, 28, 28), epochs=1, batch_size=8, seed=seed, device="cpu")
        noise = drawn[0]
    else:
        noise = torch.randn(512, generator=torch.Generator().manual_seed(seed))
    radius = noise.view(-1, 2, 8).square().sum(1).log().flatten()  # torch makes normals in pairs, eight at a time
    assert (correlation(radius, weights.view(-1, 2, 8)[:, 0]) > 0.8) != separate


def test_weights_are_drawn_from_their_stream_and_the_generator_is_set_back():
    before = torch.random.get_rng_state()
    with fresh(2):
        inside = torch.randn(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(inside, torch.randn(5, generator=stream(2, "weights")))
    with fresh(2, 1):
        assert not torch.equal(inside, torch.randn(5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, "nosie"), "name must be one of weights, "), ((-1, "noise"), "whole numbers"), ((0.5, "noise"), "whole")],
)
def test_bad_streams_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        stream(*arguments)


# What one run begins twice, and why: codes of the measure are those of the picture; fixed data are the same wherever
# they are needed; two densities are compared on the same draws; several models of one run are compared seed by seed.
TWICE = {
    "eae": {("samples",), ("density",)},
    "vae_k1": {("data",)},
    "cvae_mixture": set(),
    "completion_2": {("data",)},
    "dae_walkback5": set(),
    "bn_vae_gamma0.7": set(),
    "bn_vae_estimates": {("weights",), ("order",), ("noise",), ("evaluation",)},
    "text_aggressive": set(),
    "text_floor": set(),
    "image_prior_two_runs": set(),
    "family_eae": {("data", 1), ("data", 2), ("evaluation", 0)},
    "family_nmf": {("data", 1), ("data", 2), ("evaluation", 0)},
    "meg_toy": set(),
    "meg_mcmc_prior": set(),
    "meg_toy_likelihood": set(),
    "meg_without_9": set(),
}


@pytest.mark.parametrize("name", TWICE)
def test_no_two_uses_of_a_run_begin_in_one_state(name, monkeypatch, tmp_path):
    """At seed 0, which the judge and the fixed data have too."""
    monkeypatch.setenv("GAE_DATA", str(tmp_path))
    study, begun, judged = registry.STUDIES[name], {}, set()
    sequence = seeds.np.random.SeedSequence

    def watched(entropy, spawn_key):
        by = [frame.filename for frame in traceback.extract_stack() if "gae_core" in frame.filename]
        if any(file.endswith("judge.py") for file in by):  # which is asked for again and again
            judged.add((entropy, spawn_key))
        else:
            begun.setdefault((entropy, spawn_key), []).append(by[-2:])
        return sequence(entropy, spawn_key=spawn_key)

    data_name = "digits" if "digits" in study.data else study.data[0]
    recipe = study.recipe(data_name, "short")
    monkeypatch.setattr(seeds.np.random, "SeedSequence", watched)
    outcome = study.run(recipe, data_name, 0, torch.device("cpu"))
    assert begun and outcome.metrics and not judged & begun.keys()
    twice = {key for key, uses in begun.items() if len(uses) > 1}
    assert {(STREAMS[key[0]], *key[1:]) for entropy, key in twice if entropy == 0} == TWICE[name]
    assert not {entropy for entropy, _ in twice if entropy}, "a seed that was made of another is used twice"


def test_no_generator_is_begun_beside_the_streams():
    """But for what has no seed of a run: the weights that define a language, and the starts of a search."""
    found = {}
    for path in Path(seeds.__file__).parent.rglob("*.py"):
        if path.name != "seeds.py" and (n := path.read_text(encoding="utf-8").count("manual_seed(")):
            found[path.name] = n
    assert found == {"languages.py": 1, "gae.py": 1}
