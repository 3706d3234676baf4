"""Train the digit feature net that bngan's metrics use, and write its weights and their SHA-256.

    python scripts/train_digit_net.py --output bngan/metrics/digit_net.safetensors

About 10 minutes on 2 cores. The seed is fixed; another processor or torch version can still give other weights, which is
why the package carries one file and pins its SHA-256.
"""

import argparse
import hashlib
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets

from bngan.data import mnist
from bngan.metrics.digit_net import DigitNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("digit_net.safetensors"))
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data set")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    mnist.lay_out(args.root)
    train_images, train_labels = load(args.root, train=True)
    test_images, test_labels = load(args.root, train=False)
    net = DigitNet()
    batch_size = 128
    steps = args.epochs * (len(train_images) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    start = time.monotonic()
    for epoch in range(args.epochs):
        net.train()
        for index in torch.randperm(len(train_images)).split(batch_size):
            if len(index) < batch_size:
                continue
            features = F.dropout(net(augment(train_images[index])), p=0.3)
            loss = F.cross_entropy(net.logits(features), train_labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        accuracy = evaluate(net, test_images, test_labels)
        print(f"epoch {epoch + 1:2d}  test accuracy {accuracy:.4f}  {time.monotonic() - start:.0f} s", flush=True)

    content = save({name: value.contiguous() for name, value in net.state_dict().items()})
    args.output.write_bytes(content)
    print(f"{args.output}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")


def load(root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) in [-1, 1] and labels (N,)."""
    dataset = datasets.MNIST(str(root), train=train)
    return dataset.data.unsqueeze(1).float() / 127.5 - 1, dataset.targets


def augment(images: Tensor) -> Tensor:
    """Give each image its own rotation (12 degrees), scale (12%), shear (0.15) and shift (2.5 pixels), at most."""
    n = len(images)

    def draw(limit: float) -> Tensor:
        return (torch.rand(n) * 2 - 1) * limit

    angle, scale, shear, shift_x, shift_y = draw(0.21), 1 + draw(0.12), draw(0.15), draw(2.5 / 14), draw(2.5 / 14)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin + shear, shift_x], dim=1), torch.stack([sin, cos, shift_y], dim=1)], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # The border is -1 (black), which zero padding would turn grey: shift to make it zero.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


@torch.no_grad()
def evaluate(net: DigitNet, images: Tensor, labels: Tensor) -> float:
    net.eval()
    logits = torch.cat([net.logits(net(chunk)) for chunk in images.split(1000)])
    return (logits.argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
