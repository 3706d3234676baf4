"""What do the numbers decide? Of many studies at once: all functions take endpoints (..., n) of runs and give arrays (...)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bngan.study.endpoints import ENDPOINTS, badness
from bngan.study.spec import AA, Claim, Contrast, Result, Run, Study, reported
from bngan.study.statistics import (
    Array,
    Bracket,
    Effect,
    Stratum,
    best_of,
    by_axes,
    cross_fitted,
    effect_of,
    equivalence_p,
    holm,
    interaction_limits,
)

Zone = Literal["supported", "contradicted", "no practical effect", "inconclusive"]
Word = Literal["supported", "contradicted", "no practical effect", "inconclusive", "conditional", "not informative"]
# Zones and verdicts of many studies are places in these.
ZONES: tuple[Zone, ...] = get_args(Zone)
WORDS: tuple[Word, ...] = get_args(Word)
SUPPORTED, CONTRADICTED, NO_EFFECT, INCONCLUSIVE, CONDITIONAL, NOT_INFORMATIVE = range(len(WORDS))
TAIL = 0.025  # one end of a 95% interval

# What is read of a run itself.
RUN: Mapping[str, Callable[[Run], float]] = {"seed": lambda run: run.seed, "horizon": lambda run: run.iterations}

# Names of runs at values that were chosen, (..., n), and of those at every value that was tried, (..., values, n).
CHOSEN, EVERY = "chosen", "every"
Best = Literal["arm", "baseline"]  # of these, the one that is compared at the value where it did best

Codes = NDArray[np.int64]
Values = Mapping[tuple[str, str, str, str], Mapping[str, Array]]  # by endpoint, block, context and arm; then values of axes


# From runs to numbers -------------------------------------------------------------------------------------------------


def read_values(study: Study, results: Sequence[Result]) -> dict[tuple[str, str, str, str], dict[str, Array]]:
    """Return what claims ask for, the seeds and the horizons, as the values of the runs of each arm, sorted by seed.

    Of a block with fresh runs these alone are reported; of one that has only pilots all are, with nothing selected. Of
    contrasts that are cross-fitted, runs at every value stand beside those at chosen ones.

    Raises:
        UsageError: if a run did not measure what a claim asks for.
    """
    chosen = {block.name for block in study.blocks if block.chosen_from is not None}
    runs: dict[tuple[str, str, str], list[Result]] = {}
    for result in sorted(results, key=lambda result: result.run.seed):
        runs.setdefault((result.run.block, result.run.context, result.run.arm), []).append(result)
    values: dict[tuple[str, str, str, str], dict[str, Array]] = {}
    for claim in study.claims:
        for contrast, context in product(claim.contrasts, claim.contexts):
            for block, arm, name in product(contrast.blocks, contrast.arms, (contrast.endpoint, *RUN)):
                of, cell = runs[block, context, arm], (key_of(contrast, name), block, context, arm)
                if cell not in values:
                    values[cell] = _cross_fitted(of, name) if contrast.cross_fitted else _by_axes(of, name, block in chosen)
    return values


def key_of(contrast: Contrast, name: str) -> str:
    """Return under which name is kept what a contrast reads of runs: cross-fitted ones are others than those of a grid."""
    return f"{name}, cross-fitted" if contrast.cross_fitted else name


def _by_axes(results: Sequence[Result], name: str, chosen: bool) -> dict[str, Array]:
    """Return an endpoint of runs by the values of their axes; those that pilots chose may differ, and do not part."""
    if chosen:
        return {CHOSEN: _read(reported(results), name)}
    return {axes: _read(of, name) for axes, of in by_axes(reported(results)).items()}


def _cross_fitted(results: Sequence[Result], name: str) -> dict[str, Array]:
    """Return an endpoint of seeds at the values that the other half of them chooses, and at every value."""
    neighbours = (result for result in results if result.run.role == "neighbour")
    grid = by_axes([*reported(results), *neighbours]).values()
    every = np.stack([_read(of, name) for of in grid])  # (values, n)
    return {CHOSEN: cross_fitted(np.array([[badness(result) for result in of] for of in grid]), every), EVERY: every}


def _read(results: Sequence[Result], name: str) -> Array:
    return np.array([RUN[name](result.run) if name in RUN else ENDPOINTS[name].of(result) for result in results], dtype=float)


def strata_of(
    values: Values, contrast: Contrast, contexts: Sequence[str], endpoint: str | None = None, best: Best | None = None
) -> list[Stratum]:
    """Return the runs of both arms that differ in nothing else.

    Contexts, blocks and pairs of arms have equal weights; values of axes within a block have Mantel and Haenszel's,
    n m / (n + m).

    Args:
        values: of all runs.
        contrast: what is compared.
        contexts: whose runs are pooled.
        endpoint: what to read of the runs in place of the contrast's.
        best: which of both is compared at the value where it did best, in the claim's direction; None for chosen values.
    """
    strata, name = [], key_of(contrast, endpoint or contrast.endpoint)
    places = [*product(contexts, contrast.blocks, contrast.comparisons)]
    for context, block, (arm, baseline) in places:
        arms = _compared(values[name, block, context, arm], contrast, best == "arm")
        pairs: list[tuple[Array, Array | None]] = [(runs, None) for runs in arms.values()]
        if baseline is not None:
            baselines = _compared(values[name, block, context, baseline], contrast, best == "baseline")
            pairs = [(runs, baselines[axes]) for axes, runs in arms.items() if axes in baselines]
        sizes = [(arm.shape[-1], arm.shape[-1] if base is None else base.shape[-1]) for arm, base in pairs]
        weights = np.array([n * m / (n + m) for n, m in sizes])
        for weight, (arm, base) in zip(weights / weights.sum() / len(places), pairs, strict=True):
            strata.append(Stratum(float(weight), arm, base))
    return strata


def _compared(runs: Mapping[str, Array], contrast: Contrast, at_best: bool) -> Mapping[str, Array]:
    """Return an arm's runs by the values of the axes, those at a chosen one or, of all that were tried, at the best."""
    if not at_best:
        return {axes: of for axes, of in runs.items() if axes != EVERY}
    endpoint = ENDPOINTS[contrast.endpoint]
    return {CHOSEN: best_of(runs[EVERY], endpoint.kind, more=contrast.better == "more", of_means=endpoint.of_means)}


# From numbers to decisions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What a contrast shows.

    Attributes:
        effect: of the arm, positive as the claim says; of ratios the logarithm.
        zone: places in WORDS of the zones.
        p: one-sided, for what supports the claim.
        against: one-sided, for what contradicts it.
        unreached: whether in both arms most runs have not come to what is waited for, so that equal times tell nothing.
        alike: whether runs came out so alike that there is no spread by which to judge; then the zone is inconclusive.
    """

    effect: Effect
    zone: Codes
    p: Array
    against: Array
    unreached: NDArray[np.bool_]
    alike: NDArray[np.bool_]


def margin_of(contrast: Contrast) -> float:
    """Return the margin on the scale of effects: of ratios the logarithm."""
    return math.log(contrast.margin) if ENDPOINTS[contrast.endpoint].kind == "ratio" else contrast.margin


def effect_in(values: Values, contrast: Contrast, contexts: Sequence[str]) -> Effect:
    """Return the effect of a contrast in contexts together; where it is cross-fitted, a bad choice does not add to it."""
    endpoint = ENDPOINTS[contrast.endpoint]

    def effect(best: Best | None) -> Effect:
        strata = strata_of(values, contrast, contexts, best=best)
        return effect_of(strata, endpoint.kind, more=contrast.better == "more", of_means=endpoint.of_means)

    return Bracket(effect(None), effect("baseline"), effect("arm")) if contrast.cross_fitted else effect(None)


def find(values: Values, contrast: Contrast, contexts: Sequence[str], rule: str, places: int = 1) -> Finding:
    """Return what a contrast shows in contexts together.

    Args:
        values: of all runs.
        contrast: what is compared.
        contexts: whose runs are pooled, with equal weights.
        rule: a claim's.
        places: how many such findings there are, over which intervals hold at once (Bonferroni).
    """
    endpoint, margin = ENDPOINTS[contrast.endpoint], margin_of(contrast)
    effect = effect_in(values, contrast, contexts)
    equivalent, alike = equivalence_p(effect, margin), effect.alike
    if rule == "within":
        p, against = equivalent, np.minimum(effect.p_above(margin), effect.p_below(-margin))
    else:
        p, against = effect.p_above(-margin if rule == "not_worse" else margin), effect.p_below(-margin)
    p, against, equivalent = (np.where(alike, 1.0, value) for value in (p, against, equivalent))
    supported = p <= (TAIL if rule == "not_worse" else TAIL / places)
    unreached = _unreached(values, contrast, contexts) if endpoint.of_means else np.zeros(equivalent.shape, dtype=bool)
    none = (rule == "beyond") & (equivalent <= 2 * TAIL) & ~unreached
    zone = np.select([supported, against <= TAIL / places, none], [SUPPORTED, CONTRADICTED, NO_EFFECT], INCONCLUSIVE)
    return Finding(effect, zone, p, against, unreached, alike)


def _unreached(values: Values, contrast: Contrast, contexts: Sequence[str]) -> NDArray[np.bool_]:
    """Whether in both arms more than half of the runs have the horizon for their time."""
    times, horizons = (strata_of(values, contrast, contexts, name) for name in (contrast.endpoint, "horizon"))
    late = []
    for arm in ("arm", "baseline"):
        both = [(getattr(time, arm), getattr(horizon, arm)) for time, horizon in zip(times, horizons, strict=True)]
        late.append(np.concatenate([time >= horizon for time, horizon in both if time is not None], axis=-1).mean(axis=-1))
    return (late[0] > 0.5) & (late[1] > 0.5)


def find_overall(values: Values, contrast: Contrast, contexts: Sequence[str], rule: str) -> Finding:
    """Return what a contrast shows over all contexts.

    They are pooled; but under the rule not_worse each must hold (intersection-union), and one that is worse contradicts (Holm).
    """
    pooled = find(values, contrast, contexts, rule)
    if rule != "not_worse":
        return pooled
    each = [find(values, contrast, (context,), rule, len(contexts)) for context in contexts]
    return Finding(pooled.effect, *together(each), pooled.unreached, np.any([finding.alike for finding in each], axis=0))


def together(findings: Sequence[Finding]) -> tuple[Codes, Array, Array]:
    """Return zone and p-values of all findings at once: all must hold, and one that does not contradicts them all."""
    zones = np.stack([finding.zone for finding in findings])
    conditions = [(zones == CONTRADICTED).any(axis=0), (zones == SUPPORTED).all(axis=0), (zones == NO_EFFECT).any(axis=0)]
    zone = np.select(conditions, [CONTRADICTED, SUPPORTED, NO_EFFECT], INCONCLUSIVE)
    against = np.minimum(len(findings) * np.min([finding.against for finding in findings], axis=0), 1.0)
    return zone, np.max([finding.p for finding in findings], axis=0), against


@dataclass(frozen=True)
class Interaction:
    """How much an effect differs between two sets of contexts.

    Attributes:
        contexts: both sets.
        findings: in each.
        limits: the interval of the difference, simultaneous over all interactions of a claim.
        differs: whether the findings are in different zones, with a spread to judge by, and the interval is beyond the margin.
    """

    contexts: tuple[tuple[str, ...], tuple[str, ...]]
    findings: tuple[Finding, Finding]
    limits: tuple[Array, Array]
    differs: NDArray[np.bool_]


@dataclass(frozen=True)
class Decision:
    """What is decided of a claim.

    Attributes:
        word: places in WORDS.
        contexts: findings of the primary contrast in each.
        overall: the same over all.
        also, controls: findings over all contexts.
        interactions: how much it differs between the levels of a condition.
        p: for the claim, and `against` it, adjusted for the number of claims.
    """

    word: Codes
    contexts: tuple[Finding, ...]
    overall: Finding
    also: tuple[Finding, ...]
    controls: tuple[Finding, ...]
    interactions: tuple[Interaction, ...]
    p: Array
    against: Array


def decide(claims: Sequence[Claim], values: Values) -> list[Decision]:
    """Return the decisions on all claims; p-values are adjusted over them (Holm), in each direction at 0.025."""
    overall = [
        [find_overall(values, contrast, claim.contexts, claim.rule) for contrast in (claim.primary, *claim.also)]
        for claim in claims
    ]
    parts = [together(findings) for findings in overall]
    p = holm(np.stack([part[1] for part in parts], axis=-1))
    against = holm(np.stack([part[2] for part in parts], axis=-1))
    decisions = []
    for place, (claim, (primary, *also), (zone, _, _)) in enumerate(zip(claims, overall, parts, strict=True)):
        contexts = [find(values, claim.primary, (context,), claim.rule, len(claim.contexts)) for context in claim.contexts]
        controls = [find(values, control, claim.contexts, "beyond") for control in claim.controls]
        interactions = _interactions(claim, values, contexts) if claim.rule != "not_worse" else ()
        too_many = ((zone == SUPPORTED) & (p[..., place] > TAIL)) | ((zone == CONTRADICTED) & (against[..., place] > TAIL))
        word = np.where(too_many, INCONCLUSIVE, zone)
        for interaction in interactions:
            word = np.where(interaction.differs, CONDITIONAL, word)
        word = np.where(_any_fails(claim, controls, word.shape), NOT_INFORMATIVE, word)
        found = Decision(word, (*contexts,), primary, (*also,), (*controls,), interactions, p[..., place], against[..., place])
        decisions.append(found)
    return decisions


def _interactions(claim: Claim, values: Values, contexts: Sequence[Finding]) -> tuple[Interaction, ...]:
    """Return how much a claim's effect differs between the levels of its conditions, or between each two contexts."""
    singles = [(context,) for context in claim.contexts]
    sides = [*claim.conditions.values()] or [*combinations(singles, 2)]
    found = dict(zip(singles, contexts, strict=True))
    levels = dict.fromkeys(level for both in sides for level in both)
    found |= {level: find(values, claim.primary, level, claim.rule, len(levels)) for level in levels.keys() - found.keys()}
    interval = 1 - 2 * TAIL / max(len(sides), 1)
    return tuple(_interaction(both, (found[both[0]], found[both[1]]), interval, margin_of(claim.primary)) for both in sides)


def _interaction(
    contexts: tuple[tuple[str, ...], tuple[str, ...]], findings: tuple[Finding, Finding], level: float, margin: float
) -> Interaction:
    first, second = findings
    low, high = interaction_limits(first.effect, second.effect, level)
    differs = (first.zone != second.zone) & ((low > margin) | (high < -margin)) & ~(first.alike | second.alike)
    return Interaction(contexts, findings, (low, high), differs)


def _any_fails(claim: Claim, controls: Sequence[Finding], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Whether a control fails: the same arm again must show no effect, all others must be supported."""
    fails = np.zeros(shape, dtype=bool)
    for contrast, control in zip(claim.controls, controls, strict=True):
        fails |= control.zone != must_be(contrast)
    return fails


def must_be(control: Contrast) -> int:
    """Return the place in WORDS of what a control must show."""
    return NO_EFFECT if control.arm == AA else SUPPORTED
