"""Batch normalisation of the code. Derived in the chapter *The entropic autoencoder*."""

from torch import Tensor, nn


class CodeBatchNorm(nn.BatchNorm1d):
    r"""Batch normalisation without scale and shift: mean 0 and variance 1 per coordinate, by construction.

    Implements ``def-eae-batch-norm``. In training the statistics are those of the batch, so that on every batch the
    means are 0 and the variances :math:`v_j / (v_j + \text{eps})`, with :math:`v_j` the variance before. In
    evaluation they are running averages, and both hold approximately only.

    Args:
        dim: dimension of the code.
        eps: added to the variance.
        momentum: weight of the newest batch in the running averages.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(dim, eps=eps, momentum=momentum, affine=False)

    def forward(self, z: Tensor) -> Tensor:
        """Normalise codes, shape (batch, dim); at least two of them in training.

        Raises:
            ValueError: for another shape, or a single code in training, which has no variance.
        """
        if z.ndim != 2 or z.shape[1] != self.num_features:
            raise ValueError(f"z must have shape (batch, {self.num_features}), got {tuple(z.shape)}")
        if self.training and len(z) < 2:
            raise ValueError("z must have at least 2 rows in training, got 1; call .eval() to encode single points")
        return super().forward(z)
