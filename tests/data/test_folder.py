"""A person's own pictures: which are found, how they are read, which are held out."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bngan.data.folder import Pictures
from bngan.errors import UsageError
from tests.pictures import COLOUR, GREY, levels, module_of, picture, pictures


@pytest.mark.parametrize(("mode", "channels"), [(GREY, 1), (COLOUR, 3)])
def test_pictures_keep_their_colours(mode: str, channels: int, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", mode)
    found = Pictures(tmp_path)
    image, label = found[0]
    assert found.image_shape == image.shape == (channels, 8, 8)
    assert (image.dtype, label) == (torch.uint8, 0)
    original = torch.from_numpy(np.array(Image.open(path)))
    assert torch.equal(image, original.reshape(8, 8, channels).permute(2, 0, 1))
    assert Pictures(tmp_path, channels=1).image_shape == (1, 8, 8)
    assert Pictures(tmp_path, channels=3)[0][0].shape == (3, 8, 8)


def test_sixteen_bit_pictures_keep_their_shades(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, _ = Pictures(tmp_path)[0]
    assert image.shape == (1, 8, 8)
    assert torch.equal(image[0].int(), torch.arange(0, 256, 4).reshape(8, 8).int())


def test_flat_folder_is_one_class_with_a_tenth_held_out(tmp_path: Path) -> None:
    data = module_of(pictures(tmp_path, 20))
    train, test = data.load(train=True), data.load(train=False)
    assert (len(train.images), len(test.images)) == (18, 2)
    assert sorted([*levels(train), *levels(test)]) == list(range(20))
    assert train.labels.tolist() == [0] * 18
    assert data.image_shape == (1, 8, 8)
    again = module_of(tmp_path, seed=1).load(train=False)
    assert levels(again) == levels(test)  # whatever the seed, or a resumed run would train on them
    for images, _ in data.train_dataloader():
        assert images.shape == (2, 1, 8, 8)
        assert images.dtype == torch.float32
        assert images.min() >= -1
        assert images.max() < -0.8  # levels up to 19 of 255


def test_a_tenth_is_held_out_the_same_in_every_version(tmp_path: Path) -> None:
    """A run that an older version began must not train on other pictures when it goes on."""
    data = module_of(pictures(tmp_path, 200, size=(2, 2)), image_size=4)
    held_out = levels(data.load(train=False))
    assert (len(held_out), len(data.load(train=True).labels)) == (20, 180)
    assert held_out == [5, 11, 22, 28, 41, 49, 59, 73, 81, 90, 103, 117, 126, 129, 143, 149, 153, 157, 189, 198]


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("cats", "dogs", "empty", ".hidden")):
        for copy in range(4 if name in ("cats", "dogs") else 0):
            picture(tmp_path / name / "deep" / f"{copy}.png", level=10 * number + copy)
    picture(tmp_path / ".hidden" / "thumbnail.png", level=200)
    (tmp_path / "empty").mkdir()
    data = module_of(tmp_path)
    both = [data.load(train=train) for train in (True, False)]
    found = {(level, label) for part in both for level, label in zip(levels(part), part.labels.tolist(), strict=True)}
    assert found == {(copy, 0) for copy in range(4)} | {(10 + copy, 1) for copy in range(4)}


def test_train_and_test_subfolders_are_used_as_they_are(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 5)
    picture(tmp_path / "test" / "a.png", level=77)
    data = module_of(tmp_path)
    assert sorted(levels(data.load(train=True))) == list(range(5))
    assert levels(data.load(train=False)) == [77]
    shutil.rmtree(tmp_path / "test")  # then train is a class like any other, and some of it is held out
    assert len(module_of(tmp_path).load(train=True).images) == 4


def test_held_out_pictures_take_the_training_pictures_colours(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 3, COLOUR)
    pictures(tmp_path / "test", 2, GREY)
    data = module_of(tmp_path)
    assert data.image_shape == (3, 8, 8)
    assert data.load(train=False).images.shape == (2, 3, 8, 8)
    assert module_of(tmp_path, channels=1).load(train=False).images.shape == (2, 1, 8, 8)


def test_held_out_pictures_of_another_size_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 3)
    pictures(tmp_path / "test", 2, size=(10, 10))
    with pytest.raises(UsageError, match=r"train have sides of 8, those in .*test of 10; give --data.image_size"):
        module_of(tmp_path).load(train=False)
    assert module_of(tmp_path, image_size=6).load(train=False).images.shape == (2, 1, 6, 6)


def test_pictures_of_different_sizes_are_refused_naming_both_and_the_remedy(tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", size=(10, 12))
    complaint = f"{first} is 8 x 8, {second} is 10 x 12; give --data.image_size 64"
    with pytest.raises(UsageError, match=complaint):
        Pictures(tmp_path)
    assert [Pictures(tmp_path, size=6)[number][0].shape for number in (0, 1)] == [(1, 6, 6)] * 2
    second.unlink()
    assert Pictures(tmp_path).image_shape == (1, 8, 8)


def test_oblong_pictures_are_refused_until_a_size_is_given(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", size=(10, 8))
    with pytest.raises(UsageError, match=f"{path} is 10 x 8, not square: give --data.image_size 64"):
        Pictures(tmp_path)
    assert Pictures(tmp_path, size=8).image_shape == (1, 8, 8)


@pytest.mark.parametrize("upright", [True, False])
def test_image_size_resizes_the_shorter_side_and_cuts_the_centre_out(upright: bool, tmp_path: Path) -> None:
    """Of a band of three equal squares, black, grey and white, the middle one is left."""
    band = np.repeat(np.repeat(np.array([[0, 100, 255]], dtype=np.uint8), 12, axis=0), 12, axis=1)
    Image.fromarray(band.T.copy() if upright else band).save(tmp_path / "a.png")
    image, _ = Pictures(tmp_path, size=6)[0]
    assert image.shape == (1, 6, 6)
    assert (image[:, 1:-1, 1:-1] == 100).all()
    enlarged, _ = Pictures(tmp_path, size=48)[0]
    assert (enlarged[:, 8:-8, 8:-8] == 100).all()


def test_smaller_pictures_have_no_aliases(tmp_path: Path) -> None:
    """Of a white stripe in every eight columns a quarter grey is left, wherever the middles of the new columns lie."""
    stripes = np.tile(np.array([0, 0, 0, 255, 255, 0, 0, 0], dtype=np.uint8), (64, 8))
    for shift in (0, 4):
        Image.fromarray(np.roll(stripes, shift, axis=1)).save(tmp_path / "a.png")
        image, _ = Pictures(tmp_path, size=8)[0]
        assert (image[..., 1:-1].int() - 64).abs().max() <= 4


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    good = picture(tmp_path / "a.png", size=(32, 32))
    content = good.read_bytes()
    bad = tmp_path / "b.png"
    bad.write_bytes(content)
    assert Pictures(tmp_path)[1][0].shape == (1, 32, 32)
    bad.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=f"{bad} is damaged .*; repair or remove it"):
        Pictures(tmp_path)[1]
    huge = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little") + 2 * (60_000).to_bytes(4, "little")
    for unreadable in (b"no picture", b"", content[:20], huge + b"\1\0\x18\0" + bytes(24)):
        bad.write_bytes(unreadable)
        with pytest.raises(UsageError, match=f"{bad} is not a picture that can be read .*; repair or remove it"):
            Pictures(tmp_path)
    with pytest.raises(UsageError, match=f"{bad} is not a picture"):
        Pictures(tmp_path, size=8)[1]


def test_a_picture_that_is_damaged_in_its_middle_is_named(tmp_path: Path) -> None:
    good = picture(tmp_path / "a.png", size=(300, 300)).read_bytes()
    chunk = good.index(b"IDAT", good.index(b"IDAT") + 4)
    (tmp_path / "b.png").write_bytes(good[:chunk] + bytes(4) + good[chunk + 4 :])
    found = Pictures(tmp_path)
    assert found[0][0].shape == (1, 300, 300)
    with pytest.raises(UsageError, match=r"b.png is damaged \(broken PNG file .*; repair or remove it"):
        found[1]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"there is no folder {tmp_path / 'absent'}; give one with pictures by --data.folder"):
        Pictures(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "class").mkdir()
    with pytest.raises(UsageError, match=f"{tmp_path} holds no pictures; png, jpg, bmp, webp and tif are found"):
        Pictures(tmp_path)
    picture(tmp_path / "class" / "a.png")
    assert len(Pictures(tmp_path)) == 1


@pytest.mark.parametrize("split", [False, True])
def test_pictures_are_looked_for_and_read_once(split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        pictures(tmp_path / part if split else tmp_path, 20)
    opened: list[str] = []
    open_picture = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_picture(path))
    data = module_of(tmp_path)
    for train in (True, False):
        from_files = data.subset(2, train=train)
        data.load(train=train)
        list(data.train_dataloader() if train else data.val_dataloader())
        before = len(opened)
        from_memory = data.subset(2, train=train)
        assert len(opened) == before
        for seen, again in zip(from_files, from_memory, strict=True):
            assert torch.equal(seen, again)
    # Once to know the size, once to read it; the first and the two for a subset, once more.
    assert len(opened) == (2 * 40 + 2 * 3 if split else 2 * 20 + 1 + 2 * 2)


def test_one_picture_is_too_few_to_train_and_hold_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(UsageError, match="holds one picture; at least 2 are needed"):
        module_of(tmp_path).load(train=True)
    picture(tmp_path / "b.png")
    data = module_of(tmp_path)
    assert [len(data.load(train=train).images) for train in (True, False)] == [1, 1]


def test_pictures_beside_subfolders_are_not_lost(tmp_path: Path) -> None:
    for name in ("a.png", "inside/b.png", "inside/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / name)
    assert len(Pictures(tmp_path)) == 3
    (tmp_path / "a.png").unlink()
    assert Pictures(tmp_path).classes == ["inside"]
    assert len(Pictures(tmp_path)) == 2
