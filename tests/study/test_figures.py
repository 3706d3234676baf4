"""What figures of a study show: every run, in the right place, in its arm's colour, and nothing outside the picture."""

import math
import re
from dataclasses import replace
from itertools import chain
from statistics import fmean
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rc_context
from scipy.stats import binom, spearmanr

from bngan.study.endpoints import ENDPOINTS, has_failed
from bngan.study.figures import figures_of_claim
from bngan.study.figures.doubts import again, pairs, power_curves
from bngan.study.figures.factors import interactions, matrix
from bngan.study.figures.networks import disturbances, gradients
from bngan.study.figures.overview import ZONES, forest
from bngan.study.figures.quality import UNTIMED, arrivals, curve_panels, rates, slopes
from bngan.study.figures.samples import REAL, UNKEPT, dots, modes
from bngan.study.figures.view import Figure, View
from bngan.study.findings import (
    COLOURS,
    Findings,
    in_margins,
    interval_of_median,
    number,
    rank_correlation,
    ratios_to_precise,
    series,
    span,
)
from bngan.study.panel import SHADE, WIDTH, LogTicks, Look, Panel
from bngan.study.spec import Arm, Contrast
from bngan.study.verdicts import Estimate, Verdict, judge
from tests.study.made_up import made_up_results, made_up_study

STUDY = made_up_study(fresh=6)
REFERENCES = {
    "digits": {"no 0s": {"fid": 5.3, "coverage": 0.88}},
    "ring": {"real points": {"modes": 8, "points": [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]}},
}
FINDINGS = Findings(STUDY, made_up_results(STUDY), REFERENCES)
LESS = Contrast(arm="a3", baseline="a0", blocks=("F",), endpoint="fid", margin=1.25, better="less")


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    return judge(STUDY, FINDINGS.results)


@pytest.fixture(scope="module")
def figures(verdicts: list[Verdict]) -> dict[str, list[Figure]]:
    """The figures of every claim, by its name."""
    return {verdict.claim.name: figures_of_claim(FINDINGS, verdict) for verdict in verdicts}


def view(*contrasts: Contrast, block: str = "F") -> View:
    return View("x", contrasts, (block,), ("T", "B"), FINDINGS.arms_of([LESS, *contrasts]))


def marks(picture: str, look: Look, *, faint: bool = False) -> list[tuple[float, float]]:
    """Return where a picture has points of a look, or only the faint ones: those of runs."""
    found = re.findall(rf'<use [^>]*x="(.*?)" y="(.*?)" style="fill: {look.colour.lower()};(.*?)"', picture)
    return [(float(x), float(y)) for x, y, style in found if not faint or "fill-opacity: 0.65" in style]


# Panels ---------------------------------------------------------------------------------------------------------------


def test_numbers_are_written_to_three_digits_and_whole_ones_in_full() -> None:
    shown = [number(value) for value in (-0.0, 0.12345, 1234.5, 1404.0, 1e-5, 2.5e7, -0.05, math.inf, math.nan, None)]
    assert shown == ["0", "0.123", "1,230", "1,404", "1e-5", "2.5e7", "-0.05", "inf", "", ""]
    assert (span((0.1, 2)), span(None)) == ("0.1 to 2", "")


@pytest.mark.parametrize("ends", [(0.9, 2.1), (0.2, 40), (9e-5, 1.1e-2), (99, 105), (1e-4, 1e4)])
def test_logarithmic_scales_have_a_few_round_ticks_within_their_ends(ends: tuple[float, float]) -> None:
    ticks = [tick for tick in LogTicks().tick_values(*ends) if ends[0] <= tick <= ends[1]]
    assert 3 <= len(ticks) <= 9
    assert all(float(f"{tick:.4g}") == pytest.approx(tick) for tick in ticks)


def test_numbers_run_up_but_names_down_and_a_number_of_runs_is_not_torn() -> None:
    panel = Panel("", "")
    low, high = panel.axes.get_ylim()
    assert low < high
    panel.rows(["none", "BN in both, joint, n\u00a06"])
    low, high = panel.axes.get_ylim()
    assert low > high
    assert [label.get_text() for label in panel.axes.get_yticklabels()] == ["none", "BN in both, joint,\nn\u00a06"]


def test_lines_at_known_values_have_names_and_those_beyond_the_scale_are_left_out() -> None:
    panel = Panel("", "", log="x")
    panel.axes.set_xlim(1, 100)
    assert panel.share(10) == pytest.approx(0.5)
    assert panel.rules("x", {"floor": 2, "beyond": 200, "the same": 2, "control": 50}) == 2
    picture = panel.svg()
    assert ">floor, the same<" in picture
    assert ">control<" in picture
    assert "beyond" not in picture


def test_all_panels_are_well_formed_and_nothing_lies_outside(verdicts: list[Verdict], figures: dict[str, list[Figure]]) -> None:
    others = [forest(verdicts), interactions(FINDINGS), pairs(FINDINGS, verdicts), *again(FINDINGS)]
    panels = [panel for figure in chain(others, *figures.values()) for panel in figure.panels]
    assert len(panels) > 30
    for panel in panels:
        root = ElementTree.fromstring(panel)
        height = float(root.attrib["viewBox"].split()[-1])
        assert root[0].tag.endswith("title")
        assert root[0].text
        for element in root.iter():
            if "x" in element.attrib:
                x, y = float(element.attrib["x"]), float(element.attrib["y"])
                assert -1 <= x <= WIDTH + 1
                assert 0 <= y <= height


def test_panels_share_no_names_but_those_of_equal_shapes() -> None:
    shapes: dict[str, set[bytes]] = {}
    for panel in [*dots(FINDINGS, view(LESS)).panels, *rates(FINDINGS, view(block="A")).panels]:
        for element in ElementTree.fromstring(panel).iter():
            if "id" in element.attrib:
                shapes.setdefault(element.attrib["id"], set()).add(ElementTree.tostring(element).strip())
    assert len(shapes) > 5
    assert all(len(alike) == 1 for alike in shapes.values())


def test_names_are_text_and_no_markup_or_mathematics() -> None:
    panel = Panel("<b>&", "</desc><script>", x="<i>", looks=[Look("<s>", "#000000")])
    panel.rows(['"<u>"', "$x^2$"])
    root = ElementTree.fromstring(panel.svg())
    assert {"<b>&", "</desc><script>", "<i>", '"<u>"', "<s>", "$x^2$"} <= {element.text for element in root.iter()}


def test_what_a_person_has_set_for_matplotlib_changes_nothing() -> None:
    picture = dots(FINDINGS, view(LESS)).panels[0]
    with rc_context({"font.size": 20, "lines.linewidth": 9, "svg.fonttype": "path", "axes.grid": True}):
        assert dots(FINDINGS, view(LESS)).panels[0] == picture


# Arms -----------------------------------------------------------------------------------------------------------------


def test_an_arms_look_tells_how_its_d_normalizes_and_no_two_are_alike() -> None:
    arms = {f"n{place}": Arm(f"{place}", {"d_norm": "none"}) for place in range(10)}
    arms["s"] = Arm("s", {"batching": "separate"})
    arms["l"] = Arm("l", {"d_norm": "layer"})
    looks = Findings(replace(STUDY, arms=STUDY.arms | arms), ()).looks
    found = {name: (looks[name].marker, looks[name].hollow) for name in ("a0", "a3", "s", "l", "aa")}
    assert found == {"a0": ("o", False), "a3": ("s", False), "s": ("^", False), "l": ("o", True), "aa": ("s", False)}
    assert len({(look.colour, look.dash) for look in looks.values()}) == len(looks) > len(COLOURS)


def test_the_arm_again_stands_beside_the_one_that_it_repeats_and_no_other() -> None:
    assert FINDINGS.arms_of([LESS]) == ("a0", "a3", "aa")
    assert FINDINGS.arms_of([replace(LESS, arm="a1")]) == ("a0", "a1")


def test_fresh_runs_are_reported_and_pilots_only_where_there_are_no_others() -> None:
    assert {result.run.role for result in FINDINGS.runs("G", "T", "a0")} == {"fresh"}
    assert {result.run.role for result in FINDINGS.runs("A", "T", "a0")} == {"pilot"}
    assert len(FINDINGS.runs("A", "T", "a0")) == 9


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 9, 12, 40, 64])
def test_interval_of_a_median_covers_it_in_95_of_100_samples_and_no_narrower_one_does(n: int) -> None:
    low, high = interval_of_median(range(1, n + 1)) or (0, 0)
    assert low + high == n + 1
    outside = 2 * binom.cdf(low - 1, n, 0.5)
    assert outside <= 0.05 < 2 * binom.cdf(low, n, 0.5)


def test_five_values_have_no_such_interval() -> None:
    assert interval_of_median(range(5)) is None


def test_effects_in_margins_point_in_the_claims_direction() -> None:
    def effect(contrast: Contrast, value: float) -> float:
        return in_margins(Estimate(contrast, "T", value, (0, 1), (0, 1), (6, 6), "inconclusive", 0.5), value)

    assert effect(LESS, 1 / 1.25) == pytest.approx(1)
    assert effect(LESS, 1.25**2) == pytest.approx(-2)
    more = replace(LESS, endpoint="coverage", margin=0.05, better="more")
    assert effect(more, 0.1) == pytest.approx(2)
    assert effect(replace(more, better="less"), 0.1) == pytest.approx(-2)


def test_ratios_to_precise_are_those_of_the_fids() -> None:
    (result,) = (result for result in FINDINGS.runs("F", "B", "a1") if result.run.seed == 1)
    fids = {(entry["weights"], entry["statistics"]): entry["fid"] for entry in result.measured if "momentum" not in entry}
    found = ratios_to_precise(result)
    assert found["raw, iteration 1,404"] == pytest.approx(fids["raw", "running"] / fids["raw", "precise"])
    assert found["ema, iteration 1,404"] == pytest.approx(fids["ema", "running"] / fids["ema", "precise"])
    assert "raw, iteration 1,404, momentum 0.01" in found


# Figures --------------------------------------------------------------------------------------------------------------


def test_every_run_is_a_point_and_failed_ones_are_counted_above() -> None:
    figure = rates(FINDINGS, view(block="A"))
    arms = {
        arm: [result for result in FINDINGS.results if (result.run.block, result.run.arm) == ("A", arm)] for arm in ("a0", "a3")
    }
    for arm, runs in arms.items():
        assert sum(len(marks(panel, FINDINGS.looks[arm], faint=True)) for panel in figure.panels) == len(runs)
    counted = [int(lost) for panel in figure.panels for lost in re.findall(r">(\d+) of 3<", panel)]
    assert sum(counted) == sum(has_failed(run) for runs in arms.values() for run in runs) > 0


def test_runs_that_were_looked_at_once_are_points_within_the_plot() -> None:
    last_look = [
        replace(result, measured=[entry for entry in result.measured if entry["iteration"] == 1404])
        for result in FINDINGS.runs("F", "T", "a3")
    ]
    runs = [result for result in last_look if series(result, "fid")]
    (picture,) = curve_panels(FINDINGS, view(LESS), "fid", "F", "T", {"a3": runs})
    found_at = [x for x, _ in marks(picture, FINDINGS.looks["a3"]) if x > WIDTH / 4]  # the legend's stands at the left
    assert len(found_at) == len(runs) + 1 > 2  # and their median
    assert max(found_at) < 3 * WIDTH / 4


def test_arrivals_mark_the_restricted_mean() -> None:
    figure = arrivals(FINDINGS, view(replace(LESS, endpoint="time_to_useful")))
    mean = fmean(ENDPOINTS["time_to_useful"].of(result) for result in FINDINGS.runs("F", "T", "a3"))
    assert f"BN in both, joint: restricted mean {number(mean)} iterations, n 6" in figure.panels[0]


def test_times_are_also_in_seconds_where_an_iteration_of_all_arms_was_timed() -> None:
    asked = replace(view(replace(LESS, endpoint="time_to_useful")), contexts=("B",))
    assert UNTIMED in arrivals(FINDINGS, asked).caption
    some = {"F/B/a0": [9.0, 11.0, 10.0]}
    assert UNTIMED in arrivals(replace(FINDINGS, milliseconds=some), asked).caption
    timed = arrivals(replace(FINDINGS, milliseconds={**some, "F/B/a3": [25.0, 20.0, 15.0]}), asked)
    assert UNTIMED not in timed.caption
    for arm, seconds in (("a0", 0.010), ("a3", 0.020), ("aa", 0.020)):  # the arm again takes what it takes
        mean = seconds * fmean(ENDPOINTS["time_to_useful"].of(result) for result in FINDINGS.runs("F", "B", arm))
        assert f"{FINDINGS.looks[arm].label}: restricted mean {number(mean)} seconds, n 6" in timed.panels[1]
    assert ">number of seconds to FID 7.8<" in timed.panels[1].replace("B, block F: ", "")


def test_early_and_late_are_joined_run_by_run() -> None:
    looks = tuple(replace(look, whole=look.iteration in (44, 1404)) for look in FINDINGS.runs("F", "T", "a0")[0].run.looks)
    results = [
        replace(result, run=replace(result.run, looks=looks)) if result.run.block == "F" else result
        for result in FINDINGS.results
    ]
    figure = slopes(replace(FINDINGS, results=results), replace(view(LESS), contexts=("T",)))
    lasting = [sum(len(series(result, "fid")) == 7 for result in FINDINGS.runs("F", "T", arm)) for arm in ("a0", "a3")]
    assert [int(re.findall(r"n (\d+)<", panel)[0]) for panel in figure.panels] == lasting
    for panel, arm, n in zip(figure.panels, ("a0", "a3"), lasting, strict=True):
        assert len(marks(panel, FINDINGS.looks[arm], faint=True)) == 2 * n
    assert slopes(FINDINGS, view(LESS)).panels == ()  # of one whole look there is no early and late


def without(*probes: str) -> Findings:
    """The findings as if these had not been measured."""
    results = [
        replace(result, probed=tuple(entry for entry in result.probed if entry["probe"] not in probes))
        for result in FINDINGS.results
    ]
    return replace(FINDINGS, results=results)


def test_logits_are_drawn_against_offsets_and_batches_where_those_were_measured() -> None:
    asked = view(replace(LESS, endpoint="offset_response"), replace(LESS, endpoint="mates_share"))
    whole, old = disturbances(FINDINGS, asked), disturbances(without("offset_curve", "mates_curve"), asked)
    assert [len(whole.panels), len(old.panels)] == [8, 4]
    assert "not measured" not in whole.caption
    assert "not measured it against: images in a batch, offset." in old.caption
    of_offsets, of_batches = whole.panels[4:6]
    n = sum(result.failure is None for result in FINDINGS.runs("F", "T", "a0"))
    assert f"none, n\u00a0{n}" in of_offsets
    assert {"16", "64", "256"} <= set(re.findall(r">(\d+)</text>", of_batches))


def test_points_of_the_median_run_lie_over_real_ones_where_they_were_kept() -> None:
    asked = View("x", (replace(LESS, endpoint="modes_share"),), ("G",), ("T",), ("a0", "a1", "p2"))
    figure = modes(FINDINGS, asked)
    runs = sorted(FINDINGS.runs("G", "T", "p2"), key=lambda result: result.run.seed)
    maps = [panel for panel in figure.panels if "over 3 real points" in panel]
    assert len(maps) == 3
    assert f"seed {runs[3].run.seed}, 8 modes" in maps[-1]  # all of them found 8: the median is the fourth
    drawn = [len(marks(maps[-1], look, faint=True)) for look in (REAL, FINDINGS.looks["p2"])]
    assert drawn == [3, 8]
    unkept = [
        replace(result, measured=[{key: value for key, value in entry.items() if key != "points"} for entry in result.measured])
        for result in FINDINGS.results
    ]
    old = modes(replace(FINDINGS, results=unkept), asked)
    assert len(old.panels) == len(figure.panels) - 3
    assert UNKEPT in old.caption
    assert UNKEPT not in figure.caption


def test_gradients_are_drawn_with_the_loss_along_them_and_beside_the_quality() -> None:
    asked = replace(view(replace(LESS, endpoint="g_gradient_cosine")), contexts=("T",))
    figure = gradients(FINDINGS, asked)
    words = ("layers of generator", "layers of discriminator", "loss of generator", "loss of discriminator", "FID against")
    assert [word in panel.replace("\n", " ") for word, panel in zip(words, figure.panels, strict=True)] == [True] * 5
    assert len(marks(figure.panels[-1], FINDINGS.looks["a3"], faint=True)) == 6
    assert len(gradients(without("loss_range"), asked).panels) == 3


def test_cells_that_fit_would_refuse_are_hatched_and_no_others() -> None:
    penalty = {"r1": 0.1, "allow_batch_coupled_penalty": True}
    results = [
        replace(result, run=replace(result.run, settings=result.run.settings | penalty))
        if result.run.context == "T"
        else result
        for result in FINDINGS.results
    ]
    asked = view(LESS)
    assert matrix(FINDINGS, asked).panels[0].count("url(#h") == 0
    assert matrix(replace(FINDINGS, results=results), asked).panels[0].count("url(#h") == 1  # a3 in T; a0 has no norm


def test_interactions_are_of_arms_that_differ_in_ds_norm_alone() -> None:
    figure = interactions(FINDINGS)
    assert [re.findall(r"<title>(.*?)</title>", panel)[0] for panel in figure.panels] == [
        "Block A, g_norm batch: failed runs",
        "Block A, g_norm batch: FID, median",
        "Block F, g_norm batch: failed runs",
        "Block F, g_norm batch: FID, median",
    ]
    assert all(">none<" in panel and ">joint<" in panel for panel in figure.panels)
    shares = [fmean(map(has_failed, FINDINGS.runs("A", context, arm))) for context in ("T", "B") for arm in ("a1", "a3")]
    heights = [y for colour in COLOURS[:2] for _, y in marks(figure.panels[0], Look("", colour))[:2]]  # then the legend's
    slope, _ = np.polyfit(shares, heights, deg=1)
    assert slope < 0  # downwards in the picture
    assert heights == pytest.approx(np.polyval(np.polyfit(shares, heights, deg=1), shares), abs=0.01)


def test_pairs_are_of_equal_seed_with_their_correlation(verdicts: list[Verdict]) -> None:
    of_claim = {verdict.claim.name: pairs(FINDINGS, [verdict]).panels for verdict in verdicts}
    # Of yes and no, of a baseline that is always 0, within runs, and of other seeds there are no correlations.
    assert [name for name, panels in of_claim.items() if not panels] == ["1", "4", "5", "A/A"]
    (verdict,) = (verdict for verdict in verdicts if verdict.claim.name == "6")
    (panel,) = of_claim["6"]
    assert len(marks(panel, Look("", COLOURS[0]), faint=True)) == 6
    assert f"T, r {number(verdict.estimates[0].sensitivity.correlation)}" in panel


def test_an_arm_that_was_trained_again_stands_beside_itself() -> None:
    (figure,) = again(FINDINGS)
    assert "block F" in figure.title
    assert re.search(r"<desc>BN in both, joint: median .*; BN in both, joint, again \(A/A\): median", figure.panels[0])
    assert SHADE in figure.panels[0]


def test_power_grows_with_runs_but_not_that_of_an_error() -> None:
    panels = power_curves({("difference", 0.05): [12]}).panels
    assert len(panels) == 1
    assert ">n 12<" in panels[0]
    right, wrong = (
        [y for x, y in marks(panels[0], Look("", colour)) if x > WIDTH / 8][-7:] for colour in (COLOURS[2], COLOURS[1])
    )
    assert right == sorted(right, reverse=True)
    assert right[0] - right[-1] > 50 > 10 > max(wrong) - min(wrong)


@pytest.mark.parametrize("seed", [1, 2])
def test_rank_correlation_is_scipys_also_with_equal_values(seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(5, size=(2, 30)).tolist()
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y)[0])
    assert math.isnan(rank_correlation(x, [1.0] * 30))


def test_what_is_too_close_to_the_baseline_is_shaded() -> None:
    runs = {"a0": FINDINGS.runs("F", "T", "a0")}
    fids = [ENDPOINTS["fid"].of(result) for result in runs["a0"]]
    low, high = view(LESS).indifferent("fid", runs) or (0, 0)
    assert high / low == pytest.approx(1.25**2)
    assert math.log(low * high) / 2 == pytest.approx(fmean(map(math.log, fids)))
    assert view(replace(LESS, baseline=None)).indifferent("fid", runs) is None


@pytest.mark.parametrize(
    ("claim", "names"),
    [
        ("1", ["claim-1-rates", "claim-1-curves"]),
        ("2", ["claim-2-time", "claim-2-fid"]),
        ("3b", ["claim-3b-modes", "claim-3b-coverage"]),
        ("4", ["claim-4-mates-share-offset-response"]),
        ("5", ["claim-5-precise"]),
        ("6", ["claim-6-cosine"]),
        ("7", ["claim-7-matrix", "claim-7-fid"]),
        ("A/A", ["claim-A-A-fid"]),
    ],
)
def test_figures_follow_from_endpoints_and_the_first_bears_the_verdict(
    claim: str, names: list[str], verdicts: list[Verdict], figures: dict[str, list[Figure]]
) -> None:
    (verdict,) = (verdict for verdict in verdicts if verdict.claim.name == claim)
    found = figures[claim]
    assert [figure.name for figure in found] == names
    assert [figure.title.endswith(f": {verdict.word}") for figure in found] == [True, *[False] * (len(found) - 1)]


def test_an_ema_endpoint_has_a_figure_of_its_own_weights(verdicts: list[Verdict]) -> None:
    claim = replace(STUDY.claims[1], primary=replace(LESS, endpoint="time_to_good_ema"), contexts=("B",), secondary=())
    (figure,) = figures_of_claim(FINDINGS, replace(verdicts[1], claim=claim))
    raw = arrivals(FINDINGS, replace(view(replace(LESS, endpoint="time_to_good")), contexts=("B",)))
    assert figure.name == "claim-2-ema-time"
    assert "of EMA weights" in figure.panels[0]
    assert figure.panels[-1] != raw.panels[-1]


def test_controls_of_the_blocks_task_are_drawn_and_of_no_other() -> None:
    assert "no 0s" in "".join(dots(FINDINGS, view(LESS)).panels)
    modes = replace(LESS, endpoint="modes_share")
    assert "no 0s" not in "".join(dots(FINDINGS, view(modes, block="G")).panels)


def test_the_forest_draws_an_effect_beyond_its_margin_beyond_the_shade(verdicts: list[Verdict]) -> None:
    (verdict,) = (verdict for verdict in verdicts if verdict.claim.name == "4")
    assert verdict.word == "supported"
    picture = forest([verdict]).panels[0]
    shades = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: {SHADE}', picture)
    right = max(float(x) for shade in shades for x in re.findall(r"[ML] ([\d.]+)", shade))
    dots_drawn = marks(picture, ZONES["supported"])
    assert len(shades) == len(dots_drawn) == len(verdict.estimates)
    assert min(x for x, _ in dots_drawn) > right
