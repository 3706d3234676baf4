"""The GAN: two networks, two optimizers, alternating updates."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from itertools import count
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bngan import distributed, randomness
from bngan.adam import Adam
from bngan.batchnorm import (
    SAMPLINGS,
    Batching,
    BatchNorm,
    Sampling,
    batch_norm_layers,
    frozen_statistics,
    sampling_statistics,
    score,
)
from bngan.losses import find_loss, gradient_penalty, zero_centered_penalty
from bngan.networks import Dropout, build_networks, needs_reference, set_reference
from bngan.norms import BATCH_COUPLED
from bngan.randomness import Stream

Batch = Tensor | Sequence[Tensor]
Draw = Callable[..., Tensor]
Play = Callable[..., Tensor]
Listener = Callable[[Trainer, "GAN"], None]
Weights = Literal["raw", "average"]
EmaBuffers = Literal["copy", "average", "recalibrate"]
EMA_BUFFERS: tuple[EmaBuffers, ...] = ("copy", "average", "recalibrate")
PRECISE_BATCHES = 64
# What Lightning calls around each backward and each step of an optimizer.
UPDATE_HOOKS = ("on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step")
ADVICE = "try a lower --model.g_lr and --model.d_lr, or another --model.loss; the last checkpoint is unharmed"
PENALTY_REASON = (
    "a gradient penalty is defined for each image by itself, but batch norm makes D's output for one image depend on the others"
)


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite: nothing trained from here on would mean anything."""


class GAN(LightningModule):
    """A generator and a discriminator trained by alternating updates (Goodfellow et al. 2014, algorithm 1).

    One alternation is `n_critic` updates of D followed by one of G. `iteration` counts alternations, and everything else
    follows it: the x axis of every plot, schedules, file names, and the Trainer's max_steps. Each update sees a batch of
    its own, so an alternation takes n_critic times as many images as one update uses.

    A step of the Trainer is one alternation, or as many as the data's alternations_per_step says. A callback of the Trainer
    that must see single ones may have `on_alternation_start(trainer, gan)` and `on_alternation_end(trainer, gan)`.

    Args:
        network: mlp, the text's fully connected networks, or conv, DCGAN's.
        image_shape: (channels, height, width); the command line takes it from the data.
        latent_dim: size of the latent z, which is standard normal.
        hidden_dim: the text's hidden_dim for mlp, the number of filters at full resolution for conv.
        g_norm: norm of the generator: batch, none, layer, group, instance, spectral, reference or virtual.
        d_norm: norm of the discriminator, likewise.
        bn_eps: what batch norm adds to the variance.
        bn_momentum: weight of the new batch in batch norm's running statistics.
        d_dropout: share of D's hidden activations dropped in training.
        loss: non_saturating, minimax, least_squares, hinge, wasserstein or relativistic.
        label_smoothing: how far below 1 the real label lies, for losses with labels.
        r1: weight of the gradient penalty on real images.
        r2: weight of the gradient penalty on fake images.
        gradient_penalty: weight of WGAN-GP's penalty between them; unset means 10 for wasserstein and 0 for other losses.
        batching: joint normalizes D's real and fake images together, separate each by themselves.
        d_tracks_g_step: whether D's running statistics also move in G's step.
        n_critic: updates of D for one of G.
        accumulate: parts into which each update's batch is cut, their gradients averaged, to save memory.
        g_lr: Adam's learning rate for G.
        d_lr: Adam's learning rate for D.
        beta1: Adam's decay of the gradient's mean.
        beta2: Adam's decay of the gradient's square.
        lr_decay_start: share of the run after which both learning rates fall linearly to 0; 1 keeps them constant.
        noise: standard deviation of the Gaussian noise added to every image that D sees, at the start of the run.
        noise_end: share of the run over which the noise falls linearly to 0.
        g_clip: largest norm of G's gradient; unset means no limit.
        d_clip: largest norm of D's gradient; unset means no limit.
        ema_decay: decay per iteration of the moving average of G's weights, from which samples are drawn, and at most
            1 - 10 / (iterations + 10); 0 keeps none.
        ema_buffers: running statistics of that average: copy takes G's own, average averages them like the weights,
            recalibrate works them out anew, on the averaged weights, when samples are drawn.
        sampling: statistics that samples are normalized by: running, batch (those of the samples' own batch, as in
            training), or precise (pooled over 64 fresh batches).
        compile: whether training runs both networks through torch.compile, on a GPU as CUDA graphs. The first iterations
            then take a minute or two; what comes out differs by rounding.
        seed: seed of latents and noise.
    """

    iteration: Tensor

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
        d_dropout: float = 0.0,
        loss: str = "relativistic",
        label_smoothing: float = 0.0,
        r1: float = 0.0,
        r2: float = 0.0,
        gradient_penalty: float | None = None,
        batching: Batching = "joint",
        d_tracks_g_step: bool = False,
        n_critic: int = 1,
        accumulate: int = 1,
        g_lr: float = 2e-3,
        d_lr: float = 2e-3,
        beta1: float = 0.0,
        beta2: float = 0.999,
        lr_decay_start: float = 0.5,
        noise: float = 1.0,
        noise_end: float = 1.0,
        g_clip: float | None = None,
        d_clip: float | None = None,
        ema_decay: float = 0.999,
        ema_buffers: EmaBuffers = "average",
        sampling: Sampling = "running",
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if gradient_penalty is None:
            gradient_penalty = 10.0 if loss == "wasserstein" else 0.0
        self.save_hyperparameters(logger=False)
        _check_numbers(
            positive={
                "g_lr": g_lr,
                "d_lr": d_lr,
                "g_clip": g_clip,
                "d_clip": d_clip,
                "noise_end": noise_end,
                "bn_eps": bn_eps,
            },
            not_negative={"r1": r1, "r2": r2, "gradient_penalty": gradient_penalty, "noise": noise},
            at_least_one={"n_critic": n_critic, "accumulate": accumulate, "latent_dim": latent_dim},
            below_one={"beta1": beta1, "beta2": beta2, "label_smoothing": label_smoothing, "ema_decay": ema_decay},
        )
        if not 0 < bn_momentum <= 1:
            raise ValueError(f"bn_momentum must be above 0 and at most 1, got {bn_momentum}")
        if not 0 <= lr_decay_start <= 1:
            raise ValueError(f"lr_decay_start must be in [0, 1], got {lr_decay_start}")
        _check_choice("batching", batching, ("joint", "separate"))
        _check_choice("ema_buffers", ema_buffers, EMA_BUFFERS)
        _check_choice("sampling", sampling, SAMPLINGS)
        if (r1 or r2 or gradient_penalty) and d_norm in BATCH_COUPLED:
            raise ValueError(
                f"d_norm {d_norm!r} cannot be combined with r1, r2 or gradient_penalty: {PENALTY_REASON}; "
                "use --model.d_norm layer, group, spectral or none"
            )
        if (r1 or r2 or gradient_penalty) and compile:
            raise ValueError(
                "compile cannot be combined with r1, r2 or gradient_penalty: torch.compile does not differentiate a gradient; "
                "leave out --model.compile"
            )
        if d_dropout and compile:
            raise ValueError("compile cannot be combined with d_dropout, whose masks come from without; leave it out")

        self.automatic_optimization = False
        self.image_shape = tuple(image_shape)
        self.latent_dim = latent_dim
        self.batching: Batching = batching
        self.d_tracks_g_step = d_tracks_g_step
        self.n_critic = n_critic
        self.accumulate = accumulate
        self.loss = find_loss(loss, label_smoothing)
        self.r1, self.r2, self.gradient_penalty = r1, r2, gradient_penalty
        self.g_lr, self.d_lr, self.betas = g_lr, d_lr, (beta1, beta2)
        self.lr_decay_start = lr_decay_start
        self.d_dropout = d_dropout
        self.noise, self.noise_end = noise, noise_end
        self.g_clip, self.d_clip = g_clip, d_clip
        self.ema_decay = ema_decay
        self.ema_buffers: EmaBuffers = ema_buffers
        self.default_sampling: Sampling = sampling
        self.compiled = compile
        self.seed = seed
        self.generator, self.discriminator = build_networks(
            network,
            cast(tuple[int, int, int], self.image_shape),
            latent_dim,
            hidden_dim,
            g_norm,
            d_norm,
            d_dropout=d_dropout,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
        )
        self.average: AveragedModel | None = None
        if ema_decay:
            self.average = AveragedModel(self.generator).requires_grad_(False)
        # Alternations done. The buffer survives in checkpoints; the integer can be read without waiting for the device.
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))
        self.iterations_done = 0
        self.register_load_state_dict_post_hook(_read_iteration)
        # What the last alternation saw, for whoever plots it.
        self.d_loss = self.g_loss = torch.zeros(())
        self.observed: dict[str, Tensor] = {}
        # Images per update over all devices; known once there is data or a checkpoint.
        self.batch_size = 128
        self._images_per_alternation = 0  # on this device; 0: all that a step has
        self._starters: list[Listener] = []
        self._enders: list[Listener] = []
        self._due = False
        self._unhooked = False
        self._checked_size = 0
        self._validated = 0

    # Generating ---------------------------------------------------------------------------------------------------

    def generate(self, z: Tensor) -> Tensor:
        """Map latents (N, latent_dim) to images (N, C, H, W) in [-1, 1]."""
        return self.generator(z).view(len(z), *self.image_shape)

    forward = generate

    def logits(self, *batches: Tensor) -> Tensor:
        """Map images (N, C, H, W), in one or several batches that are normalized as one, to D's logits (N, 1).

        They are float32 at least, since losses saturate in half precision.
        """
        logits = cast(Any, self.discriminator).logits(*batches)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def sample_latents(self, start: int, stop: int, seed: int = 0) -> Tensor:
        """Return the latents (stop - start, latent_dim) of samples start to stop - 1, the same on every machine."""
        return randomness.sample_latents(start, stop, self.latent_dim, seed).to(self.device, self.dtype_of_networks)

    @contextmanager
    def sampler(
        self, weights: Weights | None = None, sampling: Sampling | None = None, batch_size: int | None = None
    ) -> Iterator["Sampler"]:
        """Within the block give G ready to be sampled, without gradients; G itself is as before afterwards.

        Args:
            weights: raw for G itself, average for its moving average; unset means the average where there is one.
            sampling: statistics that normalize the samples: running, batch or precise; unset means the run's own policy.
            batch_size: size of the batches for batch and precise; unset means that of training.

        Raises:
            ValueError: if there is no average.
        """
        if weights == "average" and self.average is None:
            raise ValueError("this GAN keeps no average of G's weights (ema_decay is 0); use weights raw")
        averaged = weights != "raw" and self.average is not None
        network = cast(AveragedModel, self.average).module if averaged else self.generator
        if sampling is None:
            recalibrated = averaged and self.ema_buffers == "recalibrate" and self.default_sampling == "running"
            sampling = "precise" if recalibrated else self.default_sampling
        batch_size = batch_size or self.normalized_together
        batches = (
            randomness.normal((batch_size, self.latent_dim), self.seed, Stream.RECALIBRATION, number).to(
                self.device, self.dtype_of_networks
            )
            for number in range(PRECISE_BATCHES)
        )
        with sampling_statistics(network, sampling, batches):
            yield Sampler(self, network, batch_size if sampling == "batch" else None)

    @property
    def normalized_together(self) -> int:
        """How many images G's batch norm normalizes together in training."""
        synchronized = any(
            isinstance(layer, distributed.SynchronizedBatchNorm) for _, layer in batch_norm_layers(self.generator)
        )
        return max(2, self.batch_size // self.accumulate // (1 if synchronized else distributed.world_size()))

    def batch_norms(self) -> Iterator[tuple[str, BatchNorm]]:
        """Yield the name and the layer of each batch norm of the two players."""
        for player in ("generator", "discriminator"):
            for name, layer in batch_norm_layers(getattr(self, player)):
                yield f"{player}.{name}", layer

    @property
    def dtype_of_networks(self) -> torch.dtype:
        return next(self.generator.parameters()).dtype

    @cached_property
    def _dtype_in_run(self) -> torch.dtype:
        """That of the networks in a run, in which it does not change."""
        return self.dtype_of_networks

    # Training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run alternations on images in [-1, 1], n_critic * N (C, H, W) of them for each, or on (images, labels)."""
        d_optimizer, g_optimizer = self._counted_optimizers()
        for images in self.by_alternation(batch):
            self._tell(self._starters)
            self._alternate(images, d_optimizer, g_optimizer)
            self._tell(self._enders)

    def _alternate(self, images: Tensor, d_optimizer: LightningOptimizer, g_optimizer: LightningOptimizer) -> None:
        """Update D n_critic times and G once, on images (n_critic * N, C, H, W)."""
        self._schedule(d_optimizer, g_optimizer)
        if self.compiled and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        dropouts = self._guide_dropout(images)
        for turn, real_images in enumerate(self._split_batch(images)):
            real_seen, noise = self._blur(real_images, turn)
            fake_seen = self._update_discriminator(d_optimizer, real_seen, noise, turn)
            if turn == self.n_critic - 1:
                self._update_generator(g_optimizer, real_seen, fake_seen, noise)
        for layer in dropouts:
            layer.draw = None
        self.iteration.add_(1)
        self.iterations_done += 1
        self._update_average()
        self._report()

    def _update_discriminator(
        self, optimizer: LightningOptimizer, real_images: Tensor, noise: Tensor | None, turn: int
    ) -> Tensor | None:
        """Improve D on real images (N, ...) and as many new fakes; return these, with the way back to G, if they are kept."""
        fakes = None
        z = self._latents(len(real_images), turn)
        mixes: Sequence[Tensor | None] = [None] * self.accumulate
        if self.gradient_penalty:
            mixes = self._draw(torch.rand, len(real_images), (), Stream.PENALTY, turn).chunk(self.accumulate)
        for mix, (real, latents, blur) in zip(mixes, self._parts(real_images, z, noise), strict=True):
            # One forward of G serves both players, unless the batch is cut up because its graph does not fit in memory.
            with nullcontext() if self.accumulate == 1 else torch.no_grad():
                fakes = _blurred(self._players[0](latents), blur)
            real_seen = real.detach().requires_grad_(self.r1 > 0)
            fake_seen = fakes.detach().requires_grad_(self.r2 > 0)
            real_logits, fake_logits = score(self._players[1], real_seen, fake_seen, self.batching)
            objective = self.loss.discriminator(real_logits, fake_logits)
            self.d_loss = objective.detach()
            if self.r1:
                objective = objective + self.r1 * zero_centered_penalty(real_seen, real_logits)
            if self.r2:
                objective = objective + self.r2 * zero_centered_penalty(fake_seen, fake_logits)
            if mix is not None:
                penalty = gradient_penalty(self.logits, real_seen, fake_seen, mix)
                objective = objective + self.gradient_penalty * penalty
            self._backward(objective, optimizer)
            self._observe("d", self.d_loss, real_logits, fake_logits)
        self._step(optimizer, self.d_clip, "d")
        return fakes if self.accumulate == 1 else None

    def _update_generator(
        self, optimizer: LightningOptimizer, real_images: Tensor, fake_seen: Tensor | None, noise: Tensor | None
    ) -> None:
        """Improve G against the D just improved, on the fakes that D saw or, if they were not kept, on new ones."""
        kept = fake_seen is not None
        source = fake_seen if kept else self._latents(len(real_images), turn=self.n_critic)
        # D's running statistics describe the games that D played; whether G's turn is one of them is a policy.
        with nullcontext() if self.d_tracks_g_step else frozen_statistics(*self._d_norms):
            for real, part, blur in self._parts(real_images, source, noise):
                fakes = part if kept else _blurred(self._players[0](part), blur)
                real_logits, fake_logits = score(self._players[1], real, fakes, self.batching)
                objective = self.loss.generator(real_logits, fake_logits)
                self.g_loss = objective.detach()
                self._backward(objective, optimizer)
                self._observe("g", self.g_loss, real_logits, fake_logits)
        self._step(optimizer, self.g_clip, "g")

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is None:
            return
        # Early weights are soon worthless, so the average spans no more than the last tenth of the iterations.
        decay = min(self.ema_decay, 1 - 10 / (self.iterations_done + 10)) if self.iterations_done > 1 else 0.0
        averages, values, copies, originals = self._averaged
        torch._foreach_lerp_(averages, values, weight=1 - decay)
        if copies:
            torch._foreach_copy_(copies, originals)
        self.average.n_averaged.add_(1)

    @cached_property
    def _averaged(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The average's tensors that move towards G's, these, the average's that are copies of G's, and these."""
        assert self.average is not None
        averages: list[Tensor] = [*self.average.module.parameters()]
        values: list[Tensor] = [*self.generator.parameters()]
        copies, originals = [], []
        for own, generators in zip(self.average.module.buffers(), self.generator.buffers(), strict=True):
            moving = self.ema_buffers == "average" and own.is_floating_point()
            (averages if moving else copies).append(own)
            (values if moving else originals).append(generators)
        return averages, values, copies, originals

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Adam for the discriminator and Adam for the generator."""
        return [
            Adam(self.discriminator.parameters(), lr=self.d_lr, betas=self.betas),
            Adam(self.generator.parameters(), lr=self.g_lr, betas=self.betas),
        ]

    def setup(self, stage: str) -> None:
        """Learn the batch size, by which samples may be normalized, and who must be told of each alternation."""
        trainer = cast(Any, self.trainer)
        self.batch_size = getattr(trainer.datamodule, "batch_size", self.batch_size)
        grouped = getattr(trainer.datamodule, "group", 1) > 1
        self._images_per_alternation = self.batch_size * self.n_critic // trainer.world_size if grouped else 0
        self._starters, self._enders = (
            [getattr(callback, hook) for callback in trainer.callbacks if hasattr(callback, hook)]
            for hook in ("on_alternation_start", "on_alternation_end")
        )
        self.__dict__.pop("total_iterations", None)

    def on_train_start(self) -> None:
        """Forget what another run has left, and see who looks into updates."""
        for made_for_this_run in ("_averaged", "_players", "_noises", "_d_norms", "_dtype_in_run"):
            self.__dict__.pop(made_for_this_run, None)
        self._unhooked = _nobody_looks_into_updates(self.trainer)
        for optimizer in cast(list[torch.optim.Optimizer], self.trainer.optimizers):
            for group in optimizer.param_groups:
                group["betas"] = self.betas  # a checkpoint brings its own, which may have been overridden
        if math.isinf(self.total_iterations) and (self.noise or self.lr_decay_start < 1):
            rank_zero_info("The run has no end (max_epochs -1), so noise and learning rates stay constant.")

    def on_validation_start(self) -> None:
        """Agree on the running statistics, which drift apart where each rank normalizes by its own batch."""
        distributed.average_buffers(self)
        self._validated = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log D's loss and probabilities on held-out images and fakes, by the statistics that evaluation uses."""
        real_images = _images(batch)
        # The images of a batch are dealt out to the ranks in turn, so each meets the fake that one process would give it.
        everyone = distributed.total(len(real_images), self.device)
        latents = self.sample_latents(self._validated, self._validated + everyone)
        fake_images = self.generate(latents[distributed.rank() :: distributed.world_size()])
        self._validated += everyone
        real_logits, fake_logits = score(self.logits, real_images, fake_images, self.batching)
        self.log_dict(
            {
                "val/d_loss": self.loss.discriminator(real_logits, fake_logits),
                "val/d_real": real_logits.sigmoid().mean(),
                "val/d_fake": fake_logits.sigmoid().mean(),
            },
            batch_size=len(real_images),
            sync_dist=True,
        )

    def on_validation_epoch_end(self) -> None:
        """Give validation's plots the same x axis as all others, where Lightning would count from 0."""
        if self.trainer.state.fn == "fit":
            self.log("step", float(self.iterations_done))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Do nothing: a test measures samples, which a callback draws."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the images (N, C, H, W) of the samples numbered in batch (N,)."""
        first = int(batch.min())
        with self.sampler() as sampler:
            return sampler.samples(first, int(batch.max()) + 1, self.seed)[batch - first]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take on the run's precision before the weights come: Lightning does so after, when float64 has been rounded."""
        if self._trainer is not None:
            self.trainer.precision_plugin.convert_module(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save what NaN or infinity has spoilt, so that the last good checkpoint stays."""
        self._check_losses()
        for name, value in self.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all() and not name.endswith("reference"):
                raise NonFiniteLoss(f"{name} has NaN or infinite values at iteration {self.iterations_done}; {ADVICE}")

    # What one alternation needs -----------------------------------------------------------------------------------

    @cached_property
    def total_iterations(self) -> float:
        """Alternations that the run has had at its end, known once it begins; infinite where it has no end."""
        if self._trainer is None:
            return math.inf
        trainer = cast(Any, self.trainer)
        steps = trainer.num_training_batches
        epoch = trainer.datamodule.alternations(steps) if hasattr(trainer.datamodule, "alternations") else steps
        ends = [trainer.max_epochs * epoch] if trainer.max_epochs != -1 else []
        ends += [trainer.max_steps] if trainer.max_steps != -1 else []
        return float(min(ends, default=math.inf))

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]; 0 throughout where the run has no end."""
        return min(1.0, self.iterations_done / self.total_iterations)

    @property
    def _lr_scale(self) -> float:
        return min(1.0, (1 - self.progress) / (1 - self.lr_decay_start)) if self.lr_decay_start < 1 else 1.0

    @property
    def _noise_level(self) -> float:
        return self.noise * max(0.0, 1 - self.progress / self.noise_end)

    def _counted_optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer]:
        d_optimizer, g_optimizer = cast(list[LightningOptimizer], self.optimizers())
        # The Trainer counts optimizer steps and stops, saves and validates by that count: let G's alone be counted, once
        # an alternation. Lightning renews these two hooks before each step of its own.
        profiler = cast(Any, self.trainer).profiler
        d_optimizer._on_before_step = partial(profiler.start, "optimizer_step")
        d_optimizer._on_after_step = partial(profiler.stop, "optimizer_step")
        return d_optimizer, g_optimizer

    def _schedule(self, *optimizers: LightningOptimizer) -> None:
        scale = self._lr_scale
        for optimizer, lr in zip(optimizers, (self.d_lr, self.g_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        every = cast(Any, self.trainer).log_every_n_steps
        self._due = every > 0 and (self.iterations_done + 1) % every == 0

    def check_batch(self, size: int) -> None:
        """Refuse batches of a size that cannot be trained on.

        Args:
            size: images of one alternation on one device.

        Raises:
            ValueError: if it cannot be cut into equal parts, or the parts are too small for batch norm.
        """
        parts = self.n_critic * self.accumulate
        if size % parts:
            raise ValueError(f"a batch of {size} images cannot be cut into n_critic * accumulate = {parts} equal parts")
        if size // parts < 2 and any(self.batch_norms()):
            raise ValueError(
                f"batch norm needs at least 2 images at a time on each device, and here has {size // parts}: raise "
                "--data.batch_size or lower --model.accumulate"
            )

    def by_alternation(self, batch: Batch) -> tuple[Tensor, ...]:
        """Cut a step's images into those of its alternations."""
        images = _images(batch)
        return images.split(self._images_per_alternation) if self._images_per_alternation else (images,)

    def _tell(self, listeners: list[Listener]) -> None:
        if listeners:
            # They draw and measure as they would between steps, whatever the precision of training.
            device = self.device.type
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                for listener in listeners:
                    listener(self.trainer, self)

    def _split_batch(self, images: Tensor) -> tuple[Tensor, ...]:
        if len(images) != self._checked_size:
            self.check_batch(len(images))
            if needs_reference(self.discriminator):
                set_reference(self.discriminator, self.trainer.strategy.broadcast(images))
            self._checked_size = len(images)
        return images.chunk(self.n_critic) if self.n_critic > 1 else (images,)

    def _parts(
        self, real_images: Tensor, source: Tensor, noise: Tensor | None
    ) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
        """Cut an update's real images, latents or fakes, and noise into `accumulate` parts."""
        if self.accumulate == 1:
            return [(real_images, source, noise)]
        blurs = [None] * self.accumulate if noise is None else noise.chunk(self.accumulate)
        return zip(real_images.chunk(self.accumulate), source.chunk(self.accumulate), blurs, strict=True)

    def _latents(self, count: int, turn: int) -> Tensor:
        return self._draw(torch.randn, count, (self.latent_dim,), Stream.LATENTS, turn)

    def _blur(self, real_images: Tensor, turn: int) -> tuple[Tensor, Tensor | None]:
        """Return N real images as D sees them, and noise (N, C, H, W) for as many fakes, or None once it has died away."""
        level = self._noise_level
        if level == 0:
            return real_images, None
        whole = self._for_all(len(real_images), (2, *self.image_shape))
        noise = self._noises.rows(self.iterations_done * self.n_critic + turn, whole).mul_(level)
        return real_images + noise[:, 0], noise[:, 1]

    @cached_property
    def _noises(self) -> distributed.SharedDraws:
        """Instance noise by the number of D's update."""
        return distributed.SharedDraws(self._draw_noise, parts=self.accumulate)

    def _draw_noise(self, number: int, target: Tensor) -> None:
        target.normal_(generator=self._generator(Stream.NOISE, *divmod(number, self.n_critic)))

    def _draw(self, draw: Draw, count: int, shape: tuple[int, ...], stream: Stream, turn: int) -> Tensor:
        """Draw (count, *shape), this rank's share of what one process would draw for all ranks."""
        everyone = self._for_all(count, shape)
        draw(everyone.shape, generator=self._generator(stream, self.iterations_done, turn), out=everyone)
        return distributed.own_rows(everyone, parts=self.accumulate)

    def _for_all(self, count: int, shape: tuple[int, ...]) -> Tensor:
        """Return an empty tensor for what is drawn where each rank needs (count, *shape)."""
        return torch.empty((count * distributed.world_size(), *shape), device=self.device, dtype=self._dtype_in_run)

    def _generator(self, stream: Stream, iteration: int, turn: int) -> torch.Generator:
        return randomness.generator(self.seed, stream, iteration, turn, device=self.device)

    @cached_property
    def _d_norms(self) -> list[BatchNorm]:
        """D's batch norm layers, which are looked for once a run."""
        return [layer for _, layer in batch_norm_layers(self.discriminator)]

    @cached_property
    def _players(self) -> tuple[Play, Play]:
        """G, from latents to images, and D, from images to logits, as training calls them."""
        if not self.compiled:
            return self.generate, self.logits
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        generate, logits = (torch.compile(play, mode=mode, dynamic=False) for play in (self.generate, self.logits))
        return generate, logits

    def _guide_dropout(self, batch: Batch) -> list[Dropout]:
        """Let D drop in an alternation what one process would drop, and nothing of torch's global generator; return by whom."""
        if not self.d_dropout:
            return []
        layers = [layer for layer in self.discriminator.modules() if isinstance(layer, Dropout)]
        reference = self.discriminator.reference
        shared = len(reference) if isinstance(reference, Tensor) else 0
        rows = len(_images(batch)) // (self.n_critic * self.accumulate)
        ranks, key = distributed.world_size(), (self.seed, Stream.DROPOUT, self.iterations_done)
        numbers = count()

        def draw(shape: torch.Size) -> Tensor:
            # D is given real images, fake ones or, one after the other, both, behind a reference that all ranks share.
            own = shape[0] - shared
            generator = randomness.generator(*key, next(numbers), device=self.device)
            everyone = torch.rand(
                (shared + ranks * own, *shape[1:]), generator=generator, device=self.device, dtype=self.dtype_of_networks
            )
            return torch.cat([everyone[:shared], distributed.own_rows(everyone[shared:], parts=own // rows)])

        for layer in layers:
            layer.draw = draw
        return layers

    def _backward(self, objective: Tensor, optimizer: LightningOptimizer) -> None:
        """Add an objective's gradient, or that of one of several parts of a batch, to those of the optimizer's weights."""
        loss = objective / self.accumulate if self.accumulate > 1 else objective
        # Naming the inputs spares the other player's weights their gradients. The ranks agree in _step, once an update.
        inputs = optimizer.param_groups[0]["params"]
        if self._unhooked:
            loss.backward(inputs=inputs)
            return
        wrapped = self.trainer.model
        quiet = wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()
        with quiet:
            self.manual_backward(loss, inputs=inputs)

    def _step(self, optimizer: LightningOptimizer, clip: float | None, player: str) -> None:
        parameters = optimizer.param_groups[0]["params"]
        distributed.average_gradients(parameters, self.d_loss if player == "d" else self.g_loss)
        if clip is not None or self._due:
            self._unscale(optimizer)
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, clip, norm)
            if self._due:
                self.observed[f"train/{player}_grad_norm"] = norm
        if self._unhooked:
            optimizer._on_before_step()
            cast(Adam, optimizer.optimizer).update()
            optimizer._on_after_step()
        else:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    def _unscale(self, optimizer: LightningOptimizer) -> None:
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            plugin.scaler.unscale_(optimizer.optimizer)

    # Reporting ----------------------------------------------------------------------------------------------------

    def _observe(self, player: str, loss: Tensor, real_logits: Tensor, fake_logits: Tensor) -> None:
        if self._due:
            self.observed[f"train/{player}_loss"] = loss
            if player == "d":
                self.observed["train/d_real"] = real_logits.detach().sigmoid().mean()
                self.observed["train/d_fake"] = fake_logits.detach().sigmoid().mean()

    def _report(self) -> None:
        # Reading a loss makes a GPU wait, so there it is read only when due.
        if self._due or self.device.type == "cpu":
            self._check_losses()
        if self._due:
            values = distributed.average(torch.stack([value.float() for value in self.observed.values()]))
            scalars = dict(zip(self.observed, values.tolist(), strict=True))
            scalars["train/g_lr"] = self.g_lr * self._lr_scale
            scalars["train/noise"] = self._noise_level
            for logger in self.loggers:
                logger.log_metrics(scalars, step=self.iterations_done)

    def _check_losses(self) -> None:
        for name, value in (("d_loss", self.d_loss), ("g_loss", self.g_loss)):
            if not math.isfinite(float(value)):
                raise NonFiniteLoss(f"{name} is {float(value)} at iteration {self.iterations_done}; {ADVICE}")


class Sampler:
    """A generator ready to be sampled, as GAN.sampler gives it."""

    def __init__(self, gan: GAN, network: nn.Module, block: int | None) -> None:
        self._gan, self._network, self._block = gan, network, block

    def generate(self, z: Tensor) -> Tensor:
        """Map latents (N, latent_dim) to images (N, C, H, W) in [-1, 1]."""
        return self._network(z).view(len(z), *self._gan.image_shape)

    def samples(self, start: int, stop: int, seed: int = 0) -> Tensor:
        """Return the samples (stop - start, C, H, W) numbered start to stop - 1, the same however they are cut up.

        Where samples are normalized by their own batch, sample i's batch-mates are those of its block of batch_size.
        """
        if self._block is None:
            return self.generate(self._gan.sample_latents(start, stop, seed))
        first = start // self._block * self._block
        blocks = [
            self.generate(self._gan.sample_latents(number, number + self._block, seed))
            for number in range(first, stop, self._block)
        ]
        return torch.cat(blocks)[start - first : stop - first]


def _nobody_looks_into_updates(trainer: Any) -> bool:
    """Tell whether an update may go straight to torch: Lightning's way is the same, through 40 hooks that nobody uses."""
    plugin = trainer.precision_plugin
    scaled = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
    timed = not isinstance(trainer.profiler, PassThroughProfiler)
    hooked = any(is_overridden(hook, callback, parent=Callback) for hook in UPDATE_HOOKS for callback in trainer.callbacks)
    own = any(is_overridden(hook, trainer.lightning_module, parent=LightningModule) for hook in UPDATE_HOOKS)
    return not (scaled or timed or hooked or own)


def _images(batch: Batch) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]


def _blurred(images: Tensor, noise: Tensor | None) -> Tensor:
    return images if noise is None else images + noise


def _read_iteration(module: nn.Module, _: Any) -> None:
    assert isinstance(module, GAN)
    module.iterations_done = int(module.iteration)


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(allowed)}")


def _check_numbers(
    positive: dict[str, float | None],
    not_negative: dict[str, float],
    at_least_one: dict[str, int],
    below_one: dict[str, float],
) -> None:
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")
    for name, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0, got {value}")
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in below_one.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
