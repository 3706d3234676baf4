"""Norms by name. Each takes a layer and gives the modules that stand in its place, the normalized layer first.

A new norm is one function and one line in NORMS; it may ignore the settings.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bngan.batchnorm.layers import (
    BatchNorm,
    ConditionalBatchNorm,
    CovariateShift,
    GhostBatchNorm,
    ReferenceBatchNorm,
    VirtualBatchNorm,
)
from bngan.errors import UsageError
from bngan.spectral import spectral_norm

Layer = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
Modules = tuple[nn.Module, ...]


@dataclass(frozen=True)
class NormSettings:
    """Settings for the norms that have them.

    Attributes:
        eps: what batch norm adds to the variance.
        momentum: weight of the new batch in batch norm's running statistics.
        ghost_groups: groups of the batch that ghost batch norm normalizes, each by itself.
        classes: number of classes that have a gamma and a beta each; 0 is one for all images.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    ghost_groups: int = 1
    classes: int = 0


DEFAULT_NORM_SETTINGS = NormSettings()
VIRTUAL_REFERENCE_SIZE = 64


def _channels(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def batch(layer: Layer, settings: NormSettings) -> Modules:
    kind = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
    norm = kind(_channels(layer), eps=settings.eps, momentum=settings.momentum, affine=not settings.classes)
    return layer, _by_class(norm, settings)


def reference(layer: Layer, settings: NormSettings) -> Modules:
    channels, affine = _channels(layer), not settings.classes
    norm = ReferenceBatchNorm(channels, eps=settings.eps, momentum=settings.momentum, affine=affine)
    return layer, _by_class(norm, settings)


def _by_class(norm: BatchNorm, settings: NormSettings) -> nn.Module:
    return ConditionalBatchNorm(norm, classes=settings.classes) if settings.classes else norm


def ghost(layer: Layer, settings: NormSettings) -> Modules:
    return layer, GhostBatchNorm(_channels(layer), groups=settings.ghost_groups, eps=settings.eps, momentum=settings.momentum)


def noisy(layer: Layer, settings: NormSettings) -> Modules:
    return *batch(layer, settings), CovariateShift()


def virtual(layer: Layer, settings: NormSettings) -> Modules:
    return layer, VirtualBatchNorm(_channels(layer), reference_size=VIRTUAL_REFERENCE_SIZE, eps=settings.eps)


def none(layer: Layer, settings: NormSettings) -> Modules:
    return (layer,)


def layer(layer: Layer, settings: NormSettings) -> Modules:
    channels = _channels(layer)
    # Over an image's channels and pixels together, with one gamma and beta per channel.
    norm = nn.LayerNorm(channels) if isinstance(layer, nn.Linear) else nn.GroupNorm(num_groups=1, num_channels=channels)
    return layer, norm


def group(layer: Layer, settings: NormSettings) -> Modules:
    channels = _channels(layer)
    groups = math.gcd(channels, 16)
    # Without pixels, normalizing leaves nothing of a group of one channel, and of two only which is larger.
    while isinstance(layer, nn.Linear) and channels // groups < min(3, channels):
        groups //= 2
    if groups == channels and layer.bias is not None:
        layer.bias.requires_grad_(False)  # a group of one channel is centered as instance norm centers it; see find_norm
    return layer, nn.GroupNorm(num_groups=groups, num_channels=channels)


def instance(layer: Layer, settings: NormSettings) -> Modules:
    if isinstance(layer, nn.Linear):
        raise UsageError("instance norm needs pixels to average over; after a Linear layer use batch, layer or group")
    return layer, nn.InstanceNorm2d(_channels(layer), affine=True)


def spectral(layer: Layer, settings: NormSettings) -> Modules:
    return (spectral_norm(layer),)


NORMS = {
    "batch": batch,
    "none": none,
    "layer": layer,
    "group": group,
    "instance": instance,
    "spectral": spectral,
    "reference": reference,
    "ghost": ghost,
    "noisy": noisy,
    "virtual": virtual,
}

# Norms that subtract a mean per channel, which makes a bias before them useless.
CENTERING = frozenset({"batch", "reference", "ghost", "noisy", "virtual", "instance"})

# Norms whose output for one example depends on the others in its batch.
BATCH_COUPLED = frozenset({"batch", "reference", "ghost", "noisy"})


# Norms that have a conditional form.
CONDITIONAL = frozenset({"batch", "reference"})


def find_norm(name: str, settings: NormSettings = DEFAULT_NORM_SETTINGS) -> Callable[[Layer], Modules]:
    """Return the norm of that name, with these settings where it has them.

    The bias of a layer before a norm that subtracts the mean is frozen at its start: its gradient is 0 but for rounding, which
    Adam would amplify.

    Raises:
        UsageError: if there is none, or it has no form for classes, listing those there are.
    """
    if name not in NORMS:
        raise UsageError(f"unknown norm {name!r}; choose from {', '.join(sorted(NORMS))}")
    if settings.classes and name not in CONDITIONAL:
        raise UsageError(
            f"norm {name!r} has no gamma and beta for each class, by which G tells its {settings.classes} classes apart; use "
            f"--model.g_norm {' or '.join(sorted(CONDITIONAL))}, or --model.classes 0"
        )

    def normalized(layer: Layer) -> Modules:
        if name in CENTERING and layer.bias is not None:
            layer.bias.requires_grad_(False)
        return NORMS[name](layer, settings)

    return normalized
