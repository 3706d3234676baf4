"""Are the intervals and p-values right? Compared with scipy, statsmodels, lifelines and invariants."""

import math
from dataclasses import replace
from itertools import combinations

import lifelines
import lifelines.utils
import numpy as np
import pytest
from scipy import special, stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint
from statsmodels.stats.weightstats import ttost_ind

from bngan.study.statistics import (
    Array,
    Bracket,
    MeanEffect,
    Stratum,
    best,
    best_of,
    beta_quantile,
    by_axes,
    choice_made,
    choices,
    choose,
    clopper_pearson,
    combine,
    cross_fitted,
    effect_of,
    equivalence_p,
    holm,
    incomplete_beta,
    interaction_limits,
    mean_of,
    normal_quantile,
    normal_survival,
    paired,
    rank_sum_p,
    regret_of,
    seeds_needed,
    superiority,
    t_quantile,
    t_survival,
)
from tests.study.made_up import made_up_results, made_up_study

ARM: Array = np.array([2.1, 3.4, 1.9, 5.5, 2.8, 3.3, 2.2])
BASE: Array = np.array([4.1, 3.9, 6.5, 2.9, 5.8])
TIES: tuple[Array, Array] = (np.array([2.0, 3, 2, 6, 3, 3, 2]), np.array([4.0, 4, 6, 3, 6]))


def rates(arm: tuple[int, int], baseline: tuple[int, int], weight: float = 1.0) -> Stratum:
    """A stratum of (count, n) of both arms."""
    ones = [np.array([1.0] * count + [0.0] * (n - count)) for count, n in (arm, baseline)]
    return Stratum(weight, ones[0], ones[1])


# Distributions --------------------------------------------------------------------------------------------------------


def test_distributions_are_scipys() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.uniform(0.5, 400, size=(2, 500))
    x = np.where(generator.random(500) < 0.5, generator.beta(a, b), generator.random(500))
    np.testing.assert_allclose(incomplete_beta(a, b, x), special.betainc(a, b, x), atol=1e-11)
    np.testing.assert_allclose(incomplete_beta(a[:2], b[:2], np.array([0.0, 1.0])), [0, 1])
    np.testing.assert_allclose(beta_quantile(np.asarray(0.025), a, b), stats.beta.ppf(0.025, a, b), atol=1e-11)
    freedom, t = generator.uniform(1, 300, size=500), generator.normal(scale=5, size=500)
    np.testing.assert_allclose(t_survival(t, freedom), stats.t.sf(t, freedom), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(t_survival(np.array([np.inf, -np.inf, 0.0]), freedom[:3]), [0, 1, 0.5])
    np.testing.assert_allclose(normal_survival(t), stats.norm.sf(t))
    for tail in (0.0005, 0.025, 0.05, 0.4):
        np.testing.assert_allclose(t_quantile(tail, freedom), stats.t.isf(tail, freedom), rtol=1e-9)
        assert normal_quantile(tail) == pytest.approx(stats.norm.isf(tail))


@pytest.mark.parametrize(("count", "n"), [(0, 12), (3, 12), (12, 12), (41, 480)])
def test_interval_of_a_rate_is_clopper_and_pearsons(count: int, n: int) -> None:
    assert clopper_pearson(count, n) == pytest.approx(proportion_confint(count, n, method="beta"), abs=1e-10)


# Rates ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "other", "n"), [(7, 2, 12), (0, 0, 20), (20, 0, 20), (56, 48, 80)])
def test_difference_of_rates_is_newcombes_with_unbiased_variances(count: int, other: int, n: int) -> None:
    alpha = 2 * float(stats.norm.sf(stats.norm.isf(0.025) * math.sqrt(n / (n - 1))))
    expected = confint_proportions_2indep(count, n, other, n, method="newcomb", compare="diff", alpha=alpha)
    assert effect_of([rates((count, n), (other, n))], "rate").limits(0.95) == pytest.approx(expected, abs=1e-9)


def test_difference_of_rates_is_close_to_newcombes_printed_example() -> None:
    # Newcombe 1998, table II (a), method 10: 56/70 - 48/80.
    low, high = effect_of([rates((56, 70), (48, 80))], "rate").limits(0.95)
    assert (float(low), float(high)) == pytest.approx((0.0524, 0.3339), abs=1.5e-3)


def test_equal_strata_of_rates_are_as_good_as_one_and_unlike_ones_are_better() -> None:
    one = effect_of([rates((100, 400), (200, 400))], "rate")
    alike = effect_of([rates((20, 80), (40, 80), weight=0.2)] * 5, "rate")
    assert alike.limits(0.95) == pytest.approx(one.limits(0.95), abs=1e-3)
    unlike = effect_of([rates((0, 20), (0, 20), 0.25), rates((20, 20), (20, 20), 0.25), rates((10, 40), (20, 40), 0.5)], "rate")
    pooled = effect_of([rates((30, 80), (40, 80))], "rate")
    widths = [float(np.subtract(*effect.limits(0.95)[::-1])) for effect in (unlike, pooled)]
    assert float(unlike.value) == pytest.approx(float(pooled.value))
    assert widths[0] < 0.9 * widths[1]


@pytest.mark.parametrize(("arms", "baselines"), [(12, 12), (20, 8)])
def test_difference_of_rates_over_strata_is_mantel_and_haenszels(arms: int, baselines: int) -> None:
    """It is least squares of the outcome on the arm within strata, which weighs them by n m / (n + m)."""
    generator = np.random.default_rng(0)
    failed, design, strata = [], [], []
    for place, (times, truth) in enumerate(zip((1, 1, 2, 3), (0.1, 0.3, 0.6, 0.9), strict=True)):
        n, m = times * arms, times * baselines
        arm, base = (generator.binomial(1, p, size).astype(float) for p, size in ((truth, n), (truth - 0.1, m)))
        strata.append(Stratum(n * m / (n + m), arm, base))
        failed += [*arm, *base]
        design += [[float(is_arm), *np.eye(4)[place]] for is_arm in [True] * n + [False] * m]
    total = sum(stratum.weight for stratum in strata)
    effect = effect_of([Stratum(s.weight / total, s.arm, s.baseline) for s in strata], "rate")
    fitted = OLS(np.array(failed), np.array(design)).fit(cov_type="HC2")
    assert float(effect.value) == pytest.approx(fitted.params[0])
    assert [float(end) for end in effect.limits(0.95)] == pytest.approx(list(fitted.conf_int()[0]), abs=0.03)


@pytest.mark.parametrize("truth", [(0.1, 0.3, 0.6, 0.9), (0.1, 0.1, 0.1, 0.1), (0.5, 0.5, 0.5, 0.5)])
def test_stratified_difference_of_rates_covers_on_both_sides(truth: tuple[float, ...]) -> None:
    generator = np.random.default_rng(0)
    cells = (generator.random((2, 10_000, 4, 10)) < np.stack([truth, np.array(truth) - 0.1])[:, None, :, None]).astype(float)
    effect = effect_of([Stratum(0.25, cells[0, :, k], cells[1, :, k]) for k in range(4)], "rate")
    assert 0.005 < (effect.p_above(0.1) <= 0.025).mean() < 0.030
    assert 0.008 < (effect.p_below(0.1) <= 0.025).mean() < 0.030


# Means and ratios -----------------------------------------------------------------------------------------------------


def test_difference_of_means_is_welchs() -> None:
    effect = effect_of([Stratum(1.0, ARM, BASE)], "difference")
    expected = stats.ttest_ind(ARM, BASE, equal_var=False)
    assert effect.limits(0.95) == pytest.approx(tuple(expected.confidence_interval()))
    assert 2 * float(effect.p_below(0.0)) == pytest.approx(np.asarray(expected)[1])
    assert float(equivalence_p(effect, 4.0)) == pytest.approx(ttost_ind(ARM, BASE, -4.0, 4.0, usevar="unequal")[0])


def test_ratio_of_geometric_means_is_welchs_of_logarithms() -> None:
    effect = effect_of([Stratum(1.0, ARM, BASE)], "ratio")
    expected = stats.ttest_ind(np.log(ARM), np.log(BASE), equal_var=False)
    assert effect.limits(0.9) == pytest.approx(tuple(expected.confidence_interval(0.9)))


def test_restricted_mean_is_the_area_under_kaplan_and_meiers_curve() -> None:
    times, horizon = np.array([44.0, 88, 88, 351, 1404, 1404, 702]), 1404
    curve = lifelines.KaplanMeierFitter().fit(times, event_observed=times < horizon)
    area = lifelines.utils.restricted_mean_survival_time(curve, t=horizon)
    assert math.exp(float(mean_of(times, "ratio", of_means=True).value)) == pytest.approx(area)


def test_ratio_of_restricted_means_covers() -> None:
    generator = np.random.default_rng(0)
    arm, base = (np.minimum(generator.lognormal(5.5, 0.6, size=(20_000, 12)) * scale, 1404) for scale in (1.0, 2.0))
    truth = math.log(arm.mean() / base.mean())
    low, high = effect_of([Stratum(1.0, arm, base)], "ratio", of_means=True).limits(0.95)
    assert 0.93 < ((low <= truth) & (truth <= high)).mean() < 0.96


@pytest.mark.parametrize("kind", ["rate", "difference"])
def test_p_value_and_interval_agree_and_less_is_more_turned_round(kind: str) -> None:
    stratum = rates((7, 12), (2, 15)) if kind == "rate" else Stratum(1.0, ARM, BASE)
    effect, turned = (effect_of([stratum], "rate" if kind == "rate" else "difference", more=more) for more in (True, False))
    low, high = (float(end) for end in effect.limits(0.95))
    assert float(effect.p_above(low)) == pytest.approx(0.025, abs=1e-9)
    assert float(effect.p_below(high)) == pytest.approx(0.025, abs=1e-9)
    assert turned.limits(0.95) == pytest.approx((-high, -low))
    assert float(turned.p_above(0.1)) == pytest.approx(float(effect.p_below(-0.1)))


def test_many_studies_at_once_are_as_each_by_itself() -> None:
    generator = np.random.default_rng(0)
    arm, base = generator.lognormal(size=(3, 8)), generator.lognormal(size=(3, 6))
    together = effect_of([Stratum(0.5, arm, base), Stratum(0.5, base, arm)], "ratio").limits(0.95)
    for study in range(3):
        alone = [Stratum(0.5, arm[study], base[study]), Stratum(0.5, base[study], arm[study])]
        assert [float(end[study]) for end in together] == pytest.approx(
            [float(x) for x in effect_of(alone, "ratio").limits(0.95)]
        )


def test_a_single_run_tells_nothing_and_equal_runs_have_no_spread_to_tell_by() -> None:
    low, high = effect_of([Stratum(1.0, ARM[:1], BASE)], "difference").limits(0.95)
    assert (low, high) == (-math.inf, math.inf)
    same = effect_of([Stratum(1.0, np.ones(5), np.zeros(5))], "difference")
    assert same.limits(0.95) == (1.0, 1.0)
    assert (float(same.p_above(0.5)), float(same.p_above(1.5))) == (0.0, 1.0)
    assert same.alike
    assert effect_of([Stratum(1.0, np.full(5, 702.0), np.full(5, 1404.0))], "ratio").alike, "but for rounding"
    assert not effect_of([Stratum(1.0, ARM, np.zeros(5))], "difference").alike
    assert not effect_of([rates((5, 5), (0, 5))], "rate").alike, "Wilson's interval has a width"
    assert not effect_of([Stratum(1.0, ARM[:1], BASE)], "difference").alike


def test_sum_of_estimates_has_satterthwaites_freedom() -> None:
    terms = [
        (1.0, MeanEffect(*(np.asarray(x) for x in (1.0, 2.0, 5.0)))),
        (-2.0, MeanEffect(*(np.asarray(x) for x in (3.0, 0.5, 7.0)))),
    ]
    found = combine(terms)
    assert (float(found.value), float(found.variance)) == (-5.0, 4.0)
    assert float(found.freedom) == pytest.approx(4.0**2 / (2.0**2 / 5 + 2.0**2 / 7))


# Pairs and ranks ------------------------------------------------------------------------------------------------------


def test_paired_effect_is_the_paired_t_test_and_correlation_is_pearsons() -> None:
    base = ARM[::-1] + 0.3 * ARM
    correlation, effect = paired([Stratum(1.0, ARM, base)], "difference")
    assert correlation == pytest.approx(np.corrcoef(ARM, base)[0, 1])
    assert effect.limits(0.95) == pytest.approx(tuple(stats.ttest_rel(ARM, base).confidence_interval()))
    _, turned = paired([Stratum(1.0, ARM, base)], "difference", more=False)
    assert float(turned.value) == -float(effect.value)


def test_superiority_is_brunner_and_munzels() -> None:
    arm, base = TIES
    found = superiority([Stratum(1.0, arm, base)])
    expected = stats.brunnermunzel(arm, base)
    assert 2 * float(found.p_below(0.5)) == pytest.approx(expected.pvalue)
    assert float(found.value) == pytest.approx(stats.mannwhitneyu(arm, base).statistic / (len(arm) * len(base)))
    assert float(superiority([Stratum(1.0, arm, base)], more=False).value) == pytest.approx(1 - float(found.value))


def test_rank_sums_are_tested_exactly() -> None:
    assert rank_sum_p([Stratum(1.0, ARM, BASE)]) == pytest.approx(stats.mannwhitneyu(ARM, BASE, method="exact").pvalue)
    separated = rank_sum_p([Stratum(1.0, np.arange(6.0), np.arange(6.0) + 10)])
    assert separated == pytest.approx(2 / math.comb(12, 6))  # 0.0022


def test_rank_sums_with_ties_are_those_of_every_way_to_deal_the_arms() -> None:
    arm, base = TIES
    ranks = stats.rankdata([*arm, *base])
    sums = np.array([sum(ranks[list(chosen)]) for chosen in combinations(range(12), 7)])
    observed = ranks[:7].sum()
    assert rank_sum_p([Stratum(1.0, arm, base)]) == pytest.approx(
        min(1, 2 * min((sums <= observed).mean(), (sums >= observed).mean()))
    )
    both = rank_sum_p([Stratum(0.5, arm, base), Stratum(0.5, arm, base)])
    two = (sums[:, None] + sums).ravel()
    assert both == pytest.approx(2 * min((two <= 2 * observed).mean(), (two >= 2 * observed).mean()))


# Several tests and contexts -------------------------------------------------------------------------------------------


def test_holms_p_values_are_statsmodels() -> None:
    p = np.random.default_rng(0).random((4, 8)) ** 3
    expected = np.array([multipletests(row, method="holm")[1] for row in p], dtype=float)
    np.testing.assert_allclose(holm(p), expected)


def test_interval_of_an_interaction_of_means_is_nearly_welchs() -> None:
    generator = np.random.default_rng(0)
    cells = generator.normal(size=(4, 40))
    effects = [effect_of([Stratum(1.0, *pair)], "difference") for pair in ((cells[0], cells[1]), (cells[2], cells[3]))]
    both = effect_of([Stratum(1.0, cells[0], cells[1]), Stratum(-1.0, cells[2], cells[3])], "difference")
    assert interaction_limits(effects[0], effects[1], 0.95) == pytest.approx(both.limits(0.95), abs=0.02)


def test_needed_seeds_grow_with_the_square_of_the_width() -> None:
    assert seeds_needed(12, 0.2, 0.1) == 48
    assert seeds_needed(12, math.inf, 0.1) is None


# Choosing -------------------------------------------------------------------------------------------------------------


def test_rate_is_chosen_by_the_median_with_failures_worst() -> None:
    lucky, steady, failing = [1.0, 33.2, 33.2], [4.0, 4.0, 5.0], [3.0, 3.0, 33.2]
    assert best(np.array([lucky, steady, failing])) == 2  # one failure of three does not move a median
    assert best(np.array([lucky, steady, failing[::-1]] * 2).reshape(2, 3, 3)).tolist() == [2, 2]
    assert best(np.array([[3.0, 3.0, 33.2], [3.0, 3.0, 4.0]])) == 1, "of equal medians the least mean"


def test_choice_tells_its_regret_and_whether_it_lies_at_the_edge() -> None:
    study = made_up_study(pilots=4)
    results = made_up_results(study)
    block = study.blocks[0]
    chosen = choices(block, results)
    assert chosen.keys() == {(context, arm) for context, arms in block.arms.items() for arm in arms}
    ends = (block.axes["g_lr d_lr"][0], block.axes["g_lr d_lr"][-1])
    for cell, choice in chosen.items():
        assert choose(block, results)[cell] == choice.axes
        assert choice.at_edge == (choice.axes["g_lr d_lr"] in ends)
        assert choice.regret > 0
    assert choices(study.blocks[1], results) == {}, "fresh runs choose nothing"


def test_ties_go_to_the_least_value_whichever_pilot_ended_first_and_runs_that_are_there_keep_theirs() -> None:
    study = made_up_study(fresh=1, pilots=2)
    grid, fresh, _ = study.blocks
    pilots = [replace(result, failure="loss is NaN") for result in made_up_results(study) if result.run.block == "A"]
    for results in (pilots, pilots[::-1]):
        chosen = choices(grid, results)
        assert {choice.axes["g_lr d_lr"] for choice in chosen.values()} == {2e-4}
        assert all(choice.tied and choice.at_edge for choice in chosen.values())
    made = choice_made(study, grid, made_up_results(study))
    assert made == {cell: {"g_lr d_lr": 6e-4} for cell in chosen}, "at which the fresh runs were made"
    assert {cell: choice.axes for cell, choice in choices(grid, pilots, made).items()} == made
    assert choice_made(study, fresh, made_up_results(study)) == {}
    assert not any(choice.tied for choice in choices(grid, made_up_results(made_up_study(pilots=3))).values())


def test_values_are_in_their_own_order_whichever_run_ended_first() -> None:
    results = [result for result in made_up_results(made_up_study(pilots=2)) if result.run.id.startswith("A/T/a0")]
    found = by_axes(results[::-1])
    assert [*found] == [f"{{'g_lr d_lr': {rate}}}" for rate in (2e-4, 6e-4, 2e-3)]
    assert [[result.run.seed for result in of] for of in found.values()] == [[101, 102]] * 3


def test_cross_fitted_runs_are_at_the_value_that_the_other_half_chooses() -> None:
    scores = np.array([[1.0, 5.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0], [3.0, 1.0, 3.0, 1.0]])  # even seeds choose 0, odd ones 2
    values = np.arange(12.0).reshape(3, 4)
    assert cross_fitted(scores, values).tolist() == [8.0, 1.0, 10.0, 3.0]
    both = cross_fitted(np.stack([scores, -scores]), np.stack([values, values]))
    assert both.tolist() == [[8.0, 1.0, 10.0, 3.0], [0.0, 9.0, 2.0, 11.0]]


def test_best_of_values_is_where_the_mean_is_most_or_least() -> None:
    values = np.array([[1.0, 100.0], [20.0, 20.0], [11.0, 12.0]])
    assert best_of(values, "difference", more=True).tolist() == [1.0, 100.0]
    assert best_of(values, "ratio", more=True).tolist() == [20.0, 20.0], "by the mean of logarithms"
    assert best_of(values, "ratio", more=False).tolist() == [1.0, 100.0]
    assert best_of(np.stack([values, -values]), "difference", more=False).tolist() == [[11.0, 12.0], [-1.0, -100.0]]


def test_bracket_holds_all_three_effects_and_its_p_values_are_those_of_its_ends() -> None:
    effects = [effect_of([Stratum(1.0, ARM + shift, BASE)], "difference") for shift in (0.0, -0.5, 0.7)]
    bracket = Bracket(*effects)
    low, high = (float(end) for end in bracket.limits(0.95))
    assert (low, high) == (float(effects[1].limits(0.95)[0]), float(effects[2].limits(0.95)[1]))
    assert float(bracket.value) == float(effects[0].value)
    assert float(bracket.p_above(low)) == pytest.approx(0.025)
    assert float(bracket.p_below(high)) == pytest.approx(0.025)
    turned = Bracket(effects[0], effects[2], effects[1])
    assert turned.limits(0.95) == effects[0].limits(0.95), "the chosen values are among the best, so ends only move outwards"


def test_regret_is_none_where_halves_agree_and_the_loss_where_they_do_not() -> None:
    assert regret_of(np.array([[1.0, 1.0], [2.0, 2.0]])) == 0
    assert regret_of(np.array([[1.0, 3.0], [2.0, 2.0]])) == pytest.approx(1.0)
    assert math.isnan(regret_of(np.array([[1.0], [2.0]])))
