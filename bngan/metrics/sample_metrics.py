"""Every metric of a set of samples at once, from one pass through the feature net."""

from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from bngan.metrics.features import FeatureNet
from bngan.metrics.kid import KID
from bngan.metrics.modes import ClassHistogram, ClassPrecision
from bngan.metrics.prdc import PRDC

AT_ONCE = 50  # images given to the feature net, which holds many times their memory


class SampleMetrics:
    """FID, KID, precision, recall, density, coverage and, where the net has classes, modes, class KL and confidence.

    Where samples are asked to be of the net's classes, also which share of them is. Of a net that knows no images FID is called
    `distance`, and there is no KID.

    Real images are given once; each `measure` compares other images with them. On several ranks each gives its own part and
    all get the same values.

    Args:
        net: the feature net.
        image_shape: (C, H, W) of the images.
        device: where images pass the net, and where their features are compared unless it has no float64.
        mode_threshold: threshold of ClassHistogram.
        classes: number of classes that samples are asked to be of, the net's; 0 where they are not.

    Raises:
        UsageError: if the net's features are not finite, or not one row per image.
    """

    def __init__(
        self,
        net: FeatureNet,
        image_shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        mode_threshold: float = 0.05,
        classes: int = 0,
    ) -> None:
        self.net, self.device = net.to(device), torch.device(device)
        self._compared_on = torch.device("cpu") if self.device.type == "mps" else self.device
        self._no_features = net(torch.zeros(1, *image_shape, device=self.device))[:0]  # (0, d)
        self.distance = "fid" if net.knows_images else "distance"
        frechet = FrechetInceptionDistance(feature=_Features(self.num_features), reset_real_features=False)
        self._frechet = frechet.to(self._compared_on)
        self._pairs = [metric.to(self._compared_on) for metric in ([KID(), PRDC()] if net.knows_images else [PRDC()])]
        histograms = [] if net.num_classes is None else [ClassHistogram(net.num_classes, mode_threshold)]
        self._histograms = [histogram.to(self._compared_on) for histogram in histograms]
        self._precisions = [ClassPrecision(classes).to(self._compared_on)] if classes else []
        # Each rank takes none first: one that gets no images at all would leave the others waiting, or not know what to answer.
        self._take(self._no_features, real=True)

    @property
    def num_features(self) -> int:
        """Features per image."""
        return self._no_features.shape[1]

    @property
    def names(self) -> list[str]:
        """The names of the metrics that are measured."""
        metrics = (*self._pairs, *self._histograms, *self._precisions)
        return [self.distance, *(name for metric in metrics for name in metric.names)]

    def set_real(self, chunks: Iterable[Tensor]) -> None:
        """Take this rank's part of the real images: chunks of images (N, C, H, W) in [-1, 1]."""
        for images in chunks:
            self._update(images, None, real=True)

    def measure(
        self, chunks: Iterable[Tensor], labels: Iterable[Tensor] | None = None, *, distance_alone: bool = False
    ) -> dict[str, float]:
        """Return the metrics of images in chunks like those of set_real, of which this is this rank's part.

        Chunks of labels int64 (N,) tell what they were asked to be; without them that is not measured. With `distance_alone`
        the other metrics, which take most of the time, are left out.

        Raises:
            UsageError: if there are too few images.
            ValueError: if they have another shape or range than the net takes.
        """
        # Pairs first, since they say clearly when there are too few images.
        others = (*self._pairs, *self._histograms, *([] if labels is None else self._precisions))
        for metric in (self._frechet, *others):
            metric.reset()
        self._take(self._no_features, real=False)
        for images, asked in zip(chunks, repeat(None) if labels is None else labels, strict=labels is not None):
            self._update(images, asked, real=False)
        if distance_alone:
            return {self.distance: float(self._frechet.compute())}
        values: dict[str, Tensor] = {}
        for metric in others:
            values |= metric.compute()
        values[self.distance] = self._frechet.compute()
        return {name: float(values[name]) for name in self.names if name in values}

    def _update(self, images: Tensor, labels: Tensor | None, *, real: bool) -> None:
        features = torch.cat([self.net(some) for some in images.to(self.device).split(AT_ONCE)])  # (N, d)
        self._take(features, real=real)
        if labels is not None:
            for precision in self._precisions:
                precision.update(self.net.logits(features).to(self._compared_on), labels.to(self._compared_on))

    def _take(self, features: Tensor, *, real: bool) -> None:
        for histogram in () if real else self._histograms:
            histogram.update(self.net.logits(features).to(self._compared_on))
        features = features.to(self._compared_on)
        self._frechet.update(features.double(), real=real)
        for metric in self._pairs:
            metric.update(features, real=real)


class _Features(nn.Identity):
    """Stands in for a feature net where features are handed over."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
