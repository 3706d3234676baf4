"""What could a study find out? Many simulated studies, with a known truth, through the same decisions as a real one."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from bngan.study.decisions import CHOSEN, EVERY, ZONES, Values, Zone, find, key_of
from bngan.study.endpoints import ENDPOINTS, FAILED_FID, USEFUL_FID, Kind
from bngan.study.spec import AA, Block, Contrast, Study, nearest
from bngan.study.statistics import Array, best, cross_fitted

# What is assumed before there are data: how much runs of an arm differ (of ratios the standard deviation of the logarithm), how
# many fail, and how large an effect must be found for a study to be worth running.
SPREAD: Mapping[Kind, float] = {"ratio": 0.3, "difference": 0.05, "rate": 0.0}
FAILING = 0.2
LARGE: Mapping[Kind, float] = {"ratio": 3.0, "difference": 0.5, "rate": 0.7}
ENDPOINT_OF: Mapping[Kind, str] = {"ratio": "fid", "difference": "coverage", "rate": "failure"}
STUDIES = 1000
BESIDE = "beside"  # with a number, the name of runs at a value beside the chosen one


# Power ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power:
    """How often studies come to each zone.

    Attributes:
        n: runs of each arm, in each stratum.
        effect: the truth: a ratio above 1 or a difference above 0, in the claim's direction.
        spread: standard deviation of runs; of ratios that of the logarithm; rates have none of their own.
        shares: of studies, by zone.
    """

    n: int
    effect: float
    spread: float
    shares: Mapping[Zone, float]


def power(
    kind: Kind, n: int, margin: float, effect: float, spread: float, *, strata: int = 1, places: int = 1, studies: int = STUDIES
) -> Power:
    """Return how often a contrast comes to each zone, by simulation with a fixed seed.

    Runs of ratios are lognormal, those of differences normal; of rates the arm's is FAILING, and the baseline's so much above.

    Args:
        kind: of the endpoint.
        n: runs of each arm in each stratum.
        margin: of the contrast.
        effect: the truth.
        spread: of runs.
        strata: how many there are, of values of axes and blocks.
        places: over how many contexts intervals hold at once.
        studies: how many are simulated.
    """
    contrast = Contrast("arm", "baseline", ("block",), ENDPOINT_OF[kind], margin, "less" if kind == "rate" else "more")
    generator = np.random.default_rng(n)
    size = (2, strata, studies, n)
    arm, baseline = generator.normal(scale=spread, size=size)
    if kind == "ratio":
        arm, baseline = effect * np.exp(arm), np.exp(baseline)
    elif kind == "difference":
        arm = arm + effect
    else:
        drawn = generator.random(size)
        arm, baseline = (drawn[0] < FAILING).astype(float), (drawn[1] < FAILING + effect).astype(float)
    values = {
        (contrast.endpoint, "block", "context", name): {f"{stratum}": of for stratum, of in enumerate(runs)}
        for name, runs in (("arm", arm), ("baseline", baseline))
    }
    counts = Counter(find(values, contrast, ("context",), "beyond", places).zone.tolist())
    return Power(n, effect, spread, {name: counts[place] / studies for place, name in enumerate(ZONES)})


def power_table(
    kind: Kind,
    margin: float,
    runs: Sequence[int] = (6, 12, 24, 64),
    spreads: Sequence[float] | None = None,
    *,
    strata: int = 1,
    places: int = 1,
) -> list[Power]:
    """Return the power with no effect, an effect as large as the margin, and one twice as large (of ratios its square)."""
    effects = (1.0, margin, margin**2) if kind == "ratio" else (0.0, margin, 2 * margin)
    spreads = spreads or ((0.15, 0.3, 0.5) if kind == "ratio" else (SPREAD[kind],))
    cases = product(spreads, effects, runs)
    return [power(kind, n, margin, effect, spread, strata=strata, places=places) for spread, effect, n in cases]


@cache
def can_decide(kind: Kind, n: int, margin: float, strata: int = 1, places: int = 1) -> bool:
    """Return whether a contrast has at least an even chance to come to a verdict, be it that there is no effect, or that a
    large one is there: a ratio of 3, a difference of 0.5, or rates of 0.2 and 0.9; for the numbers see `power`."""

    def share(effect: float, zone: Zone) -> float:
        return power(kind, n, margin, effect, SPREAD[kind], strata=strata, places=places).shares[zone]

    return max(share(1.0 if kind == "ratio" else 0.0, "no practical effect"), share(LARGE[kind], "supported")) >= 0.5


# Whole studies --------------------------------------------------------------------------------------------------------


Drawn = tuple[Array, Array]  # FID of runs, and whether they fail


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
    matter, pilots may choose a worse one for an arm, and runs at that rate are worse.

    Args:
        study: what is planned.
        truths: of arms, by name; of those that have none the default.
        studies: how many.
        seed: of everything that is drawn.
    """
    generator = np.random.default_rng(seed)
    blocks = {block.name: block for block in study.blocks}
    runs: dict[tuple[str, str, str], dict[str, Drawn]] = {}
    values: dict[tuple[str, str, str, str], dict[str, Array]] = {}
    for contrast, (name, context, arm) in _cells(study):
        block = blocks[name]
        if (name, context, arm) not in runs:
            truth = truths.get(block.aa[context] if arm == AA else arm, Truth())
            runs[name, context, arm] = dict(_runs(block, blocks, arm, truth, studies, generator))
        drawn = runs[name, context, arm]
        drawn = (
            _cross_fitted(drawn) if contrast.cross_fitted else {axes: of for axes, of in drawn.items() if BESIDE not in axes}
        )
        for endpoint in (contrast.endpoint, "horizon"):
            values[key_of(contrast, endpoint), name, context, arm] = {
                axes: _endpoint(endpoint, *of, block.iterations) for axes, of in drawn.items()
            }
    return values


def _cells(study: Study) -> Iterator[tuple[Contrast, tuple[str, str, str]]]:
    """Yield every contrast with each block, context and arm of which it asks for runs."""
    for claim in study.claims:
        for contrast in claim.contrasts:
            for cell in product(contrast.blocks, claim.contexts, contrast.arms):
                yield contrast, cell


def _cross_fitted(drawn: Mapping[str, Drawn]) -> dict[str, Drawn]:
    """Return runs at the values that the other half of them chooses, and at every value."""
    fid, failed = (np.stack([of[part] for of in drawn.values()], axis=-2) for part in (0, 1))  # (studies, values, n)
    scores = np.where(failed > 0, FAILED_FID, fid)
    return {CHOSEN: (cross_fitted(scores, fid), cross_fitted(scores, failed)), EVERY: (fid, failed)}


def _runs(
    block: Block, blocks: Mapping[str, Block], arm: str, truth: Truth, studies: int, generator: np.random.Generator
) -> Iterator[tuple[str, Drawn]]:
    """Yield an arm's runs (studies, n) by the values of their axes."""
    seeds = block.aa_seeds if arm == AA else block.seeds.get("fresh", ()) or block.seeds.get("pilot", ())
    if block.chosen_from is None:
        for place, worse in enumerate(_profile(block, truth)):
            yield f"{place}", _draw(truth, worse, (studies, len(seeds)), generator)
    else:
        source = blocks[block.chosen_from]
        profile = _profile(source, truth)
        fid, failed = _draw(truth, profile[:, None], (studies, len(profile), len(source.seeds["pilot"])), generator)
        chosen = best(np.where(failed > 0, FAILED_FID, fid))  # (studies,)
        yield CHOSEN, _draw(truth, profile[chosen][:, None], (studies, len(seeds)), generator)
        if block.neighbours:
            beside = np.array([nearest(place, len(profile)) for place in range(len(profile))])[chosen]  # (studies, values)
            for place, others in enumerate(beside.T):
                yield f"{BESIDE} {place}", _draw(truth, profile[others][:, None], (studies, len(seeds)), generator)


def _profile(block: Block, truth: Truth) -> Array:
    """Return by how much log FID is worse at each value of a block's axes."""
    places = math.prod(map(len, block.axes.values()))
    return truth.steepness * np.square(np.arange(places) - places // 2)


def _draw(truth: Truth, worse: Array | float, shape: tuple[int, ...], generator: np.random.Generator) -> Drawn:
    fid = truth.fid * np.exp(worse + truth.spread * generator.normal(size=shape))
    return np.minimum(fid, FAILED_FID), (generator.random(shape) < truth.failing).astype(float)


def _endpoint(name: str, fid: Array, failed: Array, iterations: int) -> Array:
    """Return an endpoint of runs, or their horizon; a failed one has the worst."""
    if name == "horizon":
        return np.full(fid.shape, iterations, dtype=float)
    endpoint = ENDPOINTS[name]
    if endpoint.kind == "rate":
        return failed
    if endpoint.of_means:
        return np.where(failed > 0, iterations, np.minimum(iterations, iterations * fid / (3 * USEFUL_FID)))
    if endpoint.kind == "ratio":
        return np.where(failed > 0, FAILED_FID, fid)
    return np.where(failed > 0, 0.0, 0.5 - 0.1 * np.log(fid / USEFUL_FID))
