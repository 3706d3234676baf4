"""How do I get a trained generator, and samples from it?"""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from bngan.batchnorm.layers import batch_norm_layers
from bngan.batchnorm.statistics import EVAL_STATISTICS, EvalStatistics
from bngan.blocks import DiscriminatorNetwork, GeneratorNetwork
from bngan.errors import UsageError, check_at_least
from bngan.export.about import About, current_versions
from bngan.export.card import card
from bngan.export.forms import FORMS, read, write
from bngan.files import expand_home, write_whole
from bngan.images import fitting, write_images
from bngan.pretrained import DISCRIMINATOR, find_pretrained
from bngan.sampler import Sampler, Weights, sampler_of
from bngan.settings import Settings
from bngan.truncation import Truncated

LARGEST_CHUNK = 500  # samples drawn at a time
CHUNK_VALUES = 4_000_000  # and their pixels' values, since G holds many times as much meanwhile
SHOWN = 64  # samples in a model card's picture
REPORTS = ("validate.json", "quality.json")  # what a run's folder says of its samples


def load(
    path: str | Path | None = None,
    weights: Weights | None = None,
    statistics: EvalStatistics | None = None,
    device: str | torch.device = "cpu",
    *,
    pretrained: str | None = None,
    trust: bool = False,
) -> "TrainedGenerator":
    """Return a trained generator that is ready to be sampled, from what `bngan sample` takes, and it gives the same samples.

    Args:
        path: a checkpoint; a run's folder, which means its best checkpoint; `last`, the newest run under runs/; or a file that
            `bngan export` has written.
        weights: raw for G's weights, ema for their moving average; unset means the average where there is one.
        statistics: what normalizes the samples: running, batch or precise; unset means as in the run, or as exported.
        device: cpu; gpu, which is whatever accelerator there is; or one of torch's, such as cuda:1.
        pretrained: the name of a generator that comes with the package, instead of a path.
        trust: whether to read a .pt2, too, which can run code.

    Raises:
        UsageError: saying what is missing, damaged, or not to be had.
    """
    found = find_device(str(device))
    _check_choices(weights, statistics)
    file = _file_of(path, pretrained)
    if file.suffix.lower() in FORMS:
        return _load_exported(file, weights, statistics, found, trust=trust)
    return _load_checkpoint(file, weights, statistics, found)


@dataclass(frozen=True)
class TrainedGenerator:
    """A generator in evaluation mode; nothing that it is asked for changes it.

    Attributes:
        sampler: it, with the statistics that normalize its samples.
        about: what is known of it.
        source: the file that it is from.
    """

    sampler: Sampler
    about: About
    source: Path

    @property
    def settings(self) -> Settings:
        """Those of its GAN."""
        return self.about.settings

    def sample(self, count: int, seed: int = 0, *, label: int | None = None, truncation: float | None = None) -> Tensor:
        """Return samples (count, C, H, W) in [-1, 1], float32 on the CPU; see `chunks` for all else."""
        return torch.cat([*self.chunks(count, seed, label=label, truncation=truncation)])

    def chunks(
        self, count: int, seed: int = 0, *, label: int | None = None, truncation: float | None = None
    ) -> Iterator[Tensor]:
        """Yield samples (n, C, H, W) in [-1, 1], float32 on the CPU, until there are `count`; so many need not fit in memory.

        Sample i is the same however many are drawn; with statistics batch its batch-mates are those of its block.

        Args:
            count: how many.
            seed: of their latents.
            label: class of all of them; unset, sample i is of class i mod classes, where there are any.
            truncation: largest value of a latent, as by `truncated`; unset means no limit.

        Raises:
            UsageError: if count is below 1, the truncation not above 0, or there is no such class.
        """
        check_at_least(1, count=count)
        sampler = self.sampler
        if truncation is not None:
            if not truncation > 0:
                raise UsageError(f"truncation must be above 0, got {truncation}; 2 leaves out 5% of a latent's values, 0.5 62%")
            sampler = replace(sampler, network=Truncated(sampler.network, truncation))
        chunk = sampler.block or fitting(LARGEST_CHUNK, sampler.image_shape, max_bytes=4 * CHUNK_VALUES)
        for start in range(0, count, chunk):
            with torch.no_grad():
                yield sampler.samples(start, min(start + chunk, count), seed, label).float().cpu()

    @torch.no_grad()
    def generate(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents (N, latent_dim), best standard normal, to images (N, C, H, W) in [-1, 1] on the generator's device.

        Where there are classes, labels int64 (N,) tell those of the images; without them, image i is of class i mod classes.
        """
        return self.sampler.generate(z, labels)

    def export(self, path: str | Path, *, fold: bool = False) -> float:
        """Write the generator as a file for other programs, and beside it README.md, a model card, and a picture of samples.

        Args:
            path: of the file, .safetensors, .onnx or .pt2; what is there is replaced.
            fold: whether its batch norm becomes part of the layers before it.

        Returns:
            The largest difference between its images and those that the file's generator makes of the same latents.

        Raises:
            UsageError: if the file would give other images, or there is no such form of this generator.
            OSError: if there is no room or no right to.
        """
        network, path = self.sampler.network, Path(expand_home(str(path)))
        if not isinstance(network, GeneratorNetwork):
            raise UsageError(f"{self.source} is a graph already; export from a checkpoint or a .safetensors")
        if self.sampler.block is not None:
            raise UsageError(
                "statistics batch normalize a sample by the others of its batch, so that no file could give it for its latent "
                "alone; take running or precise"
            )
        about = self.about if self.about.sha256 else with_origin(self.about, self.source)
        about = replace(about, versions=current_versions())
        difference = write(network, about, path, fold=fold)
        picture = path.with_suffix(".png")
        write_images(self.chunks(SHOWN), picture, "grid", SHOWN)
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        text = card(replace(about, folded=about.folded or fold), path, picture.name, difference, dtype)
        write_whole(path.with_name("README.md"), text.encode())
        return difference


# From where ---------------------------------------------------------------------------------------------------------------


class Networks(NamedTuple):
    """The two networks of a trained GAN, in evaluation mode, and in words where they are from."""

    generator: GeneratorNetwork
    discriminator: DiscriminatorNetwork
    source: str


def load_networks(path: str | Path | None = None, *, pretrained: str | None = None) -> Networks:
    """Return a trained GAN's generator, the average of its weights where there is one, and its discriminator.

    Args:
        path: a checkpoint, a run's folder or `last`, as for `load`.
        pretrained: the name of networks that come with the package, instead of a path.

    Raises:
        UsageError: saying what is missing, damaged, or not to be had.
    """
    if pretrained is not None and path is None:
        generator, discriminator = (read(find_pretrained(pretrained + end)).network for end in ("", DISCRIMINATOR))
        assert isinstance(generator, GeneratorNetwork)
        assert isinstance(discriminator, DiscriminatorNetwork)
        return Networks(generator, discriminator, f"the pretrained {pretrained}")
    file = _file_of(path, pretrained)
    if file.suffix.lower() in FORMS:
        raise UsageError(f"{file} has a generator alone; name a checkpoint, a run's folder or last, which have both networks")
    from bngan.checkpoint import load_gan
    from bngan.run import checkpoint_of

    checkpoint = checkpoint_of(file)
    gan = load_gan(checkpoint)
    return Networks(gan.generator_ema or gan.generator, gan.discriminator, str(checkpoint))


def _file_of(path: str | Path | None, pretrained: str | None) -> Path:
    if (path is None) == (pretrained is None):
        raise UsageError("name a checkpoint, a run's folder, last or an exported file; or else a pretrained generator")
    return Path(expand_home(str(path))) if pretrained is None else find_pretrained(pretrained)


def _check_choices(weights: str | None, statistics: str | None) -> None:
    for name, value, allowed in (("weights", weights, get_args(Weights)), ("statistics", statistics, EVAL_STATISTICS)):
        if value is not None and value not in allowed:
            raise UsageError(f"unknown {name} {value!r}; choose from {', '.join(allowed)}")


def _load_exported(
    path: Path, weights: Weights | None, statistics: EvalStatistics | None, device: torch.device, *, trust: bool
) -> TrainedGenerator:
    network, about = read(path, trust=trust)
    if about.network != "generator":
        raise UsageError(f"{path} has a {about.network}, which draws nothing; take a generator's file")
    if weights not in (None, about.weights):
        raise UsageError(f"{path} has the weights {about.weights} alone; leave out weights, or take the checkpoint")
    settings, shape = about.settings, about.settings.image_shape
    if isinstance(network, GeneratorNetwork) and not about.folded:
        _check_has_statistics(network, statistics)
        sampler = _ready(network.to(device), None, settings, about.batch_size, "raw", statistics or "running")
        if statistics not in (None, about.statistics):  # of which the metrics are not
            about = replace(about, statistics=statistics, metrics={})
    elif statistics not in (None, about.statistics):
        raise UsageError(
            f"{path} has {about.statistics} statistics alone, as exported; leave out statistics, or take the checkpoint"
        )
    elif device.type != "cpu" and not isinstance(network, GeneratorNetwork):
        raise UsageError(f"{path} is run on the processor; leave out device, or take .safetensors")
    else:
        sampler = Sampler(network.to(device), shape, settings.latent_dim, classes=settings.classes)
    return TrainedGenerator(sampler, about, path)


def _load_checkpoint(
    path: Path, weights: Weights | None, statistics: EvalStatistics | None, device: torch.device
) -> TrainedGenerator:
    # Lightning takes as long to import as all else, and exported files do without.
    from bngan.checkpoint import load_gan
    from bngan.run import checkpoint_of

    checkpoint = checkpoint_of(path)
    gan = load_gan(checkpoint).to(device)
    settings = gan.settings
    _check_has_statistics(gan.generator, statistics)
    used: Weights = weights or ("raw" if gan.generator_ema is None else "ema")
    chosen = statistics or _usual_statistics(settings, used)
    sampler = _ready(gan.generator, gan.generator_ema, settings, int(gan.normalized_together), used, chosen)
    known = chosen if any(batch_norm_layers(gan.generator)) else None
    about = About(settings, int(gan.normalized_together), int(gan.iteration), used, known)
    return TrainedGenerator(sampler, about, checkpoint)


def _check_has_statistics(generator: GeneratorNetwork, asked: EvalStatistics | None) -> None:
    if asked is not None and not any(batch_norm_layers(generator)):
        raise UsageError("this generator has no batch norm, so statistics have no effect on it; leave them out")


def _usual_statistics(settings: Settings, weights: Weights) -> EvalStatistics:
    """Return what normalizes samples in the run itself."""
    precise = weights == "ema" and settings.ema_buffers == "precise" and settings.eval_statistics == "running"
    return "precise" if precise else settings.eval_statistics


def _ready(
    generator: GeneratorNetwork,
    average: GeneratorNetwork | None,
    settings: Settings,
    batch_size: int,
    weights: Weights,
    statistics: EvalStatistics,
) -> Sampler:
    """Return what can be sampled from then on, of a copy that has the statistics in place; arguments are sampler_of's."""
    with sampler_of(generator, average, settings, batch_size, weights, statistics) as sampler:
        return replace(sampler, network=copy.deepcopy(sampler.network))


def with_origin(about: About, checkpoint: Path) -> About:
    """Return what is known of a generator, with its checkpoint's file, its run, and the metrics measured at that iteration."""
    from bngan.recipes import read_config
    from bngan.run import run_of

    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    about = replace(about, checkpoint=checkpoint.name, sha256=digest)
    if (run := run_of(checkpoint)) is None:
        return about
    reports = [json.loads((run / name).read_text()) for name in REPORTS if (run / name).is_file()]
    floor = next((report["floor"] for report in reports if "floor" in report), {})
    recipe = read_config(run / "config.yaml").get("name")
    return replace(about, recipe=recipe, metrics=_metrics(about, checkpoint, reports), floor=floor)


def _metrics(about: About, checkpoint: Path, reports: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of samples by these weights and statistics, as a run's reports or its checkpoint have them."""
    from bngan.checkpoint import read_checkpoint

    used: Weights = "ema" if about.settings.ema_decay else "raw"
    as_in_the_run = about.weights == used and about.statistics in (None, _usual_statistics(about.settings, used))
    name = "value" if as_in_the_run else f"{about.weights}, {about.statistics}"  # as validate.json has it
    values = [report.get(name, {}) for report in reports if report.get("iteration") == about.iteration]
    callbacks = read_checkpoint(checkpoint, mmap=True).get("callbacks", {})
    if as_in_the_run and callbacks.get("CheckpointSaver", {}).get("best_iteration") == about.iteration:
        values.append(callbacks.get("MeasureSamples", {}).get("last", {}))  # it was saved when it was measured
    return next(filter(None, values), {})


def find_device(name: str) -> torch.device:
    """Return the device of that name, of which gpu is whatever accelerator there is.

    Raises:
        UsageError: if this machine has none of that name.
    """
    asked, known = name.lower(), ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        kind = accelerator.type
        known += ["gpu", kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
        asked = kind if asked == "gpu" else asked
    if asked not in known:
        raise UsageError(f"device {name!r} is not on this machine, as far as torch can tell; choose from {', '.join(known)}")
    return torch.device(asked)
