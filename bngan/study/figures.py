"""Which figure shows what a claim's runs did? It follows from the claim's endpoints; every run is a point or a line in it."""

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, product
from statistics import fmean, geometric_mean, median
from string import ascii_lowercase
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection

from bngan.study.endpoints import ENDPOINTS, has_failed
from bngan.study.findings import (
    WORDS,
    Findings,
    effect_text,
    failed_of,
    in_margins,
    interval_of_median,
    last,
    number,
    quality,
    ratios_to_precise,
    series,
)
from bngan.study.panel import FAINT, HEIGHT, SHADE, STRIP, Look, Panel
from bngan.study.spec import DEFAULTS, Claim, Contrast, Result
from bngan.study.statistics import clopper_pearson
from bngan.study.verdicts import Estimate, Verdict

ZONES = {
    "supported": Look(label="supported", colour="#009E73", marker="o"),
    "contradicted": Look(label="contradicted", colour="#D55E00", marker="s"),
    "no practical effect": Look(label="no practical effect", colour="#0072B2", marker="D"),
    "inconclusive": Look(label="inconclusive", colour="#767676", marker="o", hollow=True),
}
VERDICTS = {zone: look.colour for zone, look in ZONES.items()} | {"conditional": "#8A5A00", "not informative": "#555555"}
LOGARITHMIC = ("fid", "class_kl", "time_to")
EVERY_RUN = "Median (thick), 10 to 90% of the runs (shaded), and every run (thin), at each look."
Cells = Mapping[str, Sequence[Result]]  # runs by arm


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
        """Return from where to where an arm differs from the first contrast's baseline by less than the margin."""
        contrast = next((contrast for contrast in self.contrasts if contrast.endpoint == endpoint), None)
        if contrast is None or contrast.baseline is None or contrast.baseline not in arms:
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


# Overview -------------------------------------------------------------------------------------------------------------


def forest(verdicts: Sequence[Verdict], reach: float = 4.0) -> Figure:
    """Draw every claim in every context: its effect and intervals in multiples of the margin, coloured by zone."""
    panel = Panel(
        "Effects in multiples of their margins",
        " ".join(verdict.sentence for verdict in verdicts),
        x="effect / margin",
    )
    rows: list[str] = []
    for verdict in verdicts:
        for place, line in enumerate(textwrap.wrap(f"{verdict.claim.name}. {verdict.claim.statement}", width=38)):
            draw_heading(panel, len(rows), line, verdict.word if place == 0 else "")
            rows.append("")
        for estimate in verdict.estimates:
            draw_estimate(panel, len(rows), estimate, reach)
            rows.append(estimate.context or "together")
        rows.append("")
    panel.rows(rows[:-1])
    panel.axes.set_xlim(-reach, reach)
    panel.axes.spines["left"].set_visible(False)
    panel.axes.tick_params(axis="y", length=0)
    caption = (
        "To the right: as claimed. Thin line: 95% interval; thick: 90%; shaded: too small to matter. Supported: the thin "
        "line lies wholly to the right of the shade; contradicted: to the left; no practical effect: the thick line lies "
        "within it; else this study cannot tell. Of a claim that there is no difference, within it is supported. What lies "
        f"beyond {reach:g} margins is drawn at the edge. Numbers: x is a ratio, + or - a difference."
    )
    picture = panel.svg(height=15 * len(rows))
    return Figure(name="overview", title="Every claim in every context", caption=caption, panels=(picture,), wide=True)


def draw_heading(panel: Panel, row: int, text: str, word: str) -> None:
    """Write a line of a claim over a whole row, and its verdict at the end."""
    style = {"fontsize": 9, "weight": "bold", "in_layout": False}
    panel.write(text, (0, row), ("figure fraction", "data"), shift=(4, 0), **style)
    panel.write(word, (1, row), ("figure fraction", "data"), shift=(-4, 0), ha="right", color=VERDICTS.get(word), **style)


def draw_estimate(panel: Panel, row: int, estimate: Estimate, reach: float) -> None:
    """Draw one line of the forest over its part of the shade, and its numbers beside it."""
    look = ZONES[estimate.zone]
    panel.axes.barh(row, width=2, left=-1, height=1.02, color=SHADE, zorder=0.5)
    panel.axes.vlines(0, row - 0.5, row + 0.5, color=FAINT, linewidth=0.8, zorder=1)
    for interval, width in ((estimate.interval95, 1.5), (estimate.interval90, 4)):
        ends = np.clip([in_margins(estimate, end) for end in interval], -reach, reach)
        panel.axes.hlines(row, min(ends), max(ends), color=look.colour, linewidth=width)
    value = np.clip(in_margins(estimate, estimate.value), -reach, reach)
    panel.points([value], [row], look, size=7, alpha=1)
    panel.write(effect_text(estimate), (1, row), ("axes fraction", "data"), shift=(10, 0))


# Which figures --------------------------------------------------------------------------------------------------------


def figures_of_claim(findings: Findings, verdict: Verdict) -> list[Figure]:
    """Return the figures that the claim's endpoints ask for, its own first, which bears the verdict."""
    claim = verdict.claim
    asked: dict[tuple[Draw, str], list[Contrast]] = {}
    if claim.rule == "not_worse":
        asked[matrix, "raw"] = [*claim.contrasts]
    for contrast in claim.contrasts:
        weights = "ema" if contrast.endpoint.endswith("_ema") else "raw"
        draw = next((draw for part, draw in DRAW.items() if part in contrast.endpoint), dots)
        asked.setdefault((draw, weights), []).append(contrast)
    figures = [draw(findings, view_of(findings, claim, some, weights)) for (draw, weights), some in asked.items()]
    first, *others = [figure for figure in figures if figure.panels]
    return [replace(first, title=f"{first.title}: {verdict.word}"), *others]


def view_of(findings: Findings, claim: Claim, contrasts: Sequence[Contrast], weights: str) -> View:
    """Return what these contrasts of a claim are about, arms in the study's order."""
    return View(
        name=f"claim-{slug(claim.name)}{'' if weights == 'raw' else f'-{weights}'}",
        contrasts=tuple(contrasts),
        blocks=tuple(dict.fromkeys(block for contrast in contrasts for block in contrast.blocks)),
        contexts=claim.contexts,
        arms=findings.arms_of(contrasts),
        weights=weights,
    )


def slug(text: str) -> str:
    """Return a text as part of a file's name: letters, digits and hyphens."""
    return "-".join("".join(letter if letter.isalnum() and letter.isascii() else " " for letter in text).split())


def sentence(text: str) -> str:
    """Return a text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def logarithmic(name: str) -> bool:
    """Whether a quantity or an endpoint is drawn on a logarithmic scale."""
    return name.startswith(LOGARITHMIC)


# Claim 1: quality against learning rate, and failures -----------------------------------------------------------------


def rates(findings: Findings, view: View) -> Figure:
    """Draw quality against learning rate for each arm, nothing selected, and how many failed."""
    panels = []
    for block, context, arms in view.cells(findings):
        runs = [result for results in arms.values() for result in results if not has_failed(result)]
        key = quality(runs)
        ends = ends_of([last(result, key) for result in runs], log=logarithmic(key))
        lines = findings.known(block, key)
        panels += [rate_panel(findings.looks[arm], context, results, key, ends, lines) for arm, results in arms.items()]
        panels.append(failure_panel(findings, view, f"{context}, block {block}: runs that failed", arms))
    caption = (
        "Each point is a run's last iterate; nothing is selected. Failed runs stand in the strip, with their number of "
        "all. Line: medians of the others. Shaded: too little from the baseline to matter. Shares of failed runs are over "
        "all rates, with Clopper and Pearson's 95% intervals."
    )
    return Figure(f"{view.name}-rates", "Quality against learning rate, and failures", caption, tuple(panels))


def ends_of(values: Sequence[float], *, log: bool, room: float = 0.06) -> tuple[float, float]:
    """Return the ends of a scale that several panels share, with a share of room at both."""
    seen = [math.log(value) if log else value for value in values if math.isfinite(value) and (value > 0 or not log)]
    low, high = min(seen, default=0), max(seen, default=1)
    spare = room * (high - low) or 0.1
    return (math.exp(low - spare), math.exp(high + spare)) if log else (low - spare, high + spare)


def rate_panel(
    look: Look, context: str, results: Sequence[Result], key: str, ends: tuple[float, float], lines: Mapping[str, float]
) -> str:
    """Draw the runs of an arm against the axis of their block that has numbers."""
    axis, at = numeric_axis(results)
    values = sorted({at(result) for result in results})
    panel = Panel(
        f"{look.label}, {context}",
        f"{WORDS[key]} of {len(results)} runs by {axis}; {failed_of(results)} failed.",
        x=axis,
        y=WORDS[key],
        log=("x" if values[0] > 0 else "") + ("y" if logarithmic(key) else ""),
    )
    panel.axes.set(xlim=ends_of(values, log=values[0] > 0, room=0.15), ylim=ends)
    panel.axes.set_xticks(values)
    middles, counts = [], {}
    for x, group in groupby(sorted(results, key=at), key=at):
        runs = list(group)
        kept = [last(run, key) for run in runs if not has_failed(run)]
        counts[x] = len(runs) - len(kept), len(runs)
        panel.points([x] * len(kept), kept, look)
        middles += [(x, median(kept))] if kept else []
    panel.axes.plot([x for x, _ in middles], [y for _, y in middles], **look.line)
    panel.rules("y", lines)
    panel.strip("failed", counts, look)
    return panel.svg(height=HEIGHT + STRIP)


def numeric_axis(results: Sequence[Result]) -> tuple[str, Callable[[Result], float]]:
    """Return the name of the first axis that has numbers and how to read it; G's learning rate where there is none."""
    for name, value in results[0].run.axes.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            label = "learning rate of G and D" if set(name.split()) == {"g_lr", "d_lr"} else name
            return label, partial(value_on, name)
    return "learning rate of G", lambda result: float(result.run.settings.get("g_lr") or DEFAULTS["g_lr"])


def value_on(axis: str, result: Result) -> float:
    """Return a run's value on an axis of its block."""
    return float(result.run.axes[axis] or 0)


def failure_panel(findings: Findings, view: View, title: str, arms: Cells) -> str:
    """Draw the share of failed runs of each arm, with Clopper and Pearson's 95% interval."""
    about = "; ".join(f"{findings.looks[arm].label}: {failed_of(runs)} of {len(runs)}" for arm, runs in arms.items())
    panel = Panel(title, about, x="share of failed runs")
    panel.rows([findings.looks[arm].label for arm in arms])
    panel.axes.set_xlim(-0.02, 1.02)
    if band := view.indifferent("failure", arms):
        panel.axes.axvspan(*band, facecolor=SHADE, zorder=0.5)
    for place, (arm, results) in enumerate(arms.items()):
        look, lost = findings.looks[arm], failed_of(results)
        panel.axes.hlines(place, *clopper_pearson(lost, len(results)), color=look.colour, linewidth=1.5)
        panel.points([lost / len(results)], [place], look, size=8, alpha=1)
        panel.write(f"{lost} of {len(results)}", (1, place), ("axes fraction", "data"), shift=(6, 0))
    return panel.svg(height=30 * len(arms) + 10)


# Claims 2 and 3a: over training ---------------------------------------------------------------------------------------


def arrivals(findings: Findings, view: View) -> Figure:
    """Draw how many runs have reached a quality by when, and the way there."""
    panels = []
    for block, context, arms in view.cells(findings):
        panels += [arrival_panel(findings, view, name, f"{context}, block {block}", arms) for name in view.endpoints]
        panels += curve_panels(findings, view, "fid", block, context, arms)
    caption = (
        "Steps: share of runs that have arrived; one that fails or never arrives counts as the whole length, and the "
        f"marker on the axis is the restricted mean. Curves: {EVERY_RUN[0].lower()}{EVERY_RUN[1:]}"
    )
    return Figure(f"{view.name}-time", "Time to quality", caption, tuple(panels))


def arrival_panel(findings: Findings, view: View, endpoint: str, where: str, arms: Cells) -> str:
    """Draw the empirical distribution of a time, an arm a line."""
    times = {arm: sorted(ENDPOINTS[endpoint].of(result) for result in runs) for arm, runs in arms.items()}
    horizon = max(result.run.iterations for runs in arms.values() for result in runs)
    start = min(0.8 * min(min(values) for values in times.values()), 0.5 * horizon)
    panel = Panel(
        f"{where}: {ENDPOINTS[endpoint].words}",
        "; ".join(
            f"{findings.looks[arm].label}: restricted mean {number(fmean(values))} iterations, n {len(values)}"
            for arm, values in times.items()
        ),
        x="iterations",
        y="share of runs that arrived",
        log="x",
        looks=[findings.looks[arm] for arm in arms],
    )
    panel.axes.set(xlim=(start, horizon), ylim=(0, 1.02))
    if band := view.indifferent(endpoint, arms):
        panel.axes.axvspan(*band, facecolor=SHADE, zorder=0.5)
    for arm, values in times.items():
        arrived = [time for time in values if time < horizon]
        shares = [place / len(values) for place in range(len(arrived) + 1)]
        panel.axes.step([start, *arrived, horizon], [*shares, shares[-1]], where="post", **findings.looks[arm].line)
        panel.points([fmean(values)], [0], findings.looks[arm], size=9, alpha=1)
    return panel.svg()


def curves(findings: Findings, view: View) -> Figure:
    """Draw over training what the endpoints are read from, an arm a line."""
    keys = dict.fromkeys("pixel_variance" if name == "point_collapse" else "modes" for name in view.endpoints)
    panels = []
    for key, (block, context, arms) in product(keys, list(view.cells(findings))):
        panels += curve_panels(findings, view, key, block, context, arms)
    title = f"{sentence(', '.join(WORDS[key] for key in keys))} over training"
    return Figure(f"{view.name}-curves", title, EVERY_RUN, tuple(panels))


def curve_panels(findings: Findings, view: View, key: str, block: str, context: str, arms: Cells) -> list[str]:
    """Draw a quantity over training, an arm a bundle of lines; nothing where it was not measured."""
    bundles = {
        replace(findings.looks[arm], label=f"{findings.looks[arm].label}, n\u00a0{len(lines)}"): lines
        for arm, runs in arms.items()
        if (lines := [line for run in runs if (line := series(run, key, view.weights))])
    }
    if not bundles:
        return []
    panel = Panel(
        f"{context}, block {block}: {WORDS[key]}",
        f"{WORDS[key]} over training; " + "; ".join(look.label for look in bundles),
        x="iterations",
        y=WORDS[key],
        log="xy" if logarithmic(key) else "x",
        looks=list(bundles),
    )
    for look, lines in bundles.items():
        draw_bundle(panel, lines, look)
    x, y = zip(*chain(*chain(*bundles.values())), strict=True)
    panel.axes.set(xlim=ends_of(x, log=True), ylim=ends_of(y, log=logarithmic(key)))
    panel.rules("y", findings.known(block, key))
    return [panel.svg()]


def draw_bundle(panel: Panel, lines: Sequence[Sequence[tuple[float, float]]], look: Look) -> None:
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


# Claim 2b: early and late ---------------------------------------------------------------------------------------------


def slopes(findings: Findings, view: View) -> Figure:
    """Draw FID at the first and the last whole look, a run a line."""
    panels = []
    for block, context, arms in view.cells(findings):
        for arm, results in arms.items():
            ends = [look.iteration for look in results[0].run.looks if look.whole]
            found = [dict(series(result, "fid", view.weights)) for result in results]
            pairs = [(fids[ends[0]], fids[ends[-1]]) for fids in found if ends and {ends[0], ends[-1]} <= fids.keys()]
            if pairs:
                title = f"{findings.looks[arm].label}, {context}, block {block}: n {len(pairs)}"
                panels.append(slope_panel(title, (ends[0], ends[-1]), pairs, findings.looks[arm]))
    caption = "Each thin line is a run, the thick one joins the medians. Upwards: worse later than early."
    return Figure(f"{view.name}-slopes", "Early and late", caption, tuple(panels))


def slope_panel(title: str, ends: tuple[int, int], pairs: Sequence[tuple[float, float]], look: Look) -> str:
    """Draw the FID of runs at two iterations."""
    panel = Panel(title, f"FID early and late of {len(pairs)} runs.", y="FID", log="y")
    panel.columns([f"iteration {end:,}" for end in ends])
    panel.axes.add_collection(LineCollection([list(enumerate(pair)) for pair in pairs], colors=look.colour, linewidths=0.8))
    panel.points([0, 1] * len(pairs), list(chain(*pairs)), look)
    panel.axes.plot([0, 1], [median(fids) for fids in zip(*pairs, strict=True)], color=look.colour, linewidth=3)
    return panel.svg()


# Any endpoint; claims 3b, 4 and 5 -------------------------------------------------------------------------------------


def dots(findings: Findings, view: View) -> Figure:
    """Draw the endpoints of every run, an arm a row, with the median and its 95% interval."""
    panels = [
        dots_panel(findings, view, name, block, context, arms)
        for name, (block, context, arms) in product(view.endpoints, list(view.cells(findings)))
    ]
    caption = (
        "Each point is a run; a failed one has the worst value. The large marker is the median, the line its exact 95% "
        "interval."
    )
    title = sentence("; ".join(ENDPOINTS[name].words for name in view.endpoints))
    return Figure(f"{view.name}-{slug(' '.join(view.endpoints).replace('_', ' '))}", title, caption, tuple(panels))


def dots_panel(findings: Findings, view: View, endpoint: str, block: str, context: str, arms: Cells) -> str:
    """Draw one endpoint in one context."""
    of, words = ENDPOINTS[endpoint].of, ENDPOINTS[endpoint].words
    rows = {findings.looks[arm]: [of(result) for result in runs] for arm, runs in arms.items()}
    lines = findings.known(block, endpoint.removesuffix("_ema"))
    band = view.indifferent(endpoint, arms)
    return rows_panel(f"{context}, block {block}: {words}", words, rows, lines, log=logarithmic(endpoint), band=band)


def rows_panel(
    title: str,
    label: str,
    rows: Mapping[Look, Sequence[float]],
    lines: Mapping[str, float],
    *,
    log: bool,
    band: tuple[float, float] | None,
) -> str:
    """Draw the values of each row as points, with their median and its interval, over lines and a band."""
    about = "; ".join(f"{look.label}: median {number(median(row))}" for look, row in rows.items())
    panel = Panel(title, about, x=label, log="x" if log else "")
    panel.rows([f"{look.label}, n\u00a0{len(row)}" for look, row in rows.items()])
    if band:
        panel.axes.axvspan(*band, facecolor=SHADE, zorder=0.5)
    for place, (look, row) in enumerate(rows.items()):
        draw_row(panel, place, look, row)
    names = panel.rules("x", lines)  # above the first row
    panel.axes.set_ylim(top=-0.5 - 0.3 * names)
    return panel.svg(height=34 * len(rows) + 10 * names)


def draw_row(panel: Panel, place: int, look: Look, values: Sequence[float]) -> None:
    """Draw points on three levels, and beneath them their median and its interval."""
    panel.points(values, [place - 0.2 + 0.1 * (turn % 3) for turn in range(len(values))], look, size=5)
    if ends := interval_of_median(values):
        panel.axes.hlines(place + 0.25, *ends, color=look.colour, linewidth=2)
    panel.points([median(values)], [place + 0.25], look, size=8, alpha=1)


def coverage(findings: Findings, view: View) -> Figure:
    """Draw coverage of every run, and against FID, with controls: FID alone does not see what is dropped within a class."""
    panels = []
    for block, context, arms in view.cells(findings):
        panels += [dots_panel(findings, view, name, block, context, arms) for name in view.endpoints]
        panels.append(coverage_panel(findings, view, block, context, arms))
    caption = (
        "Coverage: share of held-out images that have a sample nearer than their fifth neighbour (Naeem et al. 2020). "
        "Letters: images of known worth; a hundred images again and again have a good FID and no coverage."
    )
    return Figure(f"{view.name}-coverage", "Coverage, and what FID does not see", caption, tuple(panels))


def coverage_panel(findings: Findings, view: View, block: str, context: str, arms: Cells) -> str:
    """Draw coverage against FID of every run that has both, with the controls as letters."""
    fids, shares = findings.known(block, "fid"), findings.known(block, "coverage")
    controls: dict[tuple[float, float], str] = {}
    for name in (name for name in fids if name in shares):
        place = fids[name], shares[name]
        controls[place] = f"{controls[place]}; {name}" if place in controls else name
    letters = [
        (place, Look(f"{letter}: {name}", FAINT, hollow=True, dash="none"))
        for letter, (place, name) in zip(ascii_lowercase, controls.items(), strict=False)
    ]
    panel = Panel(
        f"{context}, block {block}: coverage against FID",
        "Coverage against FID of every run, with controls of known worth.",
        x="FID",
        y="coverage",
        log="x",
        looks=[*(findings.looks[arm] for arm in arms), *(look for _, look in letters)],
    )
    for (fid, share), look in letters:
        panel.points([fid], [share], look, alpha=1)
        panel.write(look.label[0], (fid, share), ("data", "data"), shift=(0, 9), ha="center", color=FAINT)
    for arm, results in arms.items():
        runs = [result for result in results if series(result, "coverage", view.weights)]
        x, y = ([last(run, key, view.weights) for run in runs] for key in ("fid", "coverage"))
        panel.points(x, y, findings.looks[arm])
    panel.axes.set_ylim(-0.03, 1.05)
    return panel.svg(height=220)


def modes(findings: Findings, view: View) -> Figure:
    """Draw the modes that each run found, and the way there."""
    end, way = dots(findings, view), curves(findings, view)
    caption = f"{end.caption} Over training: {way.caption[0].lower()}{way.caption[1:]}"
    return Figure(f"{view.name}-modes", "Modes found", caption, (*end.panels, *way.panels))


def ratios(findings: Findings, view: View) -> Figure:
    """Draw FID by running statistics over that by precise ones, of each run, an arm a panel."""
    panels = []
    for block, context, arms in view.cells(findings):
        for arm, results in arms.items():
            look = findings.looks[arm]
            rows: dict[Look, list[float]] = {}
            for result in results:
                for name, ratio in ratios_to_precise(result).items():
                    rows.setdefault(replace(look, label=name), []).append(ratio)
            if rows:
                margin = view.contrasts[0].margin
                title, band = f"{look.label}, {context}, block {block}", (1 / margin, margin)
                panels.append(rows_panel(title, "FID(running) / FID(precise)", rows, {"equal": 1.0}, log=True, band=band))
    caption = (
        "Each point is a run, measured with running and with precise statistics. Shaded: too small a difference to matter."
    )
    return Figure(f"{view.name}-precise", "Running against precise statistics", caption, tuple(panels))


# Claim 6: gradients ---------------------------------------------------------------------------------------------------


def cosines(findings: Findings, view: View) -> Figure:
    """Draw how far a layer's gradient turns when the layers below it move, over training, a network a panel."""
    panels = []
    for block, context, arms in view.cells(findings):
        entries = [(arm, entry) for arm, runs in arms.items() for run in runs for entry in run.probed]
        entries = [(arm, entry) for arm, entry in entries if entry["probe"] == "gradient_cosine" and "layer" in entry]
        for network in sorted({entry["network"] for _, entry in entries}):
            own = [(arm, entry) for arm, entry in entries if entry["network"] == network]
            panels.append(cosine_panel(findings, f"{context}, block {block}: layers of {network}", own))
    caption = (
        "Points: every layer of every run. Lines: medians. 1: the gradient did not turn. Santurkar et al. 2018, section 2.2."
    )
    return Figure(f"{view.name}-cosine", "Whether a layer's gradient keeps its direction", caption, tuple(panels))


def cosine_panel(findings: Findings, title: str, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Draw the cosines of all layers of a network, an arm a colour."""
    arms: dict[Look, dict[int, list[float]]] = {}
    for arm, entry in entries:
        arms.setdefault(findings.looks[arm], {}).setdefault(entry["iteration"], []).append(entry["value"])
    about = "Cosine between a layer's gradient before and after the layers below it took a step."
    panel = Panel(title, about, x="iterations", y="cosine", log="x", looks=list(arms))
    for look, at in arms.items():
        panel.points([x for x, values in at.items() for _ in values], list(chain(*at.values())), look, size=3.5)
        panel.axes.plot(sorted(at), [median(at[x]) for x in sorted(at)], **look.line)
    return panel.svg()


# Claim 7: a matrix ----------------------------------------------------------------------------------------------------


def matrix(findings: Findings, view: View) -> Figure:
    """Draw contexts against arms: failed runs as number and colour, the median quality beneath."""
    panels = []
    for block in view.blocks:
        arms = [arm for arm in view.arms if any(findings.runs(block, context, arm) for context in view.contexts)]
        about = "Failed runs and median quality for each arm and context."
        panel = Panel(f"Block {block}: runs that failed, and median quality", about)
        panel.rows([findings.looks[arm].label for arm in arms])
        panel.columns(view.contexts)
        for (column, context), (row, arm) in product(enumerate(view.contexts), enumerate(arms)):
            if results := findings.runs(block, context, arm):
                draw_cell(panel, column, row, results)
        panels.append(panel.svg(height=36 * len(arms)))
    caption = "Each place: failed runs of all, and the median of what was reached; the darker, the more runs failed."
    return Figure(f"{view.name}-matrix", "In every context", caption, tuple(panels))


def draw_cell(panel: Panel, column: int, row: int, results: Sequence[Result]) -> None:
    """Fill a place of the matrix: the more runs failed, the darker."""
    lost, key = failed_of(results), quality(results)
    panel.axes.bar(column, height=0.94, bottom=row - 0.47, width=0.96, color="#E69F00", alpha=0.08 + 0.8 * lost / len(results))
    found = [value for result in results if math.isfinite(value := last(result, key))]
    middle = f"\n{WORDS[key].partition(' ')[0]} {number(median(found))}" if found else ""
    panel.write(f"{lost} of {len(results)}{middle}", (column, row), ("data", "data"), ha="center")


# By a part of the endpoint's name; dots for all others.
DRAW: dict[str, Draw] = {
    "failure": rates,
    "time_to": arrivals,
    "late_to_early": slopes,
    "point_collapse": curves,
    "coverage": coverage,
    "modes_share": modes,
    "running_to_precise": ratios,
    "gradient_cosine": cosines,
}
