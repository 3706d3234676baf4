"""Train some runs of a study again, each by `bngan fit`, and compare: do runs that are trained as one end where each does?

    bngan study claims_gpu --output runs/claims --device cuda
    python scripts/fit_again.py runs/claims F/B/a3 --accelerator gpu

Of the runs of block F, context B, arm a3 the first 6 are trained with the settings and seeds that results.jsonl has of them,
and measured as they were at their last look. Rounding drives runs of one seed apart within some hundred iterations, so FID is
compared, and not weights, which a test finds equal in float64 over few iterations. The status is 0 where the interval of the
ratio has 1 in it and is within 0.8 to 1.25, so that a wide one does not pass for agreement; by chance 1 is outside once in 20
times. Where it was stopped, the same command goes on.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bngan.checkpoint import load_gan
from bngan.cli import main as bngan
from bngan.errors import UsageError
from bngan.study.endpoints import ENDPOINTS
from bngan.study.reading import read_study
from bngan.study.record import SOURCE, read_results
from bngan.study.spec import Result, Run, reported
from bngan.study.statistics import Stratum, effect_of
from bngan.study.tasks import TASKS
from bngan.study.training import evaluate

NAME = "fit_again"
FID = ENDPOINTS["fid"]
ALIKE = 1.25  # times as much, at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the study")
    parser.add_argument("arm", help="block/context/arm")
    parser.add_argument("--count", type=int, default=6, help="how many of its runs are trained again (default 6)")
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu (default cpu)")
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="folder of the data set")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the runs")
    args = parser.parse_args()
    try:
        results = results_of(args.folder, args.arm)
    except UsageError as error:
        sys.exit(f"fit_again: error: {error}")
    again = []
    for result in results[: args.count]:
        again.append(trained_again(result.run, args.runs, args.data_root, f"--trainer.accelerator={args.accelerator}"))
        print(f"{result.run.id}: FID {FID.of(result):.3f} in the study, {FID.of(again[-1]):.3f} by fit", flush=True)
    sys.exit(0 if is_alike(again, results) else 1)


def results_of(folder: Path, arm: str) -> Sequence[Result]:
    """Return a study's reported results of an arm, block/context/arm, by their seeds.

    Raises:
        UsageError: if there are fewer than two, or they are not of digits, the only ones of the tasks' images that fit has.
    """
    study = read_study(folder / SOURCE)
    results = sorted(read_results(study, folder).values(), key=lambda result: result.run.seed)
    found = reported([result for result in results if f"{result.run.block}/{result.run.context}/{result.run.arm}" == arm])
    if len(found) < 2 or found[0].run.task != "digits":
        digits = dict.fromkeys(f"{r.run.block}/{r.run.context}/{r.run.arm}" for r in results if r.run.task == "digits")
        raise UsageError(f"{arm} has no two runs of digits; choose from {', '.join(digits)}")
    return found


def trained_again(run: Run, folder: Path, root: Path, *options: str) -> Result:
    """Train a run by fit, in a folder of its own, and measure it as at its last look; one that fit ends early has failed."""
    status = bngan(fit_command(run, folder, root, *options))
    if status == 130:
        raise KeyboardInterrupt
    if status:
        return Result(run, failure=f"fit ended with status {status}", seconds=0.0, measured=())
    gan = load_gan(checkpoint_of(run, folder))
    measured = evaluate(gan, TASKS[run.task].load(root, run.seed, "cpu"), run.looks[-1])
    return Result(run, failure=None, seconds=0.0, measured=tuple(measured))


def fit_command(run: Run, folder: Path, root: Path, *options: str) -> list[str]:
    """Return the words after `bngan` that train a run of digits, and measure nothing."""
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in run.settings.items()}
    settings = [f"--model.{name}={value}" for name, value in values.items()]
    length = ["--trainer.max_epochs=-1", f"--trainer.max_steps={run.iterations}", "--trainer.limit_val_batches=0"]
    where = [f"--trainer.default_root_dir={folder}", f"--name={NAME}", f"--run={Path(run.picture).stem}", "--ckpt_path=auto"]
    data = [f"--data.root={root}", f"--data.batch_size={run.batch_size}", "--metrics.num_samples=0"]
    return ["fit", f"--seed_everything={run.seed}", *settings, *data, *length, *where, *options]


def checkpoint_of(run: Run, folder: Path) -> Path:
    """Return the last checkpoint that fit_command leaves."""
    return folder / NAME / Path(run.picture).stem / "checkpoints" / "last.ckpt"


def is_alike(again: Sequence[Result], results: Sequence[Result]) -> bool:
    """Print the ratio of FID by fit to that in the study, and what its 95% interval (Welch's t) says.

    Return whether it has 1 in it and is within 1 / ALIKE to ALIKE.
    """
    by_fit, in_study = (np.array([FID.of(result) for result in of]) for of in (again, results))
    effect = effect_of([Stratum(weight=1.0, arm=by_fit, baseline=in_study)], FID.kind)
    low, ratio, high = (float(np.exp(value)) for value in (effect.limits(0.95)[0], effect.value, effect.limits(0.95)[1]))
    print(f"FID by fit (n={len(again)}) : in the study (n={len(results)}) = {ratio:.3f}, 95% interval {low:.3f} to {high:.3f}")
    if not low <= 1 <= high:
        print("They differ: 1 is outside.")
        return False
    if not 1 / ALIKE <= low <= high <= ALIKE:
        print(f"That is too wide to tell: it is not within {1 / ALIKE:g} to {ALIKE:g}; give a higher --count.")
        return False
    return True


if __name__ == "__main__":
    main()
