"""Callbacks that interrupt a run at a place of one's choice: named by tests on the command line."""

import os
import signal

from lightning.pytorch import Callback, Trainer

from bngan import GAN


class StopAfter(Callback):
    """Sends this process SIGTERM after an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        if pl_module.iterations_done == self.iteration:
            os.kill(os.getpid(), signal.SIGTERM)


class StopInValidation(Callback):
    """Sends this process SIGTERM in the middle of the validation that follows an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: GAN, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if pl_module.iterations_done == self.iteration and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGTERM)
