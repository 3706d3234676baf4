"""How is one small panel of a figure drawn? By matplotlib, as SVG, in one style; the same values always give the same bytes."""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from operator import itemgetter
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context, style
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH, HEIGHT, STRIP = 340, 150, 34  # of a panel, a plot, a strip above it, in points: a telephone shows them one to one
FAINT, SHADE = "#6a6a6a", "#dfe6ec"
STEPS = (1, 2, 5, 10)  # of round numbers
Point = tuple[float, float]
STYLE = {
    "svg.fonttype": "none",  # letters stay letters, to be found and read aloud
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: as wide everywhere
    "font.size": 9,
    "text.parse_math": False,
    "figure.frameon": False,
    "axes.edgecolor": "#aaaaaa",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.borderpad": 0.2,
}
styled = style.context(STYLE, after_reset=True)  # to decorate what makes text; a person's own matplotlibrc changes nothing
HALO = {"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 0.5}  # behind a name that stands over lines
GROUP = re.compile(r' id="[A-Za-z0-9.]+_[0-9]+"')  # matplotlib's numbers for groups, the same in every picture of a page


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same in every figure; marker and dash are matplotlib's."""

    label: str
    colour: str
    marker: str = "o"
    dash: str = "-"
    hollow: bool = False

    @property
    def line(self) -> dict[str, Any]:
        """Properties of its lines."""
        return {"color": self.colour, "linestyle": self.dash, "linewidth": 1.8}

    @property
    def points(self) -> dict[str, Any]:
        """Properties of its points: filled with a white edge, or hollow."""
        face, edge = ("white", self.colour) if self.hollow else (self.colour, "white")
        edges = {"markeredgecolor": edge, "markeredgewidth": 1.3 if self.hollow else 0.5}
        return {"marker": self.marker, "markersize": 6, "markerfacecolor": face, **edges}


class LogTicks(LogLocator):
    """Places a few round numbers on a logarithmic scale, also on one that is shorter than a decade."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """Return the fewest that are at least three, each a round number times a power of ten."""
        powers = 10.0 ** np.arange(math.floor(math.log10(vmin)), math.ceil(math.log10(vmax)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            found = np.outer(powers, factors).ravel()
            if len(found := found[(vmin <= found) & (found <= vmax)]) >= 3:
                return found.tolist()
        return MaxNLocator(nbins=5, steps=STEPS).tick_values(vmin, vmax)


class Panel:
    """A plot under a heading and a legend.

    Attributes:
        axes: the plot, in which figures draw what has no text.
    """

    @styled
    def __init__(self, title: str, about: str, *, x: str = "", y: str = "", log: str = "", looks: Sequence[Look] = ()) -> None:
        """Begin an empty plot.

        Args:
            title: its heading.
            about: what it shows, in words, for those who cannot see it.
            x, y: quantities and their units.
            log: the axes that are logarithmic: x, y, xy or none.
            looks: what the legend explains.
        """
        self.title, self.about, self.looks = title, about, looks
        self.figure = Canvas()
        self.axes = self.figure.add_subplot(xlabel=x, ylabel=y, **{f"{name}scale": "log" for name in log})
        self.axes.minorticks_off()
        for name, axis in (("x", self.axes.xaxis), ("y", self.axes.yaxis)):
            axis.set_major_locator(LogTicks() if name in log else MaxNLocator(nbins=5, steps=STEPS))
            axis.set_major_formatter("{x:,g}")

    @styled
    def rows(self, names: Sequence[str]) -> None:
        """Put names at y = 0, 1, 2, ..., downwards, as one reads."""
        self.axes.set_yticks(range(len(names)), [textwrap.fill(name, width=20) for name in names])
        self.axes.set_ylim(len(names) - 0.5, -0.5)

    @styled
    def columns(self, names: Sequence[str]) -> None:
        """Put names at x = 0, 1, 2, ..."""
        self.axes.set_xticks(range(len(names)), names)
        self.axes.set_xlim(-0.5, len(names) - 0.5)

    def points(self, x: Sequence[float], y: Sequence[float], look: Look, *, size: float = 6, alpha: float = 0.65) -> None:
        """Draw points, whole also at the edge."""
        self.axes.plot(x, y, **look.points | {"linestyle": "none", "markersize": size, "alpha": alpha, "clip_on": False})

    def rules(self, axis: Literal["x", "y"], known: Mapping[str, float]) -> int:
        """Draw a dashed line at each value within the scale, with its name; return how many names: neighbours share one.

        Names of values of x stand in lines of their own at the top, those of y at the right and the left by turns.
        """
        low, high = sorted(self.axes.get_xlim() if axis == "x" else self.axes.get_ylim())
        names: dict[float, str] = {}
        for name, value in sorted(known.items(), key=itemgetter(1)):
            if low <= value <= high:
                draw = self.axes.axvline if axis == "x" else self.axes.axhline
                draw(value, color=FAINT, linewidth=0.8, linestyle="--", zorder=1.5)
                near = [other for other in names if abs(self.share(other, axis) - self.share(value, axis)) < 0.02]
                names[near[0] if near else value] = f"{names[near[0]]}, {name}" if near else name
        for place, (value, text) in enumerate(names.items()):
            if axis == "x":
                at, of, side = (value, 1), ("data", "axes fraction"), "right" if self.share(value) > 0.5 else "left"
                shift = (-3 if side == "right" else 3, -5 - 9 * place)
            else:
                at, of, side = (place % 2, value), ("axes fraction", "data"), ("left", "right")[place % 2]
                shift = (0, 5)
            self.write(text, at, of, shift, ha=side, color=FAINT, fontsize=7.5, in_layout=False, bbox=HALO)
        return len(names)

    def strip(self, name: str, counts: Mapping[float, tuple[int, int]], look: Look) -> None:
        """Draw above the plot, at each x, as many points as are lost, and their number of all."""
        where: dict[str, Any] = {"transform": self.axes.transAxes, "clip_on": False}
        self.axes.add_patch(Rectangle((0, 1.02), width=1, height=STRIP / HEIGHT, facecolor="#f6e3da", **where))
        self.write(name, (0, 1.09), ("axes fraction", "axes fraction"), shift=(-5, 0), ha="right")
        for x, (lost, total) in counts.items():
            step = min(0.022, 0.8 / len(counts) / max(lost, 1))
            shares = [self.share(x) + step * (place - (lost - 1) / 2) for place in range(lost)]
            self.axes.plot(shares, [1.09] * lost, **look.points | where | {"linestyle": "none", "alpha": 0.65})
            self.write(f"{lost} of {total}", (x, 1.19), ("data", "axes fraction"), ha="center")

    def hatch(self, column: int, row: int) -> None:
        """Hatch a place of a table of columns and rows."""
        self.axes.bar(
            column, height=0.94, bottom=row - 0.47, width=0.96, fill=False, hatch="////", edgecolor="#bbbbbb", zorder=0.8
        )

    def share(self, value: float, axis: Literal["x", "y"] = "x") -> float:
        """Return where a value lies between the ends of an axis, 0 to 1."""
        point = (value, self.axes.get_ylim()[0]) if axis == "x" else (self.axes.get_xlim()[0], value)
        return (self.axes.transScale + self.axes.transLimits).transform(point)["xy".index(axis)]

    @styled
    def write(self, text: str, at: Point, of: tuple[str, str], shift: Point = (0, 0), **properties: Any) -> None:
        """Write at a place of the plot, shifted by points; `of` and properties are those of matplotlib's annotations."""
        given = {"fontsize": 8, "va": "center"} | properties
        self.axes.annotate(text, at, xycoords=of, xytext=shift, textcoords="offset points", **given)

    @styled
    def svg(self, height: float = HEIGHT) -> str:
        """Return the picture as an element that says what it shows, with a plot of about that height."""
        heading = textwrap.wrap(self.title, width=46)
        columns = 2 if all(len(look.label) <= 22 for look in self.looks) else 1
        lines = len(heading) + math.ceil(len(self.looks) / columns)
        self.figure.set_size_inches(WIDTH / 72, (height + 50 + 14 * lines) / 72)
        self.figure.legend(
            handles=[Line2D([], [], label=look.label, **look.line | look.points) for look in self.looks],
            title="\n".join(heading),
            title_fontproperties={"size": 9.5, "weight": "bold"},
            loc="outside upper left",
            alignment="left",
            ncols=columns,
        )
        self.figure.set_layout_engine("constrained")
        file = io.StringIO()
        salt = f"{self.figure.get_figheight()}"  # a shape's name follows from the shape, but a clip's place from this too
        with rc_context({"svg.hashsalt": salt}):
            self.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        head, _, body = file.getvalue().partition("<svg ")[2].partition(">")
        words = f"<title>{escape(self.title)}</title><desc>{escape(self.about)}</desc>"
        return f'<svg {head} role="img">{words}{GROUP.sub("", body)}'
