"""Spectral norm, as a parametrization of a layer's weight that also takes the stacked weights of many runs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

STEPS_AT_START = 15


class SpectralNorm(nn.Module):
    """Divides a weight by its largest singular value, as a power iteration estimates it (Miyato et al. 2018, algorithm 1).

    In training mode each use of the weight takes a step of that iteration. Names and values are those of torch's spectral_norm,
    which writes by out= arguments, and vmap refuses those in training.

    Args:
        weight: of the layer; it may come stacked afterwards, with dimensions in front of its own.
        dim: its dimension of outputs.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, dim: int) -> None:
        super().__init__()
        self.ndim, self.dim = weight.ndim, dim - weight.ndim
        matrix = self._matrix(weight)
        u, v = (matrix.new_empty(size).normal_() for size in matrix.shape)
        self.register_buffer("_u", F.normalize(u, dim=-1))  # left singular vector (outputs,)
        self.register_buffer("_v", F.normalize(v, dim=-1))  # right singular vector (others,)
        for _ in range(STEPS_AT_START):
            self._step(matrix)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight divided by its spectral norm, through which gradients flow while the singular vectors are fixed."""
        matrix = self._matrix(weight)
        if self.training:
            self._step(matrix)
        u, v = self._u.clone(), self._v.clone()  # which backward needs as they are now: the next use takes another step
        norm = (u * _product(matrix, v)).sum(dim=-1)
        return weight / norm.reshape(*norm.shape, *[1] * self.ndim)

    def right_inverse(self, value: Tensor) -> Tensor:
        """Return the weight to be kept where this one is assigned."""
        return value

    def _matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix (..., outputs, others)."""
        return weight.movedim(self.dim, -self.ndim).flatten(start_dim=1 - self.ndim)

    @torch.no_grad()
    def _step(self, matrix: Tensor) -> None:
        self._u.copy_(F.normalize(_product(matrix, self._v), dim=-1))
        self._v.copy_(F.normalize(_product(matrix.mT, self._u), dim=-1))


def spectral_norm(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    """Put the layer's weight under spectral norm, and return the layer."""
    dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0  # whose weight has the inputs first
    return register_parametrization(layer, "weight", SpectralNorm(layer.weight, dim))


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the product (..., n) of a matrix (..., n, m) and a vector (..., m)."""
    return (matrix @ vector.unsqueeze(dim=-1)).squeeze(dim=-1)
