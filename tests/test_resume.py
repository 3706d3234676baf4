"""A run that was stopped anywhere and goes on ends as the one that was never stopped, to the last bit."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bngan.callbacks import checkpoints
from bngan.callbacks.checkpoints import WholeCheckpoints
from bngan.cli import main
from bngan.sampling import config_beside
from bngan.trainer_cli import KEPT
from tests.conftest import REPOSITORY

# Five iterations an epoch, four epochs, two validations.
DIGITS = (
    "--metrics.num_samples=200",
    "--trainer.accelerator=cpu",
    "--trainer.limit_train_batches=5",
    "--trainer.max_epochs=4",
    "--trainer.check_val_every_n_epoch=2",
    "--trainer.limit_val_batches=3",
    "--trainer.log_every_n_steps=1",
    "--batchnorm.every_n_iterations=4",
    "--images.every_n_iterations=6",
    "--data.batch_size=16",
)
WITHIN_EPOCHS = ("--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=3")
ITERATIONS = 20
Series = dict[str, list[tuple[int, float]]]


def fit(folder: Path, *settings: str) -> int:
    return main(["fit", *settings, f"--trainer.default_root_dir={folder}"])


def runs(folder: Path) -> list[Path]:
    """Return the folders of all runs that got as far as training, the oldest first."""
    return [path.parent for path in sorted(folder.glob("*/*/config.yaml"), key=lambda path: path.stat().st_mtime_ns)]


def last(folder: Path) -> dict[str, Any]:
    return torch.load(runs(folder)[-1] / "checkpoints" / "last.ckpt", weights_only=True)


def recorded(folder: Path) -> dict[str, Any]:
    """Return the settings of the newest run."""
    return yaml.safe_load((runs(folder)[-1] / "config.yaml").read_text())


def series(folder: Path) -> Series:
    """Return (iteration, value) of each scalar, of all runs together, in the order in which they were written."""
    found: Series = {}
    for run in runs(folder):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compare nested containers; tensors must have the same bits."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{where}[{number}]")
    else:
        assert one == other, where


def assert_ended_alike(whole: Path, resumed: Path, iterations: int = ITERATIONS) -> None:
    one, other = last(whole), last(resumed)
    assert int(one["state_dict"]["iteration"]) == one["global_step"] == iterations
    for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert_same(one[part], other[part], part)
    for name in ("Checkpoints", "RunProgress"):
        mine, theirs = (next(v for key, v in content["callbacks"].items() if key.startswith(name)) for content in (one, other))
        assert_same(mine, theirs, name)
    assert "train/d_loss" in series(whole)
    assert series(whole) == series(resumed)


@pytest.fixture(scope="module")
def whole(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of an uninterrupted run with these settings, made once."""
    made: dict[tuple[str, ...], Path] = {}

    def of(*settings: str) -> Path:
        if settings not in made:
            made[settings] = tmp_path_factory.mktemp("whole")
            assert fit(made[settings], f"--data.root={mnist_root}", *settings) == 0
        return made[settings]

    return of


def stop_and_go_on(folder: Path, root: Path, settings: tuple[str, ...], iteration: int, kind: str = "StopAfter") -> None:
    stop = (f"--trainer.callbacks+=tests.interruptions.{kind}", f"--trainer.callbacks.iteration={iteration}")
    assert fit(folder, f"--data.root={root}", *settings, *stop) == 143
    where = int(last(folder)["state_dict"]["iteration"])
    assert where in (iteration, iteration + 1)
    assert fit(folder, f"--data.root={root}", "--ckpt_path=last", "--trainer.callbacks=null") == 0


@pytest.mark.parametrize(("factor", "expected"), [(0, [5, 10, 15, 20]), (1e9, [5, 20])])
def test_short_epochs_do_not_all_end_with_a_checkpoint_but_the_last_one_does(
    factor: float, expected: list[int], mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    def save(self: WholeCheckpoints, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        if Path(path).name == "last.ckpt":
            saved.append(checkpoint["global_step"])
        write(self, checkpoint, path, storage_options)

    write = WholeCheckpoints.save_checkpoint
    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", save)
    monkeypatch.setattr(checkpoints, "LEAST_BETWEEN_SAVES", factor)
    assert fit(tmp_path, f"--data.root={mnist_root}", *DIGITS, "--trainer.limit_val_batches=0") == 0
    assert saved == expected
    assert last(tmp_path)["global_step"] == ITERATIONS


@pytest.mark.parametrize("iteration", [1, 4, 5, 7, 9, 10, 14, 19])
def test_stop_after_any_iteration(iteration: int, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path) -> None:
    stop_and_go_on(tmp_path, mnist_root, DIGITS, iteration)
    assert_ended_alike(whole(*DIGITS), tmp_path)


@pytest.mark.parametrize("iteration", [2, 3, 5, 8, 12])
def test_stop_where_epochs_are_cut_up_by_validation(
    iteration: int, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    settings = (*DIGITS, *WITHIN_EPOCHS)
    stop_and_go_on(tmp_path, mnist_root, settings, iteration)
    assert_ended_alike(whole(*settings), tmp_path)


@pytest.mark.parametrize(("iteration", "more"), [(10, ()), (20, ()), (3, WITHIN_EPOCHS), (13, WITHIN_EPOCHS)])
def test_stop_in_the_middle_of_a_validation(
    iteration: int, more: tuple[str, ...], whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    stop_and_go_on(tmp_path, mnist_root, (*DIGITS, *more), iteration, "StopInValidation")
    assert int(torch.load(runs(tmp_path)[0] / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]) == iteration
    assert_ended_alike(whole(*DIGITS, *more), tmp_path)


@pytest.mark.parametrize(
    "more",
    [("--trainer.max_epochs=-1", "--trainer.max_steps=13"), ("--trainer.max_epochs=-1", "--trainer.max_steps=15"), ()],
    ids=["within the last epoch", "at its end", "by epochs"],
)
def test_validation_after_the_last_iteration_is_stopped_twice_and_made_up_for(
    more: tuple[str, ...], whole: Callable[..., Path], mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*DIGITS, "--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=1", *more)
    iterations = int(last(whole(*settings))["global_step"])
    root = f"--data.root={mnist_root}"
    stop = ("tests.interruptions.StopInValidation", f"--trainer.callbacks.iteration={iterations}")
    assert fit(tmp_path, root, *settings, f"--trainer.callbacks+={stop[0]}", stop[1]) == 143
    assert fit(tmp_path, root, "--ckpt_path=last", f"--trainer.callbacks={stop[0]}", stop[1]) == 143
    capsys.readouterr()
    assert fit(tmp_path, root, "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert "Nothing was left to do" not in capsys.readouterr().out
    assert_ended_alike(whole(*settings), tmp_path, iterations)
    assert fit(tmp_path, root, "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert "Nothing was left to do" in capsys.readouterr().out


@pytest.mark.parametrize("iteration", [3, 8, 10])
def test_crash_after_a_validation_does_not_repeat_it(
    iteration: int, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    settings = (*DIGITS, *WITHIN_EPOCHS, "--checkpoint.every_n_iterations=1")
    crash = ("--trainer.callbacks+=tests.interruptions.Crash", f"--trainer.callbacks.iteration={iteration}")
    assert fit(tmp_path, f"--data.root={mnist_root}", *settings, *crash) == 1
    assert int(last(tmp_path)["state_dict"]["iteration"]) == iteration
    assert fit(tmp_path, f"--data.root={mnist_root}", "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert_ended_alike(whole(*settings), tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        ("--model.n_critic=3",),
        ("--model.accumulate=2", "--model.ema_buffers=recalibrate"),
        ("--model.d_dropout=0.3", "--model.ema_buffers=copy"),
        ("--model.d_norm=virtual", "--data.batch_size=64"),
        ("--model.d_norm=layer", "--model.r1=0.1", "--model.loss=wasserstein", "--model.ema_decay=0"),
        ("--model.network=conv", "--model.hidden_dim=4", "--model.batching=separate", "--model.d_tracks_g_step=true"),
        ("--trainer.precision=bf16-mixed",),
    ],
    ids=lambda more: " ".join(setting.split(".")[1] for setting in more),
)
def test_every_kind_of_state_survives(
    more: tuple[str, ...], whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    stop_and_go_on(tmp_path, mnist_root, (*DIGITS, *more), iteration=8)
    assert_ended_alike(whole(*DIGITS, *more), tmp_path)


@pytest.mark.parametrize("iteration", [4, 5, 12])
def test_run_that_counts_iterations_alone(iteration: int, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path) -> None:
    settings = (*DIGITS, "--trainer.max_epochs=-1", "--trainer.max_steps=13")
    stop_and_go_on(tmp_path, mnist_root, settings, iteration)
    assert_ended_alike(whole(*settings), tmp_path, iterations=13)


def test_stopped_again_and_again(whole: Callable[..., Path], mnist_root: Path, tmp_path: Path) -> None:
    root = f"--data.root={mnist_root}"
    assert (
        fit(tmp_path, root, *DIGITS, "--trainer.callbacks+=tests.interruptions.StopAfter", "--trainer.callbacks.iteration=2")
        == 143
    )
    for iteration in (6, 10, 11, 15, 18):
        stop = ("--trainer.callbacks=tests.interruptions.StopAfter", f"--trainer.callbacks.iteration={iteration}")
        assert fit(tmp_path, root, "--ckpt_path=last", *stop) == 143
    assert fit(tmp_path, root, "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert len(runs(tmp_path)) == 7
    assert_ended_alike(whole(*DIGITS), tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("iteration", [2, 4, 6])
def test_pictures_that_workers_read(workers: int, iteration: int, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    settings = (
        *("--data.name=folder", f"--data.folder={tmp_path / 'pictures'}", "--data.batch_size=9", "--data.in_memory_gb=0"),
        *(f"--data.num_workers={workers}", "--metrics.num_samples=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=3"),
        *("--trainer.check_val_every_n_epoch=1", "--trainer.log_every_n_steps=1"),
    )
    assert fit(tmp_path / "whole", *settings) == 0
    stop = ("--trainer.callbacks+=tests.interruptions.StopAfter", f"--trainer.callbacks.iteration={iteration}")
    assert fit(tmp_path / "resumed", *settings, *stop) == 143
    assert fit(tmp_path / "resumed", "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert_ended_alike(tmp_path / "whole", tmp_path / "resumed", iterations=12)


def test_comparison_would_notice_another_run(whole: Callable[..., Path], mnist_root: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, f"--data.root={mnist_root}", *DIGITS, "--seed_everything=1") == 0
    with pytest.raises(AssertionError):
        assert_ended_alike(whole(*DIGITS), tmp_path)


def test_one_rank_goes_on_as_two_and_back(mnist_root: Path, tmp_path: Path) -> None:
    common = (*DIGITS, f"--data.root={mnist_root}", "--trainer.precision=64-true", "--checkpoint.monitor=val/d_loss")

    def fit_apart(folder: str, *settings: str) -> None:
        command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), "fit", *common, *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, f"--trainer.default_root_dir={folder}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    fit_apart("whole")
    for first in (1, 2):
        folder = tmp_path / f"{first}-first"
        stop = ("--checkpoint.every_n_iterations=7", "--checkpoint.keep_all=true", f"--trainer.devices={first}")
        fit_apart(folder.name, *stop)
        kept = runs(folder)[0] / "checkpoints" / "iteration-000007.ckpt"
        fit_apart(folder.name, f"--ckpt_path={kept}", f"--trainer.devices={3 - first}")
        one, other = last(tmp_path / "whole"), last(folder)
        assert len(runs(folder)) == 2
        for name, value in one["state_dict"].items():
            torch.testing.assert_close(other["state_dict"][name], value, rtol=0, atol=1e-9)
        for mine, theirs in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
            for number, moments in mine["state"].items():
                for name, value in moments.items():
                    torch.testing.assert_close(theirs["state"][number][name], value, rtol=0, atol=1e-9)


def test_checkpoint_outside_a_run_takes_no_strangers_settings(
    whole: Callable[..., Path], mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies two folders above a checkpoint is its run's only where that is a run's folder."""
    alone = tmp_path / "a" / "checkpoints" / "last.ckpt"
    alone.parent.mkdir(parents=True)
    run = runs(whole(*DIGITS))[-1]
    shutil.copy(run / "checkpoints" / "last.ckpt", alone)
    (tmp_path / "a" / "config.yaml").write_text("trainer: {max_epochs: 7}")
    again = (f"--data.root={mnist_root}", "--metrics.num_samples=0", f"--ckpt_path={alone}", "--trainer.max_steps=20")
    assert fit(tmp_path / "runs", *again) == 0
    assert f"{alone} lies in no run's folder" in capsys.readouterr().out
    shutil.copy(run / "run.json", tmp_path / "a")
    assert fit(tmp_path / "runs", *again) == 0
    assert "lies in no run's folder" not in capsys.readouterr().out
    settings = [
        yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] for folder in runs(tmp_path / "runs")
    ]
    assert settings == [20, 7]


def test_checkpoint_at_the_root_of_the_disk_has_no_run() -> None:
    assert config_beside(Path("/last.ckpt")) is None
    assert config_beside(Path("/checkpoints/last.ckpt")) is None


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no loops": ({"loops": None}, "loops"),
    "no loop of training": ({"loops": {"validate_loop": {}}}, "loops"),
    "no optimizers": ({"optimizer_states": None}, "0 optimizers, not of 2"),
    "no states of optimizers": ({"optimizer_states": []}, "0 optimizers, not of 2"),
    "one optimizer": ({"optimizer_states": [{}]}, "1 optimizers, not of 2"),
    "empty optimizers": ({"optimizer_states": [{}, {}]}, "empty"),
    "another iteration": ({"global_step": 19}, "iteration 20, and the rest of it of 19"),
    "no iteration": ({"global_step": None}, "iteration 20, and the rest of it of None"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_checkpoint_of_half_a_run_is_for_measuring_alone(
    case: str, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, words = DAMAGED[case]
    content = {**last(whole(*DIGITS)), **changes}
    half = tmp_path / "half.ckpt"
    torch.save({name: value for name, value in content.items() if value is not None}, half)
    again = (f"--data.root={mnist_root}", f"--ckpt_path={half}", "--trainer.max_steps=22", "--metrics.num_samples=0")
    for more in ((), ("--override",)):
        assert fit(tmp_path / "runs", *again, *more) == 2
        answer = capsys.readouterr().err
        assert f"{half} is damaged" in answer
        assert words in answer
        assert len(answer.strip().splitlines()) <= 2
    assert not runs(tmp_path / "runs")
    measuring = (
        "--trainer.limit_val_batches=1",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
    )
    assert main(["validate", *again[:2], "--metrics.num_samples=0", *measuring]) == 0
    assert main(["sample", str(half), f"--output={tmp_path / 'samples.png'}"]) == 0


# What decides the result of a run, and its value in a run that was begun with DIGITS.
BINDING = {
    "trainer.precision": ("bf16-mixed", "None"),
    "trainer.sync_batchnorm": ("false", "True"),
    "trainer.limit_train_batches": ("4", "5"),
    "trainer.limit_val_batches": ("3.0", "3"),
    "metrics.num_samples": ("201", "200"),
    "metrics.feature": ("inception", "digits"),
    "metrics.seed": ("1", "0"),
    "checkpoint.monitor": ("val/kid", "val/fid"),
    "checkpoint.mode": ("max", "min"),
}
# What does not: the length, when to validate, log, draw and save, the machine, and what looks on.
FREE = (
    *(
        "--trainer.max_epochs=5",
        "--trainer.max_steps=21",
        "--trainer.check_val_every_n_epoch=1",
        "--trainer.val_check_interval=2",
    ),
    *("--trainer.log_every_n_steps=3", "--images.every_n_iterations=7", "--images.num_samples=4", "--images.seed=2"),
    *("--batchnorm.every_n_iterations=3", "--batchnorm.histograms=false", "--checkpoint.every_n_iterations=2"),
    *("--metrics.chunk=100", "--data.eval_batch_size=100", "--data.num_workers=0", "--trainer.devices=1"),
    *("--trainer.callbacks=ModelSummary", "--trainer.profiler=simple", "--trainer.max_time=00:01:00:00", "--name=other"),
    # The same in other words is no contradiction.
    *(
        "--trainer.precision=32-true",
        "--metrics.num_samples=200",
        "--trainer.limit_train_batches=5",
        "--model.loss=relativistic",
    ),
)


@pytest.mark.parametrize("name", BINDING)
def test_setting_that_decides_the_result_is_not_changed_unasked(
    name: str, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, saved = BINDING[name]
    last_checkpoint = runs(whole(*DIGITS))[-1] / "checkpoints" / "last.ckpt"
    again = (f"--data.root={mnist_root}", f"--ckpt_path={last_checkpoint}", f"--{name}={given}")
    assert fit(tmp_path, *again) == 2
    answer = capsys.readouterr().err
    assert f"--{name} " in answer
    assert f"which has {saved};" in answer
    assert "--override" in answer
    assert not runs(tmp_path)
    if given == "inception":
        return  # which would be downloaded
    assert fit(tmp_path, *again, "--override", "--trainer.max_steps=21", "--trainer.max_epochs=5") == 0
    group, _, setting = name.partition(".")
    assert str(recorded(tmp_path)[group][setting]).lower() == given


def test_what_does_not_decide_the_result_is_changed_freely(
    whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    last_checkpoint = runs(whole(*DIGITS))[-1] / "checkpoints" / "last.ckpt"
    assert fit(tmp_path, f"--data.root={mnist_root}", f"--ckpt_path={last_checkpoint}", *FREE) == 0
    settings = recorded(tmp_path)
    for flag in FREE:
        name, _, value = flag.removeprefix("--").partition("=")
        found: Any = settings
        for part in name.split("."):
            found = found[part]
        assert str(found).lower() == value or name == "trainer.callbacks", name


def test_run_keeps_its_name_and_its_batches_of_evaluation(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = f"--data.root={mnist_root}"
    begun = (*DIGITS, "--metrics.num_samples=0", "--data.eval_batch_size=40")
    assert main(["fit", *begun, data, "--trainer.max_steps=2", "--name=foo"]) == 0
    (folder,) = Path("runs/foo").iterdir()
    assert main(["fit", f"--ckpt_path={folder}/checkpoints/last.ckpt", data, "--trainer.max_steps=3"]) == 0
    assert main(["fit", "--ckpt_path=last", "--name=foo", data, "--trainer.max_steps=4"]) == 0
    assert len(list(Path("runs/foo").iterdir())) == 3
    assert recorded(Path("runs"))["data"]["eval_batch_size"] == 40
    assert int(last(Path("runs"))["state_dict"]["iteration"]) == 4
    newest = runs(Path("runs"))[-1] / "checkpoints" / "last.ckpt"
    assert main(["fit", f"--ckpt_path={newest}", "--name=bar", data, "--trainer.max_steps=5", "--data.eval_batch_size=50"]) == 0
    assert len(list(Path("runs/bar").iterdir())) == 1
    assert recorded(Path("runs"))["data"]["eval_batch_size"] == 50


def test_job_that_is_started_again_finds_the_run_whose_name_it_kept(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    begun = ("fit", *DIGITS, "--metrics.num_samples=0", f"--data.root={mnist_root}")
    assert main([*begun, "--trainer.max_steps=2", "--name=foo"]) == 0
    (folder,) = Path("runs/foo").iterdir()
    again = [*begun, "--trainer.max_steps=3", f"--ckpt_path={folder}/checkpoints/last.ckpt"]
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert main(again) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    assert main(again) == 0
    assert "its run goes on from iteration 3" in capsys.readouterr().out
    assert len(list(Path("runs/foo").iterdir())) == 2


def test_readme_names_what_a_run_does_not_change_unasked() -> None:
    told = (REPOSITORY / "README.md").read_text().partition("## Stop and go on")[2].partition("##")[0]
    for group, kept in KEPT.items():
        if group != "model":
            assert all(f"`{f'{group}.' if group else ''}{name}`" in told for name in kept.binding), group
    assert "all of `model`" in told
