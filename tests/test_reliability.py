"""The page on reliability tells what the tests said."""

from pathlib import Path

import reliability

TESTS = """
import pytest

def test_good(): pass

@pytest.mark.parametrize("kills", [30])
def test_killed_again_and_again(kills): pass

def test_bad(): assert False

@pytest.mark.skip(reason="no such machine")
def test_left_out(): pass

@pytest.mark.slow
def test_long(): pass
"""


def test_outcomes_and_reasons_are_read_off_a_run_of_the_tests(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    for quick in (True, False):
        (cases,) = reliability.run([str(tmp_path / "test_some.py")], quick=quick).values()
        found = {name: (outcome, reason) for name, outcome, reason in cases}
        expected = {
            "test_good": ("passed", ""),
            "test_killed_again_and_again[30]": ("passed", ""),
            "test_bad": ("failed", ""),
            "test_left_out": ("skipped", "no such machine"),
        }
        assert found == (expected if quick else {**expected, "test_long": ("passed", "")})


def test_every_file_that_the_page_names_is_there() -> None:
    for names in reliability.TOPICS.values():
        for name in names:
            assert (reliability.REPOSITORY / "tests" / f"test_{name}.py").is_file()
