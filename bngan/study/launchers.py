"""Where are runs done? In processes side by side on this machine, in jobs of a cluster, or as one on a device.

A launcher is given chunks of runs to start, while it has room, and asked now and then for those that have ended. The function
that does a run is given, and its module imported where it is done.

What the machine does to a run, such as to kill its process where memory is full, tells nothing of the run: its chunk comes back
with that fault, and without outcomes. A defect is raised.
"""

import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from bngan.errors import UsageError
from bngan.study.spec import Run

Outcome = TypeVar("Outcome")
Chunk = Sequence[Run]
LAUNCHERS = ("local", "slurm", "ray")
DAY = 24 * 60  # minutes
POLL_SECONDS = 1.0
MOST_RUNS = 8  # of a job, which are all lost if it or the study is killed
MOST_WORDS = 300  # of what an engine says of a job that is lost


class Ended(NamedTuple, Generic[Outcome]):
    """A chunk of runs that has ended.

    Attributes:
        runs: of the chunk.
        outcomes: what came out of each, None where the machine was at fault.
        fault: what the machine did.
    """

    runs: Chunk
    outcomes: Sequence[Outcome] | None
    fault: str = ""


class Launcher(Protocol[Outcome]):
    """Something that does runs."""

    @property
    def room(self) -> int:
        """How many more chunks may be started now."""
        ...

    @property
    def busy(self) -> bool:
        """Whether any chunk has been started and not yet been given back."""
        ...

    def take(self, waiting: Sequence[Run]) -> Chunk:
        """Return those of the waiting runs, of which there is at least one, that are best started next as one chunk."""
        ...

    def start(self, runs: Chunk) -> None:
        """Start a chunk."""
        ...

    def ended(self) -> list[Ended[Outcome]]:
        """Return the chunks that have ended, after waiting a second for the first of them; a defect in one is raised."""
        ...

    def close(self) -> None:
        """End all that is still going on."""
        ...


# On this machine ------------------------------------------------------------------------------------------------------


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class Processes(Generic[Outcome]):
    """Processes of one thread each: on a processor two of them do more than one of two threads.

    Args:
        jobs: how many there are at most.
        function: what is done with a run; it and what it returns can be pickled.
    """

    def __init__(self, jobs: int, function: Callable[[Run], Outcome]) -> None:
        self.jobs, self.function = jobs, function
        self._idle: list[_Worker] = []
        self._at_work: list[tuple[_Worker, Chunk]] = []

    @property
    def room(self) -> int:
        return self.jobs - len(self._at_work)

    @property
    def busy(self) -> bool:
        return bool(self._at_work)

    def take(self, waiting: Sequence[Run]) -> Chunk:
        return waiting[:1]

    def start(self, runs: Chunk) -> None:
        worker = self._idle.pop() if self._idle else self._new_worker()
        with suppress(ConnectionError):  # it was killed while it was idle, which is heard as if it were at work
            worker.connection.send(runs)
        self._at_work.append((worker, runs))

    def ended(self) -> list[Ended[Outcome]]:
        heard = wait([worker.connection for worker, _ in self._at_work], timeout=POLL_SECONDS)
        speaking = [(worker, runs) for worker, runs in self._at_work if worker.connection in heard]
        self._at_work = [(worker, runs) for worker, runs in self._at_work if worker.connection not in heard]
        return [self._hear(worker, runs) for worker, runs in speaking]

    def close(self) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._at_work)]:
            worker.process.terminate()
            worker.process.join()
            worker.connection.close()
        self._idle, self._at_work = [], []

    def _new_worker(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(target=_work, args=(os.getpid(), theirs, self.function), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is heard
        return _Worker(process, connection)

    def _hear(self, worker: _Worker, runs: Chunk) -> Ended[Outcome]:
        try:
            sent = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            worker.connection.close()
            return Ended(runs, None, f"its process ended: {_last_words(worker.process)}")
        self._idle.append(worker)
        return _opened(runs, sent)


def _last_words(process: BaseProcess) -> str:
    """Return how a process has ended: "Killed", "status 1"."""
    code = process.exitcode or 0
    return signal.strsignal(-code) or f"signal {-code}" if code < 0 else f"status {code}"


def _work(parent: int, connection: Connection, function: Callable[[Run], Outcome]) -> None:
    """Do chunks of runs until the process that has started this one, or its wish for more, is gone."""
    from bngan.distributed import end_with_parent

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the one who asked ends the others
    end_with_parent(parent, grace=0.0)
    while True:
        try:
            runs = connection.recv()
        except EOFError:
            return
        connection.send(_do_chunk(function, runs))


# What is sent from where runs are done ---------------------------------------------------------------------------------


def _do_chunk(function: Callable[[Run], Outcome], runs: Chunk) -> list[Outcome] | Exception:
    """Do runs one after the other on one thread, and return what came out or went wrong.

    A defect is returned as text, for not every error can be sent.
    """
    import torch

    torch.set_num_threads(1)
    try:
        return [function(run) for run in runs]
    except OSError as error:  # which tells a full disk from a defect
        error.add_note(traceback.format_exc())
        return error
    except Exception as error:
        return MemoryError() if is_memory_full(error) else RuntimeError(traceback.format_exc())


def _opened(runs: Chunk, sent: list[Outcome] | Exception) -> Ended[Outcome]:
    """Return what has been sent of runs; what went wrong is raised, but for what the machine did."""
    if isinstance(sent, MemoryError):
        return Ended(runs, None, "memory was full")
    if isinstance(sent, Exception):
        raise sent
    return Ended(runs, sent)


def is_memory_full(error: Exception) -> bool:
    """Whether an error says that there was no memory, of the processor's or a GPU's; torch tells it by a RuntimeError."""
    words = "out of memory|t allocate memory|bad_alloc|ALLOC_FAILED"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and re.search(words, str(error)) is not None)


# On a cluster ---------------------------------------------------------------------------------------------------------


class Job(Protocol[Outcome]):
    """What submitit, and ray as a future, give for what was submitted."""

    def done(self) -> bool: ...
    def result(self) -> list[Outcome] | Exception: ...
    def cancel(self) -> object: ...


class Cluster(Generic[Outcome]):
    """Jobs of an engine that is there already, each of which does an equal share of the runs that wait, but at most MOST_RUNS.

    Args:
        jobs: how many there are at most at a time.
        submit: gives a chunk to the engine.
    """

    def __init__(self, jobs: int, submit: Callable[[Chunk], Job[Outcome]]) -> None:
        self.jobs, self.submit = jobs, submit
        self._submitted: list[tuple[Job[Outcome], Chunk]] = []

    @property
    def room(self) -> int:
        return self.jobs - len(self._submitted)

    @property
    def busy(self) -> bool:
        return bool(self._submitted)

    def take(self, waiting: Sequence[Run]) -> Chunk:
        return waiting[: min(-(-len(waiting) // self.room), MOST_RUNS)]

    def start(self, runs: Chunk) -> None:
        self._submitted.append((self.submit(runs), runs))

    def ended(self) -> list[Ended[Outcome]]:
        done = [(job, runs) for job, runs in self._submitted if job.done()]
        self._submitted = [pair for pair in self._submitted if pair not in done]
        if not done:
            time.sleep(POLL_SECONDS)
        return [self._ended(job, runs) for job, runs in done]

    def close(self) -> None:
        for job, _ in self._submitted:
            job.cancel()
        self._submitted = []

    @staticmethod
    def _ended(job: Job[Outcome], runs: Chunk) -> Ended[Outcome]:
        try:
            sent = job.result()
        except Exception as error:  # the engine's own: the job was killed, or its machine is gone
            return Ended(runs, None, " ".join(f"{type(error).__name__}: {error}".split())[:MOST_WORDS])
        return _opened(runs, sent)


def slurm(jobs: int, function: Callable[[Run], Outcome], folder: Path, cluster: str = "slurm") -> Cluster[Outcome]:
    """Return SLURM's jobs by submitit; partition, account and so on are those of the environment (SBATCH_PARTITION, ...).

    Args:
        jobs: how many at a time.
        function: what is done with a run.
        folder: for submitit's files, which all machines see.
        cluster: another of submitit's executors, such as "local".

    Raises:
        UsageError: if submitit is not installed, or there is no SLURM.
    """
    try:
        import submitit  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UsageError("--launcher slurm needs submitit; install it by pip install 'bngan[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise UsageError(f"--launcher slurm: this machine has no SLURM ({error}); leave out --launcher") from error
    executor.update_parameters(timeout_min=DAY, cpus_per_task=1, mem_gb=4)
    return Cluster(jobs, partial(executor.submit, _do_chunk, function))


def ray(jobs: int, function: Callable[[Run], Outcome]) -> Cluster[Outcome]:
    """Return tasks of ray: of the cluster that RAY_ADDRESS names, or of this machine.

    Raises:
        UsageError: if ray is not installed.
    """
    try:
        import ray as engine  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UsageError("--launcher ray needs ray; install it by pip install 'bngan[ray]'") from error
    engine.init(ignore_reinit_error=True)
    remote = engine.remote(num_cpus=1)(_do_chunk)
    return Cluster(jobs, lambda runs: remote.remote(function, runs).future())


# As one on a device ---------------------------------------------------------------------------------------------------


class Together(Generic[Outcome]):
    """Runs of one structure, trained as one by this process, as many as there is memory for: where it does not suffice, half.

    Args:
        function: what is done with a chunk of runs of one structure.
        structure: what runs of a chunk have in common.
        most: of how many runs like this one a chunk may be.
    """

    def __init__(
        self,
        function: Callable[[Chunk], Sequence[Outcome]],
        structure: Callable[[Run], Hashable],
        most: Callable[[Run], int],
    ) -> None:
        self.function, self.structure, self.most = function, structure, most
        self._started: Chunk | None = None
        self._structures: dict[str, Hashable] = {}  # by the runs' ids

    @property
    def room(self) -> int:
        return int(self._started is None)

    @property
    def busy(self) -> bool:
        return self._started is not None

    def take(self, waiting: Sequence[Run]) -> Chunk:
        for run in waiting:
            if run.id not in self._structures:
                self._structures[run.id] = self.structure(run)
        wanted = self._structures[waiting[0].id]
        return [run for run in waiting if self._structures[run.id] == wanted][: self.most(waiting[0])]

    def start(self, runs: Chunk) -> None:
        self._started = runs

    def ended(self) -> list[Ended[Outcome]]:
        assert self._started is not None
        runs, self._started = self._started, None
        return self._do(runs)

    def close(self) -> None:
        self._started = None

    def _do(self, runs: Chunk) -> list[Ended[Outcome]]:
        try:
            return [Ended(runs, self.function(runs))]
        except RuntimeError as error:
            if not is_memory_full(error):
                raise
        if len(runs) == 1:
            return [Ended(runs, None, "memory was full")]
        half = len(runs) // 2
        print(f"There is no memory for {len(runs)} runs like {runs[0].id} as one; it goes on with {half}.", flush=True)
        return self._do(runs[:half]) + self._do(runs[half:])  # out of the except block, which holds what filled the memory
