"""What does folding batch norm save? Each generator of the package, as it is and folded, one image at a time.

python scripts/folding.py     # a table, as Markdown; less than a minute
"""

import platform
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor

import bngan
from bngan.pretrained import names

ROUNDS = 40  # the two ways take turns, so that what else the machine does meets both
CALLS = 50  # in a round
FORMS = (".safetensors", ".onnx")


def seconds(generate: Callable[[Tensor], Tensor], z: Tensor) -> float:
    """Return how long one call takes, the mean over some."""
    start = perf_counter()
    for _ in range(CALLS):
        generate(z)
    return (perf_counter() - start) / CALLS


@torch.no_grad()
def compare(name: str, form: str) -> tuple[float, float]:
    """Return the median seconds for one image without and with folding."""
    original = bngan.load(pretrained=name)
    z = torch.randn(1, original.settings.latent_dim, generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as folder:
        ways = []
        for fold in (False, True):
            path = f"{folder}/{'folded' if fold else 'plain'}{form}"
            original.export(path, fold=fold)
            ways.append(bngan.load(path))
        times = [[seconds(way.generate, z) for way in ways] for _ in range(ROUNDS)]
    plain, folded = (median(column) for column in zip(*times[1:], strict=True))  # the first round warms up
    return plain, folded


def main() -> None:
    torch.set_num_threads(1)
    print(f"One image on one thread of {platform.machine()}, torch {torch.__version__}; median of {ROUNDS - 1} rounds\n")
    print("| generator | form | as it is, µs | folded, µs | times faster |\n|---|---|---|---|---|")
    for name in names():
        for form in FORMS:
            plain, folded = compare(name, form)
            print(f"| {name} | {form} | {plain * 1e6:.0f} | {folded * 1e6:.0f} | {plain / folded:.2f} |", flush=True)


if __name__ == "__main__":
    main()
