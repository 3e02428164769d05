"""Maximum-entropy generators beside the same GAN without the entropy and a WGAN-GP: records ``meg_...``."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from gae_core import data, metrics, nets, plots, train
from gae_core.chains import latent_energy, mala
from gae_core.energy import gradient_penalty_r1
from gae_core.entropy import knn_entropy
from gae_core.models.meg import MEG, WGANGP
from gae_core.records import Outcome, Study
from gae_core.studies import judge

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

    def fit(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        seed: int,
        device: torch.device,
        callback: Callable[[nn.Module, int], None] | None = None,
    ) -> tuple[train.History, float, int]:
        """Train by this recipe, with a callback after each epoch: history, seconds, rows seen."""
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
            callback=callback,
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
    "medium": Size(64, 51_200, 30, 128, 1e-3, True, (1, 5), 2.0),
    "full": Size(512, 100_000, 1536, 256, 1e-4, False, (5, 1), 0.0),  # the authors' 100,000 rounds
}
TOY_DIM = 2
LAMS = (1e-2, 1e-3, 1e-4)  # beside the authors' 0.1
AHEAD = {"energy_steps": 5, "generator_steps": 1}
SIGMA = 0.05 / SCALE  # of the toy's modes
NOISY = {"surrogate": "reconstruct", "sigma": None, "noise": SIGMA}  # no wider than the data: a perfect sampler has it
TOY_MODELS: dict[str, tuple[str, dict]] = {
    "meg_toy": ("MEG, JSD surrogate", {"surrogate": "jsd"}),
    "meg_toy_5_1": ("MEG, five steps of the energy for one of the generator", {"surrogate": "jsd", **AHEAD}),
    **{
        f"meg_toy_1_{n}": (f"MEG, steps of energy and generator 1 : {n}", {"surrogate": "jsd", "generator_steps": n})
        for n in (1, 10)
    },
    "meg_toy_long": ("MEG, trained for longer", {"surrogate": "jsd"}),
    "meg_toy_reconstruct": ("MEG, reconstruct-z surrogate", {"surrogate": "reconstruct"}),
    "meg_toy_source": ("MEG, reconstruct z with weight 1", {"surrogate": "reconstruct", "sigma": math.sqrt(0.5)}),
    "meg_toy_noise": ("MEG, noise on the samples, reconstruct z with the best sigma", NOISY),
    "meg_toy_knn": ("MEG, entropy of the samples by nearest neighbours", {"surrogate": "knn"}),
    "meg_toy_plain": ("the same GAN without the entropy", {"surrogate": None}),
    "meg_toy_plain_ahead": ("the same, the energy five steps ahead", {"surrogate": None, **AHEAD}),
    "meg_toy_wgan_gp": ("WGAN-GP", {"lam": 0.1}),
    **{f"meg_toy_{lam:g}": (f"MEG, JSD surrogate, lambda = {lam:g}", {"surrogate": "jsd", "lam": lam}) for lam in LAMS},
}


def toy_recipe(name: str, size: str) -> Size:
    """How long a run of that name is; all have as many steps, shared out among the players, but for the long one."""
    recipe = TOY[size]
    return replace(recipe, epochs=recipe.epochs * 7 // 3) if name == "meg_toy_long" else recipe


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
        steps = dict(zip(("energy_steps", "generator_steps"), size.steps, strict=True))
        statistics = toy_statistics(options["surrogate"], size)
        return MEG(generator, energy, TOY_DIM, statistics=statistics, **{**steps, **options})


def toy_statistics(surrogate: str | None, size: Size) -> nn.Module | None:
    """The network of a surrogate for the plane, None where it has none."""
    inputs, outputs = {"jsd": (2 + TOY_DIM, 1), "reconstruct": (2, TOY_DIM)}.get(surrogate, (0, 0))
    return judge_net(inputs, size.width, outputs, size.features) if inputs else None


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


def measure_samples(x: Tensor, toy: data.Toy) -> dict[str, float]:
    """How samples (n, 2) lie about the modes; the spread within 3σ is there if one lies within."""
    found = metrics.mode_quality(x, toy.modes, toy.std)
    measured = {
        "modes of 25": found.modes,
        "high quality, %": 100 * found.high_quality,
        "spread, σ": found.spread,
        "KL of mode shares": found.kl,
    }
    return measured | ({"spread within 3σ, σ": found.spread_within} if found.modes else {})


def measure_energy(model: MEG, toy: data.Toy, cells: int = 300) -> dict[str, float]:
    """How the density exp(-U) / Z lies about the modes, and its divergence from the truth, by sums over the grid."""
    kl, density = toy_density(model, toy, cells)
    points, area = grid_of(toy, cells)
    mass = density.flatten() * area
    distance = torch.cat([torch.cdist(rows, toy.modes.double()).amin(1) for rows in points.split(50_000)])
    return {
        "KL(data | energy)": kl,
        "energy: high quality, %": 100 * float(mass[distance < 3 * toy.std].sum()),
        "energy: spread, σ": float((mass @ distance.square() / 2).sqrt() / toy.std),
    }


def slope_of(model: MEG, x: Tensor) -> float:
    """Mean squared slope of the energy at the data x (n, 2)."""
    return float(gradient_penalty_r1(model.energy_of, x).detach().mean())


def draw_toy(model: MEG, toy: data.Toy, x: Tensor) -> Figure:
    """Samples, and the density of the learned energy."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
    half = 1.5 * float(toy.modes.abs().max())
    axes[0].scatter(x[:, 0], x[:, 1], s=2, alpha=0.4, linewidths=0)
    axes[0].scatter(toy.modes[:, 0], toy.modes[:, 1], s=60, marker="+", color="tab:red", linewidths=0.8)
    axes[0].set(title="samples, modes (+)", xlim=(-half, half), ylim=(-half, half), aspect="equal")
    _, density = toy_density(model, toy, 300)
    log_density = density.T.clamp_min(1e-8).log10()
    axes[1].imshow(log_density.numpy(), origin="lower", extent=(-half, half, -half, half), vmin=-3, cmap="viridis")
    axes[1].set(title=r"$\log_{10}$ of $e^{-U}/Z$")
    return figure


class Course:
    """A callback of the training that measures samples and energy some ten times, with noise of its own.

    Attributes:
        curves: name -> values so far, "epoch" among them.
    """

    def __init__(self, toy: data.Toy, x: Tensor, epochs: int, *, seed: int, energy: bool) -> None:
        self.toy, self.x, self.every, self.seed, self.energy = toy, x, max(1, epochs // 10), seed, energy
        self.curves: dict[str, list[float]] = {}

    def __call__(self, model: MEG, epoch: int) -> None:
        if epoch % self.every:
            return
        sample = model.sample(2500, generator=torch.Generator().manual_seed(self.seed)).cpu()
        measured = {"epoch": epoch, **measure_samples(sample, self.toy)}
        measured.pop("spread within 3σ, σ", None)  # which is not always there
        if self.energy:
            device = next(model.parameters()).device
            measured |= measure_energy(model, self.toy)
            measured["slope² at data"] = slope_of(model, self.x.to(device))
        for name, value in measured.items():
            self.curves.setdefault(name, []).append(value)


def run_toy(name: str, _data: str, size: str, seed: int, device: torch.device) -> Outcome:
    """Train and measure one model on the toy."""
    recipe, toy = toy_recipe(name, size), scaled(data.toy("twenty_five_gaussians"), SCALE)
    generator = torch.Generator().manual_seed(seed)
    x, model = toy.sample(recipe.rows, generator), build_toy(name, recipe, seed)
    energy = name != "meg_toy_wgan_gp"  # whose critic is none
    course = Course(toy, x[:2500], recipe.epochs, seed=seed, energy=energy)
    history, seconds, seen = recipe.fit(model, x, seed=seed, device=device, callback=course)
    sample = model.sample(2500, generator=generator).cpu()
    measured = measure_samples(sample, toy)
    if energy:
        measured |= measure_energy(model, toy)
        measured["slope² at data"] = float(history["energy penalty"][-100:].mean())
    if model.surrogate is not None:
        measured["information"] = float(history["generator information"][-100:].mean())
    parameters = sum(p.numel() for p in model.parameters())
    return Outcome(measured, parameters, seconds, seen, curves=course.curves, figure=draw_toy(model, toy, sample))


def toy_settings(name: str, _data: str, size: str) -> dict:
    """Settings of a run on the toy."""
    recipe = toy_recipe(name, size)
    model = build_toy(name, recipe, 0)
    return recipe.settings() | {
        "lam": model.lam,
        "surrogate": model.surrogate,
        "weight": model.weight,
        "sigma": model.sigma,
        "noise": model.noise,
        "steps": [model.energy_steps, model.generator_steps],
        "dim": TOY_DIM,
        "scale": SCALE,
    }


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
    """

    def __init__(self, energy: nn.Module, toy: data.Toy, *, lam: float, points: int = 1024) -> None:
        super().__init__()
        self.energy, self.toy, self.lam, self.points = energy, toy, lam, points
        self.half, self.wide = 1.5 * float(toy.modes.abs().max()), 3 * toy.std

    def energy_of(self, x: Tensor) -> Tensor:
        """Energies in nats, (batch,)."""
        return self.energy(x)[:, 0]

    def log_z(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Estimate of the logarithm of the normaliser, a number; that of the normaliser has no bias."""
        half, wide, modes, n = self.half, self.wide, self.toy.modes, self.points // 2
        square = (2 * torch.rand(n, 2, generator=generator) - 1) * half
        near = modes[torch.randint(len(modes), (n,), generator=generator)]
        near = near + wide * torch.randn(n, 2, generator=generator)
        x = torch.cat([square, near[(near.abs() < half).all(1)]])  # what lies outside of the square counts as nothing
        around = (-torch.cdist(x, modes).square() / (2 * wide**2)).exp().mean(1) / (2 * math.pi * wide**2)
        log_q = (0.5 / (2 * half) ** 2 + 0.5 * around).log()
        return (-self.energy_of(x) - log_q).logsumexp(0) - math.log(2 * n)

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: torch.Generator | None = None) -> LikelihoodLoss:
        """Minus the log-likelihood of a batch x (batch, 2) with the penalty."""
        energy, penalty = self.energy_of(x), gradient_penalty_r1(self.energy_of, x)
        log_z = self.log_z(generator=generator).expand(len(x))
        return LikelihoodLoss(energy + log_z + self.lam * penalty, energy, log_z, penalty)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw n points of the density, by the cells of the grid; ``y`` is not used."""
        points, area = grid_of(self.toy)
        log_q = -metrics.in_batches(self.energy_of, points.float(), batch_size=20_000).double()
        x = points[torch.multinomial(log_q.softmax(0), n, replacement=True, generator=generator)]
        return (x + (torch.rand(x.shape, generator=generator) - 0.5) * math.sqrt(area)).float()


LIKELIHOODS: dict[str, tuple[str, Callable[[Size], dict]]] = {
    "meg_toy_likelihood": (
        "at three times the rate, with half of the game's steps",
        lambda size: {"epochs": size.epochs // 2, "lr": 3 * size.lr},
    ),
    "meg_toy_likelihood_brief": (
        "with the steps that the energy has in the game, a sixth of all",
        lambda size: {"epochs": size.epochs // 6},
    ),
}


def likelihood_recipe(name: str, size: str) -> Size:
    """How long a run of that name is; all steps are of the energy."""
    changed = LIKELIHOODS[name][1](TOY[size])
    return replace(TOY[size], **(changed | {"epochs": max(1, changed["epochs"])}))


def build_likelihood(size: Size, seed: int) -> Likelihood:
    """The energy of :func:`build_toy` with the same first weights, to be trained by likelihood."""
    return Likelihood(
        build_toy("meg_toy", size, seed).energy, scaled(data.toy("twenty_five_gaussians"), SCALE), lam=0.1
    )


def run_likelihood(name: str, _data: str, size: str, seed: int, _device: torch.device) -> Outcome:
    """Train the energy of the toy by likelihood on the CPU, and measure it as the game's, its draws as samples."""
    recipe = likelihood_recipe(name, size)
    model = build_likelihood(recipe, seed)
    generator = torch.Generator().manual_seed(seed)
    x = model.toy.sample(recipe.rows, generator)
    course = Course(model.toy, x[:2500], recipe.epochs, seed=seed, energy=True)
    history, seconds, seen = recipe.fit(model, x, seed=seed, device=torch.device("cpu"), callback=course)
    sample = model.sample(2500, generator=generator)
    measured = measure_samples(sample, model.toy) | measure_energy(model, model.toy)
    measured["slope² at data"] = float(history["penalty"][-100:].mean())
    parameters = sum(p.numel() for p in model.parameters())
    return Outcome(measured, parameters, seconds, seen, curves=course.curves, figure=draw_toy(model, model.toy, sample))


def likelihood_settings(name: str, _data: str, size: str) -> dict:
    """Settings of a run by likelihood."""
    recipe = likelihood_recipe(name, size)
    model = build_likelihood(recipe, 0)
    return recipe.settings() | {"steps": [1, 0], "lam": model.lam, "points": model.points, "scale": SCALE}


class Flat(nn.Module):
    """The energy that knows nothing."""

    def energy_of(self, x: Tensor) -> Tensor:
        """0 everywhere, (batch,)."""
        return x.new_zeros(len(x))


def run_flat(_data: str, _size: str, seed: int, _device: torch.device) -> Outcome:
    """What stands at the bottom of the table: the flat density on the square, and samples of it."""
    start, toy = time.perf_counter(), scaled(data.toy("twenty_five_gaussians"), SCALE)
    half = 1.5 * float(toy.modes.abs().max())
    sample = (2 * torch.rand(2500, 2, generator=torch.Generator().manual_seed(seed)) - 1) * half
    measured = measure_samples(sample, toy) | measure_energy(Flat(), toy) | {"slope² at data": 0.0}
    return Outcome(measured, 0, time.perf_counter() - start, 0)


# The surrogates alone: a generator against an energy that stands still and whose density is known.


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
    """A MEG whose energy stands still."""

    @property
    def players(self) -> dict:
        """The generator's, with the statistics."""
        return {"generator": (super().players["generator"][0], 1)}


FIXED: dict[str, tuple[str, dict]] = {
    "meg_fixed_jsd": ("the JSD surrogate", {"surrogate": "jsd"}),
    "meg_fixed_noise": ("noise on the samples, reconstruct z with the best sigma", NOISY),
    "meg_fixed_knn": ("entropy by nearest neighbours", {"surrogate": "knn"}),
}


def build_fixed(name: str, size: Size, seed: int) -> Alone:
    """A generator against 25 wells as wide as the optimum under the paper's penalty."""
    toy, options = scaled(data.toy("twenty_five_gaussians"), SCALE), FIXED[name][1]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        generator = nets.mlp([TOY_DIM, size.width, size.width, size.width, 2])
        statistics = toy_statistics(options["surrogate"], size)
    energy = Wells(toy.modes, penalised_optimum(0.1, toy.std).spread * toy.std)
    return Alone(generator, energy, TOY_DIM, statistics=statistics, **options)


def divergence_of(x: Tensor, energy: nn.Module, modes: Tensor) -> dict[str, float]:
    """KL(samples | exp(-U)) in nats for an energy with Z = 1, the samples' entropy by nearest neighbours.

    The part of the shares is that of which modes the samples are at. What is left is how they lie within.
    """
    kl = float(energy(x).double().mean() - knn_entropy(x.double(), 3))
    shares = metrics.mode_count(torch.cdist(x, modes).argmin(1), torch.ones(len(modes))).kl
    return {"KL(samples | energy)": kl, "KL of mode shares": shares, "KL within modes": kl - shares}


@torch.no_grad()
def measure_fixed(model: Alone, *, n: int, generator: torch.Generator) -> dict[str, float]:
    """Samples of a generator against those that the energy itself would have."""
    x, wells = model.sample(n, generator=generator), model.energy
    quality = metrics.mode_quality(x, wells.modes, wells.std)
    return {"modes of 25": quality.modes, **divergence_of(x, wells, wells.modes)}


def run_fixed(name: str, _data: str, size: str, seed: int, _device: torch.device) -> Outcome:
    """Train a generator alone, on the CPU, and measure its divergence from the energy's density."""
    recipe = fixed_recipe(size)
    model, generator = build_fixed(name, recipe, seed), torch.Generator().manual_seed(seed)
    history, seconds, seen = recipe.fit(
        model, torch.zeros(recipe.rows, 2), seed=seed, device=torch.device("cpu")
    )  # of which the generator takes the number of rows
    measured = measure_fixed(model, n=100 if size == "short" else 10_000, generator=generator)
    measured["information"] = float(history["generator information"][-100:].mean())
    return Outcome(measured, sum(p.numel() for p in model.parameters()), seconds, seen)


def fixed_recipe(size: str) -> Size:
    """A third of the game's epochs, all of them the generator's."""
    return replace(TOY[size], epochs=max(1, TOY[size].epochs // 3))


def fixed_settings(name: str, _data: str, size: str) -> dict:
    """Settings of a run against an energy that stands still."""
    recipe = fixed_recipe(size)
    model = build_fixed(name, recipe, 0)
    return recipe.settings() | {
        "steps": [0, 1],
        "surrogate": model.surrogate,
        "sigma": model.sigma,
        "noise": model.noise,
        "width of the wells": model.energy.std,
        "dim": TOY_DIM,
        "scale": SCALE,
    }


CHAINS = {"short": (200, 10, 20), "medium": (2500, 200, 400), "full": (2500, 1000, 4000)}  # number, warm-up, steps
CHAIN_TERMS = {  # of the codes' energy, as in latent_energy
    "before": "the generator alone",
    "none": "after chains of codes with the energy of the sample",
    "prior": "after chains of codes with the energy of the sample and the prior",
    "jacobian": "after chains of codes with the energy of the sample and the Jacobian",
}


def run_toy_chains(term: str, _data: str, size: str, seed: int, device: torch.device) -> Outcome:
    """Train MEG on the toy, then let codes walk by their energy: the samples before ("before") or after.

    The density is that of the energy on the square of :func:`grid_of`; outside there is none, and no chain goes there.
    """
    recipe, toy = TOY[size], scaled(data.toy("twenty_five_gaussians"), SCALE)
    generator = torch.Generator().manual_seed(seed)
    x, model = toy.sample(recipe.rows, generator), build_toy("meg_toy", recipe, seed)
    _, seconds, seen = recipe.fit(model, x, seed=seed, device=device)
    model = model.cpu().eval().requires_grad_(False)
    points, area = grid_of(toy, 1200)  # cells of 0.2 standard deviations, to count those near a mode
    half = 1.5 * float(toy.modes.abs().max())

    def energy(x: Tensor) -> Tensor:
        return torch.where(x.abs().amax(1) < half, model.energy_of(x), math.inf)

    chains, warmup, steps = CHAINS[size]
    z = torch.randn(2 * chains, TOY_DIM, generator=generator)
    z = z[energy(model.decode(z)).isfinite()][:chains]
    measured = {}
    if term != "before":
        how = {"step_size": 1e-3, "warmup": warmup, "n_steps": steps, "thin": steps, "generator": generator}
        run = mala(latent_energy(energy, model.decode, term=term), z, **how)
        z = run.samples[-1]
        measured = {"acceptance": float(run.acceptance.mean())}
    log_q = -metrics.in_batches(model.energy_of, points.float(), batch_size=20_000).double()
    log_z = float(log_q.logsumexp(0)) + math.log(area)
    q = log_q.softmax(0)
    drawn = points[torch.multinomial(q, chains, generator=generator)]
    drawn = drawn + (torch.rand(drawn.shape, generator=generator) - 0.5) * math.sqrt(area)

    def divergence(x: Tensor) -> float:
        """KL(samples | energy) in nats, the entropy of the samples by nearest neighbours."""
        return float(model.energy_of(x.float()).double().mean()) + log_z - float(knn_entropy(x.double(), 3))

    sample = model.decode(z)
    determinant = torch.linalg.det(torch.func.vmap(torch.func.jacrev(lambda z: model.decode(z[None])[0]))(z))
    quality, of_energy = (metrics.mode_quality(v, toy.modes, toy.std) for v in (sample, drawn))
    measured |= {
        "modes of 25": quality.modes,
        "high quality, %": 100 * quality.high_quality,
        "spread, σ": quality.spread,
        "KL of mode shares": quality.kl,
        "KL(samples | energy)": divergence(sample),
        "mean of |z|²": float(z.square().sum(1).mean()),
        "energy: high quality, %": 100 * float(q[torch.cdist(points, toy.modes.double()).amin(1) < 3 * toy.std].sum()),
        "energy: spread, σ": of_energy.spread,
        "energy: KL of mode shares": of_energy.kl,
        "draws of the energy: KL(samples | energy)": divergence(drawn),
        "codes on the smaller side of a fold, %": 100
        * float(min((determinant > 0).sum(), (determinant < 0).sum()))
        / len(z),
    }
    parameters = sum(p.numel() for p in model.parameters())
    return Outcome(measured, parameters, seconds, seen, figure=draw_toy(model, toy, sample))


def toy_chains_settings(term: str, _data: str, size: str) -> dict:
    """Settings of a run with chains on the toy."""
    chains, warmup, steps = CHAINS[size]
    how = {} if term == "before" else {"term": term, "warm-up": warmup, "chain steps": steps}
    return toy_settings("meg_toy", _data, size) | {"chains": chains} | how


@dataclass(frozen=True)
class Optimum:
    """What perfect training reaches under the penalty, for data that are one round Gaussian in the plane.

    Attributes:
        high_quality: share of the model's mass within 3 standard deviations of the data.
        spread: its standard deviation per coordinate, in those of the data.
        spread_within: root mean square per coordinate of the part within 3 standard deviations of the data.
        kl: KL(data | model) in nats.
        slope: mean squared slope of the energy at the data.
        radius: midpoints of the grid, (cells,).
        density: of the model at a point of that radius, (cells,).
    """

    high_quality: float
    spread: float
    spread_within: float
    kl: float
    slope: float
    radius: Tensor
    density: Tensor


def penalised_optimum(lam: float, std: float, *, reach: float = 20.0, cells: int = 4000) -> Optimum:
    r"""The energy that minimises the likelihood's loss with the R1 penalty, by Newton's method on its radius.

    .. math:: \min_U\; \mathbb E_p U + \log\int e^{-U} + \lambda\,\mathbb E_p\|\nabla U\|^2

    Implements ``eq-meg-value``. The problem is convex. Modes far apart are each alone: where there are no data a slope
    costs nothing.

    Args:
        lam: weight of the penalty, in squared units of x.
        std: standard deviation of the data a coordinate.
        reach: radius of the disc that the density is sought on, in standard deviations.
        cells: rings of the disc.

    Raises:
        ValueError: if ``lam`` is negative or ``std`` not positive.
    """
    from scipy.linalg import solveh_banded

    if not lam >= 0 or not 0 < std < math.inf:
        raise ValueError(f"lam must be at least 0 and std positive, got {lam} and {std}")
    lam, width = lam / std**2, reach / cells  # in units of the data's standard deviation
    edge = torch.arange(1, cells, dtype=torch.float64) * width
    r = (torch.arange(cells, dtype=torch.float64) + 0.5) * width
    area = 2 * math.pi * r * width
    p = (-(r**2) / 2).exp() / (2 * math.pi)
    p = p * area / (p * area).sum()  # mass of each ring
    stiff = 2 * lam * edge * (-(edge**2) / 2).exp() / width  # of the spring between two rings: the penalty is a sum
    u = r**2 / (1 + math.sqrt(1 + 16 * lam))  # the best Gaussian, eq-meg-gaussian

    def force(u: Tensor) -> Tensor:
        pull = stiff * u.diff()
        return torch.cat([-pull[:1], -pull.diff(), pull[-1:]])

    def value(u: Tensor) -> float:
        return float(p @ u + (area.log() - u).logsumexp(0) + 0.5 * u @ force(u))

    for _ in range(200):
        q = (area.log() - u).softmax(0)
        slope = p - q + force(u)
        diagonal = q + 1e-14 + torch.cat([stiff, stiff[:0], torch.zeros(1)]) + torch.cat([torch.zeros(1), stiff])
        banded = torch.stack([torch.cat([torch.zeros(1), -stiff]), diagonal])
        step = torch.from_numpy(solveh_banded(banded.numpy(), -slope.numpy()))
        decrease = float(slope @ step)
        if decrease > -1e-10:
            break
        rate = min(1.0, 5 / float(step.abs().max()))
        while rate > 1e-6 and value(u + rate * step) > value(u) + 1e-4 * rate * decrease:
            rate /= 2
        u = u + rate * step
    q = (area.log() - u).softmax(0)
    return Optimum(
        high_quality=float(q[r < 3].sum()),
        spread=float((q @ r**2 / 2).sqrt()),
        spread_within=float((q[r < 3] @ r[r < 3] ** 2 / q[r < 3].sum() / 2).sqrt()),
        kl=float(p @ (p / q).log()),
        slope=float(0.5 * u @ force(u) / lam) / std**2 if lam else 2 / std**2,
        radius=r * std,
        density=q / (area * std**2),
    )


def run_optimum(lam: float, _data: str, _size: str, _seed: int, _device: torch.device) -> Outcome:
    """The yardstick of the runs on the toy: what perfect training would reach."""
    start = time.perf_counter()
    toy = scaled(data.toy("twenty_five_gaussians"), SCALE)
    best = penalised_optimum(lam, toy.std)
    measured = {
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
    return Outcome(measured, len(best.radius), time.perf_counter() - start, 0)


# ---- digits ------------------------------------------------------------------------------------------------------

IMAGES = {
    "short": Size(16, 128, 1, 64, 1e-3, True, (1, 3), 0.0),
    "medium": Size(128, 12_800, 40, 64, 1e-3, True, (1, 1), 0.0),
    "full": Size(512, 128_000, 300, 64, 1e-4, False, (5, 1), 0.0),  # the authors' 100,000 rounds
}
IMAGE_DIM = {"short": 8, "medium": 16, "full": 128}
STACKED = {"short": 2, "medium": 2, "full": 3}  # digits; a class has 128 training images and 26 samples
IMAGE_LAM = {"short": 1.0, "medium": 1.0, "full": 0.0032}  # for pixels in [0, 1]; the authors' is the last
IMAGE_MODELS: dict[str, tuple[str, dict]] = {
    "": ("MEG, JSD surrogate", {"surrogate": "jsd"}),
    "_plain": ("the same GAN without the entropy", {"surrogate": None}),
    "_plain_ahead": ("the same, the energy five steps ahead", {"surrogate": None, **AHEAD}),
    "_wgan_gp": ("WGAN-GP", {}),
}
HELD_OUT = (1, 9)


def build_images(name: str, shape: tuple[int, ...], size: str, seed: int) -> MEG:
    """A model of ``IMAGE_MODELS`` for images in [0, 1]: perceptrons, or convolutions in size "full"."""
    recipe, dim, options, pixels = IMAGES[size], IMAGE_DIM[size], IMAGE_MODELS[name][1], math.prod(shape)
    width = recipe.width
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if size == "full":
            energy, generator = nets.conv_pair(shape, 1, channels=64)[0], nets.conv_pair(shape, dim, channels=64)[1]
        else:
            generator = nn.Sequential(nets.mlp([dim, width, width, pixels]), nn.Sigmoid(), nn.Unflatten(1, shape))
            energy = nn.Sequential(nn.Flatten(), judge_net(pixels, width, 1, 0.0))
        if name == "_wgan_gp":
            return WGANGP(generator, energy, dim)
        statistics = judge_net(pixels + dim, width, 1, 0.0) if options["surrogate"] else None
        steps = dict(zip(("energy_steps", "generator_steps"), recipe.steps, strict=True))
        return MEG(generator, energy, dim, lam=IMAGE_LAM[size], statistics=statistics, **{**steps, **options})


def image_settings(name: str, _data: str, size: str) -> dict:
    """Settings of a run on images."""
    model = build_images(name, (1, 4, 4), size, 0)
    return IMAGES[size].settings() | {
        "lam": model.lam,
        "surrogate": model.surrogate,
        "weight": model.weight,
        "steps": [model.energy_steps, model.generator_steps],
        "dim": model.dim,
        "side": 28 if size == "full" else 16,
    }


@functools.cache
def small(name: str, size: str) -> data.Images:
    """Images of a run: halved, with a margin, to 16 x 16, except in size "full"."""
    images = data.load(name)
    if size == "full" or images.shape[1] < 28:
        return images

    def half(x: Tensor) -> Tensor:
        return nn.functional.pad(nn.functional.avg_pool2d(x.float(), 2), (1, 1, 1, 1)).round().byte()

    return data.Images(f"{name}_16", half(images.x_train), images.y_train, half(images.x_test), images.y_test)


def run_stacked(name: str, data_name: str, size: str, seed: int, device: torch.device) -> Outcome:
    """Train on stacked digits, and count the classes that the classifier of single digits sees in samples."""
    images, recipe, digits = small(data_name, size), IMAGES[size], STACKED[size]
    classes = 10**digits
    stacked = data.stack(images, digits, train=recipe.rows, test=26 * classes, seed=seed)
    model = build_images(name, stacked.shape, size, seed)
    _, seconds, seen = recipe.fit(model, stacked.x_train, seed=seed, device=device)
    one_digit = judge.classifier(images).to(device)

    def label(x: Tensor) -> Tensor:
        channels = [metrics.in_batches(one_digit, x[:, i : i + 1]).argmax(1) for i in range(digits)]
        return functools.reduce(lambda label, digit: 10 * label + digit, channels)

    generator = torch.Generator().manual_seed(seed)
    sample = torch.cat([model.sample(1000, generator=generator).cpu() for _ in range(-(-26 * classes // 1000))])
    sample, uniform = sample[: 26 * classes], torch.ones(classes)
    found, floor = metrics.mode_count(label(sample), uniform), metrics.mode_count(label(stacked.x_test), uniform)
    single = metrics.in_batches(one_digit, images.x_test).argmax(1)
    features = [metrics.in_batches(one_digit.features, x[:2000, :1]) for x in (sample, stacked.x_test)]
    measured = {
        f"modes of {classes:,}": found.modes,
        "KL from equal shares": found.kl,
        "KL, stacked test images": floor.kl,
        "KL, bias": found.floor,
        "Fréchet, first digit": metrics.frechet_distance(*features),
        "classifier right, %": 100 * float((single == images.y_test).double().mean()),
    }
    figure = plots.image_panels({f"digit {i + 1}": sample[:64, i : i + 1] for i in range(digits)}, columns=8)
    return Outcome(measured, sum(p.numel() for p in model.parameters()), seconds, seen, figure=figure)


def run_anomaly(digit: int, data_name: str, size: str, seed: int, device: torch.device) -> Outcome:
    """Train without one digit, then tell it from held-out others by the energy and by its slope.

    The test set is a fifth of the other digits and all of the one, as in the authors' code.
    """
    images, recipe = small(data_name, size), IMAGES[size]
    x, y = torch.cat([images.x_train, images.x_test]), torch.cat([images.y_train, images.y_test])
    generator = torch.Generator().manual_seed(seed)
    normal = x[y != digit]
    normal = normal[torch.randperm(len(normal), generator=generator)]
    fifth = len(normal) // 5
    test = data.to_unit(torch.cat([normal[:fifth], x[y == digit]]))
    anomaly = torch.arange(len(test)) >= fifth
    model = build_images("", images.shape, size, seed)
    train_rows = normal[fifth:][: recipe.rows]
    _, seconds, seen = recipe.fit(model, train_rows, seed=seed, device=device)
    model.requires_grad_(False)  # the slope is taken in x alone
    batches = [batch.to(device) for batch in test.split(1000)]
    scores = {
        "energy": torch.cat([model.energy_of(batch) for batch in batches]).cpu(),
        "slope²": torch.cat([gradient_penalty_r1(model.energy_of, batch).detach() for batch in batches]).cpu(),
    }
    measured = {}
    for name, score in scores.items():
        found = metrics.detection(score, anomaly)
        measured |= {f"AUROC, {name}": found.auroc, f"AUPRC, {name}": found.auprc}
    measured |= {"prevalence": found.prevalence, "least AUPRC": found.least}
    figure = plots.image_panels({"samples": model.sample(64, generator=generator), "data": train_rows[:64]}, columns=8)
    return Outcome(measured, sum(p.numel() for p in model.parameters()), seconds, seen, figure=figure)


STUDIES: dict[str, Study] = {
    **{
        name: Study(
            f"25 Gaussians: {about}",
            ("plane",),
            functools.partial(toy_settings, name),
            functools.partial(run_toy, name),
        )
        for name, (about, _) in TOY_MODELS.items()
    },
    **{
        name: Study(
            f"25 Gaussians: the energy alone, trained by likelihood with the penalty, {about}",
            ("plane",),
            functools.partial(likelihood_settings, name),
            functools.partial(run_likelihood, name),
        )
        for name, (about, _) in LIKELIHOODS.items()
    },
    "meg_toy_flat": Study(
        "25 Gaussians: a flat density", ("plane",), lambda _data, _size: {"epochs": 0, "scale": SCALE}, run_flat
    ),
    **{
        name: Study(
            f"25 wells that stand still: {about}",
            ("plane",),
            functools.partial(fixed_settings, name),
            functools.partial(run_fixed, name),
        )
        for name, (about, _) in FIXED.items()
    },
    **{
        f"meg_mcmc_{term}": Study(
            f"25 Gaussians, MEG: {about}",
            ("plane",),
            functools.partial(toy_chains_settings, term),
            functools.partial(run_toy_chains, term),
        )
        for term, about in CHAIN_TERMS.items()
    },
    **{
        f"meg_optimum_{lam:g}": Study(
            f"25 Gaussians: what perfect training reaches with lambda = {lam:g}",
            ("plane",),
            lambda _data, _size, lam=lam: {"epochs": 0, "lam": lam, "scale": SCALE},
            functools.partial(run_optimum, lam),
        )
        for lam in (0.1, *LAMS)
    },
    **{
        f"meg_stacked{name}": Study(
            f"stacked digits: {about}",
            ("mnist",),
            functools.partial(image_settings, name),
            functools.partial(run_stacked, name),
        )
        for name, (about, _) in IMAGE_MODELS.items()
    },
    **{
        f"meg_without_{digit}": Study(
            f"MEG trained without the digit {digit}, which is then to be found",
            ("mnist", "digits"),
            functools.partial(image_settings, ""),
            functools.partial(run_anomaly, digit),
        )
        for digit in HELD_OUT
    },
}
