"""The generators and discriminators: the source's MLP pair, and DCGAN's convolutional pair.

All are plain PyTorch. A discriminator gives probabilities when called and logits, which losses want, by `logits`.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from bngan.errors import UsageError, check_at_least
from bngan.norms import CENTERING, DEFAULT_NORM_SETTINGS, VIRTUAL_REFERENCE_SIZE, Layer, NormSettings, find_norm
from bngan.settings import Settings

LARGEST_FIRST_SIDE = 4  # of G's first layer, and of D's last


class Generator(nn.Module):
    """The source's MLP generator: input_dim -> hidden_dim -> 2 hidden_dim -> output_dim, batch-normalized, in [-1, 1].

    Args:
        input_dim: size of the latent z.
        output_dim: number of values in an image.
        hidden_dim: width of the first hidden layer; the second is twice as wide.
        norm: a name from bngan.norms.NORMS, after each hidden layer.
        norm_settings: eps and momentum of batch norm, and groups of ghost batch norm.
    """

    def __init__(
        self,
        input_dim: int = 100,
        output_dim: int = 784,
        hidden_dim: int = 128,
        norm: str = "batch",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
    ) -> None:
        super().__init__()
        check_at_least(1, input_dim=input_dim, output_dim=output_dim, hidden_dim=hidden_dim)
        normalized = find_norm(norm, norm_settings)
        self.input_dim = input_dim
        self.net = nn.Sequential(
            *normalized(nn.Linear(input_dim, hidden_dim)),
            nn.ReLU(),
            *normalized(nn.Linear(hidden_dim, hidden_dim * 2)),
            nn.ReLU(),
            nn.Linear(hidden_dim * 2, output_dim),
            nn.Tanh(),
        )
        self.reference = _latent_reference(norm, input_dim)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (N, input_dim) to images (N, output_dim) in [-1, 1].

        Raises:
            ValueError: if z is not (N, input_dim).
        """
        _check_latents(z, self.input_dim)
        return _run(self.net, z, self.reference)


class Discriminator(nn.Module):
    """The source's MLP discriminator: input_dim -> 2 hidden_dim -> hidden_dim -> 1, batch-normalized.

    Args:
        input_dim: number of values in an image.
        hidden_dim: width of the second hidden layer; the first is twice as wide.
        norm: a name from bngan.norms.NORMS, after each hidden layer.
        norm_settings: eps and momentum of batch norm, and groups of ghost batch norm.
        dropout: fraction of each hidden layer's activations dropped in training; 0 builds no dropout layer.
    """

    def __init__(
        self,
        input_dim: int = 784,
        hidden_dim: int = 128,
        norm: str = "batch",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(1, input_dim=input_dim, hidden_dim=hidden_dim)
        normalized = find_norm(norm, norm_settings)
        self.input_dim = input_dim
        self.net = nn.Sequential(
            *normalized(nn.Linear(input_dim, hidden_dim * 2)),
            nn.LeakyReLU(negative_slope=0.2),
            *_dropout(dropout),
            *normalized(nn.Linear(hidden_dim * 2, hidden_dim)),
            nn.LeakyReLU(negative_slope=0.2),
            *_dropout(dropout),
            # Spectral norm bounds the whole function only if the last layer is bounded as well.
            *(normalized if norm == "spectral" else find_norm("none"))(nn.Linear(hidden_dim, 1)),
            nn.Sigmoid(),
        )
        self.reference = _image_reference(norm, (input_dim,))
        self.reference_noise = _reference_noise(self.reference)
        self.instance_noise = nn.Buffer(torch.zeros(()))  # standard deviation of the noise on the images it is trained on

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, input_dim) or (N, C, H, W) to the probability (N, 1) that each is real.

        Raises:
            ValueError: if an image does not have input_dim values.
        """
        return self.logits(images).sigmoid()

    def logits(self, images: Tensor) -> Tensor:
        """Map images (N, input_dim) or (N, C, H, W) to logits (N, 1).

        Raises:
            ValueError: if an image does not have input_dim values.
        """
        images = images.flatten(start_dim=1)
        if images.shape[1] != self.input_dim:
            raise ValueError(f"expected images of {self.input_dim} values, got {images.shape[1]}")
        return _run([*self.net][:-1], images, _noisy(self.reference, self.reference_noise, self.instance_noise))


class ConvGenerator(nn.Module):
    """DCGAN's generator (Radford et al. 2016): transposed convolutions, each doubling the side; no norm at the output.

    The first layer's side is at most 4, as DCGAN's is: 28 comes from 4, 7, 14.

    Args:
        input_dim: size of the latent z.
        channels: channels of the images, 1 or 3.
        size: side of the square images: 4, 5, 6 or 7 times a power of two (28, 32, 48, 64, 80, 96, 128...).
        width: number of filters of the last hidden layer; each earlier one has twice as many, up to 8 times.
        norm: a name from bngan.norms.NORMS, after each hidden layer; with spectral norm it hardly trains, its images being
            nearly black at the start.
        norm_settings: eps and momentum of batch norm, and groups of ghost batch norm.
    """

    def __init__(
        self,
        input_dim: int = 100,
        channels: int = 1,
        size: int = 28,
        width: int = 64,
        norm: str = "batch",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
    ) -> None:
        super().__init__()
        check_at_least(1, input_dim=input_dim, channels=channels, width=width)
        base, doublings = split_size(size)
        sides = [base * 2**level for level in range(doublings + 1)]
        if base > LARGEST_FIRST_SIDE:
            sides.insert(0, (base + 1) // 2)
        normalized = find_norm(norm, norm_settings)
        bias = norm not in CENTERING
        self.input_dim = input_dim
        filters = [width * min(2**level, 8) for level in reversed(range(len(sides) - 1))]
        modules: list[nn.Module] = [
            nn.Unflatten(1, (input_dim, 1, 1)),
            *normalized(nn.ConvTranspose2d(input_dim, filters[0], kernel_size=sides[0], bias=bias)),
            nn.ReLU(),
        ]
        for (source, target), side in zip(pairwise(filters), sides[1:], strict=False):
            modules += [*normalized(_upsample(source, target, side, bias=bias)), nn.ReLU()]
        modules += [_upsample(filters[-1], channels, size, bias=True), nn.Tanh()]
        self.net = nn.Sequential(*modules)
        self.reference = _latent_reference(norm, input_dim)
        _initialize(self, norm, negative_slope=0.0)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (N, input_dim) to images (N, channels, size, size) in [-1, 1].

        Raises:
            ValueError: if z is not (N, input_dim).
        """
        _check_latents(z, self.input_dim)
        return _run(self.net, z, self.reference)


class ConvDiscriminator(nn.Module):
    """DCGAN's discriminator (Radford et al. 2016): strided convolutions, each halving the side; no norm at the input.

    They go on until the side is at most 4, as in DCGAN: 28 becomes 14, 7, 3. With 7 as the last side, no unit would
    see more than 10 pixels of a side, and D could not tell a digit from strokes that make none.

    Args:
        channels: channels of the images, 1 or 3.
        size: side of the square images, as for ConvGenerator.
        width: number of filters of the first layer; each later one has twice as many, up to 8 times.
        norm: a name from bngan.norms.NORMS, after each hidden layer but the first.
        norm_settings: eps and momentum of batch norm, and groups of ghost batch norm.
        dropout: fraction of each hidden layer's activations dropped in training; 0 builds no dropout layer.
    """

    def __init__(
        self,
        channels: int = 1,
        size: int = 28,
        width: int = 64,
        norm: str = "batch",
        norm_settings: NormSettings = DEFAULT_NORM_SETTINGS,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(1, channels=channels, width=width)
        last_side, halvings = split_size(size)
        if last_side > LARGEST_FIRST_SIDE:
            last_side, halvings = last_side // 2, halvings + 1
        self.image_shape = (channels, size, size)
        normalized = find_norm(norm, norm_settings)
        bare = normalized if norm == "spectral" else find_norm("none")
        bias = norm not in CENTERING
        filters = [width * min(2**level, 8) for level in range(halvings)]
        modules: list[nn.Module] = [*bare(_downsample(channels, width, bias=True)), nn.LeakyReLU(negative_slope=0.2)]
        for source, target in pairwise(filters):
            modules += [
                *_dropout(dropout),
                *normalized(_downsample(source, target, bias=bias)),
                nn.LeakyReLU(negative_slope=0.2),
            ]
        modules += [
            *_dropout(dropout),
            *bare(nn.Conv2d(filters[-1], 1, kernel_size=last_side)),
            nn.Flatten(start_dim=1),
            nn.Sigmoid(),
        ]
        self.net = nn.Sequential(*modules)
        self.reference = _image_reference(norm, self.image_shape)
        self.reference_noise = _reference_noise(self.reference)
        self.instance_noise = nn.Buffer(torch.zeros(()))  # standard deviation of the noise on the images it is trained on
        _initialize(self, norm, negative_slope=0.2)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, channels, size, size) to the probability (N, 1) that each is real.

        Raises:
            ValueError: if the images have another shape.
        """
        return self.logits(images).sigmoid()

    def logits(self, images: Tensor) -> Tensor:
        """Map images (N, channels, size, size) to logits (N, 1).

        Raises:
            ValueError: if the images have another shape.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"expected images (N, {', '.join(map(str, self.image_shape))}), got {tuple(images.shape)}")
        return _run([*self.net][:-1], images, _noisy(self.reference, self.reference_noise, self.instance_noise))


def build_networks(settings: Settings) -> tuple[Generator | ConvGenerator, Discriminator | ConvDiscriminator]:
    """Return the generator and the discriminator that the settings describe.

    Raises:
        UsageError: if there is no such kind, or if the networks cannot have that shape.
    """
    channels, height, width = settings.image_shape
    norms = NormSettings(eps=settings.bn_eps, momentum=settings.bn_momentum, ghost_groups=settings.ghost_groups)
    if settings.network == "mlp":
        values = math.prod(settings.image_shape)
        return (
            Generator(settings.latent_dim, values, settings.hidden_dim, settings.g_norm, norms),
            Discriminator(values, settings.hidden_dim, settings.d_norm, norms, settings.d_dropout),
        )
    if settings.network == "conv":
        if height != width:
            raise UsageError(f"convolutional networks take square images, not {height} x {width}")
        return (
            ConvGenerator(settings.latent_dim, channels, height, settings.hidden_dim, settings.g_norm, norms),
            ConvDiscriminator(channels, height, settings.hidden_dim, settings.d_norm, norms, settings.d_dropout),
        )
    raise UsageError(f"unknown network {settings.network!r}; choose from mlp, conv")


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


def _run(modules: Iterable[nn.Module], batch: Tensor, reference: Tensor | None) -> Tensor:
    """Pass a batch (N, ...) through the modules, behind the reference batch of virtual batch norm where there is one."""
    x = batch if reference is None else torch.cat([reference, batch])
    for module in modules:
        x = module(x)
    return x if reference is None else x[len(reference) :]


def _latent_reference(norm: str, input_dim: int) -> nn.Buffer | None:
    if norm != "virtual":
        return None
    generator = torch.Generator().manual_seed(0)
    return nn.Buffer(torch.randn(VIRTUAL_REFERENCE_SIZE, input_dim, generator=generator))


def _noisy(reference: Tensor | None, noise: Tensor | None, deviation: Tensor) -> Tensor | None:
    """Return D's reference batch as noisy as the images beside it: clean ones have another variance."""
    return None if reference is None or noise is None else reference + deviation * noise


def _reference_noise(reference: Tensor | None) -> nn.Buffer | None:
    if reference is None:
        return None
    return nn.Buffer(torch.randn(reference.shape, generator=torch.Generator().manual_seed(0)), persistent=False)


def _image_reference(norm: str, shape: Sequence[int]) -> nn.Buffer | None:
    return nn.Buffer(torch.full((VIRTUAL_REFERENCE_SIZE, *shape), math.nan)) if norm == "virtual" else None


def _upsample(source: int, target: int, side: int, *, bias: bool) -> Layer:
    """Return a layer from side / 2, rounded up, to that side."""
    return nn.ConvTranspose2d(source, target, kernel_size=4 - side % 2, stride=2, padding=1, bias=bias)


def _downsample(source: int, target: int, *, bias: bool) -> Layer:
    return nn.Conv2d(source, target, kernel_size=4, stride=2, padding=1, bias=bias)


def _dropout(fraction: float) -> tuple[nn.Module, ...]:
    if not 0 <= fraction < 1:
        raise UsageError(f"dropout must be in [0, 1), got {fraction}")
    return (nn.Dropout(p=fraction),) if fraction else ()


def _initialize(network: nn.Module, norm: str, negative_slope: float) -> None:
    """Draw the weights of a convolutional network with leaky ReLUs of that slope; 0 is ReLU's."""
    # Convolutions of weights in this order are faster, on processors and on GPUs' tensor cores.
    network.to(memory_format=torch.channels_last)
    gain = nn.init.calculate_gain("leaky_relu", negative_slope)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            # DCGAN's N(0, 0.02) relies on a norm to restore the scale; without one the signal would die out, so He's is used.
            # Spectral norm divides the weight by its own scale.
            if norm != "spectral":
                std = gain / math.sqrt(_fan_in(layer)) if norm == "none" else 0.02
                nn.init.normal_(layer.weight, mean=0.0, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _fan_in(layer: nn.Conv2d | nn.ConvTranspose2d) -> float:
    """Return how many products a value of the layer's output is the sum of, away from the image's border."""
    products = layer.in_channels * math.prod(layer.kernel_size)
    if isinstance(layer, nn.Conv2d):
        return products
    # A transposed convolution deals them out to stride^2 pixels; G's first one, of stride 1, to the k^2 of its whole output.
    return products / math.prod(layer.kernel_size if layer.stride == (1, 1) else layer.stride)


def _check_latents(z: Tensor, input_dim: int) -> None:
    if z.ndim != 2 or z.shape[1] != input_dim:
        raise ValueError(f"expected latents (N, {input_dim}), got {tuple(z.shape)}")
