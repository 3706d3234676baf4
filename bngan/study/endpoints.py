"""What number stands for a run? Each endpoint reads one from a result; a run that failed gets the worst there is."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

from bngan.errors import UsageError
from bngan.norms import BATCH_COUPLED
from bngan.study.spec import DEFAULTS, Result, Run
from bngan.study.tasks import TASKS

# FIDs by the pinned digit net that owe nothing to any arm.
FAILED_FID = 33.2  # one Gaussian with the mean and the covariance of all images
ROUGH_FID = 15.2
USEFUL_FID = 7.8  # one Gaussian for each class
GOOD_FID = 5.3  # real images without one of the ten classes
FEWEST_CLASSES, LEAST_PIXEL_VARIANCE = 6, 0.1
FIRST_ITERATIONS = 146  # in which G may still be a point
WORST_RATIO = FAILED_FID / USEFUL_FID  # of two FIDs: a failed run's, and more than any other's
MOST_OFFSET = 10.0  # standard deviations, likewise
WITH_FID = ("digits",)
WITH_CLASS_KL = tuple(name for name, task in TASKS.items() if task.image_shape[1:] == (28, 28))

Kind = Literal["rate", "ratio", "difference"]


@dataclass(frozen=True)
class Needs:
    """What a run must have for an endpoint to be measured.

    Attributes:
        tasks: whose measures it is among; all of them where none is named.
        iterations: after which there must be a look.
        looks: how many there must be.
        whole: how many of these must be whole.
        last_whole: whether the last must be.
        probe: that one of them must make.
        average: whether an average of G's weights must be kept.
        batch_norm: whether G must have batch norm's running statistics.
    """

    tasks: tuple[str, ...] = ()
    iterations: int = 0
    looks: int = 1
    whole: int = 0
    last_whole: bool = False
    probe: str = ""
    average: bool = False
    batch_norm: bool = False

    def missing(self, run: Run) -> str:
        """Return what a run lacks first, in words; an empty text if nothing."""
        settings = DEFAULTS | run.settings
        last, whole = run.looks[-1], sum(look.whole for look in run.looks)
        checks = (
            (not self.tasks or run.task in self.tasks, f"task {run.task} has no such measure, but {', '.join(self.tasks)}"),
            (last.iteration > self.iterations, f"it needs a look after more than {self.iterations} iterations"),
            (len(run.looks) >= self.looks, f"it needs {self.looks} looks; name more iterations in `at`"),
            (whole >= self.whole, f"it needs whole looks, {self.whole} at least; name their iterations in `whole`"),
            (last.whole or not self.last_whole, f"it needs a whole look at the end; name {last.iteration} in `whole`"),
            (not self.probe or any(self.probe in look.probes for look in run.looks), f"no look makes probe {self.probe}"),
            (settings["ema_decay"] != 0 or not self.average, "no average of G's weights is kept; set ema_decay above 0"),
            (settings["g_norm"] in BATCH_COUPLED or not self.batch_norm, "G has no batch norm"),
        )
        return next((words for met, words in checks if not met), "")


@dataclass(frozen=True)
class Endpoint:
    """A number for each run, the last iterate's, of raw weights unless the endpoint's name ends in `_ema`.

    Attributes:
        of: gives it; of a failed run the worst. UsageError if the run's looks did not measure what it needs.
        kind: how arms are compared. rate: 0 or 1, difference of shares; ratio: positive, ratio of geometric means;
            difference: difference of means.
        words: what it is.
        of_means: whether the ratio is one of means: of times, which have the horizon as an upper end (restricted means).
        needs: what a run must have.
    """

    of: Callable[[Result], float]
    kind: Kind
    words: str
    of_means: bool = False
    needs: Needs = Needs()


# Failure --------------------------------------------------------------------------------------------------------------


def has_failed(result: Result, weights: str = "raw") -> bool:
    """Whether a run ended before its time, or its last samples are no better than trivial ones.

    For images: FID of at least 33.2 (one Gaussian), at most 5 classes, or less than 0.1 of real images' variance of pixels.
    For mixtures and stacks: at most one mode.
    """
    if result.failure is not None:
        return True
    last = _entries(result, weights)[-1]
    if "fid" not in last:
        return last["modes"] <= 1
    return (
        not last["fid"] < FAILED_FID  # so NaN has failed, too
        or last["classes"] < FEWEST_CLASSES
        or not last["pixel_variance"] >= LEAST_PIXEL_VARIANCE
    )


def _failure(result: Result) -> float:
    return float(has_failed(result))


def _point_collapse(result: Result) -> float:
    """Whether, in evaluation mode, G was ever almost one image after the first iterations; a run that ended counts."""
    if result.failure is not None:
        return 1.0
    late = [entry["pixel_variance"] for entry in _entries(result, "raw") if entry["iteration"] > FIRST_ITERATIONS]
    return float(any(variance < LEAST_PIXEL_VARIANCE for variance in late))


# Quality --------------------------------------------------------------------------------------------------------------


def _fid(result: Result, weights: str) -> float:
    return FAILED_FID if has_failed(result, weights) else _last(result, "fid", weights)


def _time_to(result: Result, weights: str, threshold: float) -> float:
    """Return the first of two consecutive looks with an FID at or below the threshold; the horizon where there is none."""
    if not has_failed(result, weights):
        looks = [(entry["iteration"], entry["fid"]) for entry in _entries(result, weights)]
        for (iteration, fid), (_, next_fid) in pairwise(looks):
            if max(fid, next_fid) <= threshold:
                return float(iteration)
    return float(result.run.iterations)


def _coverage(result: Result, weights: str) -> float:
    return 0.0 if has_failed(result, weights) else _last(result, "coverage", weights)


def _modes_share(result: Result, weights: str) -> float:
    if has_failed(result, weights):
        return 0.0
    return _last(result, "classes" if result.run.task == "digits" else "modes", weights) / TASKS[result.run.task].modes


def _class_kl(result: Result, weights: str) -> float:
    return math.log(TASKS[result.run.task].modes) if has_failed(result, weights) else _last(result, "class_kl", weights)


def _fid_late_to_early(result: Result, weights: str) -> float:
    if has_failed(result, weights):
        return WORST_RATIO
    whole = {look.iteration for look in result.run.looks if look.whole}
    fids = [min(entry["fid"], FAILED_FID) for entry in _entries(result, weights) if entry["iteration"] in whole]
    return min(fids[-1] / fids[0], WORST_RATIO)


def _running_to_precise(result: Result, weights: str, early: bool = False, slow: bool = False) -> float:
    """Return FID by running statistics over that by precise ones, both at most 33.2, at the last or the first whole look."""
    if has_failed(result, weights):
        return WORST_RATIO
    precise = _entries(result, weights, statistics="precise")[0 if early else -1]
    running = _entries(result, weights, slow=slow)
    (fid,) = (entry["fid"] for entry in running if entry["iteration"] == precise["iteration"])
    return min(min(fid, FAILED_FID) / min(precise["fid"], FAILED_FID), WORST_RATIO)


# Probes ---------------------------------------------------------------------------------------------------------------


def _probe(result: Result, probe: str, worst: float, *networks: str) -> float:
    """Return the mean over looks, and over networks, of what a probe told; the worst where a run ended or it is NaN.

    Of a run that came to its end what was probed counts, however bad its samples are.
    """
    found = [entry for entry in result.probed if entry["probe"] == probe and "layer" not in entry]
    values = [entry["value"] for entry in found if not networks or entry["network"] in networks]
    if result.failure is not None or not all(map(math.isfinite, values)):
        return worst
    if not values:
        raise UsageError(f"run {result.run.id} has no probe {probe}; name it in a look of block {result.run.block}")
    return min(fmean(values), MOST_OFFSET)


# What was measured ----------------------------------------------------------------------------------------------------


def _entries(result: Result, weights: str, statistics: str = "running", slow: bool = False) -> list[dict[str, Any]]:
    """Return what was measured, by iteration; where `slow`, by running statistics of another momentum than training's."""
    wanted = (weights, statistics, slow)
    found = [entry for entry in result.measured if (entry["weights"], entry["statistics"], "momentum" in entry) == wanted]
    if not found:
        raise UsageError(f"run {result.run.id} has no measures of {weights} weights by {statistics} statistics for a claim")
    return sorted(found, key=lambda entry: entry["iteration"])


def _last(result: Result, key: str, weights: str) -> float:
    entry = _entries(result, weights)[-1]
    if key not in entry:
        raise UsageError(f"run {result.run.id} did not measure {key} at its last look, which a claim asks for")
    return float(entry[key])


PRECISE = "ratio of FID by running statistics{} to that by precise ones"
TIMED, BY_BOTH = Needs(WITH_FID, looks=2), Needs(WITH_FID, whole=1, batch_norm=True)
# Those that raw and EMA weights have: name, function of a result and weights, kind, words, needs.
QUALITY: tuple[tuple[str, Callable[..., float], Kind, str, Needs], ...] = (
    ("time_to_rough", partial(_time_to, threshold=ROUGH_FID), "ratio", f"number of iterations to FID {ROUGH_FID}", TIMED),
    ("time_to_useful", partial(_time_to, threshold=USEFUL_FID), "ratio", f"number of iterations to FID {USEFUL_FID}", TIMED),
    ("time_to_good", partial(_time_to, threshold=GOOD_FID), "ratio", f"number of iterations to FID {GOOD_FID}", TIMED),
    ("fid", _fid, "ratio", "FID", Needs(WITH_FID)),
    ("coverage", _coverage, "difference", "coverage", Needs(WITH_FID, last_whole=True)),
    ("modes_share", _modes_share, "difference", "share of modes found", Needs()),
    ("class_kl", _class_kl, "difference", "KL of classes to real ones, nats", Needs(WITH_CLASS_KL)),
    (
        "fid_late_to_early",
        _fid_late_to_early,
        "ratio",
        "ratio of FID at the last whole look to that at the first",
        Needs(WITH_FID, whole=2),
    ),
    ("running_to_precise", _running_to_precise, "ratio", PRECISE.format(""), BY_BOTH),
    (
        "running_to_precise_early",
        partial(_running_to_precise, early=True),
        "ratio",
        PRECISE.format(" at the first whole look"),
        BY_BOTH,
    ),
    (
        "running_to_precise_slow",
        partial(_running_to_precise, slow=True),
        "ratio",
        PRECISE.format(" of low momentum"),
        BY_BOTH,
    ),
)


def _quality(weights: str) -> dict[str, Endpoint]:
    end, said = ("", "") if weights == "raw" else (f"_{weights}", f" of {weights.upper()} weights")
    return {
        name + end: Endpoint(
            partial(of, weights=weights),
            kind,
            words + said,
            of_means=name.startswith("time_to"),
            needs=replace(needs, average=weights == "ema"),
        )
        for name, of, kind, words, needs in QUALITY
    }


def _probed(words: str, probe: str, *networks: str, worst: float) -> Endpoint:
    return Endpoint(lambda result: _probe(result, probe, worst, *networks), "difference", words, needs=Needs(probe=probe))


ENDPOINTS: dict[str, Endpoint] = {
    "failure": Endpoint(_failure, "rate", "share of runs that fail"),
    "point_collapse": Endpoint(
        _point_collapse,
        "rate",
        "share of runs whose G is ever almost one image",
        needs=Needs(WITH_FID, iterations=FIRST_ITERATIONS),
    ),
    **_quality("raw"),
    **_quality("ema"),
    "offset_response": _probed("change of D's logits by an offset of the fakes, sd", "offset_response", worst=MOST_OFFSET),
    "mates_share": _probed("share of a logit's variance due to the others in its batch", "mates_share", worst=0.0),
    "gradient_cosine": _probed("cosine of a layer's gradients before and after a step below it", "gradient_cosine", worst=-1.0),
    "g_gradient_cosine": _probed(
        "cosine of a layer's gradients in G before and after a step below it", "gradient_cosine", "generator", worst=-1.0
    ),
    "d_gradient_cosine": _probed(
        "cosine of a layer's gradients in D before and after a step below it", "gradient_cosine", "discriminator", worst=-1.0
    ),
}


def badness(result: Result) -> float:
    """Return what sorts runs of one task, the best first: FID, or where there is none, the share of modes missed."""
    return ENDPOINTS["fid"].of(result) if result.run.task == "digits" else 1 - ENDPOINTS["modes_share"].of(result)
