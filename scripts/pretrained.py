"""The networks that come with the package: from runs, in half precision where the metrics do not move.

python scripts/pretrained.py default=RUN             # a run's folder or a checkpoint for each name, any number of them
python scripts/pretrained.py dcgan=RUN best_mlp=RUN  # names that are not given stay as they are

Each file is read again and its samples are measured beside the checkpoint's. Matrices and kernels are kept in half precision if
FID moves by less than a hundredth, and in single precision else. The page that explains needs `default`'s discriminator, too.
"""

import argparse
import hashlib
from dataclasses import replace
from pathlib import Path

import bngan
from bngan.data import ImageDataModule
from bngan.export.forms import to_safetensors
from bngan.files import write_whole
from bngan.hub import TrainedGenerator, load_networks, with_origin
from bngan.images import to_minus1_1, to_uint8
from bngan.metrics.features import load_feature_net
from bngan.metrics.sample_metrics import SampleMetrics
from bngan.pretrained import DISCRIMINATOR, FOLDER, SUMS

SAMPLES = 10_000
CHUNK = 500
MOVED = 0.01  # of FID, that half precision may cost
WITH_DISCRIMINATOR = ("default",)
LIMIT = 6_000_000  # bytes of all files


def real_measured(root: Path) -> tuple[SampleMetrics, dict[str, float]]:
    """Return the metrics, given 10,000 training digits, and what they are for as many others: the floor."""
    data = ImageDataModule(name="mnist", root=str(root))
    data.prepare_data()
    data.setup("fit")
    metric = SampleMetrics(load_feature_net("digits"), data.image_shape)
    real = data.subset(SAMPLES, train=True).images
    others = data.subset(SAMPLES, train=True, skip=SAMPLES).images
    metric.set_real(map(to_minus1_1, real.split(CHUNK)))
    return metric, metric.measure(map(to_minus1_1, others.split(CHUNK)))


def measured(metric: SampleMetrics, generator: TrainedGenerator) -> dict[str, float]:
    """Return the metrics of 10,000 samples, as they are written to files."""
    return metric.measure(to_minus1_1(to_uint8(chunk)) for chunk in generator.chunks(SAMPLES))


def write(name: str, run: str, metric: SampleMetrics, floor: dict[str, float]) -> str:
    """Write the generator of that name, and perhaps its discriminator; return a row of the table."""
    generator = bngan.load(run)
    before = measured(metric, generator)
    about = replace(with_origin(generator.about, generator.source), recipe=name, floor=floor)
    path = FOLDER / f"{name}.safetensors"
    after: dict[str, float] = {}
    for half in (True, False):
        write_whole(path, to_safetensors(generator.sampler.network, about, half=half))
        after = measured(metric, bngan.load(path))
        if abs(after["fid"] / before["fid"] - 1) < MOVED:
            break
    write_whole(path, to_safetensors(generator.sampler.network, replace(about, metrics=after), half=half))
    if name in WITH_DISCRIMINATOR:
        about = replace(about, network="discriminator", weights=None, statistics=None, metrics={}, floor={})
        content = to_safetensors(load_networks(run).discriminator, about, half=half)
        write_whole(FOLDER / f"{name}{DISCRIMINATOR}.safetensors", content)
    size, digits = path.stat().st_size, "half" if half else "single"
    return f"| {name} | {about.iteration:,} | {before['fid']:.4f} | {after['fid']:.4f} | {digits} | {size / 1e6:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="a name, and the run or checkpoint that it is from")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets' files (default data)")
    args = parser.parse_args()
    metric, floor = real_measured(args.root)
    print(f"FID of {SAMPLES:,} samples by the digit net (floor {floor['fid']:.4f})\n")
    print("| generator | iteration | checkpoint's FID | file's FID | precision | MB |\n|---|---|---|---|---|---|")
    for given in args.runs:
        name, _, run = given.partition("=")
        print(write(name, run, metric, floor), flush=True)
    files = sorted(FOLDER.glob("*.safetensors"))
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    write_whole(SUMS, "".join(sums).encode())
    if (size := sum(file.stat().st_size for file in files)) > LIMIT:
        raise SystemExit(f"all files have {size:,} bytes, and {LIMIT:,} are allowed")


if __name__ == "__main__":
    main()
