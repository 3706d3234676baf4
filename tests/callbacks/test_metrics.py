"""Samples measured in training, by validate and by test, beside their floor and controls."""

import importlib
import io
import json
import math
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from bngan import GAN
from bngan.callbacks import BatchNormStatistics, MeasureSamples
from bngan.callbacks.monitor import measured as measured_by
from bngan.cli import main
from bngan.data import ImageDataModule
from bngan.errors import UsageError
from bngan.images import to_minus1_1, to_uint8
from bngan.metrics.digit_net import load_digit_net
from bngan.sampler import Sampler
from tests.conftest import only_run
from tests.pictures import COLOUR, GREY, module_of, picture
from tests.test_gan import tiny, trainer

FEW = ("--metrics.num_samples=200", "--trainer.accelerator=cpu")
PAIRWISE = ("fid", "kid", "kid_se", "precision", "recall", "density", "coverage")
METRICS = (*PAIRWISE, "modes_covered", "modes_seen", "class_kl", "confidence")
REFERENCES = ("floor", "dropped", "blurred", "repeated")


class Trained(NamedTuple):
    """A short run: its folder and its last checkpoint."""

    folder: Path
    checkpoint: Path


def said(*arguments: str) -> str:
    """Run a command that must succeed, and return what it printed."""
    with redirect_stdout(io.StringIO()) as output:
        assert main(list(arguments)) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def trained(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    validated = ("--trainer.max_steps=10", "--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=1")
    said("fit", *FEW, *validated, f"--data.root={mnist_root}", f"--trainer.default_root_dir={root}")
    return Trained(only_run(root), only_run(root) / "checkpoints" / "last.ckpt")


@pytest.fixture
def own_root(mnist_root: Path, tmp_path: Path) -> Path:
    """A folder that holds MNIST, and no floors yet."""
    root = tmp_path / "own"
    root.mkdir()
    (root / "MNIST").symlink_to(mnist_root / "MNIST")
    return root


def measured(command: str, trained: Trained, root: Path, folder: Path, *settings: str) -> tuple[dict[str, Any], str]:
    """Measure the checkpoint; return the report that was written and what was printed."""
    common = (f"--ckpt_path={trained.checkpoint}", f"--data.root={root}", f"--trainer.default_root_dir={folder}")
    output = said(command, *FEW, *common, *settings)
    return json.loads((only_run(folder) / f"{command}.json").read_text()), output


# Through the command line ---------------------------------------------------------------------------------------------


def test_training_logs_the_samples_beside_their_floor_and_controls(trained: Trained) -> None:
    events = EventAccumulator(str(trained.folder)).Reload()
    for metric in METRICS:
        for kind in ("val", *REFERENCES):
            logged = events.Scalars(f"{kind}/{metric}")
            assert [event.step for event in logged] == [5, 10]
            assert kind == "val" or logged[0].value == logged[1].value
    last = {kind: events.Scalars(f"{kind}/fid")[-1].value for kind in ("val", *REFERENCES)}
    assert last["val"] > 10 * last["floor"], "samples after 10 iterations are not digits"
    assert min(last["dropped"], last["blurred"], last["repeated"]) > last["floor"] > 0


def test_validate_compares_the_statistics_that_samples_are_drawn_with(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    report, output = measured("validate", trained, own_root, tmp_path / "runs")
    columns = [f"{weights}, {kind}" for weights in ("ema", "raw") for kind in ("running", "batch", "precise")]
    (title,) = (line for line in output.splitlines() if line.startswith("metric"))
    assert title.split()[1:6] == ["value", *REFERENCES]
    assert "(iteration 10, 200 samples)" in title
    assert report["iteration"] == 10
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()[:1]}
    for metric in METRICS:
        written = [report[column][metric] for column in ("value", *REFERENCES)]
        assert [float(cell) for cell in rows[metric]] == pytest.approx(written, abs=1e-4)
    for column in columns:
        (line,) = (line for line in output.splitlines() if line.startswith(column))
        assert float(line.split()[-1]) == pytest.approx(report[column]["fid"], abs=1e-4)
    assert report["ema, running"]["fid"] == pytest.approx(report["value"]["fid"], rel=1e-9)
    gap = report["ema, running"]["fid"] - report["ema, precise"]["fid"]
    assert report["bn_gap"] == pytest.approx(gap, rel=1e-9)
    assert f"= {gap:.4f}" in output
    assert gap != 0
    assert len({report[column]["fid"] for column in columns}) == len(columns)


def test_test_tells_mean_and_spread_of_five_sets_of_latents(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    report, output = measured("test", trained, own_root, tmp_path / "runs")
    assert (report["iteration"], report["num_samples"]) == (10, 200)
    assert report["seeds"] == [1, 2, 3, 4, 5]
    for metric in METRICS:
        entry = report[metric]
        assert set(entry) == {"mean", "sd", *REFERENCES, "values"}
        values = torch.tensor(entry["values"], dtype=torch.float64)
        assert len(values) == 5
        assert entry["mean"] == pytest.approx(float(values.mean()), abs=1e-9)
        assert entry["sd"] == pytest.approx(float(values.std()), abs=1e-9)
    assert len(set(report["fid"]["values"])) == 5
    assert report["modes_covered"]["dropped"] == report["modes_covered"]["floor"] - 1
    (title,) = (line for line in output.splitlines() if line.startswith("metric"))
    assert title.split()[1:7] == ["mean", "sd", *REFERENCES]
    assert "(iteration 10, 200 samples" in title


def test_floors_are_worked_out_once_and_found_again(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    first, _ = measured("test", trained, own_root, tmp_path / "first")
    cache = own_root / "floors.json"
    (entry,) = (content := json.loads(cache.read_text())).values()
    assert {name: first[name]["floor"] for name in METRICS} == entry["references"]["floor"]
    second, _ = measured("test", trained, own_root, tmp_path / "second")
    assert second == first
    entry["references"]["floor"]["fid"] = 123.0
    cache.write_text(json.dumps(content))
    third, _ = measured("test", trained, own_root, tmp_path / "third")
    assert third["fid"]["floor"] == 123.0
    assert third["fid"]["mean"] == pytest.approx(first["fid"]["mean"], rel=1e-9)
    assert json.loads(cache.read_text()) == content


def test_floors_of_other_settings_stand_beside_each_other(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    first, _ = measured("test", trained, own_root, tmp_path / "first")
    second, _ = measured("test", trained, own_root, tmp_path / "second", "--metrics.num_samples=150")
    assert second["fid"]["floor"] != first["fid"]["floor"]
    feature = "--metrics.feature=tests.features.Pooled"
    third, _ = measured("test", trained, own_root, tmp_path / "third", feature)
    entries = json.loads((own_root / "floors.json").read_text())
    assert len(entries) == 3
    assert {entry["references"]["floor"]["fid"] for entry in entries.values()} == {
        report["fid"]["floor"] for report in (first, second, third)
    }
    again, _ = measured("test", trained, own_root, tmp_path / "again")
    assert again == first


@pytest.mark.parametrize("content", ["{damaged", "[]"])
def test_damaged_floors_are_told_in_a_line_and_written_anew(
    trained: Trained, own_root: Path, tmp_path: Path, content: str
) -> None:
    cache = own_root / "floors.json"
    cache.write_text(content)
    report, output = measured("test", trained, own_root, tmp_path / "first")
    assert [line for line in output.splitlines() if "damaged" in line] == [f"{cache} is damaged and is written anew."]
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["references"]["floor"]["fid"] == report["fid"]["floor"]
    again, output = measured("test", trained, own_root, tmp_path / "second")
    assert again == report
    assert "damaged" not in output


def test_a_network_of_ones_own_measures_without_classes(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    feature = "--metrics.feature=tests.features.Pooled"
    report, _ = measured("test", trained, own_root, tmp_path / "runs", feature)
    assert set(report) == {"iteration", "num_samples", "feature", "seeds", *PAIRWISE}
    assert report["feature"] == "tests.features.Pooled"
    assert report["fid"]["mean"] > 3 * report["fid"]["floor"] > 0
    digits, _ = measured("test", trained, own_root, tmp_path / "digits")
    assert digits["fid"]["mean"] != pytest.approx(report["fid"]["mean"], rel=1e-2)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("--metrics.feature=digitz", "unknown --metrics.feature 'digitz'"),
        ("--metrics.num_samples=127", "must be 0 or at least 128, twice the features of digits or all"),
        ("--metrics.num_samples=-1", "num_samples must be at least 0"),
        ("--metrics.mode_threshold=0", "mode_threshold must be above 0 and at most 1, got 0"),
    ],
)
def test_a_setting_that_cannot_be_measured_by_is_told_in_a_line(
    trained: Trained, own_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, complaint: str
) -> None:
    common = (f"--ckpt_path={trained.checkpoint}", f"--data.root={own_root}", f"--trainer.default_root_dir={tmp_path}")
    assert main(["validate", *FEW, *common, setting]) == 2
    answer = capsys.readouterr().err
    assert complaint in answer
    assert "Traceback" not in answer


def test_floors_that_cannot_be_kept_are_told_in_a_line_and_stop_nothing(
    trained: Trained, own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_root / "floors.json").unlink(missing_ok=True)

    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("bngan.callbacks.references.write_whole", refuse)
    report, output = measured("test", trained, own_root, tmp_path / "runs")
    assert "floors.json cannot be written (Permission denied)" in output
    assert not (own_root / "floors.json").exists()
    assert report["fid"]["floor"] > 0


def test_a_shape_error_in_somebodys_network_shows_where_it_is(
    trained: Trained, own_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = (f"--ckpt_path={trained.checkpoint}", f"--data.root={own_root}", f"--trainer.default_root_dir={tmp_path}")
    assert main(["validate", *FEW, *common, "--metrics.feature=tests.features.Coloured"]) == 1
    answer = capsys.readouterr().err
    assert "Traceback" in answer
    assert "return self.conv(images).flatten(1)" in answer, "the line of the network"


# By itself ------------------------------------------------------------------------------------------------------------

POOLED = "tests.features.Pooled"  # 16 features


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pictures(folder: Path, count: int) -> Path:
    """Fill a folder with pictures of random pixels."""
    for number in range(count):
        picture(folder / f"{number}.png")
    return folder


def validated(folder: Path, callback: MeasureSamples, data: ImageDataModule, *others: Callback) -> dict[str, float]:
    """Return what is measured of an untrained GAN's samples."""
    run = trainer(folder, callback, *others)
    run.validate(tiny(image_shape=data.image_shape), datamodule=data, verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def measured_by_test(folder: Path, callback: MeasureSamples, data: ImageDataModule) -> dict[str, float]:
    """Return what a test measures of an untrained GAN's samples."""
    run = trainer(folder, callback)
    run.test(tiny(image_shape=data.image_shape), datamodule=data, verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def test_no_samples_are_measured_where_none_are_asked_for(tmp_path: Path) -> None:
    data = module_of(pictures(tmp_path / "pictures", 100))
    assert "val/d_loss" in validated(tmp_path, MeasureSamples(num_samples=0, feature=POOLED), data)
    assert "val/fid" not in validated(tmp_path, MeasureSamples(num_samples=0, feature=POOLED), data)
    assert "val/fid" in validated(tmp_path, MeasureSamples(num_samples=40, feature=POOLED), data)


def small_pictures(folder: Path, *, channels: int) -> ImageDataModule:
    for number in range(100):
        picture(folder / f"{number}.png", COLOUR if channels == 3 else GREY)
    return module_of(folder)


@pytest.mark.parametrize("known", [True, False])
def test_auto_takes_the_digit_net_for_the_digits_it_knows(
    known: bool, mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not for pictures of the same size."""
    for number in range(0 if known else 40):
        picture(tmp_path / "pictures" / f"{number}.png", size=(28, 28))
    callback = MeasureSamples(num_samples=200)
    data = ImageDataModule(root=str(mnist_root)) if known else module_of(tmp_path / "pictures")
    found, output = validated(tmp_path, callback, data), capsys.readouterr().out
    assert ("--metrics.feature digits: the images are grey digits of 28 x 28." in output) == known
    assert ("--metrics.feature random: the images are grey, and no digits of 28 x 28." in output) != known
    assert ("val/fid" in found, "val/kid" in found, "val/distance" in found) == (known, known, not known)
    assert callback.state_dict()["feature"] == ("digits" if known else "random")


@pytest.mark.parametrize("feature", ["auto", "random"])
@pytest.mark.parametrize("channels", [1, 3])
def test_own_pictures_get_a_distance_that_is_never_called_fid(
    channels: int, feature: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = validated(tmp_path, MeasureSamples(feature=feature), small_pictures(tmp_path / "pictures", channels=channels))
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if "FID" in line and "is no FID" not in line] == []
    assert output.count("The distance of random features is no FID: read it beside its floor and controls.") >= 1
    assert not {name for name in found if "fid" in name or "kid" in name}
    for kind in ("val", "floor", "blurred", "repeated"):
        assert {name for name in found if name.startswith(f"{kind}/")} >= {f"{kind}/distance", f"{kind}/coverage"}
    assert {"val/distance_running", "val/distance_batch", "val/distance_precise"} <= set(found)
    assert found["val/distance"] > found["floor/distance"] > 0
    assert found["val/bn_gap"] == pytest.approx(found["val/distance_running"] - found["val/distance_precise"], rel=1e-3)


@pytest.mark.parametrize("held_out", [4, 3])
@pytest.mark.parametrize(("d_norm", "feature"), [("batch", "auto"), ("none", POOLED)])
def test_what_will_be_measured_is_known_before_training(d_norm: str, feature: str, held_out: int, tmp_path: Path) -> None:
    class Known(Callback):
        names: tuple[str, ...] = ()

        def on_train_start(self, trainer: Trainer, gan: GAN) -> None:
            self.names = tuple(measured_by(trainer, gan))

    data, known = folder_of(tmp_path, 40, held_out), Known()
    callbacks = (BatchNormStatistics(), MeasureSamples(num_samples=20, feature=feature), known)
    run = trainer(tmp_path, *callbacks, max_steps=1, val_check_interval=1, num_sanity_val_steps=0)
    run.fit(tiny(image_shape=data.image_shape, d_norm=d_norm), datamodule=data)
    found = [name for name in run.callback_metrics if name.startswith(("val/", "bn/"))]
    assert sorted(known.names) == sorted(found)
    assert ("bn/d_shift_blindness" in found) == (held_out == 4), "D is probed on two batches"


class Stand(nn.Module):
    """Stands in for Inception: a picture's pixels."""

    def __init__(self, **_: object) -> None:
        super().__init__()

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, ::2, ::2].flatten(start_dim=1) / 255


def gone(**_: object) -> nn.Module:
    raise OSError("no route")


def test_a_run_that_goes_on_is_measured_by_the_net_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though inception is there, or gone, by then."""
    data, state = small_pictures(tmp_path / "pictures", channels=3), {"last": {}, "iteration": 3, "seconds": 0.0}

    def go_on(began_with: str, feature: str = "auto") -> dict[str, float]:
        callback = MeasureSamples(feature=feature)
        callback.load_state_dict({**state, "feature": began_with})
        return validated(tmp_path, callback, data)

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Stand)
    assert "val/distance" in go_on("random")
    assert "Samples are measured by --metrics.feature random, as before." in capsys.readouterr().out
    assert "val/fid" in go_on("inception")
    assert "val/distance" in go_on("inception", feature="random")
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", gone)
    with pytest.raises(
        UsageError, match=r"were measured by inception, but now: .*no route.* --override --metrics.feature random"
    ):
        go_on("inception")


@pytest.mark.parametrize("classes", [(1,), (2,), (5,), (6,), (11,), (1, 1, 1)])
def test_pictures_too_few_to_measure_are_told_in_a_line_and_train(
    classes: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label, count in enumerate(classes):
        pictures(tmp_path / "pictures" / "train" / str(label), count)
    data = module_of(pictures(tmp_path / "pictures" / "test", 2).parent, batch_size=sum(classes))
    found = validated(tmp_path, MeasureSamples(), data)
    comparable = sum(classes) // 2
    line = "Samples are not measured: metrics compare samples with at least 6 training images and need as many other training "
    assert f"{line}images for the floor, but there are {comparable} of each.\n" in capsys.readouterr().out
    assert not {name for name in found if name.startswith(("floor/", "val/distance"))}
    assert "val/d_loss" in found


def test_pictures_that_are_all_the_same_are_measured(tmp_path: Path) -> None:
    for number in range(30):
        picture(tmp_path / "pictures" / f"{number}.png", COLOUR, level=7)
    found = validated(tmp_path, MeasureSamples(), module_of(tmp_path / "pictures"))
    assert found["floor/distance"] == pytest.approx(0, abs=1e-6)
    assert found["val/distance"] > 1
    assert all(math.isfinite(value) for value in found.values())


def test_no_chunk_of_large_images_takes_more_than_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, drawn = module_of(pictures(tmp_path / "pictures", 100)), []
    whole = Sampler.samples

    def samples(self: Sampler, start: int, stop: int, seed: int) -> Tensor:
        drawn.append(stop - start)
        return whole(self, start, stop, seed)

    monkeypatch.setattr(Sampler, "samples", samples)
    callback = MeasureSamples(num_samples=40, feature=POOLED)
    unbound = validated(tmp_path, callback, data)
    assert set(drawn) == {40}
    drawn.clear()
    monkeypatch.setattr("bngan.callbacks.metrics.CHUNK_BYTES", 10 * 4 * 64)  # 10 images of 8 x 8
    assert validated(tmp_path, callback, data) == pytest.approx(unbound, rel=1e-5)
    assert set(drawn) == {10}
    drawn.clear()
    monkeypatch.setattr("bngan.callbacks.metrics.CHUNK_BYTES", 1)
    validated(tmp_path, callback, data)
    assert set(drawn) == {1}


def folder_of(folder: Path, training: int, held_out: int) -> ImageDataModule:
    pictures(folder / "pictures" / "train", training)
    return module_of(pictures(folder / "pictures" / "test", held_out).parent)


@pytest.mark.parametrize(
    ("command", "kind", "training", "held_out"), [("validate", "training", 11, 40), ("test", "held-out", 40, 5)]
)
def test_too_few_real_images_are_refused(command: str, kind: str, training: int, held_out: int, tmp_path: Path) -> None:
    callback = MeasureSamples(num_samples=40, feature=POOLED)
    data = folder_of(tmp_path / "few", training, held_out)
    measure = validated if command == "validate" else measured_by_test
    with pytest.raises(UsageError, match=rf"at least 6 {kind} images .* there are 5 of each: .*--metrics.num_samples 0"):
        measure(tmp_path, callback, data)
    enough = folder_of(tmp_path / "enough", training + 1, held_out + 1)
    assert measure(tmp_path, callback, enough)[f"{'test' if command == 'test' else 'val'}/fid"] > 0


@pytest.mark.parametrize(("command", "training", "held_out"), [("validate", 62, 70), ("test", 100, 31)])
def test_fewer_real_images_than_samples_are_told_in_a_line_and_decide_the_number(
    command: str, training: int, held_out: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder_of(tmp_path, training, held_out)
    measure = validated if command == "validate" else measured_by_test
    fewer = measure(tmp_path, MeasureSamples(num_samples=40, feature=POOLED), data)
    output = capsys.readouterr().out
    assert "Measures 31 samples, not 40: there are no more real images to compare with and for the floor." in output
    assert "A distance of 16 features on 31 images says little: read it beside its floor." in output
    assert "31 samples" in output.partition("metric")[2]
    asked = measure(tmp_path, MeasureSamples(num_samples=31, feature=POOLED), data)
    assert "Measures" not in capsys.readouterr().out
    assert asked == fewer
    with pytest.raises(
        UsageError, match=r"must be 0 or at least 31, twice the features .* or all images where there are fewer"
    ):
        measure(tmp_path, MeasureSamples(num_samples=30, feature=POOLED), data)


def test_a_control_without_enough_images_is_left_out_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "pictures" / "cats", 90)
    pictures(tmp_path / "pictures" / "dogs", 3)
    found = validated(tmp_path, MeasureSamples(num_samples=40, feature=POOLED), module_of(tmp_path / "pictures"))
    assert "The control `dropped` is left out" in capsys.readouterr().out
    assert {name for name in REFERENCES if f"{name}/fid" in found} == {"floor", "blurred", "repeated"}
    pictures(tmp_path / "pictures" / "dogs", 90)
    found = validated(tmp_path, MeasureSamples(num_samples=40, feature=POOLED), module_of(tmp_path / "pictures"))
    assert "left out" not in capsys.readouterr().out
    assert "dropped/fid" in found


def test_what_held_out_images_are_like_moves_a_test_and_no_validation(tmp_path: Path) -> None:
    """So that no checkpoint is chosen by them."""
    callback = MeasureSamples(num_samples=40, feature=POOLED)
    data = folder_of(tmp_path, 100, 50)
    before, tested_before = validated(tmp_path, callback, data), measured_by_test(tmp_path, callback, data)
    for number in range(50):
        picture(tmp_path / "pictures" / "test" / f"{number}.png", level=number)
    other = module_of(tmp_path / "pictures")
    after, tested_after = validated(tmp_path, callback, other), measured_by_test(tmp_path, callback, other)
    measured = [name for name in before if name.partition("/")[2] in PAIRWISE]
    assert len(measured) == 4 * len(PAIRWISE)
    assert {name: after[name] for name in measured} == {name: before[name] for name in measured}
    assert tested_after["test/fid"] != pytest.approx(tested_before["test/fid"], rel=0.1)


def test_a_helpers_change_gives_new_floors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the text of the network's own class stays the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = folder_of(tmp_path, 100, 50)
    text = """
import torch
from torch.nn import functional as F
def scaled(features): return SCALE * features
class Net(torch.nn.Module):
    def forward(self, images): return scaled(F.adaptive_avg_pool2d(images, 4).flatten(1))
SCALE = """
    module, floors = tmp_path / "own_features.py", []
    for scale in ("1", "3", "3"):
        module.write_text(text + scale)
        monkeypatch.delitem(sys.modules, "own_features", raising=False)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        data.root = tmp_path
        floors.append(validated(tmp_path, MeasureSamples(num_samples=40, feature="own_features.Net"), data)["floor/fid"])
    assert floors[1] == pytest.approx(9 * floors[0], rel=1e-3)
    assert floors[2] == floors[1]


def test_samples_are_those_of_the_seed_in_any_chunks(tmp_path: Path) -> None:
    data = module_of(pictures(tmp_path / "pictures", 100))

    def fid(**settings: int) -> float:
        return validated(tmp_path, MeasureSamples(num_samples=40, feature=POOLED, **settings), data)["val/fid"]

    assert fid(chunk=7) == pytest.approx(fid(), rel=1e-6)
    assert fid(seed=1) != pytest.approx(fid(), rel=1e-3)


def test_run_is_asked_between_chunks_whether_to_stop(tmp_path: Path) -> None:
    class Patient(Callback):
        def __init__(self) -> None:
            self.asked = 0

        def stop_if_asked(self, trainer: Trainer) -> None:
            self.asked += 1

    data = module_of(pictures(tmp_path / "pictures", 100))
    often, seldom = Patient(), Patient()
    validated(tmp_path, MeasureSamples(num_samples=40, feature=POOLED, chunk=5), data, often)
    validated(tmp_path, MeasureSamples(num_samples=40, feature=POOLED, chunk=40), data, seldom)
    assert seldom.asked > 5
    assert often.asked > 5 * seldom.asked


def test_data_that_is_not_bngans_cannot_be_measured(tmp_path: Path) -> None:
    run = trainer(tmp_path, MeasureSamples(num_samples=40, feature=POOLED))
    with pytest.raises(ValueError, match="needs an ImageDataModule"):
        run.validate(tiny(), [torch.zeros(4, 1, 4, 4)])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_samples": -1}, "metrics.num_samples must be at least 0, got -1"),
        ({"chunk": 0}, "metrics.chunk must be at least 1, got 0"),
        ({"mode_threshold": 0.0}, "mode_threshold must be above 0 and at most 1, got 0"),
        ({"mode_threshold": 1.1}, "mode_threshold must be above 0 and at most 1, got 1.1"),
        ({"mode_threshold": math.nan}, "mode_threshold must be above 0 and at most 1, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        MeasureSamples(**settings)
    MeasureSamples(num_samples=0, chunk=1, mode_threshold=1)


def test_what_was_measured_last_is_kept_with_its_iteration(tmp_path: Path) -> None:
    data, callback = module_of(pictures(tmp_path / "pictures", 100)), MeasureSamples(num_samples=40, feature=POOLED)
    measured = validated(tmp_path, callback, data)
    state = callback.state_dict()
    assert state["iteration"] == 0
    assert state["last"]["fid"] == pytest.approx(measured["val/fid"], rel=1e-6)
    again, old = MeasureSamples(), MeasureSamples()
    again.load_state_dict({**state, "iteration": 7})
    assert again.state_dict() == {**state, "iteration": 7}
    old.load_state_dict({"last": {"fid": 1.0, "modes": 10.0}, "seconds": 5.0})
    forgotten = {"last": {}, "iteration": 0, "seconds": 5.0, "feature": None}
    assert old.state_dict() == forgotten, "version 0.1 compared with other images"


# By class -------------------------------------------------------------------------------------------------------------


def test_samples_are_judged_by_the_digit_that_was_asked_for(
    mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gan = tiny(image_shape=(1, 28, 28), classes=10)
    data, callback = ImageDataModule(root=str(mnist_root), batch_size=16), MeasureSamples(num_samples=200, chunk=64)
    run = trainer(tmp_path, callback, max_steps=2, val_check_interval=2, check_val_every_n_epoch=None, limit_val_batches=1)
    run.fit(gan, datamodule=data)
    report = json.loads((tmp_path / "quality.json").read_text())["value"]
    net = load_digit_net()
    with gan.sampler() as sampler:
        images = to_minus1_1(to_uint8(sampler.samples(0, 200)))
    right = (net.logits(net(images)).argmax(dim=1) == torch.arange(200) % 10).double()
    assert report["class_precision"] == pytest.approx(float(right.mean()), abs=1e-6)
    for label in range(10):
        assert report[f"class_precision/{label}"] == pytest.approx(float(right[label::10].mean()), abs=1e-6)
    assert float(run.callback_metrics["val/class_precision"]) == pytest.approx(report["class_precision"])
    assert "val/class_precision" in callback.measured(run, gan)
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("class_precision "))
    assert row.split() == ["class_precision", f"{report['class_precision']:.4f}"]  # real images have none
    run.test(gan, datamodule=data, verbose=False)
    tested = json.loads((tmp_path / "test.json").read_text())["class_precision"]
    assert set(tested) == {"mean", "sd", "values"}
    assert len(tested["values"]) == 5
