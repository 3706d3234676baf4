"""`bngan doctor`: what is wrong with a run, a checkpoint or a recipe, with the evidence and the remedy."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from bngan import rng
from bngan.batching import discriminate, of_classes, pack
from bngan.batchnorm.diagnostics import kl_to_running
from bngan.batchnorm.layers import BatchNorm, batch_norm_layers, running_statistics
from bngan.batchnorm.statistics import BatchStatistics, evaluation_statistics, recorded_statistics
from bngan.checkpoint import build_gan, read_checkpoint
from bngan.data import ImageDataModule
from bngan.errors import UsageError, check_at_least
from bngan.gan import GAN
from bngan.images import to_minus1_1
from bngan.messages import explain
from bngan.norms import BATCH_COUPLED
from bngan.outcome import NOT_BEGUN, Finding, examine_course, examine_samples, not_begun
from bngan.recipes import CLASSES, DEFAULT_CONFIG, check_nulls, read_config
from bngan.run import checkpoint_of, run_of
from bngan.settings import Settings
from bngan.trainer import Trainer

EPS_LIMIT = 0.01
EPS_FRACTION = 0.1
KL_LIMIT = 0.5  # nats
DEAD_FRACTION = 0.1
LARGE_VARIANCE = 1e6
LEAST_LEAN = 0.55  # from 0.5, which is balanced, to what matters
CHANCE_MARGIN = 0.05
ALL_PAIRS = 0.999  # of a real image and a fake, told apart
LEAST_SIGNAL = 0.1  # of the way from fakes to real images; 0.01 to 0.05 where D has won, 0.3 and more where G goes on to learn
SMALL_BATCH = 16
IMAGES = 2048
LEAST_BATCHES = 8  # from which a standard error can be told
KINDS = {"model": Settings, "data": ImageDataModule, "trainer": Trainer}


@dataclass(frozen=True)
class ForwardStatistics:
    """What passed through both networks in training mode, in batches of training's size, with nothing left behind.

    Attributes:
        seen: by name of each batch norm layer of the GAN what it normalized, batch by batch: fresh latents in G and its EMA,
            and in D what `batching` puts together.
        alive: for each ReLU of G, which channels (C,) were above 0 anywhere.
        d_losses: D's loss on each batch (batches,).
        real_logits: D's logits of real images (N,).
        fake_logits: D's logits of fakes (N,).
        chance: the least loss of a D that gives every image the same logit.
        signal: what part of the way from fakes' logits to real images' G's gradient promises, if it were followed as far as a
            fake is from a real image.
    """

    seen: dict[str, list[BatchStatistics]]
    alive: dict[str, Tensor]
    d_losses: Tensor
    real_logits: Tensor
    fake_logits: Tensor
    chance: float
    signal: float


def diagnose(path: Path, root: Path | None = None) -> tuple[str, list[Finding]]:
    """Return what was examined and the findings, of a run's folder, a checkpoint, or a recipe.

    Args:
        path: a run's folder, a checkpoint, `last` for the newest run, or a .yaml.
        root: folder of the data set, or of the pictures; unset takes the one that the run used.

    Raises:
        UsageError: if there is nothing there that can be examined.
    """
    checkpoint = None if path.suffix in (".yaml", ".yml") else checkpoint_of(path)
    if not (checkpoint or path).is_file():
        raise UsageError(f"there is no {path}; name a run's folder, a checkpoint, or a recipe (.yaml)")
    return _diagnose_recipe(path) if checkpoint is None else _diagnose_checkpoint(checkpoint, root)


def _diagnose_recipe(path: Path) -> tuple[str, list[Finding]]:
    settings = _recipe(path)
    model, data, trainer = settings["model"], settings["data"], settings["trainer"]
    # Of the penalties, which the GAN refuses with batch norm in D, the settings tell enough.
    gan = GAN(**model | {"r1": 0.0, "r2": 0.0, "gradient_penalty": 0.0})
    together = data["batch_size"] // (1 if trainer["sync_batchnorm"] else _devices(trainer))
    return f"{path}: its settings and its untrained networks", [
        *examine_settings(Settings(**model), together),
        *examine_layers(gan),
    ]


def _diagnose_checkpoint(path: Path, root: Path | None) -> tuple[str, list[Finding]]:
    content = read_checkpoint(path)
    gan = build_gan(path, content)
    count = max(IMAGES, LEAST_BATCHES * int(gan.normalized_together))
    real_images, labels = _real_images(
        path, content.get("datamodule_hyper_parameters", {}), root, gan.settings.image_shape, count
    )
    run = run_of(path)
    findings = [
        *examine_settings(gan.settings, int(gan.normalized_together)),
        *examine_layers(gan),
        *examine_training(gan, real_images, labels if gan.settings.classes else None),
        *([] if run is None else examine_course(run)),
    ]
    return f"{path}: iteration {int(gan.iteration)}, {len(real_images)} real images", findings


def _recipe(path: Path) -> dict[str, dict[str, Any]]:
    """Return the model's, the data's and the Trainer's settings of a recipe over the default's, if their types are right."""
    parser = ArgumentParser(exit_on_error=False)
    for group, kind in KINDS.items():
        parser.add_class_arguments(kind, group, instantiate=False)
    files = [read_config(file) for file in (DEFAULT_CONFIG, path)]
    given = {group: {name: value for file in files for name, value in file.get(group, {}).items()} for group in KINDS}
    for group, name in (setting.split(".") for setting in CLASSES):  # to parse these would import what they name
        given.get(group, {}).pop(name, None)
    try:
        settings = parser.parse_object(given).as_dict()
    except ArgumentError as error:
        raise UsageError(f"{path}: {explain(error)}") from error
    for group, kind in KINDS.items():
        check_nulls(kind, settings[group], prefix=f"{path}: {group}.")
    check_at_least(1, f"{path}: data.", batch_size=settings["data"]["batch_size"])
    return settings


def _real_images(
    path: Path, data: dict[str, Any], root: Path | None, image_shape: tuple[int, ...], count: int
) -> tuple[Tensor, Tensor]:
    """Return `count` training images (N, C, H, W) in [-1, 1], or all, of the checkpoint's data, with labels (N,)."""
    known = {name: value for name, value in data.items() if name in signature(ImageDataModule).parameters}
    if not known:  # another's data
        if root is None:
            raise UsageError(f"{path} does not say which images it was trained on; name a folder of such pictures by --root")
        known = {"name": "folder", "folder": str(root), "image_size": image_shape[-1], "channels": image_shape[0]}
    elif root is not None:
        known["root" if known.get("folder") is None else "folder"] = str(root)
    try:
        module = ImageDataModule(**known)
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
        images, labels = module.subset(count, train=True)
        return to_minus1_1(images), labels
    except UsageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UsageError(absent) from error
        raise


# What the settings alone tell -----------------------------------------------------------------------------------------


def examine_settings(model: Settings, together: int) -> Iterator[Finding]:
    """Yield what is wrong with a GAN's settings, in training on batches in which `together` images pass G."""
    yield from _penalized_batch_norm(model)
    yield from _small_batch(model, together)
    if model.ema_decay and model.ema_buffers == "copy" and model.g_norm in BATCH_COUPLED:
        yield Finding(
            "EMA of G without its buffers",
            "ema_buffers copy: the averaged weights are sampled with running statistics of other weights",
            "--model.ema_buffers average or precise",
        )


def _penalized_batch_norm(model: Settings) -> Iterator[Finding]:
    penalties = [name for name in ("r1", "r2", "gradient_penalty") if getattr(model, name)]
    if model.loss == "wasserstein" and model.gradient_penalty is None:
        penalties.append("gradient_penalty (wasserstein's own)")
    if penalties and model.d_norm in BATCH_COUPLED:
        yield Finding(
            "penalty on a batch-normalized D",
            f"{', '.join(penalties)} with d_norm {model.d_norm}: the penalty is defined for each image by "
            "itself, and D's output for one image depends on the others",
            "--model.d_norm layer, group, spectral or none",
        )


def _small_batch(model: Settings, together: int) -> Iterator[Finding]:
    seen_by_d = 2 * together if model.batching == "joint" else together
    sizes = [
        size // (model.ghost_groups if norm == "ghost" else 1)
        for norm, size in ((model.g_norm, together), (model.d_norm, seen_by_d))
        if norm in BATCH_COUPLED
    ]
    if sizes and min(sizes) < SMALL_BATCH:
        yield Finding(
            "batch too small for batch norm",
            f"{min(sizes)} images at a time: where each gives one value and these are Gaussian, the batch's variance is off by "
            f"{100 * math.sqrt(2 / max(1, min(sizes) - 1)):.0f}% (one standard deviation)",
            f"at least {SMALL_BATCH} images: raise --data.batch_size, lower --model.ghost_groups, leave "
            "--trainer.sync_batchnorm true, or use norm group or layer",
        )


def _devices(trainer: dict[str, Any]) -> int:
    """Return how many devices the Trainer's settings ask for, 1 where that depends on the machine."""
    devices = trainer["devices"]
    count = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    return max(1, count) * max(1, trainer["num_nodes"])


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
            f"{sum(count for _, count in biased)} weights do nothing, and their gradient is rounding, which Adam amplifies",
            "bias=False, or requires_grad_(False) as in network mlp, which has them because its source has",
        )
    if gan.iteration > 0:
        yield from _running_variances(gan)


def _running_variances(gan: GAN) -> Iterator[Finding]:
    variances = {name: (running_statistics(layer)[1], layer.eps) for name, layer in gan.batch_norms()}
    fractions = {name: float((var * EPS_FRACTION < eps).float().mean()) for name, (var, eps) in variances.items()}
    if small := [f"{name} in {part:.0%} of its channels" for name, part in fractions.items() if part > DEAD_FRACTION]:
        yield Finding(
            "variance no larger than eps",
            f"{_some(small)}: there the running variance is below {1 / EPS_FRACTION:.0f} eps, so eps decides the scale",
            "a smaller --model.bn_eps; if the variance is 0, the channel is dead: a lower learning rate",
        )
    largest = {name: float(var.max()) for name, (var, _) in variances.items()}
    if exploding := [f"{name} up to {var:.1e}" for name, var in largest.items() if not var < LARGE_VARIANCE]:
        yield Finding(
            "exploding channels",
            f"running variance of {_some(exploding)}",
            "a lower --model.g_lr and --model.d_lr, --model.g_clip and --model.d_clip, or --model.d_norm spectral",
        )


def _useless_biases(gan: GAN) -> Iterator[tuple[str, int]]:
    """Yield the name and the size of each trained bias that a batch norm follows."""
    normalizing = {name for name, _ in gan.batch_norms()}
    for network in ("generator", "discriminator"):
        before: tuple[str, int] | None = None
        for name, module in gan.get_submodule(network).named_modules(prefix=network):
            if any(True for _ in module.children()):
                continue
            if name in normalizing and before is not None:
                yield before
            bias = module.bias if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) else None
            before = (f"{name}.bias", bias.numel()) if bias is not None and bias.requires_grad else None


# What passing real images and latents through them tells --------------------------------------------------------------


def examine_training(gan: GAN, real_images: Tensor, labels: Tensor | None = None) -> Iterator[Finding]:
    """Yield what is wrong when the networks are given real images (N, C, H, W) and as many fakes, as in training.

    Labels int64 (N,) tell the classes of both where there are some.
    """
    if gan.iteration == 0:
        yield not_begun(gan)
        return
    passed = pass_through(gan, real_images, labels)
    yield from (outcome := [*_winning_discriminator(passed)] or [*examine_samples(gan, real_images)])
    if NOT_BEGUN not in [finding.name for finding in outcome]:  # from which these would follow
        yield from _far_statistics(gan, passed)
        yield from _dead_channels(passed)
    if gan.settings.batching == "separate":
        yield from _blind_discriminator(gan, passed)
        yield from _leaning_statistics(gan, passed)


def _winning_discriminator(passed: ForwardStatistics) -> Iterator[Finding]:
    apart = float((passed.real_logits.unsqueeze(dim=1) > passed.fake_logits).float().mean())
    if apart >= ALL_PAIRS and passed.signal < LEAST_SIGNAL:
        yield Finding(
            "D has won",
            f"D tells {apart:.1%} of pairs of a real image and a fake apart, and is flat where G is: its gradient there, "
            f"followed as far as a real image is away, makes up {passed.signal:.1%} of what lies between their logits",
            "a lower --model.d_lr or a larger --model.g_lr, --model.instance_noise 1, or --model.loss relativistic",
        )


def _far_statistics(gan: GAN, passed: ForwardStatistics) -> Iterator[Finding]:
    if found := _far_layers(gan, "generator", passed):
        precise = "" if gan.settings.eval_statistics == "precise" else ", or --model.eval_statistics precise"
        yield Finding(
            "running statistics far from the batch's",
            f"KL(batch || running) in nats, mean over channels, of {_some(found)}; samples look worse after training than "
            "in it",
            f"a larger --model.bn_momentum{precise}",
        )
    # With ema_buffers precise the buffers that are kept are not those that samples are drawn with.
    if gan.settings.ema_buffers != "precise" and (found := _far_layers(gan, "generator_ema", passed)):
        yield Finding(
            "EMA of G far from its own statistics",
            f"KL(batch || running) in nats, mean over channels, of {_some(found)}",
            "--model.ema_buffers average or precise",
        )


def _far_layers(gan: GAN, network: str, passed: ForwardStatistics) -> list[str]:
    """Return the network's layers whose batches' mean statistics are far from the running ones, with the distance."""
    distances = {
        name: float(kl_to_running(_mean(passed.seen[name]), layer.eps).mean())
        for name, layer in batch_norm_layers(gan)
        if name.startswith(f"{network}.")
    }
    return [f"{name} {value:.2f}" for name, value in distances.items() if not value < KL_LIMIT]


def _dead_channels(passed: ForwardStatistics) -> Iterator[Finding]:
    dead = [
        f"{name} {int((~alive).sum())} of {len(alive)}"
        for name, alive in passed.alive.items()
        if float((~alive).float().mean()) > DEAD_FRACTION
    ]
    if dead:
        yield Finding(
            "dead channels",
            f"never above 0 for any of the latents: {_some(dead)}",
            "a lower --model.g_lr; if gamma is near 0, G has switched these channels off",
        )


def _blind_discriminator(gan: GAN, passed: ForwardStatistics) -> Iterator[Finding]:
    d_loss, batches = float(passed.d_losses.mean()), len(passed.d_losses)
    error = float(passed.d_losses.std(unbiased=batches > 1)) / math.sqrt(batches)
    spread = float(torch.cat([passed.real_logits, passed.fake_logits]).std())
    at_chance = d_loss - 3 * error >= passed.chance - CHANCE_MARGIN * (abs(passed.chance) or spread)
    if at_chance and any(batch_norm_layers(gan.discriminator)):
        yield Finding(
            "D blind in separate batches",
            f"D's loss is {d_loss:.4f}, chance is {passed.chance:.4f}: normalizing real and fake images apart removes what "
            "tells them apart",
            "--model.batching joint",
        )


def _leaning_statistics(gan: GAN, passed: ForwardStatistics) -> Iterator[Finding]:
    leaning = []
    for name, layer in batch_norm_layers(gan.discriminator):
        expected = expected_lean(layer.momentum or 0.0)
        if expected >= LEAST_LEAN and len(passed.d_losses) >= LEAST_BATCHES:
            lean, error = _lean(layer, passed.seen[f"discriminator.{name}"], len(passed.d_losses))
            if lean - 3 * error > (0.5 + expected) / 2:
                leaning.append(f"{name} {lean:.2f} (expected {expected:.2f})")
    if leaning:
        yield Finding(
            "D's running statistics lean towards fakes",
            f"0 is real, 0.5 balanced, 1 fake: {_some(leaning)}",
            "--model.batching joint, which shows D both at once; in separate batches fakes come last, which a smaller "
            "--model.bn_momentum makes matter less",
        )


def expected_lean(momentum: float) -> float:
    """Return where separate batches leave D's running mean between the mean of real images, 0, and that of fakes, 1.

    Each batch leaves (1 - m) of the running mean and adds m of its own. Real images and fakes come in turn and fakes last, so
    fakes have the weights m, m (1 - m)^2, m (1 - m)^4 ..., which sum to m / (1 - (1 - m)^2) = 1 / (2 - m), and real images have
    the rest: 0.526 at m = 0.1, which is harmless, 0.667 at 0.5, and 0.909 at 0.9.
    """
    return 1 / (2 - momentum)


def _lean(layer: BatchNorm, seen: list[BatchStatistics], batches: int) -> tuple[float, float]:
    """Return where the running mean lies between the mean of real images, 0, and that of fakes, 1, with its standard error.

    The line from the one to the other is drawn by every second batch and measured along by the others: drawn by the same
    ones, their noise would pass for a difference. Where there is none, the error is larger than the value, or both are NaN.

    Args:
        layer: of D.
        seen: what it saw: of each batch real images, then fakes, with a ghost norm one after the other group.
        batches: how many there were, of each.
    """
    running_mean, _ = running_statistics(layer)
    scale = torch.stack([group.var for group in seen]).mean(dim=0).add(layer.eps).sqrt()  # (C,)
    means = torch.stack([group.mean for group in seen]) / scale
    means = means.view(batches, 2, -1, len(scale)).mean(dim=2)  # (batches, real and fake, C)
    line = (means[::2, 1] - means[::2, 0]).mean(dim=0)
    places = means[1::2] @ line  # (batches / 2, real and fake)
    real, fake = places.mean(dim=0)
    real_var, fake_var = places.var(dim=0) / len(places)
    lean = (running_mean / scale @ line - real) / (fake - real)
    error = ((1 - lean).square() * real_var + lean.square() * fake_var).sqrt() / (fake - real).abs()
    return float(lean), float(error)


@torch.no_grad()
def pass_through(gan: GAN, real_images: Tensor, labels: Tensor | None = None) -> ForwardStatistics:
    """Give both networks real images (N, C, H, W) and as many fakes as in training: in its batches, with its noise.

    Labels int64 (N,) tell the classes of both where there are some.
    """
    weight = next(gan.generator.parameters())
    multiple = (gan.settings.groups or 1) * gan.settings.pack
    size = min(int(gan.normalized_together), len(real_images)) // multiple * multiple
    batches = [batch for batch in real_images.split(size) if len(batch) == size]
    logits: list[tuple[Tensor, Tensor]] = []
    promised: list[Tensor] = []
    with evaluation_statistics(gan, "batch"), recorded_statistics(gan) as seen, _alive_channels(gan.generator) as alive:
        for number, batch in enumerate(batches):
            z = rng.normal((size, gan.settings.latent_dim), gan.settings.seed, rng.Stream.PRECISE, number).to(weight)
            real_noise, fake_noise = gan.draw_instance_noise(2 * size, number).chunk(2)
            own = None if labels is None else labels[number * size : (number + 1) * size].to(weight.device)
            if gan.generator_ema is not None:
                gan.generator_ema(z, own)
            real, fake = batch.to(weight), gan.generate(z, own).requires_grad_()
            with torch.enable_grad():
                packs = (pack(images, gan.settings.pack) for images in (real + real_noise, fake + fake_noise))
                pair = discriminate(of_classes(gan.logits, own), *packs, gan.settings.batching)
                (gradient,) = torch.autograd.grad(gan.loss.generator(*pair), fake)
            logits.append((pair[0].detach().flatten(), pair[1].detach().flatten()))
            # Of all images at once: their number, by which the loss is divided, multiplies the product of both.
            promised.append(gradient.norm() * (real - fake).norm())
    constants = torch.linspace(-3, 3, 121, device=weight.device).reshape(-1, 1, 1)
    real_logits, fake_logits = (torch.cat(part) for part in zip(*logits, strict=True))
    return ForwardStatistics(
        seen=seen,
        alive=alive,
        d_losses=torch.stack([gan.loss.discriminator(real, fake) for real, fake in logits]),
        chance=min(float(gan.loss.discriminator(constant, constant)) for constant in constants),
        real_logits=real_logits,
        fake_logits=fake_logits,
        signal=float(torch.stack(promised).mean() / (real_logits.mean() - fake_logits.mean())),
    )


@contextmanager
def _alive_channels(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the block, collect by name of each ReLU which channels (C,) were above 0 anywhere."""
    alive: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module, inputs: object, output: Tensor) -> None:
        now = (output > 0).transpose(0, 1).flatten(start_dim=1).any(dim=1)
        alive[name] = alive.get(name, now) | now

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if isinstance(module, nn.ReLU):
                hooks.enter_context(module.register_forward_hook(partial(look, name)))
        yield alive


def _mean(seen: list[BatchStatistics]) -> BatchStatistics:
    """Return the mean over batches, and over the groups of a ghost norm: that is what running statistics move towards."""
    return replace(
        seen[0],
        mean=torch.stack([batch.mean for batch in seen]).mean(dim=0),
        var=torch.stack([batch.var for batch in seen]).mean(dim=0),
    )


def _some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
