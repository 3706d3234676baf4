"""The kernel distance, by torchmetrics."""

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from bngan.metrics.pairs import FeaturePairs


class KernelDistance(FeaturePairs):
    """KID (Binkowski et al. 2018): the squared MMD of a cubic kernel, an unbiased estimate, so it can be below 0.

    Args:
        subsets: number of random subsets over which it is averaged.
        subset_size: images in each, or all images where there are fewer.
    """

    def __init__(self, subsets: int = 50, subset_size: int = 1000) -> None:
        super().__init__()
        self.subsets, self.subset_size = subsets, subset_size

    def compute(self) -> dict[str, Tensor]:
        """Return `kid`; the subsets are the same each time."""
        real, fake = self.sets(at_least=2)
        size = min(self.subset_size, len(real), len(fake))
        whole = size == len(real) == len(fake)
        kid = KernelInceptionDistance(
            feature=nn.Identity(),
            subsets=1 if whole else self.subsets,
            subset_size=size,
            sync_on_compute=False,  # these features are already those of all ranks
        )
        kid.update(real.double(), real=True)
        kid.update(fake.double(), real=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return {"kid": kid.compute()[0]}
