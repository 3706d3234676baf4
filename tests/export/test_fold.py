"""Folding: batch norm becomes part of the layer before it, and the images stay."""

from typing import Any

import pytest
import torch
from torch import nn

from bngan.batchnorm.layers import BatchNorm, CovariateShift, batch_norm_layers
from bngan.blocks import GeneratorNetwork
from bngan.errors import UsageError
from bngan.export.fold import fold_batch_norm
from bngan.networks import build_networks
from bngan.settings import Settings

MLP: dict[str, Any] = {"image_shape": (1, 4, 4), "latent_dim": 8, "hidden_dim": 8}
CONV: dict[str, Any] = {"network": "conv", "image_shape": (1, 16, 16), "latent_dim": 8, "hidden_dim": 4}


def trained(seed: int = 0, **settings: Any) -> GeneratorNetwork:
    """Return a generator in evaluation mode, of which no number is one that layers begin with."""
    torch.manual_seed(seed)
    generator, _ = build_networks(Settings(**settings))
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.5)
    for _, layer in batch_norm_layers(generator):
        nn.init.normal_(layer.get_buffer("running_mean"))
        nn.init.uniform_(layer.get_buffer("running_var"), 0.5, 2.0)
    return generator.eval().requires_grad_(False)


def inputs(generator: GeneratorNetwork, count: int = 20) -> tuple[torch.Tensor, ...]:
    z = torch.randn(count, generator.input_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (z, torch.arange(count) % generator.classes) if generator.classes else (z,)


@pytest.mark.parametrize(
    "settings",
    [
        {**MLP},
        {**MLP, "g_norm": "reference", "bn_eps": 0.1},
        {**MLP, "g_norm": "ghost", "ghost_groups": 2},
        {**MLP, "g_norm": "noisy"},
        {**MLP, "classes": 3},
        {**CONV},
        {**CONV, "g_norm": "reference", "classes": 3},
        {**CONV, "network": "pacgan", "image_shape": (1, 28, 28)},
        {"network": "points", "image_shape": (2, 1, 1), "latent_dim": 2, "hidden_dim": 8},
    ],
    ids=str,
)
def test_folded_generator_makes_the_same_images_without_batch_norm(settings: dict[str, Any]) -> None:
    generator = trained(**settings).double()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    folded = fold_batch_norm(generator)
    z = inputs(generator)
    expected = generator(*z)
    torch.testing.assert_close(folded(*z), expected, rtol=0, atol=1e-12)
    assert not any(isinstance(layer, BatchNorm | CovariateShift) for layer in folded.modules())
    assert any(batch_norm_layers(generator)), "the original is as it was"
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_every_number_of_batch_norm_counts() -> None:
    generator = trained(**MLP).double()
    expected = fold_batch_norm(generator)(*inputs(generator))
    _, layer = next(batch_norm_layers(generator))
    for value in (*layer.parameters(), layer.get_buffer("running_mean"), layer.get_buffer("running_var")):
        before = value.clone()
        value.add_(0.1)
        assert (fold_batch_norm(generator)(*inputs(generator)) - expected).abs().max() > 1e-4
        value.copy_(before)
    layer.eps = 0.5
    assert (fold_batch_norm(generator)(*inputs(generator)) - expected).abs().max() > 1e-4


def test_single_precision_is_worked_out_in_double() -> None:
    generator = trained(**MLP)
    folded = fold_batch_norm(generator)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float32}
    exact = fold_batch_norm(generator.double())
    for name, value in folded.state_dict().items():
        assert torch.equal(value, exact.state_dict()[name].float())


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        ("virtual", "cannot be folded: it normalizes each sample by the sample itself"),
        ("none", "no batch norm to fold; leave out --fold-batchnorm"),
        ("layer", "no batch norm to fold"),
        ("spectral", "no batch norm to fold"),
    ],
)
def test_what_is_no_affine_map_is_refused(norm: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        fold_batch_norm(trained(**MLP, g_norm=norm))
