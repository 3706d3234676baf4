"""What does batch norm do to the two networks at one moment of training? Each probe leaves the GAN as it was.

A probe sees real images, always the same ones, and fakes of latents that are the same in every run, both with the noise that
training has at that moment. One network is looked at, the other stands still.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from bngan.batching import discriminate, pack
from bngan.batchnorm.diagnostics import batch_dependence
from bngan.batchnorm.statistics import evaluation_statistics
from bngan.gan import GAN
from bngan.norms import BATCH_COUPLED, Layer

PROBE_BATCHES = 8
OFFSETS = (0.05, 0.1, 0.2, 0.3, 0.5)  # images reach from -1 to 1; the last is the endpoint's
SHARES_OF_BATCH = (0.125, 0.25, 0.5, 2.0)  # sizes at which the share of the mates is measured beside training's own
STEPS = (0.5, 1.0, 2.0, 4.0)
TINY = torch.finfo(torch.double).tiny
Entry = dict[str, Any]
Network = Literal["generator", "discriminator"]
NETWORKS: tuple[Network, ...] = ("generator", "discriminator")
Parameters = list[nn.Parameter]


def probe(gan: GAN, real_images: Tensor, names: Sequence[str]) -> list[Entry]:
    """Return the entries of Result.probed of these probes, on real images (PROBE_BATCHES N, C, H, W) of batches of N.

    An entry is said to be of the probe that made it, unless it names another: that of a curve, of which endpoints know nothing.
    """
    iteration = int(gan.iteration)
    found = {name: PROBES[name](gan, real_images) for name in names}
    return [{"iteration": iteration, "probe": name} | entry for name, entries in found.items() for entry in entries]


# What D says of an image ----------------------------------------------------------------------------------------------


def offset_response(gan: GAN, real_images: Tensor) -> list[Entry]:
    """Return how far the fakes' mean logit moves if 0.5 is added to all fakes, in standard deviations of all logits.

    D normalizes batches as in training. It is the mean over the batches; 0 means that D is blind to it. The same for smaller
    offsets makes the entries of `offset_curve`.
    """
    with evaluation_statistics(gan, "batch"):
        batches = enumerate(real_images.split(batch_size(gan)))
        moves = [_moves_by_offsets(gan, as_seen(gan, real, 0, number), draw_fakes(gan, number)) for number, real in batches]
    values = torch.stack(moves).mean(dim=0).tolist()  # of OFFSETS
    curve = [{"probe": "offset_curve", "offset": offset, "value": value} for offset, value in zip(OFFSETS, values, strict=True)]
    return [{"value": values[-1]}, *curve]


def _moves_by_offsets(gan: GAN, real: Tensor, fake: Tensor) -> Tensor:
    """Return how far the mean logit of fakes (N, C, H, W) moves by each of OFFSETS, in standard deviations."""
    real_logits, fake_logits = discriminate(gan.logits, real, fake, gan.settings.batching)
    moved = [discriminate(gan.logits, real, fake + offset, gan.settings.batching)[1].mean() for offset in OFFSETS]
    spread = torch.cat([real_logits, fake_logits]).std().clamp_min(torch.finfo(torch.float32).eps)
    return (torch.stack(moved) - fake_logits.mean()).abs() / spread


def mates_share(gan: GAN, real_images: Tensor) -> list[Entry]:
    """Return which share of the variance of a real image's logit is due to the others in its batch; see batch_dependence.

    With packs it is a pack's logit. Where D takes each image by itself it is exactly 0. The same in batches of other sizes,
    of which G's fakes are made as well, makes the entries of `mates_curve`.
    """
    own = batch_size(gan)
    shares = {size: _mates_share(gan, real_images[: PROBE_BATCHES * size], size) for size in (own, *other_sizes(gan))}
    curve = [{"probe": "mates_curve", "batch": size, "value": shares[size]} for size in sorted(shares)]
    return [{"value": shares[own]}, *curve]


def other_sizes(gan: GAN) -> list[int]:
    """Return the sizes of SHARES_OF_BATCH whose batches can be packed, grouped and normalized as the settings say."""
    settings = gan.settings
    groups = settings.ghost_groups if "ghost" in (settings.g_norm, settings.d_norm) else 1
    unit = 2 * settings.pack * groups * max(1, settings.minibatch_stddev)
    sizes = [int(share * batch_size(gan)) for share in SHARES_OF_BATCH]
    return [size for size in sizes if size and size % unit == 0]


def _mates_share(gan: GAN, real_images: Tensor, size: int) -> float:
    settings = gan.settings
    if settings.d_norm not in BATCH_COUPLED and not settings.minibatch_stddev:
        return 0.0
    with evaluation_statistics(gan, "batch"):
        dependence = batch_dependence(
            gan.logits,
            as_seen(gan, real_images, 0),
            lambda number: draw_fakes(gan, number, size),
            settings.batching,
            size // settings.pack,
        )
    return float(dependence) ** 2


def batch_size(gan: GAN) -> int:
    """Return how many images an update has."""
    return int(gan.normalized_together)


def draw_fakes(gan: GAN, number: int, size: int | None = None) -> Tensor:
    """Return fakes (N / pack, pack C, H, W) of the latents of that batch of N, as D sees them; N is training's by default."""
    size = size or batch_size(gan)
    return as_seen(gan, gan.generate(gan.sample_latents(number * size, (number + 1) * size)), 1, number)


def as_seen(gan: GAN, images: Tensor, *key: int) -> Tensor:
    """Return images (N, C, H, W) as D sees them (N / pack, pack C, H, W), with noise that is the same for the same key."""
    return pack(images + gan.draw_instance_noise(len(images), *key), gan.settings.pack)


# Gradients ------------------------------------------------------------------------------------------------------------


def gradient_cosine(gan: GAN, real_images: Tensor) -> list[Entry]:
    """Return the cosine of a layer's gradient before and after the layers below it took a step: of each layer, and the mean.

    It tells the internal covariate shift as Santurkar et al. 2018 define it (definition 2.1), on the same batch: 1 where what
    happens below does not turn the gradient. It is of the weights of linear layers and convolutions, but for the lowest, below
    which there is nothing; a norm's gamma and beta move with the layer before it. What a noisy norm draws is drawn anew.
    """
    entries: list[Entry] = []
    for network in NETWORKS:
        cosines = _cosines(gan, network, real_images)
        entries += [{"network": network, "layer": layer, "value": value} for layer, value in cosines.items()]
        entries.append({"network": network, "value": sum(cosines.values()) / len(cosines)})
    return entries


def _cosines(gan: GAN, network: Network, real_images: Tensor) -> dict[str, float]:
    layers = layers_of(getattr(gan, network))
    cosines: dict[str, float] = {}
    with probed_loss(gan, network, real_images) as loss:
        gradients = iter(torch.autograd.grad(loss(0), [parameter for group in layers.values() for parameter in group]))
        before = {name: [next(gradients) for _ in group] for name, group in layers.items()}
        for below, name in pairwise(layers):
            move(layers[below], adam_steps(gan, network, before[below]), 1.0)
            place, weight = next((place, weight) for place, weight in enumerate(layers[name]) if weight.ndim > 1)
            (after,) = torch.autograd.grad(loss(1), weight)
            cosines[name] = cosine(before[name][place], after)
    return cosines


def loss_range(gan: GAN, real_images: Tensor) -> list[Entry]:
    """Return how much each network's loss varies from half a step along its gradient to four: the largest less the smallest.

    (Santurkar et al. 2018, figure 4a.)
    """
    losses = {network: [loss for loss, _ in _along_gradient(gan, network, real_images)] for network in NETWORKS}
    return [{"network": network, "value": max(values) - min(values)} for network, values in losses.items()]


def predictiveness(gan: GAN, real_images: Tensor) -> list[Entry]:
    """Return how much the gradient changes from half a step along it to four, at most (Santurkar et al. 2018, figure 4b).

    It is the norm of its change, over its own norm: 0 where the gradient tells exactly what it is further on.
    """
    changes = {network: [change for _, change in _along_gradient(gan, network, real_images)] for network in NETWORKS}
    return [{"network": network, "value": max(values)} for network, values in changes.items()]


def _along_gradient(gan: GAN, network: Network, real_images: Tensor) -> list[tuple[float, float]]:
    """Return at each of STEPS a network's loss, and how far its gradient is from the first, over that one's norm."""
    parameters = [parameter for group in layers_of(getattr(gan, network)).values() for parameter in group]
    found: list[tuple[float, float]] = []
    with probed_loss(gan, network, real_images) as loss:
        gradient = torch.autograd.grad(loss(0), parameters)
        before, steps = flat(gradient), adam_steps(gan, network, gradient)
        for last, length in pairwise((0.0, *STEPS)):
            move(parameters, steps, length - last)
            value = loss(0)
            change = flat(torch.autograd.grad(value, parameters)) - before
            found.append((float(value.detach()), float(change.norm() / before.norm().clamp_min(TINY))))
    return found


@contextmanager
def probed_loss(gan: GAN, network: Network, real_images: Tensor) -> Iterator[Callable[[int], Tensor]]:
    """Within the block give a network's loss, without penalties, on one batch in training mode; afterwards all is as before.

    It is a function of the seed of what dropout and the noisy norm draw. Running statistics and what spectral norm knows of its
    singular vectors stay as they are; the network's weights may be moved.
    """
    parameters = [*getattr(gan, network).parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    devices = [gan.device] if gan.device.type == "cuda" else []
    real = as_seen(gan, real_images[: batch_size(gan)], 0, 0)

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        fake = draw_fakes(gan, 0)
        if network == "discriminator":
            return gan.loss.discriminator(*discriminate(gan.logits, real, fake.detach(), gan.settings.batching))
        return gan.loss.generator(*discriminate(gan.logits, real, fake, gan.settings.batching))

    with evaluation_statistics(gan, "batch"), torch.enable_grad(), torch.random.fork_rng(devices=devices):
        gan.train()
        for part in gan.modules():
            if isinstance(part, ParametrizationList):
                part.eval()
        try:
            yield loss
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)


def layers_of(network: nn.Module) -> dict[str, Parameters]:
    """Return the weights that are trained, by the linear layer or convolution that they are part of or that is before them.

    The layers are in the order in which they are built, which is that from the input to the output.
    """
    layers: dict[str, Parameters] = {}
    for name, part in network.named_modules():
        if isinstance(part, Layer):
            layers[name] = []
        for parameter in part.parameters(recurse=False):
            if parameter.requires_grad:
                layers[next(reversed(layers))].append(parameter)
    return layers


def adam_steps(gan: GAN, network: Network, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the step that Adam would take first, of the run's first learning rate: lr against each gradient's sign.

    It needs no memory of training, so it is the same yardstick at each look, and for runs that are trained as one.
    """
    lr = gan.settings.g_lr if network == "generator" else gan.settings.d_lr
    return [-lr * gradient.sign() for gradient in gradients]


@torch.no_grad()
def move(parameters: Parameters, steps: Sequence[Tensor], length: float) -> None:
    """Move the parameters so many steps."""
    for parameter, step in zip(parameters, steps, strict=True):
        parameter.add_(step, alpha=length)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return all values of the tensors as one vector, float64."""
    return torch.cat([tensor.flatten() for tensor in tensors]).double()


def cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine of the angle between two tensors of one shape; 0 where one of them is 0."""
    one, other = one.double(), other.double()
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(TINY))


PROBES: dict[str, Callable[[GAN, Tensor], list[Entry]]] = {
    "offset_response": offset_response,
    "mates_share": mates_share,
    "gradient_cosine": gradient_cosine,
    "loss_range": loss_range,
    "predictiveness": predictiveness,
}
