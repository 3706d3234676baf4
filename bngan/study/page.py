"""How do headings, texts, tables, figures and pictures become one HTML file, or Markdown with files beside it?"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bngan.study.figures.overview import VERDICTS
from bngan.study.figures.view import Figure


@dataclass(frozen=True)
class Heading:
    """A heading, level 1 to 3, perhaps with a verdict's word beside it."""

    level: int
    text: str
    badge: str = ""

    @property
    def anchor(self) -> str:
        """What a link to it ends with."""
        return "-".join("".join(letter if letter.isalnum() else " " for letter in self.text.lower()).split())[:60]


@dataclass(frozen=True)
class Table:
    """Rows of texts under a head; the first column is what a row is about."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Code:
    """Text that stands as it is; with a title it is folded away."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG of samples, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Pictures beside each other."""

    pictures: Sequence[Picture]


Part = str | Heading | Table | Code | Figure | Pictures


def as_html(title: str, parts: Iterable[Part]) -> str:
    """Return a page that needs nothing else: no network, no script; all text is escaped."""
    parts = list(parts)
    links = [part for part in parts if isinstance(part, Heading) and part.level == 2]
    contents = "".join(f'<a href="#{part.anchor}">{escape(part.text.partition(":")[0])}</a>' for part in links)
    shown = "\n".join(map(_html, parts))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n<nav>{contents}</nav>\n{shown}\n</main>\n</body>\n</html>\n"
    )


def _html(part: Part) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, Heading):
        style = f'class="badge" style="background:{VERDICTS[part.badge]}"' if part.badge else ""
        badge = f" <span {style}>{escape(part.badge)}</span>" if part.badge else ""
        return f'<h{part.level} id="{part.anchor}">{escape(part.text)}{badge}</h{part.level}>'
    if isinstance(part, Table):
        return _html_table(part)
    if isinstance(part, Code):
        block = f"<pre>{escape(part.text)}</pre>"
        return f"<details><summary>{escape(part.title)}</summary>{block}</details>" if part.title else block
    if isinstance(part, Figure):
        panels = "".join(f'<div class="panel">{panel}</div>' for panel in part.panels)
        kind = "panels wide" if part.wide else "panels"
        caption = f"<b>{escape(part.title)}.</b> {escape(part.caption)}"
        return f'<figure id="{part.name}"><figcaption>{caption}</figcaption><div class="{kind}">{panels}</div></figure>'
    shown = "".join(
        f'<figure class="strip"><img src="{_data_uri(picture.path)}" alt="{escape(picture.caption)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in part.pictures
    )
    return f'<div class="strips">{shown}</div>'


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    names = [f'<td data-name="{escape(name)}">' for name in table.head]
    cells = [[f"{name}{escape(cell)}</td>" for name, cell in zip(names, row, strict=True)] for row in table.rows]
    rows = "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>{note}"


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def as_markdown(parts: Iterable[Part], folder: Path) -> str:
    """Return the same as Markdown; figures go to folder/figures, pictures stay where they are in the folder."""
    return "\n\n".join(text for part in parts if (text := _markdown(part, folder))) + "\n"


def _markdown(part: Part, folder: Path) -> str:
    if isinstance(part, str):
        return _plain(part)
    if isinstance(part, Heading):
        return f"{'#' * part.level} {_plain(part.text)}" + (f" ({part.badge})" if part.badge else "")
    if isinstance(part, Table):
        return markdown_table(part)
    if isinstance(part, Code):
        return "\n".join(filter(None, [part.title and f"{part.title}:\n", *(f"    {line}" for line in part.text.splitlines())]))
    if isinstance(part, Figure):
        return _markdown_figure(part, folder)
    return "\n".join(
        f"![{_plain(picture.caption)}]({picture.path.relative_to(folder).as_posix()}) {_plain(picture.caption)}\n"
        for picture in part.pictures
    )


def _markdown_figure(figure: Figure, folder: Path) -> str:
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    links = []
    for place, panel in enumerate(figure.panels, start=1):
        name = f"{figure.name}-{place}.svg"
        (folder / "figures" / name).write_text(panel + "\n", encoding="utf-8")
        links.append(f"![{_plain(figure.title)}, {place}](figures/{name})")
    return "\n".join([f"**{_plain(figure.title)}.** {_plain(figure.caption)}", "", *links])


def markdown_table(table: Table) -> str:
    """Return a table as Markdown."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    text = "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)
    return f"{text}\n\n{_plain(table.note)}" if table.note else text


def _plain(text: str) -> str:
    """Return a text in which Markdown finds nothing of its own."""
    marks = {mark: f"\\{mark}" for mark in "\\`*_[]<>|#"}
    return " ".join(text.split()).translate(str.maketrans(marks))


STYLE = """
:root { color-scheme: light; --ink: #222; --faint: #6a6a6a; --edge: #dcdcdc; --paper: #fff; --shade: #f5f7f9; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
main { max-width: 1120px; margin: 0 auto; padding: 16px; }
h1 { font-size: clamp(1.5rem, 4vw, 2.3rem); line-height: 1.2; margin: 0.5em 0 0.3em; }
h2 { font-size: clamp(1.2rem, 3vw, 1.6rem); line-height: 1.3;
  margin: 2em 0 0.5em; padding-top: 0.7em; border-top: 2px solid var(--edge); }
h3 { font-size: 1.05rem; margin: 1.6em 0 0.4em; }
p { max-width: 75ch; margin: 0.6em 0; }
h1 + p, h2 + p { font-size: 1.1rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 8px; font-size: 0.85rem; margin: 1em 0; }
nav a { color: #0072B2; text-decoration: none; padding: 2px 10px; border: 1px solid var(--edge); border-radius: 12px; }
.badge { color: #fff; font-size: 0.75em; font-weight: 600;
  padding: 0.1em 0.6em; border-radius: 0.3em; white-space: nowrap; }
figure { margin: 1.2em 0; }
figcaption { font-size: 0.9rem; color: var(--faint); max-width: 75ch; margin-bottom: 0.6em; }
figcaption b { color: var(--ink); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr));
  gap: 12px; align-items: start; }
.panels.wide { grid-template-columns: minmax(0, 480px); }
.panel { border: 1px solid var(--edge); border-radius: 6px; padding: 4px; break-inside: avoid; }
.panel svg { display: block; width: 100%; height: auto; }
.strips { display: grid; grid-template-columns: repeat(3, 1fr); gap: 10px; }
.strip { margin: 0; break-inside: avoid; }
.strip img { display: block; width: 100%; image-rendering: pixelated; }
.strip figcaption { margin: 2px 0 6px; font-size: 0.8rem; }
table { border-collapse: collapse; width: 100%;
  font-size: 0.9rem; margin: 0.8em 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--edge); }
th { font-size: 0.8rem; color: var(--faint); font-weight: 600; }
.note { font-size: 0.85rem; color: var(--faint); }
pre { background: var(--shade); padding: 10px; font-size: 0.8rem;
  line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 6px; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 640px) {
  main { padding: 10px; }
  .strips { grid-template-columns: 1fr; }
  table, tbody, tr, td { display: block; }
  thead { display: none; }
  tr { border: 1px solid var(--edge); border-radius: 6px; margin-bottom: 8px; padding: 6px 10px; }
  td { display: grid; grid-template-columns: 40% 60%; border: none; padding: 2px 0; }
  td::before { content: attr(data-name); color: var(--faint); font-size: 0.8rem; padding-right: 8px; }
  td:empty { display: none; }
  td:first-child { font-weight: 600; }
}
@media print {
  @page { margin: 14mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  tr, .strip { break-inside: avoid; }
  .panels { grid-template-columns: repeat(2, 1fr); }
  .badge { color: #000; background: none !important; border: 1.5px solid #000; }
  table { font-size: 8pt; }
}
"""
