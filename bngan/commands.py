"""What are the commands, other than the Trainer's, and what can each be asked for?"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from bngan.errors import UsageError, check_at_least
from bngan.files import expand_home, refuse_to_replace, writing

if TYPE_CHECKING:
    from torch import Tensor

    from bngan.hub import TrainedGenerator

SOURCE = "a checkpoint, a run's folder (its best), or last, the newest run"
STRIP, FILM = 10, 60  # steps of a walk
MANY = 10_000  # images, that take long enough to show how far it is
PER_SECOND = {"interpolate": 20, "evolve": 4}  # pictures in a film


class Parser(argparse.ArgumentParser):
    """The parser of a command's options, which leaves it to the front door to tell what is wrong."""

    def __init__(self, command: str, purpose: str, *, add_help: bool = True) -> None:
        super().__init__(prog=f"bngan {command}", description=purpose, add_help=add_help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


# A generator and where its images go ----------------------------------------------------------------------------------


def sample(parser: Parser, arguments: list[str]) -> None:
    """Draw images."""
    _take_generator(parser)
    _take_latents(parser)
    parser.add_argument("--num", type=int, help="number of images (default 64, or what --grid has room for)")
    parser.add_argument("--grid", metavar="RxC", help="rows and columns of the picture, such as 8x8 (default: about square)")
    parser.add_argument(
        "--truncation",
        type=float,
        metavar="T",
        help="draw latents' values within -T and T alone: below 2, images are more typical and less varied (default: no limit)",
    )
    parser.add_argument(
        "--output",
        default="samples.png",
        help=".png, .jpg or what else Pillow writes: a grid; .npy or .npz: uint8 N x C x H x W; without a suffix, or with / at "
        "its end: a folder of pictures (default samples.png)",
    )
    _take_force(parser)
    args = parser.parse_args(arguments)
    count, columns = _count(args.num, args.grid)
    from bngan.images import check_grid, output_kind, write_images

    kind = output_kind(output := expand_home(args.output))
    refuse_to_replace(Path(output), force=args.force)
    if columns and kind != "grid":
        raise UsageError(f"--grid is of a picture, which --output {output} is none of; choose .png, or leave out --grid")
    generator = _load(args)
    if kind == "grid":
        check_grid(count, generator.settings.image_shape)
    parts = generator.chunks(count, args.seed, label=args.digit, truncation=args.truncation)
    with writing(output):
        write_images(_shown(parts, count), Path(output), kind, count, columns)
    print(f"{count} {'image' if count == 1 else 'images'} of {generator.source} written to {output}")


def interpolate(parser: Parser, arguments: list[str]) -> None:
    """Walk from one sample's latent to another's."""
    _take_generator(parser)
    _take_latents(parser)
    parser.add_argument("--from", type=int, default=0, dest="start", metavar="I", help="number of the first sample (default 0)")
    parser.add_argument("--to", type=int, default=1, dest="end", metavar="J", help="number of the last sample (default 1)")
    parser.add_argument("--steps", type=int, help=f"images, the two samples included (default {STRIP}; in a film {FILM})")
    parser.add_argument("--output", default="strip.png", help=".png: a strip; .gif or .mp4: a film (default strip.png)")
    _take_force(parser)
    args = parser.parse_args(arguments)
    check_at_least(2, "--", steps=args.steps)
    check_at_least(0, "--", **{"from": args.start, "to": args.end})
    if args.start == args.end:
        raise UsageError(f"--from and --to are both sample {args.start}, between which there is no way; give two numbers")
    from bngan.animation import FILMS, check_film, write_film
    from bngan.images import check_grid, to_picture, write_images

    output = Path(expand_home(args.output))
    if output.suffix.lower() not in (".png", *FILMS):
        raise UsageError(f"--output {output}: a walk is written as a strip, .png, or as a film, {' or '.join(FILMS)}")
    if not (strip := output.suffix.lower() == ".png"):
        check_film(output)
    refuse_to_replace(output, force=args.force)
    steps = args.steps or (STRIP if strip else FILM)
    generator = _load(args)
    check_grid(steps, generator.settings.image_shape)
    images = generator.sampler.walk(args.start, args.end, steps, args.seed, args.digit)
    with writing(output):
        if strip:
            write_images([images], output, "grid", steps, columns=steps)
        else:
            write_film([to_picture(image) for image in images], output, PER_SECOND["interpolate"])
    print(f"{steps} images from sample {args.start} to sample {args.end} of {generator.source} written to {output}")


def export(parser: Parser, arguments: list[str]) -> None:
    """Write the generator as a file for other programs, with a model card beside it."""
    _take_generator(parser, device=False)
    parser.add_argument("--output", required=True, help="the file: .safetensors, .onnx or .pt2; best in a folder of its own")
    parser.add_argument("--fold-batchnorm", action="store_true", help="make batch norm part of the layers before it")
    _take_force(parser)
    args = parser.parse_args(arguments)
    from bngan.export.forms import check_form

    output = Path(expand_home(args.output))
    check_form(output)
    if args.statistics == "batch":
        raise UsageError(
            "--statistics batch normalizes a sample by the others of its batch, so that no file could give it for its latent "
            "alone; choose running or precise"
        )
    files = [output, output.with_name("README.md"), output.with_suffix(".png")]
    refuse_to_replace(*files, force=args.force)
    generator = _load(args)
    with writing(output):
        difference = generator.export(output, fold=args.fold_batchnorm, force=args.force)
    print(f"The generator of {generator.source} written to {output}, described in {files[1]}.")
    print(f"Largest difference of its images to the original's, on 1,000 latents: {difference:.2g}")


def evolve(parser: Parser, arguments: list[str]) -> None:
    """Make a film of what a run's G made of the same latents as training went on."""
    parser.add_argument("run", nargs="+", help="a run's folder, or last, the newest run")
    parser.add_argument("--output", default="evolve.gif", help="the film, .gif or .mp4 (default evolve.gif)")
    _take_force(parser)
    args = parser.parse_args(arguments)
    from bngan.animation import check_film, pictures_of_training, write_film

    output = Path(expand_home(args.output))
    check_film(output)
    refuse_to_replace(output, force=args.force)
    from bngan.run import checkpoint_of, only_one, run_of

    asked = Path(only_one(args.run))
    if asked.is_file() and asked.suffix != ".ckpt":
        raise UsageError(f"{asked} is no run, and the pictures of training are in a run's folder, runs/NAME/ID; name that")
    run = asked if asked.is_dir() else run_of(checkpoint_of(asked)) or asked
    pictures = pictures_of_training(run)
    with writing(output):
        write_film(pictures, output, PER_SECOND["evolve"])
    print(f"{len(pictures)} pictures of {run} written to {output}")


def explain(parser: Parser, arguments: list[str]) -> None:
    """Write a page on which a reader moves what batch norm moves."""
    parser.add_argument("checkpoint", nargs="*", help=f"{SOURCE}, of the default's networks")
    parser.add_argument("--pretrained", choices=["default"], help="the networks that come with the package instead")
    parser.add_argument("--output", default="explain.html", help="the page (default explain.html)")
    _take_force(parser)
    args = parser.parse_args(arguments)
    output = Path(expand_home(args.output))
    refuse_to_replace(output, force=args.force)
    path = _source(args)
    from bngan.explain import explain as write_page
    from bngan.hub import load_networks

    networks = load_networks(path, pretrained=args.pretrained)
    with writing(output):
        write_page(networks.generator, networks.discriminator, output, networks.source, force=args.force)
    print(f"{networks.source} explained in {output}")


# Others ---------------------------------------------------------------------------------------------------------------


def doctor(parser: Parser, arguments: list[str]) -> None:
    """Tell what is wrong."""
    parser.add_argument("path", nargs="+", help=f"{SOURCE}; or a recipe (.yaml)")
    parser.add_argument("--root", help="folder of the data set, or of your own pictures (default: the one that the run used)")
    args = parser.parse_args(arguments)
    from bngan.doctor import diagnose
    from bngan.run import only_one

    root = None if args.root is None else Path(expand_home(args.root))
    examined, findings = diagnose(Path(only_one(args.path)), root)
    print(f"Examined {examined}.")
    for number, finding in enumerate(findings, start=1):
        print(f"\n{number}. {finding.name}\n   found:  {finding.evidence}\n   remedy: {finding.remedy}")
    print(f"\n{len(findings)} finding{'' if len(findings) == 1 else 's'}." if findings else "\nNothing found.")


def study(parser: Parser, arguments: list[str]) -> None:
    """Train many runs and report."""
    parser.add_argument("study", help="a file that describes a study (.yaml), or one that is shipped: smoke, claims_cpu, ...")
    parser.add_argument("--output", help="folder for results and report; a study that was stopped there goes on")
    parser.add_argument("--root", default="data", help="folder of the data sets' files (default data)")
    parser.add_argument("--jobs", type=int, help="runs side by side, of one thread each (default: one on each core)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: many runs as one (default cpu)")
    parser.add_argument(
        "--launcher",
        choices=("local", "slurm", "ray"),
        default="local",
        help="local: processes of this machine; slurm, ray: --jobs jobs of a cluster (default local)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be run and how long it takes; write nothing")
    args = parser.parse_args(arguments)
    check_at_least(1, "--", jobs=args.jobs)
    if args.output is None and not args.dry_run:
        raise UsageError("study needs a folder for its results: add --output FOLDER, or --dry-run to see what it takes")
    from bngan.study.command import run_command

    run_command(args.study, args.output, args.root, args.jobs, args.device, args.launcher, dry_run=args.dry_run)


class Command(NamedTuple):
    """What a command is for, in the overview's words, and what runs it, given its parser and what is typed behind its name."""

    purpose: str
    run: Callable[[Parser, list[str]], None]


COMMANDS = {
    "sample": Command("draw images from a checkpoint or an exported file, without any data set", sample),
    "interpolate": Command("walk from one sample to another, as a strip or a film", interpolate),
    "evolve": Command("make a film of a run's samples as training went on", evolve),
    "export": Command("write a generator as a file that other programs run", export),
    "explain": Command("write a page on which one moves what batch norm moves", explain),
    "doctor": Command("say what is wrong with a run, a checkpoint or a recipe, and what to do", doctor),
    "study": Command("train many runs, and report what they say of a list of claims", study),
}


# Parts ----------------------------------------------------------------------------------------------------------------


def _take_generator(parser: Parser, *, device: bool = True) -> None:
    """Add the options by which a generator is chosen."""
    parser.add_argument("checkpoint", nargs="*", help=f"{SOURCE}; or a file that bngan export has written")
    parser.add_argument(
        "--pretrained", metavar="NAME", help="a generator that comes with the package instead: default, best_mlp, dcgan, ..."
    )
    parser.add_argument("--weights", choices=("raw", "ema"), help="G's weights or their moving average (default: ema, if kept)")
    parser.add_argument(
        "--statistics",
        choices=("running", "batch", "precise"),
        help="what normalizes the samples (default: as in the run, or as exported)",
    )
    if device:
        parser.add_argument("--device", default="cpu", help="cpu, gpu, cuda:1, ... (default cpu)")
    else:
        parser.set_defaults(device="cpu")
    parser.add_argument("--trust", action="store_true", help="read a .pt2, too, which can run code")


def _take_latents(parser: Parser) -> None:
    """Add the options of what is drawn."""
    parser.add_argument("--seed", type=int, default=0, help="seed of the latents (default 0)")
    parser.add_argument("--digit", type=int, help="class of all images, of a generator that was trained with classes")


def _take_force(parser: Parser) -> None:
    parser.add_argument("--force", action="store_true", help="replace what is there")


def _load(args: argparse.Namespace) -> "TrainedGenerator":
    from bngan.hub import load

    path = _source(args)
    return load(path, args.weights, args.statistics, args.device, pretrained=args.pretrained, trust=args.trust)


def _source(args: argparse.Namespace) -> str | None:
    """Return the one checkpoint, run or file that is named, None where a pretrained generator is."""
    if bool(args.checkpoint) == (args.pretrained is not None):
        raise UsageError("name a checkpoint, a run's folder, last or an exported file; or else --pretrained NAME; see --help")
    if args.pretrained is not None:
        return None
    if len(args.checkpoint) == 1 and "*" not in args.checkpoint[0]:
        return expand_home(args.checkpoint[0])
    from bngan.run import only_one  # which takes Lightning along

    return only_one(args.checkpoint)


def _count(num: int | None, grid: str | None) -> tuple[int, int | None]:
    """Return how many images are asked for, and the columns of RxC, None where no grid is asked for."""
    check_at_least(1, "--", num=num)
    if grid is None:
        return num or 64, None
    rows, _, columns = grid.lower().partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) > 0 and int(columns) > 0):
        raise UsageError(f"--grid takes rows and columns, such as 4x8, not {grid!r}")
    room = int(rows) * int(columns)
    if num is not None and num > room:
        raise UsageError(f"--grid {grid} has room for {room} images, not for {num}; leave out --num")
    return num or room, int(columns)


def _shown(parts: Iterator["Tensor"], count: int) -> Iterator["Tensor"]:
    """Yield the same parts of so many images, and show how far it is where that takes a while."""
    from rich.progress import Progress

    with Progress(disable=count < MANY) as progress:
        task = progress.add_task("sampling", total=count)
        for part in parts:
            yield part
            progress.advance(task, len(part))
