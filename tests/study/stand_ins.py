"""A small study, and what takes the place of training in tests of the queue: results at once, a fault, a defect.

Processes import it by name.
"""

import errno
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

from bngan.errors import UsageError
from bngan.study.spec import Arm, Block, Look, Result, Run, Study


def at_once(run: Run) -> Result:
    """A result that tells which process it comes from."""
    return Result(run=run, failure=None, seconds=0.01, measured=({"iteration": run.iterations, "process": os.getpid()},))


def failed_once(folder: Path, run: Run) -> Result:
    """Kills its process in one run and finds memory full in another, the first time, as files in the folder tell."""
    mark = folder / f"{run.block}-{run.seed}"
    if run.id in ("F/T/a0/0.001/3", "A/B/a3/0.001/101") and not mark.exists():
        mark.touch()
        if run.block == "A":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory")
        os.kill(os.getpid(), signal.SIGKILL)
    return at_once(run)


def wrong(run: Run) -> Result:
    """Goes wrong by a person's mistake, or a full disk, with seed 101, and by a defect else."""
    if run.seed == 101:
        raise UsageError("no such data; give others") if run.arm == "a0" else OSError(errno.ENOSPC, "No space left", "a.png")
    raise AssertionError("never")


def small_study() -> Study:
    """Two arms in two contexts: pilots on two rates, fresh runs on the one that is chosen, and an arm again."""
    looks = (Look(iteration=10, samples=100),)
    arms = {"T": ("a0", "a3"), "B": ("a3",)}
    pilots = Block(
        name="A",
        task="digits",
        arms=arms,
        axes={"g_lr d_lr": (0.001, 0.01)},
        chosen_from=None,
        seeds={"pilot": (101, 102)},
        iterations=10,
        batch_size=32,
        looks=looks,
    )
    chosen = replace(pilots, name="F", axes={}, chosen_from="A", seeds={"fresh": (1, 2, 3)}, aa={"B": "a3"}, aa_seeds=(21, 22))
    return Study(
        name="small",
        title="small",
        settings={"hidden_dim": 16, "beta1": 0.25},
        contexts={"T": {"loss": "hinge", "beta1": 0.5}, "B": {"loss": "relativistic"}},
        arms={"a0": Arm(label="none", settings={"g_norm": "none", "d_norm": "none"}), "a3": Arm(label="both", settings={})},
        blocks=(pilots, chosen),
        claims=(),
        sha256="0" * 64,
        source="title: small\n",
    )


def asleep(run: Run) -> Result:
    """Leaves the process's number in a file, and never ends."""
    Path("writing").write_text(str(os.getpid()))
    Path("writing").rename("worker")
    time.sleep(1_000)
    return at_once(run)
