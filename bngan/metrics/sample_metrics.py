"""Every metric of a set of samples at once, from one pass through the feature net."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from bngan.metrics.features import FeatureNet
from bngan.metrics.kid import KID
from bngan.metrics.modes import ClassHistogram
from bngan.metrics.prdc import PRDC

AT_ONCE = 50  # images given to the feature net, which holds many times their memory


class SampleMetrics:
    """FID, KID, precision, recall, density, coverage and, where the net has classes, modes, class KL and confidence.

    Real images are given once; each `measure` compares other images with them. On several ranks each gives its own part and
    all get the same values.

    Args:
        net: the feature net.
        image_shape: (C, H, W) of the images.
        device: where features are kept and compared.
        mode_threshold: threshold of ClassHistogram.

    Raises:
        UsageError: if the net's features are not finite, or not one row per image.
    """

    def __init__(
        self,
        net: FeatureNet,
        image_shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        mode_threshold: float = 0.05,
    ) -> None:
        self.net, self.device = net.to(device), torch.device(device)
        self._no_features = net(torch.zeros(1, *image_shape, device=device))[:0]  # (0, d)
        self._fid = FrechetInceptionDistance(feature=_Features(self.num_features), reset_real_features=False).to(device)
        self._kid, self._prdc = KID().to(device), PRDC().to(device)
        self._classes = None if net.num_classes is None else ClassHistogram(net.num_classes, mode_threshold).to(device)
        # Each rank takes none first: one that gets no images at all would leave the others waiting, or not know what to answer.
        self._take(self._no_features, real=True)

    @property
    def num_features(self) -> int:
        """Features per image."""
        return self._no_features.shape[1]

    def set_real(self, chunks: Iterable[Tensor]) -> None:
        """Take this rank's part of the real images: chunks of images (N, C, H, W) in [-1, 1]."""
        for images in chunks:
            self._update(images, real=True)

    def measure(self, chunks: Iterable[Tensor], *, fid_alone: bool = False) -> dict[str, float]:
        """Return the metrics of images in chunks like those of set_real, of which this is this rank's part.

        With `fid_alone` the others, which take most of the time, are left out.

        Raises:
            UsageError: if there are too few images.
            ValueError: if they have another shape or range than the net takes.
        """
        for metric in (self._fid, self._kid, self._prdc, self._classes):
            if metric is not None:
                metric.reset()
        self._take(self._no_features, real=False)
        for images in chunks:
            self._update(images, real=False)
        if fid_alone:
            return {"fid": float(self._fid.compute())}
        prdc = self._prdc.compute()  # first, since it says clearly when there are too few images
        values = {"fid": self._fid.compute(), **self._kid.compute(), **prdc}
        if self._classes is not None:
            values |= self._classes.compute()
        return {name: float(value) for name, value in values.items()}

    def _update(self, images: Tensor, *, real: bool) -> None:
        features = torch.cat([self.net(some) for some in images.to(self.device).split(AT_ONCE)])  # (N, d)
        self._take(features, real=real)

    def _take(self, features: Tensor, *, real: bool) -> None:
        self._fid.update(features.double(), real=real)
        self._kid.update(features, real=real)
        self._prdc.update(features, real=real)
        if self._classes is not None and not real:
            self._classes.update(self.net.logits(features))


class _Features(nn.Identity):
    """Stands in for a feature net where features are handed over."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
