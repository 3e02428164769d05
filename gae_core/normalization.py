"""Batch normalisation of the code. Derived in the chapter *The entropic autoencoder*."""

import torch
from torch import Tensor, distributed, nn


class CodeBatchNorm(nn.BatchNorm1d):
    r"""Batch normalisation without scale and shift: mean 0 and variance 1 per coordinate, by construction.

    Implements ``def-eae-batch-norm``. In training the statistics are those of the batch, so that on every batch the
    means are 0 and the variances :math:`v_j / (v_j + \text{eps})`, with :math:`v_j` the variance before. In
    evaluation they are running averages, and both hold approximately only.

    Where torch.distributed is in use, the batch is that of all processes, each with as many rows
    (``torch.nn.SyncBatchNorm`` would do the same, on CUDA alone).

    Args:
        dim: dimension of the code.
        eps: added to the variance.
        momentum: weight of the newest batch in the running averages.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(dim, eps=eps, momentum=momentum, affine=False)

    def forward(self, z: Tensor) -> Tensor:
        """Normalise codes, shape (batch, dim); at least two of them in training. Half precision is widened to float32.

        Raises:
            ValueError: for another shape, or a single code in training, which has no variance.
        """
        if z.ndim != 2 or z.shape[1] != self.num_features:
            raise ValueError(f"z must have shape (batch, {self.num_features}), got {tuple(z.shape)}")
        if self.training and len(z) < 2:
            raise ValueError("z must have at least 2 rows in training, got 1; call .eval() to encode single points")
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return super().forward(z)
        size = distributed.get_world_size()
        mean = _Sum.apply(z.mean(0)) / size
        centred = z - mean
        var = _Sum.apply(centred.square().mean(0)) / size
        n = size * len(z)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return centred * (var + self.eps).rsqrt()


class _Sum(torch.autograd.Function):
    """Sum over the processes. A process's gradient is the sum of the gradients that all have."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.apply(gradient)
