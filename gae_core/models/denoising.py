"""Denoising and contractive autoencoders as generative models. Derived in the chapter *Denoising*; in nats."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core import parallel
from gae_core.models.autoencoder import Autoencoder, AutoencoderLoss, check_shape
from gae_core.models.likelihoods import Likelihood, as_likelihood

Corruption = Callable[..., Tensor]


def salt_and_pepper(level: float) -> Corruption:
    """Corruption that replaces each entry, with probability ``level``, by a fair coin's 0 or 1.

    Returns:
        ``corrupt(x, generator=None)``, for x (batch, ...).

    Raises:
        ValueError: if ``level`` is no probability above 0.
    """
    if not 0 < level <= 1:
        raise ValueError(f"level must be in (0, 1], got {level}")

    def corrupt(x: Tensor, *, generator: Generator | None = None) -> Tensor:
        u = parallel.rand_like(x, generator=generator)
        return torch.where(u < level, (u < level / 2).to(x), x)  # half of those that are replaced become 1

    return corrupt


def gaussian_noise(sigma: float) -> Corruption:
    """Corruption that adds N(0, sigma² I).

    Returns:
        ``corrupt(x, generator=None)``, for x (batch, ...).

    Raises:
        ValueError: if ``sigma`` is not positive.
    """
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be positive, got {sigma}")

    def corrupt(x: Tensor, *, generator: Generator | None = None) -> Tensor:
        return x + sigma * parallel.randn_like(x, generator=generator)

    return corrupt


@dataclass(frozen=True)
class DenoisingLoss:
    """Terms of the loss, each of shape (batch,).

    Attributes:
        total: mean of -log P(x | corrupted) over the steps of the walkback.
        first: that of the first step, the loss without walkback.
    """

    total: Tensor
    first: Tensor


class DenoisingAutoencoder(Autoencoder):
    r"""Autoencoder trained to undo a corruption :math:`C(\tilde x|x)`; alternating the two is its sampler.

    .. math:: \min\ \mathrm E\bigl[-\log P(x|\tilde x)\bigr], \qquad
        \tilde X_t \sim C(\cdot|X_t), \quad X_{t+1} \sim P(\cdot|\tilde X_t)

    With the true reverse conditional the chain has the data's distribution as its stationary one (Bengio et al., 2013).
    The walkback goes on from samples of P for more steps, each of them scored against the clean x: it looks for what
    the chain would do wrong, and teaches the way back. The samples count as data: no gradient passes through them.

    Args:
        encoder: module x (batch, ...) -> (batch, dim).
        decoder: module (batch, dim) -> x (batch, ...), logits or means.
        dim: dimension of the code.
        corruption: ``corrupt(x, generator=...)``, for example :func:`salt_and_pepper`.
        likelihood: "bernoulli" (entries 0 and 1), "gaussian", or an object of ``likelihoods``.
        sigma: standard deviation of the Gaussian P(x | corrupted).
        walkback: steps, 1 for none.

    Raises:
        ValueError: for another likelihood, or a number out of range; when used, if x has another shape than what the
            decoder gives, or entries outside of [0, 1] with the Bernoulli likelihood.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        dim: int,
        *,
        corruption: Corruption,
        likelihood: str | Likelihood = "bernoulli",
        sigma: float = 1.0,
        walkback: int = 1,
    ) -> None:
        super().__init__(encoder, decoder, dim)
        if walkback < 1 or not 0 < sigma < float("inf"):
            raise ValueError(f"walkback must be at least 1 and sigma positive, got walkback={walkback}, sigma={sigma}")
        self.corruption, self.likelihood, self.walkback = corruption, as_likelihood(likelihood, sigma), walkback

    def decode(self, z: Tensor) -> Tensor:
        """Means (batch, ...) of P(x | corrupted) for the code of the corrupted x."""
        return self.likelihood.mean(self.decoder(z))

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> DenoisingLoss:
        """Loss on a batch, its corruption from ``generator``; ``y`` is not used."""
        self.likelihood.check_range(x)
        current, terms = x, []
        for step in range(self.walkback):
            output = self.decoder(self.encoder(self.corruption(current, generator=generator)))
            check_shape(x, output)
            terms.append(-self.likelihood.log_prob(x, output))
            if step + 1 < self.walkback:
                current = self.likelihood.draw(self.likelihood.mean(output).detach(), generator)
        return DenoisingLoss(torch.stack(terms).mean(0), terms[0])

    @torch.no_grad()
    def chain(self, x: Tensor, steps: int, *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Run the chain from x (n, ...).

        Returns:
            Means of P and samples of it after each step, each (steps, n, ...).

        Raises:
            ValueError: if ``steps`` is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        means, samples = [], []
        for _ in range(steps):
            means.append(self(self.corruption(x, generator=generator)))
            x = self.likelihood.draw(means[-1], generator)
            samples.append(x)
        return torch.stack(means), torch.stack(samples)

    def score(self, x: Tensor, sigma: float) -> Tensor:
        r"""Estimate of :math:`\nabla\log p_\sigma(x)` by Tweedie's identity: (r(x) - x) / sigma².

        Exact for the best r under the corruption N(0, sigma² I); :math:`p_\sigma` is the density of corrupted data.

        Raises:
            ValueError: if ``sigma`` is not positive, or x has another shape than what the decoder gives.
        """
        if not 0 < sigma < float("inf"):
            raise ValueError(f"sigma must be positive, got {sigma}")
        output = self(x)
        check_shape(x, output)
        return (output - x) / sigma**2


class ContractiveAutoencoder(Autoencoder):
    r"""Autoencoder whose code is penalised for moving with x.

    .. math:: \|x - D(E(x))\|^2 + \lambda\,\|\partial E / \partial x\|_F^2

    Args:
        encoder: module x (batch, ...) -> code (batch, dim).
        decoder: module z (batch, dim) -> x (batch, ...).
        dim: dimension of the code.
        lam: weight of the penalty, in units of x squared times x squared over code squared.

    Raises:
        ValueError: if ``lam`` is negative; when used, if x has another shape than what the decoder gives.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, dim: int, *, lam: float) -> None:
        super().__init__(encoder, decoder, dim)
        if not lam >= 0:
            raise ValueError(f"lam must be at least 0, got {lam}")
        self.lam = lam

    def jacobian(self, x: Tensor) -> Tensor:
        """Derivatives of the code by the entries of x, (batch, dim, entries)."""
        one = torch.func.jacrev(lambda row: self.encoder(row[None])[0])
        return torch.func.vmap(one)(x).flatten(2)

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> "ContractiveLoss":
        """Loss on a batch; ``y`` and ``generator`` are not used."""
        reconstruction = super().loss(x).reconstruction
        contraction = self.jacobian(x).square().sum((1, 2))
        return ContractiveLoss(reconstruction + self.lam * contraction, reconstruction, contraction)

    @torch.no_grad()
    def chain(self, x: Tensor, steps: int, *, sigma: float, generator: Generator | None = None) -> Tensor:
        r"""Walk along the manifold: :math:`h = E(x)`, :math:`x' = D(h + J J^\top\epsilon)`, noise N(0, sigma² I).

        Source: Rifai et al., *A generative process for sampling contractive auto-encoders*, ICML 2012.

        Returns:
            What the decoder shows after each step, (steps, n, ...).

        Raises:
            ValueError: if ``steps`` is below 1 or ``sigma`` not positive.
        """
        if steps < 1 or not 0 < sigma < float("inf"):
            raise ValueError(f"steps must be at least 1 and sigma positive, got steps={steps}, sigma={sigma}")
        found = []
        for _ in range(steps):
            J, h = self.jacobian(x), self.encode(x)
            eps = sigma * parallel.randn_like(h, generator=generator)
            x = self.decode(h + torch.einsum("bde,bfe,bf->bd", J, J, eps))
            found.append(x)
        return torch.stack(found)


@dataclass(frozen=True)
class ContractiveLoss(AutoencoderLoss):
    """Terms of the loss, each of shape (batch,).

    Attributes:
        contraction: squared Frobenius norm of the code's Jacobian.
    """

    contraction: Tensor
