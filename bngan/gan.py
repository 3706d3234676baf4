"""The GAN for Lightning: settings, networks, optimizers, validation; the training itself is bngan.iteration."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bngan import distributed, rng
from bngan.batching import Batching, discriminate
from bngan.batchnorm import (
    BatchNorm,
    EvalStatistics,
    at_least_float32,
    batch_norm_layers,
    evaluation_statistics,
    ghost_groups,
    is_synchronized,
)
from bngan.cuda_graph import CudaGraph
from bngan.ema import EmaBuffers, ExponentialMovingAverage
from bngan.errors import NonFiniteLoss, UsageError
from bngan.iteration import Iteration, Observed, OptimizerUpdate, Update
from bngan.losses import find_loss
from bngan.networks import (
    ConvDiscriminator,
    ConvGenerator,
    Discriminator,
    Generator,
    build_networks,
    needs_reference,
    set_reference,
)
from bngan.sampler import Sampler
from bngan.schedules import Schedule, Schedules
from bngan.settings import check_batch, check_settings

Batch = Tensor | Sequence[Tensor]
Weights = Literal["raw", "ema"]
PRECISE_BATCHES = 64
ADVICE = "try a lower --model.g_lr and --model.d_lr, or another --model.loss; the last checkpoint is unharmed"


class GAN(LightningModule):
    """A generator and a discriminator trained by alternating updates (Goodfellow et al. 2014, algorithm 1).

    One batch is one iteration is one `global_step`: `n_critic` updates of D and one of G, each of D's on batch_size images of
    its own. Everything follows it: the x axis of every plot, schedules, file names, and the Trainer's max_steps.

    Args:
        network: mlp, the source's fully connected networks, or conv, DCGAN's.
        image_shape: (channels, height, width); the command line takes it from the data.
        latent_dim: size of the latent z, which is standard normal.
        hidden_dim: the source's hidden_dim for mlp, the number of filters at full resolution for conv.
        g_norm: norm of the generator: batch, none, layer, group, instance, spectral, reference, ghost or virtual.
        d_norm: norm of the discriminator, likewise.
        bn_eps: what batch norm adds to the variance.
        bn_momentum: weight of the new batch in batch norm's running statistics.
        ghost_groups: groups of the batch that norm ghost normalizes, each by itself.
        d_dropout: fraction of D's hidden activations dropped in training.
        loss: non_saturating, minimax, least_squares, hinge, wasserstein or relativistic.
        label_smoothing: how far below 1 the real label lies, for losses with labels.
        r1: weight of the gradient penalty on real images.
        r2: weight of the gradient penalty on fake images.
        gradient_penalty: weight of WGAN-GP's penalty between them; unset means 10 for wasserstein and 0 for other losses.
        batching: joint normalizes D's real and fake images together, separate each by themselves.
        update_d_stats_in_g_step: whether D's running statistics also move in G's update.
        n_critic: updates of D for one of G.
        g_lr: Adam's learning rate for G.
        d_lr: Adam's learning rate for D.
        beta1: Adam's decay of the gradient's mean.
        beta2: Adam's decay of the gradient's square.
        lr_decay_start: fraction of the run after which both learning rates fall linearly to 0; 1 keeps them constant.
        instance_noise: standard deviation of the Gaussian noise added to every image that D sees, at the start of the run.
        instance_noise_end: fraction of the run over which the noise falls linearly to 0.
        g_clip: largest norm of G's gradient; unset means no limit.
        d_clip: largest norm of D's gradient; unset means no limit.
        ema_decay: decay per iteration of the moving average of G's weights, from which samples are drawn; 0 keeps none.
        ema_buffers: running statistics of that average: copy takes G's own, average averages them like the weights,
            precise works them out anew, on the averaged weights, when samples are drawn.
        eval_statistics: statistics that normalize samples: running, batch (those of the samples' own batch, as in training),
            or precise (pooled over 64 fresh batches).
        cuda_graph: whether training on a GPU replays its iteration as a CUDA graph.
        tf32: whether float32 products on a GPU go through TF32, with 10 bits of mantissa.
        seed: seed of latents and noise.
    """

    generator: Generator | ConvGenerator
    discriminator: Discriminator | ConvDiscriminator
    generator_ema: Generator | ConvGenerator | None
    iteration: Tensor
    normalized_together: Tensor

    def __init__(
        self,
        network: Literal["mlp", "conv"] = "mlp",
        image_shape: tuple[int, int, int] = (1, 28, 28),
        latent_dim: int = 100,
        hidden_dim: int = 128,
        g_norm: str = "batch",
        d_norm: str = "batch",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        ghost_groups: int = 1,
        d_dropout: float = 0.0,
        loss: str = "relativistic",
        label_smoothing: float = 0.0,
        r1: float = 0.0,
        r2: float = 0.0,
        gradient_penalty: float | None = None,
        batching: Batching = "joint",
        update_d_stats_in_g_step: bool = False,
        n_critic: int = 1,
        g_lr: float = 2e-3,
        d_lr: float = 2e-3,
        beta1: float = 0.0,
        beta2: float = 0.999,
        lr_decay_start: float = 0.5,
        instance_noise: float = 1.0,
        instance_noise_end: float = 1.0,
        g_clip: float | None = None,
        d_clip: float | None = None,
        ema_decay: float = 0.999,
        ema_buffers: EmaBuffers = "average",
        eval_statistics: EvalStatistics = "running",
        cuda_graph: bool = True,
        tf32: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if gradient_penalty is None:
            gradient_penalty = 10.0 if loss == "wasserstein" else 0.0
        self.save_hyperparameters(logger=False)
        check_settings(dict(self.hparams))
        self.automatic_optimization = False
        self.image_shape, self.latent_dim, self.seed = (image_shape[0], image_shape[1], image_shape[2]), latent_dim, seed
        self.batching: Batching = batching
        self.n_critic, self.d_dropout = n_critic, d_dropout
        self.r1, self.r2, self.gradient_penalty = r1, r2, gradient_penalty
        self.update_d_stats_in_g_step = update_d_stats_in_g_step
        self.betas, self.g_clip, self.d_clip = (beta1, beta2), g_clip, d_clip
        self.ema_buffers: EmaBuffers = ema_buffers
        self.eval_statistics: EvalStatistics = eval_statistics
        self.cuda_graph, self.tf32 = cuda_graph, tf32
        self.loss = find_loss(loss, label_smoothing)
        self.schedules = Schedules(
            d_lr=d_lr,
            g_lr=g_lr,
            lr_decay_start=lr_decay_start,
            instance_noise=instance_noise,
            instance_noise_end=instance_noise_end,
            ema_decay=ema_decay,
        )
        self.generator, self.discriminator = build_networks(
            network,
            self.image_shape,
            latent_dim,
            hidden_dim,
            g_norm,
            d_norm,
            d_dropout=d_dropout,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            ghost_groups=ghost_groups,
        )
        self.generator_ema = copy.deepcopy(self.generator).requires_grad_(False) if ema_decay else None
        self.discriminator.instance_noise.fill_(instance_noise)
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))  # iterations done
        # Images that pass a network together in training; known once there is data or a checkpoint.
        self.register_buffer("normalized_together", torch.tensor(128))
        self.observed: Observed | None = None  # what the last iteration saw
        self._run: Iteration | None = None
        self._graph: CudaGraph | None = None
        self._looked_into = False

    # Generating ---------------------------------------------------------------------------------------------------

    def generate(self, z: Tensor) -> Tensor:
        """Map latents (N, latent_dim) to images (N, C, H, W) in [-1, 1]."""
        return self.generator(z).view(len(z), *self.image_shape)

    forward = generate

    def logits(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to D's logits (N, 1), in float32 at least, since losses saturate in half precision."""
        return at_least_float32(self.discriminator.logits(images))

    def sample_latents(self, start: int, stop: int, seed: int = 0) -> Tensor:
        """Return the latents (stop - start, latent_dim) of samples start to stop - 1, the same on every machine."""
        return rng.sample_latents(start, stop, self.latent_dim, seed).to(self._weight)

    def draw_instance_noise(self, count: int, *key: int) -> Tensor:
        """Return noise (count, C, H, W) as D's images have it at this point of training, the same for the same key.

        Who looks at D adds it: D is trained on noisy images, and says other things of clean ones.
        """
        noise = rng.normal((count, *self.image_shape), self.seed, rng.Stream.PROBE, *key)
        return self.discriminator.instance_noise * noise.to(self._weight)

    @contextmanager
    def sampler(
        self, weights: Weights | None = None, statistics: EvalStatistics | None = None, batch_size: int | None = None
    ) -> Iterator[Sampler]:
        """Within the block give G ready to be sampled, without gradients; G itself is as before afterwards.

        Args:
            weights: raw for G itself, ema for its moving average; unset means the average where there is one.
            statistics: what normalizes the samples: running, batch or precise; unset means the run's own policy.
            batch_size: size of the batches for batch and precise; unset means that of training.

        Raises:
            UsageError: if there is no average.
        """
        if weights == "ema" and self.generator_ema is None:
            raise UsageError("this GAN keeps no average of G's weights (ema_decay is 0); use weights raw")
        network = self.generator if weights == "raw" or self.generator_ema is None else self.generator_ema
        if statistics is None:
            precise = network is self.generator_ema and self.ema_buffers == "precise" and self.eval_statistics == "running"
            statistics = "precise" if precise else self.eval_statistics
        size = batch_size or int(self.normalized_together)
        batches = (
            rng.normal((size, self.latent_dim), self.seed, rng.Stream.PRECISE, number).to(self._weight)
            for number in range(PRECISE_BATCHES)
        )
        with evaluation_statistics(network, statistics, batches):
            yield Sampler(network, self.image_shape, self.latent_dim, size if statistics == "batch" else None)

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
        images, done = _images(batch), self.global_step
        if self.observed is None:
            self._check_first(images)
        schedule = self.schedules.at(done, self.total_iterations)
        self.observed = self._iterate(images, torch.tensor(schedule, dtype=torch.float64).to(self._weight), done)
        self.iteration.add_(1)
        # The Trainer counts optimizers' steps, and here they are taken out of its sight.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        self._log(schedule, done + 1)

    def _iterate(self, images: Tensor, schedule: Tensor, done: int) -> Observed:
        assert self._run is not None
        seed = rng.key(self.seed, rng.Stream.ITERATION, done)
        if self.d_dropout:
            torch.manual_seed(rng.key(self.seed, rng.Stream.DROPOUT, done, distributed.rank()))
        if self._graph is not None and not self._looked_into:
            return self._graph(images, schedule, seed)
        return self._run(images, Schedule(*schedule), self._rng.manual_seed(seed))

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
        names = ["d_loss", "g_loss", *([] if self._scaler else ["d_grad_norm", "g_grad_norm"])]
        for name in names:
            value = float(getattr(self.observed, name))
            if not math.isfinite(value):
                raise NonFiniteLoss(f"{name} is {value} at iteration {int(self.iteration)}; {ADVICE}")

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        plugin = self.trainer.precision_plugin
        return plugin.scaler if isinstance(plugin, MixedPrecision) else None

    # Setting up ---------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam for the discriminator and Adam for the generator."""
        return [
            torch.optim.Adam(
                network.parameters(),
                lr=self._lr_tensor(lr),
                betas=self.betas,
                fused=True,
                capturable=self.device.type == "cuda",
            )
            for network, lr in ((self.discriminator, self.schedules.d_lr), (self.generator, self.schedules.g_lr))
        ]

    def _lr_tensor(self, lr: float | Tensor) -> Tensor:
        # On a GPU fused Adam reads it as float32, whatever the weights are.
        dtype = torch.float32 if self.device.type == "cuda" else self._weight.dtype
        return torch.as_tensor(lr, device=self.device, dtype=dtype)

    def setup(self, stage: str) -> None:
        """Take on the run's precision and way to multiply."""
        # Lightning does so after a checkpoint's weights have come, when float64 has been rounded.
        self.trainer.precision_plugin.convert_module(self)
        if stage == "fit" and self.trainer.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32
            if self.tf32 and self._weight.dtype == torch.float32:
                distributed.print0("Float32 products go through TF32 (--model.tf32 false: in full precision)")

    def on_fit_start(self) -> None:
        """Keep how many images training normalizes together, now that batch norm is synchronized or not."""
        if batch_size := getattr(getattr(self.trainer, "datamodule", None), "batch_size", None):
            whole = any(is_synchronized(layer) for _, layer in self.batch_norms())
            self.normalized_together.fill_(batch_size // (1 if whole else distributed.world_size()))

    def on_train_start(self) -> None:
        """Put together this run's iteration, now that weights and optimizers are where they will stay."""
        if math.isinf(self.total_iterations) and (self.schedules.instance_noise or self.schedules.lr_decay_start < 1):
            distributed.print0("The run has no end (max_epochs -1), so noise and learning rates stay constant.")
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False  # the iteration averages gradients itself
        self.observed = None
        self._rng = torch.Generator(device=self.device)
        d_optimizer, g_optimizer = self.trainer.optimizers
        for optimizer in (d_optimizer, g_optimizer):
            (group,) = optimizer.param_groups
            # A checkpoint brings its own, from another device or with other settings, which may have been overridden.
            group |= {"lr": self._lr_tensor(group["lr"]), "betas": self.betas, "capturable": self.device.type == "cuda"}
        self._run = self.build_iteration(
            OptimizerUpdate(d_optimizer, self.d_clip, self._scaler), OptimizerUpdate(g_optimizer, self.g_clip, self._scaler)
        )
        # What a profiler is to see must be called.
        profiler = self.trainer.profiler  # pyright: ignore[reportAttributeAccessIssue]  # set from outside
        replayed = self.cuda_graph and self.device.type == "cuda" and isinstance(profiler, PassThroughProfiler)
        self._graph = CudaGraph(self._run, self.device) if replayed else None

    def build_iteration(self, d_update: Update, g_update: Update) -> Iteration:
        """Return one iteration of training on these networks by these settings, whose updates move D's and G's weights."""
        average = self.generator_ema
        return Iteration(
            generator=self.generate,
            discriminator=self.logits,
            d_network=self.discriminator,
            d_update=d_update,
            g_update=g_update,
            ema=None if average is None else ExponentialMovingAverage(average, self.generator, self.ema_buffers),
            latent_dim=self.latent_dim,
            loss=self.loss,
            batching=self.batching,
            n_critic=self.n_critic,
            instance_noise=self.discriminator.instance_noise if self.schedules.instance_noise else None,
            r1=self.r1,
            r2=self.r2,
            gradient_penalty=self.gradient_penalty,
            update_d_stats_in_g_step=self.update_d_stats_in_g_step,
        )

    @property
    def total_iterations(self) -> float:
        """Iterations that the run has had at its end, known once its data is; infinite where it has no end."""
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        by_epochs = math.inf if epochs in (None, -1) else float(epochs * self.trainer.num_training_batches)
        return min(by_epochs, math.inf if steps == -1 else float(steps))

    def _check_first(self, images: Tensor) -> None:
        if len(images) % self.n_critic:
            raise UsageError(f"a batch of {len(images)} images cannot be cut into n_critic = {self.n_critic} equal parts")
        ranks = distributed.world_size()
        synchronized = all(is_synchronized(layer) for _, layer in self.batch_norms())
        self.check_batch(len(images) // self.n_critic * ranks, ranks, synchronized=synchronized)
        if needs_reference(self.discriminator):
            set_reference(self.discriminator, distributed.unshard(images))

    def check_batch(self, size: int, ranks: int = 1, *, synchronized: bool = True) -> None:
        """Refuse updates on `size` images over all ranks if batch norm cannot be trained on them; see settings.check_batch."""
        if any(self.batch_norms()):
            groups = ghost_groups(self) if "ghost" in (self.hparams["g_norm"], self.hparams["d_norm"]) else None
            check_batch(size, ranks, groups, synchronized=synchronized)

    # Validation and checkpoints -----------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Agree on the running statistics, which drift apart where each rank normalizes by its own batch."""
        distributed.average_buffers(self)
        self._validated = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log D's loss and readings on held-out images and fakes, with training's noise, by evaluation's statistics."""
        real_images = _images(batch)
        start, count = self._validated, distributed.total(len(real_images), self.device)
        self._validated += count
        # The images of a batch are dealt out to the ranks in turn, so each meets the fake that one process would give it.
        fake_images = self.generate(distributed.shard(self.sample_latents(start, start + count)))
        real_noise, fake_noise = map(distributed.shard, self.draw_instance_noise(2 * count, start).chunk(2))
        logits = discriminate(self.logits, real_images + real_noise, fake_images + fake_noise, self.batching)
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
            return sampler.samples(first, int(batch.max()) + 1, self.seed)[batch - first]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save what NaN or infinity has spoilt, so that the last good checkpoint stays."""
        self._check_losses()
        for name, value in self.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all() and not name.endswith("reference"):
                raise NonFiniteLoss(f"{name} has NaN or infinite values at iteration {int(self.iteration)}; {ADVICE}")


def _images(batch: Batch) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]
