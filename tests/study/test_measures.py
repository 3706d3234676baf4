"""Measures of samples are those of the packages that they come from, for several sets in one pass."""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from bngan.data.datasets import DATASETS
from bngan.images import to_minus1_1
from bngan.metrics.modes import ClassHistogram
from bngan.metrics.prdc import PRDC
from bngan.metrics.random_net import RandomNet
from bngan.rng import generator
from bngan.study.measures import (
    DigitMeasures,
    class_counts,
    coverage,
    digit_features,
    frechet_distance,
    kl_to_uniform,
    moments,
    neighbour_distances,
    pixel_variance,
)


class Given(torch.nn.Module):
    """Takes features for images, as torchmetrics' FID asks for."""

    num_features = 6

    def forward(self, features: Tensor) -> Tensor:
        return features


def clouds(count: int, *scales: float) -> Tensor:
    """Features (R, count, 6) about as skewed and correlated as those of a net, a set for each scale."""
    mixing = torch.randn(6, 6, generator=generator(1), dtype=torch.double)
    points = torch.randn(len(scales), count, 6, generator=generator(2), dtype=torch.double).exp()
    return points @ mixing * torch.tensor(scales, dtype=torch.double).view(-1, 1, 1)


@cache
def digits(root: Path) -> tuple[Tensor, Tensor]:
    """MNIST's first 1,000 held-out and 2,000 training digits, uint8."""
    DATASETS["mnist"].prepare(root)
    return tuple(DATASETS["mnist"].load(root, train=train).images[: 1000 * (1 + train)] for train in (False, True))  # type: ignore


@cache
def digit_measures(root: Path) -> DigitMeasures:
    return DigitMeasures(digits(root)[0])


def test_frechet_distance_of_several_sets_is_torchmetrics_of_each() -> None:
    real, sets = clouds(500, 1.0), clouds(300, 1.0, 1.1, 3.0)
    found = frechet_distance(*moments(real), *moments(sets))
    for own, features in zip(found, sets, strict=True):
        metric = FrechetInceptionDistance(feature=Given()).set_dtype(torch.double)
        metric.update(real[0], real=True)
        metric.update(features, real=False)
        assert float(own) == pytest.approx(float(metric.compute()), rel=1e-6)
    assert found[0] < found[1] < found[2]


def test_frechet_distance_of_known_gaussians() -> None:
    """|m|^2 + sum (s1 - s2)^2 where the covariances commute, and 0 of a set from itself even where it has no width."""
    mean, flat = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.double), torch.diag(torch.tensor([4.0, 0.0]).double())
    wide = torch.diag(torch.tensor([9.0, 1.0]).double())
    found = frechet_distance(mean[:1], flat[None], mean, torch.stack([flat, wide]))
    assert found.tolist() == pytest.approx([0.0, 25 + 1 + 1])


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_coverage_is_prdcs(scale: float) -> None:
    real, fake = clouds(450, 1.0)[0], clouds(350, scale)[0]
    metric = PRDC()
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert float(coverage(real, neighbour_distances(real, 5), fake)) == pytest.approx(
        float(metric.compute()["coverage"]), abs=0
    )


def test_class_histogram_is_that_of_the_metric() -> None:
    classes = torch.randint(7, (2, 400), generator=generator(3)) ** 2 % 10
    counts = class_counts(classes, 10)
    for own, kl, labels in zip(counts, kl_to_uniform(counts), classes, strict=True):
        assert own.tolist() == labels.bincount(minlength=10).tolist()
        metric = ClassHistogram(10)
        metric.update(torch.nn.functional.one_hot(labels, 10).double())
        assert float(kl) == pytest.approx(float(metric.compute()["class_kl"]))


def test_kl_lies_between_what_its_modes_force_and_its_largest_value() -> None:
    """m modes of K force ln(K / m) at least, and one mode gives ln K: 6.91 of a thousand (claims about Stacked MNIST)."""
    counts = torch.zeros(4, 1000, dtype=torch.double)
    for row, (modes, uneven) in zip(counts, [(79, False), (693, True), (1, False), (1000, False)], strict=True):
        row[:modes] = torch.arange(1.0, modes + 1) if uneven else 3.0
    kl = kl_to_uniform(counts).tolist()
    assert kl[0] == pytest.approx(math.log(1000 / 79)) == pytest.approx(2.54, abs=0.005)
    assert kl[1] > math.log(1000 / 693) == pytest.approx(0.37, abs=0.005)
    assert kl[2] == pytest.approx(math.log(1000)) == pytest.approx(6.91, abs=0.005)
    assert kl[3] == pytest.approx(0, abs=1e-12)


def test_pixel_variance_is_of_the_images_not_of_the_pixels() -> None:
    image = torch.rand(1, 28, 28, generator=generator(4))
    same, noise = image.expand(50, 1, 28, 28), torch.rand(50, 1, 28, 28, generator=generator(5)) * 2 - 1
    values = pixel_variance(torch.stack([same, noise]))
    assert values[0] == pytest.approx(0, abs=1e-12)
    assert float(values[1]) == pytest.approx(1 / 3, rel=0.02)


def test_sets_in_one_pass_are_measured_as_each_by_itself(mnist_root: Path) -> None:
    measures, train = digit_measures(mnist_root), to_minus1_1(digits(mnist_root)[1])
    sets = torch.stack([train[:300], train[:30].repeat(10, 1, 1, 1), torch.zeros(300, 1, 28, 28)])
    together = measures.measure(sets, whole=True)
    for own, one in zip(together, sets, strict=True):
        (alone,) = measures.measure(one[None], whole=True)
        assert own == pytest.approx(alone, rel=1e-4, abs=1e-4)
    real, few, grey = together
    assert real["fid"] < few["fid"] < grey["fid"]
    assert real["coverage"] > 0.4 > 0.15 > few["coverage"] > grey["coverage"]
    assert real["classes"] == 10 > grey["classes"] == 1
    assert real["pixel_variance"] == pytest.approx(1, abs=0.1)
    assert grey["pixel_variance"] == 0
    assert grey["class_kl"] == pytest.approx(math.log(10))


def test_distance_by_random_filters_is_torchmetrics_fid_of_that_net(mnist_root: Path) -> None:
    some = to_minus1_1(digits(mnist_root)[1][:400])
    metric = FrechetInceptionDistance(feature=RandomNet().double()).set_dtype(torch.double)
    metric.update(to_minus1_1(digits(mnist_root)[0]).double(), real=True)
    metric.update(some.double(), real=False)
    (found,) = digit_measures(mnist_root).measure(some[None], whole=True)
    assert found["fid_random"] == pytest.approx(float(metric.compute()), rel=1e-3)


def test_distance_by_pixels_is_of_the_directions_in_which_real_ones_vary_most(mnist_root: Path) -> None:
    real, some = (to_minus1_1(digits(mnist_root)[place][:400]).flatten(start_dim=1).double().numpy() for place in (0, 1))
    whole = to_minus1_1(digits(mnist_root)[0]).flatten(start_dim=1).double().numpy()
    _, _, directions = np.linalg.svd(whole - whole.mean(axis=0), full_matrices=False)
    (found,) = digit_measures(mnist_root).measure(torch.tensor(some).float().view(1, 400, 1, 28, 28), whole=True)
    projected = [torch.tensor(pixels @ directions[:64].T)[None] for pixels in (whole, some)]
    expected = float(frechet_distance(*moments(projected[0]), *moments(projected[1])))
    assert found["fid_pixels"] == pytest.approx(expected, rel=1e-6)
    (itself,) = DigitMeasures(digits(mnist_root)[0][:400]).measure(
        torch.tensor(real).float().view(1, 400, 1, 28, 28), whole=True
    )
    assert itself["fid_pixels"] == pytest.approx(0, abs=1e-6)


def test_measuring_draws_nothing_that_training_would_have_drawn(mnist_root: Path) -> None:
    measures = DigitMeasures(digits(mnist_root)[0][:100])
    torch.manual_seed(3)
    measures.measure(to_minus1_1(digits(mnist_root)[1][:100])[None], whole=True)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))


def test_samples_are_rounded_to_a_pictures_levels_and_coverage_is_of_whole_looks(mnist_root: Path) -> None:
    measures, some = digit_measures(mnist_root), to_minus1_1(digits(mnist_root)[1][:200])[None]
    (expected,), (found,) = (measures.measure(images, whole=False) for images in (some, some * 1.001 + 0.0005))
    assert found == expected
    assert not found.keys() & {"coverage", "fid_random", "fid_pixels"}


def test_features_do_not_depend_on_how_images_are_cut_up(mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = digit_measures(mnist_root).net, to_minus1_1(digits(mnist_root)[1][:90]).view(2, 45, 1, 28, 28)
    expected = digit_features(net, images)
    monkeypatch.setattr("bngan.study.measures.IMAGES_AT_ONCE", 7)
    assert expected.shape == (2, 45, 64)
    torch.testing.assert_close(digit_features(net, images), expected, rtol=1e-4, atol=1e-4)
