"""What figures of a study show: every run, in the right place, in its arm's colour, and nothing outside the picture."""

import math
import re
from dataclasses import replace
from statistics import fmean
from xml.etree import ElementTree

import pytest
from matplotlib import rc_context
from scipy.stats import binom

from bngan.study.endpoints import ENDPOINTS, has_failed
from bngan.study.figures import ZONES, View, arrivals, curve_panels, dots, figures_of_claim, forest, rates
from bngan.study.findings import COLOURS, Findings, in_margins, interval_of_median, number, ratios_to_precise, series, span
from bngan.study.panel import SHADE, WIDTH, LogTicks, Look, Panel
from bngan.study.spec import Arm, Contrast
from bngan.study.verdicts import Estimate, Verdict, judge
from tests.study.made_up import made_up_results, made_up_study

STUDY = made_up_study(fresh=6)
FINDINGS = Findings(STUDY, made_up_results(STUDY), {"digits": {"no 0s": {"fid": 5.3, "coverage": 0.88}}})
LESS = Contrast(arm="a3", baseline="a0", blocks=("F",), endpoint="fid", margin=1.25, better="less")


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    return judge(STUDY, FINDINGS.results)


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


def test_all_panels_are_well_formed_and_nothing_lies_outside(verdicts: list[Verdict]) -> None:
    figures = [forest(verdicts)]
    for verdict in verdicts:
        figures += figures_of_claim(FINDINGS, verdict)
    panels = [panel for figure in figures for panel in figure.panels]
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
    claim: str, names: list[str], verdicts: list[Verdict]
) -> None:
    (verdict,) = (verdict for verdict in verdicts if verdict.claim.name == claim)
    figures = figures_of_claim(FINDINGS, verdict)
    assert [figure.name for figure in figures] == names
    assert [figure.title.endswith(f": {verdict.word}") for figure in figures] == [True, *[False] * (len(figures) - 1)]


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
