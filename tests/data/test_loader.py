"""Which rows each rank sees and when, and the loaders that read them."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from bngan import distributed
from bngan.data.loader import PictureLoader, ShardedBatches, TensorLoader
from bngan.errors import UsageError

Loader = TensorLoader | PictureLoader


def chained(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def sharded(num_rows: int, batch_size: int, *, train: bool, ranks: int, epoch: int = 0, seed: int = 0) -> list[list[list[int]]]:
    """For each rank its batches of row numbers."""
    found = []
    for rank in range(ranks):
        batches = ShardedBatches(num_rows, batch_size, train=train, seed=seed, rank=rank, ranks=ranks)
        batches.set_epoch(epoch)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_train_on_what_one_process_would(ranks: int) -> None:
    (alone,) = sharded(100, 24, train=True, ranks=1)
    together = sharded(100, 24, train=True, ranks=ranks)
    for number, batch in enumerate(alone):
        assert [batches[number] for batches in together] == [batch[rank::ranks] for rank in range(ranks)]
    assert len(alone) == 4


@pytest.mark.parametrize("n_critic", [1, 3])
def test_each_update_of_the_ranks_together_is_on_the_images_of_one_process(n_critic: int) -> None:
    """A batch is cut into one part for each update of D, on each rank by itself."""
    (alone,) = sharded(100, 8 * n_critic, train=True, ranks=1)
    together = sharded(100, 8 * n_critic, train=True, ranks=4)
    whole = torch.tensor(alone[0]).chunk(n_critic)
    shares = [torch.tensor(batches[0]).chunk(n_critic) for batches in together]
    for update in range(n_critic):
        assert sorted(chained(share[update].tolist() for share in shares)) == sorted(whole[update].tolist())


def test_rows_are_dealt_out_as_noise_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image and the noise for it meet on the same rank only if both are dealt in the same way."""
    whole = torch.tensor(sharded(100, 24, train=True, ranks=1)[0][0])
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for rank, (batch, *_) in enumerate(sharded(100, 24, train=True, ranks=4)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert distributed.shard(whole).tolist() == batch
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: (rank + 1) % 4)
        assert distributed.shard(whole).tolist() != batch


@pytest.mark.parametrize(("num_rows", "batch_size", "ranks"), [(100, 24, 1), (101, 24, 4), (7, 4, 2), (50, 7, 4)])
def test_evaluation_sees_every_row_once_even_where_sizes_do_not_divide(num_rows: int, batch_size: int, ranks: int) -> None:
    found = sharded(num_rows, batch_size, train=False, ranks=ranks)
    assert sorted(row for batches in found for batch in batches for row in batch) == list(range(num_rows))
    assert len({len(batches) for batches in found}) == 1  # or a rank would wait for another for ever
    alone = sharded(num_rows, batch_size, train=False, ranks=1)[0]
    assert chained(alone) == list(range(num_rows))


def test_training_drops_the_incomplete_last_batch_alone() -> None:
    for num_rows, count in ((96, 4), (100, 4), (119, 4), (120, 5)):
        (batches,) = sharded(num_rows, 24, train=True, ranks=1)
        assert [len(batch) for batch in batches] == [24] * count
        rows = chained(batches)
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(num_rows))
    missing = [set(range(100)) - set(chained(sharded(100, 24, train=True, ranks=1, epoch=epoch)[0])) for epoch in (0, 1)]
    assert missing[0] != missing[1]  # other rows are left out each time


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(epoch: int, seed: int) -> list[list[int]]:
        torch.randn(7)
        return sharded(100, 10, train=True, ranks=1, epoch=epoch, seed=seed)[0]

    assert order(epoch=3, seed=5) == order(epoch=3, seed=5)
    orders = [order(epoch, seed) for epoch in range(3) for seed in range(3)]
    assert all(one != other for number, one in enumerate(orders) for other in orders[:number])
    assert all(sorted(chained(batches)) == list(range(100)) for batches in orders)
    assert chained(orders[0]) != list(range(100))


def test_too_few_rows_for_a_batch_are_refused() -> None:
    with pytest.raises(UsageError, match=r"a batch of 24 images needs as many, but there are 23; lower --data.batch_size"):
        ShardedBatches(23, 24, train=True)
    assert len(ShardedBatches(24, 24, train=True)) == 1
    assert len(ShardedBatches(23, 24, train=False)) == 1


@pytest.mark.parametrize(("rows", "ranks"), [(101, 2), (100, 2), (50, 4), (203, 4), (5, 4)])
def test_no_rank_is_left_without_rows_in_evaluation(rows: int, ranks: int) -> None:
    shares = [list(ShardedBatches(rows, 50, train=False, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert all(len(batch) > 0 for share in shares for batch in share)
    assert {len(share) for share in shares} == {len(ShardedBatches(rows, 50, train=False, ranks=ranks))}
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(rows))
    with pytest.raises(UsageError, match="cannot be shared"):
        ShardedBatches(ranks - 1, 50, train=False, ranks=ranks)


def test_an_epochs_rows_go_to_the_images_device_at_once() -> None:
    batches = ShardedBatches(40, 8, train=True, seed=1)
    rows = list(batches.rows())
    assert [some.tolist() for some in rows] == list(batches)
    assert len({some.untyped_storage().data_ptr() for some in rows}) == 1, "cut out of one tensor"
    assert {some.device.type for some in batches.rows("meta")} == {"meta"}
    images, labels = torch.zeros(40, 1, 2, 2, dtype=torch.uint8), torch.zeros(40, dtype=torch.long)
    loader = TensorLoader(images.to("meta"), labels.to("meta"), batches)
    assert {(images.device.type, labels.device.type) for images, labels in loader} == {("meta", "meta")}


class Numbered(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Pictures whose every pixel is their number."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), index, dtype=torch.uint8), index % 3


def loader_of(kind: str, *, train: bool = True) -> Loader:
    batches = ShardedBatches(40, 8, train=train, seed=1)
    if kind == "tensor":
        rows = [Numbered()[index] for index in range(40)]
        return TensorLoader(torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows]), batches)
    return PictureLoader(Numbered(), batches, num_workers=int(kind))


def seen(batch: Any) -> tuple[list[int], list[int]]:
    """Numbers of the pictures in a batch of either loader, and their labels."""
    images, labels = batch
    numbers = images if images.dtype == torch.uint8 else ((images + 1) * 127.5).round()
    return numbers[:, 0, 0, 0].int().tolist(), labels.tolist()


KINDS = [pytest.param("tensor", id="in_memory"), pytest.param("0", id="no_worker"), pytest.param("1", id="one_worker")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_gives_the_rows_of_its_batches_with_their_labels(kind: str) -> None:
    for train in (True, False):
        loader = loader_of(kind, train=train)
        rows = list(ShardedBatches(40, 8, train=train, seed=1))
        assert len(loader) == len(rows) == 5
        assert [seen(batch) for batch in loader] == [(batch, [row % 3 for row in batch]) for batch in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_continues_in_the_middle_of_an_epoch(kind: str) -> None:
    original = loader_of(kind)
    original.batches.set_epoch(2)
    running = iter(original)
    before = [seen(next(running)) for _ in range(3)]
    state = original.state_dict()
    assert state == {"epoch": 2, "batches": 3, "rows": 40}
    rest = [seen(batch) for batch in running]

    resumed = loader_of(kind)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # a run that ends before its first batch must not lose its place
    resumed.batches.set_epoch(2)
    running = iter(resumed)
    first = seen(next(running))
    assert resumed.state_dict() == {"epoch": 2, "batches": 4, "rows": 40}
    assert [first, *(seen(batch) for batch in running)] == rest
    assert len(rest) == 2
    assert rest != before[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_loader_starts_the_next_epoch_at_its_beginning(kind: str) -> None:
    original, resumed = loader_of(kind), loader_of(kind)
    resumed.load_state_dict({"epoch": 2, "batches": 3})
    resumed.batches.set_epoch(2)
    assert len(list(resumed)) == 2
    for loader in (original, resumed):
        loader.batches.set_epoch(3)
    whole = [seen(batch) for batch in resumed]
    assert whole == [seen(batch) for batch in original]
    assert len(whole) == 5
    assert resumed.state_dict() == {"epoch": 3, "batches": 5, "rows": 40}


def test_a_place_in_a_checkpoint_of_an_older_version_is_found() -> None:
    resumed = loader_of("tensor")
    resumed.load_state_dict({"epoch": 2, "batches": 3, "group": 4})
    assert resumed.state_dict() == {"epoch": 2, "batches": 3, "rows": 40}
    assert len(list(resumed)) == 2


def test_another_number_of_pictures_is_said_when_a_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    for rows, said in ((40, ""), (39, "There are 40 images to train with, and were 39 in the run\n")):
        loader_of("tensor").load_state_dict({"epoch": 2, "batches": 3, "rows": rows})
        assert capsys.readouterr().out == said


class Recorder(LightningModule):
    """Notes which pictures a Trainer shows it in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.epochs: list[list[list[int]]] = []
        self.held_out: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.epochs[-1].append(seen(batch)[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.held_out.append(seen(batch)[0])

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_shows_the_pictures_of_each_epoch_in_an_order_of_its_own(kind: str) -> None:
    recorder = Recorder()
    trainer = Trainer(max_epochs=3, accelerator="cpu", barebones=True, use_distributed_sampler=False)
    trainer.fit(recorder, train_dataloaders=loader_of(kind))
    trainer.validate(recorder, loader_of(kind, train=False))
    expected = [sharded(40, 8, train=True, ranks=1, seed=1, epoch=epoch)[0] for epoch in range(3)]
    assert recorder.epochs == expected
    assert expected[0] != expected[1] != expected[2]
    assert list(chain.from_iterable(recorder.held_out)) == list(range(40))
