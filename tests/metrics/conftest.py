"""The same random features in every run, and the held-out digits."""

from pathlib import Path

import pytest
import torch

from bngan.data.datasets import DATASETS, Labelled


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits(mnist_root: Path) -> Labelled:
    """The 10,000 held-out digits."""
    return DATASETS["mnist"].load(mnist_root, train=False)
