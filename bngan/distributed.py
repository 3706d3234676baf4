"""What must agree between the ranks of a distributed run: plain torch, one rank where nothing is distributed."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

# In the environment of the processes that a command starts: the number of the process that has started them.
FIRST_PROCESS = "BNGAN_FIRST_PROCESS"


def world_size() -> int:
    """Return the number of ranks, 1 when not distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 when not distributed."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def all_gather(own: Tensor) -> Tensor:
    """Return all ranks' tensors, which have one shape, stacked by rank: (ranks, ...)."""
    own = own.detach()
    if world_size() == 1:
        return own.unsqueeze(0)
    gathered = own.new_empty(world_size(), *own.shape)
    distributed.all_gather(list(gathered.unbind()), own.contiguous())
    return gathered


def all_reduce(own: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors."""
    total = own.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def mean_over_ranks(own: Tensor) -> Tensor:
    """Return the mean of the ranks' tensors, through which gradients flow back to all of them."""
    return own if world_size() == 1 else _SumOverRanks.apply(own) / world_size()


def shard(rows: Tensor) -> Tensor:
    """Return this rank's rows of a global batch (N, ...): every world_size-th one."""
    return rows if world_size() == 1 else rows[rank() :: world_size()]


def unshard(own: Tensor) -> Tensor:
    """Return the global batch (N, ...) of which each rank has its rows (n, ...), on every rank."""
    ranks = world_size()
    if ranks == 1:
        return own
    rows = total(len(own), own.device)
    # A message has the same size on every rank, so ranks with a row less send one for nothing.
    padded = own.new_zeros((rows + ranks - 1) // ranks, *own.shape[1:])
    padded[: len(own)] = own
    return all_gather(padded).transpose(0, 1).flatten(end_dim=1)[:rows]


def total(count: int, device: torch.device | str = "cpu") -> int:
    """Return the sum of the ranks' counts."""
    return count if world_size() == 1 else int(all_reduce(torch.tensor(count, device=device)))


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace each gradient by its mean over the ranks, all of them in one message."""
    _average([parameter.grad for parameter in parameters if parameter.grad is not None])


def average_buffers(module: nn.Module) -> None:
    """Replace each floating-point buffer, such as running statistics, by its mean over the ranks."""
    _average([buffer for buffer in module.buffers() if buffer.is_floating_point()])


@torch.no_grad()
def _average(tensors: list[Tensor]) -> None:
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


class _SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' tensors; its gradient is the sum of theirs, and so on for further derivatives."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return all_reduce(own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverRanks.apply(gradient)


def end_with_parent(parent: int, grace: float = 10.0) -> None:
    """End this process `grace` seconds after the one that started it, unless it has ended by itself until then.

    A rank that waits for a message of a rank that is gone may wait for half an hour. On Windows it does, since a process there
    is not told that its parent has ended.

    Args:
        parent: number of the process that started this one, which may be gone already.
        grace: seconds.
    """
    if sys.platform == "win32":
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(grace)
        print(f"bngan: rank {rank()} ends, because the process that started it is gone", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def print0(line: str) -> None:
    """Print a line on rank 0 alone, also before the ranks have met, where whoever starts them says which one this is."""
    said = next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0")
    met = distributed.is_available() and distributed.is_initialized()
    if (rank() if met else int(said)) == 0:
        print(line, flush=True)
