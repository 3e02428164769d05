"""The entropic autoencoder (Ghose, Rashwan and Poupart, UAI 2020). Derived in *The entropic autoencoder*."""

import math
from dataclasses import dataclass

from torch import Generator, Tensor, nn

from gae_core import parallel
from gae_core.entropy import knn_local_entropy
from gae_core.models.autoencoder import Autoencoder, squared_distance
from gae_core.normalization import CodeBatchNorm


@dataclass(frozen=True)
class EAELoss:
    """Terms of the loss, each of shape (batch,).

    Attributes:
        total: reconstruction - lam * entropy, what is minimised.
        reconstruction: squared error, summed over the entries of x.
        entropy: nearest-neighbour estimates of -log p(z) at each code, in nats; their mean is the entropy.
    """

    total: Tensor
    reconstruction: Tensor
    entropy: Tensor


class EAE(Autoencoder):
    r"""Autoencoder whose code is batch-normalised and pushed towards maximal entropy.

    .. math:: \|x - D(z)\|^2 - \lambda\,\hat H(z), \qquad z = \mathrm{BN}(E(x))

    Implements ``def-eae-loss``. With ``lam=0`` it is the autoencoder with batch norm alone.

    Args:
        encoder: module x (batch, ...) -> (batch, dim), before normalisation.
        decoder: module z (batch, dim) -> x (batch, ...).
        dim: dimension of the code.
        lam: weight of the entropy, in units of squared error per nat. The entropy is the whole estimate: where a paper
            drops the factor d / n of the sum of log-distances, its weight is this one times d / n.
        k: neighbour of the estimate; its authors recommend 1.
        duplicates: what to do where two x get the same code, of which the entropy is minus infinity: "raise", or
            "clamp" as :func:`gae_core.entropy.knn_local_entropy` does, for data that have copies.

    Raises:
        ValueError: if ``lam`` is negative or infinite or ``k`` below 1; from the loss, if the batch has no more than
            ``k`` points, or x has copies, and as :class:`gae_core.models.autoencoder.Autoencoder`.
        FloatingPointError: from the loss, if the codes are not finite, or different x get the same code: what a
            training comes to that diverged.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        dim: int,
        *,
        lam: float = 1.0,
        k: int = 1,
        duplicates: str = "raise",
    ) -> None:
        if not 0 <= lam < math.inf:
            raise ValueError(f"lam must be a number of at least 0, got {lam}: a negative one would shrink the entropy")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if duplicates not in ("raise", "clamp"):
            raise ValueError(f'duplicates must be "raise" or "clamp", got {duplicates!r}')
        super().__init__(encoder, decoder, dim)
        self.normalization = CodeBatchNorm(dim)
        self.lam, self.k, self.duplicates = lam, k, duplicates

    def encode(self, x: Tensor) -> Tensor:
        """Normalised codes (batch, dim): by the batch's statistics in training, by running ones in evaluation."""
        return self.normalization(self.encoder(x))

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> EAELoss:
        """Loss on a batch; ``y`` and ``generator`` are there for the common interface and not used."""
        z = self._codes(x)
        reconstruction = squared_distance(x, self.decode(z))
        if self.training:  # on several processes, neighbours are sought among the codes of all
            entropy = parallel.own(self._local_entropy(parallel.gather(z), parallel.gather(x)))
        else:
            entropy = self._local_entropy(z, x)
        return EAELoss(reconstruction - self.lam * entropy, reconstruction, entropy)

    def _local_entropy(self, z: Tensor, x: Tensor) -> Tensor:
        """The estimates at the codes z of x, with errors that speak of x and of the training, not of a sample."""
        if not z.isfinite().all():
            raise FloatingPointError("the codes of x are NaN or infinite: so is x, or the training has diverged")
        try:
            return knn_local_entropy(z, self.k, duplicates=self.duplicates)
        except ValueError as error:
            codes, rows = (len(v.detach().flatten(1).unique(dim=0)) for v in (z, x))
            if codes == len(z):
                raise
            if rows <= codes:  # what differs has codes of its own
                raise ValueError(
                    f"x has {len(x) - rows} copies of other rows among {len(x)}, and the entropy of codes that "
                    "coincide is minus infinity: remove them (torch.unique(x, dim=0)), add the noise that the data "
                    'have, or pass duplicates="clamp" to EAE'
                ) from error
            raise FloatingPointError(
                f"{rows} different x have {codes} different codes, and the entropy of codes that coincide is minus "
                "infinity: the training has diverged (a lower learning rate), or its precision is too low"
            ) from error
