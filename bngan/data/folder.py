"""Which files of a folder are pictures, which of them are held out, and of which class each is."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NoReturn

from bngan.data.decode import formats
from bngan.distributed import print0
from bngan.errors import UsageError

HELD_OUT_FRACTION = 0.1
TRAINING_FOLDERS = {"train", "training"}
HELD_OUT_FOLDERS = {"val", "valid", "validation", "dev", "eval", "test", "testing"}
# What systems leave in folders, beside hidden files.
LITTER = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
LISTED = 8  # classes, or kinds of files, in a message


def find(folder: Path) -> tuple[list[str], list[int], int]:
    """Return the paths of a folder's and its subfolders' pictures, those to train with first, the number of each one's class,
    0 where there are none, and how many there are to train with; and say what is made of them.

    Where there are subfolders train and val, say, or such in each class, they tell what is held out. Else each file's name
    tells, so that the others stay where they are when pictures are added. Where all pictures lie in subfolders, each of these
    is a class.

    Raises:
        UsageError: if there are fewer than two pictures, a folder cannot be read, or it holds the parts of two data sets.
    """
    names = _pictures(folder)
    paths = _without_common_folder([name.split("/") for name in names])
    _refuse_two_data_sets(folder, {path[0] for path in paths if len(path) > 1})
    depth = _depth_of_parts(paths)
    if depth is None:
        first, second = _divided(names)
    else:
        first, second = _parts(paths, depth)
        paths = [path[:depth] + path[depth + 1 :] for path in paths]
    rows = [*first, *second]
    labels = _labels([paths[row] for row in rows], 0 if depth is None else len(first))
    return [str(folder / names[row]) for row in rows], labels, len(first)


def _refuse_two_data_sets(folder: Path, names: set[str]) -> None:
    """Refuse trainA, trainB, testA and testB, of which each letter is a data set of its own (Zhu et al. 2017, CycleGAN)."""
    lettered = {name for name in names if name.endswith(("A", "B"))}
    parts = [{name for name in lettered if name[:-1].lower() in kind} for kind in (TRAINING_FOLDERS, HELD_OUT_FOLDERS)]
    if all(parts):
        found = ", ".join(sorted(set.union(*parts)))
        raise UsageError(f"{folder} holds {found}, the parts of two data sets; put those of one into folders train and test")


def _depth_of_parts(paths: list[list[str]]) -> int | None:
    """Return how deep folders train and val, say, lie: 0 at the top, 1 in each class; None where there are none."""
    for depth in (0, 1):
        names = {path[depth].lower() for path in paths if len(path) > depth + 1}
        if names & TRAINING_FOLDERS and names & HELD_OUT_FOLDERS:
            return depth
    return None


def _parts(paths: list[list[str]], depth: int) -> tuple[list[int], list[int]]:
    """Return the rows in the folders to train with and in those that are held out, which lie so deep; and say which."""
    folders = [path[depth] if len(path) > depth + 1 else "" for path in paths]
    training, held_out = (
        Counter(name for name in folders if name.lower() in kind) for kind in (TRAINING_FOLDERS, HELD_OUT_FOLDERS)
    )
    beside = len(paths) - training.total() - held_out.total()
    left_out = f"; {beside} beside these folders are left out" if beside else ""
    print0(f"Pictures to train with: {_listed(training)}; held out: {_listed(held_out)}{left_out}")
    first, second = ([row for row, name in enumerate(folders) if name in part] for part in (training, held_out))
    return first, second


def _pictures(folder: Path) -> list[str]:
    """Return the paths of all pictures within the folder, in a fixed order."""
    known = set(chain.from_iterable(formats().values()))
    suffixes = {name: Path(name).suffix.lower() for name in sorted(_files(folder))}
    names = [name for name, suffix in suffixes.items() if suffix in known]
    others = Counter(suffix or "without a suffix" for suffix in suffixes.values() if suffix not in known)
    if not names:
        found = f" (but {_listed(others)})" if others else ""
        raise UsageError(f"{folder} holds no pictures that can be read here{found}; give one with png or jpg files, say")
    if others:
        print0(f"{others.total()} file{'s' * (others.total() > 1)} left out: {_listed(others)}")
    if len(names) == 1:
        raise UsageError(f"{folder} holds one picture; at least 2 are needed, to train and to hold out")
    return names


def _files(folder: Path) -> Iterator[str]:
    """Yield the path within the folder, with slashes, of each file that a person would see there."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; give one with pictures by --data.folder")

    def refuse(error: OSError) -> NoReturn:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror}); allow it, or give another --data.folder"
        ) from error

    visited: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # links may go round in a circle
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if _is_seen(name))
        within = Path(place).relative_to(folder)
        yield from ((within / name).as_posix() for name in files if _is_seen(name))


def _is_seen(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in LITTER


def _without_common_folder(paths: list[list[str]]) -> list[list[str]]:
    """Leave out folders that hold all the pictures, as archives have them."""
    while len({path[0] for path in paths}) == 1 and all(len(path) > 1 for path in paths):
        paths = [path[1:] for path in paths]
    return paths


def _divided(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the rows to train with and those held out, about a tenth: the same whatever the seed, for runs that go on."""

    def draw(row: int) -> float:
        return int.from_bytes(hashlib.sha256(os.fsencode(names[row])).digest()[:8], "big") / 2**64

    rows = sorted(range(len(names)), key=draw)
    held_out = sum(draw(row) < HELD_OUT_FRACTION for row in rows)
    held_out = min(max(held_out, 1), len(rows) - 1)
    return sorted(rows[held_out:]), sorted(rows[:held_out])


def _labels(paths: list[list[str]], part: int) -> list[int]:
    """Number the pictures' outermost folders; the first `part` pictures, or the others, have none if one lies beside these."""
    paths = _without_common_folder(paths)
    names: list[str] = []
    for some in (paths[:part], paths[part:]):
        loose = any(len(path) == 1 for path in some)
        names += ["" if loose else path[0] for path in some]
    counts = Counter(name for name in names if name)
    if len(counts) > 1:
        print0(f"{len(counts)} classes: {_listed(counts)}")
    numbers = {"": 0} | {name: number for number, name in enumerate(sorted(counts))}
    return [numbers[name] for name in names]


def _listed(counts: dict[str, int]) -> str:
    """Name the most frequent with their counts."""
    named = [f"{count} {name}" for name, count in Counter(counts).most_common(LISTED)]
    return ", ".join(named) + (f", and {len(counts) - LISTED} more" if len(counts) > LISTED else "")
