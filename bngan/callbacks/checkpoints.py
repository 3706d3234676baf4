"""Which checkpoints a run keeps, and how they are written."""

import io
import math
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from bngan import distributed
from bngan.callbacks.run import run_folder
from bngan.data.steps import count_in_steps
from bngan.gan import GAN, NonFiniteLoss

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LEAST_BETWEEN_SAVES = 50  # times what one takes
# Ranks ask one another whether to stop, and reading the answer makes a GPU wait, so there they ask more seldom.
ASK_EVERY_ON_GPU = 10


class Stopped(SystemExit):
    """A run that was asked to stop has come to a place where it can."""


class Checkpoints(Checkpoint):
    """Keeps `checkpoints/last.ckpt`, renewed every epoch, and `checkpoints/best.ckpt`, the one of the best metric.

    Where epochs are short, last.ckpt is renewed at the end of so few of them that it takes no more than a fiftieth of the time,
    and at the end of the run.

    SIGINT (Ctrl-C) or SIGTERM to any rank makes all of them stop at the same iteration, with a last.ckpt of it, from which
    the run goes on as if it had not stopped; a second one stops that process at once.

    All this happens at the end of the Trainer's steps. Where a step has several alternations (alternations_per_step), a
    checkpoint is made at the end of that in which it became due, and its name tells the iteration that it is of.

    Args:
        monitor: metric of validation by which the best is chosen.
        mode: min if smaller is better, max if larger is.
        every_n_iterations: if set, last.ckpt is renewed that often as well.
        every_minutes: if set, last.ckpt is renewed that often as well.
        keep_all: whether to also keep those of every_n_iterations as checkpoints/iteration-000500.ckpt.
    """

    def __init__(
        self,
        monitor: str = "val/fid",
        mode: str = "min",
        every_n_iterations: int | None = None,
        every_minutes: float | None = None,
        keep_all: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"checkpoint.mode must be min or max, got {mode!r}")
        if every_n_iterations is not None and every_n_iterations < 1:
            raise ValueError(f"checkpoint.every_n_iterations must be at least 1, got {every_n_iterations}")
        if every_minutes is not None and not 0 < every_minutes < math.inf:
            raise ValueError(f"checkpoint.every_minutes must be above 0, got {every_minutes}")
        if keep_all and every_n_iterations is None:
            raise ValueError("checkpoint.keep_all keeps what checkpoint.every_n_iterations makes: give both")
        self.monitor, self.mode = monitor, mode
        self.every_n_iterations, self.every_minutes, self.keep_all = every_n_iterations, every_minutes, keep_all
        self.best = math.inf if mode == "min" else -math.inf
        self.best_iteration = -1
        self._missed = False
        self._asked = 0
        self._saved_at, self._saving_took = time.monotonic(), 0.0  # seconds
        self._validation_due = self._saved_before_validation = False
        self._started = False
        self._step_began = -1  # iteration
        self._handlers: dict[int, Any] = {}

    @property
    def ends_step_every(self) -> int | None:
        """Every how many iterations a step of the Trainer should end, unless it was said how long steps are."""
        return self.every_n_iterations

    def setup(self, trainer: Trainer, pl_module: GAN, stage: str) -> None:
        self._run_folder = run_folder(trainer)
        # Lightning's own handler sends a message from within, and its question at every batch makes a GPU wait.
        inner = cast(Any, trainer)
        inner._signal_connector.register_signal_handlers = _nothing
        inner.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing
        # Where max_steps is set, it would end the last epoch of a checkpoint a second time.
        inner.fit_loop._iteration_based_training = _nothing
        inner.fit_loop.__class__ = _UnvalidatedFitLoop
        # Lightning does not tell callbacks of an exception in a process that it has spawned.
        inner._run_stage = partial(self._run_stage, trainer, pl_module)
        self._started = _was_started(trainer)
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        self._saved_at = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: GAN) -> None:
        self._give_back_signals()

    def on_exception(self, trainer: Trainer, pl_module: GAN, exception: BaseException) -> None:
        self._give_back_signals()

    def _run_stage(self, trainer: Trainer, gan: GAN) -> Any:
        """Train, and save where it stops if it is stopped: here all that it had set up on its way is undone."""
        try:
            return Trainer._run_stage(trainer)
        except NonFiniteLoss:
            if self._started:  # all ranks have come here, and the first one tells
                raise Stopped(0) from None
            raise
        except Stopped:
            self._save(trainer, "last")
            if trainer.is_global_zero:
                where = "" if self._run_folder is None else f"; go on with --ckpt_path {self._run_folder}/checkpoints/last.ckpt"
                print(f"bngan: stopped at iteration {gan.iterations_done}{where}", file=sys.stderr, flush=True)
            trainer.strategy.barrier()  # whoever is gone first may have the others killed
            raise

    def on_train_batch_start(self, trainer: Trainer, pl_module: GAN, batch: object, batch_idx: int) -> None:
        self._step_began = pl_module.iterations_done

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        loop = cast(Any, trainer).fit_loop
        self._validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        asked = late = False
        if pl_module.device.type == "cpu" or self._passed(ASK_EVERY_ON_GPU, pl_module):
            patience = math.inf if self.every_minutes is None else 60 * self.every_minutes
            asked, late = self._everyones_wishes(trainer, pl_module, patience)
        # At the end of an epoch the place to stop is on_train_epoch_end, and at the end of the run there is no need to.
        if asked and (self._validation_due or not loop.epoch_loop._is_training_done):
            self._stop(trainer)
        due = self.every_n_iterations is not None and self._passed(self.every_n_iterations, pl_module)
        if due and self.keep_all:
            self._save(trainer, f"iteration-{pl_module.iterations_done:06d}")
        if due or late:
            self._save(trainer, "last")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: GAN, outputs: object, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.heed(trainer, pl_module)

    def heed(self, trainer: Trainer, gan: GAN) -> None:
        """Stop the run within a validation if any rank was asked to; all ranks must come here equally often.

        The checkpoint is that of the iteration before the validation, which is then the first thing that the run does.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._everyones_wishes(trainer, gan)[0]:
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validation_due = False
        self._keep_best(trainer, pl_module)
        if self._saved_before_validation:  # who goes on from it would validate, and log that, a second time
            self._save(trainer, "last")

    def _keep_best(self, trainer: Trainer, gan: GAN) -> None:
        if self.monitor not in trainer.callback_metrics:
            if not self._missed and trainer.is_global_zero:
                print(f"No best.ckpt is kept, because validation does not measure {self.monitor}.", flush=True)
            self._missed = True
            return
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best if self.mode == "min" else value > self.best:
            self.best, self.best_iteration = value, gan.iterations_done
            self._save(trainer, "best")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: GAN) -> None:
        asked, late = self._everyones_wishes(trainer, pl_module, LEAST_BETWEEN_SAVES * self._saving_took)
        done = cast(Any, trainer).fit_loop.done
        if asked and not done:
            self._stop(trainer)
        if late or done:
            self._save(trainer, "last")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: GAN, checkpoint: dict[str, Any]) -> None:
        if self._validation_due:
            _go_back_before_validation(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: GAN, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":  # whoever measures needs no more than weights
            return
        data = cast(Any, trainer).datamodule
        if getattr(data, "resumed", None) and data.alternations_per_step is None:
            count_in_steps(checkpoint["loops"]["fit_loop"], data.group)
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
        self._validation_due = self._saved_before_validation = batches["started"] > batches["processed"]

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

    def _everyones_wishes(self, trainer: Trainer, gan: GAN, patience: float = math.inf) -> tuple[bool, bool]:
        """Return, alike on all ranks, whether any was asked to stop, and whether last.ckpt is older than `patience` seconds."""
        late = time.monotonic() - self._saved_at > patience
        if trainer.world_size > 1:
            wishes = torch.tensor([self._asked, late and trainer.is_global_zero], dtype=torch.long, device=gan.device)
            asked, late = distributed.gather(wishes).amax(dim=0).tolist()
            if asked == 0:  # a signal that has come meanwhile must not be forgotten
                return False, bool(late)
            self._asked = asked
        return self._asked > 0, bool(late)

    def _passed(self, interval: int, gan: GAN) -> bool:
        """Whether the last step came to a multiple of so many iterations."""
        return gan.iterations_done // interval > self._step_began // interval

    def _stop(self, trainer: Trainer) -> NoReturn:
        # A process that this run's own first one has started must not end as if it had crashed, or that one is killed.
        raise Stopped(0 if self._started else 128 + self._asked)

    def _save(self, trainer: Trainer, name: str) -> None:
        if self._run_folder is None:
            return
        began = time.monotonic()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # Who goes on from this checkpoint must find all that was logged before it.
                logger.experiment.flush()
        distributed.average_buffers(trainer.lightning_module)
        trainer.save_checkpoint(self._run_folder / "checkpoints" / f"{name}.ckpt")
        if name == "last":
            self._saved_before_validation = self._validation_due
            self._saved_at = time.monotonic()
            self._saving_took = self._saved_at - began


def _was_started(trainer: Trainer) -> bool:
    """Tell whether this process was started by the first one of its machine, and not by torchrun, SLURM or a person."""
    if trainer.world_size == 1:
        return False
    launcher = trainer.strategy.launcher
    starts = isinstance(launcher, _SubprocessScriptLauncher) and len(launcher.procs) > 0
    starters = distributed.gather(torch.tensor(starts, dtype=torch.uint8, device=trainer.strategy.root_device))
    return trainer.local_rank != 0 and bool(starters[trainer.global_rank - trainer.local_rank])


def _go_back_before_validation(fit_loop: dict[str, Any]) -> None:
    """Let the saved loop stand where its last batch is done and the first batch of validation has just begun.

    Left to itself, the Trainer takes a validation for done that was due when it was stopped.
    """
    for count in ("total", "current"):
        batches = fit_loop["epoch_loop.batch_progress"][count]
        batches["completed"] = batches["processed"]
        fit_loop["epoch_loop.val_loop.batch_progress"][count] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    fit_loop["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False


class _UnvalidatedFitLoop(_FitLoop):
    """The Trainer's loop, which is not done while a checkpoint's last validation is, though its last iteration may be."""

    @property
    def done(self) -> bool:
        batches = cast(Any, self.epoch_loop.val_loop.batch_progress.current)
        return super().done and not (self.epoch_loop.restarting and batches.started > batches.processed)


def _nothing() -> None:
    """Stand in for what Lightning would do or answer."""


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
        for left_over in target.parent.glob(f".{target.name}.*"):  # by a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
        content = io.BytesIO()  # torch does not tell a full disk from a defect when it writes there itself
        torch.save(checkpoint, content)
        try:
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{target} could not be written ({error.strerror}); the checkpoint before it is unharmed") from error
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
