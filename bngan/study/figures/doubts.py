"""What does a doubter want to see? Pairs of equal seed, the same arm again, and what a study of this size can find out."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from bngan.study.decisions import Zone
from bngan.study.endpoints import ENDPOINTS, Kind
from bngan.study.figures.samples import dots
from bngan.study.figures.view import Figure, View, logarithmic, slug
from bngan.study.findings import COLOURS, Findings, number
from bngan.study.panel import Look, Panel
from bngan.study.power import Power, power_table
from bngan.study.spec import AA, Block, Contrast, Result
from bngan.study.verdicts import Verdict

RUNS = (6, 12, 24, 48, 96, 192, 384)
POWERS: tuple[tuple[int, Zone, Look], ...] = (
    (0, "no practical effect", Look("no effect: says so", COLOURS[0], marker="D")),
    (1, "supported", Look("at the margin: supported, an error", COLOURS[1], marker="s", dash="--")),
    (2, "supported", Look("twice the margin: supported", COLOURS[2])),
)


# Pairs of equal seed --------------------------------------------------------------------------------------------------


def pairs(findings: Findings, verdicts: Sequence[Verdict]) -> Figure:
    """Draw, for each claim, its endpoint with the arm against that with the baseline, of the runs of equal seed."""
    panels = [panel for verdict in verdicts if (panel := pairs_panel(findings, verdict))]
    caption = (
        "Each point: two runs of one seed. If seeds mattered for both arms alike, points would lie along a line, and pairs "
        "would tell more than groups; verdicts are of groups."
    )
    return Figure("pairs", "Runs of equal seed", caption, tuple(panels))


def pairs_panel(findings: Findings, verdict: Verdict) -> str:
    """Draw the pairs of a claim's first contrast, a context a colour; nothing where no correlation is defined."""
    contrast = verdict.claim.primary
    found = {context: pairs_of(findings, contrast, context) for context in verdict.claim.contexts}
    correlations = {estimate.context or "": estimate.sensitivity.correlation for estimate in verdict.estimates}
    told = [number(correlations.get(context)) for context in found]
    if ENDPOINTS[contrast.endpoint].kind == "rate" or contrast.baseline is None or not all(found.values()) or not any(told):
        return ""
    looks = [
        Look(f"{context}, r {r or 'undefined'}", COLOURS[place % len(COLOURS)], dash="none")
        for place, (context, r) in enumerate(zip(found, told, strict=True))
    ]
    title = f"Claim {verdict.claim.name}: {ENDPOINTS[contrast.endpoint].words}"
    x, y = (findings.looks[arm].label for arm in (contrast.baseline, contrast.arm))
    log = "xy" if logarithmic(contrast.endpoint) else ""
    panel = Panel(title, f"{y} against {x}, seed by seed.", x=x, y=y, log=log, looks=looks)
    for look, points in zip(looks, found.values(), strict=True):
        panel.points([x for x, _ in points], [y for _, y in points], look)
    return panel.svg()


def pairs_of(findings: Findings, contrast: Contrast, context: str) -> list[tuple[float, float]]:
    """Return (baseline, arm) of all runs that differ in nothing else."""
    of = ENDPOINTS[contrast.endpoint].of
    points = []
    for block in contrast.blocks:
        arms = [findings.runs(block, context, arm) for arm in (contrast.baseline, contrast.arm) if arm is not None]
        values = [{key_of(result): of(result) for result in runs} for runs in arms]
        points += [(base, values[-1][key]) for key, base in values[0].items() if key in values[-1]]
    return points


def key_of(result: Result) -> tuple[int, str]:
    """Return what two runs of a pair have in common: the seed and, where nothing was chosen, the values of the axes."""
    return result.run.seed, repr(result.run.axes) if result.run.role == "pilot" else ""


# The same again -------------------------------------------------------------------------------------------------------


def again(findings: Findings) -> list[Figure]:
    """Return for each block with an arm that was trained again both beside each other: they may differ by chance alone."""
    return [again_in(findings, block) for block in findings.study.blocks if block.aa]


def again_in(findings: Findings, block: Block) -> Figure:
    """Draw the quality of an arm and of itself again, with the margin that a claim has for it around the first."""
    endpoint = "fid" if block.task == "digits" else "modes_share"
    contrasts = [contrast for claim in findings.study.claims for contrast in claim.contrasts]
    margins = [contrast.margin for contrast in contrasts if contrast.endpoint == endpoint]
    panels: list[str] = []
    for context, arm in block.aa.items():
        contrast = Contrast(AA, arm, (block.name,), endpoint, min(margins, default=1.25 if endpoint == "fid" else 0.05), "less")
        view = View(f"again-{slug(block.name)}", (contrast,), (block.name,), (context,), (arm, AA))
        panels += dots(findings, view).panels
    caption = "One arm, twice, with seeds of their own. Shaded: what would be too small a difference to matter."
    return Figure(f"again-{slug(block.name)}", f"The same arm again (A/A), block {block.name}", caption, tuple(panels))


# Power ----------------------------------------------------------------------------------------------------------------


def power_curves(asked: Mapping[tuple[Kind, float], Sequence[int]]) -> Figure:
    """Draw how often studies come to a verdict against runs of an arm, for each kind of contrast and spread of runs.

    Args:
        asked: kinds and margins, with the numbers of runs that this study has.
    """
    panels = [panel for (kind, margin), runs in asked.items() for panel in power_panels(kind, margin, runs)]
    caption = (
        "Share of simulated studies with a known truth. At the margin, supported is an error, at most 2.5% of the time. "
        "Vertical: runs that this study has."
    )
    return Figure("power", "What more runs would find out", caption, tuple(panels))


def power_panels(kind: Kind, margin: float, here: Sequence[int]) -> Iterator[str]:
    """Yield a panel for each spread of runs."""
    powers = powers_of(kind, margin)
    for spread in dict.fromkeys(power.spread for power in powers):
        said = "" if kind == "rate" else f", sd of runs {number(spread)}"
        own = [power for power in powers if power.spread == spread]
        yield power_panel(f"{kind.capitalize()}, margin {number(margin)}{said}", own, here)


@cache
def powers_of(kind: Kind, margin: float) -> list[Power]:
    """Return the powers of studies of all sizes, which take a second."""
    return power_table(kind, margin, runs=RUNS)


def power_panel(title: str, powers: Sequence[Power], here: Sequence[int]) -> str:
    """Draw how often each truth is told, against runs of an arm."""
    effects = sorted({power.effect for power in powers})
    panel = Panel(title, title, x="runs of an arm", y="share of studies", log="x", looks=[look for _, _, look in POWERS])
    panel.axes.set(xlim=(RUNS[0], RUNS[-1]), ylim=(0, 1.02))
    panel.axes.set_xticks(RUNS, [f"{n}" for n in RUNS])
    for place, zone, look in POWERS:
        line = [(power.n, power.shares[zone]) for power in powers if power.effect == effects[place]]
        panel.axes.plot(*zip(*line, strict=True), **look.line | look.points)
    panel.rules("x", {f"n {n}": n for n in here})
    return panel.svg()
