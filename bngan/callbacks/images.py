"""Pictures of what G makes, in TensorBoard and as PNG files."""

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bngan.data import ImageDataModule
from bngan.errors import check_at_least
from bngan.gan import GAN
from bngan.images import grid, save_png, to_minus1_1
from bngan.sampler import Sampler
from bngan.trainer import run_folder

WALKS = 4  # rows of the picture of walks


class SampleImages(Callback):
    """Shows samples of the same latents as training goes on, walks between latents, and held-out real images once.

    Where G is asked for classes, each of these has a row of samples, and a latent a column; a walk stays in one class.

    Everything is drawn as samples will be after training: by the EMA of G's weights, if one is kept, and normalized by the
    run's eval_statistics. The pictures go to TensorBoard and to `samples/` in the run's folder.

    Args:
        every_n_iterations: iterations between pictures; the untrained and the final G are always shown.
        num_samples: images in the grid; with classes as many of each, and at least 1.
        walk_steps: images in each row of the walks.
        seed: seed of the latents.

    Raises:
        UsageError: if a number is below 1.
    """

    def __init__(self, every_n_iterations: int = 1000, num_samples: int = 64, walk_steps: int = 10, seed: int = 0) -> None:
        check_at_least(1, "images.", every_n_iterations=every_n_iterations, num_samples=num_samples, walk_steps=walk_steps)
        self.every_n_iterations = every_n_iterations
        self.num_samples, self.walk_steps, self.seed = num_samples, walk_steps, seed
        self._drawn_at = -1  # iteration

    def setup(self, trainer: Trainer, gan: GAN, stage: str) -> None:
        self._run_folder = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, gan: GAN) -> None:
        if trainer.global_step > 0 or not trainer.is_global_zero:
            return
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ImageDataModule):
            real_images = to_minus1_1(data.subset(self.num_samples, train=False).images)
            self._show(trainer, "samples/real", "real", real_images, iteration=0)
        self._draw(trainer, gan)

    def on_train_batch_end(self, trainer: Trainer, gan: GAN, outputs: object, batch: object, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_iterations == 0 and trainer.is_global_zero:
            self._draw(trainer, gan)

    def on_train_end(self, trainer: Trainer, gan: GAN) -> None:
        if trainer.is_global_zero and self._drawn_at != trainer.global_step:
            self._draw(trainer, gan)

    def on_predict_batch_end(
        self, trainer: Trainer, gan: GAN, outputs: Tensor, batch: Tensor, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for number, image in zip(batch.tolist(), outputs, strict=True):
            self._save(image, f"{number:06d}")

    def on_predict_end(self, trainer: Trainer, gan: GAN) -> None:
        if trainer.is_global_zero and self._run_folder is not None:
            print(f"Samples written to {self._run_folder / 'samples'}", flush=True)

    def _draw(self, trainer: Trainer, gan: GAN) -> None:
        iteration = self._drawn_at = trainer.global_step
        ends = range(self.num_samples, self.num_samples + 2 * WALKS)  # samples that the grid does not show
        with gan.sampler() as sampler:
            samples, columns = self._draw_samples(sampler)
            walks = [
                sampler.walk(start, end, self.walk_steps, self.seed) for start, end in zip(ends[0::2], ends[1::2], strict=True)
            ]
        self._show(trainer, "samples/fixed_z", f"iteration-{iteration:06d}", samples, iteration, columns)
        self._show(
            trainer, "samples/interpolation", f"interpolation-{iteration:06d}", torch.cat(walks), iteration, self.walk_steps
        )

    def _draw_samples(self, sampler: Sampler) -> tuple[Tensor, int | None]:
        """Return the samples (N, C, H, W) of the grid, and in how many columns it has them; None is as many as rows."""
        if not sampler.classes:
            return sampler.samples(0, self.num_samples, self.seed), None
        columns = max(1, self.num_samples // sampler.classes)
        rows = [sampler.samples(0, columns, self.seed, label) for label in range(sampler.classes)]
        return torch.cat(rows), columns

    def _show(self, trainer: Trainer, tag: str, name: str, images: Tensor, iteration: int, columns: int | None = None) -> None:
        """Show images (N, C, H, W) in [-1, 1] as one picture."""
        picture = grid(images, columns)
        self._save(picture, name)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(tag, (picture + 1) / 2, global_step=iteration)

    def _save(self, image: Tensor, name: str) -> None:
        if self._run_folder is not None:
            folder = self._run_folder / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            save_png(image, folder / f"{name}.png")
