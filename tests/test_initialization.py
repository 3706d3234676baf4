"""Which weights the networks begin with."""

import math

import pytest
import torch
from torch import Tensor, nn

from bngan.networks import ConvDiscriminator, ConvGenerator, Discriminator, Generator
from bngan.norms import NORMS

CONVOLUTION = (nn.Conv2d, nn.ConvTranspose2d)


def convolutional_pair(norm: str) -> tuple[ConvGenerator, ConvDiscriminator]:
    torch.manual_seed(0)
    settings = {"channels": 3, "size": 32, "width": 32, "norm": norm}
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


def test_convolutions_without_a_norm_begin_as_hes() -> None:
    generator, discriminator = convolutional_pair("none")
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


def assert_uniform(values: Tensor, bound: float) -> None:
    """Look at the range and, within five standard errors, at the deviation of a uniform distribution about 0."""
    values = values.detach().double().flatten() / bound
    assert float(values.abs().max()) <= 1
    assert abs(float(values.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / values.numel())
