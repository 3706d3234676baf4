"""Ranks of one machine talk through shared memory of their own: what goes wrong there is told, and nobody waits for ever."""

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as torch_distributed

from bngan import distributed, wires

PATIENCE, MEETING = 3.0, 2.0
Part = Callable[[int, Path], str]


def play(rank: int, folder: Path, part: Part) -> None:
    """Be one of two ranks, and write down what came of it."""
    torch.set_num_threads(1)
    wires.MEETING_SECONDS = MEETING
    torch_distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE),
    )
    started = time.monotonic()
    try:
        with redirect_stdout((folder / "said").open("a")):
            found = part(rank, folder)
    except RuntimeError as error:
        found = f"RuntimeError: {error}"
    seconds = time.monotonic() - started
    (folder / str(rank)).write_text(f"{seconds:.1f} {found}")
    os._exit(0)  # by the usual way out ranks wait for one another


def played(folder: Path, part: Part) -> list[tuple[float, str]]:
    """Return after how many seconds each of two ranks was done, and with what."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_wires"])
    processes = [context.Process(target=play, args=(rank, folder, part)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    texts = [(folder / str(rank)).read_text() if (folder / str(rank)).exists() else "0 gone" for rank in range(2)]
    return [(float(text.partition(" ")[0]), text.partition(" ")[2]) for text in texts]


def exchange(rank: int, folder: Path) -> str:
    """Exchange messages of many sizes and kinds, and tell whether shared memory was used."""
    for size in (1, 7, 1024, 300_000):
        for dtype in (torch.float32, torch.float64, torch.long, torch.bfloat16):
            own = torch.full((size,), rank + 1, dtype=dtype)
            assert torch.equal(distributed.gather(own), torch.tensor([[1], [2]], dtype=dtype).expand(2, size))
    return f"through shared memory: {distributed._wires(torch.zeros(1)) is not None}"


def differ(rank: int, folder: Path) -> str:
    distributed.gather(torch.zeros(3))
    return str(distributed.gather(torch.zeros(3 + rank)))


def die(rank: int, folder: Path) -> str:
    distributed.gather(torch.zeros(3))
    if rank == 1:
        os._exit(1)
    return str(distributed.gather(torch.zeros(3)))


def stand_still(rank: int, folder: Path) -> str:
    distributed.gather(torch.zeros(3))
    if rank == 1:
        time.sleep(PATIENCE + 2)
    return str(distributed.gather(torch.zeros(3)))


def die_before_meeting(rank: int, folder: Path) -> str:
    if rank == 1:
        wires.Wires._find_others = lambda self, server, folder: os._exit(1)
    return str(distributed.gather(torch.zeros(3)))


def stay_away(rank: int, folder: Path) -> str:
    if rank == 1:
        wires.Wires._find_others = lambda self, server, folder: None
    return exchange(rank, folder)


def have_no_folder(rank: int, folder: Path) -> str:
    tempfile.tempdir = str(folder / "missing")
    return exchange(rank, folder)


def use_this_folder(rank: int, folder: Path) -> str:
    tempfile.tempdir = str(folder)
    return exchange(rank, folder)


def be_on_two_machines(rank: int, folder: Path) -> str:
    wires.platform.node = lambda: f"host{rank}"
    return exchange(rank, folder)


def leave_a_worker(rank: int, folder: Path) -> str:
    distributed.gather(torch.zeros(3))
    if rank == 1:
        if os.fork() == 0:
            time.sleep(PATIENCE + 2)
        os._exit(1)
    return str(distributed.gather(torch.zeros(3)))


def draw_in_turn(rank: int, folder: Path) -> str:
    """Ask for ten batches of noise, from one in the middle on, and return which of them this rank has drawn."""
    drawn: list[int] = []

    def draw(number: int, target: torch.Tensor) -> None:
        drawn.append(number)
        target.normal_(generator=torch.Generator().manual_seed(number))

    for parts in (1, 2):
        noises = distributed.SharedDraws(draw, parts=parts)
        for number in range(7, 17):
            rows = noises.rows(number, torch.empty(8, 3, dtype=torch.float64))
            distributed.gather(torch.full((8, 3), math.nan, dtype=torch.float64))  # a message that goes the same way
            whole = torch.empty(8, 3, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(number))
            assert torch.equal(rows, distributed.own_rows(whole, parts=parts))
    return str(drawn)


def test_messages_of_all_sizes_and_kinds_arrive(tmp_path: Path) -> None:
    assert [found for _, found in played(tmp_path, exchange)] == ["through shared memory: True"] * 2
    assert (tmp_path / "said").read_text() == ""


def test_messages_of_different_sizes_are_refused_by_their_sizes(tmp_path: Path) -> None:
    (_, first), (_, second) = played(tmp_path, differ)
    assert "RuntimeError" in first
    assert "sent 12 bytes where this one has 16" in second


@pytest.mark.parametrize("part", [die, leave_a_worker])
def test_rank_that_is_gone_is_noticed_at_once(part: Part, tmp_path: Path) -> None:
    (seconds, found), _ = played(tmp_path, part)
    assert found == "RuntimeError: Connection closed by peer"
    assert seconds < PATIENCE - 1


def test_rank_that_stands_still_is_waited_for_as_long_as_by_the_group(tmp_path: Path) -> None:
    (seconds, found), (_, other) = played(tmp_path, stand_still)
    assert found == "RuntimeError: Timed out waiting for rank 1"
    assert PATIENCE - 1 < seconds < PATIENCE + 2
    assert "RuntimeError" in other


def test_rank_that_dies_before_it_meets_the_others_leaves_none_waiting(tmp_path: Path) -> None:
    (seconds, found), _ = played(tmp_path, die_before_meeting)
    assert "RuntimeError" in found
    assert seconds < MEETING + PATIENCE + 2


@pytest.mark.parametrize(("part", "reason"), [(stay_away, "timed out"), (have_no_folder, "No such file or directory")])
def test_ranks_of_one_machine_that_cannot_share_memory_say_why(part: Part, reason: str, tmp_path: Path) -> None:
    assert [found for _, found in played(tmp_path, part)] == ["through shared memory: False"] * 2
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith("The ranks talk through gloo")
    assert reason in line


def test_ranks_of_several_machines_talk_through_gloo(tmp_path: Path) -> None:
    assert [found for _, found in played(tmp_path, be_on_two_machines)] == ["through shared memory: False"] * 2
    assert (tmp_path / "said").read_text() == ""


def test_no_folder_is_left_behind(tmp_path: Path) -> None:
    assert [found for _, found in played(tmp_path, use_this_folder)] == ["through shared memory: True"] * 2
    assert not list(tmp_path.glob("bngan-*"))


def test_ranks_draw_noise_in_turn_and_each_gets_its_rows_of_all(tmp_path: Path) -> None:
    turns = [list(range(7 + rank, 17, 2)) * 2 for rank in range(2)]
    assert [found for _, found in played(tmp_path, draw_in_turn)] == [str(turn) for turn in turns]
