"""The generators and discriminators: the source's MLP pair, DCGAN's and PacGAN's convolutional pairs, and PacGAN's for points.

All are plain PyTorch. A discriminator gives probabilities when called and logits, which losses want, by `logits`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bngan.blocks import (
    PACGAN_KERNEL,
    DiscriminatorNetwork,
    GeneratorNetwork,
    LinearMaxout,
    MinibatchStddev,
    Projection,
    as_drawn,
    he,
    initialize,
    published,
)
from bngan.errors import UsageError, check_at_least
from bngan.norms import CENTERING, DEFAULT_NORM_SETTINGS, Layer, Modules, NormSettings, find_norm
from bngan.settings import Initialization, Settings

Normalized = Callable[[Layer], Modules]
POINT_SHAPE = (2, 1, 1)

# Fully connected ------------------------------------------------------------------------------------------------------


class Generator(GeneratorNetwork):
    """The source's MLP generator: input_dim -> hidden_dim -> 2 hidden_dim -> output_dim, batch-normalized, in [-1, 1].

    Args:
        input_dim: size of the latent z.
        output_dim: number of values in an image.
        hidden_dim: width of the first hidden layer; the others are twice as wide.
        norm: a name from bngan.norms.NORMS, after each hidden layer.
        norm_settings: eps and momentum of batch norm, groups of ghost batch norm, and the images' classes.
        depth: number of hidden layers.
        initialization: default, as torch's layers begin, or he for the hidden ones.
    """

    def __init__(
        self,
        input_dim: int = 100,
        output_dim: int = 784,
        hidden_dim: int = 128,
        norm: str = "batch",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
        depth: int = 2,
        initialization: Initialization = "default",
    ) -> None:
        check_at_least(1, input_dim=input_dim, output_dim=output_dim, hidden_dim=hidden_dim, depth=depth)
        widths = [input_dim, hidden_dim, *[hidden_dim * 2] * (depth - 1)]
        hidden = _relu_layers(widths, find_norm(norm, norm_settings))
        if initialization == "he":
            initialize(hidden, he(negative_slope=0.0))
        net = nn.Sequential(*hidden, nn.Linear(widths[-1], output_dim), nn.Tanh())
        super().__init__(net, input_dim, norm, norm_settings.classes)


class Discriminator(DiscriminatorNetwork):
    """The source's MLP discriminator: input_dim -> 2 hidden_dim -> hidden_dim -> 1, batch-normalized.

    Args:
        input_dim: number of values in an image, or in a pack of them.
        hidden_dim: width of the second hidden layer; the first is twice as wide.
        norm: a name from bngan.norms.NORMS, after each hidden layer.
        norm_settings: eps and momentum of batch norm, and groups of ghost batch norm.
        dropout: fraction of each hidden layer's activations dropped in training; 0 builds no dropout layer.
        norm_first: whether the first hidden layer is normalized, too; spectral norm is on every layer.
        minibatch_stddev: size of the groups of bngan.blocks.MinibatchStddev; 0 builds no such layer.
        classes: number of classes that images are said to be of, which makes the last layer a Projection; 0 is none.
        initialization: default, as torch's layers begin, or he for the hidden ones.
    """

    def __init__(
        self,
        input_dim: int = 784,
        hidden_dim: int = 128,
        norm: str = "batch",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
        dropout: float = 0.0,
        norm_first: bool = True,
        minibatch_stddev: int = 0,
        classes: int = 0,
        initialization: Initialization = "default",
    ) -> None:
        check_at_least(1, input_dim=input_dim, hidden_dim=hidden_dim)
        normalized = find_norm(norm, norm_settings)
        bare = _bare(norm, normalized)
        hidden: list[nn.Module] = [
            *(normalized if norm_first else bare)(nn.Linear(input_dim, hidden_dim * 2)),
            nn.LeakyReLU(negative_slope=0.2),
            *_dropout(dropout),
            *normalized(nn.Linear(hidden_dim * 2, hidden_dim)),
            nn.LeakyReLU(negative_slope=0.2),
            *_minibatch_stddev(minibatch_stddev),
            *_dropout(dropout),
        ]
        if initialization == "he":
            initialize(hidden, he(negative_slope=0.2))
        output = _output(partial(nn.Linear, hidden_dim + bool(minibatch_stddev)), bare, classes)
        super().__init__(nn.Sequential(*hidden, output, nn.Sigmoid()), (input_dim,), norm, classes)


class PointGenerator(GeneratorNetwork):
    """PacGAN's generator of points in the plane (Lin et al. 2018, their code for ring and grid), which no tanh bounds.

    Weights begin as N(0, 0.02), and hidden layers have no bias before a norm that subtracts the mean.

    Args:
        input_dim: size of the latent z, 2 as published.
        output_dim: number of a point's coordinates.
        hidden_dim: width of the hidden layers, 400 as published.
        norm: a name from bngan.norms.NORMS, after each hidden layer.
        norm_settings: eps and momentum of batch norm, groups of ghost batch norm, and the images' classes.
        depth: number of hidden layers.
        initialization: default, or he for the hidden layers.
    """

    def __init__(
        self,
        input_dim: int = 2,
        output_dim: int = 2,
        hidden_dim: int = 400,
        norm: str = "batch",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
        depth: int = 4,
        initialization: Initialization = "default",
    ) -> None:
        check_at_least(1, input_dim=input_dim, output_dim=output_dim, hidden_dim=hidden_dim, depth=depth)
        widths = [input_dim, *[hidden_dim] * depth]
        hidden = _relu_layers(widths, find_norm(norm, norm_settings), bias=norm not in CENTERING)
        initialize(hidden, he(negative_slope=0.0) if initialization == "he" else published)
        output = nn.Linear(hidden_dim, output_dim)
        initialize([output], published)
        super().__init__(nn.Sequential(*hidden, output), input_dim, norm, norm_settings.classes)


class PointDiscriminator(DiscriminatorNetwork):
    """PacGAN's discriminator of points in the plane (Lin et al. 2018, their code for ring and grid): 3 layers of maxout units.

    Weights begin as N(0, 0.02).

    Args:
        input_dim: number of a point's coordinates, or of a pack's.
        hidden_dim: number of units in each hidden layer, 200 as published.
        norm: a name from bngan.norms.NORMS, after each hidden layer; none as published.
        norm_settings: eps and momentum of batch norm, and groups of ghost batch norm.
        dropout: fraction of each hidden layer's activations dropped in training; 0 builds no dropout layer.
        norm_first: whether the first hidden layer is normalized, too; spectral norm is on every layer.
        minibatch_stddev: size of the groups of bngan.blocks.MinibatchStddev; 0 builds no such layer.
        classes: number of classes that images are said to be of, which makes the last layer a Projection; 0 is none.
        initialization: default, or he for the hidden layers, whose pieces are linear.
    """

    def __init__(
        self,
        input_dim: int = 2,
        hidden_dim: int = 200,
        norm: str = "none",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
        dropout: float = 0.0,
        norm_first: bool = True,
        minibatch_stddev: int = 0,
        classes: int = 0,
        initialization: Initialization = "default",
    ) -> None:
        check_at_least(1, input_dim=input_dim, hidden_dim=hidden_dim)
        normalized = find_norm(norm, norm_settings)
        bare = _bare(norm, normalized)
        hidden: list[nn.Module] = [
            *(normalized if norm_first else bare)(LinearMaxout(input_dim, hidden_dim)),
            *_dropout(dropout),
            *normalized(LinearMaxout(hidden_dim, hidden_dim)),
            *_dropout(dropout),
            *normalized(LinearMaxout(hidden_dim, hidden_dim)),
            *_minibatch_stddev(minibatch_stddev),
            *_dropout(dropout),
        ]
        initialize(hidden, he(negative_slope=1.0) if initialization == "he" else published)
        output = _output(partial(nn.Linear, hidden_dim + bool(minibatch_stddev)), bare, classes)
        initialize(output.modules(), published)
        super().__init__(nn.Sequential(*hidden, output, nn.Sigmoid()), (input_dim,), norm, classes)


# Convolutional --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What tells one pair of convolutional networks from another.

    Attributes:
        kernel_size: side of the kernels of stride 2.
        smallest_side: the side of G's first layer and of D's last one is at most that.
        he_without_norm: whether weights begin as He's where there is no norm, by default; else always as N(0, 0.02).
    """

    kernel_size: int
    smallest_side: int
    he_without_norm: bool


# N(0, 0.02) relies on a norm to restore the scale, and without one the signal would die out: PacGAN's is kept as published.
DCGAN = Layout(kernel_size=4, smallest_side=4, he_without_norm=True)
PACGAN = Layout(kernel_size=PACGAN_KERNEL, smallest_side=2, he_without_norm=False)
LAYOUTS = {"conv": DCGAN, "pacgan": PACGAN}
PACGAN_SIZE = 28


class ConvGenerator(GeneratorNetwork):
    """A generator of transposed convolutions, each doubling the side; no norm at the output, which is in [-1, 1].

    By layout it is DCGAN's (Radford et al. 2016), where 28 comes from 4, 7, 14; or PacGAN's (Lin et al. 2018, their code for
    Stacked MNIST), where it comes from 2, 4, 7, 14. That is written in TensorFlow, which cuts one pixel more off the end of an
    even side, where torch does at the start: this is its network for images turned by 180 degrees. And it has biases before
    batch norm, which do nothing and are left out.

    Args:
        input_dim: size of the latent z.
        channels: channels of the images, 1 or 3.
        size: side of the square images: 4, 5, 6 or 7 times a power of two (28, 32, 48, 64, 80, 96, 128...).
        width: number of filters of the last hidden layer; each earlier one has twice as many, up to 8 times.
        norm: a name from bngan.norms.NORMS, after each hidden layer; with spectral norm it hardly trains, its images being
            nearly black at the start.
        norm_settings: eps and momentum of batch norm, groups of ghost batch norm, and the images' classes.
        layout: DCGAN or PACGAN.
        initialization: default, the layout's, or he whatever the norm.
    """

    def __init__(
        self,
        input_dim: int = 100,
        channels: int = 1,
        size: int = 28,
        width: int = 64,
        norm: str = "batch",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
        layout: Layout = DCGAN,
        initialization: Initialization = "default",
    ) -> None:
        check_at_least(1, input_dim=input_dim, channels=channels, width=width)
        base, doublings = split_size(size)
        sides = [base * 2**level for level in range(doublings + 1)]
        while sides[0] > layout.smallest_side:
            sides.insert(0, (sides[0] + 1) // 2)
        normalized = find_norm(norm, norm_settings)
        bias = norm not in CENTERING
        filters = [width * min(2**level, 8) for level in reversed(range(len(sides) - 1))]
        modules: list[nn.Module] = [
            nn.Unflatten(1, (input_dim, 1, 1)),
            *normalized(nn.ConvTranspose2d(input_dim, filters[0], kernel_size=sides[0], bias=bias)),
            nn.ReLU(),
        ]
        for (source, target), side in zip(pairwise(filters), sides[1:], strict=False):
            modules += [*normalized(_upsample(source, target, side, layout, bias=bias)), nn.ReLU()]
        modules += [_upsample(filters[-1], channels, size, layout, bias=True), nn.Tanh()]
        super().__init__(_drawn(modules, norm, 0.0, layout, initialization), input_dim, norm, norm_settings.classes)


class ConvDiscriminator(DiscriminatorNetwork):
    """A discriminator of strided convolutions, each halving the side; no norm at the input.

    By layout it is DCGAN's (Radford et al. 2016), which go on until the side is at most 4: 28 becomes 14, 7, 3. With 7 as the
    last side, no unit would see more than 10 pixels of a side, and D could not tell a digit from strokes that make none. Or it
    is PacGAN's (Lin et al. 2018, their code for Stacked MNIST): 28 becomes 14, 7, 4, 2. For what differs see ConvGenerator.

    Args:
        channels: channels of the images, 1 or 3, or of packs of them.
        size: side of the square images, as for ConvGenerator.
        width: number of filters of the first layer; each later one has twice as many, up to 8 times.
        norm: a name from bngan.norms.NORMS, after each hidden layer but the first.
        norm_settings: eps and momentum of batch norm, and groups of ghost batch norm.
        dropout: fraction of each hidden layer's activations dropped in training; 0 builds no dropout layer.
        norm_first: whether the first hidden layer is normalized, too; spectral norm is on every layer.
        minibatch_stddev: size of the groups of bngan.blocks.MinibatchStddev; 0 builds no such layer.
        classes: number of classes that images are said to be of, which makes the last layer a Projection; 0 is none.
        layout: DCGAN or PACGAN.
        initialization: default, the layout's, or he whatever the norm.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        width: int = 64,
        norm: str = "batch",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
        dropout: float = 0.0,
        norm_first: bool = False,
        minibatch_stddev: int = 0,
        classes: int = 0,
        layout: Layout = DCGAN,
        initialization: Initialization = "default",
    ) -> None:
        check_at_least(1, channels=channels, width=width)
        last_side, halvings = split_size(size)
        while last_side > layout.smallest_side:
            last_side, halvings = (last_side + layout.kernel_size % 2) // 2, halvings + 1
        normalized = find_norm(norm, norm_settings)
        bare = _bare(norm, normalized)
        bias = norm not in CENTERING
        filters = [width * min(2**level, 8) for level in range(halvings)]
        modules: list[nn.Module] = [
            *(normalized if norm_first else bare)(_downsample(channels, width, layout, bias=bias or not norm_first)),
            nn.LeakyReLU(negative_slope=0.2),
        ]
        for source, target in pairwise(filters):
            modules += [
                *_dropout(dropout),
                *normalized(_downsample(source, target, layout, bias=bias)),
                nn.LeakyReLU(negative_slope=0.2),
            ]
        modules += [
            *_minibatch_stddev(minibatch_stddev),
            *_dropout(dropout),
            _output(partial(nn.Conv2d, filters[-1] + bool(minibatch_stddev), kernel_size=last_side), bare, classes),
            nn.Flatten(start_dim=1),
            nn.Sigmoid(),
        ]
        super().__init__(_drawn(modules, norm, 0.2, layout, initialization), (channels, size, size), norm, classes)


# By settings ----------------------------------------------------------------------------------------------------------


def build_networks(settings: Settings) -> tuple[GeneratorNetwork, DiscriminatorNetwork]:
    """Return the generator and the discriminator that the settings describe.

    Raises:
        UsageError: if there is no such kind, or if the networks cannot have that shape.
    """
    (channels, height, width), latent_dim, hidden_dim = settings.image_shape, settings.latent_dim, settings.hidden_dim
    norms = NormSettings(eps=settings.bn_eps, momentum=settings.bn_momentum, ghost_groups=settings.ghost_groups)
    common: dict[str, Any] = {"norm_settings": norms, "initialization": settings.initialization}
    g_how = {**common, "norm": settings.g_norm, "norm_settings": replace(norms, classes=settings.classes)}
    d_how = {**common, "norm": settings.d_norm, "dropout": settings.d_dropout, "minibatch_stddev": settings.minibatch_stddev}
    d_how |= {"classes": settings.classes}
    # Where they are unset, the classes have the networks' own ways.
    depth: dict[str, Any] = {} if settings.g_depth is None else {"depth": settings.g_depth}
    d_how |= {} if settings.d_norm_first is None else {"norm_first": settings.d_norm_first}
    if settings.network == "mlp":
        values = math.prod(settings.image_shape)
        g = Generator(latent_dim, output_dim=values, hidden_dim=hidden_dim, **g_how, **depth)
        return g, Discriminator(settings.pack * values, hidden_dim=hidden_dim, **d_how)
    if settings.network == "points":
        if settings.image_shape != POINT_SHAPE:
            raise UsageError(
                f"network points makes points, of image_shape {POINT_SHAPE}, not {settings.image_shape}; use mlp or conv"
            )
        g = PointGenerator(latent_dim, hidden_dim=hidden_dim, **g_how, **depth)
        return g, PointDiscriminator(settings.pack * channels, hidden_dim=hidden_dim // 2, **d_how)
    if settings.network not in LAYOUTS:
        raise UsageError(f"unknown network {settings.network!r}; choose from mlp, conv, pacgan, points")
    if height != width:
        raise UsageError(f"convolutional networks take square images, not {height} x {width}")
    if settings.network == "pacgan" and height != PACGAN_SIZE:
        raise UsageError(f"network pacgan is for images of side {PACGAN_SIZE}, not {height}; use conv (--model.network)")
    how = {"size": height, "width": hidden_dim, "layout": LAYOUTS[settings.network]}
    g = ConvGenerator(latent_dim, channels=channels, **g_how, **how)
    return g, ConvDiscriminator(settings.pack * channels, **d_how, **how)


def split_size(size: int) -> tuple[int, int]:
    """Return (base, doublings) with size = base * 2^doublings, the base in 4 to 7 and at least 2 doublings.

    Raises:
        UsageError: if the size cannot be split so, naming the nearest sizes that can.
    """
    base, doublings = size, 0
    while base > 7 and base % 2 == 0:
        base, doublings = base // 2, doublings + 1
    if not 4 <= base <= 7 or doublings < 2:
        fitting = sorted({b * 2**k for b in (4, 5, 6, 7) for k in range(2, 9)}, key=lambda s: (abs(s - size), s))
        nearest = " or ".join(map(str, sorted(fitting[:2])))
        raise UsageError(f"convolutional networks cannot make images of side {size}; use {nearest} (--data.image_size)")
    return base, doublings


def set_reference(network: nn.Module, batch: Tensor) -> None:
    """Fix the reference batch of a network with virtual batch norm to the first examples of `batch`.

    Raises:
        UsageError: if the batch is too small.
    """
    reference = network.reference
    assert isinstance(reference, Tensor)
    if len(batch) < len(reference):
        raise UsageError(f"virtual batch norm needs a batch of at least {len(reference)} examples, got {len(batch)}")
    reference.copy_(batch[: len(reference)].reshape(reference.shape))


def needs_reference(network: nn.Module) -> bool:
    """Return whether the network has virtual batch norm whose reference batch is not set yet."""
    return isinstance(network.reference, Tensor) and bool(network.reference.isnan().any())


# Parts ----------------------------------------------------------------------------------------------------------------


def _relu_layers(widths: Sequence[int], normalized: Normalized, *, bias: bool = True) -> list[nn.Module]:
    """Return fully connected layers from each width to the next, with norms and ReLUs."""
    pairs = pairwise(widths)
    return [part for source, target in pairs for part in (*normalized(nn.Linear(source, target, bias=bias)), nn.ReLU())]


def _bare(norm: str, normalized: Normalized) -> Normalized:
    """Return the norm of D's other layers: none but for spectral, which bounds the whole function only if it is on all."""
    return normalized if norm == "spectral" else find_norm("none")


def _dropout(fraction: float) -> tuple[nn.Module, ...]:
    if not 0 <= fraction < 1:
        raise UsageError(f"dropout must be in [0, 1), got {fraction}")
    return (nn.Dropout(p=fraction),) if fraction else ()


def _minibatch_stddev(size: int) -> tuple[nn.Module, ...]:
    return (MinibatchStddev(size),) if size else ()


def _output(layer: Callable[..., Layer], bare: Normalized, classes: int) -> nn.Module:
    """Return D's last layer, to one logit.

    Args:
        layer: makes layers from what D's last hidden layer gives to so many outputs.
        bare: the norm that it has.
        classes: number of classes that images are said to be of; 0 is none.
    """
    (psi,) = bare(layer(1))
    if not classes:
        return psi
    (v,) = bare(layer(classes, bias=False))
    return Projection(psi, v)


def _upsample(source: int, target: int, side: int, layout: Layout, *, bias: bool) -> Layer:
    """Return a layer from side / 2, rounded up, to that side."""
    odd = side % 2
    if layout.kernel_size % 2:
        return nn.ConvTranspose2d(
            source, target, layout.kernel_size, stride=2, padding=layout.kernel_size // 2, output_padding=1 - odd, bias=bias
        )
    return nn.ConvTranspose2d(source, target, layout.kernel_size - odd, stride=2, padding=1, bias=bias)


def _downsample(source: int, target: int, layout: Layout, *, bias: bool) -> Layer:
    """Return a layer from a side to half of it, rounded down for kernels of 4 x 4 and up for those of 5 x 5."""
    return nn.Conv2d(source, target, layout.kernel_size, stride=2, padding=(layout.kernel_size - 1) // 2, bias=bias)


def _drawn(
    modules: list[nn.Module], norm: str, negative_slope: float, layout: Layout, initialization: Initialization
) -> nn.Sequential:
    """Return convolutional layers with leaky ReLUs of that slope, 0 being ReLU's, their weights drawn."""
    # Convolutions of weights in this order are faster, on processors and on GPUs' tensor cores.
    net = nn.Sequential(*modules).to(memory_format=torch.channels_last)
    if initialization == "he" or (norm == "none" and layout.he_without_norm):
        initialize(net.modules(), he(negative_slope))
    else:
        initialize(net.modules(), as_drawn if norm == "spectral" else published)
    return net
