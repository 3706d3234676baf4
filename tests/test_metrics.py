"""What the samples are worth: the feature nets, each metric beside other implementations, and the floors and controls."""

import copy
import io
import json
import math
import weakref
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms.v2 import functional as tv

from bngan.cli import main
from bngan.data.datasets import DATASETS, Labelled
from bngan.data.loader import to_unit_range
from bngan.metrics import digit_net
from bngan.metrics.digit_net import DigitNet, load_digit_net
from bngan.metrics.features import FeatureNet, load_feature_net
from bngan.metrics.kernel import KernelDistance
from bngan.metrics.manifold import Manifold
from bngan.metrics.modes import ClassHistogram
from bngan.metrics.pairs import FeaturePairs
from bngan.metrics.quality import SampleQuality
from tests.conftest import only_run


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def net() -> DigitNet:
    return load_digit_net()


@pytest.fixture(scope="module")
def digits(mnist_root: Path) -> Labelled:
    """The 10,000 held-out digits."""
    return DATASETS["mnist"].load(mnist_root, train=False)


def accuracy(net: DigitNet, digits: Labelled) -> float:
    with torch.no_grad():
        guesses = torch.cat([net.logits(net(to_unit_range(part))).argmax(dim=1) for part in digits.images.split(500)])
    return float((guesses == digits.labels).double().mean())


# The digit net --------------------------------------------------------------------------------------------------------


def test_pinned_weights_are_frozen_and_in_evaluation_mode(net: DigitNet) -> None:
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    fresh = DigitNet()
    assert fresh.training
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    for name, parameter in fresh.named_parameters():
        assert not torch.equal(parameter, net.get_parameter(name)), f"{name} was not loaded"


def test_pinned_net_reads_the_held_out_digits(net: DigitNet, digits: Labelled) -> None:
    assert accuracy(net, digits) >= 0.993
    some = Labelled(digits.images[:1000], digits.labels[:1000])
    assert accuracy(DigitNet(), some) < 0.5
    upside_down = Labelled(some.images.flip(2), some.labels)
    assert accuracy(net, upside_down) < 0.8


def test_a_damaged_weights_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = bytearray(digit_net.WEIGHTS.read_bytes())
    copy = tmp_path / "digit_net.safetensors"
    monkeypatch.setattr(digit_net, "WEIGHTS", copy)
    copy.write_bytes(content)
    assert isinstance(load_digit_net(), DigitNet)
    content[-1] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ValueError, match=r"digit_net.safetensors is corrupt \(SHA-256 .*, expected .*\); reinstall bngan"):
        load_digit_net()


def test_features_of_an_image_do_not_depend_on_its_batch_mates(net: DigitNet, digits: Labelled) -> None:
    some, others = to_unit_range(digits.images[:5]), to_unit_range(digits.images[5:10])
    mixed = torch.cat([some[:1], others[1:]])
    features = net(some)
    assert features.shape == (5, DigitNet.num_features)
    assert net.logits(features).shape == (5, DigitNet.num_classes)
    torch.testing.assert_close(net(mixed)[0], features[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(net(some[:1])[0], features[0], rtol=0, atol=1e-4)
    assert (net(others)[0] - features[0]).abs().max() > 1e-2
    coupled = nn.BatchNorm2d(1, eps=1e-5, momentum=0.1)
    assert (net(coupled(mixed))[0] - net(coupled(some))[0]).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(4, 3, 28, 28), (4, 1, 32, 32), (4, 784), (1, 28, 28)])
def test_images_of_another_shape_are_refused(net: DigitNet, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"takes images of shape \(N, 1, 28, 28\), not \({shape[0]}, "):
        net(torch.zeros(shape))
    assert net(torch.zeros(4, 1, 28, 28)).shape == (4, DigitNet.num_features)


# Modes ----------------------------------------------------------------------------------------------------------------


def logits_of(counts: list[int]) -> Tensor:
    """Logits whose argmax is each class as often as counted, in mixed order."""
    classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(len(classes))
    return F.one_hot(classes[order], len(counts)).float() + 0.1 * torch.rand(len(classes), len(counts))


def histogram_of(counts: list[int], min_share: float = 0.005) -> tuple[int, float]:
    metric = ClassHistogram(len(counts), min_share)
    metric.update(logits_of(counts))
    values = metric.compute()
    return int(values["modes"]), float(values["class_kl"])


@pytest.mark.parametrize(
    ("counts", "modes", "kl"),
    [
        ([5, 5, 5, 5], 4, 0.0),
        ([20, 0, 0, 0], 1, math.log(4)),
        ([10, 10, 0, 0], 2, math.log(2)),
        ([10, 5, 5, 0], 3, math.log(4) - 1.5 * math.log(2)),
    ],
)
def test_modes_and_divergence_of_known_histograms(counts: list[int], modes: int, kl: float) -> None:
    found_modes, found_kl = histogram_of(counts)
    assert found_modes == modes
    assert found_kl == pytest.approx(kl, abs=1e-12)


def test_divergence_equals_its_definition() -> None:
    counts = [13, 1, 40, 7, 0, 22]
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    expected = float((shares * (shares * 6).log()).nansum())
    assert histogram_of(counts)[1] == pytest.approx(expected, abs=1e-12)
    assert histogram_of([*counts[:-1], 23])[1] != pytest.approx(expected, abs=1e-6)


def test_a_class_counts_as_a_mode_from_its_least_share_on() -> None:
    assert histogram_of([995, 5], min_share=0.005)[0] == 2
    assert histogram_of([996, 4], min_share=0.005)[0] == 1
    assert histogram_of([996, 4], min_share=0.004)[0] == 2


def test_batches_add_up_and_reset_forgets_them() -> None:
    metric = ClassHistogram(4)
    metric.update(logits_of([10, 0, 0, 0]))
    assert int(metric.compute()["modes"]) == 1
    metric.update(logits_of([0, 10, 0, 0]))
    values = metric.compute()
    assert int(values["modes"]) == 2
    assert float(values["class_kl"]) == pytest.approx(math.log(2), abs=1e-12)
    metric.reset()
    metric.update(logits_of([5, 5, 5, 5]))
    assert float(metric.compute()["class_kl"]) == pytest.approx(0, abs=1e-12)


def test_a_class_is_seen_from_its_first_sample_on() -> None:
    metric = ClassHistogram(4)
    metric.update(logits_of([997, 2, 1, 0]))
    values = metric.compute()
    assert int(values["modes"]) == 1
    assert int(values["modes_seen"]) == 3
    metric.update(logits_of([0, 0, 0, 1]))
    assert int(metric.compute()["modes_seen"]) == 4


def test_confidence_is_the_mean_probability_of_the_likeliest_class() -> None:
    metric = ClassHistogram(4)
    metric.update(torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.5, 0.1]]).log())
    assert float(metric.compute()["confidence"]) == pytest.approx(0.6, abs=1e-6)
    metric.update(torch.zeros(2, 4))
    assert float(metric.compute()["confidence"]) == pytest.approx((0.7 + 0.5 + 0.25 + 0.25) / 4, abs=1e-6)
    metric.reset()
    metric.update(1e4 * F.one_hot(torch.tensor([3]), 4).float())
    assert float(metric.compute()["confidence"]) == pytest.approx(1, abs=1e-12)


def test_logits_of_another_number_of_classes_are_refused() -> None:
    metric = ClassHistogram(4)
    for wrong in (torch.zeros(2, 5), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"expected class logits \(N, 4\), got"):
            metric.update(wrong)
    with pytest.raises(ValueError, match="ClassHistogram needs at least 1 image, got 0"):
        ClassHistogram(4).compute()


# Beside other implementations -----------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """How many real and fake images there are, and their features."""

    real: int
    fake: int
    features: int


SIZES = (Sizes(60, 60, 4), Sizes(203, 120, 16), Sizes(120, 203, 64))
DTYPES = (torch.float32, torch.float64)


def clouds(sizes: Sizes, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Features in [-1, 1] of two sets that overlap in part: the fakes are narrower, and lack a third of the real ones."""
    real = torch.randn(sizes.real, sizes.features, dtype=dtype)
    real[::3] += 1.5
    fake = 0.8 * torch.randn(sizes.fake, sizes.features, dtype=dtype) + 0.1
    return real.mul_(0.5).tanh(), fake.mul_(0.5).tanh()


def numbered(features: Tensor, chunk: int = 50) -> list[tuple[Tensor, Tensor]]:
    return list(zip(features.split(chunk), torch.arange(len(features)).split(chunk), strict=True))


def values_of(metric: FeaturePairs, real: Tensor, fake: Tensor) -> dict[str, float]:
    for features, is_real in ((real, True), (fake, False)):
        for part, index in numbered(features):
            metric.update(part, index, real=is_real)
    return {name: float(value) for name, value in metric.compute().items()}


def quality_of(features: int) -> SampleQuality:
    """Measures images that are their own features."""
    return SampleQuality(FeatureNet("pixels", nn.Flatten()), (1, 1, features))


def as_images(features: Tensor, chunk: int = 50) -> list[tuple[Tensor, Tensor]]:
    return [(part[:, None, None], index) for part, index in numbered(features, chunk)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_frechet_distance_equals_torch_fidelity(sizes: Sizes, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("torch_fidelity.metric_fid")
    real, fake = clouds(sizes, dtype)
    quality = quality_of(sizes.features)
    quality.set_real(as_images(real))
    found = quality.measure(as_images(fake))["fid"]
    statistics = [oracle.fid_features_to_statistics(features.double()) for features in (real, fake)]
    expected = oracle.fid_statistics_to_metric(*statistics, verbose=False)[oracle.KEY_METRIC_FID]
    assert found == pytest.approx(expected, rel=1e-6)
    assert quality.measure(as_images(fake[1:]))["fid"] != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [4, 64])
def test_kernel_distance_equals_torch_fidelity(features: int, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("torch_fidelity.metric_kid")
    size = 120
    real, fake = clouds(Sizes(size, size, features), dtype)
    found = values_of(KernelDistance(subsets=1, subset_size=size), real, fake)["kid"]
    expected = oracle.kid_features_to_metric(real.double(), fake.double(), kid_subsets=1, kid_subset_size=size, verbose=False)[
        oracle.KEY_METRIC_KID_MEAN
    ]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert values_of(KernelDistance(), real, fake)["kid"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert values_of(KernelDistance(subsets=1, subset_size=size - 1), real, fake)["kid"] != pytest.approx(expected, rel=1e-4)


def test_kernel_distance_of_subsets_is_near_that_of_all_and_the_same_each_time() -> None:
    real, fake = clouds(Sizes(200, 200, 8))
    whole = values_of(KernelDistance(), real, fake)["kid"]
    state = torch.get_rng_state()
    found = values_of(KernelDistance(subsets=50, subset_size=100), real, fake)["kid"]
    assert torch.equal(torch.get_rng_state(), state), "other draws must not depend on whether samples are measured"
    torch.rand(1)
    assert values_of(KernelDistance(subsets=50, subset_size=100), real, fake)["kid"] == found
    assert found != whole
    assert found == pytest.approx(whole, rel=0.2)
    assert values_of(KernelDistance(subsets=50, subset_size=100), real, real)["kid"] < 0.1 * whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_precision_and_recall_equal_torch_fidelity(sizes: Sizes, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("torch_fidelity.metric_prc")
    real, fake = clouds(sizes, dtype)
    expected = oracle.prc_features_to_metric(fake.double(), real.double(), prc_neighborhood=3, verbose=False)
    found = values_of(Manifold(chunk=50), real, fake)
    for name in ("precision", "recall"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    assert values_of(Manifold(), fake, real)["recall"] == pytest.approx(expected["precision"], abs=1e-6)
    assert expected["precision"] > expected["recall"] + 0.05, "sets where a mix-up of the two would go unseen"
    assert values_of(Manifold(pr_neighbours=2), real, fake)["recall"] != pytest.approx(expected["recall"], abs=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_density_and_coverage_equal_prdc(sizes: Sizes, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("prdc")
    real, fake = clouds(sizes, dtype)
    expected = oracle.compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=5)
    found = values_of(Manifold(pr_neighbours=5, chunk=50), real, fake)
    for name in ("precision", "recall", "density", "coverage"):
        assert found[name] == pytest.approx(float(expected[name]), abs=1e-9)
    assert values_of(Manifold(dc_neighbours=4), real, fake)["density"] != pytest.approx(expected["density"], abs=1e-4)
    assert 0.3 < expected["coverage"] < 0.95, "a share that is far from both ends"


def test_the_edge_of_a_ball_belongs_to_it_for_precision_but_not_for_density() -> None:
    fidelity, prdc = pytest.importorskip("torch_fidelity.metric_prc"), pytest.importorskip("prdc")
    real = torch.arange(10, dtype=torch.float64)[:, None]  # the ball of the last, at 9, reaches to 12
    fake = torch.tensor([12, 100, 101, 102, 103], dtype=torch.float64)[:, None]
    found = values_of(Manifold(pr_neighbours=3, dc_neighbours=3), real, fake)
    assert found["precision"] == pytest.approx(0.2)
    assert found["precision"] == pytest.approx(fidelity.prc_features_to_metric(fake, real, verbose=False)["precision"])
    strict = prdc.compute_prdc(real.numpy(), fake.numpy(), nearest_k=3)
    assert strict["precision"] == 0
    assert found["density"] == strict["density"] == 0
    assert found["coverage"] == strict["coverage"] == 0
    fake[0] -= 0.5
    within = values_of(Manifold(pr_neighbours=3, dc_neighbours=3), real, fake)
    assert within["density"] == pytest.approx(1 / 15)
    assert within["coverage"] == pytest.approx(0.1)


def test_chunks_of_distances_change_nothing() -> None:
    real, fake = clouds(Sizes(203, 120, 16))
    whole = values_of(Manifold(chunk=10_000), real, fake)
    for chunk in (1, 7, 203):
        assert values_of(Manifold(chunk=chunk), real, fake) == pytest.approx(whole, abs=1e-12)
    assert values_of(Manifold(chunk=7), real[:202], fake) != pytest.approx(whole, abs=1e-12)


def test_two_blocks_of_distances_are_held_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fakes, chunk = 210, 195, 20
    mm, blocks, most = torch.mm, list[Callable[[], Tensor | None]](), 0

    def recorded(left: Tensor, right: Tensor) -> Tensor:
        nonlocal most
        distances = mm(left, right)
        assert distances.numel() <= chunk * rows
        blocks.append(weakref.ref(distances))
        most = max(most, sum(block() is not None for block in blocks))
        return distances

    monkeypatch.setattr(torch, "mm", recorded)
    real, fake = clouds(Sizes(rows, fakes, 8))
    metric = Manifold(chunk=chunk)
    values_of(metric, real, fake)
    assert len(blocks) == 2 * math.ceil(rows / chunk) + math.ceil(fakes / chunk)
    assert most <= 2
    held = list(metric._squared_distances(real, fake))
    assert most == len(held) > 2, "blocks that are kept must be noticed"
    with pytest.raises(AssertionError):
        values_of(Manifold(chunk=chunk + 1), real, fake)


# What the metrics keep ------------------------------------------------------------------------------------------------


def kernel_of_subsets() -> KernelDistance:
    return KernelDistance(subsets=3, subset_size=20)


def small_chunks() -> Manifold:
    return Manifold(chunk=7)


PAIRS = (kernel_of_subsets, small_chunks)


@pytest.mark.parametrize("build", PAIRS)
def test_batches_add_up_in_any_order(build: Callable[[], FeaturePairs]) -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    metric = build()
    metric.update(real, torch.arange(80), real=True)
    metric.update(fake, torch.arange(70), real=False)
    at_once = {name: float(value) for name, value in metric.compute().items()}
    shuffled = build()
    for features, is_real in ((real, True), (fake, False)):
        order = torch.randperm(len(features))
        for rows in order.split(9):
            shuffled.update(features[rows], rows, real=is_real)
    assert {name: float(value) for name, value in shuffled.compute().items()} == pytest.approx(at_once, abs=1e-12)
    fewer = values_of(build(), real, fake[:-9])
    assert all(fewer[name] != pytest.approx(value, abs=1e-9) for name, value in at_once.items() if name != "coverage")


@pytest.mark.parametrize("chunk", [1, 7, 20, 100])
def test_kernel_distance_is_that_of_torchmetrics_on_the_same_subsets(chunk: int) -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    oracle = KernelInceptionDistance(feature=nn.Identity(), subsets=3, subset_size=20)
    oracle.update(real.double(), real=True)
    oracle.update(fake.double(), real=False)
    torch.manual_seed(0)
    expected = float(oracle.compute()[0])
    assert values_of(KernelDistance(subsets=3, subset_size=20, chunk=chunk), real, fake)["kid"] == pytest.approx(
        expected, rel=1e-10
    )
    assert values_of(KernelDistance(subsets=4, subset_size=20), real, fake)["kid"] != pytest.approx(expected, rel=1e-3)


def test_numbers_decide_which_images_are_in_a_subset() -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    order = torch.randperm(70)
    in_order = values_of(kernel_of_subsets(), real, fake)["kid"]
    assert values_of(kernel_of_subsets(), real, fake[order])["kid"] != pytest.approx(in_order, rel=1e-3)


@pytest.mark.parametrize("build", PAIRS)
def test_reset_forgets_the_fakes_and_keeps_the_real_images(build: Callable[[], FeaturePairs]) -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    other = fake.flip(1) * 0.9
    metric = build()
    first = values_of(metric, real, fake)
    metric.reset()
    with pytest.raises(ValueError, match=rf"{type(metric).__name__} needs at least \d fake images, got 0"):
        metric.compute()
    second = values_of(metric, real[:0], other)
    assert second == pytest.approx(values_of(build(), real, other), abs=1e-12)
    assert second != pytest.approx(first, abs=1e-6)
    metric.reset()
    assert values_of(metric, real[:0], fake) == pytest.approx(first, abs=1e-12)


@pytest.mark.parametrize("build", PAIRS)
def test_real_images_that_come_later_count(build: Callable[[], FeaturePairs]) -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    metric = build()
    before = values_of(metric, real[:50], fake)
    metric.update(real[50:], torch.arange(50, 80), real=True)
    after = {name: float(value) for name, value in metric.compute().items()}
    assert after == pytest.approx(values_of(build(), real, fake), abs=1e-12)
    assert after != pytest.approx(before, abs=1e-6)


def test_quality_of_other_samples_equals_that_of_a_fresh_one() -> None:
    real, fake = clouds(Sizes(80, 70, 6))
    used, fresh = quality_of(6), quality_of(6)
    for quality in (used, fresh):
        quality.set_real(as_images(real))
    first = used.measure(as_images(fake))
    second = used.measure(as_images(0.5 * fake))
    assert second == pytest.approx(fresh.measure(as_images(0.5 * fake)), abs=1e-9)
    assert all(second[name] != pytest.approx(first[name], abs=1e-6) for name in ("fid", "kid", "recall", "density"))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "least"), [(KernelDistance(), 2), (Manifold(), 6), (Manifold(7, 5), 8)])
def test_too_few_images_are_refused(metric: FeaturePairs, least: int) -> None:
    real, fake = clouds(Sizes(least, least, 3))
    for rows, name in (((least - 1, least), "real"), ((least, least - 1), "fake")):
        few = copy.deepcopy(metric)
        with pytest.raises(ValueError, match=f"needs at least {least} {name} images, got {least - 1}"):
            values_of(few, real[: rows[0]], fake[: rows[1]])
    assert all(math.isfinite(value) for value in values_of(metric, real, fake).values())


@pytest.mark.parametrize("shape", [(4,), (4, 2, 1), (3, 2)])
def test_features_that_are_not_one_row_per_number_are_refused(shape: tuple[int, ...]) -> None:
    for metric in (KernelDistance(), Manifold()):
        with pytest.raises(ValueError, match=r"expected features \(N, d\) and as many numbers, got \("):
            metric.update(torch.zeros(shape), torch.arange(4), real=True)
        metric.update(torch.zeros(4, 2), torch.arange(4), real=True)


@pytest.mark.parametrize(
    ("images", "complaint"),
    [
        (torch.full((4, 1, 28, 28), 1.1), "these reach from 1.1 to 1.1"),
        (torch.full((4, 1, 28, 28), -255.0), "these reach from -255 to -255"),
        (torch.full((4, 1, 28, 28), math.nan), "these reach from nan to nan"),
        (torch.zeros(4, 1, 28, 28, dtype=torch.uint8), "not torch.uint8 of"),
        (torch.zeros(1, 28, 28), r"not torch.float32 of \(1, 28, 28\)"),
        (torch.zeros(4, 3, 28, 28), r"takes images of shape \(N, 1, 28, 28\), not \(4, 3, 28, 28\)"),
    ],
)
def test_images_that_the_features_would_not_fit_are_refused(images: Tensor, complaint: str) -> None:
    net = load_feature_net("digits")
    with pytest.raises(ValueError, match=complaint):
        net(images)
    assert net(torch.full((4, 1, 28, 28), 1.0)).shape == (4, 64)


class Answers(nn.Module):
    """Returns what it is told to, whatever the images."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (torch.zeros(4, 8, 1, 1), r"must return features \(4, d\), but returned \(4, 8, 1, 1\)"),
        (torch.zeros(3, 8), r"must return features \(4, d\), but returned \(3, 8\)"),
        ([torch.zeros(4, 8)], r"must return features \(4, d\), but returned list"),
        (torch.full((4, 8), math.nan), "returned NaN or infinite features"),
        (torch.full((4, 8), -math.inf), "returned NaN or infinite features"),
    ],
)
def test_a_feature_net_that_answers_wrongly_is_refused(answer: Any, complaint: str) -> None:
    images = torch.zeros(4, 1, 28, 28)
    with pytest.raises(ValueError, match=f"the feature net mine {complaint}"):
        FeatureNet("mine", Answers(answer))(images)
    assert FeatureNet("mine", Answers(torch.zeros(4, 8)))(images).shape == (4, 8)


class Pooled(nn.Module):
    """Somebody's own features: a picture's 16 quarters of quarters."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 4).flatten(1)


class Coloured(nn.Module):
    """Somebody's own features, of colour pictures only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(1)


def not_a_class() -> nn.Module:
    return Pooled()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("digit", "unknown --metrics.feature 'digit'; choose from digits, inception, or name a class"),
        ("", "unknown --metrics.feature ''"),
        (".Pooled", "unknown --metrics.feature '.Pooled'"),
        ("no_such_module.Net", r"--metrics.feature no_such_module.Net cannot be imported \(.*No module named 'no_such_module'"),
        (f"{__name__}.Missing", "has no attribute 'Missing'"),
        (f"{__name__}.not_a_class", "is not a torch.nn.Module class"),
        (f"{__name__}.Sizes", "is not a torch.nn.Module class"),
        (f"{__name__}.Answers", r"cannot be built without arguments \(.*'answer'"),
    ],
)
def test_a_feature_net_that_cannot_be_had_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_feature_net(name)


def test_a_name_with_a_leading_dot_is_refused_like_any_unknown_one() -> None:
    with pytest.raises(ValueError, match=r"metrics\.feature"):
        load_feature_net(".tests.Pooled")


def test_a_class_path_gives_the_class() -> None:
    net = load_feature_net(f"{__name__}.Pooled")
    assert isinstance(net.net, Pooled)
    assert net.num_classes is None
    assert load_feature_net("digits").num_classes == 10


def test_a_net_that_does_not_take_the_images_is_refused() -> None:
    net = FeatureNet("mine", Coloured())
    assert SampleQuality(net, (3, 5, 5)).num_features == 4 * 9
    with pytest.raises(ValueError, match="mine"):
        SampleQuality(net, (1, 5, 5))


def test_a_feature_net_stays_in_evaluation_mode() -> None:
    unstable = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5))
    images = torch.rand(8, 1, 4, 4)
    assert not torch.equal(unstable(images), unstable(images))
    net = FeatureNet("mine", unstable)
    before = net.fingerprint()
    first = net(images)
    assert first.shape == (8, 16)
    for train in (net.train, nn.Sequential(net).train):
        train()
        assert not any(module.training for module in net.modules())
        assert torch.equal(net(images), first)
    assert net.fingerprint() == before
    assert not any(parameter.requires_grad for parameter in unstable.parameters())
    unstable.train()
    unstable(images)
    assert net.fingerprint() != before


# Controls -------------------------------------------------------------------------------------------------------------

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
    }
    quality = SampleQuality(load_feature_net("digits"), (1, 28, 28))

    def chunks(images: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(to_unit_range(part), index) for part, index in numbered(images, 500)]

    quality.set_real(chunks(digits.images[:CONTROL_IMAGES]))
    return {name: quality.measure(chunks(images)) for name, images in sets.items()}


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
        ("modes", "dropped", -1),
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
    assert floor["modes"] == floor["modes_seen"] == 10
    assert 0 < floor["fid"] < 2
    assert abs(floor["kid"]) < 0.02
    assert 0 < floor["class_kl"] < 0.02
    assert min(floor[name] for name in ("precision", "recall", "density", "coverage", "confidence")) > 0.7


# Through the command line ---------------------------------------------------------------------------------------------

FEW = ("--metrics.num_samples=200", "--trainer.accelerator=cpu")
METRICS = ("fid", "kid", "precision", "recall", "density", "coverage", "modes", "modes_seen", "class_kl", "confidence")


class Trained(NamedTuple):
    """A short run: its folder and its last checkpoint."""

    folder: Path
    checkpoint: Path


def said(*arguments: str) -> str:
    """Run a command that must succeed, and return what it printed."""
    with redirect_stdout(io.StringIO()) as output:
        assert main(list(arguments)) == 0
    return output.getvalue()


@pytest.fixture(scope="module")
def trained(mnist_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    validated = ("--trainer.max_steps=10", "--trainer.val_check_interval=5", "--trainer.check_val_every_n_epoch=1")
    said("fit", *FEW, *validated, f"--data.root={mnist_root}", f"--trainer.default_root_dir={root}")
    return Trained(only_run(root), only_run(root) / "checkpoints" / "last.ckpt")


@pytest.fixture
def own_root(mnist_root: Path, tmp_path: Path) -> Path:
    """A folder that holds MNIST, and no floors yet."""
    root = tmp_path / "own"
    root.mkdir()
    (root / "MNIST").symlink_to(mnist_root / "MNIST")
    return root


def measured(command: str, trained: Trained, root: Path, folder: Path, *settings: str) -> tuple[dict[str, Any], str]:
    """Measure the checkpoint; return the report that was written and what was printed."""
    common = (f"--ckpt_path={trained.checkpoint}", f"--data.root={root}", f"--trainer.default_root_dir={folder}")
    output = said(command, *FEW, *common, *settings)
    return json.loads((only_run(folder) / f"{command}.json").read_text()), output


def test_training_logs_the_samples_beside_their_floor_and_controls(trained: Trained) -> None:
    events = EventAccumulator(str(trained.folder)).Reload()
    for metric in METRICS:
        for kind in ("val", "floor", "dropped", "blurred"):
            logged = events.Scalars(f"{kind}/{metric}")
            assert [event.step for event in logged] == [5, 10]
            assert kind == "val" or logged[0].value == logged[1].value
    last = {kind: events.Scalars(f"{kind}/fid")[-1].value for kind in ("val", "floor", "dropped", "blurred")}
    assert last["val"] > 10 * last["floor"], "samples after 10 iterations are not digits"
    assert min(last["dropped"], last["blurred"]) > last["floor"] > 0


def test_validate_compares_the_statistics_that_samples_are_drawn_with(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    report, output = measured("validate", trained, own_root, tmp_path / "runs")
    columns = [f"{weights}, {kind}" for weights in ("average", "raw") for kind in ("running", "batch", "precise")]
    (title,) = (line for line in output.splitlines() if line.startswith("metric"))
    assert title.split()[1:5] == ["value", "floor", "dropped", "blurred"]
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()[:1]}
    for metric in METRICS:
        written = [report[column][metric] for column in ("value", "floor", "dropped", "blurred")]
        assert [float(cell) for cell in rows[metric]] == pytest.approx(written, abs=1e-4)
    for column in columns:
        (line,) = (line for line in output.splitlines() if line.startswith(column))
        assert float(line.split()[-1]) == pytest.approx(report[column]["fid"], abs=1e-4)
    assert report["average, running"]["fid"] == pytest.approx(report["value"]["fid"], rel=1e-9)
    gap = report["average, running"]["fid"] - report["average, precise"]["fid"]
    assert report["bn_gap"] == pytest.approx(gap, rel=1e-9)
    assert f"= {gap:.4f}" in output
    assert gap != 0
    assert len({report[column]["fid"] for column in columns}) == len(columns)


def test_test_tells_mean_and_spread_of_five_sets_of_latents(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    report, output = measured("test", trained, own_root, tmp_path / "runs")
    assert report["num_samples"] == 200
    assert report["seeds"] == [1, 2, 3, 4, 5]
    for metric in METRICS:
        entry = report[metric]
        assert set(entry) == {"mean", "sd", "floor", "dropped", "blurred", "values"}
        values = torch.tensor(entry["values"], dtype=torch.float64)
        assert len(values) == 5
        assert entry["mean"] == pytest.approx(float(values.mean()), abs=1e-9)
        assert entry["sd"] == pytest.approx(float(values.std()), abs=1e-9)
    assert len(set(report["fid"]["values"])) == 5
    assert report["modes"]["dropped"] == report["modes"]["floor"] - 1
    (title,) = (line for line in output.splitlines() if line.startswith("metric"))
    assert title.split()[1:6] == ["mean", "sd", "floor", "dropped", "blurred"]


def test_floors_are_worked_out_once_and_found_again(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    first, _ = measured("test", trained, own_root, tmp_path / "first")
    cache = own_root / "floors.json"
    (entry,) = (content := json.loads(cache.read_text())).values()
    assert {name: first[name]["floor"] for name in METRICS} == entry["floor"]
    second, _ = measured("test", trained, own_root, tmp_path / "second")
    assert second == first
    entry["floor"]["fid"] = 123.0
    cache.write_text(json.dumps(content))
    third, _ = measured("test", trained, own_root, tmp_path / "third")
    assert third["fid"]["floor"] == 123.0
    assert third["fid"]["mean"] == pytest.approx(first["fid"]["mean"], rel=1e-9)
    assert json.loads(cache.read_text()) == content


def test_floors_of_other_settings_stand_beside_each_other(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    first, _ = measured("test", trained, own_root, tmp_path / "first")
    second, _ = measured("test", trained, own_root, tmp_path / "second", "--metrics.num_samples=150")
    assert second["fid"]["floor"] != first["fid"]["floor"]
    feature = f"--metrics.feature={__name__}.Pooled"
    third, _ = measured("test", trained, own_root, tmp_path / "third", feature)
    entries = json.loads((own_root / "floors.json").read_text())
    assert len(entries) == 3
    assert {entry["floor"]["fid"] for entry in entries.values()} == {
        report["fid"]["floor"] for report in (first, second, third)
    }
    again, _ = measured("test", trained, own_root, tmp_path / "again")
    assert again == first


@pytest.mark.parametrize("content", ["{damaged", "[]"])
def test_damaged_floors_are_told_in_a_line_and_written_anew(
    trained: Trained, own_root: Path, tmp_path: Path, content: str
) -> None:
    cache = own_root / "floors.json"
    cache.write_text(content)
    report, output = measured("test", trained, own_root, tmp_path / "first")
    assert [line for line in output.splitlines() if "damaged" in line] == [f"{cache} is damaged and is written anew."]
    (entry,) = json.loads(cache.read_text()).values()
    assert entry["floor"]["fid"] == report["fid"]["floor"]
    again, output = measured("test", trained, own_root, tmp_path / "second")
    assert again == report
    assert "damaged" not in output


def test_a_network_of_ones_own_measures_without_classes(trained: Trained, own_root: Path, tmp_path: Path) -> None:
    feature = f"--metrics.feature={__name__}.Pooled"
    report, _ = measured("test", trained, own_root, tmp_path / "runs", feature)
    assert set(report) == {"num_samples", "seeds", "fid", "kid", "precision", "recall", "density", "coverage"}
    assert report["fid"]["mean"] > 3 * report["fid"]["floor"] > 0
    digits, _ = measured("test", trained, own_root, tmp_path / "digits")
    assert digits["fid"]["mean"] != pytest.approx(report["fid"]["mean"], rel=1e-2)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("--metrics.feature=digitz", "unknown --metrics.feature 'digitz'"),
        ("--metrics.num_samples=127", "must be 0 or at least 128, twice the features of digits, got 127"),
        ("--metrics.num_samples=-1", "num_samples must be at least 0"),
        (f"--metrics.feature={__name__}.Coloured", "Coloured"),
    ],
)
def test_a_setting_that_cannot_be_measured_by_is_told_in_a_line(
    trained: Trained, own_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, complaint: str
) -> None:
    common = (f"--ckpt_path={trained.checkpoint}", f"--data.root={own_root}", f"--trainer.default_root_dir={tmp_path}")
    assert main(["validate", *FEW, *common, setting]) == 2
    answer = capsys.readouterr().err
    assert complaint in answer
    assert "Traceback" not in answer


def test_inception_is_given_bytes_in_three_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand(nn.Module):
        def __init__(self, **_: object) -> None:
            super().__init__()

        def forward(self, pixels: Tensor) -> Tensor:
            assert pixels.dtype == torch.uint8
            return pixels.flatten(start_dim=1).float()

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Stand)
    images = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)
    assert load_feature_net("inception")(images).tolist() == [[0.0, 85.0, 170.0, 255.0] * 3]


@pytest.mark.parametrize(("error", "remedy"), [(OSError("no route"), "connect"), (ModuleNotFoundError(), "pip install")])
def test_inception_that_cannot_be_had_is_told_with_a_remedy(
    error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> nn.Module:
        raise error

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", fail)
    with pytest.raises((OSError, ValueError), match=remedy):
        load_feature_net("inception")


def test_floors_that_cannot_be_kept_are_told_in_a_line_and_stop_nothing(
    trained: Trained, own_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_root / "floors.json").unlink(missing_ok=True)
    write = Path.write_text

    def refuse(path: Path, text: str) -> int:
        if path.name.startswith("floors.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", refuse)
    report, output = measured("test", trained, own_root, tmp_path / "runs")
    assert "floors.json cannot be written (Permission denied)" in output
    assert not (own_root / "floors.json").exists()
    assert report["fid"]["floor"] > 0
