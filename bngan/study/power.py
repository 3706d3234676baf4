"""What could a study find out? Many simulated studies, with a known truth, through the same decisions as a real one."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from bngan.study.decisions import ZONES, Values, Zone, find
from bngan.study.endpoints import ENDPOINTS, FAILED_FID, USEFUL_FID, Kind
from bngan.study.spec import AA, Block, Contrast, Study
from bngan.study.statistics import Array, best

# What is assumed before there are data: how much runs of an arm differ (of ratios the standard deviation of the logarithm), how
# many fail, and how large an effect must be found for a study to be worth running.
SPREAD: Mapping[Kind, float] = {"ratio": 0.3, "difference": 0.05, "rate": 0.0}
FAILING = 0.2
LARGE: Mapping[Kind, float] = {"ratio": 3.0, "difference": 0.5, "rate": 0.6}
ENDPOINT_OF: Mapping[Kind, str] = {"ratio": "fid", "difference": "coverage", "rate": "failure"}
STUDIES = 1000


# Power ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power:
    """How often studies come to each zone.

    Attributes:
        n: runs of each arm.
        effect: the truth: a ratio above 1 or a difference above 0, in the claim's direction.
        spread: standard deviation of runs; of ratios that of the logarithm; rates have none of their own.
        shares: of studies, by zone.
    """

    n: int
    effect: float
    spread: float
    shares: Mapping[Zone, float]


def power(kind: Kind, n: int, margin: float, effect: float, spread: float, studies: int = STUDIES) -> Power:
    """Return how often a contrast of n runs an arm comes to each zone, by simulation with a fixed seed.

    Runs of ratios are lognormal, those of differences normal; of rates the arm's is FAILING, and the baseline's so much above.
    """
    contrast = Contrast("arm", "baseline", ("block",), ENDPOINT_OF[kind], margin, "less" if kind == "rate" else "more")
    generator = np.random.default_rng(n)
    arm, baseline = generator.normal(scale=spread, size=(2, studies, n))
    if kind == "ratio":
        arm, baseline = effect * np.exp(arm), np.exp(baseline)
    elif kind == "difference":
        arm = arm + effect
    else:
        drawn = generator.random((2, studies, n))
        arm, baseline = (drawn[0] < FAILING).astype(float), (drawn[1] < FAILING + effect).astype(float)
    values = {(contrast.endpoint, "block", "context", name): {"": x} for name, x in (("arm", arm), ("baseline", baseline))}
    counts = Counter(find(values, contrast, ("context",), "beyond").zone.tolist())
    return Power(n, effect, spread, {name: counts[place] / studies for place, name in enumerate(ZONES)})


def power_table(
    kind: Kind, margin: float, runs: Sequence[int] = (6, 12, 24, 64), spreads: Sequence[float] | None = None
) -> list[Power]:
    """Return the power with no effect, an effect as large as the margin, and one twice as large (of ratios its square)."""
    effects = (1.0, margin, margin**2) if kind == "ratio" else (0.0, margin, 2 * margin)
    spreads = spreads or ((0.15, 0.3, 0.5) if kind == "ratio" else (SPREAD[kind],))
    return [power(kind, n, margin, effect, spread) for spread, effect, n in product(spreads, effects, runs)]


@cache
def can_decide(kind: Kind, n: int, margin: float) -> bool:
    """Return whether n runs an arm have at least an even chance to come to a verdict, be it that there is no effect, or that
    a large one is there: a ratio of 3, a difference of 0.5, or rates of 0.2 and 0.8."""
    nothing = power(kind, n, margin, 1.0 if kind == "ratio" else 0.0, SPREAD[kind]).shares["no practical effect"]
    return max(nothing, power(kind, n, margin, LARGE[kind], SPREAD[kind]).shares["supported"]) >= 0.5


# Whole studies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """How runs of an arm turn out.

    Attributes:
        fid: the geometric mean at the best rate.
        spread: standard deviation of log FID.
        failing: share of runs that fail.
        steepness: at the k-th rate beside the best FID is exp(steepness k^2) times as much.
    """

    fid: float = 4.0
    spread: float = 0.3
    failing: float = 0.0
    steepness: float = 0.15


def simulate(study: Study, truths: Mapping[str, Truth], studies: int, seed: int) -> Values:
    """Return the endpoints (studies, n) of runs of a study's claims, as if it had been run so often; pilots choose in each.

    FID is as the truth says; times to an FID grow with it, shares (coverage, modes) fall with its logarithm. Where rates
    matter, pilots may choose a worse one for the baseline, and runs at that rate are worse: intervals do not tell of that.

    Args:
        study: what is planned.
        truths: of arms, by name; of those that have none the default.
        studies: how many.
        seed: of everything that is drawn.
    """
    generator = np.random.default_rng(seed)
    blocks = {block.name: block for block in study.blocks}
    asked = sorted(
        {cell for claim in study.claims for contrast in claim.contrasts for cell in _cells(contrast, claim.contexts)}
    )
    runs: dict[tuple[str, str, str], dict[str, tuple[Array, Array]]] = {}
    values: dict[tuple[str, str, str, str], dict[str, Array]] = {}
    for endpoint, name, context, arm in asked:
        block = blocks[name]
        if (name, context, arm) not in runs:
            truth = truths.get(block.aa[context] if arm == AA else arm, Truth())
            runs[name, context, arm] = dict(_runs(block, blocks, arm, truth, studies, generator))
        drawn = runs[name, context, arm]
        values[endpoint, name, context, arm] = {axes: _endpoint(endpoint, *of, block.iterations) for axes, of in drawn.items()}
        values["horizon", name, context, arm] = {axes: np.full(fid.shape, block.iterations) for axes, (fid, _) in drawn.items()}
    return values


def _cells(contrast: Contrast, contexts: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    for block, context, arm in product(contrast.blocks, contexts, (contrast.arm, contrast.baseline)):
        if arm is not None:
            yield contrast.endpoint, block, context, arm


def _runs(
    block: Block, blocks: Mapping[str, Block], arm: str, truth: Truth, studies: int, generator: np.random.Generator
) -> Iterator[tuple[str, tuple[Array, Array]]]:
    """Yield an arm's runs, FID and whether they fail, each (studies, n), by the values of their axes."""
    seeds = block.aa_seeds if arm == AA else block.seeds.get("fresh", ()) or block.seeds.get("pilot", ())
    if block.chosen_from is None:
        for place, worse in enumerate(_profile(block, truth)):
            yield f"{place}", _draw(truth, worse, (studies, len(seeds)), generator)
    else:
        source = blocks[block.chosen_from]
        profile = _profile(source, truth)
        fid, failed = _draw(truth, profile[:, None], (studies, len(profile), len(source.seeds["pilot"])), generator)
        chosen = best(np.where(failed > 0, FAILED_FID, fid))  # (studies,)
        yield "chosen", _draw(truth, profile[chosen][:, None], (studies, len(seeds)), generator)


def _profile(block: Block, truth: Truth) -> Array:
    """Return by how much log FID is worse at each value of a block's axes."""
    places = math.prod(map(len, block.axes.values()))
    return truth.steepness * np.square(np.arange(places) - places // 2)


def _draw(truth: Truth, worse: Array | float, shape: tuple[int, ...], generator: np.random.Generator) -> tuple[Array, Array]:
    fid = truth.fid * np.exp(worse + truth.spread * generator.normal(size=shape))
    return np.minimum(fid, FAILED_FID), (generator.random(shape) < truth.failing).astype(float)


def _endpoint(name: str, fid: Array, failed: Array, iterations: int) -> Array:
    """Return an endpoint of runs; a failed one has the worst."""
    endpoint = ENDPOINTS[name]
    if endpoint.kind == "rate":
        return failed
    if endpoint.of_means:
        return np.where(failed > 0, iterations, np.minimum(iterations, iterations * fid / (3 * USEFUL_FID)))
    if endpoint.kind == "ratio":
        return np.where(failed > 0, FAILED_FID, fid)
    return np.where(failed > 0, 0.0, 0.5 - 0.1 * np.log(fid / USEFUL_FID))
