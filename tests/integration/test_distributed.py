"""What N ranks do together is what one process would have done with their global batch."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integration.ranks import launch

RANKS = (1, 2, 4)
CASES: dict[str, dict[str, Any]] = {
    "joint": {},
    "separate": {"batching": "separate"},
    "D's statistics move in G's step": {"update_d_stats_in_g_step": True},
    "two critic steps": {"n_critic": 2},
    "clipped": {"g_clip": 0.1, "d_clip": 0.1},
    "convolutional": {"network": "conv", "image_shape": (1, 16, 16), "hidden_dim": 4},
    "reference norm": {"g_norm": "reference", "d_norm": "reference"},
    "ghost norm": {"g_norm": "ghost", "d_norm": "ghost", "ghost_groups": 4},
    "virtual norm": {"g_norm": "virtual", "d_norm": "virtual"},
    "spectral norm": {"g_norm": "spectral", "d_norm": "spectral"},
    "classes": {"classes": 3, "n_critic": 2},
    "classes, reference norm": {"classes": 3, "g_norm": "reference"},
    "copied buffers": {"ema_buffers": "copy"},
    "R1 and R2": {"d_norm": "layer", "r1": 0.1, "r2": 0.1},
    "gradient penalty": {"d_norm": "layer", "gradient_penalty": 1.0},
    **{loss: {"loss": loss} for loss in ("non_saturating", "minimax", "least_squares", "hinge", "relativistic")},
    "wasserstein": {"loss": "wasserstein", "d_norm": "layer"},
}
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-9)
# On several ranks, batch norm that is not synchronized; on one, batch norm over as many groups.
APART = "each by itself"
Results = dict[int, dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results by number of ranks, case and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    found: Results = {}
    for ranks in RANKS:
        cases = {case: {"synchronized": True, **settings} for case, settings in CASES.items()}
        if ranks == 1:
            for groups in RANKS[1:]:
                ghost = {"g_norm": "ghost", "d_norm": "ghost", "ghost_groups": groups}
                cases[f"{groups} groups"] = {"synchronized": True, **ghost}
        else:
            cases[APART] = {"synchronized": False}
        by_rank = launch("tests.integration.ranks", ranks, folder, list(cases.values()), timeout=900)
        found[ranks] = dict(zip(cases, map(list, zip(*by_rank, strict=True)), strict=True))
    return found


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("case", CASES)
def test_ranks_together_equal_one_process_with_the_global_batch(case: str, ranks: int, results: Results) -> None:
    (alone,) = results[1][case]
    for result in results[ranks][case]:
        assert difference(result["state"], alone["state"]) < 1e-9


def test_comparison_would_notice_another_run(results: Results) -> None:
    states = {case: alone["state"] for case, (alone,) in results[1].items()}
    joint = states["joint"]
    for case in CASES.keys() - {"joint", "relativistic", "reference norm"}:
        other = states[case]
        if joint.keys() == other.keys() and all(joint[name].shape == other[name].shape for name in joint):
            assert difference(joint, other) > 1e-6, case
    assert difference(joint, states["relativistic"]) < 1e-12


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_batch_norm_that_is_not_synchronized_is_that_of_as_many_groups(ranks: int, results: Results) -> None:
    (groups,) = results[1][f"{ranks} groups"]
    (joint,) = results[1]["joint"]
    for result in results[ranks][APART]:
        assert difference(result["state"], groups["state"]) < 1e-9
        assert difference(result["state"], joint["state"]) > 1e-4


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_weights_never_part_and_buffers_agree_once_averaged(ranks: int, results: Results) -> None:
    first, *others = results[ranks][APART]
    for other in others:
        assert difference(first["state"], other["state"]) == 0
        assert difference(first["drifted"], other["drifted"]) > 1e-4


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("case", ["joint", "two critic steps"])
def test_ranks_draw_different_latents_that_together_are_one_process_s(case: str, ranks: int, results: Results) -> None:
    (alone,) = results[1][case]
    drawn: list[list[Tensor]] = [result["latents"] for result in results[ranks][case]]
    assert len(alone["latents"]) == len(drawn[0]) > 0
    for step, expected in enumerate(alone["latents"]):
        rows = [own[step] for own in drawn]
        assert not torch.equal(rows[0], rows[1])
        assert torch.equal(torch.stack(rows, dim=1).flatten(end_dim=1), expected)


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("case", ["joint", "separate", "two critic steps", "convolutional", "reference norm", "ghost norm"])
def test_batches_are_as_far_from_the_running_statistics_on_any_number_of_ranks(case: str, ranks: int, results: Results) -> None:
    (alone,) = results[1][case]
    for name, batches in alone["kl"].items():
        seen = [torch.stack(result["kl"][name]) for result in results[ranks][case]]
        if case == "ghost norm":  # each rank has its own of the groups, which they do not share
            assert_close(torch.cat(seen).mean(dim=0), torch.stack(batches).mean(dim=0))
        else:
            for own in seen:
                assert_close(own, torch.stack(batches))
    apart = results[ranks][APART]
    assert difference(*({name: kl[0] for name, kl in result["kl"].items()} for result in apart[:2])) > 1e-4
