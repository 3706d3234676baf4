"""docs/performance.md and its chart, from what scripts/benchmark.py recorded, and what was to be reached."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Literal, TypedDict

import torch

Figures = dict[str, list[float]]
GOALS: dict[str, dict[str, tuple[Literal["at least", "at most"], float]]] = {
    "step default cpu": {"fit / bare": ("at least", 0.9), "fit / textbook": ("at least", 3.0)},
    "step dcgan cpu": {"fit / bare": ("at least", 0.97)},
    "step default cuda": {"fit / bare": ("at least", 0.5), "fit / textbook": ("at least", 12.0)},
    "step dcgan cuda": {"fit / bare": ("at least", 0.85)},
    "quality default cpu": {"seconds": ("at most", 150.0), "FID": ("at most", 2.1)},
    "quality default cuda": {"seconds": ("at most", 25.0), "seconds of training": ("at most", 10.0)},
    "startup cpu": {"bngan --help, seconds": ("at most", 0.7), "first iteration / imports": ("at most", 1.25)},
    "scaling cpu": {"image of the most / of the fewest": ("at most", 1.1), "growth of memory / of the data": ("at most", 1.1)},
    "study cpu": {"study / fit": ("at least", 1.1)},
}
SECTIONS = {
    "step": (
        "Images per second",
        "After the warm-up. `fit` is the command as a person runs it, with every callback, but without validation. `bare` "
        "(`scripts/bare_gan.py`) is the same recipe without a framework, written by hand for speed, by the same means. "
        "`textbook` (`scripts/textbook_gan.py`) is a GAN in Lightning as tutorials write it, of the same networks.",
    ),
    "quality": (
        "Time to quality",
        "Whole commands, from the shell to the end, one a seed. Each works out the floor: the FID of as many real images. "
        "Training is the command without start and validation; FID is the best of the run's validations, against training "
        "images. "
        "[recipes.md](recipes.md) measures the same recipes on other samples.",
    ),
    "startup": ("From the command to the first iteration", "With the data in place and files in the system's cache."),
    "scaling": (
        "A thousand to a million images",
        "Noise, 28 x 28, held in memory; as many iterations for each size, with the checkpoints of their epochs.",
    ),
    "study": (
        "Runs side by side",
        "The default recipe. A study trains as many runs as there are cores, one thread each; `fit` trains one on all of them.",
    ),
}
# Okabe and Ito's colours, which everybody can tell apart, and a hatch for print in black and white.
BARS = {"fit": ("#0072B2", ""), "bare": ("#E69F00", "//"), "textbook": ("#CCCCCC", "")}


class Result(TypedDict):
    """What one command of scripts/benchmark.py found: each figure has a value for every round."""

    command: str
    date: str
    commit: str
    machine: str
    software: str
    figures: Figures


def write_page(results: Mapping[str, Result], page: Path) -> None:
    """Write the page, and a chart beside it.

    Raises:
        ValueError: if there are no results, or if they come from several commits or machines.
    """
    _check(results)
    chart = page.with_suffix(".svg")
    lines = [
        "# Performance, measured",
        "",
        f"Written by `python scripts/benchmark.py page` from `{page.stem}.json`: one commit, one machine for each device.",
        "Figures are medians (least to most) of the rounds; the sides take turns, and ratios are taken within a round.",
        "[log.md](log.md) has what was tried and what it gained.",
        "",
    ]
    for section, (title, note) in SECTIONS.items():
        keys = [key for key in results if key.startswith(section)]
        if keys:
            lines += [f"## {title}", "", note, ""]
        if keys and section == "step":
            draw_chart({key: results[key] for key in keys}, chart)
            lines += [f"![images per second of each side]({chart.name})", ""]
        for key in keys:
            lines += [f"### {key.removeprefix(section).strip()}", "", *table(key, results[key]), ""]
    missing = [
        f"{key}: {name} {which} {value:g}"
        for key, goals in GOALS.items()
        if key not in results
        for name, (which, value) in goals.items()
    ]
    if missing:
        lines += ["## Not measured", "", *(f"- {goal}" for goal in missing), ""]
    page.write_text("\n".join(lines))


def table(key: str, result: Result) -> list[str]:
    """Return the lines of a result's table, with its goals, and of how it was measured."""
    lines = ["| | measured | goal | met |", "|---|---|---|---|"]
    for name, values in result["figures"].items():
        goal = met = ""
        if name in GOALS.get(key, {}):
            which, limit = GOALS[key][name]
            goal = f"{which} {limit:g}"
            met = "yes" if (median(values) >= limit if which == "at least" else median(values) <= limit) else "no"
        lines.append(f"| {name} | {spread(values)} | {goal} | {met} |")
    source = f"commit {result['commit']}; {result['date']}"
    return [*lines, "", f"`{result['command']}`: {result['machine']}; {result['software']}; {source}."]


def spread(values: Sequence[float]) -> str:
    """Return median (least to most) as text."""
    shown = (min(values), median(values), max(values))
    low, middle, high = (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in shown)
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def draw_chart(steps: Mapping[str, Result], path: Path) -> None:
    """Draw the images per second of every side as an SVG, a panel for each recipe and device."""
    import matplotlib  # which measuring does not need
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.9 * len(steps)), layout="constrained")
    panels = figure.subplots(nrows=len(steps), squeeze=False).flat
    for axes, (key, result) in zip(panels, steps.items(), strict=True):
        for side, (colour, hatch) in BARS.items():
            values = result["figures"][f"{side}, images/s"]
            middle = median(values)
            reach = [[middle - min(values)], [max(values) - middle]]
            axes.barh(side, middle, xerr=reach, capsize=3, color=colour, hatch=hatch, edgecolor="black")
            axes.annotate(f" {middle:,.0f}", (max(values), side), va="center")
        axes.set_title(f"{key.removeprefix('step ')}: {result['machine']}", fontsize="small", loc="left")
        axes.set_xlabel("images per second (median; whiskers: least to most)")
        axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.invert_yaxis()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bngan"}):  # the same chart of the same results
        figure.savefig(path, metadata={"Date": None})


def _check(results: Mapping[str, Result]) -> None:
    if not results:
        raise ValueError("there are no results yet; run python scripts/benchmark.py step first")
    commits = {result["commit"] for result in results.values()}
    if len(commits) > 1:
        raise ValueError(f"the results come from several commits ({', '.join(sorted(commits))}); measure all on one")
    for device in ("cpu", "cuda"):
        machines = {result["machine"] for key, result in results.items() if key.endswith(device)}
        if len(machines) > 1:
            raise ValueError(
                f"the results on {device} come from several machines ({'; '.join(sorted(machines))}); measure all on one"
            )


# Where it was measured -------------------------------------------------------------------------------------------------


def commit() -> str:
    """Return the commit of this source tree, with +changes if anything but docs/ was modified."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run([*git, "status", "--porcelain", ":!docs"], capture_output=True, text=True, check=False)
    return (head.stdout.strip() or "none") + ("+changes" if changes.stdout else "")


def machine() -> str:
    """Return what computes here: the card if there is one, processor, cores and threads."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{gpu}{os.cpu_count()} cores of {models[0] if models else platform.machine()}, {threads} threads"
