"""The layers' equations against torch's own batch norm; groups, ranks and reference batches against what they promise."""

from collections.abc import Iterator
from functools import partial
from typing import cast

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from bngan.batching import discriminate
from bngan.batchnorm.layers import (
    BatchNorm,
    ConditionalBatchNorm,
    CovariateShift,
    GhostBatchNorm,
    ReferenceBatchNorm,
    VirtualBatchNorm,
    batch_norm_layers,
    batch_statistics,
    local_batches,
    normalize,
    synchronize,
)
from bngan.batchnorm.statistics import EVAL_STATISTICS, evaluation_statistics

CHANNELS = 5
SHAPES = [pytest.param((16, CHANNELS), id="1d"), pytest.param((8, CHANNELS, 3, 4), id="2d")]
MOMENTA = [0.1, 0.5, None]

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


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


def test_layers_that_keep_running_statistics_are_found_by_name() -> None:
    without = nn.BatchNorm1d(8, eps=1e-5, momentum=0.1, track_running_stats=False)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), ReferenceBatchNorm(8), GhostBatchNorm(8, groups=2))
    module = nn.ModuleDict({"net": net, "without": without, "group": nn.GroupNorm(1, 8)})
    assert [name for name, _ in batch_norm_layers(module)] == ["net.1", "net.3", "net.4"]
    assert list(batch_norm_layers(nn.Linear(2, 2))) == []


# Groups ---------------------------------------------------------------------------------------------------------------


def ghost_and_torchs(shape: tuple[int, ...], groups: int) -> tuple[GhostBatchNorm, list[BatchNorm]]:
    """Our layer over groups, and a layer of torch for each group, all with one gamma and one beta."""
    ghost = GhostBatchNorm(shape[1], groups=groups).double()
    reference, _ = twins(shape)
    ghost.load_state_dict(reference.state_dict())
    return ghost, [twins(shape)[1] for _ in range(groups)]


def by_groups(z: Tensor, layers: list[BatchNorm]) -> Tensor:
    """Pass group i, the rows i, i + groups, ..., through layer i."""
    output = torch.empty_like(z)
    for number, layer in enumerate(layers):
        output[number :: len(layers)] = layer(z[number :: len(layers)])
    return output


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_ghost_norm_is_batch_norm_of_every_groups_rows(shape: tuple[int, ...], groups: int) -> None:
    ghost, layers = ghost_and_torchs(shape, groups)
    z = batches(shape, 1)[0] + torch.arange(shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    assert_close(ghost(z), by_groups(z, layers))
    contiguous = torch.cat([layer(rows) for layer, rows in zip(layers, z.chunk(groups), strict=True)])
    assert torch.allclose(ghost(z), contiguous, rtol=0, atol=1e-3) == (groups == 1)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_ghost_norm_are_those_of_every_groups_batch_norm(shape: tuple[int, ...], groups: int) -> None:
    ghost, layers = ghost_and_torchs(shape, groups)
    (z,) = batches(shape, 1)
    upstream, leaf = torch.randn_like(z), z.clone().requires_grad_()
    found = torch.autograd.grad(ghost(leaf), [leaf, ghost.weight, ghost.bias], upstream)
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    inner, *outer = torch.autograd.grad(by_groups(leaf, layers), [leaf, *weights, *biases], upstream)
    expected = inner, torch.stack(outer[:groups]).sum(dim=0), torch.stack(outer[groups:]).sum(dim=0)
    for of_ghost, of_layers in zip(found, expected, strict=True):
        assert of_layers.abs().max() > 1e-3
        assert_close(of_ghost, of_layers)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("shape", SHAPES)
def test_running_statistics_of_ghost_norm_are_the_mean_of_the_groups(shape: tuple[int, ...], momentum: float | None) -> None:
    ghost = GhostBatchNorm(shape[1], groups=2, momentum=momentum).double()
    layers, whole = [torch_layer(shape, momentum=momentum) for _ in range(2)], torch_layer(shape, momentum=momentum)
    for z in batches(shape, 5):
        z[::2] += 4
        ghost(z)
        whole(z)
        by_groups(z, layers)
    first, second = (running(layer) for layer in layers)
    found = running(ghost)
    for name in ("running_mean", "running_var"):
        assert_close(found[name], (first[name] + second[name]) / 2)
    assert int(ghost.num_batches_tracked) == 5
    assert (running(whole)["running_var"] > found["running_var"] + 0.1).all(), "the groups' means differ"


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_of_ghost_norm_knows_no_groups(shape: tuple[int, ...]) -> None:
    ghost, (plain, *_) = ghost_and_torchs(shape, 4)
    for z in batches(shape, 3):
        ghost(z)
    assert list(ghost.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(ghost.state_dict())
    (z,) = batches(shape, 1)
    in_training = ghost(z)
    plain.load_state_dict(ghost.state_dict())
    before = running(ghost)
    assert_close(ghost.eval()(z), plain.eval()(z))
    assert_close(ghost(z[:3]), plain(z)[:3])  # of any number of rows
    assert not torch.allclose(ghost(z), in_training, atol=1e-3)
    for name, buffer in before.items():
        assert_equal(running(ghost)[name], buffer)


def test_every_group_of_a_joint_batch_has_real_and_fake_images() -> None:
    ghost, layers = ghost_and_torchs((8, CHANNELS), 4)
    real, fake = torch.randn(2, 8, CHANNELS, dtype=torch.float64)
    fake += 5
    found = discriminate(ghost, real, fake, "joint")
    for number, layer in enumerate(layers):
        expected = layer(torch.cat([real[number::4], fake[number::4]]))
        assert_close(torch.cat([logits[number::4] for logits in found]), expected)
    separate = discriminate(ghost, real, fake, "separate")
    assert (found[1] - separate[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("rows", "answer"), [(10, "10 rows cannot be cut into 4 groups"), (4, "at least 2 values per channel, got 1")]
)
def test_ghost_norm_refuses_rows_that_make_no_groups(rows: int, answer: str) -> None:
    ghost = GhostBatchNorm(CHANNELS, groups=4)
    before = running(ghost)
    with pytest.raises(ValueError, match=answer):
        ghost(torch.randn(rows, CHANNELS))
    for name, buffer in before.items():
        assert_equal(running(ghost)[name], buffer)
    assert ghost(torch.randn(8, CHANNELS)).shape == (8, CHANNELS)
    assert ghost.eval()(torch.randn(rows, CHANNELS)).shape == (rows, CHANNELS)


@pytest.mark.parametrize("ranks", [2, 4])
def test_synchronized_groups_are_those_of_the_global_batch(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ghost, _ = ghost_and_torchs((32, CHANNELS), 4)
    (z,) = batches((32, CHANNELS), 1)
    whole = ghost(z)
    monkeypatch.setattr("bngan.batchnorm.layers.world_size", lambda: ranks)
    ghost.synchronized = True
    for rank in range(ranks):
        assert_close(ghost(z[rank::ranks]), whole[rank::ranks])
    ghost.synchronized = False  # each rank then cuts its own rows into all the groups
    assert not torch.allclose(ghost(z[::ranks]), whole[::ranks], atol=1e-3)


# Ranks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """This process is one of one rank."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def mixed() -> nn.Sequential:
    """Batch norm of every kind, some of it deeper, the last in evaluation."""
    deep = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, eps=1e-4, momentum=0.2), nn.ReLU())
    net = nn.Sequential(
        deep,
        ReferenceBatchNorm(8),
        nn.BatchNorm1d(8, track_running_stats=False),
        GhostBatchNorm(8, groups=2),
        nn.BatchNorm1d(8, eps=1e-5, momentum=0.1),
    ).double()
    net(torch.randn(16, 6, dtype=torch.float64))
    net[4].eval()
    return net


@pytest.mark.parametrize(("device", "kind"), [("cpu", ReferenceBatchNorm), ("cuda", nn.SyncBatchNorm)])
def test_synchronizing_keeps_parameters_buffers_and_modes(device: str, kind: type[nn.Module]) -> None:
    net = mixed()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert synchronize(net, torch.device(device)) is net
    layers = dict(batch_norm_layers(net))
    assert {name: type(layer) for name, layer in layers.items()} == {
        "0.1": kind,
        "1": ReferenceBatchNorm,
        "3": GhostBatchNorm,
        "4": kind,
    }
    assert all(layer.synchronized for layer in layers.values() if isinstance(layer, ReferenceBatchNorm))
    assert (layers["0.1"].eps, layers["0.1"].momentum) == (1e-4, 0.2)
    assert [layer.training for layer in layers.values()] == [True, True, True, False]
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert after[name] is tensor, f"{name} is what optimizers and checkpoints know"


def test_synchronized_layers_compute_alone_what_they_did_before() -> None:
    net, twin = mixed(), mixed()
    twin.load_state_dict(net.state_dict())
    x = torch.randn(16, 6, dtype=torch.float64)
    assert_close(synchronize(net, torch.device("cpu"))(x), twin(x))
    for name, buffer in running(twin).items():
        assert_close(running(net)[name], buffer)


@pytest.mark.parametrize("fails", [False, True])
def test_within_local_batches_no_layer_of_ours_waits_for_other_ranks(fails: bool) -> None:
    net = synchronize(mixed(), torch.device("cpu"))
    layers = [layer for _, layer in batch_norm_layers(net) if isinstance(layer, ReferenceBatchNorm)]
    layers[1].synchronized = False

    def look() -> None:
        with local_batches(net):
            assert not any(layer.synchronized for layer in layers)
            if fails:
                raise KeyError("inside")

    if fails:
        with pytest.raises(KeyError, match="inside"):
            look()
    else:
        look()
    assert [layer.synchronized for layer in layers] == [True, False, True, True]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.usefixtures("group_of_one")
def test_within_local_batches_torchs_layers_talk_to_this_rank_alone(fails: bool) -> None:
    net = synchronize(mixed(), torch.device("cuda"))
    layers = [layer for layer in net.modules() if isinstance(layer, nn.SyncBatchNorm)]
    world = distributed.group.WORLD
    layers[0].process_group = world

    def look() -> None:
        with local_batches(net):
            for layer in layers:
                assert layer.process_group not in (None, world)
                assert distributed.get_world_size(layer.process_group) == 1
            if fails:
                raise KeyError("inside")

    for _ in range(2):  # the second time the group is there already
        if fails:
            with pytest.raises(KeyError, match="inside"):
                look()
        else:
            look()
        assert [layer.process_group for layer in layers] == [world, None]


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


# Santurkar's noise ----------------------------------------------------------------------------------------------------

ROWS, DRAWN = 2000, 40


def shifts(shape: tuple[int, ...], passes: int = DRAWN) -> tuple[Tensor, Tensor]:
    """Return what is added to 0 and, beside that, what 1 is multiplied by, (passes, *shape) each."""
    torch.manual_seed(0)
    layer, added, scaled = CovariateShift(), [], []
    for number in range(passes):
        for z, found in ((torch.zeros(shape), added), (torch.ones(shape), scaled)):
            torch.manual_seed(number)
            found.append(layer(z))
    added_values = torch.stack(added)
    return added_values, torch.stack(scaled) - added_values


def test_covariate_shift_draws_from_the_papers_distributions() -> None:
    m, s = shifts((ROWS, CHANNELS))
    mu, sigma = m.mean(dim=1), s.mean(dim=1)  # (passes, C)
    assert mu.min() < -0.4 < 0.4 < mu.max()
    assert sigma.min() < 1.05 < 1.2 < sigma.max()
    assert mu.abs().max() < 0.51
    assert 0.99 < sigma.min() < sigma.max() < 1.26
    spread = 0.1 / 3**0.5  # of a uniform distribution
    torch.testing.assert_close(m.std(dim=1), torch.full_like(mu, spread), rtol=0.1, atol=0)
    torch.testing.assert_close(s.std(dim=1), torch.full_like(sigma, 0.1), rtol=0.1, atol=0)
    assert (m - mu.unsqueeze(1)).abs().max() < 0.11  # bounded, as s is not
    assert (s - sigma.unsqueeze(1)).abs().max() > 0.3


def test_covariate_shift_differs_between_channels_passes_and_values_but_is_one_over_pixels() -> None:
    m, _ = shifts((50, CHANNELS, 8, 8), passes=8)
    means = m.mean(dim=(1, 3, 4))  # (passes, C)
    assert means.std(dim=0).min() > 0.1
    assert means.std(dim=1).min() > 0.1
    within = m - m.mean(dim=(1, 3, 4), keepdim=True)
    assert within.mean(dim=(1, 2)).abs().max() < 0.02  # a pixel has no mean of its own
    assert within.mean(dim=(2, 3, 4)).abs().max() < 0.02  # nor has an image
    assert within.std(dim=(0, 1)).min() > 0.05


def test_covariate_shift_is_off_in_evaluation_whichever_statistics_normalize() -> None:
    net = nn.Sequential(ReferenceBatchNorm(CHANNELS), CovariateShift())
    z = torch.randn(64, CHANNELS)
    assert not torch.equal(net(z), net(z))
    for statistics in EVAL_STATISTICS:
        with evaluation_statistics(net, statistics, batches=[z]):
            assert torch.equal(net(z), net[0](z))


# By class -------------------------------------------------------------------------------------------------------------

CLASSES = 3


def conditional(shape: tuple[int, ...], *, ours: bool = False, classes: int = CLASSES) -> ConditionalBatchNorm:
    """A conditional layer whose gammas and betas are drawn at random."""
    theirs = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    layer = ConditionalBatchNorm((ReferenceBatchNorm if ours else theirs)(shape[1], affine=False), classes).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.gamma.normal_(generator=generator)
        layer.beta.normal_(generator=generator)
    return layer


def plain(layer: ConditionalBatchNorm, label: int) -> BatchNorm:
    """Torch's batch norm with the gamma and the beta of one class."""
    twin = torch_layer((2, CHANNELS) if isinstance(layer.norm, nn.BatchNorm1d) else (2, CHANNELS, 1, 1))
    with torch.no_grad():
        twin.weight.copy_(layer.gamma[label])
        twin.bias.copy_(layer.beta[label])
    return twin


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_conditional_layer_is_batch_norm_with_each_rows_own_gamma_and_beta(shape: tuple[int, ...], ours: bool) -> None:
    torch.manual_seed(0)
    layer, twin, labels = conditional(shape, ours=ours), torch_layer(shape), torch.randint(CLASSES, shape[:1])
    assert len(labels.unique()) == CLASSES
    values = (layer.gamma, layer.beta)
    (z, z_twin), weights = (batch.requires_grad_() for batch in batches(shape, 1) * 2), torch.randn(shape, dtype=torch.float64)
    gamma, beta = (value[labels].view(*shape[:2], *[1] * (len(shape) - 2)) for value in values)
    found, expected = layer(z, labels), gamma * twin(z_twin) + beta
    assert_close(found, expected)
    ours_and_theirs = (
        torch.autograd.grad((result * weights).sum(), (given, *values)) for result, given in ((found, z), (expected, z_twin))
    )
    for one, other in zip(*ours_and_theirs, strict=True):
        assert_close(one, other)
    assert layer(z, (labels + 1) % CLASSES).sub(found).abs().max() > 0.1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_one_class_are_normalized_as_by_plain_batch_norm(shape: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(0)
    first, *others = batches(shape, 3)
    for label in range(CLASSES):
        layer = conditional(shape)
        twin, labels = plain(layer, label), torch.full(shape[:1], label)
        for z in others:  # let the running statistics move
            assert_close(layer(z, labels), twin(z))
        layer.train(training)
        twin.train(training)
        assert_close(layer(first, labels), twin(first))
        for name, buffer in running(twin).items():
            assert_close(running(layer)[f"norm.{name}"], buffer)
        assert layer(first, (labels + 1) % CLASSES).sub(twin(first)).abs().max() > 0.1


def test_conditional_layer_begins_as_plain_batch_norm() -> None:
    layer = ConditionalBatchNorm(nn.BatchNorm1d(CHANNELS, affine=False), CLASSES)
    z = torch.randn(16, CHANNELS)
    assert_equal(layer(z, torch.arange(16) % CLASSES), nn.BatchNorm1d(CHANNELS)(z))


def test_statistics_are_of_the_whole_batch_whatever_its_classes() -> None:
    layer, z = conditional((16, CHANNELS)), torch.randn(16, CHANNELS, dtype=torch.float64)
    layer(z, torch.arange(16) % CLASSES)
    ((name, norm),) = batch_norm_layers(layer)
    assert name == "norm"
    mean, var = batch_statistics(z)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert_close(norm.running_mean, 0.1 * mean)
    assert_close(norm.running_var, 0.9 + 0.1 * var * 16 / 15)


@pytest.mark.parametrize("ours", [False, True])
def test_conditional_layer_is_synchronized_within(ours: bool) -> None:
    layer, z = conditional((16, CHANNELS), ours=ours), torch.randn(16, CHANNELS, dtype=torch.float64)
    labels = torch.arange(16) % CLASSES
    expected = layer(z, labels)
    synchronize(layer, torch.device("cpu"))
    assert isinstance(layer.norm, ReferenceBatchNorm)
    assert layer.norm.synchronized
    assert_close(layer(z, labels), expected)


def test_conditional_layer_gives_half_precision_back_in_half_precision() -> None:
    layer = conditional((16, CHANNELS)).float()
    z = torch.randn(16, CHANNELS, dtype=torch.bfloat16)
    found = layer(z, torch.arange(16) % CLASSES)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(z.float(), torch.arange(16) % CLASSES), rtol=0, atol=0.05)
