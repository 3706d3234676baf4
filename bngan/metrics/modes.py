"""Which classes the samples cover."""

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassHistogram(Metric):
    """Counts predicted classes; tells the modes covered and the divergence from a uniform histogram.

    Args:
        num_classes: number of classes.
        min_share: share of the samples that a class needs to count as a mode.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, min_share: float = 0.005) -> None:
        super().__init__()
        self.min_share = min_share
        self.add_state("counts", default=torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Count the samples whose class logits (N, num_classes) these are."""
        self.counts += logits.argmax(dim=1).bincount(minlength=len(self.counts))

    def compute(self) -> dict[str, Tensor]:
        """Return `modes`, how many classes have at least min_share, and `class_kl`, KL(histogram || uniform) in nats."""
        shares = self.counts.double() / self.counts.sum()
        entropy = -torch.special.xlogy(shares, shares).sum()
        return {
            "modes": (shares >= self.min_share).sum(),
            "class_kl": torch.tensor(len(shares), dtype=torch.float64, device=shares.device).log() - entropy,
        }
