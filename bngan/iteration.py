"""One iteration of training, as in the box of the paper: a pure tensor program in plain PyTorch.

What changes from iteration to iteration is in tensors: the images, the schedule, the state of the generator of random numbers.
Nothing is read back to the host, and no branch depends on a value. So the same program runs eagerly on any device, as a CUDA
graph, and over R runs at once: these are dimension 1 of latents, images and logits, (N, R, ...), and dimension 0 of weights and
of what the schedule holds. Losses are then means over the runs, too.
"""

# pyright: reportPossiblyUnboundVariable=false
# n_critic and g_steps are at least 1, so what the loops over updates leave is there.

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from bngan.batching import Batching, Logits, discriminate, of_classes, pack
from bngan.batchnorm.statistics import frozen_statistics
from bngan.distributed import average_gradients, shard, world_size
from bngan.ema import ExponentialMovingAverage
from bngan.losses import Loss, gradient_penalty, zero_centered_penalty
from bngan.schedules import Schedule


class Observed(NamedTuple):
    """What an iteration saw on this rank, on the device: scalars of G's update and of the last one of D."""

    d_loss: Tensor  # without penalties
    g_loss: Tensor
    d_readings: Tensor  # (2,), what the loss reads from D's logits: probabilities, pairs told apart, or the logits' means
    d_grad_norm: Tensor  # before clipping
    g_grad_norm: Tensor


class Draws:
    """Random numbers for a batch, drawn for all ranks' images, of which each rank keeps its own.

    Args:
        device: on which they are drawn.
        runs: how many runs draw at once, each from a generator of its own; None means a single one.
    """

    def __init__(self, device: torch.device | str = "cpu", runs: int | None = None) -> None:
        self.generators, self._several = [torch.Generator(device) for _ in range(runs or 1)], runs is not None

    def seeded(self, *seeds: int) -> Self:
        """Return these draws from a new start: a seed for each generator."""
        for generator, seed in zip(self.generators, seeds, strict=True):
            generator.manual_seed(seed)
        return self

    def normal(self, like: Tensor, *shape: int) -> Tensor:
        """Return standard normal numbers (N, *shape), of many runs (N, R, *shape), where `like` is (N, ...)."""
        return self._draw(torch.randn, like, shape)

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        """Return uniform numbers in [0, 1) of that shape."""
        return self._draw(torch.rand, like, shape)

    def _draw(self, distribution: Callable[..., Tensor], like: Tensor, shape: tuple[int, ...]) -> Tensor:
        everyone = (len(like) * world_size(), *shape)
        drawn = [distribution(everyone, generator=each, device=like.device, dtype=like.dtype) for each in self.generators]
        return shard(torch.stack(drawn, dim=1) if self._several else drawn[0])


class Update(Protocol):
    """Moves a network's weights against the gradient of a loss."""

    def __call__(self, loss: Tensor, lr: Tensor) -> Tensor:
        """Take one step of learning rate `lr`, a scalar or (R,), and return the gradient's norm, likewise."""
        ...


@dataclass(frozen=True)
class Iteration:
    """n_critic updates of D, g_steps of G, and one of the moving average (Goodfellow et al. 2014, algorithm 1).

    Attributes:
        generator: maps latents (N, latent_dim), and labels (N,) where there are classes, to images (N, C, H, W) in [-1, 1].
        discriminator: maps images (N, C, H, W), or packs of them as `pack` makes them, and labels likewise to logits (N, 1).
        d_network: the discriminator's module, whose batch norm layers are frozen in G's update.
        d_update: moves D's weights.
        g_update: moves G's weights.
        ema: the moving average of G, if one is kept.
        latent_dim: size of the latent z, which is standard normal.
        loss: what both minimize.
        batching: joint or separate.
        pack: how many images D judges as one.
        n_critic: updates of D before those of G.
        g_steps: updates of G, all on the same latents.
        instance_noise: where D keeps its noise's standard deviation, a scalar or (R, 1, 1, 1); None is no noise.
        r1, r2: weights of the gradient penalties on real and on fake images.
        gradient_penalty: weight of WGAN-GP's penalty between them.
        update_d_stats_in_g_step: whether D's running statistics also move in G's updates.
    """

    generator: Callable[..., Tensor]
    discriminator: Callable[..., Tensor]
    d_network: nn.Module
    d_update: Update
    g_update: Update
    ema: ExponentialMovingAverage | None
    latent_dim: int
    loss: Loss
    batching: Batching
    pack: int = 1
    n_critic: int = 1
    g_steps: int = 1
    instance_noise: Tensor | None = None
    r1: float = 0.0
    r2: float = 0.0
    gradient_penalty: float = 0.0
    update_d_stats_in_g_step: bool = False

    def __call__(self, real_images: Tensor, schedule: Schedule[Tensor], draws: Draws, labels: Tensor | None = None) -> Observed:
        """Train on real images (n_critic * N, C, H, W) in [-1, 1] of classes (n_critic * N,), if any: this rank's rows."""
        if self.instance_noise is not None:
            self.instance_noise.copy_(schedule.instance_noise.view_as(self.instance_noise))
        classes = [None] * self.n_critic if labels is None else labels.chunk(self.n_critic)
        # The discriminator: tell real from fake.
        for images, own in zip(real_images.chunk(self.n_critic), classes, strict=True):
            generator, discriminator = of_classes(self.generator, own), of_classes(self.discriminator, own)
            real = self._prepare(images, draws)  # (N / pack, pack C, H, W)
            z = draws.normal(images, self.latent_dim)  # (N, latent_dim)
            fake = self._prepare(generator(z), draws)
            real_seen, fake_seen = real.detach().requires_grad_(self.r1 > 0), fake.detach().requires_grad_(self.r2 > 0)
            real_logits, fake_logits = discriminate(discriminator, real_seen, fake_seen, self.batching)  # (N / pack, 1)
            d_loss = self.loss.discriminator(real_logits, fake_logits)
            penalty = self._penalty(discriminator, (real_seen, fake_seen), (real_logits, fake_logits), draws)
            d_grad_norm = self.d_update(d_loss + penalty, schedule.d_lr)

        # The generator: fool the discriminator just improved, whose statistics describe its own batches alone, by policy.
        with nullcontext() if self.update_d_stats_in_g_step else frozen_statistics(self.d_network):
            for step in range(self.g_steps):
                fake = fake if step == 0 else self._prepare(generator(z), draws)  # as G makes them now
                g_loss = self.loss.generator(*discriminate(discriminator, real, fake, self.batching))
                g_grad_norm = self.g_update(g_loss, schedule.g_lr)
        if self.ema is not None:
            self.ema.update(schedule.ema_weight)
        readings = self.loss.read(real_logits.detach(), fake_logits.detach())
        return Observed(d_loss.detach(), g_loss.detach(), readings, d_grad_norm, g_grad_norm)

    def _prepare(self, images: Tensor, draws: Draws) -> Tensor:
        """Return images (N, C, H, W) as D sees them: noisy, and in packs (N / pack, pack C, H, W)."""
        if self.instance_noise is not None:
            images = images + self.instance_noise * draws.normal(images, *images.shape[-3:])
        return pack(images, self.pack)

    def _penalty(
        self, discriminator: Logits, images: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor], draws: Draws
    ) -> Tensor | float:
        penalty: Tensor | float = 0.0
        for weight, seen, said in zip((self.r1, self.r2), images, logits, strict=True):
            if weight:
                penalty = penalty + weight * zero_centered_penalty(seen, said)
        if self.gradient_penalty:
            mix = draws.uniform(images[0])  # (N / pack,)
            penalty = penalty + self.gradient_penalty * gradient_penalty(discriminator, *images, mix)
        return penalty


class OptimizerUpdate:
    """An Update by one of torch's optimizers, with gradients averaged over the ranks.

    Args:
        optimizer: of one parameter group.
        clip: largest norm of the gradient; None means no limit.
        scaler: scales the loss in 16-mixed precision.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip: float | None = None, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        (self._group,) = optimizer.param_groups
        self._optimizer, self._clip, self._scaler = optimizer, clip, scaler

    def __call__(self, loss: Tensor, lr: Tensor) -> Tensor:
        """Take one step of learning rate `lr`, a scalar, and return the gradient's norm before clipping."""
        parameters = [parameter for parameter in self._group["params"] if parameter.requires_grad]
        for parameter in parameters:
            parameter.grad = None
        # Naming the inputs spares the other network's weights their gradients.
        (loss if self._scaler is None else self._scaler.scale(loss)).backward(inputs=parameters)
        average_gradients(parameters)  # scaled: what overflows on one rank then does on all
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        self._group["lr"] = lr.float() if lr.is_cuda else lr  # there fused Adam reads it as float32, whatever the weights are
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        torch.clear_autocast_cache()  # it holds 16-bit copies of the weights as they were before the step
        return norm
