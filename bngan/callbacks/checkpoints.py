"""Which checkpoints a run keeps, and how they are written."""

import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from bngan import distributed
from bngan.callbacks.run import run_folder
from bngan.gan import GAN

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Ranks ask one another whether to stop that often, since each question is a message.
ASK_EVERY = 10


class Checkpoints(Checkpoint):
    """Keeps `checkpoints/last.ckpt`, renewed every epoch, and `checkpoints/best.ckpt`, the one of the best metric.

    SIGINT (Ctrl-C) or SIGTERM to any rank makes all of them stop at the same iteration, with a last.ckpt of it; a second one
    stops that process at once.

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
        self._asked = 0
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: GAN, stage: str) -> None:
        self._run_folder = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def on_train_end(self, trainer: Trainer, pl_module: GAN) -> None:
        self._give_back_signals()

    def on_exception(self, trainer: Trainer, pl_module: GAN, exception: BaseException) -> None:
        self._give_back_signals()

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        if self._all_asked(trainer, pl_module):
            self._save(trainer, "last")
            if trainer.is_global_zero:
                where = "" if self._run_folder is None else f"; go on with --ckpt_path {self._run_folder}/checkpoints/last.ckpt"
                print(f"bngan: stopped at iteration {pl_module.iterations_done}{where}", file=sys.stderr, flush=True)
            # A process that the main one has started must not end as if it had crashed, or that one is killed.
            started = trainer.local_rank != 0 and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & os.environ.keys()
            raise SystemExit(0 if started else 128 + self._asked)
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

    def _ask(self, signum: int, _: object) -> None:
        self._asked = signum
        signal.signal(signum, signal.SIG_DFL)

    def _give_back_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _all_asked(self, trainer: Trainer, gan: GAN) -> bool:
        """Return whether any rank was asked to stop, the same on all ranks."""
        if trainer.world_size == 1:
            return self._asked > 0
        if gan.iterations_done % ASK_EVERY:
            return False
        asked = torch.tensor(self._asked, device=gan.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        self._asked = int(asked)
        return self._asked > 0

    def _save(self, trainer: Trainer, name: str) -> None:
        if self._run_folder is not None:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    # Who goes on from this checkpoint must find all that was logged before it.
                    logger.experiment.flush()
            distributed.average_buffers(trainer.lightning_module)
            trainer.save_checkpoint(self._run_folder / "checkpoints" / f"{name}.ckpt")


class WholeCheckpoints(TorchCheckpointIO):
    """Trainer plugin that writes checkpoints so that there is always a whole one, whatever stops the process.

    The file is written beside its target, forced to the disk, and only then put in its place. Lightning writes elsewhere and
    moves, which across file systems is a copy that can be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint.

        Raises:
            OSError: if there is no room or no right to; what was there before is then as it was.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            temporary.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise OSError(f"{target} could not be written ({reason}); the checkpoint before it is unharmed") from error
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
