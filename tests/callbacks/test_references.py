"""The floor and the controls that stand beside a metric: of which images they are, and when they are found again."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from bngan.callbacks.references import blurred, cache_key, read_cache, reference_images, write_cache
from bngan.data import ImageDataModule
from tests.pictures import module_of, pictures

COUNT = 300


@pytest.fixture(scope="module")
def digits(mnist_root: Path) -> ImageDataModule:
    return ImageDataModule(root=str(mnist_root))


def test_floor_is_of_training_images_as_they_are(digits: ImageDataModule) -> None:
    floor = dict(reference_images(digits, COUNT))["floor"]
    assert torch.equal(floor, digits.subset(COUNT, train=True).images)
    assert not torch.equal(floor, digits.subset(COUNT, train=False).images)


def test_dropped_is_without_the_first_class_and_as_many(digits: ImageDataModule) -> None:
    dropped = dict(reference_images(digits, COUNT))["dropped"]
    assert len(dropped) == COUNT
    for digit in (0, 1, 9):
        assert torch.equal(dropped, digits.subset(COUNT, train=True, without=digit).images) == (digit == 0)
    assert 0 in digits.subset(COUNT, train=True).labels
    assert 0 not in digits.subset(COUNT, train=True, without=0).labels


@pytest.mark.parametrize(("kinds", "names"), [(("a",), ["floor", "blurred"]), (("a", "b"), ["floor", "dropped", "blurred"])])
def test_one_class_alone_cannot_be_dropped(kinds: Sequence[str], names: list[str], tmp_path: Path) -> None:
    for kind in kinds:
        pictures(tmp_path / kind, 20)
    found = dict(reference_images(module_of(tmp_path), COUNT))
    assert list(found) == names
    assert {images.dtype for images in found.values()} == {torch.uint8}


def test_blur_is_gaussian_of_five_pixels_and_deviation_one() -> None:
    point = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    point[0, 0, 4, 4] = 255
    # 255 exp(-(x^2 + y^2) / 2), divided by its sum over the 5 x 5 pixels
    expected = torch.zeros(9, 9, dtype=torch.uint8)
    expected[2:7, 2:7] = torch.tensor(
        [[1, 3, 6, 3, 1], [3, 15, 25, 15, 3], [6, 25, 41, 25, 6], [3, 15, 25, 15, 3], [1, 3, 6, 3, 1]]
    )
    assert torch.equal(blurred(point)[0, 0], expected)
    for kernel, sigma in ((3, 1.0), (7, 1.0), (5, 0.9), (5, 1.1)):
        assert not torch.equal(tv.gaussian_blur(point, [kernel, kernel], [sigma, sigma])[0, 0], expected)


def test_blurred_images_are_the_floors_own_and_come_in_their_order(digits: ImageDataModule) -> None:
    found = dict(reference_images(digits, COUNT))
    assert torch.equal(found["blurred"], tv.gaussian_blur(found["floor"], [5, 5], [1.0, 1.0]))
    assert not torch.equal(found["blurred"], found["floor"])
    assert torch.equal(blurred(found["floor"][200:]), found["blurred"][200:])


def test_key_tells_feature_nets_and_images_apart() -> None:
    images = torch.arange(2 * 16, dtype=torch.uint8).reshape(2, 1, 4, 4)

    def key(fingerprint: str = "net", sets: Sequence[Tensor] = (images, images)) -> str:
        return cache_key(fingerprint, sets)

    other = images.clone()
    other[0, 0, 0, 0] += 1
    assert key() == key("net", (images.clone(), images.clone()))
    others = [key("another"), key(sets=(images,)), key(sets=(images, other)), key(sets=(images, images.reshape(2, 1, 2, 8)))]
    assert len({key(), *others}) == 5


def test_what_is_written_is_read_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path, content = tmp_path / "data" / "floors.json", {"key": {"floor": {"fid": 1.5}}}
    assert read_cache(path) == {}
    write_cache(path, content)
    assert read_cache(path) == content
    assert [file.name for file in path.parent.iterdir()] == ["floors.json"]


@pytest.mark.parametrize("content", ["{damaged", "[]", "3"])
def test_damaged_file_is_told_in_a_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "floors.json"
    path.write_text(content)
    assert read_cache(path) == {}
    assert capsys.readouterr().out == f"{path} is damaged and is written anew.\n"
    path.write_text(json.dumps({"key": {}}))
    assert read_cache(path) == {"key": {}}
    assert capsys.readouterr().out == ""
