"""The LightningDataModule: from a data set's name to batches of images in [-1, 1]."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule
from PIL import ImageColor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tv

from bngan import distributed
from bngan.data.datasets import CHUNK, DATASETS, Labelled
from bngan.data.loader import PictureLoader, ShardedBatches, TensorLoader
from bngan.data.pictures import OnDamaged, Pictures, PicturesPart
from bngan.distributed import print0
from bngan.errors import UsageError, check_at_least
from bngan.images import fitting, to_minus1_1
from bngan.rng import generator

Name = Literal["mnist", "fashion_mnist", "kmnist", "emnist_letters", "emnist_balanced", "emnist_digits", "folder"]
MAX_EVAL_BYTES = 256e6  # of the images of a batch of validation
SUBSET_SEED = 0


class ImageDataModule(LightningDataModule):
    """Images and labels, (N, C, H, W) in [-1, 1] and (N,), for training and held out.

    MNIST travels with the package; the other named sets are downloaded by torchvision; `folder` takes your own pictures.

    Args:
        name: mnist, fashion_mnist, kmnist, emnist_letters, emnist_balanced, emnist_digits or folder.
        root: folder for the named data sets' files.
        folder: folder of your own pictures, with or without subfolders, for name folder. A tenth of them is held out, or
            what is in its subfolders val and test where there are train and one of these.
        image_size: side of the square images; unset keeps the native size.
        channels: 1 for grey or 3 for colour, for name folder; unset takes colour if any picture has it.
        background: colour that is seen where your own pictures are transparent: white, #808080, or as Pillow knows them.
        on_damaged: what to do about pictures that cannot be read: refuse, which names them all, or skip.
        batch_size: images per update of a network, over all devices together.
        eval_batch_size: images per batch of validation, test and predict; fewer where they are large.
        num_workers: processes that read a folder too large to hold in memory.
        in_memory_gb: largest size, in GB, of all pictures of a folder together that are held in memory, on the accelerator
            where they fit.
        predict_samples: how many images predict makes.
        seed: seed of the training order.
        n_critic: updates of D in an iteration, for each of which a batch has batch_size images; the command line takes it
            from model.n_critic.

    Raises:
        UsageError: if a setting is impossible.
    """

    def __init__(
        self,
        name: Name = "mnist",
        root: str = "data",
        folder: str | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        background: str = "white",
        on_damaged: OnDamaged = "refuse",
        batch_size: int = 128,
        eval_batch_size: int = 500,
        num_workers: int = 2,
        in_memory_gb: float = 2.0,
        predict_samples: int = 64,
        seed: int = 0,
        n_critic: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if name != "folder" and name not in DATASETS:
            raise UsageError(f"unknown data set {name!r}; choose from {', '.join([*DATASETS, 'folder'])}")
        if (name == "folder") != (folder is not None):
            raise UsageError("--data.name folder and --data.folder PATH belong together: give both or neither")
        check_at_least(
            1, batch_size=batch_size, eval_batch_size=eval_batch_size, predict_samples=predict_samples, n_critic=n_critic
        )
        check_at_least(0, num_workers=num_workers, in_memory_gb=in_memory_gb)
        check_at_least(4, image_size=image_size)
        if channels not in (None, 1, 3):
            raise UsageError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        if on_damaged not in ("refuse", "skip"):
            raise UsageError(f"on_damaged must be refuse or skip, got {on_damaged!r}")
        self.background = _rgb(background)
        if name != "folder" and channels not in (None, own := DATASETS[name].image_shape[0]):
            raise UsageError(f"the images of {name} have {own} channel; leave --data.channels out")
        if name != "folder" and (background, on_damaged) != ("white", "refuse"):
            raise UsageError("--data.background and --data.on_damaged are for --data.name folder; leave them out")
        self.data_name, self.root = name, Path(root)
        self.folder = None if folder is None else Path(folder)
        self.image_size, self.channels = image_size, channels
        self.on_damaged: OnDamaged = on_damaged
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.in_memory_gb = num_workers, in_memory_gb
        self.predict_samples, self.seed, self.n_critic = predict_samples, seed, n_critic
        self._parts: dict[bool, Labelled | PicturesPart] = {}  # to train with and held out

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image; for a folder it is read off the pictures."""
        if self.folder is not None:
            return self._pictures.image_shape
        channels, height, width = DATASETS[self.data_name].image_shape
        return (channels, self.image_size or height, self.image_size or width)

    @cached_property
    def classes(self) -> int:
        """Number of classes of the images, 1 where all are of one; a folder's pictures are looked at for it."""
        return 1 + max(int(self.labels(train=train).max()) for train in (True, False))

    def prepare_data(self) -> None:
        """Put the data set's files under root, once per machine."""
        if self.folder is None:
            DATASETS[self.data_name].prepare(self.root)

    def train_dataloader(self) -> TensorLoader | PictureLoader:
        """Return the shuffled loader, whose batches have batch_size images for each update of D.

        Raises:
            UsageError: if the ranks cannot share the images of an update equally, or there are too few for one batch.
        """
        ranks = distributed.world_size()
        if self.batch_size % ranks:
            raise UsageError(
                f"a batch of {self.batch_size} images cannot be shared equally by {ranks} devices; change --data.batch_size to "
                f"a multiple of {ranks}"
            )
        return self._loader(self.batch_size * self.n_critic, train=True)

    def val_dataloader(self) -> TensorLoader | PictureLoader:
        """Return the loader of the held-out images."""
        return self._loader(self._eval_rows(), train=False)

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        """Return the numbers of the samples that predict makes, in batches."""
        rows = self._batches(self.predict_samples, self._eval_rows(), train=False)
        return DataLoader(cast(Dataset[int], range(self.predict_samples)), batch_sampler=rows)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Bring images that arrive as uint8 to [-1, 1]."""
        if isinstance(batch, list | tuple) and batch[0].dtype == torch.uint8:
            images, labels = batch
            return to_minus1_1(images), labels
        return batch

    def load(self, *, train: bool) -> Labelled:
        """Return all training or held-out images as one uint8 tensor (N, C, H, W), with labels (N,)."""
        part = self._part(train=train)
        return part if isinstance(part, Labelled) else part.read(torch.arange(len(part)))

    def labels(self, *, train: bool) -> Tensor:
        """Return the labels (N,) of all training or held-out images, without reading pictures."""
        return self._part(train=train).labels

    def subset(self, count: int, *, train: bool, skip: int = 0, without: int | None = None) -> Labelled:
        """Return `count` images, or all where there are fewer, as uint8 (N, C, H, W), with labels (N,).

        They are drawn at random but always the same, from the training or the held-out images, leaving out those of the
        subset of `skip` images, and one class if `without` names it.
        """

        def drawn(rows: Tensor, count: int) -> Tensor:
            return rows[torch.randperm(len(rows), generator=generator(SUBSET_SEED, train))[:count]]

        labels = self.labels(train=train)
        kept = torch.ones(len(labels), dtype=torch.bool) if without is None else labels != without
        kept[drawn(torch.arange(len(labels)), skip)] = False
        return self._part(train=train).read(drawn(kept.nonzero().flatten(), count))

    def _load_named(self, *, train: bool) -> Labelled:
        images, labels = DATASETS[self.data_name].load(self.root, train=train)
        return Labelled(images if images.shape[1:] == self.image_shape else _resized(images, self.image_shape), labels)

    @cached_property
    def _pictures(self) -> Pictures:
        """The folder's pictures: where they are, and of what shape."""
        assert self.folder is not None
        return Pictures(self.folder, self.image_size, self.channels, self.background)

    def _part(self, *, train: bool) -> Labelled | PicturesPart:
        """Return the images to train with or those held out; of a folder too large for memory they are yet to be read."""
        if train not in self._parts:
            self._parts |= {train: self._load_named(train=train)} if self.folder is None else self._read_folder()
        return self._parts[train]

    def _read_folder(self) -> dict[bool, Labelled | PicturesPart]:
        pictures = self._pictures
        hold = len(pictures) * math.prod(pictures.image_shape) <= self.in_memory_gb * 1e9
        images = pictures.read_all(hold=hold, on_damaged=self.on_damaged, num_workers=self.num_workers)
        parts = {True: slice(pictures.training), False: slice(pictures.training, None)}
        if images is None:
            return {train: PicturesPart(pictures, range(len(pictures))[part]) for train, part in parts.items()}
        return {train: Labelled(images[part], pictures.labels[part]) for train, part in parts.items()}

    def _loader(self, batch_size: int, *, train: bool) -> TensorLoader | PictureLoader:
        part = self._part(train=train)
        batches = self._batches(len(part.labels), batch_size, train=train)
        if isinstance(part, PicturesPart):
            return PictureLoader(part, batches, self.num_workers)
        return TensorLoader(*self._placed(part), batches)

    def _eval_rows(self) -> int:
        """Return the size of a batch of validation: what is asked for, or as many images as take a bounded memory."""
        rows = fitting(self.eval_batch_size, self.image_shape, MAX_EVAL_BYTES)
        if rows < self.eval_batch_size:
            print0(f"Batches of validation have {rows} images, not {self.eval_batch_size}: more would be too large for memory")
        return rows

    def _batches(self, num_rows: int, batch_size: int, *, train: bool) -> ShardedBatches:
        rank, ranks = distributed.rank(), distributed.world_size()
        batches = ShardedBatches(num_rows, batch_size, train=train, seed=self.seed, rank=rank, ranks=ranks)
        if train and self.trainer is not None:
            # A DataLoader's workers start on an epoch before the Trainer has said which one it is.
            progress = self.trainer.fit_loop.epoch_progress.current
            batches.set_epoch(progress.processed)  # pyright: ignore[reportAttributeAccessIssue] declared as one of fewer counts
        return batches

    def _placed(self, source: Labelled) -> Labelled:
        """Move the images to the accelerator if they take less than half of its free memory."""
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        if device.type != "cuda" or source.images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return source
        return Labelled(source.images.to(device), source.labels.to(device))


def _rgb(background: str) -> tuple[int, ...]:
    try:
        colour = ImageColor.getrgb(background)
    except ValueError as error:
        raise UsageError(f"background must be a colour such as white, black or #808080, got {background!r}") from error
    if len(colour) > 3:
        raise UsageError(f"background must be opaque, got {background!r}; leave out how transparent it is, as in #808080")
    return colour


def _resized(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return uint8 images (N, C, H, W) at another size, a part at a time: torchvision computes in float32."""
    resized = torch.empty(len(images), *shape, dtype=torch.uint8)
    for target, some in zip(resized.split(CHUNK), images.split(CHUNK), strict=True):
        target.copy_(tv.resize(some, list(shape[1:]), antialias=True))
    return resized
