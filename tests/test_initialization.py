"""Which weights the networks begin with."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bngan.blocks import LinearMaxout
from bngan.networks import (
    PACGAN,
    ConvDiscriminator,
    ConvGenerator,
    Discriminator,
    Generator,
    PointDiscriminator,
    PointGenerator,
)
from bngan.norms import NORMS
from bngan.settings import Initialization

CONVOLUTION = (nn.Conv2d, nn.ConvTranspose2d)


def convolutional_pair(norm: str, **changes: Any) -> tuple[ConvGenerator, ConvDiscriminator]:
    torch.manual_seed(0)
    settings = {"channels": 3, "size": 32, "width": 32, "norm": norm, **changes}
    return ConvGenerator(input_dim=64, **settings), ConvDiscriminator(**settings)


def convolutions(norm: str) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    return [layer for network in convolutional_pair(norm) for layer in network.modules() if isinstance(layer, CONVOLUTION)]


def assert_normal(values: Tensor, std: float) -> None:
    """Look at mean, deviation and kurtosis, each within five standard errors of a normal distribution's of mean 0."""
    values, error = values.detach().double().flatten() / std, 5 / math.sqrt(values.numel())
    assert abs(float(values.mean())) < error
    assert abs(float(values.square().mean().sqrt()) - 1) < error / math.sqrt(2)
    assert abs(float(values.pow(4).mean()) - 3) < error * math.sqrt(96)


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"none", "spectral"}))
def test_convolutions_before_a_norm_begin_as_dcgans_with_deviation_0_02(norm: str) -> None:
    for layer in convolutions(norm):
        assert_normal(layer.weight, std=0.02)
        with pytest.raises(AssertionError):
            assert_normal(layer.weight, std=0.025)


@pytest.mark.parametrize(("norm", "initialization"), [("none", "default"), ("none", "he"), ("batch", "he")])
def test_convolutions_begin_as_hes_without_a_norm_and_where_asked(norm: str, initialization: str) -> None:
    generator, discriminator = convolutional_pair(norm, initialization=initialization)
    first, *later = (layer for layer in generator.modules() if isinstance(layer, nn.ConvTranspose2d))
    assert_normal(first.weight, std=math.sqrt(2 / 64))  # its input is 64 latents, of which each pixel sees one tap
    for layer in later:
        assert_normal(layer.weight, std=math.sqrt(2 / (layer.in_channels * 2 * 2)))  # 4 x 4 taps, each pixel meets a quarter
        with pytest.raises(AssertionError):
            assert_normal(layer.weight, std=math.sqrt(2 / (layer.out_channels * 4 * 4)))  # torch's reading of the fan-in
    for layer in discriminator.modules():
        if isinstance(layer, nn.Conv2d):
            assert_normal(layer.weight, std=math.sqrt(2 / (1 + 0.2**2) / layer.weight[0].numel()))


@pytest.mark.parametrize("size", [28, 48, 64, 128])
def test_signal_keeps_its_scale_through_convolutions_without_a_norm(size: int) -> None:
    torch.manual_seed(0)
    z, images = torch.randn(16, 100), torch.randn(16, 1, size, size)
    generator = ConvGenerator(input_dim=100, size=size, width=16, norm="none")
    discriminator = ConvDiscriminator(size=size, width=16, norm="none")
    for scale in (*scales(generator, z), *scales(discriminator, images)):
        assert 1.2 / 1.5 < scale < 1.2 * 1.5  # the square root of 2, but at the image's border, which goes down to 1
    # DCGAN's, whose running statistics do nothing yet, would fall short.
    assert scales(ConvGenerator(input_dim=100, size=size, width=16, norm="batch").eval(), z)[-1] < 0.2


def scales(network: ConvGenerator | ConvDiscriminator, batch: Tensor) -> list[float]:
    """Return the root mean square of what each hidden convolution gives, before norm and activation, and of G's last one."""
    found: list[float] = []
    for layer in network.modules():
        if isinstance(layer, CONVOLUTION) and (layer.out_channels > 1 or isinstance(network, ConvGenerator)):
            layer.register_forward_hook(lambda layer, inputs, output: found.append(float(output.square().mean().sqrt())))
    with torch.no_grad():
        network(batch)
    return found


def test_spectrally_normalized_convolutions_begin_as_torchs() -> None:
    for layer in convolutions("spectral"):
        original = dict(layer.named_parameters()).get("parametrizations.weight.original", layer.weight)
        assert_uniform(original, bound=1 / math.sqrt(original[0].numel()))


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_pacgans_layers_begin_as_published_whatever_the_norm(norm: str) -> None:
    generator, discriminator = convolutional_pair(norm, size=28, width=8, layout=PACGAN)
    for layer in generator.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            assert_normal(layer.weight, std=0.02)
    *convolutions, last = (layer for layer in discriminator.modules() if isinstance(layer, nn.Conv2d))
    assert_normal(last.weight, std=0.02)
    for layer in convolutions:
        values = layer.weight.detach().double().flatten()
        assert 0.0395 < float(values.abs().max()) <= 0.04
        # The deviation of a standard normal that is cut off at two is 0.8796.
        assert abs(float(values.square().mean().sqrt()) / (0.02 * 0.8796) - 1) < 5 / math.sqrt(2 * values.numel())


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_convolutions_biases_begin_at_0(norm: str) -> None:
    biases = [layer.bias for layer in convolutions(norm) if layer.bias is not None]
    assert len(biases) >= 3  # G's output, D's input and D's output
    assert all(not bias.any() for bias in biases)


def test_fully_connected_networks_begin_as_torchs_layers() -> None:
    torch.manual_seed(0)
    for network in (Generator(), Discriminator()):
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                assert_uniform(layer.weight, bound)
                assert_uniform(layer.bias, bound)


@pytest.mark.parametrize("norm", ["none", "batch", "spectral"])
def test_hidden_layers_begin_as_hes_where_asked_and_the_last_one_as_torchs(norm: str) -> None:
    torch.manual_seed(0)
    pair = (Generator(norm=norm, depth=4, initialization="he"), Discriminator(norm=norm, initialization="he"))
    for network, slope in zip(pair, (0.0, 0.2), strict=True):
        *hidden, last = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
        for layer in hidden:
            assert not layer.bias.any()
            if norm != "spectral":  # which divides by the weights' scale
                std = math.sqrt(2 / (1 + slope**2) / layer.in_features)
                assert_normal(layer.weight, std=std)
                with pytest.raises(AssertionError):
                    assert_normal(layer.weight, std=1.1 * std)
        assert last.bias.any()
        if not (norm == "spectral" and slope):
            assert_uniform(last.weight, 1 / math.sqrt(last.in_features))


def test_hes_weights_keep_the_signals_scale_through_eight_layers_and_torchs_do_not() -> None:
    torch.manual_seed(0)
    z = torch.randn(64, 100)
    he, default = (Generator(norm="none", depth=8, initialization=how).net[:-2](z).detach() for how in ("he", "default"))
    assert 0.5 < float(he.square().mean().sqrt()) < 2
    assert float(default.std(dim=0).mean()) < 0.05 * float(he.std(dim=0).mean())


@pytest.mark.parametrize("initialization", ["default", "he"])
def test_points_layers_begin_as_published_and_hidden_ones_as_hes_where_asked(initialization: Initialization) -> None:
    torch.manual_seed(0)
    pair = (PointGenerator(initialization=initialization), PointDiscriminator(initialization=initialization))
    for network, gain in zip(pair, (2.0, 1.0), strict=True):
        *hidden, last = (layer for layer in network.modules() if isinstance(layer, nn.Linear))
        for layer in hidden:
            assert_normal(layer.weight, std=0.02 if initialization == "default" else math.sqrt(gain / layer.in_features))
            assert not isinstance(layer, LinearMaxout) or not layer.offsets.any()
        assert_normal(last.weight, std=0.02)
        assert not last.bias.any()


def assert_uniform(values: Tensor, bound: float) -> None:
    """Look at the range and, within five standard errors, at the deviation of a uniform distribution about 0."""
    values = values.detach().double().flatten() / bound
    assert float(values.abs().max()) <= 1
    assert abs(float(values.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / values.numel())
