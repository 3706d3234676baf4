"""FID of checkpoints and of spoilt real digits on the pinned digit net and on a plain classifier, in multiples of the floor.

    python scripts/compare_classifiers.py runs/mnist/*/checkpoints/best.ckpt

Classifier FIDs share no scale. The pinned net was trained with augmentation, so it minds a rotation or a shift less; the
plain one (same layers, no augmentation, 12 epochs with dropout) minds them more. The floor is the FID of the first 10,000
training images against the 10,000 test images; samples and spoilt digits are 10,000 as well. About 10 minutes on one core.
"""

import argparse
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms.v2 import functional as tv

from bngan.checkpoint import load_gan
from bngan.data import mnist
from bngan.data.datasets import DATASETS, Labelled
from bngan.images import to_minus1_1, to_uint8
from bngan.metrics.digit_net import DigitNet, load_digit_net

SAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data set")
    args = parser.parse_args()
    mnist.lay_out(args.root)
    train, test = (DATASETS["mnist"].load(args.root, train=part) for part in (True, False))
    plain = train_plain(to_minus1_1(train.images), train.labels)
    correct = classify(plain, to_minus1_1(test.images)) == test.labels
    print(f"plain classifier: test accuracy {correct.float().mean().item():.4f}")
    for name, net in (("pinned", load_digit_net()), ("plain", plain)):
        real = to_minus1_1(test.images)
        floor = fid(net, real, to_minus1_1(train.images[:SAMPLES]))
        print(f"{name:<7} floor {floor:8.3f}")
        for control, images in spoilt(train).items():
            print(f"{name:<7} {control:<20} {fid(net, real, images) / floor:6.1f} x floor", flush=True)
        for path in args.checkpoints:
            value = fid(net, real, draw(path))
            print(f"{name:<7} FID   {value:8.3f}  = {value / floor:5.1f} x floor  {path}", flush=True)


def spoilt(train: Labelled) -> dict[str, Tensor]:
    """Return 10,000 real training digits each, spoilt in a known way, in [-1, 1]."""
    digits = to_minus1_1(train.images[:SAMPLES])
    bilinear = {"interpolation": tv.InterpolationMode.BILINEAR, "fill": [-1.0]}
    noise = torch.randn(digits.shape, generator=torch.Generator().manual_seed(0))
    return {
        "no 1s": to_minus1_1(train.images[train.labels != 1][:SAMPLES]),
        "no 8s": to_minus1_1(train.images[train.labels != 8][:SAMPLES]),
        "rotated 10 degrees": tv.rotate(digits, 10.0, **bilinear),
        "shifted 2 pixels": digits.roll(2, dims=3),
        "5% smaller": tv.affine(digits, 0.0, [0, 0], 0.95, [0.0, 0.0], **bilinear),
        "blurred, sd 1 pixel": tv.gaussian_blur(digits, [5, 5], [1.0, 1.0]),
        "noise, sd 0.2": (digits + 0.2 * noise).clamp(-1, 1),
        "1,000 digits 10 times": digits[:1000].repeat(10, 1, 1, 1),
    }


def train_plain(images: Tensor, labels: Tensor, epochs: int = 12) -> DigitNet:
    """Train the digit net's layers without augmentation or label smoothing."""
    torch.manual_seed(0)
    net = DigitNet()
    batches = len(images) // 128
    adam = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=2e-3, total_steps=epochs * batches)
    for _ in track(range(epochs), description="training the plain classifier"):
        for rows in torch.randperm(len(images)).split(128)[:batches]:
            loss = F.cross_entropy(net.logits(F.dropout(net(images[rows]), p=0.5)), labels[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def classify(net: DigitNet, images: Tensor) -> Tensor:
    return torch.cat([net.logits(net(chunk)).argmax(dim=1) for chunk in images.split(1000)])


def fid(net: DigitNet, real: Tensor, fake: Tensor) -> float:
    metric = FrechetInceptionDistance(feature=net)
    for images, is_real in ((real, True), (fake, False)):
        for chunk in images.split(1000):
            metric.update(chunk, real=is_real)
    return float(metric.compute())


def draw(checkpoint: Path) -> Tensor:
    """Return a checkpoint's samples as a picture file would have them, in [-1, 1]."""
    gan = load_gan(checkpoint)
    with gan.sampler() as sampler:
        chunks = [sampler.samples(start, start + 1000, seed=1) for start in range(0, SAMPLES, 1000)]
    return to_minus1_1(to_uint8(torch.cat(chunks)))


if __name__ == "__main__":
    main()
