"""How are samples made more typical, and fewer kinds of them? The truncation trick (Brock et al. 2019, section 3.1)."""

import torch
from torch import Tensor, nn


class Truncated(nn.Module):
    """A generator behind truncated latents."""

    def __init__(self, network: nn.Module, threshold: float) -> None:
        super().__init__()
        self.network = network
        self.threshold = threshold

    def forward(self, z: Tensor, *labels: Tensor) -> Tensor:
        """Map latents (N, latent_dim), and labels (N,) if there are classes, to images of N rows."""
        return self.network(truncated(z, self.threshold), *labels)


def truncated(z: Tensor, threshold: float) -> Tensor:
    """Return standard normal values of any shape as if all beyond -threshold and threshold had been drawn anew.

    Instead of being drawn anew, each value takes its quantile's place in the truncated distribution, so that sample i changes
    smoothly with the threshold.
    """
    most = torch.special.ndtr(torch.tensor(threshold, dtype=torch.float64))
    quantile = torch.special.ndtr(z.cpu().double())  # not every accelerator has float64
    return torch.special.ndtri((1 - most) + (2 * most - 1) * quantile).clamp(-threshold, threshold).to(z)
