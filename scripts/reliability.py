"""Run the tests of what bngan promises about ranks, interruptions and bad input, the long ones too; write docs/reliability.md.

    python scripts/reliability.py

It takes about half an hour on 2 cores. The page is written if every test passes; else the failed ones are named and the page
stays as it is. What a machine cannot do is skipped, and the page says so.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from benchmark import commit

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "reliability.md"
# What is promised, and the tests that hold it.
TOPICS = {
    "N ranks equal one process: weights, buffers, latents, metrics, plots": (
        "tests/integration/test_distributed.py",
        "tests/metrics/test_sample_metrics_on_ranks.py",
    ),
    "strategies, precisions and the Trainer's settings": (
        "tests/integration/test_strategies.py",
        "tests/integration/test_precision.py",
        "tests/test_trainer.py",
    ),
    "a run that was stopped anywhere goes on to the same bits": ("tests/integration/test_resume.py",),
    "killed over and over, full disk, two runs at once": ("tests/integration/test_crash.py",),
    "signals, and ranks that die": ("tests/integration/test_signals.py",),
    "several machines, restarted jobs": ("tests/integration/test_multinode.py", "tests/test_rendezvous.py"),
    "a person's mistake is told in a line": ("tests/test_bad_input.py",),
    "files from strangers run nothing": ("tests/test_safety.py",),
}


class Case(NamedTuple):
    """One test: its file, its name, how it came out, and why it was skipped."""

    file: str
    name: str
    outcome: str  # passed, skipped or failed
    reason: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the long tests")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write (default docs/reliability.md)")
    args = parser.parse_args()
    start = time.monotonic()
    green, cases = run([file for files in TOPICS.values() for file in files], quick=args.quick)
    if not green:
        failed = [f"{case.file}::{case.name}" for case in cases if case.outcome == "failed"]
        print("\n".join(["", f"Not every test passed, so {args.output} is not written:", *failed]), file=sys.stderr)
        sys.exit(1)
    command = f"scripts/reliability.py{' --quick' if args.quick else ''}"
    args.output.write_text(page(cases, command, minutes=(time.monotonic() - start) / 60))
    print(f"{args.output} written")


def run(files: list[str], *, quick: bool) -> tuple[bool, list[Case]]:
    """Run the tests of these files, with progress on the terminal; return whether all went well, and how each came out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        marks = "not gpu and not slow" if quick else "not gpu"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marks, f"--junitxml={report}", *files]
        status = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
        found = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    return status == 0, [read(case) for case in found]


def read(case: ElementTree.Element) -> Case:
    skipped = case.find("skipped")
    bad = case.find("failure") is not None or case.find("error") is not None
    outcome = "failed" if bad else "passed" if skipped is None else "skipped"
    file = case.get("classname", "").replace(".", "/") + ".py"
    return Case(file, case.get("name", ""), outcome, "" if skipped is None else skipped.get("message", ""))


def page(cases: list[Case], command: str, *, minutes: float) -> str:
    """Return the text of docs/reliability.md, of a run of the tests in which none failed."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {torch.cuda.device_count()} GPUs"
    software = f"Python {platform.python_version()}, torch {torch.__version__}, commit {commit()}"
    lines = [
        "# What was tested of reliability",
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}, when every test passed, in {minutes:.0f} minutes:",
        f"{machine}, {software}.",
        "",
        "| promise | passed | skipped | tests |",
        "|---|---|---|---|",
    ]
    for topic, files in TOPICS.items():
        outcomes = Counter(case.outcome for case in cases if case.file in files)
        names = ", ".join(f"`{file}`" for file in files)
        lines.append(f"| {topic} | {outcomes['passed']} | {outcomes['skipped']} | {names} |")
    kills = [re.search(r"killed_again_and_again.*\[(\d+)\]", case.name) for case in cases if case.outcome == "passed"]
    lines += [
        "",
        f"Runs killed by SIGKILL at random moments: {sum(int(count[1]) for count in kills if count)}. After each there was a",
        "whole checkpoint, and each chain of runs ended with the weights, optimizers and plots of one that was never killed.",
        "",
        *(f"- skipped: {case.name}: {case.reason}" for case in cases if case.outcome == "skipped"),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
