"""Densities fitted to codes after the training, to draw new codes from."""

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class GaussianMixture:
    r"""A mixture of Gaussians, :math:`q(z) = \sum_c \pi_c\, N(z; m_c, \Sigma_c)`.

    Implements ``def-autoencoder-mixture``.

    Attributes:
        weights: :math:`\pi_c`, shape (components,), summing to 1.
        means: :math:`m_c`, shape (components, d).
        factors: Cholesky factors of the covariances :math:`\Sigma_c`, shape (components, d, d).

    Raises:
        ValueError: for shapes that do not fit, or weights that are negative or do not sum to 1.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __post_init__(self):
        shapes = [tuple(part.shape) for part in (self.weights, self.means, self.factors)]
        c, d = shapes[1] if self.means.ndim == 2 else (0, 0)
        if not c * d or shapes != [(c,), (c, d), (c, d, d)]:
            raise ValueError(f"weights, means and factors must have shapes (c,), (c, d) and (c, d, d), got {shapes}")
        if not ((self.weights >= 0).all() and abs(float(self.weights.sum()) - 1) < 1e-3):
            raise ValueError(f"weights must not be negative and sum to 1, got {self.weights.tolist()}")

    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """Draw n independent points, shape (n, d)."""
        if not isinstance(n, Integral) or n < 1:
            raise ValueError(f"n must be a whole number, at least 1, got {n}")
        device = self.means.device if generator is None else generator.device
        component = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        eps = torch.randn(n, self.means.shape[1], generator=generator, device=device, dtype=self.means.dtype).to(
            self.means.device
        )
        component = component.to(self.means.device)
        return self.means[component] + torch.einsum("nij,nj->ni", self.factors[component], eps)

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-density in nats, shape (n,), of finite points z of shape (n, d)."""
        d = self.means.shape[1]
        if z.ndim != 2 or z.shape[1] != d or not torch.isfinite(z).all():
            raise ValueError(f"z must be finite, of shape (n, {d}), got {tuple(z.shape)}, or NaN or infinite entries")
        normal = torch.distributions.MultivariateNormal(self.means, scale_tril=self.factors)
        return torch.logsumexp(self.weights.log() + normal.log_prob(z[:, None]), dim=1)


def fit_gaussian_mixture(z: Tensor, n_components: int = 1, *, seed: int = 0) -> GaussianMixture:
    """Fit a mixture of full-covariance Gaussians to codes by maximum likelihood.

    One component is the closed form (mean and covariance of the codes); more are scikit-learn's EM, which adds a
    millionth of the codes' mean variance to each variance.

    Args:
        z: codes, shape (n, d), with n > d.
        n_components: number of Gaussians, at least 1.
        seed: of EM's starting point.

    Raises:
        ValueError: for a wrong shape or type, too few or non-finite codes, fewer different ones than components, codes
            whose variances overflow or underflow, or codes that lie on a subspace.
    """
    if z.ndim != 2 or z.shape[1] < 1 or z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"z must be float32 or float64 of shape (n, d), got shape {tuple(z.shape)} of {z.dtype}")
    if not torch.isfinite(z).all():
        raise ValueError("z must be finite, got NaN or infinite entries")
    if not isinstance(n_components, Integral) or n_components < 1 or len(z) <= max(z.shape[1], n_components):
        raise ValueError(
            f"n_components must be at least 1, a whole number, and z have more than {max(z.shape[1], n_components)} "
            f"rows, got n_components={n_components} and {len(z)} rows"
        )
    if n_components > 1 and (different := len(z.unique(dim=0))) < n_components:
        raise ValueError(f"n_components must not exceed the {different} different rows of z, got {n_components}")
    z, d = z.detach(), z.shape[1]
    weights, means = z.new_ones(1), z.mean(0)[None]
    covariances = torch.cov(z.T, correction=0).reshape(1, d, d)
    std = covariances[0].diagonal().sqrt()
    if not torch.isfinite(covariances).all() or ((std == 0) & (z != z[0]).any(0)).any():
        raise ValueError(f"z must have variances that {z.dtype} can hold: rescale the codes, or use float64")
    # Correlations, for they do not depend on the units; rounding turns an eigenvalue 0 of theirs into one of about eps.
    if (z == z[0]).all(0).any() or (
        torch.linalg.eigvalsh(covariances[0] / torch.outer(std, std))[0] < 10 * d * torch.finfo(z.dtype).eps
    ):
        raise ValueError("z must span all its dimensions, got codes on a subspace: drop dependent coordinates")
    if n_components > 1:
        from sklearn.mixture import GaussianMixture as Fit

        # EM adds this to the variances, so that no component shrinks to a point; a millionth of the codes' own.
        floor = 1e-6 * float(z.double().var(0).mean())
        fit = Fit(n_components, max_iter=1000, reg_covar=floor, random_state=seed).fit(z.double().cpu().numpy())
        weights, means, covariances = (torch.from_numpy(a).to(z) for a in (fit.weights_, fit.means_, fit.covariances_))
    return GaussianMixture(weights, means, torch.linalg.cholesky(covariances))
