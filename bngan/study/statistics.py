"""How sure are we? Estimates with intervals and p-values of arrays (..., n) of n runs; leading dimensions are other studies."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bngan.study.endpoints import Kind, badness
from bngan.study.spec import AA, Block, Choice, Result, Study, Value, as_number

Array = NDArray[np.float64]
BISECTIONS = 45
NEWTON_STEPS = 60
ROUNDING = 1e-12  # a standard error below it is one of arithmetic


# Distributions --------------------------------------------------------------------------------------------------------


def normal_survival(z: Array) -> Array:
    """Return P(Z > z) of a standard normal variable."""
    return torch.special.erfc(torch.as_tensor(z / math.sqrt(2), dtype=torch.float64)).numpy() / 2  # exact in the tail


def normal_quantile(tail: float) -> float:
    """Return z with P(Z > z) = tail, for a tail between 0 and 1."""
    return -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64)))


def incomplete_beta(a: Array, b: Array, x: Array) -> Array:
    """Return the regularized incomplete beta function I_x(a, b), for x in [0, 1].

    By the continued fraction (NIST Digital Library of Mathematical Functions, 8.17.22), which converges quickly on the near
    side of the mean; the far side follows by symmetry.
    """
    a, b, x = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float), np.asarray(x, float))
    far = x > (a + 1) / (a + b + 2)
    a, b, x = np.where(far, b, a), np.where(far, a, b), np.where(far, 1 - x, x)
    fraction = np.ones_like(x)
    for m in reversed(range(int(12 + 2 * math.sqrt(np.max(a + b, initial=1.0))))):
        even = (m + 1) * (b - m - 1) * x / ((a + 2 * m + 1) * (a + 2 * m + 2))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + odd / (1 + even / fraction)
    with np.errstate(divide="ignore"):
        log_front = a * np.log(x) + b * np.log1p(-x) - np.log(a) - _log_beta(a, b)
    value = np.exp(log_front) / fraction
    return np.where(far, 1 - value, value)


def beta_quantile(p: Array, a: Array, b: Array) -> Array:
    """Return x with I_x(a, b) = p."""
    shape = np.broadcast_shapes(np.shape(p), np.shape(a), np.shape(b))
    return bisect(lambda x: incomplete_beta(a, b, x) >= p, np.zeros(shape), np.ones(shape))


def t_survival(t: Array, freedom: Array) -> Array:
    """Return P(T > t) of Student's t with that many degrees of freedom; t may be infinite."""
    tail = incomplete_beta(freedom / 2, np.asarray(0.5), freedom / (freedom + np.square(t))) / 2
    return np.where(t > 0, tail, 1 - tail)


def t_quantile(tail: float, freedom: Array) -> Array:
    """Return t with P(T > t) = tail, for a tail below 0.5.

    By Newton's method from the normal quantile, which is less; the tail is convex there, so steps do not go too far.
    """
    t = np.full(np.shape(freedom), normal_quantile(tail))
    log_scale = np.log(freedom) / 2 + _log_beta(np.asarray(0.5), freedom / 2)
    for _ in range(NEWTON_STEPS):
        density = np.exp(-(freedom + 1) / 2 * np.log1p(t**2 / freedom) - log_scale)
        step = (t_survival(t, freedom) - tail) / density
        t = t + step
        if np.all(step <= 1e-12 * t):
            break
    return t


def bisect(is_high: Callable[[Array], NDArray[np.bool_]], low: Array, high: Array) -> Array:
    """Return where, between `low` and `high`, something that is first false becomes true."""
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        at_end = is_high(middle)
        low, high = np.where(at_end, low, middle), np.where(at_end, middle, high)
    return (low + high) / 2


def _log_beta(a: Array, b: Array) -> Array:
    log_gamma = [torch.lgamma(torch.as_tensor(x, dtype=torch.float64)).numpy() for x in (a, b, a + b)]
    return log_gamma[0] + log_gamma[1] - log_gamma[2]


# Estimates ------------------------------------------------------------------------------------------------------------


class Effect(Protocol):
    """An estimate with an interval: of something that is positive if a claim is right."""

    @property
    def value(self) -> Array:
        """The estimate."""
        ...

    @property
    def alike(self) -> NDArray[np.bool_]:
        """Whether runs came out so alike that there is no spread by which to judge."""
        ...

    def limits(self, level: float) -> tuple[Array, Array]:
        """Return both ends of the interval that has the truth in it with probability `level`."""
        ...

    def p_above(self, bound: float) -> Array:
        """Return the one-sided p-value that speaks for an effect above `bound`: below a / 2 if the 1 - a interval is."""
        ...

    def p_below(self, bound: float) -> Array:
        """Return the one-sided p-value that speaks for an effect below `bound`."""
        ...


@dataclass(frozen=True)
class MeanEffect:
    """An estimate whose error follows Student's t.

    Attributes:
        value: the estimate.
        variance: of its error, infinite where it is not known.
        freedom: degrees of freedom of the variance.
    """

    value: Array
    variance: Array
    freedom: Array

    @property
    def alike(self) -> NDArray[np.bool_]:
        return np.asarray(self.variance <= ROUNDING**2)

    def limits(self, level: float) -> tuple[Array, Array]:
        half = t_quantile((1 - level) / 2, self.freedom) * np.sqrt(self.variance)
        return self.value - half, self.value + half

    def p_above(self, bound: float) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (self.value - bound) / np.sqrt(self.variance)
        return t_survival(np.nan_to_num(t, posinf=np.inf, neginf=-np.inf), self.freedom)

    def p_below(self, bound: float) -> Array:
        return MeanEffect(-self.value, self.variance, self.freedom).p_above(-bound)


@dataclass(frozen=True)
class Bracket:
    """An effect at values of an axis that were chosen, perhaps not well, with ends that a bad choice does not move.

    The effect asked for is that of the arm at its best value over the baseline at its own. It is no less than that of the arm
    at its chosen value over the baseline's best, and no more than the other way round; tests of both the chosen and the other
    must speak for it (intersection-union, Berger 1982). One that did best by luck only widens the interval.

    Attributes:
        chosen: at the chosen values of both.
        least: of the arm at its chosen value over the baseline at the one that did best.
        most: of the arm at the one that did best over the baseline at its chosen value.
    """

    chosen: Effect
    least: Effect
    most: Effect

    @property
    def value(self) -> Array:
        return self.chosen.value

    @property
    def alike(self) -> NDArray[np.bool_]:
        return self.chosen.alike | self.least.alike | self.most.alike

    def limits(self, level: float) -> tuple[Array, Array]:
        low, high = self.chosen.limits(level)
        return np.minimum(low, self.least.limits(level)[0]), np.maximum(high, self.most.limits(level)[1])

    def p_above(self, bound: float) -> Array:
        return np.maximum(self.chosen.p_above(bound), self.least.p_above(bound))

    def p_below(self, bound: float) -> Array:
        return np.maximum(self.chosen.p_below(bound), self.most.p_below(bound))


@dataclass(frozen=True)
class RateEffect:
    """A difference of two rates, arm minus baseline, averaged over strata.

    Newcombe's hybrid of Wilson's intervals (Newcombe 1998, Statistics in Medicine 17:873, method 10), for strata by Yan and
    Su (2010, Statistics in Biopharmaceutical Research 2:381). It has a width where all runs do or none does, which an interval
    of means has not.

    Attributes:
        counts: of arm and baseline, each (..., strata): runs that did.
        sizes: of arm and baseline, each (strata,): runs.
        weights: of the strata, which add up to 1.
    """

    counts: tuple[Array, Array]
    sizes: tuple[Array, Array]
    weights: Array

    @property
    def value(self) -> Array:
        return self._rate(0) - self._rate(1)

    @property
    def alike(self) -> NDArray[np.bool_]:
        return np.zeros(self.counts[0].shape[:-1], dtype=bool)  # Wilson's interval has a width of its own

    def limits(self, level: float) -> tuple[Array, Array]:
        return self._limits(np.asarray(normal_quantile((1 - level) / 2)))

    def p_above(self, bound: float) -> Array:
        """Return the p-value of the interval that just touches the bound."""
        above = self.value > bound
        low, high = np.zeros(above.shape), np.full(above.shape, 40.0)

        def reaches(quantile: Array) -> NDArray[np.bool_]:
            lower, upper = self._limits(quantile)
            return np.where(above, lower <= bound, upper >= bound)

        tail = normal_survival(bisect(reaches, low, high))
        return np.where(above, tail, 1 - tail)

    def p_below(self, bound: float) -> Array:
        swapped = RateEffect((self.counts[1], self.counts[0]), (self.sizes[1], self.sizes[0]), self.weights)
        return swapped.p_above(-bound)

    def _rate(self, of: int) -> Array:
        return np.sum(self.weights * self.counts[of] / self.sizes[of], axis=-1)

    def _limits(self, quantile: Array) -> tuple[Array, Array]:
        """Return the interval for a quantile of shape () or (...)."""
        low, high = wilson(self.counts[0], self.sizes[0], self.weights, quantile)
        base_low, base_high = wilson(self.counts[1], self.sizes[1], self.weights, quantile)
        rate, base = self._rate(0), self._rate(1)
        return rate - base - np.hypot(rate - low, base_high - base), rate - base + np.hypot(high - rate, base - base_low)


def wilson(counts: Array, sizes: Array, weights: Array, quantile: Array) -> tuple[Array, Array]:
    """Return Wilson's interval of a rate averaged over strata (Yan and Su 2010); of one stratum his own (Wilson 1927).

    Each stratum's interval is taken at a quantile so much smaller that their average is as wide as that of independent
    errors; the variances that say how much are of rates drawn to 1/2 by two runs, so that none is 0. Quantiles are larger by
    n / (n - 1) under the root, for p (1 - p) / n is too small by that on average. Without it, strata of 3 and of 10 runs put
    an interval beyond the truth in up to 0.040 of studies in place of 0.025.

    Args:
        counts: (..., strata) runs that did.
        sizes: (strata,) runs.
        weights: (strata,) that add up to 1.
        quantile: () or (...) of the normal distribution.
    """
    drawn = (counts + 1) / (sizes + 2)
    deviation = weights * np.sqrt(drawn * (1 - drawn) / sizes)
    shrunk = quantile[..., None] * (np.sqrt(np.sum(deviation**2, axis=-1)) / np.sum(deviation, axis=-1))[..., None]
    shrunk = shrunk * np.sqrt(sizes / np.maximum(sizes - 1, 0.5))
    square = shrunk**2
    centre = (counts + square / 2) / (sizes + square)
    half = shrunk / (sizes + square) * np.sqrt(counts * (sizes - counts) / sizes + square / 4)
    return np.sum(weights * (centre - half), axis=-1), np.sum(weights * (centre + half), axis=-1)


@cache  # many cells have the same counts
def clopper_pearson(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a rate (Clopper and Pearson 1934)."""
    tail = np.asarray((1 - level) / 2)
    low = beta_quantile(tail, np.asarray(count), np.asarray(n - count + 1)) if count > 0 else 0.0
    high = beta_quantile(1 - tail, np.asarray(count + 1), np.asarray(n - count)) if count < n else 1.0
    return float(low), float(high)


@dataclass(frozen=True)
class Stratum:
    """Runs that differ in the arm alone.

    Attributes:
        weight: in the mean over all strata.
        arm: (..., n) endpoints of its runs.
        baseline: (..., m) of those that it is compared with, None where endpoints are comparisons within runs.
    """

    weight: float
    arm: Array
    baseline: Array | None


def effect_of(strata: Sequence[Stratum], kind: Kind, *, more: bool = True, of_means: bool = False) -> Effect:
    """Return how much more, or how much less, of an endpoint the arm has than the baseline, as a mean over strata.

    Rates: Newcombe. Differences and ratios: Welch's t, the variance of each stratum and arm by itself, with Satterthwaite's
    degrees of freedom (Welch 1947); ratios as logarithms, those of means by the delta method.
    """
    pairs = [(stratum.arm, stratum.baseline) for stratum in strata if stratum.baseline is not None]
    if kind == "rate" and pairs:
        arm, base = (0, 1) if more else (1, 0)
        counts = [np.stack([pair[of].sum(axis=-1) for pair in pairs], axis=-1) for of in (arm, base)]
        sizes = [np.array([pair[of].shape[-1] for pair in pairs], dtype=float) for of in (arm, base)]
        weights = np.array([stratum.weight for stratum in strata])
        return RateEffect(counts=(counts[0], counts[1]), sizes=(sizes[0], sizes[1]), weights=weights)
    sign = 1 if more else -1
    terms = [(sign * stratum.weight, mean_of(stratum.arm, kind, of_means)) for stratum in strata]
    terms += [(-sign * s.weight, mean_of(s.baseline, kind, of_means)) for s in strata if s.baseline is not None]
    return combine(terms)


def mean_of(values: Array, kind: Kind, of_means: bool = False) -> MeanEffect:
    """Return what a cell of runs says: the mean, the mean logarithm, or the logarithm of the mean."""
    value, errors = deviations(values, kind, of_means)
    n = values.shape[-1]
    variance = np.sum(errors**2, axis=-1) / (n * (n - 1)) if n > 1 else np.full(value.shape, np.inf)
    return MeanEffect(value, variance, np.full(value.shape, max(n - 1, 1), dtype=float))


def deviations(values: Array, kind: Kind, of_means: bool = False) -> tuple[Array, Array]:
    """Return a cell's estimate (...), and how each run moves it (..., n), which adds up to 0."""
    if kind == "ratio" and not of_means:
        values = np.log(values)
    mean = values.mean(axis=-1)
    errors = values - mean[..., None]
    return (np.log(mean), errors / mean[..., None]) if of_means else (mean, errors)


def combine(terms: Sequence[tuple[float, MeanEffect]]) -> MeanEffect:
    """Return a weighted sum of independent estimates, with Satterthwaite's degrees of freedom."""
    value, variance, inverse = (np.zeros(()) for _ in range(3))
    for weight, term in terms:
        value = value + weight * term.value
        variance = variance + weight**2 * term.variance
    known = np.where((variance > 0) & np.isfinite(variance), variance, 1.0)
    for weight, term in terms:
        share = np.where(np.isfinite(term.variance), weight**2 * term.variance / known, 0.0)
        inverse = inverse + share**2 / term.freedom
    all_of_them = sum(term.freedom for _, term in terms)
    return MeanEffect(value, variance, np.where(inverse > 0, 1 / np.where(inverse > 0, inverse, 1.0), all_of_them))


# Pairs and ranks: what else is shown ----------------------------------------------------------------------------------


def paired(strata: Sequence[Stratum], kind: Kind, *, more: bool = True, of_means: bool = False) -> tuple[float, MeanEffect]:
    """Return the correlation over pairs of equal seed, in whose order the runs of both arms stand, and the paired effect."""
    sign, terms, products, squares, base_squares = (1 if more else -1), [], 0.0, 0.0, 0.0
    for stratum in strata:
        assert stratum.baseline is not None
        n = stratum.arm.shape[-1]
        (value, errors), (base, base_errors) = (deviations(x, kind, of_means) for x in (stratum.arm, stratum.baseline))
        variance = np.sum((errors - base_errors) ** 2, axis=-1) / (n * (n - 1)) if n > 1 else np.asarray(np.inf)
        terms.append((sign * stratum.weight, MeanEffect(value - base, variance, np.asarray(max(n - 1, 1), dtype=float))))
        products += float(np.sum(errors * base_errors))
        squares += float(np.sum(errors**2))
        base_squares += float(np.sum(base_errors**2))
    spread = math.sqrt(squares * base_squares)
    return products / spread if spread > 0 else math.nan, combine(terms)


def superiority(strata: Sequence[Stratum], *, more: bool = True) -> MeanEffect:
    """Return P(a run of the arm has more, or less, than one of the baseline), ties counted half (Brunner and Munzel 2000)."""
    terms = []
    for stratum in strata:
        assert stratum.baseline is not None
        arm, base = stratum.arm[..., :, None], stratum.baseline[..., None, :]
        wins = (arm > base if more else arm < base) + 0.5 * (arm == base)  # (..., n, m)
        arm_term, base_term = (mean_of(wins.mean(axis=axis), "difference") for axis in (-1, -2))
        terms.append((stratum.weight, arm_term))
        terms.append((stratum.weight, MeanEffect(np.zeros(()), base_term.variance, base_term.freedom)))
    return combine(terms)


def rank_sum_p(strata: Sequence[Stratum]) -> float:
    """Return the exact two-sided p-value of Wilcoxon, Mann and Whitney's rank sum over all ways to deal out the arms.

    Ties have mean ranks; rank sums of several strata are added.
    """
    observed, chances = 0, np.ones(1)
    for stratum in strata:
        assert stratum.baseline is not None
        every = np.concatenate([stratum.arm, stratum.baseline])
        below, equal = (every[:, None] > every).sum(axis=1), (every[:, None] == every).sum(axis=1)
        doubled = 2 * below + equal + 1  # twice the mean rank
        observed += int(doubled[: len(stratum.arm)].sum())
        chances = np.convolve(chances, _rank_sum_chances(doubled, len(stratum.arm)))
    tails = chances[: observed + 1].sum(), chances[observed:].sum()
    return min(1.0, 2 * float(min(tails)))


def _rank_sum_chances(ranks: NDArray[np.int64], n: int) -> Array:
    """Return the probability of each sum of n of the ranks, drawn without replacement."""
    chances = np.zeros((n + 1, int(ranks.sum()) + 1))
    chances[0, 0] = 1.0
    for seen, rank in enumerate(ranks, start=1):
        share = np.arange(n + 1)[:, None] / seen  # of all sets of k of those seen, the part that has this one
        moved = np.zeros_like(chances)
        moved[1:, rank:] = chances[:-1, : chances.shape[1] - rank]
        chances = (1 - share) * chances + share * moved
    return chances[n]


# Several tests --------------------------------------------------------------------------------------------------------


def holm(p: Array) -> Array:
    """Return p-values (..., tests) adjusted for their number (Holm 1979)."""
    tests = p.shape[-1]
    order = np.argsort(p, axis=-1)
    stepped = np.take_along_axis(p, order, axis=-1) * np.arange(tests, 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(stepped, axis=-1), 1.0)
    return np.take_along_axis(adjusted, np.argsort(order, axis=-1), axis=-1)


def equivalence_p(effect: Effect, margin: float) -> Array:
    """Return the p-value that speaks for an effect within -margin to margin: two one-sided tests (Schuirmann 1987)."""
    return np.maximum(effect.p_above(-margin), effect.p_below(margin))


def interaction_limits(effect: Effect, other: Effect, level: float) -> tuple[Array, Array]:
    """Return the interval of the difference of two independent effects, from theirs (Zou and Donner 2008, MOVER)."""
    (low, high), (other_low, other_high) = effect.limits(level), other.limits(level)
    value = effect.value - other.value
    return (
        value - np.hypot(effect.value - low, other_high - other.value),
        value + np.hypot(high - effect.value, other.value - other_low),
    )


def seeds_needed(n: int, half_width: float, margin: float) -> int | None:
    """Return how many runs an arm needs for an interval as wide as the margins, if n give that half width."""
    return math.ceil(n * (half_width / margin) ** 2) if math.isfinite(half_width) else None


# Choosing by pilots ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """What an arm's pilots chose.

    Attributes:
        axes: the values: of equally good ones the least, or those at which there are fresh runs already.
        regret: by how much the value that half of the pilots choose is worse on the other half than the one which that half
            chooses for itself, and so too large rather than too small: FID's ratio, or a difference of shares of modes
            missed. NaN for a single pilot.
        at_edge: whether a value is the least or the greatest of three or more, so that a better one may lie outside.
        tied: whether other values did as well.
    """

    axes: dict[str, Value]
    regret: float
    at_edge: bool
    tied: bool


def best(scores: Array) -> NDArray[np.int64]:
    """Return which of the values (..., values, pilots) has the least median, of equals the least mean, of these the first."""
    return np.lexsort((scores.mean(axis=-1), np.median(scores, axis=-1)), axis=-1)[..., 0]


def by_axes(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Return results by the values of their axes, in the order of these, whichever run ended first; each by seed."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: (*map(_order, result.run.axes.values()), result.run.seed)):
        found.setdefault(repr(result.run.axes), []).append(result)
    return found


def _order(value: Value) -> tuple[float, str]:
    """Return what sorts numbers by size, and words by letters."""
    return as_number(value), str(value)


def choices(block: Block, results: Iterable[Result], made: Choice | None = None) -> dict[tuple[str, str], Chosen]:
    """Return what a block's pilots choose, by context and arm; failed runs are the worst, and never left out.

    Args:
        block: whose pilots choose.
        results: of the study, others than those of the block's pilots being left aside.
        made: the choice by which there are fresh runs already (see `choice_made`): it stays.
    """
    pilots: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if result.run.block == block.name and result.run.role == "pilot":
            pilots.setdefault((result.run.context, result.run.arm), []).append(result)
    return {cell: _chosen(block, by_axes(of), (made or {}).get(cell)) for cell, of in pilots.items()}


def choose(block: Block, results: Iterable[Result]) -> Choice:
    """Return the values of the axes that a block's pilots choose, by context and arm."""
    return {cell: chosen.axes for cell, chosen in choices(block, results).items()}


def choice_made(study: Study, source: Block, results: Iterable[Result]) -> Choice:
    """Return the choice of a block's pilots by which there are fresh runs already, by context and arm."""
    takers = {block.name: block for block in study.blocks if block.chosen_from == source.name}
    fresh = [result.run for result in results if result.run.block in takers and result.run.role == "fresh"]
    return {(takers[run.block].chosen_as.get(run.context, run.context), run.arm): run.axes for run in fresh if run.arm != AA}


def best_of(values: Array, kind: Kind, *, more: bool, of_means: bool = False) -> Array:
    """Return the runs (..., n) at that of the values (..., values, n) where their mean is most, or least."""
    means, _ = deviations(values, kind, of_means)
    place = (means if more else -means).argmax(axis=-1)
    return np.take_along_axis(values, place[..., None, None], axis=-2)[..., 0, :]


def cross_fitted(scores: Array, values: Array) -> Array:
    """Return the endpoints (..., n) of all seeds, of each half at the value that the other half chooses.

    Args:
        scores: (..., values, n) by which to choose, the least being the best.
        values: (..., values, n) endpoints.
    """
    fitted = np.empty(values[..., 0, :].shape)
    for half, other in ((0, 1), (1, 0)):
        place = best(scores[..., other::2])
        fitted[..., half::2] = np.take_along_axis(values[..., half::2], place[..., None, None], axis=-2)[..., 0, :]
    return fitted


def _chosen(block: Block, runs: dict[str, list[Result]], made: Mapping[str, Value] | None) -> Chosen:
    scores = np.array([[badness(result) for result in results] for results in runs.values()])
    place = int(best(scores))
    axes = dict(made or [*runs.values()][place][0].run.axes)
    ranks = np.stack([np.median(scores, axis=-1), scores.mean(axis=-1)])
    tied = int((ranks == ranks[:, [place]]).all(axis=0).sum()) > 1
    as_ratio = block.task == "digits"
    regret = regret_of(np.log(scores) if as_ratio else scores)
    numbers = {name: sorted(values, key=as_number) for name, values in block.axes.items() if len(values) > 2}
    at_edge = any(axes[name] in (values[0], values[-1]) for name, values in numbers.items())
    return Chosen(axes, math.exp(regret) if as_ratio else regret, at_edge, tied)


def regret_of(scores: Array) -> float:
    """Return the regret of choosing among values (values, pilots), by choosing on half of the pilots, and on the other."""
    if scores.shape[-1] < 2:
        return math.nan
    halves = scores[:, ::2], scores[:, 1::2]
    first, second = (int(best(half)) for half in halves)
    means = [half.mean(axis=-1) for half in halves]
    return float((means[1][first] - means[1][second] + means[0][second] - means[0][first]) / 2)
