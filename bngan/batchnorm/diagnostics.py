"""What batch norm does: how far batches are from the running statistics, and what the discriminator does not see."""

import torch
from torch import Tensor

from bngan.batching import Batching, Logits, discriminate
from bngan.batchnorm.layers import BatchNorm, running_statistics
from bngan.batchnorm.statistics import BatchStatistics


def kl_to_running(layer: BatchNorm, batch: BatchStatistics) -> Tensor:
    """Return how far the batch is from the running statistics: KL(batch || running) in nats, one value per channel (C,).

    Both are taken as Gaussians, as the layer itself does. 0 means that evaluation mode sees what training mode saw.
    """
    running_mean, running_var = running_statistics(layer)
    ratio = (batch.var + layer.eps) / (running_var + layer.eps)
    return 0.5 * (ratio - 1 - ratio.log() + (batch.mean - running_mean).square() / (running_var + layer.eps))


# (scale, shift) of the fakes by which a discriminator is tried.
AFFINE_CHANGES = ((0.5, 0.0), (1.5, 0.0), (1.0, -0.5), (1.0, 0.5))


@torch.no_grad()
def shift_blindness(logits: Logits, real_images: Tensor, fake_images: Tensor, batching: Batching) -> Tensor:
    """Return how little a discriminator in training mode minds fakes (N, C, H, W) that are scaled or shifted as a whole.

    1 / (1 + r), where r is the mean over AFFINE_CHANGES of how far the fakes' mean logit moves, in standard deviations of the
    logits of real and fake images: 1 means that it sees nothing of it (Johannsmeier 2022), near 0 that it sees little else.
    """
    real_logits, fake_logits = discriminate(logits, real_images, fake_images, batching)
    spread = torch.cat([real_logits, fake_logits]).std().clamp_min(torch.finfo(torch.float32).tiny)
    moves = [
        (discriminate(logits, real_images, scale * fake_images + shift, batching)[1].mean() - fake_logits.mean()).abs() / spread
        for scale, shift in AFFINE_CHANGES
    ]
    return 1 / (1 + torch.stack(moves).mean())


@torch.no_grad()
def batch_dependence(logits: Logits, real_images: Tensor, fake_images: Tensor, batching: Batching, mates: int = 4) -> Tensor:
    """Return how much a discriminator's logit of an image in training mode depends on the others in its batch.

    The first N / (mates + 1) real images are scored `mates` times, each time with as many other real images and with fakes.
    The result is the root of the share of the logits' variance that the company explains: 0 if it does not matter, 1 if it
    is all that matters.

    Raises:
        ValueError: if there are fewer than mates + 1 real images or `mates` fakes.
    """
    size = len(real_images) // (mates + 1)
    fakes = min(2 * size, len(fake_images) // mates)
    if size < 1 or fakes < 1:
        raise ValueError(f"{mates} sets of batch-mates need at least {mates + 1} real images and {mates} fakes")
    subjects, others = real_images[:size], real_images[size:].split(size)
    scored = torch.stack(
        [
            discriminate(logits, torch.cat([subjects, others[mate]]), fake_images[mate * fakes :][:fakes], batching)[0][:size]
            for mate in range(mates)
        ]
    )
    total = scored.var(unbiased=False)
    return (scored.var(dim=0, unbiased=False).mean() / total).sqrt() if total > 0 else torch.zeros_like(total)
