"""How good are samples? Several sets of them are measured in one pass, against real images that were measured once."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bngan.images import to_minus1_1
from bngan.metrics.digit_net import load_digit_net
from bngan.metrics.random_net import RandomNet

COVERED = 0.005  # fraction of the samples from which on a class counts as covered
NEIGHBOURS = 5  # k of coverage
PIXEL_COMPONENTS = 64  # of the real images' pixels: as many as the digit net has features
ROWS_AT_ONCE = 200  # of a matrix of distances: what a processor's cache holds
IMAGES_AT_ONCE = 500  # given to a net on a processor


class DigitMeasures:
    """Measures sets of samples against real digits by the pinned digit net, and by two feature spaces that know no classes.

    Args:
        real_images: uint8 (N, 1, 28, 28), on the device where all is computed.
    """

    def __init__(self, real_images: Tensor) -> None:
        self.net = load_digit_net().to(real_images.device)
        self._images = to_minus1_1(real_images).unsqueeze(0)  # (1, N, 1, 28, 28)
        self._real = digit_features(self.net, self._images)[0]  # (N, 64)
        self._real_mean, self._real_covariance = moments(self._real.unsqueeze(0))
        self._real_variance = pixel_variance(self._images)

    def measure(self, sets: Tensor, *, whole: bool) -> list[dict[str, float]]:
        """Return the measures of each of R sets of samples (R, n, 1, 28, 28) in [-1, 1], rounded to a picture's 256 levels.

        `fid` is of the digit net; `classes` counts those with at least 0.5% of the samples; `class_kl` is
        KL(histogram || uniform) in nats; `pixel_variance` is over that of real images. Where `whole`, also `coverage`, which
        takes most of the time, and the same distance in other spaces: `fid_random`, of the net of random filters, and
        `fid_pixels`, of the real pixels' principal components. The three share no scale.
        """
        sets = rounded(sets)
        features = digit_features(self.net, sets)  # (R, n, 64)
        counts = class_counts(self.net.logits(features.to(sets.dtype)).argmax(dim=-1), self.net.num_classes)  # (R, 10)
        values = {
            "fid": frechet_distance(self._real_mean, self._real_covariance, *moments(features)),
            "classes": (counts >= COVERED * sets.shape[1]).sum(dim=1),
            "class_kl": kl_to_uniform(counts),
            "pixel_variance": pixel_variance(sets) / self._real_variance,
        }
        if whole:
            values["coverage"] = torch.stack([coverage(self._real, self._radii, fakes) for fakes in features])
            for name, (net, mean, covariance) in self._other_spaces.items():
                values[f"fid_{name}"] = frechet_distance(mean, covariance, *moments(digit_features(net, sets)))
        return by_set(values)

    @cached_property
    def _radii(self) -> Tensor:
        return neighbour_distances(self._real, NEIGHBOURS)

    @cached_property
    def _other_spaces(self) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
        """Return the net, and the real images' mean (1, d) and covariance (1, d, d), of each space, by its name."""
        with torch.random.fork_rng(devices=[]):  # layers draw when they are built, and a run is on its way
            nets = {"random": RandomNet().to(self._images.device), "pixels": PrincipalComponents(self._images[0])}
        return {name: (net, *moments(digit_features(net, self._images))) for name, net in nets.items()}


class PrincipalComponents(nn.Module):
    """Maps images to the components in which the pixels of real images (N, C, H, W) vary most."""

    directions: Tensor

    def __init__(self, real_images: Tensor) -> None:
        super().__init__()
        _, vectors = torch.linalg.eigh(real_images.flatten(start_dim=1).double().T.cov())  # the largest come last
        self.register_buffer("directions", vectors[:, -PIXEL_COMPONENTS:])

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to (N, 64), float64."""
        return images.flatten(start_dim=1).double() @ self.directions


def by_set(values: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return, for each of R sets, its values by name, where `values` has (R,) of each."""
    rows = zip(*(value.tolist() for value in values.values()), strict=True)
    return [{name: float(value) for name, value in zip(values, row, strict=True)} for row in rows]


def rounded(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as a picture of 256 levels has them, where they lie."""
    return to_minus1_1(((images + 1) * 127.5).round().clamp(0, 255))


def digit_features(net: nn.Module, sets: Tensor) -> Tensor:
    """Return a net's features (R, n, d), float64, of sets of digits (R, n, 1, 28, 28) in [-1, 1]; the digit net has 64."""
    at_once = IMAGES_AT_ONCE if sets.device.type == "cpu" else 20 * IMAGES_AT_ONCE
    features = torch.cat([net(images) for images in sets.flatten(end_dim=1).split(at_once)])
    return features.double().unflatten(0, sets.shape[:2])


# Frechet distance -----------------------------------------------------------------------------------------------------


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (R, d) and the unbiased covariance (R, d, d) of features (R, n, d)."""
    mean = features.mean(dim=1)
    centred = features - mean.unsqueeze(1)
    return mean, centred.mT @ centred / (features.shape[1] - 1)


def frechet_distance(real_mean: Tensor, real_covariance: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) of R Gaussians (R,) from one (Dowson & Landau 1982).

    Of the features of an image net it is FID (Heusel et al. 2017).

    Args:
        real_mean: (1, d).
        real_covariance: (1, d, d).
        mean: (R, d).
        covariance: (R, d, d).
    """
    values, vectors = torch.linalg.eigh(real_covariance)
    root = vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mT  # S1^1/2, (1, d, d)
    shared = torch.linalg.eigvalsh(root @ covariance @ root).clamp_min(0).sqrt().sum(dim=-1)
    return (real_mean - mean).square().sum(dim=-1) + trace(real_covariance) + trace(covariance) - 2 * shared


def trace(matrices: Tensor) -> Tensor:
    """Return the traces (R,) of matrices (R, d, d)."""
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


# Coverage -------------------------------------------------------------------------------------------------------------


def coverage(real: Tensor, radii: Tensor, fakes: Tensor) -> Tensor:
    """Return the fraction of real points (N, d) that have one of the fakes (M, d) nearer than their k-th real neighbour.

    `radii` (N,) are neighbour_distances of the real points (Naeem et al. 2020, equation 9).
    """
    nearest = torch.cat([squared_distances(some, fakes).amin(dim=1) for some in real.split(ROWS_AT_ONCE)])
    return (nearest < radii).double().mean()


def neighbour_distances(points: Tensor, neighbours: int) -> Tensor:
    """Return the squared distance (N,) of each point (N, d) to its k-th nearest other one."""
    nearest = [
        squared_distances(some, points).topk(neighbours + 1, dim=1, largest=False).values[:, neighbours]  # itself is the first
        for some in points.split(ROWS_AT_ONCE)
    ]
    return torch.cat(nearest)


def squared_distances(points: Tensor, others: Tensor) -> Tensor:
    """Return |a - b|^2 = |a|^2 - 2 a b + |b|^2 (N, M) of points (N, d) and others (M, d): one product of matrices."""
    left = torch.cat([-2 * points, points.square().sum(dim=1, keepdim=True), torch.ones_like(points[:, :1])], dim=1)
    right = torch.cat([others, torch.ones_like(others[:, :1]), others.square().sum(dim=1, keepdim=True)], dim=1)
    return torch.mm(left, right.T).clamp_(min=0)


# Histograms and pixels ------------------------------------------------------------------------------------------------


def class_counts(classes: Tensor, num_classes: int) -> Tensor:
    """Return how many samples (R, num_classes) of each set are of each class, from their classes int64 (R, n)."""
    counts = torch.zeros(len(classes), num_classes, dtype=torch.double, device=classes.device)
    return counts.scatter_add_(1, classes, torch.ones_like(classes, dtype=torch.double))


def kl_to_uniform(counts: Tensor) -> Tensor:
    """Return KL(histogram || uniform) in nats (R,) of counts (R, K): from 0, where all are equal, to ln K."""
    fractions = counts / counts.sum(dim=1, keepdim=True)
    return torch.special.xlogy(fractions, fractions * counts.shape[1]).sum(dim=1)


def pixel_variance(sets: Tensor) -> Tensor:
    """Return the variance over a set's images, averaged over the pixels, (R,) of sets (R, n, C, H, W)."""
    return sets.var(dim=1).flatten(start_dim=1).mean(dim=1).double()
