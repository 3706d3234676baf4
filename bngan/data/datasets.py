"""The data sets by name. A new one is a class with `image_shape`, `prepare` and `load`, and one line in DATASETS."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision import datasets

from bngan.data import mnist


class Labelled(NamedTuple):
    """Images uint8 (N, C, H, W) and their labels int64 (N,)."""

    images: Tensor
    labels: Tensor


class DataSet(Protocol):
    """Where images come from."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of its images."""
        ...

    def prepare(self, root: Path) -> None:
        """Put the files under `root`, once per machine, unless they are there."""
        ...

    def load(self, root: Path, *, train: bool) -> Labelled:
        """Read the training or the held-out images."""
        ...


class MNIST:
    """The 70,000 digits that travel inside this package."""

    image_shape = (1, 28, 28)

    def prepare(self, root: Path) -> None:
        mnist.lay_out(root)

    def load(self, root: Path, *, train: bool) -> Labelled:
        return _labelled(datasets.MNIST(str(root), train=train))


class Downloaded:
    """A data set of MNIST's format that torchvision downloads.

    Args:
        title: its name, for messages.
        build: makes torchvision's data set from (root, train, download).
        transposed: whether its images lie on their side, as EMNIST's do.
    """

    image_shape = (1, 28, 28)

    def __init__(self, title: str, build: Callable[[str, bool, bool], datasets.MNIST], *, transposed: bool = False) -> None:
        self.title = title
        self.build = build
        self.transposed = transposed

    def prepare(self, root: Path) -> None:
        try:
            self.build(str(root), True, True)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"{self.title} could not be downloaded into {root} ({error}); connect to a network, or copy the files there "
                "from a machine that has them"
            ) from error

    def load(self, root: Path, *, train: bool) -> Labelled:
        images, labels = _labelled(self.build(str(root), train, False))
        return Labelled(images.mT.contiguous() if self.transposed else images, labels)


def _labelled(dataset: datasets.MNIST) -> Labelled:
    return Labelled(dataset.data.unsqueeze(1), dataset.targets.to(torch.long))


def _emnist(split: str) -> Downloaded:
    def build(root: str, train: bool, download: bool) -> datasets.MNIST:
        return datasets.EMNIST(root, split=split, train=train, download=download)

    return Downloaded(f"EMNIST {split}", build, transposed=True)


DATASETS: dict[str, DataSet] = {
    "mnist": MNIST(),
    "fashion_mnist": Downloaded(
        "Fashion-MNIST", lambda root, train, download: datasets.FashionMNIST(root, train=train, download=download)
    ),
    "kmnist": Downloaded("KMNIST", lambda root, train, download: datasets.KMNIST(root, train=train, download=download)),
    "emnist_letters": _emnist("letters"),
    "emnist_balanced": _emnist("balanced"),
    "emnist_digits": _emnist("digits"),
}
