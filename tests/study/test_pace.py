"""What an iteration takes is timed for the arms whose times a claim compares, in rounds, once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bngan.study import pace
from bngan.study.pace import MILLISECONDS, milliseconds, timed_runs, write_milliseconds
from bngan.study.spec import planned_runs
from tests.study.made_up import made_up_study

STUDY = made_up_study(fresh=6)


def test_arms_are_timed_of_which_a_claim_compares_the_time_and_no_others() -> None:
    assert timed_runs(STUDY).keys() == {"F/T/a0", "F/T/a3", "F/B/a0", "F/B/a3"}
    assert timed_runs(replace(STUDY, claims=STUDY.claims[2:])) == {}


def test_every_round_times_every_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pace, "WARM_UP", 1)
    monkeypatch.setattr(pace, "TIMED", 2)
    (ring,) = (block for block in STUDY.blocks if block.task == "ring")
    runs = {run.arm: replace(run, looks=()) for run in planned_runs(STUDY, ring)}
    found = milliseconds(runs, tmp_path)
    assert found.keys() == {"a0", "a1", "p2"}
    assert all(len(rounds) == pace.ROUNDS and min(rounds) > 0 for rounds in found.values())


def test_what_was_timed_once_is_kept_and_without_such_a_claim_nothing_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pace, "milliseconds", lambda runs, root: {name: [1.0] for name in runs})
    write_milliseconds(replace(STUDY, claims=()), tmp_path, tmp_path)
    assert not (tmp_path / MILLISECONDS).exists()
    write_milliseconds(STUDY, tmp_path, tmp_path)
    assert json.loads((tmp_path / MILLISECONDS).read_text())["F/T/a0"] == [1.0]
    (tmp_path / MILLISECONDS).write_text("{}")
    write_milliseconds(STUDY, tmp_path, tmp_path)
    assert (tmp_path / MILLISECONDS).read_text() == "{}"
