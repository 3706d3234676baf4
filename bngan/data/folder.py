"""A person's own pictures: any file type that Pillow reads, in one folder or one folder per class."""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as tv

from bngan.data.datasets import Labelled
from bngan.errors import UsageError
from bngan.rng import generator

HELD_OUT_FRACTION, HELD_OUT_SEED = 0.1, 0

Item = TypeVar("Item")


class Pictures(ImageFolder):
    """Pictures under `folder`, as uint8 (C, H, W) with the index of their class folder, 0 where there is none.

    Args:
        folder: searched with its subfolders.
        size: side to which each picture's shorter side is resized before its centre is cut out; None keeps the native
            size, which all pictures must then share and which must be square.
        channels: 1 for grey, 3 for colour; None takes the first picture's.

    Raises:
        UsageError: if there are no pictures, if they differ in size and no size is given, or if one cannot be read.
    """

    def __init__(self, folder: Path, size: int | None = None, channels: int | None = None) -> None:
        if not folder.is_dir():
            raise UsageError(f"there is no folder {folder}; give one with pictures by --data.folder")
        try:
            super().__init__(str(folder), allow_empty=True)
        except OSError as error:
            raise UsageError(f"{folder} cannot be read ({error.strerror}); allow it, or give another --data.folder") from error
        if not self.samples:
            raise UsageError(f"{folder} holds no pictures; png, jpg, bmp, webp and tif are found, also in subfolders")
        with _opened(self.samples[0][0]) as first:
            self.channels = channels or (1 if first.mode in ("1", "L", "LA", "I") or first.mode.startswith("I;16") else 3)
            width, height = first.size
        self.resize = size is not None
        if size is None:
            self._check_one_size((width, height))
            size = width
        self.image_shape = (self.channels, size, size)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Take each subfolder as a class, or everything as one where there are none or pictures lie beside them."""
        entries = [path for path in Path(directory).iterdir() if not path.name.startswith(".")]
        loose = any(path.suffix.lower() in IMG_EXTENSIONS for path in entries if path.is_file())
        classes = [""] if loose else sorted(path.name for path in entries if path.is_dir()) or [""]
        return classes, {name: index for index, name in enumerate(classes)}

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        with _opened(path) as picture:
            try:
                image = tv.pil_to_tensor(_eight_bit(picture).convert("L" if self.channels == 1 else "RGB"))
            except (OSError, SyntaxError) as error:  # Pillow calls what is wrong within a PNG its syntax
                raise UsageError(f"{path} is damaged ({error}); repair or remove it") from error
        size = self.image_shape[-1]
        if self.resize:
            image = tv.center_crop(tv.resize(image, [size], antialias=True), [size, size])
        return image.contiguous(), label

    def _check_one_size(self, expected: tuple[int, int]) -> None:
        remedy = "give --data.image_size 64, say, and every picture is resized and its centre cut out"
        if expected[0] != expected[1]:
            raise UsageError(f"{self.samples[0][0]} is {expected[0]} x {expected[1]}, not square: {remedy}")
        for path, _ in _watched(self.samples, "looking at pictures"):
            with _opened(path) as picture:
                if picture.size != expected:
                    raise UsageError(
                        f"pictures of different sizes: {self.samples[0][0]} is {expected[0]} x {expected[1]}, {path} is "
                        f"{picture.size[0]} x {picture.size[1]}; {remedy}"
                    )


class PicturesPart(Subset[tuple[Tensor, int]]):
    """Some of a folder's pictures: those to train with, or those held out.

    Args:
        pictures: all pictures of the folder.
        rows: which of them are in this part.
    """

    def __init__(self, pictures: Pictures, rows: Sequence[int]) -> None:
        super().__init__(pictures, rows)
        self.image_shape = pictures.image_shape
        self.nbytes = len(rows) * math.prod(pictures.image_shape)
        self.labels = torch.tensor([pictures.targets[row] for row in rows], dtype=torch.long)  # (N,)

    def read(self, rows: Sequence[int]) -> Labelled:
        """Return pictures of this part, by their place in it, as uint8 (n, C, H, W), with their labels (n,)."""
        images = torch.empty(len(rows), *self.image_shape, dtype=torch.uint8)
        for target, row in zip(images, _watched(rows, "reading pictures"), strict=True):
            target.copy_(self[row][0])
        return Labelled(images, self.labels[list(rows)])


def divide(folder: Path, size: int | None, channels: int | None) -> tuple[PicturesPart, PicturesPart]:
    """Return the pictures to train with and those held out; arguments and errors are those of Pictures.

    Where there are subfolders train and test, they tell which is which. Else a tenth is held out, the same whatever a run's
    seed: a run that goes on with another one must not train on them.
    """
    if all((folder / part).is_dir() for part in ("train", "test")):
        train = Pictures(folder / "train", size, channels)
        test = Pictures(folder / "test", size, train.channels)
        if train.image_shape != test.image_shape:
            raise UsageError(
                f"pictures of different sizes: those in {train.root} have sides of {train.image_shape[-1]}, those in "
                f"{test.root} of {test.image_shape[-1]}; give --data.image_size 64, say, to bring all to one size"
            )
        return PicturesPart(train, range(len(train))), PicturesPart(test, range(len(test)))
    pictures = Pictures(folder, size, channels)
    if len(pictures) < 2:
        raise UsageError(f"{folder} holds one picture; at least 2 are needed, to train and to hold out")
    order = torch.randperm(len(pictures), generator=generator(HELD_OUT_SEED)).tolist()
    held_out = max(1, round(HELD_OUT_FRACTION * len(pictures)))
    return PicturesPart(pictures, sorted(order[held_out:])), PicturesPart(pictures, sorted(order[:held_out]))


def _watched(items: Sequence[Item], doing: str) -> Iterable[Item]:
    """Show on a terminal how far it is."""
    return track(items, description=doing, disable=not sys.stderr.isatty())


def _opened(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is not a picture that can be read ({error}); repair or remove it") from error


def _eight_bit(picture: Image.Image) -> Image.Image:
    # Pillow's own conversion turns every value above 255 of 65535 white.
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)) if picture.mode.startswith("I;16") else picture
