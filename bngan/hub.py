"""How do I get a trained generator, and samples from it?"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from rich.progress import track
from torch import Tensor

from bngan.batchnorm.layers import batch_norm_layers
from bngan.batchnorm.statistics import EVAL_STATISTICS, EvalStatistics
from bngan.checkpoint import load_gan
from bngan.errors import UsageError, check_at_least
from bngan.gan import GAN
from bngan.images import fitting
from bngan.run import checkpoint_of
from bngan.sampler import Weights

LARGEST_CHUNK = 500  # samples drawn at a time
CHUNK_VALUES = 4_000_000  # and their pixels' values, since G holds many times as much meanwhile
MANY_CHUNKS = 20  # that take long enough to show how far it is


def load(
    path: str | Path,
    weights: Weights | None = None,
    statistics: EvalStatistics | None = None,
    device: str | torch.device = "cpu",
) -> "TrainedGenerator":
    """Return a trained generator that is ready to be sampled, from what `bngan sample` takes, and it gives the same samples.

    Args:
        path: a checkpoint; a run's folder, which means its best checkpoint; or `last`, the newest run under runs/.
        weights: raw for G's weights, ema for their moving average; unset means the average where there is one.
        statistics: what normalizes the samples: running, batch or precise; unset means as in the run.
        device: cpu; gpu, which is whatever accelerator there is; or one of torch's, such as cuda:1.

    Raises:
        UsageError: saying what is missing, damaged, or not to be had.
    """
    found = find_device(str(device))
    return TrainedGenerator(load_gan(checkpoint_of(path)).to(found), weights, statistics)


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator in evaluation mode; nothing that it is asked for changes it.

    Attributes:
        gan: its networks, with their settings.
        weights: which of G's it samples with, as in `load`.
        statistics: what normalizes its samples, as in `load`.

    Raises:
        UsageError: if this GAN has no such weights or statistics.
    """

    gan: GAN
    weights: Weights | None = None
    statistics: EvalStatistics | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("weights", self.weights, get_args(Weights)),
            ("statistics", self.statistics, EVAL_STATISTICS),
        ):
            if value is not None and value not in allowed:
                raise UsageError(f"unknown {name} {value!r}; choose from {', '.join(allowed)}")
        if self.weights == "ema" and self.gan.generator_ema is None:
            raise UsageError("this GAN keeps no average of G's weights (ema_decay is 0); use weights raw")
        if self.statistics is not None and not any(batch_norm_layers(self.gan.generator)):
            raise UsageError("this generator has no batch norm, so statistics have no effect on it; leave them out")

    def sample(self, count: int, seed: int = 0, *, progress: bool = False) -> Tensor:
        """Return samples (count, C, H, W) in [-1, 1], float32 on the CPU.

        Sample i is the same however many are drawn; with statistics batch its batch-mates are those of its block.

        Args:
            count: how many.
            seed: of their latents.
            progress: whether to show on the terminal how far it is.

        Raises:
            UsageError: if count is below 1.
        """
        check_at_least(1, count=count)
        shape = self.gan.settings.image_shape
        images = torch.empty(count, *shape)
        with self.gan.sampler(self.weights, self.statistics) as sampler:
            chunk = sampler.block or fitting(LARGEST_CHUNK, shape, max_bytes=4 * CHUNK_VALUES)
            starts = range(0, count, chunk)
            for start in track(starts, description="sampling", disable=not progress or len(starts) < MANY_CHUNKS):
                images[start : start + chunk] = sampler.samples(start, min(start + chunk, count), seed)
        return images

    def generate(self, z: Tensor) -> Tensor:
        """Map latents (N, latent_dim), best standard normal, to images (N, C, H, W) in [-1, 1] on the generator's device."""
        with self.gan.sampler(self.weights, self.statistics) as sampler:
            return sampler.generate(z)


def find_device(name: str) -> torch.device:
    """Return the device of that name, of which gpu is whatever accelerator there is.

    Raises:
        UsageError: if this machine has none of that name.
    """
    asked, known = name.lower(), ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        kind = accelerator.type
        known += ["gpu", kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
        asked = kind if asked == "gpu" else asked
    if asked not in known:
        raise UsageError(f"device {name!r} is not on this machine, as far as torch can tell; choose from {', '.join(known)}")
    return torch.device(asked)
