"""Which classes the samples cover, and whether they are of those that were asked for."""

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


class ClassPrecision(Metric):
    """Tells which share of the samples a classifier takes for what they were asked to be, in all and for each class.

    Args:
        num_classes: number of classes K.
    """

    full_state_update = False
    right: Tensor
    asked: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.names = ("class_precision", *(f"class_precision/{label}" for label in range(num_classes)))
        for name in ("right", "asked"):
            self.add_state(name, default=torch.zeros(num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count samples with these class logits (N, K), that were asked to be of the classes labels int64 (N,)."""
        self.asked += labels.bincount(minlength=len(self.asked))
        self.right += labels[logits.argmax(dim=1) == labels].bincount(minlength=len(self.right))

    def compute(self) -> dict[str, Tensor]:
        """Return `class_precision`, of all samples, and `class_precision/c` of those of class c.

        Raises:
            ValueError: if no sample of a class was counted.
        """
        if not self.asked.all():
            raise ValueError(f"ClassPrecision needs samples of each class, got {self.asked.tolist()}")
        shares = [self.right.sum() / self.asked.sum(), *(self.right / self.asked)]
        return dict(zip(self.names, shares, strict=True))
