"""The Trainer counts steps, a person counts alternations: the one's settings in terms of the other's."""

from collections.abc import Callable
from itertools import count
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")
ALTERNATION_HOOKS = ("on_alternation_start", "on_alternation_end")


def largest_group(trainer: Trainer, batches: int, most: int, done: int = 0) -> int:
    """Return how many alternations, `most` at the most, a step can have where nothing is to happen within a step.

    It is one where something counts steps that is not known to count alternations: a callback, or a validation that is due
    by the number of steps since the run began, which a later part of the run must count alike. A callback that does something
    at the end of a step may say every how many alternations in `ends_step_every`. Where a checkpoint has `done` alternations of
    an epoch, a step ends there as well.
    """
    callbacks = cast(Any, trainer).callbacks
    if trainer.check_val_every_n_epoch is None or any(map(_counts_steps, callbacks)):
        return 1
    limit = trainer.limit_train_batches
    epoch = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    intervals = [every for callback in callbacks if (every := getattr(callback, "ends_step_every", None))]
    for group in range(min(most, epoch), 1, -1):
        if done % group and done != epoch:
            continue
        if intervals and any(number % group for number in (*intervals, epoch)):
            continue
        if not _keeps_shares(trainer, batches, epoch, group):
            continue
        try:
            settings_in_steps(trainer, batches, group)
        except ValueError:
            continue
        return group
    return 1


def count_in_steps(fit_loop: dict[str, Any], group: int) -> None:
    """Let a checkpoint's loop, which counts steps, stand at the same alternation of its epoch by steps of `group`.

    A step of the checkpoint and one of `group` must both end there.
    """
    place = fit_loop["state_dict"]["combined_loader"][0]
    before, now = (-(-place["batches"] // each) for each in (place.get("group", 1), group))
    progress = fit_loop["epoch_loop.batch_progress"]
    if progress["current"]["ready"] == before:  # else the epoch has ended, and the next one begins with steps of its own
        for name in progress["current"]:
            progress["current"][name] += now - before
    place["group"] = group


def _keeps_shares(trainer: Trainer, batches: int, epoch: int, group: int) -> bool:
    """Tell whether shares of an epoch come to as many alternations as they would by single ones."""
    limit, interval = trainer.limit_train_batches, getattr(trainer, "val_check_interval", None)
    if isinstance(limit, float) and int(-(-batches // group) * limit) * group != epoch and limit < 1:
        return False
    if not isinstance(interval, float) or interval >= 1:
        return True
    steps, due = -(-epoch // group), int(epoch * interval)
    every = int(steps * interval)
    return every * group == due > 0 and (epoch % group == 0 or steps % every > 0)


def _counts_steps(callback: Callback) -> bool:
    known = type(callback).__module__.startswith("bngan.") or any(hasattr(callback, hook) for hook in ALTERNATION_HOOKS)
    return not known and any(is_overridden(hook, callback, parent=Callback) for hook in BATCH_HOOKS)


def settings_in_steps(trainer: Trainer, batches: int, group: int) -> dict[str, int]:
    """Return the Trainer's settings that count batches, as numbers of steps.

    A step is `group` alternations, each on a batch, but for an epoch's last step, which has those that are left. Shares of an
    epoch stay as they are; the Trainer rounds them down to whole steps. max_steps counts alternations for the Trainer as well,
    so it is only checked: a run ends where a step does.

    Args:
        trainer: with its settings as a person gave them, in alternations.
        batches: batches of an epoch.
        group: alternations of a step.

    Raises:
        ValueError: if a number cannot be said in steps, naming the nearest that can.
    """
    limit = trainer.limit_train_batches
    steps = -(-batches // group)
    epoch = min(limit, batches) if isinstance(limit, int) else min(int(steps * limit) * group, batches)
    if epoch == 0:
        return {}  # the loader and the Trainer have their own words for too little
    steps = -(-epoch // group)

    def check(setting: str, number: int, fits: Callable[[int], bool]) -> None:
        if fits(number):
            return
        below = next((other for other in range(number - 1, 0, -1) if fits(other)), None)
        above = next(other for other in count(number + 1) if fits(other))
        raise ValueError(
            f"--trainer.{setting} {number} does not fit the steps of --data.alternations_per_step {group}: give "
            f"{above if below is None else f'{below} or {above}'}"
        )

    in_steps: dict[str, int] = {}
    if isinstance(limit, int):
        check("limit_train_batches", limit, lambda number: number % group == 0 or number >= batches)
        in_steps["limit_train_batches"] = steps
    interval = getattr(trainer, "val_check_interval", None)  # none where the interval is a time
    if isinstance(interval, int) and trainer.limit_val_batches:
        if trainer.check_val_every_n_epoch is None:
            # Counted through all epochs, whose steps are alike, or else only whole epochs are.
            unit, steps_of_unit = (group, 1) if epoch % group == 0 else (epoch, steps)
            check("val_check_interval", interval, lambda number: number % unit == 0)
            in_steps["val_check_interval"] = interval // unit * steps_of_unit
        elif interval > epoch:
            raise ValueError(
                f"--trainer.val_check_interval {interval} is more than the {epoch} alternations of an epoch; lower it, or give "
                "--trainer.check_val_every_n_epoch null to count through all epochs"
            )
        else:
            # Where the last step is shorter, the number of all steps must not be a multiple, since that of alternations is not.
            even = epoch % group == 0
            check(
                "val_check_interval",
                interval,
                lambda number: number == epoch or (number % group == 0 and (even or steps % (number // group) > 0)),
            )
            in_steps["val_check_interval"] = -(-interval // group)
    max_epochs = cast(Any, trainer).max_epochs
    if trainer.max_steps != -1 and (max_epochs in (None, -1) or trainer.max_steps < max_epochs * epoch):
        check("max_steps", trainer.max_steps, lambda number: number % epoch % group == 0)
    return in_steps
