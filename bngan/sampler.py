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
        network: maps latents (N, latent_dim) to images of N rows, and is in evaluation.
        image_shape: (C, H, W) of the images.
        latent_dim: size of the latents.
        block: where samples are normalized by their own batch, how many are drawn together; None elsewhere.
    """

    network: nn.Module
    image_shape: tuple[int, int, int]
    latent_dim: int
    block: int | None = None

    def generate(self, z: Tensor) -> Tensor:
        """Map latents (N, latent_dim) to images (N, C, H, W) in [-1, 1]."""
        weight = next(self.network.parameters())
        return self.network(z.to(weight.device, weight.dtype)).view(len(z), *self.image_shape)

    def samples(self, start: int, stop: int, seed: int = 0) -> Tensor:
        """Return the samples (stop - start, C, H, W) numbered start to stop - 1, the same however they are cut up.

        Where samples are normalized by their own batch, sample i's batch-mates are those of its block.
        """
        if self.block is None:
            return self.generate(rng.sample_latents(start, stop, self.latent_dim, seed))
        first = start // self.block * self.block
        blocks = [
            self.generate(rng.sample_latents(number, number + self.block, self.latent_dim, seed))
            for number in range(first, stop, self.block)
        ]
        return torch.cat(blocks)[start - first : stop - first]

    def walk(self, start: int, end: int, steps: int, seed: int = 0) -> Tensor:
        """Return images (steps, C, H, W) of latents on the great circle from sample `start`'s to sample `end`'s.

        Where samples are normalized by their own batch, each step takes the place of sample `start` among its batch-mates, so
        that only the latent changes along the walk: the first image is sample `start`, and the last has other company than
        sample `end`.
        """
        first, last = (rng.sample_latents(number, number + 1, self.latent_dim, seed) for number in (start, end))
        latents = slerp(first, last, steps)  # (steps, latent_dim)
        if self.block is None:
            return self.generate(latents)
        place = start % self.block
        mates = rng.sample_latents(start - place, start - place + self.block, self.latent_dim, seed)
        blocks = mates.repeat(steps, 1, 1)  # (steps, block, latent_dim)
        blocks[:, place] = latents
        return torch.stack([self.generate(block)[place] for block in blocks])


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
        precise = network is average and settings.ema_buffers == "precise" and settings.eval_statistics == "running"
        statistics = "precise" if precise else settings.eval_statistics
    weight = next(network.parameters())
    batches = (
        rng.normal((batch_size, settings.latent_dim), settings.seed, rng.Stream.PRECISE, number).to(weight)
        for number in range(PRECISE_BATCHES)
    )
    with evaluation_statistics(network, statistics, batches):
        yield Sampler(network, settings.image_shape, settings.latent_dim, batch_size if statistics == "batch" else None)
