"""`bngan fit` as a person runs it, timed by what the run itself records: when its plots were drawn and how well it did.

    python scripts/timed_fit.py --warm_up 100 --trainer.max_steps 1000

What is not an option of this script goes to fit as it is. The last line is JSON:

    images_per_s       from the first plotted iteration after the warm-up to the last one, validations among them
    first_iteration    seconds from the command to the first plotted iteration
    training_seconds   from the run's first record to its last, less validation
    seconds            of the whole command
    peak_mb            the most memory that the process held at once
    fid, floor         the best FID of a validation and the one of as many real images, if there was a validation
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

TRAIN = Path(__file__).with_name("train.py")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--warm_up", type=int, default=0, help="iterations that are not timed")
    parser.add_argument("--runs", type=Path, help="new folder for the run (default: a temporary one)")
    args, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="bngan-timed-") as temporary:
        runs = args.runs or Path(temporary)
        started = time.time()
        command = [sys.executable, str(TRAIN), "fit", f"--trainer.default_root_dir={runs}", *settings]
        done = subprocess.run(command, stdout=sys.stderr, check=False)
        seconds = time.time() - started
        if done.returncode:
            sys.exit(done.returncode)
        peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
        (run,) = runs.glob("*/*")
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb, **recorded(run, started, args.warm_up)}))


def recorded(run: Path, started: float, warm_up: int) -> dict[str, float]:
    """Return what a run's folder tells of a fit command that started at that time of the clock."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # after the run: it takes memory

    plots = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    scalars = {tag: plots.Scalars(tag) for tag in plots.Tags()["scalars"]}
    iterations = scalars["train/d_loss"]
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    seen = {"first_iteration": iterations[0].wall_time - started}
    timed = [event for event in iterations if event.step >= warm_up]
    if len(timed) > 1:
        seconds = timed[-1].wall_time - timed[0].wall_time
        seen["images_per_s"] = (timed[-1].step - timed[0].step) * data["batch_size"] / seconds
    if "val/fid" in scalars:
        validating = json.loads((run / "quality.json").read_text())["validation_seconds"]
        last = scalars["val/fid"][-1].wall_time
        seen["training_seconds"] = last - plots.FirstEventTimestamp() - validating
        seen["fid"] = min(event.value for event in scalars["val/fid"])
        seen["floor"] = scalars["floor/fid"][-1].value
    return seen


if __name__ == "__main__":
    main()
