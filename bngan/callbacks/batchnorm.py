"""What batch norm does, layer by layer, in TensorBoard."""

from contextlib import ExitStack

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from bngan.batching import BATCHINGS
from bngan.batchnorm import (
    BatchNorm,
    BatchStatistics,
    batch_dependence,
    evaluation_statistics,
    ghost_groups,
    kl_to_running,
    recorded_statistics,
    running_statistics,
    shift_blindness,
)
from bngan.distributed import unshard
from bngan.errors import UsageError
from bngan.gan import GAN

MATES = 4  # sets of batch-mates for each image whose logit is watched
LEAST_IMAGES = 16


class BatchNormStatistics(Callback):
    """Logs each batch norm layer's running statistics, gamma and beta, and how far its batches are from them.

    Under `bn/<layer>/`: running_mean and running_var with their mean, smallest and largest value over the channels and
    their histogram; gamma and beta likewise; and kl_to_running, KL(batch || running) in nats, averaged over the channels and
    over the batches that the layer saw in one iteration.

    At each validation it also logs how blind D is, in training mode: `bn/d_shift_blindness` to fakes that are scaled or
    shifted as a whole, and `bn/d_batch_dependence`, how much the others in its batch sway D's output for one image; both by
    the run's own batching, and with /joint and /separate for the same D by either.

    Args:
        every_n_iterations: iterations between looks.
        histograms: whether to log histograms as well.

    Raises:
        UsageError: if every_n_iterations is below 1.
    """

    def __init__(self, every_n_iterations: int = 200, histograms: bool = True) -> None:
        if every_n_iterations < 1:
            raise UsageError(f"batchnorm.every_n_iterations must be at least 1, got {every_n_iterations}")
        self.every_n_iterations = every_n_iterations
        self.histograms = histograms
        self._recording = ExitStack()
        self._seen: dict[str, list[BatchStatistics]] | None = None

    def on_train_batch_start(self, trainer: Trainer, gan: GAN, batch: object, batch_idx: int) -> None:
        due = (trainer.global_step + 1) % self.every_n_iterations == 0
        if due and _writers(trainer):
            # All ranks run this iteration eagerly, so that they send the same messages in the same order.
            self._recording.enter_context(gan.eager())
            if trainer.is_global_zero:
                self._seen = self._recording.enter_context(recorded_statistics(gan))

    def on_train_batch_end(self, trainer: Trainer, gan: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        self._recording.close()
        if self._seen is not None:
            seen, self._seen = self._seen, None
            for writer in _writers(trainer):
                self._write(writer, gan, seen, trainer.global_step)

    def on_exception(self, trainer: Trainer, gan: GAN, exception: BaseException) -> None:
        self._recording.close()

    def on_validation_batch_end(
        self, trainer: Trainer, gan: GAN, outputs: object, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx > 0 or trainer.sanity_checking:
            return
        # Every rank looks at all images, so that the values do not depend on how many ranks there are.
        real_images = unshard(batch[0])  # (N, C, H, W)
        groups = ghost_groups(gan.discriminator)
        whole = (MATES + 1) * groups if groups > 1 else 1  # so that every part of them can be cut into the groups
        real_images = real_images[: len(real_images) // whole * whole]
        if len(real_images) < LEAST_IMAGES:
            return
        with torch.no_grad():
            fake_images = gan.generate(gan.sample_latents(0, 2 * len(real_images)))  # (2 N, C, H, W)
        with evaluation_statistics(gan.discriminator, "batch"):
            for batching in BATCHINGS:
                blindness = shift_blindness(gan.logits, real_images, fake_images[: len(real_images)], batching)
                dependence = batch_dependence(gan.logits, real_images, fake_images, batching, mates=MATES)
                for tag, value in (("bn/d_shift_blindness", blindness), ("bn/d_batch_dependence", dependence)):
                    gan.log(f"{tag}/{batching}", value, batch_size=1)
                    if batching == gan.batching:
                        gan.log(tag, value, batch_size=1)

    @torch.no_grad()
    def _write(self, writer: SummaryWriter, gan: GAN, seen: dict[str, list[BatchStatistics]], iteration: int) -> None:
        for name, layer in gan.batch_norms():
            for quantity, channels in _per_channel(layer).items():
                tag = f"bn/{name}/{quantity}"
                low, mean, high = torch.stack([channels.min(), channels.mean(), channels.max()]).tolist()
                for statistic, value in (("min", low), ("mean", mean), ("max", high)):
                    writer.add_scalar(f"{tag}/{statistic}", value, iteration)
                if self.histograms:
                    writer.add_histogram(tag, channels, iteration)
            if seen[name]:
                kl = torch.stack([kl_to_running(layer, batch).mean() for batch in seen[name]]).mean()
                writer.add_scalar(f"bn/{name}/kl_to_running", float(kl), iteration)


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _per_channel(layer: BatchNorm) -> dict[str, Tensor]:
    """Return the layer's values by name, each (C,)."""
    running_mean, running_var = running_statistics(layer)
    values: dict[str, Tensor] = {"running_mean": running_mean, "running_var": running_var}
    if layer.weight is not None:
        values |= {"gamma": layer.weight, "beta": layer.bias}
    return values
