"""Pictures of shapes are what their folders say, and whoever judges them can tell sure from unsure."""

import random
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from PIL import Image
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", 3.1326), ("cross", 20 / 9), ("square", 2.89), ("star", 10 * 0.4 * 0.5 * 0.5878), ("triangle", 1.2990)],
)
def test_shape_covers_its_area_of_the_picture(shape: str, area: float) -> None:
    # areas of the outlines on the unit circle, by hand
    draws = random.Random(1)
    fractions = []
    for _ in range(60):
        picture = np.asarray(shapes.draw(shape, 64, draws)).astype(int)
        ground = np.median(np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]), axis=0)
        fractions.append((abs(picture - ground).sum(axis=2) > 60).mean())
    expected = area * (0.25**2 + 0.25 * 0.4 + 0.4**2) / 3  # the mean of radius^2 over radii from 1/4 to 2/5
    assert np.mean(fractions) == pytest.approx(expected, rel=0.15)


def test_same_seed_makes_the_same_pictures_in_one_folder_per_shape(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        shapes.make(tmp_path / name, num=10, size=16, seed=seed)
    one, again, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.png")} for name in ("one", "again", "other")
    )
    assert one == again
    assert one != other
    assert {path.name: len(list(path.iterdir())) for path in (tmp_path / "one").iterdir()} == dict.fromkeys(shapes.SHAPES, 2)
    assert Image.open(next((tmp_path / "one" / "star").iterdir())).size == (16, 16)


def test_judge_counts_what_the_net_is_sure_of_and_each_shape() -> None:
    class Net(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(start_dim=1)

    # logits of 5 shapes, as the images themselves: 3 that are sure, and one of two minds
    logits = torch.tensor([[9.0, 0, 0, 0, 0], [9, 0, 0, 0, 0], [0, 0, 9, 0, 0], [0, 0, 0, 1, 1]])
    sure, fractions = shapes.judge(Net(), logits)
    assert sure == 0.75
    assert fractions == [0.5, 0, 0.25, 0.25, 0]


def test_classifier_learns_to_tell_shapes(tmp_path: Path) -> None:
    draws = random.Random(0)
    pictures = [shapes.draw(shape, 16, draws) for shape in ("circle", "star") for _ in range(64)]
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    labels = torch.tensor([0] * 64 + [3] * 64)
    net = shapes.train_classifier(images, labels, epochs=8, batch_size=16)
    guesses = net(images / 127.5 - 1).argmax(dim=1)
    assert (guesses == labels).float().mean() > 0.9
