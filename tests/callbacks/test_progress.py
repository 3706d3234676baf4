"""What a run tells of itself as it goes on."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback, Trainer

from bngan import GAN
from bngan.callbacks import RunProgress, progress
from tests.test_gan import BATCH, images, tiny, trainer


class Judge(Callback):
    """Logs a metric of the samples that gets worse from one validation to the next."""

    def __init__(self) -> None:
        self.fid = 3.0

    def on_validation_epoch_end(self, trainer: Trainer, gan: GAN) -> None:
        gan.log("val/fid", self.fid)
        gan.log("floor/fid", 0.5)
        gan.log("val/modes", 7.0)
        self.fid += 1.0


def told(folder: Path, capsys: pytest.CaptureFixture[str], *callbacks: Callback, steps: int = 7, validate: bool = False) -> str:
    settings = {"val_check_interval": 2, "limit_val_batches": 1} if validate else {"limit_val_batches": 0}
    run = trainer(folder, *callbacks, max_steps=steps, enable_progress_bar=True, num_sanity_val_steps=0, **settings)
    capsys.readouterr()
    run.fit(tiny(), images(), images(batches=1))
    return capsys.readouterr().out


def test_every_line_tells_losses_rate_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    output = told(tmp_path, capsys, RunProgress())
    lines = [line for line in output.splitlines() if line.startswith("iteration ")]
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    for line in lines:
        assert re.fullmatch(r"iteration \d/7  D -?\d+\.\d{3}  G -?\d+\.\d{3}  [\d,]+ images/s  \d+ s left", line), line
        assert " 0 images/s" not in line


def test_lines_are_seldom_and_the_last_one_counts_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = told(tmp_path, capsys, RunProgress())
    first, last = (line for line in output.splitlines() if "images/s" in line)
    assert first.startswith("iteration 7/7 ")
    assert re.fullmatch(r"7 iterations in \d+ s, [\d,]+ images/s", last)
    assert "\x1b" not in output
    assert "\r" not in output


def test_rate_is_of_the_images_that_were_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    output = told(tmp_path, capsys, RunProgress(), steps=4)
    # The clock is asked at the start, after each of 4 iterations, for the last iteration's line and for the run's.
    assert f"{4 * BATCH / 5:,.0f} images/s" in output
    assert f"4 iterations in 6 s, {4 * BATCH / 6:,.0f} images/s" in output


def test_validation_is_told_with_its_best_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = RunProgress()
    output = told(tmp_path, capsys, Judge(), callback, steps=4, validate=True)
    lines = [line for line in output.splitlines() if "FID" in line]
    assert "FID 3.00 (best 3.00, floor 0.5)  modes 7" in lines[0]
    assert "FID 4.00 (best 3.00, floor 0.5)" in lines[1]
    again = RunProgress()
    again.load_state_dict(callback.state_dict())
    assert again.state_dict() == {"best": 3.0}
    assert RunProgress().state_dict() == {"best": math.inf}


def test_run_without_an_end_tells_no_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, gan: GAN, *_: object) -> None:
            trainer.should_stop = trainer.global_step == 3

    run = trainer(tmp_path, RunProgress(), Stop(), max_epochs=-1, enable_progress_bar=True)
    run.fit(tiny(), images())
    output = capsys.readouterr().out
    assert "iteration 3/? " in output
    assert "left" not in output


def test_disabled_bar_tells_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = RunProgress()
    callback.disable()
    assert "images/s" not in told(tmp_path, capsys, callback)
    callback.enable()
    assert "images/s" in told(tmp_path, capsys, callback)
