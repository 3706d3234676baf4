"""What a study would take: each structure is timed once, with every kind of look, and the blocks add up."""

from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bngan.errors import UsageError
from bngan.study.estimate import Cost, alike, examples, kind, measure, measure_all, table
from bngan.study.launchers import Cluster
from bngan.study.spec import Look, planned_runs
from tests.study.stand_ins import small_study
from tests.study.test_together import RING

STUDY = small_study()
LONG = replace(STUDY.blocks[1], iterations=1_000, looks=(Look(500, 100), Look(1_000, 200, whole=True)))
STUDY = replace(STUDY, blocks=(STUDY.blocks[0], LONG))


def test_each_structure_has_one_example_with_every_kind_of_look() -> None:
    found = examples(STUDY)
    assert sorted((run.context, run.arm) for run in found) == [("B", "a3"), ("T", "a0"), ("T", "a3")]  # rates, seeds: alike
    for run in found:
        assert {kind(look) for look in run.looks} == {(100, False, ()), (200, True, ())}


def test_times_are_of_iterations_and_of_each_kind_of_look(tmp_path: Path) -> None:
    cost = measure(RING, root=tmp_path)
    assert cost.iteration > 0
    assert set(cost.looks) == {kind(look) for look in RING.looks}
    assert all(seconds > 0 for seconds in cost.looks.values())
    assert cost.memory > 0
    longer = replace(RING, iterations=106, looks=(*RING.looks, RING.looks[0]))
    more = 100 * cost.iteration + cost.looks[kind(RING.looks[0])]
    assert cost.of(longer) - cost.of(RING) == pytest.approx(more)


def test_table_adds_up_what_would_be_run() -> None:
    looks: dict[Hashable, float] = {(100, False, ()): 10.0, (200, True, ()): 50.0}
    costs = [Cost(run=run, iteration=0.5, looks=looks, memory=2**30) for run in examples(STUDY)]
    console = Console(record=True, width=200)
    console.print(table(STUDY, costs, jobs=2))
    told = console.export_text()
    first, second = (len(planned_runs(STUDY, block)) for block in STUDY.blocks)
    hours = (first * 15 + second * 560) / 2 / 3600
    assert f"{hours * 60:.0f} min in all, 2 at a time, 2.0 GiB" in told
    for words in (f" {first} ", f" {second} ", " 1,000 ", "T: a0 a3; B: a3", " 15 s ", " 9 min "):
        assert words in told


def test_runs_of_other_lengths_and_looks_are_timed_once() -> None:
    run = planned_runs(STUDY, LONG)[0]
    assert alike(run) == alike(replace(run, iterations=7, looks=(), seed=9))
    assert alike(run) != alike(replace(run, batch_size=7))


def test_machine_that_has_no_room_for_so_many_runs_is_told() -> None:
    def full(*_: object) -> list[Cost]:
        raise ConnectionError("the machine is gone")

    with ThreadPoolExecutor() as pool, pytest.raises(UsageError, match=r"ConnectionError: .* gone, while it was timed; lower"):
        measure_all(STUDY, Cluster(1, lambda runs: pool.submit(full, runs)))
