"""Batches: which rows each rank sees and when, and two ways to get them."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bngan.distributed import print0
from bngan.errors import UsageError
from bngan.images import to_minus1_1
from bngan.rng import Stream, generator

Batch = TypeVar("Batch")


class ShardedBatches:
    """The row numbers of each batch on this rank, a function of (seed, epoch) and the rank alone.

    Rank r of R has the rows [r::R] of each global batch. In training the permutation's incomplete last batch is dropped: all
    ranks together see what one process would, in the same order. In evaluation every row is seen once, by exactly one rank.

    Args:
        num_rows: size of the data set.
        batch_size: rows in one global batch; in training a multiple of `ranks`.
        train: whether to shuffle and to drop the incomplete last batch.
        seed: seed of the permutations.
        rank: this process's number.
        ranks: number of processes.

    Raises:
        UsageError: if there are too few rows for one batch in training, or for one row on each rank in evaluation.
    """

    def __init__(self, num_rows: int, batch_size: int, *, train: bool, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        if train and num_rows < batch_size:
            raise UsageError(f"a batch of {batch_size} images needs as many, but there are {num_rows}; lower --data.batch_size")
        if not train and num_rows < ranks:
            raise UsageError(f"{num_rows} images cannot be shared by {ranks} devices; use fewer --trainer.devices")
        self.num_rows, self.batch_size, self.train, self.seed = num_rows, batch_size, train, seed
        self.rank, self.ranks = rank, ranks
        self.epoch = 0
        self._resumed = (0, 0)  # an epoch, and the batches of it that were given out before this process began
        self._given_out = 0

    @property
    def sampler(self) -> "ShardedBatches":
        """Itself: the Trainer looks for set_epoch at a loader's batch_sampler.sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        full, rest = divmod(self.num_rows, self.batch_size)
        if self.train:
            return full
        # A rest with less than one row for each rank joins the batch before it: no rank may be left with nothing.
        return max(1, full + (rest >= self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.rows():
            yield rows.tolist()

    def rows(self, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """Yield this rank's rows of each batch that is left of the epoch, int64 (n,), cut out of one tensor on the device."""
        if self.train:
            order = torch.randperm(self.num_rows, generator=generator(self.seed, Stream.PERMUTATION, self.epoch))
            order = order[: len(self) * self.batch_size]
        else:
            order = torch.arange(self.num_rows)
        order = order.to(device)
        for number in range(self._first, len(self)):
            stop = len(order) if number == len(self) - 1 else (number + 1) * self.batch_size
            yield order[number * self.batch_size + self.rank : stop : self.ranks]

    def counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass on what a loader makes of the rows; state_dict tells how many batches of the epoch were given out."""
        self._given_out = self._first
        for batch in batches:
            self._given_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data: the epoch, how many of its batches were given out, and how many rows there are."""
        return {"epoch": self.epoch, "batches": self._given_out, "rows": self.num_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that place, and say so if there are not as many rows now, as when pictures were added."""
        if (rows := state.get("rows", self.num_rows)) != self.num_rows:
            print0(f"There are {self.num_rows} images to train with, and were {rows} in the run")
        self._resumed = state["epoch"], state["batches"]
        self._given_out = state["batches"]
        self.set_epoch(state["epoch"])

    @property
    def _first(self) -> int:
        """Number of the batch with which the epoch begins here."""
        epoch, batches = self._resumed
        return batches if epoch == self.epoch else 0


class _Resumable:
    """A loader that tells its place in the data and goes on from one, as the Trainer's checkpoints ask it to."""

    batches: ShardedBatches

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that place."""
        self.batches.load_state_dict(state)


class TensorLoader(_Resumable):
    """Batches cut out of one uint8 tensor, which may live on the accelerator: no workers, no copying, no waiting.

    Yields (images in [-1, 1] (n, C, H, W), labels (n,)).

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        batches: which rows, and when.
    """

    def __init__(self, images: Tensor, labels: Tensor, batches: ShardedBatches) -> None:
        self.images, self.labels = images, labels
        self.batches = self.batch_sampler = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # The rows go to the images' device once an epoch, or each batch would wait for a copy.
        return self.batches.counted(self._read(rows) for rows in self.batches.rows(self.images.device))

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return to_minus1_1(self.images.index_select(0, rows)), self.labels.index_select(0, rows)


class PictureLoader(_Resumable, DataLoader):
    """Batches of pictures too many to hold in memory, read by worker processes.

    Yields (images uint8 (n, C, H, W), labels (n,)); the data module brings the images to [-1, 1] on the device.
    """

    def __init__(self, dataset: Dataset, batches: ShardedBatches, num_workers: int) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            persistent_workers=False,
            pin_memory=torch.cuda.is_available(),
        )
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        # The workers must not start before the first batch is asked for: only then is the epoch known.
        try:
            yield from self.batches.counted(super().__iter__())
        except UsageError as error:  # torch puts the worker's whole traceback before what it says
            raise UsageError(str(error).rpartition("UsageError: ")[2].strip()) from error
