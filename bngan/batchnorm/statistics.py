"""Which statistics normalize, and where they come from: frozen, recorded, precise, and those of evaluation."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from bngan.batchnorm.layers import (
    BatchNorm,
    GhostBatchNorm,
    batch_norm_layers,
    batch_statistics,
    is_synchronized,
    local_batches,
    running_statistics,
)
from bngan.distributed import mean_over_ranks, world_size

EvalStatistics = Literal["running", "batch", "precise"]
EVAL_STATISTICS: tuple[EvalStatistics, ...] = ("running", "batch", "precise")


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


@dataclass(frozen=True)
class BatchStatistics:
    """What one layer normalized a batch by, and its running statistics just before that batch entered them, all (C,).

    Attributes:
        mean: the batch's mean.
        var: its biased variance.
        count: number of values per channel over which these are.
        running_mean: the running mean before.
        running_var: the running variance before.
    """

    mean: Tensor
    var: Tensor
    count: int
    running_mean: Tensor
    running_var: Tensor


@contextmanager
def recorded_statistics(module: nn.Module) -> Iterator[dict[str, list[BatchStatistics]]]:
    """Within the block, collect by layer name the statistics of all that a batch norm layer normalizes together.

    That is a batch of this rank, or of all ranks where the layer is synchronized, so that all must record; with a ghost norm
    it is each group that this rank has. What passes in evaluation mode, such as samples drawn to be looked at, is not
    normalized by its own statistics.
    """
    seen: dict[str, list[BatchStatistics]] = {name: [] for name, _ in batch_norm_layers(module)}

    def record(name: str, layer: BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        if layer.training:
            seen[name].extend(_look(layer, inputs[0].detach()))

    with ExitStack() as hooks:
        for name, layer in batch_norm_layers(module):
            hooks.enter_context(layer.register_forward_pre_hook(partial(record, name)))
        yield seen


def _look(layer: BatchNorm, z: Tensor) -> Iterator[BatchStatistics]:
    """Yield the statistics of each part of z (N, C, ...) that the layer is about to normalize together."""
    synchronized, groups = is_synchronized(layer), 1
    running = [buffer.clone() for buffer in running_statistics(layer)]
    if synchronized:  # a ghost norm's differ between the ranks, each of which has some of the groups, until they are averaged
        running = [mean_over_ranks(buffer) for buffer in running]
    if isinstance(layer, GhostBatchNorm):
        synchronized, groups = False, layer.own_groups  # and each group is whole on one rank
    for group in range(groups):
        part = z[group::groups]
        mean, var = batch_statistics(part, synchronized=synchronized)
        count = part.numel() // part.shape[1] * (world_size() if synchronized else 1)
        yield BatchStatistics(mean, var, count, *running)


@torch.no_grad()
def set_precise_statistics(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace running statistics by the pooled mean and variance over fresh batches: precise batch norm.

    The running average mixes statistics of weights that are gone; these are of the weights as they are (Wu & Johnson 2021,
    section 3). Each batch passes in training mode, so every layer is fed what it was fed in training. All batches must have
    one size.

    Raises:
        ValueError: if there is no batch.
    """
    with evaluation_statistics(module, "batch"), recorded_statistics(module) as seen:
        for batch in batches:
            module(batch)
    for name, layer in batch_norm_layers(module):
        if not seen[name]:
            raise ValueError("precise statistics need at least one batch")
        running_mean, running_var = running_statistics(layer)
        means = torch.stack([batch.mean for batch in seen[name]]).cpu().double()  # not every device has float64
        variances = torch.stack([batch.var for batch in seen[name]]).cpu().double()
        pooled = variances.mean(dim=0) + means.var(dim=0, unbiased=False)
        count = sum(batch.count for batch in seen[name])
        running_mean.copy_(means.mean(dim=0))
        running_var.copy_(pooled * count / (count - 1))


class AlsoRunning:
    """Running statistics of another momentum beside a network's own: neither normalize in training, so one has both.

    They come from the network's own: where r moves to (1 - m) r + m b by a batch of statistics b, b is r + (its move) / m
    (Ioffe & Szegedy 2015, section 3.1). A network whose weights are stacked (R, ...) has them stacked, too.

    Args:
        network: the network that is trained, as it starts.
        momentum: weight of the new batch.
    """

    def __init__(self, network: nn.Module, momentum: float) -> None:
        self.momentum = momentum
        self._layers = [layer for _, layer in batch_norm_layers(network)]
        self.statistics = [buffer.clone() for layer in self._layers for buffer in running_statistics(layer)]

    def following(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a call of the network in training mode that moves these statistics, too."""

        def call_and_follow(*batches: Tensor) -> Tensor:
            before = [[buffer.clone() for buffer in running_statistics(layer)] for layer in self._layers]
            output = call(*batches)
            self._follow(before)
            return output

        return call_and_follow

    @torch.no_grad()
    def _follow(self, before: list[list[Tensor]]) -> None:
        kept = iter(self.statistics)
        for layer, buffers in zip(self._layers, before, strict=True):
            assert layer.momentum is not None
            for old, new in zip(buffers, running_statistics(layer), strict=True):
                next(kept).lerp_(old + (new - old) / layer.momentum, self.momentum)

    @contextmanager
    def within(self, network: nn.Module, run: int | None = None) -> Iterator[None]:
        """Within the block a network of that structure, such as an average, has these statistics; of many, those of a run."""
        buffers = [buffer for _, layer in batch_norm_layers(network) for buffer in running_statistics(layer)]
        before = [buffer.clone() for buffer in buffers]
        for buffer, value in zip(buffers, self.statistics, strict=True):
            buffer.copy_(value if run is None else value[run])
        try:
            yield
        finally:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


@contextmanager
def evaluation_statistics(module: nn.Module, statistics: EvalStatistics, batches: Iterable[Tensor] = ()) -> Iterator[None]:
    """Within the block the module is evaluated, without gradients, its batch norm by policy; nothing of it stays behind.

    `running` normalizes by the running statistics, `batch` by those of the batch at hand, as in training, and `precise` by
    those pooled over `batches`. All else, such as dropout, is in evaluation mode. Each rank normalizes by itself.
    """
    modes = {part: part.training for part in module.modules()}
    layers = [layer for _, layer in batch_norm_layers(module)]
    buffers = [buffer for layer in layers for buffer in running_statistics(layer)]
    before = [buffer.clone() for buffer in buffers]
    if statistics == "precise":
        set_precise_statistics(module, batches)
    module.eval()
    for layer in layers:
        layer.train(statistics == "batch")
    try:
        with torch.no_grad(), frozen_statistics(module), local_batches(module):
            yield
    finally:
        for part, training in modes.items():
            part.training = training
        if statistics == "precise":
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
