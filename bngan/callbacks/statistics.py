"""What batch norm does, layer by layer, in TensorBoard."""

from contextlib import ExitStack

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bngan import distributed
from bngan.batchnorm import (
    BATCHINGS,
    Statistics,
    batch_dependence,
    divergence,
    recorded_statistics,
    running_statistics,
    sampling_statistics,
    shift_blindness,
)
from bngan.gan import GAN

# Fewer cannot be split into an image and several sets of batch-mates.
LEAST_IMAGES = 16


class BatchNormStatistics(Callback):
    """Logs each batch norm layer's running statistics, gamma and beta, and how far its batches are from them.

    Under `bn/<layer>/`: running_mean and running_var with their mean, smallest and largest value over the channels and
    their histogram; gamma and beta likewise; and divergence, KL(batch || running) in nats, averaged over the channels and
    over the batches that the layer saw in one alternation.

    At each validation it also logs how blind D is, in training mode: `bn/d_shift_blindness` to fakes that are scaled or
    shifted as a whole, and `bn/d_batch_dependence`, how much the others in its batch sway D's output for one image; both by
    the run's own batching, and with /joint and /separate for the same D by either.

    Args:
        every_n_iterations: iterations between looks.
        histograms: whether to log histograms as well.
    """

    def __init__(self, every_n_iterations: int = 200, histograms: bool = True) -> None:
        if every_n_iterations < 1:
            raise ValueError(f"batchnorm.every_n_iterations must be at least 1, got {every_n_iterations}")
        self.every_n_iterations = every_n_iterations
        self.histograms = histograms
        self._recording = ExitStack()
        self._seen: dict[str, list[Statistics]] | None = None

    def on_alternation_start(self, trainer: Trainer, gan: GAN) -> None:
        due = (gan.iterations_done + 1) % self.every_n_iterations == 0
        if due and trainer.is_global_zero and any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            if gan.compiled:  # a compiled network would be compiled anew to be looked into
                self._recording.enter_context(torch.compiler.set_stance("force_eager"))
            self._seen = self._recording.enter_context(recorded_statistics(gan))

    def on_alternation_end(self, trainer: Trainer, gan: GAN) -> None:
        if self._seen is None:
            return
        seen, self._seen = self._seen, None
        self._recording.close()
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self._write(logger, gan, seen)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: GAN, outputs: object, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx > 0 or trainer.sanity_checking:
            return
        # Every rank looks at all images, so that the values do not depend on how many ranks there are.
        real_images = distributed.gather_rows(batch[0])
        if len(real_images) < LEAST_IMAGES:
            return
        with torch.no_grad():
            fake_images = pl_module.generate(pl_module.sample_latents(0, 2 * len(real_images)))
        with sampling_statistics(pl_module.discriminator, "batch"):
            for tag, probe in (("bn/d_shift_blindness", shift_blindness), ("bn/d_batch_dependence", batch_dependence)):
                for batching in BATCHINGS:
                    fakes = fake_images[: len(real_images)] if probe is shift_blindness else fake_images
                    value = probe(pl_module.logits, real_images, fakes, batching)
                    pl_module.log(f"{tag}/{batching}", value, batch_size=1)
                    if batching == pl_module.batching:
                        pl_module.log(tag, value, batch_size=1)

    def on_exception(self, trainer: Trainer, pl_module: GAN, exception: BaseException) -> None:
        self._recording.close()

    @torch.no_grad()
    def _write(self, logger: TensorBoardLogger, gan: GAN, seen: dict[str, list[Statistics]]) -> None:
        writer, iteration = logger.experiment, gan.iterations_done
        for name, layer in gan.batch_norms():
            running_mean, running_var = running_statistics(layer)
            values: dict[str, Tensor] = {"running_mean": running_mean, "running_var": running_var}
            if layer.weight is not None:
                values |= {"gamma": layer.weight, "beta": layer.bias}
            for quantity, channels in values.items():
                tag = f"bn/{name}/{quantity}"
                low, mean, high = torch.stack([channels.min(), channels.mean(), channels.max()]).tolist()
                for statistic, value in (("min", low), ("mean", mean), ("max", high)):
                    writer.add_scalar(f"{tag}/{statistic}", value, iteration)
                if self.histograms:
                    writer.add_histogram(tag, channels, iteration)
            if seen.get(name):
                apart = torch.stack([divergence(layer, batch).mean() for batch in seen[name]]).mean()
                writer.add_scalar(f"bn/{name}/divergence", float(apart), iteration)
