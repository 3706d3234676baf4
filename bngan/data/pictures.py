"""A person's own pictures as a data set: of one shape, looked at before training, held in memory where they fit."""

import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from bngan.data.datasets import Labelled
from bngan.data.decode import Background, Traits, common_range, look, read, upright_size
from bngan.data.folder import find
from bngan.distributed import print0
from bngan.errors import UsageError

LEAST_SIDE = 4  # pixels
MANY = 1_000  # pictures that take more than an instant to read
AT_ONCE = 8  # pictures that a process reads before it passes them on
NAMED = 20  # damaged pictures in a message
REMEDY = "give --data.image_size 64, say, and every picture is resized and its centre cut out"

Item = TypeVar("Item")
OnDamaged = Literal["refuse", "skip"]


class Pictures(Dataset[tuple[Tensor, int]]):
    """The pictures of a folder as uint8 (C, H, W), each with the number of its class; those to train with come first.

    Args:
        folder: searched with its subfolders.
        size: side to which the square in each picture's middle is resized; None keeps the native size, which all pictures
            must then share and which must be square.
        channels: 1 for grey, 3 for colour; None takes colour if any picture has it.
        background: colour that is seen where a picture is transparent.

    Raises:
        UsageError: if there are too few pictures, or if they differ in size and no size is given.
    """

    def __init__(self, folder: Path, size: int | None, channels: int | None, background: Background) -> None:
        self.folder, self.size, self.background = folder, size, background
        self.paths, labels, self.training = find(folder)
        self.labels = torch.tensor(labels)  # (N,)
        self.damaged: list[str] = []  # paths, each with what is wrong
        traits = self._look()
        side = self._native_side(traits) if size is None else size
        self.image_shape = (channels or _common_channels(traits), side, side)
        self._ranges = {
            kind: common_range(kind, [seen.extremes for seen in traits if seen.kind == kind])
            for kind in {seen.kind for seen in traits if seen.kind}
        }
        if size is not None:
            _tell_what_is_lost(traits, size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        try:
            return self.read(row), int(self.labels[row])
        except UsageError as error:
            raise _unreadable([str(error)]) from error

    def read(self, row: int) -> Tensor:
        """Return one picture from its file; UsageError with its path and what is wrong if it is damaged."""
        return read(self.paths[row], self.image_shape[0], self.size, self.background, self._ranges)

    def read_all(self, *, hold: bool, on_damaged: OnDamaged, num_workers: int) -> Tensor | None:
        """Read every file once, to return all pictures as (N, C, H, W) or, where they are too many, to find the damaged ones.

        Raises:
            UsageError: naming the damaged ones, unless they are to be skipped and others are left.
        """
        if len(self) >= MANY:
            print0(f"{'Reads' if hold else 'Checks'} {len(self):,} pictures from {self.folder}")
        images = torch.empty(len(self) if hold else 0, *self.image_shape, dtype=torch.uint8)
        attempts = DataLoader(
            _Attempts(self, hold=hold),
            batch_size=AT_ONCE,
            num_workers=num_workers if len(self) >= MANY else 0,
            collate_fn=list,
            generator=torch.Generator(),  # the global one is for the networks' first weights
        )
        whole: list[int] = []
        for row, (image, complaint) in enumerate(_with_progress(chain.from_iterable(attempts), "reading pictures", len(self))):
            if complaint:
                self.damaged.append(complaint)
                continue
            if hold:
                images[len(whole)] = torch.from_numpy(image)
            whole.append(row)
        self._keep(whole)
        if self.damaged and (on_damaged == "refuse" or len(self) < 2):
            raise _unreadable(self.damaged)
        if self.damaged:
            print0(_told(self.damaged, "left out that cannot be read"))
        return images[: len(self)] if hold else None

    def _look(self) -> list[Traits]:
        """Look at every picture, and keep those whose files begin as they should."""
        traits, whole = [], []
        for row, path in enumerate(_with_progress(self.paths, "looking at pictures", len(self))):
            try:
                traits.append(look(path, self.background))
                whole.append(row)
            except UsageError as error:
                self.damaged.append(str(error))
        if not whole:
            raise _unreadable(self.damaged)
        self._keep(whole)
        return traits

    def _keep(self, rows: Sequence[int]) -> None:
        self.training = min(max(1, sum(row < self.training for row in rows)), len(rows) - 1)  # none of both is left empty
        self.paths, self.labels = [self.paths[row] for row in rows], self.labels[rows]

    def _native_side(self, traits: Sequence[Traits]) -> int:
        """Return the side of the pictures, all of which must be squares of one size."""
        (side, height), first = traits[0].size, self.paths[0]
        if side != height:
            raise UsageError(f"{_measured(first)}, not square: {REMEDY}")
        if side < LEAST_SIDE:
            raise UsageError(f"{_measured(first)}, smaller than {LEAST_SIDE} x {LEAST_SIDE}: {REMEDY}")
        for other, seen in zip(self.paths, traits, strict=True):
            if seen.size != (side, side):
                raise UsageError(f"pictures of different sizes: {_measured(first)}, {_measured(other)}; {REMEDY}")
        return side


class _Attempts(Dataset[tuple[Any, str]]):
    """Each picture as an array, or as nothing where only its being whole counts, and a complaint where it is damaged."""

    def __init__(self, pictures: Pictures, *, hold: bool) -> None:
        self.pictures, self.hold = pictures, hold

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> tuple[Any, str]:
        try:
            image = self.pictures.read(row)
        except UsageError as error:
            return None, str(error)
        return (image.numpy() if self.hold else None), ""  # an array: each tensor would take a file of shared memory


class PicturesPart(Subset[tuple[Tensor, int]]):
    """Some of a folder's pictures, which are too many for memory: those to train with, or those held out.

    Args:
        pictures: all pictures of the folder, which have been read once.
        rows: which of them are in this part.
    """

    def __init__(self, pictures: Pictures, rows: range) -> None:
        super().__init__(pictures, rows)
        self.image_shape = pictures.image_shape
        self.labels = pictures.labels[rows.start : rows.stop]  # (N,)

    def read(self, rows: Tensor) -> Labelled:
        """Return pictures of this part, by their place in it int64 (n,), as uint8 (n, C, H, W), with their labels (n,)."""
        images = torch.empty(len(rows), *self.image_shape, dtype=torch.uint8)
        for target, row in zip(images, _with_progress(rows.tolist(), "reading pictures", len(rows)), strict=True):
            target.copy_(self[row][0])
        return Labelled(images, self.labels[rows])


def _common_channels(traits: Sequence[Traits]) -> int:
    """Return 3 where any picture has colours, else 1."""
    colour = sum(seen.colour for seen in traits)
    if 0 < colour < len(traits):
        grey = len(traits) - colour
        print0(f"{colour} colour and {grey} grey pictures: all are taken as colour (--data.channels 1 for grey)")
    return 3 if colour else 1


def _measured(path: str) -> str:
    try:
        width, height = upright_size(path)
    except UsageError as error:
        raise _unreadable([str(error)]) from error
    return f"{path} is {width} x {height}"


def _tell_what_is_lost(traits: Sequence[Traits], size: int) -> None:
    """Say how many pictures are enlarged, and of how many the square in the middle is less than half."""
    small = sum(min(seen.size) < size for seen in traits)
    long = sum(max(seen.size) > 2 * min(seen.size) for seen in traits)
    if small:
        print0(f"{small} of {len(traits)} pictures are smaller than {size} x {size} and are enlarged")
    if long:
        print0(
            f"{long} of {len(traits)} pictures are more than twice as long as wide, and only the square in their middle is seen"
        )


def _unreadable(damaged: Sequence[str]) -> UsageError:
    remedy = "repair or remove what is damaged, or leave it out by --data.on_damaged skip"
    return UsageError(f"{_told(damaged, 'cannot be read')}; {remedy}")


def _told(damaged: Sequence[str], what: str) -> str:
    count = "1 picture" if len(damaged) == 1 else f"{len(damaged)} pictures"
    more = f", and {len(damaged) - NAMED} more" if len(damaged) > NAMED else ""
    return f"{count} {what}: {', '.join(sorted(damaged)[:NAMED])}{more}"


def _with_progress(items: Iterable[Item], doing: str, total: int) -> Iterable[Item]:
    """Yield the items, and show progress on a terminal."""
    return track(items, description=doing, total=total, disable=not sys.stderr.isatty())
