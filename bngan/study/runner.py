"""How is a study run? A queue of runs, a launcher that does them, and a record of what came out: stopped, it goes on."""

import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.live import Live
from rich.table import Table

from bngan.errors import UsageError
from bngan.study.launchers import Chunk, Ended, Launcher
from bngan.study.record import Record
from bngan.study.spec import Block, Choice, Result, Run, Study, planned_runs, runs_of
from bngan.study.statistics import choice_made

LINE_SECONDS = 15.0
Choose = Callable[[Block, Sequence[Result]], Choice]


class Queue:
    """The runs that are still to be done, by blocks; those that wait for a choice come when the pilots that make it have ended.

    Args:
        study: the study.
        results: what is there already, and is not done again.
        choose: gives, from the results of a block's pilot runs, the values of its axes for each context and arm.

    Attributes:
        waiting: runs that can be started.
        lost: those that the machine has failed twice, and what it did. They have no result: it would be held against their arm.
    """

    def __init__(self, study: Study, results: Iterable[Result], choose: Choose) -> None:
        self.study, self.choose = study, choose
        self.waiting: list[Run] = []
        self.lost: dict[str, str] = {}
        self._results = {result.run.id: result for result in results}
        self._known = set(self._results)
        self._again: set[str] = set()  # those that the machine has failed once
        # Blocks whose pilots choose, with those of them that have not ended.
        self._pilots = {block.name: self._pilots_of(block) - self._known for block in study.blocks}
        self._fill()

    def take(self, launcher: Launcher[Result]) -> Chunk:
        """Take out what is to be started next; a run that the machine has failed comes after all others, by itself."""
        first_time = [run for run in self.waiting if run.id not in self._again]
        chunk = launcher.take(first_time) if first_time else self.waiting[:1]
        taken = {run.id for run in chunk}
        self.waiting = [run for run in self.waiting if run.id not in taken]
        return chunk

    def settle(self, ended: Ended[Result]) -> Sequence[Result]:
        """Return the results of a chunk; runs that the machine has failed are put back once, and then given up."""
        if ended.outcomes is None:
            self._put_back(ended)
            return []
        for result in ended.outcomes:
            self._results[result.run.id] = result
            pilots = self._pilots[result.run.block]
            if result.run.id in pilots:
                pilots.remove(result.run.id)
                if not pilots:
                    self._fill()
        return ended.outcomes

    def _put_back(self, ended: Ended[Result]) -> None:
        first, *others = ended.runs
        if first.id in self._again:  # it was by itself
            self.lost[first.id] = ended.fault
            then = "for the second time, so it is given up"
        else:
            self._again |= {run.id for run in ended.runs}
            self.waiting += ended.runs
            then = "once more by itself when the others have ended"
        print(f"{first.id}{f' and {len(others)} others' if others else ''}: {ended.fault}; {then}.", flush=True)

    def _pilots_of(self, block: Block) -> set[str]:
        return {run.id for run in runs_of(self.study, block) if run.role == "pilot"}

    def _fill(self) -> None:
        """Let wait what can be started now and has not been yet, in the order of the blocks."""
        for block in self.study.blocks:
            new = [run for run in runs_of(self.study, block, self._choice(block)) if run.id not in self._known]
            self._known |= {run.id for run in new}
            self.waiting += new
        places = {block.name: place for place, block in enumerate(self.study.blocks)}
        self.waiting.sort(key=lambda run: places[run.block])

    def _choice(self, block: Block) -> Choice | None:
        if block.chosen_from is None or self._pilots[block.chosen_from]:
            return None
        (source,) = (other for other in self.study.blocks if other.name == block.chosen_from)
        pilots = self._pilots_of(source)
        chosen = self.choose(source, [result for name, result in self._results.items() if name in pilots])
        return {**chosen, **choice_made(self.study, source, self._results.values())}  # fresh runs go on as they began


class Progress:
    """Shows, for each block, the runs done of those planned, those that ended before their time, and the time that is left.

    On a terminal it is a table, elsewhere a line now and then. It tells nothing of what came out.

    Args:
        study: the study.
        results: those there are, to which others are added as they come.
    """

    def __init__(self, study: Study, results: Collection[Result]) -> None:
        self.results = results
        self.planned = {block.name: len(planned_runs(study, block)) for block in study.blocks}
        self.iterations = {block.name: block.iterations for block in study.blocks}
        self._start = self._shown = time.monotonic()
        self._before = self._cost(results)
        self._live = Live(auto_refresh=False) if sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.show(last=True)
        if self._live is not None:
            self._live.stop()

    def show(self, *, last: bool = False) -> None:
        """Show how far it is, if it is time to."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        elif last or time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            blocks = "  ".join(f"{block} {self._done(block)}/{planned}" for block, planned in self.planned.items())
            early = sum(result.failure is not None for result in self.results)
            print(f"{blocks}  {early} ended early  {duration(self.seconds_left())} left", flush=True)

    def seconds_left(self) -> float | None:
        """Return how long what is left will take, None while nothing has ended since the start."""
        done = self._cost(self.results) - self._before
        each = {block: self._seconds_per_run(block) for block in self.planned}
        left = sum(each[block] * (planned - self._done(block)) for block, planned in self.planned.items())
        return left * (time.monotonic() - self._start) / done if done else None

    def _table(self) -> Table:
        table = Table("block", "runs", "done", "ended early")
        for block, planned in self.planned.items():
            early = sum(result.failure is not None for result in self.results if result.run.block == block)
            table.add_row(block, f"{planned:,}", f"{self._done(block):,}", f"{early:,}")
        done = sum(self._done(block) for block in self.planned)
        table.caption = f"{done:,} of {sum(self.planned.values()):,} runs, {duration(self.seconds_left())} left"
        return table

    def _done(self, block: str) -> int:
        return sum(result.run.block == block for result in self.results)

    def _seconds_per_run(self, block: str) -> float:
        """Return the mean of the block's own runs, or where there are none what an iteration of all takes, times its own."""
        own = [result.seconds for result in self.results if result.run.block == block]
        if own:
            return sum(own) / len(own)
        iterations = sum(result.run.iterations for result in self.results)
        return self._cost(self.results) / iterations * self.iterations[block] if iterations else 0.0

    @staticmethod
    def _cost(results: Iterable[Result]) -> float:
        return sum(result.seconds for result in results)


def run_study(study: Study, record: Record, launcher: Launcher[Result], choose: Choose) -> None:
    """Do all runs that are still to be done, and add what comes out to the record.

    Raises:
        KeyboardInterrupt: after it was asked to stop; what has ended is in the record.
        UsageError: if the machine has failed a run twice, after all others that could be done.
    """
    queue = Queue(study, record.results.values(), choose)
    try:
        with Progress(study, record.results.values()) as progress:
            while queue.waiting or launcher.busy:
                while queue.waiting and launcher.room:
                    launcher.start(queue.take(launcher))
                for ended in launcher.ended():
                    for result in queue.settle(ended):
                        record.add(result)
                progress.show()
    except KeyboardInterrupt:
        print(f"Stopped; {len(record.results):,} runs have ended. The same command goes on with the others.", flush=True)
        raise
    finally:
        launcher.close()
    if queue.lost:
        name, fault = next(iter(queue.lost.items()))
        raise UsageError(
            f"{len(queue.lost):,} of the runs have no result, for the machine failed them twice, the first {name} ({fault}); "
            "give it less to do at once (--jobs) or more memory: the same command goes on with what is missing"
        )


def duration(seconds: float | None) -> str:
    """Return a time as it is read: 40 s, 12 min, 3.5 h."""
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
