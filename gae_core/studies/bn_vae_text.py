"""Text VAEs and what keeps their codes from collapse, on languages whose optimum is known: records ``text_...``."""

import copy
import functools
import math
import time

import torch
from torch import nn

from gae_core import languages, metrics, nets, text, train
from gae_core.gaussian import kl_to_standard_normal
from gae_core.models.text_vae import CodeReader, CommittedRate, TextVAE
from gae_core.normalization import CoupledBatchNorm, FixedScaleBatchNorm
from gae_core.records import Outcome, Study

DATA = ("learnable", "he2019")
DIM, HIDDEN, CLIP, BATCH = 8, 50, 5.0, 32
LR = {"sgd": 1.0, "adam": 3e-3}  # falls to 0 along a line
SENTENCES = {"short": 320, "medium": 16_000, "full": 300_000}
TEST = {"short": (64, 64), "medium": (1000, 400), "full": (2000, 2000)}  # for each of DATA
EPOCHS = {"short": 1, "medium": 10, "full": 10}
IMPORTANCE = {"short": 16, "medium": 512, "full": 512}
CODED = {"short": 300, "medium": 8000, "full": 20_000}  # training sentences whose codes the information is of
PRIOR = {"short": 50, "medium": 2000, "full": 10_000}  # codes drawn for the optimum
NORMS = {"gamma": FixedScaleBatchNorm, "tau": CoupledBatchNorm, "delta": lambda dim, delta: CommittedRate(delta)}
AGGRESSIVE = 0.1  # share of the decoder's steps that the encoder runs ahead of, where a method names no other

# Where a method has a rate to choose, it is two nats, of the about 2.6 and 4 that the codes of the languages carry.
METHODS: dict[str, tuple[str, dict]] = {
    "plain": ("plain VAE", {}),
    "plain_adam": ("plain VAE, trained with Adam", {"optimizer": "adam"}),
    "annealed": ("KL annealing: its weight rises from 0 over half of the training", {"warmup": 0.5}),
    "free_bits": ("free bits, 0.25 nats a dimension", {"free_bits": 0.25}),
    "beta": ("beta-VAE, beta = 0.4", {"beta": 0.4}),
    "delta": ("delta-VAE, 0.25 nats a dimension", {"delta": 0.25}),
    "aggressive": ("the encoder ahead by ten steps for one, a tenth of the training", {"encoder_steps": 10}),
    "aggressive_half": ("the encoder ahead for half of the training", {"encoder_steps": 10, "ahead": 0.5}),
    **{f"bn_{gamma}": (f"BN-VAE, gamma = {gamma}", {"gamma": gamma}) for gamma in (0.3, 0.5, 0.7, 1.0, 1.2, 1.5, 1.8)},
    "bn_0.7_adam": ("BN-VAE, gamma = 0.7, trained with Adam", {"gamma": 0.7, "optimizer": "adam"}),
    "bn_0.7_annealed": ("BN-VAE, gamma = 0.7, with KL annealing", {"gamma": 0.7, "warmup": 0.5}),
    **{f"coupled_{tau}": (f"batch norm on mu and sigma, tau = {tau}", {"tau": tau}) for tau in (0.2, 0.5, 0.8)},
    **{
        f"coupled_{tau}_{name}": (f"the same, tau = {tau}, {about}", {"tau": tau, **options})
        for tau in (0.2, 0.5)
        for name, about, options in (
            ("adam", "trained with Adam", {"optimizer": "adam"}),
            ("annealed", "with KL annealing", {"warmup": 0.5}),
        )
    },
}


@functools.cache
def sentences(data: str, size: str) -> text.Sentences:
    """Sentences of a run; all seeds and methods have the same."""
    return languages.synthetic(data, train=SENTENCES[size], test=TEST[size][DATA.index(data)])


def build(
    tokens: int, *, steps: int, seed: int, optimizer: str = "sgd", ahead: float = AGGRESSIVE, **method: float
) -> TextVAE:
    """A model with fresh weights that depend on ``seed`` alone.

    Args:
        tokens: of the vocabulary.
        steps: of the training, of which ``warmup`` is a share here.
        seed: of the weights.
        optimizer: of no use here.
        ahead: of no use here.
        **method: as in ``METHODS``.
    """
    norm = next((make(DIM, method.pop(name)) for name, make in NORMS.items() if name in method), None)
    if "warmup" in method:
        method["warmup"] = round(steps * method["warmup"])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = nets.LSTMEncoder(tokens, 2 * DIM, hidden=HIDDEN)
        return TextVAE(encoder, nets.LSTMDecoder(tokens, DIM, hidden=HIDDEN), DIM, norm=norm, **method)


def fit(
    model: nn.Module,
    data: text.Sentences,
    *,
    epochs: int,
    seed: int,
    optimizer: str = "sgd",
    ahead: float = AGGRESSIVE,
    device="auto",
):
    """Train by the recipe that all methods share; returns the history and the number of sentences seen.

    An encoder that runs ahead does so at first, for a share ``ahead`` of the decoder's steps, and then both train at
    once, until the decoder has made as many steps as with the other methods.
    """
    options = dict(batch_size=BATCH, lr=LR[optimizer], optimizer=optimizer, clip=CLIP, device=device, seed=seed)
    first = 0
    if hasattr(model, "players"):
        turn = model.players["encoder"][1] + 1
        first = max(1, round(ahead * turn * epochs))
        train.fit(model, data.train, epochs=first, **options)
        del model.players
        epochs = max(1, epochs - round(first / turn))
    history = train.fit(model, data.train, data.z_train, epochs=epochs, schedule=lambda t: 1 - t, **options)
    return history, (epochs + first) * (len(data.train) // BATCH) * BATCH


def clock(device: torch.device) -> float:
    """Seconds of this process where it computes itself, so that its neighbours do not count."""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


@torch.no_grad()
def measure(model: TextVAE, data: text.Sentences, *, samples: int, coded: int, seed: int) -> dict[str, float]:
    """The metrics of a trained model on the held-out sentences, in nats where they have a unit.

    "MI" and "KL of aggregate" are of the first ``coded`` training sentences, since the few held-out ones would cap the
    information. "NLL, fall on doubling" is how much less the estimate is than that of half as many draws. "gain from
    z": how much nearer a sentence is with a code of its own than with another sentence's. "R² of z": of the linear
    regression of the true code on the mean of q(z | x), fitted to 2,000 training sentences. "KL on batches" has the
    statistics of batches of 32, as in training, where the bounds of the batch norms hold.
    """
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    x = data.test.to(device)
    mu, logvar = model.posterior(x)
    whole = metrics.encoder_information(*model.posterior(data.train[:coded].to(device)), generator=generator)
    kl = float(kl_to_standard_normal(mu, logvar).mean())
    pairs = list(zip(mu.split(BATCH), logvar.split(BATCH), strict=True))[: len(x) // BATCH]
    parts = [metrics.encoder_information(*pair, generator=generator).mutual_information for pair in pairs]
    z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator).to(device)
    right, shuffled = (model.log_likelihood(x, code) for code in (z, z.roll(1, 0)))
    training = copy.deepcopy(model).train()
    batches = [training.loss(rows, generator=generator.manual_seed(seed)).kl for rows in x.split(BATCH)[: len(pairs)]]
    known = model.encode(data.train[:2000].to(device)).cpu().double()
    seen, new = (nn.functional.pad(m, (0, 1), value=1.0) for m in (known, mu.cpu().double()))
    fitted = new @ torch.linalg.lstsq(seen, data.z_train[:2000].double()).solution
    error, spread = (fitted - data.z_test).square().sum(), (data.z_test - data.z_test.mean(0)).square().sum()
    nll = metrics.importance_weighted_nll(model, x, samples=samples, generator=generator)
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


def settings(method: dict, data: str, size: str) -> dict:
    """All that runs must agree in."""
    return {
        "epochs": EPOCHS[size],
        "batch_size": BATCH,
        "lr": LR[method.get("optimizer", "sgd")],
        "schedule": "1 - t",
        "clip": CLIP,
        "sentences": SENTENCES[size],
        "test sentences": TEST[size][DATA.index(data)],
        "dim": DIM,
        "hidden": HIDDEN,
        "importance samples": IMPORTANCE[size],
        "proposal": "mixture",
        "sentences of the information": CODED[size],
        "method": method,
    }


def run(method: dict, name: str, size: str, seed: int, device: torch.device) -> Outcome:
    """Train and measure one method."""
    data, epochs = sentences(name, size), EPOCHS[size]
    optimizer, tokens, steps = method.get("optimizer", "sgd"), len(data.vocabulary), len(data.train) // BATCH
    model = build(tokens, steps=epochs * steps, seed=seed, **method)
    start = clock(device)
    ahead = method.get("ahead", AGGRESSIVE)
    history, seen = fit(model, data, epochs=epochs, seed=seed, optimizer=optimizer, ahead=ahead, device=device)
    seconds = clock(device) - start
    few = min(steps, 300) * BATCH  # of a plain VAE, to compare the time of training with
    plain, start = build(tokens, steps=0, seed=seed), clock(device)
    rate = dict(lr=LR["sgd"], optimizer="sgd", clip=CLIP)
    train.fit(plain, data.train[:few], epochs=1, batch_size=BATCH, device=device, **rate)
    reference = (clock(device) - start) * epochs * steps * BATCH / few
    curves = {key: history[key].view(-1, steps).mean(1).tolist() for key in ("reconstruction", "kl")}
    found = measure(model, data, samples=IMPORTANCE[size], coded=CODED[size], seed=seed)
    return Outcome(
        metrics=found | {"training time / plain": seconds / reference},
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=seen,
        curves=curves,
    )


@torch.no_grad()
def prior_nll(model: CodeReader, data: text.Sentences, *, samples: int, generator: torch.Generator) -> float:
    """-log of the mean of p(x | z) over codes drawn from the language's own p(z), the mean over the held-out sentences.

    All sentences share the draws.
    """
    language, device = languages.SyntheticLanguage(languages.RECIPES[data.name]), next(model.parameters()).device
    z = language.sample_codes(samples, generator=generator).to(device)
    found = [(-model.loss(x.expand(samples, -1), z).total.double()).logsumexp(0) for x in data.test.to(device)]
    return math.log(samples) - float(torch.stack(found).mean())


def run_floor(name: str, size: str, seed: int, device: torch.device) -> Outcome:
    """What the best and what the same decoder could reach: the language itself, and the decoder on the true codes."""
    data, generator = sentences(name, size), torch.Generator().manual_seed(seed)
    language = languages.SyntheticLanguage(languages.RECIPES[name])
    optimum = language.optimum(data.test, data.z_test, samples=PRIOR[size], generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = CodeReader(nets.LSTMDecoder(len(data.vocabulary), 2, hidden=HIDDEN))
    start = clock(device)
    history, seen = fit(model, data, epochs=EPOCHS[size], seed=seed, device=device)
    seconds = clock(device) - start
    with torch.no_grad():
        given = float(model.loss(data.test.to(device), data.z_test.to(device)).total.mean())
    error = (optimum.nll - optimum.nll_below).std() / len(data.test) ** 0.5
    return Outcome(
        metrics={
            "optimum of NLL": float(optimum.nll.mean()),
            "its bracket": float((optimum.nll - optimum.nll_below).mean()),
            "error of the bracket": float(error),
            "optimum given z": float(optimum.given_code.mean()),
            "I(x; z)": optimum.information,
            "reader given z": given,
            "reachable floor": given + optimum.information,
            "reader, z integrated": prior_nll(model, data, samples=PRIOR[size] // 2, generator=generator),
        },
        parameters=sum(p.numel() for p in model.parameters()),
        training_seconds=seconds,
        samples=seen,
        curves={"reconstruction": history["reconstruction"].view(EPOCHS[size], -1).mean(1).tolist()},
    )


STUDIES: dict[str, Study] = {
    "text_floor": Study(
        "the optimum of a language, and its decoder trained on the true codes",
        DATA,
        lambda data, size: settings({}, data, size) | {"prior samples": PRIOR[size]},
        run_floor,
    ),
    **{
        f"text_{name}": Study(
            f"text: {about}", DATA, functools.partial(settings, method), functools.partial(run, method)
        )
        for name, (about, method) in METHODS.items()
    },
}
