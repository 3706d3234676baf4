"""Every metric of a set of samples at once, from one pass through the feature net."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from bngan.metrics.features import FeatureNet
from bngan.metrics.kernel import KernelDistance
from bngan.metrics.manifold import Manifold
from bngan.metrics.modes import ClassHistogram

Numbered = Iterable[tuple[Tensor, Tensor]]
AT_ONCE = 50


class _Features(nn.Identity):
    """Stands in for a feature net where features are handed over."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class SampleQuality:
    """FID, KID, precision, recall, density, coverage and, where the net has classes, modes, class KL and confidence.

    Real images are given once; each `measure` compares other images with them. On several ranks each gives its own share and
    all get the same values.

    Args:
        net: the feature net.
        image_shape: (C, H, W) of the images.
        device: where features are kept and compared.
        between_stages: called between the stages of a measurement, each of which needs large blocks of memory of its own.

    Raises:
        ValueError: if the net does not take such images.
    """

    def __init__(
        self,
        net: FeatureNet,
        image_shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        between_stages: Callable[[], object] = lambda: None,
    ) -> None:
        self._between_stages = between_stages
        self.net, self.device = net.to(device), torch.device(device)
        self._none = net(torch.zeros(1, *image_shape, device=device))[:0]
        stand_in = _Features(self._none.shape[1])
        self._fid = FrechetInceptionDistance(feature=stand_in, reset_real_features=False).to(device)
        self._kid, self._manifold = KernelDistance().to(device), Manifold().to(device)
        self._classes = None if net.num_classes is None else ClassHistogram(net.num_classes).to(device)
        # A rank without a share would leave the others waiting for it, or not know what it is to answer: it has an empty one.
        self._no_index = torch.empty(0, dtype=torch.long, device=self.device)
        self._take(self._none, self._no_index, real=True)

    @property
    def num_features(self) -> int:
        """Features per image."""
        return self._none.shape[1]

    def set_real(self, chunks: Numbered) -> None:
        """Take this rank's share of the real images: chunks of images (N, C, H, W) in [-1, 1] and their numbers (N,)."""
        for images, index in chunks:
            self._update(images, index, real=True)

    def measure(self, chunks: Numbered, *, fid_alone: bool = False) -> dict[str, float]:
        """Return the metrics of images in chunks like those of set_real, of which this is this rank's share.

        With `fid_alone` the others, which take most of the time, are left out.

        Raises:
            ValueError: if there are too few images, or they have another shape or range than the net takes.
        """
        for metric in (self._kid, self._manifold, self._classes, self._fid):
            if metric is not None:
                metric.reset()
        self._take(self._none, self._no_index, real=False)
        for images, index in chunks:
            self._update(images, index, real=False)
        if fid_alone:
            return {"fid": float(self._fid.compute())}
        self._between_stages()
        # First the one that says clearly when there are too few images.
        manifold = self._manifold.compute()
        self._between_stages()
        values = {"fid": self._fid.compute(), **self._kid.compute(), **manifold}
        self._between_stages()
        if self._classes is not None:
            values |= self._classes.compute()
        return {name: float(value) for name, value in values.items()}

    def _update(self, images: Tensor, index: Tensor, *, real: bool) -> None:
        images = images.to(self.device)
        # A feature net holds many times the memory of its images, so it gets few; what is kept is made before it is used, or
        # it would leave that memory in pieces.
        features = self._none.new_empty(len(images), self.num_features)
        for target, some in zip(features.split(AT_ONCE), images.split(AT_ONCE), strict=True):
            target.copy_(self.net(some))
        self._take(features, index.to(self.device), real=real)

    def _take(self, features: Tensor, index: Tensor, *, real: bool) -> None:
        self._fid.update(features.double(), real=real)
        for metric in (self._kid, self._manifold):
            metric.update(features, index, real=real)
        if self._classes is not None and not real:
            self._classes.update(self.net.logits(features))
