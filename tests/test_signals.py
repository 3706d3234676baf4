"""A run that is asked to stop stops, wherever the signal arrives, and can go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, only_run


def start(root: Path, cwd: Path, *settings: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), "fit", f"--data.root={root}"]
    quiet = ("--metrics.num_samples=0", "--trainer.accelerator=cpu", "--trainer.max_epochs=1000")
    return subprocess.Popen(
        [*command, *quiet, *settings],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def members(session: int) -> list[int]:
    """Return the processes of a session, its leader first."""
    listed = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True, check=False)
    return sorted(int(pid) for pid in listed.stdout.split())


def wait_for_training(folder: Path) -> None:
    for _ in range(600):
        if list(folder.glob("runs/*/*/samples/iteration-000005.png")):
            return
        time.sleep(0.1)
    raise AssertionError("training did not start")


@pytest.mark.parametrize(
    ("devices", "target", "number"),
    [(1, "leader", signal.SIGTERM), (1, "leader", signal.SIGINT), (2, "child", signal.SIGTERM), (2, "all", signal.SIGINT)],
)
def test_signal_stops_every_process_with_a_checkpoint(
    devices: int, target: str, number: signal.Signals, mnist_root: Path, tmp_path: Path
) -> None:
    process = start(mnist_root, tmp_path, f"--trainer.devices={devices}", "--images.every_n_iterations=5")
    try:
        wait_for_training(tmp_path)
        running = members(process.pid)
        assert len(running) >= devices
        sent = time.monotonic()
        for pid in {"leader": [process.pid], "child": running[-1:], "all": running}[target]:
            os.kill(pid, number)
        _, errors = process.communicate(timeout=15)
        while members(process.pid) and time.monotonic() - sent < 15:
            time.sleep(0.1)
        assert members(process.pid) == []
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 128 + number
    assert "stopped at iteration" in errors
    assert "Traceback" not in errors
    content = torch.load(only_run(tmp_path / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    assert f"stopped at iteration {int(content['state_dict']['iteration'])};" in errors
