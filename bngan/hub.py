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
from bngan.export.about import About, check_types, current_versions
from bngan.export.card import card, is_card
from bngan.export.forms import FORMS, draft, read
from bngan.files import expand_home, write_whole
from bngan.images import fitting, write_images
from bngan.pretrained import DISCRIMINATOR, find_pretrained
from bngan.sampler import Sampler, Weights, sampler_of
from bngan.settings import Settings
from bngan.truncation import Truncated

LARGEST_CHUNK = 500  # samples drawn at a time
CHUNK_VALUES = 4_000_000  # and their pixels' values, since G holds many times as much meanwhile
SHOWN = 64  # samples in a model card's picture
CHECKPOINT = "take the checkpoint"  # to have what an exported file has not
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

    def export(self, path: str | Path, *, fold: bool = False, force: bool = False) -> float:
        """Write the generator as a file for other programs, and beside it README.md, a model card, and a picture of samples.

        Args:
            path: of the file, .safetensors, .onnx or .pt2; what is there is replaced.
            fold: whether its batch norm becomes part of the layers before it.
            force: whether a README.md that is there and is no model card is replaced, too.

        Returns:
            The largest difference between its images and those that the file's generator makes of the same latents.

        Raises:
            UsageError: if the file would give other images, there is no such form of this generator, or README.md is another's.
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
        readme, picture = path.with_name("README.md"), path.with_suffix(".png")
        if not force and readme.exists() and not is_card(readme.read_text(errors="replace")):
            raise UsageError(f"{readme} is no model card, and one would replace it; export to a folder of its own")
        about = self.about if self.about.sha256 else with_origin(self.about, self.source)
        about = replace(about, versions=current_versions())
        content, difference = draft(network, about, path, fold=fold)
        dtype = "float64" if next(network.parameters()).dtype == torch.float64 else "float32"  # as it is written
        text = card(replace(about, folded=about.folded or fold), path, picture.name, difference, dtype)
        write_images(self.chunks(SHOWN), picture, "grid", SHOWN)
        write_whole(readme, text.encode())
        write_whole(path, content)  # last: where it is, all is
        return difference


# From where ---------------------------------------------------------------------------------------------------------------


class Networks(NamedTuple):
    """The two networks of a trained GAN, in evaluation mode, and in words where they are from.

    G's running statistics are those that normalize its samples in the run; where each batch does, they are the run's own.
    """

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
    generator, settings = gan.generator_ema or gan.generator, gan.settings
    statistics = settings.usual_statistics(averaged=generator is gan.generator_ema)
    if statistics == "precise" and any(batch_norm_layers(generator)):
        ready = _ready(gan.generator, gan.generator_ema, settings, int(gan.normalized_together), None, statistics)
        generator.load_state_dict(ready.network.state_dict())
    return Networks(generator, gan.discriminator, str(checkpoint))


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
        raise UsageError(f"{path} has the weights {about.weights} alone; leave out weights, or {CHECKPOINT}")
    settings, shape = about.settings, about.settings.image_shape
    _check_has_statistics(about.statistics is not None, statistics)
    if isinstance(network, GeneratorNetwork) and not about.folded:
        if (about.statistics, statistics) == ("precise", "running"):
            raise UsageError(
                f"{path} has precise statistics in place of the running ones; leave out statistics, or {CHECKPOINT}"
            )
        sampler = _ready(network.to(device), None, settings, about.batch_size, "raw", statistics or "running")
        if statistics not in (None, about.statistics):  # of which the metrics are not
            about = replace(about, statistics=statistics, metrics={})
    elif statistics not in (None, about.statistics):
        raise UsageError(f"{path} has {about.statistics} statistics alone, as exported; leave out statistics, or {CHECKPOINT}")
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
    has_statistics = any(batch_norm_layers(gan.generator))
    _check_has_statistics(has_statistics, statistics)
    used: Weights = weights or ("raw" if gan.generator_ema is None else "ema")
    usual = settings.usual_statistics(averaged=used == "ema") if has_statistics else "running"  # which have no effect
    chosen = statistics or usual
    sampler = _ready(gan.generator, gan.generator_ema, settings, int(gan.normalized_together), used, chosen)
    about = About(settings, int(gan.normalized_together), int(gan.iteration), used, chosen if has_statistics else None)
    return TrainedGenerator(sampler, about, checkpoint)


def _check_has_statistics(has_statistics: bool, asked: EvalStatistics | None) -> None:
    if asked is not None and not has_statistics:
        raise UsageError("this generator has no batch norm, so statistics have no effect on it; leave them out")


def _ready(
    generator: GeneratorNetwork,
    average: GeneratorNetwork | None,
    settings: Settings,
    batch_size: int,
    weights: Weights | None,
    statistics: EvalStatistics,
) -> Sampler:
    """Return what can be sampled from then on, of a copy that has the statistics in place; arguments are sampler_of's."""
    with sampler_of(generator, average, settings, batch_size, weights, statistics) as sampler:
        return replace(sampler, network=copy.deepcopy(sampler.network))


def with_origin(about: About, checkpoint: Path) -> About:
    """Return what is known of a generator, with its checkpoint's file, its run, and the metrics measured at that iteration.

    Raises:
        UsageError: if what the run's folder or the checkpoint says of it cannot be so.
    """
    from bngan.recipes import read_config
    from bngan.run import run_of

    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    about = replace(about, checkpoint=checkpoint.name, sha256=digest)
    if (run := run_of(checkpoint)) is None:
        return about
    reports = [_report(run / name) for name in REPORTS if (run / name).is_file()]
    floor = next((report["floor"] for report in reports if "floor" in report), {})
    recipe = read_config(run / "config.yaml").get("name")
    about = replace(about, recipe=recipe, metrics=_metrics(about, checkpoint, reports), floor=floor)
    try:
        check_types(about)
    except ValueError as error:
        raise UsageError(f"{run}: in {', '.join(REPORTS)} or config.yaml, {error}; mend it, or move it away") from error
    return about


def _report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is damaged ({error}); measure anew, or move it away") from error
    if not isinstance(report, dict):
        raise UsageError(f"{path} has no report in it; measure anew, or move it away")
    return report


def _metrics(about: About, checkpoint: Path, reports: list[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of samples by these weights and statistics, as a run's reports or its checkpoint have them."""
    from bngan.checkpoint import read_checkpoint

    used: Weights = "ema" if about.settings.ema_decay else "raw"
    usual = about.settings.usual_statistics(averaged=used == "ema")
    as_in_the_run = about.weights == used and about.statistics in (None, usual)
    name = "value" if as_in_the_run else f"{about.weights}, {about.statistics}"  # as validate.json has it
    values = [report.get(name, {}) for report in reports if report.get("iteration") == about.iteration]
    callbacks = read_checkpoint(checkpoint, mmap=True).get("callbacks", {})
    saver, measured = (callbacks.get(name) for name in ("CheckpointSaver", "MeasureSamples"))
    whole = isinstance(saver, dict) and isinstance(measured, dict)  # a stranger's may be anything
    if as_in_the_run and whole and saver.get("best_iteration") == about.iteration:
        values.append(measured.get("last", {}))  # it was saved when it was measured
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
