"""The one front door: `bngan`, `python -m bngan` and `python scripts/train.py`.

What a command does not need is not imported: help is instant, and only training loads Lightning.
"""

import argparse
import errno
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bngan import __version__
from bngan.errors import NonFiniteLoss, UsageError, check_at_least

if TYPE_CHECKING:
    from torch import Tensor

TRAINER_COMMANDS = {
    "fit": "train; with no further words, the batch-normalized GAN on MNIST",
    "validate": "measure a checkpoint as training does, and the statistics that G can be sampled with",
    "test": "measure a checkpoint against the held-out images, which chose nothing",
    "predict": "write a checkpoint's samples as pictures",
}
OWN_COMMANDS = {
    "sample": "draw images from a checkpoint, without any data set",
    "doctor": "say what is wrong with a run, a checkpoint or a recipe, and what to do",
}
SHOW_TRACEBACK = "BNGAN_TRACEBACK"
LOST_CONTACT = "closed by peer|reset by peer|Broken pipe|caused pair closure|Connection refused|Timed out waiting"
PROCESSOR_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch has no error of its own for it
CHUNK = 500  # samples drawn at a time


def entry_point() -> None:
    """Run the command in sys.argv and exit with its status."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run one command and return its status.

    It is 0; 2 for what a person can put right, told in a line; 1 for a rank that lost another, told in a line, or for a
    defect, which shows its traceback; and 128 + signal for a run that was asked to stop.
    """
    try:
        _dispatch(arguments)
        sys.stdout.flush()  # or a reader who is gone is noticed where nothing can be done about it
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2 * bool(stop.code)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `bngan fit --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed goes there
        return 128 + signal.SIGPIPE
    except Exception as error:
        status, line = _answer(error)
        if line is None or os.environ.get(SHOW_TRACEBACK):
            traceback.print_exc()
        if line:
            hint = "" if os.environ.get(SHOW_TRACEBACK) else f"\n({SHOW_TRACEBACK}=1 shows where)"
            print(f"bngan: error: {line}{hint}", file=sys.stderr)
        return status
    return 0


def _answer(error: Exception) -> tuple[int, str | None]:
    """Return the status for an error and what to say of it, or None where its traceback says more."""
    names = {kind.__name__ for kind in type(error).__mro__}  # to look for torch's errors without importing torch
    if isinstance(error, UsageError | NonFiniteLoss):
        return 2, " ".join(str(error).split())
    full = isinstance(error, RuntimeError) and PROCESSOR_MEMORY in str(error)
    if full or isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return (
            2,
            "memory is full; try a smaller --data.batch_size or --model.hidden_dim, or --metrics.chunk if it was measuring",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 2, error.strerror or str(error)
    if (status := getattr(error, "exit_code", 0)) in (129, 130, 143):  # of ranks that this process has forked: asked to stop
        return status, ""
    lost = re.search(LOST_CONTACT, str(error)) if isinstance(error, RuntimeError) else None
    if lost or names & {"DistBackendError", "DistNetworkError", "DistStoreError", "ProcessExitedException"}:
        reason = lost[0] if lost else type(error).__name__
        return 1, f"this process ends, because another one of the run is gone ({reason})"
    return 1, None


def _dispatch(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        print(f"bngan {__version__}")
    elif command == "sample":
        _sample(rest)
    elif command == "doctor":
        _doctor(rest)
    elif command in TRAINER_COMMANDS and ("-h" in rest or "--help" in rest):
        print(_help(command))
    elif command in TRAINER_COMMANDS:
        _run_lightning(command, ["--help" if word == "--help.all" else word for word in rest])
    elif command.startswith("-"):
        raise UsageError(f"{command} must come after the command: bngan fit {command} ...; see bngan --help")
    else:
        known = ", ".join([*TRAINER_COMMANDS, *OWN_COMMANDS])
        raise UsageError(f"unknown command {command!r}; choose from {known}")


def _overview() -> str:
    commands = {**TRAINER_COMMANDS, **OWN_COMMANDS}
    return "\n".join(
        [
            "bngan: batch normalization in GANs",
            "",
            *(f"  bngan {name:<9} {purpose}" for name, purpose in commands.items()),
            "",
            "  bngan fit --help       all settings, with their defaults",
            "  bngan fit --help.all   the same with their types",
            "  tensorboard --logdir runs",
        ]
    )


def _help(command: str) -> str:
    from bngan.recipes import DEFAULT_CONFIG, SHIPPED

    recipes = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
    options = {
        "--config FILE": f"settings from a YAML file, or a recipe: {recipes}; several are laid one over the other",
        "--GROUP.NAME VALUE": "one setting of those below, such as --model.g_lr 0.001",
        "--ckpt_path PATH": "a checkpoint, a run's folder, or last, the newest run of that name: go on from it, or measure it",
        "--override": "let settings differ from the run's that decide its result",
        "--print_config": "print the settings and stop",
    }
    if command == "fit":
        options["--run ID"] = "name the run's folder, runs/NAME/ID; with --ckpt_path auto, go on with it if it is there"
    lines = [f"bngan {command}: {TRAINER_COMMANDS[command]}", "", *(f"  {name:<20} {text}" for name, text in options.items())]
    lines += ["", f"Their types: bngan {command} --help.all. The settings with their defaults, as in a file of settings:", ""]
    return "\n".join([*lines, DEFAULT_CONFIG.read_text()])


class _Parser(argparse.ArgumentParser):
    """Leaves it to main to tell what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _run_lightning(command: str, arguments: list[str]) -> None:
    """Do what fit, validate, test or predict is asked for; what is about the run, and no setting, is taken out first."""
    from bngan.recipes import GROUPS, find_config, read_config

    parser = _Parser(prog=f"bngan {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", nargs="?", default=[], dest="configs")
    parser.add_argument("--ckpt_path")
    parser.add_argument("--override", action="store_true")
    parser.add_argument("--print_config", action="store_true")
    parser.set_defaults(run=None)
    if command == "fit":
        parser.add_argument("--run")
    for group in GROUPS:
        parser.add_argument(f"--{group}", nargs="?", const="")
    options, settings = parser.parse_known_args(arguments)
    if whole := [group for group in GROUPS if getattr(options, group) is not None]:
        raise UsageError(
            f"--{whole[0]} is not taken as a whole; give settings one by one, --{whole[0]}.NAME VALUE, or --config FILE"
        )
    options.configs = [find_config(name) for name in options.configs]
    for path in options.configs:
        read_config(path)
    from bngan.lightning_cli import run_command

    run_command(command, options, settings)


def _sample(arguments: list[str]) -> None:
    parser = _Parser(
        prog="bngan sample", description="Draw images from a checkpoint, without any data set.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="a run's checkpoints/best.ckpt")
    parser.add_argument("--num", type=int, default=64, help="number of images (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the latents (default 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("samples.png"),
        help=".png: a grid; .npz: uint8 N x C x H x W; else a folder of pictures (default samples.png)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default cpu)")
    parser.add_argument("--weights", choices=("raw", "ema"), help="G's weights or their moving average (default: ema, if kept)")
    parser.add_argument(
        "--statistics",
        choices=("running", "batch", "precise"),
        help="what normalizes the samples (default: as in the run)",
    )
    args = parser.parse_args(arguments)
    check_at_least(1, "--", num=args.num)
    images = _draw(args)
    try:
        _write(images, args.output)
    except OSError as error:
        raise UsageError(f"cannot write to {args.output}: {error.strerror}; choose another --output") from error
    print(f"{args.num} images written to {args.output}")


def _draw(args: argparse.Namespace) -> "Tensor":
    """Return samples (num, C, H, W) in [-1, 1], on the CPU."""
    import torch
    from rich.progress import track

    from bngan.checkpoint import load_gan

    gan = load_gan(args.checkpoint)
    try:
        gan = gan.to(torch.device(args.device))
    except (RuntimeError, AssertionError) as error:  # as torch says of a device that it does not know or find
        raise UsageError(f"--device {args.device} is none that torch can use here; leave it out, which means cpu") from error
    starts = range(0, args.num, CHUNK)
    with gan.sampler(args.weights, args.statistics) as sampler:
        chunks = [
            sampler.samples(start, min(start + CHUNK, args.num), args.seed).cpu()
            for start in track(starts, description="sampling", disable=len(starts) < 20)
        ]
    return torch.cat(chunks)


def _write(images: "Tensor", output: Path) -> None:
    """Write images (N, C, H, W) in [-1, 1] as what the path says."""
    import numpy as np

    from bngan.images import grid, save_png, to_uint8

    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".png":
        save_png(grid(images), output)
    elif output.suffix == ".npz":
        np.savez_compressed(output, images=to_uint8(images).numpy())
    else:
        output.mkdir(exist_ok=True)
        for number, image in enumerate(images):
            save_png(image, output / f"{number:06d}.png")


def _doctor(arguments: list[str]) -> None:
    parser = _Parser(
        prog="bngan doctor", description="Say what is wrong with a run, a checkpoint or a recipe.", allow_abbrev=False
    )
    parser.add_argument("path", type=Path, help="a run's folder, a checkpoint (.ckpt), or a recipe (.yaml)")
    parser.add_argument("--root", type=Path, help="folder of the data set (default: the one that the run used)")
    args = parser.parse_args(arguments)
    from bngan.doctor import diagnose

    examined, findings = diagnose(args.path, args.root)
    print(f"Examined {examined}.")
    for number, finding in enumerate(findings, start=1):
        print(f"\n{number}. {finding.name}\n   found:  {finding.evidence}\n   remedy: {finding.remedy}")
    print(f"\n{len(findings)} finding{'' if len(findings) == 1 else 's'}." if findings else "\nNothing found.")
