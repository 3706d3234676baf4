"""Statistics that samples are normalized by, the average of G's weights, and what D sees of a batch."""

import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bngan import GAN
from bngan.batchnorm import (
    BATCHINGS,
    SAMPLINGS,
    Batching,
    ReferenceBatchNorm,
    Sampling,
    batch_dependence,
    batch_norm_layers,
    batch_statistics,
    recalibrate,
    running_statistics,
    sampling_statistics,
    shift_blindness,
)
from bngan.callbacks import BatchNormStatistics
from bngan.cli import main
from bngan.gan import EMA_BUFFERS, EmaBuffers, Weights
from bngan.sampling import load_gan, to_uint8
from tests.conftest import QUICK, only_run
from tests.test_gan import images, tiny, trainer

CHANNELS = 5
WEIGHTS: tuple[Weights, ...] = ("raw", "average")
SHAPES = [pytest.param((16, CHANNELS), id="1d"), pytest.param((8, CHANNELS, 3, 4), id="2d")]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def assert_close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


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


# Recalibration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_recalibration_pools_the_batches(shape: tuple[int, ...]) -> None:
    layer, given = layer_for(shape), batches(shape)
    recalibrate(layer, given)
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
def test_recalibration_ignores_momentum_and_what_was_there(momentum: float | None) -> None:
    shape = (16, CHANNELS)
    given = batches(shape)
    layer, plain = layer_for(shape, momentum), layer_for(shape)
    for buffer in running_statistics(layer):
        buffer.fill_(7.0)
    recalibrate(layer, given)
    recalibrate(plain, given)
    for found, expected in zip(running_statistics(layer), running_statistics(plain), strict=True):
        assert_close(found, expected)
    for batch in given:
        layer(batch)
    assert apart(running_statistics(layer)[0], running_statistics(plain)[0]) == (momentum is not None)


def test_recalibration_gives_each_layer_what_training_gives_it() -> None:
    net, given = network(), batches((16, 6))
    net.eval()
    in_evaluation = torch.cat([net[:5](batch) for batch in given])
    net.train()
    in_training = torch.cat([net[:5](batch) for batch in given])
    recalibrate(net, given)
    mean, var = running_statistics(dict(batch_norm_layers(net))["5"])
    assert_close(mean, in_training.mean(dim=0))
    assert_close(var, in_training.var(dim=0))
    assert apart(mean, in_evaluation.mean(dim=0))


def test_recalibration_leaves_all_but_the_running_statistics() -> None:
    net, given = network(), batches((16, 6))
    net(given[0])
    net.eval()
    net[1].train()
    before, modes = state(net), flags(net)
    recalibrate(net, given)
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value) == (name.split(".")[-1] not in ("running_mean", "running_var")), name
    assert flags(net) == modes
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_recalibration_refuses_no_batches_and_changes_nothing() -> None:
    net = network()
    net(batches((16, 6))[0])
    before = state(net), flags(net)
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(net, [])
    with pytest.raises(ValueError, match="at least one batch"), sampling_statistics(net, "precise", []):
        pass
    assert_untouched(net, before)
    recalibrate(nn.Linear(2, 2), [])


# Sampling by policy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampling_normalizes_by_what_its_name_says(sampling: Sampling) -> None:
    net, given = network(), batches((16, 6))
    for batch in given:
        net(batch)
    x = torch.randn(16, 6, dtype=torch.float64)
    expected: dict[Sampling, Tensor] = {}
    twin = pickle.loads(pickle.dumps(net))
    expected["batch"] = twin.train()(x)
    twin = pickle.loads(pickle.dumps(net)).eval()
    expected["running"] = twin(x)
    recalibrate(twin, given)
    expected["precise"] = twin(x)
    with sampling_statistics(net, sampling, given):
        found = net(x)
    assert not found.requires_grad
    for name, value in expected.items():
        assert apart(found, value) == (name != sampling), name
    assert_close(found, expected[sampling])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_of_the_sampling_stays_behind(sampling: Sampling, fails: bool, gradients: bool) -> None:
    net, given = network(dropout=0.5), batches((16, 6))
    net(given[0])
    net[0].eval()
    net[5].eval()
    before = state(net), flags(net)

    def sample() -> None:
        with sampling_statistics(net, sampling, given):
            net(given[1])
            assert not torch.is_grad_enabled()
            assert flags(net) != before[1]
            if fails:
                raise KeyError("inside")

    with torch.set_grad_enabled(gradients):
        if fails:
            with pytest.raises(KeyError, match="inside"):
                sample()
        else:
            sample()
        assert torch.is_grad_enabled() == gradients
    assert_untouched(net, before)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_dropout_is_off_however_samples_are_normalized(sampling: Sampling) -> None:
    dropping, plain, given = network(dropout=0.5), network(), batches((16, 6))
    plain.load_state_dict(dropping.state_dict())
    x = torch.randn(16, 6, dtype=torch.float64)
    assert apart(dropping(x), dropping(x))
    plain.load_state_dict(dropping.state_dict())
    with sampling_statistics(dropping, sampling, given), sampling_statistics(plain, sampling, given):
        assert_close(dropping(x), plain(x))


# Samples of a GAN -----------------------------------------------------------------------------------------------------


def trained(folder: Path, iterations: int = 20, **settings: Any) -> GAN:
    gan = tiny(**{"g_lr": 0.05, "ema_decay": 0.9, **settings})
    trainer(folder, max_steps=iterations).fit(gan, images())
    return gan


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> GAN:
    return trained(tmp_path_factory.mktemp("gan"))


def drawn(gan: GAN, weights: Weights | None, sampling: Sampling | None, chunk: int = 40, start: int = 3) -> Tensor:
    stop = start + 40
    with gan.sampler(weights, sampling, batch_size=16) as sampler:
        return torch.cat([sampler.samples(first, min(first + chunk, stop)) for first in range(start, stop, chunk)])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_samples_are_the_same_however_they_are_cut_up(gan: GAN, weights: Weights, sampling: Sampling) -> None:
    whole = drawn(gan, weights, sampling, chunk=64)
    assert whole.shape == (40, 1, 4, 4)
    for chunk in (1, 7):
        assert_close(drawn(gan, weights, sampling, chunk), whole, atol=1e-5)
    shifted = drawn(gan, weights, sampling, start=10)
    assert_close(shifted[:33], whole[7:], atol=1e-5)
    assert apart(shifted[:33], whole[:33])


def test_samples_differ_by_weights_and_by_statistics(gan: GAN) -> None:
    kinds = [drawn(gan, weights, sampling) for weights in WEIGHTS for sampling in SAMPLINGS]
    for number, first in enumerate(kinds):
        for second in kinds[number + 1 :]:
            assert apart(first, second)


def test_sampling_leaves_the_gan_as_it_was(gan: GAN) -> None:
    before = state(gan), flags(gan)
    for weights in WEIGHTS:
        for sampling in SAMPLINGS:
            drawn(gan, weights, sampling)
    assert_untouched(gan, before)


def test_unset_weights_and_sampling_are_the_average_and_the_runs_policy(gan: GAN, tmp_path: Path) -> None:
    assert torch.equal(drawn(gan, None, None), drawn(gan, "average", "running"))
    precise = trained(tmp_path, ema_decay=0.0, sampling="precise")
    assert torch.equal(drawn(precise, None, None), drawn(precise, "raw", "precise"))
    assert apart(drawn(precise, None, None), drawn(precise, "raw", "running"))


def test_average_that_is_not_kept_cannot_be_sampled() -> None:
    without = tiny(ema_decay=0.0)
    with pytest.raises(ValueError, match=r"no average.*ema_decay is 0.*raw"), without.sampler("average"):
        pass
    with tiny().sampler("average") as sampler:
        assert sampler.samples(0, 2).shape == (2, 1, 4, 4)


def test_recalibrated_average_is_sampled_by_precise_statistics(tmp_path: Path) -> None:
    recalibrated = trained(tmp_path, ema_buffers="recalibrate")
    copied = trained(tmp_path, ema_buffers="copy")
    assert torch.equal(drawn(recalibrated, "average", None), drawn(recalibrated, "average", "precise"))
    assert_close(drawn(recalibrated, "average", None), drawn(copied, "average", "precise"), atol=1e-6)
    assert apart(drawn(recalibrated, "average", None), drawn(copied, "average", None))
    assert_close(drawn(recalibrated, "average", "running"), drawn(copied, "average", "running"), atol=1e-6)
    assert apart(drawn(recalibrated, "raw", "running"), drawn(recalibrated, "raw", "precise"))


# The average of G's weights -------------------------------------------------------------------------------------------


class Weighed(Callback):
    """Keeps G's weights and buffers as they are after each iteration."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: GAN, *_: object) -> None:
        self.states.append(state(pl_module.generator))


def averaged(states: list[dict[str, Tensor]], name: str, decay_at: Callable[[int], float]) -> Tensor:
    average = states[0][name].double()
    for iteration, values in enumerate(states[1:], start=2):
        decay = decay_at(iteration)
        average = decay * average + (1 - decay) * values[name].double()
    return average


def average_of(gan: GAN) -> AveragedModel:
    assert gan.average is not None
    return gan.average


@pytest.mark.parametrize("buffers", EMA_BUFFERS)
def test_average_follows_its_rule(buffers: EmaBuffers, tmp_path: Path) -> None:
    seen, gan = Weighed(), tiny(g_lr=0.05, ema_decay=0.6, ema_buffers=buffers)
    trainer(tmp_path, seen, max_steps=18).fit(gan, images())
    kept = average_of(gan).module.state_dict()
    assert len(seen.states) == 18
    assert kept.keys() == gan.generator.state_dict().keys()
    for name, value in kept.items():
        raw = gan.generator.state_dict()[name]
        if name.endswith("num_batches_tracked") or ("running" in name and buffers != "average"):
            assert torch.equal(value, raw), name
            continue
        # Up to the 15th iteration the warm-up rules, after it ema_decay.
        expected = averaged(seen.states, name, lambda i: min(0.6, 1 - 10 / (i + 10)))
        assert_close(value.double(), expected, atol=1e-5)
        assert apart(value, raw, by=1e-4), name
    others: tuple[Callable[[int], float], ...] = (
        lambda _: 0.6,
        lambda i: 1 - 10 / (i + 10),
        lambda i: min(0.6, 1 - 10 / (i + 9)),
    )
    for wrong in others:
        assert apart(kept["net.3.weight"].double(), averaged(seen.states, "net.3.weight", wrong), by=1e-4)


def test_first_update_copies(tmp_path: Path) -> None:
    gan = trained(tmp_path, iterations=1, ema_decay=0.999)
    for name, value in average_of(gan).module.state_dict().items():
        assert torch.equal(value, gan.generator.state_dict()[name]), name
    again = trained(tmp_path, iterations=2, ema_decay=0.999)
    assert apart(average_of(again).module.state_dict()["net.0.weight"], again.generator.state_dict()["net.0.weight"], by=1e-4)


def test_average_gets_no_gradients_and_is_in_no_optimizer(tmp_path: Path) -> None:
    gan = tiny()
    run = trainer(tmp_path, max_steps=3)
    run.fit(gan, images())
    trained_ones = {id(p) for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]}
    for parameter in average_of(gan).parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert id(parameter) not in trained_ones
    players = [*gan.generator.parameters(), *gan.discriminator.parameters()]
    assert {id(parameter) for parameter in players} == trained_ones


@pytest.mark.parametrize("settings", [{"ema_decay": 0.0}, *({"ema_buffers": kind} for kind in EMA_BUFFERS)])
def test_average_changes_nothing_in_training(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, other = trained(tmp_path, 5), trained(tmp_path, 5, **settings)
    for name, value in plain.generator.state_dict().items():
        assert torch.equal(other.generator.state_dict()[name], value), name


def saved(gan: GAN, folder: Path, iterations: int = 20) -> Path:
    run = trainer(folder, max_steps=iterations)
    run.fit(gan, images())
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def test_raw_and_averaged_weights_are_kept_and_come_back(tmp_path: Path) -> None:
    gan = tiny(g_lr=0.05, ema_decay=0.9)
    path = saved(gan, tmp_path)
    stored = torch.load(path, weights_only=True)["state_dict"]
    again = load_gan(path)
    for name in gan.generator.state_dict():
        assert f"generator.{name}" in stored
        assert f"average.module.{name}" in stored
    assert apart(stored["generator.net.0.weight"], stored["average.module.net.0.weight"])
    assert again.state_dict().keys() == gan.state_dict().keys()
    for name, value in gan.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for weights in WEIGHTS:
        assert torch.equal(drawn(again, weights, None), drawn(gan, weights, None))


def test_training_goes_on_with_the_average_it_had(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"g_lr": 0.05, "ema_decay": 0.9}
    whole, resumed = tiny(**settings), tiny(**settings)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="seven", every_n_train_steps=7, save_top_k=1)
    trainer(tmp_path, saver, max_steps=12).fit(whole, images())
    trainer(tmp_path, max_steps=12).fit(resumed, images(), ckpt_path=tmp_path / "seven.ckpt")
    stored = torch.load(tmp_path / "seven.ckpt", weights_only=True)["state_dict"]
    assert int(stored["iteration"]) == 7
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert apart(stored["average.module.net.0.weight"], average_of(whole).module.state_dict()["net.0.weight"])


def test_command_samples_the_weights_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gan = tiny(g_lr=0.05, ema_decay=0.9)
    path = saved(gan, tmp_path)
    monkeypatch.chdir(tmp_path)

    def sampled(*arguments: str) -> np.ndarray:
        assert main(["sample", str(path), "--num=20", "--output=a.npz", *arguments]) == 0
        return np.load("a.npz")["images"].astype(int)

    found = {weights: sampled(f"--weights={weights}") for weights in WEIGHTS}
    assert np.abs(found["raw"] - found["average"]).max() > 10
    assert np.array_equal(sampled(), found["average"])
    for weights in WEIGHTS:
        with gan.sampler(weights) as sampler:
            expected = to_uint8(sampler.samples(0, 20)).numpy().astype(int)
        assert np.abs(found[weights] - expected).max() <= 1
    by_statistics = [sampled(f"--sampling={sampling}") for sampling in SAMPLINGS]
    assert np.array_equal(by_statistics[0], found["average"])
    assert np.abs(by_statistics[0] - by_statistics[1]).max() > 1
    assert np.abs(by_statistics[1] - by_statistics[2]).max() > 1


def test_decay_of_zero_keeps_no_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gan = tiny(ema_decay=0.0)
    path = saved(gan, tmp_path, iterations=3)
    assert gan.average is None
    assert not [name for name in torch.load(path, weights_only=True)["state_dict"] if name.startswith("average.")]
    for weights, status in (("raw", 0), ("average", 2)):
        assert main(["sample", str(path), "--num=2", f"--weights={weights}", f"--output={tmp_path / 'a.npz'}"]) == status
    answer = capsys.readouterr().err
    assert "ema_decay" in answer
    assert "Traceback" not in answer


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.0}, {"ema_buffers": "copy"}, {"network": "conv"}])
def test_gan_can_be_sent_to_another_process(settings: dict[str, Any], tmp_path: Path) -> None:
    gan = tiny(**{"image_shape": (1, 16, 16) if "network" in settings else (1, 4, 4), **settings})
    again = pickle.loads(pickle.dumps(gan))
    for name, value in gan.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    if "network" not in settings:
        for one in (gan, again):
            trainer(tmp_path, max_steps=3).fit(one, images())
        for name, value in gan.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        pickle.dumps(gan)


# What D sees ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch_of_each() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    real = torch.rand(80, 1, 4, 4, generator=generator) * 2 - 1
    return real, torch.rand(160, 1, 4, 4, generator=generator) - 0.5


def test_discriminator_without_batch_norm_sees_each_image_alone(batch_of_each: tuple[Tensor, Tensor]) -> None:
    for norm in ("none", "layer"):
        gan = tiny(d_norm=norm)
        joint, separate = (shift_blindness(gan.logits, *batch_of_each, batching) for batching in BATCHINGS)
        assert_close(joint, separate, atol=1e-5)
        assert joint < 0.9
        for batching in BATCHINGS:
            assert float(batch_dependence(gan.logits, *batch_of_each, batching)) < 1e-6


@pytest.mark.parametrize("norm", ["batch", "reference"])
def test_separate_batches_blind_a_batch_normalized_discriminator(norm: str, batch_of_each: tuple[Tensor, Tensor]) -> None:
    gan = tiny(d_norm=norm)
    assert shift_blindness(gan.logits, *batch_of_each, "separate") > 0.99
    assert shift_blindness(gan.logits, *batch_of_each, "joint") < 0.9
    for batching in BATCHINGS:
        assert 0.01 < batch_dependence(gan.logits, *batch_of_each, batching) < 1


@pytest.mark.parametrize("batching", BATCHINGS)
def test_shift_blindness_has_its_closed_form(batching: Batching) -> None:
    real, fake = torch.full((10, 1, 2, 2), 0.5), torch.full((10, 1, 2, 2), -0.25)

    def brightness(x: Tensor) -> Tensor:
        return 3 * x.flatten(start_dim=1).mean(dim=1, keepdim=True)

    spread = torch.cat([brightness(real), brightness(fake)]).std()
    moves = 3 * torch.tensor([0.5 * 0.25, 0.5 * 0.25, 0.5, 0.5]) / spread
    assert_close(shift_blindness(brightness, real, fake, batching), 1 / (1 + moves.mean()), atol=1e-6)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_batch_dependence_is_one_where_the_company_is_all_that_matters(
    batching: Batching, batch_of_each: tuple[Tensor, Tensor]
) -> None:
    def only_company(x: Tensor) -> Tensor:
        return x.mean().expand(len(x), 1)

    def only_itself(x: Tensor) -> Tensor:
        return x.flatten(start_dim=1).mean(dim=1, keepdim=True)

    def both(x: Tensor) -> Tensor:
        return only_itself(x) + only_company(x)

    def neither(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 1)

    alone, mixed, company = (
        float(batch_dependence(logits, *batch_of_each, batching)) for logits in (only_itself, both, only_company)
    )
    assert company == pytest.approx(1, abs=1e-3)
    assert alone < 1e-6
    assert 0.01 < mixed < 0.9
    assert float(batch_dependence(neither, *batch_of_each, batching)) == 0
    blindness = [float(shift_blindness(logits, *batch_of_each, batching)) for logits in (neither, only_itself)]
    assert blindness[0] == pytest.approx(1)
    assert blindness[1] < 0.9


@pytest.mark.parametrize(("real", "fake"), [(4, 20), (0, 20), (20, 3), (20, 0)])
def test_too_few_images_for_batch_mates_are_refused(real: int, fake: int) -> None:
    with pytest.raises(ValueError, match="at least 5 real images and 4 fakes"):
        batch_dependence(tiny().logits, torch.zeros(real, 1, 4, 4), torch.zeros(fake, 1, 4, 4), "joint")
    assert batch_dependence(tiny().logits, torch.randn(5, 1, 4, 4), torch.randn(8, 1, 4, 4), "joint").isfinite()


TAGS = [f"bn/{probe}{kind}" for probe in ("d_shift_blindness", "d_batch_dependence") for kind in ("", "/joint", "/separate")]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_callback_logs_the_runs_own_batching_and_both(batching: Batching, tmp_path: Path) -> None:
    trained_alike = []
    for callbacks in ((BatchNormStatistics(),), ()):
        gan = tiny(batching=batching)
        logger = CSVLogger(tmp_path, name=str(len(callbacks)), version="")
        trainer(tmp_path, *callbacks, max_steps=20, logger=logger).fit(gan, images(), images(batch_size=64, batches=2))
        trained_alike.append(state(gan))
    for name, value in trained_alike[0].items():
        assert torch.equal(trained_alike[1][name], value), name
    header, *rows = (line.split(",") for line in (tmp_path / "1" / "metrics.csv").read_text().splitlines())
    logged = {tag: [float(row[header.index(tag)]) for row in rows if row[header.index(tag)]] for tag in TAGS}
    for tag, values in logged.items():
        assert len(values) == 1, tag
    for probe in ("bn/d_shift_blindness", "bn/d_batch_dependence"):
        other = "separate" if batching == "joint" else "joint"
        assert logged[probe] == logged[f"{probe}/{batching}"] != logged[f"{probe}/{other}"]
    assert logged["bn/d_shift_blindness/separate"][0] > 0.99 > logged["bn/d_shift_blindness/joint"][0]
    assert not set(TAGS) & set((tmp_path / "0" / "metrics.csv").read_text().splitlines()[0].split(","))


@pytest.fixture(scope="module")
def events(mnist_root: Path) -> Iterator[EventAccumulator]:
    every = ("--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=1")
    with tempfile.TemporaryDirectory() as folder:
        where = (f"--data.root={mnist_root}", f"--trainer.default_root_dir={folder}")
        assert main(["fit", *QUICK[::2], "--metrics.num_samples=0", *every, *where]) == 0
        yield EventAccumulator(str(only_run(Path(folder)))).Reload()


def test_run_plots_what_d_sees(events: EventAccumulator) -> None:
    values = {}
    for tag in TAGS:
        assert [event.step for event in events.Scalars(tag)] == [5, 10], tag
        values[tag] = [event.value for event in events.Scalars(tag)]
    for probe in ("bn/d_shift_blindness", "bn/d_batch_dependence"):
        assert values[probe] == values[f"{probe}/joint"]
        assert all(0 < value <= 1 for value in values[probe])
    assert min(values["bn/d_shift_blindness/separate"]) > 0.99 > max(values["bn/d_shift_blindness/joint"])


# Settings of batch norm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "reference"])
@pytest.mark.parametrize(("network_name", "expected"), [("mlp", (2, 2)), ("conv", (3, 2))])
def test_eps_and_momentum_reach_every_batch_norm_layer(network_name: str, expected: tuple[int, int], norm: str) -> None:
    shape = {"network": network_name, "image_shape": (1, 32, 32), "g_norm": norm, "d_norm": norm}
    gan, plain = tiny(**shape, bn_eps=3e-4, bn_momentum=0.03), tiny(**shape)
    counts = [len(list(batch_norm_layers(player))) for player in (gan.generator, gan.discriminator)]
    assert tuple(counts) == expected
    layers = [layer for _, layer in batch_norm_layers(gan)]
    assert len(layers) == 2 * counts[0] + counts[1]
    assert {(layer.eps, layer.momentum) for layer in layers} == {(3e-4, 0.03)}
    assert {(layer.eps, layer.momentum) for _, layer in batch_norm_layers(plain)} == {(1e-5, 0.1)}
