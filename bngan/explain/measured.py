"""Which numbers does the page that explains quote? All are worked out from the networks that it shows, in float64."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from bngan import rng
from bngan.batching import BATCHINGS, Batching, discriminate
from bngan.batchnorm.layers import batch_norm_layers, batch_statistics, normalize, running_statistics
from bngan.batchnorm.statistics import EvalStatistics, evaluation_statistics
from bngan.blocks import DiscriminatorNetwork, GeneratorNetwork
from bngan.metrics.digit_net import load_digit_net
from bngan.networks import Discriminator

BATCH = 128
SIZES = (2, 8, 32, 128)
ROUNDS = 10  # batches of other mates in which each of the ten latents is drawn
BRIGHTER = 0.5
TIMES = 2.0  # by which all latents of a batch are multiplied
PLUS = 1.0  # what is added to every number of all latents


@dataclass(frozen=True)
class Shown:
    """What the page shows, in float64, as the page decodes it.

    Attributes:
        generator: the source's generator, in evaluation mode.
        discriminator: its discriminator.
        latents: (128, 100), standard normal.
        real_images: (128, 784) in [-1, 1].
    """

    generator: GeneratorNetwork
    discriminator: DiscriminatorNetwork
    latents: Tensor
    real_images: Tensor

    def draw(self, latents: Tensor, statistics: EvalStatistics, first: int | None = None) -> Tensor:
        """Map latents (N, 100) to images (N, 784) in [-1, 1], or to those of the `first` so many alone."""
        with evaluation_statistics(self.generator, statistics):
            hidden = self.generator.net[:-2](latents)  # (N, 256)
            return self.generator.net[-2:](hidden[:first])

    def ten(self) -> Tensor:
        """Return for each digit 0 to 9 which of the latents the digit net most surely reads as it, int64 (10,)."""
        return _class_probabilities(self.draw(self.latents, "running")).argmax(dim=0)


def measure(shown: Shown) -> dict[str, float]:
    """Return the numbers that the text quotes, by the names that it has for them."""
    return {**_by_mates(shown), **_by_momentum(shown), **_erased(shown), **_verdicts(shown)}


def distance(images: Tensor, others: Tensor) -> float:
    """Return the root mean square difference over the pixels of images (N, 784), averaged over the images."""
    return float((images - others).square().mean(dim=1).sqrt().mean())


def _by_mates(shown: Shown) -> dict[str, float]:
    """How far an image in training mode is from the one by running statistics, and how often it is the same digit."""
    ten = shown.latents[shown.ten()]
    alone = shown.draw(ten, "running").repeat(ROUNDS, 1)  # (100, 784)
    digits = _class_probabilities(alone).argmax(dim=1)
    found = {"between": float(torch.pdist(alone[:10]).mean() / alone.shape[1] ** 0.5), "ones_2": _share_of_ones(shown)}
    for size in SIZES:
        batches = [torch.cat([latent[None], _latents(size - 1, number)]) for number in range(ROUNDS) for latent in ten]
        images = torch.cat([shown.draw(batch, "batch", first=1) for batch in batches])
        found[f"mates_{size}"] = distance(images, alone)
        if size == 8:
            found["redrawn"] = distance(images[10:], images[:-10])  # the same latents in the batches before
        found[f"same_{size}"] = float((_class_probabilities(images).argmax(dim=1) == digits).double().mean())
    return found


def _share_of_ones(shown: Shown) -> float:
    """Return which share of the first layer's z-hat lies within 0.01 of -1 or 1 where batches are of two."""
    pairs = shown.generator.net[0](shown.latents).view(2, -1)  # each column has what two latents come to in one channel
    mean, var = batch_statistics(pairs)
    _, layer = next(batch_norm_layers(shown.generator))
    return float((normalize(pairs, mean, var, layer.eps).abs() > 0.99).double().mean())


def _by_momentum(shown: Shown) -> dict[str, float]:
    """How far images by running statistics that began at mean 0 and variance 1 are from the trained ones'."""
    trained = shown.draw(shown.latents, "running")
    found = {}
    for name, momentum, batches in (("reset", 0.1, 0), ("fed_10", 0.1, 10), ("fed_100", 0.1, 100), ("fed_100_by_1", 1.0, 100)):
        generator = copy.deepcopy(shown.generator).train()
        for _, layer in batch_norm_layers(generator):
            for buffer, value in zip(running_statistics(layer), (0, 1), strict=True):
                buffer.fill_(value)
            layer.momentum = momentum
        for number in range(batches):
            generator.net[:-2](_latents(BATCH, number))  # the output layer has no part in it, and takes the most time
        found[name] = distance(generator.eval()(shown.latents), trained)
    return found


def _erased(shown: Shown) -> dict[str, float]:
    """How far images move when all latents of a batch are multiplied, or when the same is added to all."""
    changes = {"times": TIMES * shown.latents, "plus": shown.latents + PLUS}
    found = {}
    for statistics in ("batch", "running"):
        images = shown.draw(shown.latents, statistics)
        found |= {f"{name}_{statistics}": distance(shown.draw(z, statistics), images) for name, z in changes.items()}
    return found


def _verdicts(shown: Shown) -> dict[str, float]:
    """D's mean logit for fakes as drawn, brighter and darker; how far those move that are made brighter; and its slope."""
    fake = shown.draw(shown.latents, "batch")
    found = {}
    for count in (1, 64, 120, BATCH):
        some = torch.cat([fake[:count] + BRIGHTER, fake[count:]])
        before, after = (_logits(shown, shown.discriminator, images, "separate")[:count].mean() for images in (fake, some))
        found[f"moved_{count}"] = float(after - before)
    changes = {"before": 0.0, "brighter": BRIGHTER, "darker": -BRIGHTER}
    for name, brightness in changes.items():
        found[f"joint_{name}"] = float(_logits(shown, shown.discriminator, fake + brightness, "joint").mean())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = Discriminator().double()
    found["separate_move"] = abs(found[f"moved_{BATCH}"])
    found["untrained_move"] = _move(shown, untrained, fake)
    return found | {f"{batching}_slope": _slope(shown, fake, batching) for batching in BATCHINGS}


def _move(shown: Shown, network: DiscriminatorNetwork, fake: Tensor) -> float:
    """Return how far a discriminator's mean logit for fakes (128, 784) moves where all get brighter, separately."""
    before, after = (_logits(shown, network, images, "separate").mean() for images in (fake, fake + BRIGHTER))
    return abs(float(after - before))


def _slope(shown: Shown, fake: Tensor, batching: Batching) -> float:
    """Return how fast the fakes' mean logit changes with their common brightness, either way: what G can learn of it."""
    brightness = torch.zeros((), dtype=fake.dtype, requires_grad=True)
    with torch.enable_grad():
        logit = _logits(shown, shown.discriminator, fake + brightness, batching).mean()
    (slope,) = torch.autograd.grad(logit, brightness)
    return abs(float(slope))


def _logits(shown: Shown, network: DiscriminatorNetwork, fake: Tensor, batching: Batching) -> Tensor:
    """Return a discriminator's logits (N, 1) for fakes (N, 784), normalized as in training."""
    with evaluation_statistics(network, "batch"), torch.set_grad_enabled(fake.requires_grad):
        return discriminate(network.logits, shown.real_images, fake, batching)[1]


def _class_probabilities(images: Tensor) -> Tensor:
    """Return the digit net's probabilities (N, 10) for images (N, 784)."""
    net = load_digit_net()
    return net.logits(net(images.float().view(-1, 1, 28, 28))).softmax(dim=1)


def _latents(count: int, batch: int) -> Tensor:
    """Return latents (count, 100) of a batch by its number."""
    return rng.normal((count, 100), rng.Stream.PROBE, batch).double()
