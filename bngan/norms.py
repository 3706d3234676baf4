"""Norms by name. Each takes a layer and gives the modules that stand in its place, the normalized layer first.

A new norm is one function and one line in NORMS; what it is told beside the layer it may ignore.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypedDict

from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from bngan.batchnorm import GhostBatchNorm, ReferenceBatchNorm, VirtualBatchNorm
from bngan.errors import UsageError

Layer = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
Normalized = Callable[[Layer], tuple[nn.Module, ...]]


class NormSettings(TypedDict, total=False):
    """Settings of the norms that have them: eps and momentum of batch norm, and the groups of ghost batch norm."""

    eps: float
    momentum: float
    ghost_groups: int


class Norm(Protocol):
    """Puts a norm after a layer, or into it."""

    def __call__(self, layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
        """Return the modules, the layer first; eps and momentum are batch norm's, ghost_groups those of the batch."""
        ...


VIRTUAL_REFERENCE_SIZE = 64


def _channels(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def batch(layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
    kind = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
    return layer, kind(_channels(layer), eps=eps, momentum=momentum)


def reference(layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
    return layer, ReferenceBatchNorm(_channels(layer), eps=eps, momentum=momentum)


def ghost(layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
    return layer, GhostBatchNorm(_channels(layer), groups=ghost_groups, eps=eps, momentum=momentum)


def virtual(layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
    return layer, VirtualBatchNorm(_channels(layer), reference_size=VIRTUAL_REFERENCE_SIZE, eps=eps)


def none(layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
    return (layer,)


def layer(layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
    channels = _channels(layer)
    # Over an image's channels and pixels together, with one gamma and beta per channel.
    norm = nn.LayerNorm(channels) if isinstance(layer, nn.Linear) else nn.GroupNorm(num_groups=1, num_channels=channels)
    return layer, norm


def group(layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
    channels = _channels(layer)
    groups = math.gcd(channels, 16)
    # Without pixels, normalizing leaves nothing of a group of one channel, and of two only which is larger.
    while isinstance(layer, nn.Linear) and channels // groups < min(3, channels):
        groups //= 2
    return layer, nn.GroupNorm(num_groups=groups, num_channels=channels)


def instance(layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
    if isinstance(layer, nn.Linear):
        raise UsageError("instance norm needs pixels to average over; after a Linear layer use batch, layer or group")
    return layer, nn.InstanceNorm2d(_channels(layer), affine=True)


def spectral(layer: Layer, *, eps: float, momentum: float, ghost_groups: int) -> tuple[nn.Module, ...]:
    return (spectral_norm(layer),)


NORMS: dict[str, Norm] = {
    "batch": batch,
    "none": none,
    "layer": layer,
    "group": group,
    "instance": instance,
    "spectral": spectral,
    "reference": reference,
    "ghost": ghost,
    "virtual": virtual,
}

# Norms that subtract a mean per channel, which makes a bias before them useless.
CENTERING = frozenset({"batch", "reference", "ghost", "virtual", "instance"})

# Norms whose output for one example depends on the others in its batch.
BATCH_COUPLED = frozenset({"batch", "reference", "ghost"})


def find_norm(name: str, *, eps: float = 1e-5, momentum: float = 0.1, ghost_groups: int = 1) -> Normalized:
    """Return the norm of that name, with batch norm's eps and momentum and ghost's groups where it has them.

    Raises:
        UsageError: if there is none, listing those there are.
    """
    if name not in NORMS:
        raise UsageError(f"unknown norm {name!r}; choose from {', '.join(sorted(NORMS))}")
    return partial(NORMS[name], eps=eps, momentum=momentum, ghost_groups=ghost_groups)
