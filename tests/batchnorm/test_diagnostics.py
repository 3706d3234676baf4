"""How far batches are from the running statistics, and what a discriminator with batch norm does not see."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bngan.batching import BATCHINGS, Batching, discriminate
from bngan.batchnorm.diagnostics import batch_dependence, kl_floor, kl_to_running, shift_blindness
from bngan.batchnorm.layers import ReferenceBatchNorm, batch_statistics
from bngan.batchnorm.statistics import BatchStatistics, evaluation_statistics, recorded_statistics
from bngan.networks import Discriminator

CHANNELS = 5

assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def of(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> BatchStatistics:
    return BatchStatistics(mean=mean, var=var, count=32, running_mean=running_mean, running_var=running_var)


# Batch against running statistics -------------------------------------------------------------------------------------


def test_kl_to_running_is_zero_where_running_and_batch_statistics_agree_and_positive_elsewhere() -> None:
    mean, var = batch_statistics(torch.randn(32, CHANNELS) * 2 + 1)
    assert kl_to_running(of(mean, var, mean, var), eps=1e-5).tolist() == [0.0] * CHANNELS
    for moved in ((mean + 0.1, var), (mean - 0.1, var), (mean, var * 1.2), (mean, var / 1.2)):
        assert (kl_to_running(of(*moved, mean, var), eps=1e-5) > 1e-4).all()


def test_kl_to_running_has_its_closed_form() -> None:
    mean = torch.randn(CHANNELS, dtype=torch.float64)
    var = torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    # A shift by k standard deviations costs k^2 / 2 nats.
    shift = torch.linspace(-2, 2, CHANNELS, dtype=torch.float64)
    assert_close(kl_to_running(of(mean, var, mean + shift * (var + 0.5).sqrt(), var), eps=0.5), shift.square() / 2)
    # A running variance e times too large costs (1/e - 1 + 1) / 2.
    found = kl_to_running(of(mean, var, mean, (var + 0.5) * math.e - 0.5), eps=0.5)
    assert_close(found, torch.full((CHANNELS,), 1 / (2 * math.e), dtype=torch.float64))


def test_kl_to_running_is_from_batch_to_running_not_back() -> None:
    mean, running_mean = torch.randn(2, CHANNELS, dtype=torch.float64)
    var, running_var = torch.rand(2, CHANNELS, dtype=torch.float64) + 0.5
    batch = torch.distributions.Normal(mean, (var + 0.1).sqrt())
    kept = torch.distributions.Normal(running_mean, (running_var + 0.1).sqrt())
    found = kl_to_running(of(mean, var, running_mean, running_var), eps=0.1)
    assert_close(found, torch.distributions.kl_divergence(batch, kept))
    assert not torch.allclose(found, torch.distributions.kl_divergence(kept, batch), atol=1e-3)


def recorded(layer: nn.Module, z: Tensor) -> BatchStatistics:
    with recorded_statistics(nn.Sequential(layer)) as seen:
        layer(z)
    (batch,) = seen["0"]
    return batch


@pytest.mark.parametrize("shape", [(32,), (128,), (256,), (8, 4, 4)], ids=str)
def test_kl_floor_is_what_chance_alone_comes_to(shape: tuple[int, ...]) -> None:
    channels = 2000
    layer = ReferenceBatchNorm(channels, momentum=0.0).double()  # running statistics stay those of the distribution
    batches = [recorded(layer, torch.randn(shape[0], channels, *shape[1:], dtype=torch.float64)) for _ in range(10)]
    found = torch.stack([kl_to_running(batch, eps=0.0).mean() for batch in batches]).mean()
    assert kl_floor(batches[0]) == 1 / math.prod(shape)
    # Of the second order are about 1 / n more; the mean over 20,000 channels is off by 0.7%, a standard deviation.
    assert float(found) == pytest.approx(kl_floor(batches[0]), rel=0.02 + 1 / math.prod(shape))


def test_running_statistics_of_their_own_batches_add_their_noise_to_the_floor() -> None:
    channels, size, momentum = 2000, 128, 0.5
    layer = ReferenceBatchNorm(channels, momentum=momentum).double()
    batches = [recorded(layer, torch.randn(size, channels, dtype=torch.float64)) for _ in range(20)]
    found = torch.stack([kl_to_running(batch, eps=0.0).mean() for batch in batches[10:]]).mean()
    assert float(found) * size == pytest.approx(1 + momentum / (2 - momentum), rel=0.04)


# What D sees ----------------------------------------------------------------------------------------------------------


def discriminator(norm: str) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(input_dim=16, hidden_dim=8, norm=norm)


@pytest.fixture
def batch_of_each() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    real = torch.rand(80, 1, 4, 4, generator=generator) * 2 - 1
    return real, torch.rand(160, 1, 4, 4, generator=generator) - 0.5


def fresh_fakes(batch_size: int) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(3)
    return lambda _: torch.rand(batch_size, 1, 4, 4, generator=generator) - 0.5


def test_discriminator_without_batch_norm_sees_each_image_alone(batch_of_each: tuple[Tensor, Tensor]) -> None:
    for norm in ("none", "layer"):
        judge = discriminator(norm)
        joint, separate = (shift_blindness(judge.logits, *batch_of_each, batching) for batching in BATCHINGS)
        assert_close(joint, separate, atol=1e-5)
        assert joint < 0.9
        for batching in BATCHINGS:
            assert float(batch_dependence(judge.logits, batch_of_each[0], fresh_fakes(16), batching, batch_size=16)) < 1e-6


@pytest.mark.parametrize("norm", ["batch", "reference", "ghost"])
def test_separate_batches_blind_a_batch_normalized_discriminator(norm: str, batch_of_each: tuple[Tensor, Tensor]) -> None:
    judge = discriminator(norm)
    assert shift_blindness(judge.logits, *batch_of_each, "separate") > 0.99
    assert shift_blindness(judge.logits, *batch_of_each, "joint") < 0.9
    for batching in BATCHINGS:
        assert 0.01 < batch_dependence(judge.logits, batch_of_each[0], fresh_fakes(16), batching, batch_size=16) < 1


def brightness(x: Tensor) -> Tensor:
    return 3 * x.flatten(start_dim=1).mean(dim=1, keepdim=True)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_shift_blindness_has_its_closed_form(batching: Batching) -> None:
    real, fake = torch.full((10, 1, 2, 2), 0.5), torch.full((10, 1, 2, 2), -0.25)
    spread = torch.cat([brightness(real), brightness(fake)]).std()
    moves = 3 * torch.tensor([0.5 * 0.25, 0.5 * 0.25, 0.5, 0.5]) / spread
    assert_close(shift_blindness(brightness, real, fake, batching), 1 / (1 + moves.mean()), atol=1e-6)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_fakes_are_changed_before_they_get_their_noise(batching: Batching) -> None:
    real, fake = torch.full((10, 1, 2, 2), 0.5), torch.full((10, 1, 2, 2), -0.25)
    noise = torch.randn(10, 1, 2, 2) + 1
    spread = torch.cat([brightness(real), brightness(fake + noise)]).std()
    moves = 3 * torch.tensor([0.5 * 0.25, 0.5 * 0.25, 0.5, 0.5]) / spread  # the noise moves no mean
    found = shift_blindness(brightness, real, fake, batching, fake_noise=noise)
    assert_close(found, 1 / (1 + moves.mean()), atol=1e-6)
    assert abs(found - shift_blindness(brightness, real, fake + noise, batching)) > 0.01


# The company that an image keeps --------------------------------------------------------------------------------------


def no_fakes(_: int) -> Tensor:
    return torch.zeros(16, 1, 1, 1)


def test_batch_dependence_is_the_share_of_the_company() -> None:
    real = torch.randn(256, 1, 1, 1, dtype=torch.float64)

    def alone(x: Tensor) -> Tensor:
        return x.flatten(start_dim=1)

    def company(x: Tensor) -> Tensor:
        return x.mean().expand(len(x), 1)

    def both(x: Tensor) -> Tensor:
        return alone(x) + 2 * company(x)

    def neither(x: Tensor) -> Tensor:
        return torch.ones(len(x), 1)

    def measured(logits: Callable[[Tensor], Tensor], rounds: int = 8) -> float:
        return float(batch_dependence(logits, real, no_fakes, "separate", batch_size=16, rounds=rounds))

    assert measured(alone) < 1e-6
    assert measured(neither) == 0
    assert 0.95 < measured(company) < 1.05
    # The image counts 1 + 2/16 itself, and each of its 15 mates 2/16.
    within, between = 15 * (2 / 16) ** 2, (1 + 2 / 16) ** 2
    assert measured(both, rounds=100) == pytest.approx(math.sqrt(within / (within + between)), rel=0.03)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_batch_dependence_draws_all_others_anew_in_batches_of_training(batching: Batching) -> None:
    real = torch.arange(1.0, 97.0).reshape(96, 1, 1, 1)
    batches: list[Tensor] = []
    drawn: list[int] = []

    def fakes(batch: int) -> Tensor:
        drawn.append(batch)
        return torch.full((32, 1, 1, 1), -1.0 - batch)

    def logits(x: Tensor) -> Tensor:
        batches.append(x.flatten())
        return torch.randn(len(x), 1, dtype=torch.float64)

    batch_dependence(logits, real, fakes, batching, batch_size=32)
    assert len(batches) == 8 * 96 // 32
    assert torch.equal(torch.cat([batch[:32] for batch in batches]).sort()[0], real.flatten().repeat_interleave(8))
    companies = {tuple(sorted(batch[:32].tolist())) for batch in batches}
    assert len(companies) == len(batches)
    if batching == "separate":
        assert (torch.cat(batches) > 0).all()
    else:
        assert drawn == list(range(len(batches)))
        for number, batch in enumerate(batches):
            assert batch[32:].tolist() == [-1.0 - number] * 32


def normalized(seed: int) -> tuple[Discriminator, Callable[[int], Tensor], Callable[[int], Tensor]]:
    """A discriminator with batch norm, and what draws it real images and fakes, whose brightness and contrast differ."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    judge = Discriminator(input_dim=16, hidden_dim=8)
    for parameter in judge.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)

    def draw(count: int, level: float) -> Tensor:
        pixels = torch.randn(count, 1, 4, 4, generator=generator)
        light, contrast = torch.randn(2, count, 1, 1, 1, generator=generator)
        return level + 0.5 * light + pixels * contrast.exp()

    return judge, lambda count: draw(count, level=0.5), lambda count: draw(count, level=-0.5)


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("batch_size", [32, 128])
def test_batch_dependence_equals_brute_force(batch_size: int, batching: Batching) -> None:
    """One image a batch is looked at, and everything beside it is drawn anew; from 32 to 128 it halves."""
    judge, draw_real, draw_fake = normalized(seed=1)
    real = draw_real(1024)

    def score(subject: Tensor) -> Tensor:
        images = torch.cat([subject, draw_real(batch_size - 1)])
        return discriminate(judge.logits, images, draw_fake(batch_size), batching)[0][0, 0]

    with evaluation_statistics(judge, "batch"):
        found = batch_dependence(judge.logits, real, lambda _: draw_fake(batch_size), batching, batch_size, rounds=32)
        scores = torch.stack([torch.stack([score(subject) for _ in range(8)]) for subject in real[::4].split(1)])
    within = scores.var(dim=1).mean()
    expected = (within / (within + scores.mean(dim=1).var() - within / 8)).sqrt()
    # Each is off by 5%, a standard deviation: the found one has 256 batches or more, the other 256 images.
    assert float(found) == pytest.approx(float(expected), rel=0.15)


@pytest.mark.parametrize("count", [0, 16, 31, 40])
def test_images_that_are_not_several_batches_are_refused(count: int) -> None:
    def measure(count: int) -> Tensor:
        return batch_dependence(discriminator("batch").logits, torch.randn(count, 1, 4, 4), fresh_fakes(16), "joint", 16)

    with pytest.raises(ValueError, match=f"several batches of 16 real images, got {count} images"):
        measure(count)
    assert measure(32).isfinite()
