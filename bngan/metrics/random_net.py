"""The net of random filters, whose features measure pictures that no pinned network knows."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

EQUALIZED_BY = 512  # images of noise
SHRINKAGE = 0.1  # of the mean variance


class RandomNet(nn.Module):
    """Convolutional net with random weights, the same in every run: how sharp, varied and whole images are, not what they show.

    A trained network is made for one kind of picture; a random one has no such leaning (Naeem et al. 2020, section 4.3). Its
    distances mean something only beside those of the same number of real images, whole and spoilt.
    """

    stages, channels = 3, 32
    num_features = 2 * stages * channels
    equalize: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = Generator().manual_seed(0)
        self.convs = nn.ModuleList()
        for stage in range(self.stages):
            conv = nn.Conv2d(self.channels if stage else 3, self.channels, kernel_size=3, stride=2, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
            conv.bias = nn.Parameter(0.5 * torch.randn(self.channels, generator=generator))
            self.convs.append(conv)
        # Most features follow how bright an image is; unless they are made equal on noise, that is all a distance shows.
        with torch.no_grad():
            self.register_buffer("equalize", _whitening(self._pooled(_noise(EQUALIZED_BY, generator))))

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, 1 or 3, H, W) in [-1, 1] to features (N, 192)."""
        return self._pooled(images) @ self.equalize

    def _pooled(self, images: Tensor) -> Tensor:
        """Return each channel's mean and deviation at each stage (N, 192)."""
        x, features = images.expand(-1, 3, -1, -1), []
        for conv in self.convs:
            x = F.relu(conv(x))  # (N, 32, H / 2, W / 2)
            features += [x.mean(dim=(2, 3)), x.std(dim=(2, 3), correction=0)]
        return torch.cat(features, dim=1)


def _noise(count: int, generator: Generator) -> Tensor:
    """Return images (count, 3, 32, 32) in [-1, 1] of coarse and fine noise."""
    grids = [torch.randn(count, 3, side, side, generator=generator) for side in (1, 2, 4, 8, 16, 32)]
    return torch.stack([F.interpolate(0.35 * grid, size=32, mode="bilinear") for grid in grids]).sum(dim=0).tanh()


def _whitening(features: Tensor) -> Tensor:
    """Return a matrix (d, d) after which such features (N, d) have much the same variance in every direction."""
    variances, directions = torch.linalg.eigh(features.double().T.cov())
    shrunk = variances.clamp(min=0) + SHRINKAGE * variances.mean()
    return (directions * shrunk.rsqrt() @ directions.T).to(features)
