"""Run the tests of what bngan promises about ranks, interruptions and bad input, the long ones too; write docs/reliability.md.

    python scripts/reliability.py

It takes about half an hour on 2 cores. What a machine cannot do is skipped, and the page says so.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import torch

from bngan.trainer_cli import git_commit

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "reliability.md"
# What is promised, and the files of tests that hold it.
TOPICS = {
    "N ranks, and several alternations a step, equal one process: weights, buffers, latents, metrics, plots": (
        "distributed",
        "wires",
        "metrics_on_ranks",
        "alternations",
    ),
    "strategies, precisions and every flag of the Trainer": ("strategies", "precision", "trainer_flags"),
    "a run that was stopped anywhere goes on to the same bits": ("resume",),
    "killed over and over, full disk, two runs at once": ("crash",),
    "signals, and ranks that die": ("signals",),
    "several machines, restarted jobs": ("multinode",),
    "a person's mistake is told in a line": ("bad_input",),
    "files from strangers run nothing": ("safety",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the long tests")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write (default docs/reliability.md)")
    args = parser.parse_args()
    rows, notes, failed, kills, start = [], [], 0, 0, time.monotonic()
    everything = run([f"tests/test_{name}.py" for names in TOPICS.values() for name in names], quick=args.quick)
    for topic, names in TOPICS.items():
        cases = [case for name in names for case in everything[f"tests.test_{name}"]]
        outcomes = Counter(outcome for _, outcome, _ in cases)
        rows.append(
            f"| {topic} | {outcomes['passed']} | {outcomes['skipped']} | {outcomes['failed']} | "
            + ", ".join(f"`tests/test_{name}.py`" for name in names)
            + " |"
        )
        notes += [f"- skipped: {name}: {reason}" for name, outcome, reason in cases if outcome == "skipped"]
        notes += [f"- **failed**: {name}" for name, outcome, _ in cases if outcome == "failed"]
        failed += outcomes["failed"]
        kills += sum(
            int(count[1])
            for name, outcome, _ in cases
            if outcome == "passed" and (count := re.search(r"killed_again_and_again.*\[(\d+)\]", name))
        )
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {torch.cuda.device_count()} GPUs"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    args.output.write_text(
        "\n".join(
            [
                "# What was tested of reliability, and how it came out last",
                "",
                f"Written by `scripts/reliability.py{' --quick' if args.quick else ''}` on {time.strftime('%Y-%m-%d')} in "
                f"{(time.monotonic() - start) / 60:.0f} minutes: {machine}, {versions}, commit {str(git_commit())[:12]}.",
                "",
                "| promise | passed | skipped | failed | tests |",
                "|---|---|---|---|---|",
                *rows,
                "",
                f"Runs killed by SIGKILL at random moments: {kills}. After each there was a whole checkpoint, and each chain "
                "of runs ended with the weights, optimizers and plots of one that was never killed.",
                *(["", *notes] if notes else []),
                "",
            ]
        )
    )
    print(f"{args.output} written")
    sys.exit(failed > 0)


def run(files: list[str], *, quick: bool) -> dict[str, list[tuple[str, str, str]]]:
    """Return (name, passed | skipped | failed, reason) of each test, by the module it is in; progress goes to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        marks = "not gpu and not slow" if quick else "not gpu"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marks, f"--junitxml={report}", *files]
        subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        suite = ElementTree.parse(report).getroot()[0]
    found: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for case in suite.iter("testcase"):
        skipped = case.find("skipped")
        bad = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if bad else "passed" if skipped is None else "skipped"
        reason = "" if skipped is None else skipped.get("message", "")
        found[case.get("classname", "")].append((case.get("name", ""), outcome, reason))
    return found


if __name__ == "__main__":
    main()
