"""The conditional VAE: labels, or a part of the datum, decide what is generated. Likelihoods are in nats.

Source: Sohn, Lee and Yan, *Learning structured output representation using deep conditional generative models*,
NeurIPS 2015.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from gae_core.models.likelihoods import Bernoulli
from gae_core.models.vae import LatentVariableModel


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


class CVAE(LatentVariableModel):
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
        **options: ``likelihood``, ``beta``, ``sigma``, ``norm``, ``binarise`` as for
            :class:`gae_core.models.vae.LatentVariableModel`.

    Raises:
        ValueError: as LatentVariableModel; and when used, if y is missing, of the wrong kind or shape, or out of range.
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
            return y.to(like)
        if y.shape != (len(like),) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"y must be integer labels of shape ({len(like)},), got {y.dtype} {tuple(y.shape)}")
        y = y.to(like.device).long()
        if ((y < 0) | (y >= self.classes)).any():
            raise ValueError(f"y must be labels 0 to {self.classes - 1}, got {int(y.min())} to {int(y.max())}")
        return F.one_hot(y, self.classes).to(like.dtype)

    def _beside(self, y: Tensor | None, like: Tensor) -> tuple[Tensor, ...]:
        return (self.condition(y, like),)

    def prior(self, y: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of p(z | y), each (batch, dim); ``like`` as in :meth:`condition`."""
        h = self.condition(y, like)
        if self.prior_network is None:
            return super().prior(y, h)
        return self._halves("prior", self.prior_network(h).to(h.dtype), len(h))


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
        self.network, self.likelihood = network, Bernoulli()

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
        self.likelihood.check_range(x)
        return FactorisedLoss(-self.likelihood.log_prob(x, logits))


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
