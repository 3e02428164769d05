"""The entropic autoencoder (Ghose, Rashwan and Poupart, UAI 2020). Derived in *The entropic autoencoder*."""

from dataclasses import dataclass

from torch import Generator, Tensor, nn

from gae_core import parallel
from gae_core.entropy import knn_local_entropy
from gae_core.models.autoencoder import Autoencoder
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
        lam: weight of the entropy, in units of squared error a nat. The entropy is the whole estimate: where a paper
            drops the factor d / n of the sum of log-distances, its weight is this one times d / n.
        k: neighbour of the estimate; its authors recommend 1.

    Raises:
        ValueError: if ``lam`` is negative, or (from the loss) if the batch has no more than ``k`` points or two
            inputs get the same code.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, dim: int, *, lam: float = 1.0, k: int = 1) -> None:
        if not lam >= 0:
            raise ValueError(f"lam must be at least 0, got {lam}: a negative weight would shrink the entropy")
        super().__init__(encoder, decoder, dim)
        self.normalization = CodeBatchNorm(dim)
        self.lam, self.k = lam, k

    def encode(self, x: Tensor) -> Tensor:
        """Normalised codes (batch, dim): by the batch's statistics in training, by running ones in evaluation."""
        return self.normalization(self.encoder(x))

    def loss(self, x: Tensor, y: Tensor | None = None, *, generator: Generator | None = None) -> EAELoss:
        """Loss on a batch; ``y`` and ``generator`` are there for the common interface and not used."""
        z = self.encode(x)
        reconstruction = (x - self.decode(z)).square().flatten(1).sum(1)
        if self.training:  # on several processes, neighbours are sought among the codes of all
            entropy = parallel.own(knn_local_entropy(parallel.gather(z), self.k))
        else:
            entropy = knn_local_entropy(z, self.k)
        return EAELoss(reconstruction - self.lam * entropy, reconstruction, entropy)
