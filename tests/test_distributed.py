"""What ranks tell one another, in one process and in three."""

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch import multiprocessing as processes

from bngan.distributed import (
    all_gather,
    all_reduce,
    average_buffers,
    average_gradients,
    mean_over_ranks,
    print0,
    rank,
    shard,
    total,
    unshard,
    world_size,
)

RANKS = 3
LENGTHS = (0, 1, 2, 3, 7, 9)


def rows_of(length: int) -> Tensor:
    return torch.arange(length * 2, dtype=torch.float64).reshape(length, 2)


def layer_of(number: int) -> nn.Sequential:
    """A layer whose gradients and buffers are multiples of a rank's number, one of its weights without a gradient."""
    linear, norm = nn.Linear(2, 3), nn.BatchNorm1d(3, eps=1e-5, momentum=0.1)
    linear.weight.grad, norm.bias.grad = torch.full((3, 2), 1.0 + number), torch.full((3,), 10.0 * number)
    for buffer in norm.buffers():
        buffer.fill_(number)
    return nn.Sequential(linear, norm)


def work(number: int, folder: str) -> None:
    """Do on one of the ranks what the tests look at, and write down what came of it."""
    distributed.init_process_group("gloo", store=distributed.FileStore(f"{folder}/store", RANKS), rank=number, world_size=RANKS)
    own, leaf, layer = torch.tensor([float(number), 1.0]), torch.tensor(float(number), requires_grad=True), layer_of(number)
    mean = mean_over_ranks(leaf)
    ((number + 1) * mean).backward()
    average_gradients([*layer.parameters()])
    average_buffers(layer)
    found = {
        "who": (rank(), world_size()),
        "shards": [shard(rows_of(length)) for length in LENGTHS],
        "unsharded": [unshard(shard(rows_of(length))) for length in LENGTHS],
        "gathered": all_gather(own),
        "sum": all_reduce(own),
        "own": own,
        "mean": mean.detach(),
        "gradient": leaf.grad,
        "total": total(number + 1),
        "gradients": [parameter.grad for parameter in layer.parameters()],
        "buffers": dict(layer.named_buffers()),
    }
    torch.save(found, f"{folder}/{number}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of it on each of three ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    processes.spawn(work, args=(str(folder),), nprocs=RANKS)  # pyright: ignore[reportPrivateImportUsage]
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(RANKS)]


def test_a_process_alone_is_rank_0_of_1_and_has_everything() -> None:
    assert (rank(), world_size()) == (0, 1)
    rows, layer = rows_of(7), layer_of(2)
    assert torch.equal(shard(rows), rows)
    assert torch.equal(unshard(rows), rows)
    assert torch.equal(all_gather(rows), rows[None])
    assert torch.equal(all_reduce(rows), rows)
    assert torch.equal(mean_over_ranks(rows), rows)
    assert total(7) == 7
    average_gradients([*layer.parameters()])
    average_buffers(layer)
    assert [parameter.grad is None for parameter in layer.parameters()] == [False, True, True, False]
    assert all(
        parameter.grad.unique().tolist() in ([3.0], [20.0]) for parameter in layer.parameters() if parameter.grad is not None
    )
    assert all(buffer.unique().tolist() == [2] for buffer in layer.buffers())


def test_ranks_know_who_they_are(results: list[dict[str, Any]]) -> None:
    assert [result["who"] for result in results] == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("length", LENGTHS)
def test_ranks_deal_out_rows_in_turn_and_put_them_together_again(length: int, results: list[dict[str, Any]]) -> None:
    place, rows = LENGTHS.index(length), rows_of(length)
    for number, result in enumerate(results):
        assert torch.equal(result["shards"][place], rows[number::RANKS])
        assert torch.equal(result["unsharded"][place], rows)


def test_tensors_are_gathered_by_rank_and_added_up_and_stay_what_they_are(results: list[dict[str, Any]]) -> None:
    for number, result in enumerate(results):
        assert result["gathered"].tolist() == [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
        assert result["sum"].tolist() == [3.0, 3.0]
        assert result["own"].tolist() == [number, 1.0]
        assert result["total"] == 1 + 2 + 3


def test_gradients_flow_back_through_the_mean_to_every_rank(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert float(result["mean"]) == 1.0
        assert float(result["gradient"]) == pytest.approx((1 + 2 + 3) / RANKS)  # each rank's loss counts


def test_gradients_and_floating_point_buffers_are_averaged(results: list[dict[str, Any]]) -> None:
    for number, result in enumerate(results):
        weight, bias, gamma, beta = result["gradients"]
        assert weight.tolist() == [[2.0, 2.0]] * 3
        assert beta.tolist() == [10.0] * 3
        assert bias is None
        assert gamma is None
        assert result["buffers"]["1.running_mean"].tolist() == [1.0] * 3
        assert int(result["buffers"]["1.num_batches_tracked"]) == number


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_together_have_every_row_once(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(48)
    monkeypatch.setattr("bngan.distributed.world_size", lambda: ranks)
    found = []
    for number in range(ranks):
        monkeypatch.setattr("bngan.distributed.rank", lambda number=number: number)
        found.append(shard(rows))
    assert [len(share) for share in found] == [48 // ranks] * ranks
    assert torch.equal(torch.stack(found, dim=1).flatten(end_dim=1), rows)


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "LOCAL_RANK"])
def test_rank_0_alone_prints(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    print0("once")
    assert capsys.readouterr().out == "once\n"
    for number, printed in ((0, "once\n"), (1, "")):  # before they have met
        monkeypatch.setenv(name, str(number))
        print0("once")
        assert capsys.readouterr().out == printed
