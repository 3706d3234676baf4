"""Each finding of `bngan doctor` on a GAN that has just that fault, and none on one that has not."""

import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from bngan import GAN, rng
from bngan.batchnorm.layers import BatchNorm, batch_norm_layers, batch_statistics, running_statistics
from bngan.batchnorm.statistics import evaluation_statistics, recorded_statistics, set_precise_statistics
from bngan.cli import main
from bngan.data import ImageDataModule
from bngan.doctor import diagnose, examine_layers, examine_settings, examine_training, expected_lean, pass_through
from bngan.images import to_minus1_1
from bngan.outcome import NOT_BEGUN
from bngan.settings import Settings
from tests.conftest import QUICK, REPOSITORY, only_run
from tests.small_gans import brief, examined, fakes, healthy, last_layer, names, of_two_greys, raised, settle
from tests.test_gan import images, tiny, trainer

EPS = "eps that looks like a momentum"
BIAS = "bias before batch norm"
FAR = "running statistics far from the batch's"
DEAD = "dead channels"
EXPLODING = "exploding channels"
NO_VARIANCE = "variance no larger than eps"
PENALTY = "penalty on a batch-normalized D"
BLIND = "D blind in separate batches"
LEANING = "D's running statistics lean towards fakes"
SMALL_BATCH = "batch too small for batch norm"
EMA_COPY = "EMA of G without its buffers"
EMA_FAR = "EMA of G far from its own statistics"
D_WON = "D has won"

Part = tuple[str, BatchNorm]


@pytest.fixture
def real() -> Tensor:
    return of_two_greys()


def layers(network: nn.Module) -> list[Part]:
    return list(batch_norm_layers(network))


@torch.no_grad()
def dead_channels(gan: GAN, real: Tensor, count: int = 2) -> None:
    layers(gan.generator)[0][1].bias[:count] = -100.0
    settle(gan, real)


@torch.no_grad()
def exploding_channels(gan: GAN, real: Tensor, times: float = 1e6) -> None:
    name, _ = layers(gan.discriminator)[0]
    before = gan.discriminator.get_submodule(f"net.{int(name.split('.')[1]) - 1}")
    assert isinstance(before.weight, Tensor)
    before.weight.mul_(times)
    settle(gan, real)


@torch.no_grad()
def vanishing_channels(gan: GAN, real: Tensor) -> None:
    name, _ = layers(gan.discriminator)[0]
    before = gan.discriminator.get_submodule(f"net.{int(name.split('.')[1]) - 1}")
    assert isinstance(before.weight, Tensor)
    before.weight[:4] *= 1e-4
    settle(gan, real)


@torch.no_grad()
def tampered_running_mean(gan: GAN, real: Tensor, deviations: float = 2.0) -> None:
    mean, var = running_statistics(layers(gan.generator)[-1][1])
    mean += deviations * var.sqrt()


@torch.no_grad()
def tampered_running_var(gan: GAN, real: Tensor) -> None:
    running_statistics(layers(gan.generator)[0][1])[1].mul_(0.1)


@torch.no_grad()
def tampered_ema(gan: GAN, real: Tensor) -> None:
    assert gan.generator_ema is not None
    running_statistics(layers(gan.generator_ema)[0][1])[1].mul_(0.1)


def leaning(gan: GAN, real: Tensor, fraction: float = 1.0) -> None:
    """Let D's running mean lie that fraction of the way from real images to fakes."""
    running_mean, _ = running_statistics(layers(gan.discriminator)[0][1])
    set_precise_statistics(gan.discriminator, [real])
    of_real = running_mean.clone()
    set_precise_statistics(gan.discriminator, [fakes(gan)])
    of_fakes = running_mean.clone()
    settle(gan, real)
    running_mean.copy_(torch.lerp(of_real, of_fakes, fraction))


@torch.no_grad()
def constant(gan: GAN, real: Tensor) -> None:
    last = last_layer(gan.discriminator)
    assert last.bias is not None
    last.weight.zero_()
    last.bias.zero_()


def separate_and_constant(gan: GAN, real: Tensor) -> None:
    gan.settings = replace(gan.settings, batching="separate")
    constant(gan, real)


Fault = Callable[[GAN, Tensor], None]
FAULTS: dict[str, tuple[Fault, str]] = {
    "two dead channels of 16": (dead_channels, DEAD),
    "weights of D a million times larger": (exploding_channels, EXPLODING),
    "a quarter of D's channels all but off": (vanishing_channels, NO_VARIANCE),
    "G's running mean two deviations away": (tampered_running_mean, FAR),
    "G's running variance a tenth": (tampered_running_var, FAR),
    "the EMA's running variance a tenth": (tampered_ema, EMA_FAR),
    "D constant, in separate batches": (separate_and_constant, BLIND),
}


GHOST = {"g_norm": "ghost", "d_norm": "ghost", "ghost_groups": 4}


@pytest.mark.parametrize(
    "settings", [{}, {"batching": "separate"}, {"batching": "separate", "bn_momentum": 0.9}, GHOST], ids=str
)
def test_healthy_gan_has_no_finding(settings: dict[str, Any], real: Tensor) -> None:
    assert examined(healthy(real, **settings), real) == []


def test_packs_are_examined_as_packs(real: Tensor) -> None:
    gan = tiny(network="conv", image_shape=(1, 16, 16), pack=3)
    gan.normalized_together.fill_(64)
    passed = pass_through(gan, real)  # four batches of 63, which are 21 packs
    assert len(passed.real_logits) == len(passed.fake_logits) == len(real) // 64 * 21
    assert passed.d_losses.isfinite().all()


def test_ghost_norm_is_examined_group_by_group(real: Tensor) -> None:
    gan = tiny(network="conv", image_shape=(1, 16, 16), g_norm="ghost", ghost_groups=5)
    gan.normalized_together.fill_(64)
    passed = pass_through(gan, real)  # four batches of 60, which can be cut into groups
    with evaluation_statistics(gan.generator, "batch"), recorded_statistics(gan.generator) as seen:
        gan.generate(rng.normal((60, gan.settings.latent_dim), gan.settings.seed, rng.Stream.PRECISE, 0))
    for name, groups in seen.items():
        found = passed.seen[f"generator.{name}"]
        assert (len(groups), len(found)) == (5, 20)
        for group, expected in zip(found[:5], groups, strict=True):
            torch.testing.assert_close(group.mean, expected.mean, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(group.var, expected.var, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[0].mean, found[5].mean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("batching", "sizes"), [("joint", [64] * 8), ("separate", [32] * 16)])
def test_discriminator_is_given_batches_as_training_composes_them(batching: str, sizes: list[int], real: Tensor) -> None:
    gan = tiny(image_shape=(1, 16, 16), batching=batching)
    gan.normalized_together.fill_(32)
    passed = pass_through(gan, real)
    assert [batch.count for batch in passed.seen["discriminator.net.1"]] == sizes
    assert [batch.count for batch in passed.seen["generator.net.1"]] == [32] * 8
    assert len(passed.d_losses) == 8


def test_discriminator_is_given_the_noise_that_it_trains_on(real: Tensor) -> None:
    gan = tiny(image_shape=(1, 16, 16), batching="separate")
    gan.normalized_together.fill_(64)
    before = gan.discriminator.net[0]
    for deviation in (0.0, 0.7):
        gan.discriminator.instance_noise.fill_(deviation)
        seen, *_ = pass_through(gan, real).seen["discriminator.net.1"]
        noise = gan.draw_instance_noise(2 * 64, 0)[:64]
        assert noise.std().item() == pytest.approx(deviation, rel=0.02)
        with torch.no_grad():
            mean, var = batch_statistics(before((real[:64] + noise).flatten(start_dim=1)))
        torch.testing.assert_close(seen.mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.var, var, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_nothing_else(fault: str, real: Tensor) -> None:
    spoil, name = FAULTS[fault]
    gan = healthy(real)
    spoil(gan, real)
    (finding,) = examined(gan, real)
    assert finding.name == name
    assert any(letter.isdigit() for letter in finding.evidence)
    assert finding.remedy


NEAR_FAULTS: dict[str, Fault] = {
    "one dead channel of 16": lambda gan, real: dead_channels(gan, real, count=1),
    "weights of D ten times larger": lambda gan, real: exploding_channels(gan, real, times=10.0),
    "G's running mean half a deviation away": lambda gan, real: tampered_running_mean(gan, real, deviations=0.5),
    "D's running mean that of fakes, in joint batches": leaning,
    "D constant, in joint batches": constant,
}


@pytest.mark.parametrize("fault", NEAR_FAULTS)
def test_what_comes_near_a_fault_is_no_finding(fault: str, real: Tensor) -> None:
    gan = healthy(real)
    NEAR_FAULTS[fault](gan, real)
    assert examined(gan, real) == []


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9])
def test_separate_batches_leave_the_running_mean_where_it_is_expected(momentum: float) -> None:
    layer = nn.BatchNorm1d(1, momentum=momentum).double()
    spread = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    for _ in range(200):
        layer(spread)  # real images, of mean 0
        layer(spread + 1)
    assert layer.running_mean is not None
    assert layer.running_mean.item() == pytest.approx(expected_lean(momentum), abs=1e-9)
    layer(spread)
    assert layer.running_mean.item() == pytest.approx(1 - expected_lean(momentum), abs=1e-9)


# Halfway between 0.5 and what is expected, which is 0.58 at momentum 0.5 and 0.70 at 0.9; at 0.1 nothing matters.
@pytest.mark.parametrize(
    ("momentum", "fraction", "found"),
    [(0.5, 0.5, False), (0.5, 0.7, True), (0.9, 0.6, False), (0.9, 0.8, True), (0.1, 0.8, False)],
)
def test_lean_is_told_between_real_and_fake(momentum: float, fraction: float, found: bool, real: Tensor) -> None:
    gan = healthy(real, batching="separate", bn_momentum=momentum)
    leaning(gan, real, fraction)
    findings = examined(gan, real)
    assert names(findings) == [LEANING] * found
    for finding in findings:
        assert f"(expected {expected_lean(momentum):.2f})" in finding.evidence


def test_lean_is_not_told_from_too_few_batches_or_where_fakes_are_like_real_images(real: Tensor) -> None:
    gan = healthy(real, batching="separate", bn_momentum=0.9)
    leaning(gan, real)
    assert names(examined(gan, real)) == [LEANING]
    assert LEANING not in names(examined(gan, real[: 7 * 32]))
    assert LEANING not in names(examined(gan, fakes(gan)))
    nn.init.zeros_(next(gan.discriminator.parameters()))  # D then sees the same of all images
    assert LEANING not in names(examined(gan, real))


@pytest.mark.parametrize("seeds", [[0], pytest.param(range(1, 20), marks=pytest.mark.slow)], ids=["once", "19 redraws"])
@pytest.mark.parametrize(
    "recipe",
    ["default", "literal", pytest.param("best_mlp", marks=pytest.mark.slow), pytest.param("dcgan", marks=pytest.mark.slow)],
)
def test_recipes_that_come_along_raise_no_false_alarm(
    recipe: str, seeds: Iterable[int], mnist_root: Path, tmp_path: Path
) -> None:
    # In so few iterations literal, whose D hardly sees G, has made nothing but noise.
    expected = [NOT_BEGUN] * (recipe == "literal")
    found = {seed: names(examined(*brief(recipe, seed, tmp_path, mnist_root))) for seed in seeds}
    assert found == dict.fromkeys(seeds, expected)


@pytest.mark.parametrize("seeds", [[0], pytest.param(range(1, 20), marks=pytest.mark.slow)], ids=["once", "19 redraws"])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("recipe", ["literal", pytest.param("default", marks=pytest.mark.slow)])
def test_leaning_statistics_are_found_in_training(
    recipe: str, momentum: float, seeds: Iterable[int], mnist_root: Path, tmp_path: Path
) -> None:
    for seed in seeds:
        trained = brief(recipe, seed, tmp_path, mnist_root, batching="separate", bn_momentum=momentum)
        # In so few iterations G may have made nothing but noise, which is told as well.
        assert [name for name in names(examined(*trained)) if name != NOT_BEGUN] == [LEANING], seed


# What has come of training ---------------------------------------------------------------------------------------------


OTHER_LOSSES = ("relativistic", "least_squares", "minimax")
WON: dict[str, Any] = {"instance_noise": 0.0, "d_lr": 0.02, "g_lr": 1e-6}


@pytest.mark.parametrize("loss", ["non_saturating", *(pytest.param(loss, marks=pytest.mark.slow) for loss in OTHER_LOSSES)])
def test_discriminator_that_has_won_is_found(loss: str, mnist_root: Path, tmp_path: Path) -> None:
    gan, real = brief("default", 0, tmp_path, mnist_root, iterations=60, loss=loss, **WON)
    assert names(examined(gan, real)) == [D_WON]
    (finding,) = examined(gan, real)
    assert "100.0% of pairs" in finding.evidence
    gan.discriminator.load_state_dict(tiny(**gan.hparams).discriminator.state_dict())
    assert names(examined(gan, real)) == [NOT_BEGUN]  # as G's samples are still noise, whatever D says of them


def test_signal_does_not_depend_on_the_logits_scale(real: Tensor) -> None:
    gan = healthy(real, loss="wasserstein", gradient_penalty=0.0)
    before = pass_through(gan, real)
    with torch.no_grad():
        last_layer(gan.discriminator).weight.mul_(100)
    after = pass_through(gan, real)
    assert after.real_logits.std() > 50 * before.real_logits.std()
    assert after.signal == pytest.approx(before.signal, rel=1e-3)


@pytest.mark.parametrize("iteration", [0, 5])
def test_learning_that_has_not_begun_is_named_and_not_what_follows_from_it(iteration: int, mnist_root: Path) -> None:
    gan = tiny(image_shape=(1, 28, 28), hidden_dim=32)
    gan.iteration.fill_(iteration)
    data = to_minus1_1(ImageDataModule(root=str(mnist_root)).subset(1024, train=True).images)
    for spoil in (lambda gan: None, lambda gan: tampered_running_mean(gan, data)):
        spoil(gan)
        (finding,) = examine_training(gan, data)
        assert finding.name == NOT_BEGUN
        assert f"iteration {iteration}" in finding.evidence
    assert ("an untrained G's" in finding.evidence) == (iteration > 0)


def test_evidence_names_the_layer_at_fault(real: Tensor) -> None:
    for spoil, layer in (
        (dead_channels, "net.3 2 of 16"),
        (tampered_running_mean, "net.5"),
        (tampered_running_var, "net.2"),
        (exploding_channels, "discriminator.net.3"),
        (vanishing_channels, "discriminator.net.3 in 25%"),
    ):
        gan = healthy(real)
        spoil(gan, real)
        (finding,) = examined(gan, real)
        assert layer in finding.evidence


def test_untrained_networks_are_not_blamed_for_their_variances(real: Tensor) -> None:
    gan = healthy(real)
    exploding_channels(gan, real)
    assert names([*examine_layers(gan)]) == [EXPLODING]
    gan.iteration.fill_(0)
    assert [*examine_layers(gan)] == []


@pytest.mark.parametrize(("eps", "expected"), [(0.8, [EPS]), (0.01, [EPS]), (1e-3, []), (1e-5, [])])
def test_eps_that_looks_like_a_momentum_is_found(eps: float, expected: list[str]) -> None:
    gan = tiny(network="conv", image_shape=(1, 16, 16), bn_eps=eps)
    findings = [*examine_layers(gan)]
    assert names(findings) == expected
    for finding in findings:
        assert f"{eps:g}" in finding.evidence


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2 * (8 + 16)),
        ({"d_norm": "none"}, 8 + 16),
        ({"g_norm": "reference", "d_norm": "layer"}, 8 + 16),
        ({"g_norm": "layer", "d_norm": "group"}, 0),
        ({"network": "conv", "image_shape": (1, 16, 16)}, 0),
    ],
)
def test_trained_biases_before_batch_norm_are_counted_and_frozen_ones_are_not(settings: dict[str, Any], expected: int) -> None:
    gan = tiny(**settings)
    assert [*examine_layers(gan)] == []
    gan.requires_grad_(True)  # as another's networks may be
    findings = [*examine_layers(gan)]
    assert names(findings) == [BIAS] * (expected > 0)
    for finding in findings:
        assert f"these {expected} weights" in finding.evidence
    if not settings:
        (finding,) = findings
        for name in ("generator.net.0.bias", "generator.net.3.bias", "discriminator.net.0.bias", "discriminator.net.3.bias"):
            assert name in finding.evidence


def pictures() -> Tensor:
    return torch.cat([batch for batch, _ in images()])[:256]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"bn_momentum": 1e-4}, [FAR, EMA_FAR]),
        ({"bn_momentum": 1e-4, "ema_decay": 0.0}, [FAR]),
        ({"batching": "separate"}, [BLIND, NOT_BEGUN]),
        ({"bn_eps": 0.8}, [EPS, NO_VARIANCE]),
    ],
)
def test_trained_gan_has_the_faults_of_its_settings(settings: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    gan = tiny(**settings)
    trainer(tmp_path, max_epochs=10).fit(gan, images())
    assert sorted(names(examined(gan, pictures()))) == sorted(expected)


@pytest.mark.parametrize("settings", [{}, {"batching": "separate"}, {"d_dropout": 0.5}, {"ema_decay": 0.0}, {"d_norm": "none"}])
def test_examination_changes_nothing(settings: dict[str, Any], real: Tensor) -> None:
    gan = healthy(real, **settings)
    gan.generator.eval()
    before = {name: value.clone() for name, value in gan.state_dict().items()}
    flags = [(part.training, getattr(part, "track_running_stats", None)) for part in gan.modules()]
    drawn = torch.random.get_rng_state()
    first = examined(gan, real)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert [(part.training, getattr(part, "track_running_stats", None)) for part in gan.modules()] == flags
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in gan.modules())
    for name, value in gan.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(value.grad is None for value in gan.generator.parameters())
    assert examined(gan, real) == first


# Settings -------------------------------------------------------------------------------------------------------------


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]] = {
    "none": ({}, {}, {}, []),
    "r1": ({"r1": 1.0}, {}, {}, [PENALTY]),
    "r2": ({"r2": 1.0, "d_norm": "reference"}, {}, {}, [PENALTY]),
    "r1 with ghost norm": ({"r1": 1.0, "d_norm": "ghost"}, {}, {}, [PENALTY]),
    "gradient penalty": ({"gradient_penalty": 1.0}, {}, {}, [PENALTY]),
    "wasserstein": ({"loss": "wasserstein"}, {}, {}, [PENALTY]),
    "wasserstein without its penalty": ({"loss": "wasserstein", "gradient_penalty": 0.0}, {}, {}, []),
    "r1 with layer norm": ({"r1": 1.0, "d_norm": "layer"}, {}, {}, []),
    "16 images on 4 devices, normalized together": ({}, {"batch_size": 16}, {"devices": 4}, []),
    "16 images on 4 devices": ({}, {"batch_size": 16}, {"devices": 4, "sync_batchnorm": False}, [SMALL_BATCH]),
    "16 images on 1 device": ({}, {"batch_size": 16}, {"devices": 1}, []),
    "16 images on any device": ({}, {"batch_size": 16}, {"devices": "auto"}, []),
    "64 images on 4 devices": ({}, {"batch_size": 64}, {"devices": 4, "sync_batchnorm": False}, []),
    "8 images": ({}, {"batch_size": 8}, {}, [SMALL_BATCH]),
    "128 images in 16 ghost groups": ({"g_norm": "ghost", "ghost_groups": 16}, {}, {}, [SMALL_BATCH]),
    "128 images in 8 ghost groups": ({"g_norm": "ghost", "ghost_groups": 8}, {}, {}, []),
    "128 real and 128 fake images in 16 ghost groups": ({"d_norm": "ghost", "ghost_groups": 16}, {}, {}, []),
    "128 images at a time in 16 ghost groups": (
        {"d_norm": "ghost", "ghost_groups": 16, "batching": "separate"},
        {},
        {},
        [SMALL_BATCH],
    ),
    "16 groups that no norm has": ({"ghost_groups": 16}, {}, {}, []),
    "8 images without batch norm": ({"g_norm": "group", "d_norm": "none"}, {"batch_size": 8}, {}, []),
    "8 images with batch norm in G alone": ({"d_norm": "none"}, {"batch_size": 8}, {}, [SMALL_BATCH]),
    "8 real and 8 fake images with batch norm in D alone": ({"g_norm": "none"}, {"batch_size": 8}, {}, []),
    "copied buffers": ({"ema_buffers": "copy"}, {}, {}, [EMA_COPY]),
    "precise buffers": ({"ema_buffers": "precise"}, {}, {}, []),
    "averaged buffers": ({"ema_buffers": "average"}, {}, {}, []),
    "copied buffers of no EMA": ({"ema_buffers": "copy", "ema_decay": 0.0}, {}, {}, []),
    "copied buffers without batch norm": ({"ema_buffers": "copy", "g_norm": "layer"}, {}, {}, []),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_tell_what_is_wrong(case: str, tmp_path: Path) -> None:
    model, data, training, expected = SETTINGS[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": {**model, "hidden_dim": 8}, "data": data, "trainer": training}))
    assert names(diagnose(recipe)[1]) == expected


def test_penalty_is_told_by_name_and_small_batches_by_number() -> None:
    (finding,) = examine_settings(Settings(r1=1.0, r2=0.5), together=128)
    assert "r1, r2" in finding.evidence
    (finding,) = examine_settings(Settings(), together=4)
    assert finding.evidence.startswith("4 images at a time")
    (finding,) = examine_settings(Settings(d_norm="ghost", ghost_groups=8), together=16)
    assert finding.evidence.startswith("4 images at a time")


RECIPES = sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_come_along_have_nothing_wrong(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = REPOSITORY / "configs" / name
    found, findings = diagnose(path)
    assert name in found
    assert findings == []
    assert main(["doctor", str(path)]) == 0
    assert "Nothing found." in capsys.readouterr().out


def test_command_tells_each_finding_its_evidence_and_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("model: {bn_eps: 0.8, ema_buffers: copy}\ndata: {batch_size: 8}\n")
    _, findings = diagnose(recipe)
    assert names(findings) == [SMALL_BATCH, EMA_COPY, EPS]
    assert main(["doctor", str(recipe)]) == 0
    output = capsys.readouterr().out
    for number, finding in enumerate(findings, start=1):
        assert f"{number}. {finding.name}" in output
        assert finding.evidence in output
        assert finding.remedy in output
    assert "3 findings." in output


# Runs and checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    where = (f"--data.root={mnist_root}", f"--trainer.default_root_dir={root}")
    # Slow enough that running statistics, which are behind the weights early in a run, have nothing wrong.
    slow = ("--model.g_lr=1e-3", "--model.d_lr=1e-3", "--trainer.max_steps=60")
    assert main(["fit", *QUICK[::2], *slow, "--metrics.num_samples=0", "--model.hidden_dim=32", *where]) == 0
    return only_run(root)


def test_run_is_examined_by_folder_and_by_checkpoint(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    last = run_folder / "checkpoints" / "last.ckpt"
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    by_folder, by_checkpoint = diagnose(run_folder), diagnose(last)
    assert "iteration 60, 2048 real images" in by_checkpoint[0]
    assert names(by_folder[1]) == names(by_checkpoint[1]) == []
    assert main(["doctor", str(run_folder)]) == 0
    assert by_folder[0] in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.iterdir())


def copied(run_folder: Path, to: Path, name: str, spoil: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    content = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    spoil(content)
    path = to / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


def test_best_checkpoint_is_preferred_to_the_last(run_folder: Path, tmp_path: Path) -> None:
    copied(run_folder, tmp_path, "last")
    assert "last.ckpt" in diagnose(tmp_path)[0]
    copied(run_folder, tmp_path, "best")
    assert "best.ckpt" in diagnose(tmp_path)[0]


def test_faults_of_a_checkpoint_are_found(run_folder: Path, tmp_path: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["state_dict"]["generator.net.4.running_mean"] += 5
        content["hyper_parameters"]["ema_buffers"] = "copy"
        content["state_dict"]["normalized_together"].fill_(8)

    assert sorted(names(diagnose(copied(run_folder, tmp_path, "last", spoil))[1])) == sorted([FAR, EMA_COPY, SMALL_BATCH])


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_checkpoint_of_version_0_1_is_examined(network: str, mnist_root: Path) -> None:
    examined, findings = diagnose(REPOSITORY / "tests" / "golden" / f"0.1-{network}.ckpt", mnist_root)
    assert re.search(r"iteration [1-9]\d*, 2048 real images", examined)
    assert BIAS not in names(findings)


def test_data_set_can_be_elsewhere(run_folder: Path, mnist_root: Path, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file")

    def move(content: dict[str, Any]) -> None:
        content["datamodule_hyper_parameters"]["root"] = str(tmp_path / "occupied")

    path = copied(run_folder, tmp_path, "last", move)
    assert main(["doctor", str(path)]) == 2
    assert main(["doctor", str(path), f"--root={mnist_root}"]) == 0


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of 8 x 8."""
    folder = tmp_path_factory.mktemp("shapes")
    for number, pixels in enumerate(torch.randint(256, (40, 8, 8), generator=torch.Generator().manual_seed(0)).byte()):
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("data", [{"name": "folder", "folder": "moved", "image_size": 8}, {}, {"path": "theirs"}], ids=str)
def test_pictures_can_be_elsewhere(
    data: dict[str, Any], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    gan = tiny(image_shape=(1, 8, 8))
    content = {"state_dict": gan.state_dict(), "hyper_parameters": dict(gan.hparams), "datamodule_hyper_parameters": data}
    torch.save(content, "theirs.ckpt")
    assert main(["doctor", "theirs.ckpt"]) == 2
    assert "--root" in capsys.readouterr().err
    assert main(["doctor", "theirs.ckpt", "--root=gone"]) == 2
    assert "gone; name its folder by --root" in capsys.readouterr().err
    assert main(["doctor", "theirs.ckpt", f"--root={shapes}"]) == 0
    assert "36 real images" in capsys.readouterr().out


# Mistakes -------------------------------------------------------------------------------------------------------------


class Written:
    """Unpickled by a reader that trusts it, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def an_empty_folder(folder: Path) -> Path:
    (folder / "run").mkdir()
    return folder / "run"


def a_missing_file(folder: Path) -> Path:
    return folder / "gone.ckpt"


def wrote(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def stored(name: str, content: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        torch.save(content, folder / name)
        return folder / name

    return make


FOREIGN = {"state_dict": {"weight": torch.zeros(3)}, "hyper_parameters": {"banana": 3}}
OTHER_SHAPE = {"state_dict": {"weight": torch.zeros(3)}, "hyper_parameters": {"hidden_dim": 4}}
MISTAKES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "folder without checkpoints": (an_empty_folder, ("run", "checkpoints/")),
    "missing file": (a_missing_file, ("gone.ckpt", "there is no")),
    "no run at all": (lambda _: Path("last"), ("last", "no run in runs")),
    "missing recipe": (lambda folder: folder / "gone.yaml", ("gone.yaml", "there is no")),
    "junk": (wrote("a.ckpt", b"junk"), ("a.ckpt", "damaged")),
    "empty file": (wrote("a.ckpt", b""), ("a.ckpt", "damaged")),
    "file of another kind": (wrote("a.txt", b"junk"), ("a.txt", "damaged")),
    "something else in a checkpoint": (stored("a.ckpt", {"weights": 3}), ("a.ckpt", "bngan")),
    "unknown settings in a checkpoint": (stored("a.ckpt", FOREIGN), ("a.ckpt", "banana")),
    "weights of other networks": (stored("a.ckpt", OTHER_SHAPE), ("a.ckpt", "does not fit")),
    "recipe that is no YAML": (wrote("a.yaml", b"model: [1"), ("a.yaml", "YAML", "line")),
    "empty recipe": (wrote("a.yaml", b""), ("a.yaml", "no settings")),
    "recipe with an unknown group": (wrote("a.yaml", b"modle: {g_lr: 1}"), ("modle", "model")),
    "recipe with an unknown setting": (wrote("a.yaml", b"model: {glr: 1}"), ("a.yaml", "glr")),
    "recipe with a setting's old name": (wrote("a.yaml", b"model: {noise: 1}"), ("a.yaml", "model.noise", "instance_noise")),
    "recipe with an unknown loss": (wrote("a.yaml", b"model: {loss: vanilla}"), ("vanilla", "hinge")),
    "recipe with an unknown data setting": (wrote("a.yaml", b"data: {batchsize: 3}"), ("a.yaml", "data.batchsize")),
    "recipe with an unknown Trainer setting": (wrote("a.yaml", b"trainer: {devixes: 3}"), ("a.yaml", "trainer.devixes")),
    "recipe with a word for a number": (wrote("a.yaml", b"data: {batch_size: many}"), ("batch_size", "int", "many")),
    "recipe with nothing for a number": (wrote("a.yaml", b"data: {batch_size: null}"), ("batch_size", "int")),
    "recipe with no groups": (wrote("a.yaml", b"model: {ghost_groups: 0}"), ("ghost_groups", "at least 1")),
    "recipe with no images": (wrote("a.yaml", b"data: {batch_size: 0}"), ("batch_size", "at least 1")),
    "recipe with a list for a norm": (wrote("a.yaml", b"model: {g_norm: [batch]}"), ("g_norm", "str")),
    "weights that are a number": (stored("a.ckpt", {"state_dict": 3, "hyper_parameters": {}}), ("a.ckpt", "damaged")),
    "recipe with a number out of range": (wrote("a.yaml", b"model: {ema_decay: 2}"), ("ema_decay", "[0, 1)")),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_gets_a_short_answer(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BNGAN_TRACEBACK", raising=False)
    prepare, words = MISTAKES[case]
    assert main(["doctor", str(prepare(tmp_path))]) == 2
    answer = capsys.readouterr().err
    assert answer.startswith("bngan: error: ")
    assert "Traceback" not in answer
    assert len(answer.strip().splitlines()) <= 2
    for word in words:
        assert word in answer
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("arguments", [[], ["--rot=data", "a.ckpt"]])
def test_mistyped_command_gets_a_short_answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert "bngan doctor --help" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_checkpoint_that_holds_code_is_refused_and_runs_nothing(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, written = tmp_path / "evil.ckpt", tmp_path / "written"
    content = {"state_dict": {}, "hyper_parameters": {"seed": Written(written)}}
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert main(["doctor", str(path)]) == 2
    answer = capsys.readouterr().err
    assert "evil.ckpt is damaged or not a checkpoint" in answer
    assert "Traceback" not in answer
    assert not written.exists()
    # A reader that trusts the same file runs what is in it.
    if form == "torch":
        torch.load(path, weights_only=False)["hyper_parameters"]["seed"].close()
    else:
        pickle.loads(path.read_bytes())["hyper_parameters"]["seed"].close()
    assert written.exists()


def test_every_finding_is_tried_here() -> None:
    settings = {EPS, BIAS, PENALTY, SMALL_BATCH, EMA_COPY}
    assert raised("doctor.py") == settings | {FAR, DEAD, EXPLODING, NO_VARIANCE, BLIND, LEANING, EMA_FAR, D_WON}


def test_classes_are_examined_with_the_labels_of_the_real_images(real: Tensor) -> None:
    gan, seen = tiny(network="conv", image_shape=(1, 16, 16), classes=3), []
    labels = torch.arange(len(real)) % 3
    gan.normalized_together.fill_(32)
    with gan.discriminator.net[-3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1])):
        passed = pass_through(gan, real, labels)
    assert torch.equal(torch.cat(seen), torch.cat([torch.cat([own, own]) for own in labels.split(32)]))
    assert len(passed.real_logits) == len(real)
    assert [*pass_through(gan, real, (labels + 1) % 3).real_logits] != [*passed.real_logits]
