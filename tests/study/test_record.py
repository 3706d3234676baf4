"""The record of a study: what is on the disk counts, a line cut off does not, and another study's is refused."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bngan.errors import UsageError
from bngan.study.record import Record, locked, read_results
from bngan.study.runner import Queue
from bngan.study.spec import Look, Result, first_choice, runs_of
from tests.study.stand_ins import at_once, small_study

STUDY = small_study()
FRESH = STUDY.blocks[1]
RUNS = [replace(run, looks=(Look(10, 100, True, ("mates_share",)),)) for run in runs_of(STUDY, STUDY.blocks[0])]
RESULTS = [
    Result(
        run=run,
        failure="d_loss is nan" if run.seed == 102 else None,
        seconds=1.5,
        measured=({"iteration": 10, "weights": "raw", "statistics": "running", "fid": 3.25},),
        probed=({"iteration": 10, "probe": "mates_share", "value": 0.5},),
    )
    for run in RUNS
]


def recorded(folder: Path) -> Path:
    record = Record(STUDY, folder)
    for result in RESULTS:
        record.add(result)
    return folder / "results.jsonl"


def test_first_line_tells_study_and_machine_and_every_result_has_a_line(tmp_path: Path) -> None:
    header, *lines = recorded(tmp_path).read_text().splitlines()
    assert json.loads(header)["sha256"] == STUDY.sha256
    assert {"study", "version", "torch", "machine", "device"} <= json.loads(header).keys()
    assert [json.loads(line)["run"]["id"] for line in lines] == [run.id for run in RUNS]
    assert (tmp_path / "study.yaml").read_text() == STUDY.source


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    recorded(tmp_path)
    again = Record(STUDY, tmp_path)
    assert list(again.results.values()) == RESULTS
    assert not again.torn


@pytest.mark.parametrize("cut", [1, 40])
def test_line_cut_off_is_dropped_and_written_again(cut: int, tmp_path: Path) -> None:
    path = recorded(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Record(STUDY, tmp_path)
    assert again.torn
    assert list(again.results.values()) == RESULTS[:-1]
    again.add(RESULTS[-1])
    assert path.read_bytes() == whole


def test_record_cut_off_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    assert Record(STUDY, tmp_path).results == {}
    assert json.loads(path.read_text())["sha256"] == STUDY.sha256


def test_who_only_reads_changes_nothing(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    path.write_bytes(cut := path.read_bytes()[:-40])
    assert list(read_results(STUDY, tmp_path).values()) == RESULTS[:-1]
    assert path.read_bytes() == cut
    with pytest.raises(UsageError, match="another study"):
        read_results(replace(STUDY, sha256="1" * 64), tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_results(STUDY, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_more_runs_than_planned_are_refused(tmp_path: Path) -> None:
    first, second = ({cell: {"g_lr d_lr": rate} for cell in first_choice(STUDY, FRESH)} for rate in (0.001, 0.01))
    fresh, again = (runs_of(STUDY, FRESH, choice) for choice in (first, second))
    record = Record(STUDY, tmp_path)
    for run in [*RUNS, *fresh]:
        record.add(at_once(run))
    assert len(Record(STUDY, tmp_path).results) == len(RUNS) + len(fresh)
    surplus = replace(RUNS[0], id=f"{RUNS[0].id}/again")
    for more, words in ((again[0], "are fresh runs of one arm at two values"), (surplus, "/again is one more than the study")):
        whole = record.path.read_bytes()
        record.add(at_once(more))
        for read in (Record, read_results):
            with pytest.raises(UsageError, match=words):
                read(STUDY, tmp_path)
        record.path.write_bytes(whole)


def test_fresh_runs_go_on_at_the_value_at_which_they_began() -> None:
    choice = {cell: {"g_lr d_lr": 0.01} for cell in first_choice(STUDY, FRESH)}
    begun = runs_of(STUDY, FRESH, choice)[:1]
    queue = Queue(STUDY, map(at_once, [*RUNS, *begun]), lambda block, pilots: first_choice(STUDY, FRESH))
    rates = {(run.context, run.arm): run.axes["g_lr d_lr"] for run in queue.waiting}
    assert len(queue.waiting) == 10
    assert rates == {("T", "a0"): 0.01, ("T", "a3"): 0.001, ("B", "a3"): 0.001, ("B", "aa"): 0.001}


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    before = recorded(tmp_path).read_bytes()
    with pytest.raises(UsageError, match="another study"):
        Record(replace(STUDY, sha256="1" * 64), tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(UsageError, match="choose another --output"):
        Record(STUDY, tmp_path / "occupied")


@pytest.mark.skipif(sys.platform == "win32", reason="knows no such locks")
def test_two_studies_in_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with locked(folder), pytest.raises(UsageError, match=r"running in .*new already; wait for its end"), locked(folder):
        pytest.fail("the second came in")
    with locked(folder), locked(tmp_path):  # when the first has ended; and another folder is free
        assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="knows no such locks")
def test_folder_of_a_study_that_was_killed_is_free(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(writing, b"in")
            time.sleep(1_000)
    try:
        assert os.read(reading, 2) == b"in"
        with pytest.raises(UsageError, match="already"), locked(tmp_path):
            pytest.fail("two came in")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with locked(tmp_path):
        pass


def test_result_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    record = Record(STUDY, tmp_path)
    (tmp_path / "results.jsonl").unlink()
    (tmp_path / "results.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"cannot write to .*results.jsonl: .*; the same command then goes on"):
        record.add(RESULTS[0])
    assert record.results == {}
