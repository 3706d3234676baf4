"""The moving average of the generator, from which samples are drawn: how it moves, with its buffers."""

from typing import Literal

import torch
from torch import Tensor, nn

EmaBuffers = Literal["copy", "average", "precise"]
EMA_BUFFERS: tuple[EmaBuffers, ...] = ("copy", "average", "precise")


class ExponentialMovingAverage:
    """Moves a network's weights towards those of another of the same structure.

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
        for own, networks in zip(average.buffers(), network.buffers(), strict=True):
            moving = buffers == "average" and own.is_floating_point()
            (self._averages if moving else self._copies).append(own)
            (self._values if moving else self._originals).append(networks)

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Give the network's present weights this weight, a scalar in [0, 1], in the average."""
        torch._foreach_lerp_(self._averages, self._values, [weight] * len(self._averages))
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)
