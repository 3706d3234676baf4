"""The command line as a person uses it: subprocesses in a temporary folder."""

import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bngan.cli import main
from tests.conftest import QUICK, REPOSITORY, Command, only_run

SCALARS = ("d_loss", "g_loss", "d_pair_accuracy", "d_pair_prob", "d_grad_norm", "g_grad_norm", "d_lr", "g_lr", "instance_noise")
INTERVALS = (
    "--images.every_n_iterations=5",
    "--batchnorm.every_n_iterations=5",
    "--trainer.log_every_n_steps=5",
    "--trainer.val_check_interval=5",
    "--trainer.check_val_every_n_epoch=1",
)


class Run:
    """A finished run: its folder and what the command printed."""

    def __init__(self, folder: Path, output: str, errors: str) -> None:
        self.folder, self.output, self.errors = folder, output, errors
        self.best = folder / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def run(train: Command, mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    cwd = tmp_path_factory.mktemp("user")
    done = train("fit", *QUICK, *INTERVALS, f"--data.root={mnist_root}", "--model.d_lr=0.003", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return Run(only_run(cwd / "runs"), done.stdout, done.stderr)


@pytest.fixture(scope="module")
def events(run: Run) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.folder), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    return accumulator.Reload()


def test_run_lives_in_one_folder(run: Run) -> None:
    assert run.folder.parent.name == "mnist"
    files = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "run.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "samples/real.png"} <= files
    assert {f"samples/iteration-{n:06d}.png" for n in (0, 5, 10)} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)


def test_a_run_that_went_well_complains_of_nothing(run: Run) -> None:
    assert run.errors == ""


def test_run_records_how_it_was_made(run: Run) -> None:
    record = json.loads((run.folder / "run.json").read_text())
    assert record["id"] == run.folder.name
    assert record["parent"] is None
    (start,) = record["starts"]
    assert start["iteration"] == 0
    assert "--model.d_lr=0.003" in start["command"]
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert start["git"] is None or len(start["git"].removesuffix("+changes")) == 40
    settings = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert settings["model"]["d_lr"] == 0.003
    assert settings["model"]["g_lr"] == yaml.safe_load((REPOSITORY / "configs" / "default.yaml").read_text())["model"]["g_lr"]


def test_checkpoints_load_safely_and_count_iterations(run: Run) -> None:
    for name in ("last", "best"):
        content = torch.load(run.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert content["global_step"] == int(content["state_dict"]["iteration"])
    last = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 10


def test_pictures_change_as_training_goes_on(run: Run) -> None:
    first, last = (np.asarray(Image.open(run.folder / "samples" / f"iteration-{n:06d}.png")) for n in (0, 10))
    assert first.shape == last.shape
    assert (first != last).mean() > 0.1
    real = np.asarray(Image.open(run.folder / "samples" / "real.png"))
    assert real.min() == 0
    assert real.max() == 255


def test_output_off_a_terminal_is_plain_lines(run: Run) -> None:
    assert "\x1b" not in run.output
    assert "\r" not in run.output
    assert run.output.count("iteration 10/10") == 1
    assert "images/s" in run.output
    assert " 0 images/s" not in run.output
    assert "batch 128" in run.output
    assert str(run.folder.name) in run.output


def test_tensorboard_scalars_share_the_iteration_axis(events: EventAccumulator) -> None:
    tags = set(events.Tags()["scalars"])
    expected = {f"train/{name}" for name in SCALARS}
    expected |= {"val/fid", "val/modes_covered", "val/class_kl", "val/d_loss"}
    assert expected <= tags
    for tag in expected:
        assert [event.step for event in events.Scalars(tag)] == [5, 10], tag


def test_tensorboard_shows_every_batch_norm_layer(events: EventAccumulator) -> None:
    scalars, histograms = set(events.Tags()["scalars"]), set(events.Tags()["histograms"])
    for layer in ("generator.net.1", "generator.net.4", "discriminator.net.1", "discriminator.net.4"):
        for quantity in ("running_mean", "running_var", "gamma", "beta"):
            assert {f"bn/{layer}/{quantity}/{statistic}" for statistic in ("min", "mean", "max")} <= scalars
            assert f"bn/{layer}/{quantity}" in histograms
            low, mean, high = (events.Scalars(f"bn/{layer}/{quantity}/{s}")[-1].value for s in ("min", "mean", "max"))
            assert low <= mean <= high
        divergences = [event.value for event in events.Scalars(f"bn/{layer}/kl_to_running")]
        assert len(divergences) == 2
        assert min(divergences) > 0


def test_tensorboard_shows_pictures(events: EventAccumulator) -> None:
    assert [event.step for event in events.Images("samples/fixed_z")] == [0, 5, 10]
    assert [event.step for event in events.Images("samples/interpolation")] == [0, 5, 10]
    assert [event.step for event in events.Images("samples/real")] == [0]


def test_tensorboard_knows_settings_and_layout(events: EventAccumulator) -> None:
    tags = events.summary_metadata
    assert "_hparams_/session_start_info" in tags
    assert b"val/fid" in tags["_hparams_/experiment"].plugin_data.content
    assert b"d_lr" in tags["_hparams_/session_start_info"].plugin_data.content
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"train/d_loss" in layout
    assert b"train/g_loss" in layout


def test_progress_bar_on_a_terminal(mnist_root: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    arguments = ("fit", "--trainer.max_steps=150", "--metrics.num_samples=0", f"--data.root={mnist_root}")
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "scripts" / "train.py"), *arguments],
        cwd=tmp_path,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "COLUMNS": "160", "TERM": "xterm"},
    )
    os.close(terminal)
    shown = b"".join(_read(controller))
    assert process.wait(timeout=60) == 0, shown
    assert b"150/150" in shown
    assert b"images/s" in shown
    assert b"left" in shown
    assert b"\x1b[" in shown


def _read(descriptor: int) -> Iterator[bytes]:
    while True:
        try:
            yield os.read(descriptor, 65536)
        except OSError:  # how a pseudo-terminal says that nobody writes to it any more
            return


def test_recorded_settings_can_be_used_again(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", f"--config={run.folder / 'config.yaml'}", "--print_config"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    recorded = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert again["model"] == recorded["model"]
    assert again["trainer"]["max_steps"] == 10


def test_sample_writes_what_the_path_says(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no data set
    for output in ("grid.png", "images.npz", "folder"):
        assert main(["sample", str(run.best), "--num=10", "--seed=3", f"--output={output}"]) == 0
    images = np.load("images.npz")["images"]
    assert images.dtype == np.uint8
    assert images.shape == (10, 1, 28, 28)
    pictures = sorted(Path("folder").iterdir())
    assert len(pictures) == 10
    for number, path in enumerate(pictures):
        assert np.array_equal(np.asarray(Image.open(path)), images[number, 0])
    width, height = Image.open("grid.png").size
    assert width > 3 * 28
    assert height > 3 * 28
    assert not Path("data").exists()


def test_samples_depend_on_their_number_and_the_seed_alone(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def drawn(name: str, *arguments: str) -> np.ndarray:
        assert main(["sample", str(run.best), f"--output={name}.npz", *arguments]) == 0
        return np.load(f"{name}.npz")["images"]

    few, many = drawn("few", "--num=70", "--seed=3"), drawn("many", "--num=200", "--seed=3")
    # One grey level of room: matrix products of other sizes may round otherwise.
    assert np.abs(few.astype(int) - many[:70].astype(int)).max() <= 1
    other = drawn("other", "--num=70", "--seed=4")
    assert np.abs(few.astype(int) - other.astype(int)).max() > 10


def test_validate_and_test_measure_a_checkpoint(
    run: Run, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = (f"--ckpt_path={run.best}", f"--data.root={mnist_root}", "--metrics.num_samples=500")
    assert main(["validate", *common]) == 0
    output = capsys.readouterr().out
    assert "ema, precise" in output
    assert "bn_gap" in output
    assert main(["test", *common, "--trainer.default_root_dir=tested"]) == 0
    output = capsys.readouterr().out
    assert "floor" in output
    report = json.loads((only_run(tmp_path / "tested") / "test.json").read_text())
    assert len(report["fid"]["values"]) == 5
    assert len(set(report["fid"]["values"])) == 5
    assert report["fid"]["mean"] > report["fid"]["floor"] > 0


def test_run_keeps_what_it_measured_last(run: Run) -> None:
    report = json.loads((run.folder / "quality.json").read_text())
    checkpoint = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert report["iteration"] == checkpoint["global_step"] > 0
    assert report["num_samples"] == 200
    assert 0 < report["floor"]["fid"] < report["value"]["fid"]
    assert report["validation_seconds"] > 0


def test_predict_writes_pictures(run: Run, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = (f"--ckpt_path={run.best}", f"--data.root={mnist_root}", "--data.predict_samples=7")
    assert main(["predict", *arguments]) == 0
    assert len(list((only_run(tmp_path / "runs") / "samples").glob("*.png"))) == 7


def test_checkpoint_brings_the_settings_of_its_data(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = f"--data.root={mnist_root}"
    assert main(["fit", *QUICK, data, "--data.batch_size=32", "--model.eval_statistics=batch", "--model.ema_decay=0"]) == 0
    last = only_run(tmp_path / "runs") / "checkpoints" / "last.ckpt"
    assert main(["fit", *QUICK, data, f"--ckpt_path={last}", "--data.batch_size=64"]) == 2
    assert "--data.batch_size 64 contradicts" in capsys.readouterr().err

    # Samples are normalized in batches of training's size, whatever the data are now.
    assert main(["sample", str(last), "--num=40", "--output=drawn"]) == 0
    assert main(["sample", str(last), "--num=40", "--output=running", "--statistics=running"]) == 0
    assert main(["predict", f"--ckpt_path={last}", data, "--data.predict_samples=40", "--trainer.default_root_dir=own"]) == 0
    wider = ("--data.predict_samples=40", "--data.batch_size=128", "--trainer.default_root_dir=wider")
    assert main(["predict", f"--ckpt_path={last}", data, *wider]) == 0

    def pixels(folder: Path) -> np.ndarray:
        return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])

    drawn = pixels(tmp_path / "drawn")
    assert len(drawn) == 40
    assert np.abs(drawn - pixels(only_run(tmp_path / "own") / "samples")).max() <= 1
    assert np.abs(drawn - pixels(only_run(tmp_path / "wider") / "samples")).max() <= 1
    assert np.abs(drawn - pixels(tmp_path / "running")).max() > 1


def test_measuring_leaves_training_as_it_is(mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def weights(*settings: str) -> dict[str, torch.Tensor]:
        arguments = (f"--data.root={mnist_root}", "--model.d_dropout=0.5", f"--trainer.default_root_dir={settings[0][-3:]}")
        validation = ("--trainer.val_check_interval=4", "--trainer.check_val_every_n_epoch=1")
        assert main(["fit", *QUICK, *arguments, *validation, *settings]) == 0
        last = only_run(tmp_path / settings[0][-3:]) / "checkpoints" / "last.ckpt"
        return torch.load(last, weights_only=True)["state_dict"]

    measured, not_measured = weights("--metrics.num_samples=200"), weights("--metrics.num_samples=0")
    assert all(torch.equal(measured[name], not_measured[name]) for name in measured)
    other = weights("--metrics.num_samples=201", "--seed_everything=1")
    assert not torch.equal(measured["generator.net.0.weight"], other["generator.net.0.weight"])


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_plot_and_measure_what_one_process_does(
    devices: int, train: Command, mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every scalar of TensorBoard, with numbers of held-out images and of samples that ranks cannot share equally."""
    measuring = ("--metrics.num_samples=203", "--metrics.chunk=70", "--data.eval_batch_size=333")
    common = ("fit", *QUICK, *INTERVALS, *measuring, "--trainer.precision=64-true", f"--data.root={mnist_root}")

    def scalars(root: Path) -> dict[str, list[tuple[int, float]]]:
        folder = only_run(root)
        content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert int(content["state_dict"]["iteration"]) == 10
        assert int(content["state_dict"]["normalized_together"]) == 128
        assert json.loads((folder / "quality.json").read_text())["value"]["fid"] > 1
        plots = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        return {tag: [(point.step, point.value) for point in plots.Scalars(tag)] for tag in plots.Tags()["scalars"]}

    said = "all devices' images together"
    assert main([*common, "--trainer.devices=1", f"--trainer.default_root_dir={tmp_path / 'alone'}"]) == 0
    assert said not in capsys.readouterr().out
    done = train(*common, f"--trainer.devices={devices}", "--trainer.default_root_dir=together", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert f"over {devices} x cpu" in done.stdout
    alone, together = scalars(tmp_path / "alone"), scalars(tmp_path / "together")
    expected = {"val/d_loss", "val/fid", "bn/d_batch_dependence", "bn/discriminator.net.1/kl_to_running", "train/d_grad_norm"}
    assert expected <= alone.keys() == together.keys()
    for tag, points in alone.items():
        assert [step for step, _ in together[tag]] == [step for step, _ in points]
        values = [value for _, value in points]
        assert [value for _, value in together[tag]] == pytest.approx(values, rel=1e-6, abs=1e-6), tag


def test_pictures_of_ones_own_train_on_the_first_try(train: Command, tmp_path: Path) -> None:
    for number in range(40):
        pixels = np.random.default_rng(number).integers(0, 256, (40 + number % 3, 50, 3), dtype=np.uint8)
        (folder := tmp_path / "pictures" / ("cat", "dog")[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    arguments = ("--data.name=folder", "--data.folder=pictures", "--data.image_size=32", "--model.network=conv")
    small = ("--model.hidden_dim=8", "--data.batch_size=16", "--trainer.max_steps=4", "--name=mine", "--trainer.max_epochs=-1")
    done = train("fit", *arguments, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 classes: 20 cat, 20 dog" in done.stdout
    told = "with --model.classes 2 they are, and each can be asked for"
    assert told in done.stdout
    folder = only_run(tmp_path / "runs")
    assert folder.parent.name == "mine"
    assert Image.open(folder / "samples" / "iteration-000004.png").mode == "RGB"
    done = train("fit", *arguments, *small, "--model.classes=2", "--run=told", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert told not in done.stdout


def test_fast_dev_run_tries_everything_and_writes_nothing(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", f"--data.root={mnist_root}", "--metrics.num_samples=200", "--trainer.fast_dev_run=true"]) == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_run_without_a_logger_keeps_its_folder(mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", f"--data.root={mnist_root}", *QUICK, "--trainer.logger=false"]) == 0
    folder = only_run(tmp_path / "runs")
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert (folder / "samples" / "iteration-000010.png").exists()
    assert (folder / "config.yaml").exists()
    assert not list(folder.glob("events*"))


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wild = ("--model.loss=wasserstein", "--model.d_norm=none", "--model.d_lr=1e38", "--checkpoint.every_n_iterations=1")
    assert main(["fit", f"--data.root={mnist_root}", "--metrics.num_samples=0", "--trainer.max_steps=50", *wild]) == 2
    answer = capsys.readouterr().err
    assert "iteration" in answer
    assert "nan" in answer or "inf" in answer
    assert "Traceback" not in answer
    for path in tmp_path.rglob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"].values()
        assert all(bool(value.isfinite().all()) for value in weights)


@pytest.mark.full
def test_bare_command_reaches_its_promise(train: Command, tmp_path: Path) -> None:
    start = time.monotonic()
    done = train("fit", cwd=tmp_path, timeout=1200)
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    values = EventAccumulator(str(only_run(tmp_path / "runs"))).Reload()
    assert values.Scalars("val/modes_covered")[-1].value == 10
    assert values.Scalars("val/class_kl")[-1].value < 0.05
    assert values.Scalars("val/fid")[-1].value < 6
    # The promise of 4 minutes is for 2 cores at rest, which a machine shared with other jobs does not have.
    if not os.environ.get("CI"):
        assert seconds < 240
