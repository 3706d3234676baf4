"""What are the networks made of, and which weights do they begin with?"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from bngan.batchnorm.layers import ConditionalBatchNorm
from bngan.norms import VIRTUAL_REFERENCE_SIZE, Layer

MAXOUT_PIECES = 5
PACGAN_KERNEL = 5


class GeneratorNetwork(nn.Module):
    """What every generator is: layers that latents pass, behind the reference latents of virtual batch norm if it has one.

    Args:
        net: the layers.
        input_dim: size of the latent z.
        norm: a name from bngan.norms.NORMS.
        classes: number of classes of images that it can be asked for; 0 is none.
    """

    def __init__(self, net: nn.Sequential, input_dim: int, norm: str, classes: int = 0) -> None:
        super().__init__()
        self.net = net
        self.input_dim = input_dim
        self.classes = classes
        self.reference = _latent_reference(norm, input_dim)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents (N, input_dim) to images (N, values) or (N, C, H, W).

        Where there are classes, they are of the classes labels int64 (N,), and without labels row i is of class i mod classes.

        Raises:
            ValueError: if z or labels have another shape, or there are labels but no classes.
        """
        if z.ndim != 2 or z.shape[1] != self.input_dim:
            raise ValueError(f"expected latents (N, {self.input_dim}), got {tuple(z.shape)}")
        if self.classes and labels is None:
            labels = torch.arange(z.shape[0], device=z.device) % self.classes
        _check_labels(labels, z.shape[0], self.classes)
        return _run(self.net, z, labels, self.reference)


class DiscriminatorNetwork(nn.Module):
    """What every discriminator is: layers that images pass, behind the reference images of virtual batch norm if it has one.

    Args:
        net: the layers, of which the last is a sigmoid.
        input_shape: of an image, or of a pack of them; (values,) where it is flattened first.
        norm: a name from bngan.norms.NORMS.
        classes: number of classes that the images are said to be of; 0 is none.
    """

    def __init__(self, net: nn.Sequential, input_shape: tuple[int, ...], norm: str, classes: int = 0) -> None:
        super().__init__()
        self.net = net
        self.input_shape = input_shape
        self.classes = classes
        self.reference = _image_reference(norm, input_shape)
        self.reference_noise = _reference_noise(self.reference)
        self.instance_noise = nn.Buffer(torch.zeros(()))  # standard deviation of the noise on the images it is trained on

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images (N, C, H, W), or (N, values) where they are flattened, to the probability (N, 1) that each is real.

        Where there are classes, that it is a real one of its class, which labels int64 (N,) tell.

        Raises:
            ValueError: if images or labels have another shape, or there are labels but no classes or the other way round.
        """
        return self.logits(images, labels).sigmoid()

    def logits(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images and labels, as `forward` takes them, to logits (N, 1).

        Raises:
            ValueError: as `forward` does.
        """
        if len(self.input_shape) == 1:
            images = images.flatten(start_dim=1)
        if images.shape[1:] != self.input_shape:
            raise ValueError(f"expected images (N, {', '.join(map(str, self.input_shape))}), got {tuple(images.shape)}")
        _check_labels(labels, images.shape[0], self.classes)
        return _run([*self.net][:-1], images, labels, _noisy(self.reference, self.reference_noise, self.instance_noise))


def _check_labels(labels: Tensor | None, rows: int, classes: int) -> None:
    expected, found = (rows,) if classes else None, None if labels is None else tuple(labels.shape)
    if found != expected:
        raise ValueError(f"a network of {classes} classes takes labels {expected} with {rows} rows, got {found}")


def _run(modules: Iterable[nn.Module], batch: Tensor, labels: Tensor | None, reference: Tensor | None) -> Tensor:
    """Pass a batch (N, ...) of classes (N,), if there are any, through the modules.

    It is behind the reference batch of virtual batch norm where there is one, whose own output, of any class, is left out.
    """
    x = batch if reference is None else torch.cat([reference, batch])
    if labels is not None and reference is not None:
        labels = F.pad(labels, (len(reference), 0))
    for module in modules:
        x = module(x, labels) if isinstance(module, ConditionalBatchNorm | Projection) else module(x)
    return x if reference is None else x[len(reference) :]


def _latent_reference(norm: str, input_dim: int) -> nn.Buffer | None:
    if norm != "virtual":
        return None
    generator = torch.Generator().manual_seed(0)
    return nn.Buffer(torch.randn(VIRTUAL_REFERENCE_SIZE, input_dim, generator=generator))


def _image_reference(norm: str, shape: Sequence[int]) -> nn.Buffer | None:
    return nn.Buffer(torch.full((VIRTUAL_REFERENCE_SIZE, *shape), math.nan)) if norm == "virtual" else None


def _reference_noise(reference: Tensor | None) -> nn.Buffer | None:
    if reference is None:
        return None
    return nn.Buffer(torch.randn(reference.shape, generator=torch.Generator().manual_seed(0)), persistent=False)


def _noisy(reference: Tensor | None, noise: Tensor | None, deviation: Tensor) -> Tensor | None:
    """Return D's reference batch as noisy as the images beside it: clean ones have another variance."""
    return None if reference is None or noise is None else reference + deviation * noise


# Layers ---------------------------------------------------------------------------------------------------------------


class LinearMaxout(nn.Linear):
    """Units that each give the largest of several linear functions (Goodfellow et al. 2013).

    What these add is not called `bias`: unlike one, it matters before a norm that subtracts the units' means.

    Args:
        in_features: number of inputs.
        out_features: number of units.
        pieces: linear functions in a unit.
    """

    def __init__(self, in_features: int, out_features: int, pieces: int = MAXOUT_PIECES) -> None:
        super().__init__(in_features, out_features * pieces, bias=False)
        self.out_features = out_features
        self.offsets = nn.Parameter(torch.zeros(out_features * pieces))

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, in_features) to (N, out_features)."""
        pieces = F.linear(input, self.weight, self.offsets)
        return pieces.unflatten(dim=-1, sizes=(self.out_features, -1)).amax(dim=-1)


class MinibatchStddev(nn.Module):
    """Tells D how much the images of a group differ, in one channel more (Karras et al. 2018, section 3).

    That is the standard deviation of each activation over the group, averaged over the activations. A group is of consecutive
    rows, where StyleGAN2's are far apart: so real and fake images in a joint batch share none. With several ranks it is of the
    rows that one of them has, not of those that one process would take.

    Args:
        size: images in a group; in evaluation, what is left of a batch is a smaller one.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map activations (N, C, ...) to (N, C + 1, ...)."""
        left = len(x) % self.size
        groups = [(x[: len(x) - left], self.size), (x[len(x) - left :], left)]
        return torch.cat([x, torch.cat([_group_stddev(rows, size) for rows, size in groups if len(rows)])], dim=1)

    def extra_repr(self) -> str:
        return f"size={self.size}"


def _group_stddev(x: Tensor, size: int) -> Tensor:
    """Return the mean standard deviation (N, 1, ...) within each group of so many consecutive rows of x (N, C, ...)."""
    grouped = x.unflatten(dim=0, sizes=(-1, size))  # (N / size, size, C, ...)
    var = grouped.var(dim=1, correction=0, keepdim=True)
    stddev = (var + 1e-8).sqrt()  # whose slope at 0 would be infinite
    mean = stddev.mean(dim=tuple(range(2, grouped.ndim)), keepdim=True)  # (N / size, 1, 1, ...)
    return mean.expand(-1, size, 1, *grouped.shape[3:]).flatten(end_dim=1)


class Projection(nn.Module):
    """D's last layer where images have classes: psi(phi) + <v_c, phi> for class c (Miyato & Koyama 2018, section 3).

    Here phi is all that this layer sees, pixels included, and psi is linear.

    Args:
        psi: maps phi (N, ...) to one value for each image.
        v: maps it to one for each class.
    """

    def __init__(self, psi: nn.Module, v: nn.Module) -> None:
        super().__init__()
        self.psi, self.v = psi, v

    def forward(self, phi: Tensor, labels: Tensor) -> Tensor:
        """Map phi (N, ...) of images of the classes labels int64 (N,) to (N, 1) or (N, 1, 1, 1), as psi does."""
        of_all = self.psi(phi)
        of_class = self.v(phi).flatten(start_dim=1).gather(dim=1, index=labels.unsqueeze(dim=1))  # (N, 1)
        return of_all + of_class.reshape(of_all.shape)


# Initialization -------------------------------------------------------------------------------------------------------


def initialize(modules: Iterable[nn.Module], draw: Callable[[Layer], None]) -> None:
    """Draw the weights of the layers among the modules, and set biases to 0.

    Spectral norm divides a weight by its own scale, so that one is left as it is.
    """
    for layer in modules:
        if isinstance(layer, Layer):
            if not is_parametrized(layer, "weight"):
                draw(layer)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def as_drawn(layer: Layer) -> None:
    """Leave a layer's weights as torch has drawn them."""


def he(negative_slope: float) -> Callable[[Layer], None]:
    """Return what draws a layer's weights so that leaky ReLUs of that slope keep the signal's scale (He et al. 2015).

    0 is ReLU's slope, 1 that of no activation.
    """
    gain = nn.init.calculate_gain("leaky_relu", negative_slope)

    def draw(layer: Layer) -> None:
        nn.init.normal_(layer.weight, mean=0.0, std=gain / math.sqrt(_fan_in(layer)))

    return draw


def published(layer: Layer) -> None:
    """Draw a layer's weights from N(0, 0.02), as DCGAN and PacGAN do; the latter's D cuts that off at two deviations."""
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (PACGAN_KERNEL, PACGAN_KERNEL):
        nn.init.trunc_normal_(layer.weight, mean=0.0, std=0.02, a=-0.04, b=0.04)
    else:
        nn.init.normal_(layer.weight, mean=0.0, std=0.02)


def _fan_in(layer: Layer) -> float:
    """Return how many products a value of the layer's output is the sum of, away from the image's border."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    products = layer.in_channels * math.prod(layer.kernel_size)
    if isinstance(layer, nn.Conv2d):
        return products
    # A transposed convolution deals them out to stride^2 pixels; G's first one, of stride 1, to the k^2 of its whole output.
    return products / math.prod(layer.kernel_size if layer.stride == (1, 1) else layer.stride)
