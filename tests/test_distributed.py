"""What N ranks do together is what one process would have done with their global batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import launch

RANKS = (1, 2, 4)
CASES: dict[str, dict[str, Any]] = {
    "joint": {},
    "separate": {"batching": "separate"},
    "D follows G's step": {"d_tracks_g_step": True},
    "two critic steps": {"n_critic": 2},
    "two parts": {"accumulate": 2},
    "clipped": {"g_clip": 0.1, "d_clip": 0.1},
    "convolutional": {"network": "conv", "image_shape": (1, 16, 16), "hidden_dim": 4},
    "reference norm": {"g_norm": "reference", "d_norm": "reference"},
    "copied buffers": {"ema_buffers": "copy"},
    "dropout": {"d_dropout": 0.3, "n_critic": 2},
    "dropout, separate": {"d_dropout": 0.3, "batching": "separate", "accumulate": 2},
    "dropout and penalty": {"d_dropout": 0.3, "d_norm": "layer", "gradient_penalty": 1.0},
    "convolutional dropout": {"d_dropout": 0.3, "network": "conv", "image_shape": (1, 16, 16), "hidden_dim": 4},
    "R1 and R2": {"d_norm": "layer", "r1": 0.1, "r2": 0.1},
    **{loss: {"loss": loss} for loss in ("non_saturating", "minimax", "least_squares", "hinge", "relativistic")},
    "wasserstein": {"loss": "wasserstein", "d_norm": "layer"},
}
APART = "by themselves"
Results = dict[int, list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results by number of ranks, rank and case; the last case has batch norm that is not synchronized."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [*({"synchronized": True, **case} for case in CASES.values()), {"synchronized": False}]
    found: Results = {}
    for ranks in RANKS:
        found[ranks] = launch("tests.ranks", ranks, folder, cases, timeout=900)
    return found


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def state(results: Results, ranks: int, rank: int, case: str) -> dict[str, Tensor]:
    number = len(CASES) if case == APART else list(CASES).index(case)
    return results[ranks][rank][number]["state"]


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("case", CASES)
def test_ranks_together_equal_one_process_with_the_global_batch(case: str, ranks: int, results: Results) -> None:
    for rank in range(ranks):
        assert difference(state(results, ranks, rank, case), state(results, 1, 0, case)) < 1e-9


def test_comparison_would_notice_another_run(results: Results) -> None:
    joint = state(results, 1, 0, "joint")
    for case in CASES:
        other = state(results, 1, 0, case)
        if case not in ("joint", "relativistic", "reference norm") and joint.keys() == other.keys():
            shapes = all(joint[name].shape == other[name].shape for name in joint)
            assert not shapes or difference(joint, other) > 1e-6, case
    assert difference(joint, state(results, 1, 0, "relativistic")) < 1e-12


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_batch_norm_that_is_not_synchronized_is_another_game(ranks: int, results: Results) -> None:
    assert difference(state(results, ranks, 0, APART), state(results, 1, 0, "joint")) > 1e-4


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_weights_never_part_and_buffers_agree_once_averaged(ranks: int, results: Results) -> None:
    first = results[ranks][0][-1]
    for rank in range(1, ranks):
        other = results[ranks][rank][-1]
        assert difference(first["state"], other["state"]) == 0
        assert difference(first["drifted"], other["drifted"]) > 1e-4


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("case", ["joint", "two critic steps", "two parts"])
def test_ranks_draw_different_latents_that_together_are_one_process_s(case: str, ranks: int, results: Results) -> None:
    number = list(CASES).index(case)
    alone: list[Tensor] = results[1][0][number]["latents"]
    drawn: list[list[Tensor]] = [results[ranks][rank][number]["latents"] for rank in range(ranks)]
    assert len(alone) == len(drawn[0]) > 0
    for step, expected in enumerate(alone):
        parts = [own[step] for own in drawn]
        assert not torch.equal(parts[0], parts[1])
        assert torch.equal(torch.cat(parts), expected)
