"""The LightningDataModule: from a data set's name to batches of images in [-1, 1]."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as tv

from bngan import distributed
from bngan.data.datasets import CHUNK, DATASETS, Labelled
from bngan.data.folder import Pictures
from bngan.data.loader import PictureLoader, ShardedBatches, TensorLoader, to_unit_range
from bngan.data.steps import largest_group, settings_in_steps
from bngan.randomness import generator

Name = Literal["mnist", "fashion_mnist", "kmnist", "emnist_letters", "emnist_balanced", "emnist_digits", "folder"]
HELD_OUT_SHARE = 0.1
MANY = 5_000  # pictures that take more than an instant to read
SUBSET_SEED = 0
# What a training step has at the most where alternations_per_step is unset.
MOST_ALTERNATIONS, STEP_BYTES = 8, 4_000_000


class ImageDataModule(LightningDataModule):
    """Images and labels, (N, C, H, W) in [-1, 1] and (N,), for training and held out.

    MNIST travels with the package; the other named sets are downloaded by torchvision; `folder` takes your own pictures.

    Args:
        name: mnist, fashion_mnist, kmnist, emnist_letters, emnist_balanced, emnist_digits or folder.
        root: folder for the named data sets' files.
        folder: folder of your own pictures, with or without subfolders, for name folder. A tenth of them is held out, or
            what is in its subfolder test where there are train and test.
        image_size: side of the square images; unset keeps the native size.
        channels: 1 for grey or 3 for colour, for name folder; unset takes the first picture's.
        batch_size: images per update of a network, over all devices together.
        alternations_per_step: alternations in one step of the Trainer, whose own work is then done once for all of them.
            Training and its plots come out the same; a checkpoint, a validation or a stop waits for the step's end, and
            max_steps, limit_train_batches and val_check_interval, which count alternations, must fit the steps, of which an
            epoch's last has those that are left. A fast_dev_run has one alternation a step. Unset means as many, up to 8, as
            these settings allow and have at most 4 MB of images, but one if a callback that is not bngan's looks at
            batches and has no on_alternation_start or on_alternation_end.
        eval_batch_size: images per batch of validation and test.
        num_workers: processes that read a folder too large to hold in memory.
        in_memory_gb: largest size, in GB, of images that are held in memory, on the accelerator where they fit.
        predict_samples: how many images predict makes.
        seed: seed of the training order.
        updates_per_batch: updates of D for which one batch must last; the command line takes it from model.n_critic.
        parts_per_update: parts of each update; the command line takes it from model.accumulate.
    """

    def __init__(
        self,
        name: Name = "mnist",
        root: str = "data",
        folder: str | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        batch_size: int = 128,
        alternations_per_step: int | None = None,
        eval_batch_size: int = 500,
        num_workers: int = 2,
        in_memory_gb: float = 2.0,
        predict_samples: int = 64,
        seed: int = 0,
        updates_per_batch: int = 1,
        parts_per_update: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if name != "folder" and name not in DATASETS:
            raise ValueError(f"unknown data set {name!r}; choose from {', '.join([*DATASETS, 'folder'])}")
        if (name == "folder") != (folder is not None):
            raise ValueError("--data.name folder and --data.folder PATH belong together: give both or neither")
        for setting, value in (
            ("batch_size", batch_size),
            ("alternations_per_step", alternations_per_step),
            ("eval_batch_size", eval_batch_size),
            ("predict_samples", predict_samples),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{setting} must be at least 1, got {value}")
        if num_workers < 0 or in_memory_gb < 0:
            raise ValueError(f"num_workers and in_memory_gb must be at least 0, got {num_workers} and {in_memory_gb}")
        if image_size is not None and image_size < 4:
            raise ValueError(f"image_size must be at least 4, got {image_size}")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        self.data_name, self.root = name, Path(root)
        self.folder = None if folder is None else Path(folder)
        self.image_size, self.channels = image_size, channels
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.alternations_per_step = alternations_per_step
        self.group = alternations_per_step or 1  # alternations of a training step, known once `setup` has met the Trainer
        self.resumed: dict[str, int] = {}  # place in the data of the checkpoint from which training is to go on
        self.num_workers, self.in_memory_gb = num_workers, in_memory_gb
        self.predict_samples, self.seed = predict_samples, seed
        self.updates_per_batch, self.parts_per_update = updates_per_batch, parts_per_update
        self._loaded: dict[bool, Labelled] = {}
        self._found: dict[str, Pictures] = {}
        self._as_given: dict[str, Any] = {}

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of one image; for a folder it is read off the pictures."""
        if self.folder is not None:
            return self._pictures(train=True).image_shape
        channels, height, width = DATASETS[self.data_name].image_shape
        return (channels, self.image_size or height, self.image_size or width)

    def prepare_data(self) -> None:
        """Put the data set's files under root, once per machine."""
        if self.folder is None:
            DATASETS[self.data_name].prepare(self.root)

    def setup(self, stage: str) -> None:
        """Choose how many alternations a step has, and let the Trainer's settings count steps.

        Raises:
            ValueError: if one of them falls within a step.
        """
        if stage != "fit":
            return
        assert self.trainer is not None
        self.group = self._choose_group(self.trainer)
        if self.group > 1:
            in_steps = settings_in_steps(self.trainer, self._batches_of_an_epoch, self.group)
            self._as_given = {name: getattr(self.trainer, name) for name in in_steps}
            self._set_in_trainer(in_steps)

    def teardown(self, stage: str) -> None:
        """Give the Trainer its own settings back."""
        self._set_in_trainer(self._as_given)
        self._as_given = {}

    def alternations(self, steps: float) -> float:
        """Return how many alternations the first `steps` steps of an epoch are."""
        return steps if self.group == 1 else min(steps * self.group, self._batches_of_an_epoch)

    def train_dataloader(self) -> TensorLoader | PictureLoader:
        """Return the shuffled loader; each of its steps has batch_size images for each update of each alternation."""
        parts = self.updates_per_batch * self.parts_per_update
        return self._loader(train=True, batch_size=self.batch_size * self.updates_per_batch, parts=parts, group=self.group)

    def val_dataloader(self) -> TensorLoader | PictureLoader:
        """Return the loader of the held-out images."""
        return self._loader(train=False, batch_size=self.eval_batch_size)

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        """Return the numbers of the samples that predict makes, in batches."""
        rows = self._batches(self.predict_samples, self.eval_batch_size, train=False)
        return DataLoader(cast(Dataset[int], range(self.predict_samples)), batch_sampler=rows)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Bring images that arrive as uint8 to [-1, 1]."""
        if isinstance(batch, list | tuple) and batch[0].dtype == torch.uint8:
            images, labels = batch
            return to_unit_range(images), labels
        return batch

    def load(self, *, train: bool) -> Labelled:
        """Return all training or held-out images as one uint8 tensor (N, C, H, W), with labels (N,)."""
        if train not in self._loaded:
            if self.folder is not None:
                pictures, rows = self._picture_rows(train=train)
                if len(rows) >= MANY and distributed.rank() == 0:
                    print(f"Reads {len(rows):,} pictures from {self.folder}", flush=True)
                images, labels = pictures.read(rows)
            else:
                images, labels = DATASETS[self.data_name].load(self.root, train=train)
                if images.shape[-1] != self.image_shape[-1]:
                    images = self._resized(images)
            self._loaded[train] = Labelled(images, labels)
        return self._loaded[train]

    def subset(self, count: int, *, train: bool, without: int | None = None) -> Labelled:
        """Return `count` images, or all where there are fewer, as uint8 (N, C, H, W), with labels (N,).

        They are drawn at random but always the same, from the training or the held-out images, leaving out one class if
        `without` names it.
        """
        pictures, rows = self._picture_rows(train=train) if self.folder is not None else (None, [])
        labels = self.load(train=train).labels if pictures is None else torch.tensor([pictures.targets[row] for row in rows])
        kept = torch.arange(len(labels)) if without is None else (labels != without).nonzero().flatten()
        chosen = kept[torch.randperm(len(kept), generator=generator(SUBSET_SEED, train))[:count]]
        if pictures is not None and train not in self._loaded:
            return Labelled(*pictures.read([rows[row] for row in chosen.tolist()]))
        return Labelled(self.load(train=train).images[chosen], labels[chosen])

    def _loader(self, *, train: bool, batch_size: int, parts: int = 1, group: int = 1) -> TensorLoader | PictureLoader:
        pictures, rows = self._picture_rows(train=train) if self.folder is not None else (None, [])
        in_memory = pictures is None or len(rows) * pictures.bytes_per_image <= self.in_memory_gb * 1e9
        source = self.load(train=train) if in_memory else None
        num_rows = len(rows) if source is None else len(source.labels)
        batches = self._batches(num_rows, batch_size, train=train, parts=parts, group=group)
        if source is None:
            assert pictures is not None
            return PictureLoader(Subset(pictures, rows), batches, self.num_workers)
        return TensorLoader(*self._placed(source), batches)

    def _resized(self, images: Tensor) -> Tensor:
        """Return the images at the size that is asked for, a part at a time: torchvision computes in float32."""
        resized = torch.empty(len(images), *self.image_shape, dtype=torch.uint8)
        for target, some in zip(resized.split(CHUNK), images.split(CHUNK), strict=True):
            target.copy_(tv.resize(some, list(self.image_shape[1:]), antialias=True))
        return resized

    def _choose_group(self, trainer: Trainer) -> int:
        if cast(Any, trainer).fast_dev_run:
            return 1
        if self.alternations_per_step is not None:
            return self.alternations_per_step
        # With larger images the Trainer's work weighs little, and a step of several alternations would wait long to stop.
        each = 4 * self.batch_size * self.updates_per_batch * math.prod(self.image_shape) // trainer.world_size
        most = min(MOST_ALTERNATIONS, STEP_BYTES // each)
        return largest_group(trainer, self._batches_of_an_epoch, most, done=self.resumed.get("batches", 0))

    @cached_property
    def _batches_of_an_epoch(self) -> int:
        num_rows = len(self.load(train=True).labels) if self.folder is None else len(self._picture_rows(train=True)[1])
        return num_rows // (self.batch_size * self.updates_per_batch)

    def _set_in_trainer(self, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            setattr(self.trainer, name, value)

    def _batches(self, num_rows: int, batch_size: int, *, train: bool, parts: int = 1, group: int = 1) -> ShardedBatches:
        share = {"rank": distributed.rank(), "ranks": distributed.world_size(), "parts": parts}
        batches = ShardedBatches(num_rows, batch_size, train=train, seed=self.seed, group=group, **share)
        if train and self.trainer is not None:
            # A DataLoader's workers start on an epoch before the Trainer has said which one it is.
            batches.set_epoch(cast(Any, self.trainer).fit_loop.epoch_progress.current.processed)
        return batches

    def _placed(self, source: Labelled) -> Labelled:
        """Move the images to the accelerator if they take less than half of its free memory."""
        device = self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")
        if device.type != "cuda" or source.images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
            return source
        return Labelled(source.images.to(device), source.labels.to(device))

    @cached_property
    def _is_split(self) -> bool:
        """Whether the folder's subfolders tell which pictures are held out."""
        return self.folder is not None and all((self.folder / part).is_dir() for part in ("train", "test"))

    def _pictures(self, *, train: bool) -> Pictures:
        """Return the pictures, which are looked for once: each is opened to know its size."""
        part = "" if not self._is_split else "train" if train else "test"
        if part not in self._found:
            self._found[part] = self._find_pictures(part)
        return self._found[part]

    def _find_pictures(self, part: str) -> Pictures:
        assert self.folder is not None
        pictures = Pictures(self.folder / part, self.image_size, self.image_shape[0] if part == "test" else self.channels)
        if part == "test" and pictures.image_shape != self.image_shape:
            raise ValueError(
                f"pictures of different sizes: those in {self.folder / 'train'} have sides of {self.image_shape[-1]}, those in "
                f"{self.folder / part} of {pictures.image_shape[-1]}; give --data.image_size 64, say, to bring all to one size"
            )
        return pictures

    def _picture_rows(self, *, train: bool) -> tuple[Pictures, list[int]]:
        """Return the pictures and which of them belong to training or are held out."""
        pictures = self._pictures(train=train)
        if self._is_split:
            return pictures, list(range(len(pictures)))
        if len(pictures) < 2:
            raise ValueError(f"{self.folder} holds one picture; at least 2 are needed, to train and to hold out")
        order = torch.randperm(len(pictures), generator=generator(0)).tolist()
        held_out = max(1, round(HELD_OUT_SHARE * len(pictures)))
        return pictures, sorted(order[held_out:] if train else order[:held_out])
