"""Measuring samples during validation and test."""

import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, tee
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from bngan.batchnorm.statistics import EVAL_STATISTICS, EvalStatistics
from bngan.callbacks.references import (
    Entry,
    References,
    Values,
    cache_key,
    count_comparable,
    is_same_net,
    read_cache,
    real_images,
    reference_images,
    write_cache,
)
from bngan.data import ImageDataModule
from bngan.distributed import print0
from bngan.errors import UsageError, check_at_least
from bngan.files import write_whole
from bngan.gan import GAN
from bngan.images import fitting, to_minus1_1, to_uint8
from bngan.metrics.features import FeatureNet, choose_feature, load_feature_net
from bngan.metrics.sample_metrics import SampleMetrics
from bngan.sampler import Weights
from bngan.trainer import run_folder, stop_if_asked

DIGIT_SHAPE = (1, 28, 28)
DIGIT_SETS = ("mnist", "emnist_digits")
TEST_SEEDS = 5
LEAST_REAL = 6
PROBED = 16  # images
CHUNK_BYTES = 2**27  # of images in float32
RANDOM = "The distance of random features is no FID: read it beside its floor and controls."


class MeasureSamples(Callback):
    """Compares samples with real images: FID, KID, precision, recall, density, coverage, and the classes seen.

    `fit` and `validate` compare with training images, so that nothing is chosen by the held-out ones, which `test` compares
    with. val/<metric> is of samples from one set of fixed latents. Beside it stands floor/<metric>, what as many other training
    images get, and three positive controls: dropped/<metric> of training images without the first class, blurred/<metric> of
    blurred ones, and repeated/<metric> of a few of them again and again. `validate` also compares the statistics that G can be
    sampled with, `test` draws five further sets of latents. All sets have the same number of images: num_samples, or as many as
    there are real ones, which a line tells. Samples are rounded to the 256 levels of a picture. Where G is asked for the digits
    that the digit net knows, val/class_precision is the share of samples that it takes for what they were asked to be, and
    val/class_precision/7 that of the sevens; real images, which nobody asked for, have none.

    Args:
        num_samples: samples to draw; 0 measures nothing.
        feature: network whose features are compared: digits, inception, random, or package.module.Class of a torch.nn.Module
            from images (N, C, H, W) in [-1, 1] to features (N, d). auto is digits for digits, inception for colour pictures
            where there are a GPU and its weights, and random for all others. Random features give val/distance and no FID. A
            run that goes on stays with what it began with.
        chunk: samples generated at a time, or fewer where images are large.
        seed: seed of the samples' latents; test uses the next 5.
        mode_threshold: fraction of an equal share of the samples from which on a class counts as covered.

    Raises:
        UsageError: if a setting is out of range.
    """

    def __init__(
        self, num_samples: int = 10_000, feature: str = "auto", chunk: int = 500, seed: int = 0, mode_threshold: float = 0.05
    ) -> None:
        check_at_least(0, "metrics.", num_samples=num_samples)
        check_at_least(1, "metrics.", chunk=chunk)
        if not 0 < mode_threshold <= 1:
            raise UsageError(f"metrics.mode_threshold must be above 0 and at most 1, got {mode_threshold}")
        self.num_samples, self.feature, self.chunk, self.seed = num_samples, feature, chunk, seed
        self.mode_threshold = mode_threshold
        self._chosen: str | None = None  # the feature net that samples were measured with
        self._metric: SampleMetrics | None = None  # None where nothing is measured
        self._held_out = False  # whether samples are compared with held-out images
        self._count = 0  # images in each set
        self._references: References = {}
        self._last: Values = {}
        self._iteration = 0  # the one that was measured last
        self._began = self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last, "iteration": self._iteration, "seconds": self._seconds, "feature": self._chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds = state_dict["seconds"]
        if "iteration" in state_dict:  # version 0.1 compared with held-out images; what it measured last is not kept
            self._last, self._iteration = state_dict["last"], state_dict["iteration"]
        self._chosen = state_dict.get("feature")

    def setup(self, trainer: Trainer, gan: GAN, stage: str) -> None:
        self._run_folder = run_folder(trainer)
        self._metric, self._references = None, {}

    def measured(self, trainer: Trainer, gan: GAN) -> list[str]:
        """Return the names of what validation logs of the samples, known once training is about to start."""
        return [] if self._metric is None else [f"val/{name}" for name in self._metric.names]

    def _prepare(self, trainer: Trainer, gan: GAN) -> None:
        """Load the feature net, once a checkpoint has said which one, and see that there are enough images for it."""
        if self.num_samples == 0:
            return
        data = _image_data(trainer)
        self._held_out = trainer.state.fn == "test"
        comparable = count_comparable(data, held_out=self._held_out)
        if comparable < LEAST_REAL:
            self._tell_too_few(comparable)
            return
        with torch.random.fork_rng(devices=[]):  # building a network draws numbers, which must not change training
            net = self._load_net(trainer, data)
        asked = gan.settings.classes if gan.settings.classes == net.num_classes else 0
        self._metric = SampleMetrics(net, data.image_shape, trainer.strategy.root_device, self.mode_threshold, asked)
        self._count = self._choose_count(comparable, 2 * self._metric.num_features)
        if self._count < asked:
            raise UsageError(
                f"each of {asked} classes is measured by a sample at least, and there would be {self._count} in all: give more "
                "pictures, raise --metrics.num_samples, or set it to 0"
            )

    def _tell_too_few(self, comparable: int) -> None:
        """Say that there are too few real images, which is a mistake only where a feature net was asked for."""
        line = (
            f"metrics compare samples with at least {LEAST_REAL} {'held-out' if self._held_out else 'training'} images and "
            f"need as many other training images for the floor, but there are {comparable} of each"
        )
        if self.feature != "auto":
            raise UsageError(f"{line}: give more pictures, or --metrics.num_samples 0")
        print0(f"Samples are not measured: {line}.")

    def _load_net(self, trainer: Trainer, data: ImageDataModule) -> FeatureNet:
        """Return the net that the settings name, or the run began with, or else the one that goes with the images."""
        if self.feature != "auto":
            self._chosen = self.feature
            return load_feature_net(self.feature)
        if self._chosen is None:
            self._chosen = self._choose(trainer, data)
            return load_feature_net(self._chosen)
        print0(f"Samples are measured by --metrics.feature {self._chosen}, as before.")
        try:
            return load_feature_net(self._chosen)
        except UsageError as error:
            raise UsageError(
                f"the run's samples were measured by {self._chosen}, but now: {error}; or measure by others from here on: "
                "--override --metrics.feature random"
            ) from error

    def _choose(self, trainer: Trainer, data: ImageDataModule) -> str:
        """Return the feature net that goes with the images, and say which and why."""
        digits = data.data_name in DIGIT_SETS and data.image_shape == DIGIT_SHAPE
        on_processor = trainer.strategy.root_device.type == "cpu"
        channels, found = data.image_shape[0], ("", "")
        if trainer.is_global_zero:  # the others find the weights downloaded
            found = choose_feature(channels, digits=digits, on_processor=on_processor)
        name, reason = trainer.strategy.broadcast(found)
        print0(f"Samples are measured by --metrics.feature {name}: {reason}.{f' {RANDOM}' if name == 'random' else ''}")
        return name

    def _choose_count(self, comparable: int, enough: int) -> int:
        """Return how many images each set has, given how many there are and from how many on FID says something."""
        least = min(enough, comparable)
        if self.num_samples < least:
            raise UsageError(
                f"metrics.num_samples must be 0 or at least {least}, twice the features of {self._chosen} or all images where "
                f"there are fewer, got {self.num_samples}"
            )
        if comparable < self.num_samples:
            print0(
                f"Measures {comparable:,} samples, not {self.num_samples:,}: there are no more real images to compare with and "
                "for the floor."
            )
        if comparable < enough:
            print0(f"A distance of {enough // 2} features on {comparable} images says little: read it beside its floor.")
        return min(self.num_samples, comparable)

    # When ---------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, gan: GAN) -> None:
        self._prepare(trainer, gan)

    def on_validation_start(self, trainer: Trainer, gan: GAN) -> None:
        self._began = time.monotonic()
        if trainer.state.fn != "fit":
            self._prepare(trainer, gan)
        if self._metric is not None and not self._references and not trainer.sanity_checking:
            self._references = self._measure_references(trainer, self._metric)

    def on_test_start(self, trainer: Trainer, gan: GAN) -> None:
        self.on_validation_start(trainer, gan)

    def on_validation_epoch_end(self, trainer: Trainer, gan: GAN) -> None:
        if self._metric is None or trainer.sanity_checking:
            return
        # Every rank must know the values, and to the last digit, to agree on the best checkpoint.
        self._last = trainer.strategy.broadcast(self._measure(trainer, gan, self.seed))
        self._iteration = int(gan.iteration)
        if trainer.state.fn == "validate":
            self._report_validate(trainer, self._compare_statistics(trainer, gan))
        for kind, measured in {"val": self._last, **self._references}.items():
            for name, value in measured.items():
                gan.log(f"{kind}/{name}", value)
        self._seconds += time.monotonic() - self._began

    def on_test_epoch_end(self, trainer: Trainer, gan: GAN) -> None:
        if self._metric is None:
            return
        self._iteration = int(gan.iteration)
        seeds = range(self.seed + 1, self.seed + 1 + TEST_SEEDS)
        runs = [self._measure(trainer, gan, seed) for seed in seeds]
        for name in runs[0]:
            gan.log(f"test/{name}", mean(run[name] for run in runs))
        if trainer.is_global_zero:
            self._report_test(list(seeds), runs)

    def on_train_end(self, trainer: Trainer, gan: GAN) -> None:
        if self._last and trainer.is_global_zero:
            note = f"{self._note()}; validation took {self._seconds:.0f} s of the run"
            self._print({"value": self._last, **self._references}, note)
            report = {"validation_seconds": self._seconds, "value": self._last, **self._references}
            self._write("quality.json", report)

    # What is measured ---------------------------------------------------------------------------------------------

    def _measure(
        self,
        trainer: Trainer,
        gan: GAN,
        seed: int,
        weights: Weights | None = None,
        statistics: EvalStatistics | None = None,
        *,
        distance_alone: bool = False,
    ) -> Values:
        """Return the metrics of one set of samples; weights and statistics are as in GAN.sampler."""
        assert self._metric is not None
        with gan.sampler(weights, statistics) as sampler:
            chunks, again = tee(self._own_chunks(trainer, self._count))
            samples = (to_minus1_1(to_uint8(sampler.samples(start, stop, seed))) for start, stop in chunks)
            classes = gan.settings.classes
            labels = (torch.arange(start, stop) % classes for start, stop in again) if classes else None
            return self._metric.measure(samples, labels, distance_alone=distance_alone)

    def _compare_statistics(self, trainer: Trainer, gan: GAN) -> dict[str, Values]:
        """Return the distance by G's weights and by the statistics that normalize its samples; nothing without batch norm."""
        if not any(name.startswith("generator.") for name, _ in gan.batch_norms()):
            return {}
        kinds: list[Weights] = ["raw"] if gan.generator_ema is None else ["ema", "raw"]
        distances = {
            f"{weights}, {statistics}": self._measure(trainer, gan, self.seed, weights, statistics, distance_alone=True)
            for weights in kinds
            for statistics in EVAL_STATISTICS
        }
        for statistics in EVAL_STATISTICS:
            for name, value in distances[f"{kinds[0]}, {statistics}"].items():
                gan.log(f"val/{name}_{statistics}", value)
        gan.log("val/bn_gap", _bn_gap(distances))
        return distances

    def _measure_references(self, trainer: Trainer, metric: SampleMetrics) -> References:
        """Give the real images to the metric, and return the floor and the controls, measured or found in the data's folder."""
        data = _image_data(trainer)
        real = real_images(data, self._count, held_out=self._held_out)
        metric.set_real(self._chunks(trainer, real))
        # The sets are made anew for each use: kept, they would fill the memory.
        sets = partial(reference_images, data, self._count, held_out=self._held_out)
        path = data.root / "floors.json"
        key = cache_key(f"{self._chosen} {self.mode_threshold}", chain([real], (images for _, images in sets())))
        probe = metric.net.probe(to_minus1_1(real[:PROBED]).to(metric.device)).tolist()
        # Another run may be writing the file, so only one rank reads it, and what it found holds for all.
        known = read_cache(path) if trainer.is_global_zero else {}
        entry = known.get(key)
        found = entry["references"] if entry is not None and is_same_net(probe, entry["probe"]) else None
        found = trainer.strategy.broadcast(found)
        if found is None:
            found = {name: metric.measure(self._chunks(trainer, images)) for name, images in sets()}
            if trainer.is_global_zero and self._run_folder is not None:
                write_cache(path, {**known, key: Entry(probe=probe, references=found)})
        if "dropped" not in found and len(data.labels(train=True).unique()) > 1:
            print0("The control `dropped` is left out: without the first class there are too few training images.")
        return found

    def _chunks(self, trainer: Trainer, images: Tensor) -> Iterator[Tensor]:
        """Yield this rank's chunks of images uint8 (N, C, H, W) as (n, C, H, W) in [-1, 1]."""
        for start, stop in self._own_chunks(trainer, len(images)):
            yield to_minus1_1(images[start:stop])

    def _own_chunks(self, trainer: Trainer, count: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of this rank's chunks of `count` images, each image in one chunk of one rank."""
        chunk = fitting(self.chunk, _image_data(trainer).image_shape, CHUNK_BYTES)
        for first in range(0, count, chunk * trainer.world_size):
            stop_if_asked(trainer)
            start = first + chunk * trainer.global_rank
            if start < count:
                yield start, min(start + chunk, count)

    # What is told -------------------------------------------------------------------------------------------------

    def _note(self) -> str:
        return f"iteration {self._iteration}, {self._count} samples"

    def _print(self, columns: dict[str, Values], note: str) -> None:
        """Print the table of what was measured."""
        print(_table(columns, note), *([RANDOM] if self._chosen == "random" else []), sep="\n", flush=True)

    def _report_validate(self, trainer: Trainer, distances: dict[str, Values]) -> None:
        if not trainer.is_global_zero:
            return
        self._print({"value": self._last, **self._references}, self._note())
        report: dict[str, Any] = {"value": self._last, **self._references, **distances}
        if distances:
            report["bn_gap"] = _bn_gap(distances)
            (name,) = next(iter(distances.values()))
            title = "FID" if name == "fid" else name
            print(f"\n{title} by the weights and the statistics that G is sampled with ({self._note()})")
            print("\n".join(f"{policy:<17} {value[name]:9.4f}" for policy, value in distances.items()))
            print(f"bn_gap = {title}(running) - {title}(precise) = {_bn_gap(distances):.4f}", flush=True)
        self._write("validate.json", report)

    def _report_test(self, seeds: list[int], runs: list[Values]) -> None:
        means = {name: mean(run[name] for run in runs) for name in runs[0]}
        deviations = {name: stdev(run[name] for run in runs) for name in runs[0]}
        columns = {"mean": means, "sd": deviations, **self._references}
        self._print(columns, f"{self._note()} from each of {TEST_SEEDS} seeds of latents")
        report = {
            name: {
                **{title: values[name] for title, values in columns.items() if name in values},
                "values": [run[name] for run in runs],
            }
            for name in means
        }
        self._write("test.json", {"seeds": seeds, **report})

    def _write(self, name: str, report: dict[str, Any]) -> None:
        if self._run_folder is not None:
            content = {"iteration": self._iteration, "num_samples": self._count, "feature": self._chosen, **report}
            write_whole(self._run_folder / name, f"{json.dumps(content, indent=2)}\n".encode())


def _image_data(trainer: Trainer) -> ImageDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise ValueError(f"MeasureSamples needs an ImageDataModule, for the images to compare with, got {type(data).__name__}")
    return data


def _bn_gap(distances: dict[str, Values]) -> float:
    """Return how much better samples by precise statistics are than by running ones, of the first weights that are there."""
    weights = next(iter(distances)).partition(",")[0]
    running, precise = (next(iter(distances[f"{weights}, {statistics}"].values())) for statistics in ("running", "precise"))
    return running - precise


def _table(columns: dict[str, Values], note: str) -> str:
    """Return a row for each metric and a column for each title; what real images cannot have is left empty."""
    widths = {title: max(9, len(title) + 2) for title in columns}
    margin = max(14, *(len(name) + 1 for name in next(iter(columns.values()))))
    lines = [f"{'metric':<{margin}}" + "".join(f"{title:>{widths[title]}}" for title in columns) + f"   ({note})"]
    for name in next(iter(columns.values())):
        cells = {title: f"{values[name]:.4f}" if name in values else "" for title, values in columns.items()}
        lines.append(f"{name:<{margin}}" + "".join(f"{cell:>{widths[title]}}" for title, cell in cells.items()))
    return "\n".join(lines)
