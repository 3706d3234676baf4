"""Pictures to try `--config pictures` with: shapes in colours and places; and a classifier that says how good a run's are.

python scripts/shapes.py make shapes                 # 20,000 pictures in class folders
bngan fit --config pictures --data.folder shapes
python scripts/shapes.py check last --folder shapes  # are 90% of 1,000 samples a shape beyond doubt, and all occur?
"""

import argparse
import colorsys
import math
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import bngan
from bngan.data import ImageDataModule
from bngan.images import to_minus1_1

SMOOTHING = 4  # pictures are drawn this many times as large, so that edges are smooth
SURE = 0.9  # the probability from which on the classifier is sure
GOAL = 0.9  # the fraction of samples of which it should be
CHUNK = 500  # pictures judged at a time


def polygon(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Return a regular polygon's corners on the unit circle, the first at the top; every other one at `inner` for a star."""
    angles = [2 * math.pi * corner / corners - math.pi / 2 for corner in range(corners)]
    radii = [inner if corner % 2 else 1.0 for corner in range(corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


BAR = 1 / 3  # half the width of a cross's bars
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": polygon(48),
    "cross": [
        (BAR, -1), (BAR, -BAR), (1, -BAR), (1, BAR), (BAR, BAR), (BAR, 1),
        (-BAR, 1), (-BAR, BAR), (-1, BAR), (-1, -BAR), (-BAR, -BAR), (-BAR, -1),
    ],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "star": polygon(10, inner=0.4),
    "triangle": polygon(3),
}  # fmt: skip


def draw(shape: str, size: int, draws: random.Random) -> Image.Image:
    """Return a picture of a shape: a strong colour of any hue on a pale ground, anywhere, its radius 1/4 to 2/5 of the side."""
    side = size * SMOOTHING
    picture = Image.new("RGB", (side, side), _colour(draws.random(), saturation=0.25, value=0.95))
    radius = draws.uniform(1 / 4, 2 / 5) * side
    x, y = (draws.uniform(radius, side - radius) for _ in range(2))
    corners = [(x + radius * dx, y + radius * dy) for dx, dy in SHAPES[shape]]
    ImageDraw.Draw(picture).polygon(corners, fill=_colour(draws.random(), saturation=0.9, value=0.75))
    return picture.resize((size, size), Image.Resampling.BOX)


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def make(folder: Path, num: int, size: int, seed: int) -> None:
    """Write `num` pictures into one folder per shape."""
    draws = random.Random(seed)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
    for number in track(range(num), description="drawing"):
        shape = list(SHAPES)[number % len(SHAPES)]
        draw(shape, size, draws).save(folder / shape / f"{number:06d}.png")


class Classifier(nn.Sequential):
    """Maps images (N, 3, H, W) in [-1, 1] to logits (N, 5) of the shapes."""

    def __init__(self, width: int = 16) -> None:
        layers: list[nn.Module] = []
        for source, target in ((3, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width)):
            layers += [nn.Conv2d(source, target, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(target), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8 * width, len(SHAPES)))


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 4, batch_size: int = 64) -> Classifier:
    """Return a classifier trained on uint8 images (N, 3, H, W) and labels (N,)."""
    torch.manual_seed(0)
    net = Classifier()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.003, total_steps=steps)
    batches = (rows for _ in range(epochs) for rows in torch.randperm(len(images)).split(batch_size))
    for rows, _ in zip(track(batches, description="classifier", total=steps), range(steps), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(net(to_minus1_1(images[rows])), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def judge(net: nn.Module, images: Tensor) -> tuple[float, list[float]]:
    """Return of which fraction of the images (N, 3, H, W) in [-1, 1] the net is sure, and the fraction of each shape."""
    probabilities = torch.cat([net(some).softmax(dim=1) for some in images.split(CHUNK)])
    best, shapes = probabilities.max(dim=1)
    return float((best >= SURE).double().mean()), (shapes.bincount(minlength=len(SHAPES)) / len(images)).tolist()


def check(run: str, folder: Path, num: int) -> None:
    """Print what a classifier says of held-out pictures, of pairs of them laid over each other, and of a run's samples."""
    data = ImageDataModule(name="folder", folder=str(folder))
    samples = bngan.load(run).sample(num)
    train, held_out = data.load(train=True), data.load(train=False)
    net = train_classifier(train.images, train.labels)
    real = to_minus1_1(held_out.images)
    with torch.no_grad():
        guesses = torch.cat([net(some) for some in real.split(CHUNK)]).argmax(dim=1)
    right = (guesses == held_out.labels).double().mean()
    print(f"The classifier is right about {right:.2%} of {len(real):,} held-out pictures; it is sure, {SURE:.0%} or more, of")
    print(f"{'':<10}{'':>8}" + "".join(f"{shape:>10}" for shape in SHAPES))
    verdicts = {"held out": judge(net, real), "overlaid": judge(net, (real + real.flip(0)) / 2), "samples": judge(net, samples)}
    for title, (sure, fractions) in verdicts.items():
        print(f"{title:<10}{sure:>8.1%}" + "".join(f"{fraction:>10.1%}" for fraction in fractions))
    sure, fractions = verdicts["samples"]
    met = sure >= GOAL and min(fractions) > 0
    print(f"Goal, {GOAL:.0%} of the samples and every shape among them: {'met' if met else 'NOT met'}.")


def main() -> None:
    """Make pictures, or check a run's samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--num", type=int, default=20_000)
    making.add_argument("--size", type=int, default=64)
    making.add_argument("--seed", type=int, default=0)
    checking = commands.add_parser("check")
    checking.add_argument("run", help="what bngan sample takes: a checkpoint, a run's folder, or last")
    checking.add_argument("--folder", type=Path, required=True)
    checking.add_argument("--num", type=int, default=1_000)
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder, args.num, args.size, args.seed)
    else:
        check(args.run, args.folder, args.num)


if __name__ == "__main__":
    main()
