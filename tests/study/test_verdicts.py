"""Does a verdict follow from where intervals lie, and never from less than the whole study?"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest

from bngan.errors import UsageError
from bngan.study.decisions import CHOSEN, EVERY, WORDS, decide, effect_in, read_values, strata_of
from bngan.study.spec import Claim, Contrast, Result, Run, Study, runs_of
from bngan.study.verdicts import Verdict, judge
from tests.study.made_up import made_up_results, made_up_study

Values = dict[tuple[str, str, str, str], dict[str, np.ndarray]]
GENERATOR = np.random.default_rng(0)


def contrast(
    arm: str = "a", baseline: str | None = "b", endpoint: str = "fid", margin: float = 1.25, better: str = "less"
) -> Contrast:
    return Contrast(arm, baseline, ("F",), endpoint, margin, "less" if better == "less" else "more")


def claim(primary: Contrast, contexts: Sequence[str] = ("T",), **more: object) -> Claim:
    return replace(Claim("1", "It is so.", primary, (*contexts,)), **more)


def runs(mean: float, spread: float, n: int = 12, endpoint: str = "fid") -> np.ndarray:
    """Runs with exactly this mean, or geometric mean of FID, and spread."""
    quantiles = (np.arange(n) + 0.5) / n
    z = np.log(quantiles / (1 - quantiles))
    z = (z - z.mean()) / z.std(ddof=1)
    return mean * np.exp(spread * z) if endpoint == "fid" else mean + spread * z


def values(cells: dict[tuple[str, str], np.ndarray], endpoint: str = "fid") -> Values:
    """Cells by context and arm."""
    return {(endpoint, "F", context, arm): {"": numbers} for (context, arm), numbers in cells.items()}


def word(of: Claim, given: Values, others: int = 0) -> str:
    """The verdict on a claim beside as many others that nothing speaks for."""
    nothing = claim(contrast("b", "b"), of.contexts)
    return WORDS[int(decide([of, *[nothing] * others], given)[0].word)]


def words(ratio: float, spread: float, rule: str = "beyond", others: int = 0, n: int = 12) -> str:
    given = values({("T", "a"): runs(4 * ratio, spread, n), ("T", "b"): runs(4, spread, n)})
    return word(claim(contrast(), rule=rule), given, others)


# Zones ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "spread", "beyond", "not_worse"),
    [
        (0.5, 0.2, "supported", "supported"),
        (2.0, 0.2, "contradicted", "contradicted"),
        (1.0, 0.1, "no practical effect", "supported"),
        (0.9, 0.1, "no practical effect", "supported"),
        (0.8, 0.1, "inconclusive", "supported"),
        (1.0, 0.6, "inconclusive", "inconclusive"),
        (1.25, 0.1, "inconclusive", "inconclusive"),
    ],
)
def test_verdict_is_where_the_interval_lies(ratio: float, spread: float, beyond: str, not_worse: str) -> None:
    assert words(ratio, spread) == beyond
    assert words(ratio, spread, "not_worse") == not_worse


@pytest.mark.parametrize(
    ("ratio", "spread", "expected"),
    [(1.0, 0.05, "supported"), (1.24, 0.05, "inconclusive"), (1.5, 0.05, "contradicted"), (0.7, 0.05, "contradicted")],
)
def test_within_asks_for_an_interval_between_the_margins(ratio: float, spread: float, expected: str) -> None:
    given = values({("T", "a"): runs(ratio, spread)})
    assert word(claim(contrast(baseline=None), rule="within"), given) == expected


def test_more_is_less_turned_round() -> None:
    given = values({("T", "a"): runs(2.0, 0.1), ("T", "b"): runs(4.0, 0.1)})
    assert word(claim(contrast(better="less")), given) == "supported"
    assert word(claim(contrast(better="more")), given) == "contradicted"


@pytest.mark.parametrize(
    ("late", "base_late", "expected"),
    [
        (6, 6, "no practical effect"),
        (7, 7, "inconclusive"),
        (12, 12, "inconclusive"),
        (0, 11, "supported"),
        (0, 12, "inconclusive"),
    ],
)
def test_equal_times_tell_nothing_where_most_runs_never_come_so_far(late: int, base_late: int, expected: str) -> None:
    times = {"a": [700.0] * (12 - late) + [1000.0] * late, "b": [700.0] * (12 - base_late) + [1000.0] * base_late}
    given = {("time_to_useful", "F", "T", arm): {"": np.array(seen)} for arm, seen in times.items()}
    given |= {("horizon", "F", "T", arm): {"": np.full(12, 1000.0)} for arm in times}
    assert word(claim(contrast(endpoint="time_to_useful")), given) == expected


def test_runs_that_all_came_out_alike_give_no_verdict() -> None:
    """Two runs of 2 against two of 4 have an interval without a width, which is no evidence."""
    given = values({("T", "a"): np.array([2.0, 2.0]), ("T", "b"): np.array([4.0, 4.0])})
    for asked in (claim(contrast()), claim(contrast(better="more")), claim(contrast(), rule="not_worse")):
        (decision,) = decide([asked], given)
        assert WORDS[int(decision.word)] == "inconclusive"
        assert (float(decision.p), float(decision.against), bool(decision.overall.alike)) == (1.0, 1.0, True)
    given["fid", "F", "T", "a"] = {"": np.array([2.0, 2.01])}
    assert word(claim(contrast()), given) == "supported", "a spread of one arm is one"


def test_many_claims_ask_for_smaller_p_values() -> None:
    # The interval by itself is just beyond the margin; beside 8 claims without effect that is not enough.
    assert words(0.67, 0.2) == "supported"
    assert words(0.67, 0.2, others=7) == "inconclusive"
    assert words(0.4, 0.2, others=7) == "supported"


# Contexts -------------------------------------------------------------------------------------------------------------


def two_contexts(first: float, second: float, spread: float = 0.15) -> Values:
    return values(
        {
            (context, arm): runs(4 * ratio, spread)
            for context, ratios in (("T", first), ("B", second))
            for arm, ratio in (("a", ratios), ("b", 1.0))
        }
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0.5, 0.5, "supported"),
        (0.5, 1.0, "conditional"),
        (1.0, 0.5, "conditional"),
        (0.5, 2.0, "conditional"),
        (0.65, 0.75, "supported"),  # significant in one alone, but the interaction is within the margin
        (1.0, 1.0, "no practical effect"),
    ],
)
def test_conditional_needs_zones_and_an_interaction_that_differ(first: float, second: float, expected: str) -> None:
    assert word(claim(contrast(), ("T", "B")), two_contexts(first, second)) == expected


def test_not_worse_needs_every_context_and_one_that_is_worse_contradicts() -> None:
    assert word(claim(contrast(), ("T", "B"), rule="not_worse"), two_contexts(0.5, 1.0)) == "supported"
    assert word(claim(contrast(), ("T", "B"), rule="not_worse"), two_contexts(0.5, 2.0)) == "contradicted"
    assert word(claim(contrast(), ("T", "B"), rule="not_worse"), two_contexts(0.5, 1.25)) == "inconclusive"


CELLS = ("T", "Tn", "Bq", "B")
LOSS, NOISE = (("T", "Tn"), ("Bq", "B")), (("T", "Bq"), ("Tn", "B"))


@pytest.mark.parametrize(
    ("ratios", "conditions", "expected"),
    [
        ((0.5, 0.5, 1.0, 1.0), {"loss": LOSS}, "conditional"),
        ((0.5, 0.5, 1.0, 1.0), {"noise": NOISE}, "supported"),
        ((0.5, 1.0, 0.5, 1.0), {"noise": NOISE}, "conditional"),
        ((0.5, 1.0, 0.5, 1.0), {"loss": LOSS}, "supported"),
        ((0.5, 0.5, 1.0, 1.0), {}, "conditional"),
        ((0.5, 0.5, 0.5, 0.5), {"loss": LOSS, "noise": NOISE}, "supported"),
    ],
)
def test_factors_named_before_decide_what_an_effect_depends_on(
    ratios: tuple[float, ...], conditions: dict[str, tuple[tuple[str, ...], tuple[str, ...]]], expected: str
) -> None:
    arms = {(context, "a"): runs(4 * ratio, 0.15) for context, ratio in zip(CELLS, ratios, strict=True)}
    given = values(arms | {(context, "b"): runs(4, 0.15) for context in CELLS})
    assert word(claim(contrast(), CELLS, conditions=conditions), given) == expected


def test_pooled_levels_of_a_factor_tell_what_pairs_of_contexts_cannot() -> None:
    ratios = {"T": 0.6, "Tn": 0.6, "Bq": 1.0, "B": 1.0}
    given = values(
        {(context, arm): runs(4 * (ratio if arm == "a" else 1), 0.28) for context, ratio in ratios.items() for arm in "ab"}
    )
    assert word(claim(contrast(), CELLS), given) != "conditional"
    assert word(claim(contrast(), CELLS, conditions={"loss": LOSS}), given) == "conditional"


# Chosen values --------------------------------------------------------------------------------------------------------


CROSSED = replace(contrast(), cross_fitted=True)


def chosen(arm: float, baseline: float, beside: dict[str, float] | None = None) -> Values:
    """Cells at chosen values, with some better or worse values beside them, by their FID."""
    cells = {}
    for name, fid in (("a", arm), ("b", baseline)):
        every = [runs(other, 0.1) for other in (fid, (beside or {}).get(name, 50.0), 50.0)]
        cells["fid, cross-fitted", "F", "T", name] = {CHOSEN: every[0], EVERY: np.stack(every)}
    return cells


@pytest.mark.parametrize(
    ("arm", "baseline", "beside", "expected"),
    [
        (2, 4, {}, "supported"),
        (2, 4, {"b": 8}, "supported"),
        (2, 4, {"b": 2}, "inconclusive"),
        (2, 4, {"a": 1}, "supported"),
        (4, 2, {"b": 1}, "contradicted"),
        (4, 2, {"a": 2}, "inconclusive"),
        (4, 4, {"a": 4, "b": 4}, "no practical effect"),
        (4, 4, {"a": 3}, "inconclusive"),
    ],
)
def test_other_arm_must_be_beaten_at_its_best_rate(
    arm: float, baseline: float, beside: dict[str, float], expected: str
) -> None:
    assert word(claim(CROSSED), chosen(arm, baseline, beside)) == expected


def test_best_rates_move_ends_outwards_and_leave_the_estimate_alone() -> None:
    alone, bracket = (effect_in(given, CROSSED, ("T",)) for given in (chosen(2, 4), chosen(2, 4, {"a": 1, "b": 2})))
    assert float(bracket.value) == float(alone.value)
    assert float(bracket.limits(0.95)[0]) == pytest.approx(float(alone.limits(0.95)[0]) - np.log(2))
    assert float(bracket.limits(0.95)[1]) == pytest.approx(float(alone.limits(0.95)[1]) + np.log(2))


# Controls, and what must be so as well --------------------------------------------------------------------------------


def with_control(ratio: float, arm: str) -> str:
    given = values({("T", "a"): runs(2, 0.1), ("T", "b"): runs(4, 0.1), ("T", arm): runs(4 * ratio, 0.1)})
    return word(claim(contrast(), controls=(contrast(arm),)), given)


def test_failed_control_makes_a_test_tell_nothing() -> None:
    assert with_control(0.5, "p2") == "supported"
    assert with_control(1.0, "p2") == "not informative"
    assert with_control(1.0, "aa") == "supported", "the same arm again must show no effect"
    assert with_control(0.5, "aa") == "not informative"


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.5, "supported"), (1.0, "no practical effect"), (2.0, "contradicted"), (0.8, "inconclusive")]
)
def test_claim_is_as_weak_as_what_must_be_supported_as_well(ratio: float, expected: str) -> None:
    given = values({("T", "a"): runs(2, 0.1), ("T", "b"): runs(4, 0.1), ("T", "c"): runs(4 * ratio, 0.1)})
    assert word(claim(contrast(), also=(contrast("c"),)), given) == expected


# Strata ---------------------------------------------------------------------------------------------------------------


def test_blocks_and_contexts_weigh_equally_and_rates_by_mantel_and_haenszel() -> None:
    given: Values = {
        ("fid", block, context, arm): {"1e-3": np.ones(n), "1e-2": np.ones(n if arm == "a" else 3 * n)}
        for block, n in (("F", 4), ("G", 8))
        for context in ("T", "B")
        for arm in ("a", "b")
    }
    strata = strata_of(given, replace(contrast(), blocks=("F", "G")), ("T", "B"))
    assert [stratum.weight for stratum in strata] == pytest.approx([0.25 * 0.4, 0.25 * 0.6] * 4)


def test_main_effect_of_a_factor_is_the_mean_over_what_else_varies() -> None:
    given = values({("T", arm): runs(fid, 0.1, n=8) for arm, fid in {"a": 2.0, "b": 4.0, "c": 3.0, "d": 3.0}.items()})
    main = replace(contrast(), pairs=(("c", "d"),))
    assert [stratum.weight for stratum in strata_of(given, main, ("T",))] == [0.5, 0.5]
    assert float(effect_in(given, main, ("T",)).value) == pytest.approx(np.log(2) / 2)
    assert word(claim(main), given) == "supported"


def test_sentence_names_every_pair_of_a_main_effect_and_the_condition_it_depends_on() -> None:
    study = made_up_study()
    first = replace(study.claims[0], primary=replace(study.claims[0].primary, arm="a1", pairs=(("a3", "p2"),)))
    study = replace(study, blocks=(replace(study.blocks[0], arms=dict.fromkeys("TB", ("a0", "a1", "a3", "p2"))),))
    time = replace(
        first, name="2", primary=replace(first.primary, endpoint="fid", margin=1.01), conditions={"loss": (("T",), ("B",))}
    )
    study = replace(study, claims=(replace(first, secondary=()), replace(time, secondary=())))
    helps = {"T": 0.5, "B": 2.0}

    def measured(run: Run) -> dict[str, object]:
        fid = 4.0 * (1 + 0.01 * (run.seed % 3)) * (helps[run.context] if run.arm in ("a1", "a3") else 1.0)
        last = {"iteration": run.iterations, "weights": "raw", "statistics": "running"}
        return {**last, "fid": fid, "classes": 10, "pixel_variance": 0.9}

    results = [replace(result, failure=None, measured=(measured(result.run),)) for result in made_up_results(study)]
    found = [verdict.sentence for verdict in judge(study, results)]
    assert "as a mean over BN in G against none, BN in both, joint against none, packs of 2, is" in found[0]
    assert found[1].startswith("Conditional: it depends on loss: supported in T and contradicted in B, which differ by 0.2")


def test_cross_fitted_contrasts_read_every_value_and_others_as_before() -> None:
    study = made_up_study(fresh=5, pilots=4)
    grid, fresh, ring = study.blocks
    study = replace(study, blocks=(grid, replace(fresh, neighbours=True), ring))
    plain = replace(study.claims[1].primary, endpoint="fid", blocks=("A",))
    in_grid, in_fresh = (replace(plain, blocks=(block,), cross_fitted=True) for block in "AF")
    study = replace(study, claims=(*study.claims, claim(plain), claim(in_grid), claim(in_fresh)))
    found = read_values(study, made_up_results(study))
    shapes = {cell[:2]: {axes: x.shape for axes, x in of.items()} for cell, of in found.items() if cell[2:] == ("T", "a3")}
    assert shapes["fid", "F"] == {CHOSEN: (5,)}
    assert shapes["fid, cross-fitted", "F"] == {CHOSEN: (5,), EVERY: (3, 5)}
    assert shapes["fid, cross-fitted", "A"] == {CHOSEN: (4,), EVERY: (3, 4)}
    every = np.stack([*found["fid", "A", "T", "a3"].values()])
    assert np.array_equal(every, found["fid, cross-fitted", "A", "T", "a3"][EVERY])
    sentences = {verdict.claim.primary: verdict.sentence for verdict in judge(study, made_up_results(study))}
    assert "the other arm at the best of the rates tried here" in sentences[in_grid]
    assert "at the rates that pilots chose" in sentences[study.claims[2].primary]
    assert "rates" not in sentences[plain]


def judged(
    fid: Callable[[Run], float], rate: float = 6e-4, axis: str = "g_lr d_lr", also: tuple[Contrast, ...] = ()
) -> Verdict:
    """The verdict on a lower FID with a3 than with a0 in six fresh runs at a rate that one pilot each has chosen."""
    study = made_up_study(fresh=6, pilots=1)
    grid, fresh, _ = (replace(block, arms={"T": ("a0", "a1", "a3")}, aa={}) for block in study.blocks)
    grid = replace(grid, axes={axis: (2e-4, 6e-4, 2e-3)})
    asked = claim(Contrast("a3", "a0", ("F",), "fid", 1.25, "less"), also=also)
    study = replace(study, blocks=(grid, fresh), claims=(asked,))
    choice = {("T", arm): {axis: rate} for arm in ("a0", "a1", "a3")}
    entry = {"weights": "raw", "statistics": "running", "classes": 10, "pixel_variance": 0.9}
    results = [
        Result(run, failure=None, seconds=1.0, measured=({**entry, "iteration": run.iterations, "fid": fid(run)},))
        for block in study.blocks
        for run in runs_of(study, block, choice)
    ]
    (verdict,) = judge(study, results)
    return verdict


def spread(run: Run) -> float:
    return 1 + 0.005 * (run.seed % 3)


def test_sentence_tells_of_choices_at_an_edge_and_of_rates_only_where_rates_were_chosen() -> None:
    assert judged(spread).sentence.endswith(" This holds at the rates that pilots chose.")
    at_edge = judged(spread, rate=2e-4).sentence
    assert at_edge.endswith("beyond which a better one may lie: BN in both, joint in T, none in T.")
    assert judged(spread, axis="r1").sentence.endswith(" This holds at the values that pilots chose.")


def test_sentence_and_what_would_change_a_verdict_are_of_the_contrast_that_makes_it_so() -> None:
    also = Contrast("a1", "a0", ("F",), "fid", 1.25, "less")
    verdict = judged(lambda run: spread(run) * (2.0 if run.arm == "a3" else 4.0), also=(also,))
    low, high = verdict.also[0].interval90
    assert verdict.word == "no practical effect"
    assert "is no practical effect (the FID with BN in G is that with none times 1 (" in verdict.sentence
    assert verdict.would_change == f"A margin within the 90% interval, {low:.3g} to {high:.3g}."


def test_runs_without_spread_are_told_and_have_blanks_in_place_of_intervals() -> None:
    verdict = judged(lambda run: 2.0 if run.arm == "a3" else 4.0)
    found = verdict.estimates[0].sensitivity
    assert "no spread to judge by" in verdict.sentence
    assert "alike" in verdict.would_change
    assert verdict.estimates[0].needed is None
    assert (found.superiority, found.superiority95, found.paired95) == (1.0, None, None)


def test_more_runs_are_asked_for_only_where_there_are_fewer() -> None:
    near = judged(lambda run: spread(run) ** 10 * (4 / 1.25 if run.arm == "a3" else 4.0))
    wide = judged(lambda run: 4.0 * spread(run) ** 60)
    assert (near.word, wide.word) == ("inconclusive", "inconclusive")
    assert near.estimates[0].needed is None
    assert "With more runs" in near.would_change
    assert (wide.estimates[0].needed or 0) > 6
    assert f"With about {wide.estimates[0].needed} runs of an arm in place of 6" in wide.would_change


def test_fresh_runs_alone_are_read_or_all_of_a_grid() -> None:
    study = made_up_study(fresh=5, pilots=3)
    found = read_values(study, made_up_results(study))
    assert {axes: len(runs) for axes, runs in found["fid", "F", "T", "a3"].items()} == {"chosen": 5}
    assert {axes: len(runs) for axes, runs in found["modes_share", "G", "T", "a1"].items()} == {"chosen": 5}
    assert [len(runs) for runs in found["failure", "A", "T", "a3"].values()] == [3, 3, 3]
    assert found["seed", "F", "B", "aa"]["chosen"].tolist() == [21, 22, 23, 24, 25]


# The whole ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study() -> Study:
    return made_up_study()


@pytest.fixture(scope="module")
def results(study: Study) -> list[Result]:
    return made_up_results(study, effect=0.5)


@pytest.fixture(scope="module")
def verdicts(study: Study, results: list[Result]) -> list[Verdict]:
    return judge(study, results)


def test_no_verdict_before_the_planned_runs_are_done(study: Study, results: list[Result]) -> None:
    with pytest.raises(
        UsageError, match=r"^2 of 246 planned runs are missing, the first in block A; there is no verdict before"
    ):
        judge(study, results[2:])


def test_order_of_results_does_not_matter(study: Study, results: list[Result], verdicts: list[Verdict]) -> None:
    assert [verdict.sentence for verdict in judge(study, results[::-1])] == [verdict.sentence for verdict in verdicts]


def test_estimates_are_of_each_context_and_pooled_last(verdicts: list[Verdict]) -> None:
    by_name = {verdict.claim.name: verdict for verdict in verdicts}
    assert [estimate.context for estimate in by_name["2"].estimates] == ["T", "B", None]
    assert [estimate.context for estimate in by_name["3b"].estimates] == ["T"]
    assert [estimate.n for estimate in by_name["1"].estimates] == [(9, 9), (9, 9), (18, 18)]
    for estimate in (estimate for verdict in verdicts for estimate in verdict.estimates):
        assert (
            estimate.interval95[0]
            <= estimate.interval90[0]
            <= estimate.value
            <= estimate.interval90[1]
            <= estimate.interval95[1]
        )


def test_pairs_and_ranks_are_shown_beside_what_decides(verdicts: list[Verdict]) -> None:
    by_name = {verdict.claim.name: verdict.estimates[-1] for verdict in verdicts}
    found = by_name["2"].sensitivity
    assert found.correlation is not None
    assert -1 <= found.correlation <= 1
    assert found.superiority is not None
    assert found.superiority > 0.5, "the arm is faster"
    assert found.superiority95 is not None
    assert found.superiority95[0] < found.superiority < found.superiority95[1]
    assert by_name["5"].sensitivity.superiority is None, "within a run there is nothing to compare with"
    assert by_name["A/A"].sensitivity.correlation is None, "the arm again has other seeds"


def test_sentence_has_verdict_effect_interval_and_what_would_change_it(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        assert verdict.sentence.lower().startswith(verdict.word)
        assert f"{verdict.estimates[-1].value:.3g} (95% interval" in verdict.sentence
        assert verdict.would_change
        assert (verdict.word == "contradicted") == ("contradicted" in verdict.sentence.lower())


def test_clear_effects_are_found(verdicts: list[Verdict]) -> None:
    by_name = {verdict.claim.name: verdict.word for verdict in verdicts}
    assert by_name["4"] == "supported"
    assert by_name["5"] == "inconclusive", "ratios are near 1, but those of failed runs are the worst"
    assert "contradicted" not in by_name.values()


def test_thousands_of_runs_are_judged_in_seconds() -> None:
    study = made_up_study(fresh=170, pilots=60)
    results = made_up_results(study)
    assert len(results) > 4000
    start = perf_counter()
    judge(study, results)
    assert perf_counter() - start < 20  # about 2 on an idle core
