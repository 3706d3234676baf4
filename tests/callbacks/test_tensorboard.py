"""TensorBoard's layout and settings."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bngan import GAN
from bngan.callbacks import TensorBoardLayout
from bngan.losses import LOSSES
from tests.test_gan import images, tiny, trainer


class Measured(Callback):
    """Says that samples are measured."""

    def __init__(self, *metrics: str) -> None:
        self.metrics = metrics

    def measured(self, trainer: Trainer, gan: GAN) -> list[str]:
        return [f"val/{name}" for name in self.metrics]


FID = Measured("fid", "recall", "coverage")


def events_of(folder: Path, samples: Measured = FID, **settings: Any) -> EventAccumulator:
    logger = TensorBoardLogger(folder, name="", version="")
    trainer(folder, TensorBoardLayout(), samples, max_steps=1, logger=logger).fit(tiny(**settings), images(), images(batches=1))
    return EventAccumulator(str(folder)).Reload()


def layout_of(events: EventAccumulator) -> bytes:
    (event,) = events.Tensors("custom_scalars__config__")
    return event.tensor_proto.string_val[0]


def test_settings_are_shown_with_the_metric_they_are_judged_by(tmp_path: Path) -> None:
    tags = events_of(tmp_path, d_lr=0.125).summary_metadata
    assert b"val/fid" in tags["_hparams_/experiment"].plugin_data.content
    other = events_of(tmp_path / "other", Measured("distance")).summary_metadata["_hparams_/experiment"].plugin_data.content
    assert (b"val/fid" in other, b"val/distance" in other) == (False, True)
    settings = tags["_hparams_/session_start_info"].plugin_data.content
    assert b"d_lr" in settings
    assert b"image_shape" in settings


def test_charts_show_generator_beside_discriminator(tmp_path: Path) -> None:
    layout = layout_of(events_of(tmp_path))
    for tag in (
        "train/d_loss",
        "train/g_loss",
        "train/d_grad_norm",
        "val/fid",
        "floor/fid",
        "dropped/recall",
        "repeated/coverage",
    ):
        assert f"^{tag}$".encode() in layout
    for layer in ("generator.net.1", "generator.net.4", "discriminator.net.1", "discriminator.net.4"):
        for quantity in ("kl_to_running", "kl_floor", "running_mean/mean", "running_var/mean"):
            assert f"^bn/{layer}/{quantity}$".encode() in layout


def test_charts_of_quality_are_of_what_is_measured(tmp_path: Path) -> None:
    random = layout_of(events_of(tmp_path / "random", Measured("distance", "recall")))
    assert b"^floor/distance$" in random
    assert b"/fid$" not in random
    assert b"class_kl" not in random
    assert b"Quality" not in layout_of(events_of(tmp_path / "none", Measured()))


TITLES = {
    "non_saturating": b"D's probability of real",
    "minimax": b"D's probability of real",
    "relativistic": b"pairs with real above fake",
    "least_squares": b"D's logits",
    "hinge": b"D's logits",
    "wasserstein": b"D's logits",
}


@pytest.mark.parametrize("loss", LOSSES)
def test_chart_of_d_says_what_is_read_under_this_loss(loss: str, tmp_path: Path) -> None:
    layout = layout_of(events_of(tmp_path, loss=loss, d_norm="none"))
    assert [title for title in set(TITLES.values()) if title in layout] == [TITLES[loss]]
    assert all(f"^train/{reading}$".encode() in layout for reading in LOSSES[loss].readings)


@pytest.mark.parametrize("d_norm", ["layer", "none"])
def test_charts_are_of_the_layers_that_there_are(d_norm: str, tmp_path: Path) -> None:
    layout = layout_of(events_of(tmp_path / d_norm, d_norm=d_norm))
    assert b"bn/generator" in layout
    assert b"bn/discriminator" not in layout
    assert b"bn/" not in layout_of(events_of(tmp_path / "neither", d_norm=d_norm, g_norm="none"))


class Measure(Callback):
    """Logs a metric of the samples in a test, where the GAN itself logs nothing."""

    def on_test_epoch_end(self, trainer: Trainer, gan: GAN) -> None:
        gan.log("test/fid", 2.0)


@pytest.mark.parametrize(("command", "tag"), [("validate", "val/d_loss"), ("test", "test/fid")])
def test_what_is_measured_of_a_checkpoint_stands_at_its_iteration(command: str, tag: str, tmp_path: Path) -> None:
    fitted = trainer(tmp_path, max_steps=7)
    fitted.fit(tiny(), images())
    fitted.save_checkpoint(tmp_path / "7.ckpt")
    run = trainer(tmp_path, Measure(), logger=TensorBoardLogger(tmp_path, name="", version=""))
    getattr(run, command)(tiny(), images(batches=1), ckpt_path=str(tmp_path / "7.ckpt"), weights_only=True)
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars(tag)] == [7]


def test_other_loggers_are_left_alone(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, TensorBoardLayout(), max_steps=1, logger=logger).fit(tiny(), images())
    assert not list(tmp_path.glob("events*"))
