"""The data sets by name. A new one is a class with `image_shape`, `prepare` and `load`, and one line in DATASETS."""

import math
import os
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision import datasets

from bngan.data import mnist
from bngan.errors import UsageError

CHUNK = 10_000  # images that are turned at a time


class Labelled(NamedTuple):
    """Images uint8 (N, C, H, W) and their labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def read(self, rows: Tensor) -> "Labelled":
        """Return the images of these rows int64 (n,), with their labels."""
        return Labelled(self.images[rows], self.labels[rows])


class DataSet(Protocol):
    """Where images come from."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of its images."""
        ...

    def prepare(self, root: Path) -> None:
        """Put the files under `root`, once per machine, unless they are there; UsageError if they cannot be had."""
        ...

    def load(self, root: Path, *, train: bool) -> Labelled:
        """Read the training or the held-out images; UsageError if their files are damaged."""
        ...


class MNIST:
    """The 70,000 digits that travel inside this package."""

    image_shape = (1, 28, 28)

    def prepare(self, root: Path) -> None:
        mnist.lay_out(root)

    def load(self, root: Path, *, train: bool) -> Labelled:
        return _read_pair(root / "MNIST" / "raw", "train" if train else "t10k")


class Downloaded:
    """A data set of MNIST's format that torchvision downloads.

    Args:
        title: its name, for messages.
        folder: where under the root torchvision puts it.
        download: gets it with torchvision, given the root and whether the training images are wanted.
        parts: beginnings of the names of the training and the held-out images' files.
        transposed: whether its images lie on their side, as EMNIST's do.
        first_class: its smallest label, which becomes 0.
    """

    image_shape = (1, 28, 28)

    def __init__(
        self,
        title: str,
        folder: str,
        download: Callable[[str, bool], object],
        parts: tuple[str, str] = ("train", "t10k"),
        *,
        transposed: bool = False,
        first_class: int = 0,
    ) -> None:
        self.title, self.folder, self.download = title, folder, download
        self.parts, self.transposed, self.first_class = parts, transposed, first_class

    def prepare(self, root: Path) -> None:
        try:
            for train, part in zip((True, False), self.parts, strict=True):
                # torchvision also reads what it has downloaded, which holds a large set in memory more than once.
                if not all(path.is_file() for path in _pair(root / self.folder / "raw", part)):
                    self.download(str(root), train)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"{self.title} could not be downloaded into {root} ({error}); connect to a network, or copy the files there "
                "from a machine that has them"
            ) from error

    def load(self, root: Path, *, train: bool) -> Labelled:
        images, labels = _read_pair(root / self.folder / "raw", self.parts[not train])
        if self.transposed:
            for some in images.split(CHUNK):
                some.copy_(some.mT.contiguous())
        return Labelled(images, labels - self.first_class)


def _pair(folder: Path, part: str) -> tuple[Path, Path]:
    return folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"


def _read_pair(folder: Path, part: str) -> Labelled:
    pictures, classes = _pair(folder, part)
    images, labels = read_idx(pictures, 3).unsqueeze(1), read_idx(classes, 1).to(torch.long)
    if len(images) != len(labels):
        raise UsageError(f"{pictures} holds {len(images)} images and {classes} {len(labels)} labels; delete the wrong one")
    return Labelled(images, labels)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Return the bytes of a file of MNIST's format as uint8 in the shape that its header tells.

    They are read straight into the tensor's memory: torchvision's reader needs the size of the file three times.

    Raises:
        UsageError: if it cannot be read, is no such file, or is longer or shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            content = torch.empty(_read_shape(file, path, dimensions), dtype=torch.uint8)
            if file.readinto(content.numpy().data) != content.numel():
                raise UsageError(f"{path} is being written by another program; try again")
            return content
    except OSError as error:
        remedy = "allow it, or give another folder by --data.root"
        raise UsageError(f"{path} cannot be read ({error.strerror}); {remedy}") from error


def _read_shape(file: BufferedReader, path: Path, dimensions: int) -> list[int]:
    """Read the header, and make sure that the file is as long as it says: a damaged one may tell any size."""
    remedy = "delete it, and the next run puts it there anew"
    header = file.read(4 * (1 + dimensions))
    if len(header) < 4 * (1 + dimensions) or header[:4] != (0x800 + dimensions).to_bytes(4, "big"):
        raise UsageError(f"{path} is damaged (it does not begin like bytes in {dimensions} dimensions); {remedy}")
    shape = [int.from_bytes(header[start : start + 4], "big") for start in range(4, len(header), 4)]
    found = os.fstat(file.fileno()).st_size - len(header)
    if found != math.prod(shape):
        raise UsageError(f"{path} is damaged ({found} bytes, where its header says {math.prod(shape)}); {remedy}")
    return shape


def _emnist(split: str) -> Downloaded:
    return Downloaded(
        f"EMNIST {split}",
        "EMNIST",
        lambda root, train: datasets.EMNIST(root, split=split, train=train, download=True),
        (f"emnist-{split}-train", f"emnist-{split}-test"),
        transposed=True,
        first_class=1 if split == "letters" else 0,
    )


DATASETS: dict[str, DataSet] = {
    "mnist": MNIST(),
    "fashion_mnist": Downloaded(
        "Fashion-MNIST", "FashionMNIST", lambda root, train: datasets.FashionMNIST(root, train=train, download=True)
    ),
    "kmnist": Downloaded("KMNIST", "KMNIST", lambda root, train: datasets.KMNIST(root, train=train, download=True)),
    "emnist_letters": _emnist("letters"),
    "emnist_balanced": _emnist("balanced"),
    "emnist_digits": _emnist("digits"),
}
