"""A run that was stopped anywhere and goes on ends as the one that was never stopped, to the last bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bngan.callbacks import AtomicCheckpointIO, saving
from bngan.cli import main
from bngan.lightning_cli import FROZEN
from bngan.run import run_of
from tests.conftest import REPOSITORY, Command, only_run

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
    "--model.hidden_dim=32",
    "--images.num_samples=16",
)
WITHOUT_VALIDATION = (*(word for word in DIGITS if "val" not in word), "--trainer.limit_val_batches=0")
WITHIN_EPOCHS = ("--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=3")
AT_THEIR_ENDS = ("--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=5")
AFTER_EACH = ("--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=1")
# Nothing depends on how long the run is to be.
CONSTANT = ("--model.instance_noise=0", "--model.lr_decay_start=1")
ITERATIONS = 20


def slow(*cases: Any) -> list[Any]:
    """Return cases of a parametrization that others, which are quick, are much like."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


Series = dict[str, list[tuple[int, float]]]


def fit(folder: Path, *settings: str) -> int:
    return main(["fit", *settings, f"--trainer.default_root_dir={folder}"])


def go_on(folder: Path, root: Path, *settings: str) -> int:
    return fit(folder, f"--data.root={root}", "--ckpt_path=last", *settings)


def interrupted(kind: str, iteration: int, *, again: bool = False) -> tuple[str, str]:
    """Return the flags of a callback of interruptions.py, in place of one that the run has already if `again`."""
    flag = f"--trainer.callbacks{'' if again else '+'}=tests.integration.interruptions.{kind}"
    return flag, f"--trainer.callbacks.iteration={iteration}"


def last(folder: Path) -> dict[str, Any]:
    return torch.load(only_run(folder) / "checkpoints" / "last.ckpt", weights_only=True)


def recorded(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((only_run(folder) / "config.yaml").read_text())


def series(run: Path) -> Series:
    """Return (iteration, value) of each scalar, as TensorBoard shows them."""
    with TemporaryDirectory() as folder:
        # TensorBoard reads files by their names, which are in order where starts are more than a second apart.
        for number, path in enumerate(sorted(run.glob("events*"), key=lambda path: path.stat().st_mtime_ns)):
            (Path(folder) / f"events.out.tfevents.{number:03d}").symlink_to(path.absolute())
        events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


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
    for part in ("state_dict", "optimizer_states", "global_step", "epoch", "loops"):
        assert_same(one[part], other[part], part)
    for name in ("CheckpointSaver", "RunProgress"):
        assert_same(one["callbacks"][name], other["callbacks"][name], name)
    plots = series(only_run(whole))
    assert "train/d_loss" in plots
    assert plots == series(only_run(resumed))


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
    assert fit(folder, f"--data.root={root}", *settings, *interrupted(kind, iteration)) == 143
    assert last(folder)["global_step"] == iteration
    assert go_on(folder, root, "--trainer.callbacks=null") == 0


@pytest.mark.parametrize(("factor", "expected"), [(0, [5, 10, 15, 20]), (1e9, [5, 20])])
def test_short_epochs_do_not_all_end_with_a_checkpoint_but_the_last_one_does(
    factor: float, expected: list[int], mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []

    def save(self: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        if Path(path).name == "last.ckpt":
            saved.append(checkpoint["global_step"])
        write(self, checkpoint, path, storage_options)

    write = AtomicCheckpointIO.save_checkpoint
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    monkeypatch.setattr(saving, "LEAST_BETWEEN_SAVES", factor)
    assert fit(tmp_path, f"--data.root={mnist_root}", *WITHOUT_VALIDATION) == 0
    assert saved == expected
    assert last(tmp_path)["global_step"] == ITERATIONS


@pytest.mark.parametrize("iteration", [1, 5, 7, 10, 19, *slow(4, 9, 14)])
def test_stop_after_any_iteration(iteration: int, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path) -> None:
    stop_and_go_on(tmp_path, mnist_root, DIGITS, iteration)
    assert_ended_alike(whole(*DIGITS), tmp_path)


@pytest.mark.parametrize("iteration", [3, 5, 8, *slow(2, 12)])
def test_stop_where_epochs_are_cut_up_by_validation(
    iteration: int, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    settings = (*DIGITS, *WITHIN_EPOCHS)
    stop_and_go_on(tmp_path, mnist_root, settings, iteration)
    assert_ended_alike(whole(*settings), tmp_path)


@pytest.mark.parametrize(
    ("iteration", "more"),
    [
        *((10, ()), (13, WITHIN_EPOCHS), (5, AT_THEIR_ENDS)),
        *slow((20, ()), (3, WITHIN_EPOCHS), (5, AFTER_EACH), (7, AFTER_EACH)),
    ],
)
def test_validation_that_was_cut_off_is_made_up_for(
    iteration: int, more: tuple[str, ...], whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    stop_and_go_on(tmp_path, mnist_root, (*DIGITS, *more), iteration, "StopInValidation")
    assert_ended_alike(whole(*DIGITS, *more), tmp_path)


def test_last_validation_is_cut_off_twice_and_made_up_for(
    whole: Callable[..., Path], mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*DIGITS, *AT_THEIR_ENDS)
    assert fit(tmp_path, f"--data.root={mnist_root}", *settings, *interrupted("StopInValidation", ITERATIONS)) == 143
    assert go_on(tmp_path, mnist_root, *interrupted("StopInValidation", ITERATIONS, again=True)) == 143
    capsys.readouterr()
    assert go_on(tmp_path, mnist_root, "--trainer.callbacks=null") == 0
    assert "Nothing was left to do" not in capsys.readouterr().out
    assert_ended_alike(whole(*settings), tmp_path)
    assert go_on(tmp_path, mnist_root) == 0
    assert "Nothing was left to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("iterations", "more"), [(13, WITHIN_EPOCHS), (15, AT_THEIR_ENDS)], ids=["within an epoch", "at its end"]
)
def test_validation_after_max_steps_that_was_cut_off_is_missing_and_said_to_be(
    iterations: int,
    more: tuple[str, ...],
    whole: Callable[..., Path],
    mnist_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = (*DIGITS, *more, "--trainer.max_epochs=-1", f"--trainer.max_steps={iterations}")
    assert fit(tmp_path, f"--data.root={mnist_root}", *settings, *interrupted("StopInValidation", iterations)) == 143
    assert f"stopped at iteration {iterations}, whose validation is missing; go on with" in capsys.readouterr().err
    assert go_on(tmp_path, mnist_root, "--trainer.callbacks=null") == 0
    assert "Nothing was left to do" in capsys.readouterr().out
    assert last(tmp_path)["global_step"] == iterations
    plots, others = series(only_run(whole(*settings))), series(only_run(tmp_path))
    validated = {tag for tag in plots if tag.startswith(("val/", "floor/", "dropped/", "blurred/", "repeated/", "bn/d_"))}
    assert {tag for tag in plots if plots[tag] != others[tag]} == validated
    for tag in validated:
        assert others[tag] == plots[tag][:-1]


def test_stop_in_the_last_iteration_lets_a_run_end(mnist_root: Path, tmp_path: Path) -> None:
    stop = interrupted("StopAfter", ITERATIONS)
    assert fit(tmp_path, f"--data.root={mnist_root}", *WITHOUT_VALIDATION, *stop) == 0
    assert last(tmp_path)["global_step"] == ITERATIONS


@pytest.mark.parametrize("iteration", [8, 10, *slow(3)])
def test_crash_after_a_validation_does_not_repeat_it(
    iteration: int, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    settings = (*DIGITS, *WITHIN_EPOCHS, "--checkpoint.every_n_iterations=1")
    assert fit(tmp_path, f"--data.root={mnist_root}", *settings, *interrupted("Crash", iteration)) == 1
    assert last(tmp_path)["global_step"] == iteration
    assert go_on(tmp_path, mnist_root, "--trainer.callbacks=null") == 0
    assert_ended_alike(whole(*settings), tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        ("--model.n_critic=3",),
        ("--model.d_norm=ghost", "--model.ghost_groups=2", "--model.ema_buffers=precise"),
        ("--model.d_dropout=0.3", "--model.ema_buffers=copy"),
        ("--model.d_norm=virtual", "--data.batch_size=64"),
        ("--model.d_norm=layer", "--model.r1=0.1", "--model.loss=wasserstein", "--model.ema_decay=0"),
        ("--model.network=conv", "--model.hidden_dim=4", "--model.batching=separate", "--model.update_d_stats_in_g_step=true"),
        ("--trainer.precision=bf16-mixed",),
    ],
    ids=lambda more: " ".join(setting.split(".")[1] for setting in more),
)
def test_every_kind_of_state_survives(
    more: tuple[str, ...], whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    stop_and_go_on(tmp_path, mnist_root, (*DIGITS, *more), iteration=8)
    assert_ended_alike(whole(*DIGITS, *more), tmp_path)


@pytest.mark.parametrize("iteration", [5, 12, *slow(4)])
def test_run_that_counts_iterations_alone(iteration: int, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path) -> None:
    settings = (*DIGITS, "--trainer.max_epochs=-1", "--trainer.max_steps=13")
    stop_and_go_on(tmp_path, mnist_root, settings, iteration)
    assert_ended_alike(whole(*settings), tmp_path, iterations=13)


@pytest.mark.parametrize(
    "lengths",
    [
        (("--trainer.max_epochs=-1", "--trainer.max_steps=8"), ("--trainer.max_steps=10",), ("--trainer.max_steps=20",)),
        pytest.param((("--trainer.max_epochs=1",), ("--trainer.max_epochs=4",)), marks=pytest.mark.slow),
        (("--trainer.max_epochs=2",), ("--trainer.max_epochs=-1", "--trainer.max_steps=20")),
    ],
    ids=["by iterations", "by epochs", "by epochs, then iterations"],
)
def test_run_that_ended_is_made_longer(
    lengths: tuple[tuple[str, ...], ...], whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    first, *longer = lengths
    assert fit(tmp_path, f"--data.root={mnist_root}", *DIGITS, *CONSTANT, *first) == 0
    for length in longer:
        assert go_on(tmp_path, mnist_root, *length) == 0
    assert_ended_alike(whole(*DIGITS, *CONSTANT), tmp_path)


def test_stopped_again_and_again(whole: Callable[..., Path], mnist_root: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, f"--data.root={mnist_root}", *DIGITS, *interrupted("StopAfter", 2)) == 143
    for iteration in (6, 10, 11, 15, 18):
        assert go_on(tmp_path, mnist_root, *interrupted("StopAfter", iteration, again=True)) == 143
    assert go_on(tmp_path, mnist_root, "--trainer.callbacks=null") == 0
    assert_ended_alike(whole(*DIGITS), tmp_path)


@pytest.mark.parametrize(("workers", "iteration"), [(0, 4), (2, 4), (2, 6), *slow((0, 2), (0, 6), (2, 2))])
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
    assert fit(tmp_path / "resumed", *settings, *interrupted("StopAfter", iteration)) == 143
    assert fit(tmp_path / "resumed", "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert_ended_alike(tmp_path / "whole", tmp_path / "resumed", iterations=12)


def test_comparison_would_notice_another_run(whole: Callable[..., Path], mnist_root: Path, tmp_path: Path) -> None:
    assert fit(tmp_path, f"--data.root={mnist_root}", *DIGITS, "--seed_everything=1") == 0
    with pytest.raises(AssertionError):
        assert_ended_alike(whole(*DIGITS), tmp_path)


def test_one_rank_goes_on_as_two_and_back(train: Command, mnist_root: Path, tmp_path: Path) -> None:
    exact = ("--trainer.precision=64-true", "--checkpoint.monitor=val/d_loss")
    common = (*DIGITS, *CONSTANT, *exact, f"--data.root={mnist_root}")
    folder = tmp_path / "changing"
    assert fit(tmp_path / "whole", *common) == 0
    assert fit(folder, *common, "--trainer.max_steps=7", "--trainer.devices=1") == 0
    two = ("--trainer.max_steps=13", "--trainer.devices=2", "--ckpt_path=last", f"--trainer.default_root_dir={folder}")
    done = train("fit", *common, *two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "over 2 x cpu" in done.stdout
    assert last(folder)["global_step"] == 13
    assert fit(folder, *common, "--trainer.max_steps=-1", "--trainer.devices=1", "--ckpt_path=last") == 0
    one, other = last(tmp_path / "whole"), last(folder)
    assert one["global_step"] == other["global_step"] == ITERATIONS
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=0, atol=1e-9)
    for mine, theirs in zip(one["optimizer_states"], other["optimizer_states"], strict=True):
        for number, moments in mine["state"].items():
            for name, value in moments.items():
                torch.testing.assert_close(theirs["state"][number][name], value, rtol=0, atol=1e-9)


def test_older_checkpoint_begins_a_run_of_its_own(whole: Callable[..., Path], mnist_root: Path, tmp_path: Path) -> None:
    settings = (*DIGITS, "--checkpoint.every_n_iterations=7", "--checkpoint.keep_all=true")
    parent = only_run(whole(*settings))
    before = {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()}
    older = parent / "checkpoints" / "iteration-000007.ckpt"
    assert fit(tmp_path, f"--data.root={mnist_root}", f"--ckpt_path={older}") == 0
    assert {path: path.read_bytes() for path in parent.rglob("*") if path.is_file()} == before
    record = json.loads((only_run(tmp_path) / "run.json").read_text())
    assert (Path(record["parent"]["folder"]), record["parent"]["iteration"]) == (parent, 7)
    one, other = last(whole(*settings)), last(tmp_path)
    assert_same(one["state_dict"], other["state_dict"])
    plots = series(parent)
    for tag, points in series(only_run(tmp_path)).items():
        assert points == [(step, value) for step, value in plots[tag] if step > 7], tag


def test_checkpoint_outside_a_run_takes_no_strangers_settings(
    whole: Callable[..., Path], mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies two folders above a checkpoint is its run's only where that is a run's folder."""
    alone = tmp_path / "a" / "checkpoints" / "last.ckpt"
    alone.parent.mkdir(parents=True)
    run = only_run(whole(*DIGITS))
    shutil.copy(run / "checkpoints" / "last.ckpt", alone)
    config = tmp_path / "a" / "config.yaml"
    config.write_text("trainer: {max_epochs: 7}\nmodel: {hidden_dim: 32}")
    again = (f"--data.root={mnist_root}", "--metrics.num_samples=0", f"--ckpt_path={alone}", "--trainer.max_steps=20")
    assert fit(tmp_path / "runs", *again) == 0
    assert f"{alone} lies in no folder of a run" in capsys.readouterr().out
    assert recorded(tmp_path / "runs")["trainer"]["max_epochs"] == 20
    shutil.copy(run / "run.json", tmp_path / "a")
    assert fit(tmp_path / "runs", *again, "--override") == 0
    assert "lies in no folder of a run" not in capsys.readouterr().out
    found = [yaml.safe_load(path.read_text())["trainer"]["max_epochs"] for path in tmp_path.glob("runs/*/*/config.yaml")]
    assert sorted(found) == [7, 20]


def test_checkpoint_at_the_root_of_the_disk_has_no_run() -> None:
    assert run_of(Path("/last.ckpt")) is None
    assert run_of(Path("/checkpoints/last.ckpt")) is None


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
        assert f"training cannot go on from {half}" in answer
        assert words in answer
        assert len(answer.strip().splitlines()) <= 2
    assert not list(tmp_path.glob("runs/*/*"))
    measuring = (
        "--trainer.limit_val_batches=1",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
    )
    assert main(["validate", *again[:2], "--metrics.num_samples=0", *measuring]) == 0
    assert main(["sample", str(half), f"--output={tmp_path / 'samples.png'}"]) == 0


# What decides the result of a run, and its value in a run that was begun with DIGITS.
FROZEN_SETTINGS = {
    "trainer.precision": ("bf16-mixed", "32-true"),
    "trainer.sync_batchnorm": ("false", "True"),
    "trainer.limit_train_batches": ("4", "5"),
    "trainer.limit_val_batches": ("2", "3"),
    "metrics.num_samples": ("201", "200"),
    "metrics.feature": ("inception", "auto"),
    "metrics.seed": ("1", "0"),
    "checkpoint.monitor": ("val/kid", "auto"),
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
    *("--trainer.callbacks=ModelSummary", "--trainer.profiler=simple", "--trainer.max_time=00:01:00:00"),
    # The same is no contradiction.
    *(
        "--trainer.precision=32-true",
        "--metrics.num_samples=200",
        "--trainer.limit_train_batches=5",
        "--model.loss=relativistic",
    ),
)


@pytest.mark.parametrize("name", FROZEN_SETTINGS)
def test_setting_that_decides_the_result_is_not_changed_unasked(
    name: str, whole: Callable[..., Path], mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, saved = FROZEN_SETTINGS[name]
    again = (f"--data.root={mnist_root}", f"--ckpt_path={only_run(whole(*DIGITS))}", f"--{name}={given}")
    assert fit(tmp_path, *again) == 2
    answer = capsys.readouterr().err
    assert f"--{name} " in answer
    assert f"which has {saved};" in answer
    assert "--override" in answer
    assert not list(tmp_path.iterdir())


def test_settings_that_decide_the_result_are_all_changed_on_request(
    whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    changed = {name: given for name, (given, _) in FROZEN_SETTINGS.items() if given != "inception"}  # would be downloaded
    flags = (*(f"--{name}={given}" for name, given in changed.items()), "--trainer.max_steps=21", "--trainer.max_epochs=5")
    again = (f"--data.root={mnist_root}", f"--ckpt_path={only_run(whole(*DIGITS))}")
    assert fit(tmp_path, *again, *flags, "--override") == 0
    settings = recorded(tmp_path)
    for name, given in changed.items():
        group, _, setting = name.partition(".")
        assert str(settings[group][setting]).lower() == given, name


def test_what_does_not_decide_the_result_is_changed_freely(
    whole: Callable[..., Path], mnist_root: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(only_run(whole(*DIGITS, *CONSTANT)), tmp_path / "mnist" / "copy")
    assert fit(tmp_path, f"--data.root={mnist_root}", f"--ckpt_path={run}", *FREE) == 0
    settings = recorded(tmp_path)
    for flag in FREE:
        name, _, value = flag.removeprefix("--").partition("=")
        found: Any = settings
        for part in name.split("."):
            found = found[part]
        assert str(found).lower() == value or name == "trainer.callbacks", name


def test_run_goes_on_in_its_folder_however_it_is_named(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = f"--data.root={mnist_root}"
    begun = (*DIGITS, *CONSTANT, "--metrics.num_samples=0", "--data.eval_batch_size=40")
    assert main(["fit", *begun, data, "--trainer.max_steps=2", "--name=foo"]) == 0
    (folder,) = Path("runs/foo").iterdir()
    for steps, which in enumerate((f"{folder}/checkpoints/last.ckpt", str(folder), "last"), start=3):
        name = ["--name=foo"] if which == "last" else []
        assert main(["fit", f"--ckpt_path={which}", *name, data, f"--trainer.max_steps={steps}"]) == 0
        assert last(Path("runs"))["global_step"] == steps
        assert recorded(Path("runs"))["data"]["eval_batch_size"] == 40
    record = json.loads((folder / "run.json").read_text())
    assert [start["iteration"] for start in record["starts"]] == [0, 2, 3, 4]


def test_job_that_may_be_started_again_names_its_run(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = (f"--data.root={mnist_root}", *DIGITS, *CONSTANT, "--ckpt_path=auto", "--run=4711")
    assert fit(tmp_path, *job, "--trainer.max_steps=2") == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert fit(tmp_path, *job, "--trainer.max_steps=4") == 0
    assert only_run(tmp_path).name == "4711"
    assert last(tmp_path)["global_step"] == 4
    capsys.readouterr()
    assert fit(tmp_path, f"--data.root={mnist_root}", *DIGITS, "--trainer.max_steps=4") == 2
    assert "--ckpt_path auto --run" in capsys.readouterr().err
    assert only_run(tmp_path).name == "4711"


def test_readme_names_what_a_run_does_not_change_unasked() -> None:
    told = (REPOSITORY / "README.md").read_text().partition("## Stop and go on")[2].partition("##")[0]
    for name in FROZEN:
        assert name.startswith("model.") or f"`{name}`" in told, name
    assert "all of `model`" in told
