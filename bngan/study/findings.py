"""What did a study's runs do, as figures and tables ask for it?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean, median
from typing import Any

import numpy as np

from bngan.norms import BATCH_COUPLED
from bngan.study.endpoints import ENDPOINTS, has_failed
from bngan.study.panel import Look
from bngan.study.spec import AA, Contrast, Result, Study, Value, reported
from bngan.study.verdicts import Estimate

# Okabe and Ito's colours, which everybody can tell apart, without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = {"none": "o", "joint": "s", "separate": "^"}  # by how D normalizes; hollow where its norm knows no batch
WORDS = {
    "fid": "FID",
    "coverage": "coverage",
    "modes": "modes found",
    "class_kl": "KL of classes to real ones, nats",
    "pixel_variance": "pixel variance / real",
}
References = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by task, what was measured, quantity
Points = Sequence[Sequence[float]]  # (x, y) of samples in the plane
SPACES = {"fid": "digit net", "fid_random": "random filters", "fid_pixels": "pixels"}  # in which samples are compared


@dataclass(frozen=True)
class Findings:
    """A study and what came out of it.

    Attributes:
        study: the study.
        results: of its runs.
        references: floors and controls: by task, and by what they are, the measures of images of known worth.
        milliseconds: of an iteration, by block, context and arm, as the rounds in which it was timed found it.
    """

    study: Study
    results: Sequence[Result]
    references: References = field(default_factory=dict)
    milliseconds: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @cached_property
    def looks(self) -> dict[str, Look]:
        """How each arm is drawn, everywhere the same; the arm that is one again comes last, with another dash."""
        looks = {name: self._look(place, arm.label, arm.settings) for place, (name, arm) in enumerate(self.study.arms.items())}
        again = [arm for block in self.study.blocks for arm in block.aa.values()]
        if again:
            dash = DASHES[DASHES.index(looks[again[0]].dash) - 2]
            looks[AA] = replace(looks[again[0]], label=f"{looks[again[0]].label}, again (A/A)", dash=dash)
        return looks

    def _look(self, place: int, label: str, settings: dict[str, Value]) -> Look:
        kind = d_kind(self.study.settings | settings)
        colour, dash = COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)]
        return Look(label, colour, marker=MARKERS.get(kind, "o"), dash=dash, hollow=kind not in MARKERS)

    @cached_property
    def _by_cell(self) -> dict[tuple[str, str, str], list[Result]]:
        cells: dict[tuple[str, str, str], list[Result]] = {}
        for result in self.results:
            cells.setdefault((result.run.block, result.run.context, result.run.arm), []).append(result)
        return cells

    def runs(self, block: str, context: str, arm: str) -> Sequence[Result]:
        """Return the runs that are reported: the fresh ones, or the pilots of a block that has no others."""
        return reported(self._by_cell.get((block, context, arm), []))

    def arms_of(self, contrasts: Sequence[Contrast]) -> tuple[str, ...]:
        """Return the arms of some contrasts in the study's order, and the one that is one of them again."""
        named = {arm for contrast in contrasts for arm in contrast.arms}
        if named & {arm for block in self.study.blocks for arm in block.aa.values()}:
            named.add(AA)
        return tuple(arm for arm in self.looks if arm in named)

    def known(self, block: str, key: str) -> dict[str, float]:
        """Return the values of a quantity for the floors and controls of a block's task, by what they are."""
        (task,) = (other.task for other in self.study.blocks if other.name == block)
        return {name: measured[key] for name, measured in self.references.get(task, {}).items() if key in measured}

    def real_points(self, task: str) -> Points:
        """Return real points of a task in the plane, none where they were not kept."""
        return next((measured["points"] for measured in self.references.get(task, {}).values() if "points" in measured), ())

    def paces(self, block: str, context: str) -> dict[str, float]:
        """Return how many seconds an iteration takes, by arm: the median of the rounds in which it was timed."""
        start = f"{block}/{context}/"
        paces = {
            key.removeprefix(start): median(rounds) / 1000 for key, rounds in self.milliseconds.items() if key.startswith(start)
        }
        again = next((other.aa.get(context) for other in self.study.blocks if other.name == block), None)
        return paces | ({AA: paces[again]} if again in paces else {})

    def contrast_text(self, contrast: Contrast) -> str:
        """Return a contrast in words; of several pairs of arms all."""
        return " and ".join(self._pair_text(arm, baseline) for arm, baseline in contrast.comparisons)

    def _pair_text(self, arm: str, baseline: str | None) -> str:
        text = f"{self.looks[arm].label} ({arm})"
        return f"{text}, within each run" if baseline is None else f"{text} against {self.looks[baseline].label} ({baseline})"


def d_kind(settings: Mapping[str, Value]) -> str:
    """Return how D normalizes: joint or separate batches, or the norm that knows no batch."""
    norm = str(settings.get("d_norm", "batch"))
    return str(settings.get("batching", "joint")) if norm in BATCH_COUPLED else norm


# A run ----------------------------------------------------------------------------------------------------------------


def series(result: Result, key: str, weights: str = "raw") -> list[tuple[int, float]]:
    """Return (iteration, value) of a quantity at each look, by training's own running statistics."""
    wanted = (weights, "running", None)
    return [
        (entry["iteration"], entry[key])
        for entry in result.measured
        if (entry["weights"], entry["statistics"], entry.get("momentum")) == wanted and math.isfinite(entry.get(key, math.nan))
    ]


def last(result: Result, key: str, weights: str = "raw") -> float:
    """Return a quantity at the last look, NaN where it was not measured."""
    found = series(result, key, weights)
    return found[-1][1] if found else math.nan


def quality(results: Sequence[Result]) -> str:
    """Return what tells how good these runs are: fid, or modes where there is none."""
    return "fid" if any(series(result, "fid") for result in results) else "modes"


def ratios_to_precise(result: Result) -> dict[str, float]:
    """Return FID(running) : FID(precise) for all looks, weights and momentums that have both, by a name for them."""
    found: dict[tuple[int, str, str], dict[str, float]] = {}
    for entry in result.measured:
        if math.isfinite(entry.get("fid", math.nan)):
            momentum = f", momentum {entry['momentum']:g}" if "momentum" in entry else ""
            found.setdefault((entry["iteration"], entry["weights"], momentum), {})[entry["statistics"]] = entry["fid"]
    precise = {key[:2]: fids["precise"] for key, fids in found.items() if "precise" in fids}
    return {
        f"{weights}, iteration {iteration:,}{momentum}": fids["running"] / precise[iteration, weights]
        for (iteration, weights, momentum), fids in found.items()
        if "running" in fids and (iteration, weights) in precise
    }


def points_of(result: Result) -> Points:
    """Return the last samples in the plane that a run has kept, of raw weights by its own running statistics."""
    wanted = ("raw", "running", None)
    kept = [
        entry["points"]
        for entry in result.measured
        if (entry["weights"], entry["statistics"], entry.get("momentum")) == wanted and "points" in entry
    ]
    return kept[-1] if kept else ()


def probe_curve(result: Result, probe: str, key: str) -> list[tuple[float, float]]:
    """Return what a probe told against a key of its entries, the mean over all looks."""
    found: dict[float, list[float]] = {}
    for entry in result.probed:
        if entry["probe"] == probe and math.isfinite(entry["value"]):
            found.setdefault(entry[key], []).append(entry["value"])
    return [(x, fmean(values)) for x, values in sorted(found.items())]


def probe_series(result: Result, probe: str, network: str) -> list[tuple[int, float]]:
    """Return (iteration, value) of what a probe told of a whole network."""
    return [
        (entry["iteration"], entry["value"])
        for entry in result.probed
        if (entry["probe"], entry.get("network")) == (probe, network) and "layer" not in entry and math.isfinite(entry["value"])
    ]


def failed_of(results: Sequence[Result]) -> int:
    """Return how many runs failed."""
    return sum(map(has_failed, results))


# Numbers --------------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Return a number to three digits, a whole one in full, as a person writes it; nothing where there is none."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return f"{value:g}"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"  # which writes no -0
    if 1e-3 <= abs(value) < 1e6:
        return f"{float(f'{value:.3g}'):,.10g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def span(ends: Sequence[float] | None) -> str:
    """Return an interval as a person writes it; nothing where there is none."""
    return f"{number(ends[0])} to {number(ends[1])}" if ends else ""


def interval_of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% interval of a median by order statistics (binomial, exact); None for fewer than 6 values."""
    ordered, n = sorted(values), len(values)
    tail, below = 0.0, 0
    while below < n and tail + math.comb(n, below) / 2**n <= 0.025:
        tail += math.comb(n, below) / 2**n
        below += 1
    return (ordered[below - 1], ordered[n - below]) if below else None


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation, equal values sharing their ranks; NaN where all of x or y are equal."""
    columns = np.asarray(x, dtype=float)[:, None], np.asarray(y, dtype=float)[:, None]
    ranks = [(column > column.T).sum(axis=1) + (column == column.T).sum(axis=1) / 2 for column in columns]
    left, right = (rank - rank.mean() for rank in ranks)
    norm = math.sqrt(float((left @ left) * (right @ right)))
    return float(left @ right) / norm if norm else math.nan


def in_margins(estimate: Estimate, value: float) -> float:
    """Return an effect in multiples of its margin, positive in the claim's direction."""
    contrast = estimate.contrast
    if ENDPOINTS[contrast.endpoint].kind == "ratio":
        effect = math.log(value) / math.log(contrast.margin) if value > 0 else -math.inf
    else:
        effect = value / contrast.margin
    return effect if contrast.better == "more" else -effect


def effect_text(estimate: Estimate) -> str:
    """Return an effect and its 95% interval as text: a ratio after a times sign, a difference with its own."""
    if ENDPOINTS[estimate.contrast.endpoint].kind == "ratio":
        low, high = map(number, estimate.interval95)
        return f"x {number(estimate.value)} ({low} to {high})"
    low, high = (number(round(end, ndigits=3)) for end in estimate.interval95)
    return f"{round(estimate.value, ndigits=3) + 0.0:+g} ({low} to {high})"
