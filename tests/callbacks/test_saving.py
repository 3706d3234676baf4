"""When checkpoints are kept, that none is ever half written, and who hears a signal."""

import errno
import os
import signal
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from bngan import GAN, distributed
from bngan.callbacks import AtomicCheckpointIO, CheckpointSaver
from bngan.callbacks.saving import SIGNALS, Stopped
from bngan.errors import UsageError
from tests.test_gan import images, tiny, trainer


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "least"}, "mode"),
        ({"every_n_iterations": 0}, "every_n_iterations"),
        ({"every_minutes": 0.0}, "every_minutes"),
        ({"every_minutes": float("inf")}, "every_minutes"),
        ({"keep_all": True}, "give both"),
    ],
)
def test_settings_without_meaning_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        CheckpointSaver(**settings)
    CheckpointSaver(mode="max", every_n_iterations=1, every_minutes=0.1, keep_all=True)


class Measures(Callback):
    """Measures samples: each validation finds the next of some values."""

    def __init__(self, **values: list[float]) -> None:
        self.values = values

    def measured(self, trainer: Trainer, gan: GAN) -> list[str]:
        return [f"val/{name}" for name in self.values]

    def on_validation_epoch_end(self, trainer: Trainer, gan: GAN) -> None:
        for name, values in self.values.items():
            gan.log(f"val/{name}", values.pop(0))


Measures.__module__ = "bngan.stand_in"  # whose names are known, unlike those of somebody's own callback


def fitted(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    """Train for three epochs of an iteration each, with a validation after each."""
    run = trainer(folder, *callbacks, **{"max_epochs": 3, "enable_checkpointing": True, "num_sanity_val_steps": 0, **settings})
    run.fit(tiny(), images(batches=1), images(batches=1))
    return run


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({"fid": [3.0, 1.0, 2.0]}, 2),
        ({"distance": [3.0, 2.0, 1.0]}, 3),
        ({"fid": [1.0, 2.0, 3.0], "distance": [3.0, 2.0, 1.0]}, 1),
        ({"kid": [1.0, 2.0, 3.0]}, None),
    ],
)
def test_best_is_by_fid_or_by_the_distance_where_there_is_none(
    values: dict[str, list[float]], best: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = CheckpointSaver()
    fitted(tmp_path, Measures(**values), saver)
    assert saver.best_iteration == (best or -1)
    assert (tmp_path / "checkpoints" / "best.ckpt").exists() == (best is not None)
    line = "No best.ckpt is kept, because validation does not measure val/fid or val/distance."
    assert capsys.readouterr().out.count(line) == (best is None)


def test_best_of_another_metric_is_no_best_of_this_one(tmp_path: Path) -> None:
    begun = CheckpointSaver()
    fitted(tmp_path, Measures(distance=[0.3, 0.2, 0.1]), begun)
    for values, best in ({"fid": [5.0, 4.0, 6.0]}, 2), ({"distance": [5.0, 4.0, 6.0]}, 3):
        saver = CheckpointSaver()
        saver.load_state_dict(begun.state_dict())
        fitted(tmp_path, Measures(**values), saver)
        assert saver.best_iteration == best
    old = {name: value for name, value in begun.state_dict().items() if name != "best_of"}
    saver.load_state_dict(old)
    fitted(tmp_path, Measures(fid=[5.0, 4.0, 0.05]), saver)
    assert (saver.best, saver.best_iteration) == (pytest.approx(0.05), 3)


@pytest.mark.parametrize("monitor", ["val/fod", "fid", "train/d_loss", "", "val/d_loss_epoch", "floor/fid"])
def test_metric_that_is_not_measured_is_refused_before_training(monitor: str, tmp_path: Path) -> None:
    there = "validation does not measure it; choose from val/d_loss, val/d_pair_accuracy, val/d_pair_prob, val/fid$"
    for setting, callbacks in (
        ("--checkpoint.monitor", [CheckpointSaver(monitor=monitor)]),
        ("--trainer.callbacks EarlyStopping: monitor", [EarlyStopping(monitor), CheckpointSaver()]),
    ):
        with pytest.raises(UsageError, match=f"^{setting} {monitor}: {there}"):
            fitted(tmp_path, Measures(fid=[3.0, 2.0, 1.0]), *callbacks)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("monitor", ["val/fid", "val/d_loss", "val/d_pair_prob"])
def test_metric_that_is_measured_is_taken(monitor: str, tmp_path: Path) -> None:
    saver = CheckpointSaver(monitor=monitor)
    run = fitted(tmp_path, Measures(fid=[3.0, 3.5, 3.6]), EarlyStopping(monitor, patience=1, min_delta=100.0), saver)
    assert saver.best_iteration > 0
    assert run.global_step == 2, "stopped early"


def test_without_validation_nothing_can_be_monitored(tmp_path: Path) -> None:
    for callbacks in [CheckpointSaver(monitor="val/fid")], [CheckpointSaver(), EarlyStopping("val/d_loss")]:
        with pytest.raises(UsageError, match=r"does not measure it; there is no validation, see --trainer.limit_val_batches$"):
            fitted(tmp_path, Measures(fid=[1.0]), *callbacks, limit_val_batches=0)
    fitted(tmp_path, CheckpointSaver(), limit_val_batches=0)
    fitted(tmp_path, CheckpointSaver(), EarlyStopping("val/gone", strict=False), limit_val_batches=0)


def test_callback_of_ones_own_may_measure_anything(tmp_path: Path) -> None:
    class Own(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, gan: GAN) -> None:
            gan.log("val/mine", float(trainer.global_step))

    saver = CheckpointSaver(monitor="val/mine", mode="max")
    fitted(tmp_path, Own(), saver)
    assert saver.best_iteration == 3


def test_no_left_over_of_a_killed_write_stays(tmp_path: Path) -> None:
    (tmp_path / ".last.ckpt.4711").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint({"iteration": 5}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"iteration": 5}


def test_write_that_fails_says_why_and_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"iteration": 5}, target)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"last\.ckpt could not be written \(No space left on device\)") as caught:
        AtomicCheckpointIO().save_checkpoint({"iteration": 6}, target)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(target, weights_only=True) == {"iteration": 5}


def test_checkpoint_made_after_training_is_that_of_its_end(tmp_path: Path) -> None:
    first = trainer(tmp_path, CheckpointSaver(), max_epochs=2, enable_checkpointing=True)
    first.fit(tiny(), images(batches=3))
    first.save_checkpoint(tmp_path / "after.ckpt")
    paths = (tmp_path / "checkpoints" / "last.ckpt", tmp_path / "after.ckpt")
    last, after = (torch.load(path, weights_only=True) for path in paths)
    assert after["loops"] == last["loops"]
    longer = trainer(tmp_path / "longer", CheckpointSaver(), max_epochs=3, enable_checkpointing=True)
    longer.fit(tiny(), images(batches=3), ckpt_path=paths[1])
    assert (longer.global_step, longer.current_epoch) == (9, 3)


def test_ranks_on_gpus_ask_seldom_after_an_iteration_but_always_in_a_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def all_gather(own: torch.Tensor) -> torch.Tensor:
        asked.append(own)
        return torch.tensor([[0, 0], [signal.SIGTERM, 0]])

    monkeypatch.setattr(distributed, "all_gather", all_gather)
    trainer: Any = SimpleNamespace(world_size=2, sanity_checking=False, state=SimpleNamespace(fn="fit"), fast_dev_run=True)
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer.enable_validation, trainer.check_val_every_n_epoch, trainer.current_epoch = False, 1, 0
    gan: Any = SimpleNamespace(device=torch.device("meta"), total_iterations=1000)
    saver = CheckpointSaver()
    saver.setup(trainer, gan, "fit")
    for iteration in range(1, 10):
        trainer.global_step = iteration
        saver.on_train_batch_end(trainer, gan, None, None, iteration - 1)
    assert asked == []
    with pytest.raises(Stopped, match=str(128 + signal.SIGTERM)):
        saver.stop_if_asked(trainer)
    trainer.global_step = 10
    with pytest.raises(Stopped, match=str(128 + signal.SIGTERM)):
        saver.on_train_batch_end(trainer, gan, None, None, 9)
    assert len(asked) == 2


@pytest.mark.parametrize("ending", ["on_train_end", "on_exception"])
def test_signals_are_taken_for_training_alone_and_not_where_they_are_ignored(ending: str) -> None:
    trainer: Any = SimpleNamespace(global_step=0, current_epoch=0, callbacks=[])
    gan: Any = None
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    saver = CheckpointSaver()
    try:
        saver.on_train_start(trainer, gan)
        taken = {number for number in SIGNALS if signal.getsignal(number) != handlers[number]}
        assert taken == {signal.SIGINT, signal.SIGTERM}
        getattr(saver, ending)(trainer, gan, *([RuntimeError()] if ending == "on_exception" else []))
        assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_before_training_ends_the_run_with_its_status(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=str(128 + signal.SIGTERM)):
        trainer(tmp_path, Stop(), CheckpointSaver(), enable_checkpointing=True).fit(tiny(), images())


def test_training_outside_the_main_thread_takes_no_signals() -> None:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    trainer: Any = SimpleNamespace(global_step=0, current_epoch=0, callbacks=[])
    gan: Any = None
    failed: list[Exception] = []

    def train() -> None:
        try:
            CheckpointSaver().on_train_start(trainer, gan)
        except Exception as error:
            failed.append(error)

    thread = Thread(target=train)
    thread.start()
    thread.join()
    assert not failed
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
