"""Energies as densities and of codes, the penalties of their slope, and what a penalty leaves of the best energy.

The file needs torch alone, and SciPy for :func:`penalised_optimum`: copy it as it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Generator, Tensor

Energy = Callable[[Tensor], Tensor]


def _slopes(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Squared length of the gradient of the energies (n,) at each x (n, ...), over all entries of one sample."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = energy(x)
        if values.shape != (len(x),):
            raise ValueError(f"energy must map {tuple(x.shape)} to ({len(x)},), got {tuple(values.shape)}")
        gradient = None
        if values.requires_grad:  # otherwise grad raises; with parameters alone in the graph it returns None
            (gradient,) = torch.autograd.grad(values.sum(), x, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError("energy must depend on x by operations with a gradient, got none: detach, or torch.no_grad()?")
    return gradient.flatten(1).square().sum(1)


def _check_floating(name: str, x: Tensor) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape (n, ...), got {x.dtype} {tuple(x.shape)}: divide images of bytes "
            f"by 255"
        )


def gradient_penalty_r1(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""Zero-centred gradient penalty (R1).

    .. math:: \|\nabla_x U(x)\|^2

    With the weight lam it moves the optimum of the likelihood, to first order as a blur of the data by the variance
    4 lam a coordinate would (``eq-energy-heat``).

    Args:
        energy: maps (n, ...) to (n,), row by row.
        x: data, (n, ...).

    Returns:
        Squared lengths, (n,), in squared nats by squared units of x, differentiable in the energy's parameters. A row
        with a NaN has a NaN.

    Raises:
        ValueError: if ``x`` is not floating point, or ``energy`` gives another shape or does not depend on x.

    Source: Mescheder, Geiger and Nowozin, *Which training methods for GANs do actually converge?*, ICML 2018, where
    the weight is written gamma / 2.
    """
    _check_floating("x", x)
    return _slopes(energy, x)


def gradient_penalty_wgan(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    place: Tensor | None = None,
    generator: Generator | None = None,
) -> Tensor:
    r"""One-centred gradient penalty of WGAN-GP, at a uniform place between a datum and a sample.

    .. math:: \bigl(\|\nabla D(\hat x)\| - 1\bigr)^2, \qquad \hat x = a x + (1 - a) x', \quad a \sim U[0, 1]

    Args:
        critic: maps (n, ...) to (n,), row by row.
        real: data, (n, ...).
        fake: samples, of the same shape.
        place: a, (n,), where it is not to be drawn here.
        generator: of the places.

    Returns:
        Squared excesses, (n,), differentiable in the critic's parameters. A row with a NaN has a NaN.

    Raises:
        ValueError: if shapes or types do not fit, or ``critic`` does not depend on x.

    Source: Gulrajani et al., *Improved training of Wasserstein GANs*, NeurIPS 2017.
    """
    _check_floating("real", real)
    if real.shape != fake.shape or real.dtype != fake.dtype:
        raise ValueError(
            f"real and fake must have one shape and type, got {tuple(real.shape)} of {real.dtype} and "
            f"{tuple(fake.shape)} of {fake.dtype}"
        )
    if place is None:
        place = torch.rand(len(real), generator=generator, dtype=real.dtype, device=real.device)
    if place.shape != real.shape[:1]:
        raise ValueError(f"place must have one number for each row of real, ({len(real)},), got {tuple(place.shape)}")
    place = place.view(-1, *[1] * (real.ndim - 1))
    squared = _slopes(critic, place * real + (1 - place) * fake)
    return ((squared + 1e-12).sqrt() - 1).square()  # the root has no slope at 0


@dataclass(frozen=True)
class GridDensity:
    """The density of an energy in the plane, normalised by the midpoint rule.

    Attributes:
        log_z: logarithm of the normaliser over the square, in nats; differentiable in the energy's parameters.
        x: midpoints of the cells, (points², 2), the second coordinate running fastest.
        log_density: log of the density at each, in nats, (points²,).
        area: of a cell.
        edge: share of the mass in the outermost cells. Near 0, or the square cuts the density off.
    """

    log_z: Tensor
    x: Tensor
    log_density: Tensor
    area: float
    edge: float

    def kl_from(self, log_prob: Callable[[Tensor], Tensor]) -> Tensor:
        """KL(p || density) in nats for a reference p whose log-density at (n, 2) is ``log_prob``, (n,).

        Raises:
            ValueError: if ``log_prob`` gives another shape, or the grid sees less or more of p than 1, by over one per
                cent: then it is too small or coarse.
        """
        log_p = log_prob(self.x)
        if log_p.shape != (len(self.x),):
            raise ValueError(f"log_prob must map {tuple(self.x.shape)} to ({len(self.x)},), got {tuple(log_p.shape)}")
        p = log_p.exp() * self.area
        if not abs(float(p.sum()) - 1) < 0.01:
            raise ValueError(
                f"log_prob must have mass 1 on the grid, it has {float(p.sum()):.3f}: widen the square or add points"
            )
        return torch.where(p > 0, p * (log_p - self.log_density), 0).sum()

    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """Draw n points, (n, 2): a cell by its mass, and any place within it."""
        mass, device = self.log_density.detach().exp(), self.x.device
        cells = torch.multinomial(mass, n, replacement=True, generator=generator)
        place = torch.rand(n, 2, generator=generator, dtype=self.x.dtype, device=device) - 0.5
        return self.x[cells] + math.sqrt(self.area) * place


def log_normalizer_2d(
    energy: Callable[[Tensor], Tensor], low: float, high: float, points: int, *, dtype: torch.dtype = torch.float64
) -> GridDensity:
    r"""Normaliser of an energy over a square by the midpoint rule, and the density with it.

    .. math:: \log Z = \log \int_{[a, b]^2} e^{-U(x)}\,dx \approx \log \sum_i e^{-U(x_i)} h^2, \qquad h = (b - a) / n

    Implements ``def-energy-boltzmann`` in the plane. The error is that of the midpoint rule: tiny where e^{-U} is
    smooth over several cells and vanishes towards the edge. Outside the square there is no mass by definition.

    Args:
        energy: maps (points², 2) to (points²,), in nats.
        low: lower end of both coordinates.
        high: upper end of both.
        points: cells a side.
        dtype: of the grid: that of the energy's parameters, if it has any. float32 costs digits of log Z.

    Raises:
        ValueError: if the square is empty, ``points`` no whole number of 2 or more, ``dtype`` not floating or another
            than the energy takes, or the energy gives another shape, NaN or -inf.
    """
    if (
        not (math.isfinite(low) and math.isfinite(high) and low < high)
        or not isinstance(points, Integral)
        or points < 2
    ):
        raise ValueError(
            f"low must be below high and points a whole number, at least 2, got low={low}, high={high}, points={points}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    width = (high - low) / points
    axis = low + width * (torch.arange(points, dtype=dtype) + 0.5)
    x = torch.cartesian_prod(axis, axis)
    try:
        u = energy(x)
    except RuntimeError as error:  # torch says "Double and Float", and not which argument decides it
        if "type" in str(error):
            raise ValueError(f"dtype must be that of the energy's parameters, got {dtype} ({error})") from error
        raise
    if u.shape != (len(x),):
        raise ValueError(f"energy must map {tuple(x.shape)} to ({len(x)},), got {tuple(u.shape)}")
    if torch.isnan(u).any() or (u == -math.inf).any():
        raise ValueError("energy must be a number above -inf on the whole square, got NaN or -inf: shrink the square?")
    log_z = torch.logsumexp(-u, 0) + 2 * math.log(width)
    if not torch.isfinite(log_z):
        raise ValueError("energy must be finite somewhere on the square, got +inf everywhere")
    log_density = -u - log_z
    mass = (log_density.detach().exp() * width**2).reshape(points, points)
    inside = float(mass[1:-1, 1:-1].sum())
    return GridDensity(log_z, x, log_density, width**2, max(0.0, 1 - inside))


@dataclass(frozen=True)
class Optimum:
    """What perfect training reaches under the penalty, for data that are one round Gaussian in the plane.

    Attributes:
        high_quality: share of the model's mass within 3 standard deviations of the data.
        spread: its standard deviation per coordinate, in those of the data.
        spread_within: root mean square per coordinate of the part within 3 standard deviations of the data.
        kl: KL(data | model) in nats.
        slope: mean squared slope of the energy at the data.
        radius: midpoints of the grid, (cells,).
        density: of the model at a point of that radius, (cells,).
    """

    high_quality: float
    spread: float
    spread_within: float
    kl: float
    slope: float
    radius: Tensor
    density: Tensor


def penalised_optimum(lam: float, std: float, *, reach: float = 20.0, cells: int = 4000) -> Optimum:
    r"""The energy that minimises the likelihood's loss with the R1 penalty, by Newton's method on its radius.

    .. math:: \min_U\; \mathbb E_p U + \log\int e^{-U} + \lambda\,\mathbb E_p\|\nabla U\|^2

    Implements ``eq-meg-value``. The problem is convex. Modes far apart are each alone: where there are no data a slope
    costs nothing.

    Args:
        lam: weight of the penalty, in squared units of x.
        std: standard deviation of the data a coordinate.
        reach: radius of the disc that the density is sought on, in standard deviations.
        cells: rings of the disc.

    Raises:
        ValueError: if ``lam`` is negative, ``std`` or ``reach`` not positive, or ``cells`` no whole number above 1.
    """
    from scipy.linalg import solveh_banded

    if not 0 <= lam < math.inf or not 0 < std < math.inf:
        raise ValueError(f"lam must be at least 0 and std positive, got {lam} and {std}")
    if not 0 < reach < math.inf or not isinstance(cells, Integral) or cells < 2:
        raise ValueError(f"reach must be positive and cells a whole number, at least 2, got {reach} and {cells}")
    lam, width = lam / std**2, reach / cells  # in units of the data's standard deviation
    edge = torch.arange(1, cells, dtype=torch.float64) * width
    r = (torch.arange(cells, dtype=torch.float64) + 0.5) * width
    area = 2 * math.pi * r * width
    p = (-(r**2) / 2).exp() / (2 * math.pi)
    p = p * area / (p * area).sum()  # mass of each ring
    stiff = 2 * lam * edge * (-(edge**2) / 2).exp() / width  # of the spring between two rings: the penalty is a sum
    none = torch.zeros(1, dtype=torch.float64)
    u = r**2 / (1 + math.sqrt(1 + 16 * lam))  # the best Gaussian, eq-meg-gaussian

    def force(u: Tensor) -> Tensor:
        pull = stiff * u.diff()
        return torch.cat([-pull[:1], -pull.diff(), pull[-1:]])

    def value(u: Tensor) -> float:
        return float(p @ u + (area.log() - u).logsumexp(0) + 0.5 * u @ force(u))

    for _ in range(200):
        q = (area.log() - u).softmax(0)
        slope = p - q + force(u)
        diagonal = q + 1e-14 + torch.cat([stiff, none]) + torch.cat([none, stiff])
        banded = torch.stack([torch.cat([none, -stiff]), diagonal])
        step = torch.from_numpy(solveh_banded(banded.numpy(), -slope.numpy()))
        decrease = float(slope @ step)
        if decrease > -1e-10:
            break
        rate = min(1.0, 5 / float(step.abs().max()))
        while rate > 1e-6 and value(u + rate * step) > value(u) + 1e-4 * rate * decrease:
            rate /= 2
        u = u + rate * step
    q = (area.log() - u).softmax(0)
    return Optimum(
        high_quality=float(q[r < 3].sum()),
        spread=float((q @ r**2 / 2).sqrt()),
        spread_within=float((q[r < 3] @ r[r < 3] ** 2 / q[r < 3].sum() / 2).sqrt()),
        kl=float(p @ (p / q).log()),
        slope=float(0.5 * u @ force(u) / lam) / std**2 if lam else 2 / std**2,
        radius=r * std,
        density=q / (area * std**2),
    )


def latent_energy(energy: Energy, decode: Callable[[Tensor], Tensor], *, term: str) -> Energy:
    r"""The energy of codes z for an energy U of data x = G(z).

    - ``"jacobian"``: :math:`U(G(z)) - \tfrac12\log\det J^\top J`. Then G(z) has the density e^{-U}
      (``eq-latent_mcmc-pullback``), or where x has more coordinates than z, that density along the surface, by area.
      Where J has not full rank it is +inf: there x has no density.
    - ``"prior"``: :math:`U(G(z)) + \tfrac12\|z\|^2`. Then G(z) has the density p_G e^{-U}, where p_G is that of the
      generator (``eq-latent_mcmc-residual``): right if U is a residual energy, minus the log-ratio of data to p_G.
    - ``"none"``: U(G(z)). G(z) has neither density, and for a bounded generator the codes have none at all.

    Args:
        energy: U, maps (chains, ...) to (chains,).
        decode: G, maps (chains, dim) to (chains, ...), row by row, in evaluation mode. For ``"jacobian"`` with two
            derivatives, and at least dim numbers a row; it costs dim forward passes a step.
        term: one of the three.

    Raises:
        ValueError: for another term, or, when called with the Jacobian, for a generator that gives fewer numbers than
            it takes, or does not depend on z.
    """
    if term not in ("jacobian", "prior", "none"):
        raise ValueError(f"term must be 'jacobian', 'prior' or 'none', got {term!r}")

    def of_codes(z: Tensor) -> Tensor:
        u = energy(decode(z))
        if term == "prior":
            return u + 0.5 * z.square().sum(1)
        if term == "jacobian":
            with torch.enable_grad():
                columns = [
                    torch.autograd.functional.jvp(decode, z, direction.expand_as(z), create_graph=True)[1].flatten(1)
                    for direction in torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
                ]
            jacobian = torch.stack(columns, 2)  # (chains, numbers of a row, dim)
            rows, columns = jacobian.shape[1:]
            if rows < columns:
                raise ValueError(
                    f"decode must give at least {columns} numbers a row for {columns} coordinates, got {rows}"
                )
            if not jacobian.any():  # flat here, which may happen, or cut off from z, which is a mistake
                with torch.enable_grad():
                    leaf = z.detach().requires_grad_()
                    x = decode(leaf)
                    if not x.requires_grad or torch.autograd.grad(x.sum(), leaf, allow_unused=True)[0] is None:
                        raise ValueError(
                            "decode must depend on z by operations with a gradient, got none: detach, or no_grad()?"
                        )
            square = rows == columns
            log_det = torch.linalg.slogdet(jacobian if square else jacobian.mT @ jacobian).logabsdet
            return u - (log_det if square else 0.5 * log_det)
        return u

    return of_codes
