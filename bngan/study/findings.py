"""What did a study's runs do, as figures and tables ask for it?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

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
References = Mapping[str, Mapping[str, Mapping[str, float]]]  # by task, what was measured, quantity


@dataclass(frozen=True)
class Findings:
    """A study and what came out of it.

    Attributes:
        study: the study.
        results: of its runs.
        references: floors and controls: by task, and by what they are, the measures of images of known worth.
    """

    study: Study
    results: Sequence[Result]
    references: References = field(default_factory=dict)

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
        given = self.study.settings | settings
        norm = str(given.get("d_norm", "batch"))
        kind = str(given.get("batching", "joint")) if norm in BATCH_COUPLED else norm
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
        named = {arm for contrast in contrasts for arm in (contrast.arm, contrast.baseline)}
        if named & {arm for block in self.study.blocks for arm in block.aa.values()}:
            named.add(AA)
        return tuple(arm for arm in self.looks if arm in named)

    def known(self, block: str, key: str) -> dict[str, float]:
        """Return the values of a quantity for the floors and controls of a block's task, by what they are."""
        (task,) = (other.task for other in self.study.blocks if other.name == block)
        return {name: measured[key] for name, measured in self.references.get(task, {}).items() if key in measured}

    def contrast_text(self, contrast: Contrast) -> str:
        """Return a contrast in words."""
        arm = f"{self.looks[contrast.arm].label} ({contrast.arm})"
        if contrast.baseline is None:
            return f"{arm}, within each run"
        return f"{arm} against {self.looks[contrast.baseline].label} ({contrast.baseline})"


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
