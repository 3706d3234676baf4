"""Feature nets: the pinned one, Inception, and anyone's own; what they are given and what they answer."""

import math
import pickle
import socket
from http.client import IncompleteRead
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bngan.errors import UsageError
from bngan.metrics.features import FeatureNet, choose_feature, load_feature_net
from bngan.metrics.sample_metrics import SampleMetrics
from tests.features import Coloured, Pooled


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


def test_images_may_reach_beyond_their_range_by_rounding_alone() -> None:
    net = FeatureNet("mine", Pooled())
    for edge in (1.0, -1.0):
        assert net(torch.full((1, 1, 4, 4), 1.0009 * edge)).shape == (1, 16)
        with pytest.raises(ValueError, match="these reach from"):
            net(torch.full((1, 1, 4, 4), 1.0011 * edge))


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
        (torch.full((4, 8), math.nan), "must return finite features, but returned NaN or infinite ones"),
        (torch.full((4, 8), -math.inf), "must return finite features, but returned NaN or infinite ones"),
    ],
)
def test_a_feature_net_that_answers_wrongly_is_refused(answer: Any, complaint: str) -> None:
    images = torch.zeros(4, 1, 28, 28)
    with pytest.raises(UsageError, match=f"the feature net mine {complaint}"):
        FeatureNet("mine", Answers(answer))(images)
    assert FeatureNet("mine", Answers(torch.zeros(4, 8)))(images).shape == (4, 8)


def not_a_class() -> nn.Module:
    return Pooled()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("digit", "unknown --metrics.feature 'digit'; choose from auto, digits, inception, random, or name a class"),
        ("", "unknown --metrics.feature ''"),
        (".Pooled", "unknown --metrics.feature '.Pooled'"),
        ("no_such_module.Net", r"--metrics.feature no_such_module.Net cannot be imported \(.*No module named 'no_such_module'"),
        (f"{__name__}.Missing", "has no attribute 'Missing'"),
        (f"{__name__}.not_a_class", "is not a torch.nn.Module class"),
        ("tests.features.Sizes", "is not a torch.nn.Module class"),
        (f"{__name__}.Answers", r"cannot be built without arguments \(.*'answer'"),
    ],
)
def test_a_feature_net_that_cannot_be_had_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        load_feature_net(name)


def test_a_class_path_gives_the_class() -> None:
    net = load_feature_net("tests.features.Pooled")
    assert isinstance(net.net, Pooled)
    assert net.num_classes is None
    assert load_feature_net("digits").num_classes == 10


def test_a_shape_error_within_a_net_is_its_own() -> None:
    """Whoever wrote the network needs its traceback, which a person's mistake does not get."""
    net = FeatureNet("mine", Coloured())
    assert SampleMetrics(net, (3, 5, 5)).num_features == 4 * 9
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 1 channels"):
        SampleMetrics(net, (1, 5, 5))


def test_a_feature_net_stays_in_evaluation_mode() -> None:
    unstable = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5))
    images = torch.rand(8, 1, 4, 4)
    assert not torch.equal(unstable(images), unstable(images))
    net = FeatureNet("mine", unstable)
    first, before = net(images), net.probe(images)
    assert first.shape == (8, 16)
    for train in (net.train, nn.Sequential(net).train):
        train()
        assert not any(module.training for module in net.modules())
        assert torch.equal(net(images), first)
    assert torch.equal(net.probe(images), before)
    assert not any(parameter.requires_grad for parameter in unstable.parameters())
    unstable.train()
    unstable(images)
    assert not torch.equal(net.probe(images), before)


class Told(nn.Module):
    """Features and logits of images, by weights that are given."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.of_images, self.of_features = nn.Linear(16, 5), nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.of_images(images.flatten(1))

    def logits(self, features: Tensor) -> Tensor:
        return self.of_features(features)


def test_a_probe_has_a_number_for_each_image_which_every_output_moves() -> None:
    net, images = Told(), torch.rand(7, 1, 4, 4)
    state = torch.get_rng_state()
    before = FeatureNet("mine", net).probe(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert before.shape == (7,)
    assert torch.equal(FeatureNet("another", net).probe(images), before)
    assert torch.equal(FeatureNet("mine", net).probe(images[2:]), before[2:])
    for bias in (net.of_images.bias, net.of_features.bias):
        for number in range(len(bias)):
            bias.data[number] += 0.01
            moved = FeatureNet("mine", net).probe(images)
            assert ((moved - before).abs() > 1e-5).all()
            bias.data[number] -= 0.01


def test_inception_is_given_bytes_in_three_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand(nn.Module):
        def __init__(self, **_: object) -> None:
            super().__init__()

        def forward(self, pixels: Tensor) -> Tensor:
            assert pixels.dtype == torch.uint8
            return pixels.flatten(start_dim=1).float()

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Stand)
    net = load_feature_net("inception")
    levels = torch.tensor([0.0, 85.0, 170.0, 255.0]).reshape(1, 1, 2, 2)
    for off in (0.0, 0.4, -0.4):  # which rounding undoes
        images = (levels + off).clamp(0, 255) / 127.5 - 1
        assert net(images).tolist() == [levels.flatten().tolist() * 3]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError("no route"), "no route.* connect .* or use --metrics.feature random"),
        (TimeoutError("timed out"), "timed out.* connect"),
        (IncompleteRead(b""), "connect"),
        (ModuleNotFoundError(), "pip install torch-fidelity"),
        (RuntimeError("PytorchStreamReader failed"), "checkpoints are damaged; delete them"),
        (EOFError(), "are damaged"),
        (pickle.UnpicklingError(), "are damaged"),
    ],
)
def test_inception_that_cannot_be_had_is_told_with_a_remedy(
    error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> nn.Module:
        raise error

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", fail)
    with pytest.raises(UsageError, match=remedy):
        load_feature_net("inception")


def test_a_network_that_does_not_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    def wait(**_: object) -> nn.Module:
        waits.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", wait)
    with pytest.raises(UsageError, match="timed out"):
        load_feature_net("inception")
    assert waits == [10.0]
    assert socket.getdefaulttimeout() is None, "as before"


@pytest.mark.parametrize("error", [None, OSError("no route"), ModuleNotFoundError()])
def test_the_net_is_chosen_by_the_images_and_by_what_can_be_had(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def stand_in(**_: object) -> nn.Module:
        asked.append(error)
        if error is not None:
            raise error
        return nn.Identity()

    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", stand_in)
    assert choose_feature(1, digits=True, on_processor=True)[0] == "digits"
    name, reason = choose_feature(1, digits=False, on_processor=False)
    assert (name, "grey" in reason) == ("random", True)
    name, reason = choose_feature(3, digits=False, on_processor=True)
    assert (name, "processor" in reason) == ("random", True)
    assert asked == [], "nothing is downloaded that will not be used"
    name, reason = choose_feature(3, digits=False, on_processor=False)
    assert name == ("inception" if error is None else "random")
    assert ("cannot be had" in reason) == (error is not None)


# The net of random filters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 4, 4), (3, 33, 20), (1, 28, 28)])
def test_random_filters_take_images_of_any_size_grey_or_colour(shape: tuple[int, int, int]) -> None:
    net = load_feature_net("random")
    images = 2 * torch.rand(5, *shape) - 1
    features = net(images)
    assert features.shape == (5, 192)
    torch.testing.assert_close(net(images[2:3]), features[2:3])  # whatever its batch-mates
    assert (features[0] - features[1]).abs().max() > 1e-3
    if shape[0] == 1:
        torch.testing.assert_close(net(images.expand(-1, 3, -1, -1)), features)  # grey as colour is the same picture


def test_random_filters_are_the_same_whatever_the_seed() -> None:
    """Or values would say something else than those of earlier runs."""
    torch.manual_seed(1)
    first = load_feature_net("random")
    torch.manual_seed(2)
    second = load_feature_net("random")
    images = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)
    assert torch.equal(first(images), second(images))
    assert not first.knows_images
    assert load_feature_net("digits").knows_images
    expected = torch.tensor([26.4422, 2.1454, 0.1501, 3.4712])
    torch.testing.assert_close(first(images)[0, ::48], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(first(-images)[0, ::48], expected, rtol=1e-2)
