"""What several callbacks ask of a run: where it writes, and how large its batches are."""

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer

from bngan.gan import GAN


def run_folder(trainer: Trainer) -> Path | None:
    """Return the run's folder, or None in a fast_dev_run, which writes nothing.

    All ranks must ask, in `setup`: asking for the Trainer's log_dir is a message between them.
    """
    if cast(Any, trainer).fast_dev_run:
        return None
    assert trainer.log_dir is not None
    return Path(trainer.log_dir)


def batch_per_device(trainer: Trainer, gan: GAN) -> int:
    """Return how many images a network is given at a time on one device."""
    batch_size = getattr(cast(Any, trainer).datamodule, "batch_size", 128)
    return max(2, batch_size // (trainer.world_size * gan.accumulate))
