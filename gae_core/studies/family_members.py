"""What a fitted member of the family can do, and what those abilities have in common."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core import metrics
from gae_core.densities import GaussianMixture, fit_gaussian_mixture
from gae_core.metrics import Components, Density
from gae_core.seeds import seed_of, stream
from gae_core.studies import study

# Streams of one name are told apart by these numbers.
IMAGES, TEST_NOISE, ODD, TRAINING_NOISE = range(4)  # of "data"; the first three with seed 0, the same for all runs
SAMPLED, PRIOR, SOLVER = range(3)  # of "density": fitted to codes to be sampled, or for log-densities; scikit-learn's
DRAWS, ODD_DRAWS, CANDIDATES, CODES = range(4)  # of "evaluation"


@dataclass(frozen=True, kw_only=True)
class Recipe(study.Recipe):
    """What all members are fitted to and measured by; those that need more have a recipe with more.

    Attributes:
        member: one of ``gae_core.studies.family.MEMBERS``.
        rows: training images, at most.
        test: test images, at most.
        density: test images whose density is estimated.
        draws: importance samples for each of them.
        probe: test images for what is odd, and for what is missing.
        dim: of the codes; the number of centres.
        noise: standard deviation of what is added to the test images before their density is asked for.
        coded: training images, at most, that show what a network leaves of them, and whose codes get a density.
        components: of the mixture of Gaussians that this density is.
        starts: codes at which the search for what is missing begins.
        candidates: codes of N(0, I) among which the likeliest starts are chosen.
        search_steps: of each search for a code.
        neighbours: of the trustworthiness.
    """

    member: str
    rows: int
    test: int
    density: int
    draws: int
    probe: int
    dim: int = 10
    noise: float = 0.1
    coded: int = 5000
    components: int = 10
    starts: int = 4
    candidates: int = 2000
    search_steps: int = 10
    neighbours: int = 12


@dataclass(frozen=True)
class Member:
    """What a fitted model can do, on flat images (n, D) in [0, 1]; None for what it cannot.

    Attributes:
        codes: images, labels -> codes (n, d), whose distances mean something.
        reconstruct: images, labels -> images.
        decode: codes -> images; with it a density can be fitted to the codes, and sampled.
        sample: n, generator -> images, by the model's own distribution.
        fitted: the same, codes from a density that is fitted to them; None, with ``decode``, is a mixture.
        log_density: noisy images, images without the noise, labels, draws, their generator -> a
            :class:`gae_core.metrics.Density` of the noisy ones, with a variance of the noise for each pixel unless the
            model says that it is one for all.
        plain_density: the same with one variance for all pixels; None where the noise is a part of the model.
        fill: noisy images, NaN where they are hidden, which pixels are known (D,), labels -> all pixels, given those:
            their means where these can be had, else the image of the likeliest code.
        conditional: whether it needs the label of each image, so that it has nothing to say of one that has none.
    """

    codes: Callable[[Tensor, Tensor], Tensor] | None = None
    reconstruct: Callable[[Tensor, Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    sample: Callable[[int, Generator], Tensor] | None = None
    fitted: Callable[[int, Generator], Tensor] | None = None
    log_density: Callable[[Tensor, Tensor, Tensor, int, Generator], Density] | None = None
    plain_density: Callable[[Tensor, Tensor, Tensor, int, Generator], Density] | None = None
    fill: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    conditional: bool = False


def remaining_variance(x: Tensor, back: Tensor, noise: float) -> Tensor:
    """Variances of the noise around a decoder, (D,): what it leaves of training images, and what the test adds."""
    return (x - back).square().mean(0) + noise**2


def codes_density(codes: Tensor, recipe: Recipe, seed: int, index: int) -> GaussianMixture:
    """The mixture of Gaussians fitted to codes (n, d), in float64; ``index`` is that of its stream."""
    return fit_gaussian_mixture(codes.double(), recipe.components, seed=seed_of(seed, "density", index))


def with_exact_density(
    member: Member, weights: Tensor, components: Components, plain: Components | None = None
) -> Member:
    """The same member, which is a mixture of Gaussians among the noisy images; ``plain``, with one noise for all."""

    def density(components: Components) -> Callable:
        return lambda noisy, *_: Density(metrics.gaussian_mixture_density(noisy, weights, components))

    return dataclasses.replace(
        member,
        log_density=density(components),
        plain_density=None if plain is None else density(plain),
        fill=lambda noisy, known, _: metrics.gaussian_mixture_fill(noisy, known, weights, components),
    )


def with_searched_density(
    member: Member,
    decode: Callable,
    variance: Tensor,
    centre: Tensor,
    recipe: Recipe,
    seed: int,
    *,
    codes: Tensor | None = None,
    classes: int = 0,
) -> Member:
    """The same member, which is a decoder with Gaussian noise: the integral over its codes is estimated.

    Args:
        member: has ``codes``, where the searches for the likeliest code begin.
        decode: codes, one-hot labels if there are classes -> flat images.
        variance: of the noise, (D,).
        centre: mean image, (D,), which stands for what is missing where a search begins.
        recipe: has the numbers of the searches, and of the density fitted to codes.
        seed: of that density, and of the candidates.
        codes: (m, d), to which a density is fitted, as their distribution; None takes N(0, I).
        classes: number of labels, if the decoder takes them. The density is then a bound by the true label's part.
    """
    search = functools.partial(metrics.decoder_fill, steps=recipe.search_steps)
    estimate = functools.partial(metrics.decoder_density, steps=recipe.search_steps)

    @functools.cache
    def prior() -> GaussianMixture | None:
        return None if codes is None else codes_density(codes, recipe, seed, PRIOR)

    def one_hot(labels: Tensor) -> tuple[Tensor, ...]:
        return (nn.functional.one_hot(labels, classes).float(),) if classes else ()

    def density(variance: Tensor) -> Callable:
        sigma = variance.sqrt()

        def log_density(noisy: Tensor, clean: Tensor, labels: Tensor, draws: int, generator: Generator) -> Density:
            start, rows = member.codes(clean, labels), one_hot(labels)
            result = estimate(
                decode, noisy, start, sigma=sigma, prior=prior(), rows=rows, draws=draws, generator=generator
            )
            return dataclasses.replace(result, values=result.values - math.log(classes or 1))

        return log_density

    @torch.no_grad()
    def fill(noisy: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        """By searches from the code of the image with the mean image's other half, and from the most similar images."""
        first, candidates = member.codes(torch.where(known, noisy, centre), labels), codes
        if candidates is None:
            generator = stream(seed, "evaluation", CANDIDATES)
            candidates = torch.randn(recipe.candidates, first.shape[1], generator=generator)
        starts = first[:, None].repeat(1, recipe.starts, 1)
        for label in labels.unique() if classes else [None]:
            same = slice(None) if label is None else labels == label
            images = decode(candidates, *(() if label is None else one_hot(label.expand(len(candidates)))))
            apart = torch.cdist(noisy[same][:, known], images[:, known])
            starts[same, 1:] = candidates[apart.topk(recipe.starts - 1, largest=False).indices]
        return search(decode, noisy, known, starts, sigma=variance.sqrt(), prior=prior(), rows=one_hot(labels))

    plain = density(variance.mean().expand_as(variance))
    return dataclasses.replace(member, log_density=density(variance), plain_density=plain, fill=fill)
