"""Are false verdicts as rare as they must be, and is the power what it is said to be?"""

from dataclasses import replace

import numpy as np
import pytest

from bngan.study.decisions import CONTRADICTED, NO_EFFECT, SUPPORTED, decide
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


def test_rate_chosen_badly_is_an_error_that_intervals_do_not_tell_of() -> None:
    """Beside the truth at the best rates, not at the chosen ones, an effect at the margin is supported too often."""
    study = three_claims()
    steep = {"a0": Truth(spread=0.15), "a3": Truth(fid=4 / 1.25, spread=0.15)}
    decisions = decide(study.claims, simulate(study, steep, studies=1000, seed=0))
    assert (decisions[2].overall.zone == SUPPORTED).mean() > 0.04


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


@pytest.mark.parametrize(("kind", "margin", "too_few"), [("ratio", 1.25, 2), ("difference", 0.05, 1), ("rate", 0.1, 6)])
def test_study_that_could_never_tell_is_known_before_it_starts(kind: Kind, margin: float, too_few: int) -> None:
    assert not can_decide(kind, too_few, margin)
    assert can_decide(kind, 2 * too_few, margin)
