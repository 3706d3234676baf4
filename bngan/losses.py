"""GAN losses by name: functions of (real_logits, fake_logits), real before fake, one for each network.

A new loss is two functions and one line in LOSSES.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from bngan.errors import UsageError


@dataclass(frozen=True)
class Loss:
    """What each network minimizes, and what a discriminator trained so says.

    Attributes:
        discriminator: the discriminator's loss, a scalar, from logits (N,) or (N, 1) of real and of fake images.
        generator: the generator's loss, likewise.
        readings: names of two scalars that show how well the discriminator tells real from fake.
        read: those scalars (2,), from the same logits.
        labelled: whether the discriminator's loss takes a `real_label`, too.
    """

    discriminator: Callable[..., Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    readings: tuple[str, str]
    read: Callable[[Tensor, Tensor], Tensor]
    labelled: bool = False


def cross_entropy_d(real_logits: Tensor, fake_logits: Tensor, real_label: float = 1.0) -> Tensor:
    """Binary cross-entropy on logits, the sum of the real and the fake half: 2 ln 2 when D cannot tell (Goodfellow 2014).

    A real label below 1 is one-sided label smoothing (Salimans et al. 2016): the fake label stays 0.
    """
    # Cross-entropy with label t is softplus(-x) + (1 - t) x.
    real = F.softplus(-real_logits) + (1 - real_label) * real_logits
    return real.mean() + F.softplus(fake_logits).mean()


def non_saturating_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log D(fake) (Goodfellow 2014, section 3)."""
    return F.softplus(-fake_logits).mean()


def minimax_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """log(1 - D(fake)): G minimizes what D maximizes (Goodfellow 2014, equation 1)."""
    return -F.softplus(fake_logits).mean()


def least_squares_d(real_logits: Tensor, fake_logits: Tensor, real_label: float = 1.0) -> Tensor:
    """Squared distance of the logits from the labels, real_label and 0 (Mao et al. 2017, equation 9)."""
    return 0.5 * ((real_logits - real_label).square().mean() + fake_logits.square().mean())


def least_squares_g(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return 0.5 * (fake_logits - 1).square().mean()


def hinge_d(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Zero once each logit is a margin of 1 on its own side (Lim & Ye 2017)."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


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


def probabilities(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return D's mean probability of being real, of real images and of fakes (2,)."""
    return torch.stack([real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()])


def pairs(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the fraction of pairs whose real image has the larger logit, and the mean probability that it has (2,).

    A relativistic loss knows differences alone: an offset of all logits changes nothing, so a sigmoid of one means nothing.
    """
    margin = real_logits - fake_logits
    return torch.stack([(margin > 0).to(margin.dtype).mean(), margin.sigmoid().mean()])


def logit_means(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the mean logit of real images and of fakes (2,): not a probability, with these losses."""
    return torch.stack([real_logits.mean(), fake_logits.mean()])


_PROBABILITIES = ("d_real_prob", "d_fake_prob"), probabilities
_PAIRS = ("d_pair_accuracy", "d_pair_prob"), pairs
_LOGITS = ("d_real_logit", "d_fake_logit"), logit_means

LOSSES: dict[str, Loss] = {
    "non_saturating": Loss(cross_entropy_d, non_saturating_g, *_PROBABILITIES, labelled=True),
    "minimax": Loss(cross_entropy_d, minimax_g, *_PROBABILITIES, labelled=True),
    "least_squares": Loss(least_squares_d, least_squares_g, *_LOGITS, labelled=True),
    "hinge": Loss(hinge_d, wasserstein_g, *_LOGITS),
    "wasserstein": Loss(wasserstein_d, wasserstein_g, *_LOGITS),
    "relativistic": Loss(relativistic_d, relativistic_g, *_PAIRS),
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
    if not loss.labelled:
        having = ", ".join(sorted(key for key, value in LOSSES.items() if value.labelled))
        raise UsageError(f"label_smoothing means nothing for the {name} loss, which has no labels; it works with {having}")
    return replace(loss, discriminator=partial(loss.discriminator, real_label=1 - label_smoothing))


def zero_centered_penalty(images: Tensor, logits: Tensor) -> Tensor:
    """Half the mean squared norm of the logits' gradient at each image: R1 on reals, R2 on fakes (Mescheder et al. 2018).

    Args:
        images: (N, ...), or (N, R, ...) of many runs, requiring gradients, from which `logits` were computed.
        logits: (N, 1) or (N, R, 1).
    """
    return 0.5 * _squared_gradient_norms(images, logits).mean()


def gradient_penalty(logits: Callable[[Tensor], Tensor], real_images: Tensor, fake_images: Tensor, mix: Tensor) -> Tensor:
    """Mean squared distance from 1 of the gradient's norm between real and fake images (Gulrajani et al. 2017, equation 3).

    Args:
        logits: the critic.
        real_images: (N, ...), or (N, R, ...) of many runs.
        fake_images: likewise.
        mix: (N,) or (N, R) in [0, 1], where between each pair to look.
    """
    mix = mix.reshape(*mix.shape, *[1] * (real_images.ndim - mix.ndim))
    between = (mix * real_images + (1 - mix) * fake_images).detach().requires_grad_()
    # The root's derivative is infinite at 0, which a dead critic reaches.
    norms = (_squared_gradient_norms(between, logits(between)) + 1e-12).sqrt()
    return (norms - 1).square().mean()


def _squared_gradient_norms(images: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.flatten(start_dim=logits.ndim - 1).square().sum(dim=-1)
