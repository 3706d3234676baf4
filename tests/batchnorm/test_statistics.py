"""Which statistics normalize: frozen, recorded, precise, and those of evaluation."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bngan.batchnorm.layers import (
    GhostBatchNorm,
    ReferenceBatchNorm,
    batch_norm_layers,
    batch_statistics,
    running_statistics,
    synchronize,
)
from bngan.batchnorm.statistics import (
    EVAL_STATISTICS,
    AlsoRunning,
    EvalStatistics,
    evaluation_statistics,
    frozen_statistics,
    recorded_statistics,
    set_precise_statistics,
)

CHANNELS = 5
SHAPES = [pytest.param((16, CHANNELS), id="1d"), pytest.param((8, CHANNELS, 3, 4), id="2d")]

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def apart(a: Tensor, b: Tensor, by: float = 1e-3) -> bool:
    return bool((a - b).abs().max() > by)


def batches(shape: tuple[int, ...], count: int = 4) -> list[Tensor]:
    """Batches whose means and spreads differ, so that pooling them is not the same as averaging them."""
    return [(1 + number) * torch.randn(shape, dtype=torch.float64) + 2 * number for number in range(count)]


def layer_for(shape: tuple[int, ...], momentum: float | None = 0.1) -> nn.BatchNorm1d | nn.BatchNorm2d:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    return kind(CHANNELS, momentum=momentum).double()


def network(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(8, CHANNELS),
        ReferenceBatchNorm(CHANNELS),
    ).double()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def flags(module: nn.Module) -> dict[str, tuple[bool, object]]:
    return {name: (part.training, getattr(part, "track_running_stats", None)) for name, part in module.named_modules()}


def assert_untouched(module: nn.Module, before: tuple[dict[str, Tensor], dict[str, tuple[bool, object]]]) -> None:
    for name, value in before[0].items():
        assert torch.equal(module.state_dict()[name], value), name
    assert flags(module) == before[1]
    assert not any(part._forward_pre_hooks for part in module.modules())


def running(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


# Frozen ---------------------------------------------------------------------------------------------------------------


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


# Recorded -------------------------------------------------------------------------------------------------------------


def test_recorded_statistics_are_those_of_every_batch_of_every_layer() -> None:
    net = network()
    inputs = [torch.randn(16, 6, dtype=torch.float64) * scale for scale in (1, 5)]
    with recorded_statistics(net) as seen:
        for x in inputs:
            net(x)
    net(inputs[0])
    assert {name: len(statistics) for name, statistics in seen.items()} == {"1": 2, "5": 2}
    for x, statistics in zip(inputs, seen["1"], strict=True):
        hidden = net[0](x)
        assert_close(statistics.mean, hidden.mean(dim=0))
        assert_close(statistics.var, hidden.var(dim=0, correction=0))
        assert not statistics.mean.requires_grad
    assert (seen["1"][1].var > seen["1"][0].var).all()


def test_recorded_running_statistics_are_those_just_before_each_batch() -> None:
    layer = layer_for((16, CHANNELS), momentum=0.5)
    net, before = nn.Sequential(layer), []
    with recorded_statistics(net) as seen:
        for batch in batches((16, CHANNELS)):
            before.append([buffer.clone() for buffer in running_statistics(layer)])
            net(batch)
    for statistics, (mean, var) in zip(seen["0"], before, strict=True):
        assert_equal(statistics.running_mean, mean)
        assert_equal(statistics.running_var, var)
    assert apart(before[0][0], before[1][0])


def test_recorded_statistics_are_of_all_ranks_together_where_they_are_normalized_so(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = torch.randn(2, 8, CHANNELS, dtype=torch.float64) * 2
    mean, var = batch_statistics(torch.cat([here, there]))
    others = iter([there.mean(dim=0), (there - mean).square().mean(dim=0)])
    monkeypatch.setattr("bngan.batchnorm.layers.mean_over_ranks", lambda own: (own + next(others)) / 2)
    monkeypatch.setattr("bngan.batchnorm.statistics.world_size", lambda: 2)
    layer = ReferenceBatchNorm(CHANNELS, synchronized=True).double()
    net = nn.Sequential(layer)
    with recorded_statistics(net) as together:
        for hook in layer._forward_pre_hooks.values():
            hook(layer, (here,))
    assert_close(together["0"][0].mean, mean)
    assert_close(together["0"][0].var, var)
    assert together["0"][0].count == 16
    with evaluation_statistics(net, "batch"), recorded_statistics(net) as alone:
        net(here)
    assert_close(alone["0"][0].mean, here.mean(dim=0))
    assert alone["0"][0].count == 8


def test_recording_ends_with_an_exception() -> None:
    net, recordings = network(), []
    x = torch.randn(16, 6, dtype=torch.float64)

    def fail_inside() -> None:
        with recorded_statistics(net) as seen:
            recordings.append(seen)
            net(x)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    net(x)
    assert [len(statistics) for statistics in recordings[0].values()] == [1, 1]


def test_recording_passes_over_batches_in_evaluation_mode() -> None:
    layer = nn.BatchNorm1d(3)
    batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with recorded_statistics(nn.Sequential(layer)) as seen:
        layer(batch)
        layer.eval()
        layer(batch + 5)
    (statistics,) = seen["0"]
    torch.testing.assert_close(statistics.mean, batch.mean(dim=0))


def test_recorded_statistics_of_ghost_norm_are_those_of_its_groups() -> None:
    layer = GhostBatchNorm(CHANNELS, groups=4).double()
    z = torch.randn(16, CHANNELS, dtype=torch.float64)
    with recorded_statistics(nn.Sequential(layer)) as seen:
        layer(z)
    assert [group.count for group in seen["0"]] == [4] * 4
    for number, group in enumerate(seen["0"]):
        assert_close(group.mean, z[number::4].mean(dim=0))
        assert_close(group.var, z[number::4].var(dim=0, correction=0))
    assert apart(seen["0"][0].mean, z.mean(dim=0))


def test_recorded_groups_are_those_that_this_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = GhostBatchNorm(CHANNELS, groups=4).double()
    layer.synchronized = True
    monkeypatch.setattr("bngan.batchnorm.layers.world_size", lambda: 2)
    z = torch.randn(8, CHANNELS, dtype=torch.float64)
    with recorded_statistics(nn.Sequential(layer)) as seen:
        layer(z)
    assert [group.count for group in seen["0"]] == [4, 4]
    assert_close(seen["0"][0].mean, z[::2].mean(dim=0))
    assert_close(seen["0"][1].mean, z[1::2].mean(dim=0))


# Precise --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_precise_statistics_pool_the_batches(shape: tuple[int, ...]) -> None:
    layer, given = layer_for(shape), batches(shape)
    set_precise_statistics(layer, given)
    mean, var = running_statistics(layer)

    means, variances = (torch.stack(values) for values in zip(*map(batch_statistics, given), strict=True))
    count = len(given) * given[0].numel() // CHANNELS
    spread_of_means = (means - means.mean(dim=0)).square().mean(dim=0)
    assert_close(mean, means.mean(dim=0))
    assert_close(var, (variances.mean(dim=0) + spread_of_means) * count / (count - 1))

    together_mean, together_var = batch_statistics(torch.cat(given))
    assert_close(mean, together_mean)
    assert_close(var, together_var * count / (count - 1))
    for wrong in (variances.mean(dim=0), together_var, variances.mean(dim=0) * count / (count - 1)):
        assert apart(var, wrong)


@pytest.mark.parametrize("momentum", [0.01, 0.1, 1.0, None])
def test_precise_statistics_ignore_momentum_and_what_was_there(momentum: float | None) -> None:
    shape = (16, CHANNELS)
    given = batches(shape)
    layer, plain = layer_for(shape, momentum), layer_for(shape)
    for buffer in running_statistics(layer):
        buffer.fill_(7.0)
    set_precise_statistics(layer, given)
    set_precise_statistics(plain, given)
    for found, expected in zip(running_statistics(layer), running_statistics(plain), strict=True):
        assert_close(found, expected)
    for batch in given:
        layer(batch)
    assert apart(running_statistics(layer)[0], running_statistics(plain)[0]) == (momentum is not None)


def test_precise_statistics_are_of_what_training_gives_each_layer() -> None:
    net, given = network(), batches((16, 6))
    net.eval()
    in_evaluation = torch.cat([net[:5](batch) for batch in given])
    net.train()
    in_training = torch.cat([net[:5](batch) for batch in given])
    set_precise_statistics(net, given)
    mean, var = running_statistics(dict(batch_norm_layers(net))["5"])
    assert_close(mean, in_training.mean(dim=0))
    assert_close(var, in_training.var(dim=0))
    assert apart(mean, in_evaluation.mean(dim=0))


def test_precise_statistics_leave_all_but_the_running_statistics() -> None:
    net, given = network(), batches((16, 6))
    net(given[0])
    net.eval()
    net[1].train()
    before, modes = state(net), flags(net)
    set_precise_statistics(net, given)
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value) == (name.split(".")[-1] not in ("running_mean", "running_var")), name
    assert flags(net) == modes
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_precise_statistics_of_no_batches_are_refused_and_nothing_changes() -> None:
    net = network()
    net(batches((16, 6))[0])
    before = state(net), flags(net)
    with pytest.raises(ValueError, match="at least one batch"):
        set_precise_statistics(net, [])
    with pytest.raises(ValueError, match="at least one batch"), evaluation_statistics(net, "precise", []):
        pass
    assert_untouched(net, before)
    set_precise_statistics(nn.Linear(2, 2), [])


@pytest.mark.parametrize("groups", [1, 4])
def test_precise_statistics_of_ghost_norm_pool_all_rows(groups: int) -> None:
    layer, given = GhostBatchNorm(CHANNELS, groups=groups).double(), batches((16, CHANNELS))
    set_precise_statistics(nn.Sequential(layer), given)
    assert_close(layer.running_mean, torch.cat(given).mean(dim=0))
    assert_close(layer.running_var, torch.cat(given).var(dim=0))


# In evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", EVAL_STATISTICS)
def test_evaluation_normalizes_by_what_the_name_of_its_statistics_says(statistics: EvalStatistics) -> None:
    net, given = network(), batches((16, 6))
    for batch in given:
        net(batch)
    x = torch.randn(16, 6, dtype=torch.float64)
    expected: dict[EvalStatistics, Tensor] = {}
    twin = pickle.loads(pickle.dumps(net))
    expected["batch"] = twin.train()(x)
    twin = pickle.loads(pickle.dumps(net)).eval()
    expected["running"] = twin(x)
    set_precise_statistics(twin, given)
    expected["precise"] = twin(x)
    with evaluation_statistics(net, statistics, given):
        found = net(x)
    assert not found.requires_grad
    for name, value in expected.items():
        assert apart(found, value) == (name != statistics), name
    assert_close(found, expected[statistics])


@pytest.mark.parametrize("statistics", EVAL_STATISTICS)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_of_an_evaluation_stays_behind(statistics: EvalStatistics, fails: bool, gradients: bool) -> None:
    net, given = network(dropout=0.5), batches((16, 6))
    net(given[0])
    net[0].eval()
    net[5].eval()
    before = state(net), flags(net)

    def evaluate() -> None:
        with evaluation_statistics(net, statistics, given):
            net(given[1])
            assert not torch.is_grad_enabled()
            assert flags(net) != before[1]
            if fails:
                raise KeyError("inside")

    with torch.set_grad_enabled(gradients):
        if fails:
            with pytest.raises(KeyError, match="inside"):
                evaluate()
        else:
            evaluate()
        assert torch.is_grad_enabled() == gradients
    assert_untouched(net, before)


@pytest.mark.parametrize("statistics", EVAL_STATISTICS)
def test_dropout_is_off_whatever_normalizes(statistics: EvalStatistics) -> None:
    dropping, plain, given = network(dropout=0.5), network(), batches((16, 6))
    plain.load_state_dict(dropping.state_dict())
    x = torch.randn(16, 6, dtype=torch.float64)
    assert apart(dropping(x), dropping(x))
    plain.load_state_dict(dropping.state_dict())
    with evaluation_statistics(dropping, statistics, given), evaluation_statistics(plain, statistics, given):
        assert_close(dropping(x), plain(x))


@pytest.mark.parametrize("statistics", EVAL_STATISTICS)
def test_evaluation_waits_for_no_other_rank(statistics: EvalStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    net, given = synchronize(network(), torch.device("cpu")), batches((16, 6))

    def wait(own: Tensor) -> Tensor:
        raise TimeoutError("for the other ranks")

    monkeypatch.setattr("bngan.batchnorm.layers.mean_over_ranks", wait)
    with evaluation_statistics(net, statistics, given):
        net(given[0])
    with pytest.raises(TimeoutError):
        net(given[0])


# Of another momentum --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.01, 0.3, 1.0])
def test_statistics_of_another_momentum_are_those_of_a_network_that_has_it(momentum: float) -> None:
    torch.manual_seed(0)
    one = network()
    other, plain = copy.deepcopy(one), copy.deepcopy(one)
    for _, layer in batch_norm_layers(other):
        layer.momentum = momentum
    also = AlsoRunning(one, momentum)
    follow = also.following(one)
    for batch in torch.randn(5, 16, 6, dtype=torch.float64) * 3 + 1:
        assert_equal(follow(batch), plain(batch))
        other(batch)
    before, images = state(one), torch.randn(4, 6, dtype=torch.float64)
    assert_equal(before, state(plain))
    with also.within(one):
        assert_close(one.eval()(images), other.eval()(images))
    assert_equal(state(one), before)
    assert apart(one(images), other(images))
