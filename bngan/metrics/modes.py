"""Which classes the samples cover."""

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassHistogram(Metric):
    """Counts predicted classes; tells the modes covered, the divergence from a uniform histogram, and the confidence.

    Args:
        num_classes: number of classes.
        threshold: fraction of an equal share of the samples, 1 / num_classes, from which on a class counts as covered.
    """

    names = ("modes_covered", "modes_seen", "class_kl", "confidence")
    full_state_update = False
    counts: Tensor
    certainty: Tensor

    def __init__(self, num_classes: int, threshold: float = 0.05) -> None:
        super().__init__()
        self.threshold = threshold
        self.add_state("counts", default=torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("certainty", default=torch.zeros((), dtype=torch.double), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Count the samples whose class logits (N, num_classes) these are.

        Raises:
            ValueError: if there is another number of classes.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.counts):
            raise ValueError(f"expected class logits (N, {len(self.counts)}), got {tuple(logits.shape)}")
        self.counts += logits.argmax(dim=1).bincount(minlength=len(self.counts))
        self.certainty += logits.double().softmax(dim=1).amax(dim=1).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `modes_covered`, how many classes have enough samples; `modes_seen`, how many have any at all; `class_kl`,
        KL(histogram || uniform) in nats; and `confidence`, the mean probability of the likeliest class.

        Raises:
            ValueError: if no sample was counted.
        """
        total = self.counts.sum()
        if total == 0:
            raise ValueError("ClassHistogram needs at least 1 image, got 0")
        fractions = self.counts.double() / total
        entropy = -torch.special.xlogy(fractions, fractions).sum()
        return {
            "modes_covered": (self.counts * len(self.counts) >= self.threshold * total).sum(),
            "modes_seen": (self.counts > 0).sum(),
            "class_kl": torch.tensor(len(fractions), dtype=torch.float64, device=fractions.device).log() - entropy,
            "confidence": self.certainty / total,
        }
