"""How long does an iteration of each arm take? Timed apart from the study, in rounds in which the arms take turns."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

from bngan.files import write_whole
from bngan.study.spec import AA, Run, Study, planned_runs
from bngan.study.tasks import TASKS
from bngan.study.training import Training

MILLISECONDS = "milliseconds.json"  # of an iteration, in a study's folder
ROUNDS, WARM_UP, TIMED = 5, 20, 60  # rounds, and iterations of each


def write_milliseconds(study: Study, root: Path, folder: Path) -> None:
    """Write the milliseconds of an iteration of the arms whose times a claim compares, unless they are there.

    They are of training on this processor as `fit` does it, without its validations, with nothing beside it but what else the
    machine does.
    """
    path, timed = folder / MILLISECONDS, timed_runs(study)
    if timed and not path.exists():
        write_whole(path, json.dumps(milliseconds(timed, root)).encode())


def timed_runs(study: Study) -> dict[str, Run]:
    """Return a run of each arm in whose time to a quality a claim is interested, by block/context/arm."""
    asked = {
        (block, context, arm)
        for claim in study.claims
        for contrast in claim.contrasts
        if contrast.endpoint.startswith("time_to")
        for block, context, arm in product(contrast.blocks, claim.contexts, contrast.arms)
        if arm != AA  # which takes as long as the arm that it repeats
    }
    runs = (run for block in study.blocks for run in planned_runs(study, block))
    return {f"{run.block}/{run.context}/{run.arm}": run for run in runs if (run.block, run.context, run.arm) in asked}


def milliseconds(runs: dict[str, Run], root: Path) -> dict[str, list[float]]:
    """Return what an iteration of each run takes in each round, in milliseconds; in a round all take turns."""
    length = WARM_UP + ROUNDS * TIMED
    alone = {name: replace(run, iterations=length, looks=()) for name, run in runs.items()}
    trainings = {name: Training(run, TASKS[run.task].load(root, run.seed, "cpu")) for name, run in alone.items()}
    for training in trainings.values():
        training.advance(WARM_UP)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(WARM_UP, length, TIMED):
        for name, training in trainings.items():
            before = training.seconds
            training.advance(done + TIMED)
            found[name].append(1000 * (training.seconds - before) / TIMED)
    return found
