"""What the doctor finds in what has come of training, on G's samples and a run's validations; and nothing where all is well."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from bngan.data import ImageDataModule
from bngan.images import to_minus1_1
from bngan.outcome import NOT_BEGUN, Finding, distinct, energy_distance, examine_course, examine_samples, noise
from tests.small_gans import brief, examined, healthy, last_layer, names, of_two_greys, raised
from tests.test_gan import tiny, trainer

COLLAPSED = "G has collapsed"
RANGE = "images of another range"
TOO_LONG = "trained for too long"


@pytest.fixture
def real() -> Tensor:
    return of_two_greys()


# What samples tell ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def of_one_picture(network: nn.Module) -> None:
    last_layer(network).weight.zero_()


@torch.no_grad()
def of_few_pictures(network: nn.Module) -> None:
    """Let the latents' signs alone decide, of three numbers, what the picture is."""
    network.register_forward_pre_hook(lambda _, inputs: (torch.cat([inputs[0][:, :3].sign(), inputs[0][:, 3:] * 0], dim=1),))


@pytest.mark.parametrize(
    ("weights", "evidence"),
    [
        (["generator"], "about 1 distinct, by G's weights"),
        (["generator_ema"], "about 1 distinct, by the average"),
        (["generator", "generator_ema"], "1 distinct, by G's weights and 1 distinct, by the average"),
    ],
)
@pytest.mark.parametrize("network", ["conv", "mlp"])
def test_collapse_of_either_generator_is_found(network: str, weights: list[str], evidence: str, real: Tensor) -> None:
    gan = healthy(real, network=network)
    assert COLLAPSED not in names(examined(gan, real))
    for name in weights:
        of_one_picture(gan.get_submodule(name))
    (finding,) = [finding for finding in examined(gan, real) if finding.name == COLLAPSED]
    assert evidence in finding.evidence
    assert NOT_BEGUN not in names(examined(gan, real))


def test_generator_of_few_pictures_has_not_collapsed_where_there_are_no_more(real: Tensor) -> None:
    gan = healthy(real)
    of_few_pictures(gan.generator)
    (finding,) = examine_samples(gan, real)
    assert finding.name == COLLAPSED
    assert "of 512 about 8 distinct, by G's weights" in finding.evidence
    assert COLLAPSED not in names(examined(gan, real[:64]))
    assert COLLAPSED not in names(examined(gan, real[:8].repeat(32, 1, 1, 1)))


def test_distinct_pictures_are_counted_by_their_pairs() -> None:
    drawn = torch.rand(7, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    unit = torch.tensor(1.0)
    assert distinct(drawn.repeat(60, 1, 1, 1), unit) == pytest.approx(7, rel=0.02)
    assert distinct(drawn, unit) == float("inf")
    assert distinct(drawn[:1].repeat(2, 1, 1, 1), unit) == 1


def test_energy_distance_is_that_of_distributions() -> None:
    drawn = torch.randn(3, 1500, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert energy_distance(drawn[0], drawn[1]) == pytest.approx(0, abs=0.01)
    assert energy_distance(drawn[0] + 9, drawn[1]) == pytest.approx(2 * 18 - 2 * 2.66, rel=0.03)  # of far apart ones
    assert energy_distance(2 * drawn[0], drawn[1]) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("iterations", "expected"), [(300, [COLLAPSED]), (4000, [])])
def test_generator_with_spectral_norm_begins_with_one_picture_and_learns_more(
    iterations: int, expected: list[str], mnist_root: Path, tmp_path: Path
) -> None:
    assert names(examined(*brief("default", 0, tmp_path, mnist_root, iterations, g_norm="spectral"))) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [(lambda real: real, None), (lambda real: (real + 1) / 2, "[0, 1]")],
    ids=["-1 to 1", "0 to 1"],
)
def test_images_of_another_range_are_told_by_what_was_learnt(
    given: Callable[[Tensor], Tensor], expected: str | None, mnist_root: Path, tmp_path: Path
) -> None:
    real = to_minus1_1(ImageDataModule(root=str(mnist_root)).subset(6400, train=True).images)
    gan = tiny(image_shape=(1, 28, 28), hidden_dim=32, instance_noise=0.0)
    trainer(tmp_path, max_epochs=2).fit(gan, DataLoader(TensorDataset(given(real)), batch_size=64))
    findings = {finding.name: finding for finding in examined(gan, real[:1024])}
    assert (RANGE in findings) == (expected is not None)
    if expected is not None:
        assert f"like real images in {expected}" in findings[RANGE].evidence


# What a run's validations tell ----------------------------------------------------------------------------------------


def course(folder: Path, values: Iterable[float], tag: str = "val/fid", **checkpoint: Any) -> list[Finding]:
    """Examine a run of these validations, one every 100 iterations."""
    (folder / "config.yaml").write_text(yaml.safe_dump({"checkpoint": checkpoint}))
    with SummaryWriter(str(folder)) as writer:
        for number, value in enumerate(values, start=1):
            writer.add_scalar(tag, value, global_step=100 * number)
            writer.add_scalar("train/d_loss", 0.0, global_step=100 * number)
    return [*examine_course(folder)]


RISING = [9.0, 5.0, 3.0, *(3.2 + 0.3 * number for number in range(8))]
PLATEAU = [9.0, 5.0, *(3 + 0.3 * (-1) ** number * (1 + number % 3) for number in range(12))]
COURSES: dict[str, tuple[list[float], dict[str, str], str | None]] = {
    "falling": ([9.0, 7.0, 5.0, 4.0, 3.5, 3.2, 3.0, 2.9], {}, None),
    "rising": (RISING, {}, "iteration 300, 3; the last 5 validations, to iteration 1100, gave 4.7"),
    "falling, of which more is better": ([-value for value in RISING], {"mode": "max"}, "iteration 300, -3;"),
    "rising, of which more is better": ([-9.0, -7.0, -5.0, -4.0, -3.5, -3.2, -3.0, -2.9], {"mode": "max"}, None),
    "rising for four validations": (RISING[:7], {}, None),
    "rising by little": ([9.0, 5.0, 3.0, *(3.1 + 0.01 * number for number in range(8))], {}, None),
    "going up and down": (PLATEAU, {}, None),
    "of another metric": (RISING, {"monitor": "val/kid"}, None),
    "empty": ([], {}, None),
}


@pytest.mark.parametrize("case", COURSES)
def test_run_that_went_on_for_too_long_is_told_where_it_was_best(case: str, tmp_path: Path) -> None:
    values, checkpoint, expected = COURSES[case]
    findings = course(tmp_path, values, **checkpoint)
    assert names(findings) == [TOO_LONG] * (expected is not None)
    if expected is not None:
        assert expected in findings[0].evidence
        assert "--trainer.max_steps 300" in findings[0].remedy


def test_noise_of_a_run_is_about_its_curve() -> None:
    drawn = 0.5 * torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert noise(drawn.tolist()) == pytest.approx(0.5, rel=0.1)
    assert noise((drawn + 3 * torch.arange(2000)).tolist()) == pytest.approx(0.5, rel=0.1)
    assert noise([1.0, 2.0, 3.0]) == 0


def test_every_finding_is_tried_here() -> None:
    assert raised("outcome.py") == {COLLAPSED, RANGE, TOO_LONG, "NOT_BEGUN"}
