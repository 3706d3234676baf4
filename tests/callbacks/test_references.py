"""The floor and the controls that stand beside a metric: of which images they are, and when they are found again."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from bngan.callbacks.references import (
    Entry,
    blurred,
    cache_key,
    count_comparable,
    is_same_net,
    read_cache,
    real_images,
    reference_images,
    write_cache,
)
from bngan.data import ImageDataModule
from bngan.images import to_minus1_1
from bngan.metrics.features import load_feature_net
from tests.pictures import module_of, pictures

COUNT = 300


@pytest.fixture(scope="module")
def digits(mnist_root: Path) -> ImageDataModule:
    return ImageDataModule(root=str(mnist_root))


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_a_test_compares_with_held_out_images_and_the_first_training_images(digits: ImageDataModule) -> None:
    assert torch.equal(real_images(digits, COUNT, held_out=True), digits.subset(COUNT, train=False).images)
    found = dict(reference_images(digits, COUNT, held_out=True))
    assert torch.equal(found["floor"], digits.subset(COUNT, train=True).images)
    assert torch.equal(found["dropped"], digits.subset(COUNT, train=True, without=0).images)


def test_training_compares_with_training_images_that_neither_floor_nor_controls_have(digits: ImageDataModule) -> None:
    real = real_images(digits, COUNT, held_out=False)
    assert torch.equal(real, digits.subset(COUNT, train=True).images)
    training, held_out = (rows(digits.load(train=train).images) for train in (True, False))
    found = dict(reference_images(digits, COUNT, held_out=False))
    for name in ("floor", "dropped", "repeated"):
        assert rows(found[name]) <= training - held_out
        assert not rows(found[name]) & rows(real)
        assert rows(dict(reference_images(digits, COUNT, held_out=True))[name]) & rows(real), "as a test's do"


@pytest.mark.parametrize("held_out", [True, False])
def test_every_set_has_the_same_number_of_images(held_out: bool, digits: ImageDataModule) -> None:
    found = dict(reference_images(digits, COUNT, held_out=held_out))
    assert list(found) == ["floor", "dropped", "blurred", "repeated"]
    for images in (*found.values(), real_images(digits, COUNT, held_out=held_out)):
        assert images.dtype == torch.uint8
        assert images.shape == (COUNT, 1, 28, 28)


def test_dropped_is_without_the_first_class(digits: ImageDataModule) -> None:
    images, labels = digits.load(train=True)
    zeros, ones = (rows(images[labels == digit]) for digit in (0, 1))
    found = dict(reference_images(digits, COUNT, held_out=False))
    assert not rows(found["dropped"]) & zeros
    assert rows(found["dropped"]) & ones
    assert rows(found["floor"]) & zeros


@pytest.mark.parametrize(("others", "is_there"), [(0, False), (19, False), (20, True)])
def test_dropped_is_left_out_where_the_other_classes_have_too_few_images(others: int, is_there: bool, tmp_path: Path) -> None:
    pictures(tmp_path / "train" / "cats", 90)
    pictures(tmp_path / "train" / "dogs", others)
    pictures(tmp_path / "test", 20)
    found = dict(reference_images(module_of(tmp_path), 20, held_out=True))
    assert ("dropped" in found) == is_there
    assert [name for name in found if name != "dropped"] == ["floor", "blurred", "repeated"]


@pytest.mark.parametrize(("count", "different"), [(33, 1), (250, 2), (10_000, 100), (20_000, 100)])
def test_repeated_is_a_hundredth_of_the_floor_or_100_images(count: int, different: int, digits: ImageDataModule) -> None:
    found = dict(reference_images(digits, count, held_out=True))
    assert torch.equal(found["repeated"][:different], found["floor"][:different])
    _, times = found["repeated"].unique(dim=0, return_counts=True)
    assert len(times) == different
    assert times.sum() == count
    assert times.max() - times.min() <= 1


@pytest.mark.parametrize(
    ("training", "held_out", "in_training", "in_test"), [(41, 6, 20, 6), (40, 100, 20, 40), (12, 1, 6, 1), (1, 4, 0, 1)]
)
def test_as_many_can_be_compared_as_leave_as_many_for_the_floor(
    training: int, held_out: int, in_training: int, in_test: int, tmp_path: Path
) -> None:
    pictures(tmp_path / "train", training)
    data = module_of(pictures(tmp_path / "test", held_out).parent)
    assert count_comparable(data, held_out=False) == in_training
    assert count_comparable(data, held_out=True) == in_test


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
    found = dict(reference_images(digits, COUNT, held_out=False))
    assert torch.equal(found["blurred"], tv.gaussian_blur(found["floor"], [5, 5], [1.0, 1.0]))
    assert not torch.equal(found["blurred"], found["floor"])
    assert torch.equal(blurred(found["floor"][200:]), found["blurred"][200:])


def test_key_tells_settings_and_images_apart() -> None:
    images = torch.arange(2 * 16, dtype=torch.uint8).reshape(2, 1, 4, 4)

    def key(settings: str = "net", sets: Sequence[Tensor] = (images, images)) -> str:
        return cache_key(settings, sets)

    other = images.clone()
    other[0, 0, 0, 0] += 1
    assert key() == key("net", (images.clone(), images.clone()))
    others = [key("another"), key(sets=(images,)), key(sets=(images, other)), key(sets=(images, images.reshape(2, 1, 2, 8)))]
    assert len({key(), *others}) == 5


def test_probes_of_one_net_differ_by_rounding_alone() -> None:
    probe = torch.tensor([3.0, -0.5, 1e-6, 2.0])
    rounded = probe + 2e-5 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert is_same_net(probe.tolist(), rounded.tolist())
    assert is_same_net([0.0, 0.0], [0.0, 0.0])
    for other in (3 * probe, -probe, probe + torch.tensor([0.0, 0.0, 1e-3, 0.0])):
        assert not is_same_net(probe.tolist(), other.tolist())


def test_probe_of_the_digit_net_is_the_same_on_any_number_of_threads(digits: ImageDataModule) -> None:
    images = to_minus1_1(digits.subset(16, train=False).images)
    threads, probes = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        probes.append(load_feature_net("digits").probe(images).tolist())
    torch.set_num_threads(threads)
    assert is_same_net(*probes)
    assert not is_same_net(probes[0], load_feature_net("digits").probe(-images).tolist())


def test_what_is_written_is_read_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path, content = tmp_path / "data" / "floors.json", {"key": Entry(probe=[0.5], references={"floor": {"fid": 1.5}})}
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
    entry = {"probe": [0.5], "references": {"floor": {"fid": 1.5}}}
    path.write_text(json.dumps({"key": entry, "of version 0.1": {"floor": {"fid": 1.5}}, "odd": 3}))
    assert read_cache(path) == {"key": entry}
    assert capsys.readouterr().out == ""
