"""A file is there as a whole or not at all, also on systems that lack what Unix has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bngan.errors import UsageError
from bngan.files import expand_home, write_whole
from tests.conftest import only_run

# What Windows does not have.
ABSENT = """
import os, signal, sys
for name in ("fork", "forkpty", "fchmod", "fchown", "killpg", "setsid", "O_DIRECTORY", "sched_getaffinity"):
    delattr(os, name)
for name in ("SIGHUP", "SIGPIPE"):
    delattr(signal, name)
sys.modules |= dict.fromkeys(("resource", "fcntl", "grp"))
from bngan.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("folders_open", [True, False])
def test_file_is_replaced_as_a_whole(folders_open: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not folders_open:
        monkeypatch.delattr(os, "O_DIRECTORY")
    path = tmp_path / "new" / "file"
    write_whole(path, b"one")
    write_whole(path, memoryview(b"two"))
    assert path.read_bytes() == b"two"

    def fail(*_: object) -> None:
        raise OSError("no such luck")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no such luck"):
        write_whole(path, b"three")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_run_and_its_stop_need_nothing_that_windows_lacks(mnist_root: Path, tmp_path: Path) -> None:
    words = (
        "fit",
        "--trainer.max_steps=3",
        "--trainer.accelerator=cpu",
        "--metrics.num_samples=0",
        f"--data.root={mnist_root}",
    )
    command = [sys.executable, "-c", ABSENT, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert (only_run(tmp_path / "runs") / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize("path", ["$HOME/runs", "${HOME}/runs", "runs/$HOME"])
def test_variable_of_the_shell_is_no_part_of_a_path(path: str) -> None:
    # Lightning's TensorBoard logger would look it up, and the rest of the run would lie in a folder of that name
    with pytest.raises(UsageError, match="names a variable of the shell; write out what it stands for"):
        expand_home(path)
    assert expand_home("US$ and $undefined_9") == "US$ and $undefined_9"
