"""Work that torch does on one thread is done on several, and draws that are made so are those made one by one."""

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from bngan import distributed, threads

SEVERAL = pytest.mark.skipif(
    threads._pause_of_openmp() is None, reason="the OpenMP of this torch cannot be told to rest, so all is done on one thread"
)


@pytest.fixture(params=[1, 2, 3])
def count(request: pytest.FixtureRequest) -> Iterator[int]:
    """A number of threads that torch is told to use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("works", [0, 1, 2, 7])
def test_each_work_is_done_once(works: int, count: int) -> None:
    done: list[int] = []
    threads.side_by_side(partial(done.append, number) for number in range(works))
    assert sorted(done) == list(range(works))
    assert count > 1 or done == list(range(works))


@SEVERAL
def test_as_many_works_go_on_at_once_as_torch_has_threads(count: int) -> None:
    together = threading.Barrier(count)
    threads.side_by_side([partial(together.wait, timeout=20)] * (2 * count))
    one_more = threading.Barrier(count + 1)
    with pytest.raises(threading.BrokenBarrierError):
        threads.side_by_side([partial(one_more.wait, timeout=0.5)] * (count + 1))


def test_failure_of_a_work_is_the_callers(count: int) -> None:
    def fail() -> None:
        raise IndexError("of this work")

    with pytest.raises(IndexError, match="of this work"):
        threads.side_by_side([fail] * count + [lambda: None])
    before = threading.active_count()
    threads.side_by_side([lambda: None] * 4)
    assert threading.active_count() == before


def test_torch_works_on_as_many_threads_as_before(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(300, 300, generator=generator) for _ in range(2))
    expected = left @ right
    for _ in range(3):
        threads.side_by_side([lambda: None] * 4)
        torch.testing.assert_close(left @ right, expected, rtol=0, atol=0)
        assert torch.get_num_threads() == count


def drawn(number: int, like: Tensor) -> Tensor:
    return torch.empty_like(like).normal_(generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_ahead_are_those_of_their_numbers(dtype: torch.dtype, count: int) -> None:
    made: list[int] = []

    def draw(number: int, target: Tensor) -> None:
        made.append(number)
        target.normal_(generator=torch.Generator().manual_seed(number))

    draws = distributed.SharedDraws(draw, parts=2)
    whole = torch.empty(6, 40, dtype=dtype)
    for number in (*range(3, 40), 1000, 7):  # on from the middle, and anywhere after that
        rows = draws.rows(number, torch.empty_like(whole))
        assert torch.equal(rows, drawn(number, whole))
        assert not torch.equal(rows, drawn(number + 1, whole))
    several = count > 1 and threads.spare() > 1
    assert len(made) > 39 if several else made == [*range(3, 40), 1000, 7]


def test_draws_ahead_take_no_more_memory_than_allowed(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    made: list[int] = []
    whole = torch.empty(4, 4)
    for allowed, expected in ((0, 1), (2, 2), (5, 5), (1000, distributed.DRAWN_AHEAD)):
        monkeypatch.setattr(distributed, "DRAWN_AHEAD_BYTES", allowed * whole.nbytes)
        made.clear()
        distributed.SharedDraws(lambda number, _: made.append(number), parts=1).rows(0, torch.empty_like(whole))
        assert sorted(made) == list(range(expected if count > 1 and threads.spare() > 1 else 1))
