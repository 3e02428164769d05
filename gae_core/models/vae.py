"""The variational autoencoder, and its importance-weighted bound. Likelihoods and divergences are in nats.

Sources: Kingma and Welling, *Auto-encoding variational Bayes*, ICLR 2014; Burda, Grosse and Salakhutdinov,
*Importance weighted autoencoders*, ICLR 2016. Derived in the chapter *The variational autoencoder*.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from gae_core import parallel
from gae_core.gaussian import kl_to_standard_normal, standard_normal_log_prob
from gae_core.models.autoencoder import Autoencoder
from gae_core.models.likelihoods import Likelihood, as_likelihood


@dataclass(frozen=True)
class VAELoss:
    """Terms of the loss, each of shape (batch,).

    Attributes:
        total: reconstruction + beta * kl, what is minimised; for beta = 1 its expectation bounds -log p(x) from above.
        reconstruction: -log p(x | z) at one z drawn from q(z | x), with all its constants.
        kl: KL(q(z | x) || p(z)), in closed form; log q(z | x) - log p(z) at the same z where the prior has none.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


@dataclass(frozen=True)
class IWAELoss:
    """Terms of the loss, each of shape (batch,), on the same draws.

    Attributes:
        total: minus the logarithm of the mean weight, what is minimised; its expectation bounds -log p(x) from above.
        negative_elbo: minus the mean logarithm of a weight, never below ``total``.
    """

    total: Tensor
    negative_elbo: Tensor


def _last_layer(network: nn.Module) -> nn.Module:
    """The layer that makes the output's values, as far as a network shows it."""
    while (inner := getattr(network, "network", None)) is not None or isinstance(network, nn.Sequential):
        shapes = (nn.Flatten, nn.Unflatten, nn.Identity)
        layers = [inner] if inner is not None else [m for m in network if not isinstance(m, shapes)]
        if not layers:
            break
        network = layers[-1]
    return network


class LatentVariableModel(Autoencoder):
    r"""A code z from p(z | y), a datum x from p(x | z, y), and an encoder's Gaussian q(z | x, y): losses and estimates.

    .. math:: -\log p(x|z,y) + \beta\,\mathrm{KL}\bigl(q(z|x,y)\,\|\,p(z|y)\bigr), \qquad z \sim q(z|x,y)

    A subclass replaces the hooks in which it differs: ``posterior``, ``log_likelihood`` and ``decode``; ``prior`` for a
    Gaussian other than N(0, I); ``log_prior`` and ``sample_prior``, both, for a prior of another kind. The divergence
    is then estimated at the z of the loss, and importance sampling has the Gaussian of ``prior`` as a proposal still.
    A model without conditions does not look at y.

    Args:
        encoder: module x (batch, ...) -> (batch, 2 * dim), the means beside the logarithms of the variances.
        decoder: module z (batch, dim) -> what the likelihood takes: logits or means (batch, ...).
        dim: dimension of the code.
        likelihood: "bernoulli", "gaussian", or a :class:`gae_core.models.likelihoods.Likelihood`.
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
        likelihood: str | Likelihood = "bernoulli",
        beta: float = 1.0,
        sigma: float | None = 1.0,
        norm: nn.Module | None = None,
        binarise: bool = False,
    ) -> None:
        super().__init__(encoder, decoder, dim)
        self.likelihood = as_likelihood(likelihood, sigma)
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta must be at least 0 and finite, got {beta}")
        if self.likelihood.binary and isinstance(_last_layer(decoder), nn.Sigmoid):
            raise ValueError(
                "decoder must give logits for the Bernoulli likelihood, got one that ends in a Sigmoid, which would be "
                "applied twice: output=nn.Identity in gae_core.nets"
            )
        if binarise and not self.likelihood.binary:
            raise ValueError(f'binarise must be False for the {likelihood} likelihood: only "bernoulli" is of binary x')
        if self.has_gaussian_prior and type(self).sample_prior is not LatentVariableModel.sample_prior:
            raise ValueError(f"sample_prior must come with log_prior, got a {type(self).__name__} with the first alone")
        self.beta, self.norm, self.binarise = beta, norm, binarise

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of q(z | x, y), each (batch, dim), in the precision of x."""
        output = self.encoder(x, *self._beside(y, x))
        # Autocast would round the divergence. Tokens have no precision: for them half precision becomes float32.
        kind = x.dtype if x.is_floating_point() else torch.promote_types(output.dtype, torch.float32)
        mu, raw = self._halves("encoder", output.to(kind), len(x))
        return (mu, raw) if self.norm is None else self.norm(mu, raw)

    def log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Logarithms of p(x | z, y) for each x (batch, ...) at its z (batch, dim), shape (batch,)."""
        return self.likelihood.log_prob(x, self.decoder(z, *self._beside(y, z)))

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Means (batch, ...) of p(x | z, y)."""
        return self.likelihood.mean(self.decoder(z, *self._beside(y, z)))

    def prior(self, y: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of p(z | y) for each row of ``like``, each (batch, dim)."""
        zeros = like.new_zeros(len(like), self.dim)
        return zeros, zeros

    def log_prior(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Logarithms of p(z | y), (batch, ...), for codes z (batch, ..., dim), those of a row under the same y."""
        m, s = (v.view(len(z), *(1,) * (z.ndim - 2), self.dim) for v in self.prior(y, z))
        return standard_normal_log_prob((z - m) * (-0.5 * s).exp()) - 0.5 * s.sum(-1)

    def sample_prior(self, n: int, y: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
        """Codes (n, dim) drawn from p(z | y), y one condition for each."""
        if not self.has_gaussian_prior:
            raise NotImplementedError(f"{type(self).__name__} has its own log_prior and needs its own sample_prior")
        eps = self._noise(n, generator)
        mean, logvar = self.prior(y, eps)
        return mean + (0.5 * logvar).exp() * eps

    def _beside(self, y: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
        """What encoder and decoder are given beside their first input, whose rows and precision are those of like."""
        return ()

    def _observed(self, x: Tensor, generator: Generator | None) -> Tensor:
        """What the loss sees of x: with ``binarise`` zeros and ones whose means are x, new ones at each call."""
        self._refuse_type(x)
        self.likelihood.check_range(x)
        return self.likelihood.draw(x, generator) if self.binarise else x

    def _charge(self, kl: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        """What the loss charges for the divergence, (batch,)."""
        return self.beta * kl

    # ---- what follows from them --------------------------------------------------------------------------------------

    @property
    def weighs_divergence(self) -> bool:
        """Whether the loss has another weight of the divergence than 1."""
        return self.beta != 1

    @property
    def has_gaussian_prior(self) -> bool:
        """Whether p(z | y) is the Gaussian of :meth:`prior`: not if a subclass has another :meth:`log_prior`."""
        return type(self).log_prior is LatentVariableModel.log_prior

    def divergence(self, mu: Tensor, logvar: Tensor, y: Tensor | None = None) -> Tensor:
        """KL(q(z | x, y) || p(z | y)) in closed form, by dimension: (batch, dim).

        Raises:
            ValueError: if the prior is not the Gaussian of :meth:`prior`.
        """
        if not self.has_gaussian_prior:
            raise ValueError(f"model must have a Gaussian prior for the closed form, got a {type(self).__name__}")
        m, s = self.prior(y, mu)
        # The divergence of two Gaussians does not change when both are shifted and scaled so that the prior is N(0, I).
        return kl_to_standard_normal(((mu - m) * (-0.5 * s).exp())[..., None], (logvar - s)[..., None])

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> VAELoss:
        """Loss on a batch with one z for each x, its noise from ``generator``."""
        x = self._observed(x, generator)
        mu, logvar = self.posterior(x, y)
        eps = parallel.randn_like(mu, generator=generator)
        z = mu + (0.5 * logvar).exp() * eps
        reconstruction = -self.log_likelihood(x, z, y)
        if self.has_gaussian_prior:
            kl = self.divergence(mu, logvar, y).sum(1)
        else:
            kl = standard_normal_log_prob(eps) - 0.5 * logvar.sum(1) - self.log_prior(z, y)
        return VAELoss(reconstruction + self._charge(kl, mu, logvar), reconstruction, kl)

    def iwae_loss(
        self, x: Tensor, y: Tensor | None = None, *, samples: int, generator: Generator | None = None
    ) -> IWAELoss:
        """Minus the importance-weighted bound on a batch, with k = ``samples`` draws for each x: see :class:`IWAE`.

        Raises:
            ValueError: if ``samples`` is below 1, ``x``, after ``binarise``, has no likelihood, or the model weighs its
                divergence, which has no part in this bound.
        """
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if self.weighs_divergence:
            raise ValueError(f"beta must be 1, without free bits and warm-up, for this bound, got beta={self.beta}")
        x = self._observed(x, generator)
        eps = next(self.parameters()).new_empty(len(x), samples, self.dim)
        log_weights = self.log_weights(x, parallel.randn_like(eps, generator=generator), y)
        return IWAELoss(math.log(samples) - log_weights.logsumexp(1), -log_weights.mean(1))

    def log_weights(self, x: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
        r"""Logarithms of importance weights :math:`p(x|z,y)\,p(z|y)\,/\,q(z|x,y)`, (batch, samples).

        Their mean estimates p(x | y). Implements ``def-vae-weights``, and ``eq-cvae-importance`` for draws from q.

        Args:
            x: data, (batch, ...); for a Bernoulli likelihood all entries 0 or 1.
            eps: standard normal noise, (batch, samples, dim), from which z is made.
            y: condition of each x.

        Raises:
            ValueError: if ``x`` has no Bernoulli likelihood.
        """
        mu, logvar = (v[:, None] for v in self.posterior(x, y))
        log_q = standard_normal_log_prob(eps) - 0.5 * logvar.sum(-1)
        return self.log_joint(x, mu + (0.5 * logvar).exp() * eps, y) - log_q

    def log_joint(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Logarithms of p(x, z | y), (batch, samples), for each x (batch, ...) at its codes z (batch, samples, dim).

        Raises:
            ValueError: if ``x`` has no Bernoulli likelihood.
        """
        self.likelihood.check_support(x)
        rows, given = (None if v is None else v.repeat_interleave(z.shape[1], dim=0) for v in (x, y))
        return self.log_likelihood(rows, z.flatten(0, 1), given).view(z.shape[:2]) + self.log_prior(z, y)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Means (batch, dim) of q(z | x, y)."""
        return self.posterior(x, y)[0]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Reconstruction of x from the mean of its code."""
        return self.decode(self.encode(x, y), y)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
        """Decode n codes drawn from p(z | y), y one condition for each; means, without the noise of p(x | z, y)."""
        return self.decode(self.sample_prior(n, y, generator=generator), y)

    def _halves(self, name: str, output: Tensor, n: int) -> tuple[Tensor, ...]:
        """Means and logarithms of variances, each (n, dim), which the network of that name gives side by side."""
        if output.shape != (n, 2 * self.dim):
            raise ValueError(f"{name} must give shape {(n, 2 * self.dim)}, got {tuple(output.shape)}")
        return output.chunk(2, dim=1)


class VAE(LatentVariableModel):
    r"""Autoencoder with a distribution at either end: :math:`q(z|x)` from the encoder, :math:`p(x|z)` from the decoder.

    Its loss is minus ``def-vae-elbo``, at one z for each x and with weight beta on the divergence:

    .. math:: -\log p(x|z) + \beta\,\mathrm{KL}\bigl(q(z|x)\,\|\,N(0, I)\bigr), \qquad
        z = \mu(x) + \sigma(x) \odot \epsilon \sim q(z|x)

    The likelihood is :class:`gae_core.models.likelihoods.Bernoulli` unless told otherwise. Grey values are none of its
    support; with ``binarise`` the loss reads them as probabilities and draws zeros and ones anew at every call.

    ``encode`` gives the mean of q, ``decode`` the mean of p(x | z), and ``sample`` decodes codes drawn from N(0, I) to
    such means, without the noise of p(x | z). Arguments and errors are those of :class:`LatentVariableModel`.

    A logvar of -100 is an ordinary, nearly deterministic code. At 100 the divergence is finite in float64 and infinite
    in float32 (from 89 on), where :func:`gae_core.train.fit` stops with an error that names it.

    Source: Kingma and Welling, *Auto-encoding variational Bayes*, ICLR 2014; beta: Higgins et al., ICLR 2017.
    """


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
        """Loss on a batch with k draws for each x, their noise from ``generator``."""
        return self.iwae_loss(x, y, samples=self.samples, generator=generator)
