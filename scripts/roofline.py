"""How fast the default recipe could train on this machine at best: its arithmetic over the rates that the machine reaches.

    python scripts/roofline.py --batch 128

Floating-point operations are counted by torch's FlopCounterMode on one real alternation (scripts/bare_gan.py), forward and
backward; only matrix products count. Bytes are those that cannot be spared however kernels are fused: operands and
results of every product, the batch, and weights, gradients, moments and average as Adam and the average read and write
them. Rates are measured: the step's own products run by themselves, a large product, and copies within and beyond the caches.
The limit takes the best rate of each kind and lets arithmetic and traffic overlap. Random numbers, which the recipe needs too,
are not in it; their time is told apart.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from bare_gan import LATENT, Players, alternate, players, schedule
from benchmark import wait_for
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bngan.networks import Discriminator, Generator

LARGE = 2048
COPIES = (1 << 20, 256 << 20)  # bytes: what caches hold, and what they do not
MIN_SECONDS = 0.3


class Products(TorchDispatchMode):
    """Collects the shapes (m, k, n) of the matrix products within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.shapes.append((*left.shape, right.shape[1]))
        return func(*args, **(kwargs or {}))


def count(pair: Players, batch: int, device: str) -> tuple[int, list[tuple[int, int, int]], int]:
    """Return one alternation's floating-point operations, the shapes of its products, and the bytes it must move."""
    values = pair.discriminator.input_dim
    real, z = torch.zeros(batch, values, device=device), torch.randn(batch, LATENT, device=device)
    noise = torch.randn(2 * batch, values, device=device)
    flops, products = FlopCounterMode(display=False), Products()
    with flops, products:
        alternate(pair, real, z, noise, schedule(0, 2))
    moved = sum(4 * (m * k + k * n + m * n) for m, k, n in products.shapes)
    # Adam reads weight, gradient and two moments and writes all but the gradient; the average reads two and writes one.
    for network, passes in ((pair.generator, 7 + 3), (pair.discriminator, 7)):
        moved += 4 * passes * sum(parameter.numel() for parameter in network.parameters())
    return flops.get_total_flops(), products.shapes, moved + batch * values


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the least time of one call, after one that is not timed."""
    work()
    wait_for(device)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < MIN_SECONDS:
        before = time.perf_counter()
        work()
        wait_for(device)
        best = min(best, time.perf_counter() - before)
    return best


def measure(batch: int, device: str) -> dict[str, Any]:
    """Return counts, rates and the limit in images/s."""
    pair = players(Generator().to(device), Discriminator().to(device))
    flops, shapes, moved = count(pair, batch, device)
    operands = [(torch.randn(m, k, device=device), torch.randn(k, n, device=device)) for m, k, n in shapes]
    outputs = [torch.empty(m, n, device=device) for m, _, n in shapes]

    def own_products() -> None:
        for (left, right), output in zip(operands, outputs, strict=True):
            torch.mm(left, right, out=output)

    square = torch.randn(LARGE, LARGE, device=device)
    product = torch.empty_like(square)
    own_rate = flops / seconds(own_products, device)
    large_rate = 2 * LARGE**3 / seconds(lambda: torch.mm(square, square, out=product), device)
    copy_rates: list[float] = []
    for size in COPIES:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target: Tensor = torch.zeros_like(source)
        copy_rates.append(2 * size / seconds(lambda source=source, target=target: target.copy_(source), device))
    drawn = batch * (2 * pair.discriminator.input_dim + LATENT)
    numbers = torch.empty(drawn, device=device)
    drawing = seconds(numbers.normal_, device)
    arithmetic, traffic = flops / max(own_rate, large_rate), moved / max(copy_rates)
    return {
        "images_per_s": batch / max(arithmetic, traffic),
        "flops": flops,
        "bytes": moved,
        "own_gflops_per_s": own_rate / 1e9,
        "large_gflops_per_s": large_rate / 1e9,
        "cached_copy_gb_per_s": copy_rates[0] / 1e9,
        "large_copy_gb_per_s": copy_rates[1] / 1e9,
        "arithmetic_ms": 1e3 * arithmetic,
        "own_products_ms": 1e3 * flops / own_rate,
        "traffic_ms": 1e3 * traffic,
        "random_ms": 1e3 * drawing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(json.dumps(measure(args.batch, args.device)))


if __name__ == "__main__":
    main()
