"""What a model makes of many rows, a batch at a time, and its error of reconstruction."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gae_core.data import to_unit
from gae_core.models.autoencoder import squared_distance


@torch.no_grad()
def in_batches(
    function: Callable[[Tensor], Tensor | tuple[Tensor, ...]], x: Tensor, *, batch_size: int = 1000
) -> Tensor | tuple[Tensor, ...]:
    """Apply a function or module to x by batches, without gradient; bytes become floats in [0, 1].

    A module is put where its parameters are, in the mode that it is in: call ``.eval()`` first for a model with
    batch norm.

    Args:
        function: maps (batch, ...) to (batch, ...), or to a tuple of such, as ``model.posterior`` does.
        x: inputs, (n, ...), on any device.
        batch_size: rows at a time.

    Returns:
        Results, (n, ...), on the device of ``x``; a tuple of them if ``function`` gives tuples.

    Raises:
        ValueError: if ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    parameter = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
    device = x.device if parameter is None else parameter.device
    results = [function(to_unit(batch.to(device))) for batch in x.split(batch_size)]
    if isinstance(results[0], tuple):
        return tuple(torch.cat(parts).to(x.device) for parts in zip(*results, strict=True))
    return torch.cat(results).to(x.device)


def squared_error(model: nn.Module, x: Tensor) -> Tensor:
    r"""Reconstruction error :math:`\|x - D(E(x))\|^2`, summed over the entries of x, one value per sample (n,).

    Raises:
        ValueError: if the model gives another shape than that of x. A row with NaN has the error NaN.
    """
    return squared_distance(to_unit(x), in_batches(model, x))
