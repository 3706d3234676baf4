"""Settings in layers, and a run that goes on: in its folder, with its settings, and with what is given now."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bngan.cli import main
from bngan.lightning_cli import FROZEN, MACHINE, is_same
from bngan.recipes import DEFAULT_CONFIG, flatten
from tests.conftest import REPOSITORY

SMALL = ("--model.hidden_dim=4", "--metrics.num_samples=0", "--trainer.accelerator=cpu", "--trainer.limit_val_batches=0")
CONSTANT = ("--model.lr_decay_start=1", "--model.instance_noise=0")  # so that nothing jumps where a run becomes longer
ITERATIONS = 4


@pytest.fixture(scope="module")
def made(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of 4 iterations, runs/mnist/first, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    kept = ("--checkpoint.every_n_iterations=2", "--checkpoint.keep_all=true", "--trainer.log_every_n_steps=1")
    where = ("--run=first", f"--trainer.default_root_dir={folder / 'runs'}", f"--data.root={mnist_root}")
    assert main(["fit", *SMALL, *CONSTANT, *kept, *where, f"--trainer.max_steps={ITERATIONS}", "--model.d_lr=0.003"]) == 0
    return folder


@pytest.fixture
def run(made: Path, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run, below the folder where one stands, beside the data."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNGAN_TRACEBACK", raising=False)
    Path("data").symlink_to(mnist_root)
    return Path("runs/mnist/first")


def go_on(*arguments: str, iterations: int = 6) -> int:
    return main(["fit", "--trainer.accelerator=cpu", f"--trainer.max_steps={iterations}", *arguments])


def last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def iteration_of(folder: Path) -> int:
    return int(last(folder)["state_dict"]["iteration"])


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def others(run: Path) -> list[Path]:
    return [folder for folder in run.parent.iterdir() if folder != run]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return the settings that a command would have, by full name."""
    capsys.readouterr()
    assert main([*arguments, "--print_config"]) == 0
    return flatten(yaml.safe_load(capsys.readouterr().out))


# Layers -----------------------------------------------------------------------------------------------------------------


def test_settings_are_layered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("model: {g_lr: 0.5, d_lr: 0.25, beta1: 0.75}")
    Path("two.yaml").write_text("model: {d_lr: 0.0625}")
    settings = printed(capsys, "fit", "--model.beta1=0.125", "-c", "one.yaml", "--config=two.yaml")
    default = flatten(yaml.safe_load(DEFAULT_CONFIG.read_text()))
    changed = {name: value for name, value in settings.items() if default.get(name, {}) != value}
    assert changed == {"model.g_lr": 0.5, "model.d_lr": 0.0625, "model.beta1": 0.125}


def test_setting_without_effect_is_refused_where_it_is_typed_and_told_of_in_a_file(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text("model: {d_norm: layer, batching: separate, ema_decay: 0.5}")
    small = (*SMALL, "--config=mine.yaml", "--run=mine")
    assert go_on(*small, "--model.bn_eps=1e-3", "--model.g_norm=layer", iterations=1) == 2
    assert "--model.bn_eps 0.001 has no effect where g_norm and d_norm are none of batch" in capsys.readouterr().err
    assert go_on(*small, "--model.bn_eps=1e-3", iterations=1) == 0
    said = "model.batching separate has no effect where d_norm is none of batch, ghost, noisy, reference\n"
    assert said in capsys.readouterr().out
    assert main(["fit", "--ckpt_path=last"]) == 0
    assert "has no effect" not in capsys.readouterr().out
    assert main(["fit", "--override"]) == 2
    assert "add --ckpt_path" in capsys.readouterr().err
    assert main(["validate", "--ckpt_path=last", "--images.num_samples=7"]) == 2
    assert "--images.num_samples has no effect on validate; leave it out" in capsys.readouterr().err


def test_shipped_recipes_are_layers_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    settings = printed(capsys, "fit", "--config", "dcgan", "--config", "literal")
    assert (settings["model.network"], settings["model.batching"], settings["name"]) == ("conv", "separate", "literal")


# Paths -------------------------------------------------------------------------------------------------------------------


def test_home_is_written_out_in_every_path_that_is_typed_or_in_a_file(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "digits").symlink_to(mnist_root)
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: ~/logs}}"
    (home / "mine.yaml").write_text(f"data: {{root: ~/digits}}\ntrainer: {{default_root_dir: ~/runs, logger: {logger}}}\n")
    assert go_on(*SMALL, *CONSTANT, "--config=~/mine.yaml", "--run=a", "--trainer.log_every_n_steps=1", iterations=1) == 0
    run = home / "runs" / "mnist" / "a"
    recorded = flatten(yaml.safe_load((run / "config.yaml").read_text()))
    assert (recorded["data.root"], recorded["trainer.default_root_dir"]) == (str(home / "digits"), str(home / "runs"))
    assert recorded["trainer.logger"]["init_args"]["save_dir"] == str(home / "logs")
    assert [path.name for path in (home / "logs").rglob("metrics.csv")] == ["metrics.csv"]
    typed = ("--data.root", "~/digits", "--trainer.default_root_dir=~/runs")
    assert go_on("--ckpt_path=~/runs/mnist/a", *typed, iterations=2) == 0
    assert go_on("--ckpt_path=~/runs/*/a", *typed, iterations=3) == 0
    assert iteration_of(run) == 3
    assert main(["sample", "~/runs/mnist/a", "--num=1", "--output=~/a.png"]) == 0
    assert (home / "a.png").is_file()
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("setting", ["data.root", "data.folder", "trainer.default_root_dir", "config", "ckpt_path"])
@pytest.mark.parametrize("path", ["~nobody9/x", "", "a\0b"])
def test_what_can_be_no_path_is_refused(
    setting: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", f"--{setting}={path}"]) == 2
    answer = capsys.readouterr().err
    assert any(words in answer for words in ("there is no user ~nobody9; write ./~nobody9/x", "is no path", "no such file"))
    assert list(tmp_path.iterdir()) == []


# Going on ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["runs/mnist/first", "runs/mnist/first/checkpoints/last.ckpt", "last"])
def test_run_goes_on_in_its_folder(asked: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go_on(f"--ckpt_path={asked}") == 0
    told = capsys.readouterr().out
    assert f"Goes on from {run}/checkpoints/last.ckpt, iteration 4" in told
    assert "--trainer.max_steps is 6, and was 4 in the run" in told
    assert told.count(" in the run") == 1
    assert others(run) == []
    assert iteration_of(run) == 6
    assert [start["iteration"] for start in record(run)["starts"]] == [0, 4]
    assert record(run)["parent"] is None
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 6


def test_start_that_is_cut_off_while_it_writes_the_settings_leaves_those_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "config.yaml").read_text()

    def cut_off(descriptor: int) -> None:
        os.ftruncate(descriptor, 40)
        raise KeyError("cut off")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", cut_off)
        assert go_on("--ckpt_path=auto", "--run=first") == 1
    assert (run / "config.yaml").read_text() == before
    assert go_on("--ckpt_path=auto", "--run=first") == 0
    assert iteration_of(run) == 6
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 6
    assert not list(run.glob(".config*"))


def test_auto_goes_on_with_the_run_that_is_named_or_begins_it(run: Path) -> None:
    assert go_on("--ckpt_path=auto", "--run=first") == 0
    assert iteration_of(run) == 6
    assert go_on("--ckpt_path=auto", "--run=second", *SMALL, iterations=2) == 0
    (second,) = others(run)
    assert second.name == "second"
    assert (iteration_of(second), record(second)["parent"]) == (2, None)
    assert last(second)["hyper_parameters"]["d_lr"] == 0.002
    assert last(run)["hyper_parameters"]["d_lr"] == 0.003


def test_plots_have_neither_gaps_nor_repeats_where_iterations_are_done_again(run: Path) -> None:
    for name in ("last", "iteration-000004"):  # as if it had been killed after iteration 4, before these were written
        (run / "checkpoints" / f"{name}.ckpt").unlink()
    assert go_on("--ckpt_path=last") == 0
    plots = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in plots.Scalars("train/d_loss")] == [1, 2, 3, 4, 5, 6]


def test_run_without_a_checkpoint_begins_anew_in_its_folder(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    arguments = (*SMALL, "--trainer.log_every_n_steps=1", "--run=first")
    assert go_on(*arguments, iterations=3) == 2
    assert go_on(*arguments, "--ckpt_path=auto", iterations=3) == 0
    plots = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in plots.Scalars("train/d_loss")] == [1, 2, 3]
    assert [start["iteration"] for start in record(run)["starts"]] == [0, 0]


def test_older_checkpoint_begins_a_run_that_names_its_parent(run: Path) -> None:
    assert go_on(f"--ckpt_path={run}/checkpoints/iteration-000002.ckpt", iterations=3) == 0
    (branch,) = others(run)
    assert iteration_of(branch) == 3
    assert iteration_of(run) == 4
    assert record(branch)["parent"] == {"folder": str(run), "iteration": 2}
    assert last(branch)["hyper_parameters"]["d_lr"] == 0.003


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (("--run=branch",), "runs/mnist/branch"),
        (("--name=other", "--run=branch"), "runs/other/branch"),
        (("--name=other",), "runs/other/*"),
        (("--trainer.default_root_dir=elsewhere",), "elsewhere/mnist/*"),
    ],
)
def test_new_run_may_be_named_or_put_elsewhere(given: tuple[str, ...], folder: str, run: Path) -> None:
    assert go_on(f"--ckpt_path={run}", *given) == 0
    (begun,) = Path().glob(folder)
    assert iteration_of(begun) == 6
    assert iteration_of(run) == 4


def test_run_is_gone_on_with_where_its_own_place_is_given(run: Path) -> None:
    assert go_on(f"--ckpt_path={run}", "--name=mnist", f"--trainer.default_root_dir={Path('runs').absolute()}") == 0
    assert (others(run), iteration_of(run)) == ([], 6)


def test_what_jumps_in_a_longer_run_is_said_and_asked_for(
    mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(*arguments: str) -> int:
        capsys.readouterr()
        return main(["fit", f"--data.root={mnist_root}", f"--trainer.default_root_dir={tmp_path}", *SMALL, *arguments])

    assert fit("--trainer.max_steps=4", "--run=a") == 0
    run = tmp_path / "mnist" / "a"
    records = [run / "config.yaml", run / "run.json", run / "checkpoints" / "last.ckpt"]
    before = [path.read_bytes() for path in records]
    last = f"--ckpt_path={run}"
    jump = "d_lr from 0 to 0.00133, g_lr from 0 to 0.00133, instance_noise from 0 to 0.333, because the run's 4 iterations"
    assert fit(last, "--trainer.max_steps=6") == 2
    answer = capsys.readouterr().err
    assert f"{jump} became 6" in answer
    assert "add --override" in answer
    assert [path.read_bytes() for path in records] == before
    assert fit(last, "--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:01") == 2
    assert "became endless" in capsys.readouterr().err
    for no_jump in ("--trainer.max_steps=4", "--trainer.max_epochs=30", "--trainer.max_steps=3"):
        assert fit(last, no_jump) == 0
        assert "because" not in capsys.readouterr().out
    assert fit(last, "--trainer.max_steps=6", "--override", "--run=b") == 0
    assert f"{jump} became 6" in capsys.readouterr().out
    assert iteration_of(tmp_path / "mnist" / "b") == 6


def test_checkpoint_outside_a_run_brings_its_networks_and_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run / "checkpoints" / "last.ckpt", "lone.ckpt")
    settings = printed(capsys, "fit", "--ckpt_path=lone.ckpt")
    assert (settings["model.hidden_dim"], settings["model.d_lr"]) == (4, 0.003)
    assert settings["metrics.num_samples"] == 10_000
    assert main(["fit", "--ckpt_path=lone.ckpt", "--data.batch_size=64", *SMALL[1:]]) == 2
    assert "--data.batch_size 64 contradicts the run of lone.ckpt, which has 128" in capsys.readouterr().err
    assert go_on("--ckpt_path=lone.ckpt", *SMALL[1:]) == 0
    assert "lies in no folder of a run" in capsys.readouterr().out
    (begun,) = others(run)
    assert record(begun)["parent"] == {"folder": ".", "iteration": 4}


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_checkpoint_of_the_version_before_is_gone_on_from(
    network: str, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = REPOSITORY / "tests" / "golden" / f"0.1-{network}.ckpt"
    before = torch.load(old, weights_only=True)
    arguments = (f"--ckpt_path={old}", f"--data.root={mnist_root}", *SMALL[1:])
    assert main(["fit", *arguments, "--trainer.max_steps=22"]) == 0
    (begun,) = Path("runs/mnist").iterdir()
    content = last(begun)
    assert int(content["state_dict"]["iteration"]) == content["global_step"] == 22
    steps = [state["state"][0]["step"] for state in content["optimizer_states"]]
    assert steps == [state["state"][0]["step"] + 2 for state in before["optimizer_states"]]


def test_nothing_left_to_do_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go_on("--ckpt_path=last", iterations=4) == 0
    assert "Nothing was left to do" in capsys.readouterr().out
    assert go_on("--ckpt_path=last", iterations=5) == 0
    assert "Nothing was left to do" not in capsys.readouterr().out


# The run's settings -----------------------------------------------------------------------------------------------------


def test_frozen_settings_and_the_machines_are_settings() -> None:
    settings = flatten(yaml.safe_load(DEFAULT_CONFIG.read_text())).keys() | {"model.image_shape", "model.seed"}
    assert settings >= FROZEN
    assert settings >= MACHINE
    assert not FROZEN & MACHINE
    assert {"model.g_lr", "data.batch_size", "seed_everything"} <= FROZEN
    assert not FROZEN & {"model.cuda_graph", "model.tf32", "trainer.max_steps", "images.num_samples", "name"}


def test_all_settings_of_a_run_are_kept_but_those_of_the_machine(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = flatten(yaml.safe_load((run / "config.yaml").read_text()))
    kept, default = printed(capsys, "fit", "--ckpt_path=last"), flatten(yaml.safe_load(DEFAULT_CONFIG.read_text()))
    for name, value in recorded.items():
        assert kept[name] == (default[name] if name in MACHINE else value), name
    assert kept["trainer.default_root_dir"] is None
    assert kept["model.d_lr"] == 0.003


def test_settings_that_decide_the_result_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.yaml").write_text("model: {d_lr: 0.5}")
    for given, name, saved in (
        (("--model.d_lr=0.5",), "--model.d_lr", "0.003"),
        (("--config=other.yaml",), "--model.d_lr", "0.003"),
        (("-cother.yaml",), "--model.d_lr", "0.003"),
        (("--seed_everything=7",), "--seed_everything", "0"),
        (("--data.batch_size=64",), "--data.batch_size", "128"),
        (("--trainer.precision=64-true",), "--trainer.precision", "32-true"),
        (("--metrics.seed=1",), "--metrics.seed", "0"),
        (("--checkpoint.mode=max",), "--checkpoint.mode", "min"),
    ):
        assert go_on("--ckpt_path=last", *given) == 2
        answer = capsys.readouterr().err
        assert f"{name} " in answer
        assert f"which has {saved};" in answer
        assert "--override" in answer
    assert iteration_of(run) == 4
    assert go_on("--ckpt_path=last", "--model.d_lr=0.003", "--model.tf32=false", "--images.num_samples=9") == 0
    told = capsys.readouterr().out
    for line in ("--model.tf32 is False, and was True", "--images.num_samples is 9, and was 64"):
        assert line in told
    assert iteration_of(run) == 6


def test_settings_that_decide_the_result_may_differ_in_another_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go_on("--ckpt_path=last", "--override", "--model.hidden_dim=8") == 2
    assert "networks cannot be changed by --override" in capsys.readouterr().err
    assert go_on("--ckpt_path=last", "--override", "--model.beta2=0.5", "--model.d_lr=0.5", "--data.batch_size=64") == 0
    (begun,) = others(run)
    content, before = last(begun), last(run)
    assert content["datamodule_hyper_parameters"]["batch_size"] == 64
    groups = [optimizer["param_groups"][0] for optimizer in content["optimizer_states"]]
    assert [group["betas"][1] for group in groups] == [0.5, 0.5]
    saved, now = before["hyper_parameters"], content["hyper_parameters"]
    assert {name for name in saved if saved[name] != now[name]} == {"beta2", "d_lr"}
    assert record(begun)["parent"] == {"folder": str(run), "iteration": 4}


def test_callbacks_of_others_must_be_given_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": "tests.integration.interruptions.Crash", "init_args": {"iteration": 99}}]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert go_on("--ckpt_path=last") == 2
    answer = capsys.readouterr().err
    assert "code of its own" in answer
    assert "--trainer.callbacks" in answer
    assert go_on("--ckpt_path=last", "--trainer.callbacks=null", iterations=5) == 0
    again = ("--trainer.callbacks+=tests.integration.interruptions.Crash", "--trainer.callbacks.iteration=99")
    assert go_on("--ckpt_path=last", *again) == 0
    assert iteration_of(run) == 6


# Measuring --------------------------------------------------------------------------------------------------------------


def test_measuring_takes_networks_and_data_from_the_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("validate", "--trainer.accelerator=cpu", "--metrics.num_samples=0", "--trainer.limit_val_batches=1")
    assert main([*common, f"--ckpt_path={run}", "--name=measured", "--data.batch_size=64"]) == 0
    assert "val/d_loss" in capsys.readouterr().out
    (measured,) = Path("runs/measured").iterdir()
    settings = yaml.safe_load((measured / "config.yaml").read_text())
    assert (settings["model"]["hidden_dim"], settings["data"]["batch_size"]) == (4, 64)
    assert record(measured)["parent"] == {"folder": str(run), "iteration": 4}
    assert main([*common, f"--ckpt_path={run}", "--model.d_lr=0.5"]) == 2
    assert main([*common, f"--ckpt_path={run}", "--data.image_size=16"]) == 2
    assert "images of shape (1, 28, 28), but the data has (1, 16, 16)" in capsys.readouterr().err
    assert main([*common, f"--ckpt_path={run}", "--model.eval_statistics=batch", "--override"]) == 0


def test_a_limit_of_one_batch_is_not_the_same_as_of_all() -> None:
    assert not is_same("trainer.limit_train_batches", 1, 1.0)
    assert is_same("trainer.limit_train_batches", 1.0, 1.0)
    assert is_same("model.r1", 1, 1.0)
    assert not is_same("model.r1", 1.0, 2.0)
