"""A study from its file to its report: by processes, stopped and killed on its way, and going on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bngan.cli import main
from bngan.study.record import locked
from tests.conftest import REPOSITORY

TINY = """
title: A ring of Gaussians; 10 iterations
settings: {network: points, hidden_dim: 8, latent_dim: 2, instance_noise: 0, ema_decay: 0, lr_decay_start: 1}
contexts:
  T: {loss: non_saturating}
arms:
  a0: {label: none, g_norm: none, d_norm: none}
  a3: {label: BN in both, g_norm: batch, d_norm: batch}
blocks:
  R:
    task: ring
    arms: {T: [a0, a3]}
    axes: {g_lr d_lr: [1e-3, 1e-2]}
    chosen_from: R
    aa: {T: a3}
    seeds: {pilot: 101..102, fresh: 1..6, aa: 21..26}
    iterations: ITERATIONS
    batch_size: 16
    looks: {at: [5, ITERATIONS], samples: 100, probes: {mates_share: [ITERATIONS]}}
claims:
  - name: "4"
    statement: Through batch norm D sees the batch.
    contexts: [T]
    primary: {arm: a3, baseline: a0, blocks: R, endpoint: mates_share, margin: 0.05, better: more}
"""
PLANNED = 2 * 2 * 2 + 2 * 6 + 6


def written(folder: Path, iterations: int = 10) -> list[str]:
    """Write the study into a folder, and return the words that run it with its output there."""
    (folder / "tiny.yaml").write_text(TINY.replace("ITERATIONS", str(iterations)))
    return ["study", str(folder / "tiny.yaml"), f"--output={folder / 'out'}", f"--root={folder}", "--jobs=1"]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results by the runs' ids, each of which is there once, without the seconds that they took."""
    _, *lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        del entry["seconds"]
    found = {entry["run"]["id"]: entry for entry in entries}
    assert len(found) == len(entries)
    return found


def test_study_is_run_reported_and_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = written(tmp_path)
    assert main(command) == 0
    told = capsys.readouterr().out
    assert f"R {PLANNED}/{PLANNED}" in told
    assert told.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"
    whole, page = results(tmp_path), (tmp_path / "out" / "report.html").read_bytes()
    assert len(whole) == PLANNED
    assert b"Through batch norm D sees the batch." in page

    assert main(command) == 0  # there is nothing to do
    assert results(tmp_path) == whole
    assert (tmp_path / "out" / "report.html").read_bytes() == page

    with locked(tmp_path / "out"):  # as by another study's process
        assert main(command) == 2
    assert "a study is running in" in capsys.readouterr().err

    (tmp_path / "tiny.yaml").write_text((tmp_path / "tiny.yaml").read_text().replace("0.05", "0.1"))
    assert main(command) == 2
    assert "another study, or of this one before its file was changed" in capsys.readouterr().err


def test_dry_run_tells_what_it_takes_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [word for word in written(tmp_path) if "--output" not in word]
    assert main([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out
    for words in ("A ring of Gaussians", f" {PLANNED} ", "in all, 1 at a time", "GiB of memory", "Claim 4: Through batch norm"):
        assert words in told
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "bngan", *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_lines(folder: Path, count: int) -> None:
    """Wait until so many results are there."""
    record, deadline = folder / "out" / "results.jsonl", time.monotonic() + 120
    while not record.exists() or record.read_bytes().count(b"\n") <= count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_study_that_is_stopped_or_killed_loses_and_repeats_nothing(
    number: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = written(tmp_path, iterations=200)
    record = tmp_path / "out" / "results.jsonl"
    for done in (3, 12):
        process = start(command, tmp_path)
        wait_for_lines(tmp_path, done)
        process.send_signal(number)
        told, _ = process.communicate(timeout=60)
        assert process.returncode == status
        if number == signal.SIGINT:
            assert "The same command goes on with the others." in told
            assert "Traceback" not in told
        assert not (tmp_path / "out" / "report.html").exists()  # no verdict before the last run
    record.write_bytes(record.read_bytes()[:-30])  # as a kill in the middle of a line leaves it
    assert main(command) == 0
    assert "The last line of results.jsonl was cut off; its run is done again." in capsys.readouterr().out
    (tmp_path / "whole").mkdir()
    assert main(written(tmp_path / "whole", iterations=200)) == 0
    assert results(tmp_path) == results(tmp_path / "whole")


@pytest.mark.slow
def test_smoke_study_ends_in_two_minutes_with_its_report(tmp_path: Path, mnist_root: Path) -> None:
    begin = time.monotonic()
    assert main(["study", "smoke", f"--output={tmp_path / 'out'}", f"--root={mnist_root}", "--jobs=2"]) == 0
    assert time.monotonic() - begin < 120
    assert len(results(tmp_path)) == 76
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("3b", "Through batch norm", "Running statistics serve"):
        assert words in page
