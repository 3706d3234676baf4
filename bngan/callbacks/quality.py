"""Measuring samples during validation and test."""

from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from bngan import distributed
from bngan.gan import GAN
from bngan.metrics.digit_net import DigitNet, load_digit_net
from bngan.metrics.modes import ClassHistogram

DIGIT_SHAPE = (1, 28, 28)


class Quality(Callback):
    """At each validation, compares samples with the held-out digits and logs val/fid, val/modes and val/class_kl.

    The features are those of the pinned digit net, so it measures 28 x 28 grey digits and says once that it does not
    measure anything else. The samples come from fixed latents, G in evaluation mode, rounded to the 256 levels of a picture.

    Args:
        num_samples: samples to draw; 0 measures nothing.
        chunk: samples generated at a time.
        seed: seed of the samples' latents.
    """

    def __init__(self, num_samples: int = 10_000, chunk: int = 500, seed: int = 0) -> None:
        if num_samples < 0 or chunk < 1:
            raise ValueError(f"num_samples must be at least 0 and chunk at least 1, got {num_samples} and {chunk}")
        if 0 < num_samples < DigitNet.num_features * 2:
            raise ValueError(f"num_samples must be 0 or at least {DigitNet.num_features * 2}, got {num_samples}")
        self.num_samples, self.chunk, self.seed = num_samples, chunk, seed
        self._active = False
        self._real_seen = False

    def setup(self, trainer: Trainer, pl_module: GAN, stage: str) -> None:
        digits = getattr(cast(Any, trainer).datamodule, "data_name", None) in ("mnist", "emnist_digits")
        self._active = self.num_samples > 0 and digits and pl_module.image_shape == DIGIT_SHAPE
        if self.num_samples > 0 and not self._active:
            print_once(trainer, "Samples are not measured: the digit net knows 28 x 28 grey digits only.")
        if self._active:
            self._net = load_digit_net()
            self._fid = FrechetInceptionDistance(feature=self._net, reset_real_features=False)
            self._classes = ClassHistogram(DigitNet.num_classes)
            for part in (self._net, self._fid, self._classes):
                part.to(trainer.strategy.root_device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: GAN,
        outputs: object,
        batch: list[Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._active and not self._real_seen and not trainer.sanity_checking:
            self._fid.update(batch[0], real=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if not self._active or trainer.sanity_checking:
            return
        self._real_seen = True
        self._fid.reset()
        self._classes.reset()
        for start in range(0, self.num_samples, self.chunk * distributed.world_size()):
            first = start + distributed.rank() * self.chunk
            stop = min(first + self.chunk, self.num_samples)
            if first < stop:
                images = quantized(pl_module.generate(pl_module.sample_latents(first, stop, self.seed)))
                self._fid.update(images, real=False)
                self._classes.update(self._net.logits(self._net(images)))
        values = {"fid": self._fid.compute(), **self._classes.compute()}
        pl_module.log_dict({f"val/{name}": value.float() for name, value in values.items()}, rank_zero_only=False)


def quantized(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to the 256 levels that a saved picture has."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def print_once(trainer: Trainer, message: str) -> None:
    if trainer.is_global_zero:
        print(message, flush=True)
