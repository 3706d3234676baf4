"""Each loss against hand-computed values and torch's own, and the penalties on critics whose gradient is known."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bngan.errors import UsageError
from bngan.losses import LOSSES, find_loss, gradient_penalty, zero_centered_penalty

REAL = torch.tensor([2.0, -1.0], dtype=torch.float64)
FAKE = torch.tensor([0.5, -3.0], dtype=torch.float64)
HAVING_LABELS = ["least_squares", "minimax", "non_saturating"]
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-8)  # softplus is linear above 20, to 2e-9


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


CROSS_ENTROPY_D = (softplus(-2) + softplus(1) + softplus(0.5) + softplus(-3)) / 2

BY_HAND = {
    "non_saturating": (CROSS_ENTROPY_D, (softplus(-0.5) + softplus(3)) / 2),
    "minimax": (CROSS_ENTROPY_D, -(softplus(0.5) + softplus(-3)) / 2),
    "least_squares": (((1 + 4) / 2 + (0.25 + 9) / 2) / 2, (0.25 + 16) / 2 / 2),
    "hinge": ((0 + 2) / 2 + (1.5 + 0) / 2, 1.25),
    "wasserstein": (-1.25 - 0.5, 1.25),
    "relativistic": ((softplus(-1.5) + softplus(-2)) / 2, (softplus(1.5) + softplus(2)) / 2),
}


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_has_the_value_computed_by_hand(name: str, shape: tuple[int, ...]) -> None:
    loss, (d_loss, g_loss) = LOSSES[name], BY_HAND[name]
    real, fake = REAL.reshape(shape), FAKE.reshape(shape)
    assert_close(loss.discriminator(real, fake), torch.tensor(d_loss, dtype=torch.float64))
    assert_close(loss.generator(real, fake), torch.tensor(g_loss, dtype=torch.float64))
    # Swapped arguments would not go unnoticed.
    assert abs(float(loss.discriminator(fake, real)) - d_loss) > 0.1
    assert abs(float(loss.generator(fake, real)) - g_loss) > 0.1


def test_cross_entropy_equals_torch() -> None:
    real, fake = torch.randn(2, 100, dtype=torch.float64) * 5
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    entropy = F.binary_cross_entropy_with_logits
    loss = LOSSES["non_saturating"]
    both = entropy(real, ones) + entropy(fake, zeros)
    assert_close(loss.discriminator(real, fake), both)
    assert_close(loss.generator(real, fake), entropy(fake, ones))
    assert_close(LOSSES["minimax"].generator(real, fake), -entropy(fake, zeros))
    assert not torch.allclose(both, entropy(torch.cat([real, fake]), torch.cat([zeros, ones])), atol=1e-2)


def test_relativistic_loss_is_the_cross_entropy_of_the_difference() -> None:
    real, fake = torch.randn(2, 100, dtype=torch.float64) * 5
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    loss = LOSSES["relativistic"]
    assert_close(loss.discriminator(real, fake), F.binary_cross_entropy_with_logits(real - fake, ones))
    assert_close(loss.generator(real, fake), F.binary_cross_entropy_with_logits(real - fake, zeros))
    # Only differences count: a common shift of the logits changes nothing, and it does for a loss with labels.
    assert_close(loss.discriminator(real + 3, fake + 3), loss.discriminator(real, fake))
    labelled = LOSSES["non_saturating"].discriminator
    assert abs(float(labelled(real + 3, fake + 3) - labelled(real, fake))) > 0.1


def test_losses_start_at_ln_2_a_half_when_the_discriminator_cannot_tell() -> None:
    undecided, same = torch.zeros(8), torch.full((8,), 1.7)
    ln_2 = torch.tensor(math.log(2))
    for name, halves in (("non_saturating", 2), ("minimax", 2), ("relativistic", 1)):
        torch.testing.assert_close(LOSSES[name].discriminator(undecided, undecided), halves * ln_2)
        torch.testing.assert_close(LOSSES[name].generator(undecided, undecided).abs(), ln_2)
    torch.testing.assert_close(LOSSES["relativistic"].discriminator(same, same), ln_2)
    assert LOSSES["non_saturating"].discriminator(same, same) > 2 * ln_2 + 0.1


def test_r1_weighs_against_cross_entropy_as_mescheders() -> None:
    """A linear D of real 1/2 and fake -1/2 is best where the loss's slope, sigmoid(-w / 2), is the penalty's, gamma w."""
    gamma, real, fake = 10.0, torch.tensor([[0.5]]), torch.tensor([[-0.5]])
    w = torch.tensor([[0.1]], requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-12)

    def step() -> Tensor:
        optimizer.zero_grad()
        images = real.clone().requires_grad_()
        loss = LOSSES["non_saturating"].discriminator(images @ w, fake @ w)
        loss = loss + gamma * zero_centered_penalty(images, images @ w)
        loss.backward(inputs=[w])
        return loss

    optimizer.step(step)
    slope = float(torch.sigmoid(-w / 2))
    assert float(w) == pytest.approx(slope / gamma, rel=1e-4)  # Mescheder et al. 2018, equations 1 and 9
    assert float(w) != pytest.approx(slope / (2 * gamma), rel=0.1)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_readings_tell_what_the_loss_knows(name: str) -> None:
    """An offset of all logits is nothing to a loss of differences, and perfect ones read as what the loss asks for."""
    loss = LOSSES[name]
    real, fake = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    first, second = loss.read(real, fake).tolist()
    assert loss.read(real, fake).shape == (2,)
    match loss.readings:
        case ("d_real_prob", "d_fake_prob"):
            assert (first, second) == pytest.approx((float(real.sigmoid().mean()), float(fake.sigmoid().mean())))
            assert name in ("non_saturating", "minimax")
        case ("d_pair_accuracy", "d_pair_prob"):
            assert first == pytest.approx(sum(r > f for r, f in zip(real, fake, strict=True)) / 500)
            assert second == pytest.approx(float((real - fake).sigmoid().mean()))
            torch.testing.assert_close(loss.read(real + 5, fake + 5), loss.read(real, fake))
            assert name == "relativistic"
        case ("d_real_logit", "d_fake_logit"):
            assert (first, second) == pytest.approx((float(real.mean()), float(fake.mean())))
            assert name in ("least_squares", "hinge", "wasserstein")
            assert loss.read(torch.ones(3), torch.zeros(3)).tolist() == [1, 0]  # a perfect least squares D
        case readings:
            raise AssertionError(readings)


def test_hinge_is_zero_beyond_its_margin_alone() -> None:
    hinge = LOSSES["hinge"].discriminator
    assert hinge(torch.tensor([1.0, 7.0]), torch.tensor([-1.0, -7.0])) == 0
    assert hinge(torch.tensor([0.9]), torch.tensor([-1.0])) > 0
    assert hinge(torch.tensor([1.0]), torch.tensor([-0.9])) > 0


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_networks_pull_logits_in_opposite_directions(name: str) -> None:
    """D wants real logits up and fake ones down; G wants fake ones up."""
    real = torch.tensor([0.3, -0.4], requires_grad=True)
    fake = torch.tensor([0.2, -0.6], requires_grad=True)
    d_real, d_fake = torch.autograd.grad(LOSSES[name].discriminator(real, fake), [real, fake])
    (g_fake,) = torch.autograd.grad(LOSSES[name].generator(real, fake), [fake])
    assert (d_real < 0).all()
    if name == "least_squares":  # which pulls towards the label 0, not down
        assert torch.equal(d_fake.sign(), fake.detach().sign())
    else:
        assert (d_fake > 0).all()
    assert (g_fake < 0).all()


def test_minimax_generator_stalls_where_the_non_saturating_one_learns() -> None:
    fake = torch.tensor([-12.0], requires_grad=True)
    (stalled,) = torch.autograd.grad(LOSSES["minimax"].generator(fake, fake), fake)
    (learning,) = torch.autograd.grad(LOSSES["non_saturating"].generator(fake, fake), fake)
    assert -1e-4 < float(stalled) < 0
    assert float(learning) < -0.99


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_extreme_logits_stay_finite(name: str) -> None:
    extreme = torch.tensor([1e4, -1e4])
    probabilities = extreme.sigmoid()
    assert not probabilities.log().isfinite().all()  # what computing by probabilities would meet
    for loss in (LOSSES[name].discriminator, LOSSES[name].generator):
        assert loss(extreme, extreme.flip(0)).isfinite()


# Label smoothing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["non_saturating", "minimax"])
@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_smoothing_is_cross_entropy_with_a_real_label_below_1_and_a_fake_label_of_0(name: str, smoothing: float) -> None:
    real, fake = torch.randn(2, 50, dtype=torch.float64) * 4
    loss = find_loss(name, smoothing)
    entropy = F.binary_cross_entropy_with_logits
    halves = entropy(real, torch.full_like(real, 1 - smoothing)), entropy(fake, torch.zeros_like(fake))
    assert_close(loss.discriminator(real, fake), sum(halves))
    assert loss.generator is LOSSES[name].generator
    assert not torch.allclose(loss.discriminator(real, fake), LOSSES[name].discriminator(real, fake), atol=1e-3)


@pytest.mark.parametrize("name", HAVING_LABELS)
def test_smoothing_moves_the_best_real_logit_to_its_label(name: str) -> None:
    best = {"least_squares": 0.75}.get(name, math.log(0.75 / 0.25))
    real = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    for smoothing, at_rest in ((0.25, True), (0.0, False)):
        (slope,) = torch.autograd.grad(find_loss(name, smoothing).discriminator(real, torch.zeros_like(real)), real)
        assert (abs(float(slope)) < 1e-12) == at_rest


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_smoothing_is_the_plain_loss(name: str) -> None:
    assert find_loss(name) is LOSSES[name]
    assert find_loss(name, 0.0) is LOSSES[name]


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(HAVING_LABELS)))
def test_smoothing_is_refused_where_there_are_no_labels(name: str) -> None:
    with pytest.raises(UsageError, match=f"the {name} loss, which has no labels; it works with {', '.join(HAVING_LABELS)}"):
        find_loss(name, 0.1)


def test_an_unknown_loss_is_refused_with_the_list_of_losses() -> None:
    with pytest.raises(UsageError, match=f"unknown loss 'bce'; choose from {', '.join(sorted(LOSSES))}"):
        find_loss("bce")


# Penalties ------------------------------------------------------------------------------------------------------------


def half_square(images: Tensor) -> Tensor:
    """A critic whose gradient at an image is the image."""
    return images.flatten(1).square().sum(dim=1, keepdim=True) / 2


def linear_critic() -> nn.Linear:
    return nn.Linear(6, 1).double()


def squared_norm(critic: nn.Linear) -> Tensor:
    return critic.weight.detach().square().sum()


def test_zero_centered_penalty_of_a_linear_critic_is_half_its_squared_norm() -> None:
    critic = linear_critic()
    images = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert_close(zero_centered_penalty(images, critic(images)).detach(), squared_norm(critic) / 2)
    assert_close(zero_centered_penalty(images, 3 * critic(images)).detach(), 9 * squared_norm(critic) / 2)


@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 3, 3)])
def test_zero_centered_penalty_averages_over_images(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = images.detach().flatten(1).square().sum(dim=1).mean() / 2
    assert_close(zero_centered_penalty(images, half_square(images)).detach(), expected)


def test_zero_centered_penalty_trains_the_weights() -> None:
    critic = linear_critic()
    images = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(zero_centered_penalty(images, critic(images)), critic.weight)
    assert_close(found, critic.weight.detach())  # d(|w|^2 / 2) / dw


def test_gradient_penalty_of_a_linear_critic_is_its_norms_squared_distance_from_1() -> None:
    critic = linear_critic()
    real, fake, mix = torch.randn(5, 6).double(), torch.randn(5, 6).double(), torch.rand(5).double()
    for norm, expected in ((1.0, 0.0), (3.0, 4.0), (0.5, 0.25)):
        with torch.no_grad():
            critic.weight.mul_(norm / squared_norm(critic).sqrt())
        found = gradient_penalty(critic, real, fake, mix).detach()
        torch.testing.assert_close(float(found), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3, 3)])
def test_gradient_penalty_looks_between_each_real_and_fake_image(shape: tuple[int, ...]) -> None:
    real, fake = torch.randn(2, *shape, dtype=torch.float64)
    mix = torch.tensor([1.0, 0.0, 0.25, 0.5], dtype=torch.float64)
    places = torch.stack([share * r + (1 - share) * f for share, r, f in zip(mix, real, fake, strict=True)])
    expected = (places.flatten(1).norm(dim=1) - 1).square().mean()
    torch.testing.assert_close(gradient_penalty(half_square, real, fake, mix).detach(), expected, rtol=0, atol=1e-9)
    swapped = gradient_penalty(half_square, fake, real, mix).detach()
    assert abs(float(swapped - expected)) > 1e-3


def test_gradient_penalty_trains_the_weights() -> None:
    critic = linear_critic()
    real, fake, mix = torch.randn(5, 6).double(), torch.randn(5, 6).double(), torch.rand(5).double()
    (found,) = torch.autograd.grad(gradient_penalty(critic, real, fake, mix), critic.weight)
    norm = squared_norm(critic).sqrt()
    expected = 2 * (norm - 1) * critic.weight.detach() / norm
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_gradient_penalty_of_a_dead_critic_has_a_finite_gradient() -> None:
    critic = linear_critic()
    nn.init.zeros_(critic.weight)
    real, fake, mix = torch.randn(5, 6).double(), torch.randn(5, 6).double(), torch.rand(5).double()
    penalty = gradient_penalty(critic, real, fake, mix)
    (found,) = torch.autograd.grad(penalty, critic.weight)
    assert found.isfinite().all()
    assert float(penalty.detach()) == pytest.approx(1, abs=1e-5)
    bare = torch.zeros(1, requires_grad=True)
    (without_care,) = torch.autograd.grad((bare * bare).sqrt(), bare)
    assert not without_care.isfinite().all()


def test_gradient_penalty_sends_no_gradient_to_the_generator() -> None:
    critic = linear_critic()
    fake = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    real, mix = torch.randn(5, 6).double(), torch.rand(5).double()
    (found,) = torch.autograd.grad(gradient_penalty(critic, real, fake, mix), fake, allow_unused=True)
    assert found is None
    (by_logits,) = torch.autograd.grad(critic(fake).sum(), fake)
    assert by_logits.abs().max() > 0
