"""A folder of pictures as a data set: of one shape, in the right parts, the damaged ones named, read once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bngan.data.loader import PictureLoader, ShardedBatches
from bngan.data.pictures import NAMED
from bngan.errors import UsageError
from tests.pictures import COLOUR, GREY, found_in, levels, module_of, picture, pictures


def damage(path: Path) -> Path:
    """Cut off a picture's end."""
    content = picture(path, size=(32, 32)).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def test_flat_folder_is_one_class_with_a_part_held_out(tmp_path: Path) -> None:
    data = module_of(pictures(tmp_path, 40))
    train, test = data.load(train=True), data.load(train=False)
    assert sorted([*levels(train), *levels(test)]) == list(range(40))
    assert 1 <= len(test.images) <= 8
    assert set(train.labels.tolist()) == {0}
    assert data.image_shape == (1, 8, 8)
    assert levels(module_of(tmp_path, seed=1).load(train=False)) == levels(test)
    for images, _ in data.train_dataloader():
        assert images.shape == (2, 1, 8, 8)
        assert images.dtype == torch.float32
        assert images.min() >= -1
        assert images.max() < -0.6  # levels up to 39 of 255


def test_pictures_have_the_labels_of_their_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("cats", "dogs")):
        for copy in range(4):
            picture(tmp_path / name / f"{copy}.png", level=10 * number + copy)
    for in_memory_gb in (0.0, 2.0):
        data = module_of(tmp_path, in_memory_gb=in_memory_gb)
        both = [data.load(train=train) for train in (True, False)]
        found = {(level, label) for part in both for level, label in zip(levels(part), part.labels.tolist(), strict=True)}
        assert found == {(copy, 0) for copy in range(4)} | {(10 + copy, 1) for copy in range(4)}


def test_pictures_in_folders_of_their_own_are_held_out(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 5)
    picture(tmp_path / "Valid" / "a.png", level=77)
    data = module_of(tmp_path)
    assert sorted(levels(data.load(train=True))) == list(range(5))
    assert levels(data.load(train=False)) == [77]


@pytest.mark.parametrize("first", [COLOUR, GREY])
def test_all_are_in_colour_if_any_is(first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(4):
        picture(tmp_path / f"{number}.png", first if number == 0 else {COLOUR: GREY, GREY: COLOUR}[first])
    colour, grey = (1, 3) if first == COLOUR else (3, 1)
    assert module_of(tmp_path).load(train=True).images.shape == (3, 3, 8, 8)
    line = f"{colour} colour and {grey} grey pictures: all are taken as colour (--data.channels 1 for grey)\n"
    assert capsys.readouterr().out == line
    for channels in (1, 3):
        assert module_of(tmp_path, channels=channels).load(train=True).images.shape == (3, channels, 8, 8)
    assert capsys.readouterr().out == ""


def test_colours_are_judged_over_both_parts(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 3, GREY)
    pictures(tmp_path / "test", 2, COLOUR)
    data = module_of(tmp_path)
    assert data.image_shape == (3, 8, 8)
    assert data.load(train=True).images.shape == (3, 3, 8, 8)


def test_deep_pictures_are_scaled_alike(tmp_path: Path) -> None:
    for name, level in (("a", 1000), ("b", 4000)):
        Image.fromarray(np.full((8, 8), level, dtype=np.uint16)).save(tmp_path / f"{name}.png")
    data = module_of(tmp_path)
    assert sorted(levels(data.load(train=True)) + levels(data.load(train=False))) == [1000 >> 4, 4000 >> 4]


def test_the_background_is_as_given(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / f"{name}.png")
    for background, expected in (("white", [255] * 3), ("black", [0] * 3), ("#102030", [16, 32, 48])):
        assert module_of(tmp_path, background=background).load(train=True).images[0, :, 0, 0].tolist() == expected


def test_pictures_of_different_sizes_are_refused_naming_both_and_the_remedy(tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", size=(10, 12))
    with pytest.raises(UsageError, match=f"{first} is 8 x 8, {second} is 10 x 12; give --data.image_size 64"):
        found_in(tmp_path)
    assert [found_in(tmp_path, size=6)[number][0].shape for number in (0, 1)] == [(1, 6, 6)] * 2
    picture(tmp_path / "b.png")
    assert found_in(tmp_path).image_shape == (1, 8, 8)


def test_oblong_pictures_are_refused_until_a_size_is_given(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6  # stored lying
    for name in "ab":
        Image.new("L", (10, 8)).save(tmp_path / f"{name}.jpg", exif=exif)
    with pytest.raises(UsageError, match=r"[ab].jpg is 8 x 10, not square: give --data.image_size 64"):
        found_in(tmp_path)
    assert found_in(tmp_path, size=8).image_shape == (1, 8, 8)


def test_pictures_too_small_for_networks_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, 2, size=(3, 3))
    with pytest.raises(UsageError, match=r"is 3 x 3, smaller than 4 x 4: give --data.image_size 64"):
        found_in(tmp_path)
    pictures(tmp_path, 2, size=(4, 4))
    assert found_in(tmp_path).image_shape == (1, 4, 4)


def test_what_is_lost_by_resizing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, size in enumerate(((16, 16), (32, 16), (15, 16), (33, 16), (1, 1), (4000, 2))):
        Image.new("L", size, 200).save(tmp_path / f"{number}.png")
    assert module_of(tmp_path, image_size=16).load(train=True).images.shape[1:] == (1, 16, 16)
    assert capsys.readouterr().out.splitlines() == [
        "3 of 6 pictures are smaller than 16 x 16 and are enlarged",
        "2 of 6 pictures are more than twice as long as wide, and only the square in their middle is seen",
    ]
    for number in range(3):
        picture(tmp_path / "good" / f"{number}.png", size=(16, 16), level=200)
    module_of(tmp_path / "good", image_size=16).load(train=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("level", "dark"), [(15, 1), (16, 0)])
def test_pictures_that_are_nearly_black_are_counted(
    level: int, dark: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the white of 12 bits in a colour file of 16, of which Pillow reads the upper 8
    for number, value in enumerate((level, 200, 255)):
        picture(tmp_path / f"{number}.png", COLOUR, level=value)
    module_of(tmp_path).load(train=True)
    said = f"{dark} of 3 pictures are nearly black, no pixel above 15 of 255;"
    assert (said in capsys.readouterr().out) == bool(dark)


@pytest.mark.parametrize("in_memory_gb", [0.0, 2.0])
def test_all_damaged_pictures_are_named_before_training(in_memory_gb: float, tmp_path: Path) -> None:
    pictures(tmp_path, 6, size=(32, 32))
    bad = [damage(tmp_path / f"bad {number}.png") for number in range(3)]
    bad[1].write_text("<html>")
    with pytest.raises(UsageError) as refused:
        module_of(tmp_path, in_memory_gb=in_memory_gb).labels(train=True)
    said = str(refused.value)
    assert said.startswith(
        f"3 pictures cannot be read: {bad[0]} (image file is truncated), {bad[1]} (no picture that can be read),"
    )
    assert said.endswith("; repair or remove what is damaged, or leave it out by --data.on_damaged skip")


def test_of_very_many_damaged_pictures_the_first_are_named(tmp_path: Path) -> None:
    for number in range(NAMED + 5):
        (tmp_path / f"{number:04d}.png").touch()
    with pytest.raises(
        UsageError, match=rf"{NAMED + 5} pictures cannot be read: .*{NAMED - 1}.png \(.*\), and 5 more; repair"
    ) as refused:
        found_in(tmp_path)
    assert str(refused.value).count(".png") == NAMED


@pytest.mark.parametrize("in_memory_gb", [0.0, 2.0])
def test_damaged_pictures_may_be_skipped(in_memory_gb: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path, 12, size=(32, 32))
    before = module_of(tmp_path)
    whole = {train: levels(before.load(train=train)) for train in (True, False)}
    bad = damage(tmp_path / f"{whole[True][2]:03d}.png")
    capsys.readouterr()
    data = module_of(tmp_path, on_damaged="skip", in_memory_gb=in_memory_gb)
    assert levels(data.load(train=True)) == [level for level in whole[True] if level != whole[True][2]]
    assert levels(data.load(train=False)) == whole[False]
    assert len(data.labels(train=True)) == len(whole[True]) - 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"1 picture left out that cannot be read: {bad} (image file is truncated)"


def test_skipping_leaves_no_part_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path, 5, size=(32, 32))
    (held_out,) = levels(module_of(tmp_path).load(train=False))
    damage(tmp_path / f"{held_out:03d}.png")
    data = module_of(tmp_path, on_damaged="skip")
    assert [len(data.labels(train=train)) for train in (True, False)] == [3, 1]
    assert "No picture to hold out could be read, so one of those to train with is held out" in capsys.readouterr().out
    for number in range(4):
        damage(tmp_path / f"{number:03d}.png")
    with pytest.raises(UsageError, match=r"fewer than 2 pictures are left: [45] pictures cannot be read"):
        module_of(tmp_path, on_damaged="skip").labels(train=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_picture_damaged_later_is_named_by_whoever_reads_it(num_workers: int, tmp_path: Path) -> None:
    found = found_in(pictures(tmp_path, 4))
    found.read_all(hold=False, on_damaged="refuse", num_workers=0)
    loader = PictureLoader(found, ShardedBatches(4, 2, train=False), num_workers)
    assert len(list(loader)) == 2
    bad = Path(found.paths[3])
    bad.write_text("no picture")
    with pytest.raises(UsageError) as refused:
        list(loader)
    assert str(refused.value).startswith(f"1 picture cannot be read: {bad} (no picture that can be read); repair")
    assert "Traceback" not in str(refused.value)


@pytest.mark.parametrize("in_memory_gb", [0.0, 2.0])
def test_many_pictures_are_read_by_workers_and_announced(
    in_memory_gb: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path, 10, size=(32, 32))
    alone = module_of(tmp_path).load(train=True)
    bad = damage(tmp_path / "bad.png")
    capsys.readouterr()
    monkeypatch.setattr("bngan.data.pictures.MANY", 11)
    torch.manual_seed(0)
    data = module_of(tmp_path, num_workers=1, on_damaged="skip", in_memory_gb=in_memory_gb)
    assert torch.equal(data.load(train=True).images, alone.images)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{'Reads' if in_memory_gb else 'Checks'} 11 pictures from {tmp_path}"
    assert str(bad) in said[1]
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1)), "reading must not draw from the networks' random numbers"


@pytest.mark.parametrize("split", [False, True])
def test_pictures_are_looked_for_and_read_once(split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        pictures(tmp_path / part if split else tmp_path, 20)
    opened: list[str] = []
    open_picture = Image.open

    def counted(path: str, **options: Any) -> Image.Image:
        opened.append(path)
        return open_picture(path, **options)

    monkeypatch.setattr(Image, "open", counted)
    data = module_of(tmp_path)
    assert data.image_shape == (1, 8, 8)
    files = 40 if split else 20
    assert len(opened) == files, "to know the shape, files are only looked at"
    for train in (True, False):
        data.subset(2, train=train)
        data.load(train=train)
        list(data.train_dataloader() if train else data.val_dataloader())
    assert len(opened) == 2 * files
    assert set(opened) == {str(path) for path in tmp_path.rglob("*.png")}
