"""Features of two sets of images that overlap in part, and feature nets of somebody's own, for tests of the metrics."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bngan.metrics.pairs import FeaturePairs


class Sizes(NamedTuple):
    """How many real and fake images there are, and their features."""

    real: int
    fake: int
    features: int


SIZES = (Sizes(60, 60, 4), Sizes(203, 120, 16), Sizes(120, 203, 64))
DTYPES = (torch.float32, torch.float64)


def clouds(sizes: Sizes, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Features in [-1, 1] of two sets that overlap in part: the fakes are narrower, and lack a third of the real ones."""
    real = torch.randn(sizes.real, sizes.features, dtype=dtype)
    real[::3] += 1.5
    fake = 0.8 * torch.randn(sizes.fake, sizes.features, dtype=dtype) + 0.1
    return real.mul_(0.5).tanh(), fake.mul_(0.5).tanh()


def values_of(metric: FeaturePairs, real: Tensor, fake: Tensor) -> dict[str, float]:
    for features, is_real in ((real, True), (fake, False)):
        for part in features.split(50):
            metric.update(part, real=is_real)
    return {name: float(value) for name, value in metric.compute().items()}


class Pooled(nn.Module):
    """Somebody's own features: a picture's 16 quarters of quarters."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 4).flatten(1)


class Coloured(nn.Module):
    """Somebody's own features, of colour pictures only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(1)
