"""The moving average of the generator, from which samples are drawn: how it moves, with its buffers."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from bngan.batchnorm.layers import batch_norm_layers, running_statistics

EmaBuffers = Literal["copy", "average", "precise"]
EMA_BUFFERS: tuple[EmaBuffers, ...] = ("copy", "average", "precise")


class ExponentialMovingAverage:
    """Moves a network's weights towards those of another of the same structure.

    What parametrizations keep, such as the singular vectors of spectral norm, is no average: they follow the averaged weights.

    Args:
        average: the network that holds the average.
        network: the network that is trained.
        buffers: running statistics of the average: `average` averages them like the weights, `copy` takes the network's own;
            `precise` does too, since they are worked out anew, on the averaged weights, when samples are drawn.
    """

    def __init__(self, average: nn.Module, network: nn.Module, buffers: EmaBuffers) -> None:
        self._averages: list[Tensor] = [*average.parameters()]
        self._values: list[Tensor] = [*network.parameters()]
        self._copies: list[Tensor] = []
        self._originals: list[Tensor] = []
        self._parametrizations = [module for module in average.modules() if isinstance(module, ParametrizationList)]
        running = {id(buffer) for _, layer in batch_norm_layers(average) for buffer in running_statistics(layer)}
        following = {id(buffer) for module in self._parametrizations for buffer in module.buffers()}
        for own, networks in zip(average.buffers(), network.buffers(), strict=True):
            if id(own) in following:
                continue
            moving = buffers == "average" and id(own) in running
            (self._averages if moving else self._copies).append(own)
            (self._values if moving else self._originals).append(networks)

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Give the network's present weights this weight in the average: a scalar in [0, 1], or (R,) where R are stacked."""
        weights = [weight.reshape(weight.shape + (1,) * (average.ndim - 1)) for average in self._averages]
        torch._foreach_lerp_(self._averages, self._values, weights)
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)
        for parametrization in self._parametrizations:
            parametrization.train()()  # in training mode spectral norm takes a step of its power iteration
