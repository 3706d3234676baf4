"""Each strategy that trains gives, through the command, the weights that one process gives."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bngan.cli import main
from tests.conftest import Command, only_run

FLAGS = (
    "--trainer.accelerator=cpu",
    "--trainer.precision=64-true",
    "--trainer.max_steps=4",
    "--trainer.limit_val_batches=0",
    "--metrics.num_samples=0",
)
Weights = dict[str, Tensor]


def weights(folder: Path) -> Weights:
    content = torch.load(only_run(folder / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    assert int(content["state_dict"]["iteration"]) == 4
    return content["state_dict"]


@pytest.fixture(scope="module")
def alone(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("alone")
    assert main(["fit", *FLAGS, f"--data.root={mnist_root}", f"--trainer.default_root_dir={folder / 'runs'}"]) == 0
    return weights(folder)


# That two processes are started without being asked for by a strategy's name, test_command_line.py shows as well.
@pytest.mark.parametrize("strategy", [pytest.param("auto", marks=pytest.mark.slow), "ddp", "ddp_notebook"])
def test_strategy_gives_the_weights_of_one_process(
    strategy: str, alone: Weights, train: Command, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks = ("--trainer.devices=2", f"--trainer.strategy={strategy}")
    done = train("fit", *FLAGS, *ranks, f"--data.root={mnist_root}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    together = weights(tmp_path)
    assert together.keys() == alone.keys()
    apart = max(float((together[name].double() - alone[name].double()).abs().max()) for name in alone)
    # They are not the same run, only the same sums in another order.
    assert 0 < apart < 1e-9
