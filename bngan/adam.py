"""Adam (Kingma & Ba 2015), whose updates cost no more than their arithmetic where networks are small."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


class Adam(torch.optim.Adam):
    """torch's fused Adam for one group of weights, with a second way to step.

    `step` looks up what it keeps of each weight at every call, asks who looks on, and whether there is a GPU, for which by a
    setting of Lightning's it searches for the driver's library anew. `update` does the same arithmetic, to the last bit, and
    nothing else: for the text's networks in 0.7 of the time, or in half of it where there is such a search.

    Args:
        params: the weights.
        lr: learning rate.
        betas: decay of the gradient's mean and of its square.
    """

    _known: dict[str, Any] | None = None  # what was kept of the first weight when the lists were made
    _lists: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])

    def __init__(self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def update(self) -> None:
        """Step, and tell none of the hooks of `step`."""
        (group,) = self.param_groups
        weights = group["params"]
        gradients = [weight.grad for weight in weights]
        if any(gradient is None or weight not in self.state for weight, gradient in zip(weights, gradients, strict=True)):
            self.step()
            return
        if self._known is not self.state[weights[0]]:  # a checkpoint brings its own
            self._known = self.state[weights[0]]
            means, squares, steps = (
                [self.state[weight][kept] for weight in weights] for kept in ("exp_avg", "exp_avg_sq", "step")
            )
            self._lists = means, squares, steps
        means, squares, steps = self._lists
        adam(
            weights,
            gradients,
            means,
            squares,
            [],
            steps,
            foreach=False,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
