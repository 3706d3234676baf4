"""How far batches are from the running statistics, and what a discriminator with batch norm does not see."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bngan.batching import BATCHINGS, Batching
from bngan.batchnorm import (
    BatchStatistics,
    ReferenceBatchNorm,
    batch_dependence,
    batch_statistics,
    kl_to_running,
    running_statistics,
    shift_blindness,
)
from bngan.networks import Discriminator

CHANNELS = 5

assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)


def of(mean: Tensor, var: Tensor) -> BatchStatistics:
    return BatchStatistics(mean=mean, var=var, count=32)


# Batch against running statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, ReferenceBatchNorm])
def test_kl_to_running_is_zero_where_running_and_batch_statistics_agree_and_positive_elsewhere(
    kind: type[nn.BatchNorm1d] | type[ReferenceBatchNorm],
) -> None:
    layer = kind(CHANNELS)
    mean, var = batch_statistics(torch.randn(32, CHANNELS) * 2 + 1)
    for buffer, value in zip(running_statistics(layer), (mean, var), strict=True):
        buffer.copy_(value)
    assert kl_to_running(layer, of(mean, var)).tolist() == [0.0] * CHANNELS
    for moved in (of(mean + 0.1, var), of(mean - 0.1, var), of(mean, var * 1.2), of(mean, var / 1.2)):
        assert (kl_to_running(layer, moved) > 1e-4).all()


def test_kl_to_running_has_its_closed_form() -> None:
    layer = ReferenceBatchNorm(CHANNELS, eps=0.5).double()
    mean = torch.randn(CHANNELS, dtype=torch.float64)
    var = torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    layer.running_var.copy_(var)
    # A shift by k standard deviations costs k^2 / 2 nats.
    shift = torch.linspace(-2, 2, CHANNELS, dtype=torch.float64)
    layer.running_mean.copy_(mean + shift * (var + 0.5).sqrt())
    assert_close(kl_to_running(layer, of(mean, var)), shift.square() / 2)
    # A running variance e times too large costs (1/e - 1 + 1) / 2.
    layer.running_mean.copy_(mean)
    layer.running_var.copy_((var + 0.5) * math.e - 0.5)
    assert_close(kl_to_running(layer, of(mean, var)), torch.full((CHANNELS,), 1 / (2 * math.e), dtype=torch.float64))


def test_kl_to_running_is_from_batch_to_running_not_back() -> None:
    layer = ReferenceBatchNorm(CHANNELS, eps=0.1).double()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    mean, var = torch.randn(CHANNELS, dtype=torch.float64), torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    batch = torch.distributions.Normal(mean, (var + 0.1).sqrt())
    kept = torch.distributions.Normal(layer.running_mean, (layer.running_var + 0.1).sqrt())
    found = kl_to_running(layer, of(mean, var))
    assert_close(found, torch.distributions.kl_divergence(batch, kept))
    assert not torch.allclose(found, torch.distributions.kl_divergence(kept, batch), atol=1e-3)


# What D sees ----------------------------------------------------------------------------------------------------------


def discriminator(norm: str) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(input_dim=16, hidden_dim=8, norm=norm)


@pytest.fixture
def batch_of_each() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    real = torch.rand(80, 1, 4, 4, generator=generator) * 2 - 1
    return real, torch.rand(160, 1, 4, 4, generator=generator) - 0.5


def test_discriminator_without_batch_norm_sees_each_image_alone(batch_of_each: tuple[Tensor, Tensor]) -> None:
    for norm in ("none", "layer"):
        judge = discriminator(norm)
        joint, separate = (shift_blindness(judge.logits, *batch_of_each, batching) for batching in BATCHINGS)
        assert_close(joint, separate, atol=1e-5)
        assert joint < 0.9
        for batching in BATCHINGS:
            assert float(batch_dependence(judge.logits, *batch_of_each, batching)) < 1e-6


@pytest.mark.parametrize("norm", ["batch", "reference", "ghost"])
def test_separate_batches_blind_a_batch_normalized_discriminator(norm: str, batch_of_each: tuple[Tensor, Tensor]) -> None:
    judge = discriminator(norm)
    assert shift_blindness(judge.logits, *batch_of_each, "separate") > 0.99
    assert shift_blindness(judge.logits, *batch_of_each, "joint") < 0.9
    for batching in BATCHINGS:
        assert 0.01 < batch_dependence(judge.logits, *batch_of_each, batching) < 1


@pytest.mark.parametrize("batching", BATCHINGS)
def test_shift_blindness_has_its_closed_form(batching: Batching) -> None:
    real, fake = torch.full((10, 1, 2, 2), 0.5), torch.full((10, 1, 2, 2), -0.25)

    def brightness(x: Tensor) -> Tensor:
        return 3 * x.flatten(start_dim=1).mean(dim=1, keepdim=True)

    spread = torch.cat([brightness(real), brightness(fake)]).std()
    moves = 3 * torch.tensor([0.5 * 0.25, 0.5 * 0.25, 0.5, 0.5]) / spread
    assert_close(shift_blindness(brightness, real, fake, batching), 1 / (1 + moves.mean()), atol=1e-6)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_batch_dependence_is_one_where_the_company_is_all_that_matters(
    batching: Batching, batch_of_each: tuple[Tensor, Tensor]
) -> None:
    def only_company(x: Tensor) -> Tensor:
        return x.mean().expand(len(x), 1)

    def only_itself(x: Tensor) -> Tensor:
        return x.flatten(start_dim=1).mean(dim=1, keepdim=True)

    def both(x: Tensor) -> Tensor:
        return only_itself(x) + only_company(x)

    def neither(x: Tensor) -> Tensor:
        return torch.zeros(len(x), 1)

    alone, mixed, company = (
        float(batch_dependence(logits, *batch_of_each, batching)) for logits in (only_itself, both, only_company)
    )
    assert company == pytest.approx(1, abs=1e-3)
    assert alone < 1e-6
    assert 0.01 < mixed < 0.9
    assert float(batch_dependence(neither, *batch_of_each, batching)) == 0
    blindness = [float(shift_blindness(logits, *batch_of_each, batching)) for logits in (neither, only_itself)]
    assert blindness[0] == pytest.approx(1)
    assert blindness[1] < 0.9


def test_batch_dependence_scores_the_same_images_in_company_that_never_meets_again(
    batch_of_each: tuple[Tensor, Tensor],
) -> None:
    real, fake = batch_of_each
    batches: list[Tensor] = []
    scores: list[Tensor] = []

    def logits(x: Tensor) -> Tensor:
        batches.append(x)
        scores.append(torch.randn(len(x), 1))
        return scores[-1]

    found = batch_dependence(logits, real, fake, "joint")
    assert [len(batch) for batch in batches] == [16 + 16 + 32] * 4  # the images, as many other real ones, and fakes
    for batch in batches:
        assert torch.equal(batch[:16], real[:16])
    company = torch.cat([batch[16:32] for batch in batches])
    assert torch.equal(company, real[16:])
    assert torch.equal(torch.cat([batch[32:] for batch in batches]), fake[:128])
    of_images = torch.stack([score[:16, 0] for score in scores])  # (company, image)
    explained = of_images.var(dim=0, correction=0).mean() / of_images.var(correction=0)
    assert_close(found, explained.sqrt(), atol=1e-6)


@pytest.mark.parametrize(("real", "fake"), [(4, 20), (0, 20), (20, 3), (20, 0)])
def test_too_few_images_for_batch_mates_are_refused(real: int, fake: int) -> None:
    with pytest.raises(ValueError, match="at least 5 real images and 4 fakes"):
        batch_dependence(discriminator("batch").logits, torch.zeros(real, 1, 4, 4), torch.zeros(fake, 1, 4, 4), "joint")
    assert batch_dependence(discriminator("batch").logits, torch.randn(5, 1, 4, 4), torch.randn(8, 1, 4, 4), "joint").isfinite()
