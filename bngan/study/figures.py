"""Which figure shows what a claim's runs did? It follows from the claim's endpoints; every run is a point or a line in it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from statistics import fmean, geometric_mean, median
from typing import Any

import numpy as np

from bngan.study.endpoints import ENDPOINTS, has_failed
from bngan.study.findings import (
    WORDS,
    Findings,
    effect_text,
    failed_of,
    in_margins,
    interval_of_median,
    last,
    quality,
    rate_interval,
    ratios_to_precise,
    series,
    tip,
)
from bngan.study.panel import FAINT, Axis, Look, Panel, number, wrapped
from bngan.study.spec import DEFAULTS, Claim, Contrast, Result, Run
from bngan.study.verdicts import Estimate, Verdict

ZONES = {
    "supported": Look(label="supported", colour="#009E73", marker="circle"),
    "contradicted": Look(label="contradicted", colour="#D55E00", marker="square"),
    "no practical effect": Look(label="no practical effect", colour="#0072B2", marker="diamond"),
    "inconclusive": Look(label="inconclusive", colour="#767676", marker="ring"),
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
    rows: list[tuple[Verdict, str | Estimate]] = []
    for verdict in verdicts:
        rows += [(verdict, line) for line in wrapped(f"{verdict.claim.name}. {verdict.claim.statement}", 31)]
        rows += [(verdict, estimate) for estimate in verdict.estimates]
    panel = Panel(
        title="Effects in multiples of their margins",
        x=Axis(label="effect / margin; to the right: as claimed", low=-reach, high=reach),
        y=Axis.of_names(["" if isinstance(row, str) else row.context or "together" for _, row in rows]),
        about=" ".join(verdict.sentence for verdict in verdicts),
        inner_height=19 * len(rows),
        beside=130,
    )
    panel.band("x", -1, 1)
    panel.rule("x", 0)
    for place, (verdict, row) in enumerate(rows):
        if isinstance(row, Estimate):
            draw_estimate(panel, place, row, reach)
        else:
            word = verdict.word if row.startswith(f"{verdict.claim.name}. ") else ""
            panel.heading(place, row, word, VERDICTS[verdict.word])
    caption = (
        "Thin line: 95% interval; thick: 90%; shaded: too small to matter. Supported: the thin line lies wholly to the "
        "right of the shade; contradicted: to the left; no practical effect: the thick line lies within it; else this "
        f"study cannot tell. Of a claim that there is no difference, within it is supported. What lies beyond {reach:g} "
        "margins is drawn at the edge. Numbers: x is a ratio, + or - a difference."
    )
    return Figure(name="overview", title="Every claim in every context", caption=caption, panels=(panel.svg(),), wide=True)


def draw_estimate(panel: Panel, place: int, estimate: Estimate, reach: float) -> None:
    """Draw one line of the forest, and its numbers beside it."""
    look = ZONES[estimate.zone]
    for interval, width in ((estimate.interval95, 1.5), (estimate.interval90, 4)):
        low, high = sorted(max(min(in_margins(estimate, end), reach), -reach) for end in interval)
        panel.whisker(place, low, high, look, width=width)
    panel.dot(in_margins(estimate, estimate.value), place, look, effect_text(estimate), size=4.5, faint=False)
    panel.aside(place, effect_text(estimate))


# Which figures --------------------------------------------------------------------------------------------------------


def figures_of_claim(findings: Findings, verdict: Verdict) -> list[Figure]:
    """Return the figures that the claim's endpoints ask for, its own first, which bears the verdict."""
    claim = verdict.claim
    contrasts = [claim.primary, *claim.also, *claim.controls, *claim.secondary]
    asked: dict[tuple[Draw, str], list[Contrast]] = {}
    if claim.rule == "not_worse":
        asked[matrix, "raw"] = contrasts
    for contrast in contrasts:
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
        scale = Axis.around(WORDS[key], [last(result, key) for result in runs], log=logarithmic(key))
        lines = findings.known(block, key)
        panels += [rate_panel(findings.looks[arm], context, results, key, scale, lines) for arm, results in arms.items()]
        panels.append(failure_panel(findings, view, f"{context}, block {block}: runs that failed", arms))
    caption = (
        "Each point is a run's last iterate; nothing is selected. Failed runs stand in the strip, with their number of "
        "all. Line: medians of the others. Shaded: too little from the baseline to matter. Shares of failed runs are over "
        "all rates, with Clopper and Pearson's 95% intervals."
    )
    return Figure(f"{view.name}-rates", "Quality against learning rate, and failures", caption, tuple(panels))


def rate_panel(look: Look, context: str, results: Sequence[Result], key: str, scale: Axis, lines: Mapping[str, float]) -> str:
    """Draw the runs of an arm against the axis of their block that has numbers."""
    axis, at = numeric_axis(results)
    values = sorted({at(result) for result in results})
    panel = Panel(
        title=f"{look.label}, {context}",
        x=Axis.around(axis, values, log=values[0] > 0, room=0.15, marks=tuple(values)),
        y=scale,
        about=f"{WORDS[key]} of {len(results)} runs by {axis}; {failed_of(results)} failed.",
        strip="failed",
    )
    for name, value in lines.items():
        panel.rule("y", value, name)
    middles = []
    for x, group in groupby(sorted(results, key=at), key=at):
        runs = list(group)
        lost, kept = [run for run in runs if has_failed(run)], [run for run in runs if not has_failed(run)]
        for place, result in enumerate(lost):
            panel.dot_in_strip(x, place, look, tip(result.run, last(result, key)))
        panel.count_in_strip(x, f"{len(lost)} of {len(runs)}")
        for result in kept:
            panel.dot(x, last(result, key), look, tip(result.run, last(result, key)))
        middles += [(x, median(last(result, key) for result in kept))] if kept else []
    panel.line(middles, look)
    return panel.svg()


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
    panel = Panel(
        title=title,
        x=Axis(label="share of failed runs", low=0, high=1),
        y=Axis.of_names([findings.looks[arm].label for arm in arms]),
        about="; ".join(f"{findings.looks[arm].label}: {failed_of(runs)} of {len(runs)}" for arm, runs in arms.items()),
        inner_height=30 * len(arms) + 10,
        beside=48,
    )
    if band := view.indifferent("failure", arms):
        panel.band("x", *band)
    for place, (arm, results) in enumerate(arms.items()):
        look, lost = findings.looks[arm], failed_of(results)
        low, high = rate_interval(lost, len(results))
        panel.whisker(place, low, high, look)
        panel.dot(lost / len(results), place, look, f"{lost} of {len(results)}", size=5, faint=False)
        panel.aside(place, f"{lost} of {len(results)}")
    return panel.svg()


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
    least = min(min(values) for values in times.values())
    panel = Panel(
        title=f"{where}: {ENDPOINTS[endpoint].words}",
        x=Axis(label="iterations", low=min(0.8 * least, 0.5 * horizon), high=horizon, log=True),
        y=Axis(label="share of runs that arrived", low=0, high=1.02),
        about="; ".join(f"{findings.looks[arm].label}: mean {number(fmean(values))}" for arm, values in times.items()),
        looks=[findings.looks[arm] for arm in arms],
    )
    if band := view.indifferent(endpoint, arms):
        panel.band("x", *band)
    for arm, values in times.items():
        look, steps, share = findings.looks[arm], [(panel.x.low, 0.0)], 0.0
        for place, time in enumerate((time for time in values if time < horizon), start=1):
            steps += [(time, share), (time, place / len(values))]
            share = place / len(values)
        panel.line([*steps, (horizon, share)], look)
        said = f"{look.label}: restricted mean {number(fmean(values))} iterations, n {len(values)}"
        panel.dot(fmean(values), 0, look, said, size=6, faint=False)
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
    bundles = {arm: [line for run in runs if (line := series(run, key, view.weights))] for arm, runs in arms.items()}
    bundles = {arm: lines for arm, lines in bundles.items() if lines}
    points = [point for lines in bundles.values() for line in lines for point in line]
    if not points:
        return []
    panel = Panel(
        title=f"{context}, block {block}: {WORDS[key]}",
        x=Axis.around("iterations", [x for x, _ in points], log=True),
        y=Axis.around(WORDS[key], [y for _, y in points], log=logarithmic(key)),
        about=f"{WORDS[key]} over training; " + ", ".join(f"{arm}: n {len(lines)}" for arm, lines in bundles.items()),
        looks=[
            replace(look, label=f"{look.label}, n {len(bundles[arm])}")
            for arm, look in findings.looks.items()
            if arm in bundles
        ],
    )
    for name, value in findings.known(block, key).items():
        panel.rule("y", value, name)
    for arm, lines in bundles.items():
        draw_bundle(panel, lines, findings.looks[arm])
    return [panel.svg()]


def draw_bundle(panel: Panel, lines: Sequence[Sequence[tuple[int, float]]], look: Look) -> None:
    """Draw lines thin, their median thick, and where there are five the band that holds 80% of them."""
    at: dict[int, list[float]] = {}
    for line in lines:
        panel.line(line, look, width=0.6, opacity=0.35)
        for x, y in line:
            at.setdefault(x, []).append(y)
    if len(lines) >= 5:
        low, high = ([(x, float(np.quantile(at[x], q=share))) for x in sorted(at)] for share in (0.1, 0.9))
        panel.area(low, high, look)
    middles = [(x, median(at[x])) for x in sorted(at)]
    panel.line(middles, look)
    for x, y in middles:
        panel.dot(x, y, look, f"{look.label}, iteration {x:,}: median {number(y)}, n {len(at[x])}", faint=False)


# Claim 2b: early and late ---------------------------------------------------------------------------------------------


def slopes(findings: Findings, view: View) -> Figure:
    """Draw FID at the first and the last whole look, a run a line."""
    panels = []
    for block, context, arms in view.cells(findings):
        for arm, results in arms.items():
            ends = [look.iteration for look in results[0].run.looks if look.whole]
            found = [(result.run, dict(series(result, "fid", view.weights))) for result in results]
            pairs = [(run, fids[ends[0]], fids[ends[-1]]) for run, fids in found if ends and {ends[0], ends[-1]} <= fids.keys()]
            if pairs:
                title = f"{findings.looks[arm].label}, {context}, block {block}: n {len(pairs)}"
                panels.append(slope_panel(title, (ends[0], ends[-1]), pairs, findings.looks[arm]))
    caption = "Each thin line is a run, the thick one joins the medians. Upwards: worse later than early."
    return Figure(f"{view.name}-slopes", "Early and late", caption, tuple(panels))


def slope_panel(title: str, ends: tuple[int, int], pairs: Sequence[tuple[Run, float, float]], look: Look) -> str:
    """Draw the FID of runs at two iterations."""
    panel = Panel(
        title=title,
        x=Axis.of_names([f"iteration {end:,}" for end in ends]),
        y=Axis.around("FID", [fid for _, early, late in pairs for fid in (early, late)], log=True),
        about=f"FID early and late of {len(pairs)} runs.",
    )
    for run, early, late in pairs:
        panel.line([(0, early), (1, late)], look, width=0.8, opacity=0.6)
        panel.dot(0, early, look, tip(run, early))
        panel.dot(1, late, look, tip(run, late))
    panel.line([(0, median(early for _, early, _ in pairs)), (1, median(late for _, _, late in pairs))], look, width=3)
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
    values = {findings.looks[arm]: [(result.run, of(result)) for result in runs] for arm, runs in arms.items()}
    lines = findings.known(block, endpoint.removesuffix("_ema"))
    return rows_panel(
        f"{context}, block {block}: {words}", words, values, lines, logarithmic(endpoint), view.indifferent(endpoint, arms)
    )


def rows_panel(
    title: str,
    label: str,
    rows: Mapping[Look, Sequence[tuple[Run, float]]],
    lines: Mapping[str, float],
    log: bool,
    band: tuple[float, float] | None = None,
) -> str:
    """Draw the values of each row as points, with their median and its interval, over lines and a band."""
    values = [value for row in rows.values() for _, value in row]
    panel = Panel(
        title=title,
        x=Axis.around(label, [*values, *(band or ())], log=log),
        y=replace(Axis.of_names([f"{look.label}, n {len(row)}" for look, row in rows.items()]), low=-1.4 if lines else -0.5),
        about="; ".join(f"{look.label}: median {number(median(value for _, value in row))}" for look, row in rows.items()),
        inner_height=34 * len(rows) + (34 if lines else 8),
    )
    if band:
        panel.band("x", *band)
    for name, value in lines.items():
        panel.rule("x", value, name)
    for place, (look, row) in enumerate(rows.items()):
        draw_row(panel, place, look, row)
    return panel.svg()


def draw_row(panel: Panel, place: int, look: Look, row: Sequence[tuple[Run, float]]) -> None:
    """Draw points side by side on three levels, and beneath them their median and its interval."""
    for turn, (run, value) in enumerate(row):
        panel.dot(value, place - 0.2 + 0.1 * (turn % 3), look, tip(run, value), size=2.6)
    values = [value for _, value in row]
    if ends := interval_of_median(values):
        panel.whisker(place + 0.25, *ends, look, width=2)
    panel.dot(median(values), place + 0.25, look, f"median {number(median(values))}", size=5, faint=False)


def coverage(findings: Findings, view: View) -> Figure:
    """Draw coverage of every run, and against FID, with controls: FID alone does not see what is dropped within a class."""
    panels = []
    for block, context, arms in view.cells(findings):
        panels += [dots_panel(findings, view, name, block, context, arms) for name in view.endpoints]
        panels.append(coverage_panel(findings, view, block, context, arms))
    caption = (
        "Coverage: share of held-out images that have a sample nearer than their fifth neighbour (Naeem et al. 2020). "
        "Grey rings: images of known worth; a hundred images again and again have a good FID and no coverage."
    )
    return Figure(f"{view.name}-coverage", "Coverage, and what FID does not see", caption, tuple(panels))


def coverage_panel(findings: Findings, view: View, block: str, context: str, arms: Cells) -> str:
    """Draw coverage against FID of every run that has both, with the controls."""
    fids, shares = findings.known(block, "fid"), findings.known(block, "coverage")
    runs = [(arm, run) for arm, results in arms.items() for run in results if series(run, "coverage", view.weights)]
    points = [(arm, run.run, last(run, "fid", view.weights), last(run, "coverage", view.weights)) for arm, run in runs]
    panel = Panel(
        title=f"{context}, block {block}: coverage against FID",
        x=Axis.around("FID", [*(fid for _, _, fid, _ in points), *fids.values()], log=True, room=0.12),
        y=Axis(label="coverage", low=0, high=1.05),
        about="Coverage against FID of every run, with controls of known worth.",
        looks=[findings.looks[arm] for arm in arms],
        inner_height=220,
    )
    for name in fids.keys() & shares.keys():
        panel.dot(fids[name], shares[name], Look(label=name, colour=FAINT, marker="ring"), name)
        panel.note(fids[name], shares[name], name, up=8, colour=FAINT)
    for arm, run, fid, share in points:
        panel.dot(fid, share, findings.looks[arm], tip(run, share))
    return panel.svg()


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
            rows: dict[Look, list[tuple[Run, float]]] = {}
            for result in results:
                for name, ratio in ratios_to_precise(result).items():
                    rows.setdefault(replace(look, label=name), []).append((result.run, ratio))
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
    arms = list(dict.fromkeys(arm for arm, _ in entries))
    panel = Panel(
        title=title,
        x=Axis.around("iterations", [entry["iteration"] for _, entry in entries], log=True, room=0.1),
        y=Axis.around("cosine", [entry["value"] for _, entry in entries]),
        about="Cosine between a layer's gradient before and after the layers below it took a step.",
        looks=[findings.looks[arm] for arm in arms],
    )
    for arm in arms:
        look, at = findings.looks[arm], dict[int, list[float]]()
        for entry in (entry for name, entry in entries if name == arm):
            at.setdefault(entry["iteration"], []).append(entry["value"])
            said = f"{look.label}, layer {entry['layer']}: {number(entry['value'])}"
            panel.dot(entry["iteration"], entry["value"], look, said, size=1.8)
        panel.line([(x, median(at[x])) for x in sorted(at)], look)
    return panel.svg()


# Claim 7: a matrix ----------------------------------------------------------------------------------------------------


def matrix(findings: Findings, view: View) -> Figure:
    """Draw contexts against arms: failed runs as number and colour, the median quality beneath."""
    panels = []
    for block in view.blocks:
        arms = [arm for arm in view.arms if any(findings.runs(block, context, arm) for context in view.contexts)]
        panel = Panel(
            title=f"Block {block}: runs that failed, and median quality",
            x=Axis.of_names(arms),
            y=Axis.of_names(view.contexts),
            about="Share of failed runs for each context and arm.",
            looks=[replace(findings.looks[arm], label=f"{arm}: {findings.looks[arm].label}") for arm in arms],
            inner_height=44 * len(view.contexts),
        )
        for (row, context), (column, arm) in product(enumerate(view.contexts), enumerate(arms)):
            if results := findings.runs(block, context, arm):
                lost, key = failed_of(results), quality(results)
                found = [value for result in results if math.isfinite(value := last(result, key))]
                middle = f"{WORDS[key]} {number(median(found))}" if found else ""
                panel.cell(column, row, [f"{lost} of {len(results)} failed", middle], share=lost / len(results))
        panels.append(panel.svg())
    caption = "Each place: failed runs of all, and the median of what was reached; the darker, the more runs failed."
    return Figure(f"{view.name}-matrix", "In every context", caption, tuple(panels))


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
