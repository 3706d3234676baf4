"""Batch normalization in GANs: train, watch, measure and test what it does."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bngan.data.module import ImageDataModule
    from bngan.gan import GAN
    from bngan.hub import TrainedGenerator, load
    from bngan.networks import ConvDiscriminator, ConvGenerator, Discriminator, Generator

__version__ = "0.2.0"

__all__ = [
    "GAN",
    "ConvDiscriminator",
    "ConvGenerator",
    "Discriminator",
    "Generator",
    "ImageDataModule",
    "TrainedGenerator",
    "load",
]

_HOMES = {
    "GAN": "bngan.gan",
    "ImageDataModule": "bngan.data.module",
    "Generator": "bngan.networks",
    "Discriminator": "bngan.networks",
    "ConvGenerator": "bngan.networks",
    "ConvDiscriminator": "bngan.networks",
    "TrainedGenerator": "bngan.hub",
    "load": "bngan.hub",
}


def __getattr__(name: str) -> object:
    # Loading torch takes seconds, which `bngan --help` should not.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bngan' has no attribute {name!r}")
