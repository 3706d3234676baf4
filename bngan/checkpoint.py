"""What is in a checkpoint, and can it be trusted?"""

import io
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from bngan.errors import UsageError
from bngan.files import write_whole
from bngan.gan import GAN
from bngan.settings import LARGEST_BATCH

# Names of version 0.1: of settings, and of callbacks that left something in its checkpoints.
RENAMED = {
    "d_tracks_g_step": "update_d_stats_in_g_step",
    "noise": "instance_noise",
    "noise_end": "instance_noise_end",
    "sampling": "eval_statistics",
}
RENAMED_CALLBACKS = {"Checkpoints": "CheckpointSaver", "Quality": "MeasureSamples"}
BATCH_STAGES = ("ready", "started", "processed", "completed")

Content = dict[str, Any]


def read_checkpoint(path: Path, *, mmap: bool = False) -> Content:
    """Return a checkpoint's content, on the CPU and in this version's names, without running any code that it may hold.

    Args:
        path: of the file.
        mmap: whether a tensor is read off the disk only when it is used.

    Raises:
        UsageError: if the file is missing, damaged, or not a bngan checkpoint that this version can use.
    """
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}; a run keeps them in its folder checkpoints/")
    try:
        with warnings.catch_warnings():  # that a file is none of torch's is said below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises a dozen kinds for damaged files
        raise UsageError(f"{path} is damaged or not a checkpoint ({type(error).__name__}); use another one") from error
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise UsageError(f"{path} is not a bngan checkpoint: it has no networks' settings in it")
    for part in ("state_dict", "hyper_parameters", "datamodule_hyper_parameters", "callbacks"):
        if not isinstance(content.get(part, {}), dict):
            raise UsageError(f"{path} is damaged: its {part} is {content[part]!r}; use another one")
    return upgrade(content)


def upgrade(content: Content) -> Content:
    """Return a checkpoint's content in this version's names for weights, settings and callbacks; version 0.1 had others."""
    settings = {RENAMED.get(name, name): value for name, value in content["hyper_parameters"].items()}
    settings.pop("compile", None)
    if settings.get("accumulate") == 1:
        del settings["accumulate"]
    if settings.get("ema_buffers") == "recalibrate":
        settings["ema_buffers"] = "precise"
    weights = {name.replace("average.module.", "generator_ema."): value for name, value in content["state_dict"].items()}
    weights.pop("average.n_averaged", None)
    batch_size = content.get("datamodule_hyper_parameters", {}).get("batch_size")
    known = isinstance(batch_size, int) and 0 < batch_size <= LARGEST_BATCH
    weights.setdefault("normalized_together", torch.tensor(batch_size if known else 128))
    weights.setdefault("discriminator.instance_noise", torch.zeros(()))  # it is not known any more
    states = {RENAMED_CALLBACKS.get(name, name): state for name, state in content.get("callbacks", {}).items()}
    if "normalized_together" not in content["state_dict"]:  # then FID was of held-out images: its best is of another scale
        states.pop("RunProgress", None)
        if isinstance(saver := states.get("CheckpointSaver"), dict):
            states["CheckpointSaver"] = saver | {"best": None}
    with suppress(KeyError, TypeError, ValueError):  # a stranger's may be anything
        _count_iterations(content["loops"]["fit_loop"], content["global_step"])
    return {**content, "hyper_parameters": settings, "state_dict": weights, "callbacks": states}


def _count_iterations(fit_loop: dict[str, Any], iteration: int) -> None:
    """Let the Trainer's saved loop count iterations where it counted steps, each of a group of several."""
    (place,) = fit_loop["state_dict"]["combined_loader"]
    if place.pop("group") > 1:
        fit_loop["epoch_loop.batch_progress"]["current"] = dict.fromkeys(BATCH_STAGES, place["batches"])
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = iteration


def load_gan(checkpoint: Path) -> GAN:
    """Rebuild the trained networks from a checkpoint alone, in evaluation mode; in float64 if they were trained in it.

    Raises:
        UsageError: if the file is missing, damaged, or not a bngan checkpoint.
    """
    content = read_checkpoint(checkpoint)
    gan, weights = build_gan(checkpoint, content), content["state_dict"]
    if any(weights[name].dtype == torch.float64 for name, _ in gan.named_parameters()):
        gan.double().load_state_dict(weights)  # which were rounded
    return gan


def build_gan(checkpoint: Path, content: Content) -> GAN:
    """Return the trained networks of a checkpoint's content, which was read from the path, in float32 and evaluation mode.

    Raises:
        UsageError: if it does not fit this version's networks.
    """
    check_networks(checkpoint, content)
    gan = GAN(**content["hyper_parameters"])
    gan.load_state_dict(content["state_dict"])
    return gan.eval()


def check_networks(checkpoint: Path, content: Content) -> None:
    """Refuse settings that are not those of the weights beside them, before networks of their size are built.

    Raises:
        UsageError: if they do not fit, or not this version's networks.
    """
    try:
        if "accumulate" in content["hyper_parameters"]:
            raise ValueError("it was trained with --model.accumulate, which only version 0.1 has")
        with torch.device("meta"):
            expected = GAN(**content["hyper_parameters"]).state_dict()
        found = content["state_dict"]
        if mismatch := other_shape(expected, found):
            raise ValueError(mismatch)
        for name, value in expected.items():
            # A file of kilobytes can hold one number and the claim that it is a thousand billion.
            if found[name].untyped_storage().nbytes() < value.numel():
                raise ValueError(f"{name} holds less than its shape says")
        if not 0 < (together := int(found["normalized_together"])) <= LARGEST_BATCH:
            raise ValueError(f"it says that {together} images were normalized together")
        if absent := {"image_shape", "seed"} - content["hyper_parameters"].keys():
            raise ValueError(f"its settings lack {', '.join(sorted(absent))}")
    except Exception as error:  # a stranger's settings may be anything, and fail anywhere
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{checkpoint} does not fit the networks of this version of bngan: {reason}") from error


def save_gan(gan: GAN, path: Path, total: int, data: dict[str, Any] | None = None) -> None:
    """Write a checkpoint of networks alone, to be sampled, measured and examined; training cannot go on from it.

    Args:
        gan: the networks.
        path: of the file; its folder is made.
        total: iterations of the whole training.
        data: settings of the data that they were trained on, by ImageDataModule's names.

    Raises:
        OSError: if there is no room or no right to.
    """
    content = {
        "state_dict": gan.state_dict(),
        "hyper_parameters": asdict(gan.settings),
        "datamodule_hyper_parameters": data or {},
        "global_step": int(gan.iteration),
        "total_iterations": float(total),
        "pytorch-lightning_version": lightning.__version__,
    }
    buffer = io.BytesIO()  # torch does not tell a full disk from a defect when it writes there itself
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def check_training(checkpoint: Path, content: Content) -> None:
    """Refuse a checkpoint that has the networks but not all that training needs to go on: the Trainer would not say so.

    Raises:
        UsageError: saying what is missing.
    """
    iteration, loops, optimizers = iterations(content), content.get("loops"), content.get("optimizer_states")
    if not isinstance(loops, dict) or not isinstance(loops.get("fit_loop"), dict):
        reason = "it does not say how far its epoch was (loops)"
    elif not isinstance(optimizers, list) or len(optimizers) != 2:
        reason = f"it has the states of {len(optimizers) if isinstance(optimizers, list) else 0} optimizers, not of 2"
    elif not all(isinstance(state, dict) and state.get("param_groups") and state.get("state") for state in optimizers):
        reason = "one of its optimizers' states is empty"
    elif content.get("global_step") != iteration:
        reason = f"its networks are of iteration {iteration}, and the rest of it of {content.get('global_step')}"
    else:
        return
    raise UsageError(f"training cannot go on from {checkpoint}: {reason}; use another one")


def iterations(content: Content) -> int:
    """Return how many iterations the networks of a checkpoint were trained for."""
    return int(content["state_dict"]["iteration"])


def other_shape(built: dict[str, Tensor], saved: dict[str, Tensor]) -> str | None:
    """Return in words the first weights whose shape is not the same in both, or None."""
    for name in sorted(built.keys() | saved.keys()):
        one, other = (tuple(state[name].shape) if name in state else "nothing" for state in (built, saved))
        if one != other:
            return f"the settings build {name} as {one} and the checkpoint has {other}"
    return None
