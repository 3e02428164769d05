"""What the game on 25 Gaussians is measured by: each player trained alone, a flat density, the penalised optimum."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core import data, metrics
from gae_core.energy import gradient_penalty_r1, penalised_optimum
from gae_core.models.meg import MEG
from gae_core.seeds import stream
from gae_core.studies import meg_plane, study
from gae_core.studies.meg_plane import density_of, divergence_of, half_side, measure_energy, measure_samples
from gae_core.studies.study import Outcome, Study
from gae_core.train import Training

TOPIC = meg_plane.TOPIC


@dataclass(frozen=True, kw_only=True)
class Recipe(meg_plane.Recipe):
    """How one player of the game is trained without the other.

    Attributes:
        steps: (1, 0) for the energy, by its likelihood with the penalty; (0, 1) for the generator, against wells that
            are as wide as the optimum under the penalty.
        points: of the normaliser's estimate in each step of the energy.
        fine: cells a side of the grid that samples of the energy are drawn from.
        neighbours: which of them the entropy of the generator's samples is estimated by.
    """

    points: int = 1024
    fine: int = 600
    neighbours: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if tuple(self.steps) not in ((1, 0), (0, 1)):
            raise ValueError(
                f"steps must be (1, 0), the energy alone, or (0, 1), the generator alone, got {self.steps}"
            )
        if self.steps[0] and self.surrogate is not None:
            raise ValueError(f"surrogate must be None for the energy alone, got {self.surrogate!r}")


@dataclass(frozen=True, kw_only=True)
class Untrained(study.Recipe):
    """What is known without a training.

    Attributes:
        scale: what the toy's coordinates are divided by.
        lam: weight of the optimum's penalty; None for the flat density.
        cells: a side of the grid of the flat density, rings of the disc of the optimum.
        draws: samples of the flat density; the optimum has none.
    """

    scale: float
    lam: float | None
    cells: int
    draws: int

    def toy(self) -> data.Toy:
        """The data's distribution."""
        return data.toy("twenty_five_gaussians").scaled(1 / self.scale)


ENERGIES: dict[str, tuple[str, int, int]] = {  # what part of the game's epochs each has, and how many times its rate
    "meg_toy_likelihood": ("at three times the rate, with half of the game's steps", 2, 3),
    "meg_toy_likelihood_brief": ("with the steps that the energy has in the game, a sixth of all", 6, 1),
}
GENERATORS: dict[str, tuple[str, dict]] = {
    "meg_fixed_jsd": ("the JSD surrogate", {"surrogate": "jsd"}),
    "meg_fixed_noise": ("noise on the samples, reconstruct z with the best sigma", meg_plane.NOISY),
    "meg_fixed_knn": ("entropy by nearest neighbours", {"surrogate": "knn"}),
}


def recipe(name: str, data_name: str, size: str) -> Recipe:
    """The recipe of a player alone: that of the game, but for what ``ENERGIES`` or ``GENERATORS`` say.

    Raises:
        ValueError: for an unknown name or size.
    """
    if name not in (*ENERGIES, *GENERATORS):
        raise ValueError(f"name must be one of {', '.join((*ENERGIES, *GENERATORS))}, got {name!r}")
    game = meg_plane.recipe("meg_toy", data_name, size)
    if name in ENERGIES:
        _, part, times = ENERGIES[name]
        changes = {"epochs": game.epochs // part, "lr": times * game.lr, "steps": (1, 0), "surrogate": None}
    else:
        changes = {"epochs": game.epochs // 3, "steps": (0, 1), "draws": 4 * game.draws, **GENERATORS[name][1]}
    return Recipe(**vars(game) | changes | {"epochs": max(1, changes["epochs"])})


def untrained(lam: float | None, data_name: str, size: str) -> Untrained:
    """The recipe of the optimum under a penalty, or of the flat density.

    Raises:
        ValueError: for an unknown size.
    """
    game = meg_plane.recipe("meg_toy", data_name, size)
    if lam is None:
        return Untrained(scale=game.scale, lam=None, cells=game.cells, draws=game.draws)
    return Untrained(scale=game.scale, lam=lam, cells=4000, draws=0)


# ---- the energy alone --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LikelihoodLoss:
    """Terms of the loss, each of shape (batch,).

    Attributes:
        total: energy + log_z + lam * penalty, what is minimised.
        energy: of data.
        log_z: logarithm of the normaliser, the same for all rows.
        penalty: squared slope of the energy at each datum.
    """

    total: Tensor
    energy: Tensor
    log_z: Tensor
    penalty: Tensor


class Likelihood(nn.Module):
    """An energy trained by its likelihood with the penalty: the game's energy, had it a perfect generator.

    The normaliser over the square is estimated in each step by importance sampling, half of the points uniform on the
    square and half around the modes, which in practice nobody knows. This is a yardstick, no method.

    Args:
        energy: module (batch, 2) -> (batch, 1).
        toy: the data's distribution.
        lam: weight of the penalty.
        points: how many.
        cells: a side of the grid that samples are drawn from.
    """

    def __init__(self, energy: nn.Module, toy: data.Toy, *, lam: float, points: int = 1024, cells: int = 600) -> None:
        super().__init__()
        self.energy, self.toy, self.lam, self.points, self.cells = energy, toy, lam, points, cells
        self.register_buffer("modes", toy.modes)
        self.half, self.wide = half_side(toy), 3 * toy.std

    def energy_of(self, x: Tensor) -> Tensor:
        """Energies in nats, (batch,)."""
        return self.energy(x)[:, 0]

    def log_z(self, *, generator: Generator | None = None) -> Tensor:
        """Estimate of the logarithm of the normaliser, a number; that of the normaliser has no bias."""
        half, wide, modes, n = self.half, self.wide, self.modes, self.points // 2
        source = {"generator": generator, "device": modes.device}
        square = (2 * torch.rand(n, 2, **source) - 1) * half
        near = modes[torch.randint(len(modes), (n,), **source)] + wide * torch.randn(n, 2, **source)
        x = torch.cat([square, near[(near.abs() < half).all(1)]])  # what lies outside of the square counts as nothing
        around = (-torch.cdist(x, modes).square() / (2 * wide**2)).exp().mean(1) / (2 * math.pi * wide**2)
        log_q = (0.5 / (2 * half) ** 2 + 0.5 * around).log()
        return (-self.energy_of(x) - log_q).logsumexp(0) - math.log(2 * n)

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> LikelihoodLoss:
        """Minus the log-likelihood of a batch x (batch, 2) with the penalty."""
        energy, penalty = self.energy_of(x), gradient_penalty_r1(self.energy_of, x)
        log_z = self.log_z(generator=generator).expand(len(x))
        return LikelihoodLoss(energy + log_z + self.lam * penalty, energy, log_z, penalty)

    def sample(self, n: int, y: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
        """Draw n points of the density, by the cells of the grid; ``y`` is not used."""
        return density_of(self, self.toy, self.cells).sample(n, generator=generator).float()


# ---- the generator alone -----------------------------------------------------------------------------------------


class Wells(nn.Module):
    """Minus the logarithm of a mixture of equal round Gaussians: an energy with Z = 1."""

    def __init__(self, modes: Tensor, std: float) -> None:
        super().__init__()
        self.register_buffer("modes", modes)
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """Energies in nats, (batch, 1)."""
        exponent = -torch.cdist(x, self.modes, compute_mode="donot_use_mm_for_euclid_dist").square() / 2 / self.std**2
        return (math.log(2 * math.pi * self.std**2 * len(self.modes)) - exponent.logsumexp(1))[:, None]


class Alone(MEG):
    """A MEG whose energy stands still: its density is known, and how far the surrogate takes the samples is seen."""

    @property
    def players(self) -> dict:
        """The generator's, with the statistics."""
        return {"generator": super().players["generator"]}


def build(recipe: Recipe, shape: Sequence[int], seed: int) -> Likelihood | Alone:
    """The player that has steps, with the first weights that it has in the game of that seed."""
    generator, energy, statistics = meg_plane.networks(recipe, shape, seed)
    toy = recipe.toy()
    if recipe.steps[0]:
        return Likelihood(energy, toy, lam=recipe.lam, points=recipe.points, cells=recipe.fine)
    return Alone(
        generator,
        Wells(toy.modes, penalised_optimum(recipe.lam, toy.std).spread * toy.std),
        recipe.dim,
        surrogate=recipe.surrogate,
        statistics=statistics,
        weight=recipe.weight,
        sigma=recipe.sigma,
        noise=recipe.noise,
        generator_steps=recipe.steps[1],
    )


def run_energy(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train the energy by likelihood, and measure it as the game's, its draws as samples."""
    return meg_plane.run(recipe, data_name, seed, device, build=build)


def measure_wells(x: Tensor, wells: Wells, *, neighbours: int) -> dict[str, float]:
    """KL(samples | exp(-U)) in nats of samples x (n, 2), the entropy by nearest neighbours, and what it is made of.

    The part of the shares is that of which modes the samples are at. What is left is how they lie within.
    """
    kl = divergence_of(x, lambda x: wells(x)[:, 0], log_z=0.0, neighbours=neighbours)
    shares = metrics.mode_count(torch.cdist(x, wells.modes).argmin(1), torch.ones(len(wells.modes))).kl
    return {
        "modes of 25": metrics.mode_quality(x, wells.modes, wells.std).modes,
        "KL(samples | energy)": kl,
        "KL of mode shares": shares,
        "KL within modes": kl - shares,
    }


def run_generator(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train a generator against wells, and measure its divergence from their density."""
    rows = torch.zeros(recipe.rows, 2)  # of which the generator takes the number
    model = build(recipe, rows.shape[1:], seed)
    training = recipe.fit(model, rows, seed=seed, device=device)
    sample = model.sample(recipe.draws, generator=stream(seed, "samples")).cpu()
    measured = measure_wells(sample, model.energy.cpu(), neighbours=recipe.neighbours)
    information = float(training.history["generator information"][-100:].mean())
    return Outcome({**measured, "information": information}, training)


# ---- without a training ------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """The energy that knows nothing."""

    def energy_of(self, x: Tensor) -> Tensor:
        """0 everywhere, (batch,)."""
        return x.new_zeros(len(x))


def measure_untrained(recipe: Untrained, seed: int) -> dict[str, float]:
    """The flat density with samples of it, at the bottom of the table; or what perfect training would reach."""
    toy = recipe.toy()
    if recipe.lam is None:
        sample = density_of(Flat(), toy, recipe.cells).sample(recipe.draws, generator=stream(seed, "samples"))
        measured = measure_samples(sample.float(), toy) | measure_energy(Flat(), toy, recipe.cells)
        return measured | {"slope² at data": 0.0}
    best = penalised_optimum(recipe.lam, toy.std, cells=recipe.cells)
    return {
        "modes of 25": 25,
        "high quality, %": 100 * best.high_quality,
        "spread, σ": best.spread,
        "KL of mode shares": 0.0,
        "spread within 3σ, σ": best.spread_within,
        "KL(data | energy)": best.kl,
        "energy: high quality, %": 100 * best.high_quality,
        "energy: spread, σ": best.spread,
        "slope² at data": best.slope,
    }


def run_untrained(recipe: Untrained, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Measure what nobody trains."""
    nothing = Training(history={}, seconds=0.0, processor_seconds=0.0, rows=0, parameters=0)
    return Outcome(measure_untrained(recipe, seed), nothing)


STUDIES: dict[str, Study] = {
    **{
        name: Study(
            f"25 Gaussians: the energy alone, trained by likelihood with the penalty, {about}",
            TOPIC,
            ("plane",),
            functools.partial(recipe, name),
            run_energy,
        )
        for name, (about, *_) in ENERGIES.items()
    },
    "meg_toy_flat": Study(
        "25 Gaussians: a flat density", TOPIC, ("plane",), functools.partial(untrained, None), run_untrained
    ),
    **{
        name: Study(
            f"25 wells that stand still: {about}", TOPIC, ("plane",), functools.partial(recipe, name), run_generator
        )
        for name, (about, _) in GENERATORS.items()
    },
    **{
        f"meg_optimum_{lam:g}": Study(
            f"25 Gaussians: what perfect training reaches with lambda = {lam:g}",
            TOPIC,
            ("plane",),
            functools.partial(untrained, lam),
            run_untrained,
        )
        for lam in (0.1, *meg_plane.LAMS)
    },
}
