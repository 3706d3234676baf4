"""README's tables of claims are what the committed studies say."""

import shutil
from pathlib import Path

import claims
import pytest

README = claims.REPOSITORY / "README.md"
STUDIES = [folder.parent for folder in sorted((claims.REPOSITORY / "docs" / "claims").glob("*/study.yaml"))]


def test_every_committed_study_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    ignored = shutil.ignore_patterns("figures", "samples")
    folders = [shutil.copytree(folder, tmp_path / folder.name, ignore=ignored) for folder in STUDIES]
    monkeypatch.setattr("sys.argv", ["claims.py", *map(str, folders), f"--readme={readme}"])
    readme.write_text(README.read_text().replace("inconclusive |", "supported |"))
    claims.main()
    assert readme.read_text() == README.read_text()


def test_a_page_without_a_place_for_the_table_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (readme := tmp_path / "README.md").write_text("no table")
    monkeypatch.setattr("sys.argv", ["claims.py", str(STUDIES[0]), f"--readme={readme}"])
    with pytest.raises(SystemExit):
        claims.main()
    assert "has no <!-- written by scripts/claims.py" in capsys.readouterr().err
    assert readme.read_text() == "no table"
