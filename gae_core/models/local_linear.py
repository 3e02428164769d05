"""Autoencoders that are solved in closed form, step by step: k-means, PCA and what lies between; NMF; factor analysis.

Derived in the chapter *One framework*. Nothing here is trained by gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class LocalCodes:
    """Codes of a :class:`LocalLinearGAE`.

    Attributes:
        component: which subspace, (n,), int64.
        z: coordinates in it, (n, q).
    """

    component: Tensor
    z: Tensor


class LocalLinearGAE(nn.Module):
    r"""K affine subspaces of dimension q, a code (k, z) for each x (locally linear GAE, LLGAE).

    .. math:: \log q(x|k, z) = -\tfrac1{2\sigma^2}\|x - \mu_k - W_k z\|^2 - \tfrac D2\log 2\pi\sigma^2,
        \qquad W_k^\top W_k = I

    The code has a closed form: :math:`z = W_k^\top (x - \mu_k)` and the k with the smallest error. So has the best
    model for given components. One class, its parts exchanged:

    - q = 0, hard: k-means by Lloyd's algorithm; soft: a mixture of spherical Gaussians with fixed sigma;
    - K = 1: PCA;
    - hard, both larger: K subspaces, a mixture of PCA;
    - soft: shares of the components in place of one, with the code z at its maximum. Each step raises the objective
      (minorise-maximise). For q = 0 it is expectation maximisation; for q > 0 it is not, for the likelihood at the best
      z is constant along a subspace and no density of x.

    Args:
        mu: centres, (K, D).
        W: orthonormal columns, (K, D, q).
        log_weights: logarithms of the components' weights, (K,); None weighs them equally. Hard assignment to the most
            likely component uses them too; Lloyd's algorithm is that of equal weights.
        sigma: standard deviation around the subspaces.

    Raises:
        ValueError: for shapes that do not fit, or columns that are not orthonormal.
    """

    def __init__(self, mu: Tensor, W: Tensor, *, log_weights: Tensor | None = None, sigma: float = 1.0) -> None:
        super().__init__()
        if mu.ndim != 2 or W.ndim != 3 or W.shape[:2] != mu.shape:
            raise ValueError(f"mu must be (K, D) and W (K, D, q), got {tuple(mu.shape)} and {tuple(W.shape)}")
        eye = torch.eye(W.shape[2], dtype=W.dtype, device=W.device)
        if not torch.allclose(W.mT @ W, eye.expand(len(W), -1, -1), atol=1e-4):
            raise ValueError("W must have orthonormal columns for each component; torch.linalg.qr makes them so")
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be positive, got {sigma}")
        self.register_buffer("mu", mu)
        self.register_buffer("W", W)
        self.register_buffer("log_weights", mu.new_full((len(mu),), -math.log(len(mu))))
        if log_weights is not None:
            self.log_weights = log_weights.log_softmax(0)
        self.sigma = sigma

    def squared_distances(self, x: Tensor) -> Tensor:
        """Squared distances of x (n, D) to all subspaces, (n, K)."""
        squared = torch.cdist(x, self.mu, compute_mode="donot_use_mm_for_euclid_dist").square()
        along = torch.einsum("nd,kdq->nkq", x, self.W) - torch.einsum("kd,kdq->kq", self.mu, self.W)
        return (squared - along.square().sum(-1)).clamp_min(0)

    def log_joint(self, x: Tensor) -> Tensor:
        """Logarithms of weight times likelihood at the best z of each component, (n, K)."""
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi * self.sigma**2)
        return self.log_weights - self.squared_distances(x) / (2 * self.sigma**2) - constant

    def encode(self, x: Tensor) -> LocalCodes:
        """The most likely component of each x (n, D), and the coordinates in it."""
        k = self.log_joint(x).argmax(1)
        return LocalCodes(k, torch.einsum("nd,ndq->nq", x - self.mu[k], self.W[k]))

    def decode(self, codes: LocalCodes) -> Tensor:
        """Points (n, D) that codes stand for."""
        return self.mu[codes.component] + torch.einsum("nq,ndq->nd", codes.z, self.W[codes.component])

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x, (n, D)."""
        return self.decode(self.encode(x))


@dataclass(frozen=True)
class LocalFit:
    """Result of :func:`fit_local_linear`.

    Attributes:
        model: the fitted subspaces.
        objective: mean of max_k (hard) or log-sum-exp_k (soft) of the log-joint over the data before each step, and at
            the end: never falling.
        steps: steps taken.
        reseeded: how often an empty component was put elsewhere.
    """

    model: LocalLinearGAE
    objective: Tensor
    steps: int
    reseeded: int


@torch.no_grad()
def fit_local_linear(
    x: Tensor,
    components: int,
    dim: int,
    *,
    start: Tensor | LocalLinearGAE | None = None,
    hard: bool = True,
    equal_weights: bool = False,
    sigma: float = 1.0,
    max_steps: int = 300,
    tol: float = 0.0,
    generator: Generator | None = None,
) -> LocalFit:
    """Fit K affine subspaces by alternating codes and subspaces until nothing changes.

    A step gives every x its component (hard) or its responsibilities (soft), and then every component the mean and the
    leading principal axes of its points: the best for these assignments, so that the objective never falls. What is
    reached is a local maximum that depends on the start. A step costs O(n K q D) for the assignment and, for q > 0,
    O(K (n D² + D³)) for the axes (``eq-gae-cost``).

    A component that lost all its points (hard) is put on the point with the largest error, where it again has one.

    Args:
        x: data, (n, D), floating point.
        components: K, at most n.
        dim: q, at most D.
        start: centres to start from, (K, D), with subspaces of dimension 0; or a model; None draws centres by
            k-means++. Soft fits of equal weights with falling sigma, each from the one before,
            make a better start than centres do.
        hard: hard assignment, with equal weights; otherwise soft.
        equal_weights: leave the weights of a soft fit equal instead of fitting them.
        sigma: standard deviation around the subspaces; matters for the soft fit alone.
        max_steps: largest number of steps.
        tol: stop when the objective rises by no more than this.
        generator: source of the start.

    Raises:
        ValueError: for arguments out of range, or data that are not finite.
    """
    if x.ndim != 2 or not x.is_floating_point() or not torch.isfinite(x).all():
        raise ValueError(f"x must be finite floating-point data of shape (n, D), got {x.dtype} {tuple(x.shape)}")
    n, entries = x.shape
    if not (1 <= components <= n and 0 <= dim <= entries) or max_steps < 1:
        raise ValueError(
            f"components must be 1 to n, dim 0 to D and max_steps at least 1, got components={components} for n={n}, "
            f"dim={dim} for D={entries}, max_steps={max_steps}"
        )
    if start is None:
        start = plus_plus(x, components, generator=generator)
    centres = start.mu if isinstance(start, LocalLinearGAE) else start
    if centres.shape != (components, entries):
        raise ValueError(f"start must have shape {(components, entries)}, got {tuple(centres.shape)}")
    if isinstance(start, LocalLinearGAE):
        model = LocalLinearGAE(
            start.mu, start.W, log_weights=None if hard or equal_weights else start.log_weights, sigma=sigma
        )
    else:
        model = LocalLinearGAE(start, start.new_zeros(components, entries, 0), sigma=sigma)
    objective, reseeded, before = [], 0, None
    for step in range(max_steps + 1):
        joint = model.log_joint(x)
        value = joint.amax(1) if hard else joint.logsumexp(1)
        objective.append(value.mean())
        assigned = joint.argmax(1)
        settled = torch.equal(assigned, before) if hard and before is not None else False
        rose = step == 0 or objective[-1] > objective[-2] + tol
        if step == max_steps or settled or (not rose and step > 1):
            break
        before = assigned.clone()
        if hard:
            counts = assigned.bincount(minlength=components)
            for k in (counts == 0).nonzero()[:, 0].tolist():
                lonely = value.masked_fill(counts[assigned] < 2, math.inf).argmin()  # takes no other's last point
                counts[assigned[lonely]] -= 1
                assigned[lonely], counts[k], value[lonely] = k, 1, math.inf
                reseeded += 1
            weights = torch.nn.functional.one_hot(assigned, components).to(x.dtype)
            log_weights = None
        else:
            weights = joint.softmax(1)
            log_weights = None if equal_weights else weights.mean(0).log()
        model = LocalLinearGAE(*_principal(x, weights, dim), log_weights=log_weights, sigma=sigma)
    return LocalFit(model, torch.stack(objective), step, reseeded)


def _principal(x: Tensor, weights: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Weighted means (K, D) and leading principal axes (K, D, q)."""
    share = weights / weights.sum(0).clamp_min(torch.finfo(x.dtype).tiny)
    mu = share.T @ x
    W = x.new_zeros(*mu.shape, dim)
    for k in range(len(mu)) if dim else ():
        centred = x - mu[k]
        W[k] = torch.linalg.eigh(centred.T @ (share[:, k, None] * centred)).eigenvectors[:, -dim:].flip(1)
    return mu, W


def _check_data(x: Tensor, name: str = "x") -> None:
    """Raise a ValueError unless ``x`` holds finite floating-point numbers."""
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(x)).sum())} entries that are not")


def plus_plus(x: Tensor, components: int, *, generator: Generator | None = None) -> Tensor:
    """Centres (K, D) among the points x (n, D), each next one drawn by its squared distance (Arthur, Vassilvitskii).

    Raises:
        ValueError: if there are fewer points than centres, or points that are not finite.
    """
    _check_data(x)
    if not 1 <= components <= len(x):
        raise ValueError(f"components must be 1 to n, got components={components} for n={len(x)}")
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    distance = (x - x[chosen[0]]).square().sum(1)
    while len(chosen) < components:
        if distance.sum() > 0:
            chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
        else:  # fewer different points than centres
            chosen.append(next(i for i in range(len(x)) if i not in chosen))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
    return x[chosen].clone()


def nmf_step(x: Tensor, z: Tensor, W: Tensor) -> Tensor:
    """One round of coordinate descent on non-negative codes: each coordinate in turn goes to its best value.

    With ``x.mT``, the basis and the codes exchanged it is the step of the basis. For fixed basis it is an encoder:
    repeated, it converges to the non-negative least-squares code, the problem being convex.

    Args:
        x: data, (n, D).
        z: codes, (n, q), not negative.
        W: basis, (q, D), not negative.

    Returns:
        Codes, (n, q), whose squared error is not larger.

    Raises:
        ValueError: for shapes that do not fit, codes or a basis that are negative, or numbers that are not finite or
            not floating point.
    """
    if x.shape != (len(z), W.shape[1]) or z.shape[1] != len(W):
        shapes = [tuple(v.shape) for v in (x, z, W)]
        raise ValueError(f"x, z, W must be (n, D), (n, q), (q, D), got {shapes}")
    for name, value in (("x", x), ("z", z), ("W", W)):
        _check_data(value, name)
    if (z < 0).any() or (W < 0).any():
        raise ValueError("z and W must not be negative")
    z, gram, target = z.clone(), W @ W.T, x @ W.T
    for j in range(z.shape[1]):
        if gram[j, j] > 0:
            z[:, j] = (z[:, j] - (z @ gram[:, j] - target[:, j]) / gram[j, j]).clamp_min(0)
    return z


def factor_log_likelihood(x: Tensor, mu: Tensor, W: Tensor, psi: Tensor) -> Tensor:
    r"""Log-density of factor analysis, :math:`x \sim N(\mu, W W^\top + \mathrm{diag}\,\psi)`, shape (n,).

    With equal psi it is probabilistic PCA. Reckoned in float64, and never by a matrix of D times D.

    Args:
        x: data, (n, D).
        mu: mean, (D,).
        W: loadings, (D, q), q at least 1.
        psi: variances of the noise, (D,), positive.

    Raises:
        ValueError: if a variance is not positive, shapes do not fit, or numbers are not finite or not floating point.
    """
    if W.ndim != 2 or not W.shape[1] or x.ndim != 2 or not x.shape[1] == len(mu) == len(W) == len(psi):
        shapes = [tuple(v.shape) for v in (x, mu, W, psi)]
        raise ValueError(f"x, mu, W, psi must be (n, D), (D,), (D, q), (D,), q at least 1, got {shapes}")
    for name, value in (("x", x), ("mu", mu), ("W", W), ("psi", psi)):
        _check_data(value, name)
    if not (psi > 0).all():
        raise ValueError("psi must be positive: without noise the model has no density")
    law = torch.distributions.LowRankMultivariateNormal(mu.double(), W.double(), psi.double())
    return law.log_prob(x.double()).to(x.dtype)


def ppca(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilistic PCA at its maximum likelihood (Tipping and Bishop, 1999).

    Args:
        x: data, (n, D), with n > D so that the noise has a variance.
        dim: q, below D.

    Returns:
        mu (D,), W (D, q) and the variance of the noise (), which is the mean of the D - q smallest eigenvalues of the
        covariance (that divides by n).

    Raises:
        ValueError: if ``dim`` is out of range, the discarded eigenvalues are 0, or the data are none, not finite or
            not floating point.
    """
    _check_data(x)
    if x.ndim != 2 or not 1 <= dim < x.shape[1]:
        raise ValueError(f"dim must be 1 to D - 1, got {dim} for x of shape {tuple(x.shape)}")
    if not len(x):
        raise ValueError(f"x must have rows, got shape {tuple(x.shape)}")
    mu = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mu).T @ (x - mu) / len(x))
    noise = values[:-dim].mean()
    if not noise > 1e-12 * values[-1]:
        raise ValueError("x must have variance outside of dim directions, it has none: the likelihood has no maximum")
    return mu, vectors[:, -dim:].flip(1) * (values[-dim:].flip(0) - noise).clamp_min(0).sqrt(), noise
