"""README's table of claims is what the committed study says."""

import shutil
from pathlib import Path

import claims
import pytest

STUDY = claims.REPOSITORY / "docs" / "claims" / "claims_cpu"


def test_table_of_claims_is_written_by_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    folder = shutil.copytree(STUDY, tmp_path / "study", ignore=shutil.ignore_patterns("figures"))
    monkeypatch.setattr("sys.argv", ["claims.py", str(folder), f"--readme={readme}"])
    readme.write_text((claims.REPOSITORY / "README.md").read_text().replace("conditional |", "supported |"))
    claims.main()
    assert readme.read_text() == (claims.REPOSITORY / "README.md").read_text()
