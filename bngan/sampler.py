"""How samples are drawn: from which weights, normalized by which statistics, and numbered."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bngan import rng
from bngan.batchnorm.statistics import EvalStatistics, evaluation_statistics
from bngan.errors import UsageError
from bngan.images import slerp
from bngan.settings import Settings

Weights = Literal["raw", "ema"]
PRECISE_BATCHES = 64


@dataclass(frozen=True)
class Sampler:
    """A generator ready to be sampled.

    Attributes:
        network: maps latents (N, latent_dim), and labels (N,) if there are classes, to images of N rows; in evaluation.
        image_shape: (C, H, W) of the images.
        latent_dim: size of the latents.
        block: where samples are normalized by their own batch, how many are drawn together; None elsewhere.
        classes: number of classes of images that can be asked for; 0 is none.
    """

    network: nn.Module
    image_shape: tuple[int, int, int]
    latent_dim: int
    block: int | None = None
    classes: int = 0

    def generate(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents (N, latent_dim) to images (N, C, H, W) in [-1, 1].

        Where there are classes, labels int64 (N,) tell those of the images; without them, image i is of class i mod classes.
        """
        if labels is None:
            labels = self._labels(0, len(z))  # an exported network asks for them
        weight = next(self.network.parameters())
        given = () if labels is None else (labels.to(weight.device),)
        return self.network(z.to(weight.device, weight.dtype), *given).view(len(z), *self.image_shape)

    def samples(self, start: int, stop: int, seed: int = 0, label: int | None = None) -> Tensor:
        """Return the samples (stop - start, C, H, W) numbered start to stop - 1, the same however they are cut up.

        Where there are classes, all are of the class `label`; unset, sample i is of class i mod classes. Where samples are
        normalized by their own batch, sample i's batch-mates are those of its block, and all classes are among them.

        Raises:
            UsageError: if there is no such class.
        """
        self._check_label(label)
        if self.block is None:
            return self._numbered(start, stop, seed, self._labels(start, stop, label))
        first = start // self.block * self.block
        blocks = [self._draw_block(number, self.block, seed, label) for number in range(first, stop, self.block)]
        return torch.cat(blocks)[start - first : stop - first]

    def walk(self, start: int, end: int, steps: int, seed: int = 0, label: int | None = None) -> Tensor:
        """Return images (steps, C, H, W) of latents on the great circle from sample `start`'s to sample `end`'s.

        Where there are classes, all are of the class `label`; unset, of that of sample `start`. Where samples are normalized by
        their own batch, each step takes the place of sample `start` among its batch-mates, so that only the latent changes
        along the walk: the first image is sample `start`, and the last has other company than sample `end`.

        Raises:
            UsageError: if there is no such class.
        """
        self._check_label(label)
        first, last = (rng.sample_latents(number, number + 1, self.latent_dim, seed) for number in (start, end))
        latents = slerp(first, last, steps)  # (steps, latent_dim)
        own = self._labels(start, start + 1, label)  # (1,)
        if self.block is None:
            return self.generate(latents, None if own is None else own.expand(steps))
        place = start % self.block
        mates = rng.sample_latents(start - place, start - place + self.block, self.latent_dim, seed)
        labels = self._labels(start - place, start - place + self.block)
        if labels is not None and own is not None:
            labels[place] = own
        blocks = mates.repeat(steps, 1, 1)  # (steps, block, latent_dim)
        blocks[:, place] = latents
        return torch.stack([self.generate(block, labels)[place] for block in blocks])

    def _numbered(self, start: int, stop: int, seed: int, labels: Tensor | None) -> Tensor:
        """Return samples (stop - start, C, H, W) of these classes that are normalized together."""
        return self.generate(rng.sample_latents(start, stop, self.latent_dim, seed), labels)

    def _draw_block(self, first: int, size: int, seed: int, label: int | None) -> Tensor:
        """Return the block of samples (size, C, H, W) that begins at `first`."""
        stop, numbers = first + size, torch.arange(first, first + size)
        if label is None:
            return self._numbered(first, stop, seed, self._labels(first, stop))
        # Mates of its class alone would give other statistics than training's: each sample has its turn to be of the class.
        turns = [self._numbered(first, stop, seed, (numbers + shift) % self.classes) for shift in range(self.classes)]
        return torch.stack(turns)[(label - numbers) % self.classes, numbers - first]

    def _labels(self, start: int, stop: int, label: int | None = None) -> Tensor | None:
        """Return the classes int64 (stop - start,) of samples, None where there are no classes."""
        if not self.classes:
            return None
        return torch.arange(start, stop) % self.classes if label is None else torch.full((stop - start,), label)

    def _check_label(self, label: int | None) -> None:
        if label is None or 0 <= label < self.classes:
            return
        if not self.classes:
            raise UsageError(f"class {label} cannot be asked of this generator, which was trained without --model.classes")
        raise UsageError(f"there is no class {label}; this generator's are 0 to {self.classes - 1}")


@contextmanager
def sampler_of(
    generator: nn.Module,
    average: nn.Module | None,
    settings: Settings,
    batch_size: int,
    weights: Weights | None = None,
    statistics: EvalStatistics | None = None,
) -> Iterator[Sampler]:
    """Within the block give a generator ready to be sampled, without gradients; it is as before afterwards.

    Args:
        generator: the network that is trained.
        average: its moving average, if one is kept.
        settings: of both.
        batch_size: size of the batches for batch and precise.
        weights: raw for the network itself, ema for its average; unset means the average where there is one.
        statistics: what normalizes the samples: running, batch or precise; unset means the run's own policy.

    Raises:
        UsageError: if there is no average.
    """
    if weights == "ema" and average is None:
        raise UsageError("this GAN keeps no average of G's weights (ema_decay is 0); use weights raw")
    network = generator if weights == "raw" or average is None else average
    if statistics is None:
        statistics = settings.usual_statistics(averaged=network is average)
    weight = next(network.parameters())
    batches = (
        rng.normal((batch_size, settings.latent_dim), settings.seed, rng.Stream.PRECISE, number).to(weight)
        for number in range(PRECISE_BATCHES)
    )
    with evaluation_statistics(network, statistics, batches):
        block = batch_size if statistics == "batch" else None
        yield Sampler(network, settings.image_shape, settings.latent_dim, block, settings.classes)
