"""The front door: help at once, each command by its name, and what went wrong told by a line and a status."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import DistNetworkError, DistStoreError
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from bngan import __version__
from bngan.cli import TRAINER_COMMANDS, main
from bngan.commands import COMMANDS, Command, Parser
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
        for command in (*TRAINER_COMMANDS, *COMMANDS):
            assert f"bngan {command} " in told
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bngan {__version__}\n"


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
def test_help_tells_options_and_settings_and_the_rest_is_elsewhere(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    for word in (
        "--config",
        "--ckpt_path",
        "--override",
        "--help.all",
        "best_mlp",
        "dcgan",
        "batching: joint",
        "max_epochs: 20",
    ):
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


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["study", "--help"], ["--version"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "bngan", *arguments], cwd=REPOSITORY, capture_output=True, check=True)
    assert done.stdout
    assert time.monotonic() - start < 2.0  # loading torch alone takes longer


# What went wrong ----------------------------------------------------------------------------------------------------------

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes. Error code 12"
ARRAY_MEMORY = type("_ArrayMemoryError", (MemoryError,), {})("Unable to allocate 7.28 TiB for an array")
FORKED = '-- Process 0 ...\n  File "a.py", line 1, in b\n    raise MemoryError\n  File "b.py", line 1, in c\n    c()\n'
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
    "an array's memory": (ARRAY_MEMORY, 2, "--data.batch_size"),
    "an overflow of memory": (RuntimeError("Storage size calculation overflowed with sizes=[1000]"), 2, "--model.hidden_dim"),
    "C++'s memory": (RuntimeError("std::bad_alloc"), 2, "--data.batch_size"),
    "a Mac's memory": (RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"), 2, "--data.batch_size"),
    "a library's memory": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 2, "--data.batch_size"),
    "shared memory": (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), 2, "--data.num_workers"),
    "a worker killed": (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. "), 2, "--data.num_workers"),
    "a worker gone": (RuntimeError("DataLoader worker (pid(s) 1, 2) exited unexpectedly"), 2, "--data.num_workers"),
    "no more processes": (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 2, "--data.num_workers"),
    "no more files": (OSError(errno.EMFILE, "Too many open files"), 2, "Too many open files; lower --data.num_workers"),
    "a right": (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b: Permission denied"),
    "a disk that is read only": (OSError(errno.EROFS, "Read-only file system", "a/b"), 2, "a/b: Read-only file system"),
    "a port": (DistNetworkError("failed to listen. port: 29500, code: -98, name: EADDRINUSE"), 2, "port 29500 is taken"),
    "others that never came": (DistStoreError("Timed out after 9 seconds waiting for clients."), 1, "MASTER_ADDR"),
    "others that are nowhere": (DistNetworkError("The client socket has timed out after 9000ms"), 1, "MASTER_ADDR"),
    "a forked rank's mistake": (
        ProcessRaisedException(f"{FORKED}bngan.errors.UsageError: lower it", 0, 1),
        2,
        "error: lower it",
    ),
    "a forked rank's defect": (ProcessRaisedException(f"{FORKED}TypeError: odd", 0, 1), 1, None),
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

    def broken(parser: Parser, arguments: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "sample", Command("", broken))
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
    def stopped(parser: Parser, arguments: list[str]) -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "doctor", Command("", stopped))
    assert main(["doctor"]) == status
    assert capsys.readouterr().err == ""


# Paths and terminals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["sample"], ["doctor"], *([name, "--ckpt_path"] for name in TRAINER_COMMANDS)])
def test_one_checkpoint_is_taken_where_the_shell_gives_several(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("new", "old")):
        path = Path("runs/mnist") / name / "checkpoints" / "best.ckpt"
        path.parent.mkdir(parents=True)
        path.write_text("a checkpoint")
        os.utime(path, (2000 - number, 2000 - number))
    given = ["runs/mnist/old/checkpoints/best.ckpt", "runs/mnist/new/checkpoints/best.ckpt"]
    star = "runs/mnist/*/checkpoints/best.ckpt"
    joined = [[*command[:-1], f"--ckpt_path={star}"]] if command[-1] == "--ckpt_path" else []
    for words in ([*command, *given], [*command, star], *joined):
        assert main(words) == 2
        told = capsys.readouterr().err.splitlines()
        assert told[0] == f"bngan: error: 2 checkpoints or runs given, name one; the newest is {given[1]}"
        assert len(told) == 2


def test_terminal_that_is_closed_or_knows_ascii_alone_is_no_defect(tmp_path: Path) -> None:
    run = f"{sys.executable} -m bngan sample {OLD} --num 1 --output"
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    environment = {**plain, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(REPOSITORY)}
    script = f"{run} bär.png; {run} closed.png >&- 2>&-"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert rb"written to b\xe4r.png" in done.stdout
    assert (tmp_path / "bär.png").is_file()
    assert (tmp_path / "closed.png").is_file()
