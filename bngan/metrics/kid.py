"""The kernel inception distance of all images, with its standard error."""

from typing import NamedTuple

import torch
from torch import Tensor

from bngan.metrics.pairs import FeaturePairs


class Kernels(NamedTuple):
    """What the kernels of n images with m others come to.

    Attributes:
        rows: mean kernel of each image with the others (n,).
        columns: mean kernel of each of the others with the images (m,).
        variance: variance of the kernels about the sum of both means, a scalar.
    """

    rows: Tensor
    columns: Tensor
    variance: Tensor


class KID(FeaturePairs):
    """KID (Binkowski et al. 2018): the squared MMD of the kernel (x y / d + 1)^3, an unbiased estimate, so it can be below 0.

    It is of all images, not of subsets, whose choice alone would move it more than all that a good generator has left to gain.
    The time grows as n^2 d: with Inception's 2,048 features it is some 30 times that of the digit net's 64.

    Args:
        chunk: rows of kernels held at a time.
    """

    names = ("kid", "kid_se")

    def __init__(self, chunk: int = 100) -> None:
        super().__init__()
        self.chunk = chunk

    def compute(self) -> dict[str, Tensor]:
        """Return `kid`, and `kid_se`, its standard error where the images were drawn independently."""
        real, fake = (_with_constant(features.double()) for features in self.sets(at_least=2))
        if self._among_real is None:
            self._among_real = self._kernels(real, real)
        among_real, among_fake, between = self._among_real, self._kernels(fake, fake), self._kernels(real, fake)
        kid = among_real.rows.mean() + among_fake.rows.mean() - 2 * between.rows.mean()
        return {"kid": kid, "kid_se": _variance(among_real, among_fake, between).sqrt()}

    def _kernels(self, images: Tensor, others: Tensor) -> Kernels:
        """Return the kernels of features (n, d + 1) with (m, d + 1); where both are the same, none of an image with itself."""
        same = images is others
        right = others.T.contiguous()
        rows, columns = [], torch.zeros_like(others[:, 0])
        squares = torch.zeros_like(columns[0])
        for start in range(0, len(images), self.chunk):
            kernels = torch.mm(images[start : start + self.chunk], right).pow_(3)  # (chunk, m)
            if same:
                kernels.diagonal(start).zero_()
            rows.append(kernels.sum(dim=1))
            columns += kernels.sum(dim=0)
            squares += torch.linalg.vector_norm(kernels).square()
        in_row, in_column = len(others) - int(same), len(images) - int(same)
        row_means, column_means = torch.cat(rows) / in_row, columns / in_column
        mean_square = squares / (len(images) * in_row)
        variance = mean_square - row_means.square().mean() - column_means.square().mean() + row_means.mean().square()
        return Kernels(row_means, column_means, variance)


def _with_constant(features: Tensor) -> Tensor:
    """Return features (n, d + 1) whose inner products are x y / d + 1."""
    return torch.cat([features / features.shape[1] ** 0.5, torch.ones_like(features[:, :1])], dim=1)


def _variance(among_real: Kernels, among_fake: Kernels, between: Kernels) -> Tensor:
    """Return an estimate of the variance of the squared MMD from n real and m fake images (Hoeffding 1948).

    How much one image moves it, its mean kernel with its own set less that with the other, is the first order, and all there
    is between sets that differ. What pairs of images add is the second, and all there is between sets that do not.
    """
    n, m = len(between.rows), len(between.columns)
    # The means over the other images, which are drawn too, make an image's influence look larger than it is.
    of_real = (among_real.rows - between.rows).var() - among_real.variance / n - between.variance / m
    of_fake = (among_fake.rows - between.columns).var() - among_fake.variance / m - between.variance / n
    first = (4 * of_real / n + 4 * of_fake / m).clamp(min=0)
    return first + 2 * among_real.variance / n**2 + 2 * among_fake.variance / m**2 + 4 * between.variance / (n * m)
