"""Data sets, and how their images reach the networks."""

from bngan.data.module import ImageDataModule

__all__ = ["ImageDataModule"]
