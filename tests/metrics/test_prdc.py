"""Precision, recall, density and coverage beside two other implementations."""

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bngan.metrics.prdc import PRDC
from tests.features import DTYPES, SIZES, Sizes, clouds, values_of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_precision_and_recall_equal_torch_fidelity(sizes: Sizes, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = clouds(sizes, dtype)
    expected = oracle.prc_features_to_metric(fake.double(), real.double(), prc_neighborhood=3, verbose=False)
    found = values_of(PRDC(chunk=50), real, fake)
    for name in ("precision", "recall"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    assert values_of(PRDC(), fake, real)["recall"] == pytest.approx(expected["precision"], abs=1e-6)
    assert expected["precision"] > expected["recall"] + 0.05, "sets where a mix-up of the two would go unseen"
    assert values_of(PRDC(pr_neighbours=2), real, fake)["recall"] != pytest.approx(expected["recall"], abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_density_and_coverage_equal_prdc(sizes: Sizes, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("prdc")
    real, fake = clouds(sizes, dtype)
    expected = oracle.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=5)
    found = values_of(PRDC(pr_neighbours=5, chunk=50), real, fake)
    for name in ("precision", "recall", "density", "coverage"):
        assert found[name] == pytest.approx(float(expected[name]), abs=1e-9)
    assert values_of(PRDC(dc_neighbours=4), real, fake)["density"] != pytest.approx(expected["density"], abs=1e-4)
    assert 0.3 < expected["coverage"] < 0.95, "a share that is far from both ends"


def test_the_edge_of_a_ball_belongs_to_it_for_precision_and_recall_but_not_for_density() -> None:
    fidelity, prdc = pytest.importorskip("torch_fidelity.metric_prc"), pytest.importorskip("prdc")
    real = torch.arange(10, dtype=torch.float64)[:, None]  # the ball of the last, at 9, reaches to 12
    fake = torch.tensor([12, 100, 101, 102, 103], dtype=torch.float64)[:, None]
    found = values_of(PRDC(pr_neighbours=3, dc_neighbours=3), real, fake)
    assert found["precision"] == pytest.approx(0.2)
    assert found["precision"] == pytest.approx(fidelity.prc_features_to_metric(fake, real, verbose=False)["precision"])
    assert values_of(PRDC(pr_neighbours=3, dc_neighbours=3), fake, real)["recall"] == pytest.approx(0.2)
    strict = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=3)
    assert strict["precision"] == 0
    assert found["density"] == strict["density"] == 0
    assert found["coverage"] == strict["coverage"] == 0
    fake[0] -= 0.5
    within = values_of(PRDC(pr_neighbours=3, dc_neighbours=3), real, fake)
    assert within["density"] == pytest.approx(1 / 15)
    assert within["coverage"] == pytest.approx(0.1)


def test_chunks_of_distances_change_nothing() -> None:
    real, fake = clouds(Sizes(203, 120, 16))
    whole = values_of(PRDC(chunk=10_000), real, fake)
    for chunk in (1, 7, 203):
        assert values_of(PRDC(chunk=chunk), real, fake) == pytest.approx(whole, abs=1e-12)
    assert values_of(PRDC(chunk=7), real[:202], fake) != pytest.approx(whole, abs=1e-12)


def test_two_blocks_of_distances_are_held_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fakes, chunk = 210, 195, 20
    mm, blocks, most = torch.mm, list[Callable[[], Tensor | None]](), 0

    def recorded(left: Tensor, right: Tensor) -> Tensor:
        nonlocal most
        distances = mm(left, right)
        assert distances.numel() <= chunk * rows
        blocks.append(weakref.ref(distances))
        most = max(most, sum(block() is not None for block in blocks))
        return distances

    monkeypatch.setattr(torch, "mm", recorded)
    real, fake = clouds(Sizes(rows, fakes, 8))
    metric = PRDC(chunk=chunk)
    values_of(metric, real, fake)
    assert len(blocks) == 2 * math.ceil(rows / chunk) + math.ceil(fakes / chunk)
    assert most <= 2
    held = list(metric._squared_distances(real, fake))
    assert most == len(held) > 2, "blocks that are kept must be noticed"
    with pytest.raises(AssertionError):
        values_of(PRDC(chunk=chunk + 1), real, fake)
