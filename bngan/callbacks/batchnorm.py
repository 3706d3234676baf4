"""What batch norm does, layer by layer, in TensorBoard."""

from contextlib import ExitStack

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from bngan.batching import BATCHINGS, pack
from bngan.batchnorm.diagnostics import batch_dependence, kl_floor, kl_to_running, shift_blindness
from bngan.batchnorm.layers import BatchNorm, batch_norm_layers, running_statistics
from bngan.batchnorm.statistics import BatchStatistics, evaluation_statistics, recorded_statistics
from bngan.data import ImageDataModule
from bngan.distributed import mean_over_ranks, print0
from bngan.errors import check_at_least
from bngan.gan import GAN
from bngan.images import to_minus1_1

PROBE_BATCHES, PROBE_IMAGES = 8, 512  # D is looked at with at least so many batches and images, where there are as many


class BatchNormStatistics(Callback):
    """Logs each batch norm layer's running statistics, gamma and beta, and how far its batches are from them.

    Under `bn/<layer>/`: running_mean and running_var with their mean, smallest and largest value over the channels and
    their histogram; gamma and beta likewise; kl_to_running, KL(batch || running) in nats against the running statistics
    just before each batch, averaged over the channels and over the batches of one iteration, of D's layers those of D's own
    updates; and kl_floor, about what that is by chance alone. On several ranks these are means over them.

    At each validation it also logs how blind D is, in training mode: `bn/d_shift_blindness` to fakes that are scaled or
    shifted as a whole, and `bn/d_batch_dependence`, how much the others in its batch sway D's output for one image; both by
    the run's own batching, and with /joint and /separate for the same D by either. D gets held-out images and fakes as it
    does in training: in batches of that size, with that noise, fakes normalized by their own batch. Fewer images than two
    batches are not looked at, and the dependence of a D without batch norm, which is 0, is not logged.

    Args:
        every_n_iterations: iterations between looks.
        histograms: whether to log histograms as well.

    Raises:
        UsageError: if every_n_iterations is below 1.
    """

    def __init__(self, every_n_iterations: int = 200, histograms: bool = True) -> None:
        check_at_least(1, "batchnorm.", every_n_iterations=every_n_iterations)
        self.every_n_iterations = every_n_iterations
        self.histograms = histograms
        self._recording = ExitStack()
        self._seen: dict[str, list[BatchStatistics]] | None = None
        self._told = False

    def on_train_batch_start(self, trainer: Trainer, gan: GAN, batch: object, batch_idx: int) -> None:
        due = (trainer.global_step + 1) % self.every_n_iterations == 0
        if due and _writers(trainer):
            # All ranks take part, and run this iteration eagerly, so that they send the same messages in the same order.
            self._recording.enter_context(gan.eager())
            self._seen = self._recording.enter_context(recorded_statistics(gan))

    def on_train_batch_end(self, trainer: Trainer, gan: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        self._recording.close()
        if self._seen is not None:
            seen, self._seen = self._seen, None
            for name, layer in gan.batch_norms():
                batches = seen[name]
                if name.startswith("discriminator."):
                    # In G's update D meets the images of its own last one again, which are in its statistics by then.
                    batches = batches[: len(batches) * gan.settings.n_critic // (gan.settings.n_critic + 1)]
                self._write(_writers(trainer), f"bn/{name}", layer, batches, trainer.global_step)

    def on_exception(self, trainer: Trainer, gan: GAN, exception: BaseException) -> None:
        self._recording.close()

    def measured(self, trainer: Trainer, gan: GAN) -> list[str]:
        """Return the names of what validation says of D."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule) or len(data.labels(train=False)) < 2 * int(gan.normalized_together):
            return []
        kinds = ["d_shift_blindness", *(["d_batch_dependence"] if any(batch_norm_layers(gan.discriminator)) else [])]
        return [f"bn/{kind}{batching}" for kind in kinds for batching in ("", *(f"/{name}" for name in BATCHINGS))]

    def on_validation_epoch_end(self, trainer: Trainer, gan: GAN) -> None:
        data = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or not isinstance(data, ImageDataModule):
            return
        batch_size = int(gan.normalized_together)
        images = data.subset(max(PROBE_BATCHES * batch_size, PROBE_IMAGES), train=False).images
        if (batches := len(images) // batch_size) >= 2:
            self._probe(gan, to_minus1_1(images[: batches * batch_size]), batch_size)
        elif not self._told:
            print0(f"D is not probed (bn/d_*): {len(images)} held-out images are not two batches of {batch_size}.")
            self._told = True

    @torch.no_grad()
    def _probe(self, gan: GAN, real_images: Tensor, batch_size: int) -> None:
        """Log how blind D is on real images (N, C, H, W), the same on every rank, so that their number does not matter."""
        real_images = real_images.to(next(gan.parameters())) + gan.draw_instance_noise(len(real_images), 0)
        coupled, size = any(batch_norm_layers(gan.discriminator)), gan.settings.pack  # what D judges as one

        def fakes(batch: int) -> Tensor:
            return gan.generate(gan.sample_latents(batch * batch_size, (batch + 1) * batch_size))

        def noise(batch: int) -> Tensor:
            return gan.draw_instance_noise(batch_size, 1, batch)

        with evaluation_statistics(gan, "batch"):
            split = enumerate(real_images.split(batch_size))
            batches = [[pack(images, size) for images in (real, fakes(batch), noise(batch))] for batch, real in split]
            for batching in BATCHINGS:
                blindness = [shift_blindness(gan.logits, real, fake, batching, added) for real, fake, added in batches]
                values = {"bn/d_shift_blindness": torch.stack(blindness).mean()}
                if coupled:  # else it is 0
                    values["bn/d_batch_dependence"] = batch_dependence(
                        gan.logits,
                        pack(real_images, size),
                        lambda batch: pack(fakes(batch) + noise(batch), size),
                        batching,
                        batch_size // size,
                    )
                for tag, value in values.items():
                    gan.log(f"{tag}/{batching}", value, batch_size=1)
                    if batching == gan.settings.batching:
                        gan.log(tag, value, batch_size=1)

    @torch.no_grad()
    def _write(
        self, writers: list[SummaryWriter], tag: str, layer: BatchNorm, seen: list[BatchStatistics], iteration: int
    ) -> None:
        """Write what there is to say of one layer; on ranks but the first the writers do nothing."""
        quantities = {name: mean_over_ranks(channels) for name, channels in _per_channel(layer).items()}
        scalars = {
            f"{name}/{statistic}": float(value)
            for name, channels in quantities.items()
            for statistic, value in (("min", channels.min()), ("mean", channels.mean()), ("max", channels.max()))
        }
        if seen:
            kl = torch.stack([kl_to_running(batch, layer.eps).mean() for batch in seen]).mean()
            scalars["kl_to_running"] = float(mean_over_ranks(kl))
            scalars["kl_floor"] = sum(map(kl_floor, seen)) / len(seen)
        for writer in writers:
            for name, value in scalars.items():
                writer.add_scalar(f"{tag}/{name}", value, iteration)
            for name, channels in quantities.items() if self.histograms else ():
                writer.add_histogram(f"{tag}/{name}", channels, iteration)


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _per_channel(layer: BatchNorm) -> dict[str, Tensor]:
    """Return the layer's values by name, each (C,)."""
    running_mean, running_var = running_statistics(layer)
    values: dict[str, Tensor] = {"running_mean": running_mean, "running_var": running_var}
    if layer.weight is not None:
        values |= {"gamma": layer.weight, "beta": layer.bias}
    return values
