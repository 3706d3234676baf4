"""What must agree between the ranks of a distributed run."""

import os
import platform
import shutil
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from lightning.pytorch.plugins import LayerSync
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bngan.batchnorm import ReferenceBatchNorm, running_statistics, single

# So many values at most go straight from each rank to each; of more, each rank adds up a part, but for two ranks.
SMALL = 1 << 14
# Ranks that meet have just told one another that they are there.
MEETING_SECONDS = 60.0
SIZE_BYTES = 8


def world_size() -> int:
    """Return the number of ranks, 1 when not distributed."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, 0 when not distributed."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


@torch.no_grad()
def gather(own: Tensor) -> Tensor:
    """Return all ranks' tensors, which have one shape, stacked by rank: (ranks, ...)."""
    ranks, me = world_size(), rank()
    own = own.detach().contiguous()
    gathered = own.new_empty(ranks, *own.shape)
    if not _straight(own):
        distributed.all_gather(list(gathered.unbind()), own)
        return gathered
    gathered[me] = own
    _wires().exchange(gathered, me)
    return gathered


@torch.no_grad()
def add_up(own: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors, to the last bit the same on all of them."""
    if _straight(own):
        return gather(own).sum(dim=0)
    total = own.detach().clone()
    distributed.all_reduce(total)
    return total


def _straight(own: Tensor) -> bool:
    """Tell whether a tensor is best sent from each rank to each."""
    return own.device.type == "cpu" and (world_size() == 2 or own.numel() <= SMALL) and _wires().connected


class _Wires:
    """Unix sockets between the ranks, where all of them are on one machine.

    A message of a layer's statistics takes gloo 0.2 to 2 ms on a processor, since threads of its own first agree on it; here
    it takes the kernel's 0.03 ms. A rank that is gone is noticed at once, one that stands still after as long as by gloo.
    """

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self.connected = len(set(_everyones(platform.node()))) == 1 and self._connect()

    def _connect(self) -> bool:
        """Connect this rank to all others if all can; else rank 0 says why not."""
        folder = [""]

        def make_folder() -> None:
            if rank() == 0:
                folder[0] = tempfile.mkdtemp(prefix="bngan-")

        try:
            reason = _failure(make_folder)
            distributed.broadcast_object_list(folder)
            with socket.socket(socket.AF_UNIX) as server:
                for step in (self._listen, self._meet):
                    reason = reason or _failure(partial(step, server, Path(folder[0])))
        finally:
            if rank() == 0:
                shutil.rmtree(folder[0], ignore_errors=True)
        if reason:
            self.close()
            if rank() == 0:
                print(f"The ranks talk through gloo, which takes longer than sockets in {folder[0]} ({reason}).", flush=True)
            return False
        for wire in self._sockets.values():
            wire.settimeout(None)
            # The kernel's own limits: with Python's, each message would take one call of the system more, and twice as long.
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                wire.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", max(1, int(_patience())), 0))
        itself = ref(self)

        def let_go() -> None:
            if wires := itself():
                wires.close()

        # A worker that reads data would keep a dead rank's end open, and the others waiting.
        os.register_at_fork(after_in_child=let_go)
        return True

    def _listen(self, server: socket.socket, folder: Path) -> None:
        server.bind(str(folder / str(rank())))
        server.listen(world_size())
        server.settimeout(MEETING_SECONDS)

    def _meet(self, server: socket.socket, folder: Path) -> None:
        for other in range(rank()):
            wire = self._sockets[other] = socket.socket(socket.AF_UNIX)
            wire.settimeout(MEETING_SECONDS)
            wire.connect(str(folder / str(other)))
            _send(wire, rank().to_bytes(4, "big"))
        for _ in range(rank() + 1, world_size()):
            wire, _ = server.accept()
            wire.settimeout(MEETING_SECONDS)
            caller = bytearray(4)
            _receive(wire, memoryview(caller))
            self._sockets[int.from_bytes(caller, "big")] = wire

    def close(self) -> None:
        """Let go of all sockets, which the other ranks notice."""
        for wire in self._sockets.values():
            wire.close()

    def exchange(self, gathered: Tensor, me: int) -> None:
        """Send this rank's tensor, gathered[me], to all others, and receive theirs in their places.

        Raises:
            RuntimeError: if another rank is gone, stands still, or has sent a message of another size.
        """
        content = gathered.view(len(gathered), -1).view(torch.uint8).numpy()
        other = me
        try:
            # In this order every pair of ranks meets, whatever the others do.
            for other, wire in sorted(self._sockets.items()):
                for sending in (me < other, me > other):
                    if sending:
                        _send(wire, content[me])
                    else:
                        _receive(wire, memoryview(content[other]))
        except BlockingIOError as error:  # what the kernel's limits come to
            self.close()
            raise RuntimeError(f"Timed out waiting for rank {other}") from error
        except OSError as error:
            self.close()
            raise RuntimeError("Connection closed by peer") from error
        except RuntimeError:
            self.close()
            raise


def _send(wire: socket.socket, content: Any) -> None:
    """Send a message behind its size, by which ranks that disagree find out."""
    content = memoryview(content)
    sent = wire.sendmsg([len(content).to_bytes(SIZE_BYTES, "big"), content]) - SIZE_BYTES
    if sent < len(content):
        wire.sendall(content[sent:])


def _receive(wire: socket.socket, target: memoryview) -> None:
    header, count = bytearray(SIZE_BYTES), 0
    size = memoryview(header)
    while count < SIZE_BYTES + len(target):
        received = wire.recvmsg_into([size[count:], target[max(0, count - SIZE_BYTES) :]])[0]
        if received == 0:
            raise RuntimeError("Connection closed by peer")
        count += received
        if count >= SIZE_BYTES and (told := int.from_bytes(header, "big")) != len(target):
            raise RuntimeError(f"another rank has sent {told} bytes where this one has {len(target)}: they have parted")


def _everyones(own: Any) -> list[Any]:
    found: list[Any] = [None] * world_size()
    distributed.all_gather_object(found, own)
    return found


def _failure(step: Callable[[], None]) -> str:
    """Let each rank do a step; return why one of them could not, or nothing."""
    own = ""
    try:
        step()
    except OSError as error:
        own = str(error) or type(error).__name__
    return next(filter(None, _everyones(own)), "")


def _patience() -> float:
    """Return for how many seconds the ranks' own messages wait for one another."""
    try:
        options = cast(Any, distributed.group.WORLD)._get_backend(torch.device("cpu")).options
    except RuntimeError:  # these ranks are grouped for GPUs alone
        return default_pg_timeout.total_seconds()
    return options._timeout.total_seconds()


_WIRES: WeakKeyDictionary[Any, _Wires] = WeakKeyDictionary()


def _wires() -> _Wires:
    """Return the wires of the ranks as they are grouped now; all ranks must ask at the same place."""
    group = distributed.group.WORLD
    if group not in _WIRES:
        _WIRES[group] = _Wires()
    return _WIRES[group]


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
        if self.local or not self.training or world_size() == 1:
            return super().forward(z)
        y, mean, var = _NormalizeTogether.apply(single(z), self.weight, self.bias, self.eps)
        if self.track_running_stats:
            count = world_size() * z.numel() // self.num_features
            self._update_running(mean, var * count / (count - 1))
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
        means, variances = gather(torch.stack([own_mean, own_var])).unbind(dim=1)
        mean = means.mean(dim=0)
        # Pooled about the common mean, so that no digits are lost where it is large.
        var = (variances + (means - mean).square()).mean(dim=0)
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
        count = world_size() * z.numel() // len(mean)
        mean_dy_z_hat, mean_dy = (add_up(torch.stack([d_weight, d_bias])) / count).unbind()
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
    flat = average(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
