"""Which checkpoints a run keeps, how they are written, and where a run stops when it is asked to."""

import io
import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from bngan import distributed
from bngan.callbacks.monitor import candidates, check_monitor
from bngan.checkpoint import upgrade
from bngan.errors import NonFiniteLoss, UsageError, check_at_least
from bngan.files import write_whole
from bngan.gan import GAN
from bngan.trainer import run_folder

# Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
LEAST_BETWEEN_SAVES = 50  # times what one takes
ASK_EVERY_ON_GPU = 10  # iterations; reading the ranks' answer is a CPU-GPU sync point


class Stopped(SystemExit):
    """A run that was asked to stop does so; `code` is the exit status of this process."""


class CheckpointSaver(Checkpoint):
    """Keeps `checkpoints/last.ckpt`, renewed every epoch, and `checkpoints/best.ckpt`, the one of the best metric.

    last.ckpt is renewed after every validation as well, and at the end of the run. Where epochs are short, it is renewed at the
    end of so few of them that it takes no more than a fiftieth of the time.

    In training SIGINT (Ctrl-C), SIGTERM or SIGHUP (the terminal is closed, but not under nohup) to any rank stops all of them
    after the same iteration, or within a validation, with a last.ckpt of that iteration, and the run goes on from it as if it
    had not stopped. A second one ends that process at once.

    Args:
        monitor: metric of validation by which the best is chosen; auto is val/fid, or val/distance where that is measured.
        mode: min if smaller is better, max if larger is.
        every_n_iterations: if set, last.ckpt is renewed that often as well.
        every_minutes: if set, last.ckpt is renewed that often as well.
        keep_all: whether to also keep those of every_n_iterations as checkpoints/iteration-000500.ckpt.

    Raises:
        UsageError: if a setting is out of range.
    """

    def __init__(
        self,
        monitor: str = "auto",
        mode: str = "min",
        every_n_iterations: int | None = None,
        every_minutes: float | None = None,
        keep_all: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise UsageError(f"checkpoint.mode must be min or max, got {mode!r}")
        check_at_least(1, "checkpoint.", every_n_iterations=every_n_iterations)
        if every_minutes is not None and not 0 < every_minutes < math.inf:
            raise UsageError(f"checkpoint.every_minutes must be above 0, got {every_minutes}")
        if keep_all and every_n_iterations is None:
            raise UsageError("checkpoint.keep_all keeps what checkpoint.every_n_iterations makes: give both")
        self.monitor, self.mode, self.keep_all = monitor, mode, keep_all
        self.every_n_iterations, self.every_minutes = every_n_iterations, every_minutes
        self._forget_best()
        self._best_of: str | None = None  # the metric that chose it
        self._missed = False
        self._epoch, self._validation_is_due = 0, False  # of the last iteration, and after it
        self._signal = 0
        self._handlers: dict[signal.Signals, Any] = {}
        self._saved_iteration, self._saved_at, self._saving_took = -1, time.monotonic(), 0.0  # last.ckpt's; seconds

    def setup(self, trainer: Trainer, pl_module: GAN, stage: str) -> None:
        self._folder = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        self._check_monitors(trainer, pl_module)
        self._saved_at, self._epoch = time.monotonic(), trainer.current_epoch
        # Lightning's own handlers, which these replace, send a message to the other ranks from within.
        if threading.current_thread() is threading.main_thread():
            heard = [signum for signum in SIGNALS if signum.name != "SIGHUP" or signal.getsignal(signum) != signal.SIG_IGN]
            self._handlers = {signum: signal.signal(signum, self._ask) for signum in heard}

    def on_train_end(self, trainer: Trainer, pl_module: GAN) -> None:
        self._give_back_signals()

    def on_exception(self, trainer: Trainer, pl_module: GAN, exception: BaseException) -> None:
        self._give_back_signals()
        if isinstance(exception, SIGTERMException):  # which came before training began, and has no status
            raise _stopped(trainer, signal.SIGTERM) from exception
        if isinstance(exception, NonFiniteLoss) and _was_launched_by_another(trainer):
            raise Stopped(0) from exception  # all ranks have come here, and the first one tells
        if isinstance(exception, Stopped):
            if self._saved_iteration != trainer.global_step:
                self._save(trainer, "last")
            self._tell_where_it_stopped(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        iteration = trainer.global_step
        self._epoch, self._validation_is_due = trainer.current_epoch, _validates_after(trainer, batch_idx)
        signum, late = 0, False
        if trainer.world_size == 1 or pl_module.device.type == "cpu" or iteration % ASK_EVERY_ON_GPU == 0:
            signum, late = self._agree(trainer, math.inf if self.every_minutes is None else 60 * self.every_minutes)
        due = self.every_n_iterations is not None and iteration % self.every_n_iterations == 0
        stops = signum > 0 and iteration < pl_module.total_iterations
        if due and self.keep_all:
            self._save(trainer, f"iteration-{iteration:06d}")
        if due or late or stops:
            self._save(trainer, "last")
        if stops:
            raise _stopped(trainer, signum)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: GAN, outputs: object, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.stop_if_asked(trainer)

    def stop_if_asked(self, trainer: Trainer) -> None:
        """Stop the run within a validation if any rank was asked to; all ranks must come here equally often.

        The checkpoint is that of the iteration before, and who goes on from it validates first. on_exception saves it, since G
        may have other statistics here.

        Raises:
            Stopped: if so.
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking and (signum := self._agree(trainer)[0]):
            raise _stopped(trainer, signum)

    def on_validation_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._validation_is_due = False
        self._keep_best(trainer)
        self._save(trainer, "last")  # who went on from the one before would validate, and log that, a second time

    def on_train_epoch_end(self, trainer: Trainer, pl_module: GAN) -> None:
        _, late = self._agree(trainer, LEAST_BETWEEN_SAVES * self._saving_took)
        if late or trainer.should_stop or trainer.global_step >= pl_module.total_iterations:
            self._save(trainer, "last")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: GAN, checkpoint: dict[str, Any]) -> None:
        if trainer.global_step > 0:
            fit_loop = checkpoint["loops"]["fit_loop"]
            _go_back_to_end_of_iteration(fit_loop, trainer.global_step, self._epoch, self._validation_is_due)

    def state_dict(self) -> dict[str, Any]:
        best = {"best": self.best, "best_iteration": self.best_iteration, "best_of": self._best_of}
        return {**best, "validation_is_due": self._validation_is_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["best"] is not None:
            self.best, self.best_iteration = state_dict["best"], state_dict["best_iteration"]
        self._best_of = state_dict.get("best_of")
        self._validation_is_due = state_dict.get("validation_is_due", False)  # which version 0.1 did not say

    def _check_monitors(self, trainer: Trainer, gan: GAN) -> None:
        """Refuse to wait for a metric that is not measured, here and in EarlyStopping."""
        if self.monitor != "auto":
            check_monitor("--checkpoint.monitor", self.monitor, trainer, gan)
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]  # set from outside
            if isinstance(callback, EarlyStopping) and callback.strict:
                check_monitor("--trainer.callbacks EarlyStopping: monitor", callback.monitor, trainer, gan)

    def _forget_best(self) -> None:
        self.best, self.best_iteration = math.inf if self.mode == "min" else -math.inf, -1

    def _keep_best(self, trainer: Trainer) -> None:
        choice = candidates(self.monitor)
        name = next((name for name in choice if name in trainer.callback_metrics), None)
        if name is None:
            if not self._missed:
                distributed.print0(f"No best.ckpt is kept, because validation does not measure {' or '.join(choice)}.")
            self._missed = True
            return
        if self._best_of not in (None, name):  # a run that goes on may be judged by another metric
            self._forget_best()
        self._best_of = name
        value = float(trainer.callback_metrics[name])
        if value < self.best if self.mode == "min" else value > self.best:
            self.best, self.best_iteration = value, trainer.global_step
            self._save(trainer, "best")

    def _save(self, trainer: Trainer, name: str) -> None:
        if self._folder is None:
            return
        began = time.monotonic()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()  # who goes on from this checkpoint must find all that was logged before it
        distributed.average_buffers(trainer.lightning_module)
        trainer.save_checkpoint(self._folder / "checkpoints" / f"{name}.ckpt")
        if name == "last":
            self._saved_iteration, self._saved_at = trainer.global_step, time.monotonic()
            self._saving_took = self._saved_at - began

    def _ask(self, signum: int, _: object) -> None:
        self._signal = signum
        signal.signal(signum, signal.SIG_DFL)

    def _give_back_signals(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def _agree(self, trainer: Trainer, seconds: float = math.inf) -> tuple[int, bool]:
        """Return alike on all ranks which signal one was sent, or 0, and whether last.ckpt is older than so many seconds."""
        late = time.monotonic() - self._saved_at > seconds
        if trainer.world_size == 1:
            return self._signal, late
        everyone = distributed.all_gather(torch.tensor([self._signal, late], device=trainer.strategy.root_device)).tolist()
        return max(signum for signum, _ in everyone), bool(everyone[0][1])

    def _tell_where_it_stopped(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            # The Trainer does nothing where max_steps is reached.
            missing = self._validation_is_due and trainer.global_step == trainer.max_steps
            line = f"bngan: stopped at iteration {trainer.global_step}{', whose validation is missing' if missing else ''}"
            line += "" if self._folder is None else f"; go on with --ckpt_path {self._folder}"
            print(line, file=sys.stderr, flush=True)
        trainer.strategy.barrier()  # whoever is gone first may have the others killed


def _validates_after(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether the Trainer validates after this batch of the epoch."""
    every = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (every is not None and (trainer.current_epoch + 1) % every):
        return False
    batches = trainer.global_step if every is None else batch_idx + 1
    return trainer.val_check_batch is not None and batches % trainer.val_check_batch == 0


def _was_launched_by_another(trainer: Trainer) -> bool:
    """Tell whether this process was started by the first one of its machine, and not by torchrun, SLURM or a person."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


def _stopped(trainer: Trainer, signum: int) -> Stopped:
    # A process that the first one has started must not end as if it had crashed, or that one is killed.
    return Stopped(0 if _was_launched_by_another(trainer) else 128 + signum)


def _go_back_to_end_of_iteration(fit_loop: dict[str, Any], iteration: int, epoch: int, validation_is_due: bool) -> None:
    """Let the Trainer's saved loops stand where their last iteration has ended and nothing after it has begun.

    From there the Trainer goes on alike whatever its settings. From other places it repeats an epoch's end where max_steps is
    set, takes an epoch that max_steps cut short for a whole one, and leaves out a validation that was due. That one is saved as
    begun, so that it is done.

    Args:
        fit_loop: state of the loops, which is changed.
        iteration: iterations done.
        epoch: number of the last one's epoch, from 0.
        validation_is_due: whether a validation follows it.
    """
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = iteration - 1
    begun = int(validation_is_due)
    for count in ("total", "current"):
        fit_loop["epoch_progress"][count] = _progress(epoch + 1, epoch)
        batches = fit_loop["epoch_loop.batch_progress"][count]
        batches["completed"] = batches["processed"] - 1 + begun
        fit_loop["epoch_loop.val_loop.batch_progress"][count] = _progress(begun, 0)


def _progress(begun: int, done: int) -> dict[str, int]:
    return {"ready": begun, "started": begun, "processed": done, "completed": done}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Trainer plugin that writes checkpoints so that there is always a whole one, whatever stops the process.

    The file is written beside its target, forced to the disk, and only then put in its place. Lightning writes elsewhere and
    moves, which across file systems is a copy that can be cut short.
    """

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint's content in this version's names, read as tensors and plain values alone."""
        content = super().load_checkpoint(path, map_location, weights_only=True)
        # Through a file of weights alone ddp_notebook hands over what its processes have trained.
        return upgrade(content) if "hyper_parameters" in content else content

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint.

        Raises:
            OSError: if there is no room or no right to; what was there before is then as it was.
        """
        target = Path(path)
        for left_over in target.parent.glob(f".{target.name}.*"):  # by a process that was killed while it wrote
            left_over.unlink(missing_ok=True)
        content = io.BytesIO()  # torch does not tell a full disk from a defect when it writes there itself
        torch.save(checkpoint, content)
        try:
            write_whole(target, content.getbuffer())
        except OSError as error:
            reason = f"{target} could not be written ({error.strerror}); the checkpoint before it is unharmed"
            raise OSError(error.errno, reason) from error
