"""Measure what the framework costs: images/s of `bngan fit` and of a bare PyTorch loop of the same networks.

    python scripts/benchmark.py step --runs 5

Both sides train the default recipe on MNIST in processes of their own, in turn, so that a slow spell of the machine hits
both. The first iterations are not timed. The table gives medians; the last line is JSON.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from bngan.data import mnist
from bngan.data.datasets import DATASETS
from bngan.gan import GAN
from bngan.networks import Discriminator, Generator

WARM_UP = 100
BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="images/s of fit and of a bare loop, and their ratio")
    step.add_argument("--runs", type=int, default=5, help="pairs of runs (default 5)")
    step.add_argument("--epochs", type=int, default=2, help="passes over MNIST in each run (default 2)")
    step.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each process (default all cores)")
    one = commands.add_parser("one", help="a single run, in this process")
    one.add_argument("side", choices=SIDES)
    one.add_argument("--epochs", type=int, default=2)
    one.add_argument("--root", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "one":
        SIDES[args.side](args.root, args.epochs)
    else:
        compare(args.runs, args.epochs, args.threads)


def compare(runs: int, epochs: int, threads: int) -> None:
    """Run both sides in turn and print images/s, peak memory and the ratio."""
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        mnist.lay_out(Path(folder))
        for number in range(runs):
            for side in SIDES if number % 2 == 0 else reversed(SIDES):
                command = [sys.executable, __file__, "one", side, "--epochs", str(epochs), "--root", folder]
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
                result = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
                results[side].append(result)
                print(f"run {number + 1}/{runs}  {side:<5} {result['images_per_s']:8,.0f} images/s", flush=True)
    ratios = [fit["images_per_s"] / bare["images_per_s"] for fit, bare in zip(results["fit"], results["bare"], strict=True)]
    report: dict[str, Any] = {
        "batch": BATCH,
        "runs": runs,
        "threads": threads,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    print(f"\n{'':<6}{'images/s':>10}{'lowest':>10}{'highest':>10}{'peak MB':>10}")
    for side, rows in results.items():
        speeds = [row["images_per_s"] for row in rows]
        peak = statistics.median(row["peak_mb"] for row in rows)
        report[side] = {"images_per_s": statistics.median(speeds), "all": speeds, "peak_mb": peak}
        print(f"{side:<6}{statistics.median(speeds):10,.0f}{min(speeds):10,.0f}{max(speeds):10,.0f}{peak:10,.0f}")
    print(f"fit / bare: {report['ratio']:.3f} (median of {runs} pairs, {min(ratios):.3f} to {max(ratios):.3f})")
    print(json.dumps(report))


def run_bare(root: Path, epochs: int) -> None:
    """Train the default recipe as one would write it by hand for speed: one tensor, fused Adam, one forward of G."""
    images, _ = DATASETS["mnist"].load(root, train=True)
    pixels = images.flatten(start_dim=1)
    torch.manual_seed(0)
    generator, discriminator = Generator(), Discriminator()
    g_adam = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999), fused=True)
    d_adam = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999), fused=True)
    g_weights = list(generator.parameters())
    d_norms = [layer for layer in discriminator.modules() if isinstance(layer, nn.BatchNorm1d)]
    total = epochs * (len(pixels) // BATCH)
    noise_at_start = GAN().noise
    done, start = 0, 0.0
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(BATCH):
            if len(rows) < BATCH:
                continue
            noise = torch.randn(2 * BATCH, pixels.shape[1]) * (noise_at_start * (1 - done / total))
            real = pixels[rows].float().div_(127.5).sub_(1) + noise[:BATCH]
            fake = generator(torch.randn(BATCH, 100))
            logits = discriminator.logits(torch.cat([real, fake.detach() + noise[BATCH:]]))
            F.softplus(logits[BATCH:] - logits[:BATCH]).mean().backward()
            d_adam.step()
            d_adam.zero_grad()
            set_tracking(d_norms, False)
            logits = discriminator.logits(torch.cat([real, fake + noise[BATCH:]]))
            loss = F.softplus(logits[:BATCH] - logits[BATCH:]).mean()
            loss.backward(inputs=g_weights)
            set_tracking(d_norms, True)
            g_adam.step()
            g_adam.zero_grad()
            done += 1
            if done == WARM_UP:
                start = time.perf_counter()
    report(done - WARM_UP, time.perf_counter() - start)


def set_tracking(norms: list[nn.BatchNorm1d], tracking: bool) -> None:
    for norm in norms:
        norm.track_running_stats = tracking


def run_fit(root: Path, epochs: int) -> None:
    """Train by the command that a user types, with every callback at work."""
    from bngan.cli import main as bngan

    settings = (f"--data.root={root}", f"--trainer.max_epochs={epochs}", "--trainer.accelerator=cpu")
    status = bngan(["fit", *settings, "--trainer.callbacks+=benchmark.Stopwatch"])
    if status:
        sys.exit(status)


class Stopwatch(Callback):
    """Prints images/s from the end of the warm-up to the end of the last epoch."""

    def __init__(self) -> None:
        self.done, self.start = 0, 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GAN, outputs: object, batch: list[Tensor], batch_idx: int
    ) -> None:
        self.done += 1
        if self.done == WARM_UP:
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: GAN) -> None:
        self.seconds = time.perf_counter() - self.start

    def teardown(self, trainer: Trainer, pl_module: GAN, stage: str) -> None:
        report(self.done - WARM_UP, self.seconds)


def report(iterations: int, seconds: float) -> None:
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images_per_s": iterations * BATCH / seconds, "peak_mb": peak_mb}), flush=True)


SIDES = {"bare": run_bare, "fit": run_fit}

if __name__ == "__main__":
    main()
