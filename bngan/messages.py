"""What libraries say of a person's mistakes and of other things: put in this program's words, or not said."""

import argparse
import logging
import re
import warnings
from collections.abc import Callable

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from bngan.checkpoint import RENAMED
from bngan.trainer import COUNTERPARTS

# Settings that are not here, or no longer, and what to use.
ABSENT = {
    **{f"trainer.{name}": reason for name, reason in COUNTERPARTS.items()},
    **{f"model.{name}": f"it is called --model.{new} now" for name, new in RENAMED.items()},
    "model.accumulate": COUNTERPARTS["accumulate_grad_batches"],
    "model.compile": "--model.cuda_graph, on by default, is for GPUs",
    "data.alternations_per_step": "one batch is one iteration; leave it out",
    "weights_only": "a checkpoint is always read as tensors and plain values; leave it out",
}


def explain(error: Exception) -> str | None:
    """Say in a line what jsonargparse or Lightning found wrong with what a person gave, or None if it is no such error."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError):
        match = re.search(LONG_INTERVAL, text)
        if match:
            return _long_interval(match)
        match = re.search(NO_SUCH_OBJECT, text)
        return f"a setting that names a class: {match[1]}" if match else None
    if not isinstance(error, argparse.ArgumentError | MisconfigurationException):
        return None
    for pattern, put in PLAIN_WORDS:
        if match := re.search(pattern, text):
            return put(match)
    return text if len(text) <= 400 else f"{text[:396]} ..."


def _wrong_type(match: re.Match[str]) -> str:
    name, expected, got = match.groups()
    classes = re.findall(r"<class '([\w.]+)'>", expected)
    words = [word.strip(" '\"") for group in re.findall(r"Literal\[([^\]]*)\]", expected) for word in group.split(",")]
    allowed = ", ".join(dict.fromkeys("nothing (null)" if kind == "NoneType" else kind for kind in [*classes, *words]))
    return f"--{name}: {got.strip()!r} is not allowed; expected {allowed}"


def _no_such_setting(match: re.Match[str]) -> str:
    group, option = match.groups()
    option = option.strip().lstrip("-").partition("=")[0].partition(" ")[0]
    name = option if group is None else f"{group}.{option}"
    return f"there is no setting --{name}; {ABSENT.get(name, 'see bngan fit --help')}"


def _long_interval(match: re.Match[str]) -> str:
    return (
        f"--trainer.val_check_interval {match[1]} is more than the {match[2]} batches of an epoch; add "
        "--trainer.check_val_every_n_epoch null to count on through epochs"
    )


# What Lightning finds wrong with a setting by a ValueError.
LONG_INTERVAL = r"`val_check_interval` \((.*?)\) must be less than or equal to the number of the training batches \((.*?)\)"
# What a class of Lightning's finds wrong with its own arguments, as jsonargparse passes it on.
NO_SUCH_OBJECT = r"^Does not validate against any of the Union subtypes.*? Errors: - (.*?) - Expected"
PLAIN_WORDS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r'^Parser key "([\w.]+)": .*?Subtypes: (\[.*?\]) Errors.*Given value: (.*)$', _wrong_type),
    (r'^Parser key "([\w.]+)": Expected a (.*?)\. Got value: (.*)$', _wrong_type),
    (r"(?:(?:Group '(\w+)' )?does not accept option|[Uu]nrecognized arguments:) ['\"]?([^'\"]+)", _no_such_setting),
    (r'^Parser key "([\w.]+)": (.*)$', lambda match: f"--{match[1]}: {match[2][:300]}"),
    (
        r"No supported (\w+) backend found|Accelerator can not be created|(\w+)Accelerator` can not run on your system",
        lambda match: "there is no GPU here that torch can use; leave out --trainer.accelerator, or set it to cpu",
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


def filter_warnings() -> None:
    """Silence libraries' remarks that a user of this command can do nothing about."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # It tells which process has died and that the others are ended for that.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*were no .* available.*",
        ".*`tensorboardX` has been removed.*",
        ".*treespec, LeafSpec.*",
        ".*Metric `Frechet Inception Distance` will save all extracted features in buffer.*",
        ".*Metric `Kernel Inception Distance` will save all extracted features in buffer.*",
        ".*You are using a custom batch sampler.*",
        ".*sync_dist=True.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)
