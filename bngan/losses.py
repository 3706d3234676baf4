"""GAN losses by name: functions of (real_logits, fake_logits), real before fake, one for each network.

A new loss is two functions and one line in LOSSES.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bngan.errors import UsageError

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """What each network minimizes.

    Attributes:
        discriminator: the discriminator's loss, a scalar, from logits (N,) or (N, 1) of real and of fake images.
        generator: the generator's loss, likewise.
        smoothed: builds the discriminator's loss with real labels of 1 - smoothing; None where labels have no meaning.
    """

    discriminator: LossFunction
    generator: LossFunction
    smoothed: Callable[[float], LossFunction] | None = None


def cross_entropy_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Binary cross-entropy on logits, the mean of the real and the fake half: ln 2 when D cannot tell (Goodfellow 2014)."""
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def smoothed_cross_entropy_d(smoothing: float) -> LossFunction:
    """One-sided label smoothing: the real label is 1 - smoothing, the fake label stays 0 (Salimans et al. 2016)."""

    def loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        # Cross-entropy with target t is softplus(-x) + (1 - t) x.
        return cross_entropy_d(real_logits, fake_logits) + 0.5 * smoothing * real_logits.mean()

    return loss


def non_saturating_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log D(fake) (Goodfellow 2014, section 3)."""
    return F.softplus(-fake_logits).mean()


def minimax_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """log(1 - D(fake)): G minimizes what D maximizes (Goodfellow 2014, equation 1)."""
    return -F.softplus(fake_logits).mean()


def least_squares_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Squared distance of the logits from the labels 1 and 0 (Mao et al. 2017, equation 9)."""
    return smoothed_least_squares_d(smoothing=0.0)(real_logits, fake_logits)


def smoothed_least_squares_d(smoothing: float) -> LossFunction:
    def loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        return 0.5 * ((real_logits - (1 - smoothing)).square().mean() + fake_logits.square().mean())

    return loss


def least_squares_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return 0.5 * (fake_logits - 1).square().mean()


def hinge_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Zero once each logit is a margin of 1 on its own side (Lim & Ye 2017)."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def hinge_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return -fake_logits.mean()


def wasserstein_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The negative of the estimated distance; it needs a Lipschitz critic (Arjovsky et al. 2017)."""
    return fake_logits.mean() - real_logits.mean()


def wasserstein_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return -fake_logits.mean()


def relativistic_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Each real image against the fake it is paired with: softplus(-(real - fake)) (Jolicoeur-Martineau 2018)."""
    return F.softplus(fake_logits - real_logits).mean()


def relativistic_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return F.softplus(real_logits - fake_logits).mean()


LOSSES: dict[str, Loss] = {
    "non_saturating": Loss(cross_entropy_d, non_saturating_g, smoothed=smoothed_cross_entropy_d),
    "minimax": Loss(cross_entropy_d, minimax_g, smoothed=smoothed_cross_entropy_d),
    "least_squares": Loss(least_squares_d, least_squares_g, smoothed=smoothed_least_squares_d),
    "hinge": Loss(hinge_d, hinge_g),
    "wasserstein": Loss(wasserstein_d, wasserstein_g),
    "relativistic": Loss(relativistic_d, relativistic_g),
}


def find_loss(name: str, label_smoothing: float = 0.0) -> Loss:
    """Return the loss of that name, its real labels smoothed.

    Raises:
        UsageError: if there is no such loss, or if smoothing is asked of a loss without labels.
    """
    if name not in LOSSES:
        raise UsageError(f"unknown loss {name!r}; choose from {', '.join(sorted(LOSSES))}")
    loss = LOSSES[name]
    if not label_smoothing:
        return loss
    if loss.smoothed is None:
        having = ", ".join(sorted(key for key, value in LOSSES.items() if value.smoothed))
        raise UsageError(f"label_smoothing means nothing for the {name} loss, which has no labels; it works with {having}")
    return Loss(loss.smoothed(label_smoothing), loss.generator)


def zero_centered_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """Half the mean squared norm of the logits' gradient at each image: R1 on reals, R2 on fakes (Mescheder et al. 2018).

    Args:
        images: (N, ...), requiring gradients, from which `logits` were computed one by one.
        logits: (N,) or (N, 1).
    """
    return 0.5 * _squared_gradient_norms(images, logits).mean()


def gradient_penalty(logits: Callable[[Tensor], Tensor], real_images: Tensor, fake_images: Tensor, mix: Tensor) -> Tensor:
    """Mean squared distance from 1 of the gradient's norm between real and fake images (Gulrajani et al. 2017, equation 3).

    Args:
        logits: the critic.
        real_images: (N, ...).
        fake_images: (N, ...).
        mix: (N,) in [0, 1], where between each pair to look.
    """
    mix = mix.reshape(-1, *[1] * (real_images.ndim - 1))
    between = (mix * real_images + (1 - mix) * fake_images).detach().requires_grad_()
    # The root's derivative is infinite at 0, which a dead critic reaches.
    norms = (_squared_gradient_norms(between, logits(between)) + 1e-12).sqrt()
    return (norms - 1).square().mean()


def _squared_gradient_norms(images: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.flatten(start_dim=1).square().sum(dim=1)
