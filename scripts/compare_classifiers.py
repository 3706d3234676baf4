"""FID of checkpoints on the pinned digit net and on a plain classifier, with the floors of both.

    python scripts/compare_classifiers.py runs/mnist/*/checkpoints/last.ckpt

Classifier FIDs share no scale. The pinned net was trained with augmentation and barely tells training from test images, so
its floor is very low; the plain one (same layers, three epochs, no augmentation) is what most people would train. The floor
is the FID of the first 10,000 training images against the 10,000 test images; samples are 10,000 as well.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from bngan.data import mnist
from bngan.data.datasets import DATASETS
from bngan.data.loader import to_unit_range
from bngan.metrics.digit_net import DigitNet, load_digit_net
from bngan.sampling import evaluating, load_gan, to_uint8

SAMPLES = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data set")
    args = parser.parse_args()
    mnist.lay_out(args.root)
    train, test = (DATASETS["mnist"].load(args.root, train=part) for part in (True, False))
    plain = train_plain(to_unit_range(train.images), train.labels)
    correct = classify(plain, to_unit_range(test.images)) == test.labels
    print(f"plain classifier: test accuracy {correct.float().mean().item():.4f}")
    for name, net in (("pinned", load_digit_net()), ("plain", plain)):
        real = to_unit_range(test.images)
        floor = fid(net, real, to_unit_range(train.images[:SAMPLES]))
        print(f"{name:<7} floor {floor:8.3f}")
        for path in args.checkpoints:
            value = fid(net, real, draw(path))
            print(f"{name:<7} FID   {value:8.3f}  = {value / floor:5.1f} x floor  {path}", flush=True)


def train_plain(images: Tensor, labels: Tensor) -> DigitNet:
    """Train the digit net's layers for three epochs without augmentation, dropout or smoothing."""
    torch.manual_seed(0)
    net = DigitNet()
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(3):
        for rows in torch.randperm(len(images)).split(128):
            loss = F.cross_entropy(net.logits(net(images[rows])), labels[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
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
    with evaluating(gan):
        chunks = [gan.generate(gan.sample_latents(start, start + 1000, seed=1)) for start in range(0, SAMPLES, 1000)]
    return to_unit_range(to_uint8(torch.cat(chunks)))


if __name__ == "__main__":
    main()
