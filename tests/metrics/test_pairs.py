"""What the metrics of two sets of features keep, and how many images they need."""

import copy
import math
from collections.abc import Callable

import pytest
import torch

from bngan.errors import UsageError
from bngan.metrics.kid import KID
from bngan.metrics.pairs import FeaturePairs
from bngan.metrics.prdc import PRDC
from tests.features import Sizes, clouds, values_of

PAIRS = (lambda: KID(chunk=7), lambda: PRDC(chunk=7))


@pytest.mark.parametrize("build", PAIRS)
def test_batches_add_up_in_any_order(build: Callable[[], FeaturePairs]) -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    metric = build()
    metric.update(real, real=True)
    metric.update(fake, real=False)
    at_once = {name: float(value) for name, value in metric.compute().items()}
    shuffled = build()
    for features, is_real in ((real, True), (fake, False)):
        for rows in torch.randperm(len(features)).split(9):
            shuffled.update(features[rows], real=is_real)
    assert {name: float(value) for name, value in shuffled.compute().items()} == pytest.approx(at_once, abs=1e-12)
    fewer = values_of(build(), real, fake[:-9])
    assert all(fewer[name] != pytest.approx(value, abs=1e-9) for name, value in at_once.items() if name != "coverage")


@pytest.mark.parametrize("build", PAIRS)
def test_reset_forgets_the_fakes_and_keeps_the_real_images(build: Callable[[], FeaturePairs]) -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    other = fake.flip(1) * 0.9
    metric = build()
    first = values_of(metric, real, fake)
    metric.reset()
    with pytest.raises(UsageError, match=rf"{type(metric).__name__} needs at least \d fake images, got 0"):
        metric.compute()
    second = values_of(metric, real[:0], other)
    assert second == pytest.approx(values_of(build(), real, other), abs=1e-12)
    assert second != pytest.approx(first, abs=1e-6)
    metric.reset()
    assert values_of(metric, real[:0], fake) == pytest.approx(first, abs=1e-12)


@pytest.mark.parametrize("build", PAIRS)
def test_real_images_that_come_later_count(build: Callable[[], FeaturePairs]) -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    metric = build()
    before = values_of(metric, real[:50], fake)
    metric.update(real[50:], real=True)
    after = {name: float(value) for name, value in metric.compute().items()}
    assert after == pytest.approx(values_of(build(), real, fake), abs=1e-12)
    assert after != pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize(("metric", "least"), [(KID(), 2), (PRDC(), 6), (PRDC(pr_neighbours=7, dc_neighbours=5), 8)])
def test_too_few_images_are_refused(metric: FeaturePairs, least: int) -> None:
    real, fake = clouds(Sizes(least, least, 3))
    for rows, name in (((least - 1, least), "real"), ((least, least - 1), "fake")):
        few = copy.deepcopy(metric)
        with pytest.raises(UsageError, match=f"needs at least {least} {name} images, got {least - 1}"):
            values_of(few, real[: rows[0]], fake[: rows[1]])
    assert all(math.isfinite(value) for value in values_of(metric, real, fake).values())


@pytest.mark.parametrize("shape", [(4,), (4, 2, 1)])
def test_features_that_are_not_one_row_per_image_are_refused(shape: tuple[int, ...]) -> None:
    for metric in (KID(), PRDC()):
        with pytest.raises(ValueError, match=r"expected features \(N, d\), got \("):
            metric.update(torch.zeros(shape), real=True)
        metric.update(torch.zeros(4, 2), real=True)
