"""Modes, class KL and confidence of known histograms."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bngan.metrics.modes import ClassHistogram, ClassPrecision


def logits_of(counts: list[int]) -> Tensor:
    """Logits whose argmax is each class as often as counted, in mixed order."""
    classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = torch.randperm(len(classes))
    return F.one_hot(classes[order], len(counts)).float() + 0.1 * torch.rand(len(classes), len(counts))


def histogram_of(counts: list[int], **settings: float) -> tuple[int, float]:
    metric = ClassHistogram(len(counts), **settings)
    metric.update(logits_of(counts))
    values = metric.compute()
    return int(values["modes_covered"]), float(values["class_kl"])


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


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_a_class_is_covered_from_a_twentieth_of_an_equal_share_on(classes: int) -> None:
    others = [40] * (classes - 2)
    assert histogram_of([*others, 40, 40])[0] == classes, "however many classes there are"
    assert histogram_of([*others, 78, 2])[0] == classes
    assert histogram_of([*others, 79, 1])[0] == classes - 1


def test_a_class_is_covered_from_the_threshold_on() -> None:
    assert histogram_of([196, 4], threshold=0.04)[0] == 2
    assert histogram_of([197, 3], threshold=0.04)[0] == 1
    assert histogram_of([100, 100], threshold=1)[0] == 2
    assert histogram_of([101, 99], threshold=1)[0] == 1


def test_batches_add_up_and_reset_forgets_them() -> None:
    metric = ClassHistogram(4)
    metric.update(logits_of([10, 0, 0, 0]))
    assert int(metric.compute()["modes_covered"]) == 1
    metric.update(logits_of([0, 10, 0, 0]))
    values = metric.compute()
    assert int(values["modes_covered"]) == 2
    assert float(values["class_kl"]) == pytest.approx(math.log(2), abs=1e-12)
    metric.reset()
    metric.update(logits_of([5, 5, 5, 5]))
    assert float(metric.compute()["class_kl"]) == pytest.approx(0, abs=1e-12)


def test_a_class_is_seen_from_its_first_sample_on() -> None:
    metric = ClassHistogram(4)
    metric.update(logits_of([997, 2, 1, 0]))
    values = metric.compute()
    assert int(values["modes_covered"]) == 1
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


def test_class_precision_is_the_share_that_is_taken_for_what_was_asked() -> None:
    metric = ClassPrecision(3)
    asked = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    seen = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1, 2, 1])
    for some_asked, some_seen in zip(asked.split(4), seen.split(4), strict=True):
        metric.update(F.one_hot(some_seen, 3).float(), some_asked)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert [*found] == [*metric.names] == ["class_precision", *(f"class_precision/{label}" for label in range(3))]
    assert [*found.values()] == pytest.approx([0.6, 0.75, 1.0, 0.25])


def test_class_precision_needs_samples_of_each_class() -> None:
    metric = ClassPrecision(3)
    metric.update(F.one_hot(torch.tensor([0, 1]), 3).float(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"samples of each class, got \[1, 1, 0\]"):
        metric.compute()
