"""What changes as a run goes on: learning rates, instance noise and the weight of the moving average."""

import math
from typing import Generic, NamedTuple, TypeVar

from bngan.settings import Settings

Value = TypeVar("Value")


class Schedule(NamedTuple, Generic[Value]):
    """What holds in one iteration, as numbers or, where they must be read anew at each replay, as scalar tensors."""

    d_lr: Value
    g_lr: Value
    instance_noise: Value  # standard deviation
    ema_weight: Value  # of the present weights in their moving average


def schedule_at(settings: Settings, iteration: int, total: float) -> Schedule[float]:
    """Return what holds in the iteration after `iteration` others of `total`, which is infinite in a run without an end."""
    done = min(1.0, iteration / total)
    scale = min(1.0, (1 - done) / (1 - settings.lr_decay_start)) if settings.lr_decay_start < 1 else 1.0
    return Schedule(
        d_lr=settings.d_lr * scale,
        g_lr=settings.g_lr * scale,
        instance_noise=settings.instance_noise * max(0.0, 1 - done / settings.instance_noise_end),
        # So the average is of the iterations so far, and never of what it began with (Kingma & Ba 2015, section 3).
        ema_weight=(1 - settings.ema_decay) / (1 - settings.ema_decay ** (iteration + 1)),
    )


def jumps(settings: Settings, iteration: int, before: float, now: float) -> str:
    """Say what changes at once after `iteration` iterations where a run of `before` becomes one of `now`; else nothing."""
    values = zip(Schedule._fields, *(schedule_at(settings, iteration, total) for total in (before, now)), strict=True)
    return ", ".join(f"{name} from {old:.3g} to {new:.3g}" for name, old, new in values if not math.isclose(old, new))
