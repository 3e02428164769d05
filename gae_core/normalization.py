"""Normalisation of codes, and of the parameters of a posterior.

Derived in *The entropic autoencoder* and *Posterior collapse and batch norm*.
"""

import math

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


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

    Raises:
        ValueError: if ``dim`` is below 1, ``eps`` not positive or ``momentum`` outside (0, 1].
    """

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be a positive number, got {eps}")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1], got {momentum}: it is the weight of the newest batch")
        super().__init__(dim, eps=eps, momentum=momentum, affine=False)

    def forward(self, z: Tensor) -> Tensor:
        """Normalise codes, shape (batch, dim); at least two of them in training. Half precision is widened to float32.

        Raises:
            ValueError: for another shape or type, or fewer than two codes in training, which have no variance.
            FloatingPointError: in training, if the variance over the batch is not finite, as it is with one NaN. The
                running averages have not seen such a batch: they would be NaN for ever after.
        """
        if z.ndim != 2 or z.shape[1] != self.num_features:
            raise ValueError(f"z must have shape (batch, {self.num_features}), got {tuple(z.shape)}")
        if self.training and len(z) < 2:
            raise ValueError(
                f"z must have at least 2 rows in training, got {len(z)}; call .eval() to encode single points"
            )
        if not z.is_floating_point():
            raise ValueError(f"z must be floating point, got {z.dtype}")
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            if self.training:
                _refuse_infinite(z.detach().var(0))
            return super().forward(z)
        size = distributed.get_world_size()
        mean = _Sum.apply(z.mean(0)) / size
        centred = z - mean
        var = _Sum.apply(centred.square().mean(0)) / size
        _refuse_infinite(var.detach())
        n = size * len(z)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return centred * (var + self.eps).rsqrt()


def _refuse_infinite(var: Tensor) -> None:
    if not var.isfinite().all():
        raise FloatingPointError(
            "the codes of the batch have a variance that is NaN or infinite: there is NaN or an infinity in the data, "
            "or the training has diverged. The running averages are as before"
        )


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


class _Norm(nn.Module):
    """What norms of a posterior's parameters share.

    ``forward(mu, raw)`` gives means and logarithms of variances, and ``floor()`` a lower bound of their divergence from
    N(0, I), in nats and but for eps.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim

    def _check(self, mu: Tensor, raw: Tensor) -> None:
        for name, value in (("mu", mu), ("raw", raw)):
            if value.ndim != 2 or value.shape != (len(mu), self.dim):
                raise ValueError(f"{name} must have shape (batch, {self.dim}), got {tuple(value.shape)}")
            if not value.is_floating_point():
                raise ValueError(f"{name} must be floating point, got {value.dtype}")


class FixedScaleBatchNorm(_Norm):
    r"""Batch norm on the means of a posterior, with a scale that is not trained: BN-VAE.

    .. math:: \mu_j \leftarrow \gamma\,\mathrm{BN}(\mu)_j + \beta_j, \qquad \log\sigma^2_j = \text{raw}_j

    Implements ``def-bn_vae-fixed-scale``. On the statistics of a batch the mean of :math:`\mu_j^2` is
    :math:`\gamma^2 v_j / (v_j + \text{eps}) + \beta_j^2`, with :math:`v_j` the variance before the norm. Half the sum
    over j bounds the mean divergence from N(0, I) from below, whatever the variances. In evaluation the statistics
    are running averages, and the bound holds approximately only.

    Source: Zhu et al., *A batch normalized inference network keeps the KL vanishing away*, ACL 2020.

    Args:
        dim: dimension of the code.
        gamma: standard deviation of each mean over the batch, the same for all. Above 1 the aggregate posterior has
            more variance than the prior N(0, I).
        eps: added to the variance in the norm; torch's usual one.

    Raises:
        ValueError: if ``gamma`` is no positive number; when used, for other shapes or a single row in training.
    """

    def __init__(self, dim: int, gamma: float, *, eps: float = 1e-5) -> None:
        super().__init__(dim)
        self.gamma = _positive(gamma)
        self.norm = CodeBatchNorm(dim, eps=eps)
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, mu: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of variances, each (batch, dim)."""
        self._check(mu, raw)
        return self.gamma * self.norm(mu) + self.beta, raw

    @torch.no_grad()
    def floor(self) -> float:
        r"""Of a batch's mean: :math:`\tfrac12\sum_j(\gamma^2 + \beta_j^2)`, ``eq-bn_vae-bound``."""
        return 0.5 * (self.dim * self.gamma**2 + float(self.beta.square().sum()))


class FixedScaleLayerNorm(_Norm):
    r"""Layer norm on the means of a posterior: each x by itself gets means with mean 0 and variance gamma² over j.

    .. math:: \mu \leftarrow \gamma\,\mathrm{LN}(\mu), \qquad \log\sigma^2 = \text{raw}

    Implements ``def-bn_vae-layer-norm``. The divergence from N(0, I) has the same lower bound as with
    :class:`FixedScaleBatchNorm`, and the means may be the same for all x: it is here as the counterexample.

    Args:
        dim: dimension of the code, at least 2.
        gamma: root mean square of the means of one x.
        eps: added to the variance in the norm.

    Raises:
        ValueError: if ``gamma`` is no positive number or ``dim`` below 2; when used, for other shapes.
    """

    def __init__(self, dim: int, gamma: float, *, eps: float = 1e-5) -> None:
        super().__init__(dim)
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}: a single number has no variance over coordinates")
        self.gamma, self.eps = _positive(gamma), eps

    def forward(self, mu: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of variances, each (batch, dim)."""
        self._check(mu, raw)
        return self.gamma * F.layer_norm(mu, (self.dim,), eps=self.eps), raw

    def floor(self) -> float:
        r"""Of every single x: :math:`\tfrac d2\gamma^2`, ``eq-bn_vae-layer-bound``."""
        return 0.5 * self.dim * self.gamma**2


class CoupledBatchNorm(_Norm):
    r"""Batch norm on means and standard deviations of a posterior, scaled so that the second moments add up to 1.

    .. math::

        \mu_j \leftarrow \gamma_{\mu,j}\,\mathrm{BN}(\mu)_j, \quad
        \sigma_j = \gamma_{\sigma,j}\,\mathrm{BN}(\text{raw})_j, \qquad
        \gamma_{\mu,j}^2 = \tau + (1-\tau)\,s(\theta_j), \quad \gamma_{\sigma,j}^2 = (1-\tau)\,s(-\theta_j)

    with the logistic function s, and :math:`\theta` trained, from 0. Implements ``def-bn_vae-coupled``. The squared
    scales add up to 1, which is what the moments of the prior N(0, I) ask of the statistics of a batch.

    The normalised :math:`\sigma` has both signs; only its square matters. The variance is
    :math:`\sigma^2 + \text{floor}`. Where :math:`\sigma = 0` its logarithm is that of ``floor``, with gradient 0, and
    nowhere is the gradient in :math:`\sigma` larger than :math:`1/\sqrt{\text{floor}}`. Without the floor both are
    infinite there.

    Source: Su, *VAE + BN = a better VAE*, 2020, whose code has eps = 1e-8 and no floor.

    Args:
        dim: dimension of the code.
        tau: smallest share of the means in the second moment, in (0, 1). The divergence from N(0, I) is at least
            :math:`-\tfrac d2\log(1-\tau)` on the statistics of a batch, but for eps and floor.
        eps: added to the variances in the norms; torch's usual one.
        floor: added to the variance of the posterior.

    Raises:
        ValueError: if ``tau`` is outside (0, 1) or ``floor`` is not positive; when used, for other shapes or a single
            row in training.
    """

    def __init__(self, dim: int, tau: float = 0.5, *, eps: float = 1e-5, floor: float = 1e-6) -> None:
        super().__init__(dim)
        if not 0 < tau < 1:
            raise ValueError(f"tau must be between 0 and 1, both excluded, got {tau}")
        if not 0 < floor < math.inf:
            raise ValueError(f"floor must be a positive number, got {floor}")
        self.tau, self.least_variance = tau, floor
        self.norm_mu, self.norm_sigma = CodeBatchNorm(dim, eps=eps), CodeBatchNorm(dim, eps=eps)
        self.theta = nn.Parameter(torch.zeros(dim))

    def squared_scales(self) -> tuple[Tensor, Tensor]:
        r"""The squares of :math:`\gamma_\mu` and :math:`\gamma_\sigma`, each (dim,); they add up to 1."""
        return self.tau + (1 - self.tau) * self.theta.sigmoid(), (1 - self.tau) * (-self.theta).sigmoid()

    def forward(self, mu: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Means and logarithms of variances, each (batch, dim)."""
        self._check(mu, raw)
        share_mu, share_sigma = self.squared_scales()
        variance = share_sigma * self.norm_sigma(raw).square() + self.least_variance
        return share_mu.sqrt() * self.norm_mu(mu), variance.log()

    @torch.no_grad()
    def floor(self) -> float:
        r"""Of a batch's mean: :math:`-\tfrac12\sum_j\log\gamma_{\sigma,j}^2`, ``eq-bn_vae-coupled-bound``."""
        return -0.5 * float(self.squared_scales()[1].log().sum())


def _positive(gamma: float) -> float:
    """The scale, if it is one."""
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be a positive number, got {gamma}; without a norm there is no bound: norm=None")
    return gamma
