"""How good do runs become, how soon, and how many fail? Claims 1, 2, 2b and 3a."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, groupby, product
from statistics import fmean, median

from matplotlib.collections import LineCollection

from bngan.study.endpoints import ENDPOINTS, has_failed
from bngan.study.figures.view import EVERY_RUN, Cells, Figure, View, bundle_panel, ends_of, logarithmic, sentence
from bngan.study.findings import WORDS, Findings, failed_of, last, number, quality, series
from bngan.study.panel import HEIGHT, SHADE, STRIP, Look, Panel
from bngan.study.spec import DEFAULTS, Result
from bngan.study.statistics import clopper_pearson

UNTIMED = "In seconds: this study has not timed an iteration of these arms."

# Against learning rate ---


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


# Over training ---


def arrivals(findings: Findings, view: View) -> Figure:
    """Draw how many runs have reached a quality by when, in iterations and in seconds, and the way there."""
    panels, timed = [], False
    for block, context, arms in view.cells(findings):
        paces = findings.paces(block, context)
        for name in view.endpoints:
            panels.append(arrival_panel(findings, view, name, f"{context}, block {block}", arms))
            if arms.keys() <= paces.keys():
                panels.append(arrival_panel(findings, view, name, f"{context}, block {block}", arms, paces))
                timed = True
        panels += curve_panels(findings, view, "fid", block, context, arms)
    seconds = "Seconds are iterations times what one takes on the machine that timed them, apart." if timed else UNTIMED
    caption = (
        "Steps: share of runs that have arrived; one that fails or never arrives counts as the whole length, and the "
        f"marker on the axis is the restricted mean. {seconds} Curves: {EVERY_RUN[0].lower()}{EVERY_RUN[1:]}"
    )
    return Figure(f"{view.name}-time", "Time to quality", caption, tuple(panels))


def arrival_panel(
    findings: Findings, view: View, endpoint: str, where: str, arms: Cells, paces: Mapping[str, float] | None = None
) -> str:
    """Draw the empirical distribution of a time, an arm a line; in seconds, if paces tell how many an iteration takes."""
    unit = "iterations" if paces is None else "seconds"
    worth = dict.fromkeys(arms, 1.0) if paces is None else paces
    words = ENDPOINTS[endpoint].words.replace("iterations", unit)
    times = {arm: sorted(worth[arm] * ENDPOINTS[endpoint].of(run) for run in runs) for arm, runs in arms.items()}
    horizons = {arm: worth[arm] * max(run.run.iterations for run in runs) for arm, runs in arms.items()}
    start = min(0.8 * min(min(values) for values in times.values()), 0.5 * max(horizons.values()))
    about = "; ".join(
        f"{findings.looks[arm].label}: restricted mean {number(fmean(values))} {unit}, n {len(values)}"
        for arm, values in times.items()
    )
    looks = [findings.looks[arm] for arm in arms]
    panel = Panel(f"{where}: {words}", about, x=unit, y="share of runs that arrived", log="x", looks=looks)
    panel.axes.set(xlim=(start, max(horizons.values())), ylim=(0, 1.02))
    if paces is None and (band := view.indifferent(endpoint, arms)):
        panel.axes.axvspan(*band, facecolor=SHADE, zorder=0.5)
    for arm, values in times.items():
        draw_arrivals(panel, start, values, horizons[arm], findings.looks[arm])
    return panel.svg()


def draw_arrivals(panel: Panel, start: float, times: Sequence[float], horizon: float, look: Look) -> None:
    """Draw the share of runs that have arrived, from the start to the horizon, and mark the restricted mean on the axis."""
    arrived = [time for time in times if time < horizon]
    shares = [place / len(times) for place in range(len(arrived) + 1)]
    panel.axes.step([start, *arrived, horizon], [*shares, shares[-1]], where="post", **look.line)
    panel.points([fmean(times)], [0], look, size=9, alpha=1)


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
        findings.looks[arm]: lines
        for arm, runs in arms.items()
        if (lines := [line for run in runs if (line := series(run, key, view.weights))])
    }
    if not bundles:
        return []
    title, log = f"{context}, block {block}: {WORDS[key]}", "xy" if logarithmic(key) else "x"
    panel = bundle_panel(title, bundles, x="iterations", y=WORDS[key], log=log)
    panel.rules("y", findings.known(block, key))
    return [panel.svg()]


def slopes(findings: Findings, view: View) -> Figure:
    """Draw FID at the first and the last whole look, a run a line."""
    panels = []
    for block, context, arms in view.cells(findings):
        for arm, results in arms.items():
            ends = [look.iteration for look in results[0].run.looks if look.whole]
            found = [dict(series(result, "fid", view.weights)) for result in results]
            pairs = [(fids[ends[0]], fids[ends[-1]]) for fids in found if len(ends) > 1 and {ends[0], ends[-1]} <= fids.keys()]
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
