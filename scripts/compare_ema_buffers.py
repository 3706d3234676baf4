"""FID of the moving average of G's weights by where its running statistics come from: copied, averaged or recalibrated.

    python scripts/compare_ema_buffers.py runs/recipes/default-*/default/*/checkpoints/best.ckpt

The checkpoints must come from runs with ema_buffers average. 10,000 samples of one set of latents against the test digits.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.progress import track

from bngan.batchnorm import Sampling, batch_norm_layers, running_statistics
from bngan.data import mnist
from bngan.data.datasets import DATASETS
from bngan.data.loader import to_unit_range
from bngan.gan import GAN, Weights
from bngan.metrics.features import load_feature_net
from bngan.metrics.quality import SampleQuality
from bngan.sampling import load_gan, to_uint8

SAMPLES, CHUNK = 10_000, 500
POLICIES = ("raw weights", "copy", "average", "recalibrate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data set")
    args = parser.parse_args()
    mnist.lay_out(args.root)
    quality = SampleQuality(load_feature_net("digits"), (1, 28, 28))
    held_out = DATASETS["mnist"].load(args.root, train=False).images
    quality.set_real(
        (to_unit_range(held_out[start : start + CHUNK]), torch.arange(start, start + CHUNK))
        for start in range(0, len(held_out), CHUNK)
    )
    fids: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for path in track(args.checkpoints, description="measuring"):
        gan = load_gan(path)
        if gan.average is None or gan.ema_buffers != "average":
            raise SystemExit(f"{path} does not come from a run with ema_buffers average")
        fids["raw weights"].append(fid(quality, gan, "raw", "running"))
        fids["average"].append(fid(quality, gan, "average", "running"))
        fids["recalibrate"].append(fid(quality, gan, "average", "precise"))
        for (_, own), (_, averaged) in zip(
            batch_norm_layers(gan.generator), batch_norm_layers(gan.average.module), strict=True
        ):
            for source, target in zip(running_statistics(own), running_statistics(averaged), strict=True):
                target.copy_(source)
        fids["copy"].append(fid(quality, gan, "average", "running"))
    print(f"FID, n={len(args.checkpoints)} checkpoints")
    for policy, values in fids.items():
        gains = [value - raw for value, raw in zip(values, fids["raw weights"], strict=True)]
        deviation = stdev(values) if len(values) > 1 else 0.0
        worse = sum(gain > 0 for gain in gains)
        print(f"{policy:<12} {mean(values):.4f} ± {deviation:.4f}  less raw {mean(gains):+.4f}  worse in {worse}")


def fid(quality: SampleQuality, gan: GAN, weights: Weights, sampling: Sampling) -> float:
    with gan.sampler(weights, sampling) as sampler:
        chunks = (
            (to_unit_range(to_uint8(sampler.samples(start, start + CHUNK))), torch.arange(start, start + CHUNK))
            for start in range(0, SAMPLES, CHUNK)
        )
        return quality.measure(chunks, fid_alone=True)["fid"]


if __name__ == "__main__":
    main()
