"""Energies as densities, and the penalties of their slope. The file needs torch alone: copy it as it is."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor


def _slopes(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Squared length of the gradient of the energies (n,) at each x (n, ...), over all entries of one sample."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = energy(x)
        if values.shape != (len(x),):
            raise ValueError(f"energy must map {tuple(x.shape)} to ({len(x)},), got {tuple(values.shape)}")
        (gradient,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    return gradient.flatten(1).square().sum(1)


def gradient_penalty_r1(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""Zero-centred gradient penalty (R1).

    .. math:: \|\nabla_x U(x)\|^2

    Args:
        energy: maps (n, ...) to (n,), row by row.
        x: data, (n, ...).

    Returns:
        Squared lengths, (n,), in squared nats by squared units of x, differentiable in the energy's parameters.

    Raises:
        ValueError: if ``energy`` gives another shape.
    """
    return _slopes(energy, x)


def gradient_penalty_wgan(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, *, generator: Generator | None = None
) -> Tensor:
    r"""One-centred gradient penalty of WGAN-GP, at a uniform place between a datum and a sample.

    .. math:: \bigl(\|\nabla D(\hat x)\| - 1\bigr)^2, \qquad \hat x = a x + (1 - a) x', \quad a \sim U[0, 1]

    Args:
        critic: maps (n, ...) to (n,), row by row.
        real: data, (n, ...).
        fake: samples, of the same shape.
        generator: of the places.

    Returns:
        Squared excesses, (n,), differentiable in the critic's parameters.

    Raises:
        ValueError: if shapes do not fit.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have one shape, got {tuple(real.shape)} and {tuple(fake.shape)}")
    place = torch.rand(len(real), *[1] * (real.ndim - 1), generator=generator, dtype=real.dtype, device=real.device)
    squared = _slopes(critic, place * real + (1 - place) * fake)
    return ((squared + 1e-12).sqrt() - 1).square()  # the root has no slope at 0
