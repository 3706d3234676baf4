"""Every kind of file becomes the picture that a viewer shows."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torch import Tensor

from bngan.data.decode import Background, Range, common_range, look, read, upright_size
from bngan.errors import UsageError
from tests.pictures import COLOUR, GREY, WHITE, picture

RAMP = np.arange(64).reshape(8, 8)


def decoded(
    path: Path, channels: int | None = None, size: int | None = None, background: Background = WHITE
) -> Tensor:  # uint8 (C, H, W)
    """A picture that is alone in its folder."""
    seen = look(str(path), background)
    ranges = {seen.kind: common_range(seen.kind, [seen.extremes])}
    return read(str(path), channels or (3 if seen.colour else 1), size, background, ranges)


def corners(image: Tensor) -> list[int]:
    """Which quarters of a picture are light."""
    return [int(image[0, y, x] > 128) for y in (4, 12) for x in (4, 12)]


@pytest.mark.parametrize(("mode", "channels"), [(GREY, 1), (COLOUR, 3)])
def test_pixels_are_those_of_the_file(mode: str, channels: int, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", mode)
    image = decoded(path)
    assert (image.shape, image.dtype) == ((channels, 8, 8), torch.uint8)
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(path))).reshape(8, 8, channels).permute(2, 0, 1))
    assert decoded(path, channels=1).shape == (1, 8, 8)
    assert decoded(path, channels=3).shape == (3, 8, 8)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_pictures_stand_upright(suffix: str, tmp_path: Path) -> None:
    """The light quarter at the top left of what is stored is where EXIF's orientation 1 to 8 puts it."""
    stored = np.zeros((16, 32, 3), dtype=np.uint8)
    stored[:8, :16] = 255
    where = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif)
        upright = (32, 16) if orientation < 5 else (16, 32)
        assert upright_size(str(tmp_path / f"a{suffix}")) == upright
        where.append(corners(decoded(tmp_path / f"a{suffix}", size=16)))
    top_left, top_right, bottom_left, bottom_right = np.eye(4, dtype=int).tolist()
    assert where == [top_left, top_right, bottom_right, bottom_left, top_left, top_right, bottom_right, bottom_left]


def test_broken_exif_leaves_a_picture_as_it_is(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\x05\0"):
        Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=exif)
        assert decoded(tmp_path / "a.jpg").shape == (3, 8, 16)
    assert not recwarn.list


def see_through(mode: str, hidden: int) -> tuple[Image.Image, dict[str, Any]]:
    """A picture that is black at its top and transparent at its bottom, over some hidden level, and how to save it."""
    alpha = np.repeat([[255], [0]], 4, axis=0).repeat(8, axis=1).astype(np.uint8)
    grey = np.where(alpha == 255, 0, hidden).astype(np.uint8)
    if mode in ("RGBA", "LA"):
        return Image.fromarray(np.dstack([grey] * (len(mode) - 1) + [alpha])), {}
    if mode == "P":
        palette = Image.fromarray((alpha == 0).astype(np.uint8), "P")
        palette.putpalette([0, 0, 0, hidden, hidden, hidden])
        return palette, {"transparency": 1}
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257), {"transparency": hidden * 257}
    return Image.fromarray(grey).convert(mode), {"transparency": {"RGB": (hidden,) * 3}.get(mode, hidden)}


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, ".png") for mode in ("RGBA", "LA", "P", "L", "RGB", "1", "I;16")),
        ("RGBA", ".webp"),
        ("RGBA", ".tif"),
        ("P", ".gif"),
    ],
)
def test_what_is_transparent_shows_the_background(
    mode: str, suffix: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / f"a{suffix}"
    for hidden in (255,) if mode == "1" else (90, 200):
        image, options = see_through(mode, hidden)
        lossless: dict[str, Any] = {"lossless": True, "exact": True} if suffix == ".webp" else {}
        image.save(path, **options, **lossless)
        for background in (WHITE, (0, 0, 0), (255, 0, 0)):
            shown = decoded(path, channels=3, background=background)
            assert shown[:, 0, 0].tolist() == [0, 0, 0]
            assert shown[:, 7, 0].tolist() == list(background)
    assert not recwarn.list


def test_grey_pictures_have_colours_only_before_a_coloured_background(tmp_path: Path) -> None:
    image, _ = see_through("LA", 90)
    image.save(tmp_path / "a.png")
    picture(tmp_path / "opaque.png", GREY)
    assert not look(str(tmp_path / "a.png"), WHITE).colour
    assert look(str(tmp_path / "a.png"), (255, 0, 0)).colour
    assert not look(str(tmp_path / "opaque.png"), (255, 0, 0)).colour


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("CMYK", ".jpg"), ("CMYK", ".tif"), ("YCbCr", ".jpg"), ("LAB", ".tif"), ("P", ".gif"), ("P", ".png"), ("RGB", ".bmp")]
    + [("RGB", suffix) for suffix in (".jfif", ".jp2", ".avif", ".tga", ".ppm", ".ico")],
)
def test_colours_of_every_kind_of_file_are_kept(mode: str, suffix: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    if mode == "LAB":
        profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert image is not None
    (image if mode in ("RGB", "LAB") else image.convert(mode)).save(tmp_path / f"a{suffix}")
    shown = decoded(tmp_path / f"a{suffix}")
    assert shown.shape == (3, 16, 16)
    assert (shown.int() - torch.tensor([255, 0, 0]).reshape(3, 1, 1)).abs().max() <= 6


def test_grey_stays_grey(tmp_path: Path) -> None:
    ramp = Image.fromarray((RAMP * 4).astype(np.uint8))
    for name, image in {"l.png": ramp, "p.png": ramp.quantize(64), "l.gif": ramp, "1.png": ramp.convert("1")}.items():
        image.save(tmp_path / name)
        assert not look(str(tmp_path / name), WHITE).colour
    assert (decoded(tmp_path / "p.png")[0].int() - torch.from_numpy(RAMP * 4)).abs().max() <= 4
    assert decoded(tmp_path / "1.png").unique().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ((RAMP * 1040).astype(np.uint16), Range(0, 65536)),
        ((RAMP * 65).astype(np.uint16), Range(0, 4096)),  # a camera of 12 bits
        ((RAMP * 2).astype(np.uint16), Range(0, 256)),
        ((RAMP * 100_000).astype(np.int32), Range(0, 2**23)),
        ((RAMP * 100 - 3000).astype(np.int32), Range(-3000, 3300)),
        ((RAMP / 63).astype(np.float32), Range(0, 1)),
        ((RAMP / 630).astype(np.float32), Range(0, 1)),
        ((RAMP * 4).astype(np.float32), Range(0, 252)),
        (np.full((8, 8), 7, dtype=np.float32), Range(7, 8)),
    ],
)
def test_deep_pictures_are_scaled_by_the_range_of_their_pixels(pixels: np.ndarray, expected: Range, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(pixels).save(path)
    seen = look(str(path), WHITE)
    assert not seen.colour
    assert common_range(seen.kind, [seen.extremes]) == expected
    black, above_white = expected
    shades = np.floor((pixels.astype(np.float64) - black) / (above_white - black) * 256).clip(0, 255)
    assert np.abs(decoded(path)[0].numpy() - shades).max() <= 1


def tiff(pixels: np.ndarray, *, white_is_zero: bool) -> bytes:
    """Return the smallest file of pixels (H, W), of kinds that Pillow does not write (TIFF 6.0, section 2)."""
    height, width = pixels.shape
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    values = {256: width, 257: height, 258: 8 * pixels.itemsize, 259: 1, 262: 0 if white_is_zero else 1}
    values |= {273: 8 + 2 + 9 * 12 + 4, 278: height, 279: pixels.nbytes, 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + pixels.tobytes()


@pytest.mark.parametrize(
    ("dtype", "step", "white_is_zero"), [(np.uint16, 1040, False), (np.uint16, 1040, True), (np.uint32, 2**26, False)]
)
def test_deep_pictures_are_as_light_as_their_file_says(
    dtype: type[np.generic], step: int, white_is_zero: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff((RAMP * step).astype(dtype), white_is_zero=white_is_zero))
    shades = RAMP * step / 2 ** (8 * np.dtype(dtype).itemsize - 8)
    expected = 255 - shades if white_is_zero else shades
    assert np.abs(decoded(path)[0].numpy() - expected).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "white_is_zero", "complaint"),
    [(np.int8, False, "signed numbers of 8 bits"), (np.float32, True, "floating-point numbers, of which 0 is white")],
)
def test_numbers_that_would_be_read_as_others_are_refused(
    dtype: type[np.generic], white_is_zero: bool, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(RAMP.astype(dtype), white_is_zero=white_is_zero))
    with pytest.raises(UsageError, match=rf"a.tif \({complaint}; save it with"):
        look(str(path), WHITE)
    path.write_bytes(tiff(RAMP.astype(np.uint8), white_is_zero=False))
    assert decoded(path)[0].tolist() == RAMP.tolist()


def test_deep_pictures_share_one_range() -> None:
    assert common_range("I", [(0, 100), (7, 4000)]) == Range(0, 4096)
    assert common_range("I", [(0, 100), (-1, 4000)]) == Range(-1, 4000)
    assert common_range("F", [(0.2, 0.5), (0.1, 1.5)]) == Range(0.1, 1.5)


def test_sixteen_bit_colours_keep_their_shades(tmp_path: Path) -> None:
    """Written by hand, as Pillow writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + struct.pack(">HHH", 0x8000, 0xFFFF, 0) * 8 for _ in range(8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    assert decoded(tmp_path / "a.png")[:, 3, 3].tolist() == [128, 255, 0]


@pytest.mark.parametrize("upright", [True, False])
def test_the_square_in_the_middle_is_resized(upright: bool, tmp_path: Path) -> None:
    """Of a band of three equal squares, black, grey and white, the middle one is left."""
    band = np.repeat(np.repeat(np.array([[0, 100, 255]], dtype=np.uint8), 12, axis=0), 12, axis=1)
    Image.fromarray(band.T.copy() if upright else band).save(tmp_path / "a.png")
    for size, margin in ((6, 1), (48, 8)):
        image = decoded(tmp_path / "a.png", size=size)
        assert image.shape == (1, size, size)
        assert (image[:, margin:-margin, margin:-margin] == 100).all()


def test_smaller_pictures_have_no_aliases(tmp_path: Path) -> None:
    """Of a white stripe in every eight columns a quarter grey is left, wherever the middles of the new columns lie."""
    stripes = np.tile(np.array([0, 0, 0, 255, 255, 0, 0, 0], dtype=np.uint8), (64, 8))
    for suffix in (".png", ".jpg"):  # the second is decoded at a part of its size
        for shift in (0, 4):
            Image.fromarray(np.roll(stripes, shift, axis=1)).save(tmp_path / f"a{suffix}", quality=100)
            image = decoded(tmp_path / f"a{suffix}", size=8)
            assert (image[..., 1:-1].int() - 64).abs().max() <= 4


def test_a_picture_as_long_as_a_street_takes_little_memory(tmp_path: Path) -> None:
    """Resized before it is cut, it would be 2 TB."""
    Image.new("L", (100_000, 1), 7).save(tmp_path / "a.png")
    assert (decoded(tmp_path / "a.png", size=512) == 7).all()


def content_of(suffix: str, **options: Any) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, Image.registered_extensions()[suffix], **options)
    return file.getvalue()


def bad_chunk() -> bytes:
    content = content_of(".png")
    place = content.index(b"IDAT")
    return content[:place] + bytes(4) + content[place + 4 :]


def long_text() -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    return content_of(".png", pnginfo=text)


def bomb() -> bytes:
    header = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    return header + 2 * (60_000).to_bytes(4, "little") + b"\1\0\x18\0" + bytes(24)


SUFFIXES = (".png", ".jpg", ".tif", ".webp", ".gif", ".bmp", ".avif", ".jp2", ".ppm", ".tga")
DAMAGED = {
    **{f"cut{suffix}": content_of(suffix)[: len(content_of(suffix)) // 2] for suffix in SUFFIXES},
    "packed.tif": content_of(".tif", compression="tiff_lzw")[:-500],
    "chunk.png": bad_chunk(),
    "text.png": long_text(),
    "page.jpg": b"<html>404</html>",
    "empty.png": b"",
    "short.png": content_of(".png")[:20],
    "bomb.bmp": bomb(),
    "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_what_is_wrong(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    with pytest.raises(UsageError, match=rf"^{path} \(.+\)$"):
        decoded(path)
    path.write_bytes(content_of(path.suffix))
    assert decoded(path).shape == (3, 32, 32)
    assert not recwarn.list


def test_pixels_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    for spoilt in (np.nan, np.inf):
        Image.fromarray(np.full((8, 8), spoilt, dtype=np.float32)).save(tmp_path / "a.tif")
        with pytest.raises(UsageError, match=r"a.tif \(some pixels are NaN or infinite\)"):
            look(str(tmp_path / "a.tif"), WHITE)


def test_a_name_that_leads_to_no_file_is_named(tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "link.png")
    os.symlink("self.png", tmp_path / "self.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("link", "No such file or directory"), ("self", "symbolic links"), ("pipe", "no file")):
        with pytest.raises(UsageError, match=rf"{name}.png \(.*{reason}"):
            decoded(tmp_path / f"{name}.png")


def test_a_file_is_read_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content_of(".jpg"))
    assert decoded(tmp_path / "a.png").shape == (3, 32, 32)


def test_of_a_film_the_first_picture_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 255, 0))
    for suffix in (".gif", ".webp", ".tif", ".png", ".avif"):
        first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second])
        image = decoded(tmp_path / f"a{suffix}")
        assert image[0, 4, 4] > 250
        assert image[1, 4, 4] < 5


def test_memory_that_is_full_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        look(str(tmp_path / "a.png"), WHITE)
