"""What is a figure about? Some contrasts in some contexts; and what all figures have in common."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from statistics import fmean, geometric_mean, median

import numpy as np
from matplotlib.collections import LineCollection

from bngan.study.endpoints import ENDPOINTS
from bngan.study.findings import Findings
from bngan.study.panel import Look, Panel
from bngan.study.spec import Contrast, Result

LOGARITHMIC = ("fid", "class_kl", "time_to", "loss_range")
EVERY_RUN = "Median (thick), 10 to 90% of the runs (shaded), and every run (thin), at each look."
Cells = Mapping[str, Sequence[Result]]  # runs by arm
Lines = Sequence[Sequence[tuple[float, float]]]  # of (x, y)


@dataclass(frozen=True)
class Figure:
    """Panels that belong together.

    Attributes:
        name: of its files: letters, digits and hyphens.
        title: what it shows.
        caption: how it is to be read.
        panels: SVG texts.
        wide: whether its panel is as wide as the text.
    """

    name: str
    title: str
    caption: str
    panels: tuple[str, ...]
    wide: bool = False


@dataclass(frozen=True)
class View:
    """What a figure is about.

    Attributes:
        name: what the names of its files begin with.
        contrasts: those of a claim that it shows.
        blocks, contexts, arms: whose runs it shows.
        weights: raw or ema.
    """

    name: str
    contrasts: tuple[Contrast, ...]
    blocks: tuple[str, ...]
    contexts: tuple[str, ...]
    arms: tuple[str, ...]
    weights: str = "raw"

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Return the contrasts' endpoints, without repetition."""
        return tuple(dict.fromkeys(contrast.endpoint for contrast in self.contrasts))

    def indifferent(self, endpoint: str, arms: Cells) -> tuple[float, float] | None:
        """Return from where to where arms differ from a contrast's only baseline by less than the margin."""
        contrast = next((contrast for contrast in self.contrasts if contrast.endpoint == endpoint), None)
        if contrast is None or contrast.pairs or contrast.baseline is None or contrast.baseline not in arms:
            return None
        values = [ENDPOINTS[endpoint].of(result) for result in arms[contrast.baseline]]
        if ENDPOINTS[endpoint].kind != "ratio":
            return fmean(values) - contrast.margin, fmean(values) + contrast.margin
        middle = fmean(values) if ENDPOINTS[endpoint].of_means else geometric_mean(values)
        return middle / contrast.margin, middle * contrast.margin

    def cells(self, findings: Findings) -> Iterator[tuple[str, str, Cells]]:
        """Yield block, context, and the runs of each arm that has any there."""
        for block, context in product(self.blocks, self.contexts):
            arms = {arm: runs for arm in self.arms if (runs := findings.runs(block, context, arm))}
            if arms:
                yield block, context, arms


Draw = Callable[[Findings, View], Figure]


def slug(text: str) -> str:
    """Return a text as part of a file's name: letters, digits and hyphens."""
    return "-".join("".join(letter if letter.isalnum() and letter.isascii() else " " for letter in text).split())


def sentence(text: str) -> str:
    """Return a text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def logarithmic(name: str) -> bool:
    """Whether a quantity or an endpoint is drawn on a logarithmic scale."""
    return name.startswith(LOGARITHMIC)


def ends_of(values: Sequence[float], *, log: bool, room: float = 0.06) -> tuple[float, float]:
    """Return the ends of a scale that several panels share, with a share of room at both."""
    seen = [math.log(value) if log else value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = min(seen, default=0), max(seen, default=1)
    spare = room * (high - low) or 0.1
    return (math.exp(low - spare), math.exp(high + spare)) if log else (low - spare, high + spare)


def bundle_panel(title: str, bundles: Mapping[Look, Lines], *, x: str, y: str, log: str = "") -> Panel:
    """Return a panel with a bundle of lines for each look, whose number stands in the legend."""
    named = {replace(look, label=f"{look.label}, n\u00a0{len(lines)}"): lines for look, lines in bundles.items()}
    about = f"{y} against {x}; " + "; ".join(look.label for look in named)
    panel = Panel(title, about, x=x, y=y, log=log, looks=list(named))
    for look, lines in named.items():
        draw_bundle(panel, lines, look)
    xs, ys = zip(*chain(*chain(*named.values())), strict=True)
    panel.axes.set(xlim=ends_of(xs, log="x" in log), ylim=ends_of(ys, log="y" in log))
    return panel


def draw_bundle(panel: Panel, lines: Lines, look: Look) -> None:
    """Draw lines thin, or as points where they have but one, their median thick, and a band that holds 80% of five or more."""
    panel.axes.add_collection(LineCollection(lines, colors=look.colour, linewidths=0.6, alpha=0.35))
    lone = [line[0] for line in lines if len(line) == 1]
    panel.points([x for x, _ in lone], [y for _, y in lone], look, size=3.5)
    at: dict[float, list[float]] = {}
    for x, y in sorted(point for line in lines for point in line):
        at.setdefault(x, []).append(y)
    if len(lines) >= 5:
        low, high = ([float(np.quantile(values, q=share)) for values in at.values()] for share in (0.1, 0.9))
        panel.axes.fill_between(list(at), low, high, color=look.colour, alpha=0.15, linewidth=0)
    panel.axes.plot(list(at), [median(values) for values in at.values()], **look.line | look.points)
