"""The variational autoencoder, and its importance-weighted bound. Likelihoods and divergences are in nats.

Sources: Kingma and Welling, *Auto-encoding variational Bayes*, ICLR 2014; Burda, Grosse and Salakhutdinov,
*Importance weighted autoencoders*, ICLR 2016. Derived in the chapter *The variational autoencoder*.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gae_core import parallel
from gae_core.gaussian import kl_to_standard_normal, standard_normal_log_prob
from gae_core.models.autoencoder import Autoencoder


@dataclass(frozen=True)
class VAELoss:
    """Terms of the loss, each of shape (batch,).

    Attributes:
        total: reconstruction + beta * kl, what is minimised; for beta = 1 its expectation bounds -log p(x) from above.
        reconstruction: -log p(x | z) at one z drawn from q(z | x), with all its constants.
        kl: KL(q(z | x) || p(z)), in closed form.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


def refuse_outside_unit(x: Tensor) -> None:
    """Raise a ValueError unless all entries are in [0, 1]: outside, the Bernoulli loss falls without end."""
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(
            f"x must be in [0, 1] for the Bernoulli likelihood, got {float(x.min()):g} to {float(x.max()):g}: "
            "gae_core.data.to_unit(x) makes such floats of bytes, and (x + 1) / 2 of images in [-1, 1]"
        )


def _last_layer(network: nn.Module) -> nn.Module:
    """The layer that makes the output's values, as far as a network shows it."""
    while (inner := getattr(network, "network", None)) is not None or isinstance(network, nn.Sequential):
        shapes = (nn.Flatten, nn.Unflatten, nn.Identity)
        layers = [inner] if inner is not None else [m for m in network if not isinstance(m, shapes)]
        if not layers:
            break
        network = layers[-1]
    return network


class VAE(Autoencoder):
    r"""Autoencoder with a distribution at either end: :math:`q(z|x)` from the encoder, :math:`p(x|z)` from the decoder.

    Its loss is minus ``def-vae-elbo``, at one z for each x and with weight beta on the divergence:

    .. math:: -\log p(x|z) + \beta\,\mathrm{KL}\bigl(q(z|x)\,\|\,N(0, I)\bigr), \qquad
        z = \mu(x) + \sigma(x) \odot \epsilon \sim q(z|x)

    The likelihood is one of

    - ``"bernoulli"``: independent binary entries with the decoder's output as logits. It is a likelihood for entries 0
      and 1 alone. Grey values train as well, on the cross-entropy that is common for them, but what they give is no
      -log p(x): the density that it implies does not integrate to 1. Measures of the likelihood refuse them. With
      ``binarise`` the loss reads them as probabilities and draws an image of zeros and ones anew at every call.
    - ``"gaussian"``: :math:`N(x; m(z), \sigma^2 I)` with the decoder's output as means m. Its -log p(x|z) is the
      squared error over :math:`2\sigma^2`, plus :math:`\tfrac12\log 2\pi\sigma^2` an entry.

    ``encode`` gives the mean of q, ``decode`` the mean of p(x | z), and ``sample`` decodes codes drawn from N(0, I) to
    such means, without the noise of p(x | z).

    A logvar of -100 is an ordinary, nearly deterministic code. At 100 the divergence is finite in float64 and infinite
    in float32 (from 89 on), where :func:`gae_core.train.fit` stops with an error that names it.

    Source: Kingma and Welling, *Auto-encoding variational Bayes*, ICLR 2014; beta: Higgins et al., ICLR 2017.

    Args:
        encoder: module x (batch, ...) -> (batch, 2 * dim), the means beside the logarithms of the variances.
        decoder: module z (batch, dim) -> x (batch, ...), logits or means.
        dim: dimension of the code.
        likelihood: "bernoulli" or "gaussian".
        beta: weight of the divergence.
        sigma: standard deviation of the Gaussian likelihood, the same for all entries; None learns it, from 1.
        norm: module that makes (mu, logvar), each (batch, dim), of the two halves of the encoder's output; None takes
            them as they are.
        binarise: whether the loss draws binary images from grey ones, by the noise of its generator.

    Raises:
        ValueError: for another likelihood, a ``beta`` that is negative or infinite, a ``sigma`` that is not positive or
            has no use, ``binarise`` without the Bernoulli likelihood, or with it a decoder that ends in a sigmoid,
            whose output would be taken for logits; and when used, if encoder or decoder give other shapes, x is of
            another type than the weights, or with the Bernoulli likelihood not in [0, 1].
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        dim: int,
        *,
        likelihood: str = "bernoulli",
        beta: float = 1.0,
        sigma: float | None = 1.0,
        norm: nn.Module | None = None,
        binarise: bool = False,
    ) -> None:
        super().__init__(encoder, decoder, dim)
        if likelihood not in ("bernoulli", "gaussian"):
            raise ValueError(f'likelihood must be "bernoulli" or "gaussian", got {likelihood!r}')
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta must be at least 0 and finite, got {beta}")
        if likelihood == "bernoulli" and isinstance(_last_layer(decoder), nn.Sigmoid):
            raise ValueError(
                "decoder must give logits for the Bernoulli likelihood, got one that ends in a Sigmoid, which would be "
                "applied twice: output=nn.Identity in gae_core.nets"
            )
        if likelihood == "bernoulli" and sigma != 1.0:
            raise ValueError(f"sigma must be left out for a Bernoulli likelihood, which has none, got {sigma}")
        if sigma is not None and not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be a positive number, or None to learn it, got {sigma}")
        if binarise and likelihood != "bernoulli":
            raise ValueError(f'binarise must be False for the {likelihood} likelihood: only "bernoulli" is of binary x')
        self.likelihood, self.beta, self.norm, self.binarise = likelihood, beta, norm, binarise
        if sigma is None:
            self.log_sigma = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("log_sigma", torch.tensor(math.log(sigma)))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of q(z | x), each (batch, dim), in the precision of x."""
        return self._posterior_from(self.encoder(x), x)

    def _posterior_from(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The posterior's parameters from what the encoder gives for x."""
        parameters = output.to(x.dtype)  # autocast would round the divergence
        if parameters.shape != (len(x), 2 * self.dim):
            raise ValueError(f"encoder must give shape {(len(x), 2 * self.dim)}, got {tuple(parameters.shape)}")
        mu, raw = parameters.chunk(2, dim=1)
        return (mu, raw) if self.norm is None else self.norm(mu, raw)

    def encode(self, x: Tensor) -> Tensor:
        """Means (batch, dim) of q(z | x)."""
        return self.posterior(x)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Means (batch, ...) of p(x | z)."""
        return self._means(self.decoder(z))

    def _means(self, output: Tensor) -> Tensor:
        """Means of p(x | z) from what the decoder gives."""
        return output.sigmoid() if self.likelihood == "bernoulli" else output

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """Logarithms of p(x | z) for each x (batch, ...) at its z (batch, dim), shape (batch,)."""
        return self._log_density(x, self.decoder(z))

    def _log_density(self, x: Tensor, output: Tensor) -> Tensor:
        """Logarithms of p(x | z) from what the decoder gives at the z of each x."""
        output = output.to(x.dtype)
        if output.shape != x.shape:
            raise ValueError(f"decoder must give the shape of x, {tuple(x.shape)}, got {tuple(output.shape)}")
        if self.likelihood == "bernoulli":
            return -F.binary_cross_entropy_with_logits(output, x, reduction="none").flatten(1).sum(1)
        residual = ((x - output) / self.log_sigma.exp()).flatten(1)
        return standard_normal_log_prob(residual) - residual.shape[1] * self.log_sigma

    def log_weights(self, x: Tensor, eps: Tensor) -> Tensor:
        r"""Logarithms of importance weights :math:`p(x|z)\,p(z)\,/\,q(z|x)`; the weights' mean estimates p(x).

        Implements ``def-vae-weights``.

        Args:
            x: data, (batch, ...); for a Bernoulli likelihood all entries 0 or 1.
            eps: standard normal noise, (batch, samples, dim), from which z is made.

        Returns:
            Logarithms, (batch, samples).

        Raises:
            ValueError: if ``x`` has no Bernoulli likelihood.
        """
        mu, logvar = (v[:, None] for v in self.posterior(x))
        log_q = standard_normal_log_prob(eps) - 0.5 * logvar.sum(-1)
        return self.log_joint(x, mu + (0.5 * logvar).exp() * eps) - log_q

    def prior(self, y: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of p(z) for each row of ``like``, each (batch, dim); no ``y`` is used."""
        zeros = torch.zeros(len(like), self.dim, dtype=like.dtype, device=like.device)
        return zeros, zeros

    def log_joint(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Logarithms of p(x, z), (batch, samples), for each x (batch, ...) at its codes z (batch, samples, dim).

        Raises:
            ValueError: if ``x`` has no Bernoulli likelihood.
        """
        self._refuse_grey(x)
        condition = () if y is None else (y.repeat_interleave(z.shape[1], dim=0),)
        rows = x.repeat_interleave(z.shape[1], dim=0)
        log_likelihood = self.log_likelihood(rows, z.flatten(0, 1), *condition).view(z.shape[:2])
        m, s = (v[:, None] for v in self.prior(y, x))
        return log_likelihood + standard_normal_log_prob((z - m) * (-0.5 * s).exp()) - 0.5 * s.sum(-1)

    def _refuse_grey(self, x: Tensor) -> None:
        """Raise a ValueError if ``x`` has no likelihood."""
        if self.likelihood == "bernoulli" and not ((x == 0) | (x == 1)).all():
            raise ValueError(
                "x must have entries 0 and 1 alone, got others: grey values have no Bernoulli likelihood; "
                "binarise them, for example by torch.bernoulli(x, generator=...), and say so beside the figure"
            )

    def _binarised(self, x: Tensor, generator: Generator | None) -> Tensor:
        """What the loss sees of x: with ``binarise`` zeros and ones whose means are x, new ones at each call.

        Raises:
            ValueError: if x is of another type than the weights, or outside of [0, 1] where it may not be.
        """
        self._refuse_type(x)
        if self.likelihood == "bernoulli":
            refuse_outside_unit(x)
        if not self.binarise:
            return x
        return (parallel.rand_like(x, generator=generator) < x).to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> VAELoss:
        """Loss on a batch with one z for each x, its noise from ``generator``; ``y`` is not used."""
        x = self._binarised(x, generator)
        mu, logvar = self.posterior(x)
        z = mu + (0.5 * logvar).exp() * parallel.randn_like(mu, generator=generator)
        reconstruction, kl = -self.log_likelihood(x, z), kl_to_standard_normal(mu, logvar)
        return VAELoss(reconstruction + self.beta * kl, reconstruction, kl)


@dataclass(frozen=True)
class IWAELoss:
    """Terms of the loss, each of shape (batch,), on the same draws.

    Attributes:
        total: minus the logarithm of the mean weight, what is minimised; its expectation bounds -log p(x) from above.
        negative_elbo: minus the mean logarithm of a weight, never below ``total``.
    """

    total: Tensor
    negative_elbo: Tensor


class IWAE(VAE):
    r"""A VAE trained on the importance-weighted bound, of which its own is the case of one sample.

    .. math:: -\log\frac1k\sum_{s=1}^k w_s, \qquad w_s = \frac{p(x|z_s)\,p(z_s)}{q(z_s|x)}, \quad z_s \sim q(z|x)

    Implements ``def-vae-iw``. The value is the bound's, and its gradient that of ``eq-vae-iw-gradient``; the sum of
    normalised weights times logarithms that some programs minimise has this gradient, but not this value
    (``eq-vae-iw-surrogate``).

    Args:
        encoder: as for :class:`VAE`.
        decoder: as for :class:`VAE`.
        dim: dimension of the code.
        samples: k, draws for each x.
        **options: as for :class:`VAE`, without ``beta``: the bound does not split into two terms that one could weigh.

    Raises:
        ValueError: as VAE, if ``samples`` is below 1, or for another ``beta`` than 1; and in the loss, if x is grey
            without ``binarise`` and has no Bernoulli likelihood.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, dim: int, *, samples: int, **options) -> None:
        super().__init__(encoder, decoder, dim, **options)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if self.beta != 1:
            raise ValueError(f"beta must be 1 for the importance-weighted bound, got {self.beta}")
        self.samples = samples

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> IWAELoss:
        """Loss on a batch with k draws for each x, their noise from ``generator``; ``y`` is not used."""
        x = self._binarised(x, generator)
        eps = parallel.randn_like(x.new_empty(len(x), self.samples, self.dim), generator=generator)
        log_weights = self.log_weights(x, eps)
        return IWAELoss(math.log(self.samples) - log_weights.logsumexp(1), -log_weights.mean(1))
