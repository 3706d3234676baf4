"""The kernel inception distance, in little memory."""

import torch
from torch import Tensor

from bngan.metrics.pairs import FeaturePairs

SUBSET_SEED = 0


class KID(FeaturePairs):
    """KID (Binkowski et al. 2018): the squared MMD of a cubic kernel, an unbiased estimate, so it can be below 0.

    Args:
        subsets: number of random subsets over which it is averaged.
        subset_size: images in each, or all images where there are fewer.
        chunk: rows of kernels held at a time, where torchmetrics holds three whole kernels and works out a fourth.
    """

    def __init__(self, subsets: int = 50, subset_size: int = 1000, chunk: int = 100) -> None:
        super().__init__()
        self.subsets, self.subset_size, self.chunk = subsets, subset_size, chunk

    def compute(self) -> dict[str, Tensor]:
        """Return `kid`; the subsets are the same each time."""
        real, fake = (features.double() for features in self.sets(at_least=2))
        size = min(self.subset_size, len(real), len(fake))
        subsets = 1 if size == len(real) == len(fake) else self.subsets
        generator = torch.Generator().manual_seed(SUBSET_SEED)

        def drawn(features: Tensor) -> Tensor:
            return features[torch.randperm(len(features), generator=generator)[:size]]

        return {"kid": torch.stack([self._squared_mmd(drawn(real), drawn(fake)) for _ in range(subsets)]).mean()}

    def _squared_mmd(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the unbiased estimate from n features (n, d) of each, which leaves out each image's kernel with itself."""
        count = len(real)
        within = real.new_zeros(())
        for features in (real, fake):
            within += self._kernels(features, features) - _cubic(features.square().sum(dim=1), features).sum()
        return within / (count * (count - 1)) - 2 * self._kernels(real, fake) / count**2

    def _kernels(self, rows: Tensor, others: Tensor) -> Tensor:
        """Return the sum of the kernels of each row with each of the others."""
        return torch.stack([_cubic(torch.mm(some, others.T), others).sum() for some in rows.split(self.chunk)]).sum()


def _cubic(products: Tensor, features: Tensor) -> Tensor:
    """Return (x y / d + 1)^3 of inner products of features (n, d), in their place."""
    return products.div_(features.shape[1]).add_(1).pow_(3)
