"""What does a study's report say? Verdicts first, then for each claim what they rest on, then all that a doubter asks for."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from bngan.files import write_whole
from bngan.study.doubts import COMMAND, block_text, doubts, settings_text, strips
from bngan.study.endpoints import ENDPOINTS
from bngan.study.figures import figures_of_claim
from bngan.study.figures.networks import CURVES
from bngan.study.figures.overview import forest
from bngan.study.findings import Findings, effect_text, failed_of, interval_of_median, number, span
from bngan.study.pace import MILLISECONDS
from bngan.study.page import Code, Heading, Part, Pictures, Table, as_html, as_markdown, markdown_table
from bngan.study.record import REFERENCES
from bngan.study.spec import Claim, Result, Study
from bngan.study.statistics import clopper_pearson
from bngan.study.verdicts import Estimate, Verdict, judge

RULES = {
    "beyond": "Supported if the whole 95% interval lies beyond the margin in the claim's direction; contradicted if "
    "beyond it in the other; no practical effect if the whole 90% interval lies within the margins (two one-sided tests); "
    "else inconclusive.",
    "within": "Supported if the whole interval lies within the margins; contradicted if it lies beyond one of them; else "
    "inconclusive.",
    "not_worse": "Supported if in no context the arm is worse by the margin (intersection-union, no correction); "
    "contradicted if in any context it is (Holm); else inconclusive.",
}
ADJUSTED = (
    "Supported and contradicted are adjusted for the number of claims (Holm). Conditional and no practical effect are not: "
    "each is judged by its own claim's intervals alone, so of many claims some may be called so by chance; and conditional "
    "stands whatever Holm's adjustment says."
)
CROSS_FITTED = (
    "Half of the seeds choose the values of the axes for the other half; the interval's ends are those of the arm at the "
    "chosen values against the baseline at the best of the values tried here, and of the arm at the best of these against the "
    "baseline at the chosen ones. "
)


def write_report(study: Study, results: Sequence[Result], folder: Path) -> Path:
    """Write report.html, one file that needs nothing else, and report.md with folder/figures; same results, same bytes.

    Args:
        study: the study.
        results: of all its runs.
        folder: of the study, in which samples of runs may lie.

    Returns:
        The path of report.html.
    """
    order = {block.name: place for place, block in enumerate(study.blocks)}
    inorder = sorted(results, key=lambda result: (order[result.run.block], result.run.role, result.run.id))
    findings = Findings(study, inorder, read_json(folder / REFERENCES), read_json(folder / MILLISECONDS))
    parts = list(report(findings, judge(study, inorder), folder))
    write_whole(folder / "report.md", as_markdown(parts, folder).encode())
    page = folder / "report.html"
    write_whole(page, as_html(study.title, parts).encode())
    return page


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file holds, nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def report(findings: Findings, verdicts: Sequence[Verdict], folder: Path) -> Iterator[Part]:
    """Yield all parts of the report."""
    study = findings.study
    yield Heading(1, study.title)
    yield summary(findings, verdicts)
    yield f"Contexts: {'; '.join(f'{name}: {settings_text(settings)}' for name, settings in study.contexts.items())}."
    yield Heading(2, "Verdicts")
    yield forest(verdicts)
    yield claims(verdicts)
    yield ADJUSTED
    for verdict in verdicts:
        yield from claim_section(findings, verdict, folder)
    yield from doubts(findings, verdicts, folder)


def summary(findings: Findings, verdicts: Sequence[Verdict]) -> str:
    """Return in a few sentences what was done and what came out."""
    words = Counter(verdict.word for verdict in verdicts)
    lost = failed_of(findings.results)
    blocks = findings.study.blocks
    lengths = " to ".join(
        f"{length:,}" for length in sorted({min(b.iterations for b in blocks), max(b.iterations for b in blocks)})
    )
    return (
        f"{len(verdicts)} claim{'' if len(verdicts) == 1 else 's'}: "
        f"{', '.join(f'{count} {word}' for word, count in words.items())}. "
        f"{len(findings.results):,} runs of {lengths} iterations on "
        f"{', '.join(dict.fromkeys(block.task for block in blocks))}; {lost:,} of them failed, and count."
    )


# Claims ---------------------------------------------------------------------------------------------------------------


def claims(verdicts: Sequence[Verdict]) -> Table:
    """Return the table of all claims."""
    rows = [
        [
            f"{verdict.claim.name}. {verdict.claim.statement}",
            ", ".join(verdict.claim.contexts),
            verdict.word,
            effect_text(verdict.estimates[-1]),
            runs_text(verdict.estimates[-1]),
        ]
        for verdict in verdicts
    ]
    note = "Effects are those of all contexts together: x is a ratio, + or - a difference. n: runs of arm:baseline."
    return Table(["claim", "contexts", "verdict", "effect (95% interval)", "n"], rows, note)


def claims_table(verdicts: Sequence[Verdict]) -> str:
    """Return the claims as a Markdown table: claim, contexts, verdict, effect with its interval, n."""
    return markdown_table(claims(verdicts))


def runs_text(estimate: Estimate) -> str:
    """Return the numbers of runs of arm and baseline as text."""
    return f"{estimate.n[0]}:{estimate.n[1]}" if estimate.contrast.baseline else f"{estimate.n[0]}"


def claim_section(findings: Findings, verdict: Verdict, folder: Path) -> Iterator[Part]:
    """Yield what stands of a claim: verdict, figures, numbers, protocol, and how to overturn it."""
    claim = verdict.claim
    yield Heading(2, f"Claim {claim.name}: {claim.statement}", badge=verdict.word)
    yield verdict.sentence
    yield from figures_of_claim(findings, verdict)
    yield from pictures_of_claim(findings, claim, folder)
    yield Heading(3, f"Claim {claim.name}: effects")
    yield estimates_table(findings, verdict)
    yield from sensitivity_table(findings, verdict)
    yield Heading(3, f"Claim {claim.name}: every arm")
    yield from arms_tables(findings, claim)
    yield Heading(3, f"Claim {claim.name}: protocol, and what would change the verdict")
    yield protocol(findings, claim)
    yield verdict.would_change
    yield Code(COMMAND)


def pictures_of_claim(findings: Findings, claim: Claim, folder: Path) -> Iterator[Part]:
    """Yield samples of a claim about what D does not see, arm beside arm: G need not mend it."""
    blocks = dict.fromkeys(block for contrast in claim.contrasts if contrast.endpoint in CURVES for block in contrast.blocks)
    cells = product(blocks, claim.contexts, findings.arms_of(claim.contrasts))
    if shown := [strip for cell in cells for strip in strips(findings, folder, *cell, which=["median"])]:
        yield "What G drew in the median run of each arm: what D does not see, such as a frame on all fakes, G need not mend."
        yield Pictures(shown)


def estimates_table(findings: Findings, verdict: Verdict) -> Table:
    """Return every contrast in every context; those that decide nothing say so."""
    rows = [
        [
            f"{findings.contrast_text(estimate.contrast)}, {estimate.context or 'all together'}",
            role,
            ENDPOINTS[estimate.contrast.endpoint].words,
            effect_text(estimate),
            span(estimate.interval90),
            number(estimate.contrast.margin),
            runs_text(estimate),
            number(estimate.p),
            f"{estimate.zone}{needed_text(estimate)}",
        ]
        for role, estimate in estimates_of(verdict)
    ]
    notes = [f"p of all that decides, adjusted for the number of claims (Holm): {number(verdict.p_holm)}."]
    if verdict.interaction:
        notes.append(f"How much the contexts differ (interaction), 95% interval: {span(verdict.interaction)}.")
    head = ["contrast", "role", "endpoint", "effect (95%)", "90%", "margin", "n", "p", "zone"]
    return Table(head, rows, " ".join(notes))


def needed_text(estimate: Estimate) -> str:
    """Return how many runs would settle an estimate, where more would."""
    where = "" if estimate.context else " in all contexts"
    return f" (about {estimate.needed:,} runs an arm needed{where})" if estimate.needed else ""


def estimates_of(verdict: Verdict) -> Iterator[tuple[str, Estimate]]:
    """Yield a verdict's estimates, each with its role."""
    roles = ("decides", verdict.estimates), ("must hold too", verdict.also), ("control", verdict.controls)
    for role, estimates in (*roles, ("descriptive", verdict.secondary)):
        for estimate in estimates:
            yield role, estimate


def sensitivity_table(findings: Findings, verdict: Verdict) -> Iterator[Table]:
    """Yield, of contrasts with a baseline, what ranks and pairs of equal seed say; they decide nothing."""
    rows = []
    for _, estimate in estimates_of(verdict):
        found = estimate.sensitivity
        if found.superiority is not None:
            ends = f" ({span(found.superiority95)})" if found.superiority95 else ""
            rows.append(
                [
                    f"{findings.contrast_text(estimate.contrast)}, {estimate.context or 'all together'}",
                    ENDPOINTS[estimate.contrast.endpoint].words,
                    f"{number(found.superiority)}{ends}",
                    number(found.rank_p),
                    number(found.correlation),
                    span(found.paired95),
                ]
            )
    note = (
        "Descriptive: by ranks, with failures worst (Brunner and Munzel 2000; Mann and Whitney 1947), and by pairs of "
        "equal seed. P is the probability that a run of the arm and one of the baseline are as claimed. No interval is given "
        "where runs leave no spread to judge by."
    )
    head = ["contrast", "endpoint", "P(as claimed) (95%)", "p of ranks", "correlation of pairs", "paired 95%"]
    if rows:
        yield Table(head, rows, note)


def arms_tables(findings: Findings, claim: Claim) -> Iterator[Table]:
    """Yield a table for each endpoint and block of a claim: n, failures, median, spread of every arm."""
    asked = dict.fromkeys((contrast.endpoint, block) for contrast in claim.contrasts for block in contrast.blocks)
    for endpoint, block in asked:
        arms = findings.arms_of([contrast for contrast in claim.contrasts if contrast.endpoint == endpoint])
        rows = [
            arm_row(findings, endpoint, context, arm, runs)
            for context, arm in product(claim.contexts, arms)
            if (runs := findings.runs(block, context, arm))
        ]
        lines = ", ".join(f"{name} {number(value)}" for name, value in findings.known(block, endpoint).items())
        note = f"Block {block}: {ENDPOINTS[endpoint].words}." + (f" Floor and controls: {lines}." if lines else "")
        if any(other.neighbours for other in findings.study.blocks if other.name == block):
            note += " These are the runs at the values that pilots chose; cross-fitted contrasts read those beside them, too."
        if rows:
            yield Table(["arm", "n", "failed (95%)", "mean", "median (95%)", "sd", "least to most"], rows, note)


def arm_row(findings: Findings, endpoint: str, context: str, arm: str, runs: Sequence[Result]) -> list[str]:
    """Return what the runs of an arm did in an endpoint."""
    values = [ENDPOINTS[endpoint].of(result) for result in runs]
    lost = failed_of(runs)
    low, high = clopper_pearson(lost, len(runs))
    row = [
        f"{findings.looks[arm].label} ({arm}), {context}",
        f"{len(values)}",
        f"{lost} ({low:.0%} to {high:.0%})",
        number(fmean(values)),
    ]
    if ENDPOINTS[endpoint].kind == "rate":  # of yes and no there is no more to tell
        return [*row, "", "", ""]
    ends = interval_of_median(values)
    return [
        *row,
        number(median(values)) + (f" ({span(ends)})" if ends else ""),
        number(stdev(values)) if len(values) > 1 else "",
        span((min(values), max(values))),
    ]


def protocol(findings: Findings, claim: Claim) -> str:
    """Return how a claim was tested, in sentences."""
    contrast = claim.primary
    blocks = [block for block in findings.study.blocks if block.name in contrast.blocks]
    said = "; ".join(f"block {block.name}: {block_text(block)}" for block in blocks)
    at_once = f" Intervals are simultaneous over the contexts {', '.join(claim.contexts)}." if len(claim.contexts) > 1 else ""
    at_once = " The interval of each context is a 95% one by itself." if claim.rule == "not_worse" else at_once
    return (
        f"Unit: one run. Contrast that decides: {findings.contrast_text(contrast)}; endpoint: "
        f"{ENDPOINTS[contrast.endpoint].words}; the claim says {contrast.better}; margin {number(contrast.margin)}. "
        f"{CROSS_FITTED if contrast.cross_fitted else ''}{RULES[claim.rule]}{at_once} Runs: {said}. Last iterates; a failed "
        "run counts as the worst."
    )
