"""The data module: settings, batches in [-1, 1], and the same subset of images each time."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bngan import distributed
from bngan.data import ImageDataModule
from bngan.data.datasets import DATASETS
from bngan.data.loader import PictureLoader, TensorLoader
from bngan.errors import UsageError
from bngan.images import to_minus1_1
from tests.pictures import COLOUR, GREY, levels, module_of, picture, pictures


def batches_of(loader: Iterable[Any], data: ImageDataModule) -> list[tuple[Tensor, Tensor]]:
    """A loader's batches as the networks get them."""
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def test_mnist_comes_in_batches_between_minus_1_and_1(mnist_root: Path) -> None:
    data = ImageDataModule(root=str(mnist_root), batch_size=128, n_critic=3)
    data.prepare_data()
    loader = data.train_dataloader()
    assert len(loader) == 60_000 // (128 * 3)
    images, labels = next(iter(loader))
    assert images.shape == (128 * 3, *data.image_shape) == (384, 1, 28, 28)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (-1, 1)
    assert len(labels.unique()) == 10
    held_out = torch.cat([labels for _, labels in data.val_dataloader()])
    assert torch.equal(held_out, DATASETS["mnist"].load(mnist_root, train=False).labels)


def test_images_that_arrive_as_bytes_are_brought_to_minus_1_to_1() -> None:
    data, bytes_ = ImageDataModule(), torch.arange(256, dtype=torch.uint8)
    mapped, labels = data.on_after_batch_transfer([bytes_, bytes_], 0)
    assert torch.equal(mapped, to_minus1_1(bytes_))
    assert labels is bytes_
    assert data.on_after_batch_transfer([mapped, labels], 0)[0] is mapped
    assert data.on_after_batch_transfer(labels, 0) is labels  # numbers of samples


def test_image_size_resizes_a_named_data_set(mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageDataModule(root=str(mnist_root), image_size=8)
    images = data.load(train=False).images
    monkeypatch.setattr("bngan.data.module.CHUNK", 3_000)
    assert torch.equal(ImageDataModule(root=str(mnist_root), image_size=8).load(train=False).images, images)
    assert data.image_shape == (1, 8, 8)
    assert images.shape == (10_000, 1, 8, 8)
    assert images.dtype == torch.uint8
    original = ImageDataModule(root=str(mnist_root)).load(train=False).images
    # Resized with care for aliasing, each picture keeps its brightness.
    brightness = torch.stack([images.float().mean(dim=(1, 2, 3)), original.float().mean(dim=(1, 2, 3))])
    assert torch.corrcoef(brightness)[0, 1] > 0.98


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "minst"}, "unknown data set 'minst'; choose from mnist, .*, folder"),
        ({"name": "folder"}, "--data.name folder and --data.folder PATH belong together"),
        ({"folder": "pictures"}, "--data.name folder and --data.folder PATH belong together"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"predict_samples": 0}, "predict_samples must be at least 1, got 0"),
        ({"n_critic": 0}, "n_critic must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"in_memory_gb": -1.0}, "in_memory_gb must be at least 0, got -1.0"),
        ({"in_memory_gb": math.nan}, "in_memory_gb must be at least 0, got nan"),
        ({"image_size": 3}, "image_size must be at least 4, got 3"),
        ({"channels": 2}, r"channels must be 1 \(grey\) or 3 \(colour\), got 2"),
        ({"channels": 3}, "the images of mnist have 1 channel; leave --data.channels out"),
        ({"background": "black"}, "--data.background and --data.on_damaged are for --data.name folder; leave them out"),
        ({"on_damaged": "skip"}, "--data.background and --data.on_damaged are for --data.name folder; leave them out"),
        ({"background": "blau"}, "background must be a colour such as white, black or #808080, got 'blau'"),
        ({"background": ""}, "background must be a colour such as white, black or #808080, got ''"),
        ({"background": "#fff8"}, "background must be opaque, got '#fff8'; leave out how transparent it is, as in #808080"),
        ({"on_damaged": "ignore"}, "on_damaged must be refuse or skip, got 'ignore'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        ImageDataModule(**settings)
    ImageDataModule(batch_size=1, eval_batch_size=1, predict_samples=1, num_workers=0, in_memory_gb=0, image_size=4, channels=1)


def test_predict_numbers_every_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageDataModule(predict_samples=130, eval_batch_size=50)
    alone = list(data.predict_dataloader())
    assert [len(batch) for batch in alone] == [50, 50, 30]
    assert torch.equal(torch.cat(alone), torch.arange(130))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    together = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        together += list(data.predict_dataloader())
    assert torch.equal(torch.cat(together).sort().values, torch.arange(130))


@pytest.mark.parametrize("n_critic", [1, 2])
def test_ranks_that_cannot_share_an_update_equally_are_refused(
    n_critic: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they can share the images of two updates does not help."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    pictures(tmp_path, 20)
    with pytest.raises(UsageError, match=r"batch of 3 images .* by 2 devices; change --data.batch_size to a multiple of 2"):
        module_of(tmp_path, batch_size=3, n_critic=n_critic).train_dataloader()
    images, _ = next(iter(module_of(tmp_path, batch_size=4, n_critic=n_critic).train_dataloader()))
    assert len(images) == 2 * n_critic


def test_a_subset_is_drawn_at_random_but_always_the_same(tmp_path: Path) -> None:
    data = module_of(pictures(tmp_path, 40))
    assert levels(data.subset(5, train=True)) == levels(module_of(tmp_path, seed=1).subset(5, train=True)) == [2, 9, 35, 0, 37]
    train, test = (sorted(levels(data.subset(1000, train=train))) for train in (True, False))
    assert 1 <= len(test) <= 8
    assert sorted([*train, *test]) == list(range(40))


def test_a_subset_skips_the_images_of_another_one(tmp_path: Path) -> None:
    for number in range(60):
        picture(tmp_path / f"class {number % 2}" / f"{number}.png", level=number)
    data = module_of(tmp_path)
    for train in (True, False):
        everything = levels(data.subset(1000, train=train))
        for skip in (0, 3, len(everything), 1000):
            skipped, rest = levels(data.subset(skip, train=train)), levels(data.subset(1000, train=train, skip=skip))
            assert sorted([*skipped, *rest]) == sorted(everything)
            assert rest[:4] == levels(module_of(tmp_path).subset(4, train=train, skip=skip))
    rest, odd = (levels(data.subset(1000, train=True, skip=20, without=without)) for without in (None, 0))
    assert sorted(odd) == sorted(level for level in rest if level % 2)
    assert 0 < len(odd) < len(rest)


def test_labels_are_those_of_all_images(tmp_path: Path, mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        picture(tmp_path / f"class {number % 2}" / f"{number}.png", level=number)
    for train in (True, False):
        expected = module_of(tmp_path).load(train=train).labels
        data = module_of(tmp_path, in_memory_gb=0.0)
        with monkeypatch.context() as patch:
            patch.setattr("bngan.data.pictures.PicturesPart.read", lambda *_: pytest.fail("no picture need be read"))
            assert torch.equal(data.labels(train=train), expected)
    held_out = DATASETS["mnist"].load(mnist_root, train=False).labels
    assert torch.equal(ImageDataModule(root=str(mnist_root)).labels(train=False), held_out)


def test_a_subset_leaves_a_class_out(tmp_path: Path) -> None:
    for number in range(40):
        picture(tmp_path / f"class {number % 2}" / f"{number}.png", level=number)
    data = module_of(tmp_path)
    for without, left in ((0, {1}), (1, {0}), (None, {0, 1})):
        images, labels = data.subset(10, train=True, without=without)
        assert set(labels.tolist()) == left
        assert (images[:, 0, 0, 0] % 2).tolist() == labels.tolist()


@pytest.mark.parametrize("mode", [GREY, COLOUR])
def test_pictures_too_many_for_memory_give_the_same_batches(mode: str, tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / f"{number % 3}" / f"{number}.png", mode, size=(10 + number, 12))
    held, read = (module_of(tmp_path, image_size=8, batch_size=4, in_memory_gb=size) for size in (2.0, 0.0))
    for name, kinds in (("train_dataloader", [TensorLoader, PictureLoader]), ("val_dataloader", [TensorLoader, PictureLoader])):
        loaders = [getattr(data, name)() for data in (held, read)]
        assert [type(loader) for loader in loaders] == kinds
        batches = [batches_of(loader, data) for loader, data in zip(loaders, (held, read), strict=True)]
        assert len(batches[0]) == len(batches[1]) > 0
        for (images, labels), (same_images, same_labels) in zip(*batches, strict=True):
            assert images.std() > 0.1
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)


def test_pictures_are_held_in_memory_up_to_so_many_gb(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 10)  # of 64 bytes
    pictures(tmp_path / "test", 10)
    for size, kind in ((1280e-9, TensorLoader), (1279e-9, PictureLoader)):
        assert type(module_of(tmp_path, in_memory_gb=size).train_dataloader()) is kind


def test_batches_of_validation_are_bounded_by_their_size_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "train", 3)
    pictures(tmp_path / "test", 20)
    capsys.readouterr()
    monkeypatch.setattr("bngan.data.module.MAX_EVAL_BYTES", 7 * 8 * 8 * 4)  # seven pictures in float32
    for asked, expected in ((500, [7, 7, 6]), (8, [7, 7, 6]), (7, [7, 7, 6]), (4, [4] * 5)):
        data = module_of(tmp_path, eval_batch_size=asked, predict_samples=20)
        batches = [[len(batch[0]) for batch in data.val_dataloader()], [len(batch) for batch in data.predict_dataloader()]]
        assert batches == [expected, expected]
        assert ("Batches of validation have 7 images" in capsys.readouterr().out) == (asked > 7)
    monkeypatch.setattr("bngan.data.module.MAX_EVAL_BYTES", 1)
    assert len(module_of(tmp_path).val_dataloader()) == 20


def test_classes_are_those_of_training_and_held_out_images(mnist_root: Path, tmp_path: Path) -> None:
    assert ImageDataModule(root=str(mnist_root)).classes == 10
    for number, name in enumerate(("train/a/0", "train/a/1", "train/b/2", "test/a/3", "test/c/4")):
        picture(tmp_path / "sorted" / f"{name}.png", level=number)
    assert module_of(tmp_path / "sorted").classes == 3
    assert module_of(pictures(tmp_path / "loose", 5)).classes == 1
