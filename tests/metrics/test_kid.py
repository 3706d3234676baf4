"""KID and its standard error beside other implementations and repeated draws."""

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from bngan.metrics.kid import KID
from tests.features import DTYPES, Sizes, clouds, values_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [4, 64])
def test_kid_equals_torch_fidelity(features: int, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("torch_fidelity.metric_kid")
    size = 120
    real, fake = clouds(Sizes(size, size, features), dtype)
    expected = oracle.kid_features_to_metric(real.double(), fake.double(), kid_subsets=1, kid_subset_size=size, verbose=False)[
        oracle.KEY_METRIC_KID_MEAN
    ]
    assert values_of(KID(), real, fake)["kid"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert values_of(KID(), real[1:], fake)["kid"] != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 20, 100])
def test_kid_is_that_of_torchmetrics_on_one_subset_of_all_images_in_any_chunks(chunk: int) -> None:
    size = 1_020  # more than the 1,000 images of a usual subset
    real, fake = clouds(Sizes(size, size, 2))
    oracle = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=size)
    oracle.update(real, real=True)
    oracle.update(fake, real=False)
    expected = float(oracle.compute()[0])
    assert values_of(KID(chunk=chunk), real, fake)["kid"] == pytest.approx(expected, rel=1e-10)
    assert values_of(KID(chunk=chunk), real[1:], fake[1:])["kid"] != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sizes", [Sizes(9, 9, 3), Sizes(12, 7, 3)])
def test_kid_equals_its_definition(sizes: Sizes) -> None:
    real, fake = clouds(sizes)

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / sizes.features + 1) ** 3)

    def among(images: Tensor) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(images) for j, y in enumerate(images) if i != j]
        return sum(pairs) / len(pairs)

    between = [kernel(x, y) for x in real for y in fake]
    expected = among(real) + among(fake) - 2 * sum(between) / len(between)
    assert values_of(KID(), real, fake)["kid"] == pytest.approx(expected, abs=1e-12)


def test_kid_draws_no_numbers() -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    state = torch.get_rng_state()
    values_of(KID(), real, fake)
    assert torch.equal(torch.get_rng_state(), state), "other draws must not depend on whether samples are measured"


DRAWS = 400


@pytest.mark.parametrize("sizes", [Sizes(100, 100, 4), Sizes(150, 75, 4)])
@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
def test_standard_error_is_the_deviation_over_repeated_draws(sizes: Sizes, shift: float) -> None:
    """Of sets that do not differ, differ a little, and differ much."""
    found = [
        values_of(
            KID(), torch.rand(sizes.real, sizes.features).double(), torch.rand(sizes.fake, sizes.features).double() + shift
        )
        for _ in range(DRAWS)
    ]
    kids, errors = (torch.tensor([values[name] for values in found]) for name in ("kid", "kid_se"))
    deviation = float(kids.std())  # known to 4%
    error = float(errors.square().mean().sqrt())
    assert errors.min() > 0.2 * deviation, "none is near 0"
    if shift > 0:
        assert error == pytest.approx(deviation, rel=0.15)
    else:  # then it is a little too large
        assert 0.95 < error / deviation < 1.25
        assert abs(kids.mean()) < 4 * deviation / DRAWS**0.5, "an unbiased estimate"


def test_standard_error_of_more_images_is_smaller() -> None:
    """By the root of their number between sets that differ, and by their number between sets that do not."""

    def error(count: int, shift: float) -> float:
        real, fake = torch.rand(2, count, 4, dtype=torch.double)
        return values_of(KID(), real, fake + shift)["kid_se"]

    assert error(400, 1.0) / error(1600, 1.0) == pytest.approx(2, rel=0.1)
    assert error(400, 0.0) / error(1600, 0.0) == pytest.approx(4, rel=0.25)
