"""Are false verdicts as rare as they must be, and is the power what it is said to be?"""

from dataclasses import replace

import numpy as np
import pytest

from bngan.study.decisions import CONTRADICTED, NO_EFFECT, SUPPORTED, Decision, decide
from bngan.study.endpoints import Kind
from bngan.study.power import Truth, can_decide, power, power_table, simulate
from bngan.study.spec import Claim, Study
from tests.study.made_up import made_up_study

FLAT, BETTER = Truth(steepness=0.0), Truth(fid=4 / 1.25, steepness=0.0)
HALF_FAIL = Truth(failing=0.5)
# In which nothing may be supported: arms that are equal, an arm exactly at the margin, equal failures that make two heaps.
NULLS = {
    "equal": {},
    "at the margin": {"a0": FLAT, "a1": BETTER, "a3": BETTER},
    "failures at the margin": {"a0": Truth(failing=0.4), "a1": Truth(failing=0.3), "a3": Truth(failing=0.3)},
    "two heaps": {"a0": HALF_FAIL, "a1": HALF_FAIL, "a3": HALF_FAIL},
    "two heaps, one of them wide": {"a0": Truth(failing=0.3, spread=0.15), "a3": Truth(failing=0.3, spread=0.6)},
}
TESTED = {"equal": "1 2 fid", "failures at the margin": "1"}


def three_claims() -> Study:
    """The made-up study with a rate, a restricted mean, and a ratio of FIDs."""
    study = made_up_study()
    claims = {claim.name: replace(claim, secondary=()) for claim in study.claims}
    fid = Claim("fid", "It has a lower FID.", claims["7"].primary, contexts=("T", "B"))
    return replace(study, claims=(claims["1"], claims["2"], fid))


def check_nulls(null: str, studies: int) -> None:
    study = three_claims()
    decisions = decide(study.claims, simulate(study, NULLS[null], studies=studies, seed=0))
    allowed = 0.025 + 3 * np.sqrt(0.025 * 0.975 / studies)
    for claim, decision in zip(study.claims, decisions, strict=True):
        if claim.name in TESTED.get(null, "1 2 fid"):
            assert (decision.word == SUPPORTED).mean() <= allowed, claim.name
            assert (decision.word == CONTRADICTED).mean() <= allowed, claim.name
            assert (decision.overall.zone == SUPPORTED).mean() <= allowed, "nor before Holm"


@pytest.mark.parametrize("null", NULLS)
def test_false_support_is_rare(null: str) -> None:
    check_nulls(null, studies=1000)


@pytest.mark.slow
@pytest.mark.parametrize("null", NULLS)
def test_false_support_is_rare_in_ten_thousand_studies(null: str) -> None:
    check_nulls(null, studies=10_000)


def test_large_effects_are_found_and_none_is_called_none() -> None:
    study = three_claims()
    truths = {"a0": Truth(fid=8.0, failing=0.9), "a3": Truth(fid=2.0)}
    words = [decision.word for decision in decide(study.claims, simulate(study, truths, studies=200, seed=0))]
    assert [(word == SUPPORTED).mean() > 0.9 for word in words] == [True] * 3
    equal = {arm: Truth(spread=0.05, steepness=0.0) for arm in study.arms}
    words = [decision.word for decision in decide(study.claims, simulate(study, equal, studies=200, seed=0))]
    assert [(word == NO_EFFECT).mean() > 0.9 for word in words] == [False, True, True], "a rate takes more runs"


def test_studies_at_once_are_decided_as_each_by_itself() -> None:
    study = three_claims()
    values = simulate(study, NULLS["two heaps"], studies=5, seed=0)
    together = decide(study.claims, values)
    for place in range(5):
        alone = decide(study.claims, {cell: {axes: x[place] for axes, x in runs.items()} for cell, runs in values.items()})
        assert [int(decision.word) for decision in alone] == [int(decision.word[place]) for decision in together]


# Choosing a rate by pilots --------------------------------------------------------------------------------------------

RATES = {"g_lr d_lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
STEEP, LEVEL = 0.15, 0.0  # log FID is 0.6, 0.15, 0, 0.15, 0.6 above the best at the five rates, or the same at all


def with_choice(pilots: int, *, neighbours: bool = False, cross_fitted: bool = False, fresh: int = 12) -> Study:
    """A restricted mean and a ratio of FIDs at one of five rates, chosen by pilots or, of a grid, by the other seeds."""
    study = made_up_study(fresh=fresh, pilots=pilots)
    grid, block, _ = study.blocks
    _, *claims = three_claims().claims
    if cross_fitted or neighbours:
        where = ("F",) if neighbours else ("A",)
        claims = [replace(claim, primary=replace(claim.primary, blocks=where, cross_fitted=True)) for claim in claims]
    return replace(study, blocks=(replace(grid, axes=RATES), replace(block, neighbours=neighbours)), claims=(*claims,))


def at_margin(steepness: float, spread: float) -> dict[str, Truth]:
    """An effect that is exactly the margin where both arms have their best rates."""
    arms = (("a0", 4.0), ("a3", 4.0 / 1.25))
    return {arm: Truth(fid=fid, spread=spread, steepness=steepness) for arm, fid in arms}


def supported(decisions: list[Decision]) -> float:
    """The share of studies in which the claim is supported that most often is, over all contexts or in one, before Holm."""
    findings = (finding for decision in decisions for finding in (decision.overall, *decision.contexts))
    return max((finding.zone == SUPPORTED).mean() for finding in findings)


def check_choice(study: Study, studies: int, steepness: float, spread: float) -> None:
    equal = Truth(spread=spread, steepness=steepness)
    heaps = replace(equal, failing=0.5)
    for truths in (at_margin(steepness, spread), {"a0": equal, "a3": equal}, {"a0": heaps, "a3": heaps}):
        decisions = decide(study.claims, simulate(study, truths, studies, seed=0))
        assert supported(decisions) <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / studies)


def test_rate_chosen_badly_is_an_error_of_which_its_own_interval_does_not_tell() -> None:
    study = with_choice(pilots=3)
    decisions = decide(study.claims, simulate(study, at_margin(STEEP, spread=0.15), studies=1000, seed=0))
    assert supported(decisions) > 0.08


@pytest.mark.parametrize("pilots", [2, 8])
def test_runs_at_the_rates_beside_keep_false_support_rare(pilots: int) -> None:
    check_choice(with_choice(pilots, neighbours=True), 1000, STEEP, spread=0.15)


def test_cross_fitting_against_all_rates_keeps_false_support_rare() -> None:
    check_choice(with_choice(8, cross_fitted=True), 1000, STEEP, spread=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.15, 0.3, 0.6])
@pytest.mark.parametrize("steepness", [STEEP, STEEP / 2, LEVEL])
@pytest.mark.parametrize("pilots", [2, 3, 4, 8])
def test_false_support_is_rare_in_ten_thousand_studies_with_pilots(pilots: int, steepness: float, spread: float) -> None:
    check_choice(with_choice(pilots, neighbours=True), 10_000, steepness, spread)
    check_choice(with_choice(2 * pilots, cross_fitted=True), 10_000, steepness, spread)


@pytest.mark.parametrize("way", ["neighbours", "cross_fitted"])
def test_effects_are_found_at_chosen_rates_on_either_side(way: str) -> None:
    study = with_choice(12 if way == "cross_fitted" else 4, **{way: True})
    better = {"a0": Truth(fid=8.0, spread=0.15), "a3": Truth(spread=0.15)}
    for truths, expected in (
        (better, SUPPORTED),
        ({"a0": better["a3"], "a3": better["a0"]}, CONTRADICTED),
        (dict.fromkeys(better, Truth(spread=0.1)), NO_EFFECT),
    ):
        words = [decision.word for decision in decide(study.claims, simulate(study, truths, studies=200, seed=0))]
        assert [(word == expected).mean() > 0.9 for word in words] == [True] * 2, expected


# Power ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spread", "n", "equal", "two_thirds"),
    [(0.15, 6, 0.56, 0.47), (0.15, 12, 0.94, 0.81), (0.3, 32, 0.81, None), (0.3, 64, 0.99, 0.93)],
)
def test_power_is_that_of_the_plan(spread: float, n: int, equal: float, two_thirds: float | None) -> None:
    assert power("ratio", n, 1.25, effect=1.0, spread=spread).shares["no practical effect"] == pytest.approx(equal, abs=0.05)
    if two_thirds is not None:
        assert power("ratio", n, 1.25, effect=1.5, spread=spread).shares["supported"] == pytest.approx(two_thirds, abs=0.05)


def test_power_table_has_shares_that_add_up_and_grow_with_runs() -> None:
    cases: tuple[tuple[Kind, float], ...] = (("ratio", 1.25), ("difference", 0.05), ("rate", 0.1))
    for kind, margin in cases:
        rows = power_table(kind, margin, runs=(6, 24))
        assert all(sum(row.shares.values()) == pytest.approx(1) for row in rows)
        assert rows[-1].shares["supported"] > rows[-2].shares["supported"] or rows[-1].shares["supported"] == 1
        assert rows == power_table(kind, margin, runs=(6, 24)), "the same every time"


def test_power_table_is_of_as_many_strata_and_intervals_at_once_as_it_is_asked_for() -> None:
    def supported(strata: int, places: int) -> float:
        return power_table("ratio", 1.25, runs=(4,), spreads=(0.3,), strata=strata, places=places)[-1].shares["supported"]

    assert supported(1, 4) < supported(1, 1) < supported(4, 1)


@pytest.mark.parametrize(("kind", "margin", "too_few"), [("ratio", 1.25, 2), ("difference", 0.05, 1), ("rate", 0.1, 6)])
def test_study_that_could_never_tell_is_known_before_it_starts(kind: Kind, margin: float, too_few: int) -> None:
    assert not can_decide(kind, too_few, margin)
    assert can_decide(kind, 2 * too_few, margin)


def test_runs_of_one_seed_in_each_stratum_tell_nothing_and_more_contexts_ask_for_more() -> None:
    assert not can_decide("ratio", 1, 1.25, strata=8), "their spread is not known"
    assert can_decide("ratio", 2, 1.25, strata=8)
    assert can_decide("rate", 8, 0.1)
    assert not can_decide("rate", 8, 0.1, places=20)
