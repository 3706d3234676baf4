"""Batch normalization: its equations as code.

Notation follows Ioffe & Szegedy 2015: z_hat = (z - mu) / sqrt(var + eps), y = gamma z_hat + beta. Over images the
statistics are per channel over N, H and W. `weight` is gamma and `bias` is beta, as in torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, group, new_group

from bngan.distributed import mean_over_ranks, rank, world_size


def batch_statistics(z: Tensor, *, synchronized: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel of z (N, C, ...), both (C,), in float32 at least.

    Synchronized, they are those of the union of all ranks' z, which must be of one size.
    """
    z, dims = at_least_float32(z), _reduced(z)
    over_ranks = mean_over_ranks if synchronized else lambda own: own
    mean = over_ranks(z.mean(dim=dims))
    var = over_ranks((z - _per_channel(mean, z)).square().mean(dim=dims))
    return mean, var


def normalize(z: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Return (z - mean) / sqrt(var + eps) for z (N, C, ...) with mean and var (C,)."""
    return (z - _per_channel(mean, z)) / (_per_channel(var, z) + eps).sqrt()


class ReferenceBatchNorm(nn.Module):
    """Batch norm as the equations are printed, for z (N, C) or (N, C, H, W); slower than torch's and easier to read.

    It is differentiable any number of times and has the parameters, buffers, state_dict and defaults of nn.BatchNorm1d and
    nn.BatchNorm2d, so either loads the other's checkpoint. Synchronized, the batch is the union of all ranks' batches, which
    must be of one size: its mean and its variance are two means over the ranks.

    Args:
        num_features: number of channels C.
        eps: added to the variance before the square root.
        momentum: weight of the new batch in the running statistics; None averages all batches equally.
        affine: whether it has gamma and beta; without them the result is z_hat.
        synchronized: whether a batch is what all ranks have of it.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        synchronized: bool = False,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.synchronized = synchronized
        self.track_running_stats = True
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features))
            self.bias = nn.Parameter(torch.zeros(num_features))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
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
            z_hat = self.normalize_by_batch(at_least_float32(z))
        else:
            z_hat = normalize(at_least_float32(z), self.running_mean, self.running_var, self.eps)
        if not self.affine:
            return z_hat.to(z.dtype)
        return (_per_channel(self.weight, z) * z_hat + _per_channel(self.bias, z)).to(z.dtype)

    def normalize_by_batch(self, z: Tensor) -> Tensor:
        """Return z_hat (N, C, ...) by the batch's statistics, and let the running ones move towards them."""
        mean, var = batch_statistics(z, synchronized=self.synchronized)
        count = z.numel() // self.num_features * (world_size() if self.synchronized else 1)
        self.update_running(mean, var, count)
        return normalize(z, mean, var, self.eps)

    @torch.no_grad()
    def update_running(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics towards a batch's mean and biased variance (C,), over `count` values per channel.

        Raises:
            ValueError: if there is one value per channel.
        """
        if count < 2:
            raise ValueError(
                f"batch norm in training needs at least 2 values per channel, got {count}: "
                "the variance of a single value is 0; use a larger batch or call eval()"
            )
        if not self.track_running_stats:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        # running = (1 - momentum) running + momentum batch
        self.running_mean.add_(momentum * (mean.to(self.running_mean.dtype) - self.running_mean))
        self.running_var.add_(momentum * ((var * (count / (count - 1))).to(self.running_var.dtype) - self.running_var))

    def extra_repr(self) -> str:
        numbers = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
        return f"{numbers}, affine={self.affine}, synchronized={self.synchronized}"


class GhostBatchNorm(ReferenceBatchNorm):
    """Batch norm over groups of the batch, each by its own statistics (Hoffer et al. 2017): row i is in group i mod groups.

    So where real and fake images share a batch and each are a multiple of the groups, every group has both. The running
    statistics move towards the mean of the groups'. Synchronized, the groups are those of the global batch, of which rank r
    has rows r, r + ranks, ...: each rank has whole groups, and nothing needs to be sent.

    Args:
        num_features: number of channels C.
        groups: number of groups; synchronized, a multiple of the number of ranks.
        eps: added to the variance before the square root.
        momentum: weight of the new batch in the running statistics.
    """

    def __init__(self, num_features: int, groups: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.groups = groups

    @property
    def own_groups(self) -> int:
        """Into how many groups this rank's rows are cut."""
        return self.groups // world_size() if self.synchronized else self.groups

    def normalize_by_batch(self, z: Tensor) -> Tensor:
        """Return z_hat (N, C, ...) by the groups' statistics, and let the running ones move towards their mean.

        Raises:
            ValueError: if the rows cannot be cut into the groups.
        """
        groups = self.own_groups
        if groups < 1 or len(z) % groups:
            raise ValueError(f"{len(z)} rows cannot be cut into {groups} groups of one size")
        grouped = z.reshape(len(z) // groups, groups * self.num_features, *z.shape[2:])  # a channel for each group's channel
        mean, var = batch_statistics(grouped)
        count = grouped.numel() // grouped.shape[1]
        self.update_running(mean.view(groups, -1).mean(dim=0), var.view(groups, -1).mean(dim=0), count)
        return normalize(grouped, mean, var, self.eps).reshape(z.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


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
        dtype, z = z.dtype, at_least_float32(z)
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


class CovariateShift(nn.Module):
    """Noise behind a batch norm that undoes the distribution it has just made (Santurkar et al. 2018, appendix A.2.1).

    y = s z + m. Each pass draws mu ~ U(-0.5, 0.5) and sigma ~ U(1, 1.25) for each channel; of them each value has its own
    m ~ U(mu - 0.1, mu + 0.1) and s ~ N(sigma, 0.1), pixels being part of the batch. So all that passes together, such as a
    joint batch of real and fake images, is shifted alike on average, and each rank's rows by themselves. As in dropout, torch's
    own generator draws, and in evaluation nothing is changed, whichever statistics normalize.

    Args:
        shift: largest mean of m over a pass.
        scale: largest mean of s over a pass; the smallest is 1.
        spread: half the width of m's distribution within a pass, and the standard deviation of s's.
    """

    def __init__(self, shift: float = 0.5, scale: float = 1.25, spread: float = 0.1) -> None:
        super().__init__()
        self.shift, self.scale, self.spread = shift, scale, spread

    def forward(self, z: Tensor) -> Tensor:
        """Perturb z (N, C, ...) in training."""
        if not self.training:
            return z
        channels = (1, z.shape[1], *[1] * (z.ndim - 2))
        mu = self.shift * _uniform(torch.rand(channels, dtype=z.dtype, device=z.device))
        sigma = 1 + (self.scale - 1) * torch.rand(channels, dtype=z.dtype, device=z.device)
        m = mu + self.spread * _uniform(torch.rand_like(z))
        s = sigma + self.spread * torch.randn_like(z)
        return s * z + m

    def extra_repr(self) -> str:
        return f"shift={self.shift}, scale={self.scale}, spread={self.spread}"


TorchBatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
BatchNorm = TorchBatchNorm | ReferenceBatchNorm


class ConditionalBatchNorm(nn.Module):
    """Batch norm with a gamma and a beta for each class (de Vries et al. 2017): y = gamma_c z_hat + beta_c for class c.

    Only these are a class's own: the statistics are those of the whole batch, whatever classes are in it.

    Args:
        norm: makes z_hat, so it has no gamma and beta itself.
        classes: number of classes K.
    """

    def __init__(self, norm: BatchNorm, classes: int) -> None:
        super().__init__()
        self.norm = norm
        self.gamma = nn.Parameter(torch.ones(classes, norm.num_features))
        self.beta = nn.Parameter(torch.zeros(classes, norm.num_features))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Normalize z (N, C, ...), whose rows are of the classes labels int64 (N,), 0 to K - 1; the result is of z's dtype."""
        shape = (*z.shape[:2], *[1] * (z.ndim - 2))
        gamma, beta = self.gamma[labels].reshape(shape), self.beta[labels].reshape(shape)
        return (gamma * self.norm(z) + beta).to(z.dtype)

    def extra_repr(self) -> str:
        return f"classes={len(self.gamma)}"


def batch_norm_layers(module: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    """Yield the dotted name and the layer of each batch norm in the module that keeps running statistics."""
    for name, layer in module.named_modules():
        if isinstance(layer, BatchNorm) and layer.running_mean is not None:
            yield name, layer


def is_synchronized(layer: BatchNorm) -> bool:
    """Return whether the layer normalizes the union of all ranks' batches; within `local_batches` none does."""
    if isinstance(layer, nn.SyncBatchNorm):
        return layer.process_group in (None, group.WORLD)
    return isinstance(layer, ReferenceBatchNorm) and layer.synchronized


def running_statistics(layer: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the layer's own buffers, running mean and running variance, both (C,)."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def synchronize(module: nn.Module, device: torch.device) -> nn.Module:
    """Let each batch norm below the module normalize the union of all ranks' batches, with the same parameters and buffers.

    On a GPU torch's layers become torch's nn.SyncBatchNorm, which works nowhere else; elsewhere ReferenceBatchNorm.
    """
    for name, child in module.named_children():
        if isinstance(child, ReferenceBatchNorm):
            child.synchronized = True
        elif isinstance(child, TorchBatchNorm) and child.running_mean is not None:
            on_gpu = device.type == "cuda"
            layer = nn.SyncBatchNorm.convert_sync_batchnorm(child) if on_gpu else _synchronized(child)
            setattr(module, name, layer.train(child.training))
        else:
            synchronize(child, device)
    return module


@contextmanager
def local_batches(module: nn.Module) -> Iterator[None]:
    """Within the block the module's batch norm layers normalize what this rank gives them, and wait for no other rank."""
    ours = [layer for _, layer in batch_norm_layers(module) if isinstance(layer, ReferenceBatchNorm)]
    synchronized = [layer.synchronized for layer in ours]
    torchs = [layer for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm) and group.WORLD is not None]
    groups = [layer.process_group for layer in torchs]
    for layer in ours:
        layer.synchronized = False
    for layer in torchs:
        layer.process_group = _group_of_one(group.WORLD)
    try:
        yield
    finally:
        for layer, before in zip(ours, synchronized, strict=True):
            layer.synchronized = before
        for layer, before in zip(torchs, groups, strict=True):
            layer.process_group = before


def at_least_float32(z: Tensor) -> Tensor:
    """Return z in float32 at least."""
    # Eight bits of mean would leave little of a variance that is a difference from it.
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def _synchronized(layer: TorchBatchNorm) -> ReferenceBatchNorm:
    twin = ReferenceBatchNorm(
        layer.num_features, eps=layer.eps, momentum=layer.momentum, affine=layer.affine, synchronized=True
    )
    twin.weight, twin.bias = layer.weight, layer.bias
    twin.running_mean, twin.running_var = running_statistics(layer)
    assert layer.num_batches_tracked is not None
    twin.num_batches_tracked = layer.num_batches_tracked
    return twin


@cache
def _group_of_one(world: ProcessGroup | None) -> ProcessGroup:
    """Return a group of this rank alone, made once for each `world`."""
    group_of_one = new_group([rank()], use_local_synchronization=True)
    assert isinstance(group_of_one, ProcessGroup)  # of which this rank is a member
    return group_of_one


def _uniform(draws: Tensor) -> Tensor:
    """Map draws from U(0, 1) to U(-1, 1)."""
    return 2 * draws - 1


def _reduced(z: Tensor) -> tuple[int, ...]:
    return (0, *range(2, z.ndim))


def _per_channel(values: Tensor, z: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (z.ndim - 2))
