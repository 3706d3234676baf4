"""Batches: which rows each rank sees and when, and two ways to get them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bngan.randomness import Stream, generator


class ShardedBatches:
    """The row numbers of each batch of this rank, a function of (seed, epoch) and the rank alone.

    In training the permutation's incomplete last batch is dropped; all ranks together see what one process with the same
    global batch would see, in the same order. In evaluation every row is seen once by exactly one rank.

    Args:
        num_rows: size of the data set.
        batch_size: rows in one batch, over all ranks together.
        train: whether to shuffle and to drop the incomplete last batch.
        seed: seed of the permutations.
        rank: this process's number.
        ranks: number of processes.
        parts: equal parts into which the reader cuts each batch; each part is dealt out to all ranks.
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
        self.epoch = 0
        self.position = (0, 0)  # epoch, batches of it already seen

    @property
    def sampler(self) -> "ShardedBatches":
        """Itself: behind a DataLoader the Trainer looks for set_epoch at batch_sampler.sampler alone."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.train:
            return self.num_rows // self.batch_size
        full, rest = divmod(self.num_rows, self.batch_size)
        # A rest with less than one row for each rank joins the batch before it: no rank may be left with nothing.
        return max(1, full + (rest >= self.ranks))

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.tensors():
            yield rows.tolist()

    def tensors(self) -> Iterator[Tensor]:
        """Yield the rows of each batch that is left of the epoch, int64 (n,)."""
        if not self.train:
            rows = torch.arange(self.num_rows)
            for number in range(len(self)):
                stop = self.num_rows if number == len(self) - 1 else (number + 1) * self.batch_size
                yield rows[number * self.batch_size + self.rank : stop : self.ranks]
            return
        order = torch.randperm(self.num_rows, generator=generator(self.seed, Stream.PERMUTATION, self.epoch))
        start = self.position[1] if self.position[0] == self.epoch else 0
        for number in range(start, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            yield batch.view(self.parts, self.ranks, -1)[:, self.rank].reshape(-1)


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
        self._seen = 0

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, start = self.batch_sampler.position
        self._seen = start if epoch == self.batch_sampler.epoch else 0
        for rows in self.batch_sampler.tensors():
            rows = rows.to(self.images.device)
            self._seen += 1
            yield to_unit_range(self.images.index_select(0, rows)), self.labels.index_select(0, rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data: the epoch and how many of its batches were given out."""
        return {"epoch": self.batch_sampler.epoch, "batches": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that place."""
        self.batch_sampler.position = (state["epoch"], state["batches"])
        self.batch_sampler.set_epoch(state["epoch"])
        self._seen = state["batches"]


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
        self._seen = 0

    def __iter__(self) -> Iterator[Any]:
        epoch, start = self.batches.position
        self._seen = start if epoch == self.batches.epoch else 0
        for batch in super().__iter__():
            self._seen += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the data: the epoch and how many of its batches were given out."""
        return {"epoch": self.batches.epoch, "batches": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that place."""
        self.batches.position = (state["epoch"], state["batches"])
        self.batches.set_epoch(state["epoch"])
        self._seen = state["batches"]


def to_unit_range(images: Tensor) -> Tensor:
    """Map images from uint8 0..255 to float32 [-1, 1]."""
    return images.to(torch.float32).div_(127.5).sub_(1)
