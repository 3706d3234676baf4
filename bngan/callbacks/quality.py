"""Measuring samples during validation and test."""

import json
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from bngan import distributed
from bngan.callbacks.folder import run_folder
from bngan.data.loader import to_unit_range
from bngan.gan import GAN
from bngan.metrics.digit_net import DigitNet, load_digit_net
from bngan.metrics.modes import ClassHistogram
from bngan.sampling import evaluating, to_uint8

DIGIT_SHAPE = (1, 28, 28)
DIGIT_SETS = ("mnist", "emnist_digits")
TEST_SEEDS = 5


class Quality(Callback):
    """Compares samples with the held-out digits: FID, modes and the KL of the class histogram.

    Validation logs val/fid, val/modes and val/class_kl of samples from one set of fixed latents; test prints their mean and
    standard deviation over 5 sets, beside the floor, which is what as many real training images get. G is in evaluation mode
    and its images are rounded to the 256 levels of a picture. The features are those of the pinned digit net, so for data
    other than 28 x 28 grey digits nothing is measured, and a line says so.

    Args:
        num_samples: samples to draw; 0 measures nothing.
        chunk: samples generated at a time.
        seed: seed of the samples' latents; test uses this one and the next 4.
    """

    def __init__(self, num_samples: int = 10_000, chunk: int = 500, seed: int = 0) -> None:
        if num_samples < 0 or chunk < 1:
            raise ValueError(f"metrics.num_samples must be at least 0 and chunk at least 1, got {num_samples} and {chunk}")
        if 0 < num_samples < DigitNet.num_features * 2:
            raise ValueError(f"metrics.num_samples must be 0 or at least {DigitNet.num_features * 2}, got {num_samples}")
        self.num_samples, self.chunk, self.seed = num_samples, chunk, seed
        self._active = False
        self._real_seen = False

    def setup(self, trainer: Trainer, pl_module: GAN, stage: str) -> None:
        self._run_folder = run_folder(trainer)
        digits = getattr(cast(Any, trainer).datamodule, "data_name", None) in DIGIT_SETS
        self._active = self.num_samples > 0 and digits and pl_module.image_shape == DIGIT_SHAPE
        if self._active:
            self._net = load_digit_net()
            self._fid = FrechetInceptionDistance(feature=self._net, reset_real_features=False)
            self._classes = ClassHistogram(DigitNet.num_classes)
            for part in (self._net, self._fid, self._classes):
                part.to(trainer.strategy.root_device)
        elif self.num_samples > 0 and stage != "predict" and trainer.is_global_zero:
            print("Samples are not measured: the digit net knows 28 x 28 grey digits only.", flush=True)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: GAN, outputs: object, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._active and not self._real_seen and not trainer.sanity_checking:
            self._fid.update(batch[0], real=True)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: GAN, outputs: object, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if not self._active or trainer.sanity_checking:
            return
        self._real_seen = True
        for name, value in self._measure(self._samples(pl_module, self.seed)).items():
            # Every rank has the same value already, and every rank must know it to agree on the best checkpoint.
            pl_module.log(f"val/{name}", value)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if not self._active:
            return
        self._real_seen = True
        runs = [self._measure(self._samples(pl_module, self.seed + offset)) for offset in range(TEST_SEEDS)]
        floor = self._measure(self._training_images(trainer))
        report: dict[str, Any] = {"num_samples": self.num_samples, "seeds": TEST_SEEDS}
        for name in floor:
            values = [run[name] for run in runs]
            report[name] = {"mean": mean(values), "sd": stdev(values), "floor": floor[name], "values": values}
            pl_module.log(f"test/{name}", mean(values))
        if trainer.is_global_zero:
            if self._run_folder is not None:
                (self._run_folder / "test.json").write_text(json.dumps(report, indent=2) + "\n")
            print(f"{'metric':<10} {'mean':>9} {'sd':>8} {'floor':>8}   ({TEST_SEEDS} seeds, {self.num_samples} samples each)")
            for name in floor:
                row = report[name]
                print(f"{name:<10} {row['mean']:9.4f} {row['sd']:8.4f} {row['floor']:8.4f}", flush=True)

    def _measure(self, chunks: Iterator[Tensor]) -> dict[str, float]:
        """Return the metrics of images in [-1, 1], each rank giving its own chunks."""
        self._fid.reset()
        self._classes.reset()
        for images in chunks:
            self._fid.update(images, real=False)
            self._classes.update(self._net.logits(self._net(images)))
        values = {"fid": self._fid.compute(), **self._classes.compute()}
        return {name: float(value) for name, value in values.items()}

    def _samples(self, gan: GAN, seed: int) -> Iterator[Tensor]:
        with evaluating(gan.generator):
            for start, stop in self._own_chunks():
                images = gan.generate(gan.sample_latents(start, stop, seed))
                yield to_unit_range(to_uint8(images)).to(gan.device)

    def _training_images(self, trainer: Trainer) -> Iterator[Tensor]:
        images = cast(Any, trainer).datamodule.load(train=True).images
        for start, stop in self._own_chunks():
            yield to_unit_range(images[start:stop]).to(trainer.strategy.root_device)

    def _own_chunks(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of this rank's chunks of the samples, each sample in one chunk of one rank."""
        starts = range(0, self.num_samples, self.chunk)
        for start in starts[distributed.rank() :: distributed.world_size()]:
            yield start, min(start + self.chunk, self.num_samples)
