"""What must agree between the ranks of a distributed run."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bngan import threads
from bngan.batchnorm import ReferenceBatchNorm, running_statistics, single
from bngan.wires import SLOT_BYTES, Wires

# Batches that a process draws at once, on all its threads, and what they may take together.
DRAWN_AHEAD, DRAWN_AHEAD_BYTES = 16, 1 << 25


def world_size() -> int:
    """Return the number of ranks, 1 when not distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 when not distributed."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def gather(own: Tensor) -> Tensor:
    """Return all ranks' tensors, which have one shape, stacked by rank: (ranks, ...)."""
    return glance(own).clone()


def glance(own: Tensor) -> Tensor:
    """Return what `gather` does, to be used before the next message, by which it may be overwritten."""
    own = own.detach()
    if wires := _wires(own):
        return wires.share(own)
    gathered = own.new_empty(world_size(), *own.shape)
    distributed.all_gather(list(gathered.unbind()), own.contiguous())
    return gathered


def add_up(own: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors, to the last bit the same on all of them."""
    own = own.detach()
    if wires := _wires(own):
        return wires.share(own).sum(dim=0)
    total = own.clone()
    distributed.all_reduce(total)
    return total


_WIRES: WeakKeyDictionary[Any, Wires] = WeakKeyDictionary()


def _wires(first: Tensor, *others: Tensor) -> Wires | None:
    """Return the wires of the ranks as they are grouped now, if these tensors can be one message of theirs.

    All ranks must ask at the same place.
    """
    size = first.nbytes + sum(tensor.nbytes for tensor in others)
    if first.device.type != "cpu" or size > SLOT_BYTES or any(tensor.dtype != first.dtype for tensor in others):
        return None
    group = distributed.group.WORLD
    wires = _WIRES.get(group)
    if wires is None:
        wires = _WIRES[group] = Wires()
    return wires if wires.connected else None


def average(values: Tensor) -> Tensor:
    """Return the mean of the ranks' tensors."""
    return values if world_size() == 1 else add_up(values) / world_size()


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> None:
    """Replace each gradient, and the loss that they are of, by its mean over the ranks, all of them in one message."""
    if world_size() == 1:
        return
    _average_in_place([loss, *(parameter.grad for parameter in parameters if parameter.grad is not None)])


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
    return int(add_up(torch.tensor(count, device=device)))


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
    return gather(padded).transpose(0, 1).flatten(end_dim=1)[:everyone]


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


class SharedDraws:
    """Random numbers for whole global batches, of which each rank gets its rows; the draws of some batches go side by side.

    A rank cannot draw its own rows alone, since they depend on how much was drawn before them. So each rank draws one of the
    next batches, as many as there are ranks, and deals its rows out. A single process draws the next ones on several threads.

    Args:
        draw: fills a tensor with the batch of a number, and does nothing else.
        parts: as for `own_rows`.
    """

    def __init__(self, draw: Callable[[int, Tensor], object], parts: int) -> None:
        self._draw, self._parts = draw, parts
        self._dealt: dict[int, Tensor] = {}

    def rows(self, number: int, whole: Tensor) -> Tensor:
        """Return this rank's rows of a batch; all ranks must ask for the same numbers, one after the other.

        Args:
            number: which batch.
            whole: a tensor of the shape, dtype and device of the whole batch, which may be written to.
        """
        if number not in self._dealt:
            self._dealt = dict(enumerate(self._deal(number, whole), start=number))
        return self._dealt.pop(number)

    def _deal(self, number: int, whole: Tensor) -> list[Tensor]:
        if world_size() > 1:
            if wires := _wires(whole):
                batches = wires.fill(whole.shape, whole.dtype, lambda place: self._draw(number + rank(), place))
                return [own_rows(batch, self._parts).clone() for batch in batches]
            self._draw(number, whole)
            return [own_rows(whole, self._parts)]
        ahead = min(DRAWN_AHEAD, DRAWN_AHEAD_BYTES // whole.nbytes) if whole.device.type == "cpu" and threads.spare() > 1 else 1
        batches = [whole, *(torch.empty_like(whole) for _ in range(ahead - 1))]
        threads.side_by_side(partial(self._draw, number + turn, batch) for turn, batch in enumerate(batches))
        return batches


class SynchronizedBatchNorm(ReferenceBatchNorm):
    """Batch norm over the union of all ranks' batches, by the same equations, on any device.

    In training every rank must be given as many values as the others, and all must take part in forward and backward.
    `local` turns it into batch norm over this rank's own batch, for what the ranks do each by themselves.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.local = False

    def forward(self, z: Tensor) -> Tensor:
        """Normalize z (N, C, ...) by the statistics of all ranks' in training, by the running ones in evaluation."""
        if self.local or not self.training or (ranks := world_size()) == 1:
            return super().forward(z)
        y, mean, var = _NormalizeTogether.apply(single(z), self.weight, self.bias, self.eps)
        if self.track_running_stats:
            count = ranks * z.numel() // self.num_features
            self._update_running(mean, var * (count / (count - 1)))
        return y.to(z.dtype)


class _NormalizeTogether(torch.autograd.Function):
    """y = gamma (z - mean) / sqrt(var + eps) + beta by the mean and variance over all ranks, which are returned as well.

    Each way takes one message. Backward is by the derivatives of Ioffe & Szegedy 2015, section 3, with their sums over the
    batch taken over all ranks.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        if z.device.type == "cpu":  # where this takes a thirtieth of the other's time
            own_mean, own_var = torch.batch_norm_update_stats(z, None, None, 0.0)
        else:
            own_var, own_mean = torch.var_mean(z, dim=(0, *range(2, z.ndim)), correction=0)
        means, variances = glance(torch.stack([own_mean, own_var])).unbind(dim=1)
        ctx.ranks = ranks = len(means)
        mean = means.sum(dim=0).div_(ranks)
        # Pooled about the common mean, so that no digits are lost where it is large.
        var = (means - mean).square_().add_(variances).sum(dim=0).div_(ranks)
        ctx.save_for_backward(z, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(z, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        z, weight, mean, inverse_sd = ctx.saved_tensors
        _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, z, weight, None, None, mean, inverse_sd, True, 0.0, [False, True, True]
        )
        count = ctx.ranks * z.numel() // len(mean)
        mean_dy_z_hat, mean_dy = add_up(torch.stack([d_weight, d_bias])).div_(count).unbind()
        scale = weight * inverse_sd
        shape = (1, -1, *[1] * (z.ndim - 2))
        dz = torch.addcmul((-scale * mean_dy).view(shape), dy, scale.view(shape))
        dz = dz.addcmul_(z - mean.view(shape), (-scale * inverse_sd * mean_dy_z_hat).view(shape))
        return dz, d_weight, d_bias, None


def synchronize(module: nn.Module) -> nn.Module:
    """Replace each batch norm layer below the module by a synchronized one with the same parameters and buffers."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm | ReferenceBatchNorm) and child.running_mean is not None:
            layer = SynchronizedBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            layer.weight, layer.bias = child.weight, child.bias
            running_mean, running_var = running_statistics(child)
            layer.running_mean, layer.running_var = running_mean, running_var
            assert child.num_batches_tracked is not None
            layer.num_batches_tracked = child.num_batches_tracked
            setattr(module, name, layer.train(child.training))
        else:
            synchronize(child)
    return module


class SynchronizedBatchNorms(LayerSync):
    """Trainer plugin: batch norm over the batches of all ranks, on any device, where torch's own needs a GPU."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Replace the model's batch norm layers, if there is more than one rank."""
        return synchronize(model) if world_size() > 1 else model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave the layers as they are: without ranks they normalize by their own batch."""
        return model


def _average_in_place(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        return
    if wires := _wires(*tensors):
        wires.average(tensors)
        return
    flat = average(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
