"""`bngan doctor`: what is wrong with a run, a checkpoint or a recipe, with the evidence and the remedy."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from torch import Tensor, nn

from bngan import randomness
from bngan.batchnorm import (
    BatchNorm,
    Statistics,
    batch_norm_layers,
    divergence,
    recorded_statistics,
    running_statistics,
    sampling_statistics,
    score,
)
from bngan.data import ImageDataModule
from bngan.data.loader import to_unit_range
from bngan.gan import GAN
from bngan.norms import BATCH_COUPLED
from bngan.sampling import build_gan, config_beside, read_checkpoint

EPS_LIMIT = 0.01
EPS_SHARE = 0.1
DIVERGENCE_LIMIT = 0.5
DEAD_SHARE = 0.1
LARGE_VARIANCE = 1e6
SKEW_LIMIT = 0.65
CHANCE_MARGIN = 0.05
SMALL_BATCH = 16
BATCH = 256


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        name: what it is called.
        evidence: what was found, with numbers.
        remedy: what to do.
    """

    name: str
    evidence: str
    remedy: str


@dataclass(frozen=True)
class Passed:
    """What each network was given when it was looked at, in training mode and with nothing left behind.

    Attributes:
        generator: statistics of each batch norm layer of G on fresh latents, by name.
        average: likewise for the average of G's weights, empty where there is none.
        real: statistics of each batch norm layer of D on real images alone.
        fake: likewise on fakes alone.
        active: for each ReLU of G, the share of latents (C,) for which each channel is above 0 anywhere.
        d_loss: D's loss.
        chance: the least loss of a D that gives every image the same logit.
        spread: standard deviation of D's logits.
    """

    generator: dict[str, Statistics]
    average: dict[str, Statistics]
    real: dict[str, Statistics]
    fake: dict[str, Statistics]
    active: dict[str, Tensor]
    d_loss: float
    chance: float
    spread: float


def diagnose(path: Path, root: Path | None = None) -> tuple[str, list[Finding]]:
    """Return what was examined and the findings, of a run's folder, a checkpoint, or a recipe.

    Args:
        path: a run's folder, a .ckpt or a .yaml.
        root: folder of the data set; unset takes the one that the run used.

    Raises:
        ValueError: if there is nothing there that can be examined.
    """
    if path.is_dir():
        found = [path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
        existing = [checkpoint for checkpoint in found if checkpoint.is_file()]
        if not existing:
            raise ValueError(f"{path} is not a run's folder: it has no checkpoints/best.ckpt or last.ckpt")
        path = existing[0]
    if not path.is_file():
        raise ValueError(f"there is no {path}; name a run's folder, a checkpoint, or a recipe (.yaml)")
    if path.suffix in (".yaml", ".yml"):
        model, data, trainer = _recipe(path)
        # Of the penalties, which the GAN refuses with batch norm in D, the settings tell enough.
        unpenalized = {**model, "r1": 0.0, "r2": 0.0, "gradient_penalty": 0.0}
        findings = [*examine_settings(model, data, trainer), *examine_layers(GAN(**unpenalized))]
        return f"{path}: its settings and its untrained networks", findings
    content = read_checkpoint(path)
    gan = build_gan(path, content)
    data = content.get("datamodule_hyper_parameters", {})
    trainer = _trainer_settings(config_beside(path))
    real_images = _real_images(path, data, root, gan.image_shape)
    findings = [
        *examine_settings(content["hyper_parameters"], data, trainer),
        *examine_layers(gan),
        *examine_training(gan, real_images),
    ]
    return f"{path}: iteration {gan.iterations_done}, {len(real_images)} real images", findings


def _recipe(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the model's, the data's and the Trainer's settings of a recipe over the default's, checked."""
    from bngan.trainer_cli import DEFAULT_CONFIG, read_config_file

    recipes = [read_config_file(file) for file in (DEFAULT_CONFIG, path)]
    model, data, trainer = (
        {key: value for recipe in recipes for key, value in (recipe.get(group) or {}).items()}
        for group in ("model", "data", "trainer")
    )
    for group, settings, kind in (("model", model, GAN), ("data", data, ImageDataModule), ("trainer", trainer, Trainer)):
        for name in settings:
            if name not in signature(kind).parameters:
                raise ValueError(f"{path}: there is no setting {group}.{name}; see bngan fit --help.all")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(GAN, "model", instantiate=False)
    parser.add_class_arguments(ImageDataModule, "data", instantiate=False)
    checked = parser.parse_object({"model": model, "data": data}).as_dict()
    for group, name in (("model", "accumulate"), ("data", "batch_size")):
        value = checked[group][name]  # null passes the parser
        if value is None or value < 1:
            raise ValueError(f"{path}: {name} must be an int of at least 1, got {value}")
    return checked["model"], checked["data"], trainer


def _trainer_settings(config: Path | None) -> dict[str, Any]:
    """Return what a run's config.yaml tells of the Trainer, nothing where it is not there."""
    if config is None:
        return {}
    try:
        content = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config}, which belongs to the checkpoint, is damaged; move it away to do without") from error
    trainer = content.get("trainer") if isinstance(content, dict) else None
    return trainer if isinstance(trainer, dict) else {}


def _real_images(path: Path, data: dict[str, Any], root: Path | None, image_shape: tuple[int, ...]) -> Tensor:
    try:
        module = ImageDataModule(**(data if root is None else {**data, "root": str(root)}))
    except TypeError as error:
        raise ValueError(f"{path} has data settings that this version of bngan does not know: {error}") from error
    where = module.folder or module.root
    absent = f"the data that {path} was trained on is not in {where}; name its folder by --root"
    if not where.is_dir():
        raise ValueError(absent)
    if module.image_shape != image_shape:
        raise ValueError(f"{path} makes images of shape {image_shape}, but its data's settings say {module.image_shape}")
    if root is not None:  # a folder that only a checkpoint names is read, never written to
        module.prepare_data()
    try:
        return to_unit_range(module.subset(BATCH, train=True).images)
    except FileNotFoundError as error:
        raise ValueError(absent) from error


def _devices(trainer: dict[str, Any]) -> int:
    """Return how many devices the Trainer's settings ask for, 1 where that depends on the machine."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, str):
        devices = devices.split(",") if "," in devices else int(devices) if devices.isdigit() else 1
    count = len(devices) if isinstance(devices, list) else devices
    return max(1, count if isinstance(count, int) else 1) * max(1, int(trainer.get("num_nodes") or 1))


# What the settings alone tell -----------------------------------------------------------------------------------------


def examine_settings(model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with settings, named as in a recipe."""
    penalties = [name for name in ("r1", "r2", "gradient_penalty") if model.get(name)]
    if model.get("loss") == "wasserstein" and model.get("gradient_penalty") is None:
        penalties.append("gradient_penalty (wasserstein's own)")
    if penalties and model.get("d_norm", "batch") in BATCH_COUPLED:
        yield Finding(
            "penalty on a batch-normalized D",
            f"{', '.join(penalties)} with d_norm {model.get('d_norm', 'batch')}: the penalty is defined for each image by "
            "itself, and D's output for one image depends on the others",
            "--model.d_norm layer, group, spectral or none",
        )
    devices = _devices(trainer)
    normalized = {model.get("g_norm", "batch"), model.get("d_norm", "batch")} & BATCH_COUPLED
    per_device = data.get("batch_size", 128) // (devices * model.get("accumulate", 1))
    if normalized and per_device < SMALL_BATCH:
        yield Finding(
            "batch too small for batch norm",
            f"{per_device} images at a time on each device (batch_size {data.get('batch_size', 128)}, devices {devices}, "
            f"accumulate {model.get('accumulate', 1)}): the batch's variance is off by "
            f"{100 * math.sqrt(2 / max(1, per_device - 1)):.0f}% (one standard deviation) where the values are Gaussian",
            f"at least {SMALL_BATCH} images: raise --data.batch_size, lower --model.accumulate, or use norm group or layer",
        )
    if (
        model.get("ema_decay", 0.999)
        and model.get("ema_buffers", "average") == "copy"
        and model.get("g_norm", "batch") in BATCH_COUPLED
    ):
        yield Finding(
            "average of G without its buffers",
            "ema_buffers copy: the averaged weights are sampled with running statistics of other weights",
            "--model.ema_buffers average or recalibrate",
        )


# What the networks tell -----------------------------------------------------------------------------------------------


def examine_layers(gan: GAN) -> Iterator[Finding]:
    """Yield what the layers themselves tell, without any data."""
    layers = list(gan.batch_norms())
    if large := [f"{name} has eps {layer.eps:g}" for name, layer in layers if layer.eps >= EPS_LIMIT]:
        yield Finding(
            "eps that looks like a momentum",
            f"{_some(large)}; BatchNorm(n, 0.8) sets eps, and so large an eps leaves layers unnormalized",
            "--model.bn_eps 1e-5, and --model.bn_momentum for the weight of the new batch",
        )
    if biased := list(_useless_biases(gan)):
        yield Finding(
            "bias before batch norm",
            f"{_some([name for name, _ in biased])}: batch norm subtracts the mean, so these "
            f"{sum(count for _, count in biased)} weights do nothing and get noise for a gradient",
            "harmless; bias=False saves them (the text's networks have them, so they stay in network mlp)",
        )
    if not gan.iterations_done:
        return
    shares = {name: _eps_share(layer) for name, layer in layers}
    if small := [f"{name} in {share:.0%} of its channels" for name, share in shares.items() if share > DEAD_SHARE]:
        yield Finding(
            "variance no larger than eps",
            f"{_some(small)}: there the running variance is below {1 / EPS_SHARE:.0f} eps, so eps decides the scale",
            "a smaller --model.bn_eps; if the variance is 0, the channel is dead: a lower learning rate",
        )
    largest = {name: float(running_statistics(layer)[1].max()) for name, layer in layers}
    if exploding := [f"{name} up to {var:.1e}" for name, var in largest.items() if not var < LARGE_VARIANCE]:
        yield Finding(
            "exploding channels",
            f"running variance of {_some(exploding)}",
            "a lower --model.g_lr and --model.d_lr, --model.g_clip and --model.d_clip, or --model.d_norm spectral",
        )


def _eps_share(layer: BatchNorm) -> float:
    _, running_var = running_statistics(layer)
    return float((running_var * EPS_SHARE < layer.eps).float().mean())


def _useless_biases(gan: GAN) -> Iterator[tuple[str, int]]:
    """Yield the name and the size of each bias that a batch norm follows."""
    normalizing = {name for name, _ in gan.batch_norms()}
    for player in ("generator", "discriminator"):
        before: tuple[str, nn.Module] | None = None
        for name, module in getattr(gan, player).named_modules():
            if any(True for _ in module.children()):
                continue
            full = f"{player}.{name}"
            if full in normalizing and before is not None and isinstance(before[1].bias, Tensor):
                yield f"{before[0]}.bias", before[1].bias.numel()
            before = (full, module) if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) else None


# What passing real images and latents through them tells --------------------------------------------------------------


def examine_training(gan: GAN, real_images: Tensor) -> Iterator[Finding]:
    """Yield what is wrong when the networks are given real images (N, C, H, W) and as many fakes, as in training."""
    passed = pass_through(gan, real_images)
    yield from _diverged(gan, passed)
    dead = [
        f"{name} {int((share == 0).sum())} of {len(share)}"
        for name, share in passed.active.items()
        if float((share == 0).float().mean()) > DEAD_SHARE
    ]
    if dead:
        yield Finding(
            "dead channels",
            f"never above 0 for any of {len(real_images)} latents: {_some(dead)}",
            "a lower --model.g_lr; if gamma is near 0, G has switched these channels off",
        )
    at_chance = passed.d_loss >= passed.chance - CHANCE_MARGIN * (abs(passed.chance) or passed.spread)
    if at_chance and gan.batching == "separate" and any(batch_norm_layers(gan.discriminator)):
        yield Finding(
            "D blind in separate batches",
            f"D's loss is {passed.d_loss:.4f}, chance is {passed.chance:.4f}: normalizing real and fake images apart removes "
            "what tells them apart",
            "--model.batching joint",
        )
    skews = {name: _skew(layer, passed, name) for name, layer in batch_norm_layers(gan.discriminator)}
    skewed = [f"{name} {skew:.2f}" for name, skew in skews.items() if skew > SKEW_LIMIT]
    if skewed:
        yield Finding(
            "D's running statistics lean towards fakes",
            f"0 is real, 0.5 balanced, 1 fake: {_some(skewed)}",
            "--model.batching joint, which shows D both at once; in separate batches fakes come last, which a smaller "
            "--model.bn_momentum makes matter less",
        )


def _diverged(gan: GAN, passed: Passed) -> Iterator[Finding]:
    def apart(network: nn.Module, statistics: dict[str, Statistics]) -> list[str]:
        values = {name: float(divergence(layer, statistics[name]).mean()) for name, layer in batch_norm_layers(network)}
        return [f"{name} {value:.2f}" for name, value in values.items() if not value < DIVERGENCE_LIMIT]

    if found := apart(gan.generator, passed.generator):
        yield Finding(
            "running statistics far from the batch's",
            f"KL(batch || running) in nats, mean over channels, of G: {_some(found)}; samples look worse "
            "after training than in it",
            "a larger --model.bn_momentum" + (", or --model.sampling precise" if gan.default_sampling != "precise" else ""),
        )
    # With recalibrate the buffers that are kept are not those that samples are drawn with.
    kept = gan.average is not None and gan.ema_buffers != "recalibrate"
    if gan.average is not None and kept and (found := apart(gan.average.module, passed.average)):
        yield Finding(
            "average of G far from its own statistics",
            f"KL(batch || running) in nats, mean over channels, of the averaged G: {_some(found)}",
            "--model.ema_buffers average or recalibrate",
        )


def _skew(layer: BatchNorm, passed: Passed, name: str) -> float:
    """Return where the running mean lies between the mean of real images, 0, and that of fakes, 1."""
    running_mean, _ = running_statistics(layer)
    real, fake = passed.real[name].mean, passed.fake[name].mean
    apart = fake - real
    scale = (passed.real[name].var + layer.eps).sqrt()
    if float((apart / scale).square().mean()) < 1e-3:  # too close together for a place between them to mean anything
        return 0.5
    return float(((running_mean - real) * apart / scale**2).sum() / (apart / scale).square().sum())


@torch.no_grad()
def pass_through(gan: GAN, real_images: Tensor) -> Passed:
    """Give both networks one batch in training mode, real images (N, C, H, W) and as many fakes; change nothing."""
    z = randomness.normal((len(real_images), gan.latent_dim), gan.seed, randomness.Stream.RECALIBRATION, 0).to(
        gan.device, gan.dtype_of_networks
    )
    real_images = real_images.to(gan.device, gan.dtype_of_networks)
    active: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
            active[name] = (output > 0).transpose(0, 1).flatten(start_dim=1).float().mean(dim=1)

        return look

    handles = [
        module.register_forward_hook(watch(name))
        for name, module in gan.generator.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    try:
        with sampling_statistics(gan, "batch"):
            with recorded_statistics(gan.generator) as generator:
                fake_images = gan.generate(z)
            average: dict[str, list[Statistics]] = {}
            if gan.average is not None:
                with recorded_statistics(gan.average.module) as average:
                    gan.average.module(z)
            with recorded_statistics(gan.discriminator) as real:
                gan.logits(real_images)
            with recorded_statistics(gan.discriminator) as fake:
                gan.logits(fake_images)
            real_logits, fake_logits = score(gan.logits, real_images, fake_images, gan.batching)
    finally:
        for handle in handles:
            handle.remove()
    constants = torch.linspace(-3, 3, 121, device=gan.device).reshape(-1, 1, 1)
    chance = min(float(gan.loss.discriminator(constant, constant)) for constant in constants)
    return Passed(
        generator={name: batches[0] for name, batches in generator.items()},
        average={name: batches[0] for name, batches in average.items()},
        real={name: batches[0] for name, batches in real.items()},
        fake={name: batches[0] for name, batches in fake.items()},
        active=active,
        d_loss=float(gan.loss.discriminator(real_logits, fake_logits)),
        chance=chance,
        spread=float(torch.cat([real_logits, fake_logits]).std()),
    )


def _some(items: list[str], limit: int = 4) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
