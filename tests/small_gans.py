"""Small GANs for the doctor, healthy ones and recipes trained briefly, and what it finds in them."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bngan import GAN
from bngan.batching import discriminate
from bngan.batchnorm.statistics import evaluation_statistics, set_precise_statistics
from bngan.data import ImageDataModule
from bngan.doctor import examine_layers, examine_training
from bngan.images import to_minus1_1
from bngan.outcome import Finding
from bngan.recipes import read_config
from tests.conftest import REPOSITORY
from tests.test_gan import tiny, trainer

# Each recipe as it is shipped, but narrow and brief.
SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({"hidden_dim": 32}, 64),
    "literal": ({"hidden_dim": 32}, 128),
    "best_mlp": ({"hidden_dim": 64}, 64),
    "dcgan": ({"hidden_dim": 4}, 32),
}


def of_two_greys() -> Tensor:
    """Return pictures (256, 1, 16, 16) of two grey levels, which no untrained G makes."""
    pixels = torch.rand(256, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return 1.4 * (pixels > 0.4).float() - 0.7


def latents(gan: GAN) -> Tensor:
    return torch.randn(256, gan.settings.latent_dim, generator=torch.Generator().manual_seed(3))


def fakes(gan: GAN) -> Tensor:
    with evaluation_statistics(gan.generator, "batch"):
        return gan.generate(latents(gan))


def last_layer(network: nn.Module) -> nn.Conv2d | nn.ConvTranspose2d | nn.Linear:
    return [part for part in network.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)][-1]


def settle(gan: GAN, real: Tensor) -> GAN:
    """Let all running statistics be those that the networks as they are have on real images and fakes."""
    set_precise_statistics(gan.generator, [latents(gan)])
    if gan.generator_ema is not None:
        set_precise_statistics(gan.generator_ema, [latents(gan)])
    set_precise_statistics(gan.discriminator, [torch.cat([real, fakes(gan)])])
    return gan


def healthy(real: Tensor, **settings: Any) -> GAN:
    """A GAN with nothing wrong: no bias before batch norm, a D that tells real from fake, statistics of its own weights."""
    gan = tiny(**{"network": "conv", "image_shape": (1, 16, 16), **settings})
    for network in (gan.generator, gan.generator_ema):
        if network is not None:
            last_layer(network).weight.data.mul_(16)  # the contrast of the pictures, by which G is no more as it began
    seen = fakes(gan)
    optimizer = torch.optim.Adam(gan.discriminator.parameters(), lr=0.01)
    for _ in range(20):
        loss = gan.loss.discriminator(*discriminate(gan.logits, real[:64], seen[:64], gan.settings.batching))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gan.iteration.fill_(1)
    gan.normalized_together.fill_(32)
    return settle(gan, real)


def brief(recipe: str, seed: int, folder: Path, root: Path, iterations: int = 300, **settings: Any) -> tuple[GAN, Tensor]:
    """Train a small form of a recipe; return it and the images that it is examined with."""
    small, batch_size = SMALL[recipe]
    model = {**read_config(REPOSITORY / "configs" / f"{recipe}.yaml")["model"], **small, **settings, "seed": seed}
    gan = tiny(**{"image_shape": (1, 28, 28), "latent_dim": 100, "instance_noise": 1.0, **model})
    data = ImageDataModule(root=str(root), batch_size=batch_size, seed=seed)
    trainer(folder, max_epochs=-1, max_steps=iterations, limit_val_batches=0).fit(gan, datamodule=data)
    assert int(gan.normalized_together) == batch_size
    return gan.eval(), to_minus1_1(data.subset(2048, train=True).images)


def examined(gan: GAN, real: Tensor) -> list[Finding]:
    return [*examine_layers(gan), *examine_training(gan, real)]


def names(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings]


def raised(module: str) -> set[str]:
    """Return what the findings of a file of the package are called."""
    lines = (REPOSITORY / "bngan" / module).read_text().splitlines()
    return {after.strip().strip('",') for line, after in pairwise(lines) if line.strip().endswith("Finding(")}
