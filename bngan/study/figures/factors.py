"""Does it depend on loss, noise and D's norm? A matrix for claim 7, and interactions of all factors that a block has."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

from bngan.errors import UsageError
from bngan.settings import Settings, check_settings
from bngan.study.endpoints import badness
from bngan.study.figures.view import Figure, View
from bngan.study.findings import COLOURS, DASHES, WORDS, Findings, d_kind, failed_of, last, number, quality
from bngan.study.panel import Look, Panel
from bngan.study.spec import Block, Result, Run

Reading = Callable[[Sequence[Result]], float]
SWITCH = "allow_batch_coupled_penalty"  # which studies alone set
BY_D = ("d_norm", "batching")  # settings that make the kind of D's norm


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
                if is_refused(results[0].run):
                    panel.hatch(column, row)
        panels.append(panel.svg(height=36 * len(arms)))
    caption = (
        "Each place: failed runs of all, and the median of what was reached; the darker, the more runs failed. "
        "Hatched: bngan fit refuses it, for a penalty is of single images, and this D looks at whole batches; a study may."
    )
    return Figure(f"{view.name}-matrix", "In every context", caption, tuple(panels))


def draw_cell(panel: Panel, column: int, row: int, results: Sequence[Result]) -> None:
    """Fill a place of the matrix: the more runs failed, the darker."""
    lost, key = failed_of(results), quality(results)
    panel.axes.bar(column, height=0.94, bottom=row - 0.47, width=0.96, color="#E69F00", alpha=0.08 + 0.8 * lost / len(results))
    found = [value for result in results if math.isfinite(value := last(result, key))]
    middle = f"\n{WORDS[key].partition(' ')[0]} {number(median(found))}" if found else ""
    panel.write(f"{lost} of {len(results)}{middle}", (column, row), ("data", "data"), ha="center")


def is_refused(run: Run) -> bool:
    """Whether `fit` refuses a run's settings, without the switch that lets a study try them."""
    given: dict[str, Any] = {name: value for name, value in run.settings.items() if name != SWITCH}
    try:
        check_settings(Settings(**given))
    except UsageError:
        return True
    return False


# Interactions ---------------------------------------------------------------------------------------------------------


def interactions(findings: Findings) -> Figure:
    """Draw failures and quality by D's norm, a context a line, of all arms that differ in nothing else."""
    panels = [panel for block in findings.study.blocks for panel in interaction_panels(findings, block)]
    caption = (
        "Lines: contexts, which differ in loss and noise. Where they are parallel, what D's norm does depends on neither. "
        "Failed runs count in both. Verdicts on what depends stand with the claims; here nothing is tested."
    )
    return Figure("interactions", "D's norm, loss and noise together", caption, tuple(panels))


def interaction_panels(findings: Findings, block: Block) -> Iterator[str]:
    """Yield two panels for each group of arms of a block that has several kinds of D in several contexts."""
    for label, arms in groups_of(findings, block).items():
        contexts = [context for context, named in block.arms.items() if len(arms.keys() & set(named)) > 1]
        if len(contexts) > 1:
            cells = {
                context: {arms[arm]: findings.runs(block.name, context, arm) for arm in block.arms[context] if arm in arms}
                for context in contexts
            }
            yield interaction_panel(f"Block {block.name}, {label}: failed runs", "share of failed runs", cells, failing)
            digits = block.task == "digits"
            words = "FID, median" if digits else "share of modes missed, median"
            yield interaction_panel(f"Block {block.name}, {label}: {words}", words, cells, typical, log="y" if digits else "")


def groups_of(findings: Findings, block: Block) -> dict[str, dict[str, str]]:
    """Return the arms of a block that differ in D's norm alone, each with its kind, by what the group is called."""
    groups: dict[str, dict[str, str]] = {}
    for arm in dict.fromkeys(arm for arms in block.arms.values() for arm in arms):
        settings = findings.study.arms[arm].settings
        rest = ", ".join(f"{name} {value}" for name, value in sorted(settings.items()) if name not in BY_D)
        groups.setdefault(rest or "the default otherwise", {})[arm] = d_kind(findings.study.settings | settings)
    return groups


def interaction_panel(
    title: str, words: str, cells: Mapping[str, Mapping[str, Sequence[Result]]], of: Reading, log: str = ""
) -> str:
    """Draw a number of each cell against D's kind, a context a line."""
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    looks = [
        Look(context, COLOURS[place % len(COLOURS)], dash=DASHES[place % len(DASHES)]) for place, context in enumerate(cells)
    ]
    panel = Panel(title, f"{words} by D's norm and context.", x="norm in D", y=words, log=log, looks=looks)
    panel.columns(kinds)
    for look, row in zip(looks, cells.values(), strict=True):
        places = sorted((kinds.index(kind), of(results)) for kind, results in row.items() if results)
        panel.axes.plot(*zip(*places, strict=True), **look.line | look.points)
    return panel.svg()


def failing(results: Sequence[Result]) -> float:
    """Return the share of runs that failed."""
    return failed_of(results) / len(results)


def typical(results: Sequence[Result]) -> float:
    """Return the median of what tells how bad runs are, failed ones at the worst."""
    return median(badness(result) for result in results)
