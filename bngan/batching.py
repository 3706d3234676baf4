"""Which images share a batch in the discriminator."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Batching = Literal["joint", "separate"]
BATCHINGS: tuple[Batching, ...] = ("joint", "separate")
Logits = Callable[[Tensor], Tensor]  # from images (N, C, H, W) to logits (N, 1)


def discriminate(logits: Logits, real_images: Tensor, fake_images: Tensor, batching: Batching) -> tuple[Tensor, Tensor]:
    """Return the discriminator's logits (N, 1) of real and (M, 1) of fake images, composing its batches by policy.

    `joint` normalizes both by the statistics of their union. `separate` normalizes each by its own, which removes exactly
    what tells them apart in mean and variance: the discriminator cannot see a shift or a scale of the fakes.
    """
    if batching == "separate":
        return logits(real_images), logits(fake_images)
    both = logits(torch.cat([real_images, fake_images]))  # (N + M, 1)
    return both[: len(real_images)], both[len(real_images) :]
