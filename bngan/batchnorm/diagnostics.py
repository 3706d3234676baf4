"""What batch norm does: how far batches are from the running statistics, and what the discriminator does not see."""

from collections.abc import Callable

import torch
from torch import Tensor

from bngan import rng
from bngan.batching import Batching, Logits, discriminate, of_classes
from bngan.batchnorm.statistics import BatchStatistics


def kl_to_running(batch: BatchStatistics, eps: float) -> Tensor:
    """Return how far a batch is from the running statistics before it: KL(batch || running) in nats, one a channel (C,).

    Both are taken as Gaussians whose variance is enlarged by `eps`, as the layer itself does. 0 means that evaluation mode
    would see what training mode saw. But a batch's own statistics are noisy: where all images are of one distribution and
    the running statistics are exactly its, the mean is kl_floor.
    """
    ratio = (batch.var + eps) / (batch.running_var + eps)
    shift = (batch.mean - batch.running_mean).square() / (batch.running_var + eps)
    return 0.5 * (ratio - 1 - ratio.log() + shift)


def kl_floor(batch: BatchStatistics) -> float:
    """Return what kl_to_running comes to, about, where nothing differs but by chance: 1 / n for n values per channel.

    Half of it is the batch's mean, half its variance. That is for independent values; the pixels of a convolution's channel
    are not, and their true floor is higher. The running statistics are noisy as well: with momentum m, they add m / (2 - m) of
    it.
    """
    return 1 / batch.count


# (scale, shift) of the fakes by which a discriminator is tried.
AFFINE_CHANGES = ((0.5, 0.0), (1.5, 0.0), (1.0, -0.5), (1.0, 0.5))


@torch.no_grad()
def shift_blindness(
    logits: Logits, real_images: Tensor, fake_images: Tensor, batching: Batching, fake_noise: Tensor | float = 0.0
) -> Tensor:
    """Return how little a discriminator in training mode minds fakes (N, C, H, W) that are scaled or shifted as a whole.

    1 / (1 + r), where r is the mean over AFFINE_CHANGES of how far the fakes' mean logit moves, in standard deviations of the
    logits of real and fake images: 1 means that it sees nothing of it (Johannsmeier 2022), near 0 that it sees little else.
    It is G that would change so, thus `fake_noise` is added afterwards; real images come with theirs.
    """
    real_logits, fake_logits = discriminate(logits, real_images, fake_images + fake_noise, batching)
    spread = torch.cat([real_logits, fake_logits]).std().clamp_min(torch.finfo(torch.float32).tiny)
    changed = (scale * fake_images + shift + fake_noise for scale, shift in AFFINE_CHANGES)
    moves = [
        (discriminate(logits, real_images, fakes, batching)[1].mean() - fake_logits.mean()).abs() / spread for fakes in changed
    ]
    return 1 / (1 + torch.stack(moves).mean())


@torch.no_grad()
def batch_dependence(
    logits: Callable[..., Tensor],
    real_images: Tensor,
    draw_fakes: Callable[..., Tensor],
    batching: Batching,
    batch_size: int,
    rounds: int = 8,
    labels: Tensor | None = None,
) -> Tensor:
    """Return how much a discriminator's logit of an image in training mode depends on the others in its batch.

    Each real image (N, C, H, W) is scored `rounds` times, each time with all others redrawn: batch_size - 1 real images and,
    in joint batches, the fakes draw_fakes(b) of batch b; where images are of classes labels int64 (N,), the fakes
    draw_fakes(b, own) of the classes of the real ones in their places. By one-way analysis of variance the result is
    sqrt(within / (within + between)), where `within` is the variance of an image's logit and `between` that of the images' own
    part of it: 0 if the company does not matter, 1 if it is all that matters. It falls like 1 / sqrt(batch_size).

    `rounds` copies of the images are shuffled together and cut into batches, so company is drawn without replacement from all
    of them. That makes the result too small by (batch_size - 1) / (rounds N - 1) / 2 at most: 0.8% where N is 8 batches.
    By chance it is off by up to 1 / sqrt(2 rounds N / batch_size), a standard deviation: 9% with 64 batches.

    Raises:
        ValueError: if the images are not several batches of that size.
    """
    if len(real_images) < 2 * batch_size or len(real_images) % batch_size:
        raise ValueError(f"expected several batches of {batch_size} real images, got {len(real_images)} images")
    order = torch.randperm(rounds * len(real_images), generator=rng.generator(rng.Stream.PROBE)) % len(real_images)

    def score(batch: int, chosen: Tensor) -> Tensor:
        real, own = real_images[chosen], None if labels is None else labels[chosen]
        if batching == "separate":  # where fakes are no company
            return of_classes(logits, own)(real)
        fakes = draw_fakes(batch) if own is None else draw_fakes(batch, own)
        return discriminate(of_classes(logits, own), real, fakes, batching)[0]

    scores = torch.cat([score(batch, chosen) for batch, chosen in enumerate(order.split(batch_size))])
    of_images = scores[order.argsort()].view(len(real_images), rounds)
    within = of_images.var(dim=1).mean()
    between = (of_images.mean(dim=1).var() - within / rounds).clamp_min(0)
    return (within / (within + between)).sqrt() if within > 0 else torch.zeros_like(within)
