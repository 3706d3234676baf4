"""FID of the EMA of G by where its running statistics come from: copied, averaged, or precise.

    python scripts/compare_ema_buffers.py runs/recipes/default-*/default/*/checkpoints/best.ckpt

The checkpoints must come from runs with ema_buffers average. 10,000 samples of one set of latents against as many
training digits.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from rich.progress import track

from bngan.batchnorm.layers import batch_norm_layers, running_statistics
from bngan.batchnorm.statistics import EvalStatistics
from bngan.checkpoint import load_gan
from bngan.data import mnist
from bngan.data.datasets import DATASETS
from bngan.gan import GAN
from bngan.images import to_minus1_1, to_uint8
from bngan.metrics.features import load_feature_net
from bngan.metrics.sample_metrics import SampleMetrics
from bngan.sampler import Weights

SAMPLES, CHUNK = 10_000, 500
POLICIES = ("raw weights", "copy", "average", "precise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data set")
    args = parser.parse_args()
    mnist.lay_out(args.root)
    metrics = SampleMetrics(load_feature_net("digits"), (1, 28, 28))
    digits = DATASETS["mnist"].load(args.root, train=True).images[:SAMPLES]
    metrics.set_real(to_minus1_1(some) for some in digits.split(CHUNK))
    fids: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for path in track(args.checkpoints, description="measuring"):
        gan = load_gan(path)
        if gan.generator_ema is None or gan.settings.ema_buffers != "average":
            raise SystemExit(f"{path} does not come from a run with ema_buffers average")
        fids["raw weights"].append(fid(metrics, gan, "raw", "running"))
        fids["average"].append(fid(metrics, gan, "ema", "running"))
        fids["precise"].append(fid(metrics, gan, "ema", "precise"))
        for (_, own), (_, averaged) in zip(batch_norm_layers(gan.generator), batch_norm_layers(gan.generator_ema), strict=True):
            for source, target in zip(running_statistics(own), running_statistics(averaged), strict=True):
                target.copy_(source)
        fids["copy"].append(fid(metrics, gan, "ema", "running"))
    print(f"FID, n={len(args.checkpoints)} checkpoints")
    for policy, values in fids.items():
        gains = [value - raw for value, raw in zip(values, fids["raw weights"], strict=True)]
        deviation = stdev(values) if len(values) > 1 else 0.0
        worse = sum(gain > 0 for gain in gains)
        print(f"{policy:<12} {mean(values):.4f} ± {deviation:.4f}  less raw {mean(gains):+.4f}  worse in {worse}")


def fid(metrics: SampleMetrics, gan: GAN, weights: Weights, statistics: EvalStatistics) -> float:
    with gan.sampler(weights, statistics) as sampler:
        chunks = (to_minus1_1(to_uint8(sampler.samples(start, start + CHUNK))) for start in range(0, SAMPLES, CHUNK))
        return metrics.measure(chunks, distance_alone=True)["fid"]


if __name__ == "__main__":
    main()
