"""Samples measured by several processes, each with its own part, get the values that one process gives them."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from bngan.metrics.features import FeatureNet
from bngan.metrics.sample_metrics import SampleMetrics

# Neither number of images can be divided among the ranks. Of the larger chunks there are 2, so a third rank has none.
REAL, FAKE, FEATURES, CHUNKS = 190, 203, 8, (50, 150)


class Pixels(nn.Module):
    """Takes an image for its own features, and these for the logits of as many classes."""

    num_classes = FEATURES

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        return features


def images(count: int, seed: int) -> Tensor:
    noise = torch.randn(count, 1, 1, FEATURES, generator=torch.Generator().manual_seed(seed))
    return (0.5 * noise + 0.1 * seed).tanh()


def chunks_of(rows: Tensor, chunk: int) -> list[Tensor]:
    return list(rows.split(chunk))


def measure(chunk: int, rank: int = 0, ranks: int = 1) -> list[dict[str, float]]:
    """Return the values of two sets of samples, one after the other, as this rank knows them."""
    metrics = SampleMetrics(FeatureNet("pixels", Pixels()), (1, 1, FEATURES))
    metrics.set_real(chunks_of(images(REAL, seed=0), chunk)[rank::ranks])
    return [metrics.measure(chunks_of(images(FAKE, seed), chunk)[rank::ranks]) for seed in (1, 2)]


def measure_on_a_rank(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    values = {chunk: measure(chunk, rank, ranks) for chunk in CHUNKS}
    (folder / f"{rank}.json").write_text(json.dumps(values))
    distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_rank_has_the_values_of_a_single_process(tmp_path: Path, ranks: int) -> None:
    multiprocessing.spawn(measure_on_a_rank, args=(ranks, tmp_path), nprocs=ranks)
    for chunk in CHUNKS:
        expected = measure(chunk)
        assert expected[0] != pytest.approx(expected[1], rel=1e-3)
        for rank in range(ranks):
            found = json.loads((tmp_path / f"{rank}.json").read_text())[str(chunk)]
            for values, alone in zip(found, expected, strict=True):
                assert values == pytest.approx(alone, rel=1e-6, abs=1e-6), f"rank {rank}, chunks of {chunk}"


def test_chunks_and_their_order_change_nothing() -> None:
    expected = measure(50)
    for chunk in (1, 150, FAKE):
        for values, alone in zip(measure(chunk), expected, strict=True):
            assert values == pytest.approx(alone, rel=1e-6, abs=1e-6)


def test_an_image_that_is_counted_twice_changes_the_values() -> None:
    metrics = SampleMetrics(FeatureNet("pixels", Pixels()), (1, 1, FEATURES))
    metrics.set_real(chunks_of(images(REAL, seed=0), 50))
    chunks = chunks_of(images(FAKE, seed=1), 50)
    once, again = metrics.measure(chunks), metrics.measure(chunks)
    assert again == pytest.approx(once, rel=1e-9, abs=1e-9)
    twice = metrics.measure([*chunks, chunks[0][:1]])
    for name in ("fid", "kid", "precision", "density", "class_kl", "confidence"):
        assert twice[name] != pytest.approx(once[name], rel=1e-5, abs=1e-5), name
