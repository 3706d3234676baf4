"""The one front door: `bngan`, `python -m bngan` and `python scripts/train.py`.

What a command does not need is not imported: help is instant, and only training loads Lightning.
"""

import errno
import io
import os
import re
import sys
import traceback

from bngan import __version__
from bngan.commands import COMMANDS, SOURCE, Parser
from bngan.errors import NonFiniteLoss, UsageError
from bngan.files import expand_home

TRAINER_COMMANDS = {
    "fit": "train; with no further words, the batch-normalized GAN on MNIST",
    "validate": "measure a checkpoint as training does, and the statistics that G can be sampled with",
    "test": "measure a checkpoint against the held-out images, which chose nothing",
    "predict": "write a checkpoint's samples as pictures",
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
    SOURCE,
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
    elif command in COMMANDS:
        COMMANDS[command].run(Parser(command, COMMANDS[command].purpose), rest)
    elif command in TRAINER_COMMANDS and ("-h" in rest or "--help" in rest):
        print(_help(command))
    elif command in TRAINER_COMMANDS:
        _run_lightning(command, ["--help" if word == "--help.all" else word for word in rest])
    elif command.startswith("-"):
        raise UsageError(f"{command} must come after the command: bngan fit {command} ...; see bngan --help")
    else:
        known = ", ".join([*TRAINER_COMMANDS, *COMMANDS])
        raise UsageError(f"unknown command {command!r}; choose from {known}")


def _overview() -> str:
    purposes = {**TRAINER_COMMANDS, **{name: command.purpose for name, command in COMMANDS.items()}}
    commands = "\n".join(f"  bngan {name:<11} {purpose}" for name, purpose in purposes.items())
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


def _run_lightning(command: str, arguments: list[str]) -> None:
    """Do what fit, validate, test or predict is asked for; what is about the run, and no setting, is taken out first."""
    from bngan.recipes import GROUPS, find_config, read_config
    from bngan.rendezvous import check_environment

    check_environment()
    # A shell leaves it so, and in YAML ~ by itself is null.
    arguments = [f"{word[:-1]}{expand_home('~')}" if word.endswith("=~") else word for word in arguments]
    parser = Parser(command, TRAINER_COMMANDS[command], add_help=False)
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
