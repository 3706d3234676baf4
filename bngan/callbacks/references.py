"""What stands beside a metric of samples: what real training images get in their place, whole (the floor) and spoilt.

These values depend on the data and the feature net alone, so they are worked out once and kept in the data's folder.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from bngan.data import ImageDataModule

# Raised when the same key would stand for other numbers.
FLOORS_VERSION = 1
BLUR_KERNEL, BLUR_SIGMA = 5, 1.0  # pixels
BLURRED_AT_ONCE = 100

Values = dict[str, float]
References = dict[str, Values]  # of the floor and of each control, by name


def reference_images(data: ImageDataModule, count: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the images, uint8 (count, C, H, W) or fewer where there are fewer, of the floor and the controls.

    `floor` has training images as they are, and the controls what a good metric notices: `dropped`, where there are classes,
    has none of the first class, and `blurred` has the floor's images blurred.
    """
    training = data.subset(count, train=True)
    yield "floor", training.images
    classes = training.labels.unique()  # sorted
    if len(classes) > 1:
        yield "dropped", data.subset(count, train=True, without=int(classes[0])).images
    yield "blurred", blurred(training.images)


def blurred(images: Tensor) -> Tensor:
    """Return the images (N, C, H, W) under a Gaussian blur, worked out some at a time: it takes many times their memory."""
    result = torch.empty_like(images)
    for target, some in zip(result.split(BLURRED_AT_ONCE), images.split(BLURRED_AT_ONCE), strict=True):
        target.copy_(tv.gaussian_blur(some, [BLUR_KERNEL, BLUR_KERNEL], [BLUR_SIGMA, BLUR_SIGMA]))
    return result


def cache_key(fingerprint: str, sets: Iterable[Tensor]) -> str:
    """Return a digest of the feature net, by its fingerprint, and of the sets of images uint8 (N, C, H, W)."""
    digest = hashlib.sha256(f"{FLOORS_VERSION} {fingerprint}".encode())
    for images in sets:
        digest.update(str(tuple(images.shape)).encode())
        digest.update(images.numpy().data)
    return digest.hexdigest()


def read_cache(path: Path) -> dict[str, References]:
    """Return what the file holds by key, nothing where it is missing or, as is then printed, cannot be used."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        print(f"{path} cannot be read ({error.strerror}), so floors are worked out anew.", flush=True)
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        print(f"{path} is damaged and is written anew.", flush=True)
        return {}
    return content


def write_cache(path: Path, content: dict[str, References]) -> None:
    """Write the file, so that a reader finds it whole; print it if that is not possible."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}), so the next run works the floors out again.", flush=True)
