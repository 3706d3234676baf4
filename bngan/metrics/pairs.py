"""What metrics that compare two sets of features share: the features, in an order that does not depend on the ranks."""

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from bngan.errors import UsageError


class FeaturePairs(Metric):
    """Keeps the features of real and of fake images; a subclass computes something from both.

    `reset` forgets the fakes and keeps the real features, which are the same for every set of samples.
    """

    full_state_update = False
    real: list[Tensor]
    fake: list[Tensor]
    real_index: list[Tensor]
    fake_index: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("real", "fake", "real_index", "fake_index"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, index: Tensor, *, real: bool) -> None:
        """Add features (N, d) of the images numbered `index` (N,); each number once over all ranks.

        Raises:
            ValueError: if the features are not a matrix with one row per number.
        """
        if features.ndim != 2 or len(features) != len(index):
            raise ValueError(
                f"expected features (N, d) and as many numbers, got {tuple(features.shape)} and {tuple(index.shape)}"
            )
        (self.real if real else self.fake).append(features)
        (self.real_index if real else self.fake_index).append(index)

    def reset(self) -> None:
        real, real_index = list(self.real), list(self.real_index)
        super().reset()  # which empties the lists themselves
        self.real, self.real_index = real, real_index

    def sets(self, at_least: int) -> tuple[Tensor, Tensor]:
        """Return the real and the fake features by their numbers, so that the ranks' order does not matter.

        Raises:
            UsageError: if either set has fewer than `at_least` images.
        """
        return (
            self._in_order("real", self.real, self.real_index, at_least),
            self._in_order("fake", self.fake, self.fake_index, at_least),
        )

    def _in_order(self, name: str, features: list[Tensor], index: list[Tensor], at_least: int) -> Tensor:
        count = len(dim_zero_cat(index)) if len(index) else 0
        if count < at_least:
            raise UsageError(
                f"{type(self).__name__} needs at least {at_least} {name} images, got {count}: give more pictures, or "
                "--metrics.num_samples 0"
            )
        return dim_zero_cat(features)[dim_zero_cat(index).argsort()]
