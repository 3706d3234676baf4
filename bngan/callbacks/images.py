"""Pictures of what G makes, in TensorBoard and as PNG files."""

from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from bngan.callbacks.run import run_folder
from bngan.gan import GAN
from bngan.sampling import grid, save_png, slerp


class SampleImages(Callback):
    """Shows samples of the same latents as training goes on, a walk between latents, and real images once.

    Everything is drawn as samples will be after training: from the average of G's weights, if one is kept, and normalized by
    the run's sampling policy. The pictures go to TensorBoard and to
    `samples/` in the run's folder.

    Args:
        every_n_iterations: iterations between pictures; the untrained and the final G are always shown.
        num_samples: images in the grid.
        walk_steps: images in each row of the walk.
        seed: seed of the latents.
    """

    def __init__(self, every_n_iterations: int = 1000, num_samples: int = 64, walk_steps: int = 10, seed: int = 0) -> None:
        for name, value in (
            ("every_n_iterations", every_n_iterations),
            ("num_samples", num_samples),
            ("walk_steps", walk_steps),
        ):
            if value < 1:
                raise ValueError(f"images.{name} must be at least 1, got {value}")
        self.every_n_iterations = every_n_iterations
        self.num_samples, self.walk_steps, self.seed = num_samples, walk_steps, seed
        self._shown = -1

    def setup(self, trainer: Trainer, pl_module: GAN, stage: str) -> None:
        self._run_folder = run_folder(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: GAN) -> None:
        if not trainer.is_global_zero:
            return
        if pl_module.iterations_done == 0:
            held_out = cast(Any, trainer.val_dataloaders)
            batch = pl_module._apply_batch_transfer_handler(next(iter(held_out or cast(Any, trainer.train_dataloader))))
            real_images = batch[0] if held_out else pl_module.by_alternation(batch)[0]
            self._show(trainer, "samples/real", "real", real_images[: self.num_samples], iteration=0)
            self._draw(trainer, pl_module)

    def on_alternation_end(self, trainer: Trainer, gan: GAN) -> None:
        if gan.iterations_done % self.every_n_iterations == 0 and trainer.is_global_zero:
            self._draw(trainer, gan)

    def on_train_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if trainer.is_global_zero and self._shown != pl_module.iterations_done:
            self._draw(trainer, pl_module)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: GAN, outputs: Tensor, batch: Tensor, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for number, image in zip(batch.tolist(), outputs, strict=True):
            self._save(image, f"{number:06d}")

    def on_predict_end(self, trainer: Trainer, pl_module: GAN) -> None:
        if trainer.is_global_zero and self._run_folder is not None:
            print(f"Samples written to {self._run_folder / 'samples'}", flush=True)

    def _draw(self, trainer: Trainer, gan: GAN) -> None:
        iteration = self._shown = gan.iterations_done
        ends = gan.sample_latents(self.num_samples, self.num_samples + 8, self.seed)
        with gan.sampler() as sampler:
            samples = sampler.samples(0, self.num_samples, self.seed)
            walk = sampler.generate(slerp(ends[0::2], ends[1::2], self.walk_steps))
        self._show(trainer, "samples/fixed_z", f"iteration-{iteration:06d}", samples, iteration)
        self._show(trainer, "samples/interpolation", f"interpolation-{iteration:06d}", walk, iteration, self.walk_steps)

    def _show(self, trainer: Trainer, tag: str, name: str, images: Tensor, iteration: int, columns: int | None = None) -> None:
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
