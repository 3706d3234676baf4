"""Writes small pictures for tests to read."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bngan.data import ImageDataModule
from bngan.data.datasets import Labelled
from bngan.data.pictures import Pictures

GREY, COLOUR = "L", "RGB"
WHITE = (255, 255, 255)


def picture(path: Path, mode: str = GREY, size: tuple[int, int] = (8, 8), level: int | None = None) -> Path:
    """Write a picture of one level, or of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    shape = (height, width) if mode == GREY else (height, width, 3)
    pixels = torch.randint(0, 256, shape) if level is None else torch.full(shape, level)
    Image.fromarray(pixels.numpy().astype(np.uint8)).save(path)
    return path


def pictures(folder: Path, count: int, mode: str = GREY, size: tuple[int, int] = (8, 8)) -> Path:
    """Fill a folder with pictures, each of the level that is its number."""
    for number in range(count):
        picture(folder / f"{number:03d}.png", mode, size, level=number)
    return folder


def module_of(folder: Path, **settings: Any) -> ImageDataModule:
    """The data module of the pictures in a folder."""
    return ImageDataModule("folder", folder=str(folder), **{"batch_size": 2, "num_workers": 0, **settings})


def found_in(folder: Path, size: int | None = None, channels: int | None = None) -> Pictures:
    """The pictures in a folder, before they are read."""
    return Pictures(folder, size, channels, WHITE)


def levels(labelled: Labelled) -> list[int]:
    """The level of each picture of one level."""
    return labelled.images[:, 0, 0, 0].tolist()
