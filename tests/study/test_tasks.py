"""Tasks have the modes that they say, and their measures see which of them samples have."""

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bngan.rng import generator
from bngan.study.measures import class_counts, kl_to_uniform
from bngan.study.tasks import TASKS, Digits, Mixture, Stack, gaussian, load_digits, ring, square, stacks


@pytest.mark.parametrize(("centres", "modes", "nearest"), [(ring, 8, 2 * math.sin(math.pi / 8)), (square, 25, 2.0)])
def test_centres_are_as_many_as_they_say_and_apart(centres: Callable[[], Tensor], modes: int, nearest: float) -> None:
    """Placed by linspace(0, 2 pi, 8), two of eight would be one."""
    points = centres()
    assert points.shape == (modes, 2)
    distances = torch.pdist(points.double())
    assert float(distances.min()) == pytest.approx(nearest, abs=1e-5)
    assert points.mean(dim=0).abs().max() < 1e-6


def test_ring_lies_on_the_unit_circle() -> None:
    torch.testing.assert_close(ring().norm(dim=1), torch.ones(8))
    assert square().abs().max() == 4


@pytest.mark.parametrize("name", ["ring", "grid"])
def test_points_of_the_mixture_have_all_its_modes(name: str) -> None:
    """Of two-dimensional Gaussians 1 - exp(-9 / 2) = 98.9% lie within 3 standard deviations."""
    task = TASKS[name]
    data = task.load(Path(), 3, "cpu")
    points = data.batch(torch.arange(len(data)))
    assert points.shape == (100_000, *task.image_shape)
    (values,) = data.measure(points[None, :2500], whole=False)
    assert values["modes"] == task.modes
    assert values["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.01)


def test_runs_train_with_points_of_their_own_seed() -> None:
    rows = torch.arange(100)
    one, again, other = (TASKS["ring"].load(Path(), seed, "cpu").batch(rows) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_mode_counts_from_one_sample_within_three_deviations() -> None:
    data = Mixture(ring, 0.01, Path(), 0, "cpu")
    angles = torch.tensor([0.0, math.pi / 2])
    centres = torch.stack([angles.cos(), angles.sin()], dim=1)

    def at(*offsets: tuple[float, float]) -> Tensor:
        return (centres[: len(offsets)] + torch.tensor(offsets)).view(1, -1, 2, 1, 1)

    inside, outside = (0.0, 0.0299), (0.022, 0.022)  # 0.0311 away, though within 0.03 in each coordinate
    assert data.measure(at(inside, inside), whole=False) == [{"modes": 2, "high_quality": 1}]
    assert data.measure(at(inside, outside), whole=False) == [{"modes": 1, "high_quality": 0.5}]
    both = torch.cat([at(inside, inside), at(outside, outside)])
    found = data.measure(both, whole=True)
    assert [values["modes"] for values in found] == [2, 0]
    assert found[0]["points"] == [[1.0, 0.03], [0.0, 1.03]]


def test_references_of_a_mixture_miss_what_was_left_out() -> None:
    references = TASKS["ring"].load(Path(), 0, "cpu").references(2_500)
    assert references["real points"]["modes"] == 8
    assert references["without a mode"]["modes"] == 7


def test_picture_of_points_shows_where_they_are() -> None:
    data = Mixture(ring, 0.01, Path(), 0, "cpu")
    picture = data.picture(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1e9, 0.0], [0.0, float("inf")]]).view(4, 2, 1, 1))
    assert picture.shape == (1, 112, 112)
    rows, columns = (picture[0] > 0).nonzero().unbind(dim=1)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(11, 56), (55, 100)]  # top, and right


# Digits ---------------------------------------------------------------------------------------------------------------


def test_digits_are_mnists_in_the_range_of_tanh(mnist_root: Path) -> None:
    data = TASKS["digits"].load(mnist_root, 0, "cpu")
    assert len(data) == 60_000
    images = data.batch(torch.tensor([0, 59_999]))
    assert images.shape == (2, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.aminmax() == (-1, 1)
    assert data.picture(images.repeat(5, 1, 1, 1)).shape[1:] == (60, 10 * 58 + 2)


def test_gaussian_has_the_images_mean_and_covariance() -> None:
    images = torch.rand(500, 1, 2, 2, generator=generator(1)) @ torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    drawn = gaussian(images, 40_000, generator(2))
    assert drawn.shape == (40_000, 1, 2, 2)
    torch.testing.assert_close(drawn.mean(dim=0), images.mean(dim=0), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.flatten(1).T.cov(), images.flatten(1).T.cov(), atol=0.01, rtol=0)


@pytest.mark.slow
def test_references_of_digits_are_those_that_thresholds_come_from(mnist_root: Path) -> None:
    """FID cannot see what is dropped within a class, coverage can; failed is one Gaussian, useful one a class, good no 0s."""
    data = TASKS["digits"].load(mnist_root, 0, "cpu")
    found = data.references(10_000)
    fids = {name: values["fid"] for name, values in found.items()}
    assert fids["real images"] == pytest.approx(0.083, abs=0.03)
    assert fids["one Gaussian"] == pytest.approx(33.2, abs=1.5)
    assert fids["a Gaussian a class"] == pytest.approx(7.8, abs=0.5)
    assert fids["no 0s"] == pytest.approx(5.3, abs=0.5)
    assert max(fids["100 images repeated"], fids["half of each class"]) < fids["no 0s"]
    coverages = {name: values["coverage"] for name, values in found.items()}
    assert coverages["100 images repeated"] < 0.06 < 0.95 < coverages["real images"]
    assert coverages["half of each class"] < coverages["real images"] - 0.03


def test_controls_are_what_they_are_called(mnist_root: Path) -> None:
    data = Digits(mnist_root, 0, "cpu")
    controls = dict(islice(data.controls(300), 5))  # Gaussians, which take long, are tested above
    real, repeated, few = (controls[name] for name in ("real images", "1,000 images repeated", "100 images repeated"))
    assert all(len(images) >= 300 for images in controls.values())
    assert torch.equal(repeated[:1000], real[:1000])
    assert torch.equal(few[100:200], real[:100])
    assert len(controls["half of each class"]) == pytest.approx(30_000, rel=0.02)
    assert controls["half of each class"].mean() < real.mean() - 0.05
    assert len(controls["no 0s"]) == 60_000 - 5_923


# Stacked digits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "low"), [("stack3", -1), ("stack3_01", 0), ("stack2", -1), ("stack2_01", 0)])
def test_stacks_are_digits_in_channels_in_their_range(name: str, low: int, mnist_root: Path) -> None:
    task = TASKS[name]
    data = task.load(mnist_root, 5, "cpu")
    assert len(data) == 128_000
    assert isinstance(data, Stack)
    images = data.batch(torch.tensor([7, 127_999]))
    assert images.shape == (2, *task.image_shape)
    assert images.aminmax() == (low, 1)
    pixels = data.digits.images[data.stacks[7], 0]  # (channels, 28, 28)
    torch.testing.assert_close((images[0] - low) / (1 - low), pixels / 255)
    assert data.picture(images.repeat(5, 1, 1, 1)).shape == (3, 60, 582)


def test_stacks_are_the_runs_own_and_drawn_from_all_digits(mnist_root: Path) -> None:
    one, again, other = (Stack(2, False, mnist_root, seed, "cpu").stacks for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one.unique()) > 58_000  # (1 - exp(-256 / 60)) of 60,000


@pytest.mark.parametrize("name", ["stack2", "stack2_01"])
def test_modes_of_a_stack_are_its_digits(name: str, mnist_root: Path) -> None:
    data = TASKS[name].load(mnist_root, 0, "cpu")
    assert isinstance(data, Stack)
    rows = torch.arange(600)
    (values,) = data.measure(data.batch(rows)[None], whole=False)
    labels = (data.digits.labels[data.stacks[rows]] * torch.tensor([1, 10])).sum(dim=1)
    expected = class_counts(labels[None], 100)
    assert values["modes"] == pytest.approx(int((expected > 0).sum()), abs=1)  # the net errs on 0.6% of digits
    assert values["class_kl"] == pytest.approx(float(kl_to_uniform(expected)), abs=0.02)
    (same,) = data.measure(data.batch(torch.zeros(50, dtype=torch.long))[None], whole=False)
    assert same == {"modes": 1, "class_kl": pytest.approx(math.log(100))}


@pytest.mark.parametrize(("channels", "count", "known"), [(3, 26_000, 0.0237), (2, 10_000, 0.0050 + 0.0026)])
def test_floor_of_the_class_kl_is_chance_and_classes_of_unequal_size(
    channels: int, count: int, known: float, mnist_root: Path
) -> None:
    """(K - 1) / (2 N) of N real samples of K modes, and for each channel what MNIST's ten classes are from equal."""
    labels = load_digits(mnist_root, "cpu", train=True).labels
    modes = 10**channels
    floor = (modes - 1) / (2 * count) + channels * float(kl_to_uniform(class_counts(labels[None], 10)))
    assert floor == pytest.approx(known, abs=5e-4)
    drawn = labels[stacks(len(labels), (count, channels), generator(1))]  # (count, channels)
    counts = class_counts((drawn * 10 ** torch.arange(channels)).sum(dim=1)[None], modes)
    assert float(kl_to_uniform(counts)) == pytest.approx(floor, abs=3 * math.sqrt(modes / 2) / count)
    assert (counts > 0).all()
