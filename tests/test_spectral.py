"""Spectral norm is torch's, and takes the stacked weights of many runs besides."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from bngan.spectral import SpectralNorm, spectral_norm

LAYERS: dict[str, tuple[Callable[[], nn.Linear | nn.Conv2d | nn.ConvTranspose2d], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "convolution": (lambda: nn.Conv2d(3, 5, kernel_size=(2, 3)), (5, 3, 6, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 5, kernel_size=3), (5, 3, 6, 6)),
}


def ours_and_torchs(kind: str) -> tuple[nn.Module, nn.Module]:
    """Return one layer under our spectral norm and under torch's, which draw the same singular vectors to start with."""
    torch.manual_seed(0)
    ours = LAYERS[kind][0]().double()
    theirs = copy.deepcopy(ours)
    for norm, layer in ((spectral_norm, ours), (parametrizations.spectral_norm, theirs)):
        torch.manual_seed(1)
        norm(layer)
    return ours, theirs


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_gradients_and_singular_vectors_are_torchs(kind: str) -> None:
    ours, theirs = ours_and_torchs(kind)
    assert_same(ours, theirs)
    before = copy.deepcopy(ours.state_dict())
    for _ in range(3):
        images = torch.randn(LAYERS[kind][1], dtype=torch.float64)
        for layer in (ours, theirs):  # used twice before backward, as D is on real images and on fakes
            layer.zero_grad()
            (layer(images).square().mean() - layer(2 * images).sin().mean()).backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    assert parameter.grad is not None
                    parameter -= 0.1 * parameter.grad
        assert_same(ours, theirs)
    assert all(not torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("kind", LAYERS)
def test_evaluation_leaves_the_singular_vectors_alone(kind: str) -> None:
    ours, theirs = (layer.eval() for layer in ours_and_torchs(kind))
    before, images = copy.deepcopy(ours.state_dict()), torch.randn(LAYERS[kind][1], dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_state_of_torchs_is_taken_and_the_norm_is_then_1(kind: str) -> None:
    ours, theirs = ours_and_torchs(kind)
    for _ in range(100):
        assert isinstance(theirs.weight, Tensor)  # whose use takes a step
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours.weight, Tensor)
    matrix = ours.weight.transpose(0, 1) if kind.startswith("transposed") else ours.weight
    assert float(torch.linalg.matrix_norm(matrix.flatten(start_dim=1), ord=2)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_stacked_weights_are_each_divided_by_their_own_norm(shape: tuple[int, ...], dim: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, *shape, dtype=torch.float64)
    norms = [SpectralNorm(weight, dim) for weight in weights]
    stacked = copy.deepcopy(norms[0])
    stacked._u, stacked._v = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("_u", "_v"))
    expected = torch.stack([norm(weight) for norm, weight in zip(norms, weights, strict=True)])
    torch.testing.assert_close(stacked(weights), expected, rtol=0, atol=1e-13)
    assert float((expected - weights / 2).abs().max()) > 1e-2
