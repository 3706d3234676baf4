"""What a study's report says, that it needs nothing else, and that it is always the same."""

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

import pytest
from PIL import Image

from bngan.errors import UsageError
from bngan.study.doubts import block_text, choices_table, objections_to, sizes_of, spaces_section, strip_of
from bngan.study.endpoints import badness
from bngan.study.findings import Findings
from bngan.study.pace import MILLISECONDS
from bngan.study.page import Heading, Table, as_html, as_markdown
from bngan.study.report import claims_table, protocol, write_report
from bngan.study.spec import AA, Arm, Result, Study
from bngan.study.verdicts import judge
from tests.study.made_up import made_up_results, made_up_study

STUDY = made_up_study(fresh=6)
RESULTS = made_up_results(STUDY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's folder with its report, and pictures of the runs of one arm."""
    folder = tmp_path_factory.mktemp("study")
    for result in of_one_arm(RESULTS):
        path = strip_of(result, folder)
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (280, 28), color=result.run.seed).save(path)
    (folder / "results.jsonl").write_text(
        f'{{"study": "made_up", "sha256": "{STUDY.sha256}", "torch": "2.11.0", "device": "cpu"}}\n'
    )
    (folder / MILLISECONDS).write_text(json.dumps({f"F/{context}/{arm}": [9.0] for context in "TB" for arm in ("a0", "a3")}))
    assert write_report(STUDY, RESULTS, folder) == folder / "report.html"
    return folder


def of_one_arm(results: list[Result]) -> list[Result]:
    return [result for result in results if result.run.id.startswith("F/T/a3")]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_results_in_another_order_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(RESULTS, k=len(RESULTS))
    write_report(STUDY, shuffled, tmp_path)
    again = everything_in(tmp_path)
    write_report(STUDY, RESULTS, tmp_path)
    assert everything_in(tmp_path) == again
    assert len([name for name in again if name.startswith("figures/")]) > 30


def test_the_page_needs_nothing_else(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="([a-z]+:|#)', page)) == {"data:", "#"}
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page


def test_every_claim_has_its_verdict_numbers_protocol_and_command(folder: Path) -> None:
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for verdict in judge(STUDY, RESULTS):
        claim = verdict.claim
        assert escape(f"Claim {claim.name}: {claim.statement}") + " <span" in page
        assert escape(verdict.sentence) in page
        assert escape(verdict.would_change) in page
        assert f"## Claim {claim.name}: {claim.statement} ({verdict.word})" in text
    assert "number of seconds to FID" in page
    for said in (STUDY.sha256, "2.11.0", "Deviations", "Objections", "regret", "Power", "bngan study study.yaml"):
        assert said in page
        assert said in text


def test_claim_of_what_d_does_not_see_shows_samples_arm_beside_arm(folder: Path, tmp_path: Path) -> None:
    for result in RESULTS:
        (path := strip_of(result, tmp_path)).parent.mkdir(exist_ok=True)
        Image.new("L", (280, 28), color=result.run.seed).save(path)
    write_report(STUDY, RESULTS, tmp_path)
    sections = re.split(r"^## ", (tmp_path / "report.md").read_text(), flags=re.MULTILINE)
    own = {section.partition(":")[0]: re.findall(r"!\[([^]]*)\]\(samples", section) for section in sections}
    shown = [caption.partition(", seed")[0] for caption in own["Claim 4"]]
    for context in "TB":
        assert {f"{label}, {context}, F: median of 6" for label in ("none", "BN in both, joint")} <= {*shown}
    assert all("F: median of 6" in caption for caption in shown)
    assert {name for name, captions in own.items() if captions} == {"Claim 4", next(name for name in own if "Samples" in name)}


def test_parameters_are_counted_for_each_arm(folder: Path) -> None:
    """G is 100-128-256-784, D 784-256-128-1; batch norm adds a scale and a shift to each hidden unit."""
    g = sum((n + 1) * m for n, m in ((100, 128), (128, 256), (256, 784)))
    d = sum((n + 1) * m for n, m in ((784, 256), (256, 128), (128, 1)))
    norm = 2 * (128 + 256)
    page = (folder / "report.html").read_text()
    for g_norm, d_norm in ((0, 0), (norm, 0), (norm, norm)):
        assert f"digits: {g + g_norm:,} and {d + d_norm:,}" in page


def test_fids_of_other_nets_are_ranked_and_compared_where_they_were_measured() -> None:
    """Those that are made up follow the digit net's, so runs have the same ranks and claims the same signs."""
    _, ranks, signs = spaces_section(Findings(STUDY, RESULTS), judge(STUDY, RESULTS))
    assert isinstance(ranks, Table)
    assert isinstance(signs, Table)
    assert [row[:2] for row in ranks.rows] == [["F", "T"], ["F", "B"]]
    assert all(row[3:] == ["1.00", "1.00", "1.00"] for row in ranks.rows)
    assert {row[0] for row in signs.rows} == {"2", "4", "6", "7", "A/A"}  # those of blocks whose last looks are whole
    assert all(row[2] == row[3] for row in signs.rows)  # random filters' is a constant times the digit net's
    assert {row[-1] for row in signs.rows} == {"yes"}


def test_nets_that_do_not_agree_are_told_and_those_not_measured_as_well() -> None:
    turned = [with_spaces(result, lambda fid: {"fid_random": fid, "fid_pixels": 1 / fid}) for result in RESULTS]
    _, ranks, signs = spaces_section(Findings(STUDY, turned), judge(STUDY, RESULTS))
    assert isinstance(ranks, Table)
    assert isinstance(signs, Table)
    assert all(row[3:] == ["1.00", "-1.00", "-1.00"] for row in ranks.rows)
    assert {row[-1] for row in signs.rows} == {"no"}
    unmeasured = [with_spaces(result, lambda fid: {}) for result in RESULTS]
    assert [*spaces_section(Findings(STUDY, unmeasured), [])][1:] == ["This study has not measured FID by other nets."]


def with_spaces(result: Result, fids: Callable[[float], dict[str, float]]) -> Result:
    """The result with other FIDs of other nets, as a function of the digit net's."""
    kept = [{key: value for key, value in entry.items() if not key.startswith("fid_")} for entry in result.measured]
    return replace(result, measured=tuple(entry | (fids(entry["fid"]) if "coverage" in entry else {}) for entry in kept))


def test_objections_are_answered_by_what_the_study_has() -> None:
    found = dict(objections_to(STUDY))
    assert "nothing against it" in found["Joint batches are twice as large."]
    arms = STUDY.arms | {"x5": Arm("joint in groups", {"d_norm": "ghost"})}
    assert "joint in groups" in dict(objections_to(replace(STUDY, arms=arms)))["Joint batches are twice as large."]


def test_only_arms_without_batch_norm_are_other_baselines() -> None:
    asked = "The baseline without norm is crippled."
    layer = Arm("BN in G, LN in D", {"g_norm": "batch", "d_norm": "layer"})
    start = Arm("none, He", {"g_norm": "none", "d_norm": "none", "initialization": "he"})
    assert "nothing against it" in dict(objections_to(replace(STUDY, arms=STUDY.arms | {"l1": layer})))[asked]
    answer = dict(objections_to(replace(STUDY, arms=STUDY.arms | {"l1": layer, "x1": start})))[asked]
    assert answer == "These arms without batch norm have another initialization or another norm: none, He."


def test_controls_are_named_only_where_there_are_some() -> None:
    lucky, blind = "The better arm got lucky seeds.", "Could this study see an effect at all?"
    assert dict(objections_to(STUDY))[blind].endswith("show one: 3b.")
    assert "nothing against it" in dict(objections_to(STUDY))[lucky], "A/A is a claim of its own, and no control"
    again = replace(STUDY.claims[-2], controls=(replace(STUDY.claims[-1].primary, arm=AA),))
    found = dict(objections_to(replace(STUDY, claims=(again,))))
    assert found[lucky].endswith("no effect in these claims: 7.")
    assert "nothing against it" in found[blind]


def test_protocol_says_which_intervals_hold_at_once_and_what_cross_fitting_does() -> None:
    findings = Findings(STUDY, RESULTS)
    by_name = {claim.name: claim for claim in STUDY.claims}
    assert "Intervals are simultaneous over the contexts T, B." in protocol(findings, by_name["2"])
    assert "simultaneous" not in protocol(findings, by_name["3b"]), "which has one context"
    assert "simultaneous" not in protocol(findings, by_name["7"]), "each context is tested by itself"
    crossed = replace(by_name["2"], primary=replace(by_name["2"].primary, cross_fitted=True))
    assert "the best of the values tried here" in protocol(findings, crossed)
    assert "tried here" not in protocol(findings, by_name["2"])
    assert "two values nearest" in block_text(replace(STUDY.blocks[1], neighbours=True))
    assert "nearest" not in block_text(STUDY.blocks[1])


def test_power_is_that_of_the_strata_and_contexts_which_a_claim_has() -> None:
    """Claim 1 has 3 rates in each of 2 contexts with 3 seeds each, claim 2 has 6 seeds at the chosen rate."""
    verdicts = {verdict.claim.name: verdict for verdict in judge(STUDY, RESULTS)}
    assert sizes_of(STUDY, verdicts["1"]) == {(9, 3, 2), (18, 6, 1)}
    assert sizes_of(STUDY, verdicts["2"]) == {(6, 1, 2), (12, 2, 1)}
    assert sizes_of(STUDY, verdicts["3b"]) == {(6, 1, 1)}


def test_choices_are_those_at_which_runs_were_made_and_ties_are_told() -> None:
    ended = [replace(result, failure="loss is NaN") if result.run.role == "pilot" else result for result in RESULTS]
    _, table = choices_table(Findings(STUDY, ended))
    assert isinstance(table, Table)
    assert {row[3] for row in table.rows} == {"g_lr d_lr 0.0006 (tied)"}, "the least would be 0.0002"


def test_links_lead_somewhere(folder: Path) -> None:
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(re.findall(r' id="([^"]*)"', page))
    for path in re.findall(r"\]\(([^)]*)\)", text):
        assert (folder / path).is_file()


def test_best_median_and_worst_run_of_an_arm_are_shown(folder: Path) -> None:
    ranked = sorted(of_one_arm(RESULTS), key=badness)
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3 + 1  # the median one stands by the claim of what D sees, too
    assert f"best of 6, seed {ranked[0].run.seed}" in page
    assert re.search(rf"worst of 6, seed {ranked[-1].run.seed}\b", page)


def test_names_from_the_file_are_text_and_no_markup(tmp_path: Path) -> None:
    wrong = "<img src=x onerror=alert(1)>"
    arms = STUDY.arms | {"a3": Arm(wrong, STUDY.arms["a3"].settings)}
    claims = (replace(STUDY.claims[0], statement=f"{wrong} | `x`"), *STUDY.claims[1:])
    study: Study = replace(STUDY, title=wrong, arms=arms, claims=claims, source=f"{wrong}</pre>")
    page = write_report(study, RESULTS, tmp_path).read_text()
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 10
    assert "<img" not in (tmp_path / "report.md").read_text().replace(f"    {wrong}", "").replace("\\<img", "")


def test_the_table_of_claims_has_a_line_for_each() -> None:
    head, rule, *lines = claims_table(judge(STUDY, RESULTS)).split("\n\n")[0].splitlines()
    assert head == "| claim | contexts | verdict | effect (95% interval) | n |"
    assert set(rule) <= set("|- ")
    assert [line.split(".")[0] for line in lines] == [f"| {claim.name}" for claim in STUDY.claims]
    assert all(line.count("|") == 6 for line in lines)


def test_there_is_no_report_while_a_run_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^1 of .* planned runs are missing"):
        write_report(STUDY, RESULTS[1:], tmp_path)
    assert everything_in(tmp_path) == {}


def test_a_table_becomes_html_and_markdown() -> None:
    parts = [Heading(2, "A & B"), Table(["name", "n"], [["a|b", "<3"]])]
    assert '<td data-name="name">a|b</td><td data-name="n">&lt;3</td>' in as_html("title", parts)
    assert '<a href="#a-b">A &amp; B</a>' in as_html("title", parts)
    assert as_markdown(parts, Path()).splitlines() == ["## A & B", "", "| name | n |", "| --- | --- |", "| a\\|b | \\<3 |"]


def test_a_thousand_runs_take_seconds(tmp_path: Path) -> None:
    """Statistics and report of 4,000 runs are to take less than 30 s."""
    study = made_up_study(fresh=70)
    results = made_up_results(study)
    assert len(results) >= 1000
    start = time.process_time()
    write_report(study, results, tmp_path)
    assert time.process_time() - start < 20
