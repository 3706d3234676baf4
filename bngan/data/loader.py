"""Batches: which rows each rank sees and when, and two ways to get them."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bngan.randomness import Stream, generator

Step = TypeVar("Step")


class ShardedBatches:
    """The row numbers of each batch of this rank, a function of (seed, epoch) and the rank alone.

    In training the permutation's incomplete last batch is dropped; all ranks together see what one process with the same
    global batch would see, in the same order. In evaluation every row is seen once by exactly one rank.

    A training step may have several batches. Their rows follow one another, and an epoch's last step has those that are left.
    The place in the data is counted in batches all the same.

    Args:
        num_rows: size of the data set.
        batch_size: rows in one batch, over all ranks together.
        train: whether to shuffle and to drop the incomplete last batch.
        seed: seed of the permutations.
        rank: this process's number.
        ranks: number of processes.
        parts: equal parts into which the reader cuts each batch; each part is dealt out to all ranks.
        group: batches of one step in training.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        parts: int = 1,
        group: int = 1,
    ) -> None:
        if train and num_rows < batch_size:
            raise ValueError(f"a batch of {batch_size} images needs as many, but there are {num_rows}; lower --data.batch_size")
        if not train and num_rows < ranks:
            raise ValueError(f"{num_rows} images cannot be shared by {ranks} devices; use fewer --trainer.devices")
        if train and batch_size % (ranks * parts):
            raise ValueError(
                f"a batch of {batch_size} images cannot be shared equally by {ranks} devices in {parts} parts; change "
                f"--data.batch_size to a multiple of {ranks * parts}"
            )
        self.num_rows, self.batch_size, self.train, self.seed = num_rows, batch_size, train, seed
        self.rank, self.ranks, self.parts = rank, ranks, parts
        self.group = group if train else 1
        self.epoch = 0
        self._position = (0, 0)  # epoch, batches of it already seen where it was taken up
        self._seen = 0

    @property
    def sampler(self) -> "ShardedBatches":
        """Itself: behind a DataLoader the Trainer looks for set_epoch at batch_sampler.sampler alone."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    @property
    def num_batches(self) -> int:
        """Batches of a whole epoch."""
        if self.train:
            return self.num_rows // self.batch_size
        full, rest = divmod(self.num_rows, self.batch_size)
        # A rest with less than one row for each rank joins the batch before it: no rank may be left with nothing.
        return max(1, full + (rest >= self.ranks))

    @property
    def rows_at_once(self) -> int:
        """Rows of a batch on this rank; in evaluation a batch may have some more."""
        return max(1, self.batch_size // self.ranks)

    def __len__(self) -> int:
        return -(-self.num_batches // self.group)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.tensors():
            yield rows.tolist()

    def tensors(self) -> Iterator[Tensor]:
        """Yield the rows of each step that is left of the epoch, int64 (n,)."""
        if not self.train:
            rows = torch.arange(self.num_rows)
            for number in range(len(self)):
                stop = self.num_rows if number == len(self) - 1 else (number + 1) * self.batch_size
                yield rows[number * self.batch_size + self.rank : stop : self.ranks]
            return
        order = torch.randperm(self.num_rows, generator=generator(self.seed, Stream.PERMUTATION, self.epoch))
        share = self.batch_size // (self.parts * self.ranks)
        for first in range(self._start, self.num_batches, self.group):
            step = order[first * self.batch_size : min(first + self.group, self.num_batches) * self.batch_size]
            yield step.view(-1, self.ranks, share)[:, self.rank].reshape(-1)

    def counted(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Pass on what a loader makes of the steps' rows; state_dict tells how much of it was given out."""
        self._seen = self._start
        for step in steps:
            self._seen = min(self._seen + self.group, self.num_batches)
            yield step

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data: the epoch, how many of its batches were given out, and how many at a time."""
        return {"epoch": self.epoch, "batches": self._seen, "group": self.group}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that place.

        Raises:
            ValueError: if it lies within an epoch of other steps, which the Trainer has counted.
        """
        group = state.get("group", 1)
        if state["batches"] and group != self.group:
            raise ValueError(
                f"the checkpoint lies within an epoch of --data.alternations_per_step {group}, and here it is {self.group}; go "
                f"on with {group}, or from a checkpoint of an epoch's end"
            )
        self._position = (state["epoch"], state["batches"])
        self._seen = state["batches"]
        self.set_epoch(state["epoch"])

    @property
    def _start(self) -> int:
        return self._position[1] if self._position[0] == self.epoch else 0


class TensorLoader:
    """Batches cut out of one uint8 tensor, which may live on the accelerator: no workers, no copying, no waiting.

    Yields (images in [-1, 1] (n, C, H, W), labels (n,)).

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        batches: which rows, and when.
    """

    def __init__(self, images: Tensor, labels: Tensor, batches: ShardedBatches) -> None:
        self.images, self.labels = images, labels
        self.batch_sampler = batches

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batch_sampler.counted(self._read(rows.to(self.images.device)) for rows in self.batch_sampler.tensors())

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that place."""
        self.batch_sampler.load_state_dict(state)

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = torch.empty((len(rows), *self.images.shape[1:]), dtype=torch.float32, device=self.images.device)
        # A batch at a time, which stays in the processor's cache from one operation to the next.
        size = self.batch_sampler.rows_at_once
        for target, some in zip(images.split(size), rows.split(size), strict=True):
            to_unit_range(self.images.index_select(0, some), out=target)
        return images, self.labels.index_select(0, rows)


class PictureLoader(DataLoader):
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
        # The workers must not start before the first step is asked for: only then is the epoch known.
        yield from self.batches.counted(super().__iter__())

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that place."""
        self.batches.load_state_dict(state)


def to_unit_range(images: Tensor, out: Tensor | None = None) -> Tensor:
    """Map images from uint8 0..255 to float32 [-1, 1], into `out` if it is given."""
    return (images.to(torch.float32) if out is None else out.copy_(images)).div_(127.5).sub_(1)
