"""How is one small panel of a figure drawn? As SVG that needs no library, in which every point says whose it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal, Self

Marker = Literal["circle", "square", "triangle", "diamond", "ring"]

WIDTH = 340  # of every panel, in the units of its viewBox: a telephone shows them one to one
INNER_HEIGHT = 150
LINE_HEIGHT = 15
FONT_SIZE = 11
INK, FAINT, SHADE = "#222222", "#6a6a6a", "#dfe6ec"
HALO = 'stroke="white" stroke-width="2.5" paint-order="stroke"'  # so that text is read over lines


@dataclass(frozen=True)
class Look:
    """How an arm is drawn, the same in every figure."""

    label: str
    colour: str
    marker: Marker = "circle"
    dash: str = ""


@dataclass(frozen=True)
class Axis:
    """A scale.

    Attributes:
        label: the quantity and its unit.
        low, high: its ends, 0 < low where it is logarithmic.
        log: whether it is.
        names: what stands at 0, 1, 2, ... in place of numbers.
        marks: the numbers that are written; none means round ones.
    """

    label: str
    low: float
    high: float
    log: bool = False
    names: tuple[str, ...] = ()
    marks: tuple[float, ...] = ()

    @classmethod
    def around(
        cls, label: str, values: Sequence[float], *, log: bool = False, room: float = 0.06, marks: tuple[float, ...] = ()
    ) -> Self:
        """Return the scale that holds all finite values, with some room at both ends."""
        seen = [math.log(value) if log else value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
        spare = room * (high - low) or 0.1
        ends = [math.exp(end) if log else end for end in (low - spare, high + spare)]
        return cls(label=label, low=ends[0], high=ends[1], log=log, marks=marks)

    @classmethod
    def of_names(cls, names: Sequence[str], label: str = "") -> Self:
        """Return the scale that has a place for each name."""
        return cls(label=label, low=-0.5, high=len(names) - 0.5, names=tuple(names))

    def share(self, value: float) -> float:
        """Return where a value lies between the ends, 0 to 1; what is beyond lies at the end."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if self.log:
            value = math.log(value) if value > 0 else low
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Return places and their text: names, or four to eight round numbers."""
        if self.names:
            return [(float(place), name) for place, name in enumerate(self.names)]
        return [(value, number(value)) for value in self.marks or (self._log_ticks() if self.log else self._even_ticks())]

    def _even_ticks(self) -> list[float]:
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [place * step for place in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
            found = [factor * 10.0**decade for decade in decades for factor in factors]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                return found
        return self._even_ticks()


@dataclass
class Panel:
    """One set of axes; what is added first lies beneath.

    Attributes:
        title: its heading.
        x, y: its scales, y upwards; names of y run downwards, as one reads.
        about: what it shows, in words, for those who cannot see it.
        looks: what its legend explains.
        inner_height: height of the plot.
        strip: name of a strip of its own above the plot, as for failed runs; empty for none.
        beside: room to the right of the plot, for what `aside` writes.
    """

    title: str
    x: Axis
    y: Axis
    about: str
    looks: Sequence[Look] = ()
    inner_height: float = INNER_HEIGHT
    strip: str = ""
    beside: float = 12
    parts: list[str] = field(default_factory=list)
    rules: int = 0

    def __post_init__(self) -> None:
        self.headings = wrapped(self.title, 46)
        self.legend_rows = _legend_rows(self.looks)
        longest = max((len(text) for _, text in self.y.ticks()), default=0)
        self.left = min(14 + 5.9 * longest, 130) + (14 if self.y.label else 0)
        self.right = WIDTH - self.beside
        self.top = 10 + LINE_HEIGHT * (len(self.headings) + len(self.legend_rows)) + (26 if self.strip else 0)
        self.bottom = self.top + self.inner_height

    def across(self, value: float) -> float:
        """Return where a value of x lies in the picture."""
        return self.left + self.x.share(value) * (self.right - self.left)

    def down(self, value: float) -> float:
        """Return where a value of y lies in the picture."""
        share = self.y.share(value)
        return self.top + (share if self.y.names else 1 - share) * (self.bottom - self.top)

    def band(self, axis: Literal["x", "y"], low: float, high: float, colour: str = SHADE) -> None:
        """Shade all between two values."""
        if axis == "x":
            left, right = self.across(low), self.across(high)
            self.parts.append(_box(left, self.top, right - left, self.bottom - self.top, colour))
        else:
            upper, lower = sorted((self.down(low), self.down(high)))
            self.parts.append(_box(self.left, upper, self.right - self.left, lower - upper, colour))

    def rule(self, axis: Literal["x", "y"], value: float, label: str = "") -> None:
        """Draw a dashed line at a value, with its name; nothing where it lies beyond the scale."""
        scale = self.x if axis == "x" else self.y
        if not scale.low <= value <= scale.high:
            return
        if axis == "x":
            place, anchor = self.across(value), "end" if scale.share(value) > 0.6 else "start"
            self.parts.append(_path([(place, self.top), (place, self.bottom)], FAINT, 1, dash="4 3"))
            y = self.top + 10 + 10 * (self.rules % 3)  # neighbours' names stand on different lines
            x = place + (3 if anchor == "start" else -3)
            self.parts.append(_text(x, y, label, anchor=anchor, colour=FAINT, size=9, more=HALO))
            self.rules += 1
        else:
            place = self.down(value)
            self.parts.append(_path([(self.left, place), (self.right, place)], FAINT, 1, dash="4 3"))
            self.parts.append(_text(self.right - 2, place - 3, label, anchor="end", colour=FAINT, size=9, more=HALO))

    def heading(self, row: int, text: str, word: str = "", colour: str = INK) -> None:
        """Write over a whole row, and a word at its end."""
        half = (self.bottom - self.top) / len(self.y.names) / 2
        place = self.down(row)
        self.parts.append(_box(1, place - half - 1, WIDTH - 2, 2 * half + 2, "white"))
        self.parts.append(_text(6, place + 4, text, bold=True))
        self.parts.append(_text(WIDTH - 6, place + 4, word, anchor="end", bold=True, colour=colour))

    def aside(self, row: int, text: str) -> None:
        """Write to the right of the plot."""
        self.parts.append(_text(self.right + 6, self.down(row) + 3, text, size=9))

    def dot(self, x: float, y: float, look: Look, tip: str, *, size: float = 3.2, faint: bool = True) -> None:
        """Draw a point that says, when pointed at, whose it is."""
        self.parts.append(_marker(self.across(x), self.down(y), look, size, tip, opacity=0.65 if faint else 1))

    def dot_in_strip(self, x: float, place: int, look: Look, tip: str) -> None:
        """Draw a point in the strip above the plot, the first of those at x in its middle, the others beside it."""
        beside = 7 * ((place + 1) // 2) * (1 if place % 2 else -1)
        self.parts.append(_marker(self.across(x) + beside, self.top - 9, look, 3.2, tip, opacity=0.8))

    def count_in_strip(self, x: float, text: str) -> None:
        """Write above the strip's points how many they are."""
        self.parts.append(_text(self.across(x), self.top - 17, text, anchor="middle", size=9))

    def line(self, points: Sequence[tuple[float, float]], look: Look, *, width: float = 2, opacity: float = 1) -> None:
        """Draw a line through points (x, y)."""
        places = [(self.across(x), self.down(y)) for x, y in points if math.isfinite(y)]
        if len(places) > 1:
            self.parts.append(_path(places, look.colour, width, opacity=opacity, dash=look.dash))

    def area(self, lower: Sequence[tuple[float, float]], upper: Sequence[tuple[float, float]], look: Look) -> None:
        """Shade between two lines of points (x, y)."""
        places = [(self.across(x), self.down(y)) for x, y in [*lower, *reversed(upper)]]
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        self.parts.append(f'<polygon points="{outline}" fill="{look.colour}" opacity="0.15"/>')

    def whisker(self, y: float, low: float, high: float, look: Look, *, width: float = 1.5, beneath: float = 0) -> None:
        """Draw an interval of x at a value of y, some units beneath it."""
        place = self.down(y) + beneath
        self.parts.append(_path([(self.across(low), place), (self.across(high), place)], look.colour, width))

    def bar(self, x: float, low: float, high: float, look: Look, *, width: float = 1.5) -> None:
        """Draw an interval of y at a value of x."""
        self.parts.append(_path([(self.across(x), self.down(low)), (self.across(x), self.down(high))], look.colour, width))

    def note(self, x: float, y: float, text: str, *, up: float = 0, colour: str = INK) -> None:
        """Write beside a point, or some units above it."""
        anchor = "middle" if up else "end" if self.x.share(x) > 0.75 else "start"
        shift = {"middle": 0, "end": -6, "start": 6}[anchor]
        self.parts.append(_text(self.across(x) + shift, self.down(y) - up + 3, text, anchor=anchor, size=9, colour=colour))

    def cell(self, column: int, row: int, lines: Sequence[str], share: float) -> None:
        """Fill a place of a table with a colour from white (0) to orange (1), and text."""
        left, right = self.across(column - 0.5), self.across(column + 0.5)
        upper, lower = self.down(row - 0.5), self.down(row + 0.5)
        box = _box(left + 1, upper + 1, right - left - 2, lower - upper - 2, "#E69F00", opacity=0.08 + 0.8 * share)
        self.parts.append(box)
        for place, text in enumerate(lines):
            y = (upper + lower) / 2 + 4 + 12 * (place - (len(lines) - 1) / 2)
            self.parts.append(_text((left + right) / 2, y, text, anchor="middle", size=10))

    def svg(self) -> str:
        """Return the whole picture."""
        height = self.bottom + (40 if self.x.label else 24)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
                f'font-family="system-ui, sans-serif" font-size="{FONT_SIZE}">',
                f"<title>{escape(self.title)}</title><desc>{escape(self.about)}</desc>",
                *(_text(6, 15 + LINE_HEIGHT * row, text, bold=True) for row, text in enumerate(self.headings)),
                *self._legend(),
                *self._frame(),
                *self.parts,
                "</svg>",
            ]
        )

    def _legend(self) -> list[str]:
        parts = []
        for row, looks in enumerate(self.legend_rows):
            x, y = 10.0, 11 + LINE_HEIGHT * (len(self.headings) + row)
            for look in looks:
                parts.append(_path([(x - 5, y), (x + 9, y)], look.colour, 1.5, dash=look.dash))
                parts.append(_marker(x + 2, y, look, 3.2, "", opacity=1))
                parts.append(_text(x + 13, y + 4, look.label))
                x += _legend_width(look)
        return parts

    def _frame(self) -> list[str]:
        parts = [_box(self.left, self.top, self.right - self.left, self.bottom - self.top, "none", edge="#bbbbbb")]
        if self.strip:
            parts.append(_box(self.left, self.top - 26, self.right - self.left, 26, "#f6e3da", edge="#bbbbbb"))
            parts.append(_text(self.left - 5, self.top - 9, self.strip, anchor="end", size=9))
        parts += self._labels_of_x() + self._labels_of_y()
        return parts

    def _labels_of_x(self) -> list[str]:
        parts, free = [], 0.0
        for value, text in self.x.ticks():
            place, half = self.across(value), 0.3 * FONT_SIZE * len(text)
            parts.append(_path([(place, self.bottom), (place, self.bottom + 4)], FAINT, 1))
            middle = min(place, WIDTH - 3 - half)
            if middle - half > free:
                parts.append(_text(middle, self.bottom + 16, text, anchor="middle"))
                free = middle + half
        half = 0.27 * FONT_SIZE * len(self.x.label)
        middle = max(min((self.left + self.right) / 2, WIDTH - 4 - half), WIDTH / 2 if half > WIDTH / 2 - 4 else 0)
        return [*parts, _text(middle, self.bottom + 32, self.x.label, anchor="middle")]

    def _labels_of_y(self) -> list[str]:
        parts = []
        for value, text in self.y.ticks():
            place = self.down(value)
            if not self.y.names:
                parts.append(_path([(self.left, place), (self.right, place)], "#eeeeee", 1))
            lines = wrapped(text, 20)
            for row, line in enumerate(lines):
                y = place + 4 + 12 * (row - (len(lines) - 1) / 2)
                parts.append(_text(self.left - 6, y, line, anchor="end"))
        if self.y.label:
            middle = (self.top + self.bottom) / 2
            turned = f'transform="rotate(-90 12 {middle:.1f})"'
            parts.append(_text(12, middle, self.y.label, anchor="middle", more=turned))
        return parts


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


def wrapped(text: str, width: int) -> list[str]:
    """Return a text as lines of at most `width` letters, cut between words where it can be."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def _legend_width(look: Look) -> float:
    return 28 + 5.6 * len(look.label)


def _legend_rows(looks: Sequence[Look]) -> list[list[Look]]:
    rows: list[list[Look]] = []
    room = 0.0
    for look in looks:
        if _legend_width(look) > room:
            rows.append([])
            room = WIDTH - 10.0
        rows[-1].append(look)
        room -= _legend_width(look)
    return rows


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: float = 0,
    colour: str = INK,
    bold: bool = False,
    more: str = "",
) -> str:
    style = (f' font-size="{size:g}"' if size else "") + (' font-weight="600"' if bold else "") + (f" {more}" if more else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{style}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, fill: str, *, edge: str = "none", opacity: float = 1) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{fill}" stroke="{edge}" fill-opacity="{opacity:.2f}"/>'


def _path(places: Sequence[tuple[float, float]], colour: str, width: float, *, opacity: float = 1, dash: str = "") -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = f'stroke-width="{width:g}"' + (f' stroke-opacity="{opacity:g}"' if opacity < 1 else "")
    style += f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>'


def _marker(x: float, y: float, look: Look, size: float, tip: str, *, opacity: float) -> str:
    corners = {"square": [(-1, -1), (1, -1), (1, 1), (-1, 1)], "triangle": [(0, -1.2), (1.1, 0.9), (-1.1, 0.9)]}
    corners["diamond"] = [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)]
    filled = f'fill="{look.colour}" stroke="white" stroke-width="0.5" fill-opacity="{opacity:g}"'
    if look.marker in corners:
        points = " ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners[look.marker])
        shape = f'polygon points="{points}" {filled}'
    elif look.marker == "ring":
        shape = f'circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" fill="white" stroke="{look.colour}" stroke-width="1.5"'
    else:
        shape = f'circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" {filled}'
    return f"<{shape}><title>{escape(tip)}</title></{shape.split()[0]}>" if tip else f"<{shape}/>"
