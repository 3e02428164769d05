"""Maximum-entropy generators on 25 Gaussians, beside the same GAN without the entropy and a WGAN-GP: ``meg_toy...``."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from gae_core import data, metrics, nets
from gae_core.energy import GridDensity, gradient_penalty_r1, log_normalizer_2d
from gae_core.entropy import knn_entropy
from gae_core.models.meg import MEG, WGANGP
from gae_core.seeds import fresh, stream
from gae_core.studies.study import Outcome, Study, Trained, check_known

TOPIC = "meg"
SCALE = math.sqrt(
    8
)  # the toy's coordinates are divided by it, as in the authors' code: its lam = 0.1 is for these units
SIGMA = 0.05 / SCALE  # of the toy's modes


@dataclass(frozen=True, kw_only=True)
class Game(Trained):
    """How an energy and a generator play, on whatever data.

    Attributes:
        width: of each hidden layer.
        rows: of data.
        steps: in a round, the energy's and the generator's.
        dim: of the code.
        lam: weight of the penalty.
        penalty: of the energy's slope: "r1" at the data, "wgan" between data and samples.
        surrogate: of the samples' entropy; it and what follows as in :class:`gae_core.models.meg.MEG`.
        weight: of the surrogate.
        sigma: of the reconstruction, None for the best.
        noise: standard deviation of that on the samples.
    """

    width: int
    rows: int
    steps: tuple[int, int]
    dim: int
    lam: float
    penalty: str = "r1"
    surrogate: str | None = "jsd"
    weight: float = 1.0
    sigma: float | None = 0.5
    noise: float = 0.0
    betas: tuple[float, float] = (0.5, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty not in ("r1", "wgan"):
            raise ValueError(f'penalty must be "r1" or "wgan", got {self.penalty!r}')
        if self.penalty == "wgan" and (self.surrogate is not None or self.noise or self.steps[1] != 1):
            raise ValueError(
                'penalty must be "r1" where there is a surrogate, noise, or more than one step of the generator, got '
                f'"wgan" with surrogate={self.surrogate!r}, noise={self.noise}, steps={self.steps}'
            )

    def statistics(self, entries: int) -> tuple[int, int] | None:
        """Inputs and outputs of the surrogate's network for data of so many entries, None where it has none."""
        return {"jsd": (entries + self.dim, 1), "reconstruct": (entries, self.dim)}.get(self.surrogate)

    def model(self, generator: nn.Module, energy: nn.Module, statistics: nn.Module | None) -> MEG:
        """The game of these networks."""
        energy_steps, generator_steps = self.steps
        if self.penalty == "wgan":
            return WGANGP(generator, energy, self.dim, lam=self.lam, energy_steps=energy_steps)
        return MEG(
            generator,
            energy,
            self.dim,
            lam=self.lam,
            surrogate=self.surrogate,
            statistics=statistics,
            weight=self.weight,
            sigma=self.sigma,
            noise=self.noise,
            energy_steps=energy_steps,
            generator_steps=generator_steps,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe(Game):
    """How a game on the plane is made, trained and measured.

    Attributes:
        features: scale of the Fourier features of energy and statistics, 0 for none.
        scale: what the toy's coordinates are divided by.
        draws: samples that are measured.
        cells: a side of the grid that the energy's density is measured on.
    """

    dim: int = 2
    lam: float = 0.1
    features: float
    scale: float = SCALE
    draws: int = 2500
    cells: int = 300

    def toy(self) -> data.Toy:
        """The data's distribution."""
        return data.toy("twenty_five_gaussians").scaled(1 / self.scale)


SIZES = {
    "short": Recipe(width=16, rows=2560, epochs=1, lr=1e-3, steps=(1, 3), features=2.0, draws=250),
    "medium": Recipe(width=64, rows=51_200, epochs=30, lr=1e-3, steps=(1, 5), features=2.0),
    "full": Recipe(  # the authors' 100,000 rounds
        width=512,
        rows=100_000,
        epochs=1536,
        batch_size=256,
        lr=1e-4,
        schedule="constant",
        steps=(5, 1),
        features=0.0,
    ),
}
LAMS = (1e-2, 1e-3, 1e-4)  # beside the authors' 0.1
AHEAD = {"steps": (5, 1)}
NOISY = {"surrogate": "reconstruct", "sigma": None, "noise": SIGMA}  # no wider than the data: a perfect sampler has it
MODELS: dict[str, tuple[str, dict]] = {  # what each is, and what its recipe has of its own
    "meg_toy": ("MEG, JSD surrogate", {}),
    "meg_toy_5_1": ("MEG, five steps of the energy for one of the generator", AHEAD),
    **{f"meg_toy_1_{n}": (f"MEG, steps of energy and generator 1 : {n}", {"steps": (1, n)}) for n in (1, 10)},
    "meg_toy_long": ("MEG, trained for longer", {}),
    "meg_toy_reconstruct": ("MEG, reconstruct-z surrogate", {"surrogate": "reconstruct"}),
    "meg_toy_source": ("MEG, reconstruct z with weight 1", {"surrogate": "reconstruct", "sigma": math.sqrt(0.5)}),
    "meg_toy_noise": ("MEG, noise on the samples, reconstruct z with the best sigma", NOISY),
    "meg_toy_knn": ("MEG, entropy of the samples by nearest neighbours", {"surrogate": "knn"}),
    "meg_toy_plain": ("the same GAN without the entropy", {"surrogate": None}),
    "meg_toy_plain_ahead": ("the same, the energy five steps ahead", {"surrogate": None, **AHEAD}),
    "meg_toy_wgan_gp": ("WGAN-GP", {"penalty": "wgan", "surrogate": None, **AHEAD}),
    **{f"meg_toy_{lam:g}": (f"MEG, JSD surrogate, lambda = {lam:g}", {"lam": lam}) for lam in LAMS},
}


def recipe(name: str, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run; all have as many steps, shared out among the players, but for the long one.

    Raises:
        ValueError: for an unknown name or size.
    """
    check_known(name=(name, MODELS), size=(size, SIZES))
    usual = SIZES[size]
    longer = {"epochs": usual.epochs * 7 // 3} if name == "meg_toy_long" else {}
    return replace(usual, **MODELS[name][1], **longer)


def judge_net(inputs: int, outputs: int, width: int, features: float = 0.0) -> nn.Module:
    """Three hidden layers for an energy or statistics: on Fourier features, or as the authors have it."""
    if features:
        return nn.Sequential(
            nets.FourierFeatures(inputs, width // 2, features),
            nets.mlp([inputs + width, width, width, width, outputs], activation=nn.SiLU),
        )
    return nets.mlp([inputs, width, width, width, outputs], activation=functools.partial(nn.LeakyReLU, 0.2))


def networks(recipe: Recipe, shape: Sequence[int], seed: int) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """Generator, energy and the statistics that the surrogate has; the first two have the same weights with any."""
    (entries,), width = shape, recipe.width
    sizes = recipe.statistics(entries)
    with fresh(seed):
        generator = nets.mlp([recipe.dim, width, width, width, entries])
        energy = judge_net(entries, 1, width, recipe.features)
        return generator, energy, judge_net(*sizes, width, recipe.features) if sizes else None


def build(recipe: Recipe, shape: Sequence[int], seed: int) -> MEG:
    """A model with fresh weights that depend on ``seed`` alone, for rows of the given shape, (entries,)."""
    return recipe.model(*networks(recipe, shape, seed))


def half_side(toy: data.Toy) -> float:
    """Half the side of the square that densities live on: it reaches half again as far as the modes."""
    return 1.5 * float(toy.modes.abs().max())


def density_of(model: nn.Module, toy: data.Toy, cells: int) -> GridDensity:
    """The density exp(-U) / Z of a model's ``energy_of`` on the square of a toy, in double precision."""

    def energy(x: Tensor) -> Tensor:
        return metrics.in_batches(model.energy_of, x.float(), batch_size=20_000).double()

    return log_normalizer_2d(energy, -half_side(toy), half_side(toy), cells)


def measure_samples(x: Tensor, toy: data.Toy) -> dict[str, float]:
    """How samples (n, 2) lie about the modes; the spread within 3σ is there if one lies within."""
    quality = metrics.mode_quality(x, toy.modes, toy.std)
    measured = {
        "modes of 25": quality.modes,
        "high quality, %": 100 * quality.high_quality,
        "spread, σ": quality.spread,
        "KL of mode shares": quality.kl,
    }
    return measured | ({"spread within 3σ, σ": quality.spread_within} if quality.modes else {})


def measure_density(density: GridDensity, toy: data.Toy) -> dict[str, float]:
    """How a density lies about the modes, by sums over its grid."""
    mass = density.log_density.exp() * density.area
    distance = torch.cat([torch.cdist(x, toy.modes.double()).amin(1) for x in density.x.split(50_000)])
    return {
        "energy: high quality, %": 100 * float(mass[distance < 3 * toy.std].sum()),
        "energy: spread, σ": float((mass @ distance.square() / 2).sqrt() / toy.std),
    }


def measure_energy(model: nn.Module, toy: data.Toy, cells: int) -> dict[str, float]:
    """The divergence of the density exp(-U) / Z from the truth, and how it lies about the modes."""
    density = density_of(model, toy, cells)
    return {"KL(data | energy)": float(density.kl_from(toy.log_prob)), **measure_density(density, toy)}


def divergence_of(x: Tensor, energy_of: Callable[[Tensor], Tensor], *, log_z: float, neighbours: int) -> float:
    """KL(samples | exp(-U) / Z) in nats, the entropy of the samples x (n, 2) by their nearest neighbours."""
    return float(energy_of(x.float()).double().mean()) + log_z - float(knn_entropy(x.double(), neighbours))


def slope_of(model: nn.Module, x: Tensor) -> float:
    """Mean squared slope of the energy at the data x (n, 2)."""
    return float(gradient_penalty_r1(model.energy_of, x).detach().mean())


def draw(model: nn.Module, toy: data.Toy, x: Tensor, cells: int) -> Figure:
    """Samples, and the density of the learned energy."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    half = half_side(toy)
    axes[0].scatter(x[:, 0], x[:, 1], s=2, alpha=0.4, linewidths=0)
    axes[0].scatter(toy.modes[:, 0], toy.modes[:, 1], s=60, marker="+", color="tab:red", linewidths=0.8)
    axes[0].set(title="samples, modes (+)", xlim=(-half, half), ylim=(-half, half), aspect="equal")
    density = density_of(model, toy, cells).log_density.exp().reshape(cells, cells)
    log_density = density.T.clamp_min(1e-8).log10()
    axes[1].imshow(log_density.numpy(), origin="lower", extent=(-half, half, -half, half), vmin=-3, cmap="viridis")
    axes[1].set(title=r"$\log_{10}$ of $e^{-U}/Z$")
    return figure


class Course:
    """A callback of the training that measures samples and energy some ten times, each time with the same noise.

    Attributes:
        curves: name -> values so far, "epoch" among them.
    """

    def __init__(self, recipe: Recipe, x: Tensor, seed: int) -> None:
        self.recipe, self.toy, self.x, self.seed = recipe, recipe.toy(), x[: recipe.draws], seed
        self.curves: dict[str, list[float]] = {}

    def __call__(self, model: nn.Module, epoch: int) -> None:
        if epoch % max(1, self.recipe.epochs // 10):
            return
        sample = model.sample(self.recipe.draws, generator=stream(self.seed, "evaluation")).cpu()
        measured = {"epoch": epoch, **measure_samples(sample, self.toy)}
        measured.pop("spread within 3σ, σ", None)  # which is not always there
        if self.recipe.penalty == "r1":  # a critic is no energy
            device = next(model.parameters()).device
            measured |= measure_energy(model, self.toy, self.recipe.cells)
            measured["slope² at data"] = slope_of(model, self.x.to(device))
        for name, value in measured.items():
            self.curves.setdefault(name, []).append(value)


def run(recipe: Recipe, data_name: str, seed: int, device: torch.device, *, build: Callable = build) -> Outcome:
    """Train and measure one model, of this ``build`` or of another that makes an energy with samples."""
    toy = recipe.toy()
    x = toy.sample(recipe.rows, stream(seed, "data"))
    model, course = build(recipe, x.shape[1:], seed), Course(recipe, x, seed)
    training = recipe.fit(model, x, seed=seed, device=device, callback=course)
    sample = model.sample(recipe.draws, generator=stream(seed, "samples")).cpu()
    measured, last = measure_samples(sample, toy), {k: float(v[-100:].mean()) for k, v in training.history.items()}
    if recipe.penalty == "r1":
        measured |= measure_energy(model, toy, recipe.cells)
        measured["slope² at data"] = next(value for name, value in last.items() if name.endswith("penalty"))
    if recipe.surrogate is not None:
        measured["information"] = last["generator information"]
    return Outcome(measured, training, curves=course.curves, figure=draw(model, toy, sample, recipe.cells))


STUDIES: dict[str, Study] = {
    name: Study(f"25 Gaussians: {about}", TOPIC, ("plane",), functools.partial(recipe, name), run)
    for name, (about, _) in MODELS.items()
}
