"""Each strategy that trains gives, through the command, the weights that one process gives."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import Command, only_run

FLAGS = (
    "--trainer.accelerator=cpu",
    "--trainer.precision=64-true",
    "--trainer.max_steps=4",
    "--trainer.limit_val_batches=0",
    "--metrics.num_samples=0",
)
Weights = dict[str, Tensor]


def trained(train: Command, root: Path, folder: Path, *flags: str) -> Weights:
    done = train("fit", *FLAGS, *flags, f"--data.root={root}", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    content = torch.load(only_run(folder / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    assert int(content["state_dict"]["iteration"]) == 4
    return content["state_dict"]


@pytest.fixture(scope="module")
def alone(train: Command, mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return trained(train, mnist_root, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_notebook"])
def test_strategy_gives_the_weights_of_one_process(
    strategy: str, alone: Weights, train: Command, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    together = trained(train, mnist_root, tmp_path, "--trainer.devices=2", f"--trainer.strategy={strategy}")
    assert together.keys() == alone.keys()
    apart = max(float((together[name].double() - alone[name].double()).abs().max()) for name in alone)
    # They are not the same run, only the same sums in another order.
    assert 0 < apart < 1e-9
