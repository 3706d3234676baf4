"""Precision, recall, density and coverage: how the samples lie among the real images."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bngan.metrics.pairs import FeaturePairs


class PRDC(FeaturePairs):
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A set's manifold is taken as balls around its images, each reaching to the k-th nearest image of the same set.

    Args:
        pr_neighbours: k of precision and recall.
        dc_neighbours: k of density and coverage.
        chunk: rows of distances held at a time; never more than two blocks of chunk x images.
    """

    names = ("precision", "recall", "density", "coverage")

    def __init__(self, pr_neighbours: int = 3, dc_neighbours: int = 5, chunk: int = 50) -> None:
        super().__init__()
        self.pr_neighbours, self.dc_neighbours, self.chunk = pr_neighbours, dc_neighbours, chunk

    def compute(self) -> dict[str, Tensor]:
        """Return each as a number of at least 0.

        `precision` is the fraction of fakes within a real ball, `recall` that of real images within a fake ball, `density` the
        mean number of real balls around a fake over k, and `coverage` the fraction of real balls that hold a fake.
        """
        real, fake = self.sets(at_least=max(self.pr_neighbours, self.dc_neighbours) + 1)
        real, fake = real.double(), fake.double()
        if self._among_real is None:
            self._among_real = self._radii(real, self.pr_neighbours, self.dc_neighbours)
        pr_radii, dc_radii = self._among_real
        (fake_radii,) = self._radii(fake, self.pr_neighbours)
        held_fakes = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
        recalled, covered, balls = torch.zeros(3, dtype=torch.double, device=fake.device)
        for rows, distances in self._squared_distances(real, fake):
            held_fakes |= (distances <= pr_radii[rows, None]).any(dim=0)
            recalled += (distances <= fake_radii).any(dim=1).count_nonzero()
            balls += (distances < dc_radii[rows, None]).count_nonzero()
            covered += (distances.amin(dim=1) < dc_radii[rows]).count_nonzero()
        return {
            "precision": held_fakes.double().mean(),
            "recall": recalled / len(real),
            "density": balls / (self.dc_neighbours * len(fake)),
            "coverage": covered / len(real),
        }

    def _radii(self, points: Tensor, *neighbours: int) -> list[Tensor]:
        """Return for each k the squared distance (N,) of each point to its k-th nearest other point."""
        # The nearest point is the point itself.
        nearest = torch.cat(
            [
                distances.topk(max(neighbours) + 1, dim=1, largest=False).values  # (chunk, k + 1)
                for _, distances in self._squared_distances(points, points)
            ]
        )
        return [nearest[:, k] for k in neighbours]

    def _squared_distances(self, points: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of the points, and their squared distances to all others (chunk, others).

        |a - b|^2 is |a|^2 - 2 a b + |b|^2, one product of matrices. Nobody needs the root, which would take as long again.
        """
        right = torch.cat([others, torch.ones_like(others[:, :1]), others.square().sum(dim=1, keepdim=True)], dim=1).T
        for start in range(0, len(points), self.chunk):
            rows = slice(start, start + self.chunk)
            part = points[rows]
            left = torch.cat([-2 * part, part.square().sum(dim=1, keepdim=True), torch.ones_like(part[:, :1])], dim=1)
            yield rows, torch.mm(left, right).clamp_(min=0)
