"""Batch normalization: its equations as code, which batch they run over, and what the running statistics say.

Notation follows Ioffe & Szegedy 2015: z_hat = (z - mu) / sqrt(var + eps), y = gamma z_hat + beta. Over images the
statistics are per channel over N, H and W. `weight` is gamma and `bias` is beta, as in torch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batching = Literal["joint", "separate"]


def batch_statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel of z (N, C, ...), both (C,)."""
    dims = _reduced(z)
    mean = z.mean(dim=dims)
    var = (z - _per_channel(mean, z)).square().mean(dim=dims)
    return mean, var


def normalize(z: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return (z - mean) / sqrt(var + eps) for z (N, C, ...) with mean and var (C,)."""
    return (z - _per_channel(mean, z)) / (_per_channel(var, z) + eps).sqrt()


class ReferenceBatchNorm(nn.Module):
    """Batch norm as the equations are printed, for z (N, C) or (N, C, H, W); slower than torch's and easier to read.

    It is differentiable any number of times and has the parameters, buffers, state_dict and defaults of nn.BatchNorm1d and
    nn.BatchNorm2d, so either loads the other's checkpoint.

    Args:
        num_features: number of channels C.
        eps: added to the variance before the square root.
        momentum: weight of the new batch in the running statistics; None averages all batches equally.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = True
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, z: Tensor) -> Tensor:
        """Normalize z (N, C, ...) by its own statistics in training, by the running ones in evaluation.

        Raises:
            ValueError: if z has another number of channels, or one value per channel in training.
        """
        if z.ndim < 2 or z.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, ...), got {tuple(z.shape)}")
        if self.training:
            mean, var = self._training_statistics(z)
        else:
            mean, var = self.running_mean, self.running_var
        z_hat = normalize(z, mean, var, self.eps)
        return _per_channel(self.weight, z) * z_hat + _per_channel(self.bias, z)

    def _training_statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        count = z.numel() // self.num_features
        if count < 2:
            raise ValueError(
                f"batch norm in training needs at least 2 values per channel, got {count}: "
                "the variance of a single value is 0; use a larger batch or call eval()"
            )
        mean, var = batch_statistics(z)
        if self.track_running_stats:
            self._update_running(mean.detach(), var.detach() * count / (count - 1))
        return mean, var

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.num_batches_tracked += 1
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - momentum).add_(mean.to(self.running_mean.dtype), alpha=momentum)
        self.running_var.mul_(1 - momentum).add_(unbiased_var.to(self.running_var.dtype), alpha=momentum)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class VirtualBatchNorm(nn.Module):
    """Batch norm by a fixed reference batch, so that an example's output ignores its batch-mates (Salimans et al. 2016).

    The first `reference_size` rows of the input are the reference batch, carried through the network by its owner so that
    its statistics follow the weights; each other example is normalized by the reference batch and itself. Training and
    evaluation are the same, and there are no running statistics.
    """

    def __init__(self, num_features: int, reference_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.reference_size = reference_size
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, z: Tensor) -> Tensor:
        """Normalize z (reference_size + N, C, ...).

        Raises:
            ValueError: if z is no longer than the reference batch.
        """
        if len(z) <= self.reference_size:
            raise ValueError(f"expected more than the {self.reference_size} rows of the reference batch, got {len(z)}")
        reference, examples = z[: self.reference_size], z[self.reference_size :]
        spatial = tuple(range(2, z.ndim))
        mean, var = batch_statistics(reference)
        own = 1 / (self.reference_size + 1)
        own_mean = examples.mean(dim=spatial, keepdim=True) if spatial else examples
        own_var = (examples - own_mean).square().mean(dim=spatial, keepdim=True) if spatial else torch.zeros_like(examples)
        shift = own_mean - _per_channel(mean, z)
        mixed_mean = _per_channel(mean, z) + own * shift
        # The mean square less the squared mean would lose all digits where the mean is large, and could be negative.
        mixed_var = own * own_var + (1 - own) * _per_channel(var, z) + own * (1 - own) * shift.square()
        z_hat = torch.cat([normalize(reference, mean, var, self.eps), (examples - mixed_mean) / (mixed_var + self.eps).sqrt()])
        return _per_channel(self.weight, z) * z_hat + _per_channel(self.bias, z)

    def extra_repr(self) -> str:
        return f"{self.num_features}, reference_size={self.reference_size}, eps={self.eps}"


BatchNorm = _BatchNorm | ReferenceBatchNorm


def batch_norm_layers(module: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    """Yield the dotted name and the layer of each batch norm in the module that keeps running statistics."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm | ReferenceBatchNorm) and layer.running_mean is not None:
            yield name, layer


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within the block batch norm layers still normalize by the batch, but leave their running statistics alone."""
    layers = [layer for _, layer in batch_norm_layers(module) if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def score(
    logits: Callable[[Tensor], Tensor], real_images: Tensor, fake_images: Tensor, batching: Batching
) -> tuple[Tensor, Tensor]:
    """Return the discriminator's logits of real and of fake images, composing its batches by policy.

    `joint` normalizes both by the statistics of their union. `separate` normalizes each by its own, which removes exactly
    what tells them apart in mean and variance: the discriminator cannot see a shift or a scale of the fakes.
    """
    if batching == "separate":
        return logits(real_images), logits(fake_images)
    both = logits(torch.cat([real_images, fake_images]))
    return both[: len(real_images)], both[len(real_images) :]


@dataclass(frozen=True)
class Statistics:
    """One layer's batch mean and biased variance, each (C,)."""

    mean: Tensor
    var: Tensor


@contextmanager
def recorded_statistics(module: nn.Module) -> Iterator[dict[str, list[Statistics]]]:
    """Within the block, collect by layer name the statistics of every batch that a batch norm layer normalizes by itself.

    What passes in evaluation mode, such as samples drawn to be looked at, is not normalized by its own statistics.
    """
    seen: dict[str, list[Statistics]] = {name: [] for name, _ in batch_norm_layers(module)}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not layer.training:
                return
            mean, var = batch_statistics(inputs[0].detach())
            seen[name].append(Statistics(mean=mean, var=var))

        return record

    handles = [layer.register_forward_pre_hook(recorder(name)) for name, layer in batch_norm_layers(module)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def divergence(layer: BatchNorm, batch: Statistics) -> Tensor:
    """Return how far the batch is from the running statistics: KL(batch || running) in nats, one value per channel (C,).

    Both are taken as Gaussians, as the layer itself does. 0 means that evaluation mode sees what training mode saw.
    """
    assert layer.running_mean is not None
    assert layer.running_var is not None
    running_var = layer.running_var + layer.eps
    ratio = (batch.var + layer.eps) / running_var
    return 0.5 * (ratio - 1 - ratio.log() + (batch.mean - layer.running_mean).square() / running_var)


def _reduced(z: Tensor) -> tuple[int, ...]:
    return (0, *range(2, z.ndim))


def _per_channel(values: Tensor, z: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (z.ndim - 2))
