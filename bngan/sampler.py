"""How samples are drawn: from which weights, normalized by which statistics, and numbered."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bngan import rng


@dataclass(frozen=True)
class Sampler:
    """A generator ready to be sampled.

    Attributes:
        network: maps latents (N, latent_dim) to images of N rows, and is in evaluation.
        image_shape: (C, H, W) of the images.
        latent_dim: size of the latents.
        block: where samples are normalized by their own batch, how many are drawn together; None elsewhere.
    """

    network: nn.Module
    image_shape: tuple[int, int, int]
    latent_dim: int
    block: int | None = None

    def generate(self, z: Tensor) -> Tensor:
        """Map latents (N, latent_dim) to images (N, C, H, W) in [-1, 1]."""
        weight = next(self.network.parameters())
        return self.network(z.to(weight.device, weight.dtype)).view(len(z), *self.image_shape)

    def samples(self, start: int, stop: int, seed: int = 0) -> Tensor:
        """Return the samples (stop - start, C, H, W) numbered start to stop - 1, the same however they are cut up.

        Where samples are normalized by their own batch, sample i's batch-mates are those of its block.
        """
        if self.block is None:
            return self.generate(rng.sample_latents(start, stop, self.latent_dim, seed))
        first = start // self.block * self.block
        blocks = [
            self.generate(rng.sample_latents(number, number + self.block, self.latent_dim, seed))
            for number in range(first, stop, self.block)
        ]
        return torch.cat(blocks)[start - first : stop - first]
