"""What has come of training? Whether G has begun to learn, what it was shown, whether it collapsed, when it was best."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor

from bngan.callbacks.monitor import candidates
from bngan.gan import GAN
from bngan.networks import build_networks
from bngan.recipes import DEFAULT_CONFIG, read_config
from bngan.sampler import Weights, sampler_of

NOT_BEGUN = "learning has not begun"
COMPARED = 512  # images of each kind, all pairs of which are measured
LEAST_VARIED = 0.5  # of an untrained G's samples' mean distance: one that has collapsed is near an untrained one, too
ALIKE = 0.1  # of the median distance between real images; hardly any two of them, or of good samples, come so near
LEAST_DISTINCT = 20  # pictures; a healthy G makes thousands within its first 100 iterations
LEAST_AFTER = 5  # validations after the best one
MUCH_WORSE = 1.1  # times the best
DEVIATIONS = 3  # of one validation


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


# What samples tell ----------------------------------------------------------------------------------------------------


def examine_samples(gan: GAN, real_images: Tensor) -> Iterator[Finding]:
    """Yield what is wrong with G's samples beside real images (N, C, H, W)."""
    real, samples, untrained = real_images[:COMPARED], _samples(gan, "raw"), _untrained_samples(gan)
    others = {
        "an untrained G's samples": untrained,
        "real images in [0, 1]": (real + 1) / 2,
    }
    distances = {name: energy_distance(samples, images) for name, images in others.items()}
    nearest, to_real = min(distances, key=distances.__getitem__), energy_distance(samples, real)
    evidence = f"G's samples are like {nearest} (energy distance {distances[nearest]:.3g}, from real ones {to_real:.3g})"
    varied = pair_distances(samples).mean() > LEAST_VARIED * pair_distances(untrained).mean()
    if not varied or to_real <= distances[nearest]:
        averages = {} if gan.generator_ema is None else {"by the average of its weights": _samples(gan, "ema")}
        yield from _collapse({"by G's weights": samples, **averages}, real)
    elif others[nearest] is untrained:
        yield not_begun(gan, f": {evidence}")
    else:
        yield Finding(
            "images of another range",
            f"{evidence}, which are in [-1, 1] as G's tanh makes them",
            "images in [-1, 1]: after torchvision's ToTensor, Normalize(mean=[0.5], std=[0.5])",
        )


def not_begun(gan: GAN, evidence: str = "") -> Finding:
    """Return the finding that G is as it began, from which others would follow."""
    return Finding(
        NOT_BEGUN,
        f"iteration {int(gan.iteration)}{evidence}",
        "train longer; if it stays so, a larger --model.g_lr",
    )


def _samples(gan: GAN, weights: Weights) -> Tensor:
    """Return samples (COMPARED, C, H, W), normalized as in training."""
    with gan.sampler(weights, "batch") as sampler:
        return sampler.samples(0, COMPARED)


def _untrained_samples(gan: GAN) -> Tensor:
    """Return as many of an untrained G of the same settings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(gan.settings.seed)
        generator, _ = build_networks(gan.settings)
    with sampler_of(generator, None, gan.settings, int(gan.normalized_together), statistics="batch") as sampler:
        return sampler.samples(0, COMPARED)


def _collapse(samples: dict[str, Tensor], real: Tensor) -> Iterator[Finding]:
    unit = pair_distances(real).median()
    # As many as there are real images, or nearly, are all that G could learn.
    limit = min(LEAST_DISTINCT, len(real) / 10, distinct(real, unit) / 2)
    counts = {how: distinct(images, unit) for how, images in samples.items()}
    if few := [f"{count:.0f} distinct, {how}" for how, count in counts.items() if count < limit]:
        yield Finding(
            "G has collapsed",
            f"different latents give nearly the same picture: of {COMPARED} about {' and '.join(few)}",
            "training on, if it has just begun; else an earlier checkpoint that has more, a lower --model.g_lr, "
            "--model.instance_noise 1, or another --model.loss",
        )


def distinct(images: Tensor, unit: Tensor) -> float:
    """Return how many equally frequent pictures would have as many pairs alike as these; infinite where there is none.

    Args:
        images: (N, C, H, W).
        unit: typical distance between real images.
    """
    alike = float((pair_distances(images) < ALIKE * unit).double().mean())
    return 1 / alike if alike else float("inf")


def energy_distance(one: Tensor, other: Tensor) -> float:
    """Return how different two sets of images (N, C, H, W) are, 0 for the same distribution (Székely & Rizzo 2013)."""
    between = torch.cdist(one.flatten(start_dim=1).double(), other.flatten(start_dim=1).double())
    return float(2 * between.mean() - pair_distances(one).mean() - pair_distances(other).mean())


def pair_distances(images: Tensor) -> Tensor:
    """Return the Euclidean distances (N (N - 1) / 2,) of all pairs of images (N, C, H, W)."""
    rows = images.flatten(start_dim=1).double()
    first, second = torch.triu_indices(len(rows), len(rows), offset=1)
    return torch.cdist(rows, rows)[first, second]


# What a run's validations tell ----------------------------------------------------------------------------------------


def examine_course(run: Path) -> Iterator[Finding]:
    """Yield what is wrong with the metric by which a run's best checkpoint is chosen, as its folder's event files have it."""
    settings = {"monitor": "", "mode": ""}
    for file in (DEFAULT_CONFIG, run / "config.yaml"):
        settings |= read_config(file).get("checkpoint", {})
    tags = candidates(settings["monitor"])
    name, values = next(((tag, found) for tag in tags if (found := read_scalars(run, tag))), ("", {}))
    if not values:
        return
    sign = -1 if settings["mode"] == "max" else 1
    best = min(values, key=lambda iteration: sign * values[iteration])
    last = [sign * value for iteration, value in sorted(values.items()) if iteration > best][-LEAST_AFTER:]
    if len(last) < LEAST_AFTER:
        return
    worse = sign * values[best] + max((MUCH_WORSE - 1) * abs(values[best]), DEVIATIONS * noise([*values.values()]))
    if min(last) > worse:
        yield Finding(
            "trained for too long",
            f"{name} was best at iteration {best}, {values[best]:.4g}; the last {LEAST_AFTER} validations, to "
            f"iteration {max(values)}, gave {sign * mean(last):.4g}",
            f"best.ckpt, which is of iteration {best}; train less: --trainer.max_steps {best}",
        )


def noise(values: list[float]) -> float:
    """Return the standard deviation of one value about a curve that these follow, three at least; a slope does not count."""
    bends = [abs(after - before) for before, after in pairwise(b - a for a, b in pairwise(values))]
    return median(bends) / 1.65  # the median of |a - 2 b + c| for standard normal a, b, c


def read_scalars(run: Path, tag: str) -> dict[int, float]:
    """Return the values of that tag in a run's event files by iteration, none where there are no such files."""
    # It takes a second, which other examinations need not wait for.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0, "images": 1, "histograms": 1})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
