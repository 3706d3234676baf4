"""What batch norm does, layer by layer, in TensorBoard."""

from contextlib import ExitStack

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from bngan.batching import BATCHINGS, Batching, of_classes, pack
from bngan.batchnorm.diagnostics import batch_dependence, kl_floor, kl_to_running, shift_blindness
from bngan.batchnorm.layers import BatchNorm, ConditionalBatchNorm, batch_norm_layers, running_statistics
from bngan.batchnorm.statistics import BatchStatistics, evaluation_statistics, recorded_statistics
from bngan.data import ImageDataModule
from bngan.distributed import mean_over_ranks, print0
from bngan.errors import check_at_least
from bngan.gan import GAN
from bngan.images import to_minus1_1

CELL = (8, 4)  # pixels of one gamma or beta in the picture of all
PROBE_BATCHES, PROBE_IMAGES = 8, 512  # D is looked at with at least so many batches and images, where there are as many


class BatchNormStatistics(Callback):
    """Logs each batch norm layer's running statistics, gamma and beta, and how far its batches are from them.

    Under `bn/<layer>/`: running_mean and running_var with their mean, smallest and largest value over the channels and
    their histogram; gamma and beta likewise; kl_to_running, KL(batch || running) in nats against the running statistics
    just before each batch, averaged over the channels and over the batches of one iteration, of D's layers those of D's own
    updates; and kl_floor, about what that is by chance alone. On several ranks these are means over them. Of a conditional
    batch norm, gamma and beta are a scalar for each class, the mean over the channels; `between_classes`, their standard
    deviation over the classes, averaged over the channels, 0 where G does not tell them apart; and a picture with a row for
    each class and a column for each channel, black at the smallest value and white at the largest.

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
            for name, layer in gan.generator.named_modules(prefix="generator"):
                if isinstance(layer, ConditionalBatchNorm):
                    self._write_by_class(_writers(trainer), f"bn/{name}", layer, trainer.global_step)

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
        images, labels = data.subset(max(PROBE_BATCHES * batch_size, PROBE_IMAGES), train=False)
        if (batches := len(images) // batch_size) >= 2:
            rows = slice(batches * batch_size)
            self._probe(gan, to_minus1_1(images[rows]), labels[rows] if gan.settings.classes else None, batch_size)
        elif not self._told:
            print0(f"D is not probed (bn/d_*): {len(images)} held-out images are not two batches of {batch_size}.")
            self._told = True

    @torch.no_grad()
    def _probe(self, gan: GAN, real_images: Tensor, labels: Tensor | None, batch_size: int) -> None:
        """Log how blind D is on real images (N, C, H, W), the same on every rank, so that their number does not matter.

        Labels int64 (N,) tell their classes, where there are some, and those of the fakes in their places.
        """
        weight = next(gan.parameters())
        real_images = real_images.to(weight) + gan.draw_instance_noise(len(real_images), 0)
        labels = None if labels is None else labels.to(weight.device)
        coupled = any(batch_norm_layers(gan.discriminator))
        with evaluation_statistics(gan, "batch"):
            for batching in BATCHINGS:
                values = {"bn/d_shift_blindness": _blindness(gan, real_images, labels, batch_size, batching)}
                if coupled:  # else it is 0
                    values["bn/d_batch_dependence"] = _dependence(gan, real_images, labels, batch_size, batching)
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

    @torch.no_grad()
    def _write_by_class(self, writers: list[SummaryWriter], tag: str, layer: ConditionalBatchNorm, iteration: int) -> None:
        """Write gamma and beta (K, C) of each class."""
        for name, values in {"gamma": layer.gamma, "beta": layer.beta}.items():
            scalars = {f"class_{label}": float(mean) for label, mean in enumerate(values.mean(dim=1))}
            scalars["between_classes"] = float(values.std(dim=0, correction=0).mean())
            low, high = values.aminmax()
            cells = (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
            picture = cells.repeat_interleave(CELL[0], dim=0).repeat_interleave(CELL[1], dim=1).unsqueeze(dim=0)
            for writer in writers:
                writer.add_image(f"{tag}/{name}", picture, iteration)
                for scalar, value in scalars.items():
                    writer.add_scalar(f"{tag}/{name}/{scalar}", value, iteration)


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _blindness(gan: GAN, real_images: Tensor, labels: Tensor | None, batch_size: int, batching: Batching) -> Tensor:
    """Return shift_blindness, averaged over batches of noisy real images (N, C, H, W) and as many fakes."""
    found = []
    for number, real in enumerate(real_images.split(batch_size)):
        own = None if labels is None else labels.split(batch_size)[number]
        seen = (real, _fakes(gan, number, batch_size, own), _noise(gan, number, batch_size))
        real, fake, noise = (pack(images, gan.settings.pack) for images in seen)
        found.append(shift_blindness(of_classes(gan.logits, own), real, fake, batching, noise))
    return torch.stack(found).mean()


def _dependence(gan: GAN, real_images: Tensor, labels: Tensor | None, batch_size: int, batching: Batching) -> Tensor:
    """Return batch_dependence of noisy real images (N, C, H, W)."""
    size = gan.settings.pack  # what D judges as one

    def draw_fakes(number: int, own: Tensor | None = None) -> Tensor:
        return pack(_fakes(gan, number, batch_size, own) + _noise(gan, number, batch_size), size)

    return batch_dependence(gan.logits, pack(real_images, size), draw_fakes, batching, batch_size // size, labels=labels)


def _fakes(gan: GAN, number: int, batch_size: int, labels: Tensor | None) -> Tensor:
    """Return the fakes (batch_size, C, H, W) of that batch."""
    return gan.generate(gan.sample_latents(number * batch_size, (number + 1) * batch_size), labels)


def _noise(gan: GAN, number: int, batch_size: int) -> Tensor:
    return gan.draw_instance_noise(batch_size, 1, number)


def _per_channel(layer: BatchNorm) -> dict[str, Tensor]:
    """Return the layer's values by name, each (C,)."""
    running_mean, running_var = running_statistics(layer)
    values: dict[str, Tensor] = {"running_mean": running_mean, "running_var": running_var}
    if layer.affine:
        values |= {"gamma": layer.weight, "beta": layer.bias}
    return values
