"""A run that is asked to stop stops, wherever the signal arrives, and can go on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bngan.callbacks.saving import SIGNALS
from bngan.cli import main
from tests.conftest import REPOSITORY, only_run

QUIET = ("--trainer.accelerator=cpu", "--trainer.max_epochs=1000")


def start(root: Path, cwd: Path, *settings: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, str(REPOSITORY / "scripts" / "train.py"), "fit", f"--data.root={root}"]
    return subprocess.Popen(
        [*command, *QUIET, *settings],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},  # for tests.integration.interruptions
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def members(session: int) -> list[int]:
    """Return the processes of a session, its leader first."""
    listed = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True, check=False)
    return sorted(int(pid) for pid in listed.stdout.split())


def children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def wait_for(folder: Path, pattern: str) -> None:
    for _ in range(900):
        if list(folder.glob(pattern)):
            return
        time.sleep(0.1)
    raise AssertionError(f"no {pattern} in {folder}")


def victims(process: subprocess.Popen[str], target: str) -> list[int]:
    running = members(process.pid)
    return {"leader": [process.pid], "child": running[-1:], "all": running}[target]


def wait_until_gone(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """Return what it printed, once it and all that it started are gone."""
    deadline = time.monotonic() + seconds
    output = process.communicate(timeout=seconds)
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members(process.pid) == []
    return output


def kill_all(process: subprocess.Popen[str]) -> None:
    for pid in members(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def assert_stopped_with_a_checkpoint(root: Path, errors: str) -> None:
    """Check that the only run told once at which iteration it stopped and how it goes on, and has a checkpoint of that."""
    run = only_run(root)
    iteration = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    ((told, folder),) = re.findall(r"^bngan: stopped at iteration (\d+); go on with --ckpt_path (.*)$", errors, re.MULTILINE)
    assert (int(told), Path(folder).parts[-3:]) == (iteration, run.parts[-3:])
    assert errors.count("stopped at iteration") == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_stops_a_run_with_its_status(
    number: signal.Signals, mnist_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = ("--trainer.callbacks+=tests.integration.interruptions.StopAfter", "--trainer.callbacks.iteration=5")
    where = (f"--data.root={mnist_root}", f"--trainer.default_root_dir={tmp_path / 'runs'}", "--metrics.num_samples=0")
    before = signal.signal(number, signal.SIG_DFL)  # SIGHUP is ignored where the tests are run by nohup
    try:
        assert main(["fit", *QUIET, *where, *stop, f"--trainer.callbacks.signum={number.value}"]) == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert_stopped_with_a_checkpoint(tmp_path / "runs", capfd.readouterr().err)


# That SIGTERM to one of two ranks stops both, those below show that stop the other rank first.
SLOW_SIGNALS = (
    *((1, "leader", number) for number in SIGNALS),
    *((2, target, signal.SIGTERM) for target in ("leader", "child")),
    *((2, "child", signal.SIGINT), (2, "all", signal.SIGHUP)),
)


@pytest.mark.parametrize(
    ("devices", "target", "number"),
    [(2, "all", signal.SIGINT), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_SIGNALS)],
)
def test_signal_stops_every_process_with_a_checkpoint(
    devices: int, target: str, number: signal.Signals, mnist_root: Path, tmp_path: Path
) -> None:
    more = (f"--trainer.devices={devices}", "--images.every_n_iterations=5")
    process = start(mnist_root, tmp_path, "--metrics.num_samples=0", *more)
    try:
        wait_for(tmp_path, "runs/*/*/samples/iteration-000005.png")
        assert len(members(process.pid)) >= devices
        for pid in victims(process, target):
            os.kill(pid, number)
        _, errors = wait_until_gone(process, seconds=15)
    finally:
        kill_all(process)
    assert process.returncode == 128 + number
    assert_stopped_with_a_checkpoint(tmp_path / "runs", errors)


def test_signal_stops_processes_that_were_forked_with_a_checkpoint(mnist_root: Path, tmp_path: Path) -> None:
    fork = ("--trainer.devices=2", "--trainer.strategy=ddp_notebook", "--images.every_n_iterations=5")
    process = start(mnist_root, tmp_path, "--metrics.num_samples=0", *fork)
    try:
        wait_for(tmp_path, "runs/*/*/samples/iteration-000005.png")
        (child,) = victims(process, "child")
        os.kill(child, signal.SIGTERM)
        _, errors = wait_until_gone(process, seconds=15)
    finally:
        kill_all(process)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert torch.load(only_run(tmp_path / "runs") / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] >= 5


def test_run_under_nohup_outlives_its_terminal(mnist_root: Path, tmp_path: Path) -> None:
    more = ("--metrics.num_samples=0", "--images.every_n_iterations=5")
    process = start(mnist_root, tmp_path, *more, prefix=("nohup",))
    try:
        wait_for(tmp_path, "runs/*/*/samples/iteration-000005.png")
        os.kill(process.pid, signal.SIGHUP)
        wait_for(tmp_path, "runs/*/*/samples/iteration-000100.png")
        os.kill(process.pid, signal.SIGTERM)
        _, errors = wait_until_gone(process, seconds=15)
    finally:
        kill_all(process)
    assert process.returncode == 143
    assert "stopped at iteration" in errors


@pytest.mark.parametrize("target", ["leader", "child"])
def test_signal_that_comes_while_a_rank_waits_for_another_is_not_lost(target: str, mnist_root: Path, tmp_path: Path) -> None:
    process = start(mnist_root, tmp_path, "--metrics.num_samples=0", "--trainer.devices=2", "--images.every_n_iterations=5")
    try:
        wait_for(tmp_path, "runs/*/*/samples/iteration-000005.png")
        (asked,) = victims(process, target)
        (still,) = victims(process, "child" if target == "leader" else "leader")
        os.kill(still, signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(asked, signal.SIGTERM)
        time.sleep(2.0)
        assert asked in members(process.pid)
        os.kill(still, signal.SIGCONT)
        _, errors = wait_until_gone(process, seconds=15)
    finally:
        kill_all(process)
    assert process.returncode == 143
    assert_stopped_with_a_checkpoint(tmp_path / "runs", errors)


def test_second_signal_ends_a_process_at_once(mnist_root: Path, tmp_path: Path) -> None:
    hang = ("--trainer.callbacks+=tests.integration.interruptions.Hang", "--trainer.callbacks.iteration=6")
    process = start(mnist_root, tmp_path, "--metrics.num_samples=0", "--images.every_n_iterations=5", *hang)
    try:
        wait_for(tmp_path, "runs/*/*/samples/iteration-000005.png")
        time.sleep(2.0)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(1.0)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=10) == -signal.SIGTERM
    finally:
        kill_all(process)


@pytest.mark.parametrize(("devices", "target"), [pytest.param(1, "leader", marks=pytest.mark.slow), (2, "child")])
def test_signal_does_not_wait_for_the_end_of_a_validation(devices: int, target: str, mnist_root: Path, tmp_path: Path) -> None:
    long = ("--metrics.num_samples=1000000", "--metrics.chunk=1000", "--trainer.limit_train_batches=6")
    every = ("--trainer.check_val_every_n_epoch=1", "--images.every_n_iterations=6", f"--trainer.devices={devices}")
    process = start(mnist_root, tmp_path, *long, *every)
    try:
        wait_for(tmp_path, "runs/*/*/samples/iteration-000006.png")
        time.sleep(2.0)
        for pid in victims(process, target):
            os.kill(pid, signal.SIGTERM)
        _, errors = wait_until_gone(process, seconds=15)
    finally:
        kill_all(process)
    assert process.returncode == 143
    assert "stopped at iteration 6;" in errors


@pytest.mark.parametrize("target", ["leader", "child"])
def test_rank_that_is_killed_takes_the_run_down(target: str, mnist_root: Path, tmp_path: Path) -> None:
    more = ("--trainer.devices=2", "--images.every_n_iterations=5")
    process = start(mnist_root, tmp_path, "--metrics.num_samples=0", *more)
    try:
        wait_for(tmp_path, "runs/*/*/samples/iteration-000005.png")
        for pid in victims(process, target):
            os.kill(pid, signal.SIGKILL)
        _, errors = wait_until_gone(process, seconds=30)
    finally:
        kill_all(process)
    assert process.returncode in ((1,) if target == "child" else (-signal.SIGKILL,))
    assert "another one of the run is gone" in errors or "stopped at iteration" in errors, errors
    assert "Traceback" not in errors


def test_killed_rank_is_missed_although_its_data_worker_lives_on(tmp_path: Path) -> None:
    for number in range(400):  # so many that a worker has still to read while the first ones are trained on
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16), dtype=np.uint8)
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    pictures = ("--data.name=folder", f"--data.folder={tmp_path / 'pictures'}", "--data.in_memory_gb=0", "--data.batch_size=4")
    more = ("--data.num_workers=1", "--trainer.devices=2", "--metrics.num_samples=0", "--images.every_n_iterations=5")
    process = start(tmp_path, tmp_path, *pictures, *more)
    try:
        wait_for(tmp_path, "runs/*/*/samples/iteration-000005.png")
        started = children(process.pid)
        (rank,) = (pid for pid in started if children(pid) and "train.py" in Path(f"/proc/{pid}/cmdline").read_text())
        workers = children(rank)
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        os.kill(rank, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        # The worker holds on to the rank's sockets, so the other rank hears nothing; Lightning's launcher ends it.
        assert process.poll() == -signal.SIGKILL
        assert set(workers) <= set(members(process.pid))
    finally:
        kill_all(process)


def test_loss_that_is_lost_on_one_rank_ends_the_run_as_on_a_single_one(
    mnist_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    callback = ("--trainer.callbacks+=tests.integration.interruptions.SpoilLoss", "--trainer.callbacks.iteration=7")
    spoil = ("--metrics.num_samples=0", *callback)
    assert main(["fit", *QUIET, *spoil, f"--data.root={mnist_root}", f"--trainer.default_root_dir={tmp_path / 'alone'}"]) == 2
    process = start(mnist_root, tmp_path, *spoil, "--trainer.devices=2")
    try:
        _, errors = wait_until_gone(process, seconds=100)
    finally:
        kill_all(process)
    assert process.returncode == 2, errors
    # The first of two sees it in the gradient, which is of both.
    for lost, said in (("g_loss", capfd.readouterr().err), ("g_grad_norm", errors)):
        assert said.count(f"bngan: error: {lost} is nan at iteration 7;") == 1
        assert "Traceback" not in said
        assert "is gone" not in said


def test_process_ends_some_seconds_after_the_one_that_started_it() -> None:
    watched = (
        "from bngan.distributed import end_with_parent; import os, time; "
        "end_with_parent(os.getppid(), grace=0.5); print('watches', flush=True); time.sleep(60)"
    )
    parent = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {watched!r}]).pid); sys.stdout.flush(); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process.stdout.readline() == "watches\n"
        time.sleep(3.0)
        assert child in members(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        _, errors = wait_until_gone(process, seconds=10)
    finally:
        kill_all(process)
    assert "the process that started it is gone" in errors


def test_process_ends_where_the_one_that_started_it_was_gone_before_it_looked() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    late = f"from bngan.distributed import end_with_parent; import time; end_with_parent({gone.pid}, grace=0.1); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 1
    assert "the process that started it is gone" in done.stderr
