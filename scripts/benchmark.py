"""Measure what `bngan fit` costs, beside what the same networks can cost.

    python scripts/benchmark.py step                     # images/s of fit, a bare loop and the textbook's GAN
    python scripts/benchmark.py step --recipe dcgan
    python scripts/benchmark.py quality                  # seconds and FID of whole runs
    python scripts/benchmark.py startup                  # seconds from the command to the first iteration
    python scripts/benchmark.py scaling                  # cost of an image, and memory, of a thousand to a million images
    python scripts/benchmark.py study                    # images/s of a study's runs side by side, and of one fit
    python scripts/benchmark.py page                     # docs/performance.md and its chart, from what the others recorded

`--device cuda` measures on a GPU. A side of a comparison is a program that prints a line of JSON: scripts/timed_fit.py, the
command as a person runs it; scripts/bare_gan.py, the same recipe written by hand for speed; scripts/textbook_gan.py, a GAN in
Lightning as tutorials write it. Each run is a process of its own in a clean environment; the sides take turns, every other
round in reverse, so that a slow spell of the machine hits all of them. Ratios are taken within a round.

Results go into docs/performance.json. OMP_NUM_THREADS, if it is set, holds for all sides.
"""

import argparse
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch
from performance_page import Figures, Result, commit, machine, table, write_page

from bngan.data import mnist

SCRIPTS = Path(__file__).resolve().parent
REPOSITORY = SCRIPTS.parent
# What the hand-written loops are told of a recipe, and how many iterations show its speed on a device.
LOOPS = {
    "default": ("--network=mlp", "--hidden_dim=128", "--batch=128"),
    "dcgan": ("--network=conv", "--hidden_dim=32", "--batch=64"),
}
LEARNING_RATES = {"default": 2e-3, "dcgan": 4e-3}
ITERATIONS = {"default cpu": 1000, "dcgan cpu": 400, "default cuda": 4000, "dcgan cuda": 2000}
RECIPES = ("default", "best_mlp", "dcgan")
DEVICES = {"cpu": ("--trainer.accelerator=cpu",), "cuda": ("--trainer.accelerator=gpu", "--trainer.devices=1")}
SIZES = (1_000, 10_000, 100_000, 1_000_000)
IMAGE_SIDE = 28
IMPORTS = "import torch, lightning.pytorch, torchmetrics"
# All that a side gets of the environment: other variables could make it part of a job, or another kind of run.
ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
Seen = dict[str, float]
Side = Callable[[], Seen]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args = parse()
    results: dict[str, Result] = json.loads(args.output.read_text()) if args.output.is_file() else {}
    if args.command == "page":
        try:
            write_page(results, args.output.with_suffix(".md"))
        except ValueError as error:
            fail(str(error))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("there is no GPU here that torch can use; leave out --device")
    try:
        with tempfile.TemporaryDirectory(prefix="bngan-benchmark-") as folder:
            args.work = Path(folder)
            mnist.lay_out(args.work / "data")
            figures = {"step": step, "quality": quality, "startup": startup, "scaling": scaling, "study": study}[args.command](
                args
            )
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    key = " ".join([args.command, *([args.recipe] if "recipe" in args else []), args.device])
    results[key] = described(args, figures)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(["", *table(key, results[key])]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose, rounds in (
        ("step", "images/s of every side, and their ratios", 7),
        ("quality", "seconds and FID of whole runs, one a seed", 5),
        ("startup", "seconds to the first iteration", 5),
        ("scaling", "cost of an image, and memory, by the number of images", 3),
        ("study", "images/s of a study's runs side by side, and of one fit", 5),
    ):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("--device", choices=tuple(DEVICES), default="cpu")
        command.add_argument("--rounds", type=int, default=rounds, help=f"how often each side runs (default {rounds})")
        command.add_argument("--quick", action="store_true", help="try the script, on too little to measure anything")
    commands.choices["step"].add_argument("--recipe", choices=tuple(LOOPS), default="default")
    commands.choices["quality"].add_argument("--recipe", choices=RECIPES, default="default")
    commands.choices["quality"].add_argument("--runs", type=Path, help="folder to keep runs in, for scripts/recipes.py --runs")
    commands.add_parser("page", help="write the page and its chart")
    for command in commands.choices.values():
        command.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "performance.json", help="results' file")
    args = parser.parse_args()
    if args.command != "page" and args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    return args


# What is measured: from the options to figures, each with a value for every round ----------------------------------------


def step(args: argparse.Namespace) -> Figures:
    """Compare images per second after the warm-up."""
    iterations, warm_up = (30, 10) if args.quick else (ITERATIONS[f"{args.recipe} {args.device}"], 100)
    fit = [f"--warm_up={warm_up}", config(args.recipe), f"--trainer.max_steps={iterations}", "--trainer.limit_val_batches=0"]
    fit += ["--trainer.log_every_n_steps=10"] if args.quick else []
    loop = [*LOOPS[args.recipe], "--data_root=data", f"--warm_up={warm_up}", f"--device={args.device}"]
    bare = [f"--iterations={iterations}", f"--lr={LEARNING_RATES[args.recipe]}"]
    textbook = [f"--iterations={max(iterations // 4, 2 * warm_up)}"]  # it is slow, and every iteration takes as long
    sides: dict[str, Side] = {
        "fit": lambda: time_fit(args, *fit),
        "bare": lambda: run(args, *script("bare_gan"), *loop, *bare),
        "textbook": lambda: run(args, *script("textbook_gan"), *loop, *textbook),
    }
    return speeds("fit", sides, args.rounds)


def quality(args: argparse.Namespace) -> Figures:
    """Time whole commands, each on a seed of its own, that work out the floor as the first run on a data set does."""
    kept = (args.runs or args.work / "runs").resolve()
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=60", "--trainer.check_val_every_n_epoch=1"]
    short += ["--metrics.num_samples=200"]

    def whole(seed: int) -> Seen:
        (args.work / "data" / "floors.json").unlink(missing_ok=True)
        settings = [config(args.recipe), f"--seed_everything={seed}", *(short if args.quick else [])]
        return time_fit(args, f"--runs={kept / f'{args.recipe}-{seed}'}", *settings)

    seeds = iter(range(1, args.rounds + 1))
    seen = take_turns({"fit": lambda: whole(next(seeds))}, args.rounds)["fit"]
    names = {"seconds": "seconds", "seconds of training": "training_seconds", "FID": "fid"}
    figures = {name: [result[key] for result in seen] for name, key in names.items()}
    return figures | {"FID / its floor": [result["fid"] / result["floor"] for result in seen]}


def startup(args: argparse.Namespace) -> Figures:
    """Time from the command to the end of the first iteration, with the data in place, beside what it is made of."""
    first = ["--trainer.max_steps=1", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"]

    def timed(*command: str) -> Seen:
        started = time.monotonic()
        execute(command, args.work)
        return {"seconds": time.monotonic() - started}

    sides: dict[str, Side] = {
        "fit, to the first iteration": lambda: {"seconds": time_fit(args, *first)["first_iteration"]},
        f"python -c '{IMPORTS}'": lambda: timed(sys.executable, "-c", IMPORTS),
        "bngan --help": lambda: timed(*script("train"), "--help"),
    }
    take_turns(sides, 1)  # not counted: it brings the files into the system's cache
    seen = take_turns(sides, args.rounds)
    seconds = {f"{name}, seconds": [result["seconds"] for result in results] for name, results in seen.items()}
    fit, imports, _ = seconds.values()
    return seconds | {"first iteration / imports": ratios(fit, imports)}


def scaling(args: argparse.Namespace) -> Figures:
    """Compare training on a thousand to a million images of noise, in the files that torchvision's Fashion-MNIST has."""
    sizes, iterations = (SIZES[:2], 200) if args.quick else (SIZES, 2000)
    length = ["--warm_up=100", "--trainer.max_epochs=-1", f"--trainer.max_steps={iterations}", "--trainer.limit_val_batches=0"]

    def sized(size: int) -> Side:
        root = args.work / f"images-{size}"
        write_images(root / "FashionMNIST" / "raw", size)
        return lambda: time_fit(args, "--data.name=fashion_mnist", f"--data.root={root}", *length)

    seen = take_turns({f"{size:,} images": sized(size) for size in sizes}, args.rounds)
    costs = {name: [1e6 / result["images_per_s"] for result in results] for name, results in seen.items()}
    peaks = {name: [result["peak_mb"] for result in results] for name, results in seen.items()}
    grown = (sizes[-1] - sizes[0]) * IMAGE_SIDE**2 / 2**20
    (few, *_, many), (least, *_, most) = costs.values(), peaks.values()
    return {
        **{f"{name}, µs per image": values for name, values in costs.items()},
        **{f"{name}, peak MB": values for name, values in peaks.items()},
        "image of the most / of the fewest": [high / low for low, high in zip(few, many, strict=True)],
        "growth of memory / of the data": [(high - low) / grown for low, high in zip(least, most, strict=True)],
    }


def study(args: argparse.Namespace) -> Figures:
    """Compare the images per second of runs side by side, one a core, with those of one fit on all cores."""
    iterations, warm_up = (30, 10) if args.quick else (3000, 100)
    fit = [f"--warm_up={warm_up}", f"--trainer.max_steps={iterations}", "--trainer.limit_val_batches=0"]
    fit += ["--trainer.log_every_n_steps=10"] if args.quick else []
    runs = [*script("timed_runs"), f"--iterations={iterations}"]
    return speeds("study", {"study": lambda: run(args, *runs), "fit": lambda: time_fit(args, *fit)}, args.rounds)


# Running ---------------------------------------------------------------------------------------------------------------


def take_turns(sides: Mapping[str, Side], rounds: int) -> dict[str, list[Seen]]:
    """Run every side in each round, in reverse in every other one; return what each saw, by round."""
    seen: dict[str, list[Seen]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(list(sides)):
            seen[name].append(sides[name]())
            told = "  ".join(f"{key} {value:,.4g}" for key, value in seen[name][-1].items())
            print(f"round {number + 1}/{rounds}  {name:<12} {told}", flush=True)
    return seen


def script(name: str) -> list[str]:
    return [sys.executable, str(SCRIPTS / f"{name}.py")]


def config(recipe: str) -> str:
    return f"--config={REPOSITORY / 'configs' / recipe}.yaml"


def time_fit(args: argparse.Namespace, *settings: str) -> Seen:
    return run(args, *script("timed_fit"), *DEVICES[args.device], *settings)


def run(args: argparse.Namespace, *command: str) -> Seen:
    """Run a side and return the JSON of its last line."""
    return json.loads(execute(command, args.work).splitlines()[-1])


def execute(command: Sequence[str], work: Path) -> str:
    """Run a command in a clean environment and a process group that ends with it; return what it printed."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, cwd=work, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        output, errors = child.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode:
        tail = "\n".join(errors.strip().splitlines()[-8:])
        fail(f"{shlex.join(command)}\nended with status {child.returncode}:\n{tail}")
    return output


def fail(reason: str) -> NoReturn:
    print(f"benchmark: error: {reason}", file=sys.stderr)
    sys.exit(2)


def write_images(raw: Path, count: int) -> None:
    """Write `count` training images of noise, and 1,000 held out, as IDX files."""
    raw.mkdir(parents=True)
    numbers = random.Random(0)
    for part, size in (("train", count), ("t10k", 1_000)):
        with (raw / f"{part}-images-idx3-ubyte").open("wb") as file:
            file.write(b"".join(value.to_bytes(4, "big") for value in (0x803, size, IMAGE_SIDE, IMAGE_SIDE)))
            for start in range(0, size, 10_000):
                file.write(numbers.randbytes(min(10_000, size - start) * IMAGE_SIDE**2))
        labels = bytes(number % 10 for number in range(size))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"".join(v.to_bytes(4, "big") for v in (0x801, size)) + labels)


# Summing up ------------------------------------------------------------------------------------------------------------


def speeds(side: str, sides: Mapping[str, Side], rounds: int) -> Figures:
    """Return the images per second of all sides, and how many times those of the others a side has."""
    seen = {name: [one["images_per_s"] for one in found] for name, found in take_turns(sides, rounds).items()}
    figures = {f"{name}, images/s": values for name, values in seen.items()}
    return figures | {f"{side} / {other}": ratios(seen[side], values) for other, values in seen.items() if other != side}


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [upper / lower for upper, lower in zip(over, under, strict=True)]


def described(args: argparse.Namespace, figures: Figures) -> Result:
    """Return figures with how, when, where and on what they were measured."""
    options = [f"--{name} {getattr(args, name)}" for name in ("recipe", "device", "rounds") if name in args]
    return {
        "command": " ".join(["python scripts/benchmark.py", args.command, *options, *(["--quick"] if args.quick else [])]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "software": f"Python {platform.python_version()}, torch {version('torch')}, Lightning {version('lightning')}",
        "figures": {name: [float(f"{value:.6g}") for value in values] for name, values in figures.items()},
    }


if __name__ == "__main__":
    main()
