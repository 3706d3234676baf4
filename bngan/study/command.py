"""What does `bngan study` do? It runs a study and writes its report, or says what that would take."""

import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from bngan.errors import UsageError
from bngan.files import expand_home, write_whole
from bngan.study.endpoints import ENDPOINTS
from bngan.study.estimate import examples, measure, measure_all, table
from bngan.study.launchers import Launcher, Processes, Together, ray, slurm
from bngan.study.pace import write_milliseconds
from bngan.study.reading import find_study, read_study
from bngan.study.record import REFERENCES, SAMPLES, Record, cores, locked
from bngan.study.report import write_report
from bngan.study.runner import run_study
from bngan.study.spec import Result, Study
from bngan.study.statistics import choose
from bngan.study.tasks import TASKS
from bngan.study.together import most, structure, train_together
from bngan.study.training import train


def run_command(
    name: str, output: str | None, root: str, jobs: int | None, device: str, launcher: str, *, dry_run: bool
) -> None:
    """Do what is asked.

    Args:
        name: file of the study, or the name of one that is shipped.
        output: folder of results and report; None for a dry run.
        root: folder of the data sets' files.
        jobs: runs, or on a cluster jobs, at a time; None means one for each core.
        device: cpu or cuda.
        launcher: local, slurm or ray.
        dry_run: whether only to say what would be run.

    Raises:
        UsageError: if the study, the folder, the device or the launcher cannot be used, or the machine fails a run twice.
        KeyboardInterrupt: after the study was stopped in good order.
    """
    data, folder = Path(expand_home(root)).resolve(), Path(expand_home(output or ".")).resolve()
    study = read_study(find_study(name))
    _prepare(device, launcher)
    for task in {block.task for block in study.blocks}:
        TASKS[task].load(data, 0, "cpu")  # so that what is missing is told now, and is there for all
    jobs = jobs or cores()
    if dry_run:
        _estimate(study, data, jobs, device)
        return
    with locked(folder):
        doing = _launcher(launcher, jobs, device, folder, data)
        record = Record(study, folder, device)
        if record.torn:
            print("The last line of results.jsonl was cut off; its run is done again.", flush=True)
        run_study(study, record, doing, choose)
        write_references(study, data, folder)
        if device == "cpu" and launcher == "local":
            write_milliseconds(study, data, folder)
        print(f"Report: {write_report(study, list(record.results.values()), folder)}", flush=True)


def write_references(study: Study, root: Path, folder: Path) -> None:
    """Write the floors and controls of the study's tasks, of as many samples as its largest looks, unless they are there."""
    path = folder / REFERENCES
    if path.exists():
        return
    counts = dict.fromkeys(sorted({block.task for block in study.blocks}), 0)
    for block in study.blocks:
        counts[block.task] = max(counts[block.task], *(look.samples for look in block.looks))
    found = {task: TASKS[task].load(root, 0, "cpu").references(count) for task, count in counts.items()}
    write_whole(path, json.dumps(found).encode())


def _prepare(device: str, launcher: str) -> None:
    """Refuse a device that is not there, or set it as `fit` does."""
    if device == "cpu":
        return
    if launcher != "local":
        raise UsageError("--device cuda trains many runs as one on the GPU of this machine; leave out --launcher")
    if not torch.cuda.is_available():
        raise UsageError("there is no GPU here that torch can use; leave out --device, or set it to cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


def _launcher(kind: str, jobs: int, device: str, folder: Path, root: Path) -> Launcher[Result]:
    alone = partial(train, folder=folder / SAMPLES, root=root)
    if device != "cpu":
        together = partial(train_together, folder=folder / SAMPLES, root=root, device=device)
        return Together(together, structure, partial(most, device=device))
    if kind == "slurm":
        return slurm(jobs, alone, folder / "slurm")
    return ray(jobs, alone) if kind == "ray" else Processes(jobs, alone)


def _estimate(study: Study, root: Path, jobs: int, device: str) -> None:
    """Print what would be run, and how long it would take by what some iterations and looks take now."""
    timed = partial(measure, root=root, device=device)
    if device == "cpu":
        costs = measure_all(study, Processes(jobs, timed))
    else:
        jobs, costs = 1, [timed(run) for run in examples(study)]
    Console().print(table(study, costs, jobs))
    for claim in study.claims:
        primary = claim.primary
        against = f" against {primary.baseline}" if primary.baseline else ""
        print(
            f"Claim {claim.name}: {claim.statement} {primary.arm}{against}: {ENDPOINTS[primary.endpoint].words}, in contexts "
            f"{', '.join(claim.contexts)}, margin {primary.margin:g}"
        )
    print("Nothing was written.")
