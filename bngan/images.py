"""From tensors to pictures and back: ranges, grids, PNG files, walks between latents."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from bngan.errors import NonFiniteLoss


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


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Tile images (N, C, H, W) in [-1, 1] into one (C, H', W') in [-1, 1], about square unless `columns` are given."""
    images = images.detach().float().cpu()
    scale = max(1, 56 // images.shape[-1])  # small images are enlarged, or their pixels would be hard to see
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return make_grid(images, nrow=columns or round(len(images) ** 0.5), padding=2, pad_value=-0.5)


def save_png(image: Tensor, path: Path) -> None:
    """Write an image (C, H, W) in [-1, 1] as a PNG."""
    pixels = to_uint8(image).permute(1, 2, 0).numpy()  # (H, W, C)
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Walk from latents start (N, D) to end (N, D) along great circles: (N * steps, D), each walk's steps in a row.

    A straight line would pass through latents shorter than any that a standard normal draws (White 2016).
    """
    t = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype).reshape(1, -1, 1)
    cosine = nn.functional.cosine_similarity(start, end, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos().reshape(-1, 1, 1)
    walk = (((1 - t) * angle).sin() * start.unsqueeze(1) + (t * angle).sin() * end.unsqueeze(1)) / angle.sin()
    return walk.flatten(end_dim=1)
