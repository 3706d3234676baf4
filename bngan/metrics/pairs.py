"""What metrics that compare two sets of features share: the features."""

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from bngan.errors import UsageError


class FeaturePairs(Metric):
    """Keeps the features of real and of fake images, of all ranks; a subclass computes something from both.

    `reset` forgets the fakes and keeps the real features, which are the same for every set of samples.
    """

    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")
        self._among_real: Any = None  # what a subclass has worked out from the real features alone

    def update(self, features: Tensor, *, real: bool) -> None:
        """Add features (N, d).

        Raises:
            ValueError: if the features are not a matrix.
        """
        if features.ndim != 2:
            raise ValueError(f"expected features (N, d), got {tuple(features.shape)}")
        (self.real if real else self.fake).append(features)
        if real:
            self._among_real = None

    def reset(self) -> None:
        real = list(self.real)
        super().reset()  # which empties the list itself
        self.real = real

    def sets(self, at_least: int) -> tuple[Tensor, Tensor]:
        """Return the real and the fake features.

        Raises:
            UsageError: if either set has fewer than `at_least` images.
        """
        return self._set("real", self.real, at_least), self._set("fake", self.fake, at_least)

    def _set(self, name: str, features: list[Tensor], at_least: int) -> Tensor:
        joined = dim_zero_cat(features) if len(features) else None
        if joined is None or len(joined) < at_least:
            raise UsageError(
                f"{type(self).__name__} needs at least {at_least} {name} images, got {0 if joined is None else len(joined)}: "
                "give more pictures, or --metrics.num_samples 0"
            )
        return joined
