"""The front door: help at once, each command by its name, and what went wrong told by a line and a status."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import DistNetworkError
from torch.multiprocessing import ProcessExitedException

from bngan import __version__
from bngan.cli import OWN_COMMANDS, TRAINER_COMMANDS, main
from bngan.errors import NonFiniteLoss, UsageError
from tests.conftest import REPOSITORY

OLD = REPOSITORY / "tests" / "golden" / "0.1-mlp.ckpt"


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNGAN_TRACEBACK", raising=False)


# Help -------------------------------------------------------------------------------------------------------------------


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        told = capsys.readouterr().out
        assert len(told.splitlines()) < 20
        for command in (*TRAINER_COMMANDS, *OWN_COMMANDS):
            assert f"bngan {command} " in told
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bngan {__version__}\n"


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
def test_help_tells_options_and_settings_and_the_rest_is_elsewhere(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    for word in ("--config", "--ckpt_path", "--override", "--help.all", "best_mlp, dcgan", "batching: joint", "max_epochs: 20"):
        assert word in told
    assert ("--run ID" in told) == (command == "fit")
    assert main([command, "--help.all"]) == 0
    everything = capsys.readouterr().out
    for word in ("--model.batching", "--trainer.devices", "--checkpoint.monitor"):
        assert word in everything
    assert "--weights_only" not in everything


def test_reader_who_is_gone_is_no_defect() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "bngan", "fit", "--help"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["--version"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "bngan", *arguments], cwd=REPOSITORY, capture_output=True, check=True)
    assert done.stdout
    assert time.monotonic() - start < 2.0  # loading torch alone takes longer


# What went wrong ----------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes. Error code 12"
STATUSES: dict[str, tuple[BaseException, int, str | None]] = {
    # what a command raises, its status, and words of the line, or None for a traceback
    "a person's mistake": (UsageError("no such thing;\n  take another"), 2, "no such thing; take another"),
    "loss": (NonFiniteLoss("d_loss is nan at iteration 3"), 2, "d_loss is nan"),
    "memory": (MemoryError(), 2, "--data.batch_size"),
    "a GPU's memory": (OUT_OF_MEMORY, 2, "--data.batch_size"),
    "a processor's memory": (
        RuntimeError(f"[enforce fail at alloc_cpu.cpp:124] err == 0. {NO_MEMORY}"),
        2,
        "--data.batch_size",
    ),
    "disk": (OSError(errno.ENOSPC, "last.ckpt could not be written (No space left on device)"), 2, "No space left"),
    "quota": (OSError(errno.EDQUOT, "last.ckpt could not be written (Disk quota exceeded)"), 2, "quota exceeded"),
    "another rank": (RuntimeError("[gloo/pair.cc:81] Connection closed by peer [127.0.0.1]"), 1, "is gone (closed by peer)"),
    "another rank's store": (DistNetworkError("nobody listens"), 1, "is gone (DistNetworkError)"),
    "a forked rank": (ProcessExitedException("process 1 exited", 1, 4711, 1), 1, "is gone (ProcessExitedException)"),
    "a file": (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 1, None),
    "a value": (ValueError("shapes differ"), 1, None),
    "a library's complaint": (MisconfigurationException("training_step is missing"), 1, None),
    "a defect": (AssertionError("never"), 1, None),
    "a defect in a message": (ValueError("Connection closed by peer"), 1, None),
    "a defect that speaks of memory": (ValueError(NO_MEMORY), 1, None),
    "another of torch's errors": (RuntimeError("DefaultCPUAllocator: not enough hands"), 1, None),
}


@pytest.mark.parametrize("case", STATUSES)
def test_what_went_wrong_has_a_status_and_a_line_or_a_traceback(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, expected, words = STATUSES[case]

    def broken(_: list[str]) -> None:
        raise error

    monkeypatch.setattr("bngan.cli._sample", broken)
    assert main(["sample"]) == expected
    told = capsys.readouterr().err
    if words is None:
        assert "Traceback" in told
        return
    assert "Traceback" not in told
    assert told.startswith("bngan: error: ")
    assert len(told.splitlines()) == 2
    assert words in told
    monkeypatch.setenv("BNGAN_TRACEBACK", "1")
    assert main(["sample"]) == expected
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SystemExit(143), 143),
        (SystemExit(None), 0),
        (SystemExit("why"), 2),
        (KeyboardInterrupt(), 130),
        (ProcessExitedException("process 1 exited", 0, 4711, 143), 143),  # a forked rank that was asked to stop
    ],
)
def test_what_was_asked_to_stop_ends_without_a_word(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: list[str]) -> None:
        raise error

    monkeypatch.setattr("bngan.cli._doctor", stopped)
    assert main(["doctor"]) == status
    assert capsys.readouterr().err == ""


# Sampling -----------------------------------------------------------------------------------------------------------------


def test_samples_cannot_be_written_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    Path("occupied").write_text("a file")
    for output in ("occupied", "occupied/a.png", "occupied/a.npz"):
        assert main(["sample", str(OLD), "--num=1", f"--output={output}"]) == 2
        told = capsys.readouterr().err
        assert "occupied" in told
        assert "--output" in told
        assert len(told.splitlines()) <= 2
    assert main(["sample", str(OLD), "--num=1", "--output=new/folder/a.png"]) == 0
    assert Path("new/folder/a.png").is_file()


@pytest.mark.parametrize("device", ["abacus", "cuda:99", "meta:x"])
def test_devices_that_are_not_there_are_refused(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(OLD), "--num=1", f"--device={device}"]) == 2
    told = capsys.readouterr().err
    assert f"--device {device}" in told
    assert len(told.splitlines()) <= 2
