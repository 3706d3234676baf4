"""How far a run is: a bar on a terminal, a line now and then elsewhere."""

import math
import sys
import time

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from bngan.gan import GAN

REFRESH_SECONDS = 0.5
LINE_SECONDS = 15.0


class RunProgress(ProgressBar):
    """Shows iterations, both losses, images per second, the time left and the last metrics of validation.

    One bar spans the whole run. Images per second are those of training alone: validation stops their clock. Losses are read
    when something is shown, not at each iteration, which would slow it down.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None
        self._enabled = True
        self._best = math.inf

    def state_dict(self) -> dict[str, float]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._best = state_dict["best"]

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, gan: GAN) -> None:
        self._enabled = self._enabled and trainer.is_global_zero
        self._start = self._shown = self._mark = self._iteration_ended = time.monotonic()
        self._validating = self._rate = 0.0  # seconds, images per second
        self._images = self._images_at_mark = 0
        self._first_iteration = trainer.global_step
        if self._enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("", total=None, completed=self._first_iteration, text="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, gan: GAN, outputs: object, batch: Tensor | list[Tensor], batch_idx: int
    ) -> None:
        images = batch if isinstance(batch, Tensor) else batch[0]
        self._images += len(images) * trainer.world_size
        now = self._iteration_ended = time.monotonic()
        if self._enabled and now - self._shown >= (REFRESH_SECONDS if self._bar else LINE_SECONDS):
            self._show(trainer, gan, now)

    def on_validation_end(self, trainer: Trainer, gan: GAN) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        now = time.monotonic()
        took = now - self._iteration_ended  # with what other callbacks have done at validation's start
        self._validating += took
        self._mark += took
        if self._enabled:
            self._show(trainer, gan, now)

    def on_validation_epoch_end(self, trainer: Trainer, gan: GAN) -> None:
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            for tag, value in sorted(trainer.callback_metrics.items()):
                if tag.startswith(("val/d_", "bn/")):
                    print(f"{tag:<32} {float(value):.4f}", flush=True)

    def on_train_end(self, trainer: Trainer, gan: GAN) -> None:
        if self._enabled and self._images > self._images_at_mark:
            self._show(trainer, gan, time.monotonic())
        self._close()
        if self._enabled:
            seconds = time.monotonic() - self._start
            validation = f", {self._validating:.0f} s of them validation" if self._validating else ""
            rate = self._images / max(seconds - self._validating, 1e-9)
            done = trainer.global_step - self._first_iteration
            print(f"{done} iterations in {seconds:.0f} s{validation}; {rate:,.0f} images/s in training", flush=True)

    def on_exception(self, trainer: Trainer, gan: GAN, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, trainer: Trainer, gan: GAN, now: float) -> None:
        self._shown, done = now, trainer.global_step
        total = None if math.isinf(gan.total_iterations) else int(gan.total_iterations)
        self._measure_rate(now)
        seen = gan.observed  # reading it is a CPU-GPU sync point
        losses = [] if seen is None else [f"D {float(seen.d_loss):.3f}", f"G {float(seen.g_loss):.3f}"]
        text = "  ".join([*losses, f"{self._rate:,.0f} images/s", *self._metrics(trainer)])
        if self._bar is not None:
            self._bar.update(self._task, description=f"{done}/{total or '?'}", completed=done, total=total, text=text)
            return
        if total is not None and done > self._first_iteration:
            each = (now - self._start) / (done - self._first_iteration)  # seconds
            text += f"  {each * (total - done):.0f} s left"
        print(f"iteration {done}/{total or '?'}  {text}", flush=True)

    def _measure_rate(self, now: float) -> None:
        """Work out how many images a second were trained on since the last time, if there were any."""
        if self._images > self._images_at_mark:
            self._rate = (self._images - self._images_at_mark) / max(now - self._mark, 1e-9)
            self._mark, self._images_at_mark = now, self._images

    def _metrics(self, trainer: Trainer) -> list[str]:
        """Return what the last validation measured."""
        values = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
        parts = []
        for name, title in (("fid", "FID"), ("distance", "distance")):
            if (value := values.get(f"val/{name}")) is None:
                continue
            self._best = min(self._best, value)
            parts.append(f"{title} {value:#.3g} (best {self._best:#.3g}, floor {values[f'floor/{name}']:.2g})")
            parts.append(f"coverage {values['val/coverage']:.2f} (floor {values['floor/coverage']:.2f})")
        if "val/modes_covered" in values:
            parts.append(f"modes {values['val/modes_covered']:.0f}")
        if "val/class_precision" in values:
            parts.append(f"class precision {values['val/class_precision']:.3f}")
        return parts
