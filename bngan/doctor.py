"""`bngan doctor`: what is wrong with a run, a checkpoint or a recipe, with the evidence and the remedy."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import formatannotation, signature
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from bngan import rng
from bngan.batching import discriminate
from bngan.batchnorm import (
    BatchNorm,
    BatchStatistics,
    batch_norm_layers,
    evaluation_statistics,
    ghost_groups,
    kl_to_running,
    recorded_statistics,
    running_statistics,
)
from bngan.checkpoint import build_gan, read_checkpoint
from bngan.data import ImageDataModule
from bngan.errors import UsageError
from bngan.gan import GAN
from bngan.images import to_minus1_1
from bngan.messages import ABSENT, explain
from bngan.norms import BATCH_COUPLED
from bngan.recipes import DEFAULT_CONFIG, read_config
from bngan.run import run_of
from bngan.trainer import Trainer

Settings = dict[str, Any]

EPS_LIMIT = 0.01
EPS_FRACTION = 0.1
KL_LIMIT = 0.5  # nats
DEAD_FRACTION = 0.1
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
class ForwardStatistics:
    """What passed through both networks in one batch, in training mode and with nothing left behind.

    Attributes:
        generator: statistics of each batch norm layer of G on fresh latents, by name.
        generator_ema: likewise for the EMA of G, empty where there is none.
        real: statistics of each batch norm layer of D on real images alone.
        fake: likewise on fakes alone.
        active: for each ReLU of G, the fraction of latents (C,) for which each channel is above 0 anywhere.
        d_loss: D's loss.
        chance: the least loss of a D that gives every image the same logit.
        spread: standard deviation of D's logits.
    """

    generator: dict[str, BatchStatistics]
    generator_ema: dict[str, BatchStatistics]
    real: dict[str, BatchStatistics]
    fake: dict[str, BatchStatistics]
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
        UsageError: if there is nothing there that can be examined.
    """
    if path.is_dir():
        found = [path / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
        existing = [checkpoint for checkpoint in found if checkpoint.is_file()]
        if not existing:
            raise UsageError(f"{path} is not a run's folder: it has no checkpoints/best.ckpt or last.ckpt")
        path = existing[0]
    if not path.is_file():
        raise UsageError(f"there is no {path}; name a run's folder, a checkpoint, or a recipe (.yaml)")
    return _diagnose_recipe(path) if path.suffix in (".yaml", ".yml") else _diagnose_checkpoint(path, root)


def _diagnose_recipe(path: Path) -> tuple[str, list[Finding]]:
    model, data, trainer = _recipe(path)
    # Of the penalties, which the GAN refuses with batch norm in D, the settings tell enough.
    gan = GAN(**{**model, "r1": 0.0, "r2": 0.0, "gradient_penalty": 0.0})
    return f"{path}: its settings and its untrained networks", [*examine_settings(model, data, trainer), *examine_layers(gan)]


def _diagnose_checkpoint(path: Path, root: Path | None) -> tuple[str, list[Finding]]:
    content = read_checkpoint(path)
    gan = build_gan(path, content)
    data = content.get("datamodule_hyper_parameters", {})
    trainer = _trainer_settings(run_of(path))
    real_images = _real_images(path, data, root, gan.image_shape)
    findings = [
        *examine_settings(content["hyper_parameters"], data, trainer),
        *examine_layers(gan),
        *examine_training(gan, real_images),
    ]
    return f"{path}: iteration {int(gan.iteration)}, {len(real_images)} real images", findings


def _recipe(path: Path) -> tuple[Settings, Settings, Settings]:
    """Return the model's, the data's and the Trainer's settings of a recipe over the default's, checked."""
    recipes = [read_config(file) for file in (DEFAULT_CONFIG, path)]
    groups: dict[str, Settings] = {
        group: {name: value for recipe in recipes for name, value in (recipe.get(group) or {}).items()}
        for group in ("model", "data", "trainer")
    }
    for group, kind in (("model", GAN), ("data", ImageDataModule), ("trainer", Trainer)):
        for name in groups[group]:
            if name not in signature(kind).parameters:
                reason = ABSENT.get(f"{group}.{name}", "see bngan fit --help.all")
                raise UsageError(f"{path}: there is no setting {group}.{name}; {reason}")
    model, data = _checked(path, "model", GAN, groups["model"]), _checked(path, "data", ImageDataModule, groups["data"])
    if data["batch_size"] < 1:
        raise UsageError(f"{path}: data.batch_size must be at least 1, got {data['batch_size']}")
    return model, data, groups["trainer"]


def _checked(path: Path, group: str, kind: type, settings: Settings) -> Settings:
    """Return the settings, with the class's defaults for those that are not given, if their types are right."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, group, instantiate=False)
    try:
        checked = parser.parse_object({group: settings}).as_dict()[group]
    except ArgumentError as error:
        raise UsageError(f"{path}: {explain(error)}") from error
    for name, parameter in signature(kind).parameters.items():
        if checked[name] is None and parameter.default is not None:  # which passes the parser
            expected = formatannotation(parameter.annotation)
            raise UsageError(f"{path}: {group}.{name}: null is not allowed; expected {expected}")
    return checked


def _trainer_settings(run: Path | None) -> Settings:
    """Return what a run's config.yaml tells of the Trainer, nothing where there is no run."""
    if run is None:
        return {}
    config = run / "config.yaml"
    try:
        content = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{config}, which belongs to the checkpoint, is damaged; move it away to do without") from error
    trainer = content.get("trainer") if isinstance(content, dict) else None
    return trainer if isinstance(trainer, dict) else {}


def _real_images(path: Path, data: Settings, root: Path | None, image_shape: tuple[int, ...]) -> Tensor:
    """Return training images (N, C, H, W) in [-1, 1] of the data set that the checkpoint was trained on."""
    known = {name: value for name, value in data.items() if name in signature(ImageDataModule).parameters}
    try:
        module = ImageDataModule(**(known if root is None else {**known, "root": str(root)}))
    except TypeError as error:
        raise UsageError(f"{path} has data settings that do not fit this version of bngan: {error}") from error
    where = module.folder or module.root
    absent = f"the data that {path} was trained on is not in {where}; name its folder by --root"
    if not where.is_dir():
        raise UsageError(absent)
    if module.image_shape != image_shape:
        raise UsageError(f"{path} makes images of shape {image_shape}, but its data's settings say {module.image_shape}")
    if root is not None:  # a folder that only a checkpoint names is read, never written to
        module.prepare_data()
    try:
        return to_minus1_1(module.subset(BATCH, train=True).images)
    except UsageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UsageError(absent) from error
        raise


# What the settings alone tell -----------------------------------------------------------------------------------------


def examine_settings(model: Settings, data: Settings, trainer: Settings) -> Iterator[Finding]:
    """Yield what is wrong with settings, named as in a recipe; those that are not given have their defaults."""
    model, data = _defaults(GAN) | model, _defaults(ImageDataModule) | data
    yield from _penalized_batch_norm(model)
    yield from _small_batch(model, data, trainer)
    if model["ema_decay"] and model["ema_buffers"] == "copy" and model["g_norm"] in BATCH_COUPLED:
        yield Finding(
            "EMA of G without its buffers",
            "ema_buffers copy: the averaged weights are sampled with running statistics of other weights",
            "--model.ema_buffers average or precise",
        )


def _defaults(kind: type) -> Settings:
    return {name: parameter.default for name, parameter in signature(kind).parameters.items()}


def _penalized_batch_norm(model: Settings) -> Iterator[Finding]:
    penalties = [name for name in ("r1", "r2", "gradient_penalty") if model[name]]
    if model["loss"] == "wasserstein" and model["gradient_penalty"] is None:
        penalties.append("gradient_penalty (wasserstein's own)")
    if penalties and model["d_norm"] in BATCH_COUPLED:
        yield Finding(
            "penalty on a batch-normalized D",
            f"{', '.join(penalties)} with d_norm {model['d_norm']}: the penalty is defined for each image by "
            "itself, and D's output for one image depends on the others",
            "--model.d_norm layer, group, spectral or none",
        )


def _small_batch(model: Settings, data: Settings, trainer: Settings) -> Iterator[Finding]:
    normalized = {model["g_norm"], model["d_norm"]} & BATCH_COUPLED
    devices, groups = _devices(trainer), model["ghost_groups"]
    together = [data["batch_size"] // (groups if norm == "ghost" else devices) for norm in normalized]
    if together and min(together) < SMALL_BATCH:
        yield Finding(
            "batch too small for batch norm",
            f"{min(together)} images at a time (batch_size {data['batch_size']}, devices {devices}, ghost_groups {groups}): "
            f"the batch's variance is off by {100 * math.sqrt(2 / max(1, min(together) - 1)):.0f}% (one standard deviation) "
            "where the values are Gaussian",
            f"at least {SMALL_BATCH} images: raise --data.batch_size, lower --model.ghost_groups, or use norm group or layer",
        )


def _devices(trainer: Settings) -> int:
    """Return how many devices the Trainer's settings ask for, 1 where that depends on the machine."""
    devices = trainer.get("devices", 1)
    if isinstance(devices, str):
        devices = devices.split(",") if "," in devices else int(devices) if devices.isdigit() else 1
    count = len(devices) if isinstance(devices, list) else devices
    return max(1, count if isinstance(count, int) else 1) * max(1, int(trainer.get("num_nodes") or 1))


# What the networks tell -----------------------------------------------------------------------------------------------


def examine_layers(gan: GAN) -> Iterator[Finding]:
    """Yield what the layers themselves tell, without any data."""
    if large := [f"{name} has eps {layer.eps:g}" for name, layer in gan.batch_norms() if layer.eps >= EPS_LIMIT]:
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
            "harmless; bias=False would save them (network mlp has them because its source has)",
        )
    if gan.iteration > 0:
        yield from _running_variances(gan)


def _running_variances(gan: GAN) -> Iterator[Finding]:
    fractions = {name: _eps_fraction(layer) for name, layer in gan.batch_norms()}
    if small := [f"{name} in {part:.0%} of its channels" for name, part in fractions.items() if part > DEAD_FRACTION]:
        yield Finding(
            "variance no larger than eps",
            f"{_some(small)}: there the running variance is below {1 / EPS_FRACTION:.0f} eps, so eps decides the scale",
            "a smaller --model.bn_eps; if the variance is 0, the channel is dead: a lower learning rate",
        )
    largest = {name: float(running_statistics(layer)[1].max()) for name, layer in gan.batch_norms()}
    if exploding := [f"{name} up to {var:.1e}" for name, var in largest.items() if not var < LARGE_VARIANCE]:
        yield Finding(
            "exploding channels",
            f"running variance of {_some(exploding)}",
            "a lower --model.g_lr and --model.d_lr, --model.g_clip and --model.d_clip, or --model.d_norm spectral",
        )


def _eps_fraction(layer: BatchNorm) -> float:
    """Return the fraction of channels whose variance is so small that eps decides the scale."""
    _, running_var = running_statistics(layer)
    return float((running_var * EPS_FRACTION < layer.eps).float().mean())


def _useless_biases(gan: GAN) -> Iterator[tuple[str, int]]:
    """Yield the name and the size of each bias that a batch norm follows."""
    normalizing = {name for name, _ in gan.batch_norms()}
    for network in ("generator", "discriminator"):
        before: tuple[str, nn.Module] | None = None
        for name, module in gan.get_submodule(network).named_modules(prefix=network):
            if any(True for _ in module.children()):
                continue
            if name in normalizing and before is not None and isinstance(before[1].bias, Tensor):
                yield f"{before[0]}.bias", before[1].bias.numel()
            before = (name, module) if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) else None


# What passing real images and latents through them tells --------------------------------------------------------------


def examine_training(gan: GAN, real_images: Tensor) -> Iterator[Finding]:
    """Yield what is wrong when the networks are given real images (N, C, H, W) and as many fakes, as in training."""
    passed = pass_through(gan, real_images)
    yield from _far_statistics(gan, passed)
    yield from _dead_channels(passed)
    yield from _blind_discriminator(gan, passed)
    yield from _leaning_statistics(gan, passed)


def _far_statistics(gan: GAN, passed: ForwardStatistics) -> Iterator[Finding]:
    if found := _far_layers(gan.generator, passed.generator):
        precise = "" if gan.eval_statistics == "precise" else ", or --model.eval_statistics precise"
        yield Finding(
            "running statistics far from the batch's",
            f"KL(batch || running) in nats, mean over channels, of G: {_some(found)}; samples look worse "
            "after training than in it",
            f"a larger --model.bn_momentum{precise}",
        )
    # With ema_buffers precise the buffers that are kept are not those that samples are drawn with.
    if gan.generator_ema is None or gan.ema_buffers == "precise":
        return
    if found := _far_layers(gan.generator_ema, passed.generator_ema):
        yield Finding(
            "EMA of G far from its own statistics",
            f"KL(batch || running) in nats, mean over channels, of the EMA of G: {_some(found)}",
            "--model.ema_buffers average or precise",
        )


def _far_layers(network: nn.Module, statistics: dict[str, BatchStatistics]) -> list[str]:
    """Return the network's layers whose batch is far from the running statistics, with the distance."""
    distances = {name: float(kl_to_running(layer, statistics[name]).mean()) for name, layer in batch_norm_layers(network)}
    return [f"{name} {value:.2f}" for name, value in distances.items() if not value < KL_LIMIT]


def _dead_channels(passed: ForwardStatistics) -> Iterator[Finding]:
    dead = [
        f"{name} {int((fraction == 0).sum())} of {len(fraction)}"
        for name, fraction in passed.active.items()
        if float((fraction == 0).float().mean()) > DEAD_FRACTION
    ]
    if dead:
        yield Finding(
            "dead channels",
            f"never above 0 for any of the latents: {_some(dead)}",
            "a lower --model.g_lr; if gamma is near 0, G has switched these channels off",
        )


def _blind_discriminator(gan: GAN, passed: ForwardStatistics) -> Iterator[Finding]:
    at_chance = passed.d_loss >= passed.chance - CHANCE_MARGIN * (abs(passed.chance) or passed.spread)
    if at_chance and gan.batching == "separate" and any(batch_norm_layers(gan.discriminator)):
        yield Finding(
            "D blind in separate batches",
            f"D's loss is {passed.d_loss:.4f}, chance is {passed.chance:.4f}: normalizing real and fake images apart removes "
            "what tells them apart",
            "--model.batching joint",
        )


def _leaning_statistics(gan: GAN, passed: ForwardStatistics) -> Iterator[Finding]:
    skews = {name: _skew(layer, passed.real[name], passed.fake[name]) for name, layer in batch_norm_layers(gan.discriminator)}
    if skewed := [f"{name} {skew:.2f}" for name, skew in skews.items() if skew > SKEW_LIMIT]:
        yield Finding(
            "D's running statistics lean towards fakes",
            f"0 is real, 0.5 balanced, 1 fake: {_some(skewed)}",
            "--model.batching joint, which shows D both at once; in separate batches fakes come last, which a smaller "
            "--model.bn_momentum makes matter less",
        )


def _skew(layer: BatchNorm, real: BatchStatistics, fake: BatchStatistics) -> float:
    """Return where the running mean lies between the mean of real images, 0, and that of fakes, 1."""
    running_mean, _ = running_statistics(layer)
    scale = (real.var + layer.eps).sqrt()
    apart = (fake.mean - real.mean) / scale
    if float(apart.square().mean()) < 1e-3:  # too close together for a place between them to mean anything
        return 0.5
    return float(((running_mean - real.mean) / scale * apart).sum() / apart.square().sum())


@torch.no_grad()
def pass_through(gan: GAN, real_images: Tensor) -> ForwardStatistics:
    """Give both networks one batch in training mode, real images (N, C, H, W) and as many fakes; change nothing."""
    weight = next(gan.generator.parameters())
    real_images = real_images.to(weight.device, weight.dtype)
    groups = ghost_groups(gan)
    real_images = real_images[: len(real_images) // groups * groups]
    z = rng.normal((len(real_images), gan.latent_dim), gan.seed, rng.Stream.PRECISE, 0).to(weight.device, weight.dtype)
    with evaluation_statistics(gan, "batch"):
        with recorded_statistics(gan.generator) as generator, _active_channels(gan.generator) as active:
            fake_images = gan.generate(z)
        generator_ema: dict[str, list[BatchStatistics]] = {}
        if gan.generator_ema is not None:
            with recorded_statistics(gan.generator_ema) as generator_ema:
                gan.generator_ema(z)
        with recorded_statistics(gan.discriminator) as real:
            gan.logits(real_images)
        with recorded_statistics(gan.discriminator) as fake:
            gan.logits(fake_images)
        real_logits, fake_logits = discriminate(gan.logits, real_images, fake_images, gan.batching)
    constants = torch.linspace(-3, 3, 121, device=weight.device).reshape(-1, 1, 1)
    return ForwardStatistics(
        generator=_over_groups(generator),
        generator_ema=_over_groups(generator_ema),
        real=_over_groups(real),
        fake=_over_groups(fake),
        active=active,
        d_loss=float(gan.loss.discriminator(real_logits, fake_logits)),
        chance=min(float(gan.loss.discriminator(constant, constant)) for constant in constants),
        spread=float(torch.cat([real_logits, fake_logits]).std()),
    )


@contextmanager
def _active_channels(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the block, collect by name of each ReLU the fraction of inputs (C,) for which a channel is above 0 anywhere."""
    active: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        active[name] = (output > 0).transpose(0, 1).flatten(start_dim=1).float().mean(dim=1)

    relus = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.ReLU)]
    handles = [module.register_forward_hook(partial(look, name)) for name, module in relus]
    try:
        yield active
    finally:
        for handle in handles:
            handle.remove()


def _over_groups(seen: dict[str, list[BatchStatistics]]) -> dict[str, BatchStatistics]:
    """Return the mean over the groups of a ghost norm, towards which its running statistics move; others have one group."""
    return {
        name: BatchStatistics(
            mean=torch.stack([group.mean for group in groups]).mean(dim=0),
            var=torch.stack([group.var for group in groups]).mean(dim=0),
            count=sum(group.count for group in groups),
        )
        for name, groups in seen.items()
    }


def _some(items: list[str], limit: int = 4) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
