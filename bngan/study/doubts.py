"""What does a report say to a doubter? Samples, learning rates, other nets, power, objections, the design, the study's file."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from math import prod
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from bngan.networks import build_networks
from bngan.norms import BATCH_COUPLED
from bngan.settings import Settings
from bngan.study.endpoints import ENDPOINTS, Kind, badness, has_failed
from bngan.study.figures.doubts import again, pairs, power_curves
from bngan.study.figures.factors import interactions
from bngan.study.figures.quality import rates
from bngan.study.figures.view import View, slug
from bngan.study.findings import SPACES, Findings, failed_of, last, number, rank_correlation
from bngan.study.page import Code, Heading, Part, Picture, Pictures, Table
from bngan.study.power import power_table
from bngan.study.record import RESULTS, SAMPLES
from bngan.study.spec import AA, DEFAULTS, Arm, Block, Contrast, Result, Study, Value
from bngan.study.statistics import choice_made, choices
from bngan.study.tasks import TASKS
from bngan.study.verdicts import Verdict

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
    "Where a block reports every value of an axis, runs of one seed at several values count as independent, though they begin "
    "from the same weights and see the same data.",
)
COMMAND = "bngan study study.yaml --output again    # study.yaml lies beside this report"
OBJECTIONS = (
    (
        "Small networks, simple data.",
        "So the title says: verdicts hold for these networks, tasks and lengths, and for other seeds, not other data.",
    ),
    (
        "Learning rates and checkpoints were selected.",
        "Quality against learning rate is shown for all arms with nothing selected. Where a rate was chosen, pilots chose "
        "it, other seeds are reported, and the regret is told: verdicts hold at the rates that pilots chose, or where a "
        "contrast is cross-fitted at the best of these and the rates beside them. Always the last iterate, never a best "
        "checkpoint.",
    ),
    (
        "Failed runs were dropped.",
        "None was. A run that fails counts as the worst, in every endpoint; a probe of one that came to its end, as measured.",
    ),
    ("Margins were set afterwards.", "They stand in the study's file, whose SHA-256 is the first line of the results."),
    (
        "A difference is not an effect.",
        "Verdicts compare intervals with margins; that a difference is not 0 settles nothing here.",
    ),
    ("Why believe that there is no effect?", "That verdict needs an equivalence test of its own."),
    (
        "FID is by a classifier of your own.",
        "Floors and controls stand beside it, and coverage; other nets, where the last looks are whole, have a section.",
    ),
    ("FID does not see everything.", "Coverage stands beside it, and controls of known worth in the figures."),
)


def doubts(findings: Findings, verdicts: Sequence[Verdict], folder: Path) -> Iterator[Part]:
    """Yield all that a report says beyond its claims."""
    yield from samples_section(findings, folder)
    yield from rates_section(findings)
    yield from spaces_section(findings, verdicts)
    yield from chance_section(findings, verdicts)
    yield from power_section(findings.study, verdicts)
    yield from checks_section(findings)
    yield from design_section(findings)
    yield from provenance_section(findings, folder)


# Samples and rates ----------------------------------------------------------------------------------------------------


def samples_section(findings: Findings, folder: Path) -> Iterator[Part]:
    """Yield samples of the best, the median and the worst run of each arm, where runs have left some."""
    cells = product(findings.study.blocks, findings.study.contexts, findings.looks)
    shown = [strip for block, *cell in cells for strip in strips(findings, folder, block.name, *cell)]
    if shown:
        yield Heading(2, "Samples")
        yield (
            "For each arm the best, the median and the worst seed, by its last iterate; the same latents everywhere. A run "
            "that ended before its time has left none."
        )
        yield Pictures(shown)


def strips(
    findings: Findings, folder: Path, block: str, context: str, arm: str, which: Sequence[str] = ("best", "median", "worst")
) -> Iterator[Picture]:
    """Yield the samples of some of an arm's runs, by their quality, of those that have left some."""
    ranked = sorted(findings.runs(block, context, arm), key=lambda result: (badness(result), result.run.id))
    for name, place in {"best": 0, "median": len(ranked) // 2, "worst": -1}.items() if ranked else ():
        result = ranked[place]
        if name in which and (strip := strip_of(result, folder)).exists():
            said = f"{findings.looks[arm].label}, {context}, {block}: {name} of {len(ranked)}, seed {result.run.seed}"
            yield Picture(strip, f"{said}{', failed' if has_failed(result) else ''}")


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
        made = choice_made(findings.study, block, findings.results)
        for (context, arm), chosen in choices(block, findings.results, made).items():
            values = settings_text(chosen.axes) + (" (tied)" if chosen.tied else "")
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
        "value at the edge asks for a wider grid. Tied: another value did as well; of such the least is run."
    )
    if rows:
        yield Heading(3, "What the pilots chose, and the regret of choosing")
        yield Table(["block", "context", "arm", "chosen", "regret", "at the edge"], rows, note)


# Other nets -----------------------------------------------------------------------------------------------------------


def spaces_section(findings: Findings, verdicts: Sequence[Verdict]) -> Iterator[Part]:
    """Yield whether FID in other feature spaces ranks the runs alike, and tells the same of each claim."""
    yield Heading(2, "The same by other nets")
    rows = list(rank_rows(findings))
    if not rows:
        yield "This study has not measured FID by other nets."
        return
    names = [f"{SPACES[one]} and {SPACES[other]}" for one, other in combinations(SPACES, 2)]
    note = (
        "Spearman's rank correlation between the FIDs of two feature spaces, over the last iterates of all reported runs: the "
        "pinned digit net, the net of random filters, and the 64 principal components of the real pixels."
    )
    yield Table(["block", "context", "runs", *names], rows, note)
    signs = list(sign_rows(findings, verdicts))
    note = (
        "Descriptive: how many times the baseline's FID the arm's is (geometric means of the runs that came to the end), in "
        "each space. Agree: whether all are on the same side of 1."
    )
    if signs:
        yield Table(["claim", "contrast", *SPACES.values(), "agree"], signs, note)


def rank_rows(findings: Findings) -> Iterator[list[str]]:
    """Yield, for each block and context, the rank correlations of each two spaces over its runs."""
    for block, context in product(findings.study.blocks, findings.study.contexts):
        runs = [result for arm in findings.looks for result in measured_in_all(findings.runs(block.name, context, arm))]
        if len(runs) > 2:
            values = {space: [last(result, space) for result in runs] for space in SPACES}
            correlations = [rank_correlation(values[one], values[other]) for one, other in combinations(SPACES, 2)]
            yield [block.name, context, f"{len(runs)}", *(f"{value:.2f}" for value in correlations)]


def sign_rows(findings: Findings, verdicts: Sequence[Verdict]) -> Iterator[list[str]]:
    """Yield, for each claim's first contrast in each context, the ratio of FIDs in each space."""
    for claim in (verdict.claim for verdict in verdicts):
        for context in claim.contexts:
            ratios = ratios_of(findings, claim.primary, context)
            if ratios:
                agree = "yes" if len({ratio < 1 for ratio in ratios}) == 1 else "no"
                text = f"{findings.contrast_text(claim.primary)}, {context}"
                yield [claim.name, text, *(f"x {number(ratio)}" for ratio in ratios), agree]


def ratios_of(findings: Findings, contrast: Contrast, context: str) -> list[float]:
    """Return the ratio of FIDs of a contrast's arms and baselines in each space; none where there is no baseline or FID."""
    arms, baselines = (
        [
            result
            for block, pair in product(contrast.blocks, contrast.comparisons)
            for result in measured_in_all(findings.runs(block, context, pair[place] or ""))
        ]
        for place in (0, 1)
    )
    if not arms or not baselines:
        return []
    means = [[geometric_mean(last(run, space) for run in runs) for space in SPACES] for runs in (arms, baselines)]
    return [arm / baseline for arm, baseline in zip(*means, strict=True)]


def measured_in_all(results: Sequence[Result]) -> list[Result]:
    """Return the runs whose last look measured FID in every space."""
    return [result for result in results if all(last(result, space) > 0 for space in SPACES)]


# Chance ---------------------------------------------------------------------------------------------------------------


def chance_section(findings: Findings, verdicts: Sequence[Verdict]) -> Iterator[Part]:
    """Yield how factors go together, runs of equal seed, and arms that were trained again, where the study has such."""
    figures = [interactions(findings), pairs(findings, verdicts), *again(findings)]
    if shown := [figure for figure in figures if figure.panels]:
        yield Heading(2, "Factors, seeds, and the same again")
        yield from shown


def power_section(study: Study, verdicts: Sequence[Verdict]) -> Iterator[Part]:
    """Yield how often studies like this one come to a verdict, for every kind of contrast that decides a claim."""
    asked: dict[tuple[Kind, float, int, int, int], list[str]] = {}
    for verdict in verdicts:
        contrast = verdict.claim.primary
        if contrast.baseline is not None and verdict.claim.rule == "beyond":
            for n, strata, places in sorted(sizes_of(study, verdict)):
                size = (ENDPOINTS[contrast.endpoint].kind, contrast.margin, n, strata, places)
                asked.setdefault(size, []).append(verdict.claim.name)
    rows = [[", ".join(names), *row] for size, names in asked.items() for row in power_rows(*size)]
    head = ["claims", "kind", "margin", "runs an arm", "strata", "intervals at once", "sd"]
    head += ["no effect: says so", "margin: supported", "twice: supported"]
    note = (
        "How often simulated studies with a known truth came to a verdict: with no effect; with one as large as the "
        "margin, where supported is an error (at most 2.5%); with one twice as large (of ratios its square). sd: of runs, "
        "of ratios that of logarithms. Strata: contexts, blocks, pairs of arms and values of axes, over which runs are dealt "
        "out. Before Holm's adjustment over claims, and without the wider ends of cross-fitted contrasts, which cost power."
    )
    if rows:
        yield Heading(2, "Power")
        yield "What a study of this size could find out, whatever it found."
        yield Table(head, rows, note)
        runs: dict[tuple[Kind, float], list[int]] = {}
        for kind, margin, n, _, _ in asked:
            runs.setdefault((kind, margin), []).append(n)
        yield power_curves(runs)


def sizes_of(study: Study, verdict: Verdict) -> set[tuple[int, int, int]]:
    """Return how many runs of an arm a claim's estimates have, in how many strata, and how many intervals hold at once."""
    contrast, contexts = verdict.claim.primary, verdict.claim.contexts
    blocks = [block for block in study.blocks if block.name in contrast.blocks]
    values = (
        prod(map(len, block.axes.values())) if block.chosen_from is None and not contrast.cross_fitted else 1
        for block in blocks
    )
    each = sum(values) * len(contrast.comparisons)
    return {
        (min(estimate.n), each, len(contexts)) if estimate.context else (min(estimate.n), each * len(contexts), 1)
        for estimate in verdict.estimates
    }


def power_rows(kind: Kind, margin: float, n: int, strata: int = 1, places: int = 1) -> Iterator[list[str]]:
    """Yield for each spread of runs how often n runs an arm, in so many strata, come to the right, or the wrong, verdict."""
    powers = power_table(kind, margin, runs=(max(n // strata, 1),), strata=strata, places=places)
    for spread in dict.fromkeys(power.spread for power in powers):
        none, at_margin, large = (power.shares for power in powers if power.spread == spread)
        chances = none["no practical effect"], at_margin["supported"], large["supported"]
        size = [f"{n}", f"{strata}", f"{places}", "" if kind == "rate" else number(spread)]
        yield [kind, number(margin), *size, *(f"{chance:.0%}" for chance in chances)]


# The study ------------------------------------------------------------------------------------------------------------


def checks_section(findings: Findings) -> Iterator[Part]:
    """Yield objections and what was done about them."""
    yield Heading(2, "Objections, and what was done about them")
    yield Table(["objection", "answer"], [*OBJECTIONS, *objections_to(findings.study)])
    yield Heading(2, "Deviations to know of")
    yield Table(["", "deviation"], [(f"{place}", text) for place, text in enumerate(DEVIATIONS, start=1)])


def objections_to(study: Study) -> Iterator[tuple[str, str]]:
    """Yield objections that some studies have arms, blocks or controls against, and whether this one has."""
    arms = study.arms.values()
    controls = {claim.name: {control.arm for control in claim.controls} for claim in study.claims}
    checks = (
        (
            "Could this study see an effect at all?",
            "See the power table; besides, these claims have controls that must show one",
            [name for name, found in controls.items() if found - {AA}],
        ),
        (
            "The better arm got lucky seeds.",
            "An arm trained again with other seeds (A/A) must show no effect in these claims",
            [name for name, found in controls.items() if AA in found],
        ),
        (
            "The baseline without norm is crippled.",
            "These arms without batch norm have another initialization or another norm",
            [arm.label for arm in arms if is_other_baseline(study, arm)],
        ),
        (
            "Joint batches are twice as large.",
            "These arms normalize joint batches in groups",
            [arm.label for arm in arms if arm.settings.get("d_norm") == "ghost"],
        ),
        (
            "The recipe was tuned with batch norm.",
            "Each context stands by itself",
            [f"{name}: {settings_text(settings)}" for name, settings in study.contexts.items()],
        ),
        (
            "Longer training would turn it round.",
            "What is said holds for these lengths",
            [f"{block.name}: {block.iterations:,} iterations" for block in study.blocks if block.task == "digits"],
        ),
    )
    for objection, answer, found in checks:
        yield objection, f"{answer}: {'; '.join(found)}." if found else "This study has nothing against it."


def is_other_baseline(study: Study, arm: Arm) -> bool:
    """Whether an arm has another initialization or another norm than batch norm, and no batch norm in G or in D."""
    settings = DEFAULTS | study.settings | arm.settings
    without = not BATCH_COUPLED & {settings["g_norm"], settings["d_norm"]}
    return without and ("initialization" in arm.settings or "layer" in arm.settings.values())


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


def block_text(block: Block) -> str:
    """Return what a block's runs are, in words."""
    axes = "; ".join(f"{name} in {', '.join(map(str, values))}" for name, values in block.axes.items())
    seeds = ", ".join(
        f"{len(seeds)} {role} seeds ({min(seeds)} to {max(seeds)})" for role, seeds in block.seeds.items() if seeds
    )
    chosen = f"; values of axes chosen by the pilots of block {block.chosen_from}" if block.chosen_from else ""
    chosen += ", and the two values nearest to each chosen one" if block.neighbours else ""
    looks = ", ".join(f"{look.iteration:,}" for look in block.looks)
    text = f"{block.task}, {block.iterations:,} iterations of {block.batch_size}, {seeds}{chosen}, looked at after {looks}"
    return f"{text}; {axes}" if axes else text


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
    yield Code(COMMAND)
    header = json.loads(results.open(encoding="utf-8").readline()) if results.exists() else {}
    yield Table(
        ["", "value"],
        [
            ("SHA-256 of the study's file", study.sha256),
            *((name, f"{value}") for name, value in header.items() if name != "sha256"),
        ],
    )
    yield Code(study.source, title="The study's file")
