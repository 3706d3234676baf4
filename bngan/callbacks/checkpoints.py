"""Which checkpoints a run keeps."""

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from bngan import distributed
from bngan.callbacks.run import run_folder
from bngan.gan import GAN


class Checkpoints(Checkpoint):
    """Keeps `checkpoints/last.ckpt`, renewed every epoch, and `checkpoints/best.ckpt`, the one of the best metric.

    Args:
        monitor: metric of validation by which the best is chosen.
        mode: min if smaller is better, max if larger is.
        every_n_iterations: if set, last.ckpt is renewed that often as well.
        keep_all: whether to also keep each of those as checkpoints/iteration-000500.ckpt.
    """

    def __init__(
        self, monitor: str = "val/fid", mode: str = "min", every_n_iterations: int | None = None, keep_all: bool = False
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoint.mode must be min or max, got {mode!r}")
        if every_n_iterations is not None and every_n_iterations < 1:
            raise ValueError(f"checkpoint.every_n_iterations must be at least 1, got {every_n_iterations}")
        if keep_all and every_n_iterations is None:
            raise ValueError("checkpoint.keep_all keeps what checkpoint.every_n_iterations makes: give both")
        self.monitor, self.mode = monitor, mode
        self.every_n_iterations, self.keep_all = every_n_iterations, keep_all
        self.best = math.inf if mode == "min" else -math.inf
        self.best_iteration = -1
        self._missed = False

    def setup(self, trainer: Trainer, pl_module: GAN, stage: str) -> None:
        self._run_folder = run_folder(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        if self.every_n_iterations and pl_module.iterations_done % self.every_n_iterations == 0:
            if self.keep_all:
                self._save(trainer, f"iteration-{pl_module.iterations_done:06d}")
            self._save(trainer, "last")

    def on_validation_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            if not self._missed and trainer.is_global_zero:
                print(f"No best.ckpt is kept, because validation does not measure {self.monitor}.", flush=True)
            self._missed = True
            return
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best if self.mode == "min" else value > self.best:
            self.best, self.best_iteration = value, pl_module.iterations_done
            self._save(trainer, "best")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: GAN) -> None:
        self._save(trainer, "last")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_iteration": self.best_iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_iteration = state_dict["best"], state_dict["best_iteration"]

    def _save(self, trainer: Trainer, name: str) -> None:
        if self._run_folder is not None:
            distributed.average_buffers(trainer.lightning_module)
            trainer.save_checkpoint(self._run_folder / "checkpoints" / f"{name}.ckpt")
