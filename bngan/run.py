"""What is a run's folder? How it is named, found, gone on with, and what it records of itself."""

import json
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bngan.checkpoint import iterations, read_checkpoint
from bngan.distributed import print0
from bngan.errors import UsageError
from bngan.export.about import current_versions
from bngan.files import expand_home, write_whole

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "tensorboard", "jsonargparse", "numpy")
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Start:
    """From where a command starts, and where it writes.

    Attributes:
        folder: the run's folder.
        checkpoint: what it goes on from, or measures; None at the beginning.
        iteration: that of the checkpoint.
        parent: folder and iteration that a new run branches off from, None where there are none.
        begun: whether the folder has a run in it already, which goes on.
    """

    folder: Path
    checkpoint: Path | None = None
    iteration: int = 0
    parent: dict[str, Any] | None = None
    begun: bool = False

    def __str__(self) -> str:
        """Say from where, alike on machines that have the folder in different places."""
        if self.checkpoint is None:
            return "at the beginning"
        return f"from {'/'.join(self.checkpoint.parts[-3:])} (iteration {self.iteration})"


class Location(NamedTuple):
    """Where runs lie, ROOT/NAME/ID: the folder of all runs, the experiment, and what --run says, None for an ID made up."""

    root: Path
    name: str
    run_id: str | None = None


def new_folder(location: Location) -> Path:
    """Return a path for a new run.

    Raises:
        UsageError: if name or ID cannot be a folder's.
    """
    for option, value in (("--name", location.name), ("--run", location.run_id)):
        if value is not None and (not re.fullmatch(r"[\w.-]+", value) or value in (".", "..")):
            raise UsageError(f"{option} {value!r} becomes a folder's name: use letters, digits, '.', '_' and '-'")
    return location.root / location.name / (location.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")


def is_run(folder: Path) -> bool:
    """Whether a run of this version has begun in the folder."""
    return bool(_read_record(folder))


def run_of(checkpoint: Path) -> Path | None:
    """Return the folder of the run in which a checkpoint lies, with its run.json and config.yaml, or None."""
    folder = checkpoint.absolute().parent
    if folder.name != "checkpoints" or not is_run(folder.parent) or not (folder.parent / "config.yaml").is_file():
        return None
    return folder.parent.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder.parent


def only_one(asked: Sequence[str]) -> str:
    """Return what one checkpoint, run or recipe is asked for by; a star that the shell has left is looked up as it would.

    Raises:
        UsageError: if there are several, naming the newest.
    """
    names = map(expand_home, asked)
    found = [path for name in names for path in ([] if Path(name).exists() else sorted(glob(name))) or [name]]
    if len(found) > 1:
        newest = max(found, key=lambda name: _written(Path(name)))
        raise UsageError(f"{len(found)} checkpoints or runs given, name one; the newest is {newest}")
    return found[0]


def checkpoint_of(asked: str | Path) -> Path:
    """Return the checkpoint that is asked for where one is measured or sampled; see find.

    Raises:
        UsageError: saying what is missing.
    """
    return find(str(asked), Path("runs"), best=True)


def find(asked: str, root: Path, name: str | None = None, *, best: bool) -> Path:
    """Return the checkpoint that is asked for; one that is named is not looked at.

    Args:
        asked: a checkpoint; a run's folder; or `last`, which is the newest run.
        root: folder of all runs, where the newest is looked for.
        name: of its experiment; unset means any.
        best: whether a run's best.ckpt is taken, where it has one, or its newest checkpoint.

    Raises:
        UsageError: saying what is missing.
    """
    folder = Path(expand_home(asked))
    if asked == "last":
        written = [*(root / name).glob("*/checkpoints/*.ckpt")] if name else [*root.glob("*/*/checkpoints/*.ckpt")]
        if not written:
            raise UsageError(f"last: no run in {root / (name or '*')} has a checkpoint; name a run's folder or a checkpoint")
        folder = max(written, key=_written).parents[1]
    if not folder.is_dir():
        return folder
    chosen = folder / "checkpoints" / "best.ckpt"
    found = chosen if best and chosen.is_file() else newest_checkpoint(folder)
    if found is None:
        raise UsageError(f"{folder} has no whole checkpoint in a folder checkpoints/; name a run's folder or a checkpoint")
    return found


def find_own(location: Location) -> Path | None:
    """Return the newest checkpoint of the run that --run names, or None where there is none to go on from.

    Raises:
        UsageError: if --run names none.
    """
    if location.run_id is None:
        raise UsageError("--ckpt_path auto goes on with the run that fit's --run names, if there is one: add --run ID")
    return newest_checkpoint(new_folder(location))


def _written(path: Path) -> float:
    """Return when a checkpoint, or the newest of a run's, was written; 0 for what is not there."""
    files = [*path.glob("checkpoints/*.ckpt")] or [path]
    return max(file.stat().st_mtime if file.exists() else 0 for file in files)


def newest_checkpoint(run: Path) -> Path | None:
    """Return the whole checkpoint of the highest iteration in a run's folder, last.ckpt before its equals, or None."""
    found = []
    for path in sorted((run / "checkpoints").glob("*.ckpt")):
        try:
            found.append((iterations(read_checkpoint(path, mmap=True)), path.stem == "last", path))
        except UsageError as error:
            print0(f"Passed over: {error}")
    return max(found, default=(0, False, None))[2]


def start_of(checkpoint: Path | None, iteration: int, location: Location, *, auto: bool, apart: bool) -> Start:
    """Return where a fit starts and writes.

    Going on from a run's newest checkpoint writes in its folder. From an older one, or `apart`, or where --run names another
    folder, a new run begins that names its parent.

    Args:
        checkpoint: what it goes on from, None at the beginning.
        iteration: that of the checkpoint.
        location: where a new run lies.
        auto: whether the run that --run names may have begun and have no checkpoint yet.
        apart: whether a new run is asked for, by --override, or by a name or a root of its own.

    Raises:
        UsageError: if there is a run in the folder that --run names, and it is not the one that goes on.
    """
    run, folder = None if checkpoint is None else run_of(checkpoint), new_folder(location)
    if run is not None and not apart and (location.run_id is None or run.absolute() == folder.absolute()):
        newest = newest_checkpoint(run)
        if newest is not None and iterations(read_checkpoint(newest, mmap=True)) <= iteration:
            return Start(run, checkpoint, iteration, begun=True)
    begun = is_run(folder)
    if begun and not (auto and checkpoint is None):
        raise UsageError(
            f"there is a run in {folder} already; to go on with it add --ckpt_path auto --run {location.run_id}, "
            "or give another --run"
        )
    return Start(folder, checkpoint, iteration, parent_of(checkpoint, iteration), begun)


def parent_of(checkpoint: Path | None, iteration: int) -> dict[str, Any] | None:
    """Return what run.json says of the run that a new one branches off from, or that is measured; None where there is none."""
    if checkpoint is None:
        return None
    return {"folder": str(run_of(checkpoint) or checkpoint.parent), "iteration": iteration}


def check_restart(asked: str | None) -> None:
    """Refuse to begin anew in a job that torchrun or SLURM has started again.

    Args:
        asked: what --ckpt_path says.

    Raises:
        UsageError: with the line to type.
    """
    restarted = [name for name in RESTARTS if int(os.environ.get(name, "0")) > 0]
    if restarted and asked != "auto":
        raise UsageError(
            f"this job was started again ({restarted[0]}), and would not go on with its run; start such jobs by: bngan fit "
            "--ckpt_path auto --run ID, with an ID of your own (torchrun needs -- before the script, or it takes --run itself)"
        )


def check_writable(folder: Path) -> None:
    """Refuse a run's folder that cannot be made. One that can is made by its first file: a run that is refused leaves none.

    Raises:
        UsageError: saying which folder, why, and what to do.
    """
    if folder.is_dir():
        return
    try:
        folder.mkdir(parents=True)
        folder.rmdir()
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}; choose another --trainer.default_root_dir") from error


def record(start: Start, device: torch.device, devices: int) -> None:
    """Add this start to the run's run.json: command, time, versions, git commit, machine, and from which iteration.

    Args:
        start: from where it starts, and the run's folder.
        device: of this process.
        devices: how many processes train together.
    """
    known = _read_record(start.folder) if start.begun else {"id": start.folder.name, "parent": start.parent, "starts": []}
    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "devices": devices,
    }
    known["starts"].append(
        {
            "iteration": start.iteration,
            "command": shlex.join(sys.argv),
            "folder": os.getcwd(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git": git_commit(),
            "versions": current_versions(PACKAGES),
            "machine": machine,
        }
    )
    write_whole(start.folder / "run.json", f"{json.dumps(known, indent=2)}\n".encode())


def git_commit() -> str | None:
    """Return the commit of this source tree, with +changes if it was modified; None where it is none."""
    if not (REPOSITORY / ".git").exists():
        return None
    command = ["git", "-C", str(REPOSITORY)]
    try:
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*command, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if status else commit


def _read_record(folder: Path) -> dict[str, Any]:
    """Return what run.json says, or nothing where it is missing, damaged or of version 0.1."""
    try:
        content = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("starts"), list) else {}
