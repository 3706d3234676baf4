"""From tensors to pictures and back: ranges, grids, files, walks between latents."""

import math
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import IO, Literal
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bngan.distributed import print0
from bngan.errors import NonFiniteLoss, UsageError
from bngan.files import open_whole, write_whole

OutputKind = Literal["folder", "numbers", "grid"]
MOST_PIXELS = 89_000_000  # of a picture; beyond, Pillow takes it for an attack, and other programs open none
PADDING = 2
GREY = -0.5  # of the border
ROUNDING = 0.01
ICONS = ("ICO", "ICNS")  # Pillow shrinks what it writes as one


def to_minus1_1(images: Tensor) -> Tensor:
    """Map images from uint8 0..255 to float32 [-1, 1]."""
    return images.to(torch.float32).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Map images in [-1, 1] to the nearest of uint8 0..255, on the CPU.

    Raises:
        NonFiniteLoss: if there are NaN values among them, which would become black pixels.
    """
    images = images.detach().float().cpu()
    if images.isnan().any():
        raise NonFiniteLoss("images have NaN values, because the generator's weights have some: take an earlier checkpoint")
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def fitting(count: int, image_shape: tuple[int, int, int], max_bytes: float) -> int:
    """Return `count`, or as many images (C, H, W) in float32 as take so much memory if these are fewer, but at least 1."""
    return min(count, max(1, int(max_bytes / (4 * math.prod(image_shape)))))


def check_range(images: Tensor) -> None:
    """Refuse images to train on that reach beyond [-1, 1], where G's tanh makes its own, and say so where none is below 0.

    Raises:
        UsageError: saying how to bring them there.
    """
    remedy = "after torchvision's ToTensor add Normalize(mean=[0.5], std=[0.5])"
    low, high = (float(value) for value in images.aminmax())  # a CPU-GPU sync point
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        raise UsageError(f"images to train on must be in [-1, 1], and these reach from {low:.3g} to {high:.3g}; {remedy}")
    if low >= 0:
        print0(f"No pixel of the first batch is below 0, but images should be in [-1, 1]; {remedy}")


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Tile images (N, C, H, W) in [-1, 1] into one (C, H', W') in [-1, 1], about square unless `columns` are given."""
    images = images.detach().float().cpu()
    scale = _enlargement(images.shape[-1])
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if len(images) == 1:
        return images[0]
    count, channels, height, width = images.shape
    across = min(columns or round(count**0.5), count)
    rows = math.ceil(count / across)
    tiles = torch.full((rows * across, channels, height + PADDING, width + PADDING), GREY)  # a border above and at the left
    tiles[:count, :, PADDING:, PADDING:] = images
    tiled = tiles.unflatten(0, (rows, across)).permute(2, 0, 3, 1, 4)  # (C, rows, H, columns, W)
    tiled = tiled.reshape(channels, rows * (height + PADDING), across * (width + PADDING))
    return nn.functional.pad(tiled, (0, PADDING, 0, PADDING), value=GREY)


def check_grid(count: int, image_shape: tuple[int, int, int]) -> None:
    """Refuse to tile more images (C, H, W) than a picture can have that programs still open.

    Raises:
        UsageError: saying how many it can have.
    """
    _, height, width = image_shape
    scale = _enlargement(width)
    most = MOST_PIXELS // ((height * scale + PADDING) * (width * scale + PADDING))
    if count > most:
        raise UsageError(f"one picture has room for {most} such images, not {count}; give --output a folder, or .npz")


def _enlargement(width: int) -> int:
    """Return how many times larger small images are shown, or their pixels would be hard to see."""
    return max(1, 56 // width)


def save_png(image: Tensor, path: Path) -> None:
    """Write an image (C, H, W) in [-1, 1] as a PNG."""
    to_picture(image).save(path)


def output_kind(output: str) -> OutputKind:
    """Return as what images are to be written where a path says so by its suffix, in small letters or capitals.

    Raises:
        UsageError: if it is a suffix of nothing that can be written.
    """
    path = Path(output)
    if output.endswith("/") or path.is_dir() or not path.suffix:
        return "folder"
    if path.suffix.lower() in (".npy", ".npz"):
        return "numbers"
    _picture_format(path)
    return "grid"


def write_images(parts: Iterable[Tensor], path: Path, kind: OutputKind, count: int, columns: int | None = None) -> None:
    """Write images in [-1, 1]: one file is there as a whole or not at all, and only a grid has all of them in memory.

    Args:
        parts: what to write, in batches (n, C, H, W).
        path: where.
        kind: a folder of PNGs; numbers, uint8 (N, C, H, W) as .npy or .npz; or a grid, as any picture.
        count: N, how many images all parts have.
        columns: of a grid; unset, it is about square.

    Raises:
        OSError: if there is no room or no right to.
    """
    if kind == "folder":
        for number, image in enumerate(image for part in parts for image in part):
            path.mkdir(parents=True, exist_ok=True)
            save_png(image, path / f"{number:06d}.png")
    elif kind == "grid":
        content = BytesIO()
        picture = to_picture(grid(torch.cat([*parts]), columns))
        picture.save(content, format=_picture_format(path), quality=95)  # which is for formats that lose some of it
        write_whole(path, content.getbuffer())
    else:
        with open_whole(path) as file:
            if path.suffix.lower() == ".npy":
                _write_numbers(parts, count, file)
                return
            with ZipFile(file, "w", ZIP_DEFLATED) as archive, archive.open("images.npy", "w", force_zip64=True) as member:
                _write_numbers(parts, count, member)


def _write_numbers(parts: Iterable[Tensor], count: int, file: IO[bytes]) -> None:
    """Write `count` images in [-1, 1], in batches (n, C, H, W), as numpy's file of uint8 (N, C, H, W)."""
    written = 0
    for part in parts:
        if not written:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *part.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        written += len(part)
        file.write(to_uint8(part).numpy().data)
    assert written == count


def _picture_format(path: Path) -> str:
    """Return Pillow's name of a path's format; refuse one in which it cannot write colours."""
    name = Image.registered_extensions().get(path.suffix.lower(), "")
    try:
        if name in ICONS:
            raise KeyError(name)
        Image.new("RGB", (16, 16)).save(BytesIO(), format=name)
    except (KeyError, OSError, ValueError) as error:
        raise UsageError(
            f"--output {path}: nothing writes colour pictures as {path.suffix}; choose .png, .jpg, .webp, .tif, .gif, .pdf, "
            ".npy or .npz, or end it with / for a folder"
        ) from error
    return name


def to_picture(image: Tensor) -> Image.Image:
    """Return an image (C, H, W) in [-1, 1] as Pillow has it."""
    pixels = to_uint8(image).permute(1, 2, 0).numpy()  # (H, W, C)
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Walk from latents start (N, D) to end (N, D) along great circles: (N * steps, D), each walk's steps in a row.

    A straight line would pass through latents shorter than any that a standard normal draws (White 2016).
    """
    t = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype).reshape(1, -1, 1)
    cosine = nn.functional.cosine_similarity(start, end, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos().reshape(-1, 1, 1)
    walk = (((1 - t) * angle).sin() * start.unsqueeze(1) + (t * angle).sin() * end.unsqueeze(1)) / angle.sin()
    return walk.flatten(end_dim=1)
