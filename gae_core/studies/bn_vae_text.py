"""Text VAEs and what keeps their codes from collapse, on languages whose optimum is known: records ``text_...``."""

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import nn

from gae_core import languages, metrics, nets, text
from gae_core.gaussian import kl_to_standard_normal
from gae_core.models.text_vae import CodeReader, CommittedRate, TextVAE
from gae_core.normalization import CoupledBatchNorm, FixedScaleBatchNorm
from gae_core.seeds import fresh, seed_of, stream
from gae_core.studies.study import Outcome, Study, Trained, together
from gae_core.train import Training

DATA = ("learnable", "he2019")


@dataclass(frozen=True, kw_only=True)
class Recipe(Trained):
    """How a model is made, trained and measured. What a method does not name is as in a plain VAE.

    Attributes:
        warmup: share of the training in which the weight of the divergence rises from 0.
        free_bits: nats a dimension that cost nothing.
        beta: weight of the divergence.
        delta: nats a dimension that are committed.
        gamma: of the batch norm on mu.
        tau: of the batch norm on mu and sigma.
        encoder_steps: of the encoder for one of the decoder, while it runs ahead.
        ahead: share of the decoder's steps in which it does.
        dim: of the code.
        hidden: of the LSTMs.
        sentences: for training.
        test: sentences held out.
        samples: importance samples of the likelihood.
        coded: training sentences whose codes the information is of.
        prior: codes drawn for the optimum.
    """

    batch_size: int = 32
    lr: float = 1.0
    optimizer: str = "sgd"
    clip: float | None = 5.0
    warmup: float | None = None
    free_bits: float | None = None
    beta: float | None = None
    delta: float | None = None
    gamma: float | None = None
    tau: float | None = None
    encoder_steps: int | None = None
    ahead: float = 0.1
    dim: int = 8
    hidden: int = 50
    sentences: int = 16_000
    test: int
    samples: int = 512
    coded: int = 8000
    prior: int = 2000


SIZES = {  # and of the test sentences, for each of DATA
    "short": ({"epochs": 1, "sentences": 320, "samples": 16, "coded": 300, "prior": 50}, (64, 64)),
    "medium": ({"epochs": 10}, (1000, 400)),
    "full": ({"epochs": 10, "sentences": 300_000, "coded": 20_000, "prior": 10_000}, (2000, 2000)),
}
ADAM = {"optimizer": "adam", "lr": 3e-3}
NORMS = {"gamma": FixedScaleBatchNorm, "tau": CoupledBatchNorm, "delta": lambda dim, delta: CommittedRate(delta)}

# Where a method has a rate to choose, it is two nats, of the about 2.6 and 4 that the codes of the languages carry.
METHODS: dict[str, tuple[str, dict]] = {
    "plain": ("plain VAE", {}),
    "plain_adam": ("plain VAE, trained with Adam", ADAM),
    "annealed": ("KL annealing: its weight rises from 0 over half of the training", {"warmup": 0.5}),
    "free_bits": ("free bits, 0.25 nats a dimension", {"free_bits": 0.25}),
    "beta": ("beta-VAE, beta = 0.4", {"beta": 0.4}),
    "delta": ("delta-VAE, 0.25 nats a dimension", {"delta": 0.25}),
    "aggressive": ("the encoder ahead by ten steps for one, a tenth of the training", {"encoder_steps": 10}),
    "aggressive_half": ("the encoder ahead for half of the training", {"encoder_steps": 10, "ahead": 0.5}),
    **{f"bn_{gamma}": (f"BN-VAE, gamma = {gamma}", {"gamma": gamma}) for gamma in (0.3, 0.5, 0.7, 1.0, 1.2, 1.5, 1.8)},
    "bn_0.7_adam": ("BN-VAE, gamma = 0.7, trained with Adam", {"gamma": 0.7, **ADAM}),
    "bn_0.7_annealed": ("BN-VAE, gamma = 0.7, with KL annealing", {"gamma": 0.7, "warmup": 0.5}),
    **{f"coupled_{tau}": (f"batch norm on mu and sigma, tau = {tau}", {"tau": tau}) for tau in (0.2, 0.5, 0.8)},
    **{
        f"coupled_{tau}_{name}": (f"the same, tau = {tau}, {about}", {"tau": tau, **options})
        for tau in (0.2, 0.5)
        for name, about, options in (
            ("adam", "trained with Adam", ADAM),
            ("annealed", "with KL annealing", {"warmup": 0.5}),
        )
    },
}


def recipe(method: dict, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run, from what sets its method apart."""
    options, tests = SIZES[size]
    return Recipe(**{**options, "test": tests[DATA.index(data_name)], **method})


@functools.cache
def sentences(name: str, n_train: int, n_test: int) -> text.Sentences:
    """Sentences of a run; all seeds and methods have the same."""
    return languages.synthetic(name, train=n_train, test=n_test)


def build(recipe: Recipe, tokens: int, seed: int) -> TextVAE:
    """A model for a vocabulary of so many tokens, with fresh weights that depend on ``seed`` alone."""
    named = ("free_bits", "beta", "encoder_steps", *NORMS)
    given = {name: value for name in named if (value := getattr(recipe, name)) is not None}
    if recipe.warmup is not None:
        given["warmup"] = round(recipe.warmup * recipe.epochs * (recipe.sentences // recipe.batch_size))
    with fresh(seed):
        norm = next((make(recipe.dim, given.pop(name)) for name, make in NORMS.items() if name in given), None)
        encoder = nets.LSTMEncoder(tokens, 2 * recipe.dim, hidden=recipe.hidden)
        decoder = nets.LSTMDecoder(tokens, recipe.dim, hidden=recipe.hidden)
        return TextVAE(encoder, decoder, recipe.dim, norm=norm, **given)


def fit(model: nn.Module, data: text.Sentences, recipe: Recipe, *, seed: int, device="auto") -> Training:
    """Train by a recipe; the history is that of the training of both networks at once.

    An encoder that runs ahead does so at first, for a share of the decoder's steps, and then both train at once, until
    the decoder has made as many steps as with the other methods.
    """
    if not hasattr(model, "players"):
        return recipe.fit(model, data.train, data.z_train, seed=seed, device=device)
    turn = model.players["encoder"][1] + 1
    first = max(1, round(recipe.ahead * turn * recipe.epochs))
    alone = dataclasses.replace(recipe, epochs=first, schedule="constant")
    ahead = alone.fit(model, data.train, seed=seed_of(seed, "other training", 1), device=device)
    model.train_together()
    rest = dataclasses.replace(recipe, epochs=max(1, recipe.epochs - round(first / turn)))
    then = rest.fit(model, data.train, data.z_train, seed=seed, device=device)
    return dataclasses.replace(together([ahead, then]), history=then.history)


@torch.no_grad()
def measure(model: TextVAE, data: text.Sentences, recipe: Recipe, *, seed: int) -> dict[str, float]:
    """The metrics of a trained model on the held-out sentences, in nats where they have a unit.

    "MI" and "KL of aggregate" are of the first training sentences, as many as the recipe says, since the few held-out
    ones would cap the information. "NLL, fall on doubling" is how much less the estimate is than that of half as many
    draws. "gain from z": how much nearer a sentence is with a code of its own than with another sentence's. "R² of z":
    of the linear regression of the true code on the mean of q(z | x), fitted to 2,000 training sentences. "KL on
    batches" has the statistics of batches as in training, where the bounds of the batch norms hold.
    """
    generator, device = stream(seed, "evaluation"), next(model.parameters()).device
    batch = recipe.batch_size
    x = data.test.to(device)
    mu, logvar = model.posterior(x)
    whole = metrics.encoder_information(*model.posterior(data.train[: recipe.coded].to(device)), generator=generator)
    kl = float(kl_to_standard_normal(mu, logvar).mean())
    pairs = list(zip(mu.split(batch), logvar.split(batch), strict=True))[: len(x) // batch]
    parts = [metrics.encoder_information(*pair, generator=generator).mutual_information for pair in pairs]
    z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator).to(device)
    right, shuffled = (model.log_likelihood(x, code) for code in (z, z.roll(1, 0)))
    training, noise = copy.deepcopy(model).train(), stream(seed, "evaluation", 1, device=device)
    batches = [training.loss(rows, generator=noise).kl for rows in x.split(batch)[: len(pairs)]]
    old = model.encode(data.train[:2000].to(device)).cpu().double()
    old, new = (nn.functional.pad(m, (0, 1), value=1.0) for m in (old, mu.cpu().double()))
    fitted = new @ torch.linalg.lstsq(old, data.z_train[:2000].double()).solution
    error, spread = (fitted - data.z_test).square().sum(), (data.z_test - data.z_test.mean(0)).square().sum()
    nll = metrics.importance_weighted_nll(model, x, samples=recipe.samples, generator=generator)
    return {
        "NLL": float(nll.nll.mean()),
        "NLL, fall on doubling": float((nll.halved - nll.nll).mean()),
        "negative ELBO": float(kl - right.mean()),
        "KL": kl,
        "KL on batches": float(torch.cat(batches).mean()),
        "MI": whole.mutual_information,
        "cap of MI": whole.cap,
        "MI by batches of 32": sum(parts) / len(parts),
        "KL of aggregate": whole.kl_aggregate,
        "AU": float(metrics.active_units(mu)),
        "gain from z": float((right - shuffled).mean()),
        "R² of z": float(1 - error / spread),
    }


def run(recipe: Recipe, name: str, seed: int, device: torch.device) -> Outcome:
    """Train and measure one method."""
    data = sentences(name, recipe.sentences, recipe.test)
    tokens, steps = len(data.vocabulary), len(data.train) // recipe.batch_size
    model = build(recipe, tokens, seed)
    training = fit(model, data, recipe, seed=seed, device=device)
    few = min(steps, 300) * recipe.batch_size  # of a plain VAE, to compare the time of training with
    brief = Recipe(epochs=1, test=recipe.test, dim=recipe.dim, hidden=recipe.hidden, schedule="constant")
    other = seed_of(seed, "other training")
    plain = brief.fit(build(brief, tokens, other), data.train[:few], seed=other, device=device)
    own, per_row = (
        t.seconds if device.type == "cuda" else t.processor_seconds for t in (training, plain)
    )  # other processes do not count
    reference = per_row / plain.rows * recipe.epochs * steps * recipe.batch_size
    curves = {key: training.history[key].view(-1, steps).mean(1).tolist() for key in ("reconstruction", "kl")}
    measured = measure(model, data, recipe, seed=seed)
    return Outcome(measured | {"training time / plain": own / reference}, training, curves=curves)


@torch.no_grad()
def prior_nll(model: CodeReader, data: text.Sentences, *, samples: int, generator: torch.Generator) -> float:
    """-log of the mean of p(x | z) over codes drawn from the language's own p(z), the mean over the held-out sentences.

    All sentences share the draws.
    """
    language, device = languages.SyntheticLanguage(languages.RECIPES[data.name]), next(model.parameters()).device
    z = language.sample_codes(samples, generator=generator).to(device)
    log_p = [(-model.loss(x.expand(samples, -1), z).total.double()).logsumexp(0) for x in data.test.to(device)]
    return math.log(samples) - float(torch.stack(log_p).mean())


def run_floor(recipe: Recipe, name: str, seed: int, device: torch.device) -> Outcome:
    """What the best and what the same decoder could reach: the language itself, and the decoder on the true codes."""
    data, generator = sentences(name, recipe.sentences, recipe.test), stream(seed, "evaluation")
    language = languages.SyntheticLanguage(languages.RECIPES[name])
    optimum = language.optimum(data.test, data.z_test, samples=recipe.prior, generator=generator)
    with fresh(seed):
        model = CodeReader(nets.LSTMDecoder(len(data.vocabulary), 2, hidden=recipe.hidden))
    training = fit(model, data, recipe, seed=seed, device=device)
    with torch.no_grad():
        given = float(model.loss(data.test.to(device), data.z_test.to(device)).total.mean())
    error = (optimum.nll - optimum.nll_below).std() / len(data.test) ** 0.5
    return Outcome(
        {
            "optimum of NLL": float(optimum.nll.mean()),
            "its bracket": float((optimum.nll - optimum.nll_below).mean()),
            "error of the bracket": float(error),
            "optimum given z": float(optimum.given_code.mean()),
            "I(x; z)": optimum.information,
            "reader given z": given,
            "reachable floor": given + optimum.information,
            "reader, z integrated": prior_nll(model, data, samples=recipe.prior // 2, generator=generator),
        },
        training,
        curves={"reconstruction": training.history["reconstruction"].view(recipe.epochs, -1).mean(1).tolist()},
    )


STUDIES: dict[str, Study] = {
    "text_floor": Study(
        "the optimum of a language, and its decoder trained on the true codes",
        "bn_vae_text",
        DATA,
        functools.partial(recipe, {}),
        run_floor,
    ),
    **{
        f"text_{name}": Study(f"text: {about}", "bn_vae_text", DATA, functools.partial(recipe, method), run)
        for name, (about, method) in METHODS.items()
    },
}
