"""The page on reliability tells what the tests said, and is written only if they all passed."""

import sys
from pathlib import Path

import pytest
import reliability

GOOD = """
import pytest

def test_good(): pass

@pytest.mark.parametrize("kills", [30])
def test_killed_again_and_again(kills): pass

@pytest.mark.skip(reason="no such machine")
def test_left_out(): pass

@pytest.mark.slow
def test_long(): pass
"""
BAD = "def test_bad(): assert False\n"


@pytest.mark.parametrize("quick", [True, False])
def test_outcomes_and_reasons_are_read_off_a_run_of_the_tests(quick: bool, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(GOOD)
    green, cases = reliability.run([str(tmp_path / "test_some.py")], quick=quick)
    expected = {
        "test_good": ("passed", ""),
        "test_killed_again_and_again[30]": ("passed", ""),
        "test_left_out": ("skipped", "no such machine"),
    }
    assert green
    assert {case.name: (case.outcome, case.reason) for case in cases} == (
        expected if quick else {**expected, "test_long": ("passed", "")}
    )


def test_page_is_written_on_a_green_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    tests = tmp_path / "test_some.py"
    monkeypatch.setattr(reliability, "TOPICS", {"it works": (str(tests),)})
    monkeypatch.setattr(sys, "argv", ["reliability.py", "--quick", f"--output={page}"])

    tests.write_text(GOOD + BAD)
    with pytest.raises(SystemExit) as ended:
        reliability.main()
    assert ended.value.code == 1
    assert not page.exists()
    assert "test_bad" in capsys.readouterr().err

    tests.write_text(GOOD)
    reliability.main()
    text = page.read_text()
    assert "at random moments: 30." in text
    assert "- skipped: test_left_out: no such machine" in text


def test_every_file_that_the_page_names_is_there() -> None:
    for files in reliability.TOPICS.values():
        for file in files:
            assert (reliability.REPOSITORY / file).is_file()
