"""The conditional VAE: labels, or a part of the datum, decide what is generated. Likelihoods are in nats.

Source: Sohn, Lee and Yan, *Learning structured output representation using deep conditional generative models*,
NeurIPS 2015.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gae_core import parallel
from gae_core.gaussian import kl_to_standard_normal, standard_normal_log_prob
from gae_core.models.vae import VAE, VAELoss, refuse_outside_unit


class Beside(nn.Module):
    """A network of two inputs (batch, ...) and (batch, width), whose rows it sees side by side.

    Args:
        network: module (batch, features + width) -> output.
        body: what the first input passes alone before, (batch, ...) -> (batch, features); None only flattens it.
    """

    def __init__(self, network: nn.Module, body: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.body = network, nn.Flatten() if body is None else body

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Output of the network."""
        return self.network(torch.cat([self.body(first), second], 1))


class FirstAlone(nn.Module):
    """A network of two inputs that does not see the second."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Output of the network for the first input."""
        return self.network(first)


class LinearMean(nn.Module):
    """Mean W h and log-variance 0 side by side, (batch, 2 * dim); W is 0 at first.

    Args:
        width: of h.
        dim: of the mean.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, width))

    def forward(self, h: Tensor) -> Tensor:
        """Parameters of N(W h, I)."""
        mean = F.linear(h, self.weight)
        return torch.cat([mean, torch.zeros_like(mean)], 1)


class CVAE(VAE):
    r"""A VAE of x given y: y goes into the encoder, the decoder and, if asked, the prior.

    .. math:: -\log p(x|z,y) + \beta\,\mathrm{KL}\bigl(q(z|x,y)\,\|\,p(z|y)\bigr), \qquad z \sim q(z|x,y)

    Implements ``eq-cvae-elbo``. With ``classes``, y are labels, which the networks see as one-hot vectors. Without, y
    are vectors that the networks see as they are, for example the observed pixels of an image whose others are x.

    Args:
        encoder: module (x (batch, ...), h (batch, width)) -> (batch, 2 * dim), see :class:`Beside`.
        decoder: module (z (batch, dim), h (batch, width)) -> x (batch, ...), logits or means.
        dim: dimension of the code.
        classes: number of labels, or None for conditions that are vectors.
        prior: module h (batch, width) -> (batch, 2 * dim), mean and log-variance of p(z | y); None is N(0, I).
        **options: ``likelihood``, ``beta``, ``sigma``, ``norm`` as for :class:`gae_core.models.vae.VAE`.

    Raises:
        ValueError: as VAE; and when used, if y is missing, of the wrong kind or shape, or out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        dim: int,
        *,
        classes: int | None = None,
        prior: nn.Module | None = None,
        **options,
    ) -> None:
        super().__init__(encoder, decoder, dim, **options)
        if classes is not None and classes < 1:
            raise ValueError(f"classes must be at least 1, or None for conditions that are vectors, got {classes}")
        self.classes, self.prior_network = classes, prior

    def condition(self, y: Tensor | None, like: Tensor) -> Tensor:
        """What the networks see of y: (batch, width), in the kind of ``like``, whose rows are the data or codes."""
        if y is None:
            raise ValueError("y must be given: the model is conditional, it has no likelihood without labels")
        if self.classes is None:
            if y.ndim != 2 or len(y) != len(like) or not y.is_floating_point():
                raise ValueError(f"y must be floats of shape ({len(like)}, width), got {y.dtype} {tuple(y.shape)}")
            return y.to(like.dtype)
        if y.shape != (len(like),) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"y must be integer labels of shape ({len(like)},), got {y.dtype} {tuple(y.shape)}")
        y = y.long()
        if ((y < 0) | (y >= self.classes)).any():
            raise ValueError(f"y must be labels 0 to {self.classes - 1}, got {int(y.min())} to {int(y.max())}")
        return F.one_hot(y, self.classes).to(like.dtype)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of q(z | x, y), each (batch, dim)."""
        return self._posterior_from(self.encoder(x, self.condition(y, x)), x)

    def prior(self, y: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of p(z | y), each (batch, dim); ``like`` as in :meth:`condition`."""
        h = self.condition(y, like)
        if self.prior_network is None:
            zeros = h.new_zeros(len(h), self.dim)
            return zeros, zeros
        parameters = self.prior_network(h).to(h.dtype)
        if parameters.shape != (len(h), 2 * self.dim):
            raise ValueError(f"prior must give shape {(len(h), 2 * self.dim)}, got {tuple(parameters.shape)}")
        mean, logvar = parameters.chunk(2, dim=1)
        return mean, logvar

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Means (batch, dim) of q(z | x, y)."""
        return self.posterior(x, y)[0]

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Means (batch, ...) of p(x | z, y)."""
        return self._means(self.decoder(z, self.condition(y, z)))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Reconstruction of x with its own y."""
        return self.decode(self.encode(x, y), y)

    def log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Logarithms of p(x | z, y), shape (batch,)."""
        return self._log_density(x, self.decoder(z, self.condition(y, x)))

    def log_weights(self, x: Tensor, eps: Tensor, y: Tensor | None = None, *, proposal: str = "posterior") -> Tensor:
        r"""Logarithms of weights whose mean estimates p(x | y), (batch, samples).

        With the posterior as proposal they are :math:`p(x|z,y)\,p(z|y)\,/\,q(z|x,y)`, :math:`z \sim q(z|x,y)`; with the
        prior, :math:`p(x|z,y)`, :math:`z \sim p(z|y)`. Implements ``eq-cvae-importance``.

        Args:
            x: data, (batch, ...); for a Bernoulli likelihood all entries 0 or 1.
            eps: standard normal noise, (batch, samples, dim), from which z is made.
            y: condition of each x.
            proposal: "posterior" or "prior".

        Raises:
            ValueError: if ``x`` has no Bernoulli likelihood, or for another proposal.
        """
        if proposal not in ("posterior", "prior"):
            raise ValueError(f'proposal must be "posterior" or "prior", got {proposal!r}')
        mu, logvar = (v[:, None] for v in (self.posterior(x, y) if proposal == "posterior" else self.prior(y, x)))
        log_proposal = standard_normal_log_prob(eps) - 0.5 * logvar.sum(-1)
        return self.log_joint(x, mu + (0.5 * logvar).exp() * eps, y) - log_proposal

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> VAELoss:
        """Loss on a batch with one z for each x, its noise from ``generator``."""
        x = self._binarised(x, generator)
        (mu, logvar), (m, s) = self.posterior(x, y), self.prior(y, x)
        z = mu + (0.5 * logvar).exp() * parallel.randn_like(mu, generator=generator)
        # The divergence of two Gaussians does not change when both are shifted and scaled so that the prior is N(0, I).
        kl = kl_to_standard_normal((mu - m) * (-0.5 * s).exp(), logvar - s)
        reconstruction = -self.log_likelihood(x, z, y)
        return VAELoss(reconstruction + self.beta * kl, reconstruction, kl)

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, generator: Generator | None = None) -> Tensor:
        """Decode n codes drawn from p(z | y), y one condition for each; means, without the noise of p(x | z, y)."""
        parameter = next(self.parameters())
        device = parameter.device if generator is None else generator.device
        eps = torch.randn(n, self.dim, generator=generator, device=device, dtype=parameter.dtype).to(parameter.device)
        y = None if y is None else y.to(parameter.device)
        mean, logvar = self.prior(y, eps)
        return self.decode(mean + (0.5 * logvar).exp() * eps, y)


class LabelPriorVAE(CVAE):
    r"""A VAE in which the label only moves the prior's mean: :math:`p(z|y) = N(W_y, I)`, encoder and decoder without y.

    .. math:: \mathrm{KL} = \tfrac12\sum_j\left((\mu_j - W_{jy})^2 + \sigma_j^2 - \log\sigma_j^2 - 1\right)

    Implements ``eq-cvae-prior-mean``. Source: J. Su's code of 2018 (see the chapter).

    Args:
        encoder: module x (batch, ...) -> (batch, 2 * dim).
        decoder: module z (batch, dim) -> x (batch, ...).
        dim: dimension of the code.
        classes: number of labels.
        **options: as for :class:`CVAE`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, dim: int, *, classes: int, **options) -> None:
        prior = LinearMean(classes, dim)
        super().__init__(FirstAlone(encoder), FirstAlone(decoder), dim, classes=classes, prior=prior, **options)

    @property
    def means(self) -> Tensor:
        """Means of p(z | y), (classes, dim)."""
        return self.prior_network.weight.detach().T


@dataclass(frozen=True)
class FactorisedLoss:
    """Terms of the loss, each of shape (batch,): -log p(x | y)."""

    total: Tensor


class FactorisedNet(nn.Module):
    r"""The network without a code: binary entries that are independent given y, :math:`\prod_j p(x_j|y)`.

    The best it can do is the entropy of x given y plus the total correlation, ``eq-cvae-total-correlation``.

    Args:
        network: module y (batch, width) -> logits (batch, ...).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, y: Tensor) -> Tensor:
        """Means (batch, ...) of p(x | y)."""
        return self.network(y).sigmoid()

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> FactorisedLoss:
        """-log p(x | y) of each x; ``generator`` is there for the common interface and not used."""
        if y is None:
            raise ValueError("y must be given: the network predicts x from it")
        logits = self.network(y)
        if logits.shape != x.shape:
            raise ValueError(f"network must give the shape of x, {tuple(x.shape)}, got {tuple(logits.shape)}")
        refuse_outside_unit(x)
        return FactorisedLoss(F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1))


def quadrant_mask(height: int, width: int, observed: Sequence[str]) -> Tensor:
    """Which pixels are observed, (height, width), booleans.

    Args:
        height: of the image, even.
        width: of the image, even.
        observed: quadrants, some of "top left", "top right", "bottom left", "bottom right".

    Raises:
        ValueError: for an odd side, a name that is none, or quadrants that are none or all.
    """
    names = ("top left", "top right", "bottom left", "bottom right")
    if height % 2 or width % 2:
        raise ValueError(f"height and width must be even, got {height} and {width}")
    if not set(observed) <= set(names) or not 1 <= len(set(observed)) <= 3:
        raise ValueError(f"observed must be one to three of {', '.join(names)}, got {list(observed)}")
    halves = torch.tensor([name in observed for name in names]).view(2, 2)
    return halves.repeat_interleave(height // 2, 0).repeat_interleave(width // 2, 1)
