"""The default recipe without a framework, written for speed: what `bngan fit` is measured against.

    python scripts/bare_gan.py --root data --epochs 20

It is the whole recipe of configs/default.yaml: joint batches, relativistic loss, noise on D's images that falls to 0, learning
rates that fall in the second half, the moving average of G's weights and running statistics. It leaves out what is not
training: pictures, logs, metrics, checkpoints and the check that losses are finite. Its draws come from torch's global
generator, one stream; given the draws of bngan.GAN it ends at the same weights, which a test holds.

Fast means: data as one uint8 tensor on the device, one forward of G for both players, fused Adam, lists of tensors made once,
no value read back, and on a GPU the whole alternation as one CUDA graph.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from benchmark import loop_parser, peak_mb, wait_for
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import MNIST

from bngan.networks import Discriminator, Generator

LATENT, LR, NOISE, EMA_DECAY, LR_DECAY_START = 100, 2e-3, 1.0, 0.999, 0.5
EAGER_BEFORE_CAPTURE = 3


@dataclass
class Players:
    """Both networks, the average of G, both optimizers, and the lists that every alternation needs."""

    generator: Generator
    discriminator: Discriminator
    average: Generator
    g_adam: torch.optim.Adam
    d_adam: torch.optim.Adam
    g_weights: list[nn.Parameter]
    d_norms: list[nn.BatchNorm1d]
    averaged: list[Tensor]
    averages: list[Tensor]


class Schedule(NamedTuple):
    """What changes as the run goes on, as numbers, or as 0-d tensors where a CUDA graph must read them."""

    noise: float | Tensor
    lr: float | Tensor
    newest: float | Tensor  # weight of G's present weights in their average


def schedule(done: int, total: int) -> Schedule:
    """Return what holds in the alternation after `done` of `total`."""
    left = 1 - done / total
    newest = 1.0 if done == 0 else 1 - min(EMA_DECAY, 1 - 10 / (done + 1 + 10))
    return Schedule(NOISE * left, LR * min(1.0, left / (1 - LR_DECAY_START)), newest)


def players(generator: Generator, discriminator: Discriminator) -> Players:
    """Give two networks what training needs."""
    graph = next(generator.parameters()).is_cuda
    average = copy.deepcopy(generator).requires_grad_(False)
    g_adam, d_adam = (
        torch.optim.Adam(network.parameters(), lr=LR, betas=(0.0, 0.999), fused=True, capturable=graph)
        for network in (generator, discriminator)
    )
    averaged, averages = (
        [*network.parameters(), *(buffer for buffer in network.buffers() if buffer.is_floating_point())]
        for network in (generator, average)
    )
    norms = [layer for layer in discriminator.modules() if isinstance(layer, nn.BatchNorm1d)]
    weights = list(generator.parameters())
    return Players(generator, discriminator, average, g_adam, d_adam, weights, norms, averaged, averages)


def alternate(pair: Players, real: Tensor, z: Tensor, noise: Tensor, now: Schedule) -> None:
    """Update D, then G, then G's average, on real images (N, 784) in [-1, 1], latents (N, 100) and noise (2 N, 784)."""
    count = len(real)
    for adam in (pair.d_adam, pair.g_adam):
        adam.param_groups[0]["lr"] = now.lr
    noise = noise * now.noise
    real = real + noise[:count]
    fake = pair.generator(z)

    logits = pair.discriminator.logits(torch.cat([real, fake.detach() + noise[count:]]))
    F.softplus(logits[count:] - logits[:count]).mean().backward()
    pair.d_adam.step()
    pair.d_adam.zero_grad()

    # D's running statistics stay those of its own turn.
    for norm in pair.d_norms:
        norm.track_running_stats = False
    logits = pair.discriminator.logits(torch.cat([real, fake + noise[count:]]))
    F.softplus(logits[:count] - logits[count:]).mean().backward(inputs=pair.g_weights)
    for norm in pair.d_norms:
        norm.track_running_stats = True
    pair.g_adam.step()
    pair.g_adam.zero_grad()
    with torch.no_grad():
        newest = [now.newest] * len(pair.averages) if isinstance(now.newest, Tensor) else now.newest
        torch._foreach_lerp_(pair.averages, pair.averaged, newest)


def train(pixels: Tensor, epochs: int, batch: int, limit: int | None, on_alternation: Callable[[int], object]) -> Players:
    """Train on images uint8 (N, 784) where they lie, and call `on_alternation` with the number of alternations done."""
    device = pixels.device
    pair = players(Generator().to(device), Discriminator().to(device))
    per_epoch = min(limit or len(pixels), len(pixels) // batch)
    total, done = epochs * per_epoch, 0

    def run(rows: Tensor, now: Schedule) -> None:
        real = pixels[rows].float().div_(127.5).sub_(1)
        z = torch.randn(batch, LATENT, device=device)
        alternate(pair, real, z, torch.randn(2 * batch, pixels.shape[1], device=device), now)

    turn: Callable[[Tensor, Schedule], None] = run
    for _ in range(epochs):
        order = torch.randperm(len(pixels), device=device)
        for rows in order[: per_epoch * batch].split(batch):
            now = schedule(done, total)
            if device.type == "cuda" and done == 0:
                turn = captured(run, rows, now)
            turn(rows, now)
            done += 1
            on_alternation(done)
    return pair


def captured(run: Callable[[Tensor, Schedule], None], rows: Tensor, now: Schedule) -> Callable[[Tensor, Schedule], None]:
    """Return `run` as one CUDA graph, captured once its first calls have set everything up."""
    rows = rows.clone()
    values = Schedule(*(torch.tensor(float(value), device=rows.device) for value in now))
    graph, calls = torch.cuda.CUDAGraph(), 0

    def replay(new_rows: Tensor, new: Schedule) -> None:
        nonlocal calls
        rows.copy_(new_rows)
        for value, number in zip(values, new, strict=True):
            assert isinstance(value, Tensor)
            value.fill_(number)
        if calls < EAGER_BEFORE_CAPTURE:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run(rows, values)
            torch.cuda.current_stream().wait_stream(side)
        else:
            if calls == EAGER_BEFORE_CAPTURE:
                with torch.cuda.graph(graph):  # which records and does not run
                    run(rows, values)
            graph.replay()
        calls += 1

    return replay


def main() -> None:
    parser = loop_parser(__doc__)
    parser.add_argument("--output", type=Path, help="where to write G's averaged weights")
    args = parser.parse_args()

    pixels = MNIST(str(args.root), train=True).data.flatten(start_dim=1).to(args.device)
    torch.manual_seed(0)
    done, start = 0, 0.0

    def watch(number: int) -> None:
        nonlocal done, start
        done = number
        if number == args.warm_up:
            wait_for(args.device)
            start = time.perf_counter()

    pair = train(pixels, args.epochs, args.batch, args.limit, watch)
    wait_for(args.device)
    seconds = time.perf_counter() - start
    if args.output is not None:
        torch.save(pair.average.state_dict(), args.output)
    timed = done - args.warm_up
    if timed <= 0:
        raise SystemExit(f"{done} alternations are no more than the {args.warm_up} of --warm-up; train for longer")
    speed = timed * args.batch / seconds
    print(json.dumps({"images_per_s": speed, "steady_images_per_s": speed, "alternations": timed, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
