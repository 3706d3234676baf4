"""Measure what `bngan fit` costs, and compare it with what the same networks can cost.

    python scripts/benchmark.py step                # images/s of fit, a bare loop, the textbook's GAN, and the machine's limit
    python scripts/benchmark.py fit                 # whole commands, from the shell to their end
    python scripts/benchmark.py startup             # from the command to the first alternation
    python scripts/benchmark.py memory              # the most memory held at once
    python scripts/benchmark.py quality             # from the command to a FID
    python scripts/benchmark.py scaling             # two processes against one
    python scripts/benchmark.py scaling --images    # a thousand to a million images
    python scripts/benchmark.py scaling --folder    # 50,000 colour pictures: is the step kept waiting?
    python scripts/benchmark.py report              # docs/performance.md from what the others recorded

The sides, on the same networks, batch and data:

    fit       `python scripts/train.py fit`, which is `bngan fit`, with every callback, and one more that times it
    fit, 1    the same with one alternation in each step of the Trainer (--data.alternations_per_step 1)
    bare      scripts/bare_gan.py, the same recipe as one writes it by hand for speed
    textbook  scripts/textbook_gan.py, a GAN in Lightning as tutorials write it
    limit     scripts/roofline.py, the recipe's arithmetic over the rates that this machine reaches

Each run is a process of its own; the sides take turns, and every other round in reverse, so that a slow spell of the machine
hits all of them. The first alternations are not timed. Figures are medians with the least and the most; ratios are taken within
a round. The last line is JSON, and the same goes into docs/performance.json, under the subcommand's name.
"""

import argparse
import json
import math
import os
import platform
import random
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performance_page import Seen, conditions, goals_table, rows_table, text_table, write_page

if TYPE_CHECKING:
    import torch  # the sides load it; here it would only cost time and memory

SCRIPTS = Path(__file__).resolve().parent
REPOSITORY = SCRIPTS.parent
BATCH, SCALING_BATCH = 128, 512
GROUP = 8  # alternations in a step of the Trainer, where several are measured
TAUS = (20, 10)  # multiples of the floor that FID must reach
RECIPES = ("default", "best_mlp", "dcgan")
SIZES = (1_000, 10_000, 100_000, 1_000_000)
IMAGE_BYTES = 28 * 28
# What issues promise: at least (+1) or at most (-1) that value.
FIT_TO_BARE = {"cpu": (+1, 0.95), "cuda": (+1, 0.8)}
FIT_TO_TEXTBOOK = {"cpu": (+1, 3.0), "cuda": (+1, 10.0)}
START_TO_IMPORT, HELP_SECONDS = (-1, 1.25), (-1, 0.7)
MEMORY_TO_BARE = (-1, 1.2)
TWO_TO_ONE = (+1, 1.6)
COST_SPREAD, BYTES_PER_BYTE, WAITING = (-1, 1.1), (-1, 1.1), (-1, 0.05)
IMPORTS = "import torch, lightning.pytorch, torchmetrics"
# Variables that would make a child part of somebody's job, or another kind of run than a fresh shell starts.
FOREIGN = ("BNGAN_", "PL_", "SLURM_", "TORCHELASTIC_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "GOMP_", "PYTHONPROFILE")
RANKS = {"RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
Side = Callable[[int], Seen]


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.command == "prepare":
        print(json.dumps(prepare(args.folder, args.pictures)))
        return
    if args.command == "report":
        results = read(args.output)
        if not results:
            fail(f"{args.output} holds no results; run python scripts/benchmark.py step first")
        write_page(results, args.output.with_suffix(".md"))
        print(f"{args.output.with_suffix('.md')} written")
        return
    measure = {"step": step, "fit": fit, "startup": startup, "scaling": scaling, "quality": quality, "memory": memory}
    try:
        with tempfile.TemporaryDirectory(prefix="bngan-benchmark-") as folder:
            args.work = Path(folder)
            machine = run([*script("benchmark"), "prepare", str(args.work)], args)
            if args.device == "cuda" and machine["gpu"] is None:
                fail("there is no GPU here that torch can use; leave out --device")
            result = measure[args.command](args)
    except KeyboardInterrupt:
        sys.exit(130)
    key = f"{args.command} {args.mode}".strip()
    key += "" if args.device == "cpu" else f" on {machine['gpu']}"
    result = {
        "command": shlex.join(["python", "scripts/benchmark.py", *without(without(sys.argv[1:], "--output"), "--keep")]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **machine,
        "settings": {"device": args.device, "threads": args.threads, **result.pop("settings")},
        **result,
    }
    result = rounded(result)
    known = read(args.output)
    write(args.output, json.dumps({**known, key: result}, indent=1) + "\n")
    print(f"\n{key}: {conditions(result)}\n")
    print("\n".join(text_table(rows_table(result))))
    if result["goals"]:
        print("\n" + "\n".join(text_table(goals_table(result))))
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("report", help="write the page, and its picture, from the recorded results")
    prepared = commands.add_parser("prepare", help="(internal) lay out the data and describe the machine")
    prepared.add_argument("folder", type=Path)
    prepared.add_argument("--pictures", type=int, default=0)
    timed: dict[str, argparse.ArgumentParser] = {}
    for name, purpose, runs in (
        ("step", "images/s of every side, and their ratios", 7),
        ("fit", "seconds of whole commands", 3),
        ("startup", "seconds to the first alternation", 7),
        ("scaling", "two processes against one; or --images, or --folder", 5),
        ("quality", "seconds from the command to a FID", 1),
        ("memory", "most memory held at once", 3),
    ):
        timed[name] = commands.add_parser(name, help=purpose)
        timed[name].add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run (default all cores)")
        timed[name].add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        if name != "quality":
            timed[name].add_argument("--runs", type=int, default=runs, help=f"rounds in which each side runs (default {runs})")
    for name, epochs in (("step", 2), ("fit", 20), ("memory", 1), ("scaling", 3), ("quality", None)):
        told = "the recipe's" if epochs is None else epochs
        timed[name].add_argument("--epochs", type=int, default=epochs, help=f"passes over the data (default {told})")
        timed[name].add_argument("--limit", type=int, help="alternations per pass, at most")
        timed[name].add_argument("--samples", type=int, default=10_000, help="samples that a validation measures")
    for name in timed:
        timed[name].add_argument("--warm-up", type=int, default=100, help="alternations that are not timed (default 100)")
    mode = timed["scaling"].add_mutually_exclusive_group()
    mode.add_argument("--images", action="store_true", help="cost per image by the number of images")
    mode.add_argument("--folder", action="store_true", help="how long a folder of pictures keeps the step waiting")
    timed["scaling"].add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of images for --images")
    timed["scaling"].add_argument("--alternations", type=int, default=2000, help="length of each run of --images")
    timed["scaling"].add_argument("--count", type=int, default=50_000, help="pictures for --folder")
    timed["quality"].add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    timed["quality"].add_argument("--seeds", type=int, nargs="+", default=(1, 2, 3, 4, 5))
    timed["quality"].add_argument("--keep", type=Path, help="folder for the runs, which scripts/recipes.py --runs can measure")
    for command in (page, *timed.values()):
        command.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "performance.json", help="results' file")
    args = parser.parse_args()
    if args.command in timed:
        for name in ("runs", "epochs", "limit", "threads", "alternations", "count"):
            value = getattr(args, name, None)
            if value is not None and value < 1:
                parser.error(f"--{name} must be at least 1, got {value}")
        args.mode = "images" if getattr(args, "images", False) else "folder" if getattr(args, "folder", False) else ""
        if args.command == "quality" and set(args.recipes) != set(RECIPES):
            args.mode = " ".join(args.recipes)  # some recipes' results must not take the place of the others'
        if args.command == "scaling" and not args.mode and args.limit and args.limit % GROUP:
            parser.error(
                f"--limit must be a multiple of {GROUP}, the alternations of a step on one of the sides, got {args.limit}"
            )
    return args


# What is measured ------------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace) -> Seen:
    """Images per second of the sides after the warm-up."""
    training = ("--trainer.limit_val_batches=0",)
    sides: dict[str, Side] = {
        "fit": lambda _: run(fit_command(args, *training), args),
        "fit, 1": lambda _: run(fit_command(args, *training, "--data.alternations_per_step=1"), args),
        "bare": lambda _: run(loop("bare_gan", args), args),
        "textbook": lambda _: run(loop("textbook_gan", args), args),
        "limit": lambda _: run([*script("roofline"), f"--batch={BATCH}", f"--device={args.device}"], args),
    }
    seen = take_turns(sides, args.runs, lambda result: f"{result['images_per_s']:,.0f} images/s")
    columns = {"images/s": "images_per_s", "images/s of alternations alone": "steady_images_per_s", "peak MB": "peak_mb"}
    roofline = {name: statistics.median(result[name] for result in seen["limit"]) for name in seen["limit"][0]}
    return {
        "settings": run_settings(args, warm_up=args.warm_up),
        "rows": {side: spreads(seen[side], columns) for side in sides},
        "goals": {
            "fit / bare": goal(ratios(seen, "images_per_s", "fit", "bare"), FIT_TO_BARE[args.device]),
            "fit / bare, alternations alone": goal(ratios(seen, "steady_images_per_s", "fit", "bare")),
            "fit / fit, 1": goal(ratios(seen, "images_per_s", "fit", "fit, 1")),
            "fit / textbook": goal(ratios(seen, "images_per_s", "fit", "textbook"), FIT_TO_TEXTBOOK[args.device]),
            "fit / limit": goal(ratios(seen, "images_per_s", "fit", "limit")),
        },
        "roofline": roofline,
    }


def fit(args: argparse.Namespace) -> Seen:
    """Seconds of the whole fit command, and of the bare loop as a script that ends by saving G."""
    weights = f"--output={args.work / 'generator.pt'}"

    def whole(number: int) -> Seen:
        forget_floors(args)
        root = args.work / f"fit-{number}"
        started = time.monotonic()
        run(fit_command(args, f"--metrics.num_samples={args.samples}", f"--trainer.default_root_dir={root}"), args)
        seconds = time.monotonic() - started
        found = list(root.glob("*/*/quality.json"))
        measuring = json.loads(found[0].read_text())["validation_seconds"] if found else 0.0
        return {"seconds": seconds, "validation": measuring, "rest": seconds - measuring}

    def script_alone(_: int) -> Seen:
        started = time.monotonic()
        run([*loop("bare_gan", args), weights], args)
        seconds = time.monotonic() - started
        return {"seconds": seconds, "validation": 0.0, "rest": seconds}

    sides: dict[str, Side] = {"fit": whole, "bare": script_alone}
    seen = take_turns(sides, args.runs, lambda result: f"{result['seconds']:.1f} s")
    columns = {"seconds": "seconds", "of them validation": "validation", "without it": "rest"}
    return {
        "settings": run_settings(args, samples=args.samples),
        "rows": {side: spreads(seen[side], columns) for side in sides},
        "goals": {
            "fit / bare": goal(ratios(seen, "seconds", "fit", "bare")),
            "fit without validation / bare": goal(ratios(seen, "rest", "fit", "bare")),
        },
    }


def startup(args: argparse.Namespace) -> Seen:
    """Seconds from the command to the end of the first alternation, with the data in place, and what they are made of."""

    def first(_: int) -> Seen:
        started = time.time()
        seen = run(fit_command(args, "--trainer.max_steps=1", epochs=20), args)
        return {"seconds": seen["first_alternation"] - started}

    def whole(*command: str) -> Side:
        def measured(_: int) -> Seen:
            started = time.monotonic()
            run(command, args, answers=False)
            return {"seconds": time.monotonic() - started}

        return measured

    sides: dict[str, Side] = {
        "fit, to the first alternation": first,
        f"python -c '{IMPORTS}'": whole(sys.executable, "-c", IMPORTS),
        "bngan --help": whole(*script("train"), "--help"),
    }
    to_first, imports, help_ = sides
    take_turns(sides, 1, lambda _: "not counted, files are being cached")
    seen = take_turns(sides, args.runs, lambda result: f"{result['seconds']:.2f} s")
    return {
        "settings": {"runs": args.runs},
        "rows": {side: spreads(seen[side], {"seconds": "seconds"}) for side in sides},
        "goals": {
            "first alternation / imports": goal(ratios(seen, "seconds", to_first, imports), START_TO_IMPORT),
            "bngan --help, seconds": goal([result["seconds"] for result in seen[help_]], HELP_SECONDS),
        },
    }


def memory(args: argparse.Namespace) -> Seen:
    """Peak memory of fit, with a validation of every metric and without, and of the bare loop."""
    validating = (f"--metrics.num_samples={args.samples}", "--trainer.check_val_every_n_epoch=1")
    sides: dict[str, Side] = {
        "fit, with validation": lambda _: run(fit_command(args, *validating), args),
        "fit, training alone": lambda _: run(fit_command(args, "--trainer.limit_val_batches=0"), args),
        "bare": lambda _: run(loop("bare_gan", args), args),
    }
    validated, trained, bare = sides
    seen = take_turns(sides, args.runs, lambda result: f"{result['peak_mb']:,.0f} MB")
    return {
        "settings": run_settings(args, samples=args.samples, tests_libraries=tests_libraries()),
        "rows": {side: spreads(seen[side], {"peak MB": "peak_mb"}) for side in sides},
        "goals": {
            "fit with validation / bare": goal(ratios(seen, "peak_mb", validated, bare), MEMORY_TO_BARE),
            "fit training alone / bare": goal(ratios(seen, "peak_mb", trained, bare), MEMORY_TO_BARE),
        },
    }


def quality(args: argparse.Namespace) -> Seen:
    """Seconds from the command to the end of the first validation whose FID is at most TAUS times the floor.

    FID is measured after each epoch. That time is counted, since a person waits for it too, as are start-up and working out
    the floor. A run ends where it reaches the smallest of TAUS; one that never does counts as never in the median.
    """
    epochs = () if args.epochs is None else (f"--trainer.max_epochs={args.epochs}",)
    keep = (args.work / "runs" if args.keep is None else args.keep).resolve()

    def to_fid(recipe: str) -> Side:
        def measured(seed: int) -> Seen:
            forget_floors(args)
            settings = (
                f"--config={REPOSITORY / 'configs' / recipe}.yaml",
                f"--seed_everything={args.seeds[seed]}",
                f"--metrics.num_samples={args.samples}",
                "--trainer.check_val_every_n_epoch=1",
                f"--trainer.default_root_dir={keep / f'{recipe}-{args.seeds[seed]}'}",
                *epochs,
            )
            started = time.time()
            seen = run(fit_command(args, *settings, epochs=None, stop_at_floors=min(TAUS)), args)
            ended = time.time()
            if not seen["validations"]:
                fail(f"{recipe} ended without a validation; train for a whole epoch")
            reached = {
                f"{tau}": next((at - started for at, fid, floor in seen["validations"] if fid <= tau * floor), None)
                for tau in TAUS
            }
            _, best, floor = min(seen["validations"], key=lambda validation: validation[1])
            return {**reached, "best": best, "floors": best / floor, "floor": floor, "seconds": ended - started}

        return measured

    sides = {recipe: to_fid(recipe) for recipe in args.recipes}
    seen = take_turns(sides, len(args.seeds), lambda result: f"FID {result['best']:.3f}, {result['floors']:.1f} x its floor")
    columns = {f"seconds to {tau} x floor": f"{tau}" for tau in TAUS}
    columns |= {"best FID": "best", "best / floor": "floors", "seconds of the run": "seconds"}
    rows = {recipe: spreads(seen[recipe], columns) for recipe in sides}
    for recipe, results in seen.items():
        for tau in TAUS:
            reached = sum(result[f"{tau}"] is not None for result in results)
            rows[recipe][f"reached {tau} x floor"] = f"{reached} of {len(results)}"
    floor = seen[args.recipes[0]][0]["floor"]
    settings = {
        "seeds": list(args.seeds),
        "epochs": args.epochs,
        "alternations_per_epoch": args.limit,
        "samples": args.samples,
        "floor": floor,
    }
    return {"settings": settings, "rows": rows, "goals": {}}


def scaling(args: argparse.Namespace) -> Seen:
    """Two ranks of one thread against one process of one thread; or one of the modes below."""
    if args.mode == "images":
        return scaling_images(args)
    if args.mode == "folder":
        return scaling_folder(args)
    args.threads = 1

    def ranks(devices: int, group: int) -> Side:
        settings = (f"--trainer.devices={devices}", f"--data.batch_size={SCALING_BATCH}", "--trainer.limit_val_batches=0")
        return lambda _: run(fit_command(args, *settings, f"--data.alternations_per_step={group}"), args)

    names = {group: ("2 ranks" + more, "1 process" + more) for group, more in ((1, ""), (GROUP, f", {GROUP} a step"))}
    sides = {name: ranks(devices, group) for group, pair in names.items() for name, devices in zip(pair, (2, 1), strict=True)}
    seen = take_turns(sides, args.runs, lambda result: f"{result['images_per_s']:,.0f} images/s")
    goals: dict[str, Seen] = {}
    for two, one in names.values():
        pairs = ratios(seen, "images_per_s", two, one)
        goals |= {f"{two} / {one}, median": goal(pairs), f"{two} / {one}, best": goal([max(pairs)], TWO_TO_ONE)}
    return {
        "settings": run_settings(args, batch=SCALING_BATCH),
        "rows": {side: spreads(seen[side], {"images/s": "images_per_s"}) for side in sides},
        "goals": goals,
    }


def scaling_images(args: argparse.Namespace) -> Seen:
    """Cost per image and memory by the number of images, all of noise, in the files that torchvision's Fashion-MNIST has."""

    def sized(size: int) -> Side:
        root = args.work / f"images-{size}"
        write_images(root / "FashionMNIST" / "raw", size)
        settings = (
            "--data.name=fashion_mnist",
            f"--data.root={root}",
            f"--trainer.max_steps={args.alternations}",
            "--trainer.limit_val_batches=0",
        )
        epochs = math.ceil(args.alternations / (size // BATCH))
        return lambda _: run(fit_command(args, *settings, epochs=epochs), args)

    if min(args.sizes) < BATCH:
        fail(f"--sizes must be at least {BATCH}, the batch")
    sides = {f"{size:,} images": sized(size) for size in sorted(set(args.sizes))}
    seen = take_turns(sides, args.runs, lambda result: f"{result['images_per_s']:,.0f} images/s")
    for results in seen.values():
        for result in results:
            result["cost"] = 1e6 / result["images_per_s"]
    rows = {side: spreads(seen[side], {"µs per image": "cost", "peak MB": "peak_mb"}) for side in sides}
    least, most = min(args.sizes), max(args.sizes)
    costs = [row["µs per image"]["median"] for row in rows.values()]
    goals = {"dearest / cheapest image": goal([max(costs) / min(costs)], COST_SPREAD)}
    if most > least:
        grown = (most - least) * IMAGE_BYTES / 2**20
        pairs = zip(seen[f"{most:,} images"], seen[f"{least:,} images"], strict=True)
        growth = [(large["peak_mb"] - small["peak_mb"]) / grown for large, small in pairs]
        goals["growth of peak memory / of the data as uint8"] = goal(growth, BYTES_PER_BYTE)
    return {"settings": {"batch": BATCH, "runs": args.runs, "alternations": args.alternations}, "rows": rows, "goals": goals}


def scaling_folder(args: argparse.Namespace) -> Seen:
    """The share of time in which configs/pictures.yaml waits for 64 x 64 colour pictures, held in memory or read as needed."""
    pictures = args.work / "pictures"
    run([*script("benchmark"), "prepare", str(pictures), f"--pictures={args.count}"], args)
    common = (
        f"--config={REPOSITORY / 'configs' / 'pictures.yaml'}",
        f"--data.folder={pictures}",
        "--trainer.profiler=simple",
        "--trainer.limit_val_batches=0",
    )

    def kept(*settings: str) -> Side:
        def measured(_: int) -> Seen:
            started = time.time()
            seen = run(fit_command(args, *common, *settings, root=False), args)
            return {**seen, "start": seen["first_alternation"] - started}

        return measured

    sides = {"held in memory": kept(), "read by 2 workers": kept("--data.in_memory_gb=0")}
    seen = take_turns(sides, args.runs, lambda result: f"{result['waiting']:.1%} of the time waiting")
    columns = {"images/s": "images_per_s", "share of time waiting": "waiting", "seconds to the first alternation": "start"}
    return {
        "settings": {"pictures": args.count, "runs": args.runs, "epochs": args.epochs, "alternations_per_epoch": args.limit},
        "rows": {side: spreads(seen[side], columns) for side in sides},
        "goals": {f"waiting, {side}": goal([result["waiting"] for result in seen[side]], WAITING) for side in sides},
    }


# Running ---------------------------------------------------------------------------------------------------------------


def take_turns(sides: Mapping[str, Side], runs: int, tell: Callable[[Seen], str]) -> dict[str, list[Seen]]:
    """Run every side in each round, in reverse in every other one; return what each saw, by round."""
    seen: dict[str, list[Seen]] = {side: [] for side in sides}
    for number in range(runs):
        for side in sides if number % 2 == 0 else reversed(list(sides)):
            result = sides[side](number)
            seen[side].append(result)
            print(f"round {number + 1}/{runs}  {side:<12} {tell(result)}", flush=True)
    return seen


def script(name: str) -> list[str]:
    return [sys.executable, str(SCRIPTS / f"{name}.py")]


def run_settings(args: argparse.Namespace, **more: Any) -> Seen:
    """Return what the runs of a comparison share, for its record."""
    lengths = {"runs": args.runs, "epochs": args.epochs, "alternations_per_epoch": args.limit}
    return {"batch": BATCH, **lengths, **more}


def loop_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a side that is a script of its own, which takes what `loop` gives."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds MNIST")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--limit", type=int, help="alternations per epoch, at most")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--warm-up", type=int, default=100, help="alternations that are not timed")
    parser.add_argument("--device", default="cpu")
    return parser


def loop(name: str, args: argparse.Namespace) -> list[str]:
    """Return the command of a side that is a script of its own."""
    limit = [] if args.limit is None else [f"--limit={args.limit}"]
    options = (f"--epochs={args.epochs}", f"--batch={BATCH}", f"--device={args.device}", f"--warm-up={args.warm_up}")
    return [*script(name), f"--root={args.work}", *options, *limit]


def fit_command(
    args: argparse.Namespace, *settings: str, epochs: int | None = -1, stop_at_floors: float = 0, root: bool = True
) -> list[str]:
    """Return the fit command with a stopwatch; `settings` win over what is set here. Epochs None leaves them to the recipe."""
    epochs = args.epochs if epochs == -1 else epochs
    accelerator = "cpu" if args.device == "cpu" else "gpu"
    own = [f"--trainer.accelerator={accelerator}"]
    own += [f"--data.root={args.work}"] if root else []
    own += [] if any(setting.startswith("--trainer.devices") for setting in settings) else ["--trainer.devices=1"]
    own += [] if epochs is None else [f"--trainer.max_epochs={epochs}"]
    own += [] if getattr(args, "limit", None) is None else [f"--trainer.limit_train_batches={args.limit}"]
    watch = ("--trainer.callbacks+=stopwatch.Stopwatch", f"--trainer.callbacks.warm_up={args.warm_up}")
    configs = [setting for setting in settings if setting.startswith("--config")]
    others = [setting for setting in settings if not setting.startswith("--config")]
    return [*script("train"), "fit", *configs, *own, *others, *watch, f"--trainer.callbacks.stop_at_floors={stop_at_floors}"]


def run(command: Sequence[str], args: argparse.Namespace, *, answers: bool = True) -> Seen:
    """Run a command as a fresh shell would, in a process group that ends with it; return the last JSON that it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in RANKS and not key.startswith(FOREIGN)}
    environment["OMP_NUM_THREADS"] = str(args.threads)
    child = subprocess.Popen(
        command,
        cwd=args.work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = child.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    told = [line for line in output.splitlines() if line.startswith("{")]
    if child.returncode or (answers and not told):
        tail = "\n".join((errors or output).strip().splitlines()[-8:])
        fail(f"{' '.join(command)}\nended with status {child.returncode}:\n{tail}")
    seen: Seen = json.loads(told[-1]) if told else {}
    if answers and "alternations" in seen and "images_per_s" not in seen and args.command in ("step", "scaling"):
        fail(f"{seen['alternations']} alternations are no more than the {args.warm_up} of --warm-up; train for longer")
    return seen


def fail(reason: str) -> None:
    print(f"benchmark: error: {reason}", file=sys.stderr)
    sys.exit(2)


def tests_libraries() -> str:
    """Tell whether libraries are there that only the tests need, but that torchmetrics imports."""
    found = [name for name in ("scipy", "torch_fidelity") if find_spec(name) is not None]
    return " and ".join(found) or "none"


def forget_floors(args: argparse.Namespace) -> None:
    """Make the next run work out the floor and the controls, as the first run on a data set does."""
    (args.work / "floors.json").unlink(missing_ok=True)


def prepare(folder: Path, pictures: int) -> Seen:
    """Lay out MNIST in `folder`, or that many pictures instead, and return what the machine and the software are."""
    import torch

    from bngan.data import mnist
    from bngan.trainer_cli import git_commit

    if pictures:
        write_pictures(folder, pictures)
    else:
        mnist.lay_out(folder)
    return {
        "git": git_commit(),
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.system()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("bngan", "torch", "lightning")}},
    }


def cpu_model() -> str:
    described = Path("/proc/cpuinfo")
    if described.is_file():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_pictures(folder: Path, count: int) -> None:
    """Write smooth random 64 x 64 colour pictures, as JPEG, which photographs mostly are."""
    from PIL import Image

    folder.mkdir(parents=True)
    numbers = random.Random(0)
    for number in range(count):
        coarse = Image.frombytes("RGB", (8, 8), numbers.randbytes(8 * 8 * 3))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)


def write_images(raw: Path, count: int) -> None:
    """Write `count` training images of noise, and 1,000 held out, as IDX files."""
    raw.mkdir(parents=True)
    numbers = random.Random(0)
    for part, size in (("train", count), ("t10k", 1_000)):
        with (raw / f"{part}-images-idx3-ubyte").open("wb") as file:
            file.write(b"".join(value.to_bytes(4, "big") for value in (0x803, size, 28, 28)))
            for start in range(0, size, 10_000):
                file.write(numbers.randbytes(min(10_000, size - start) * IMAGE_BYTES))
        labels = bytes(number % 10 for number in range(size))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"".join(v.to_bytes(4, "big") for v in (0x801, size)) + labels)


def wait_for(device: "torch.device | str") -> None:
    """Wait until a GPU has done what it was told; a processor always has."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb() -> float:
    """Return the most memory, in MB, that this process has held at once."""
    # What getrusage calls the peak of a process includes its parent's size at the time of the fork.
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def without(arguments: Sequence[str], option: str) -> list[str]:
    """Return the arguments less one option and its value."""
    pairs = zip(["", *arguments], arguments, strict=False)
    return [word for before, word in pairs if option not in (before, word, word.partition("=")[0])]


def read(path: Path) -> Seen:
    """Return the recorded results, none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError:
        fail(f"{path} is not JSON; repair or remove it, or choose another --output")
        raise


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


# Summing up ------------------------------------------------------------------------------------------------------------


def rounded(value: Any) -> Any:
    """Return the same with six digits of every number, which is more than any timing has."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def spread(values: Iterable[float | None]) -> Seen:
    """Return median, least and most; None, which stands for never, is above every number."""
    everything = list(values)
    numbers = [math.inf if value is None else value for value in everything]
    low, middle, high = (
        None if math.isinf(value) else value for value in (min(numbers), statistics.median(numbers), max(numbers))
    )
    return {"median": middle, "least": low, "most": high, "all": everything}


def spreads(results: Sequence[Seen], columns: Mapping[str, str]) -> Seen:
    return {title: spread(result[key] for result in results) for title, key in columns.items() if key in results[0]}


def ratios(seen: Mapping[str, list[Seen]], key: str, over: str, under: str) -> list[float]:
    return [upper[key] / lower[key] for upper, lower in zip(seen[over], seen[under], strict=True)]


def goal(values: Sequence[float], promised: tuple[int, float] | None = None) -> Seen:
    """Return the spread of values, what was promised of their median, and whether it holds."""
    summary = spread(values)
    if promised is None:
        return summary
    sign, limit = promised
    met = sign * summary["median"] >= sign * limit
    return {**summary, "goal": f"{'at least' if sign > 0 else 'at most'} {limit:g}", "met": met}


if __name__ == "__main__":
    main()
