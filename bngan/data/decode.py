"""One file to one picture of 8 bits, grey or in colour, upright and opaque, whatever wrote it."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from bngan.errors import UsageError

Background = tuple[int, ...]  # red, green, blue, 0..255

# Pillow knows these too: films, programs for a printer, and formats of which it has no reader.
NO_PICTURES = {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "MPEG", "WMF"}
UNSIGNED, SIGNED, FLOATING = 1, 2, 3  # a TIFF's kinds of numbers (TIFF 6.0, SampleFormat)


class Range(NamedTuple):
    """The values of pictures deeper than 8 bits that become black, 0, and one step above white, 256."""

    black: float
    above_white: float


class Traits(NamedTuple):
    """What a file tells of its picture.

    Attributes:
        size: width and height of the picture, or height and width where it must be turned to stand upright.
        colour: whether it has colours.
        kind: I or F where its pixels are integers of more than 8 bits or floating-point numbers, else empty.
        extremes: the smallest and the largest pixel of such a picture.
    """

    size: tuple[int, int]
    colour: bool
    kind: str
    extremes: tuple[float, float] = (0, 0)


@cache
def formats() -> dict[str, list[str]]:
    """Return the formats of pictures that can be read here, each with its suffixes."""
    with suppress(ImportError):  # the formats of Apple's cameras, where this package of Pillow's friends is installed
        import_module("pillow_heif").register_heif_opener()
    by_suffix = {**Image.registered_extensions(), ".mpo": "JPEG"}  # several JPEGs in a file, which its reader knows
    known = Image.OPEN.keys() - NO_PICTURES
    return {name: [suffix for suffix, owner in by_suffix.items() if owner == name] for name in sorted(known)}


def look(path: str, background: Background) -> Traits:
    """Tell what must be known of all pictures of a folder before one can be read; most are not decoded for it.

    Raises:
        UsageError: with the path and what is wrong, if it cannot be read or has pixels that are no numbers.
    """
    with _opened(path) as picture:
        _check_numbers(picture)
        if picture.mode[0] in "IF":
            pixels = _deep_pixels(picture)
            if not np.isfinite(pixels).all():
                raise ValueError("some pixels are NaN or infinite")
            extremes = float(pixels.min()), float(pixels.max())
            return Traits(picture.size, False, picture.mode[0], extremes)
        colour = Image.getmodebase(picture.mode) != "L" and not _has_grey_palette(picture)
        shown = picture.has_transparency_data and len(set(background)) > 1
        return Traits(picture.size, colour or shown, "")


def common_range(kind: str, extremes: Iterable[tuple[float, float]]) -> Range:
    """Return the range of all deep pictures of one kind, given the extremes of each: all are scaled alike.

    That of integers is the smallest of 8, 9, ... bits that holds them all, as cameras of 12 bits write files of 16; that of
    floating-point numbers is 0 to 1 if they lie in it. Where there are others, it is from the smallest to the largest.
    """
    lows, highs = zip(*extremes, strict=True)
    low, high = min(lows), max(highs)
    if low >= 0 and kind == "I":
        return Range(0, 2 ** max(8, int(high).bit_length()))
    if low >= 0 and high <= 1:
        return Range(0, 1)
    return Range(low, high if high > low else low + 1)


def read(path: str, channels: int, size: int | None, background: Background, ranges: dict[str, Range]) -> Tensor:
    """Return a file's (first) picture as uint8 (C, H, W), upright, on the background where it is transparent.

    Args:
        path: of the file.
        channels: C, 1 for grey or 3 for colour.
        size: side to which the square in the picture's middle is resized; None leaves the picture whole.
        background: its colour.
        ranges: for each kind of deep pictures.

    Raises:
        UsageError: with the path and what is wrong, if it cannot be read.
    """
    with _opened(path) as picture:
        if size is not None:
            picture.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a half, a quarter or an eighth of its size
        _turn_upright(picture)
        if picture.mode[0] in "IF":
            picture = _eight_bit(picture, ranges[picture.mode[0]])
        if picture.has_transparency_data:
            canvas = Image.new("RGBA", picture.size, background)
            canvas.alpha_composite(picture.convert("RGBA"))
            picture = canvas
        picture = picture.convert("L" if channels == 1 else "RGB")
        if size is not None:
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
        return tv.pil_to_tensor(picture)


def upright_size(path: str) -> tuple[int, int]:
    """Return the width and height of the picture in a file."""
    with _opened(path) as picture:
        _turn_upright(picture)
        return picture.size


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open a picture; Pillow's remarks are not shown, and what it complains of, also when decoding, becomes a UsageError."""
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{path} (no file)")  # reading a pipe would wait for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=list(formats())) as picture:
                yield picture
    except MemoryError:
        raise
    except Exception as error:  # each of Pillow's readers has errors of its own, among them SyntaxError and struct.error
        raise UsageError(f"{path} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no picture that can be read"
    return ((isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__)[:100]


def _turn_upright(picture: Image.Image) -> None:
    """Turn a picture as its EXIF says, unless that is broken: every viewer shows such a picture as it is."""
    picture.load()
    with suppress(Exception):  # as of Pillow's readers
        ImageOps.exif_transpose(picture, in_place=True)


def _has_grey_palette(picture: Image.Image) -> bool:
    if picture.mode not in ("P", "PA"):
        return False
    picture.load()
    palette = np.array(picture.getpalette()).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


def _check_numbers(picture: Image.Image) -> None:
    """Refuse what Pillow takes for other numbers: -1 of signed bytes for 255, and white of floating-point numbers for black."""
    bits, kind, white_is_zero = _numbers(picture)
    if (bits, kind) == (8, SIGNED):
        raise ValueError("signed numbers of 8 bits; save it with unsigned ones")
    if white_is_zero and kind == FLOATING:
        raise ValueError("floating-point numbers, of which 0 is white; save it with 0 as black")


def _numbers(picture: Image.Image) -> tuple[int, int, bool]:
    """Return the bits of a TIFF's numbers, their kind, and whether 0 is white; what any other picture has needs no care."""
    if not isinstance(picture, TiffImageFile):
        return 8, UNSIGNED, False
    tags = picture.tag_v2
    return tags.get(BITSPERSAMPLE, (1,))[0], tags.get(SAMPLEFORMAT, (UNSIGNED,))[0], tags.get(PHOTOMETRIC_INTERPRETATION) == 0


def _deep_pixels(picture: Image.Image) -> np.ndarray:
    """Return a deep picture's numbers (H, W) as its file means them: Pillow reads 32 bits as signed, and 0 as black."""
    pixels = np.asarray(picture)
    bits, kind, white_is_zero = _numbers(picture)
    if (bits, kind) == (32, UNSIGNED):
        pixels = pixels.astype(np.int64) % 2**32
    return 2**bits - 1 - pixels.astype(np.int64) if white_is_zero else pixels


def _eight_bit(picture: Image.Image, span: Range) -> Image.Image:
    """Scale a deep picture to 0..255; Pillow's own conversion would turn every value above 255 of 65535 white."""
    pixels = _deep_pixels(picture)
    fraction = (pixels.astype(np.float32) - span.black) / (span.above_white - span.black)
    grey = Image.fromarray((fraction * 256).clip(0, 255).astype(np.uint8))
    if (transparent := picture.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey
