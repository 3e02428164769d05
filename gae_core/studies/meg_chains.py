"""Chains of codes on the energy of a game on 25 Gaussians, and the generator alone beside them: ``meg_mcmc_...``."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gae_core import metrics
from gae_core.chains import mala
from gae_core.energy import GridDensity, latent_energy
from gae_core.models.meg import MEG
from gae_core.seeds import stream
from gae_core.studies import meg_plane
from gae_core.studies.meg_plane import build, density_of, divergence_of, draw, half_side, measure_density
from gae_core.studies.study import Outcome, Study

TOPIC = meg_plane.TOPIC


@dataclass(frozen=True, kw_only=True)
class Recipe(meg_plane.Recipe):
    """How a game is played, and how codes walk by its energy.

    Attributes:
        cells: a side of the grid of the energy's density; its draws are what samples are compared with.
        term: of the codes' energy, as in :func:`gae_core.energy.latent_energy`; None leaves the codes where they are.
        chains: codes, from N(0, I).
        warmup: steps of MALA that set the size of the step.
        chain_steps: steps after them.
        step_size: at the start of the warm-up.
        neighbours: which of them the samples' entropy is estimated by.
    """

    cells: int = 1200  # of 0.2 standard deviations of a mode, to count those near it
    term: str | None
    chains: int
    warmup: int
    chain_steps: int
    step_size: float = 1e-3
    neighbours: int = 3


TERMS = {
    "before": "the generator alone",
    "none": "after chains of codes with the energy of the sample",
    "prior": "after chains of codes with the energy of the sample and the prior",
    "jacobian": "after chains of codes with the energy of the sample and the Jacobian",
}
SIZES = {"short": (200, 10, 20), "medium": (2500, 200, 400), "full": (2500, 1000, 4000)}  # chains, warm-up, steps


def recipe(term: str, data_name: str, size: str) -> Recipe:
    """The recipe of a recorded run, whose game is "meg_toy".

    Raises:
        ValueError: for an unknown term or size.
    """
    if term not in TERMS:
        raise ValueError(f"term must be one of {', '.join(TERMS)}, got {term!r}")
    game = {**vars(meg_plane.recipe("meg_toy", data_name, size)), "cells": Recipe.cells}
    chains, warmup, steps = SIZES[size]
    if term == "before":
        return Recipe(**game, term=None, chains=chains, warmup=0, chain_steps=0)
    return Recipe(**game, term=term, chains=chains, warmup=warmup, chain_steps=steps)


def walk(model: MEG, recipe: Recipe, seed: int) -> tuple[Tensor, dict[str, float]]:
    """Codes (chains, dim) from N(0, I), after they have walked if they do, and the acceptance.

    The density is that of the energy on the square; outside there is none, and no chain starts or goes there.
    """
    half, generator = half_side(recipe.toy()), stream(seed, "samples")

    def energy(x: Tensor) -> Tensor:
        return torch.where(x.abs().amax(1) < half, model.energy_of(x), math.inf)

    z = torch.randn(2 * recipe.chains, recipe.dim, generator=generator)
    z = z[energy(model.decode(z)).isfinite()][: recipe.chains]
    if recipe.term is None:
        return z, {}
    chains = mala(
        latent_energy(energy, model.decode, term=recipe.term),
        z,
        step_size=recipe.step_size,
        warmup=recipe.warmup,
        n_steps=recipe.chain_steps,
        thin=recipe.chain_steps,
        generator=generator,
    )
    return chains.samples[-1], {"acceptance": float(chains.acceptance.mean())}


def measure(model: MEG, z: Tensor, density: GridDensity, recipe: Recipe, seed: int) -> dict[str, float]:
    """The samples of codes z (chains, dim) beside draws of the energy's density."""
    toy, sample = recipe.toy(), model.decode(z)
    drawn = density.sample(recipe.draws, generator=stream(seed, "evaluation")).float()
    quality, of_energy = (metrics.mode_quality(x, toy.modes, toy.std) for x in (sample, drawn))
    divergence = functools.partial(
        divergence_of, energy_of=model.energy_of, log_z=float(density.log_z), neighbours=recipe.neighbours
    )
    determinant = torch.linalg.det(torch.func.vmap(torch.func.jacrev(lambda z: model.decode(z[None])[0]))(z))
    return {
        "modes of 25": quality.modes,
        "high quality, %": 100 * quality.high_quality,
        "spread, σ": quality.spread,
        "KL of mode shares": quality.kl,
        "KL(samples | energy)": divergence(sample),
        "mean of |z|²": float(z.square().sum(1).mean()),
        **measure_density(density, toy),
        "energy: KL of mode shares": of_energy.kl,
        "draws of the energy: KL(samples | energy)": divergence(drawn),
        "codes on the smaller side of a fold, %": 100
        * float(min((determinant > 0).sum(), (determinant < 0).sum()))
        / len(z),
    }


def run(recipe: Recipe, data_name: str, seed: int, device: torch.device) -> Outcome:
    """Train MEG as "meg_toy" does, then let codes walk by their energy, and measure their samples."""
    toy = recipe.toy()
    x = toy.sample(recipe.rows, stream(seed, "data"))
    model = build(recipe, x.shape[1:], seed)
    training = recipe.fit(model, x, seed=seed, device=device)
    model = model.cpu().eval().requires_grad_(False)
    z, acceptance = walk(model, recipe, seed)
    measured = measure(model, z, density_of(model, toy, recipe.cells), recipe, seed)
    return Outcome(acceptance | measured, training, figure=draw(model, toy, model.decode(z), 300))


STUDIES: dict[str, Study] = {
    f"meg_mcmc_{term}": Study(f"25 Gaussians, MEG: {about}", TOPIC, ("plane",), functools.partial(recipe, term), run)
    for term, about in TERMS.items()
}
