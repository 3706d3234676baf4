"""What does a study's report say? Verdicts first, then for each claim what they rest on, then all that a doubter asks for."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

from bngan.files import write_whole
from bngan.networks import build_networks
from bngan.settings import Settings
from bngan.study.endpoints import ENDPOINTS, Kind, badness, has_failed
from bngan.study.figures import View, figures_of_claim, forest, rates, slug
from bngan.study.findings import Findings, effect_text, failed_of, interval_of_median, number, span
from bngan.study.page import Code, Heading, Part, Picture, Pictures, Table, as_html, as_markdown, markdown_table
from bngan.study.power import power_table
from bngan.study.record import REFERENCES, RESULTS, SAMPLES
from bngan.study.spec import Block, Claim, Result, Study, Value
from bngan.study.statistics import choices, clopper_pearson
from bngan.study.tasks import TASKS
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
DEVIATIONS = (
    "D's step and G's step see the same fakes, as in PyTorch's DCGAN example and PacGAN's code.",
    "Latents are standard normal.",
    "D is in training mode in both steps; samples are drawn in evaluation mode, by running statistics unless it says "
    "otherwise.",
    "On a GPU runs of one structure are trained as one by torch.vmap, which tests hold equal to single runs to 1e-9 in "
    "float64; products of float32 go through TF32 there unless `tf32` is off, and are plain float32 on processors.",
    "FID and coverage are those of a digit net of this package, not of Inception: compare them with the floors and "
    "controls only.",
    "Norms add a few parameters to an arm, counted under Design, and leave the biases before them without use.",
)
OBJECTIONS = (
    (
        "Small networks, simple data.",
        "So the title says: verdicts hold for these networks, tasks and lengths, and for other seeds, not other data.",
    ),
    (
        "Learning rates and checkpoints were selected.",
        "Quality against learning rate is shown for all arms with nothing selected. Where a rate was chosen, pilots chose "
        "it, other seeds are reported, and the regret is told: verdicts hold at the rates that pilots chose. Always the last "
        "iterate, never a best checkpoint.",
    ),
    ("Failed runs were dropped.", "None was. A run that fails counts as the worst, in every endpoint."),
    ("Margins were set afterwards.", "They stand in the study's file, whose SHA-256 is the first line of the results."),
    (
        "A difference is not an effect.",
        "Verdicts compare intervals with margins; that a difference is not 0 settles nothing here.",
    ),
    (
        "Why believe that there is no effect?",
        "That verdict needs an equivalence test of its own, and controls that do move. See the power table.",
    ),
    ("FID does not see everything.", "Coverage stands beside it, and controls of known worth in the figures."),
    ("The better arm got lucky seeds.", "An arm trained again with other seeds (A/A) must show no effect."),
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
    references = folder / REFERENCES
    known = json.loads(references.read_text(encoding="utf-8")) if references.exists() else {}
    findings = Findings(study, inorder, known)
    parts = list(report(findings, judge(study, inorder), folder))
    write_whole(folder / "report.md", as_markdown(parts, folder).encode())
    page = folder / "report.html"
    write_whole(page, as_html(study.title, parts).encode())
    return page


def report(findings: Findings, verdicts: Sequence[Verdict], folder: Path) -> Iterator[Part]:
    """Yield all parts of the report."""
    study = findings.study
    yield Heading(1, study.title)
    yield summary(findings, verdicts)
    yield f"Contexts: {'; '.join(f'{name}: {settings_text(settings)}' for name, settings in study.contexts.items())}."
    yield Heading(2, "Verdicts")
    yield forest(verdicts)
    yield claims(verdicts)
    for verdict in verdicts:
        yield from claim_section(findings, verdict)
    yield from samples_section(findings, folder)
    yield from rates_section(findings)
    yield from power_section(verdicts)
    yield from checks_section(findings)
    yield from design_section(findings)
    yield from provenance_section(findings, folder)


def summary(findings: Findings, verdicts: Sequence[Verdict]) -> str:
    """Return in a few sentences what was done and what came out."""
    words = Counter(verdict.word for verdict in verdicts)
    lost = failed_of(findings.results)
    blocks = findings.study.blocks
    lengths = " to ".join(
        f"{length:,}" for length in sorted({min(b.iterations for b in blocks), max(b.iterations for b in blocks)})
    )
    return (
        f"{len(verdicts)} claims: {', '.join(f'{count} {word}' for word, count in words.items())}. "
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


def claim_section(findings: Findings, verdict: Verdict) -> Iterator[Part]:
    """Yield what stands of a claim: verdict, figures, numbers, protocol, and how to overturn it."""
    claim = verdict.claim
    yield Heading(2, f"Claim {claim.name}: {claim.statement}", badge=verdict.word)
    yield verdict.sentence
    yield from figures_of_claim(findings, verdict)
    yield Heading(3, f"Claim {claim.name}: effects")
    yield estimates_table(findings, verdict)
    yield from sensitivity_table(findings, verdict)
    yield Heading(3, f"Claim {claim.name}: every arm")
    yield from arms_tables(findings, claim)
    yield Heading(3, f"Claim {claim.name}: protocol, and what would change the verdict")
    yield protocol(findings, claim)
    yield verdict.would_change
    yield Code(command(findings.study))


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
            estimate.zone + (f" (about {estimate.needed:,} runs an arm needed)" if estimate.needed else ""),
        ]
        for role, estimate in estimates_of(verdict)
    ]
    notes = [f"p of all that decides, adjusted for the number of claims (Holm): {number(verdict.p_holm)}."]
    if verdict.interaction:
        notes.append(f"How much the contexts differ (interaction), 95% interval: {span(verdict.interaction)}.")
    head = ["contrast", "role", "endpoint", "effect (95%)", "90%", "margin", "n", "p", "zone"]
    return Table(head, rows, " ".join(notes))


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
            chance, *ends = found.superiority
            rows.append(
                [
                    f"{findings.contrast_text(estimate.contrast)}, {estimate.context or 'all together'}",
                    ENDPOINTS[estimate.contrast.endpoint].words,
                    f"{number(chance)} ({span(ends)})",
                    number(found.rank_p),
                    number(found.correlation),
                    span(found.paired95),
                ]
            )
    note = (
        "Descriptive: by ranks, with failures worst (Brunner and Munzel 2000; Mann and Whitney 1947), and by pairs of "
        "equal seed. P is the probability that a run of the arm and one of the baseline are as claimed."
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
    return (
        f"Unit: one run. Contrast that decides: {findings.contrast_text(contrast)}; endpoint: "
        f"{ENDPOINTS[contrast.endpoint].words}; the claim says {contrast.better}; margin {number(contrast.margin)}. "
        f"{RULES[claim.rule]} Intervals are simultaneous over the contexts {', '.join(claim.contexts)}. Runs: {said}. Last "
        "iterates; a failed run counts as the worst."
    )


def block_text(block: Block) -> str:
    """Return what a block's runs are, in words."""
    axes = "; ".join(f"{name} in {', '.join(map(str, values))}" for name, values in block.axes.items())
    seeds = ", ".join(
        f"{len(seeds)} {role} seeds ({min(seeds)} to {max(seeds)})" for role, seeds in block.seeds.items() if seeds
    )
    chosen = f"; values of axes chosen by the pilots of block {block.chosen_from}" if block.chosen_from else ""
    looks = ", ".join(f"{look.iteration:,}" for look in block.looks)
    text = f"{block.task}, {block.iterations:,} iterations of {block.batch_size}, {seeds}{chosen}, looked at after {looks}"
    return f"{text}; {axes}" if axes else text


def command(study: Study) -> str:
    """Return what a shell is told to run the study again."""
    return f"bngan study study.yaml --output {study.name}-again    # study.yaml lies beside this report"


# What a doubter asks for ----------------------------------------------------------------------------------------------


def samples_section(findings: Findings, folder: Path) -> Iterator[Part]:
    """Yield samples of the best, the median and the worst run of each arm, where runs have left some."""
    shown = []
    for block, context in product(findings.study.blocks, findings.study.contexts):
        for arm, look in findings.looks.items():
            runs = [
                (result, strip)
                for result in findings.runs(block.name, context, arm)
                if (strip := strip_of(result, folder)).exists()
            ]
            if runs:
                ranked = sorted(runs, key=lambda pair: (badness(pair[0]), pair[0].run.id))
                places = {"best": 0, "median": len(ranked) // 2, "worst": len(ranked) - 1}
                for name, place in places.items():
                    result, strip = ranked[place]
                    said = f"{look.label}, {context}, {block.name}: {name} of {len(ranked)}, seed {result.run.seed}"
                    shown.append(Picture(strip, f"{said}{', failed' if has_failed(result) else ''}"))
    if shown:
        yield Heading(2, "Samples")
        yield "For each arm the best, the median and the worst seed, by its last iterate; the same latents everywhere."
        yield Pictures(shown)


def strip_of(result: Result, folder: Path) -> Path:
    """Return where a run's samples lie, if it left any."""
    return folder / SAMPLES / result.run.picture


def rates_section(findings: Findings) -> Iterator[Part]:
    """Yield quality against learning rate of all arms, by the pilots where a block has some."""
    yield Heading(2, "Learning rates")
    yield "Every arm at every rate, nothing selected."
    for block in (block for block in findings.study.blocks if block.axes):
        runs = [result for result in findings.results if result.run.block == block.name]
        pilots = [result for result in runs if result.run.role == "pilot"]
        view = View(f"rates-{slug(block.name)}", (), (block.name,), tuple(block.arms), tuple(findings.looks))
        yield rates(Findings(findings.study, pilots or runs, findings.references), view)
    yield from choices_table(findings)


def choices_table(findings: Findings) -> Iterator[Part]:
    """Yield what the pilots chose, and what choosing on half of them costs on the other half."""
    rows = []
    for block in findings.study.blocks:
        for (context, arm), chosen in choices(block, findings.results).items():
            values = settings_text(chosen.axes)
            rows.append(
                [
                    block.name,
                    context,
                    findings.looks[arm].label,
                    values,
                    number(chosen.regret),
                    "yes" if chosen.at_edge else "no",
                ]
            )
    note = (
        "Regret: how much worse what one half of the pilots chooses is on the other half than that half's own choice: a "
        "ratio of FIDs, or a difference of shares of modes missed. Choosing punishes the arm that varies more; a best "
        "value at the edge asks for a wider grid."
    )
    if rows:
        yield Heading(3, "What the pilots chose, and the regret of choosing")
        yield Table(["block", "context", "arm", "chosen", "regret", "at the edge"], rows, note)


def power_section(verdicts: Sequence[Verdict]) -> Iterator[Part]:
    """Yield how often studies like this one come to a verdict, for every kind of contrast that decides a claim."""
    asked: dict[tuple[Kind, float, int], list[str]] = {}
    for verdict in verdicts:
        contrast = verdict.claim.primary
        if contrast.baseline is not None and verdict.claim.rule == "beyond":
            for n in sorted({min(estimate.n) for estimate in verdict.estimates}):
                asked.setdefault((ENDPOINTS[contrast.endpoint].kind, contrast.margin, n), []).append(verdict.claim.name)
    rows = [[", ".join(names), *row] for (kind, margin, n), names in asked.items() for row in power_rows(kind, margin, n)]
    head = ["claims", "kind", "margin", "runs an arm", "sd", "no effect: says so", "margin: supported", "twice: supported"]
    note = (
        "How often simulated studies with a known truth came to a verdict: with no effect; with one as large as the "
        "margin, where supported is an error (at most 2.5%); with one twice as large (of ratios its square). sd: of runs, "
        "of ratios that of logarithms."
    )
    if rows:
        yield Heading(2, "Power")
        yield "What a study of this size could find out, whatever it found."
        yield Table(head, rows, note)


def power_rows(kind: Kind, margin: float, n: int) -> Iterator[list[str]]:
    """Yield for each spread of runs how often n runs an arm come to the right, or the wrong, verdict."""
    powers = power_table(kind, margin, runs=(n,))
    for spread in dict.fromkeys(power.spread for power in powers):
        none, at_margin, large = (power.shares for power in powers if power.spread == spread)
        chances = none["no practical effect"], at_margin["supported"], large["supported"]
        yield [kind, number(margin), f"{n}", "" if kind == "rate" else number(spread), *(f"{chance:.0%}" for chance in chances)]


def checks_section(findings: Findings) -> Iterator[Part]:
    """Yield objections and what was done about them."""
    yield Heading(2, "Objections, and what was done about them")
    yield Table(["objection", "answer"], OBJECTIONS)
    yield Heading(2, "Deviations to know of")
    yield Table(["", "deviation"], [(f"{place}", text) for place, text in enumerate(DEVIATIONS, start=1)])


def design_section(findings: Findings) -> Iterator[Part]:
    """Yield what was run: blocks and arms."""
    yield Heading(2, "Design")
    rows = []
    for block in findings.study.blocks:
        runs = [result for result in findings.results if result.run.block == block.name]
        ended = Counter(result.failure for result in runs if result.failure)
        why = "; ".join(f"{count} x {reason}" for reason, count in sorted(ended.items()))
        seconds = number(median(result.seconds for result in runs)) if runs else ""
        rows.append([block.name, block_text(block), f"{len(runs)}", f"{failed_of(runs)}", why, seconds])
    yield Table(["block", "runs are", "runs", "failed", "ended early", "seconds a run (median)"], rows)
    arms = [
        (name, arm.label, settings_text(arm.settings), parameters_of(findings, name))
        for name, arm in findings.study.arms.items()
    ]
    yield Table(["arm", "label", "settings", "parameters of G and D"], arms)
    contexts = [(name, settings_text(settings)) for name, settings in findings.study.contexts.items()]
    yield Table(["context", "settings"], contexts)


def parameters_of(findings: Findings, arm: str) -> str:
    """Return how many parameters an arm's networks have, in each task that it is trained on; nothing is drawn for it."""
    counts = {}
    for run in (result.run for result in findings.results if result.run.arm == arm):
        if run.task not in counts:
            settings: dict[str, Any] = {**run.settings, "image_shape": TASKS[run.task].image_shape}
            with torch.device("meta"):
                counts[run.task] = [
                    sum(p.numel() for p in network.parameters()) for network in build_networks(Settings(**settings))
                ]
    return "; ".join(f"{task}: {g:,} and {d:,}" for task, (g, d) in counts.items())


def settings_text(settings: Mapping[str, Value]) -> str:
    """Return settings as text."""
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "the default"


def provenance_section(findings: Findings, folder: Path) -> Iterator[Part]:
    """Yield by what and where this was made, and the study's file."""
    study, results = findings.study, folder / RESULTS
    yield Heading(2, "How to check this")
    yield Code(command(study))
    header = json.loads(results.open(encoding="utf-8").readline()) if results.exists() else {}
    yield Table(
        ["", "value"],
        [
            ("SHA-256 of the study's file", study.sha256),
            *((name, f"{value}") for name, value in header.items() if name != "sha256"),
        ],
    )
    yield Code(study.source, title="The study's file")
