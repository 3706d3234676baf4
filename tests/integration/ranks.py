"""Trains tiny GANs on several processes and writes what came out; by itself, in float64 for test_distributed.py.

    python -m tests.integration.ranks DEVICES FOLDER CASES

CASES is a JSON list of the GANs' settings, each with `synchronized`, whether batch norm is.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor

from bngan import GAN, distributed
from bngan.batchnorm.diagnostics import kl_to_running
from bngan.batchnorm.statistics import recorded_statistics
from bngan.data.loader import ShardedBatches, TensorLoader
from bngan.trainer import Trainer
from tests.conftest import REPOSITORY

BATCH = 64  # of which virtual batch norm needs as many
ITERATIONS = 10
Precision = Literal["32-true", "64-true", "bf16-mixed", "16-mixed"]


class Witness(Callback):
    """Keeps the latents that this rank drew, and how far its last batches are from the running statistics before them."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []
        self.kl: dict[str, list[Tensor]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        pl_module.generator.register_forward_pre_hook(lambda _, inputs: self.latents.append(inputs[0].clone()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: GAN, batch: object, batch_idx: int) -> None:
        self._recording = ExitStack()
        self._seen = self._recording.enter_context(recorded_statistics(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, *_: object) -> None:
        self._recording.close()
        for name, layer in pl_module.batch_norms():
            self.kl[name] = [kl_to_running(batch, layer.eps) for batch in self._seen[name]]


def fit(
    gan: GAN,
    devices: int,
    folder: Path,
    callback: Callback,
    *,
    precision: Precision,
    batch: int,
    steps: int,
    synchronized: bool,
) -> None:
    """Train on random images for so many steps, in this process and those that it starts."""
    size = batch * gan.settings.n_critic
    pixels = torch.randint(
        256, (size * 8, *gan.settings.image_shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    labels = torch.randint(3, (len(pixels),), generator=torch.Generator().manual_seed(2))  # for GANs with classes
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision=precision,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        sync_batchnorm=synchronized,
        callbacks=[callback],
        default_root_dir=str(folder),
    )

    def loader() -> TensorLoader:
        batches = ShardedBatches(len(pixels), size, train=True, rank=distributed.rank(), ranks=distributed.world_size())
        return TensorLoader(pixels, labels, batches)

    gan.train_dataloader = loader
    trainer.fit(gan)


def train(devices: int, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the state of this rank after its iterations, and what it saw."""
    synchronized = settings.pop("synchronized")
    seed_everything(0, verbose=False)
    gan = GAN(**{"image_shape": (1, 4, 4), "latent_dim": 8, "hidden_dim": 8, "instance_noise": 0.1, **settings})
    witness = Witness()
    fit(gan, devices, folder, witness, precision="64-true", batch=BATCH, steps=ITERATIONS, synchronized=synchronized)
    drifted = {name: buffer.clone() for name, buffer in gan.named_buffers()}
    distributed.average_buffers(gan)
    return {"state": gan.state_dict(), "drifted": drifted, "latents": witness.latents, "kl": witness.kl}


def main(train: Callable[[int, Path, dict[str, Any]], dict[str, Any]]) -> None:
    """Do what the command line says, each case by `train`."""
    warnings.filterwarnings("ignore")
    devices, folder, cases = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    results = [train(devices, folder, case) for case in cases]
    torch.save(results, folder / f"{devices}-{distributed.rank()}.pt")


def launch(module: str, devices: int, folder: Path, cases: list[dict[str, Any]], timeout: float) -> list[list[dict[str, Any]]]:
    """Run a module that ends in `main` on so many processes; return its results by rank and case."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(devices), str(folder), json.dumps(cases)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]


if __name__ == "__main__":
    main(train)
