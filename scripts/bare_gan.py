"""The default recipe without a framework, written by hand for speed: what `bngan fit` is measured against.

    python scripts/bare_gan.py --data_root data
    python scripts/bare_gan.py --data_root data --network conv --hidden_dim 32 --batch 64 --lr 4e-3    # configs/dcgan.yaml

It is the whole recipe: joint batches, relativistic loss, instance noise that falls to 0, learning rates that fall in the second
half, the moving average of G's weights and running statistics. It leaves out what is not training: pictures, logs, metrics,
checkpoints and the check that losses are finite. Of bngan it takes the networks alone; given the draws of bngan it ends at the
same weights, which a test holds.

It is fast by the same means as bngan's iteration: images as one uint8 tensor on the device, one forward of G for both updates,
fused Adam with a tensor as learning rate, no value read back, and on a GPU TF32 and the whole iteration as one CUDA graph.
The last line is JSON: images_per_s of the iterations after the warm-up.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import MNIST

from bngan.networks import ConvDiscriminator, ConvGenerator, Discriminator, Generator

LATENT_DIM, NOISE, EMA_DECAY, LR_DECAY_START = 100, 1.0, 0.999, 0.5
EAGER_ITERATIONS = 3  # on a GPU, before the capture: what torch sets up at its first calls cannot be captured


class BareGAN:
    """Two networks on their device, the moving average of G, both optimizers, and the iteration that updates them."""

    def __init__(self, generator: Generator | ConvGenerator, discriminator: Discriminator | ConvDiscriminator) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.generator_ema = copy.deepcopy(generator).requires_grad_(False)
        self.g_weights = [weight for weight in generator.parameters() if weight.requires_grad]
        # Scalars on the device, which a CUDA graph reads anew at each replay.
        self.lr, self.noise, self.ema_weight = (self.g_weights[0].new_zeros(()) for _ in range(3))
        self.g_adam, self.d_adam = (
            torch.optim.Adam(network.parameters(), lr=self.lr, betas=(0.0, 0.999), fused=True, capturable=self.lr.is_cuda)
            for network in (generator, discriminator)
        )
        self.d_norms = [layer for layer in discriminator.modules() if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
        self.values, self.averages = (
            [*network.parameters(), *(buffer for buffer in network.buffers() if buffer.is_floating_point())]
            for network in (generator, self.generator_ema)
        )

    def schedule(self, done: int, total: int, lr: float) -> None:
        """Set what holds in the iteration after `done` of `total`."""
        left = 1 - done / total
        self.lr.fill_(lr * min(1.0, left / (1 - LR_DECAY_START)))
        self.noise.fill_(NOISE * left)
        self.ema_weight.fill_((1 - EMA_DECAY) / (1 - EMA_DECAY ** (done + 1)))

    def iterate(self, real: Tensor, rng: torch.Generator) -> None:
        """Update D, G and G's average, on real images (N, 784) or (N, 1, 28, 28) in [-1, 1]."""
        count = len(real)
        real = real + self.noise * draw(real.shape, real, rng)
        fake = self.generator(draw((count, LATENT_DIM), real, rng)) + self.noise * draw(real.shape, real, rng)

        logits = self.discriminator.logits(torch.cat([real, fake.detach()]))  # (2 N, 1)
        F.softplus(logits[count:] - logits[:count]).mean().backward()
        self.d_adam.step()
        self.d_adam.zero_grad()

        self.track(False)  # D's running statistics stay those of its own update
        logits = self.discriminator.logits(torch.cat([real, fake]))
        F.softplus(logits[:count] - logits[count:]).mean().backward(inputs=self.g_weights)
        self.track(True)
        self.g_adam.step()
        self.g_adam.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.values, [self.ema_weight] * len(self.values))

    def track(self, tracked: bool) -> None:
        for layer in self.d_norms:
            layer.track_running_stats = tracked


def draw(shape: tuple[int, ...], like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, device=like.device, dtype=like.dtype)


def networks(network: str, hidden_dim: int) -> tuple[Generator, Discriminator] | tuple[ConvGenerator, ConvDiscriminator]:
    if network == "conv":
        return ConvGenerator(LATENT_DIM, width=hidden_dim), ConvDiscriminator(width=hidden_dim)
    return Generator(LATENT_DIM, hidden_dim=hidden_dim), Discriminator(hidden_dim=hidden_dim)


def train(gan: BareGAN, pixels: Tensor, *, batch: int, lr: float, iterations: int, warm_up: int) -> float:
    """Train on images uint8 (N, ...) where they lie; return the seconds that the iterations after the warm-up took."""
    cuda = pixels.is_cuda
    rng = torch.Generator(pixels.device).manual_seed(0)
    rows = order = torch.zeros(batch, dtype=torch.long, device=pixels.device)
    per_epoch, start = len(pixels) // batch, 0.0

    def iterate() -> None:
        gan.iterate(pixels[rows].float().div_(127.5).sub_(1), rng)

    with torch.cuda.stream(torch.cuda.Stream() if cuda else None):  # a capture must not find work on the default stream
        for done in range(iterations):
            if done == warm_up:
                synchronize(cuda)
                start = time.perf_counter()
            at = done % per_epoch
            if at == 0:
                order = torch.randperm(len(pixels), device=pixels.device)
            rows.copy_(order[at * batch : (at + 1) * batch])
            gan.schedule(done, iterations, lr)
            if cuda and done == EAGER_ITERATIONS:
                iterate = captured(iterate, rng)
            iterate()
        synchronize(cuda)
    return time.perf_counter() - start


def captured(iterate: Callable[[], None], rng: torch.Generator) -> Callable[[], None]:
    """Record an iteration, without running it, as a CUDA graph; return what replays it."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(rng)
    with torch.cuda.graph(graph):
        iterate()
    return graph.replay


def synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder that holds MNIST")
    parser.add_argument("--network", choices=("mlp", "conv"), default="mlp")
    parser.add_argument("--hidden_dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--warm_up", type=int, default=100, help="iterations that are not timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    shape = (1, 28, 28) if args.network == "conv" else (784,)
    pixels = MNIST(str(args.data_root), train=True).data.view(-1, *shape).to(args.device)
    generator, discriminator = networks(args.network, args.hidden_dim)
    gan = BareGAN(generator.to(args.device), discriminator.to(args.device))
    seconds = train(gan, pixels, batch=args.batch, lr=args.lr, iterations=args.iterations, warm_up=args.warm_up)
    print(json.dumps({"images_per_s": (args.iterations - args.warm_up) * args.batch / seconds}))


if __name__ == "__main__":
    main()
