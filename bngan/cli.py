"""The one front door: `bngan`, `python -m bngan` and `python scripts/train.py`.

What a command does not need is not imported: help is instant, and only training loads Lightning.
"""

import argparse
import errno
import io
import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from bngan import __version__
from bngan.errors import NonFiniteLoss, UsageError, check_at_least
from bngan.files import expand_home

TRAINER_COMMANDS = {
    "fit": "train; with no further words, the batch-normalized GAN on MNIST",
    "validate": "measure a checkpoint as training does, and the statistics that G can be sampled with",
    "test": "measure a checkpoint against the held-out images, which chose nothing",
    "predict": "write a checkpoint's samples as pictures",
}
OWN_COMMANDS = {
    "sample": "draw images from a checkpoint, without any data set",
    "doctor": "say what is wrong with a run, a checkpoint or a recipe, and what to do",
    "study": "train many runs, and report what they say of a list of claims",
}
SHOW_TRACEBACK = "BNGAN_TRACEBACK"
# What goes wrong on a machine, as torch tells it: the status, words of "Type: message", and what is answered.
MACHINE_ERRORS: tuple[tuple[int, str, str], ...] = (
    (2, r"bngan\.errors\.\w+: (.*)", r"\1"),  # told by a process that this one has forked
    (
        2,
        r"DataLoader worker \(pid",
        "a process that reads pictures was killed, mostly by full memory; lower --data.num_workers",
    ),
    (2, r"shared memory|unable to mmap", "shared memory (/dev/shm) is full; lower --data.num_workers, down to 0"),
    (
        2,
        "MemoryError|OverflowError|t allocate memory|out of memory|bad_alloc|ALLOC_FAILED|Storage size calculation overflowed",
        "memory is full; lower --data.batch_size or --model.hidden_dim, --metrics.chunk if it was measuring, or sample --num",
    ),
    (2, r"port: (\d+).*EADDRINUSE", r"port \1 is taken on this machine; set MASTER_PORT to a free port, or unset it"),
    (
        1,
        r"waiting for clients|socket has timed out|failed to connect",
        "not all processes of the run came; does the command run on every machine, with the same MASTER_ADDR and MASTER_PORT?",
    ),
    (
        1,
        r"closed by peer|reset by peer|Broken pipe|caused pair closure|Connection refused|Timed out waiting|Dist\w+Error|"
        "ProcessExitedException",
        r"this process ends, because another one of the run is gone (\g<0>)",
    ),
)
NO_ACCESS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENAMETOOLONG")
NO_ROOM_FOR_PROCESSES = ("EMFILE", "ENFILE", "EAGAIN", "ENOMEM")
CHECKPOINT = (
    "a checkpoint, a run's folder (its best), or last, the newest run",
    "go on from a checkpoint, from a run's folder (its newest), or from last, the newest run, of --name if that is given",
)


def entry_point() -> None:
    """Run the command in sys.argv and exit with its status."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before this began
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone shows what it can
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
        return 128 + 13  # that of SIGPIPE, which Windows does not have
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
    if isinstance(error, UsageError | NonFiniteLoss):
        return 2, " ".join(str(error).split())
    if (status := getattr(error, "exit_code", 0)) in (129, 130, 143):  # of ranks that this process has forked: asked to stop
        return status, ""
    if isinstance(error, OSError):
        kind, reason = errno.errorcode.get(error.errno or 0), error.strerror or str(error)
        if kind in NO_ROOM_FOR_PROCESSES:
            return 2, f"{reason}; lower --data.num_workers, down to 0"
        return (2, f"{error.filename}: {reason}" if error.filename else reason) if kind in NO_ACCESS else (1, None)
    forked = any(kind.__name__ == "ProcessException" for kind in type(error).__mro__)  # torch's, which is not imported here
    if forked or isinstance(error, RuntimeError | MemoryError | OverflowError):
        kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
        text = f"{kinds}: {' '.join(str(error).rpartition('  File ')[2].split())}"
        for status, pattern, line in MACHINE_ERRORS:
            if match := re.search(pattern, text):
                return status, match.expand(line)
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
    elif command == "study":
        _study(rest)
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
    commands = "\n".join(f"  bngan {name:<9} {purpose}" for name, purpose in {**TRAINER_COMMANDS, **OWN_COMMANDS}.items())
    return f"""bngan: batch normalization in GANs

{commands}

  bngan fit --help       all settings, with their defaults
  bngan fit --help.all   the same with their types
  tensorboard --logdir runs --samples_per_plugin images=1000"""


def _help(command: str) -> str:
    from bngan.recipes import DEFAULT_CONFIG, SHIPPED

    recipes = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
    options = {
        "--config FILE": f"settings from a YAML file, or a recipe: {recipes}; several are laid one over the other",
        "--GROUP.NAME VALUE": "one setting of those below, such as --model.g_lr 0.001",
        "--ckpt_path PATH": CHECKPOINT[command == "fit"],
        "--override": "let settings differ from the run's that decide its result",
        "--print_config": "print the settings and stop",
    }
    if command == "fit":
        options["--run ID"] = "name the run's folder, runs/NAME/ID; with --ckpt_path auto, go on with it if it is there"
    lines = [f"bngan {command}: {TRAINER_COMMANDS[command]}", "", *(f"  {name:<20} {text}" for name, text in options.items())]
    lines += ["", f"Their types: bngan {command} --help.all. The settings with their defaults, as in a file of settings:", ""]
    return "\n".join([*lines, DEFAULT_CONFIG.read_text()])


class _Parser(argparse.ArgumentParser):
    """The parser of a command's options, which leaves it to main to tell what is wrong."""

    def __init__(self, command: str, *, add_help: bool = True) -> None:
        purpose = {**TRAINER_COMMANDS, **OWN_COMMANDS}[command]
        super().__init__(prog=f"bngan {command}", description=purpose, add_help=add_help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _run_lightning(command: str, arguments: list[str]) -> None:
    """Do what fit, validate, test or predict is asked for; what is about the run, and no setting, is taken out first."""
    from bngan.recipes import GROUPS, find_config, read_config
    from bngan.rendezvous import check_environment

    check_environment()
    # A shell leaves it so, and in YAML ~ by itself is null.
    arguments = [f"{word[:-1]}{expand_home('~')}" if word.endswith("=~") else word for word in arguments]
    parser = _Parser(command, add_help=False)
    parser.add_argument("-c", "--config", action="append", nargs="?", default=[], dest="configs")
    parser.add_argument("--ckpt_path", nargs="+")
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
    if settings and not settings[0].startswith("-"):
        raise UsageError(
            f"{settings[0]} stands by itself; give a checkpoint by --ckpt_path, each file by its own --config, a setting by "
            "--GROUP.NAME VALUE"
        )
    options.configs = [find_config(name) for name in options.configs]
    for path in options.configs:
        read_config(path)
    from bngan.lightning_cli import run_command
    from bngan.run import only_one

    if options.ckpt_path is not None:
        options.ckpt_path = only_one(options.ckpt_path)
    run_command(command, options, settings)


def _sampling(arguments: list[str]) -> argparse.Namespace:
    """Return what is asked of `bngan sample`."""
    parser = _Parser("sample")
    parser.add_argument("checkpoint", nargs="+", help=CHECKPOINT[0])
    parser.add_argument("--num", type=int, default=64, help="number of images (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the latents (default 0)")
    parser.add_argument(
        "--output",
        default="samples.png",
        help=".png, .jpg or what else Pillow writes: a grid; .npy or .npz: uint8 N x C x H x W; without a suffix, or with / at "
        "its end: a folder of pictures (default samples.png)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, gpu, cuda:1, ... (default cpu)")
    parser.add_argument("--weights", choices=("raw", "ema"), help="G's weights or their moving average (default: ema, if kept)")
    parser.add_argument(
        "--statistics",
        choices=("running", "batch", "precise"),
        help="what normalizes the samples (default: as in the run)",
    )
    return parser.parse_args(arguments)


def _sample(arguments: list[str]) -> None:
    args = _sampling(arguments)
    check_at_least(1, "--", num=args.num)
    from bngan.hub import load
    from bngan.images import check_grid, output_kind, write_images
    from bngan.run import checkpoint_of, only_one

    output = expand_home(args.output)
    kind, checkpoint = output_kind(output), checkpoint_of(only_one(args.checkpoint))
    generator = load(checkpoint, args.weights, args.statistics, args.device)
    if kind == "grid":
        check_grid(args.num, generator.gan.settings.image_shape)
    images = generator.sample(args.num, args.seed, progress=True)
    try:
        write_images(images, Path(output), kind)
    except OSError as error:
        raise UsageError(f"cannot write to {output}: {error.strerror or error}; choose another --output") from error
    print(f"{args.num} {'image' if args.num == 1 else 'images'} of {checkpoint} written to {output}")


def _doctor(arguments: list[str]) -> None:
    parser = _Parser("doctor")
    parser.add_argument("path", nargs="+", help=f"{CHECKPOINT[0]}; or a recipe (.yaml)")
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


def _study(arguments: list[str]) -> None:
    parser = _Parser("study")
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
