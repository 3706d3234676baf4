"""Which files of a folder are pictures, which are held out, which class each is of, and what is said of it."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from bngan.data.decode import formats
from bngan.data.folder import find
from bngan.errors import UsageError


def fill(folder: Path, names: Iterable[str]) -> Path:
    """Put empty files there: whether they are pictures at all is not asked yet."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def parts(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Names within the folder, with their labels, of those to train with and those held out."""
    paths, labels, training = find(folder)
    named = [(Path(path).relative_to(folder).as_posix(), label) for path, label in zip(paths, labels, strict=True)]
    return dict(named[:training]), dict(named[training:])


def everything(folder: Path) -> dict[str, int]:
    train, held_out = parts(folder)
    assert not train.keys() & held_out.keys()
    return train | held_out


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"there is no folder {tmp_path / 'absent'}; give one with pictures by --data.folder"):
        find(tmp_path / "absent")
    with pytest.raises(UsageError, match=f"{tmp_path} holds no pictures that can be read here; give one with png"):
        find(tmp_path)
    fill(tmp_path, ["a.heic", "b.heic", "notes.txt"])
    with pytest.raises(UsageError, match=r"no pictures that can be read here \(but 2 .heic, 1 .txt\)"):
        find(tmp_path)
    fill(tmp_path, ["a.png"])
    with pytest.raises(UsageError, match="holds one picture; at least 2 are needed"):
        find(tmp_path)
    fill(tmp_path, ["b.png"])
    assert [len(part) for part in parts(tmp_path)] == [1, 1]


def test_pictures_are_known_by_their_suffix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["png", "PNG", "jpg", "JPEG", "jfif", "gif", "webp", "avif", "bmp", "tif", "tiff", "jp2", "ppm", "tga"]
    fill(tmp_path, [f"{number}.{suffix}" for number, suffix in enumerate(wanted)])
    assert len(everything(tmp_path)) == len(wanted)
    assert capsys.readouterr().out == ""
    fill(tmp_path, ["a.pdf", "a.mpg", "a.eps", "a.h5", "a.svg", "README"])
    fill(tmp_path, [f"{number}.json" for number in range(7)])
    assert len(everything(tmp_path)) == len(wanted)
    out = capsys.readouterr().out
    assert out.startswith("13 files left out: 7 .json, 1 ")
    assert all(f"1 {kind}" in out for kind in (".pdf", ".mpg", ".eps", ".h5", ".svg", "without a suffix"))


def test_formats_of_apples_cameras_are_read_where_pillow_can(monkeypatch: pytest.MonkeyPatch) -> None:
    class Opener:
        registered = 0

        def register_heif_opener(self) -> None:
            self.registered += 1

    opener = Opener()
    monkeypatch.setattr("bngan.data.decode.import_module", lambda name: {"pillow_heif": opener}[name])
    formats.cache_clear()
    assert "PNG" in formats()
    assert opener.registered == 1


def test_what_a_person_does_not_see_is_left_out_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, ["a.png", "cats/b.png"])
    fill(tmp_path, ["._a.png", "cats/._b.png", ".DS_Store", "Thumbs.db", "desktop.ini", "cats/Desktop.ini"])
    fill(tmp_path, ["__MACOSX/a.png", "cats/__MACOSX/a.png", ".ipynb_checkpoints/a.png", "cats/.thumbnails/deep/a.png"])
    assert everything(tmp_path).keys() == {"a.png", "cats/b.png"}
    assert capsys.readouterr().out == ""


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", ["a.png", "deep/b.png"])
    folder = fill(tmp_path / "pictures", ["c.png"])
    os.symlink(elsewhere, folder / "linked")
    os.symlink(folder, folder / "linked-to-itself")
    os.symlink(tmp_path, elsewhere / "up")
    assert everything(folder).keys() == {"c.png", "linked/a.png", "linked/deep/b.png"}


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, ["a.png", "b.png", "secret/c.png"])
    scan = os.scandir

    def guarded(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(UsageError, match=rf"{tmp_path / 'secret'} cannot be read \(Permission denied\); allow it"):
        find(tmp_path)


def test_subfolders_are_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, [f"dog/{number}.png" for number in range(3)])
    fill(tmp_path, [f"cat/deep/{number}.png" for number in range(5)])
    (tmp_path / "empty").mkdir()
    found = everything(tmp_path)
    assert {name.split("/")[0]: label for name, label in found.items()} == {"cat": 0, "dog": 1}
    assert len(found) == 8
    assert capsys.readouterr().out == "2 classes: 5 cat, 3 dog\n"
    fill(tmp_path, ["beside.png"])
    assert set(everything(tmp_path).values()) == {0}
    assert capsys.readouterr().out == ""


def test_of_many_classes_the_largest_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, [f"{number:02d}/{copy}.png" for number in range(20) for copy in range(number + 1)])
    assert len(set(everything(tmp_path).values())) == 20
    assert capsys.readouterr().out == "20 classes: 20 19, 19 18, 18 17, 17 16, 16 15, 15 14, 14 13, 13 12, and 12 more\n"


@pytest.mark.parametrize(
    ("training", "held_out"),
    [
        (["train"], ["test"]),
        (["Train"], ["Val"]),
        (["training"], ["valid"]),
        (["TRAIN"], ["validation"]),
        (["train"], ["Test", "val"]),
    ],
)
@pytest.mark.parametrize("above", ["", "archive/"])
def test_subfolders_may_tell_what_is_held_out(
    above: str, training: list[str], held_out: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folders, count in ((training, 5), (held_out, 2)):
        fill(tmp_path, [f"{above}{name}/{number}.png" for name in folders for number in range(count)])
    found = parts(tmp_path)
    assert [{name.removeprefix(above).split("/")[0] for name in part} for part in found] == [{*training}, {*held_out}]
    assert [len(part) for part in found] == [5 * len(training), 2 * len(held_out)]
    assert set(everything(tmp_path).values()) == {0}
    expected = f"Pictures to train with: 5 {training[0]}; held out: {', '.join(f'2 {name}' for name in held_out)}\n"
    assert capsys.readouterr().out == 2 * expected
    fill(tmp_path, [f"{above}masks/a.png", f"{above}b.png"])
    assert parts(tmp_path) == found
    assert capsys.readouterr().out == f"{expected[:-1]}; 2 beside these folders are left out\n"


def test_names_of_parts_alone_are_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, ["train/a.png", "train/b.png", "plane/c.png"])
    assert everything(tmp_path) == {"plane/c.png": 0, "train/a.png": 1, "train/b.png": 1}
    assert capsys.readouterr().out == "2 classes: 2 train, 1 plane\n"
    (tmp_path / "test").mkdir()  # nothing is held out by a folder without pictures
    assert len(everything(tmp_path)) == 3


def test_classes_of_both_parts_have_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, ["train/cat/a.png", "train/dog/b.png", "train/emu/c.png", "test/dog/d.png", "test/emu/e.png"])
    train, test = parts(tmp_path)
    assert train == {"train/cat/a.png": 0, "train/dog/b.png": 1, "train/emu/c.png": 2}
    assert test == {"test/dog/d.png": 1, "test/emu/e.png": 2}
    assert "3 classes: 2 dog, 2 emu, 1 cat\n" in capsys.readouterr().out
    fill(tmp_path, ["test/beside.png"])
    assert parts(tmp_path) == (train, {"test/beside.png": 0, "test/dog/d.png": 0, "test/emu/e.png": 0})


def test_parts_may_lie_within_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, ["cat/train/a.png", "cat/val/b.png", "dog/Train/c.png", "dog/test/deep/d.png"])
    found = ({"cat/train/a.png": 0, "dog/Train/c.png": 1}, {"cat/val/b.png": 0, "dog/test/deep/d.png": 1})
    assert parts(tmp_path) == found
    said = "Pictures to train with: 1 train, 1 Train; held out: 1 val, 1 test"
    assert capsys.readouterr().out == f"{said}\n2 classes: 2 cat, 2 dog\n"
    fill(tmp_path, ["cat/beside.png", "emu/e.png", "loose.png"])
    assert parts(tmp_path) == found
    assert f"{said}; 3 beside these folders are left out\n" in capsys.readouterr().out


def test_parts_of_two_data_sets_are_refused(tmp_path: Path) -> None:
    names = [f"{part}/{number}.png" for part in ("trainA", "trainB", "valA") for number in range(3)]
    fill(tmp_path / "both", names)
    with pytest.raises(UsageError, match="holds trainA, trainB, valA, the parts of two data sets; put those of one into"):
        find(tmp_path / "both")
    fill(tmp_path / "classes", [*names[:6], "testa/a.png"])  # of which none is held out
    assert set(everything(tmp_path / "classes").values()) == {0, 1, 2}


@pytest.mark.parametrize("above", ["one/", "one/two/"])
def test_a_folder_around_all_pictures_is_no_class(above: str, tmp_path: Path) -> None:
    """As archives have them."""
    fill(tmp_path, [f"{above}cat/{number}.png" for number in range(3)])
    fill(tmp_path, [f"{above}dog/{number}.png" for number in range(3)])
    assert set(everything(tmp_path).values()) == {0, 1}
    fill(tmp_path, [f"{above}a.png"])
    assert set(everything(tmp_path).values()) == {0}


def test_a_tenth_is_held_out_and_stays_so_when_pictures_come_and_go(tmp_path: Path) -> None:
    names = [f"{number % 3}/{number}.png" for number in range(800)]
    fill(tmp_path, names[:400])
    train, held_out = parts(tmp_path)
    assert 20 <= len(held_out) <= 60
    assert len(train) + len(held_out) == 400
    fill(tmp_path, names[400:])
    more_train, more_held_out = parts(tmp_path)
    assert train.keys() < more_train.keys()
    assert held_out.keys() < more_held_out.keys()
    for name in names[:200]:
        (tmp_path / name).unlink()
    fewer_train, fewer_held_out = parts(tmp_path)
    assert fewer_train.keys() < more_train.keys()
    assert fewer_held_out.keys() < more_held_out.keys()


def test_who_is_held_out_depends_on_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in every version and on every machine: a run that goes on must not train on other pictures."""
    names = [f"{number:03d}.png" for number in range(100)]
    found = parts(fill(tmp_path / "here", names))
    assert list(found[1]) == ["022.png", "038.png", "041.png", "048.png", "052.png", "062.png", "072.png", "082.png", "095.png"]
    assert parts(fill(tmp_path / "there", reversed(names))) == found
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *args, **options: ((a, b, c[::-1]) for a, b, c in walk(*args, **options)))
    assert parts(tmp_path / "here") == found
    assert [list(part) for part in parts(tmp_path / "here")] == [list(part) for part in found]


def test_neither_part_is_ever_empty(tmp_path: Path) -> None:
    for number in range(2, 12):
        folder = fill(tmp_path / str(number), [f"{number} {copy}.png" for copy in range(number)])
        assert all(parts(folder))


def test_names_need_not_be_text(tmp_path: Path) -> None:
    for name in (b"\xff\xfe.png", "\u2603.png".encode(), b"new\nline.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    assert len(everything(tmp_path)) == 3
