"""The GAN for Lightning: networks, optimizers, validation; the training itself is bngan.iteration."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bngan import distributed, rng
from bngan.batching import discriminate, of_classes, pack
from bngan.batchnorm.layers import BatchNorm, at_least_float32, batch_norm_layers, is_synchronized
from bngan.batchnorm.statistics import EvalStatistics
from bngan.blocks import GeneratorNetwork
from bngan.cuda_graph import CudaGraph
from bngan.ema import ExponentialMovingAverage
from bngan.errors import NonFiniteLoss, UsageError
from bngan.images import check_range
from bngan.iteration import Draws, Iteration, Observed, OptimizerUpdate, Update
from bngan.losses import find_loss
from bngan.networks import build_networks, needs_reference, set_reference
from bngan.sampler import Sampler, Weights, sampler_of
from bngan.schedules import Schedule, schedule_at
from bngan.settings import Settings, check_settings, check_update

Batch = Tensor | Sequence[Tensor]
ADVICE = "try a lower --model.g_lr and --model.d_lr, or another --model.loss; the last checkpoint is unharmed"


class GAN(LightningModule):
    """A generator and a discriminator trained by alternating updates (Goodfellow et al. 2014, algorithm 1).

    One batch is one iteration is one `global_step`: `n_critic` updates of D and then G's, each of D's on batch_size images of
    its own. Everything follows it: the x axis of every plot, schedules, file names, and the Trainer's max_steps.

    Args:
        settings: those of bngan.settings.Settings, by name.
    """

    generator_ema: GeneratorNetwork | None
    iteration: Tensor
    normalized_together: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = Settings(**settings)
        self.save_hyperparameters(asdict(self.settings), logger=False)
        check_settings(self.settings)
        self.automatic_optimization = False
        self.loss = find_loss(self.settings.loss, self.settings.label_smoothing)
        self.generator, self.discriminator = build_networks(self.settings)
        self.generator_ema = copy.deepcopy(self.generator).requires_grad_(False) if self.settings.ema_decay else None
        self.discriminator.instance_noise.fill_(self.settings.instance_noise)
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))  # iterations done
        # Images that pass a network together in training; known once there is data or a checkpoint.
        self.register_buffer("normalized_together", torch.tensor(128))
        self.observed: Observed | None = None  # what the last iteration saw
        self._run: Iteration | None = None
        self._graph: CudaGraph | None = None
        self._looked_into = False

    # Generating ---------------------------------------------------------------------------------------------------

    def generate(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents (N, latent_dim) to images (N, C, H, W) in [-1, 1].

        Where there are classes, labels int64 (N,) tell those of the images; without them, image i is of class i mod classes.
        """
        return self.generator(z, labels).view(len(z), *self.settings.image_shape)

    forward = generate

    def logits(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images (N, C, H, W), or packs of them, to D's logits (N, 1); where there are classes, with labels int64 (N,).

        They are float32 at least, since losses saturate in half precision.
        """
        return at_least_float32(self.discriminator.logits(images, labels))

    def sampler(
        self, weights: Weights | None = None, statistics: EvalStatistics | None = None
    ) -> AbstractContextManager[Sampler]:
        """Return a block within which G can be sampled, in batches of training's size; arguments are those of sampler_of."""
        return sampler_of(self.generator, self.generator_ema, self.settings, int(self.normalized_together), weights, statistics)

    def sample_latents(self, start: int, stop: int, seed: int = 0) -> Tensor:
        """Return the latents (stop - start, latent_dim) of samples start to stop - 1, the same on every machine."""
        return rng.sample_latents(start, stop, self.settings.latent_dim, seed).to(self._weight)

    def draw_instance_noise(self, count: int, *key: int) -> Tensor:
        """Return noise (count, C, H, W) as D's images have it at this point of training, the same for the same key.

        Who looks at D adds it: D is trained on noisy images, and says other things of clean ones.
        """
        noise = rng.normal((count, *self.settings.image_shape), self.settings.seed, rng.Stream.PROBE, *key)
        return self.discriminator.instance_noise * noise.to(self._weight)

    def batch_norms(self) -> Iterator[tuple[str, BatchNorm]]:
        """Yield the name and the layer of each batch norm of the two networks."""
        for network in ("generator", "discriminator"):
            for name, layer in batch_norm_layers(getattr(self, network)):
                yield f"{network}.{name}", layer

    @property
    def _weight(self) -> Tensor:
        """One of G's weights, whose device and dtype are those of all that is computed."""
        return next(self.generator.parameters())

    # Training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run one iteration on images (n_critic * N, C, H, W) in [-1, 1], or on (images, labels)."""
        (images, labels), done = self._read(batch), self.global_step
        if self.observed is None:
            self._check_first(images, labels)
        schedule = schedule_at(self.settings, done, self.total_iterations)
        self.observed = self._iterate(images, labels, torch.tensor(schedule, dtype=torch.float64).to(self._weight), done)
        self.iteration.add_(1)
        # The Trainer counts optimizers' steps, and here they are taken out of its sight.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        self._log(schedule, done + 1)

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return a batch's images (N, C, H, W) and, where there are classes, their labels (N,)."""
        images, *others = [batch] if isinstance(batch, Tensor) else batch
        if not self.settings.classes:
            return images, None
        if not others:
            raise UsageError(f"--model.classes {self.settings.classes} needs batches of images and labels")
        return images, others[0]

    def _iterate(self, images: Tensor, labels: Tensor | None, schedule: Tensor, done: int) -> Observed:
        assert self._run is not None
        seed = rng.key(self.settings.seed, rng.Stream.ITERATION, done)
        self.seed_layers(done)
        if self._graph is not None and not self._looked_into:
            return self._graph(images, schedule, seed, labels=labels)
        return self._run(images, Schedule(*schedule), self._draws.seeded(seed), labels)

    def seed_layers(self, done: int) -> None:
        """Seed what dropout and the noisy norm draw from, torch's own generator, for the iteration after `done` others."""
        if self.settings.d_dropout or "noisy" in (self.settings.g_norm, self.settings.d_norm):
            torch.manual_seed(rng.key(self.settings.seed, rng.Stream.DROPOUT, done, distributed.rank()))

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Within the block iterations are not replayed from a CUDA graph, so that hooks see what passes."""
        self._looked_into = True
        try:
            yield
        finally:
            self._looked_into = False

    def _log(self, schedule: Schedule[float], iteration: int) -> None:
        assert self.observed is not None
        every: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]  # set from outside
        due = every > 0 and iteration % every == 0
        if due or self.device.type == "cpu":  # reading a loss makes a GPU wait
            self._check_losses()
        if due:
            seen = self.observed._asdict()
            seen |= dict(zip(self.loss.readings, seen.pop("d_readings"), strict=True))
            values = distributed.mean_over_ranks(torch.stack([value.float() for value in seen.values()]))
            scalars = dict(zip(seen, values.tolist(), strict=True))
            scalars |= {"d_lr": schedule.d_lr, "g_lr": schedule.g_lr, "instance_noise": schedule.instance_noise}
            for logger in self.loggers:
                logger.log_metrics({f"train/{name}": value for name, value in scalars.items()}, step=iteration)

    def _check_losses(self) -> None:
        if self.observed is None:
            return
        # A gradient is the mean over all ranks, so that all stop where one has lost its loss. Scaled ones may overflow.
        for name in ["d_loss", "g_loss", *([] if self._scaler else ["d_grad_norm", "g_grad_norm"])]:
            value = float(getattr(self.observed, name))
            if not math.isfinite(value):
                raise NonFiniteLoss(f"{name} is {value} at iteration {int(self.iteration)}; {ADVICE}")

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        plugin = self.trainer.precision_plugin
        return plugin.scaler if isinstance(plugin, MixedPrecision) else None

    @property
    def total_iterations(self) -> float:
        """Iterations that the run has had at its end, known once its data is; infinite where it has no end."""
        return self.count_iterations(self.trainer.num_training_batches)

    def count_iterations(self, batches: float) -> float:
        """Return how many iterations the run has had at its end, if an epoch has so many batches."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        by_epochs = math.inf if epochs in (None, -1) else float(epochs * batches)
        return min(by_epochs, math.inf if steps == -1 else float(steps))

    # Setting up ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam for the discriminator and Adam for the generator, whose learning rate each iteration sets."""
        how = {"betas": (self.settings.beta1, self.settings.beta2), "fused": True, "capturable": self.device.type == "cuda"}
        return [torch.optim.Adam(network.parameters(), **how) for network in (self.discriminator, self.generator)]

    def setup(self, stage: str) -> None:
        """Take on the run's precision and way to multiply."""
        # Lightning does so after a checkpoint's weights have come, when float64 has been rounded.
        self.trainer.precision_plugin.convert_module(self)
        if stage == "fit" and self.trainer.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.settings.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.settings.tf32
            if self.settings.tf32 and self._weight.dtype == torch.float32:
                distributed.print0("Float32 products go through TF32 (--model.tf32 false: in full precision)")
        if self.settings.classes:
            self._check_classes()

    def _check_classes(self) -> None:
        """Refuse data of another number of classes."""
        asked, found = self.settings.classes, getattr(getattr(self.trainer, "datamodule", None), "classes", None)
        if found in (None, asked):
            return
        if found == 1:
            raise UsageError(
                f"--model.classes {asked} needs images of {asked} classes, and the data has none: put each class into a folder "
                "of its own, or leave --model.classes out"
            )
        raise UsageError(f"--model.classes is {asked}, but the data has {found} classes; give --model.classes {found}, or 0")

    def on_fit_start(self) -> None:
        """Keep how many images training normalizes together, now that batch norm is synchronized or not."""
        if batch_size := getattr(getattr(self.trainer, "datamodule", None), "batch_size", None):
            whole = any(is_synchronized(layer) for _, layer in self.batch_norms())
            self.normalized_together.fill_(batch_size // (1 if whole else distributed.world_size()))

    def on_train_start(self) -> None:
        """Put together this run's iteration, now that weights and optimizers are where they will stay."""
        if math.isinf(self.total_iterations) and (self.settings.instance_noise or self.settings.lr_decay_start < 1):
            distributed.print0("The run has no end (max_epochs -1), so noise and learning rates stay constant.")
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False  # the iteration averages gradients itself
        self.observed = None
        self._draws = Draws(self.device)
        for optimizer in self.trainer.optimizers:  # a checkpoint has its own, from another device or with settings overridden
            optimizer.param_groups[0] |= {name: optimizer.defaults[name] for name in ("betas", "capturable")}
        d_optimizer, g_optimizer = self.trainer.optimizers
        self._run = self.build_iteration(
            OptimizerUpdate(d_optimizer, self.settings.d_clip, self._scaler),
            OptimizerUpdate(g_optimizer, self.settings.g_clip, self._scaler),
        )
        # What a profiler is to see must be called.
        profiler = self.trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]  # set from outside
        replayed = self.settings.cuda_graph and self.device.type == "cuda" and isinstance(profiler, PassThroughProfiler)
        self._graph = CudaGraph(self._run, self.device) if replayed else None

    def build_iteration(self, d_update: Update, g_update: Update) -> Iteration:
        """Return one iteration of training on these networks by these settings, whose updates move D's and G's weights."""
        settings, average = self.settings, self.generator_ema
        return Iteration(
            generator=self.generate,
            discriminator=self.logits,
            d_network=self.discriminator,
            d_update=d_update,
            g_update=g_update,
            ema=None if average is None else ExponentialMovingAverage(average, self.generator, settings.ema_buffers),
            latent_dim=settings.latent_dim,
            loss=self.loss,
            batching=settings.batching,
            pack=settings.pack,
            n_critic=settings.n_critic,
            g_steps=settings.g_steps,
            instance_noise=self.discriminator.instance_noise if settings.instance_noise else None,
            r1=settings.r1,
            r2=settings.r2,
            gradient_penalty=settings.wgan_gp,
            update_d_stats_in_g_step=settings.update_d_stats_in_g_step,
        )

    def _check_first(self, images: Tensor, labels: Tensor | None) -> None:
        check_range(images)
        if labels is not None:
            low, high = (int(value) for value in labels.aminmax())  # a CPU-GPU sync point
            if low < 0 or high >= self.settings.classes:
                raise UsageError(
                    f"labels of the first batch reach from {low} to {high}, but with --model.classes {self.settings.classes} "
                    f"classes are 0 to {self.settings.classes - 1}"
                )
        n_critic, ranks = self.settings.n_critic, distributed.world_size()
        if len(images) % n_critic:
            raise UsageError(f"a batch of {len(images)} images cannot be cut into n_critic = {n_critic} equal parts")
        synchronized = all(is_synchronized(layer) for _, layer in self.batch_norms())
        self.check_batch(len(images) // n_critic * ranks, ranks, synchronized=synchronized)
        if needs_reference(self.discriminator):
            set_reference(self.discriminator, distributed.unshard(images))

    def check_batch(self, size: int, ranks: int = 1, *, synchronized: bool = True) -> None:
        """Refuse updates on `size` images over all ranks that the networks cannot be trained on; see settings.check_update."""
        check_update(self.settings, size, ranks, synchronized=synchronized)

    # Validation and checkpoints -----------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Agree on the running statistics, which drift apart where each rank normalizes by its own batch."""
        distributed.average_buffers(self)
        self._validated = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log D's loss and readings on held-out images and fakes, with training's noise, by evaluation's statistics."""
        real_images, labels = self._read(batch)
        start, count = self._validated, distributed.total(len(real_images), self.device)
        self._validated += count
        # The images of a batch are dealt out to the ranks in turn, so each meets the fake that one process would give it.
        fake_images = self.generate(distributed.shard(self.sample_latents(start, start + count)), labels)
        real_noise, fake_noise = map(distributed.shard, self.draw_instance_noise(2 * count, start).chunk(2))
        real, fake = (pack(seen, self.settings.pack) for seen in (real_images + real_noise, fake_images + fake_noise))
        if len(real) == 0:  # the last few images need not fill a pack
            return
        logits = discriminate(of_classes(self.logits, labels), real, fake, self.settings.batching)
        values = {f"val/{name}": value for name, value in zip(self.loss.readings, self.loss.read(*logits), strict=True)}
        values["val/d_loss"] = self.loss.discriminator(*logits)
        self.log_dict(values, batch_size=len(real_images), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Give plots of validation and test the same x axis as all others, where Lightning would count from 0."""
        self.log("step", float(self.iteration))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Do nothing: a test measures samples, which a callback draws."""

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the images (N, C, H, W) of the samples numbered in batch (N,)."""
        first = int(batch.min())
        with self.sampler() as sampler:
            return sampler.samples(first, int(batch.max()) + 1, self.settings.seed)[batch - first]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how long the run is, and refuse to save what NaN or infinity has spoilt: the last good checkpoint stays."""
        checkpoint["total_iterations"] = self.total_iterations
        self._check_losses()
        if spoilt := self.spoilt():
            raise NonFiniteLoss(f"{spoilt}; {ADVICE}")

    def spoilt(self) -> str | None:
        """Return in words the first weights or buffers that are not finite, None where all are."""
        for name, value in self.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all() and not name.endswith("reference"):
                return f"{name} has NaN or infinite values at iteration {int(self.iteration)}"
        return None
