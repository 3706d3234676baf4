"""A study's runs: those that were planned, with the settings that were laid one over the other, and no others."""

from collections import Counter
from dataclasses import fields, replace

import pytest

from bngan.settings import Settings
from bngan.study.spec import DEFAULTS, first_choice, grid, nearest, planned_runs, runs_of
from tests.study.stand_ins import small_study

CHOSEN = {("T", "a0"): {"g_lr d_lr": 0.01}, ("T", "a3"): {"g_lr d_lr": 0.001}, ("B", "a3"): {"g_lr d_lr": 0.01}}


def test_pilots_run_on_every_value_of_the_axes_and_every_seed() -> None:
    study = small_study()
    runs = runs_of(study, study.blocks[0])
    assert len(runs) == len({run.id for run in runs}) == 3 * 2 * 2
    assert {run.role for run in runs} == {"pilot"}
    assert Counter((run.context, run.arm) for run in runs) == {("T", "a0"): 4, ("T", "a3"): 4, ("B", "a3"): 4}
    assert {run.settings.get("g_lr", 0.002) for run in runs} == {0.001, 0.01} == {run.settings["d_lr"] for run in runs}


def test_axes_make_a_grid() -> None:
    block = replace(small_study().blocks[0], axes={"g_lr d_lr": (0.1, 0.2), "n_critic": (1, 2, 3)})
    assert len(grid(block)) == 6
    assert {"g_lr d_lr": 0.2, "n_critic": 3} in grid(block)
    assert grid(replace(block, axes={})) == [{}]


def test_fresh_runs_wait_for_the_choice_and_take_it() -> None:
    study = small_study()
    fresh = study.blocks[1]
    assert runs_of(study, fresh) == []
    runs = runs_of(study, fresh, CHOSEN)
    assert len(runs) == 3 * 3 + 2
    for run in runs:
        assert run.role == "fresh"
        assert (
            run.settings["g_lr"]
            == run.axes["g_lr d_lr"]
            == CHOSEN[run.context, "a3" if run.arm == "aa" else run.arm]["g_lr d_lr"]
        )
    assert len(planned_runs(study, fresh)) == len(runs)


@pytest.mark.parametrize(
    ("place", "count", "others"),
    [(0, 5, [1, 2]), (2, 5, [1, 3]), (4, 5, [2, 3]), (1, 3, [0, 2]), (0, 2, [1]), (1, 2, [0]), (0, 1, [])],
)
def test_nearest_are_two_on_either_side_or_at_the_edge_two_on_one(place: int, count: int, others: list[int]) -> None:
    assert nearest(place, count) == others


def test_neighbours_are_fresh_seeds_at_the_values_beside_the_chosen_one_as_many_as_were_planned() -> None:
    study = small_study()
    pilots = replace(study.blocks[0], axes={"g_lr d_lr": (0.1, 0.001, 0.01, 0.0001)})  # in no order
    fresh = replace(study.blocks[1], neighbours=True)
    study = replace(study, blocks=(pilots, fresh))
    runs = runs_of(study, fresh, CHOSEN)
    assert (
        Counter(run.role for run in runs)
        == {"fresh": 3 * 3 + 2, "neighbour": 2 * 3 * 3}
        == Counter(run.role for run in planned_runs(study, fresh))
    )
    beside = {
        arm: {run.axes["g_lr d_lr"] for run in runs if (run.role, run.context, run.arm) == ("neighbour", "T", arm)}
        for arm in ("a0", "a3")
    }
    assert beside == {"a0": {0.001, 0.1}, "a3": {0.0001, 0.01}}
    assert {run.seed for run in runs if run.role == "neighbour"} == {1, 2, 3}
    assert len({run.id for run in runs}) == len(runs)
    assert runs_of(study, fresh) == []


def test_pilots_and_fresh_runs_of_one_block_come_in_turn() -> None:
    study = small_study()
    both = replace(study.blocks[0], chosen_from="A", seeds={"pilot": (101, 102), "fresh": (1, 2, 3)})
    study = replace(study, blocks=(both,))
    assert {run.role for run in runs_of(study, both)} == {"pilot"}
    assert Counter(run.role for run in runs_of(study, both, CHOSEN)) == {"pilot": 12, "fresh": 9}


def test_block_without_a_choice_runs_fresh_seeds_on_the_whole_grid() -> None:
    study = small_study()
    block = replace(study.blocks[0], seeds={"fresh": (1, 2)})
    assert Counter(run.axes["g_lr d_lr"] for run in runs_of(study, block)) == {0.001: 6, 0.01: 6}


def test_an_arm_again_has_its_settings_and_seeds_of_its_own() -> None:
    study = small_study()
    runs = runs_of(study, study.blocks[1], CHOSEN)
    again = [run for run in runs if run.arm == "aa"]
    (first,) = (run for run in runs if (run.context, run.arm, run.seed) == ("B", "a3", 1))
    assert [(run.context, run.seed) for run in again] == [("B", 21), ("B", 22)]
    assert all(run.settings == first.settings and run.axes == first.axes for run in again)


def test_a_context_may_take_the_choice_of_another() -> None:
    study = small_study()
    study = replace(study, contexts={**study.contexts, "Long": {"lr_decay_start": 1.0}})
    block = replace(study.blocks[1], arms={"Long": ("a3",)}, aa={}, aa_seeds=(), chosen_as={"Long": "T"})
    assert {run.settings["g_lr"] for run in runs_of(study, block, CHOSEN)} == {0.001}
    assert first_choice(study, block) == {("T", "a3"): {"g_lr d_lr": 0.001}}
    with pytest.raises(KeyError):
        runs_of(study, replace(block, chosen_as={}), CHOSEN)


def test_settings_are_laid_one_over_the_other_and_defaults_left_out() -> None:
    study = small_study()
    block = replace(study.blocks[0], settings={"latent_dim": 7, "g_norm": "layer"})
    of = {(run.context, run.arm): run.settings for run in runs_of(study, block)}
    assert of["T", "a0"]["beta1"] == 0.5  # the context's over the study's
    assert of["B", "a3"]["beta1"] == 0.25
    assert of["T", "a0"]["g_norm"] == "none"  # the arm's over the block's
    assert of["T", "a3"]["g_norm"] == "layer"
    assert of["T", "a3"]["latent_dim"] == 7
    for settings in of.values():
        assert all(value != DEFAULTS[name] for name, value in settings.items())
        assert settings.keys() <= {item.name for item in fields(Settings)}
    assert "loss" not in of["B", "a3"]
