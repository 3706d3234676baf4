"""Which images share a batch in the discriminator, which a pack, and of which classes they are."""

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


def of_classes(network: Callable[..., Tensor], labels: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the network's function of batches whose rows are of classes (N,), or twice that many, of the same ones again.

    So a fake is of the class of the real image in its place: both are judged, paired, and mixed as images of one class. Of many
    runs the classes are (N, R). A network without classes takes no labels, None.
    """
    return network if labels is None else lambda batch: network(batch, torch.cat([labels] * (len(batch) // len(labels))))


def pack(images: Tensor, size: int) -> Tensor:
    """Return packs (N / size, ..., size C, H, W) of images (N, ..., C, H, W): their channels together (Lin et al. 2018).

    A pack is of the images i, i + N / size, i + 2 N / size...; so ranks, each of which has the rows r, r + ranks, ..., make the
    packs that one process would. Images that fill no pack are left out.
    """
    return images if size == 1 else torch.cat(images[: len(images) // size * size].chunk(size), dim=-3)
