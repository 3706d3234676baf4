"""What is learned? Data whose modes are known, and measures of samples that tell which of them are there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bngan.data.datasets import DATASETS, Labelled
from bngan.images import grid, to_minus1_1
from bngan.metrics.digit_net import load_digit_net
from bngan.rng import Stream, generator
from bngan.study.measures import DigitMeasures, by_set, class_counts, digit_features, kl_to_uniform, rounded

Measured = dict[str, Any]
SHOWN = 500  # points of a set that a map shows


class Data(Protocol):
    """A task's training images and measures, on a device.

    Attributes:
        pictured: how many samples make a picture of them.
    """

    pictured: int

    def __len__(self) -> int:
        """Return how many training images there are."""
        ...

    def batch(self, rows: Tensor) -> Tensor:
        """Return the training images (n, C, H, W) of rows int64 (n,), in the range that G is to learn."""
        ...

    def measure(self, sets: Tensor, *, whole: bool) -> list[Measured]:
        """Return the measures of each of R sets of samples (R, n, C, H, W); where `whole`, those that take long as well."""
        ...

    def references(self, count: int) -> dict[str, Measured]:
        """Return the measures of `count` held-out real images, and of others of known worth, by what they are."""
        ...

    def picture(self, samples: Tensor) -> Tensor:
        """Return a picture (C, H, W) in [-1, 1] of samples (pictured, C, H, W)."""
        ...


@dataclass(frozen=True)
class Task:
    """A task before its data is there.

    Attributes:
        image_shape: (C, H, W) of its images; points in the plane are (2, 1, 1).
        modes: how many there are.
        load: returns the data, given a folder for the data sets' files, a run's seed, and a device.
        classes: that G can be asked for; 0 where images have no labels.
    """

    image_shape: tuple[int, int, int]
    modes: int
    load: Callable[[Path, int, torch.device | str], Data]
    classes: int = 0


# Digits ---------------------------------------------------------------------------------------------------------------


class Digits:
    """MNIST, of which the 10,000 held-out digits are what samples are compared with.

    Args:
        root: folder of the data set's files.
        seed: of a run; all train with the same digits.
        device: of images and measures.
    """

    pictured = 10

    def __init__(self, root: Path, seed: int, device: torch.device | str) -> None:
        self.images, self.labels = load_digits(root, str(device), train=True)
        self._measures = load_measures(root, str(device))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor) -> Tensor:
        return to_minus1_1(self.images[rows])

    def measure(self, sets: Tensor, *, whole: bool) -> list[Measured]:
        """Return the measures of DigitMeasures: fid, classes, class_kl, pixel_variance and, where whole, coverage."""
        return self._measures.measure(sets, whole=whole)

    def references(self, count: int) -> dict[str, Measured]:
        """Return the measures of `count` images of each kind, all made of training digits.

        `half of each class` has those with less ink than half of their class; a Gaussian is fitted to the pixels.
        """
        return {name: self.measure(images[:count].unsqueeze(0), whole=True)[0] for name, images in self.controls(count)}

    def picture(self, samples: Tensor) -> Tensor:
        return grid(samples, columns=self.pictured)

    def controls(self, count: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and at least `count` images in [-1, 1] of each control, where there are as many."""
        random = generator(Stream.REFERENCES)
        order = torch.randperm(len(self), generator=random).to(self.images.device)
        images, labels = self.batch(order), self.labels[order]
        ink = images.flatten(start_dim=1).mean(dim=1)
        medians = torch.stack([ink[labels == label].median() for label in range(10)])
        yield "real images", images
        yield "half of each class", images[ink < medians[labels]]
        yield "1,000 images repeated", images[:1000].repeat(-(-count // 1000), 1, 1, 1)
        yield "100 images repeated", images[:100].repeat(-(-count // 100), 1, 1, 1)
        yield "no 0s", images[labels != 0]
        yield "a Gaussian a class", torch.cat([gaussian(images[labels == k], -(-count // 10), random) for k in range(10)])
        yield "one Gaussian", gaussian(images, count, random)


def gaussian(images: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Return images (count, C, H, W) from the Gaussian that has the mean and the covariance of images (N, C, H, W)."""
    pixels = images.flatten(start_dim=1).double()
    values, vectors = torch.linalg.eigh(pixels.T.cov())
    z = torch.randn(count, pixels.shape[1], generator=random, dtype=torch.double).to(pixels)
    drawn = pixels.mean(dim=0) + z * values.clamp_min(0).sqrt() @ vectors.T
    return drawn.view(count, *images.shape[1:]).to(images.dtype)


@cache
def load_digits(root: Path, device: str, *, train: bool) -> Labelled:
    """Return MNIST's training or held-out digits, uint8 (N, 1, 28, 28), with labels (N,), which all runs share."""
    DATASETS["mnist"].prepare(root)
    digits = DATASETS["mnist"].load(root, train=train)
    return Labelled(digits.images.to(device), digits.labels.to(device))


@cache
def load_measures(root: Path, device: str) -> DigitMeasures:
    """Return what compares samples with the held-out digits, which all runs share."""
    return DigitMeasures(load_digits(root, device, train=False).images)


# Points in the plane --------------------------------------------------------------------------------------------------


class Mixture:
    """Points of Gaussians of equal weight in the plane, measured by PacGAN's protocol (Lin et al. 2018, section 4.1).

    Args:
        centres: returns the Gaussians' means (K, 2).
        deviation: their standard deviation in each coordinate.
        root: of no use here.
        seed: a run's, of the points that it trains with.
        device: of points and measures.
    """

    size = 100_000
    pictured = 2_500

    def __init__(
        self, centres: Callable[[], Tensor], deviation: float, root: Path, seed: int, device: torch.device | str
    ) -> None:
        self.centres, self.deviation = centres().to(device), deviation
        self.points = self._draw(self.size, generator(seed, Stream.TRAINING_DATA))

    def __len__(self) -> int:
        return self.size

    def batch(self, rows: Tensor) -> Tensor:
        """Return the points (n, 2, 1, 1) of these rows."""
        return self.points[rows]

    def measure(self, sets: Tensor, *, whole: bool) -> list[Measured]:
        """Return `high_quality`, the fraction of samples within 3 standard deviations of a centre, and `modes`, how many
        centres are the nearest of at least one of these; where `whole` also `points`, the first samples' coordinates.
        """
        points = sets.flatten(start_dim=2).double().unsqueeze(2)  # (R, n, 1, 2)
        distances, nearest = (points - self.centres.double()).norm(dim=3).min(dim=2)  # (R, n) each
        good = (distances <= 3 * self.deviation).double()
        hits = torch.zeros(len(sets), len(self.centres), dtype=torch.double, device=sets.device).scatter_add_(1, nearest, good)
        measured = by_set({"modes": (hits > 0).sum(dim=1), "high_quality": good.mean(dim=1)})
        for entry, some in zip(measured, sets, strict=True):
            if whole:
                entry["points"] = [[round(value, 3) for value in point] for point in some[:SHOWN].flatten(start_dim=1).tolist()]
        return measured

    def references(self, count: int) -> dict[str, Measured]:
        real = self._draw(count, generator(Stream.REFERENCES))
        without = real[(real.flatten(start_dim=1) - self.centres[0]).norm(dim=1) > 10 * self.deviation]
        sets = {"real points": real, "without a mode": without}
        return {name: self.measure(points.unsqueeze(0), whole=True)[0] for name, points in sets.items()}

    def picture(self, samples: Tensor) -> Tensor:
        """Return a map (1, 112, 112) of the plane, a quarter wider than the centres, white where a sample is."""
        side, extent = 112, 1.25 * self.centres.abs().max()
        x, y = (((samples.flatten(start_dim=1) / extent + 1) * side / 2).floor().clamp(-1, side)).long().unbind(dim=1)
        inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
        picture = torch.full((1, side, side), -1.0, device=samples.device)
        picture[0, side - 1 - y[inside], x[inside]] = 1.0
        return picture

    def _draw(self, count: int, random: torch.Generator) -> Tensor:
        """Return points (count, 2, 1, 1)."""
        modes = torch.randint(len(self.centres), (count,), generator=random)
        noise = torch.randn(count, 2, generator=random)
        points = self.centres[modes.to(self.centres.device)] + self.deviation * noise.to(self.centres)
        return points.view(count, 2, 1, 1)


def ring() -> Tensor:
    """Return 8 points (8, 2) on the unit circle."""
    # Both ends of linspace(0, 2 pi, 8) are one point: so it has 7 modes in a published demonstration.
    angles = 2 * torch.pi * torch.arange(8) / 8
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def square() -> Tensor:
    """Return the points (25, 2) of a grid of 5 x 5, 2 apart, around 0."""
    steps = torch.arange(-4.0, 5.0, 2.0)
    return torch.cartesian_prod(steps, steps)


# Stacked digits -------------------------------------------------------------------------------------------------------


class Stack:
    """Stacked MNIST: a random digit in each channel, 10^channels modes (Metz et al. 2017), as PacGAN measures it.

    Each run trains with 128,000 stacks of its own, of MNIST's 60,000 training digits.

    Args:
        channels: how many digits there are in an image.
        unit_range: whether pixels are in [0, 1], as published, although G ends in tanh, which reaches from -1 to 1.
        root: folder of the data set's files.
        seed: a run's, of the stacks that it trains with.
        device: of images and measures.
    """

    size = 128_000
    pictured = 10

    def __init__(self, channels: int, unit_range: bool, root: Path, seed: int, device: torch.device | str) -> None:
        self.channels, self.unit_range = channels, unit_range
        self.digits, self.held_out = (load_digits(root, str(device), train=train) for train in (True, False))
        self.stacks = stacks(len(self.digits.images), (self.size, channels), generator(seed, Stream.TRAINING_DATA)).to(device)
        self._net = load_digit_net().to(device)

    def __len__(self) -> int:
        return self.size

    def batch(self, rows: Tensor) -> Tensor:
        return self._images(self.digits, self.stacks[rows])

    def measure(self, sets: Tensor, *, whole: bool) -> list[Measured]:
        """Return `modes`, those with at least one sample by the digit net, and `class_kl`, KL(histogram || uniform) in nats."""
        images = 2 * sets.clamp(0, 1) - 1 if self.unit_range else sets
        digits = rounded(images).flatten(start_dim=1, end_dim=2).unsqueeze(2)  # (R, n channels, 1, 28, 28)
        classes = self.classify(digits).unflatten(1, sets.shape[1:3])  # (R, n, channels)
        modes = (classes * 10 ** torch.arange(self.channels, device=sets.device)).sum(dim=-1)
        counts = class_counts(modes, 10**self.channels)
        return by_set({"modes": (counts > 0).sum(dim=1), "class_kl": kl_to_uniform(counts)})

    def references(self, count: int) -> dict[str, Measured]:
        """Return the measures of `count` stacks of held-out digits; of them also without one class."""
        labels = self.held_out.labels
        rows = stacks(len(labels), (count, self.channels), generator(Stream.REFERENCES)).to(labels.device)
        sets = {"real images": rows, "no 0s in the first channel": rows[labels[rows[:, 0]] != 0]}
        images = {name: self._images(self.held_out, some).unsqueeze(0) for name, some in sets.items()}
        return {name: self.measure(some, whole=True)[0] for name, some in images.items()}

    def classify(self, digits: Tensor) -> Tensor:
        """Return the classes int64 (R, n) that the digit net sees in sets of digits (R, n, 1, 28, 28) in [-1, 1]."""
        features = digit_features(self._net, digits)
        return self._net.logits(features.to(digits.dtype)).argmax(dim=-1)

    def picture(self, samples: Tensor) -> Tensor:
        images = 2 * samples - 1 if self.unit_range else samples
        blank = images.new_full((len(images), 3 - self.channels, 28, 28), -1)  # two channels are shown as red and green
        return grid(torch.cat([images, blank], dim=1), columns=self.pictured)

    def _images(self, digits: Labelled, rows: Tensor) -> Tensor:
        """Return the images (n, channels, 28, 28) that stack these rows int64 (n, channels) of digits."""
        images = to_minus1_1(digits.images.squeeze(1)[rows])
        return (images + 1) / 2 if self.unit_range else images


def stacks(digits: int, shape: tuple[int, int], random: torch.Generator) -> Tensor:
    """Return which of the digits, int64 (n, channels), make each of n stacks, drawn with replacement."""
    return torch.randint(digits, shape, generator=random)


TASKS: dict[str, Task] = {
    "digits": Task((1, 28, 28), 10, Digits, classes=10),
    "ring": Task((2, 1, 1), 8, partial(Mixture, ring, 0.01)),
    "grid": Task((2, 1, 1), 25, partial(Mixture, square, 0.05)),
    "stack2": Task((2, 28, 28), 100, partial(Stack, 2, False)),
    "stack3": Task((3, 28, 28), 1000, partial(Stack, 3, False)),
    "stack2_01": Task((2, 28, 28), 100, partial(Stack, 2, True)),
    "stack3_01": Task((3, 28, 28), 1000, partial(Stack, 3, True)),
}
