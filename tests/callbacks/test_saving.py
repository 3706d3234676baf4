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
    trainer: Any = SimpleNamespace(global_step=0, current_epoch=0)
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
    trainer: Any = SimpleNamespace(global_step=0, current_epoch=0)
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
