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
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as tv

Item = TypeVar("Item")


class Pictures(ImageFolder):
    """Pictures under `folder`, as uint8 (C, H, W) with the index of their class folder, 0 where there is none.

    Args:
        folder: searched with its subfolders.
        size: side to which each picture's shorter side is resized before its centre is cut out; None keeps the native
            size, which all pictures must then share and which must be square.
        channels: 1 for grey, 3 for colour; None takes the first picture's.

    Raises:
        ValueError: if there are no pictures, if they differ in size and no size is given, or if one cannot be read.
    """

    def __init__(self, folder: str | Path, size: int | None = None, channels: int | None = None) -> None:
        if not Path(folder).is_dir():
            raise ValueError(f"there is no folder {folder}; give one with pictures by --data.folder")
        super().__init__(str(folder), allow_empty=True)
        if not self.samples:
            raise ValueError(f"{folder} holds no pictures; png, jpg, bmp, webp and tif are found, also in subfolders")
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
            except OSError as error:
                raise ValueError(f"{path} is damaged ({error}); repair or remove it") from error
        size = self.image_shape[-1]
        if self.resize:
            image = tv.center_crop(tv.resize(image, [size], antialias=True), [size, size])
        return image.contiguous(), label

    @property
    def bytes_per_image(self) -> int:
        return math.prod(self.image_shape)

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return those pictures as uint8 (N, C, H, W), with labels int64 (N,)."""
        images = torch.empty(len(rows), *self.image_shape, dtype=torch.uint8)
        labels = torch.empty(len(rows), dtype=torch.long)
        for target, row in enumerate(_watched(rows, "reading pictures")):
            images[target], labels[target] = self[row]
        return images, labels

    def _check_one_size(self, expected: tuple[int, int]) -> None:
        remedy = "give --data.image_size 64, say, and every picture is resized and its centre cut out"
        if expected[0] != expected[1]:
            raise ValueError(f"{self.samples[0][0]} is {expected[0]} x {expected[1]}, not square: {remedy}")
        for path, _ in _watched(self.samples, "looking at pictures"):
            with _opened(path) as picture:
                if picture.size != expected:
                    raise ValueError(
                        f"pictures of different sizes: {self.samples[0][0]} is {expected[0]} x {expected[1]}, {path} is "
                        f"{picture.size[0]} x {picture.size[1]}; {remedy}"
                    )


def _watched(items: Sequence[Item], doing: str) -> Iterable[Item]:
    """Show on a terminal how far it is."""
    return track(items, description=doing, disable=not sys.stderr.isatty())


def _opened(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}); repair or remove it") from error


def _eight_bit(picture: Image.Image) -> Image.Image:
    # Pillow's own conversion turns every value above 255 of 65535 white.
    return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)) if picture.mode.startswith("I;16") else picture
