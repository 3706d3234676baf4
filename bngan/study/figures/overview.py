"""What does the whole study say? A forest: every claim in every context, its effect against its margin."""

import textwrap
from collections.abc import Sequence

import numpy as np

from bngan.study.figures.view import Figure
from bngan.study.findings import effect_text, in_margins
from bngan.study.panel import FAINT, SHADE, Look, Panel
from bngan.study.verdicts import Estimate, Verdict

ZONES = {
    "supported": Look(label="supported", colour="#009E73", marker="o"),
    "contradicted": Look(label="contradicted", colour="#D55E00", marker="s"),
    "no practical effect": Look(label="no practical effect", colour="#0072B2", marker="D"),
    "inconclusive": Look(label="inconclusive", colour="#767676", marker="o", hollow=True),
}
VERDICTS = {zone: look.colour for zone, look in ZONES.items()} | {"conditional": "#8A5A00", "not informative": "#555555"}


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
