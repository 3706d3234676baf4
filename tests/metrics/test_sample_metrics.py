"""Every metric of a set of samples: few images at a time, and of real digits, whole and spoilt."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from bngan.data.datasets import DATASETS, Labelled
from bngan.errors import UsageError
from bngan.images import to_minus1_1
from bngan.metrics.features import FeatureNet, load_feature_net
from bngan.metrics.sample_metrics import SampleMetrics
from tests.features import DTYPES, SIZES, Sizes, clouds


def metrics_of(features: int) -> SampleMetrics:
    """Measures images that are their own features."""
    return SampleMetrics(FeatureNet("pixels", nn.Flatten()), (1, 1, features))


def as_images(features: Tensor, chunk: int = 50) -> list[Tensor]:
    return list(features[:, None, None].split(chunk))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_frechet_distance_equals_torch_fidelity(sizes: Sizes, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("torch_fidelity.metric_fid")
    real, fake = clouds(sizes, dtype)
    metrics = metrics_of(sizes.features)
    metrics.set_real(as_images(real))
    found = metrics.measure(as_images(fake))["fid"]
    statistics = [oracle.fid_features_to_statistics(features.double()) for features in (real, fake)]
    expected = oracle.fid_statistics_to_metric(*statistics, verbose=False)[oracle.KEY_METRIC_FID]
    assert found == pytest.approx(expected, rel=1e-6)
    assert metrics.measure(as_images(fake[1:]))["fid"] != pytest.approx(expected, rel=1e-4)


def test_metrics_of_other_samples_equal_those_of_a_fresh_object() -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    used, fresh = metrics_of(6), metrics_of(6)
    for metrics in (used, fresh):
        metrics.set_real(as_images(real))
    first = used.measure(as_images(fake))
    second = used.measure(as_images(0.5 * fake))
    assert second == pytest.approx(fresh.measure(as_images(0.5 * fake)), abs=1e-9)
    assert all(second[name] != pytest.approx(first[name], abs=1e-6) for name in ("fid", "kid", "recall", "density"))


class Counting(nn.Module):
    """Takes images for their own features, and notes how many it is given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.given.append(len(images))
        return images.flatten(1)


def test_a_feature_net_is_given_few_images_at_a_time() -> None:
    real, fake = clouds(Sizes(120, 120, 6))
    net = Counting()
    metrics = SampleMetrics(FeatureNet("pixels", net), (1, 1, 6))
    metrics.set_real(as_images(real, chunk=120))
    assert net.given == [1, 50, 50, 20]  # the first tells how many features there are
    whole = metrics.measure(as_images(fake, chunk=120))
    assert whole == pytest.approx(metrics.measure(as_images(fake, chunk=7)), abs=1e-9)


def test_distance_alone_is_that_of_all() -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    metrics = metrics_of(6)
    metrics.set_real(as_images(real))
    assert metrics.measure(as_images(fake), distance_alone=True) == {"fid": metrics.measure(as_images(fake))["fid"]}


def test_too_few_samples_are_refused() -> None:
    real, fake = clouds(Sizes(80, 6, 3))
    metrics = metrics_of(3)
    metrics.set_real(as_images(real))
    with pytest.raises(UsageError, match=r"needs at least 6 fake images, got 5: .* --metrics.num_samples 0"):
        metrics.measure(as_images(fake[:5]))
    assert metrics.measure(as_images(fake))["fid"] > 0


@pytest.mark.parametrize("name", ["digits", "random"])
def test_names_are_those_of_what_is_measured(name: str) -> None:
    metrics = SampleMetrics(load_feature_net(name), (1, 28, 28))
    metrics.set_real([2 * torch.rand(20, 1, 28, 28) - 1])
    measured = metrics.measure([2 * torch.rand(20, 1, 28, 28) - 1])
    assert metrics.names == list(measured)
    assert ("fid" in measured, "kid" in measured) == (name == "digits", name == "digits")
    assert ("distance" in measured) == (name == "random"), "random features have no FID"
    assert "coverage" in measured


SHAPES = 1000


def shapes(channels: int) -> tuple[Tensor, Tensor]:
    """Discs and squares in any place and shade, uint8 (N, C, 32, 32), and whether each is a disc (N,)."""
    drawn = torch.Generator().manual_seed(0)
    count, along = 4 * SHAPES, torch.arange(32)
    radius = 4 + 5 * torch.rand(count, 1, 1, generator=drawn)
    x, y = (9 + 14 * torch.rand(2, count, 1, 1, generator=drawn)).unbind()
    right, down = (along - x).abs(), (along[:, None] - y).abs()
    discs = torch.rand(count, generator=drawn) < 0.5
    distance = torch.where(discs[:, None, None], (right**2 + down**2).sqrt(), torch.maximum(right, down) * 1.13)
    inside = (radius - distance + 0.5).clamp(0, 1)[:, None]  # (N, 1, 32, 32), smooth at its edge
    ground, shade = (torch.rand(2, count, channels, 1, 1, generator=drawn) * 100).unbind()
    return (ground + inside * (155 - ground + shade)).to(torch.uint8), discs


@pytest.mark.parametrize("channels", [1, 3])
def test_random_filters_tell_shapes_from_spoilt_ones(channels: int) -> None:
    images, discs = shapes(channels)
    real, others = images[:SHAPES], images[SHAPES:]
    whole = others[:SHAPES]
    metrics = SampleMetrics(load_feature_net("random"), (channels, 32, 32))
    metrics.set_real([to_minus1_1(real)])

    def distance(images: Tensor) -> float:
        return metrics.measure([to_minus1_1(images)], distance_alone=True)["distance"]

    spoilt = {
        "dropped": others[discs[SHAPES:]][:SHAPES],
        "blurred": tv.gaussian_blur(whole, [5, 5], [1.0, 1.0]),
        "half blurred": torch.cat([tv.gaussian_blur(whole[::2], [5, 5], [1.0, 1.0]), whole[1::2]]),
        "repeated": whole[:10].repeat(SHAPES // 10, 1, 1, 1),
        "cut up": whole.roll((16, 16), dims=(2, 3)),
    }
    floor = max(distance(whole), distance(others[SHAPES : 2 * SHAPES]))
    found = {name: distance(images) / floor for name, images in spoilt.items()}
    assert min(found.values()) > 1.3, found
    assert found["half blurred"] < found["blurred"] / 2


CONTROL_IMAGES = 1000


@pytest.fixture(scope="module")
def controls(mnist_root: Path, digits: Labelled) -> dict[str, dict[str, float]]:
    """What the metrics say of training images, whole and spoilt, beside held-out ones."""
    images, labels = DATASETS["mnist"].load(mnist_root, train=True)
    whole = images[:CONTROL_IMAGES]
    spoilt = whole.float() + 30 * torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    sets = {
        "half": whole,
        "other half": images[CONTROL_IMAGES : 2 * CONTROL_IMAGES],
        "dropped": images[labels != 0][:CONTROL_IMAGES],
        "blurred": tv.gaussian_blur(whole, [5, 5], [1.0, 1.0]),
        "noisy": spoilt.clamp(0, 255),
        "repeated": whole[:10].repeat(CONTROL_IMAGES // 10, 1, 1, 1),
    }
    metrics = SampleMetrics(load_feature_net("digits"), (1, 28, 28))

    def chunks(images: Tensor) -> list[Tensor]:
        return [to_minus1_1(part) for part in images.split(500)]

    metrics.set_real(chunks(digits.images[:CONTROL_IMAGES]))
    return {name: metrics.measure(chunks(images)) for name, images in sets.items()}


@pytest.mark.parametrize(
    ("metric", "control", "direction"),
    [
        ("fid", "dropped", 1),
        ("fid", "blurred", 1),
        ("kid", "dropped", 1),
        ("kid", "blurred", 1),
        ("precision", "noisy", -1),
        ("precision", "blurred", 1),  # a blurred digit lies nearer to the middle of its kind
        ("recall", "blurred", -1),
        ("density", "noisy", -1),
        ("density", "blurred", 1),
        ("coverage", "dropped", -1),
        ("coverage", "blurred", -1),
        ("coverage", "repeated", -1),
        ("modes_covered", "dropped", -1),
        ("class_kl", "dropped", 1),
        ("confidence", "blurred", -1),
    ],
)
def test_what_spoils_the_digits_moves_the_metric(
    controls: dict[str, dict[str, float]], metric: str, control: str, direction: int
) -> None:
    half, other = controls["half"][metric], controls["other half"][metric]
    moved = direction * (controls[control][metric] - half)
    assert moved > 3 * abs(half - other)
    assert moved > 0.02


def test_real_digits_are_near_the_best_values(controls: dict[str, dict[str, float]]) -> None:
    floor = controls["half"]
    assert floor["modes_covered"] == floor["modes_seen"] == 10
    assert 0 < floor["fid"] < 2
    assert abs(floor["kid"]) < 3 * floor["kid_se"] < 0.06
    assert 0 < floor["class_kl"] < 0.02
    assert min(floor[name] for name in ("precision", "recall", "density", "coverage", "confidence")) > 0.7


class Threes(nn.Module):
    """Features are the pixels; the class is the largest of the first three."""

    num_classes = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(start_dim=1)

    def logits(self, features: Tensor) -> Tensor:
        return features[:, :3]


def test_samples_that_are_asked_for_by_class_are_measured_by_it_and_real_images_are_not() -> None:
    real, fake = (features.float().clamp(-1, 1) for features in clouds(Sizes(80, 70, 6)))
    asked = torch.arange(len(fake)) % 3
    metrics = SampleMetrics(FeatureNet("threes", Threes()), (1, 1, 6), classes=3)
    metrics.set_real(as_images(real))
    for images, labels in ((fake, asked), (fake.flip(0), asked.flip(0))):  # counted anew each time
        found = metrics.measure(as_images(images), labels.split(50))
        for label in range(3):
            expected = (images[labels == label, :3].argmax(dim=1) == label).double().mean()
            assert found[f"class_precision/{label}"] == pytest.approx(float(expected))
        assert found["class_precision"] == pytest.approx(float((images[:, :3].argmax(dim=1) == labels).double().mean()))
    assert [*found] == metrics.names
    assert metrics.measure(as_images(real)).keys() == found.keys() - {name for name in found if "precision/" in name} - {
        "class_precision"
    }
    assert metrics.measure(as_images(fake), asked.split(50), distance_alone=True).keys() == {"fid"}
