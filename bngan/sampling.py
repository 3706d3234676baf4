"""Images out of a trained generator, and into files."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from torchvision.utils import make_grid

from bngan.batchnorm import Sampling
from bngan.gan import GAN, Weights

CHUNK = 500


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Walk from latents start (N, D) to end (N, D) along great circles: (N * steps, D), each walk's steps in a row.

    A straight line would pass through latents shorter than any that a standard normal draws (White 2016).
    """
    t = torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype).reshape(1, -1, 1)
    cosine = nn.functional.cosine_similarity(start, end, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.acos().reshape(-1, 1, 1)
    walk = (((1 - t) * angle).sin() * start.unsqueeze(1) + (t * angle).sin() * end.unsqueeze(1)) / angle.sin()
    return walk.flatten(end_dim=1)


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Tile images (N, C, H, W) in [-1, 1] into one (C, H', W') in [-1, 1], about square unless `columns` are given."""
    images = images.detach().float().cpu()
    scale = max(1, 56 // images.shape[-1])  # small images are enlarged, or their pixels would be hard to see
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return make_grid(images, nrow=columns or round(len(images) ** 0.5), padding=2, pad_value=-0.5)


def to_uint8(images: Tensor) -> Tensor:
    """Map images in [-1, 1] to uint8 0..255."""
    return ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(image: Tensor, path: Path) -> None:
    """Write an image (C, H, W) in [-1, 1] as a PNG."""
    pixels = to_uint8(image).permute(1, 2, 0).numpy()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)


def load_gan(checkpoint: Path, device: torch.device | str = "cpu") -> GAN:
    """Rebuild the trained networks from a checkpoint alone, in evaluation mode.

    Raises:
        ValueError: if the file is missing, damaged, or not a bngan checkpoint.
    """
    return build_gan(checkpoint, read_checkpoint(checkpoint)).to(device)


def build_gan(checkpoint: Path, content: dict) -> GAN:
    """Return the trained networks of a checkpoint's content, which was read from the path, in evaluation mode.

    Raises:
        ValueError: if it does not fit this version's networks.
    """
    check_networks(checkpoint, content)
    gan = GAN(**content["hyper_parameters"])
    gan.load_state_dict(content["state_dict"])
    gan.batch_size = content.get("datamodule_hyper_parameters", {}).get("batch_size", gan.batch_size)
    return gan.eval()


def check_networks(checkpoint: Path, content: dict) -> None:
    """Refuse settings that are not those of the weights beside them, before networks of their size are built.

    Raises:
        ValueError: if they do not fit, or not this version's networks.
    """
    try:
        with torch.device("meta"):
            expected = GAN(**content["hyper_parameters"]).state_dict()
        found = content["state_dict"]
        if odd := other_shape(expected, found):
            raise ValueError(odd)
        for name, value in expected.items():
            # A file of kilobytes can hold one number and the claim that it is a thousand billion.
            if found[name].untyped_storage().nbytes() < value.numel():
                raise ValueError(f"{name} holds less than its shape says")
        if absent := {"image_shape", "seed"} - content["hyper_parameters"].keys():
            raise ValueError(f"its settings lack {', '.join(sorted(absent))}")
    except Exception as error:  # a stranger's settings may be anything, and fail anywhere
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{checkpoint} does not fit the networks of this version of bngan: {reason}") from error


def other_shape(built: dict[str, Tensor], saved: dict[str, Tensor]) -> str | None:
    """Return in words the first weights whose shape is not the same in both, or None."""
    for name in sorted(built.keys() | saved.keys()):
        one, other = (tuple(state[name].shape) if name in state else "nothing" for state in (built, saved))
        if one != other:
            return f"the settings build {name} as {one} and the checkpoint has {other}"
    return None


def read_checkpoint(path: Path) -> dict:
    """Return a checkpoint's content, on the CPU, without running any code that it may hold.

    Raises:
        ValueError: if the file is missing, damaged, or not a bngan checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}; a run keeps them in its folder checkpoints/")
    try:
        with warnings.catch_warnings():  # that a file is none of torch's is said below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for damaged files
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(error).__name__}); use another one") from error
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise ValueError(f"{path} is not a bngan checkpoint: it has no networks' settings in it")
    if not isinstance(content.get("datamodule_hyper_parameters", {}), dict):
        raise ValueError(f"{path} is damaged: its data's settings are {content['datamodule_hyper_parameters']!r}")
    return content


def config_beside(checkpoint: Path) -> Path | None:
    """Return the config.yaml of the run in whose folder the checkpoint lies, or None if it lies in no run's."""
    folder = checkpoint.resolve().parent
    config = folder.parent / "config.yaml"
    in_a_run = folder.name == "checkpoints" and (folder.parent / "run.json").is_file()
    return config if in_a_run and config.is_file() else None


def sample(
    checkpoint: Path,
    num: int,
    seed: int,
    output: Path,
    device: str = "cpu",
    weights: Weights | None = None,
    sampling: Sampling | None = None,
) -> None:
    """Write samples 0 to num - 1 of the checkpoint's generator to `output`; weights and sampling are as in GAN.sampler.

    A path that ends in .png gets one grid, .npz gets `images` as uint8 (N, C, H, W), and any other is a folder that gets one
    PNG per sample.

    Raises:
        ValueError: if num is less than 1 or the checkpoint cannot be used.
        OSError: if the output cannot be written.
    """
    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}")
    gan = load_gan(checkpoint, device)
    starts = range(0, num, CHUNK)
    with gan.sampler(weights, sampling) as sampler:
        images = torch.cat(
            [
                sampler.samples(start, min(start + CHUNK, num), seed).cpu()
                for start in track(starts, description="sampling", disable=len(starts) < 20)
            ]
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".png":
        save_png(grid(images), output)
    elif output.suffix == ".npz":
        np.savez_compressed(output, images=to_uint8(images).numpy())
    else:
        output.mkdir(exist_ok=True)
        for number, image in enumerate(images):
            save_png(image, output / f"{number:06d}.png")
