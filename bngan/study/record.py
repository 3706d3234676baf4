"""What is in a study's folder? Its file, results.jsonl with a line for each run, and what is made of them."""

import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bngan import __version__
from bngan.errors import UsageError
from bngan.files import write_whole, writing
from bngan.study.spec import Look, Result, Run, Study, planned_runs

RESULTS, SOURCE = "results.jsonl", "study.yaml"
REFERENCES = "references.json"  # floors and controls of the study's tasks
SAMPLES = "samples"  # folder of the runs' pictures


class Record:
    """The results of a study, each on the disk before it counts; `read_results` only reads them.

    Args:
        study: the study.
        folder: its folder, made where it is not there; if it holds results of the same study, they are taken over.
        device: on which runs are done, a word for the first line.

    Attributes:
        results: those there are, by the runs' ids, in the order in which they came.
        torn: whether the last line was cut off, as kill -9 does, and has been dropped; its run is to be repeated.

    Raises:
        UsageError: if the folder is another study's, has results that are not planned, or cannot be written.
    """

    def __init__(self, study: Study, folder: Path, device: str = "cpu") -> None:
        self.path = folder / RESULTS
        with writing(folder):
            content = self.path.read_bytes() if self.path.exists() else b""
            whole = whole_lines(content)
            self.torn = len(whole) < len(content)
            self.results = results_in(whole, study, self.path)
            if whole and self.torn:
                os.truncate(self.path, len(whole))
            if not whole:
                write_whole(self.path, _line({"study": study.name, "sha256": study.sha256} | machine(device)))
                write_whole(folder / SOURCE, study.source.encode())

    def add(self, result: Result) -> None:
        """Append a result, as a whole line that is on the disk when this returns.

        Raises:
            UsageError: if it cannot be written.
        """
        try:
            with self.path.open("ab") as file:
                file.write(_line(asdict(result)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(f"cannot write to {self.path}: {error.strerror}; the same command then goes on") from error
        self.results[result.run.id] = result


def read_results(study: Study, folder: Path) -> dict[str, Result]:
    """Return the results in a study's folder by the runs' ids, and change nothing there; a line cut off is left out.

    Raises:
        UsageError: if there are none, they are another study's, or some are not planned.
    """
    path = folder / RESULTS
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); name the folder of a study that was run") from error
    return results_in(whole_lines(content), study, path)


def whole_lines(content: bytes) -> bytes:
    """Return a file's content without what follows its last end of a line."""
    return content[: content.rfind(b"\n") + 1]


def results_in(lines: bytes, study: Study, path: Path) -> dict[str, Result]:
    """Return the results by the runs' ids in the lines of a file, the first of which tells the study; none in none.

    Raises:
        UsageError: if they are another study's, or some are not planned.
    """
    if not lines:
        return {}
    header, *others = lines.splitlines()
    if json.loads(header)["sha256"] != study.sha256:
        raise UsageError(
            f"{path.parent} holds results of another study, or of this one before its file was changed; choose another "
            f"--output, or go on with {path.parent / SOURCE}"
        )
    results = {result.run.id: result for result in map(result_of, map(json.loads, others))}
    check_planned([result.run for result in results.values()], study, path)
    return results


def check_planned(runs: Iterable[Run], study: Study, path: Path) -> None:
    """Refuse runs that the study does not have, such as fresh ones at a second value: they would pass for replicates.

    Raises:
        UsageError: naming the first of them.
    """
    left = Counter(_kind(run) for block in study.blocks for run in planned_runs(study, block))
    chosen: dict[tuple[str, str, str], Run] = {}  # the first fresh run of each arm whose values are chosen
    waiting = {block.name for block in study.blocks if block.chosen_from is not None}
    for run in runs:
        if run.role == "fresh" and run.block in waiting:
            first = chosen.setdefault((run.block, run.context, run.arm), run)
            if first.axes != run.axes:
                raise UsageError(
                    f"{path}: {first.id} and {run.id} are fresh runs of one arm at two values of its axes; take out the lines "
                    "of one value"
                )
        left[_kind(run)] -= 1
        if left[_kind(run)] < 0:
            raise UsageError(f"{path}: {run.id} is one more than the study has of such runs; take out its line")


def _kind(run: Run) -> tuple[str, str, str, str, int]:
    """Return what tells a planned run from others, as long as the values of its axes are not chosen."""
    return run.block, run.role, run.context, run.arm, run.seed


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep another study's process out of a folder, which is made; the system lets go of it when this one dies, however.

    Raises:
        UsageError: if another is at work there, or the folder cannot be used.
    """
    if sys.platform == "win32":
        print("Windows does not keep two studies apart: start one at a time with the same --output.", flush=True)
        yield
        return
    import fcntl

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(f"a study is running in {folder} already; wait for its end, or choose another --output") from error
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): start one study at a time with this --output.", flush=True)
    try:
        yield
    finally:
        os.close(descriptor)


def machine(device: str) -> dict[str, Any]:
    """Return the versions and the machine that make results, as the report shows them."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {cores()} cores",
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def result_of(entry: Mapping[str, Any]) -> Result:
    """Return the result that a line of results.jsonl holds."""
    run = entry["run"]
    looks = tuple(Look(**{**look, "probes": tuple(look["probes"])}) for look in run["looks"])
    rest = {name: value for name, value in entry.items() if name not in ("run", "measured", "probed")}
    return Result(run=Run(**{**run, "looks": looks}), measured=tuple(entry["measured"]), probed=tuple(entry["probed"]), **rest)


def _line(entry: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(entry)}\n".encode()
