"""The pinned digit net, and the histogram of what it sees."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bngan.data.datasets import DATASETS, Labelled
from bngan.data.loader import to_unit_range
from bngan.metrics import digit_net
from bngan.metrics.digit_net import DigitNet, load_digit_net
from bngan.metrics.modes import ClassHistogram


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
