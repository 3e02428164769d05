"""Maximum-entropy generators beside the same GAN without the entropy and a WGAN-GP: records ``meg_...``."""

import functools
import math
import time
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from gae_core import data, metrics, nets, train
from gae_core.models.meg import MEG, WGANGP
from gae_core.records import Outcome, Study

BETAS = (0.5, 0.9)  # of Adam, as in the authors' code
SCALE = math.sqrt(8)  # the toy's coordinates are divided by it, as there: its lam = 0.1 belongs to these units


@dataclass(frozen=True)
class Size:
    """How long a run is.

    Attributes:
        width: of each hidden layer.
        rows: of data.
        epochs: passes over them, all players' steps counted.
        batch_size: rows of a step.
        lr: learning rate of all players.
        falling: whether it falls to 0 along a line.
        steps: of MEG and the plain GAN in a round, the energy's and the generator's.
        features: scale of the Fourier features of energy and statistics, 0 for none.
    """

    width: int
    rows: int
    epochs: int
    batch_size: int
    lr: float
    falling: bool
    steps: tuple[int, int]
    features: float

    def settings(self) -> dict:
        """What the training depends on."""
        return {**vars(self), "steps": list(self.steps), "betas": list(BETAS)}

    def fit(self, model: nn.Module, x: Tensor, *, seed: int, device: torch.device) -> tuple[train.History, float, int]:
        """Train by this recipe: history, seconds, rows seen."""
        start = time.perf_counter()
        history = train.fit(
            model,
            x,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            betas=BETAS,
            schedule=(lambda t: 1 - t) if self.falling else None,
            seed=seed,
            device=device,
            progress=False,
        )
        seen = self.epochs * (len(x) // self.batch_size) * self.batch_size
        return history, time.perf_counter() - start, seen


def judge_net(inputs: int, width: int, outputs: int, features: float) -> nn.Module:
    """Three hidden layers for an energy or statistics: on Fourier features, or as the authors have it."""
    if features:
        return nn.Sequential(
            nets.FourierFeatures(inputs, width // 2, features),
            nets.mlp([inputs + width, width, width, width, outputs], activation=nn.SiLU),
        )
    return nets.mlp([inputs, width, width, width, outputs], activation=functools.partial(nn.LeakyReLU, 0.2))


# ---- 25 Gaussians ------------------------------------------------------------------------------------------------

TOY = {
    "short": Size(16, 2560, 1, 128, 1e-3, True, (1, 3), 2.0),
    "medium": Size(64, 51_200, 20, 128, 1e-3, True, (1, 3), 2.0),
    "full": Size(512, 100_000, 1536, 256, 1e-4, False, (5, 1), 0.0),  # the authors' 100,000 rounds
}
TOY_DIM = 2
AHEAD = {"energy_steps": 5, "generator_steps": 1}
TOY_MODELS: dict[str, tuple[str, dict]] = {
    "meg_toy": ("MEG, JSD surrogate", {"surrogate": "jsd"}),
    "meg_toy_reconstruct": ("MEG, reconstruct-z surrogate", {"surrogate": "reconstruct"}),
    "meg_toy_plain": ("the same GAN without the entropy", {"surrogate": None}),
    "meg_toy_plain_ahead": ("the same, the energy five steps ahead", {"surrogate": None, **AHEAD}),
    "meg_toy_wgan_gp": ("WGAN-GP", {"lam": 0.1}),
    **{
        f"meg_toy_{lam:g}": (f"MEG, JSD surrogate, lambda = {lam:g}", {"surrogate": "jsd", "lam": lam})
        for lam in (1e-2, 1e-3, 1e-4)
    },
}


def scaled(toy: data.Toy, scale: float) -> data.Toy:
    """A toy with Gaussian modes in coordinates divided by ``scale``."""

    def sample(n: int, generator: torch.Generator | None = None) -> Tensor:
        return toy.sample(n, generator) / scale

    def log_prob(x: Tensor) -> Tensor:
        return toy.log_prob(scale * x) + 2 * math.log(scale)

    return data.Toy(toy.name, sample, log_prob, toy.modes / scale, toy.std / scale)


def build_toy(name: str, size: Size, seed: int) -> MEG:
    """A model of ``TOY_MODELS`` for the plane, with fresh weights that depend on ``seed`` alone."""
    options, width = TOY_MODELS[name][1], size.width
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        generator = nets.mlp([TOY_DIM, width, width, width, 2])
        energy = judge_net(2, width, 1, size.features)
        if name == "meg_toy_wgan_gp":
            return WGANGP(generator, energy, TOY_DIM, **options)
        inputs, outputs = {"jsd": (2 + TOY_DIM, 1), "reconstruct": (2, TOY_DIM)}.get(options["surrogate"], (0, 0))
        steps = dict(zip(("energy_steps", "generator_steps"), size.steps, strict=True))
        statistics = judge_net(inputs, width, outputs, size.features) if inputs else None
        return MEG(generator, energy, TOY_DIM, statistics=statistics, **{**steps, **options})


def grid_of(toy: data.Toy, cells: int = 600) -> tuple[Tensor, float]:
    """Midpoints (cells², 2) of a grid over the square that reaches half again as far as the modes, and a cell's area.

    In the toy's own units a cell is 0.4 standard deviations wide.
    """
    half = 1.5 * float(toy.modes.abs().max())
    axis = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 * half - half
    return torch.cartesian_prod(axis, axis), (2 * half / cells) ** 2


def toy_density(model: MEG, toy: data.Toy, cells: int = 600) -> tuple[float, Tensor]:
    """KL(truth | exp(-U) / Z) in nats, Z by quadrature on the grid, and the density on it, (cells, cells)."""
    points, area = grid_of(toy, cells)
    log_p = toy.log_prob(points)
    log_q = -metrics.in_batches(model.energy_of, points.float(), batch_size=20_000).double()
    log_q = log_q - log_q.logsumexp(0) - math.log(area)
    return float((log_p.exp() * area * (log_p - log_q)).sum()), log_q.exp().reshape(cells, cells)


def draw_toy(model: MEG, toy: data.Toy, x: Tensor) -> Figure:
    """Samples, and the density of the learned energy."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    half = 1.5 * float(toy.modes.abs().max())
    axes[0].scatter(x[:, 0], x[:, 1], s=2, alpha=0.4, linewidths=0)
    axes[0].scatter(toy.modes[:, 0], toy.modes[:, 1], s=60, marker="+", color="tab:red", linewidths=0.8)
    axes[0].set(title="samples, modes (+)", xlim=(-half, half), ylim=(-half, half), aspect="equal")
    _, density = toy_density(model, toy, 300)
    log_density = density.T.clamp_min(1e-8).log10()
    axes[1].imshow(log_density, origin="lower", extent=(-half, half, -half, half), vmin=-3, cmap="viridis")
    axes[1].set(title=r"$\log_{10}$ of $e^{-U}/Z$")
    return figure


def run_toy(name: str, _data: str, size: str, seed: int, device: torch.device) -> Outcome:
    """Train and measure one model on the toy."""
    recipe, toy = TOY[size], scaled(data.toy("twenty_five_gaussians"), SCALE)
    generator = torch.Generator().manual_seed(seed)
    x, model = toy.sample(recipe.rows, generator), build_toy(name, recipe, seed)
    history, seconds, seen = recipe.fit(model, x, seed=seed, device=device)
    sample = model.sample(2500, generator=generator).cpu()
    quality = metrics.mode_quality(sample, toy.modes, toy.std)
    measured = {
        "modes of 25": quality.modes,
        "high quality, %": 100 * quality.high_quality,
        "spread, σ": quality.spread,
        "KL of mode shares": quality.kl,
    }
    if name != "meg_toy_wgan_gp":  # whose critic is no energy
        measured["KL(data | energy)"], _ = toy_density(model, toy)
        measured["slope² at data"] = float(history["energy penalty"][-100:].mean())
    if model.surrogate is not None:
        measured["information"] = float(history["generator information"][-100:].mean())
    parameters = sum(p.numel() for p in model.parameters())
    return Outcome(measured, parameters, seconds, seen, figure=draw_toy(model, toy, sample))


def toy_settings(name: str, _data: str, size: str) -> dict:
    """Settings of a run on the toy."""
    recipe = TOY[size]
    model = build_toy(name, recipe, 0)
    return recipe.settings() | {
        "lam": model.lam,
        "surrogate": model.surrogate,
        "weight": model.weight,
        "sigma": model.sigma,
        "steps": [model.energy_steps, model.generator_steps],
        "dim": TOY_DIM,
        "scale": SCALE,
    }


STUDIES: dict[str, Study] = {
    name: Study(
        f"25 Gaussians: {about}", ("plane",), functools.partial(toy_settings, name), functools.partial(run_toy, name)
    )
    for name, (about, _) in TOY_MODELS.items()
}
