"""One batch on several processes: what is computed over a batch sees all of it, whoever holds its rows.

Every process holds as many rows, in the order of the ranks. On a single process these functions return what they got.
"""

import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Generator, Tensor


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) where torch.distributed is not in use."""
    used = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if used else (0, 1)


def start(device: torch.device) -> None:
    """Join the processes that ``torchrun`` started, if it did (gloo on the CPU, else nccl), and wait for all.

    With nccl each process takes the CUDA device of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    if rank_and_size()[1] > 1:
        dist.barrier()


def own(x: Tensor) -> Tensor:
    """This process's rows (n, ...) of the whole batch (size * n, ...)."""
    rank, size = rank_and_size()
    return x.chunk(size)[rank]


def gather(x: Tensor) -> Tensor:
    """The whole batch (size * n, ...) from each process's rows (n, ...).

    Differentiable: a process's rows get the gradient of what all processes made of them, summed.
    """
    return x if rank_and_size()[1] == 1 else _Gather.apply(x)


# By hand, as _Sum of normalization: torch.distributed.nn's is deprecated (torch 2.12), and refuses torch.compile.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return own(gradient)


def randn_like(x: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Standard normal noise of the shape of ``x`` (n, ...): this process's rows of one draw for the whole batch.

    The processes' generators must be in the same state, and stay so.
    """
    return _draw_like(torch.randn, x, generator)


def rand_like(x: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Noise uniform on [0, 1), otherwise as :func:`randn_like`."""
    return _draw_like(torch.rand, x, generator)


def _draw_like(draw: Callable[..., Tensor], x: Tensor, generator: Generator | None) -> Tensor:
    shape = (len(x) * rank_and_size()[1], *x.shape[1:])
    return own(draw(shape, generator=generator, device=x.device, dtype=x.dtype))


def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the first process's."""
    for tensor in tensors:
        dist.broadcast(tensor, 0)


def average_(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one exchange."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([t.numel() for t in tensors])
    for tensor, mean in zip(tensors, parts, strict=True):
        tensor.copy_(mean.view_as(tensor))
