"""docs/performance.md and its chart, from what scripts/benchmark.py recorded; and the tables that it prints."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

TRIED_START, TRIED_END = "<!-- what was tried: written by hand, kept by the script -->", "<!-- end -->"
Seen = dict[str, Any]
Table = list[list[str]]


def rows_table(result: Seen) -> Table:
    titles = list(dict.fromkeys(title for row in result["rows"].values() for title in row))
    body = [[side, *(cell(row.get(title, "")) for title in titles)] for side, row in result["rows"].items()]
    return [["", *titles], *body]


def goals_table(result: Seen) -> Table:
    body = [
        [name, cell(value), value.get("goal", "none"), {True: "yes", False: "no", None: ""}[value.get("met")]]
        for name, value in result["goals"].items()
    ]
    return [["", "measured", "goal", "met"], *body]


def cell(value: Seen | str) -> str:
    if isinstance(value, str):
        return value
    if len(value["all"]) == 1:
        return figure(value["median"])
    return f"{figure(value['median'])} ({figure(value['least'])} to {figure(value['most'])})"


def figure(value: float | None) -> str:
    if value is None:
        return "never"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def text_table(table: Table) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in table]


def markdown_table(table: Table) -> list[str]:
    head, *body = ([text.replace("|", "\\|") for text in row] for row in table)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def conditions(result: Seen) -> str:
    """Say in a line where and how it was measured."""
    settings = {name: value for name, value in result["settings"].items() if value is not None}
    cores = f"{result['machine']['cores']} cores of {result['machine']['cpu']}"
    where = result["gpu"] if settings.pop("device") == "cuda" else cores
    how = ", ".join(
        f"{name.replace('_', '-')} {figure(value) if isinstance(value, float) else value}" for name, value in settings.items()
    )
    software = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if name != "bngan")
    commit = result["git"]
    source = "no commit" if commit is None else f"commit {commit[:10]}{commit[40:]}"
    return f"{where}; {how}; {software}; {source}; {result['time'][:10]}"


HEADINGS = {
    "step": "Images per second",
    "fit": "The whole command",
    "startup": "From the command to the first alternation",
    "memory": "Memory",
    "quality": "Time to quality",
    "scaling": "Two processes against one",
    "scaling images": "A thousand to a million images",
    "scaling folder": "A folder of colour pictures",
}
NOTES = {
    "step": "From the end of the warm-up to the end of training, with the last pictures and checkpoint; and to the last "
    "alternation. No validation falls into it. *fit, 1* has one alternation in each step of the Trainer, where *fit* chooses.",
    "fit": "From the shell to the end. The bare script ends by saving G and measures nothing; `fit` works the floor out in "
    "each run.",
    "startup": "With the data in place and files in the system's cache.",
    "memory": "The most that the process held at once. torchmetrics imports scipy and torch-fidelity where they are installed, "
    "which takes more; only the tests need them, and the line below says whether they were there.",
    "quality": "From the command to the end of the first validation at that FID. There is one after each epoch, and its time "
    "is counted, since a person waits for it too. Runs that never get there count as never in the median. Where recipes end "
    "that were not timed is in [recipes.md](recipes.md).",
    "scaling": "One thread for each process, batch norm over both ranks together. *8 a step* is "
    "`--data.alternations_per_step 8`.",
    "scaling images": "Noise, 28 x 28, in memory; as many alternations for each size, with the checkpoints of their epochs.",
    "scaling folder": "64 x 64 JPEGs, `configs/pictures.yaml`. Reading all into memory comes before the first alternation.",
}
UNMEASURED = (
    "Not measured: there was no GPU. `--device cuda` runs the same sides there, the bare one as a CUDA graph, and records them "
    "under the card's name. To be reached: `fit` at 0.8 of the bare loop and 10 times the textbook's; 20 times the floor "
    "within 10 s by the default recipe, 3 times the floor within 60 s by DCGAN's."
)


def write_page(results: Mapping[str, Seen], page: Path) -> None:
    """Write the page, and beside it one chart; what stands between the page's markers stays."""
    chart = page.with_suffix(".svg")
    before = page.read_text() if page.is_file() else ""
    _, _, rest = before.partition(TRIED_START)
    tried = rest.partition(TRIED_END)[0].strip() or "See [log.md](log.md)."
    lines = [
        "# Performance, measured",
        "",
        f"Written by `python scripts/benchmark.py report` from `{page.stem}.json`; only the last section is written by hand.",
        "",
        "`fit` is the command as a person runs it, every callback on. `bare` (`scripts/bare_gan.py`) is the same recipe",
        "without a framework, written for speed. `textbook` (`scripts/textbook_gan.py`) is a GAN in Lightning as tutorials",
        "write it, of the same networks. `limit` (`scripts/roofline.py`) is the recipe's arithmetic over this machine's",
        "measured rates. Each run is a process of its own and the sides take turns. Figures are medians (least to most),",
        "ratios are taken within a round.",
        "",
    ]
    order = list(HEADINGS)
    for key in sorted(results, key=lambda key: (order.index(_section(key)), key)):
        name, card = _section(key), key.partition(" on ")[2]
        result = results[key]
        recipes = f": {', '.join(result['rows'])}" if name == "quality" else ""
        lines += [f"## {HEADINGS[name]}{recipes}{f', {card}' if card else ''}", "", NOTES[name], ""]
        if key == "step":
            chart.write_text(bar_chart("Training speed, batch 128", "images/s", result["rows"], "images/s"))
            lines += [f"![images per second of each side]({chart.name})", ""]
        lines += [*markdown_table(rows_table(result)), ""]
        if "roofline" in result:
            lines += [roofline_text(result["roofline"]), ""]
        if result["goals"]:
            lines += [*markdown_table(goals_table(result)), ""]
        lines += [f"`{result['command']}`: {conditions(result)}.", ""]
    if all(result["settings"]["device"] == "cpu" for result in results.values()):
        lines += ["## On a GPU", "", UNMEASURED, ""]
    lines += ["## What was tried", "", TRIED_START, "", tried, "", TRIED_END, ""]
    page.write_text("\n".join(lines))


def _section(key: str) -> str:
    """Return which heading a result belongs under: those of quality may be of some recipes, and any may be of a GPU."""
    name = key.partition(" on ")[0]
    return "quality" if name.startswith("quality") else name


def roofline_text(seen: Seen) -> str:
    return (
        f"The limit: one alternation takes {seen['flops'] / 1e6:,.0f} million floating-point operations in matrix products "
        f"and has to move {seen['bytes'] / 1e6:.1f} MB. Its products by themselves run at {seen['own_gflops_per_s']:.0f} "
        f"billion operations/s, large ones at {seen['large_gflops_per_s']:.0f}; copies at "
        f"{seen['cached_copy_gb_per_s']:.0f} GB/s in the caches and {seen['large_copy_gb_per_s']:.0f} beyond. At the best "
        f"rates that is {seen['arithmetic_ms']:.2f} ms of arithmetic and {seen['traffic_ms']:.2f} ms of traffic. The recipe's "
        f"random numbers, which are not in the limit, take {seen['random_ms']:.2f} ms more."
    )


def bar_chart(title: str, unit: str, rows: Mapping[str, Seen], column: str) -> str:
    """Return an SVG of one horizontal bar per row, with a line from least to most; told apart by lightness as well as hue."""
    values = {side: row[column] for side, row in rows.items() if column in row}
    top = max(value["most"] for value in values.values())
    tick = 10 ** math.floor(math.log10(top))
    tick = next(part for part in (tick / 5, tick / 2, tick, 2 * tick) if top / part <= 8)
    end = tick * math.ceil(top / tick)
    left, width, height, gap = 90, 460, 26, 44
    foot = 46 + gap * len(values)

    def x(value: float) -> float:
        return round(left + width * value / end, 1)

    frame = f'width="640" height="{foot + 52}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {frame} viewBox="0 0 640 {foot + 52}" role="img"',
        '     font-family="sans-serif" font-size="13">',
        f"<title>{escape(title)}</title>",
        f'<rect {frame} fill="white"/>',
        f'<text x="{left}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for number in range(round(end / tick) + 1):
        at = x(number * tick)
        parts.append(f'<line x1="{at}" y1="38" x2="{at}" y2="{foot}" stroke="#cccccc"/>')
        parts.append(f'<text x="{at}" y="{foot + 18}" text-anchor="middle">{figure(number * tick)}</text>')
    for number, (side, value) in enumerate(values.items()):
        y, colour = 46 + gap * number, "#0072b2" if side == "fit" else "#bbbbbb"
        middle, least, median, most = y + height / 2, x(value["least"]), x(value["median"]), x(value["most"])
        parts += [
            f'<text x="{left - 8}" y="{middle + 4}" text-anchor="end">{escape(side)}</text>',
            f'<rect x="{left}" y="{y}" width="{median - left:.1f}" height="{height}" fill="{colour}" stroke="black"/>',
            f'<line x1="{least}" y1="{middle}" x2="{most}" y2="{middle}" stroke="black" stroke-width="2"/>',
            f'<text x="{most + 6}" y="{middle + 4}">{figure(value["median"])}</text>',
        ]
    axis = f"{unit}; bar: median, line: least to most"
    parts.append(f'<text x="{left + width / 2}" y="{foot + 42}" text-anchor="middle">{escape(axis)}</text>')
    return "\n".join([*parts, "</svg>", ""])
