"""The source's MLP pair layer by layer, the convolutional pairs for every size, PacGAN's for points, and wrong input."""

import math
from dataclasses import replace
from itertools import pairwise, product
from typing import Any, Literal, Protocol, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from bngan.batchnorm.layers import ConditionalBatchNorm, batch_norm_layers
from bngan.blocks import DiscriminatorNetwork, GeneratorNetwork, LinearMaxout, MinibatchStddev, Projection
from bngan.errors import UsageError
from bngan.networks import (
    PACGAN,
    ConvDiscriminator,
    ConvGenerator,
    Discriminator,
    Generator,
    PointDiscriminator,
    build_networks,
    needs_reference,
    set_reference,
    split_size,
)
from bngan.norms import BATCH_COUPLED, CENTERING, NORMS, VIRTUAL_REFERENCE_SIZE, Layer
from bngan.settings import Settings

SIZES = [28, 32, 48, 64, 96]
CONVOLUTION = (nn.Conv2d, nn.ConvTranspose2d)


class Network(Protocol):
    net: nn.Sequential


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def kinds(network: Network) -> list[type[nn.Module]]:
    return [type(module) for module in network.net]


def followers(network: Network, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The module after each module of that kind, in order."""
    return [after for module, after in pairwise(network.net) if isinstance(module, kind)]


def discriminators() -> list[Discriminator | ConvDiscriminator]:
    return [Discriminator(input_dim=784, hidden_dim=8), ConvDiscriminator(channels=1, size=28, width=8)]


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 28, 28) * 2 - 1


# The MLP pair ---------------------------------------------------------------------------------------------------------


def test_mlp_generator_has_the_sources_layers_in_order() -> None:
    assert kinds(Generator()) == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU,
        nn.Linear, nn.BatchNorm1d, nn.ReLU,
        nn.Linear, nn.Tanh,
    ]  # fmt: skip
    widths = [(m.in_features, m.out_features) for m in Generator().net if isinstance(m, nn.Linear)]
    assert widths == [(100, 128), (128, 256), (256, 784)]


def test_mlp_discriminator_has_the_sources_layers_in_order() -> None:
    assert kinds(Discriminator()) == [
        nn.Linear, nn.BatchNorm1d, nn.LeakyReLU,
        nn.Linear, nn.BatchNorm1d, nn.LeakyReLU,
        nn.Linear, nn.Sigmoid,
    ]  # fmt: skip
    widths = [(m.in_features, m.out_features) for m in Discriminator().net if isinstance(m, nn.Linear)]
    assert widths == [(784, 256), (256, 128), (128, 1)]
    assert [m.negative_slope for m in Discriminator().net if isinstance(m, nn.LeakyReLU)] == [0.2, 0.2]


@pytest.mark.parametrize(("latent", "values", "hidden"), [(100, 784, 128), (3, 5, 7)])
def test_mlp_pair_has_the_parameters_of_the_formula(latent: int, values: int, hidden: int) -> None:
    def count(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    def linear(source: int, target: int) -> int:
        return source * target + target

    norms = 2 * hidden + 2 * (2 * hidden)  # a gamma and a beta per channel
    g = linear(latent, hidden) + linear(hidden, 2 * hidden) + linear(2 * hidden, values)
    d = linear(values, 2 * hidden) + linear(2 * hidden, hidden) + linear(hidden, 1)
    assert count(Generator(latent, values, hidden)) == g + norms
    assert count(Discriminator(values, hidden)) == d + norms
    assert count(Generator(latent, values, hidden, norm="none")) == g
    assert count(Discriminator(values, hidden, norm="none")) == d


@pytest.mark.parametrize(("depth", "widths"), [(1, [8]), (2, [8, 16]), (5, [8, 16, 16, 16, 16])])
def test_mlp_generator_has_the_depth_it_is_asked_for(depth: int, widths: list[int]) -> None:
    network = Generator(12, 20, hidden_dim=8, depth=depth)
    linear = [module for module in network.net if isinstance(module, nn.Linear)]
    assert [layer.out_features for layer in linear] == [*widths, 20]
    assert kinds(network) == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * depth + [nn.Linear, nn.Tanh]
    assert network(torch.randn(4, 12)).shape == (4, 20)
    settings = Settings(image_shape=(1, 4, 5), latent_dim=12, hidden_dim=8)
    assert widths_of(build_networks(settings)[0]) == [8, 16, 20]
    assert widths_of(build_networks(replace(settings, g_depth=depth))[0]) == [*widths, 20]
    with pytest.raises(UsageError, match="depth must be at least 1, got 0"):
        Generator(depth=0)


def widths_of(network: nn.Module) -> list[int]:
    return [module.out_features for module in network.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("hidden_dim", [0, -1])
def test_a_width_below_1_is_refused(hidden_dim: int) -> None:
    for build in (
        lambda: Generator(hidden_dim=hidden_dim),
        lambda: Discriminator(hidden_dim=hidden_dim),
    ):
        with pytest.raises(UsageError, match=f"hidden_dim must be at least 1, got {hidden_dim}"):
            build()
    for build in (lambda: ConvGenerator(width=hidden_dim), lambda: ConvDiscriminator(width=hidden_dim)):
        with pytest.raises(UsageError, match=f"width must be at least 1, got {hidden_dim}"):
            build()
    assert Generator(hidden_dim=1)(torch.randn(2, 100)).shape == (2, 784)
    assert Discriminator(hidden_dim=1)(images(2)).shape == (2, 1)


@pytest.mark.parametrize("network", [Generator(12, 20, 8), ConvGenerator(12, 1, 28, width=8)], ids=["mlp", "conv"])
def test_generator_stays_in_range_where_its_last_layer_does_not(network: Generator | ConvGenerator) -> None:
    z = torch.randn(64, 12) * 1e5
    network.eval()
    made = network(z)
    assert made.min() >= -1
    assert made.max() <= 1
    assert made.std() > 0.1
    assert network.net[:-1](z).abs().max() > 1


@pytest.mark.parametrize("network", discriminators(), ids=["mlp", "conv"])
def test_discriminator_gives_the_sigmoid_of_its_logits(network: Discriminator | ConvDiscriminator) -> None:
    x = images(64)
    network.eval()
    logits, probabilities = network.logits(x), network(x)
    assert logits.shape == probabilities.shape == (64, 1)
    torch.testing.assert_close(probabilities, logits.sigmoid(), rtol=0, atol=0)
    # As the printed layers, which end in a Sigmoid, would.
    printed = network.net(x.flatten(1) if isinstance(network, Discriminator) else x)
    torch.testing.assert_close(probabilities, printed, rtol=0, atol=0)
    assert not torch.allclose(logits, probabilities, atol=1e-2)


def test_flat_and_unflattened_images_are_the_same_to_the_mlp_discriminator() -> None:
    network = Discriminator().eval()
    x = images(8)
    torch.testing.assert_close(network(x), network(x.flatten(1)), rtol=0, atol=0)
    assert not torch.equal(network(x), network(x.mT))


@pytest.mark.parametrize("network", [Generator(12, 20, 8), ConvGenerator(12, 1, 28, width=8)], ids=["mlp", "conv"])
@pytest.mark.parametrize("shape", [(2, 13), (2, 11), (12,), (2, 12, 1, 1)])
def test_latents_of_another_shape_are_refused(network: Generator | ConvGenerator, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"expected latents \(N, 12\), got \({shape[0]},"):
        network(torch.randn(shape))
    assert len(network(torch.randn(2, 12))) == 2


def test_images_of_another_shape_are_refused() -> None:
    flat, conv = discriminators()
    for method in (flat, flat.logits):
        with pytest.raises(ValueError, match=r"expected images \(N, 784\), got \(4, 1024\)"):
            method(torch.randn(4, 1, 32, 32))
    for method in (conv, conv.logits):
        for wrong in (torch.randn(4, 1, 32, 32), torch.randn(4, 3, 28, 28), torch.randn(4, 784)):
            with pytest.raises(ValueError, match=r"expected images \(N, 1, 28, 28\), got \(4, "):
                method(wrong)
    for network in (flat, conv):
        assert network(images(4)).shape == (4, 1)


@pytest.mark.parametrize(("build", "layers"), [(Discriminator, 2), (ConvDiscriminator, 3)])
def test_dropout_is_built_only_where_asked_and_acts_in_training(
    build: type[Discriminator] | type[ConvDiscriminator], layers: int
) -> None:
    assert nn.Dropout not in kinds(build())
    network = build(norm="none", dropout=0.5)
    assert kinds(network).count(nn.Dropout) == layers
    x = images(4)
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    for fraction in (-0.1, 1.0):
        with pytest.raises(UsageError, match=r"dropout must be in \[0, 1\)"):
            build(dropout=fraction)


# Convolutional networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_convolutional_networks_make_and_take_every_size(size: int, channels: int) -> None:
    generator = ConvGenerator(input_dim=10, channels=channels, size=size, width=4)
    discriminator = ConvDiscriminator(channels=channels, size=size, width=4)
    made = generator(torch.randn(2, 10))
    assert made.shape == (2, channels, size, size)
    assert discriminator.logits(made).shape == (2, 1)
    with pytest.raises(ValueError, match=rf"expected images \(N, {channels}, {size}, {size}\)"):
        discriminator(made[:, :, 1:])


def test_filters_double_up_to_eight_times_the_width() -> None:
    generator = ConvGenerator(input_dim=10, size=128, width=4)
    discriminator = ConvDiscriminator(size=128, width=4)
    made = [m.out_channels for m in generator.net if isinstance(m, nn.ConvTranspose2d)]
    taken = [m.out_channels for m in discriminator.net if isinstance(m, nn.Conv2d)]
    assert made == [32, 32, 16, 8, 4, 1]
    assert taken == [4, 8, 16, 32, 32, 1]


@pytest.mark.parametrize(("size", "first", "last"), [(28, 4, 3), (24, 3, 3), (20, 3, 2), (32, 4, 4), (64, 4, 4)])
def test_a_unit_of_the_discriminator_sees_the_whole_image(size: int, first: int, last: int) -> None:
    generator, discriminator = ConvGenerator(10, 1, size, width=4), ConvDiscriminator(1, size, width=4, norm="none")
    assert generator.net[:2](torch.zeros(2, 10)).shape[2:] == (first, first)
    features = discriminator.net[:-3]
    images = torch.randn(2, 1, size, size, requires_grad=True)
    found = features(images)
    assert found.shape[2:] == (last, last)
    found[:, :, last // 2, last // 2].sum().backward()
    assert images.grad is not None
    seen = images.grad.abs().sum(dim=(0, 1)) > 0
    # 46 pixels of a side after four layers and 22 after three.
    reach = min(size, 22 if size < 64 else 46)
    assert seen.any(dim=0).sum() >= reach - 4


def test_convolutions_weights_lie_channels_last() -> None:
    for network in (ConvGenerator(10, 1, 28, width=4), ConvDiscriminator(1, 28, width=4)):
        weights = [module.weight for module in network.net if isinstance(module, CONVOLUTION)]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(30, "28 or 32"), (29, "28 or 32"), (8, "16 or 20"), (0, "16 or 20"), (-4, "16 or 20"), (100, "96 or 112")],
)
def test_an_impossible_size_is_refused_with_the_nearest_possible_ones(size: int, nearest: str) -> None:
    for build in (ConvGenerator, ConvDiscriminator):
        with pytest.raises(UsageError, match=rf"of side {size}; use {nearest} \(--data.image_size\)"):
            build(size=size)
    for near in nearest.split(" or "):
        base, doublings = split_size(int(near))
        assert base * 2**doublings == int(near)


def test_sizes_split_exactly_when_they_are_4_to_7_times_a_power_of_two() -> None:
    possible = {base * 2**doublings for base in (4, 5, 6, 7) for doublings in range(2, 8)}
    for size in range(1, 513):
        if size in possible:
            base, doublings = split_size(size)
            assert base * 2**doublings == size
            assert 4 <= base <= 7
            assert doublings >= 2
        else:
            with pytest.raises(UsageError, match=f"of side {size}"):
                split_size(size)


@pytest.mark.parametrize("norm", sorted(NORMS.keys() - {"instance"}))
def test_linear_layers_bias_is_not_trained_exactly_where_a_centering_norm_follows(norm: str) -> None:
    """Its gradient is 0 but for rounding, of which Adam makes steps as large as any."""
    for network, hidden in ((Generator(norm=norm), 2), (Discriminator(norm=norm), 2)):
        linear = [module for module in network.net if isinstance(module, nn.Linear)]
        assert [layer.bias.requires_grad for layer in linear] == [norm not in CENTERING] * hidden + [True]
        assert all(layer.bias.abs().max() > 0 for layer in linear)  # as torch has made them


def test_convolutions_have_no_bias_exactly_where_a_centering_norm_follows() -> None:
    for norm in NORMS:
        networks = [ConvGenerator(10, 1, 32, width=4, norm=norm), ConvDiscriminator(1, 32, width=4, norm=norm)]
        biases: list[list[bool]] = [
            [module.bias is not None for module in network.net if isinstance(module, CONVOLUTION)] for network in networks
        ]
        hidden = norm not in CENTERING
        # G's last layer and D's first and last have no norm after them.
        assert biases == [[hidden, hidden, hidden, True], [True, hidden, hidden, True]], norm


def test_neither_the_generators_output_nor_the_discriminators_input_is_normalized() -> None:
    generator, discriminator = ConvGenerator(10, 1, 32, width=4), ConvDiscriminator(1, 32, width=4)
    norm, relu, leaky = nn.BatchNorm2d, nn.ReLU, nn.LeakyReLU
    assert [type(module) for module in followers(generator, CONVOLUTION)] == [norm, norm, norm, nn.Tanh]
    assert [type(module) for module in followers(discriminator, CONVOLUTION)] == [leaky, norm, norm, nn.Flatten]
    assert [type(module) for module in followers(generator, norm)] == [relu] * 3
    assert [type(module) for module in followers(discriminator, norm)] == [leaky] * 2


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_spectral_norm_bounds_every_layer_of_the_discriminator(network: Literal["mlp", "conv"]) -> None:
    for norm, bounded in (("spectral", True), ("batch", False)):
        _, discriminator = build_networks(Settings(network, (1, 32, 32), 10, 4, g_norm="batch", d_norm=norm, d_dropout=0.0))
        layers = [module for module in discriminator.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        assert len(layers) >= 3
        assert all(is_parametrized(layer, "weight") == bounded for layer in layers)


# PacGAN's convolutional pair ------------------------------------------------------------------------------------------


def same_padded(x: Tensor, kernel: int) -> Tensor:
    """Pad x (N, C, H, H) for half the side, rounded up, as TensorFlow's SAME does: an odd pixel goes to the end."""
    side = x.shape[-1]
    total = max(0, (math.ceil(side / 2) - 1) * 2 + kernel - side)
    return F.pad(x, [total // 2, total - total // 2] * 2)


def turned(x: Tensor) -> Tensor:
    """Turn images, or kernels, by 180 degrees."""
    return x.flip(-1, -2)


def test_pacgans_discriminator_is_that_of_tensorflow_for_images_turned_around() -> None:
    discriminator = ConvDiscriminator(channels=3, size=28, width=4, norm="none", layout=PACGAN).double()
    drawn = torch.randn(6, 3, 28, 28, dtype=torch.float64)

    def published(x: Tensor) -> Tensor:
        *convolutions, last = [module for module in discriminator.net if isinstance(module, nn.Conv2d)]
        for layer in convolutions:
            x = F.conv2d(same_padded(x, kernel=5), turned(layer.weight), layer.bias, stride=2)
            x = torch.maximum(x, 0.2 * x)
        return F.conv2d(x, turned(last.weight), last.bias).flatten(start_dim=1)

    torch.testing.assert_close(discriminator.logits(drawn), published(turned(drawn)))
    assert not torch.allclose(discriminator.logits(drawn), published(drawn))


def test_pacgans_generator_is_that_of_tensorflow_but_for_turning_its_images() -> None:
    generator = ConvGenerator(10, channels=3, size=28, width=4, norm="none", layout=PACGAN).double()
    z = torch.randn(6, 10, dtype=torch.float64)

    def published(z: Tensor) -> Tensor:
        first, *convolutions = [module for module in generator.net if isinstance(module, nn.ConvTranspose2d)]
        x = (z @ turned(first.weight).flatten(1)).view(len(z), -1, 2, 2).relu()  # its biases begin at 0
        for layer, side in zip(convolutions, (4, 7, 14, 28), strict=True):
            # TensorFlow defines a transposed convolution as the gradient of the convolution from that side.
            base = torch.zeros(len(z), layer.out_channels, side, side, dtype=z.dtype, requires_grad=True)
            (x,) = torch.autograd.grad(F.conv2d(same_padded(base, kernel=5), turned(layer.weight), stride=2), base, x)
            x = x.tanh() if side == 28 else x.relu()
        return x

    torch.testing.assert_close(generator(z), turned(published(z)))
    assert not torch.allclose(generator(z), published(z))


def test_pacgans_pair_has_the_published_filters_and_parameters() -> None:
    settings, w = Settings("pacgan", (3, 28, 28), hidden_dim=8, g_norm="batch", d_norm="batch"), 8  # published with 64
    generator, discriminator = build_networks(settings)
    made = [module.out_channels for module in generator.net if isinstance(module, nn.ConvTranspose2d)]
    taken = [module.out_channels for module in discriminator.net if isinstance(module, nn.Conv2d)]
    assert (made, taken) == ([8 * w, 4 * w, 2 * w, w, 3], [w, 2 * w, 4 * w, 8 * w, 1])
    assert [module.kernel_size for module in discriminator.net if isinstance(module, nn.Conv2d)] == [(5, 5)] * 4 + [(2, 2)]
    assert [type(module) for module in followers(discriminator, nn.Conv2d)][:2] == [nn.LeakyReLU, nn.BatchNorm2d]
    # Weights of the layers, gammas and betas, and biases where no batch norm follows.
    g = 100 * 2 * 2 * 8 * w + 25 * (8 * 4 + 4 * 2 + 2) * w**2 + 25 * w * 3 + 2 * (8 + 4 + 2 + 1) * w + 3
    d = 25 * 3 * w + 25 * (2 + 2 * 4 + 4 * 8) * w**2 + 2 * 2 * 8 * w + 2 * (2 + 4 + 8) * w + w + 1
    assert [sum(weight.numel() for weight in network.parameters()) for network in (generator, discriminator)] == [g, d]
    assert generator(torch.randn(2, 100)).shape == (2, 3, 28, 28)
    with pytest.raises(UsageError, match="network pacgan is for images of side 28, not 32; use conv"):
        build_networks(replace(settings, image_shape=(3, 32, 32)))


# PacGAN's pair for points ---------------------------------------------------------------------------------------------


def test_points_pair_has_the_published_layers_and_parameters() -> None:
    settings = Settings("points", (2, 1, 1), latent_dim=2, hidden_dim=400, g_norm="batch", d_norm="none", instance_noise=0.0)
    generator, discriminator = build_networks(settings)
    assert kinds(generator) == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 4 + [nn.Linear]
    assert kinds(discriminator) == [LinearMaxout] * 3 + [nn.Linear, nn.Sigmoid]
    g = 2 * 400 + 3 * 400 * 400 + 4 * 2 * 400 + 400 * 2 + 2
    d = (2 * 1000 + 1000) + 2 * (200 * 1000 + 1000) + 200 + 1
    assert [sum(weight.numel() for weight in network.parameters()) for network in (generator, discriminator)] == [g, d]
    assert widths_of(build_networks(replace(settings, g_depth=2))[0]) == [400, 400, 2]
    nn.init.constant_(cast(nn.Linear, generator.net[-1]).bias, 3.0)  # which no tanh would let through
    assert generator(torch.randn(8, 2)).min() > 2
    with pytest.raises(UsageError, match=r"network points makes points, of image_shape \(2, 1, 1\), not \(1, 28, 28\)"):
        build_networks(replace(settings, image_shape=(1, 28, 28)))


def test_a_maxout_unit_gives_the_largest_of_its_linear_functions() -> None:
    layer, x = LinearMaxout(3, 4, pieces=5), torch.randn(7, 3)
    with torch.no_grad():
        layer.offsets.normal_()
    expected = torch.empty(7, 4)
    for row, unit in product(range(7), range(4)):
        pieces = range(unit * 5, unit * 5 + 5)
        expected[row, unit] = max(layer.weight[piece] @ x[row] + layer.offsets[piece] for piece in pieces)
    torch.testing.assert_close(layer(x), expected)


def test_norms_after_maxout_are_of_its_units_and_leave_its_offsets_to_be_trained() -> None:
    network = PointDiscriminator(hidden_dim=6, norm="batch")
    assert kinds(network) == [LinearMaxout, nn.BatchNorm1d] * 3 + [nn.Linear, nn.Sigmoid]
    assert [module.num_features for module in network.net if isinstance(module, nn.BatchNorm1d)] == [6, 6, 6]
    network.logits(torch.randn(16, 2)).square().sum().backward()
    first = network.net[0]
    assert isinstance(first, LinearMaxout)
    assert first.offsets.grad is not None
    assert first.offsets.grad.abs().max() > 1e-6


# What a discriminator is told, and where it is normalized --------------------------------------------------------------


NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"network": "mlp", "image_shape": (3, 16, 16), "latent_dim": 10, "hidden_dim": 4},
    "conv": {"network": "conv", "image_shape": (3, 16, 16), "latent_dim": 10, "hidden_dim": 4},
    "pacgan": {"network": "pacgan", "image_shape": (3, 28, 28), "latent_dim": 10, "hidden_dim": 2},
    "points": {"network": "points", "image_shape": (2, 1, 1), "latent_dim": 2, "hidden_dim": 8},
}


@pytest.mark.parametrize("network", NETWORKS)
def test_discriminators_first_layer_is_normalized_where_asked_and_else_as_published(network: str) -> None:
    def norms(**settings: Any) -> list[bool]:
        """Whether a batch norm follows, for each layer but the last."""
        judge = build_networks(Settings(**{**NETWORKS[network], **settings}))[1].net
        layers = [number for number, module in enumerate(judge) if isinstance(module, nn.Linear | nn.Conv2d)]
        return [isinstance(judge[number + 1], nn.BatchNorm1d | nn.BatchNorm2d) for number in layers[:-1]]

    first, *others = norms()
    assert first == (network in ("mlp", "points"))
    assert all(others)
    assert norms(d_norm_first=True) == [True, *others]
    assert norms(d_norm_first=False) == [False, *others]
    assert not any(norms(d_norm_first=True, d_norm="none"))
    judge = build_networks(Settings(**{**NETWORKS[network], "d_norm": "spectral", "d_norm_first": False}))[1].net
    assert all(is_parametrized(module, "weight") for module in judge if isinstance(module, nn.Linear | nn.Conv2d))


def test_first_convolution_has_a_bias_unless_batch_norm_follows() -> None:
    for norm, first, expected in (("batch", False, True), ("batch", True, False), ("layer", True, True)):
        layer = ConvDiscriminator(norm=norm, norm_first=first).net[0]
        assert isinstance(layer, nn.Conv2d)
        assert (layer.bias is not None) == expected


@pytest.mark.parametrize("network", NETWORKS)
def test_a_pack_is_judged_by_one_logit(network: str) -> None:
    settings = Settings(**NETWORKS[network], pack=3)
    generator, discriminator = build_networks(settings)
    channels, *sides = settings.image_shape
    made = generator(torch.randn(12, settings.latent_dim)).view(12, *settings.image_shape)
    packs = torch.cat(made.chunk(3), dim=1)
    assert discriminator.logits(packs).shape == (4, 1)
    with pytest.raises(ValueError, match=r"expected images \(N, "):
        discriminator.logits(made)
    single, _ = build_networks(replace(settings, pack=1))
    assert {name: weight.shape for name, weight in single.named_parameters()} == {
        name: weight.shape for name, weight in generator.named_parameters()
    }
    assert packs.shape[1:] == (3 * channels, *sides)


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3, 3)])
def test_minibatch_stddev_is_the_mean_deviation_within_each_group_of_consecutive_rows(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64) * torch.arange(1, 13).view(-1, *[1] * (len(shape) - 1))
    told = MinibatchStddev(4)(x)
    assert told.shape == (12, 6, *shape[2:])
    assert torch.equal(told[:, :5], x)
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        expected = x[rows].std(dim=0, correction=0).mean()
        torch.testing.assert_close(told[rows, 5], expected.expand(4, *shape[2:]), rtol=1e-6, atol=0)


def test_minibatch_stddev_of_real_images_does_not_depend_on_the_fakes_beside_them() -> None:
    layer, real, fake = MinibatchStddev(4), torch.randn(8, 5), torch.randn(8, 5)
    assert torch.equal(layer(torch.cat([real, fake]))[:8], layer(real))
    assert not torch.allclose(layer(torch.cat([real.roll(1, dims=0), fake]))[:8], layer(real).roll(1, dims=0))


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_minibatch_stddev_takes_what_is_left_of_a_batch_as_a_group(count: int) -> None:
    x = torch.randn(count, 5)
    whole = count - count % 4
    expected = [MinibatchStddev(size)(rows) for rows, size in ((x[:whole], 4), (x[whole:], count % 4)) if len(rows)]
    torch.testing.assert_close(MinibatchStddev(4)(x), torch.cat(expected), rtol=0, atol=0)


def test_images_that_are_all_alike_have_a_gradient() -> None:
    x = torch.ones(4, 5, requires_grad=True)
    told = MinibatchStddev(4)(x)
    assert told[:, 5].max() < 1e-3
    told[:, 5].sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("network", NETWORKS)
def test_minibatch_stddev_is_what_the_last_layer_is_told(network: str) -> None:
    plain, told = (build_networks(Settings(**NETWORKS[network], minibatch_stddev=size))[1] for size in (0, 4))
    assert MinibatchStddev not in kinds(plain)
    position = kinds(told).index(MinibatchStddev)
    last = next(module for module in told.net[position:] if isinstance(module, nn.Linear | nn.Conv2d))
    assert (
        last.weight.shape[1] == 1 + next(m for m in reversed(plain.net) if isinstance(m, nn.Linear | nn.Conv2d)).weight.shape[1]
    )
    assert told.logits(torch.randn(8, *NETWORKS[network]["image_shape"])).shape == (8, 1)


# Many networks as one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"minibatch_stddev": 2}, {"g_norm": "none", "d_norm": "layer", "d_norm_first": True}])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_are_run_side_by_side_by_vmap_as_each_by_itself(network: str, changes: dict[str, Any]) -> None:
    settings = Settings(**{**NETWORKS[network], "initialization": "he", **changes})
    pairs = [[member.double() for member in build_networks(settings)] for _ in range(3)]
    shapes = [(settings.latent_dim,), settings.image_shape]
    for members, shape in zip(zip(*pairs, strict=True), shapes, strict=True):
        weights, buffers = stack_module_state([*members])
        batch = torch.randn(8, 3, *shape, dtype=torch.float64)  # (N, runs, ...)

        def run(weights: dict[str, Tensor], buffers: dict[str, Tensor], rows: Tensor, member: nn.Module = members[0]) -> Tensor:
            return functional_call(member, (weights, buffers), (rows,))

        together = vmap(run, in_dims=(0, 0, 1), out_dims=1)(weights, buffers, batch)
        for number, member in enumerate(members):
            torch.testing.assert_close(together[:, number], member(batch[:, number]), rtol=0, atol=1e-10)


# By name --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_of_every_norm_make_and_judge_images(network: str, norm: str) -> None:
    settings = Settings(**NETWORKS[network], g_norm=norm, d_norm=norm, d_dropout=0.1)
    if network in ("mlp", "points") and norm == "instance":
        with pytest.raises(UsageError, match="instance norm needs pixels"):
            build_networks(settings)
        return
    generator, discriminator = build_networks(settings)
    if needs_reference(discriminator):
        set_reference(discriminator, torch.randn(VIRTUAL_REFERENCE_SIZE, *settings.image_shape))
    made = generator(torch.randn(6, settings.latent_dim)).view(6, *settings.image_shape)
    judged = discriminator(made)
    assert judged.shape == (6, 1)
    judged.sum().backward()
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    keeping_statistics = bool(list(batch_norm_layers(generator))) and bool(list(batch_norm_layers(discriminator)))
    assert keeping_statistics == (norm in BATCH_COUPLED)


def test_unknown_names_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="unknown network 'resnet'; choose from mlp, conv, pacgan, points"):
        build_networks(Settings("resnet"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="unknown norm 'bath'"):
        build_networks(Settings("mlp", (1, 28, 28), 10, 4, g_norm="bath", d_norm="batch", d_dropout=0.0))


def test_oblong_images_are_for_fully_connected_networks_alone() -> None:
    with pytest.raises(UsageError, match="square images, not 28 x 32"):
        build_networks(Settings("conv", (1, 28, 32), 10, 4, g_norm="batch", d_norm="batch", d_dropout=0.0))
    generator, discriminator = build_networks(
        Settings("mlp", (1, 28, 32), 10, 4, g_norm="batch", d_norm="batch", d_dropout=0.0)
    )
    assert discriminator(generator(torch.randn(4, 10)).view(4, 1, 28, 32)).shape == (4, 1)


# Virtual batch norm ---------------------------------------------------------------------------------------------------


def virtual_discriminators() -> list[Discriminator | ConvDiscriminator]:
    return [
        Discriminator(input_dim=784, hidden_dim=8, norm="virtual"),
        ConvDiscriminator(channels=1, size=28, width=8, norm="virtual"),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["mlp", "conv"])
def test_a_virtual_discriminator_needs_a_reference_of_enough_images(which: int) -> None:
    network = virtual_discriminators()[which]
    assert needs_reference(network)
    assert network(images(3)).isnan().all()
    with pytest.raises(UsageError, match=f"at least {VIRTUAL_REFERENCE_SIZE} examples, got 63"):
        set_reference(network, images(63))
    assert needs_reference(network)
    set_reference(network, images(100))
    assert not needs_reference(network)
    assert network(images(3)).isfinite().all()
    assert not needs_reference(discriminators()[which])


@pytest.mark.parametrize("which", [0, 1], ids=["mlp", "conv"])
def test_a_virtual_discriminators_judgement_ignores_batch_mates_but_not_the_reference(which: int) -> None:
    virtual, plain = virtual_discriminators()[which], discriminators()[which]
    reference, some, others = images(64), images(5), images(5) / 3
    set_reference(virtual, reference)
    mixed = torch.cat([some[:1], others[1:]])
    torch.testing.assert_close(virtual.logits(mixed)[0], virtual.logits(some)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(virtual.logits(some[:1])[0], virtual.logits(some)[0], rtol=0, atol=1e-5)
    assert (plain.logits(mixed)[0] - plain.logits(some)[0]).abs() > 1e-3
    before = virtual.logits(some)
    set_reference(virtual, reference / 3)
    assert (virtual.logits(some) - before).abs().max() > 1e-3


@pytest.mark.parametrize("build", [Generator, ConvGenerator])
def test_a_virtual_generators_image_ignores_batch_mates(build: type[Generator] | type[ConvGenerator]) -> None:
    virtual, plain = build(10, norm="virtual"), build(10, norm="batch")
    assert not needs_reference(virtual)  # its reference latents are drawn when it is built
    some, others = torch.randn(5, 10), torch.randn(5, 10) * 3
    mixed = torch.cat([some[:1], others[1:]])
    assert virtual(some).shape[0] == 5
    torch.testing.assert_close(virtual(mixed)[0], virtual(some)[0], rtol=0, atol=1e-5)
    assert (plain(mixed)[0] - plain(some)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("build", [Generator, ConvGenerator])
def test_the_reference_latents_travel_in_the_state_dict(build: type[Generator] | type[ConvGenerator]) -> None:
    source, target = build(10, norm="virtual"), build(10, norm="virtual")
    set_reference(source, torch.randn(VIRTUAL_REFERENCE_SIZE, 10) * 3)
    z = torch.randn(4, 10)
    target.load_state_dict(source.state_dict(), strict=True)
    torch.testing.assert_close(target(z), source(z), rtol=0, atol=0)
    set_reference(target, torch.randn(VIRTUAL_REFERENCE_SIZE, 10))
    assert not torch.allclose(target(z), source(z), rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1], ids=["mlp", "conv"])
def test_the_reference_images_travel_in_the_state_dict(which: int) -> None:
    source, target = virtual_discriminators()[which], virtual_discriminators()[which]
    set_reference(source, images(64))
    x = images(4)
    target.load_state_dict(source.state_dict(), strict=True)
    assert not needs_reference(target)
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)
    set_reference(target, images(64))
    assert not torch.allclose(target(x), source(x), rtol=0, atol=1e-5)
    assert "reference" not in discriminators()[which].state_dict()


# By class -------------------------------------------------------------------------------------------------------------

CLASSES = 3
CONDITIONAL: dict[str, dict[str, Any]] = {
    "mlp": {"network": "mlp", "hidden_dim": 8},
    "mlp, reference": {"network": "mlp", "hidden_dim": 8, "g_norm": "reference"},
    "mlp, spectral, minibatch stddev": {"network": "mlp", "hidden_dim": 8, "d_norm": "spectral", "minibatch_stddev": 3},
    "mlp, virtual": {"network": "mlp", "hidden_dim": 8, "d_norm": "virtual"},
    "conv": {"network": "conv", "hidden_dim": 4},
    "conv, spectral": {"network": "conv", "hidden_dim": 4, "d_norm": "spectral"},
    "points": {"network": "points", "hidden_dim": 8, "image_shape": (2, 1, 1), "g_depth": 2},
}


def conditional_pair(case: str, classes: int = CLASSES) -> tuple[GeneratorNetwork, DiscriminatorNetwork]:
    """A pair in float64 in which each class has a gamma and a beta of its own, drawn at random."""
    torch.manual_seed(0)
    g, d = build_networks(Settings(**CONDITIONAL[case], latent_dim=5, classes=classes))
    for module in g.modules():
        if isinstance(module, ConditionalBatchNorm):
            module.gamma.data.normal_()
            module.beta.data.normal_()
    if needs_reference(d):
        set_reference(d, torch.rand(VIRTUAL_REFERENCE_SIZE, *d.input_shape))
    return g.double(), d.double()


def judged(case: str, rows: int = 9) -> Tensor:
    shape = CONDITIONAL[case].get("image_shape", (1, 28, 28))
    return torch.rand(rows, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("case", CONDITIONAL)
def test_generator_makes_of_a_latent_another_image_for_each_class(case: str) -> None:
    g, _ = conditional_pair(case)
    z = torch.randn(1, 5, dtype=torch.float64).expand(9, 5)
    found = g.eval()(z, torch.arange(9) % CLASSES)
    assert found.shape[0] == 9
    torch.testing.assert_close(found[CLASSES:], found[:-CLASSES], rtol=0, atol=1e-12)
    assert all((found[one] - found[other]).abs().max() > 1e-3 for one, other in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(g(z), found)  # which is what it makes without labels


@pytest.mark.parametrize("case", CONDITIONAL)
def test_discriminators_logit_is_what_it_says_of_all_images_and_a_product_with_its_class(case: str) -> None:
    """psi(phi(x)) + <v_y, phi(x)>, written out."""
    _, d = conditional_pair(case)
    images, labels = judged(case), torch.randint(CLASSES, (9,))
    seen: list[Tensor] = []
    (projection,) = (module for module in d.modules() if isinstance(module, Projection))
    psi, v = projection.psi, projection.v
    assert isinstance(psi, Layer)
    assert isinstance(v, Layer)
    assert psi.bias is not None
    if "spectral" in case:
        # Each use in training is a step towards the largest singular value.
        *_, matrix = (v.weight.detach().flatten(start_dim=1) for _ in range(50))
        assert float(torch.linalg.matrix_norm(matrix, ord=2)) == pytest.approx(1, abs=1e-3)
    d.eval()
    with projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        found = d.logits(images, labels)
    phi = seen[0][-9:].flatten(start_dim=1)  # behind the reference batch of a virtual norm
    of_all, of_class = (layer.weight.flatten(start_dim=1) for layer in (psi, v))
    expected = [phi[row] @ of_all[0] + psi.bias[0] + phi[row] @ of_class[labels[row]] for row in range(9)]
    torch.testing.assert_close(found, torch.stack(expected).unsqueeze(dim=1), rtol=0, atol=1e-12)
    assert (d.logits(images, (labels + 1) % CLASSES) - found).abs().min() > 1e-9
    torch.testing.assert_close(d(images, labels), found.sigmoid())


@pytest.mark.parametrize("case", ["mlp", "mlp, reference"])
def test_mlp_pair_with_classes_begins_as_that_without(case: str) -> None:
    """The weights that both have are drawn alike."""
    plain, conditional = conditional_pair(case, classes=0), conditional_pair(case)
    for one, other in zip(plain, conditional, strict=True):
        own = {name.replace(".psi.", "."): value for name, value in other.state_dict().items()}
        shared = {name: value for name, value in one.state_dict().items() if name in own}
        assert len(shared) >= 2
        for name, value in shared.items():
            assert torch.equal(own[name], value), name


def test_labels_that_do_not_belong_to_the_network_are_refused() -> None:
    z, labels = torch.randn(4, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    (g, d), (plain_g, plain_d) = conditional_pair("mlp"), conditional_pair("mlp", classes=0)
    images = judged("mlp", rows=4)
    for call in (
        lambda: g(z, labels[:3]),
        lambda: g(z, labels.unsqueeze(dim=1)),
        lambda: d.logits(images),
        lambda: d(images, labels[:3]),
        lambda: plain_g(z, labels),
        lambda: plain_d(images, labels),
    ):
        with pytest.raises(ValueError, match="classes takes labels"):
            call()
    with pytest.raises(IndexError):
        g(z, labels + CLASSES)
