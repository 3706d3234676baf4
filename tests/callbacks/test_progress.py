"""What a run tells of itself as it goes on."""

import math
import re
from pathlib import Path

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
        gan.log("val/coverage", 0.824)
        gan.log("floor/coverage", 0.96)
        gan.log("val/modes_covered", 7.0)
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
    assert re.fullmatch(r"7 iterations in \d+ s; [\d,]+ images/s in training", last)
    assert "\x1b" not in output
    assert "\r" not in output


class Clock(Callback):
    """Seconds that pass in training and in validation only; stands for the module `time`."""

    def __init__(self, iteration: float, validation: float) -> None:
        self.now, self.iteration, self.validation = 0.0, iteration, validation

    def monotonic(self) -> float:
        return self.now

    def on_train_batch_start(self, trainer: Trainer, gan: GAN, batch: object, batch_idx: int) -> None:
        self.now += self.iteration

    def on_validation_start(self, trainer: Trainer, gan: GAN) -> None:
        self.now += self.validation / 2

    def on_validation_epoch_end(self, trainer: Trainer, gan: GAN) -> None:
        self.now += self.validation / 2


@pytest.mark.parametrize("line_seconds", [0.0, 3.0])
def test_rate_is_of_the_images_trained_on_and_of_the_time_that_training_took(
    line_seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(iteration=2.0, validation=30.0)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "LINE_SECONDS", line_seconds)
    output = told(tmp_path, capsys, clock, RunProgress(), steps=7, validate=True)  # after iterations 2, 4 and 6
    rates = re.findall(r"(\S+) images/s", output)
    assert len(rates) > 5
    assert set(rates) == {f"{BATCH / 2:.0f}"}
    assert f"7 iterations in 104 s, 90 s of them validation; {BATCH / 2:.0f} images/s in training" in output
    assert "17 s left" in output  # after iteration 6: the time left is a person's, with validation


def test_sanity_check_is_no_part_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(iteration=2.0, validation=30.0)
    monkeypatch.setattr(progress, "time", clock)
    run = trainer(tmp_path, clock, RunProgress(), max_steps=4, enable_progress_bar=True, num_sanity_val_steps=1)
    run.fit(tiny(), images(), images(batches=1))
    assert f"4 iterations in 8 s; {BATCH / 2:.0f} images/s in training" in capsys.readouterr().out


def test_validation_is_told_with_its_best_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = RunProgress()
    output = told(tmp_path, capsys, Judge(), callback, steps=4, validate=True)
    lines = [line for line in output.splitlines() if "FID" in line]
    assert "FID 3.00 (best 3.00, floor 0.5)  coverage 0.82 (floor 0.96)  modes 7" in lines[0]
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
