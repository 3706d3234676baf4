"""What several test files need: one copy of the data set, and the command line as a person uses it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bngan.data import mnist

REPOSITORY = Path(__file__).parents[1]
# A few iterations of a run, measured by few samples: for tests that look at the machinery, not at the digits.
QUICK = ("--trainer.max_steps=10", "--metrics.num_samples=200", "--trainer.accelerator=cpu")

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Undo what Lightning sets for ranks, or the next run that a test starts would take itself for one of them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds MNIST."""
    root = tmp_path_factory.mktemp("data")
    mnist.lay_out(root)
    return root


@pytest.fixture(scope="session")
def train() -> Command:
    """Run `python scripts/train.py ...` in a folder, as a subprocess."""

    def run(*arguments: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)

    return run


def only_run(root: Path) -> Path:
    """Return the folder of the only run under a default_root_dir."""
    (folder,) = (path for path in root.glob("*/*") if path.is_dir())
    return folder
