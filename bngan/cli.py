"""The one front door: `bngan` and `python scripts/train.py`.

What a command does not need is not imported: help is instant, and only training loads Lightning.
"""

import argparse
import ast
import atexit
import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

TRAINER_COMMANDS = {
    "fit": "train; with no further words, the batch-normalized GAN on MNIST",
    "validate": "measure a checkpoint on the held-out images",
    "test": "the same, at full length",
    "predict": "write a checkpoint's samples as pictures",
}
OWN_COMMANDS = {
    "sample": "draw images from a checkpoint, without any data set",
    "doctor": "say what is wrong with a run, a checkpoint or a recipe, and what to do",
}
SHOW_TRACEBACK = "BNGAN_TRACEBACK"
TRAINER_SETTINGS = (
    ("--trainer.max_epochs", "passes over the data"),
    ("--trainer.max_steps", "alternations after which to stop"),
    ("--trainer.devices", "number of processors or GPUs to train on"),
    ("--trainer.accelerator", "auto, cpu, gpu"),
    ("--trainer.strategy", "auto, ddp, ..."),
    ("--trainer.precision", "32-true, bf16-mixed, 16-mixed, 64-true"),
    ("--trainer.default_root_dir", "where runs go (default: runs)"),
    ("--trainer.log_every_n_steps", "alternations between logged scalars"),
    ("--trainer.check_val_every_n_epoch", "epochs between validations"),
    ("--trainer.fast_dev_run", "one alternation, nothing written"),
)


def entry_point() -> None:
    """Run the command in sys.argv and exit with its status."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run one command; return 0, 2 for a person's mistake (told in a line on stderr), or 1 for a defect of ours."""
    try:
        _dispatch(arguments)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 2 * bool(exit_.code)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (status := _asked_to_stop(error)) is not None:
            return status
        if os.environ.get(SHOW_TRACEBACK):
            traceback.print_exc()
        elif reason := _lost_contact(error):
            print(f"bngan: this process ends, because another one of the run is gone ({reason})", file=sys.stderr)
            return 1
        elif not _is_mistake(error):
            traceback.print_exc()
            return 1
        hint = "" if os.environ.get(SHOW_TRACEBACK) else f"\n({SHOW_TRACEBACK}=1 shows where)"
        print(f"bngan: error: {_brief(error)}{hint}", file=sys.stderr)
        return 2
    return 0


def _dispatch(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(_overview())
    elif command == "--version":
        from importlib.metadata import version

        print(f"bngan {version('bngan')}")
    elif command == "sample":
        _sample(rest)
    elif command == "doctor":
        _doctor(rest)
    elif command in TRAINER_COMMANDS:
        if "-h" in rest or "--help" in rest:
            print(_short_help(command))
            return
        with _imports_kept():
            from bngan import trainer_cli

        if "--help.all" in rest:
            trainer_cli.print_full_help(command)
        else:
            trainer_cli.run(arguments)
    elif command.startswith("-"):
        raise ValueError(f"{command} must come after the command: bngan fit {command} ...; see bngan --help")
    else:
        known = ", ".join([*TRAINER_COMMANDS, *OWN_COMMANDS])
        raise ValueError(f"unknown command {command!r}; choose from {known}")


@contextmanager
def _imports_kept() -> Iterator[None]:
    """Take what is made within the block for no garbage: libraries make a million objects, and looking through them while
    they are imported takes a sixth of the start, and again later."""
    collecting, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
    if len(sys.modules) > before:  # in a process that runs a second command there is other garbage about
        gc.freeze()
        atexit.register(gc.unfreeze)  # or libraries complain that objects of theirs are never let go


class _Parser(argparse.ArgumentParser):
    """Leaves it to main to tell what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


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
        help=".png: a grid; .npz: uint8 N x C x H x W; else a folder",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default cpu)")
    parser.add_argument(
        "--weights", choices=("raw", "average"), help="G's weights or their moving average (default: the average, if kept)"
    )
    parser.add_argument(
        "--sampling",
        choices=("running", "batch", "precise"),
        help="statistics that normalize the samples (default: the run's)",
    )
    args = parser.parse_args(arguments)
    from bngan.sampling import sample

    sample(args.checkpoint, args.num, args.seed, args.output, args.device, args.weights, args.sampling)
    print(f"{args.num} images written to {args.output}")


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


def _is_mistake(error: Exception) -> bool:
    """Tell what a person can put right from a defect in the program."""
    if isinstance(error, ValueError | OSError | argparse.ArgumentError):
        return True
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"ArgumentError", "MisconfigurationException", "NonFiniteLoss", "OutOfMemoryError"})


def _asked_to_stop(error: Exception) -> int | None:
    """Return the status of the ranks where they are all processes of this one and have stopped when asked to."""
    status = getattr(error, "exit_code", None) if type(error).__name__ == "ProcessExitedException" else None
    return status if status in (130, 143) else None


def _lost_contact(error: Exception) -> str | None:
    """Return what a rank sees of another that has died from a defect of its own, or None if the error is another one."""
    signs = "closed by peer|reset by peer|Broken pipe|caused pair closure|Connection refused|Timed out waiting"
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ProcessExitedException" in names:
        return str(error)
    if sign := re.search(signs, str(error)) if isinstance(error, RuntimeError) else None:
        return sign[0]
    return type(error).__name__ if names & {"DistBackendError", "DistNetworkError", "DistStoreError"} else None


def _brief(error: Exception) -> str:
    """Say in a line what is wrong."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    for pattern, plain in PLAIN_WORDS:
        if match := re.search(pattern, text):
            return plain(match)
    limit = 400
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def _wrong_type(match: re.Match[str]) -> str:
    key, expected, got = match.groups()
    classes = re.findall(r"<class '([\w.]+)'>", expected)
    choices = [
        choice.strip().strip("'\"") for group in re.findall(r"Literal\[([^\]]*)\]", expected) for choice in group.split(",")
    ]
    allowed = ", ".join(dict.fromkeys("nothing (null)" if name == "NoneType" else name for name in [*classes, *choices]))
    return f"--{key}: {got.strip()!r} is not allowed; expected {allowed}"


# Messages of libraries, put in the words of this program.
PLAIN_WORDS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r'^Parser key "([\w.]+)": .*?Subtypes: (\[.*?\]) Errors.*Given value: (.*)$', _wrong_type),
    (r'^Parser key "([\w.]+)": Expected a (.*?)\. Got value: (.*)$', _wrong_type),
    (
        r"^Parser key \"([\w.]+)\": (.*)$",
        lambda match: f"--{match[1]}: {match[2][:300]}",
    ),
    (
        r"(?:does not accept option|[Uu]nrecognized arguments:) ['\"]?([^'\"]+)",
        lambda match: f"there is no setting {match[1].strip()}; see bngan fit --help",
    ),
    (
        r"No supported (\w+) backend found|Accelerator can not be created",
        lambda match: "there is no GPU here that torch can use; leave out --trainer.accelerator, or set it to cpu",
    ),
    (
        r"Trainer\(devices=(.*?)\)` value is not a valid input",
        lambda match: f"--trainer.devices {match[1]} is not allowed; give how many devices to train on, 1 or more, or auto",
    ),
    (
        r"(\w+)Accelerator` can not run on your system",
        lambda match: (
            f"there is no {match[1]} device here that torch can use; leave out --trainer.accelerator, or set it to cpu"
        ),
    ),
    (
        r"Timer\(duration=(.*?)\)",
        lambda match: f"--trainer.max_time {match[1]} is not a duration; give days:hours:minutes:seconds, such as 00:01:30:00",
    ),
    (
        r"You requested gpu: (.*?) But your machine only has: (.*?)(?: \(|$)",
        lambda match: f"--trainer.devices asks for GPUs {match[1].strip()}, but this machine has {match[2].strip()}",
    ),
)


def _overview() -> str:
    commands = {**TRAINER_COMMANDS, **OWN_COMMANDS}
    lines = [
        "bngan: batch normalization in GANs",
        "",
        *(f"  bngan {name:<9} {purpose}" for name, purpose in commands.items()),
        "",
        "  bngan fit --help       the settings that matter",
        "  bngan fit --help.all   every setting",
        "  tensorboard --logdir runs",
    ]
    return "\n".join(lines)


def _short_help(command: str) -> str:
    here = Path(__file__).parent
    lines = [
        f"bngan {command}: {TRAINER_COMMANDS[command]}",
        "",
        f"  {'--config FILE':<38} settings from a YAML file, over configs/default.yaml",
        f"  {'--seed_everything SEED':<38} seed of all randomness",
        f"  {'--name NAME':<38} name of the experiment",
        f"  {'--ckpt_path FILE':<38} checkpoint to go on from, or to measure; last: the newest",
        f"  {'--print_config':<38} print the settings and stop",
    ]
    for title, group, file, name in (
        ("Networks and training", "model", here / "gan.py", "GAN"),
        ("Data", "data", here / "data" / "module.py", "ImageDataModule"),
        ("Measuring", "metrics", here / "callbacks" / "quality.py", "Quality"),
    ):
        lines += ["", title]
        lines += [
            f"  {f'--{group}.{setting}':<38} {purpose} (class default: {default})"
            for setting, default, purpose in _documented_settings(file, name)
            if "the command line takes it" not in purpose
        ]
    lines += ["", "Trainer"]
    lines += [f"  {setting:<38} {purpose}" for setting, purpose in TRAINER_SETTINGS]
    lines += ["", f"Every setting: bngan {command} --help.all"]
    return "\n".join(lines)


def _documented_settings(file: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """Read (setting, default, purpose) off a class's signature and docstring without importing it, which takes seconds."""
    tree = ast.parse(file.read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    (init,) = (node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    purposes: dict[str, str] = {}
    setting = ""
    for line in (ast.get_docstring(found) or "").partition("Args:\n")[2].splitlines():
        if line.startswith("        "):
            purposes[setting] += f" {line.strip()}"
        elif ":" in line:
            setting, _, purpose = line.strip().partition(": ")
            purposes[setting] = purpose
    names = [argument.arg for argument in init.args.args[1:]]
    for setting, default in zip(names, init.args.defaults, strict=True):
        yield setting, ast.unparse(default), purposes[setting].rstrip(".")
