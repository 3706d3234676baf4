"""The networks whose features metrics compare: the pinned digit net, Inception, random filters, or anyone's own."""

import os
import pickle
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from bngan.errors import UsageError
from bngan.metrics.digit_net import load_digit_net
from bngan.metrics.random_net import RandomNet

NAMES = ("auto", "digits", "inception", "random")
ROUNDING = 1e-3
DOWNLOAD_SECONDS = 10.0  # without an answer


class Classifier(Protocol):
    """A feature net that also tells classes."""

    num_classes: int

    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, d) to class logits (N, num_classes)."""
        ...


class FeatureNet(nn.Module):
    """A frozen network with its inputs and outputs checked.

    Args:
        name: what it is called in messages and caches.
        net: maps images (N, C, H, W) in [-1, 1] to features (N, d). If it is a Classifier too, samples are counted by class.

    Attributes:
        knows_images: whether it was trained, so that the Frechet distance of its features may be called FID.
    """

    def __init__(self, name: str, net: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.net = net.requires_grad_(False)
        self.knows_images = not isinstance(net, RandomNet)
        self.num_classes: int | None = getattr(net, "num_classes", None) if hasattr(net, "logits") else None
        self.eval()

    def train(self, mode: bool = True) -> "FeatureNet":
        """Stay in evaluation mode, whatever a module that holds this one is told: features must not drift."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [-1, 1] to features (N, d).

        Raises:
            ValueError: if the images are not of that rank or range.
            UsageError: if the network's output is not a finite matrix with one row per image.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"metrics take images (N, C, H, W) in [-1, 1], not {images.dtype} of {tuple(images.shape)}")
        low, high = (float(value) for value in images.aminmax())
        if not (low >= -1 - ROUNDING and high <= 1 + ROUNDING):
            raise ValueError(f"metrics take images in [-1, 1], and these reach from {low:g} to {high:g}")
        features = self.net(images)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UsageError(f"the feature net {self.name} must return features ({len(images)}, d), but returned {got}")
        if not features.isfinite().all():
            raise UsageError(f"the feature net {self.name} must return finite features, but returned NaN or infinite ones")
        return features

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, d) to class logits (N, num_classes)."""
        return cast(Classifier, self.net).logits(features)

    def probe(self, images: Tensor) -> Tensor:
        """Return for each image (N, C, H, W) the sum (N,) of the net's outputs, weighted at random: a changed net shows."""
        outputs = self(images)
        if self.num_classes is not None:
            outputs = torch.cat([outputs, self.logits(outputs)], dim=1)
        outputs = outputs.cpu().double()
        return outputs @ torch.randn(outputs.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.double)


class Inception(nn.Module):
    """torchmetrics' Inception-v3 (2048 features) for images in [-1, 1], grey or colour; its weights are downloaded.

    Raises:
        UsageError: if the package that defines it is not installed, or its weights cannot be had or are damaged.
    """

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            with _answer_within(DOWNLOAD_SECONDS):
                self.net = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
        except ModuleNotFoundError as error:
            raise UsageError(
                "--metrics.feature inception needs the package torch-fidelity: pip install torch-fidelity"
            ) from error
        except (OSError, HTTPException) as error:
            raise UsageError(
                f"Inception's weights could not be downloaded ({error}); connect to a network, or use --metrics.feature random"
            ) from error
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UsageError(
                f"Inception's weights in {torch.hub.get_dir()}/checkpoints are damaged; delete them, to download them anew"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1 or 3, H, W) in [-1, 1] to features (N, 2048)."""
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        return self.net(pixels.expand(-1, 3, -1, -1))


@contextmanager
def _answer_within(seconds: float) -> Iterator[None]:
    """Within the block an address that does not answer for so long is given up, where Python would wait for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def choose_feature(channels: int, *, digits: bool, on_processor: bool) -> tuple[str, str]:
    """Return the name of the feature net that goes with such images, and why.

    Args:
        channels: of the images, 1 or 3.
        digits: whether they are those that the digit net knows.
        on_processor: whether there is no accelerator, without which Inception takes hours.
    """
    if digits:
        return "digits", "the images are grey digits of 28 x 28"
    if channels == 1:
        return "random", "the images are grey, and no digits of 28 x 28"
    if on_processor:
        return "random", "inception, for colour pictures, takes hours on a processor"
    try:
        Inception()
    except UsageError as error:
        return "random", f"inception, for colour pictures, cannot be had ({error})"
    return "inception", "the images are colour pictures"


def load_feature_net(name: str) -> FeatureNet:
    """Return the feature net of that name: digits, inception, random, or package.module.Class, built without arguments.

    Raises:
        UsageError: if there is none, if it cannot be built, or if its weights cannot be had or are damaged.
    """
    known = {"digits": load_digit_net, "inception": Inception, "random": RandomNet}
    return FeatureNet(name, known[name]() if name in known else _build(name))


def _build(name: str) -> nn.Module:
    """Return an object of the class package.module.Class."""
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise UsageError(
            f"unknown --metrics.feature {name!r}; choose from {', '.join(NAMES)}, or name a class: package.module.Class"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a person's own module most likely is
    try:
        kind = getattr(import_module(module_name), class_name)
    except Exception as error:  # whatever a person's own module may raise
        raise UsageError(f"--metrics.feature {name} cannot be imported ({type(error).__name__}: {error})") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UsageError(f"--metrics.feature {name} is not a torch.nn.Module class")
    try:
        return kind()
    except Exception as error:
        raise UsageError(f"--metrics.feature {name} cannot be built without arguments ({error})") from error
