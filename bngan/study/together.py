"""How are runs that are trained as one measured? Each as if it had been trained by itself."""

import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bngan.errors import NonFiniteLoss
from bngan.settings import Settings
from bngan.study import ensemble
from bngan.study.ensemble import Ensemble
from bngan.study.probes import PROBE_BATCHES, probe
from bngan.study.spec import Look, Result, Run
from bngan.study.tasks import TASKS, Digits
from bngan.study.training import TrainingImages, build_gan, evaluate, other_momenta, save_picture

MOST = 128  # runs as one; more of them hardly gain anything
COPIES_OF_WEIGHTS = 8  # with gradients, Adam's two, the average, and what is on its way
COPIES_OF_IMAGES = 400  # that an iteration's activations and gradients are as large as, roughly


class TrainingTogether:
    """Runs of one structure as far as they have come.

    Args:
        runs: with the same `structure`.
        root: folder of the data sets' files.
        device: where.

    Attributes:
        ensemble: their networks.
        seconds: that training has taken, of all runs together.
    """

    def __init__(self, runs: Sequence[Run], root: Path, device: torch.device | str) -> None:
        first, gans = runs[0], [build_gan(run, device) for run in runs]
        self.runs, self.seconds = runs, 0.0
        self._data = [TASKS[first.task].load(root, run.seed, device) for run in runs]
        self.ensemble = Ensemble(gans, first.iterations, momenta=other_momenta(first, gans[0]))
        size = first.batch_size * gans[0].settings.n_critic
        self._images = [TrainingImages(data, size, run.seed, device) for data, run in zip(self._data, runs, strict=True)]
        self._probed_rows = torch.arange(PROBE_BATCHES * first.batch_size, device=device)
        self._failures: list[str | None] = [None] * len(runs)
        self._measured: list[list[dict[str, Any]]] = [[] for _ in runs]
        self._probed: list[list[dict[str, Any]]] = [[] for _ in runs]

    def images(self, done: int) -> Tensor:
        """Return the images (n_critic N, R, C, H, W) of the iteration after `done` others."""
        if isinstance(self._data[0], Digits):  # the same for all, each in an order of its own: few large steps
            rows = torch.stack([images.rows(done) for images in self._images], dim=1)
            return self._data[0].batch(rows.flatten()).unflatten(0, rows.shape)
        return torch.stack([images(done) for images in self._images], dim=1)

    def labels(self, done: int) -> Tensor:
        """Return their classes int64 (n_critic N, R)."""
        return torch.stack([images.labels(done) for images in self._images], dim=1)

    def advance(self, until: int) -> None:
        """Train until so many iterations are done."""
        start = time.perf_counter()
        self.ensemble.train(self.images, until, self.labels if self.ensemble.gan.settings.classes else None)
        self.ensemble.failed.any().item()  # a CPU-GPU sync point: all is done
        self.seconds += time.perf_counter() - start

    def look(self, look: Look) -> None:
        """Evaluate each run that has not failed until now."""
        failed = self.ensemble.failed.tolist()
        for place, data in enumerate(self._data):
            if self._failures[place] is not None:
                continue
            if failed[place]:
                self._failures[place] = f"weights have NaN or infinite values at iteration {look.iteration}"
                continue
            gan = self.ensemble.member(place)
            try:
                self._measured[place] += evaluate(gan, data, look, self.ensemble.also, place)
                self._probed[place] += probe(gan, data.batch(self._probed_rows), look.probes)
            except NonFiniteLoss as error:
                self._failures[place] = str(error)

    def results(self) -> list[Result]:
        """Return what came out of each run; its seconds are its share."""
        seconds = self.seconds / len(self.runs)
        entries = zip(self.runs, self._failures, self._measured, self._probed, strict=True)
        return [Result(run, failure, seconds, tuple(measured), tuple(probed)) for run, failure, measured, probed in entries]

    def save_pictures(self, folder: Path) -> None:
        """Write a picture of samples of each run that has not failed, named as those of a run by itself."""
        for place, (run, failure, data) in enumerate(zip(self.runs, self._failures, self._data, strict=True)):
            if failure is None:
                save_picture(self.ensemble.member(place), data, folder / run.picture)


def train_together(runs: Sequence[Run], folder: Path, root: Path, device: torch.device | str) -> list[Result]:
    """Train runs of one structure as one, and evaluate each.

    Args:
        runs: with the same `structure`.
        folder: where pictures of samples go.
        root: folder of the data sets' files.
        device: where.
    """
    training = TrainingTogether(runs, root, device)
    for look in runs[0].looks:
        training.advance(look.iteration)
        training.look(look)
    training.save_pictures(folder)
    return training.results()


def structure(run: Run) -> Hashable:
    """Return what a run has in common with those that can be trained with it as one."""
    return run.task, run.batch_size, run.iterations, run.looks, ensemble.structure(_settings(run))


def most(run: Run, device: torch.device | str) -> int:
    """Return how many runs like this one are trained as one at most, by an estimate of what their memory is."""
    if torch.device(device).type != "cuda":
        return MOST
    weights = sum(weight.numel() for weight in build_gan(run).parameters())
    images = run.batch_size * _settings(run).n_critic * torch.Size(TASKS[run.task].image_shape).numel()
    free, _ = torch.cuda.mem_get_info(device)
    return min(MOST, ensemble.chunk_size(free, 4 * (COPIES_OF_WEIGHTS * weights + COPIES_OF_IMAGES * images)))


def _settings(run: Run) -> Settings:
    given: dict[str, Any] = run.settings
    return Settings(**given)
