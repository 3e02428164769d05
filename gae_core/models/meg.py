"""Maximum-entropy generators for energy-based models (Kumar et al., 2019). Derived in *Maximum-entropy generators*."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core import parallel
from gae_core.energy import gradient_penalty_r1, gradient_penalty_wgan
from gae_core.entropy import knn_local_entropy
from gae_core.information import jsd_terms, permute_rows, reconstruction_terms

SURROGATES = ("jsd", "reconstruct", "knn")


@dataclass(frozen=True)
class EnergyLoss:
    """Terms of the energy's loss, each of shape (batch,).

    Attributes:
        total: real - fake + lam * penalty, what is minimised.
        real: energies of data.
        fake: energies of generated samples.
        penalty: squared length of the energy's gradient at each datum (for WGAN-GP, of its excess over 1 between data
            and samples).
    """

    total: Tensor
    real: Tensor
    fake: Tensor
    penalty: Tensor


@dataclass(frozen=True)
class GeneratorLoss:
    """Terms of the generator's loss, each of shape (batch,).

    Attributes:
        total: energy - weight * information, what is minimised.
        energy: energies of generated samples.
        information: what stands for their entropy, in nats; 0 for a model without it.
    """

    total: Tensor
    energy: Tensor
    information: Tensor


class MEG(nn.Module):
    r"""An energy, the generator that samples from it, and a measure of what the samples tell of their codes.

    .. math:: L_U = U(x) - U(G(z)) + \lambda\|\nabla_x U(x)\|^2, \qquad L_G = U(G(z)) - w\,\hat I(G(z), z)

    Implements ``def-meg-energy-loss`` and ``def-meg-generator-loss``. The density is :math:`q(x) \propto e^{-U(x)}`.
    In place of the samples' entropy, which is not known, stands one of these:

    - ``"jsd"``, of the paper: ``statistics`` tells pairs (G(z), z) from pairs whose codes are another row's, whole. The
      mean is at most 0; it is -log 4 for statistics that are blind, and less for statistics that are wrong.
    - ``"reconstruct"``, of its reading by Su Jianlin: ``statistics`` finds z from G(z), with the likelihood
      :math:`N(z; R(x), \sigma^2 I)`. The squared error has the weight :math:`1 / 2\sigma^2`.
    - ``"knn"``: the entropy of the batch of samples, estimated by its nearest neighbours. It needs no network.
    - ``None``: no such term. What is left is a GAN with Wasserstein loss and R1 penalty.

    Without noise the first two are no entropies: they are blind to an invertible change of the generator
    (``eq-mutual_information-blind``). With noise of fixed size on the samples, the bound by reconstruction with the
    best sigma is one of their entropy, up to a constant (``eq-mutual_information-noise``).

    Source: Kumar, Ozair, Goyal, Courville and Bengio, *Maximum entropy generators for energy-based models*, 2019.

    Args:
        generator: module z (batch, dim) -> x (batch, ...).
        energy: module x (batch, ...) -> (batch, 1), the energy U in nats.
        dim: dimension of the code z, which is drawn from N(0, I).
        lam: weight of the penalty, in squared units of x a nat: data multiplied by s want s² times the weight.
        surrogate: "jsd", "reconstruct", "knn" or None.
        statistics: for "jsd" a module ([x, z] as rows of one tensor, (batch, entries of x + dim)) -> (batch, 1); for
            "reconstruct" a module x (batch, ...) -> (batch, dim). The others have none.
        weight: of the information. The gradient of KL(generated, modelled) has 1 on the entropy; the authors' code
            has 1/2 on the "jsd" bound.
        sigma: standard deviation of the likelihood of "reconstruct"; None takes the best of each batch and coordinate.
        noise: standard deviation of Gaussian noise on every sample: x = G(z) + noise * eps.
        energy_steps: steps of the energy in a round. The source has 5.
        generator_steps: steps of the generator after them. The source has 1; more keep the generator near its best
            answer to the energy, which is what its samples stand for in the energy's gradient.

    Raises:
        ValueError: for an unknown surrogate, statistics without use or missing, a weight, penalty or sigma that is
            negative or 0, a negative noise; from the losses, for another player or modules that give other shapes.
    """

    def __init__(
        self,
        generator: nn.Module,
        energy: nn.Module,
        dim: int,
        *,
        lam: float = 0.1,
        surrogate: str | None = "jsd",
        statistics: nn.Module | None = None,
        weight: float = 1.0,
        sigma: float | None = 0.5,
        noise: float = 0.0,
        energy_steps: int = 5,
        generator_steps: int = 1,
    ) -> None:
        super().__init__()
        if surrogate not in (None, *SURROGATES):
            raise ValueError(f"surrogate must be None or one of {', '.join(SURROGATES)}, got {surrogate!r}")
        if (surrogate in (None, "knn")) != (statistics is None):
            raise ValueError(f"statistics must be a module exactly where the surrogate has one, which is {surrogate!r}")
        if not lam >= 0:
            raise ValueError(f"lam must be at least 0, got {lam}")
        if not weight > 0:
            raise ValueError(f"weight must be positive, got {weight}: leave the information out with surrogate=None")
        if sigma is not None and not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be a positive number, or None for the best, got {sigma}")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise must be a number that is at least 0, got {noise}")
        if min(energy_steps, generator_steps) < 1:
            raise ValueError(f"steps must be at least 1, got {energy_steps} of the energy, {generator_steps} after it")
        self.generator, self.energy, self.statistics = generator, energy, statistics
        self.dim, self.lam, self.surrogate, self.weight, self.sigma = dim, lam, surrogate, weight, sigma
        self.noise, self.energy_steps, self.generator_steps = noise, energy_steps, generator_steps

    @property
    def players(self) -> dict[str, tuple[Iterable[nn.Parameter], int]]:
        """Parameters and steps a round of each player; the statistics are the generator's, both raise the bound."""
        statistics = [] if self.statistics is None else list(self.statistics.parameters())
        return {
            "energy": (list(self.energy.parameters()), self.energy_steps),
            "generator": ([*self.generator.parameters(), *statistics], self.generator_steps),
        }

    def energy_of(self, x: Tensor) -> Tensor:
        """Energies U in nats, (batch,), of x (batch, ...); low where the model expects data."""
        u = self.energy(x)
        if u.shape != (len(x), 1):
            raise ValueError(f"energy must give shape {(len(x), 1)}, got {tuple(u.shape)}")
        return u[:, 0]

    def decode(self, z: Tensor) -> Tensor:
        """Samples G(z), (batch, ...), of codes z (batch, dim), without noise."""
        return self.generator(z)

    def noisy(self, x: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Add the noise of the samples to x (batch, ...), if they have one."""
        return x + self.noise * parallel.randn_like(x, generator=generator) if self.noise else x

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
        """Draw n samples, z from N(0, I), with their noise; ``y`` is there for the common interface and not used."""
        parameter = next(self.parameters())
        device = parameter.device if generator is None else generator.device  # a source draws where it is
        z = torch.randn(n, self.dim, generator=generator, device=device, dtype=parameter.dtype)
        x = self.decode(z.to(parameter.device))
        return self.noisy(x.to(device), generator=generator).to(parameter.device)

    def penalty(self, x: Tensor, fake: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Penalty of the energy's slope, (batch,): its squared length at the data x."""
        return gradient_penalty_r1(self.energy_of, x)

    def information(self, x: Tensor, z: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Terms, in nats, of what stands for the entropy of samples x (batch, ...) with codes z (batch, dim)."""
        if self.surrogate == "jsd":
            flat = x.flatten(1)
            others = self._of_the_batch(lambda z: permute_rows(z, generator=generator), z)
            pairs = torch.cat([torch.cat([flat, z], 1), torch.cat([flat, others], 1)])
            joint, apart = self.statistics(pairs)[:, 0].chunk(2)
            return jsd_terms(joint, apart)
        if self.surrogate == "reconstruct":
            return self._of_the_batch(lambda *v: reconstruction_terms(*v, self.sigma), z, self.statistics(x))
        if self.surrogate == "knn":
            return self._of_the_batch(lambda x: knn_local_entropy(x, duplicates="clamp"), x.flatten(1))
        return torch.zeros_like(z[:, 0])

    def _of_the_batch(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """What a function of a whole batch says of these rows; in training that of all processes is whole."""
        return parallel.own(function(*map(parallel.gather, rows))) if self.training else function(*rows)

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, player: str, generator: Generator | None = None
    ) -> EnergyLoss | GeneratorLoss:
        """Loss of one player, "energy" or "generator", on a batch x (batch, ...), whose noise is from ``generator``.

        The generator's loss takes from x its number of rows alone; ``y`` is not used.
        """
        z = parallel.randn_like(x.new_empty(len(x), self.dim), generator=generator)
        if player == "energy":
            with torch.no_grad():
                fake = self.noisy(self.decode(z), generator=generator)
            penalty = self.penalty(x, fake, generator=generator)
            real, generated = self.energy_of(x), self.energy_of(fake)
            return EnergyLoss(real - generated + self.lam * penalty, real, generated, penalty)
        if player == "generator":
            fake = self.noisy(self.decode(z), generator=generator)
            energy, information = self.energy_of(fake), self.information(fake, z, generator=generator)
            return GeneratorLoss(energy - self.weight * information, energy, information)
        raise ValueError(f'player must be "energy" or "generator", got {player!r}')


class WGANGP(MEG):
    r"""The Wasserstein GAN with gradient penalty in the same dress: the critic is minus the energy.

    .. math:: L_U = U(x) - U(G(z)) + \lambda\bigl(\|\nabla U(\hat x)\| - 1\bigr)^2, \qquad L_G = U(G(z)),

    where :math:`\hat x` lies at a uniform place between a datum and a sample. The length of the gradient is over all
    entries of one sample.

    Source: Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville, *Improved training of Wasserstein GANs*, NeurIPS 2017.

    Args:
        generator: as in :class:`MEG`.
        energy: as in :class:`MEG`.
        dim: as in :class:`MEG`.
        lam: weight of the penalty; the source has 10 for images and 0.1 for toys.
        energy_steps: steps of the critic before each of the generator.
    """

    def __init__(
        self, generator: nn.Module, energy: nn.Module, dim: int, *, lam: float = 10.0, energy_steps: int = 5
    ) -> None:
        super().__init__(generator, energy, dim, lam=lam, surrogate=None, energy_steps=energy_steps)

    def penalty(self, x: Tensor, fake: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Penalty of the critic's slope, (batch,): squared excess of its length over 1 between data and samples."""
        place = parallel.rand_like(x.new_empty(len(x)), generator=generator)
        return gradient_penalty_wgan(self.energy_of, x, fake, place=place)
