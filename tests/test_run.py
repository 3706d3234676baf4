"""A run's folder: how it is named, found and gone on with, and what it says of itself."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bngan import __version__, run
from bngan.errors import UsageError
from bngan.run import (
    Location,
    Start,
    check_restart,
    check_writable,
    checkpoint_of,
    find,
    find_own,
    new_folder,
    newest_checkpoint,
    only_one,
    record,
    run_of,
    start_of,
)

CPU = torch.device("cpu")
RUNS = Path("runs")
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write() -> Write:
    """Write a run with checkpoints of some iterations, each later than all before it."""
    times = iter(range(1000, 2000))

    def of(name: str, **iterations: int) -> Path:
        folder = Path("runs") / name
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if not run.is_run(folder):
            record(Start(folder), CPU, devices=1)
            (folder / "config.yaml").write_text("name: mnist")
        for stem, iteration in iterations.items():
            path = folder / "checkpoints" / f"{stem}.ckpt"
            torch.save({"state_dict": {"iteration": torch.tensor(iteration)}, "hyper_parameters": {}}, path)
            now = next(times)
            os.utime(path, (now, now))
        return folder

    return of


def location(run_id: str | None = None, name: str = "mnist") -> Location:
    return Location(Path("runs"), name, run_id)


# Names ------------------------------------------------------------------------------------------------------------------


def test_new_runs_have_folders_of_their_own_unless_they_are_named() -> None:
    one, other = new_folder(location()), new_folder(location())
    assert one.parent == other.parent == Path("runs/mnist")
    assert one != other
    assert new_folder(location("job-7")) == Path("runs/mnist/job-7")


@pytest.mark.parametrize("word", ["../up", "a/b", "", ".", "..", "a b"])
def test_names_and_ids_that_are_no_folders_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match="--run"):
        new_folder(location(word))
    with pytest.raises(UsageError, match="--name"):
        new_folder(location(name=word))


# Finding ----------------------------------------------------------------------------------------------------------------


def test_newest_checkpoint_is_of_the_highest_iteration(write: Write) -> None:
    folder = write("mnist/a", best=20, last=15)
    assert newest_checkpoint(folder) == folder / "checkpoints" / "best.ckpt"
    write("mnist/a", last=30)
    assert newest_checkpoint(folder) == folder / "checkpoints" / "last.ckpt"
    assert newest_checkpoint(Path("nowhere")) is None


@pytest.mark.parametrize("other", ["best", "zebra"])
def test_last_checkpoint_comes_before_its_equals(other: str, write: Write) -> None:
    folder = write("mnist/a", last=20, **{other: 20})
    assert newest_checkpoint(folder) == folder / "checkpoints" / "last.ckpt"


def test_damaged_checkpoints_are_passed_over_with_a_line(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write("mnist/a", best=10, last=20)
    newest = folder / "checkpoints" / "last.ckpt"
    newest.write_bytes(newest.read_bytes()[:100])
    assert newest_checkpoint(folder) == folder / "checkpoints" / "best.ckpt"
    assert f"Passed over: {newest} is damaged" in capsys.readouterr().out


def test_a_checkpoint_a_folder_and_last_are_found(write: Write) -> None:
    old, new = write("mnist/old", last=50, best=40), write("mnist/new", last=10, best=10)
    other = write("other/newest", last=70)
    assert find("some.ckpt", RUNS, best=False) == Path("some.ckpt")
    assert find(str(old), RUNS, best=False) == old / "checkpoints" / "last.ckpt"
    assert find("last", RUNS, "mnist", best=False) == new / "checkpoints" / "last.ckpt"
    assert find("last", RUNS, best=False) == other / "checkpoints" / "last.ckpt"
    write("mnist/old", best=60)
    assert find("last", RUNS, best=False) == old / "checkpoints" / "best.ckpt"
    with pytest.raises(UsageError, match="last: no run in runs/third has a checkpoint; name a run's folder"):
        find("last", RUNS, "third", best=False)
    with pytest.raises(UsageError, match=r"last: no run in elsewhere/\* has"):
        find("last", Path("elsewhere"), best=False)
    Path("empty").mkdir()
    with pytest.raises(UsageError, match="empty has no whole checkpoint"):
        find("empty", RUNS, best=False)


def test_what_is_measured_is_a_runs_best_and_else_its_newest(write: Write) -> None:
    judged, young = write("mnist/judged", best=40, last=50), write("mnist/young", last=10)
    assert checkpoint_of(judged) == judged / "checkpoints" / "best.ckpt"
    assert checkpoint_of(str(young)) == checkpoint_of("last") == young / "checkpoints" / "last.ckpt"
    assert checkpoint_of(judged / "checkpoints" / "last.ckpt") == judged / "checkpoints" / "last.ckpt"
    write("mnist/judged", last=60)
    assert checkpoint_of("last") == judged / "checkpoints" / "best.ckpt"


def test_one_checkpoint_is_named_at_a_time(write: Write) -> None:
    old = write("mnist/old", best=4)
    star = "runs/mnist/*/checkpoints/best.ckpt"
    assert only_one(["any"]) == "any"
    assert only_one([star]) == str(old / "checkpoints" / "best.ckpt")
    assert only_one(["gone/*.ckpt"]) == "gone/*.ckpt"
    Path("[1].ckpt").touch()
    assert only_one(["[1].ckpt"]) == "[1].ckpt"
    new = write("mnist/a_newer_one", best=3)
    paths = [str(folder / "checkpoints" / "best.ckpt") for folder in (new, old)]
    for several in (paths, [star]):
        with pytest.raises(UsageError, match=f"^2 checkpoints or runs given, name one; the newest is {paths[0]}$"):
            only_one(several)
    with pytest.raises(UsageError, match=f"^3 .* the newest is {new}$"):
        only_one([str(old), str(new), "gone"])


def test_auto_goes_on_if_there_is_something_and_else_begins(write: Write) -> None:
    assert find_own(location("a")) is None
    folder = write("mnist/a", last=10)
    assert find_own(location("a")) == folder / "checkpoints" / "last.ckpt"
    assert find_own(location("b")) is None
    with pytest.raises(UsageError, match="add --run ID"):
        find_own(location())


def test_a_checkpoint_lies_in_a_run_where_the_run_says_so(write: Write) -> None:
    folder = write("mnist/a", last=10)
    assert run_of(folder / "checkpoints" / "last.ckpt") == folder
    assert run_of(folder.absolute() / "checkpoints" / "last.ckpt") == folder
    assert run_of(folder / "last.ckpt") is None
    (folder / "config.yaml").rename(folder / "moved.yaml")
    assert run_of(folder / "checkpoints" / "last.ckpt") is None
    (folder / "moved.yaml").rename(folder / "config.yaml")
    assert run_of(folder / "checkpoints" / "last.ckpt") == folder
    for text in ("{}", "not json", '{"job": [], "command": "of version 0.1"}', "[1]"):
        (folder / "run.json").write_text(text)
        assert run_of(folder / "checkpoints" / "last.ckpt") is None


# Starting ---------------------------------------------------------------------------------------------------------------


def started(checkpoint: Path | None, iteration: int = 0, run_id: str | None = None, **flags: bool) -> Start:
    return start_of(checkpoint, iteration, location(run_id), **{"auto": False, "apart": False, **flags})


def test_going_on_from_the_newest_checkpoint_writes_in_the_run_itself(write: Write) -> None:
    folder = write("mnist/a", last=20, best=20)
    for name in ("last", "best"):
        checkpoint = folder / "checkpoints" / f"{name}.ckpt"
        assert started(checkpoint, 20) == Start(folder, checkpoint, 20, parent=None, begun=True)
        assert started(checkpoint, 20, "a", auto=True).folder == folder


@pytest.mark.parametrize("why", ["older", "apart", "named"])
def test_other_ways_of_going_on_begin_a_run_that_names_its_parent(why: str, write: Write) -> None:
    folder = write("mnist/a", last=20, best=10)
    checkpoint, iteration = folder / "checkpoints" / "last.ckpt", 20
    if why == "older":
        checkpoint, iteration = folder / "checkpoints" / "best.ckpt", 10
    start = started(checkpoint, iteration, "b" if why == "named" else None, apart=why == "apart")
    assert start.folder != folder
    assert start.parent == {"folder": str(folder), "iteration": iteration}
    assert (start.checkpoint, start.iteration, start.begun) == (checkpoint, iteration, False)


def test_checkpoint_outside_a_run_begins_one() -> None:
    start = started(Path("else/where.ckpt"), 5)
    assert start.folder.parent == Path("runs/mnist")
    assert start.parent == {"folder": "else", "iteration": 5}


def test_beginning_has_no_parent() -> None:
    assert started(None, run_id="a") == Start(Path("runs/mnist/a"))
    assert str(started(None)) == "at the beginning"


def test_run_that_is_there_is_not_written_over(write: Write) -> None:
    folder = write("mnist/a", last=20, best=10)
    for checkpoint, iteration, flags in (
        (None, 0, {}),
        (folder / "checkpoints" / "best.ckpt", 10, {}),
        (folder / "checkpoints" / "last.ckpt", 20, {"auto": True, "apart": True}),
    ):
        with pytest.raises(UsageError, match="--ckpt_path auto --run a"):
            started(checkpoint, iteration, "a", **flags)


def test_run_that_was_stopped_before_its_first_checkpoint_begins_anew_in_its_folder(write: Write) -> None:
    folder = write("mnist/a")
    assert started(None, run_id="a", auto=True) == Start(folder, begun=True)


def test_where_a_start_is_reads_alike_on_machines_with_the_folder_in_different_places() -> None:
    places = [Start(Path("any"), Path(root) / "mnist/a/checkpoints/last.ckpt", 7) for root in ("/here/runs", "/there/runs")]
    texts = {str(start) for start in places}
    assert len({text.replace("mnist/", "") for text in texts}) == 1
    assert "iteration 7" in texts.pop()


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_job_that_is_started_again_must_say_how_to_go_on(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_restart(None)
    monkeypatch.setenv(launcher, "0")
    check_restart(None)
    monkeypatch.setenv(launcher, "2")
    check_restart("auto")
    for asked in (None, "last", "some.ckpt"):
        with pytest.raises(UsageError, match="--ckpt_path auto --run ID"):
            check_restart(asked)


def test_folder_that_cannot_be_made_is_told_of_and_one_that_can_is_not_there_yet() -> None:
    check_writable(Path("a/b"))
    assert not Path("a/b").exists()
    Path("a/b").mkdir()
    check_writable(Path("a/b"))
    assert Path("a/b").is_dir()
    Path("occupied").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot write to occupied/b: .*--trainer\.default_root_dir"):
        check_writable(Path("occupied/b"))


# Recording --------------------------------------------------------------------------------------------------------------


def test_run_records_each_of_its_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("runs/mnist/a")
    monkeypatch.setattr("sys.argv", ["bngan", "fit", "--name", "two words"])
    record(Start(folder, parent={"folder": "runs/mnist/b", "iteration": 3}, iteration=3), CPU, devices=2)
    record(Start(folder, Path("x"), iteration=9, begun=True), CPU, devices=1)
    content = json.loads((folder / "run.json").read_text())
    assert (content["id"], content["parent"]) == ("a", {"folder": "runs/mnist/b", "iteration": 3})
    assert [start["iteration"] for start in content["starts"]] == [3, 9]
    assert [start["machine"]["devices"] for start in content["starts"]] == [2, 1]
    first = content["starts"][0]
    assert first["command"] == "bngan fit --name 'two words'"
    assert first["versions"]["bngan"] == __version__
    assert first["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_run_that_begins_anew_keeps_what_it_was(write: Write) -> None:
    folder = write("mnist/a")
    record(Start(folder, begun=True), CPU, devices=1)
    assert len(json.loads((folder / "run.json").read_text())["starts"]) == 2


def test_commit_is_that_of_the_source_tree_and_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    monkeypatch.setattr(run, "REPOSITORY", Path("tree"))
    Path("tree").mkdir()
    assert run.git_commit() is None
    for command in (["init"], ["commit", "--allow-empty", "--message", "first"]):
        subprocess.run([*git, *command], cwd="tree", check=True, capture_output=True)
    commit = run.git_commit()
    assert commit is not None
    assert len(commit) == 40
    Path("tree/new").touch()
    assert run.git_commit() == f"{commit}+changes"
