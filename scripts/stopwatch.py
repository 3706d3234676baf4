"""A callback that times a run from inside and prints what it saw as one line of JSON; see scripts/benchmark.py."""

import json
import time
from collections.abc import Sequence
from typing import Any, cast

from benchmark import peak_mb, wait_for
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor

FETCH = "[_TrainingEpochLoop].train_dataloader_next"


class Stopwatch(Callback):
    """Times what comes after the warm-up: to the end of training, and to the last alternation alone.

    The line has images_per_s, steady_images_per_s, alternations, first_alternation (the clock's time at its end), peak_mb,
    validations as [clock's time, FID, floor], and waiting, the share of the time in which the loop waited for data, if
    `--trainer.profiler simple` measures it.

    Args:
        warm_up: alternations that are not timed.
        stop_at_floors: FID, as a multiple of its floor, at which to end the run; 0 never does.
    """

    def __init__(self, warm_up: int = 100, stop_at_floors: float = 0.0) -> None:
        self.warm_up, self.stop_at_floors = warm_up, stop_at_floors
        self.done = self.done_before = self.warm_up_steps = 0
        self.images_each = 0.0  # of an alternation, on all devices
        self.first = self.start = self.last = self.end = 0.0
        self.validations: list[tuple[float, float, float]] = []

    def on_alternation_end(self, trainer: Trainer, gan: LightningModule) -> None:
        self.done += 1
        if self.done == 1:
            wait_for(gan.device)
            self.first = time.time()
        if self.done == self.warm_up:
            wait_for(gan.device)
            self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Tensor | Sequence[Tensor], batch_idx: int
    ) -> None:
        if self.done == self.done_before:  # a module that tells of no alternations has one in each step
            self.on_alternation_end(trainer, pl_module)
        self.last = time.perf_counter()
        images = len(batch if isinstance(batch, Tensor) else batch[0]) * trainer.world_size
        self.images_each = images / (self.done - self.done_before)
        self.done_before = self.done
        self.warm_up_steps += self.done <= self.warm_up

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "val/fid" in trainer.callback_metrics:
            fid, floor = (float(trainer.callback_metrics[name]) for name in ("val/fid", "floor/fid"))
            self.validations.append((time.time(), fid, floor))
            trainer.should_stop |= fid <= self.stop_at_floors * floor

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wait_for(pl_module.device)
        self.end = time.perf_counter()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero or not self.end:
            return
        seen: dict[str, Any] = {
            "alternations": self.done,
            "first_alternation": self.first,
            "validations": self.validations,
            "peak_mb": peak_mb(),
        }
        if self.done > self.warm_up:
            images = (self.done - self.warm_up) * self.images_each
            seen["images_per_s"] = images / (self.end - self.start)
            seen["steady_images_per_s"] = images / (self.last - self.start)
            profiler = cast(Any, trainer).profiler
            if isinstance(profiler, SimpleProfiler):
                waits = dict(profiler.recorded_durations)[FETCH]
                seen["waiting"] = sum(waits[self.warm_up_steps :]) / (self.last - self.start)
        print(json.dumps(seen), flush=True)
