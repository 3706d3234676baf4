"""What does a study say of each claim?"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from bngan.errors import UsageError
from bngan.study.decisions import (
    CONDITIONAL,
    CONTRADICTED,
    INCONCLUSIVE,
    NO_EFFECT,
    NOT_INFORMATIVE,
    SUPPORTED,
    TAIL,
    WORDS,
    ZONES,
    Decision,
    Finding,
    Interaction,
    Values,
    Word,
    Zone,
    decide,
    find,
    find_overall,
    margin_of,
    must_be,
    read_values,
    strata_of,
)
from bngan.study.endpoints import ENDPOINTS
from bngan.study.spec import Claim, Contrast, Result, Study, planned_runs
from bngan.study.statistics import Array, Stratum, choice_made, choices, paired, rank_sum_p, seeds_needed, superiority

EXACT_RUNS = 60  # of both arms, up to which ranks are tested over all ways to deal them out
RATES = {"g_lr", "d_lr"}
Edges = Collection[tuple[str, str, str]]  # blocks, contexts and arms whose pilots chose the least or the greatest value


@dataclass(frozen=True)
class Sensitivity:
    """The same runs looked at in other ways, which decide nothing; None where they cannot be, or have no spread to judge by.

    Attributes:
        correlation: over pairs of equal seed.
        paired95: the 95% interval if such pairs are compared.
        superiority: P(a run of the arm has more, or less, than one of the baseline, as claimed).
        superiority95: its 95% interval.
        rank_p: two-sided, of the rank sums (Wilcoxon, Mann and Whitney): exact for few runs.
    """

    correlation: float | None = None
    paired95: tuple[float, float] | None = None
    superiority: float | None = None
    superiority95: tuple[float, float] | None = None
    rank_p: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A contrast in one context, or pooled over them.

    Attributes:
        contrast: what is compared.
        context: where; None means pooled over the claim's contexts.
        value: difference or ratio of arm and baseline.
        interval95: its 95% interval, simultaneous over the claim's contexts unless the claim's rule is not_worse.
        interval90: its 90% interval.
        n: runs of the arm and of the baseline.
        zone: where the intervals lie.
        p: one-sided, of the test that would support the claim: below 0.025 if the 95% interval does.
        needed: runs of an arm, in all contexts that are pooled, that would settle it, where more of them would.
        sensitivity: the same by pairs and by ranks.
    """

    contrast: Contrast
    context: str | None
    value: float
    interval95: tuple[float, float]
    interval90: tuple[float, float]
    n: tuple[int, int]
    zone: Zone
    p: float
    needed: int | None = None
    sensitivity: Sensitivity = Sensitivity()


@dataclass(frozen=True)
class Verdict:
    """What the study says of a claim.

    Attributes:
        claim: the claim.
        word: the verdict.
        sentence: the same in a sentence, with its numbers.
        estimates: the primary contrast in each context, and pooled (context None) last, unless there is one context.
        interaction: the interval of how much the contexts differ, of the two that differ most, None where there is one.
        also, controls, secondary: likewise of the claim's other contrasts, in the claim's order.
        would_change: what would change the verdict.
        p_holm: the p-value of all that must be supported, adjusted for the number of claims.
    """

    claim: Claim
    word: Word
    sentence: str
    estimates: tuple[Estimate, ...]
    interaction: tuple[float, float] | None
    also: tuple[Estimate, ...]
    controls: tuple[Estimate, ...]
    secondary: tuple[Estimate, ...]
    would_change: str
    p_holm: float = math.nan


def check_complete(study: Study, results: Sequence[Result]) -> None:
    """Refuse results that lack planned runs: a study is looked at once, when it is done.

    Raises:
        UsageError: telling how many are missing.
    """
    planned = [run for block in study.blocks for run in planned_runs(study, block)]
    wanted, done = (
        Counter((run.block, run.role, run.context, run.arm, run.seed) for run in runs)
        for runs in (planned, [result.run for result in results])
    )
    if missing := wanted - done:
        raise UsageError(
            f"{missing.total():,} of {len(planned):,} planned runs are missing, the first in block {next(iter(missing))[0]}; "
            "there is no verdict before all are done; go on with the same command"
        )


# From zones to words --------------------------------------------------------------------------------------------------


def judge(study: Study, results: Sequence[Result]) -> list[Verdict]:
    """Return the verdicts on a study's claims, when all of its runs are done.

    Raises:
        UsageError: if a planned run is missing, or did not measure what a claim asks for.
    """
    check_complete(study, results)
    values = read_values(study, results)
    decisions, edges = decide(study.claims, values), _edges(study, results)
    return [_verdict(study, claim, decision, values, edges) for claim, decision in zip(study.claims, decisions, strict=True)]


def _edges(study: Study, results: Sequence[Result]) -> Edges:
    """Return whose pilots chose a value at an edge of those that were tried."""
    return {
        (block.name, *cell)
        for block in study.blocks
        for cell, chosen in choices(block, results, choice_made(study, block, results)).items()
        if chosen.at_edge
    }


def _verdict(study: Study, claim: Claim, decision: Decision, values: Values, edges: Edges) -> Verdict:
    estimates, *others = (_estimates(values, claim, contrast, claim.rule) for contrast in (claim.primary, *claim.also))
    secondary, controls = (
        tuple(estimate for contrast in contrasts for estimate in _estimates(values, claim, contrast, rule))
        for contrasts, rule in ((claim.secondary, claim.rule), (claim.controls, "beyond"))
    )
    pooled = [each[-1] for each in (estimates, *others)]
    widest = max(decision.interactions, key=lambda found: (bool(found.differs), abs(float(sum(found.limits)))), default=None)
    return Verdict(
        claim=claim,
        word=WORDS[int(decision.word)],
        sentence=_sentence(study, claim, decision, estimates, pooled, widest) + _at_chosen(study, claim, edges),
        estimates=estimates,
        interaction=None if widest is None else _shown_ends(claim.primary, widest.limits),
        also=tuple(estimate for each in others for estimate in each),
        controls=controls,
        secondary=secondary,
        would_change=_would_change(claim, decision, pooled),
        p_holm=float(decision.p),
    )


def _estimates(values: Values, claim: Claim, contrast: Contrast, rule: str) -> tuple[Estimate, ...]:
    """Return a contrast in each context and, where there are several, over all."""
    count = len(claim.contexts)
    each = [_estimate(values, contrast, (context,), rule, count) for context in claim.contexts]
    return (*each, _estimate(values, contrast, claim.contexts, rule, 1)) if count > 1 else (*each,)


def _estimate(values: Values, contrast: Contrast, contexts: Sequence[str], rule: str, places: int) -> Estimate:
    pooled = len(contexts) > 1
    finding = find_overall(values, contrast, contexts, rule) if pooled else find(values, contrast, contexts, rule, places)
    strata = strata_of(values, contrast, contexts)
    n = sum(stratum.arm.shape[-1] for stratum in strata)
    low, high = finding.effect.limits(1 - 2 * TAIL / (1 if rule == "not_worse" else places))
    zone = int(finding.zone)
    more_would_tell = zone == INCONCLUSIVE and not finding.unreached and not finding.alike
    needed = seeds_needed(n, float(high - low) / 2, margin_of(contrast)) if more_would_tell else None
    return Estimate(
        contrast=contrast,
        context=None if pooled else contexts[0],
        value=_shown(contrast, float(finding.effect.value)),
        interval95=_shown_ends(contrast, (low, high)),
        interval90=_shown_ends(contrast, finding.effect.limits(1 - 4 * TAIL)),
        n=(n, sum(0 if stratum.baseline is None else stratum.baseline.shape[-1] for stratum in strata)),
        zone=ZONES[zone],
        p=float(finding.p),
        needed=needed if needed and needed > n else None,  # fewer are of no use: the effect is too near to a margin
        sensitivity=_sensitivity(values, contrast, contexts, strata),
    )


def _sensitivity(values: Values, contrast: Contrast, contexts: Sequence[str], strata: Sequence[Stratum]) -> Sensitivity:
    """Return pairs and ranks of a contrast, if it has a baseline."""
    if contrast.baseline is None:
        return Sensitivity()
    endpoint, correlation, paired95 = ENDPOINTS[contrast.endpoint], None, None
    seeds = strata_of(values, contrast, contexts, "seed")
    if all(stratum.baseline is not None and np.array_equal(stratum.arm, stratum.baseline) for stratum in seeds):
        correlation, effect = paired(strata, endpoint.kind, more=contrast.better == "more", of_means=endpoint.of_means)
        paired95 = None if effect.alike else _shown_ends(contrast, effect.limits(1 - 2 * TAIL))
    wins = superiority(strata, more=contrast.better == "more")
    low, high = (float(np.clip(end, 0, 1)) for end in wins.limits(1 - 2 * TAIL))
    rank_p = None if wins.alike else min(1.0, 2 * float(min(wins.p_above(0.5), wins.p_below(0.5))))
    if all(s.baseline is not None and len(s.arm) + len(s.baseline) <= EXACT_RUNS for s in strata):
        rank_p = rank_sum_p(strata)
    return Sensitivity(correlation, paired95, float(wins.value), None if wins.alike else (low, high), rank_p)


def _shown(contrast: Contrast, effect: float) -> float:
    """Return an effect as how much more the arm has than the baseline: a difference or a ratio."""
    signed = effect if contrast.better == "more" else -effect
    return math.exp(min(signed, 700.0)) if _as_ratio(contrast) else signed


def _shown_ends(contrast: Contrast, ends: tuple[Array, Array]) -> tuple[float, float]:
    low, high = sorted(_shown(contrast, float(end)) for end in ends)
    return low, high


# Sentences ------------------------------------------------------------------------------------------------------------

# What the interval of the primary contrast says, by its zone and the claim's rule.
SAID = {
    (SUPPORTED, "beyond"): "the whole interval is beyond the margin of {margin}",
    (SUPPORTED, "within"): "the whole interval is within the margins, {inside}",
    (SUPPORTED, "not_worse"): "in no context is it worse by the margin, {worse}",
    (CONTRADICTED, "beyond"): "the whole interval is beyond the margin on the other side, {worse}",
    (CONTRADICTED, "within"): "the whole interval is outside the margins, {inside}",
    (CONTRADICTED, "not_worse"): "in at least one context it is worse by more than the margin, {worse}",
    (NO_EFFECT, "beyond"): "the 90% interval, {low90} to {high90}, is within the margins, {inside}, so what effect there is is "
    "too small to matter",
    (INCONCLUSIVE, "beyond"): "the interval reaches across a margin ({inside}), so this study cannot tell",
    (INCONCLUSIVE, "within"): "the interval reaches across a margin ({inside}), so this study cannot tell",
    (
        INCONCLUSIVE,
        "not_worse",
    ): "in at least one context the interval reaches across the margin, {worse}, so this study cannot tell",
}


def _sentence(
    study: Study,
    claim: Claim,
    decision: Decision,
    estimates: Sequence[Estimate],
    pooled: Sequence[Estimate],
    widest: Interaction | None,
) -> str:
    """Return a verdict with its numbers: those of the primary contrast in all contexts, and of all that decide, pooled."""
    word, effect = int(decision.word), _effect_text(study, estimates[-1])
    if word == NOT_INFORMATIVE:
        failed = "; ".join(
            f"{_contrast_text(study, contrast)} is {ZONES[int(control.zone)]}, and must be {ZONES[must_be(contrast)]}"
            for contrast, control in zip(claim.controls, decision.controls, strict=True)
            if int(control.zone) != must_be(contrast)
        )
        said = f"a control failed ({failed}), so nothing follows from what was measured: {effect}"
    elif word == CONDITIONAL and widest is not None:
        low, high = (_number(end) for end in _shown_ends(claim.primary, widest.limits))
        each = _each(claim, widest, estimates[:-1])
        said = f"{each} differ by {low} to {high}, which is beyond the margin; over all of them {effect}"
    else:
        said = f"{effect}; {_said(claim, decision.overall, estimates[-1])}{_but(study, claim, decision, pooled[1:])}"
    return f"{WORDS[word].capitalize()}: {said}."


def _at_chosen(study: Study, claim: Claim, edges: Edges) -> str:
    """Return, where values of axes were chosen, what keeps a verdict from resting on a bad choice, or that nothing does."""
    contrast = claim.primary
    blocks = [block for block in study.blocks if block.name in contrast.blocks]
    if not contrast.cross_fitted and all(block.chosen_from is None for block in blocks):
        return ""
    sources = [block for block in study.blocks if block.name in {other.chosen_from or other.name for other in blocks}]
    values = "rates" if {name for source in sources for axis in source.axes for name in axis.split()} <= RATES else "values"
    said = f" This holds at the {values} that pilots chose."
    if contrast.cross_fitted:
        said = (
            f" Half of the seeds chose {values} for the other half; the interval's ends are against the other arm at the best "
            f"of the {values} tried here."
        )
    at_edge = [
        f"{_label(study, arm)} in {context}"
        for context, arm in product(claim.contexts, dict.fromkeys(contrast.arms))
        if any((block.chosen_from or block.name, block.chosen_as.get(context, context), arm) in edges for block in blocks)
    ]
    return f"{said} At an edge of what was tried, beyond which a better one may lie: {', '.join(at_edge)}." if at_edge else said


def _each(claim: Claim, widest: Interaction, estimates: Sequence[Estimate]) -> str:
    """Return what each context says, or each level of the condition on which an effect depends most."""
    if not claim.conditions:
        each = "; ".join(f"{estimate.zone} in {estimate.context} ({_numbers(estimate)})" for estimate in estimates)
        return f"{each}; contexts"
    (name,) = (name for name, levels in claim.conditions.items() if levels == widest.contexts)
    both = zip(widest.findings, widest.contexts, strict=True)
    each = " and ".join(f"{ZONES[int(finding.zone)]} in {', '.join(contexts)}" for finding, contexts in both)
    return f"it depends on {name}: {each}, which"


def _said(claim: Claim, finding: Finding, estimate: Estimate) -> str:
    """Return what the interval of a contrast says."""
    contrast, margin = estimate.contrast, margin_of(estimate.contrast)
    if int(finding.zone) == INCONCLUSIVE and finding.unreached:
        return "in both arms most runs never came so far, so that equal times tell nothing"
    if int(finding.zone) == INCONCLUSIVE and finding.alike:
        return "runs came out alike, so that there is no spread to judge by"
    ends = sorted(_shown(contrast, end) for end in (-margin, margin))
    return SAID[int(finding.zone), claim.rule].format(
        margin=_number(_shown(contrast, margin)),
        worse=_number(_shown(contrast, -margin)),
        inside=" to ".join(_number(end) for end in ends),
        low90=_number(estimate.interval90[0]),
        high90=_number(estimate.interval90[1]),
    )


def _but(study: Study, claim: Claim, decision: Decision, also: Sequence[Estimate]) -> str:
    """Return why a verdict is not the zone of the primary contrast."""
    if int(decision.word) == int(decision.overall.zone):
        return ""
    others = [
        f"{_contrast_text(study, estimate.contrast)}, which must be supported as well, is {ZONES[int(found.zone)]} "
        f"({_effect_text(study, estimate)}; {_said(claim, found, estimate)})"
        for found, estimate in zip(decision.also, also, strict=True)
        if int(found.zone) != SUPPORTED
    ]
    p = float(decision.p if int(decision.overall.zone) == SUPPORTED else decision.against)
    return "; but " + ("; ".join(others) or f"adjusted for {len(study.claims)} claims (Holm) p is {p:.2g}, above {TAIL}")


def _would_change(claim: Claim, decision: Decision, pooled: Sequence[Estimate]) -> str:
    """Return what would change a verdict, from the interval over all contexts of the first contrast that makes it so."""
    word, findings = int(decision.word), (decision.overall, *decision.also)
    place = next((place for place, found in enumerate(findings) if int(found.zone) == word), 0)
    finding, estimate = findings[place], pooled[place]
    ends = estimate.interval95
    if word == NOT_INFORMATIVE:
        return "Controls that come out as they must: with more runs, or where they are known to."
    if word == CONDITIONAL:
        return "Contexts that differ by less than the margin, or whose difference has an interval that reaches within it."
    if word == INCONCLUSIVE and int(finding.zone) != INCONCLUSIVE:
        return "More runs, and so a smaller p-value."
    if word == INCONCLUSIVE and finding.unreached:
        return "Longer runs, of which most come so far."
    if word == INCONCLUSIVE and finding.alike:
        return "Runs that do not all come out alike."
    if word == INCONCLUSIVE:
        wanted = f"about {estimate.needed:,}" if estimate.needed else "more"
        where = "" if estimate.context else " in all contexts"
        return f"With {wanted} runs of an arm{where} in place of {estimate.n[0]:,} the interval would be narrow enough to tell."
    if word == NO_EFFECT:
        return f"A margin within the 90% interval, {_number(estimate.interval90[0])} to {_number(estimate.interval90[1])}."
    if claim.rule == "beyond":
        near = min(ends, key=lambda end: abs(end - _as_ratio(estimate.contrast)))
        return f"A margin that the interval reaches: one beyond {_number(near)}."
    return f"A margin that the interval, {_number(ends[0])} to {_number(ends[1])}, reaches."


def _effect_text(study: Study, estimate: Estimate) -> str:
    """Return an effect in words, with its interval."""
    contrast, numbers = estimate.contrast, _numbers(estimate)
    if contrast.pairs:
        change, words = "ratio" if _as_ratio(contrast) else "difference", ENDPOINTS[contrast.endpoint].words
        return f"the {change} of the {words}, as a mean over {_pairs_text(study, contrast)}, is {numbers}"
    value = f"the {ENDPOINTS[contrast.endpoint].words} with {_label(study, contrast.arm)} is"
    if contrast.baseline is None:
        return f"{value} {numbers}"
    base = f"with {_label(study, contrast.baseline)}"
    return f"{value} that {base} times {numbers}" if _as_ratio(contrast) else f"{value} that {base} plus {numbers}"


def _contrast_text(study: Study, contrast: Contrast) -> str:
    """Return what is compared, in words."""
    return f"{_pairs_text(study, contrast)} in {ENDPOINTS[contrast.endpoint].words}"


def _pairs_text(study: Study, contrast: Contrast) -> str:
    """Return the arms that are compared, each with its baseline."""
    return ", ".join(" against ".join(_label(study, arm) for arm in pair if arm is not None) for pair in contrast.comparisons)


def _label(study: Study, arm: str) -> str:
    return study.arms[arm].label if arm in study.arms else "the same arm again"


def _numbers(estimate: Estimate) -> str:
    value, low, high = (_number(number) for number in (estimate.value, *estimate.interval95))
    runs = f"{estimate.n[0]}" + (f" and {estimate.n[1]}" if estimate.contrast.baseline is not None else "")
    return f"{value} (95% interval {low} to {high}; {runs} runs)"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _as_ratio(contrast: Contrast) -> bool:
    return ENDPOINTS[contrast.endpoint].kind == "ratio"
