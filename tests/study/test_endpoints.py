"""Does an endpoint read the right number from a result, and the worst one where a run failed?"""

import math
from dataclasses import replace
from typing import Any

import pytest

from bngan.errors import UsageError
from bngan.study.endpoints import ENDPOINTS, badness
from bngan.study.spec import Look, Result, Run

GOOD: dict[str, Any] = {"fid": 4.0, "classes": 10, "class_kl": 0.02, "pixel_variance": 0.9, "coverage": 0.7}


def run(task: str = "digits", iterations: int = 1000) -> Run:
    looks = (Look(iteration=100, samples=10, whole=True), Look(iteration=iterations, samples=10, whole=True))
    return Run("A/T/a0/1", "A", "T", "a0", {}, 1, "fresh", task, {}, 128, iterations, looks)


def result(*looks: tuple[int, dict[str, Any]], failure: str | None = None, task: str = "digits") -> Result:
    said = {"weights": "raw", "statistics": "running", "samples": 10}
    return Result(run(task), failure, 1.0, tuple({"iteration": iteration, **said, **values} for iteration, values in looks))


def value(name: str, *looks: tuple[int, dict[str, Any]], **given: Any) -> float:
    return ENDPOINTS[name].of(result(*looks, **given))


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, 0),
        ({"fid": 33.1}, 0),
        ({"fid": 33.2}, 1),
        ({"fid": math.nan}, 1),
        ({"classes": 6}, 0),
        ({"classes": 5}, 1),
        ({"pixel_variance": 0.1}, 0),
        ({"pixel_variance": 0.09}, 1),
    ],
)
def test_failure_has_thresholds_that_owe_nothing_to_any_arm(change: dict[str, Any], failed: int) -> None:
    assert value("failure", (1000, GOOD | change)) == failed
    assert value("fid", (1000, GOOD | change)) == (33.2 if failed else (GOOD | change)["fid"])
    assert value("failure", (1000, GOOD), failure="loss is NaN") == 1


def test_mixture_fails_with_one_mode() -> None:
    assert [value("failure", (1000, {"modes": modes}), task="ring") for modes in (0, 1, 2)] == [1, 1, 0]
    assert [value("modes_share", (1000, {"modes": modes}), task="ring") for modes in (1, 2, 8)] == [0, 0.25, 1]
    assert value("modes_share", (1000, {"modes": 500, "class_kl": 1.0}), task="stack3") == 0.5
    assert value("modes_share", (1000, GOOD)) == 1


def test_last_iterate_counts_in_whatever_order_looks_come() -> None:
    assert value("fid", (1000, GOOD), (500, GOOD | {"fid": 2.0})) == 4.0


def test_time_is_of_the_first_of_two_consecutive_looks_and_the_horizon_for_failures() -> None:
    def time(*fids: float, **given: Any) -> float:
        return value("time_to_useful", *((100 * (k + 1), GOOD | {"fid": fid}) for k, fid in enumerate(fids)), **given)

    assert time(9, 7.8, 7.8, 3) == 200
    assert time(7, 9, 7, 6) == 300, "once is not enough"
    assert time(9, 9, 9, 7) == 1000, "nor is the last look alone"
    assert time(7, 7, 7, 40) == 1000, "a run that failed in the end never arrived"
    assert time(7, 7, failure="loss is NaN") == 1000
    looks = [(100, GOOD | {"fid": 14.0}), (200, GOOD | {"fid": 5.3}), (1000, GOOD)]
    assert [value(f"time_to_{name}", *looks) for name in ("rough", "useful", "good")] == [100, 200, 200]


def test_point_collapse_is_ever_after_the_first_iterations() -> None:
    point = GOOD | {"pixel_variance": 0.05}
    assert value("point_collapse", (146, point), (1000, GOOD)) == 0
    assert value("point_collapse", (147, point), (1000, GOOD)) == 1
    assert value("point_collapse", (1000, GOOD | {"fid": 60.0})) == 0, "noise is no point"
    assert value("point_collapse", (100, GOOD), failure="loss is NaN") == 1


def test_failed_runs_are_the_worst_everywhere() -> None:
    failed = result(failure="loss is NaN")
    worst = {
        "coverage": 0.0,
        "modes_share": 0.0,
        "class_kl": math.log(10),
        "fid_late_to_early": 33.2 / 7.8,
        "running_to_precise": 33.2 / 7.8,
        "mates_share": 0.0,
        "offset_response": 10.0,
        "gradient_cosine": -1.0,
    }
    assert {name: ENDPOINTS[name].of(failed) for name in worst} == pytest.approx(worst)
    assert all(math.isfinite(endpoint.of(failed)) for endpoint in ENDPOINTS.values())


def test_running_statistics_are_compared_with_precise_ones_of_the_same_look() -> None:
    entries = [
        {"iteration": iteration, "weights": weights, "statistics": statistics, **GOOD, "fid": fid, **more}
        for iteration, weights, statistics, fid, more in (
            (100, "raw", "running", 9.0, {}),
            (100, "raw", "precise", 3.0, {}),
            (1000, "raw", "running", 4.0, {}),
            (1000, "raw", "running", 6.0, {"momentum": 0.01}),
            (1000, "raw", "precise", 2.0, {}),
            (1000, "ema", "running", 3.0, {}),
            (1000, "ema", "precise", 3.0, {}),
        )
    ]
    found = replace(result(), measured=tuple(entries))
    names = (
        "running_to_precise",
        "running_to_precise_early",
        "running_to_precise_slow",
        "running_to_precise_ema",
        "fid",
        "fid_ema",
    )
    assert [ENDPOINTS[name].of(found) for name in names] == [2.0, 3.0, 3.0, 1.0, 4.0, 3.0]
    assert ENDPOINTS["fid_late_to_early"].of(found) == pytest.approx(4 / 9)


def test_no_run_that_came_to_its_end_is_worse_than_one_that_failed() -> None:
    measured = [
        {"iteration": iteration, "weights": "raw", "statistics": statistics, **GOOD, "fid": fid}
        for iteration, statistics, fid in (
            (100, "running", 30.0),
            (100, "precise", 2.0),
            (1000, "running", 30.0),
            (1000, "precise", 2.0),
        )
    ]
    probed = ({"iteration": 1000, "probe": "offset_response", "value": 40.0},)
    worst = {"running_to_precise": 33.2 / 7.8, "running_to_precise_early": 33.2 / 7.8, "offset_response": 10.0}
    found = replace(result(), measured=tuple(measured), probed=probed)
    assert {name: ENDPOINTS[name].of(found) for name in worst} == pytest.approx(worst)
    point = [entry | {"pixel_variance": 0.0, "fid": 3.0} for entry in measured]
    assert ENDPOINTS["running_to_precise"].of(replace(found, measured=tuple(point))) == pytest.approx(33.2 / 7.8)
    late = replace(found, measured=(measured[0] | {"fid": 2.0}, measured[2]))
    assert ENDPOINTS["fid_late_to_early"].of(late) == pytest.approx(33.2 / 7.8)


def test_cosine_is_the_mean_over_looks_of_a_networks_mean_over_layers() -> None:
    probed = [
        {"iteration": iteration, "probe": "gradient_cosine", "network": network, "value": value, **layer}
        for iteration, network, value, layer in (
            (100, "generator", 0.9, {"layer": "0"}),
            (100, "generator", 0.6, {}),
            (1000, "generator", 0.8, {}),
            (1000, "discriminator", 0.1, {}),
        )
    ]
    found = replace(result((1000, GOOD)), probed=(*probed, {"iteration": 1000, "probe": "mates_share", "value": 0.2}))
    assert ENDPOINTS["g_gradient_cosine"].of(found) == pytest.approx(0.7)
    assert ENDPOINTS["gradient_cosine"].of(found) == pytest.approx(0.5)
    assert ENDPOINTS["mates_share"].of(found) == 0.2


def test_what_was_not_measured_is_told_in_a_line() -> None:
    with pytest.raises(UsageError, match="has no probe offset_response; name it in a look of block A"):
        value("offset_response", (1000, GOOD))
    with pytest.raises(UsageError, match="no measures of ema weights"):
        value("fid_ema", (1000, GOOD))
    with pytest.raises(UsageError, match="did not measure coverage"):
        value("coverage", (1000, {name: x for name, x in GOOD.items() if name != "coverage"}))


def test_runs_are_sorted_by_fid_or_by_modes_missed() -> None:
    assert badness(result((1000, GOOD))) == 4.0
    assert badness(result((1000, {"modes": 6}), task="ring")) == 0.25
