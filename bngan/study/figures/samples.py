"""What do the last samples lack? Any endpoint as dots; modes, coverage, running statistics: claims 3b and 5."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import median
from string import ascii_lowercase

from bngan.study.endpoints import ENDPOINTS, badness
from bngan.study.figures.quality import curves
from bngan.study.figures.view import Cells, Figure, View, logarithmic, sentence, slug
from bngan.study.findings import Findings, interval_of_median, last, number, points_of, ratios_to_precise, series
from bngan.study.panel import FAINT, SHADE, WIDTH, Look, Panel
from bngan.study.spec import Result

REAL = Look("real points", FAINT, dash="none")
UNKEPT = "Samples as points: the runs of this study have kept none."


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
    """Draw the modes that each run found, the way there, and what the median run of each arm draws beside real points."""
    end, way = dots(findings, view), curves(findings, view)
    maps = tuple(picture for _, _, arms in view.cells(findings) for picture in point_panels(findings, arms))
    shown = f"Points: samples of the median run of each arm over {REAL.label}." if maps else UNKEPT
    caption = f"{end.caption} Over training: {way.caption[0].lower()}{way.caption[1:]} {shown}"
    return Figure(f"{view.name}-modes", "Modes found", caption, (*end.panels, *way.panels, *maps))


def point_panels(findings: Findings, arms: Cells) -> Iterator[str]:
    """Yield the samples of the median run of each arm, by the modes that it missed, of those that have kept points."""
    for arm, runs in arms.items():
        kept = sorted((run for run in runs if points_of(run)), key=lambda run: (badness(run), run.run.seed))
        if kept:
            yield point_panel(findings, findings.looks[arm], kept[len(kept) // 2])


def point_panel(findings: Findings, look: Look, result: Result) -> str:
    """Draw a run's samples, points in the plane, over as many real ones."""
    run, drawn, real = result.run, points_of(result), findings.real_points(result.run.task)
    title = f"{look.label}, {run.context}, block {run.block}: seed {run.seed}, {number(last(result, 'modes'))} modes"
    panel = Panel(title, f"{len(drawn)} samples over {len(real)} real points.", looks=[look, REAL])
    for points, of in ((real, REAL), (drawn, look)):
        panel.points([x for x, _ in points], [y for _, y in points], of, size=4)
    extent = 1.25 * max(abs(value) for point in real or drawn for value in point)
    panel.axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    return panel.svg(height=0.7 * WIDTH)


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
