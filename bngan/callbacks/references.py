"""What stands beside a metric of samples: what real training images get in their place, whole (the floor) and spoilt.

These values depend on the data and the feature net alone, so they are worked out once and kept in the data's folder.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from bngan.data import ImageDataModule
from bngan.files import write_whole

# Raised when the same key would stand for other numbers.
FLOORS_VERSION = 2
BLUR_KERNEL, BLUR_SIGMA = 5, 1.0  # pixels
BLURRED_AT_ONCE = 100
REPEATED = 100  # images
PROBE_TOLERANCE = 1e-4  # of the largest number; another device or number of threads moves them by 1e-6

Values = dict[str, float]
References = dict[str, Values]  # of the floor and of each control, by name


class Entry(TypedDict):
    """What the cache holds by a key: the references, and FeatureNet.probe of the net that they were measured with."""

    probe: list[float]
    references: References


def count_comparable(data: ImageDataModule, *, held_out: bool) -> int:
    """Return how many real images samples can be compared with, so that as many training images are left for the floor."""
    training = len(data.labels(train=True))
    return min(len(data.labels(train=False)), training) if held_out else training // 2


def real_images(data: ImageDataModule, count: int, *, held_out: bool) -> Tensor:
    """Return the images uint8 (count, C, H, W) that samples are compared with, held-out or training ones."""
    return data.subset(count, train=not held_out).images


def reference_images(data: ImageDataModule, count: int, *, held_out: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the images, uint8 (count, C, H, W), of the floor and of each control, none of them in real_images.

    `floor` has training images as they are, and the controls what a good metric notices: `dropped`, where the other classes
    have enough images, has none of the first class, `blurred` has the floor's images blurred, and `repeated` has a hundredth
    of them, at most 100, again and again.
    """
    skip = 0 if held_out else count
    floor = data.subset(count, train=True, skip=skip).images
    yield "floor", floor
    dropped = data.subset(count, train=True, skip=skip, without=int(data.labels(train=True).min())).images
    if len(dropped) == count:
        yield "dropped", dropped
    yield "blurred", blurred(floor)
    yield "repeated", floor[torch.arange(count) % min(REPEATED, max(1, count // 100))]


def blurred(images: Tensor) -> Tensor:
    """Return the images (N, C, H, W) under a Gaussian blur, worked out some at a time: it takes many times their memory."""
    result = torch.empty_like(images)
    for target, some in zip(result.split(BLURRED_AT_ONCE), images.split(BLURRED_AT_ONCE), strict=True):
        target.copy_(tv.gaussian_blur(some, [BLUR_KERNEL, BLUR_KERNEL], [BLUR_SIGMA, BLUR_SIGMA]))
    return result


def cache_key(settings: str, sets: Iterable[Tensor]) -> str:
    """Return a digest of the settings that the values depend on and of the sets of images uint8 (N, C, H, W)."""
    digest = hashlib.sha256(f"{FLOORS_VERSION} {settings}".encode())
    for images in sets:
        digest.update(str(tuple(images.shape)).encode())
        digest.update(images.numpy().data)
    return digest.hexdigest()


def is_same_net(probe: Sequence[float], other: Sequence[float]) -> bool:
    """Tell whether two probes of the same images come from the same feature net."""
    tolerance = PROBE_TOLERANCE * max(map(abs, probe))
    return all(abs(a - b) <= tolerance for a, b in zip(probe, other, strict=True))


def read_cache(path: Path) -> dict[str, Entry]:
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
    # Entries of earlier versions are of no use.
    return {
        key: Entry(probe=entry["probe"], references=entry["references"])
        for key, entry in content.items()
        if isinstance(entry, dict) and {"probe", "references"} <= entry.keys()
    }


def write_cache(path: Path, content: dict[str, Entry]) -> None:
    """Write the file, so that a reader finds it whole; print it if that is not possible."""
    try:
        write_whole(path, f"{json.dumps(content, indent=2)}\n".encode())
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}), so the next run works the floors out again.", flush=True)
