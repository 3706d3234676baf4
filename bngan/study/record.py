"""What is in a study's folder? Its file, results.jsonl with a line for each run, and what is made of them."""

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bngan import __version__
from bngan.errors import UsageError
from bngan.files import write_whole
from bngan.study.spec import Look, Result, Run, Study

RESULTS, SOURCE = "results.jsonl", "study.yaml"
REFERENCES = "references.json"  # floors and controls of the study's tasks
SAMPLES = "samples"  # folder of the runs' pictures


class Record:
    """The results of a study, each on the disk before it counts.

    Args:
        study: the study.
        folder: its folder, made where it is not there; if it holds results of the same study, they are taken over.
        device: on which runs are done, a word for the first line.

    Attributes:
        results: those there are, by the runs' ids, in the order in which they came.
        torn: whether the last line was cut off, as kill -9 does, and has been dropped; its run is to be repeated.

    Raises:
        UsageError: if the folder is another study's or cannot be written.
    """

    def __init__(self, study: Study, folder: Path, device: str = "cpu") -> None:
        self.path = folder / RESULTS
        self.results: dict[str, Result] = {}
        self.torn = False
        try:
            if not self._read(study):
                write_whole(self.path, _line({"study": study.name, "sha256": study.sha256} | machine(device)))
                write_whole(folder / SOURCE, study.source.encode())
        except OSError as error:
            raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error

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

    def _read(self, study: Study) -> bool:
        """Take over what is there, and return whether there is anything; a torn last line is cut off."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, _, rest = content.rpartition(b"\n")
        self.torn = bool(rest)
        if not whole:
            return False
        header, *lines = whole.split(b"\n")
        if json.loads(header)["sha256"] != study.sha256:
            raise UsageError(
                f"{self.path.parent} holds results of another study, or of this one before its file was changed; choose "
                f"another --output, or go on with {self.path.parent / SOURCE}"
            )
        for line in lines:
            result = result_of(json.loads(line))
            self.results[result.run.id] = result
        if rest:
            os.truncate(self.path, len(whole) + 1)
        return True


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

    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error
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
