"""Batch normalization: its equations as code, which batch they run over, and what the running statistics say.

Notation follows Ioffe & Szegedy 2015: z_hat = (z - mu) / sqrt(var + eps), y = gamma z_hat + beta. Over images the
statistics are per channel over N, H and W. `weight` is gamma and `bias` is beta, as in torch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batching = Literal["joint", "separate"]
BATCHINGS: tuple[Batching, ...] = ("joint", "separate")
Sampling = Literal["running", "batch", "precise"]
SAMPLINGS: tuple[Sampling, ...] = ("running", "batch", "precise")
# From images (N, ...) to logits (N, 1); from two batches that are normalized as one where one alone needs a gradient.
Logits = Callable[..., Tensor]


def batch_statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel of z (N, C, ...), both (C,), in float32 at least."""
    z, dims = single(z), _reduced(z)
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
        # Whether a batch is what this process has of it; see distributed.SynchronizedBatchNorm.
        self.local = True
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, z: Tensor) -> Tensor:
        """Normalize z (N, C, ...) by its own statistics in training, by the running ones in evaluation.

        The result is of z's dtype; all that lies between is float32 at least, as in torch's batch norm.

        Raises:
            ValueError: if z has another number of channels, or one value per channel in training.
        """
        if z.ndim < 2 or z.shape[1] != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, ...), got {tuple(z.shape)}")
        if self.training:
            mean, var = self._training_statistics(z)
        else:
            mean, var = self.running_mean, self.running_var
        z_hat = normalize(single(z), mean, var, self.eps)
        return (_per_channel(self.weight, z) * z_hat + _per_channel(self.bias, z)).to(z.dtype)

    def _training_statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = batch_statistics(z)
        count = z.numel() // self.num_features
        if count < 2:
            raise ValueError(
                f"batch norm in training needs at least 2 values per channel, got {count}: "
                "the variance of a single value is 0; use a larger batch or call eval()"
            )
        if self.track_running_stats:
            self._update_running(mean.detach(), var.detach() * count / (count - 1))
        return mean, var

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        # running = (1 - momentum) running + momentum batch
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), momentum)

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
        dtype, z = z.dtype, single(z)
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
        return (_per_channel(self.weight, z) * z_hat + _per_channel(self.bias, z)).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, reference_size={self.reference_size}, eps={self.eps}"


BatchNorm = _BatchNorm | ReferenceBatchNorm


def batch_norm_layers(module: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    """Yield the dotted name and the layer of each batch norm in the module that keeps running statistics."""
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm | ReferenceBatchNorm) and layer.running_mean is not None:
            yield name, layer


def running_statistics(layer: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the layer's own buffers, running mean and running variance, both (C,)."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


@contextmanager
def frozen_statistics(*modules: nn.Module) -> Iterator[None]:
    """Within the block these modules' batch norm layers still normalize by the batch, but leave running statistics alone."""
    layers = [layer for module in modules for _, layer in batch_norm_layers(module) if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def score(logits: Logits, real_images: Tensor, fake_images: Tensor, batching: Batching) -> tuple[Tensor, Tensor]:
    """Return the discriminator's logits of real and of fake images, composing its batches by policy.

    `joint` normalizes both by the statistics of their union. `separate` normalizes each by its own, which removes exactly
    what tells them apart in mean and variance: the discriminator cannot see a shift or a scale of the fakes.
    """
    if batching == "separate":
        return logits(real_images), logits(fake_images)
    alike = real_images.requires_grad == fake_images.requires_grad
    both = logits(torch.cat([real_images, fake_images])) if alike else logits(real_images, fake_images)
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


@torch.no_grad()
def recalibrate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running statistics by the pooled mean and variance over fresh batches: precise batch norm.

    The running average mixes statistics of weights that are gone; these are of the weights as they are (Wu & Johnson 2021,
    section 3). Each batch passes in training mode, so every layer is fed what it was fed in training. All batches must have
    one size.

    Raises:
        ValueError: if there is no batch.
    """
    counts: dict[str, int] = {}

    def counter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] = counts.get(name, 0) + inputs[0].numel() // inputs[0].shape[1]

        return count

    layers = dict(batch_norm_layers(module))
    handles = [layer.register_forward_pre_hook(counter(name)) for name, layer in layers.items()]
    try:
        with sampling_statistics(module, "batch"), recorded_statistics(module) as seen:
            for batch in batches:
                module(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if not seen[name]:
            raise ValueError("recalibration needs at least one batch")
        running_mean, running_var = running_statistics(layer)
        means = torch.stack([batch.mean for batch in seen[name]]).double()
        variances = torch.stack([batch.var for batch in seen[name]]).double()
        pooled = variances.mean(dim=0) + means.var(dim=0, unbiased=False)
        count = counts[name]
        running_mean.copy_(means.mean(dim=0))
        running_var.copy_(pooled * count / (count - 1))


@contextmanager
def sampling_statistics(module: nn.Module, sampling: Sampling, batches: Iterable[Tensor] = ()) -> Iterator[None]:
    """Within the block the module is evaluated, without gradients, its batch norm by policy; nothing of it stays behind.

    `running` normalizes by the running statistics, `batch` by those of the batch at hand, as in training, and `precise` by
    statistics recalibrated on `batches`. All else, such as dropout, is in evaluation mode.
    """
    modes = {part: part.training for part in module.modules()}
    layers = [layer for _, layer in batch_norm_layers(module)]
    buffers = [buffer for layer in layers for buffer in running_statistics(layer)]
    before = [buffer.clone() for buffer in buffers]
    if sampling == "precise":
        recalibrate(module, batches)
    module.eval()
    for layer in layers:
        layer.train(sampling == "batch")
    ours = [layer for layer in layers if isinstance(layer, ReferenceBatchNorm)]
    were_local = [layer.local for layer in ours]
    for layer in ours:
        layer.local = True
    try:
        with torch.no_grad(), frozen_statistics(module):
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        for layer, local in zip(ours, were_local, strict=True):
            layer.local = local
        if sampling == "precise":
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def divergence(layer: BatchNorm, batch: Statistics) -> Tensor:
    """Return how far the batch is from the running statistics: KL(batch || running) in nats, one value per channel (C,).

    Both are taken as Gaussians, as the layer itself does. 0 means that evaluation mode sees what training mode saw.
    """
    running_mean, running_var = running_statistics(layer)
    ratio = (batch.var + layer.eps) / (running_var + layer.eps)
    return 0.5 * (ratio - 1 - ratio.log() + (batch.mean - running_mean).square() / (running_var + layer.eps))


# (scale, shift) of the fakes by which a discriminator is tried.
AFFINE_CHANGES = ((0.5, 0.0), (1.5, 0.0), (1.0, -0.5), (1.0, 0.5))


@torch.no_grad()
def shift_blindness(logits: Logits, real_images: Tensor, fake_images: Tensor, batching: Batching) -> Tensor:
    """Return how little a discriminator in training mode minds fakes (N, C, H, W) that are scaled or shifted as a whole.

    1 / (1 + r), where r is the mean over AFFINE_CHANGES of how far the fakes' mean logit moves, in standard deviations of the
    logits of real and fake images: 1 means that it sees nothing of it (Johannsmeier 2022), near 0 that it sees little else.
    """
    real_logits, fake_logits = score(logits, real_images, fake_images, batching)
    spread = torch.cat([real_logits, fake_logits]).std().clamp_min(torch.finfo(torch.float32).tiny)
    moves = [
        (score(logits, real_images, scale * fake_images + shift, batching)[1].mean() - fake_logits.mean()).abs() / spread
        for scale, shift in AFFINE_CHANGES
    ]
    return 1 / (1 + torch.stack(moves).mean())


@torch.no_grad()
def batch_dependence(logits: Logits, real_images: Tensor, fake_images: Tensor, batching: Batching, mates: int = 4) -> Tensor:
    """Return how much a discriminator's logit of an image in training mode depends on the others in its batch.

    The first N / (mates + 1) real images are scored `mates` times, each time with as many other real images and with fakes.
    The result is the root of the share of the logits' variance that the company explains: 0 if it does not matter, 1 if it
    is all that matters.

    Raises:
        ValueError: if there are fewer than mates + 1 real images or `mates` fakes.
    """
    size = len(real_images) // (mates + 1)
    fakes = min(2 * size, len(fake_images) // mates)
    if size < 1 or fakes < 1:
        raise ValueError(f"{mates} sets of batch-mates need at least {mates + 1} real images and {mates} fakes")
    subjects, others = real_images[:size], real_images[size:].split(size)
    scored = torch.stack(
        [
            score(logits, torch.cat([subjects, others[mate]]), fake_images[mate * fakes :][:fakes], batching)[0][:size]
            for mate in range(mates)
        ]
    )
    total = scored.var(unbiased=False)
    return (scored.var(dim=0, unbiased=False).mean() / total).sqrt() if total > 0 else torch.zeros_like(total)


def single(z: Tensor) -> Tensor:
    """Return z in float32 at least."""
    # Eight bits of mean would leave little of a variance that is a difference from it.
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _reduced(z: Tensor) -> tuple[int, ...]:
    return (0, *range(2, z.ndim))


def _per_channel(values: Tensor, z: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (z.ndim - 2))
