"""What changes as a run goes on: learning rates, instance noise and the weight of the moving average."""

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class Schedule(NamedTuple, Generic[Value]):
    """What holds in one iteration, as numbers or, where they must be read anew at each replay, as scalar tensors."""

    d_lr: Value
    g_lr: Value
    instance_noise: Value  # standard deviation
    ema_weight: Value  # of the present weights in their moving average


@dataclass(frozen=True)
class Schedules:
    """Functions of the iteration alone.

    Attributes:
        d_lr: D's learning rate at the start.
        g_lr: G's learning rate at the start.
        lr_decay_start: fraction of the run after which both fall linearly to 0; 1 keeps them constant.
        instance_noise: standard deviation of the noise on D's images at the start.
        instance_noise_end: fraction of the run over which it falls linearly to 0.
        ema_decay: decay of the moving average.
    """

    d_lr: float
    g_lr: float
    lr_decay_start: float
    instance_noise: float
    instance_noise_end: float
    ema_decay: float

    def at(self, iteration: int, total: float) -> Schedule[float]:
        """Return what holds in the iteration after `iteration` others of `total`, which is infinite in a run without an end."""
        done = min(1.0, iteration / total)
        scale = min(1.0, (1 - done) / (1 - self.lr_decay_start)) if self.lr_decay_start < 1 else 1.0
        noise = self.instance_noise * max(0.0, 1 - done / self.instance_noise_end)
        # So the average is of the iterations so far, and never of what it began with (Kingma & Ba 2015, section 3).
        weight = (1 - self.ema_decay) / (1 - self.ema_decay ** (iteration + 1))
        return Schedule(d_lr=self.d_lr * scale, g_lr=self.g_lr * scale, instance_noise=noise, ema_weight=weight)
