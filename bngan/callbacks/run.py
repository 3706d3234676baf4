"""Where a run's callbacks write."""

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path | None:
    """Return the run's folder, or None in a fast_dev_run, which writes nothing.

    All ranks must ask, in `setup`: asking for the Trainer's log_dir is a message between them.
    """
    if cast(Any, trainer).fast_dev_run:
        return None
    assert trainer.log_dir is not None
    return Path(trainer.log_dir)
