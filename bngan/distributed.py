"""What must agree between the ranks of a distributed run."""

import os
import sys
import threading
import time
from collections.abc import Sequence

import torch
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, distributed, nn

from bngan.batchnorm import synchronize


def world_size() -> int:
    """Return the number of ranks, 1 when not distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 when not distributed."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


@torch.no_grad()
def average(values: Tensor) -> Tensor:
    """Return the mean of the ranks' tensors."""
    if world_size() == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks, all of them in one message."""
    if world_size() == 1:
        return
    _average_in_place([parameter.grad for parameter in parameters if parameter.grad is not None])


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Replace each floating-point buffer, such as running statistics, by its mean over the ranks."""
    if world_size() == 1:
        return
    _average_in_place([buffer for buffer in module.buffers() if buffer.is_floating_point()])


def total(count: int, device: torch.device | str = "cpu") -> int:
    """Return the sum of the ranks' counts."""
    if world_size() == 1:
        return count
    counts = torch.tensor(count, device=device)
    distributed.all_reduce(counts)
    return int(counts)


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Return all ranks' rows (n, ...), which were dealt out in turn, in the order that they had before, on every rank."""
    ranks = world_size()
    if ranks == 1:
        return rows
    everyone = total(len(rows), rows.device)
    # A message has the same size on every rank, so ranks that were dealt a row less send one for nothing.
    padded = rows.new_zeros((everyone + ranks - 1) // ranks, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    distributed.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(end_dim=1)[:everyone]


def end_with_parent(grace: float = 10.0) -> None:
    """End this process some seconds after the one that started it, unless it has ended by itself until then.

    A rank that waits for a message of a rank that is gone may wait for half an hour.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        time.sleep(grace)
        print(f"bngan: rank {rank()} ends, because the process that started it is gone", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def own_rows(rows: Tensor, parts: int) -> Tensor:
    """Return this rank's share (N, ...) of the rows (world_size * N, ...) of a global batch that is used in `parts` parts.

    Each part is dealt out to all ranks, so that part k of every rank together is part k of the whole.
    """
    ranks = world_size()
    if ranks == 1:
        return rows
    dealt = rows.view(parts, ranks, len(rows) // (parts * ranks), *rows.shape[1:])
    return dealt[:, rank()].reshape(-1, *rows.shape[1:])


class SynchronizedBatchNorms(LayerSync):
    """Trainer plugin: batch norm over the batches of all ranks, on any device, where torch's own needs a GPU."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the model's batch norm layers."""
        return synchronize(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave the layers as they are: without ranks they normalize by their own batch."""
        return model


def _average_in_place(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        return
    flat = average(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
