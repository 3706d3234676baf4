"""The pinned classifier: its weights, what it reads, and what it refuses."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bngan.data.datasets import Labelled
from bngan.errors import UsageError
from bngan.images import to_minus1_1
from bngan.metrics import digit_net
from bngan.metrics.digit_net import DigitNet, load_digit_net


@pytest.fixture(scope="module")
def net() -> DigitNet:
    return load_digit_net()


def accuracy(net: DigitNet, digits: Labelled) -> float:
    with torch.no_grad():
        guesses = torch.cat([net.logits(net(to_minus1_1(part))).argmax(dim=1) for part in digits.images.split(500)])
    return float((guesses == digits.labels).double().mean())


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


def test_features_of_a_known_digit_are_these(net: DigitNet, digits: Labelled) -> None:
    """Or values would say something else than those of earlier versions."""
    features = net(to_minus1_1(digits.images[:1]))
    expected = torch.tensor([0.8281083, 2.5932696, 0.0, 1.4721147, 0.0, 0.0])
    torch.testing.assert_close(features[0, :6], expected, rtol=1e-4, atol=1e-4)
    assert float(features.sum()) == pytest.approx(47.3671, rel=1e-4)
    assert float(net.logits(features)[0, 7]) == pytest.approx(5.112045, rel=1e-4)


def test_a_damaged_weights_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = bytearray(digit_net.WEIGHTS.read_bytes())
    copy = tmp_path / "digit_net.safetensors"
    monkeypatch.setattr(digit_net, "WEIGHTS", copy)
    copy.write_bytes(content)
    assert isinstance(load_digit_net(), DigitNet)
    content[-1] ^= 1
    copy.write_bytes(content)
    complaint = r"digit_net.safetensors is missing or corrupt \(SHA-256 .*, expected .*\); reinstall bngan"
    with pytest.raises(UsageError, match=complaint):
        load_digit_net()
    copy.unlink()
    with pytest.raises(UsageError, match=complaint):
        load_digit_net()


def test_features_of_an_image_do_not_depend_on_its_batch_mates(net: DigitNet, digits: Labelled) -> None:
    some, others = to_minus1_1(digits.images[:5]), to_minus1_1(digits.images[5:10])
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
    with pytest.raises(UsageError, match=rf"takes images of shape \(N, 1, 28, 28\), not \({shape[0]}, .*--metrics.feature"):
        net(torch.zeros(shape))
    assert net(torch.zeros(4, 1, 28, 28)).shape == (4, DigitNet.num_features)
