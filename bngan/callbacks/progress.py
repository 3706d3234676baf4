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

    One bar spans the whole run. Losses are read when something is shown, not at each iteration, which would slow it down.
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

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        self._enabled = self._enabled and trainer.is_global_zero
        total = pl_module.total_iterations
        self._total = None if math.isinf(total) else int(total)
        self._start = self._shown = self._mark = time.monotonic()
        self._images = self._images_at_mark = 0
        self._first_iteration = pl_module.iterations_done
        if self._enabled and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._first_iteration, text="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GAN, outputs: object, batch: Tensor | list[Tensor], batch_idx: int
    ) -> None:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        self._images += len(images) * trainer.world_size
        now = time.monotonic()
        if self._enabled and now - self._shown >= (REFRESH_SECONDS if self._bar else LINE_SECONDS):
            self._shown = now
            self._show(trainer, pl_module, now)

    def on_validation_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if self._enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._show(trainer, pl_module, time.monotonic())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            for tag, value in sorted(trainer.callback_metrics.items()):
                if tag.startswith(("val/d_", "bn/")):
                    print(f"{tag:<32} {float(value):.4f}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if self._enabled and self._images > self._images_at_mark:
            self._show(trainer, pl_module, time.monotonic())
        self._close()
        if self._enabled:
            seconds = time.monotonic() - self._start
            done = pl_module.iterations_done - self._first_iteration
            print(f"{done} iterations in {seconds:.0f} s, {self._images / seconds:,.0f} images/s", flush=True)

    def on_exception(self, trainer: Trainer, pl_module: GAN, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, trainer: Trainer, gan: GAN, now: float) -> None:
        rate = (self._images - self._images_at_mark) / max(now - self._mark, 1e-9)
        self._mark, self._images_at_mark = now, self._images
        parts = [f"D {float(gan.d_loss):.3f}", f"G {float(gan.g_loss):.3f}", f"{rate:,.0f} images/s"]
        metrics = {tag: float(value) for tag, value in trainer.callback_metrics.items()}
        if "val/fid" in metrics:
            self._best = min(self._best, metrics["val/fid"])
            parts.append(f"FID {metrics['val/fid']:#.3g} (best {self._best:#.3g}, floor {metrics['floor/fid']:.2g})")
        if "val/modes" in metrics:
            parts.append(f"modes {metrics['val/modes']:.0f}")
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=gan.iterations_done, text=text)
            return
        done = gan.iterations_done - self._first_iteration
        left = ""
        if self._total is not None and done:
            seconds = (now - self._start) / done * (self._total - gan.iterations_done)
            left = f"  {seconds:.0f} s left"
        print(f"iteration {gan.iterations_done}/{self._total or '?'}  {text}{left}", flush=True)
