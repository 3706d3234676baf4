"""A GAN's training written from the papers, in float64, with nothing of the package but the networks: what bngan is held to.

It is plain on purpose: losses are logarithms of probabilities, gradients are asked for by name, Adam is written out.
Where the papers leave a choice, it is bngan's:
- G is updated on the images of D's last update: the same latents, the same noise. A further update of G is on the images that
  it makes of those latents by then, with noise of their own.
- A fake is of the class of the real image in its place, in images as in the pairs of a loss, where there are classes.
- A pack of m images, of N, has the channels of the images i, i + N/m, i + 2 N/m.... It is made of noisy images, and all that D
  is asked, penalties included, is asked of packs.
- The moving average is that of the iterations so far, without the weights of the start.
- A bias in front of batch norm stays as it was.
- An iteration draws from one generator, for each update of D in this order: noise on the real images (N, C, H, W), latents
  (N, latent_dim), noise on the fakes, and WGAN-GP's place between each pair (N,). Without instance noise, none is drawn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bngan.blocks import DiscriminatorNetwork, GeneratorNetwork

Seen = dict[str, float | list[float]]


@dataclass(frozen=True)
class Recipe:
    """Settings of the same names and meanings as GAN's."""

    latent_dim: int
    loss: str
    label_smoothing: float
    r1: float
    r2: float
    gradient_penalty: float
    batching: str
    update_d_stats_in_g_step: bool
    pack: int
    n_critic: int
    g_steps: int
    g_lr: float
    d_lr: float
    beta1: float
    beta2: float
    lr_decay_start: float
    instance_noise: float
    instance_noise_end: float
    g_clip: float | None
    d_clip: float | None
    ema_decay: float
    ema_buffers: str


class NaiveGAN:
    """Two networks that are trained in place for `total` iterations, and G's moving average, if there is one."""

    def __init__(
        self,
        generator: GeneratorNetwork,
        discriminator: DiscriminatorNetwork,
        average: nn.Module | None,
        recipe: Recipe,
        total: int,
    ) -> None:
        self.generator, self.discriminator, self.average = generator, discriminator, average
        self.recipe, self.total = recipe, total
        self.labels: Tensor | None = None  # of the present update's images
        self.d_adam, self.g_adam = (Adam(network, recipe.beta1, recipe.beta2) for network in (discriminator, generator))

    def iterate(self, iteration: int, batch: Tensor, rng: torch.Generator, labels: Tensor | None = None) -> Seen:
        """Train on images (n_critic * N, C, H, W) in [-1, 1], of classes (n_critic * N,) if there are any.

        Return what the last updates saw (Goodfellow et al. 2014).
        """
        recipe, done = self.recipe, iteration / self.total
        seen: Seen = {}
        lr_scale = 1.0 if done < recipe.lr_decay_start else (1 - done) / (1 - recipe.lr_decay_start)
        deviation = recipe.instance_noise * max(0.0, 1 - done / recipe.instance_noise_end)

        if recipe.instance_noise:
            self.discriminator.instance_noise.fill_(deviation)  # for the reference batch of virtual batch norm

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        def shown(images: Tensor) -> Tensor:
            noisy = images + deviation * draw(*images.shape) if recipe.instance_noise else images
            between = len(images) // recipe.pack
            return torch.stack([torch.cat([*noisy[first::between]]) for first in range(between)])

        real = fake = latents = batch[:0]
        for number, images in enumerate(batch.chunk(recipe.n_critic)):
            self.labels = None if labels is None else labels[number * len(images) : (number + 1) * len(images)]
            real = shown(images)
            latents = draw(len(images), recipe.latent_dim)
            fake = shown(self.generator(latents, self.labels).view_as(images))
            seen |= self.update_discriminator(real, fake.detach(), recipe.d_lr * lr_scale, rng)  # D's loss does not train G
        seen |= self.update_generator(real, fake, recipe.g_lr * lr_scale)
        for _ in range(1, recipe.g_steps):
            fake = shown(self.generator(latents, self.labels).view(len(latents), *batch.shape[1:]))
            seen |= self.update_generator(real, fake, recipe.g_lr * lr_scale)
        if self.average is not None:
            ages = torch.arange(iteration + 1, dtype=torch.float64)
            decay = 1 - 1 / (recipe.ema_decay**ages).sum().item()
            follow(self.average, self.generator, decay, recipe.ema_buffers)
        return seen

    def update_discriminator(self, real: Tensor, fake: Tensor, lr: float, rng: torch.Generator) -> Seen:
        recipe = self.recipe
        real, fake = real.clone().requires_grad_(), fake.clone().requires_grad_()
        real_logits, fake_logits = self.discriminate(real, fake)
        loss = d_objective(recipe.loss, real_logits, fake_logits, recipe.label_smoothing)
        penalized = loss
        if recipe.r1:  # Mescheder et al. 2018, equation 9, and its twin
            penalized = penalized + recipe.r1 / 2 * (slopes(real_logits, real) ** 2).mean()
        if recipe.r2:
            penalized = penalized + recipe.r2 / 2 * (slopes(fake_logits, fake) ** 2).mean()
        if recipe.gradient_penalty:  # Gulrajani et al. 2017, algorithm 1
            mix = torch.rand(len(real), generator=rng, dtype=torch.float64).view(-1, 1, 1, 1)
            between = (mix * real + (1 - mix) * fake).detach().requires_grad_()
            slope = slopes(self.discriminator.logits(between, self.labels), between)
            penalized = penalized + recipe.gradient_penalty * ((slope - 1) ** 2).mean()
        norm = self.d_adam.step(penalized, lr, recipe.d_clip)
        return {"d_loss": loss.item(), "d_readings": readings(recipe.loss, real_logits, fake_logits), "d_grad_norm": norm}

    def update_generator(self, real: Tensor, fake: Tensor, lr: float) -> Seen:
        statistics = [buffer for name, buffer in self.discriminator.named_buffers() if "running" in name or "tracked" in name]
        before = [buffer.clone() for buffer in statistics]
        loss = g_objective(self.recipe.loss, *self.discriminate(real, fake))
        norm = self.g_adam.step(loss, lr, self.recipe.g_clip)
        if not self.recipe.update_d_stats_in_g_step:
            for buffer, value in zip(statistics, before, strict=True):
                buffer.copy_(value)
        return {"g_loss": loss.item(), "g_grad_norm": norm}

    def discriminate(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        if self.recipe.batching == "separate":
            return self.discriminator.logits(real, self.labels), self.discriminator.logits(fake, self.labels)
        twice = None if self.labels is None else torch.cat([self.labels, self.labels])
        both = self.discriminator.logits(torch.cat([real, fake]), twice)
        return both[: len(real)], both[len(real) :]


def d_objective(loss: str, real: Tensor, fake: Tensor, label_smoothing: float) -> Tensor:
    """Return what D minimizes, of logits (N, 1)."""
    label = 1 - label_smoothing
    match loss:
        case "non_saturating" | "minimax":  # Goodfellow et al. 2014, equation 1; smoothed by Salimans et al. 2016, section 3.4
            on_real = label * real.sigmoid().log() + (1 - label) * (1 - real.sigmoid()).log()
            return -(on_real.mean() + (1 - fake.sigmoid()).log().mean())
        case "least_squares":  # Mao et al. 2017, equation 9
            return ((real - label) ** 2).mean() / 2 + (fake**2).mean() / 2
        case "hinge":  # Lim & Ye 2017
            return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
        case "wasserstein":  # Arjovsky et al. 2017, algorithm 1
            return -(real.mean() - fake.mean())
        case "relativistic":  # Jolicoeur-Martineau 2018, section 4.1
            return -(real - fake).sigmoid().log().mean()
    raise ValueError(loss)


def g_objective(loss: str, real: Tensor, fake: Tensor) -> Tensor:
    """Return what G minimizes, of logits (N, 1)."""
    match loss:
        case "non_saturating":
            return -fake.sigmoid().log().mean()
        case "minimax":
            return (1 - fake.sigmoid()).log().mean()
        case "least_squares":
            return ((fake - 1) ** 2).mean() / 2
        case "hinge" | "wasserstein":
            return -fake.mean()
        case "relativistic":
            return -(fake - real).sigmoid().log().mean()
    raise ValueError(loss)


def readings(loss: str, real: Tensor, fake: Tensor) -> list[float]:
    """Return what shows how well D tells real from fake: probabilities, where its logits are some, pairs, or logits."""
    match loss:
        case "non_saturating" | "minimax":
            return [(1 / (1 + (-real).exp())).mean().item(), (1 / (1 + (-fake).exp())).mean().item()]
        case "relativistic":
            return [(real > fake).double().mean().item(), (1 / (1 + (fake - real).exp())).mean().item()]
    return [real.mean().item(), fake.mean().item()]


def slopes(logits: Tensor, images: Tensor) -> Tensor:
    """Return the norms (N,) of the logits' gradients at their images."""
    (gradient,) = torch.autograd.grad(logits, images, torch.ones_like(logits), create_graph=True)
    return gradient.flatten(start_dim=1).norm(dim=1)


class Adam:
    """Kingma & Ba 2015, algorithm 1."""

    def __init__(self, network: nn.Module, beta1: float, beta2: float) -> None:
        self.weights, self.beta1, self.beta2, self.t = [w for w in network.parameters() if w.requires_grad], beta1, beta2, 0
        self.m, self.v = ([torch.zeros_like(weight) for weight in self.weights] for _ in range(2))

    def step(self, loss: Tensor, lr: float, clip: float | None) -> float:
        """Move the weights; return the gradient's norm before clipping."""
        gradients = torch.autograd.grad(loss, self.weights)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        # Pascanu et al. 2013, algorithm 1; torch adds 1e-6 to the norm.
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        self.t += 1
        with torch.no_grad():
            for weight, gradient, m, v in zip(self.weights, gradients, self.m, self.v, strict=True):
                m.copy_(self.beta1 * m + (1 - self.beta1) * scale * gradient)
                v.copy_(self.beta2 * v + (1 - self.beta2) * (scale * gradient) ** 2)
                m_hat, v_hat = m / (1 - self.beta1**self.t), v / (1 - self.beta2**self.t)
                weight -= lr * m_hat / (v_hat.sqrt() + 1e-8)
        return norm


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float, buffers: str) -> None:
    """Move the average's weights towards the network's, and its running statistics too or else copy them."""
    for own, value in zip(average.parameters(), network.parameters(), strict=True):
        own.copy_(decay * own + (1 - decay) * value)
    for (name, own), value in zip(average.named_buffers(), network.buffers(), strict=True):
        if name.endswith(("_u", "_v")):
            continue
        own.copy_(decay * own + (1 - decay) * value if buffers == "average" and "running" in name else value)
    own_state = average.state_dict()
    for name in [name.removesuffix(".0._u") for name in own_state if name.endswith(".0._u")]:
        weight, u, v = own_state[f"{name}.original"], own_state[f"{name}.0._u"], own_state[f"{name}.0._v"]
        # (outputs, others); of a transposed convolution, whose weight has the inputs first, the outputs come second.
        matrix = weight.flatten(start_dim=1) if len(weight) == len(u) else weight.transpose(0, 1).flatten(start_dim=1)
        u.copy_(nn.functional.normalize(matrix @ v, dim=0))  # Miyato et al. 2018, algorithm 1
        v.copy_(nn.functional.normalize(matrix.T @ u, dim=0))
