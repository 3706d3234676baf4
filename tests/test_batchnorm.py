"""The equations against torch's own batch norm, and the policies around them against what they promise."""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bngan.batchnorm import (
    BatchNorm,
    ReferenceBatchNorm,
    Statistics,
    VirtualBatchNorm,
    batch_norm_layers,
    batch_statistics,
    divergence,
    frozen_statistics,
    normalize,
    recorded_statistics,
    score,
)
from bngan.networks import Discriminator

CHANNELS = 5
SHAPES = [pytest.param((16, CHANNELS), id="1d"), pytest.param((8, CHANNELS, 3, 4), id="2d")]
MOMENTA = [0.1, 0.5, None]

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def torch_layer(shape: tuple[int, ...], eps: float = 1e-5, momentum: float | None = 0.1) -> BatchNorm:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    return kind(shape[1], eps=eps, momentum=momentum).double()


def twins(shape: tuple[int, ...], momentum: float | None = 0.1) -> tuple[ReferenceBatchNorm, BatchNorm]:
    """Our layer and torch's, with the same gamma and beta drawn at random."""
    ours, theirs = ReferenceBatchNorm(shape[1], momentum=momentum).double(), torch_layer(shape, momentum=momentum)
    for layer in (ours, theirs):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            layer.weight.normal_(generator=generator)
            layer.bias.normal_(generator=generator)
    return ours, theirs


def batches(shape: tuple[int, ...], count: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) * 2 + 3 + number / 10 for number in range(count)]


def running(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


# The equations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_training_forward_equals_torch(shape: tuple[int, ...]) -> None:
    ours, theirs = twins(shape)
    (z,) = batches(shape, 1)
    assert_close(ours(z), theirs(z))


@pytest.mark.parametrize("shape", SHAPES)
def test_comparison_would_notice_an_unbiased_variance_or_another_eps(shape: tuple[int, ...]) -> None:
    ours, theirs = twins(shape)
    (z,) = batches(shape, 1)
    mean, biased_var = batch_statistics(z)
    count = z.numel() // shape[1]

    def output(var: Tensor, eps: float) -> Tensor:
        affine = [1, -1, *[1] * (z.ndim - 2)]
        return ours.weight.reshape(affine) * normalize(z, mean, var, eps) + ours.bias.reshape(affine)

    assert_close(output(biased_var, 1e-5), theirs(z))
    for wrong in (output(biased_var * count / (count - 1), 1e-5), output(biased_var, 2e-5)):
        with pytest.raises(AssertionError):
            assert_close(wrong, theirs(z))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_input_and_parameters_equal_torch(shape: tuple[int, ...]) -> None:
    ours, theirs = twins(shape)
    (z,) = batches(shape, 1)
    upstream = torch.randn_like(z)
    gradients = []
    for layer in (ours, theirs):
        leaf = z.clone().requires_grad_()
        gradients.append(torch.autograd.grad(layer(leaf), [leaf, layer.weight, layer.bias], upstream))
    for of_ours, of_theirs in zip(*gradients, strict=True):
        assert_close(of_ours, of_theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_flows_through_the_statistics(shape: tuple[int, ...]) -> None:
    """A shift of the whole batch changes nothing in training, so the gradients sum to zero; in evaluation they do not."""
    ours, _ = twins(shape)
    z = batches(shape, 1)[0].requires_grad_()
    upstream = torch.randn_like(z)
    dims = [0, *range(2, z.ndim)]
    (in_training,) = torch.autograd.grad(ours(z), z, upstream)
    (in_evaluation,) = torch.autograd.grad(ours.eval()(z), z, upstream)
    assert in_training.abs().max() > 1e-3
    assert_close(in_training.sum(dim=dims), torch.zeros(CHANNELS, dtype=torch.float64))
    assert (in_evaluation.sum(dim=dims).abs() > 1e-3).all()


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("shape", SHAPES)
def test_running_statistics_equal_torch_after_50_batches(shape: tuple[int, ...], momentum: float | None) -> None:
    ours, theirs = twins(shape, momentum)
    biased = torch.zeros(CHANNELS, dtype=torch.float64)
    for z in batches(shape, 50):
        ours(z)
        theirs(z)
        biased += batch_statistics(z)[1] / 50
    for name, buffer in running(theirs).items():
        assert_close(running(ours)[name], buffer)
    assert int(ours.num_batches_tracked) == 50
    if momentum is None:
        # The average of unbiased variances: the biased ones that normalize would be smaller.
        assert (ours.running_var > biased + 1e-3).all()


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_equals_torch_and_ignores_the_batch(shape: tuple[int, ...], momentum: float | None) -> None:
    ours, theirs = twins(shape, momentum)
    for z in batches(shape, 3):
        ours(z)
        theirs(z)
    (z,) = batches(shape, 1)
    in_training = ours(z)
    theirs(z)
    ours.eval()
    theirs.eval()
    before = running(ours)
    assert_close(ours(z), theirs(z))
    assert_close(ours(z[:1]), ours(z)[:1])
    assert not torch.allclose(ours(z), in_training, atol=1e-3)
    for name, buffer in before.items():
        assert_equal(running(ours)[name], buffer)


@pytest.mark.parametrize("shape", [(1, CHANNELS), (1, CHANNELS, 1, 1)])
def test_training_refuses_one_value_per_channel_and_says_what_to_do(shape: tuple[int, ...]) -> None:
    ours, theirs = twins(shape)
    z = torch.randn(shape, dtype=torch.float64)
    before = running(ours)
    with pytest.raises(ValueError, match=r"at least 2 values per channel, got 1.*larger batch or call eval\(\)"):
        ours(z)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        theirs(z)
    for name, buffer in before.items():
        assert_equal(running(ours)[name], buffer)
    assert_close(ours.eval()(z), theirs.eval()(z))


def test_training_takes_a_single_image_of_several_pixels() -> None:
    ours, theirs = twins((1, CHANNELS, 3, 4))
    z = torch.randn(1, CHANNELS, 3, 4, dtype=torch.float64)
    assert_close(ours(z), theirs(z))


@pytest.mark.parametrize("shape", [(8, CHANNELS + 1), (8, CHANNELS - 1, 2, 2), (CHANNELS,)])
@pytest.mark.parametrize("training", [True, False])
def test_another_number_of_channels_is_refused(shape: tuple[int, ...], training: bool) -> None:
    layer = ReferenceBatchNorm(CHANNELS).train(training)
    with pytest.raises(ValueError, match=rf"expected \(N, {CHANNELS}, ...\), got \({shape[0]},"):
        layer(torch.randn(shape))
    assert layer(torch.randn(8, CHANNELS)).shape == (8, CHANNELS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dict_loads_into_the_other_layer(shape: tuple[int, ...], ours_first: bool) -> None:
    source, target = twins(shape) if ours_first else twins(shape)[::-1]
    for z in batches(shape, 3):
        source(z)
    (z,) = batches(shape, 1)
    source.eval()
    target.eval()
    assert not torch.allclose(source(z), target(z), atol=1e-3)
    assert list(source.state_dict()) == list(target.state_dict())
    target.load_state_dict(source.state_dict(), strict=True)
    assert_close(source(z), target(z))
    source.train()(z)
    target.train()(z)
    for name, buffer in running(source).items():
        assert_close(running(target)[name], buffer)


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 1, 2)])
def test_second_derivatives_are_right(shape: tuple[int, ...]) -> None:
    layer = ReferenceBatchNorm(shape[1]).double()

    def normalized(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cast(Tensor, torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (z,)))

    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, shape[1], shape[1])]
    assert torch.autograd.gradcheck(normalized, inputs)
    assert torch.autograd.gradgradcheck(normalized, inputs)

    # Were the statistics cut off from the graph, the same check would fail.
    def cut_off(z: Tensor) -> Tensor:
        mean, var = batch_statistics(z.detach())
        return normalize(z, mean, var, eps=1e-5)

    assert not torch.autograd.gradcheck(cut_off, inputs[:1], raise_exception=False)


# Policies -----------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8, eps=1e-5, momentum=0.1),
        nn.ReLU(),
        nn.Linear(8, CHANNELS),
        ReferenceBatchNorm(CHANNELS, eps=1e-5, momentum=0.1),
    ).double()


def test_layers_that_keep_running_statistics_are_found_by_name() -> None:
    without = nn.BatchNorm1d(8, eps=1e-5, momentum=0.1, track_running_stats=False)
    module = nn.ModuleDict({"net": network(), "without": without, "group": nn.GroupNorm(1, 8)})
    assert [name for name, _ in batch_norm_layers(module)] == ["net.1", "net.4"]
    assert list(batch_norm_layers(nn.Linear(2, 2))) == []


def test_frozen_statistics_stay_while_the_batch_still_normalizes() -> None:
    net = network()
    x = torch.randn(16, 6, dtype=torch.float64) + 3
    expected = net(x)
    before = running(net)
    with frozen_statistics(net):
        inside = net(x)
    for name, buffer in before.items():
        assert_equal(running(net)[name], buffer)
    assert_close(inside, expected)
    assert_close(inside.mean(dim=0), torch.zeros(CHANNELS, dtype=torch.float64))
    net(x)
    for name, buffer in running(net).items():
        assert not torch.equal(buffer, before[name]), f"{name} should move again after the block"


def test_frozen_statistics_move_again_after_an_exception() -> None:
    net = network()
    x = torch.randn(16, 6, dtype=torch.float64)
    before = running(net)

    def fail_inside() -> None:
        with frozen_statistics(net):
            net(x)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert_equal(running(net)["1.running_mean"], before["1.running_mean"])
    net(x)
    assert not torch.equal(running(net)["1.running_mean"], before["1.running_mean"])


def test_frozen_statistics_leave_a_layer_frozen_that_was_frozen_before() -> None:
    net = network()
    first, second = (layer for _, layer in batch_norm_layers(net))
    first.track_running_stats = False
    with frozen_statistics(net):
        assert not second.track_running_stats
    assert not first.track_running_stats
    assert second.track_running_stats


def changed_fakes(fakes: Tensor) -> Tensor:
    return 3 * fakes + torch.linspace(-2, 2, fakes.shape[1], dtype=fakes.dtype)


def scorer(norm: str) -> Callable[[Tensor], Tensor]:
    return Discriminator(input_dim=20, hidden_dim=16, norm=norm).double().logits


def test_separate_batches_make_a_batch_normalized_discriminator_blind_to_shift_and_scale_of_the_fakes() -> None:
    logits = scorer("batch")
    reals, fakes = torch.randn(2, 64, 20, dtype=torch.float64)
    before = score(logits, reals, fakes, "separate")[1]
    after = score(logits, reals, changed_fakes(fakes), "separate")[1]
    assert before.std() > 0.05
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)  # up to eps, which does not scale along


def test_joint_batches_let_it_see_them() -> None:
    logits = scorer("batch")
    reals, fakes = torch.randn(2, 64, 20, dtype=torch.float64)
    before = score(logits, reals, fakes, "joint")[1]
    after = score(logits, reals, changed_fakes(fakes), "joint")[1]
    assert (after - before).abs().max() > 0.1


def test_joint_and_separate_agree_without_batch_norm_alone() -> None:
    reals, fakes = torch.randn(40, 20, dtype=torch.float64), torch.randn(24, 20, dtype=torch.float64) + 1
    for norm, agree in (("none", True), ("layer", True), ("batch", False)):
        logits = scorer(norm)
        joint, separate = score(logits, reals, fakes, "joint"), score(logits, reals, fakes, "separate")
        assert [len(part) for part in joint] == [40, 24]
        for a, b in zip(joint, separate, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-10) == agree, norm


def test_joint_and_separate_logits_keep_real_before_fake() -> None:
    reals, fakes = torch.ones(3, 1), -torch.ones(2, 1)
    for batching in ("joint", "separate"):
        real_logits, fake_logits = score(lambda images: 2 * images, reals, fakes, batching)
        assert_equal(real_logits, 2 * reals)
        assert_equal(fake_logits, 2 * fakes)


# Running against batch statistics -------------------------------------------------------------------------------------


def test_recorded_statistics_are_those_of_every_batch_of_every_layer() -> None:
    net = network()
    inputs = [torch.randn(16, 6, dtype=torch.float64) * scale for scale in (1, 5)]
    with recorded_statistics(net) as seen:
        for x in inputs:
            net(x)
    net(inputs[0])
    assert {name: len(statistics) for name, statistics in seen.items()} == {"1": 2, "4": 2}
    for x, statistics in zip(inputs, seen["1"], strict=True):
        hidden = net[0](x)
        assert_close(statistics.mean, hidden.mean(dim=0))
        assert_close(statistics.var, hidden.var(dim=0, correction=0))
        assert not statistics.mean.requires_grad
    assert (seen["1"][1].var > seen["1"][0].var).all()


def test_recording_ends_with_an_exception() -> None:
    net = network()

    def fail_inside() -> None:
        with recorded_statistics(net):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert not any(module._forward_pre_hooks for module in net.modules())
    with recorded_statistics(net):
        assert any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, ReferenceBatchNorm])
def test_divergence_is_zero_where_running_and_batch_statistics_agree_and_positive_elsewhere(
    kind: type[nn.BatchNorm1d] | type[ReferenceBatchNorm],
) -> None:
    layer = kind(CHANNELS)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = batch_statistics(torch.randn(32, CHANNELS) * 2 + 1)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    assert_equal(divergence(layer, Statistics(mean, var)), torch.zeros(CHANNELS))
    for moved in (
        Statistics(mean + 0.1, var),
        Statistics(mean - 0.1, var),
        Statistics(mean, var * 1.2),
        Statistics(mean, var / 1.2),
    ):
        assert (divergence(layer, moved) > 1e-4).all()


def test_divergence_has_its_closed_form() -> None:
    layer = ReferenceBatchNorm(CHANNELS, eps=0.5).double()
    mean = torch.randn(CHANNELS, dtype=torch.float64)
    var = torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    layer.running_var.copy_(var)
    # A shift by k standard deviations costs k^2 / 2 nats.
    shift = torch.linspace(-2, 2, CHANNELS, dtype=torch.float64)
    layer.running_mean.copy_(mean + shift * (var + 0.5).sqrt())
    assert_close(divergence(layer, Statistics(mean, var)), shift.square() / 2)
    # A running variance e times too large costs (1/e - 1 + 1) / 2.
    layer.running_mean.copy_(mean)
    layer.running_var.copy_((var + 0.5) * math.e - 0.5)
    assert_close(divergence(layer, Statistics(mean, var)), torch.full((CHANNELS,), 1 / (2 * math.e), dtype=torch.float64))


def test_divergence_is_from_batch_to_running_not_back() -> None:
    layer = ReferenceBatchNorm(CHANNELS, eps=0.1).double()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    mean, var = torch.randn(CHANNELS, dtype=torch.float64), torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    batch = torch.distributions.Normal(mean, (var + 0.1).sqrt())
    kept = torch.distributions.Normal(layer.running_mean, (layer.running_var + 0.1).sqrt())
    found = divergence(layer, Statistics(mean, var))
    assert_close(found, torch.distributions.kl_divergence(batch, kept))
    assert not torch.allclose(found, torch.distributions.kl_divergence(kept, batch), atol=1e-3)


# Virtual batch norm ---------------------------------------------------------------------------------------------------


def virtual(reference_size: int = 6) -> VirtualBatchNorm:
    layer = VirtualBatchNorm(CHANNELS, reference_size=reference_size).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("shape", SHAPES)
def test_virtual_norm_equals_batch_norm_over_the_reference_and_the_example(shape: tuple[int, ...]) -> None:
    layer = virtual()
    reference, examples = batches(shape, 2)
    reference = reference[:6]
    found = layer(torch.cat([reference, examples]))

    def batch_norm(z: Tensor) -> Tensor:
        return F.batch_norm(z, None, None, layer.weight, layer.bias, training=True, eps=1e-5)

    naive = torch.cat([batch_norm(torch.cat([reference, example[None]]))[-1:] for example in examples])
    assert_close(found[6:], naive)
    assert_close(found[:6], batch_norm(reference))
    # Normalizing an example by the reference alone, without itself, is something else.
    mean, var = batch_statistics(reference)
    affine = [1, -1, *[1] * (len(shape) - 2)]
    alone = layer.weight.reshape(affine) * normalize(examples, mean, var, 1e-5) + layer.bias.reshape(affine)
    assert not torch.allclose(found[6:], alone, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_virtual_norm_ignores_an_examples_batch_mates(shape: tuple[int, ...]) -> None:
    layer, plain = virtual(), torch_layer(shape)
    reference, examples, mates = batches(shape, 3)
    with_some, with_others = torch.cat([reference[:6], examples]), torch.cat([reference[:6], examples[:1], mates[1:]])
    assert_close(layer(with_others)[6], layer(with_some)[6])
    assert not torch.allclose(plain(with_others)[6], plain(with_some)[6], atol=1e-3)
    # It does depend on the reference batch.
    assert not torch.allclose(layer(torch.cat([mates[:6], examples]))[6], layer(with_some)[6], atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_virtual_norm_is_the_same_in_training_and_evaluation(shape: tuple[int, ...]) -> None:
    layer, plain = virtual(), torch_layer(shape)
    (z,) = batches(shape, 1)
    assert_equal(layer.train()(z), layer.eval()(z))
    assert list(layer.buffers()) == []
    assert not torch.allclose(plain.train()(z), plain.eval()(z), atol=1e-3)


@pytest.mark.parametrize("rows", [5, 6])
def test_virtual_norm_refuses_a_batch_without_examples(rows: int) -> None:
    layer = virtual(reference_size=6)
    with pytest.raises(ValueError, match=f"more than the 6 rows of the reference batch, got {rows}"):
        layer(torch.randn(rows, CHANNELS, dtype=torch.float64))
    assert layer(torch.randn(7, CHANNELS, dtype=torch.float64)).shape == (7, CHANNELS)


@pytest.mark.parametrize("shape", SHAPES)
def test_virtual_norm_keeps_its_digits_where_the_mean_is_far_from_zero(shape: tuple[int, ...]) -> None:
    """In single precision the mean square less the squared mean would be noise here, at times below zero."""
    layer = virtual()
    z = (torch.randn(shape) * 0.1 + 1000).float()
    exact = layer(z.double())
    torch.testing.assert_close(layer.float()(z).double(), exact, rtol=0, atol=5e-3)
    naive_var = z.square().mean(dim=0) - z.mean(dim=0).square()
    assert not torch.allclose(naive_var.double(), z.double().var(dim=0, correction=0), rtol=0.1)


def test_recording_passes_over_batches_in_evaluation_mode() -> None:
    layer = nn.BatchNorm1d(3)
    batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with recorded_statistics(nn.Sequential(layer)) as seen:
        layer(batch)
        layer.eval()
        layer(batch + 5)
    (statistics,) = seen["0"]
    torch.testing.assert_close(statistics.mean, batch.mean(dim=0))
