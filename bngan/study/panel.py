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

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDTH, HEIGHT, STRIP = 340, 150, 34  # of a panel, a plot, a strip above it, in points: a telephone shows them one to one
LINE = 14  # of a heading or a legend
INK, FAINT, SHADE = "#222222", "#6a6a6a", "#dfe6ec"
STYLE = {
    "svg.fonttype": "none",  # letters stay letters, to be found and read aloud
    "svg.hashsalt": "bngan",  # so that a shape's name follows from the shape
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: as wide everywhere
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "figure.frameon": False,
    "axes.facecolor": "none",
    "axes.edgecolor": "#aaaaaa",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.borderpad": 0,
}
styled = style.context(STYLE, after_reset=True)  # to decorate what makes text; a person's own matplotlibrc changes nothing
RULE: dict[str, Any] = {"color": FAINT, "linewidth": 0.8, "linestyle": "--", "zorder": 1.5}
GROUP = re.compile(r' id="[A-Za-z0-9]+_[0-9]+"')  # matplotlib's numbers for groups, the same in every picture of a page


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
        return {"color": self.colour, "linestyle": self.dash}

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
        for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
            found = LogLocator(base=10, subs=factors, numticks=100).tick_values(vmin, vmax)
            if len(found := found[(vmin <= found) & (found <= vmax)]) >= 3:
                return found
        return MaxNLocator(nbins=5).tick_values(vmin, vmax)


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
        self.axes: Axes = self.figure.add_subplot(xlabel=x, ylabel=y)
        self.axes.set(**{f"{name}scale": "log" for name in log})
        for name, axis in (("x", self.axes.xaxis), ("y", self.axes.yaxis)):
            axis.set_major_locator(LogTicks() if name in log else MaxNLocator(nbins=5))
            axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
            axis.set_minor_locator(NullLocator())

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

    def band(self, axis: Literal["x", "y"], low: float, high: float) -> None:
        """Shade all between two values."""
        (self.axes.axvspan if axis == "x" else self.axes.axhspan)(low, high, facecolor=SHADE, zorder=0.5)

    def rules(self, axis: Literal["x", "y"], known: Mapping[str, float]) -> int:
        """Draw a dashed line at each value within the scale, with its name; return how many have one.

        Names of values of x stand in lines of their own at the top, those of y at the right and the left by turns.
        """
        low, high = sorted(self.axes.get_xlim() if axis == "x" else self.axes.get_ylim())
        names: dict[float, str] = {}
        for name, value in sorted(known.items(), key=itemgetter(1)):
            if low <= value <= high:
                names[value] = f"{names[value]}, {name}" if value in names else name
        for place, (value, text) in enumerate(names.items()):
            if axis == "x":
                self.axes.axvline(value, **RULE)
                at, of, side = (value, 1), ("data", "axes fraction"), "right" if self.share(value) > 0.5 else "left"
                shift = (-3 if side == "right" else 3, -5 - 9 * place)
            else:
                self.axes.axhline(value, **RULE)
                at, of, side = (place % 2, value), ("axes fraction", "data"), ("left", "right")[place % 2]
                shift = (0, 5)
            self.write(text, at, of=of, shift=shift, ha=side, color=FAINT, fontsize=7.5, in_layout=False)
        return len(names)

    def strip(self, name: str, counts: Mapping[float, tuple[int, int]], look: Look) -> None:
        """Draw above the plot, at each x, as many points as are lost, and their number of all."""
        where = {"transform": self.axes.transAxes, "clip_on": False}
        self.axes.add_patch(Rectangle((0, 1.02), width=1, height=STRIP / HEIGHT, facecolor="#f6e3da", **where))
        self.write(name, (0, 1.09), of=("axes fraction", "axes fraction"), shift=(-5, 0), ha="right")
        for x, (lost, total) in counts.items():
            step = min(0.022, 0.8 / len(counts) / max(lost, 1))
            shares = [self.share(x) + step * (place - (lost - 1) / 2) for place in range(lost)]
            self.axes.plot(shares, [1.09] * lost, **look.points | where | {"linestyle": "none", "alpha": 0.65})
            self.write(f"{lost} of {total}", (x, 1.19), of=("data", "axes fraction"), ha="center")

    def share(self, x: float) -> float:
        """Return where a value of x lies between the ends of the plot, 0 to 1."""
        return (self.axes.transScale + self.axes.transLimits).transform((x, self.axes.get_ylim()[0]))[0]

    @styled
    def write(
        self,
        text: str,
        place: tuple[float, float],
        *,
        of: tuple[str, str] = ("data", "data"),
        shift: tuple[float, float] = (0, 0),
        **properties: Any,
    ) -> None:
        """Write at a place of the plot, shifted by points; `of` and properties are those of matplotlib's annotations."""
        given = {"fontsize": 8, "va": "center"} | properties
        self.axes.annotate(text, place, xycoords=of, xytext=shift, textcoords="offset points", **given)

    @styled
    def svg(self, height: float = HEIGHT) -> str:
        """Return the picture, with a plot of that height."""
        heading = textwrap.wrap(self.title, width=46)
        columns = 2 if all(len(look.label) <= 22 for look in self.looks) else 1
        below = 6 + LINE * len(heading)
        top = below + LINE * math.ceil(len(self.looks) / columns)
        whole = top + height + 40
        self.figure.set_size_inches(WIDTH / 72, whole / 72)
        self.figure.text(
            x=4 / WIDTH, y=1 - 3 / whole, s="\n".join(heading), va="top", weight="bold", fontsize=9.5, in_layout=False
        )
        if self.looks:
            handles = [Line2D([], [], label=look.label, **look.line | look.points) for look in self.looks]
            legend = self.figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, 1 - below / whole), ncols=columns)
            legend.set_in_layout(False)
        self.figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - top / whole))
        file = io.StringIO()
        self.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return described(file.getvalue(), self.title, self.about)


def described(svg: str, title: str, about: str) -> str:
    """Return an SVG file as an element that says what it shows; groups lose their names, which another panel has too."""
    head, _, body = svg[svg.index("<svg") :].partition(">")
    words = f"<title>{escape(title)}</title><desc>{escape(about)}</desc>"
    return f'{head} role="img">{words}{GROUP.sub("", body)}'


def number(value: float | None) -> str:
    """Return a number to three digits as a person writes it; nothing where there is none."""
    if value is None or math.isnan(value):
        return ""
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.10g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def span(ends: Sequence[float] | None) -> str:
    """Return an interval as a person writes it; nothing where there is none."""
    return f"{number(ends[0])} to {number(ends[1])}" if ends else ""
