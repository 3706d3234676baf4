"""From tensors to pictures and back: ranges, grids, files, walks between latents."""

import math
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from bngan.distributed import print0
from bngan.errors import NonFiniteLoss, UsageError
from bngan.files import write_whole

OutputKind = Literal["folder", "numbers", "grid"]
MOST_PIXELS = 89_000_000  # of a picture; beyond, Pillow takes it for an attack, and other programs open none
PADDING = 2
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
    return make_grid(images, nrow=columns or round(len(images) ** 0.5), padding=PADDING, pad_value=-0.5)


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
    _picture(image).save(path)


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


def write_images(images: Tensor, path: Path, kind: OutputKind) -> None:
    """Write images (N, C, H, W) in [-1, 1]: one file is there as a whole or not at all.

    Args:
        images: what to write.
        path: where.
        kind: a folder of PNGs; numbers, uint8 (N, C, H, W) as .npy or .npz; or a grid, as any picture.

    Raises:
        OSError: if there is no room or no right to.
    """
    if kind == "folder":
        path.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            save_png(image, path / f"{number:06d}.png")
        return
    content = BytesIO()
    if kind == "grid":  # the quality is for formats that lose some of it
        _picture(grid(images)).save(content, format=_picture_format(path), quality=95)
    elif path.suffix.lower() == ".npy":
        np.save(content, to_uint8(images).numpy())
    else:
        np.savez_compressed(content, images=to_uint8(images).numpy())
    write_whole(path, content.getbuffer())


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


def _picture(image: Tensor) -> Image.Image:
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
