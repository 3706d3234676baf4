"""Work that torch does on one thread, such as drawing random numbers, done on as many as torch has."""

import ctypes
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from threading import Thread
from typing import Any

import torch

PAUSE_SOFT = 1  # omp_pause_soft of OpenMP 5.0, section 3.2.44


def spare() -> int:
    """Return how many threads `side_by_side` uses here."""
    return torch.get_num_threads() if _pause_of_openmp() is not None else 1


def side_by_side(works: Iterable[Callable[[], object]]) -> None:
    """Do all works, on as many threads at a time as torch has; each must be one that torch does on a single thread.

    After an operation on several threads, OpenMP's threads wait for the next one by spinning, for 15 ms with GNU's. Ours
    would share the processors with them and gain nothing, so those are sent away first. The next operation starts them anew,
    which takes it 0.1 ms. Where that cannot be done, all runs on this thread.
    """
    left, failures = deque(works), list[BaseException]()

    def work() -> None:
        try:
            while (job := _taken(left)) is not None:
                job()
        except BaseException as failure:
            failures.append(failure)
            left.clear()

    pause, helpers = _pause_of_openmp(), [Thread(target=work) for _ in range(min(spare(), len(left)) - 1)]
    if pause is not None and helpers:
        pause(PAUSE_SOFT)
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]


def _taken(left: deque[Callable[[], object]]) -> Callable[[], object] | None:
    try:
        return left.popleft()
    except IndexError:
        return None


@cache
def _pause_of_openmp() -> Callable[[int], Any] | None:
    """Return omp_pause_resource_all of the OpenMP that torch uses, whichever and wherever that is."""
    if not torch.backends.openmp.is_available():
        return None
    return getattr(ctypes.CDLL(torch._C.__file__), "omp_pause_resource_all", None)
