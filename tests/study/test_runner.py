"""The queue of a study: blocks in order, a choice when its pilots have ended, nothing lost or repeated, no fault a result."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bngan.errors import UsageError
from bngan.study.launchers import Chunk, Ended, Together
from bngan.study.record import Record
from bngan.study.runner import Progress, Queue, duration, run_study
from bngan.study.spec import Block, Choice, Result, planned_runs, runs_of
from tests.study.stand_ins import at_once, small_study

STUDY = small_study()
PLANNED = 12 + 11


def second_rate(block: Block, pilots: Sequence[Result]) -> Choice:
    assert block.name == "A"
    assert {result.run.id for result in pilots} == {run.id for run in runs_of(STUDY, block)}
    return {(result.run.context, result.run.arm): {"g_lr d_lr": 0.01} for result in pilots}


class Inline:
    """Does chunks of two runs in this process, the last started first; it may refuse to go on, and lose some."""

    def __init__(self, stop_after: int = 10**9, lose: Sequence[str] = ()) -> None:
        self.done: list[str] = []
        self.started: list[Chunk] = []
        self.stop_after, self.lose, self.closed = stop_after, list(lose), False

    @property
    def room(self) -> int:
        return 2 - len(self.started)

    @property
    def busy(self) -> bool:
        return bool(self.started)

    def take(self, waiting: Chunk) -> Chunk:
        return waiting[:2]

    def start(self, runs: Chunk) -> None:
        self.started.append(runs)

    def ended(self) -> list[Ended[Result]]:
        if len(self.done) >= self.stop_after:
            raise KeyboardInterrupt
        runs = self.started.pop()
        for run in runs:
            if run.id in self.lose:
                self.lose.remove(run.id)
                return [Ended(runs, None, "memory was full")]
        self.done += [run.id for run in runs]
        return [Ended(runs, [at_once(run) for run in runs])]

    def close(self) -> None:
        self.closed = True


def test_all_runs_are_done_once_blocks_in_order_and_on_the_chosen_rate(tmp_path: Path) -> None:
    record, launcher = Record(STUDY, tmp_path), Inline()
    run_study(STUDY, record, launcher, second_rate)
    assert launcher.closed
    assert len(launcher.done) == len(set(launcher.done)) == len(record.results) == PLANNED
    assert [name[0] for name in launcher.done] == ["A"] * 12 + ["F"] * 11
    assert {result.run.axes["g_lr d_lr"] for result in record.results.values() if result.run.block == "F"} == {0.01}


@pytest.mark.parametrize("stop_after", [1, 12, 15])
def test_a_stopped_study_goes_on_and_repeats_nothing(
    stop_after: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Inline(stop_after), Inline()
    with pytest.raises(KeyboardInterrupt):
        run_study(STUDY, Record(STUDY, tmp_path), first, second_rate)
    assert first.closed
    assert "The same command goes on" in capsys.readouterr().out
    assert len(Record(STUDY, tmp_path).results) == len(first.done) < PLANNED
    record = Record(STUDY, tmp_path)
    run_study(STUDY, record, second, second_rate)
    assert sorted(first.done + second.done) == sorted(record.results)
    assert len(record.results) == PLANNED
    third = Inline()
    run_study(STUDY, record, third, second_rate)
    assert third.done == []


def test_what_the_machine_failed_is_done_again_by_itself_after_all_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = "A/T/a0/0.001/101"
    record, launcher = Record(STUDY, tmp_path), Inline(lose=[first])
    run_study(STUDY, record, launcher, second_rate)
    assert len(record.results) == PLANNED
    assert all(result.failure is None for result in record.results.values())
    assert launcher.done[10:12] == [first, "A/T/a0/0.001/102"][:: 1 if launcher.done[10] == first else -1]  # the chunk's two
    assert f"{first} and 1 others: memory was full; once more by itself" in capsys.readouterr().out


def test_what_the_machine_failed_twice_is_no_result_and_told_when_all_else_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = "F/T/a3/0.01/2"
    record = Record(STUDY, tmp_path)
    with pytest.raises(UsageError, match=rf"1 of the runs have no result, .* first {lost} \(memory was full\)"):
        run_study(STUDY, record, Inline(lose=[lost, lost]), second_rate)
    assert len(record.results) == PLANNED - 1
    assert "given up" in capsys.readouterr().out
    again = Inline()
    run_study(STUDY, record, again, second_rate)
    assert again.done == [lost]
    assert len(Record(STUDY, tmp_path).results) == PLANNED


def test_runs_that_wait_for_a_pilot_the_machine_failed_are_not_done(tmp_path: Path) -> None:
    lost, record = "A/B/a3/0.001/101", Record(STUDY, tmp_path)
    with pytest.raises(UsageError, match=lost):
        run_study(STUDY, record, Inline(lose=[lost, lost]), second_rate)
    assert len(record.results) == 12 - 1


def test_blocks_that_wait_for_no_choice_fill_the_time() -> None:
    free = replace(STUDY.blocks[0], name="P", seeds={"fresh": (7,)})
    study = replace(STUDY, blocks=(*STUDY.blocks, free))
    queue = Queue(study, [], second_rate)
    assert [run.block for run in queue.waiting] == ["A"] * 12 + ["P"] * 6
    pilots = [run for run in queue.waiting if run.block == "A"]
    queue.settle(Ended(pilots, [at_once(run) for run in pilots]))
    assert {run.block for run in queue.waiting[12:23]} == {"F"}


def test_runs_of_one_structure_go_together(tmp_path: Path) -> None:
    chunks: list[Chunk] = []

    def together(runs: Chunk) -> list[Result]:
        chunks.append(runs)
        return [at_once(run) for run in runs]

    record = Record(STUDY, tmp_path)
    run_study(
        STUDY,
        record,
        Together(together, structure=lambda run: (run.context, run.settings.get("g_norm")), most=lambda run: 3),
        second_rate,
    )
    assert len(record.results) == PLANNED
    assert [len(runs) for runs in chunks[:6]] == [3, 1, 3, 1, 3, 1]
    for runs in chunks:
        assert len({(run.context, run.settings.get("g_norm")) for run in runs}) == 1


def test_runs_that_memory_does_not_hold_as_one_are_trained_as_two_halves(capsys: pytest.CaptureFixture[str]) -> None:
    runs = planned_runs(STUDY, STUDY.blocks[0])[:5]
    tried: list[int] = []

    def together(chunk: Chunk) -> list[Result]:
        tried.append(len(chunk))
        if len(chunk) > 2 or chunk[0] == runs[2]:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        return [at_once(run) for run in chunk]

    launcher = Together(together, structure=lambda run: 0, most=lambda run: 5)
    launcher.start(runs)
    ended = launcher.ended()
    assert tried == [5, 2, 3, 1, 2]
    assert [run for one in ended for run in one.runs] == runs
    assert [one.outcomes is None for one in ended] == [False, True, False]
    assert "no memory for 5 runs like A/T/a0/0.001/101 as one; it goes on with 2" in capsys.readouterr().out


def test_defect_of_runs_trained_as_one_is_raised() -> None:
    def together(chunk: Chunk) -> list[Result]:
        raise RuntimeError("a defect")

    launcher = Together(together, structure=lambda run: 0, most=lambda run: 5)
    launcher.start(planned_runs(STUDY, STUDY.blocks[0])[:5])
    with pytest.raises(RuntimeError, match="a defect"):
        launcher.ended()


def test_progress_tells_what_is_done_of_what_is_planned_and_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    results: list[Result] = []
    with Progress(STUDY, results) as progress:
        assert progress.seconds_left() is None
        results += [at_once(run) for run in planned_runs(STUDY, STUDY.blocks[0])]
        results[0] = replace(results[0], failure="d_loss is nan")
        left = progress.seconds_left()
        assert left is not None
        results += [at_once(run) for run in planned_runs(STUDY, STUDY.blocks[1])]
        assert progress.seconds_left() == 0.0
    assert "A 12/12  F 11/11  1 ended early  0 s left" in capsys.readouterr().out


def test_time_left_is_by_the_clock_and_by_what_each_block_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("bngan.study.runner.time.monotonic", lambda: clock[0])
    pilots = [replace(at_once(run), seconds=1.0) for run in planned_runs(STUDY, STUDY.blocks[0])]
    before, results = pilots[:2], list(pilots[:2])
    progress = Progress(STUDY, before)
    progress.results = results
    clock[0] = 105.0
    results += pilots[2:]
    assert progress.seconds_left() == pytest.approx(5.0 / 10 * 11)  # two at a time; the other block has iterations alike
    results += [replace(at_once(run), seconds=3.0) for run in planned_runs(STUDY, STUDY.blocks[1])[:1]]
    assert progress.seconds_left() == pytest.approx(5.0 / 13 * 3 * 10)


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(seconds) for seconds in (None, 40, 600, 36_000)] == ["?", "40 s", "10 min", "10.0 h"]
