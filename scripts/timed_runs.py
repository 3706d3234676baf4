"""Runs of a study, as many side by side as there are cores, timed by what each tells of its training.

    python scripts/timed_runs.py --iterations 1000

They are those of the default recipe, with seeds 0, 1, ... The last line is JSON: images_per_s of all together.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from bngan.study.launchers import Processes
from bngan.study.record import cores
from bngan.study.spec import Look, Result, Run
from bngan.study.training import train

BATCH_SIZE, SAMPLES = 128, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--data_root", type=Path, default=Path("data"))
    args = parser.parse_args()
    launcher: Processes[Result] = Processes(cores(), partial(train, root=args.data_root))
    for seed in range(cores()):
        launcher.start([run_of(seed, args.iterations)])
    results: list[Result] = []
    while launcher.busy:
        for ended in launcher.ended():
            if ended.outcomes is None:
                sys.exit(f"a run was lost: {ended.fault}")
            results += ended.outcomes
    launcher.close()
    print(json.dumps({"images_per_s": sum(BATCH_SIZE * args.iterations / result.seconds for result in results)}))


def run_of(seed: int, iterations: int) -> Run:
    """Return a run of the default recipe that is looked at once, at its end."""
    return Run(
        id=f"{seed}",
        block="",
        context="",
        arm="",
        axes={},
        seed=seed,
        role="fresh",
        task="digits",
        settings={},
        batch_size=BATCH_SIZE,
        iterations=iterations,
        looks=(Look(iterations, SAMPLES),),
    )


if __name__ == "__main__":
    main()
