"""Messages between the ranks of one machine, through memory that they share.

The many small messages of synchronized batch norm take gloo 0.2 to 2 ms each, since threads of its own first agree on them.
"""

import math
import mmap
import os
import platform
import select
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn, cast
from weakref import ref

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import default_pg_timeout

# The largest message. Memory that no message has reached takes no room.
SLOT_BYTES = 1 << 26
# Of each rank its own line of the cache, in which the numbers and the sizes of its messages in both slots stand.
LINE_BYTES, PAGE_BYTES = 64, 4096
# Looks for a message before the kernel is asked to wait: at first nothing else is done, then other processes may go first.
EAGER_LOOKS, LOOKS = 64, 2048
WAIT_MS = 1
# Ranks that meet have just told one another that they are there.
MEETING_SECONDS = 60.0


class Wires:
    """Memory that all ranks share, if they are on one machine, and a socket between each two of them.

    A rank writes its message into a slot of its own and then the message's number beside it, for which the others look. It has
    two slots, used in turn: who writes the next message but one knows that all have read this one, since they have sent the one
    between. Sockets carry nothing; when a rank is gone, the kernel closes them, and the others notice at once.
    """

    def __init__(self) -> None:
        self._rank, self._ranks = distributed.get_rank(), distributed.get_world_size()
        self._sockets: dict[int, socket.socket] = {}
        self._number = 0
        self._places = lru_cache(maxsize=128)(self._find_places)
        self.connected = len(set(_everyones(platform.node()))) == 1 and self._connect()

    def share(self, own: Tensor) -> Tensor:
        """Return all ranks' tensors, which have one shape, by rank, (ranks, *shape): what stands there until the next message.

        Raises:
            RuntimeError: if another rank is gone, stands still, or has sent a message of another size.
        """
        return self.fill(own.shape, own.dtype, lambda place: place.copy_(own))

    def fill(self, shape: torch.Size, dtype: torch.dtype, write: Callable[[Tensor], object]) -> Tensor:
        """Do as `share` does with a tensor that `write` writes into its place."""
        ((everyone, by_rank),) = self._places(self._number % 2, dtype, (shape,))
        write(by_rank[self._rank])
        self._meet(by_rank[self._rank].nbytes)
        return everyone

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype by their mean over the ranks, to the last bit the same on all of them, in one message.

        Raises:
            RuntimeError: as `share` does.
        """
        places = self._places(self._number % 2, tensors[0].dtype, tuple(tensor.shape for tensor in tensors))
        for tensor, (_, by_rank) in zip(tensors, places, strict=True):
            torch.mul(tensor, 1 / self._ranks, out=by_rank[self._rank])
        self._meet(sum(tensor.nbytes for tensor in tensors))
        for tensor, (_, (first, second, *others)) in zip(tensors, places, strict=True):
            torch.add(first, second, out=tensor)
            for other in others:
                tensor.add_(other)

    def close(self) -> None:
        """Let go of all sockets, which the other ranks notice."""
        for wire in self._sockets.values():
            wire.close()

    def _meet(self, size: int) -> None:
        """Tell the others that this rank's message is there, and wait for theirs."""
        slot = self._number % 2
        self._number += 1
        lines, own = self._lines, LINE_BYTES // 8 * self._rank + slot
        lines[own + 2] = size
        lines[own] = self._number  # last: on x86-64 all see stores in their order
        for other in self._sockets:
            place, looks = LINE_BYTES // 8 * other + slot, 0
            while lines[place] != self._number:
                looks += 1
                if looks > LOOKS:
                    if lost := self._wait(other, place):
                        lines[own] = -1  # nobody may go on with the message of a rank that does not
                        self._part(lost)
                elif looks > EAGER_LOOKS:
                    os.sched_yield()
            if (told := lines[place + 2]) != size:
                self._part(f"another rank has sent {told} bytes where this one has {size}: they have parted")

    def _wait(self, other: int, place: int) -> str | None:
        """Wait without taking a core from others; return why in vain."""
        asked = select.poll()
        asked.register(self._sockets[other], select.POLLIN)
        end = time.monotonic() + self._patience
        while self._lines[place] != self._number:
            if asked.poll(WAIT_MS) and self._lines[place] != self._number:
                return "Connection closed by peer"
            if time.monotonic() > end:
                return f"Timed out waiting for rank {other}"
        return None

    def _part(self, reason: str) -> NoReturn:
        self.close()
        raise RuntimeError(reason)

    def _find_places(
        self, slot: int, dtype: torch.dtype, shapes: tuple[torch.Size, ...]
    ) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Return where tensors of these shapes lie in a slot, one after the other: all ranks' (ranks, *shape), and each's."""
        slots = self._slots[:, slot].view(dtype)
        parts = slots[:, : sum(map(math.prod, shapes))].split(list(map(math.prod, shapes)), dim=1)
        places = [part.view(self._ranks, *shape) for part, shape in zip(parts, shapes, strict=True)]
        return [(place, place.unbind()) for place in places]

    # Coming together ----------------------------------------------------------------------------------------------

    def _connect(self) -> bool:
        """Share memory with all other ranks if all can; else rank 0 says why not."""
        folder = [""]

        def make_folder() -> None:
            if not hasattr(os, "memfd_create") or platform.machine() != "x86_64":
                raise OSError("this needs Linux on x86-64")
            if self._rank == 0:
                folder[0] = tempfile.mkdtemp(prefix="bngan-")

        try:
            reason = _failure(make_folder)
            distributed.broadcast_object_list(folder)
            with socket.socket(socket.AF_UNIX) as server:
                for step in (self._listen, self._find_others):
                    reason = reason or _failure(partial(step, server, Path(folder[0])))
        finally:
            if self._rank == 0:
                shutil.rmtree(folder[0], ignore_errors=True)
        if reason:
            self.close()
            if self._rank == 0:
                print(f"The ranks talk through gloo, which takes longer than memory that they share ({reason}).", flush=True)
            return False
        self._patience = _patience()
        itself = ref(self)

        def let_go() -> None:
            if wires := itself():
                wires.close()

        # A worker that reads data would keep a dead rank's end open, and the others waiting.
        os.register_at_fork(after_in_child=let_go)
        return True

    def _listen(self, server: socket.socket, folder: Path) -> None:
        server.bind(str(folder / str(self._rank)))
        server.listen(self._ranks)
        server.settimeout(MEETING_SECONDS)

    def _find_others(self, server: socket.socket, folder: Path) -> None:
        lines_bytes = -(-self._ranks * LINE_BYTES // PAGE_BYTES) * PAGE_BYTES
        size = lines_bytes + 2 * self._ranks * SLOT_BYTES
        file = -1
        try:
            if self._rank == 0:
                file = os.memfd_create("bngan")
                os.ftruncate(file, size)
            for other in range(self._rank):
                wire = self._sockets[other] = socket.socket(socket.AF_UNIX)
                wire.settimeout(MEETING_SECONDS)
                wire.connect(str(folder / str(other)))
                wire.sendall(self._rank.to_bytes(4, "big"))
            if self._rank > 0:
                _, files, _, _ = socket.recv_fds(self._sockets[0], 1, 1)
                if not files:
                    raise OSError("rank 0 is gone")
                file = files[0]
            for _ in range(self._rank + 1, self._ranks):
                wire, _ = server.accept()
                wire.settimeout(MEETING_SECONDS)
                self._sockets[int.from_bytes(wire.recv(4, socket.MSG_WAITALL), "big")] = wire
                if self._rank == 0:
                    socket.send_fds(wire, [b"x"], [file])
            memory = mmap.mmap(file, size)
        finally:
            if file >= 0:
                os.close(file)
        self._lines = memoryview(memory)[:lines_bytes].cast("q")
        self._slots = torch.frombuffer(memory, dtype=torch.uint8, offset=lines_bytes).view(self._ranks, 2, SLOT_BYTES)


def _everyones(own: Any) -> list[Any]:
    found: list[Any] = [None] * distributed.get_world_size()
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
