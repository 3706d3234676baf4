"""What batch norm's callback logs, and that it changes nothing."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from bngan import GAN
from bngan.batching import BATCHINGS, Batching
from bngan.batchnorm import kl_to_running, recorded_statistics, running_statistics
from bngan.callbacks import BatchNormStatistics
from bngan.cli import main
from bngan.errors import UsageError
from tests.conftest import QUICK, only_run
from tests.test_gan import images, tiny, trainer

TAGS = [f"bn/{probe}{kind}" for probe in ("d_shift_blindness", "d_batch_dependence") for kind in ("", "/joint", "/separate")]
LAYERS = ("generator.net.1", "generator.net.4", "discriminator.net.1", "discriminator.net.4")


def fit(folder: Path, gan: GAN, *callbacks: Callback, steps: int = 10) -> EventAccumulator:
    logger = TensorBoardLogger(folder, name="", version="")
    trainer(folder, *callbacks, max_steps=steps, logger=logger).fit(gan, images())
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def state(gan: GAN) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gan.state_dict().items()}


# Layer by layer -------------------------------------------------------------------------------------------------------


def test_every_layer_is_logged_every_so_many_iterations(tmp_path: Path) -> None:
    events = fit(tmp_path, tiny(), BatchNormStatistics(every_n_iterations=4))
    assert {tag.removeprefix("bn/").partition("/")[0] for tag in events.Tags()["scalars"] if tag.startswith("bn/")} == {*LAYERS}
    for layer in LAYERS:
        for quantity in ("running_mean", "running_var", "gamma", "beta"):
            assert [event.step for event in events.Histograms(f"bn/{layer}/{quantity}")] == [4, 8]
            for statistic in ("min", "mean", "max"):
                assert [event.step for event in events.Scalars(f"bn/{layer}/{quantity}/{statistic}")] == [4, 8]
        assert [event.step for event in events.Scalars(f"bn/{layer}/kl_to_running")] == [4, 8]


def test_histograms_can_be_left_out(tmp_path: Path) -> None:
    events = fit(tmp_path, tiny(), BatchNormStatistics(every_n_iterations=5, histograms=False))
    assert events.Tags()["histograms"] == []
    assert "bn/generator.net.1/gamma/mean" in events.Tags()["scalars"]


def test_layers_without_running_statistics_are_not_logged(tmp_path: Path) -> None:
    events = fit(tmp_path, tiny(d_norm="layer"), BatchNormStatistics(every_n_iterations=5))
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("bn/")]
    assert tags
    assert all(tag.startswith("bn/generator.") for tag in tags)


class Recorded(Callback):
    """Works out, at the last iteration, what should be logged of each layer."""

    def __init__(self) -> None:
        self.kl: dict[str, float] = {}

    def on_train_batch_start(self, trainer: Trainer, gan: GAN, batch: object, batch_idx: int) -> None:
        self._recording = recorded_statistics(gan)
        self._seen = self._recording.__enter__()

    def on_train_batch_end(self, trainer: Trainer, gan: GAN, *_: object) -> None:
        self._recording.__exit__(None, None, None)
        self.kl = {
            name: sum(float(kl_to_running(layer, batch).mean()) for batch in self._seen[name]) / len(self._seen[name])
            for name, layer in gan.batch_norms()
        }


def test_values_are_those_of_the_layers_after_the_iteration(tmp_path: Path) -> None:
    gan, recorded = tiny(g_lr=0.05, d_lr=0.05), Recorded()
    events = fit(tmp_path, gan, BatchNormStatistics(every_n_iterations=5), recorded)
    for name, layer in gan.batch_norms():
        mean, var = running_statistics(layer)
        for quantity, channels in (("running_mean", mean), ("running_var", var), ("gamma", layer.weight), ("beta", layer.bias)):
            channels = channels.detach()
            found = [events.Scalars(f"bn/{name}/{quantity}/{statistic}")[-1].value for statistic in ("min", "mean", "max")]
            expected = [float(channels.min()), float(channels.mean()), float(channels.max())]
            assert found == pytest.approx(expected, rel=1e-6)
        logged = [event.value for event in events.Scalars(f"bn/{name}/kl_to_running")]
        assert logged[-1] == pytest.approx(recorded.kl[name], rel=1e-5)
        assert logged[0] != pytest.approx(recorded.kl[name], rel=1e-3)


def test_iterations_that_are_looked_into_run_eagerly_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager: list[tuple[int, int]] = []

    @contextmanager
    def spied(gan: GAN) -> Iterator[None]:
        before = gan.trainer.global_step
        yield
        eager.append((before, gan.trainer.global_step))

    monkeypatch.setattr(GAN, "eager", spied)
    fit(tmp_path, tiny(), BatchNormStatistics(every_n_iterations=4))
    assert eager == [(3, 4), (7, 8)]
    eager.clear()
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, BatchNormStatistics(every_n_iterations=4), max_steps=10, logger=logger).fit(tiny(), images())
    assert eager == [], "without TensorBoard there is nobody to tell"


def test_looking_leaves_training_and_the_networks_as_they_are(tmp_path: Path) -> None:
    looked_into, alone = tiny(), tiny()
    fit(tmp_path / "looked into", looked_into, BatchNormStatistics(every_n_iterations=1))
    fit(tmp_path / "alone", alone)
    for name, value in state(alone).items():
        assert torch.equal(looked_into.state_dict()[name], value), name
    assert not any(module._forward_pre_hooks for module in looked_into.modules())


def test_a_crash_leaves_no_hooks_behind(tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_end(self, trainer: Trainer, gan: GAN, *_: object) -> None:
            raise KeyError("inside")

    gan = tiny()
    with pytest.raises(KeyError, match="inside"):
        fit(tmp_path, gan, Crash(), BatchNormStatistics(every_n_iterations=1))
    assert not any(module._forward_pre_hooks for module in gan.modules())


@pytest.mark.parametrize("every", [0, -1])
def test_intervals_below_one_are_refused(every: int) -> None:
    with pytest.raises(UsageError, match=rf"batchnorm\.every_n_iterations must be at least 1, got {every}"):
        BatchNormStatistics(every_n_iterations=every)
    BatchNormStatistics(every_n_iterations=1)


# What D sees ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", BATCHINGS)
def test_callback_logs_the_runs_own_batching_and_both(batching: Batching, tmp_path: Path) -> None:
    trained_alike = []
    for callbacks in ((BatchNormStatistics(),), ()):
        gan = tiny(batching=batching)
        logger = CSVLogger(tmp_path, name=str(len(callbacks)), version="")
        trainer(tmp_path, *callbacks, max_steps=20, logger=logger).fit(gan, images(), images(batch_size=64, batches=2))
        trained_alike.append(state(gan))
    for name, value in trained_alike[0].items():
        assert torch.equal(trained_alike[1][name], value), name
    header, *rows = (line.split(",") for line in (tmp_path / "1" / "metrics.csv").read_text().splitlines())
    logged = {tag: [float(row[header.index(tag)]) for row in rows if row[header.index(tag)]] for tag in TAGS}
    for tag, values in logged.items():
        assert len(values) == 1, tag
    for probe in ("bn/d_shift_blindness", "bn/d_batch_dependence"):
        other = "separate" if batching == "joint" else "joint"
        assert logged[probe] == logged[f"{probe}/{batching}"] != logged[f"{probe}/{other}"]
    assert logged["bn/d_shift_blindness/separate"][0] > 0.99 > logged["bn/d_shift_blindness/joint"][0]
    assert not set(TAGS) & set((tmp_path / "0" / "metrics.csv").read_text().splitlines()[0].split(","))


@pytest.mark.parametrize(("images_held_out", "logged"), [(15, False), (16, True)])
def test_too_few_held_out_images_are_not_looked_at(images_held_out: int, logged: bool, tmp_path: Path) -> None:
    run = trainer(tmp_path, BatchNormStatistics(), max_steps=2, limit_train_batches=2)
    run.fit(tiny(), images(), images(batch_size=images_held_out, batches=1))
    assert ("bn/d_shift_blindness" in run.callback_metrics) == logged


@pytest.mark.parametrize("batching", BATCHINGS)
def test_held_out_images_that_ghost_groups_do_not_divide_are_looked_at_in_part(batching: Batching, tmp_path: Path) -> None:
    gan = tiny(d_norm="ghost", ghost_groups=8, batching=batching)
    run = trainer(tmp_path, BatchNormStatistics(), max_steps=2, limit_train_batches=2)
    run.fit(gan, images(), images(batch_size=83, batches=1))
    assert all(0 < float(run.callback_metrics[tag]) <= 1 for tag in TAGS)


@pytest.fixture(scope="module")
def events(mnist_root: Path) -> Iterator[EventAccumulator]:
    every = ("--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=1")
    with tempfile.TemporaryDirectory() as folder:
        where = (f"--data.root={mnist_root}", f"--trainer.default_root_dir={folder}")
        assert main(["fit", *QUICK[::2], "--metrics.num_samples=0", *every, *where]) == 0
        yield EventAccumulator(str(only_run(Path(folder)))).Reload()


def test_run_plots_what_d_sees(events: EventAccumulator) -> None:
    values: dict[str, Any] = {}
    for tag in TAGS:
        assert [event.step for event in events.Scalars(tag)] == [5, 10], tag
        values[tag] = [event.value for event in events.Scalars(tag)]
    for probe in ("bn/d_shift_blindness", "bn/d_batch_dependence"):
        assert values[probe] == values[f"{probe}/joint"]
        assert all(0 < value <= 1 for value in values[probe])
    assert min(values["bn/d_shift_blindness/separate"]) > 0.99 > max(values["bn/d_shift_blindness/joint"])
