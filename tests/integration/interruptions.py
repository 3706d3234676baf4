"""Callbacks that interrupt a run at a place of one's choice: named by tests on the command line."""

import math
import os
import signal
import time
from dataclasses import replace

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from bngan import GAN


class StopAfter(Callback):
    """Sends this process a signal after an iteration."""

    def __init__(self, iteration: int, signum: int = signal.SIGTERM.value) -> None:
        self.iteration, self.signum = iteration, signum

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.iteration:
            os.kill(os.getpid(), self.signum)


class StopInValidation(Callback):
    """Sends this process SIGTERM in the middle of the validation that follows an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: GAN, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.global_step == self.iteration and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Crash(Callback):
    """Fails after an iteration, and the validation that may follow it."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_start(self, trainer: Trainer, pl_module: GAN, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.iteration:
            raise RuntimeError("crashed as asked")


class Hang(Callback):
    """Stays in one place for a minute after an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.iteration:
            time.sleep(60)


class SpoilLoss(Callback):
    """Makes G's loss NaN in an iteration, on the last rank alone."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            loss = pl_module.loss

            def generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
                factor = math.nan if trainer.global_step + 1 == self.iteration else 1.0
                return factor * loss.generator(real_logits, fake_logits)

            pl_module.loss = replace(loss, generator=generator)
