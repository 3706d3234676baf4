"""Measuring samples during validation and test."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from bngan import distributed
from bngan.batchnorm import SAMPLINGS, Sampling, batch_norm_layers
from bngan.callbacks.checkpoints import Checkpoints
from bngan.callbacks.run import run_folder
from bngan.data.loader import to_unit_range
from bngan.gan import GAN, Weights
from bngan.memory import release_freed_memory
from bngan.metrics.features import load_feature_net
from bngan.metrics.quality import SampleQuality
from bngan.sampling import to_uint8

DIGIT_SHAPE = (1, 28, 28)
DIGIT_SETS = ("mnist", "emnist_digits")
TEST_SEEDS = 5
LEAST_REAL = 6
BLURRED_AT_ONCE = 100
# Raised when the same key would stand for other numbers.
FLOORS_VERSION = 1
# What stands beside a value: real training images in the samples' place, whole and spoilt.
FLOOR, CONTROLS = "floor", ("dropped", "blurred")
Values = dict[str, float]
Chunks = Iterator[tuple[Tensor, Tensor]]


class Quality(Callback):
    """Compares samples with the held-out images: FID, KID, precision, recall, density, coverage, and the classes seen.

    Validation logs val/<metric> of samples from one set of fixed latents. Beside it stand floor/<metric>, which is what as
    many real training images get, and two positive controls: dropped/<metric> of training images without the first class,
    and blurred/<metric> of blurred ones. `validate` compares the statistics that G can be sampled with, `test` draws five
    further sets of latents. Samples are rounded to the 256 levels of a picture.

    Args:
        num_samples: samples to draw; 0 measures nothing.
        feature: network whose features are compared: digits, inception, or package.module.Class of a torch.nn.Module from
            images (N, C, H, W) in [-1, 1] to features (N, d).
        chunk: samples generated at a time.
        seed: seed of the samples' latents; test uses the next 5.
    """

    def __init__(self, num_samples: int = 10_000, feature: str = "digits", chunk: int = 500, seed: int = 0) -> None:
        if num_samples < 0 or chunk < 1:
            raise ValueError(f"metrics.num_samples must be at least 0 and chunk at least 1, got {num_samples} and {chunk}")
        self.num_samples, self.feature, self.chunk, self.seed = num_samples, feature, chunk, seed
        self._active = False
        self._quality: SampleQuality | None = None
        self._references: dict[str, Values] = {}
        self._last: Values = {}
        self._heed: Callable[[], None] | None = None
        self._started = self._seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: GAN, stage: str) -> None:
        self._run_folder = run_folder(trainer)
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, Checkpoints):
                self._heed = partial(callback.heed, trainer, pl_module)
        digits = getattr(cast(Any, trainer).datamodule, "data_name", None) in DIGIT_SETS
        known = self.feature != "digits" or (digits and pl_module.image_shape == DIGIT_SHAPE)
        self._active = self.num_samples > 0 and known and stage != "predict"
        if self.num_samples > 0 and not known and stage != "predict" and trainer.is_global_zero:
            print(
                "Samples are not measured: the digit net knows 28 x 28 grey digits only; for other images give "
                "--metrics.feature inception, or a network of your own.",
                flush=True,
            )
        if self._active and self._quality is None:
            found = len(cast(Any, trainer).datamodule.subset(LEAST_REAL, train=False).labels)
            if found < LEAST_REAL:
                raise ValueError(
                    f"metrics need at least {LEAST_REAL} held-out images, and there are {found}: give more pictures, or "
                    "--metrics.num_samples 0"
                )
            with torch.random.fork_rng(devices=[]):  # building a network draws numbers, which must not change training
                net = load_feature_net(self.feature)
            shape, device = cast(Any, pl_module.image_shape), trainer.strategy.root_device
            # What one stage has used would be added to what the next one needs, in blocks of other sizes.
            self._quality = SampleQuality(net, shape, device, between_stages=release_freed_memory)
            least = 2 * self._quality.num_features
            if self.num_samples < least:
                raise ValueError(
                    f"metrics.num_samples must be 0 or at least {least}, twice the features of {self.feature}, got "
                    f"{self.num_samples}"
                )

    def on_validation_start(self, trainer: Trainer, pl_module: GAN) -> None:
        self._started = time.monotonic()
        if self._active and not trainer.sanity_checking and not self._references:
            self._measure_references(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: GAN) -> None:
        self.on_validation_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if not self._active or trainer.sanity_checking:
            return
        if trainer.state.fn == "validate":
            self._compare_sampling(trainer, pl_module)
        else:
            self._last = self._measure(trainer, pl_module, self.seed)
        # Every rank must know them, and to the last digit, to agree on the best checkpoint.
        self._last = trainer.strategy.broadcast(self._last)
        for name, value in self._last.items():
            pl_module.log(f"val/{name}", value)
        for reference, values in self._references.items():
            for name, value in values.items():
                pl_module.log(f"{reference}/{name}", value)
        self._seconds += time.monotonic() - self._started

    def on_train_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if self._last and trainer.is_global_zero:
            self._print_table(
                {"value": self._last},
                note=f"{self.num_samples} samples, last validation; validation took {self._seconds:.0f} s of the run",
            )
            report = {"num_samples": self.num_samples, "validation_seconds": self._seconds, "value": self._last}
            self._write("quality.json", {**report, **self._references})

    def on_test_epoch_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if not self._active:
            return
        seeds = range(self.seed + 1, self.seed + 1 + TEST_SEEDS)
        runs = [self._measure(trainer, pl_module, seed) for seed in seeds]
        means = {name: mean(run[name] for run in runs) for name in runs[0]}
        deviations = {name: stdev(run[name] for run in runs) for name in runs[0]}
        for name, value in means.items():
            pl_module.log(f"test/{name}", value)
        if trainer.is_global_zero:
            self._print_table(
                {"mean": means, "sd": deviations}, note=f"{TEST_SEEDS} seeds of latents, {self.num_samples} samples each"
            )
            report = {
                name: {
                    "mean": means[name],
                    "sd": deviations[name],
                    **{reference: values[name] for reference, values in self._references.items()},
                    "values": [run[name] for run in runs],
                }
                for name in means
            }
            self._write("test.json", {"num_samples": self.num_samples, "seeds": list(seeds), **report})

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last, self._seconds = state_dict["last"], state_dict["seconds"]

    def _compare_sampling(self, trainer: Trainer, gan: GAN) -> None:
        """Measure samples as the run draws them, and FID by each kind of statistics, of G's weights and of their average."""
        self._last = self._measure(trainer, gan, self.seed)
        report: dict[str, Any] = {"num_samples": self.num_samples, "value": self._last, **self._references}
        if trainer.is_global_zero:
            self._print_table({"value": self._last}, note=f"{self.num_samples} samples")
        if any(batch_norm_layers(gan.generator)):
            kinds: list[Weights] = ["raw"] if gan.average is None else ["average", "raw"]
            fids = {
                f"{weights}, {sampling}": self._measure(trainer, gan, self.seed, weights, sampling, fid_alone=True)
                for weights in kinds
                for sampling in SAMPLINGS
            }
            for sampling in SAMPLINGS:
                gan.log(f"val/fid_{sampling}", fids[f"{kinds[0]}, {sampling}"]["fid"])
            gap = fids[f"{kinds[0]}, running"]["fid"] - fids[f"{kinds[0]}, precise"]["fid"]
            gan.log("val/bn_gap", gap)
            report = {**report, **fids, "bn_gap": gap}
            if trainer.is_global_zero:
                print(f"\nFID by the weights and the statistics that G is sampled with ({self.num_samples} samples)")
                print("\n".join(f"{policy:<17} {value['fid']:9.4f}" for policy, value in fids.items()))
                print(f"bn_gap = FID(running) - FID(precise) = {gap:.4f}", flush=True)
        if trainer.is_global_zero:
            self._write("validate.json", report)

    def _measure(
        self,
        trainer: Trainer,
        gan: GAN,
        seed: int,
        weights: Weights | None = None,
        sampling: Sampling | None = None,
        *,
        fid_alone: bool = False,
    ) -> Values:
        assert self._quality is not None
        with gan.sampler(weights, sampling) as sampler:
            samples = (
                (to_unit_range(to_uint8(sampler.samples(start, stop, seed))), torch.arange(start, stop))
                for start, stop in self._own_chunks(self.num_samples)
            )
            return self._quality.measure(samples, fid_alone=fid_alone)

    def _measure_references(self, trainer: Trainer) -> None:
        """Give the real images to the metrics, and work out the floor and the controls, or find them in the data's folder."""
        assert self._quality is not None
        quality, data = self._quality, cast(Any, trainer).datamodule
        held_out = data.subset(self.num_samples, train=False)
        quality.set_real(self._own_rows(held_out.images))
        training = data.subset(self.num_samples, train=True)
        first_class, classes = int(training.labels.min()), len(training.labels.unique())
        fewest = min(len(held_out.labels), len(training.labels))
        if fewest < 2 * quality.num_features and trainer.is_global_zero:
            print(
                f"FID of {quality.num_features} features on {fewest} real images says little: read it beside its floor.",
                flush=True,
            )
        # Made anew when they are measured: kept, they would add to the peak of memory.
        controls: dict[str, Callable[[], Tensor]] = {
            FLOOR: lambda: training.images,
            "blurred": lambda: _blurred(training.images),
        }
        if classes > 1:
            controls["dropped"] = lambda: data.subset(self.num_samples, train=True, without=first_class).images
        names = (FLOOR, *(name for name in CONTROLS if name in controls))
        digest = hashlib.sha256(f"{FLOORS_VERSION} {quality.net.fingerprint()}".encode())
        for make in (lambda: held_out.images, *controls.values()):
            images = make()
            digest.update(str(tuple(images.shape)).encode())
            digest.update(images.numpy().data)
            del images
        # Another run may be writing the file, so only one rank reads it, and what it found holds for all.
        path, key = Path(data.root) / "floors.json", digest.hexdigest()
        known = _read_cache(path) if trainer.is_global_zero else {}
        found = trainer.strategy.broadcast(known.get(key))
        if found is None:
            found = {name: quality.measure(self._own_rows(controls[name]())) for name in names}
            if trainer.is_global_zero and self._run_folder is not None:
                _write_cache(path, {**known, key: found})
        self._references = found

    def _own_rows(self, images: Tensor) -> Chunks:
        for start, stop in self._own_chunks(len(images)):
            yield to_unit_range(images[start:stop]), torch.arange(start, stop)

    def _own_chunks(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of this rank's chunks of `count` images, each image in one chunk of one rank."""
        starts = range(0, count, self.chunk)
        for first in range(0, len(starts), distributed.world_size()):
            if self._heed is not None:
                self._heed()
            for start in starts[first + distributed.rank() :][:1]:
                yield start, min(start + self.chunk, count)

    def _print_table(self, columns: dict[str, Values], note: str) -> None:
        columns = {**columns, **self._references}
        widths = {title: max(9, len(title) + 2) for title in columns}
        lines = [f"{'metric':<11}" + "".join(f"{title:>{widths[title]}}" for title in columns) + f"   ({note})"]
        for name in next(iter(columns.values())):
            lines.append(f"{name:<11}" + "".join(f"{values[name]:>{widths[title]}.4f}" for title, values in columns.items()))
        print("\n".join(lines), flush=True)

    def _write(self, name: str, report: dict[str, Any]) -> None:
        if self._run_folder is not None:
            (self._run_folder / name).write_text(json.dumps(report, indent=2) + "\n")


def _blurred(images: Tensor) -> Tensor:
    """Return the images blurred, some at a time: torchvision needs 30 times their size for it."""
    blurred = torch.empty_like(images)
    for target, some in zip(blurred.split(BLURRED_AT_ONCE), images.split(BLURRED_AT_ONCE), strict=True):
        target.copy_(tv.gaussian_blur(some, [5, 5], [1.0, 1.0]))
    return blurred


def _read_cache(path: Path) -> dict[str, dict[str, Values]]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        print(f"{path} cannot be read ({error.strerror}), so floors are worked out anew.", flush=True)
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        print(f"{path} is damaged and is written anew.", flush=True)
        return {}
    return content


def _write_cache(path: Path, content: dict[str, dict[str, Values]]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}), so the next run works the floors out again.", flush=True)
