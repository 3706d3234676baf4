"""How does a batch norm become part of the layer before it?

In evaluation batch norm is an affine map of constants, y = s (z - mean) + beta with s = gamma / sqrt(var + eps). Behind a layer
z = W x + b it makes such a layer again: W' = s W and b' = s (b - mean) + beta (Jacob et al. 2018, section 3.2).
"""

import copy

import torch
from torch import Tensor, nn

from bngan.batchnorm.layers import (
    BatchNorm,
    ConditionalBatchNorm,
    CovariateShift,
    VirtualBatchNorm,
    batch_norm_layers,
    running_statistics,
)
from bngan.blocks import GeneratorNetwork
from bngan.errors import UsageError
from bngan.norms import Layer


def fold_batch_norm(generator: GeneratorNetwork) -> GeneratorNetwork:
    """Return a copy of a generator in which no batch norm is left, and which maps latents to the same images in evaluation.

    Of a conditional batch norm the classes' gamma and beta stay, since one layer cannot have those of all; its statistics are
    folded. The noise behind a `noisy` norm is none in evaluation and is left out.

    Raises:
        UsageError: if there is no batch norm, or one that is no affine map.
    """
    if any(isinstance(layer, VirtualBatchNorm) for layer in generator.modules()):
        raise UsageError(
            "virtual batch norm cannot be folded: it normalizes each sample by the sample itself, too, which is no affine map; "
            "leave out --fold-batchnorm"
        )
    if not any(batch_norm_layers(generator)):
        raise UsageError("this generator has no batch norm to fold; leave out --fold-batchnorm")
    folded = copy.deepcopy(generator)
    layers: list[nn.Module] = []
    for layer in folded.net:
        norm = layer.norm if isinstance(layer, ConditionalBatchNorm) else layer
        if isinstance(norm, BatchNorm):
            layers[-1] = _folded(layers[-1], norm)
        if isinstance(layer, ConditionalBatchNorm):
            layer.register_module("norm", nn.Identity())
        if not isinstance(layer, BatchNorm | CovariateShift):
            layers.append(layer)
    folded.net = nn.Sequential(*layers)
    return folded


@torch.no_grad()
def _folded(layer: nn.Module, norm: BatchNorm) -> Layer:
    """Return a linear or convolutional layer with the batch norm behind it in its weights, which are worked out in float64."""
    assert isinstance(layer, Layer)
    mean, var = (buffer.double() for buffer in running_statistics(norm))
    scale = (var + norm.eps).rsqrt()  # s, of the shape (C,), as are all of these
    shift = -mean if layer.bias is None else layer.bias.double() - mean
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    twin = copy.deepcopy(layer)
    twin.weight = _constant(layer.weight.double() * _per_output(scale, layer), layer.weight)
    twin.bias = _constant(shift, layer.weight)
    return twin


def _per_output(values: Tensor, layer: Layer) -> Tensor:
    """Return values (C,) of a layer's outputs so that they multiply its weight, whose outputs are its first or second axis."""
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    shape = [1] * layer.weight.ndim
    shape[axis] = -1
    return values.reshape(shape)


def _constant(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype), requires_grad=False)
