"""What would a study take? Hours and memory, by some iterations and one look of each kind, timed on this machine."""

import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.table import Table

from bngan.errors import UsageError
from bngan.study.launchers import Launcher
from bngan.study.runner import duration
from bngan.study.spec import Look, Run, Study, planned_runs
from bngan.study.tasks import TASKS
from bngan.study.together import TrainingTogether, most, structure
from bngan.study.training import Training

FIRST, TIMED = 5, 20  # iterations that are not timed, and that are
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Cost:
    """What runs of a structure take.

    Attributes:
        run: one of them.
        iteration: seconds of an iteration; where runs are trained as one, a run's share.
        looks: seconds of each kind of look, likewise.
        memory: bytes, of a process or of the device; 0 where that is not known.
    """

    run: Run
    iteration: float
    looks: Mapping[Hashable, float]
    memory: int

    def of(self, run: Run) -> float:
        """Return the seconds of a run of this structure."""
        return self.iteration * run.iterations + sum(self.looks[kind(look)] for look in run.looks)


def kind(look: Look) -> Hashable:
    """Return what decides how long a look takes."""
    return look.samples, look.whole, look.probes


def alike(run: Run) -> Hashable:
    """Return what decides how long an iteration takes."""
    return structure(replace(run, iterations=1, looks=()))


def examples(study: Study) -> list[Run]:
    """Return a run of each structure, which has every kind of look that runs of this structure have."""
    found: dict[Hashable, Run] = {}
    for block in study.blocks:
        for run in planned_runs(study, block):
            other = found.setdefault(alike(run), run)
            looks = {kind(look): look for look in (*other.looks, *run.looks)}
            found[alike(run)] = replace(other, looks=tuple(looks.values()))
    return list(found.values())


def measure(run: Run, root: Path, device: str = "cpu") -> Cost:
    """Time some iterations and each look of a run; on a GPU as many like it as are trained together."""
    together = device != "cpu"
    runs = [replace(run, seed=seed) for seed in range(most(run, device))] if together else [run]
    if together:
        training = TrainingTogether(runs, root, device)
    else:
        training = Training(run, TASKS[run.task].load(root, run.seed, device), device)
    training.advance(FIRST)
    before = training.seconds
    training.advance(FIRST + TIMED)
    looks: dict[Hashable, float] = {}
    for look in run.looks:
        start = time.perf_counter()
        training.look(look)
        looks[kind(look)] = (time.perf_counter() - start) / len(runs)
    return Cost(run, (training.seconds - before) / TIMED / len(runs), looks, memory_used(device))


def memory_used(device: str) -> int:
    """Return the most bytes that this process, or the device, has held."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_all(study: Study, launcher: Launcher[Cost]) -> list[Cost]:
    """Return the costs of all structures of a study, several at a time as when it is run.

    Raises:
        UsageError: if the machine has no room for so many at a time.
    """
    waiting, costs = examples(study), []
    try:
        while waiting or launcher.busy:
            while waiting and launcher.room:
                launcher.start([waiting.pop()])
            for ended in launcher.ended():
                if ended.outcomes is None:
                    raise UsageError(f"{ended.runs[0].id}: {ended.fault}, while it was timed; lower --jobs")
                costs += ended.outcomes
    finally:
        launcher.close()
    return costs


def table(study: Study, costs: list[Cost], jobs: int) -> Table:
    """Return a table of the blocks: what would be run, and how long it would take.

    Args:
        study: the study.
        costs: of all its structures.
        jobs: how many runs go on at a time, each of which has a process of its own.
    """
    of = {alike(cost.run): cost for cost in costs}
    shown = Table("block", "task", "arms", "runs", "iterations", "a run", "in all", title=study.title)
    total = 0.0
    for block in study.blocks:
        runs = planned_runs(study, block)
        seconds = sum(of[alike(run)].of(run) for run in runs)
        total += seconds
        arms = "; ".join(f"{context}: {' '.join(names)}" for context, names in block.arms.items())
        cells = [f"{len(runs):,}", f"{block.iterations:,}", duration(seconds / len(runs)), duration(seconds / jobs)]
        shown.add_row(block.name, block.task, arms, *cells)
    memory = max(cost.memory for cost in costs) * jobs / 2**30
    shown.caption = f"{duration(total / jobs)} in all, {jobs} at a time, {memory:.1f} GiB of memory together"
    return shown
