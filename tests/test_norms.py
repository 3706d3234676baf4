"""Each norm by name: what it normalizes, over what, and what its name promises the networks."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from bngan.batchnorm.layers import BatchNorm, ConditionalBatchNorm, GhostBatchNorm, batch_norm_layers
from bngan.errors import UsageError
from bngan.norms import BATCH_COUPLED, CENTERING, CONDITIONAL, NORMS, VIRTUAL_REFERENCE_SIZE, Layer, NormSettings, find_norm

CHANNELS = 12  # in 4 groups of 3
ROWS, GROUPS = VIRTUAL_REFERENCE_SIZE + 6, 2
KINDS = ["linear", "conv", "transposed"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def layer_of(kind: str) -> Layer:
    if kind == "linear":
        return nn.Linear(7, CHANNELS)
    return (nn.Conv2d if kind == "conv" else nn.ConvTranspose2d)(3, CHANNELS, kernel_size=3, stride=2, padding=1)


def inputs_of(kind: str) -> Tensor:
    shape = (7,) if kind == "linear" else (3, 8, 8)
    return torch.randn(ROWS, *shape) * 2 + 1


def normalized(name: str, kind: str) -> nn.Sequential:
    return nn.Sequential(*find_norm(name, NormSettings(ghost_groups=GROUPS))(layer_of(kind)))


def passed(net: nn.Module, x: Tensor) -> Tensor:
    """Pass x through a net that makes the same draws each time."""
    torch.manual_seed(1)
    return net(x)


CASES = [(name, kind) for name in sorted(NORMS) for kind in KINDS if (name, kind) != ("instance", "linear")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_norm_keeps_the_shape_and_stands_after_its_layer(name: str, kind: str) -> None:
    layer, x = layer_of(kind), inputs_of(kind)
    shape = layer(x).shape
    modules = find_norm(name)(layer)
    assert modules[0] is layer
    output = nn.Sequential(*modules)(x)
    assert output.shape == shape
    assert output.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(CONDITIONAL))
def test_norm_with_classes_is_the_norm_without_until_their_gammas_part(name: str, kind: str) -> None:
    layer, x, labels = layer_of(kind), inputs_of(kind), torch.arange(ROWS) % 3
    (_, plain), (first, conditional) = (find_norm(name, NormSettings(classes=classes))(layer) for classes in (0, 3))
    assert first is layer
    assert isinstance(conditional, ConditionalBatchNorm)
    assert conditional.gamma.shape == conditional.beta.shape == (3, CHANNELS)
    assert [*dict(conditional.norm.named_parameters())] == []
    torch.testing.assert_close(conditional(layer(x), labels), plain(layer(x)))
    conditional.gamma.data[1] = 2.0
    doubled = conditional(layer(x), labels)
    torch.testing.assert_close(doubled[1::3], 2 * plain(layer(x))[1::3])
    torch.testing.assert_close(doubled[0::3], plain(layer(x))[0::3])


@pytest.mark.parametrize("name", sorted(NORMS.keys() - CONDITIONAL))
def test_norm_that_cannot_tell_classes_apart_is_refused_with_them(name: str) -> None:
    with pytest.raises(
        UsageError, match=rf"norm '{name}' has no gamma and beta for each class.* 3 .*batch or reference"
    ) as error:
        find_norm(name, NormSettings(classes=3))
    assert "\n" not in str(error.value)
    find_norm(name)


def test_instance_norm_refuses_a_linear_layer_and_says_what_to_use() -> None:
    with pytest.raises(UsageError, match=r"needs pixels.*after a Linear layer use batch, layer or group"):
        find_norm("instance")(nn.Linear(7, CHANNELS))
    assert len(find_norm("instance")(nn.Conv2d(3, CHANNELS, kernel_size=3))) == 2


@pytest.mark.parametrize("channels", [4, 16, 32, 48])
def test_group_norm_after_a_linear_layer_pools_enough_channels_to_say_something(channels: int) -> None:
    # Of one value a norm leaves 0, whatever it was, and of two only a sign.
    _, norm = find_norm("group")(nn.Linear(7, channels))
    assert isinstance(norm, nn.GroupNorm)
    assert channels // norm.num_groups >= 3
    output = norm(torch.randn(8, channels, generator=torch.Generator().manual_seed(0)))
    assert output.abs().unique().numel() > channels
    _, after_convolution = find_norm("group")(nn.Conv2d(3, channels, kernel_size=3))
    assert isinstance(after_convolution, nn.GroupNorm)
    assert after_convolution.num_groups == min(channels, 16)


def pools(name: str, output: Tensor) -> Tensor:
    """Arrange an output so that the values a norm pools lie along the last dimension."""
    if name in ("batch", "noisy", "reference"):
        return output.transpose(0, 1).flatten(1)
    if name == "ghost":
        return output.unflatten(0, (-1, GROUPS)).transpose(0, 2).flatten(2)
    if name == "virtual":
        return output[:VIRTUAL_REFERENCE_SIZE].transpose(0, 1).flatten(1)
    if name == "layer":
        return output.flatten(1)
    if name == "group":
        return output.unflatten(1, (4, 3)).flatten(2)
    return output.flatten(2)  # instance


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] not in ("none", "spectral")])
def test_a_norm_gives_mean_0_and_variance_1_over_what_it_pools(name: str, kind: str) -> None:
    x = inputs_of(kind)
    net = normalized(name, kind)
    pooled, bare = pools(name, net[:2](x)), pools(name, net[0](x))  # without what noisy adds behind
    mean, var = pooled.mean(dim=-1), pooled.var(dim=-1, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=0, atol=2e-2)
    assert bare.mean(dim=-1).abs().max() > 0.01
    assert (bare.var(dim=-1, correction=0) - 1).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_norms_pool_over_different_values(kind: str) -> None:
    x = inputs_of(kind)
    names = ["batch", "ghost", "virtual", "layer", "group", *(["instance"] if kind != "linear" else [])]
    layer = layer_of(kind)
    outputs = [nn.Sequential(*find_norm(name, NormSettings(ghost_groups=GROUPS))(layer))(x) for name in names]
    for number, one in enumerate(outputs):
        for other in outputs[:number]:
            assert not torch.allclose(one, other, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["reference", "ghost"])
def test_reference_norm_and_ghost_norm_of_one_group_equal_batch_norm(name: str, kind: str) -> None:
    layer, x = layer_of(kind), inputs_of(kind)
    batch, other = (nn.Sequential(*find_norm(norm)(layer)) for norm in ("batch", name))
    torch.testing.assert_close(other(x), batch(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(other.eval()(x), batch.eval()(x), rtol=0, atol=1e-5)


def test_batch_norms_use_the_papers_numbers() -> None:
    settings = NormSettings(eps=0.2, momentum=0.3)
    for name in ("batch", "reference", "ghost"):
        ((_, layer),) = batch_norm_layers(normalized(name, "linear"))
        assert (layer.eps, layer.momentum) == (1e-5, 0.1)
        ((_, layer),) = batch_norm_layers(nn.Sequential(*find_norm(name, settings)(layer_of("linear"))))
        assert (layer.eps, layer.momentum) == (0.2, 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_no_norm_is_the_layer_itself(kind: str) -> None:
    layer = layer_of(kind)
    assert find_norm("none")(layer) == (layer,)


@pytest.mark.parametrize("scale", [0.1, 10.0])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_spectral_norm_brings_the_largest_singular_value_to_1(kind: str, scale: float) -> None:
    layer = layer_of(kind)
    with torch.no_grad():
        layer.weight.mul_(scale)

    def sigma() -> float:
        return float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2))

    before, x = sigma(), inputs_of(kind)
    (spectral,) = find_norm("spectral")(layer)
    for _ in range(100):
        spectral(x)
    spectral.eval()
    assert abs(before - 1) > 0.3
    assert 0.98 < sigma() <= 1 + 1e-3


def test_spectral_norm_iterates_in_training_alone() -> None:
    (spectral,) = find_norm("spectral")(layer_of("conv"))
    x = inputs_of("conv")
    spectral.eval()
    torch.testing.assert_close(spectral(x), spectral(x), rtol=0, atol=0)
    before = {name: buffer.clone() for name, buffer in spectral.named_buffers()}
    spectral(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in spectral.named_buffers())
    spectral.train()(x)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in spectral.named_buffers())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_bias_does_nothing_before_exactly_the_centering_norms(name: str, kind: str) -> None:
    net = normalized(name, kind).double()
    x = inputs_of(kind).double()
    if name == "spectral":
        net.eval()  # or its next power iteration would change the output as well
    before = passed(net, x)
    with torch.no_grad():
        cast(Tensor, net[0].bias).add_(torch.linspace(-2, 2, CHANNELS))
    assert torch.allclose(passed(net, x), before, rtol=0, atol=1e-9) == (name in CENTERING)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_example_depends_on_its_batch_mates_with_exactly_the_coupled_norms(name: str, kind: str) -> None:
    net = normalized(name, kind).double()
    x = inputs_of(kind).double()
    changed = torch.cat([x[:-1], x[-1:] + 5])
    if name == "spectral":
        net.eval()
    before, after = passed(net, x), passed(net, changed)
    coupled = not torch.allclose(after[:-1], before[:-1], rtol=0, atol=1e-9)
    assert coupled == (name in BATCH_COUPLED)
    assert not torch.allclose(after[-1], before[-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_noisy_norm_is_batch_norm_but_for_what_training_adds(kind: str) -> None:
    layer, x = layer_of(kind), inputs_of(kind)
    batch, noisy = (nn.Sequential(*find_norm(norm)(layer)) for norm in ("batch", "noisy"))
    made = batch(x).detach()
    noise = noisy(x).detach() - made
    assert 0.2 < float(noise.std()) < 0.5
    assert abs(float(made.std()) - 1) < 0.01
    torch.testing.assert_close(noisy.eval()(x), batch.eval()(x), rtol=0, atol=1e-6)


def test_an_unknown_norm_is_refused_with_the_list_of_norms() -> None:
    with pytest.raises(UsageError, match=r"unknown norm 'bacth'; choose from batch, ") as caught:
        find_norm("bacth")
    assert all(name in str(caught.value) for name in NORMS)


@pytest.mark.parametrize("name", sorted(BATCH_COUPLED))
def test_norms_have_the_settings_they_are_asked_for(name: str) -> None:
    norm = find_norm(name, NormSettings(eps=0.2, momentum=0.3, ghost_groups=4))(nn.Linear(7, CHANNELS))[1]
    assert isinstance(norm, BatchNorm)
    assert (norm.eps, norm.momentum) == (0.2, 0.3)
    norm = find_norm(name)(nn.Linear(7, CHANNELS))[1]
    assert isinstance(norm, BatchNorm)
    assert (norm.eps, norm.momentum) == (1e-5, 0.1)


def test_ghost_norm_has_the_groups_it_is_asked_for() -> None:
    for groups in (1, 4):
        _, norm = find_norm("ghost", NormSettings(ghost_groups=groups))(nn.Linear(7, CHANNELS))
        assert isinstance(norm, GhostBatchNorm)
        assert norm.groups == groups


@pytest.mark.parametrize(("channels", "trained"), [(8, False), (16, False), (32, True)])
def test_bias_before_groups_of_one_channel_each_which_center_it_is_not_trained(channels: int, trained: bool) -> None:
    convolution, norm = find_norm("group")(nn.Conv2d(3, channels, kernel_size=3))
    x, before = torch.randn(4, 3, 8, 8), nn.Sequential(convolution, norm)
    expected = before(x)
    assert isinstance(convolution.bias, nn.Parameter)
    assert convolution.bias.requires_grad == trained
    with torch.no_grad():
        convolution.bias += torch.linspace(-2, 2, channels)
    assert torch.allclose(before(x), expected, rtol=0, atol=1e-4) != trained
