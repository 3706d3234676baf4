"""KID beside two other implementations."""

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
    found = values_of(KID(subsets=1, subset_size=size), real, fake)["kid"]
    expected = oracle.kid_features_to_metric(real.double(), fake.double(), kid_subsets=1, kid_subset_size=size, verbose=False)[
        oracle.KEY_METRIC_KID_MEAN
    ]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert values_of(KID(), real, fake)["kid"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert values_of(KID(subsets=1, subset_size=size - 1), real, fake)["kid"] != pytest.approx(expected, rel=1e-4)


def test_kid_of_subsets_is_near_that_of_all_and_the_same_each_time() -> None:
    real, fake = clouds(Sizes(200, 200, 8))
    whole = values_of(KID(), real, fake)["kid"]
    state = torch.get_rng_state()
    found = values_of(KID(subsets=50, subset_size=100), real, fake)["kid"]
    assert torch.equal(torch.get_rng_state(), state), "other draws must not depend on whether samples are measured"
    torch.rand(1)
    assert values_of(KID(subsets=50, subset_size=100), real, fake)["kid"] == found
    assert found != whole
    assert found == pytest.approx(whole, rel=0.2)
    assert values_of(KID(subsets=50, subset_size=100), real, real)["kid"] < 0.1 * whole


def of_torchmetrics(real: Tensor, fake: Tensor, subsets: int, subset_size: int) -> float:
    """KID by torchmetrics, on the subsets that ours has."""
    oracle = KernelInceptionDistance(feature=nn.Identity(), subsets=subsets, subset_size=subset_size)
    oracle.update(real.double(), real=True)
    oracle.update(fake.double(), real=False)
    torch.manual_seed(0)
    return float(oracle.compute()[0])


@pytest.mark.parametrize("chunk", [1, 7, 20, 100])
def test_kid_is_that_of_torchmetrics_on_the_same_subsets(chunk: int) -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    expected = of_torchmetrics(real, fake, subsets=3, subset_size=20)
    assert values_of(KID(subsets=3, subset_size=20, chunk=chunk), real, fake)["kid"] == pytest.approx(expected, rel=1e-10)
    assert values_of(KID(subsets=4, subset_size=20), real, fake)["kid"] != pytest.approx(expected, rel=1e-3)


def test_kid_is_averaged_over_50_subsets_of_1000_images() -> None:
    real, fake = clouds(Sizes(1100, 1050, 2))
    found = values_of(KID(), real, fake)["kid"]
    assert found == pytest.approx(of_torchmetrics(real, fake, subsets=50, subset_size=1000), rel=1e-10)
    assert values_of(KID(subsets=49), real, fake)["kid"] != pytest.approx(found, rel=1e-6)
    assert values_of(KID(subset_size=999), real, fake)["kid"] != pytest.approx(found, rel=1e-6)


def test_numbers_decide_which_images_are_in_a_subset() -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    order = torch.randperm(70)
    in_order = values_of(KID(subsets=3, subset_size=20), real, fake)["kid"]
    assert values_of(KID(subsets=3, subset_size=20), real, fake[order])["kid"] != pytest.approx(in_order, rel=1e-3)
