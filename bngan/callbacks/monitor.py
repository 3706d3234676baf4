"""Which metrics does validation measure? By one of them the best checkpoint is chosen, and a run may stop early."""

from typing import Protocol, runtime_checkable

from lightning.pytorch import Trainer

from bngan.errors import UsageError
from bngan.gan import GAN

# What samples are judged by, where it is measured.
QUALITY = ("val/fid", "val/distance")
KNOWN = ("bngan.", "lightning.")  # callbacks whose metrics are known


def candidates(monitor: str) -> tuple[str, ...]:
    """Return the metrics of which the first that is there chooses the best checkpoint, given checkpoint.monitor."""
    return QUALITY if monitor == "auto" else (monitor,)


@runtime_checkable
class Measurer(Protocol):
    """A callback that measures something in validation."""

    def measured(self, trainer: Trainer, gan: GAN) -> list[str]:
        """Return the names of what changes from one validation to the next, once training is about to start."""
        ...


def measured(trainer: Trainer, gan: GAN) -> list[str]:
    """Return the names of all that is measured of the run, as far as callbacks are bngan's own; none without validation."""
    if not trainer.enable_validation:
        return []
    own = ["val/d_loss", *(f"val/{reading}" for reading in gan.loss.readings)]
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  # set from outside
    return own + [name for callback in callbacks if isinstance(callback, Measurer) for name in callback.measured(trainer, gan)]


def check_monitor(setting: str, name: str | None, trainer: Trainer, gan: GAN) -> None:
    """Refuse a metric that will not be there.

    Args:
        setting: what named it.
        name: of the metric.
        trainer: with all callbacks set up. One of somebody's own may log anything, so that nothing is refused beside it.
        gan: what is trained.

    Raises:
        UsageError: naming the metrics that there are.
    """
    names = measured(trainer, gan)
    callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]  # set from outside
    if name in names or not all(type(callback).__module__.startswith(KNOWN) for callback in callbacks):
        return
    choice = f"choose from {', '.join(names)}" if names else "there is no validation, see --trainer.limit_val_batches"
    raise UsageError(f"{setting} {name}: validation does not measure it; {choice}")
