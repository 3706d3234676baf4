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
ITERATIONS = 4


@pytest.fixture(scope="module")
def made(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of 4 iterations, runs/mnist/first, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("made")
    kept = ("--checkpoint.every_n_iterations=2", "--checkpoint.keep_all=true", "--trainer.log_every_n_steps=1")
    where = ("--run=first", f"--trainer.default_root_dir={folder / 'runs'}", f"--data.root={mnist_root}")
    assert main(["fit", *SMALL, *kept, *where, f"--trainer.max_steps={ITERATIONS}", "--model.d_lr=0.003"]) == 0
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


def test_shipped_recipes_are_layers_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    settings = printed(capsys, "fit", "--config", "dcgan", "--config", "literal")
    assert (settings["model.network"], settings["model.batching"], settings["name"]) == ("conv", "separate", "literal")


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


def test_new_run_may_be_named(run: Path) -> None:
    assert go_on("--ckpt_path=last", "--run=branch") == 0
    assert iteration_of(run.parent / "branch") == 6
    assert iteration_of(run) == 4


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
