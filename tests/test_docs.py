"""Documents do what they say: commands and examples run, what is generated is up to date, links lead somewhere."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
import settings_page
from tensorboard.program import TensorBoard

from bngan.cli import TRAINER_COMMANDS, main
from bngan.commands import COMMANDS
from bngan.pretrained import find_pretrained
from bngan.recipes import DEFAULT_CONFIG, find_config, find_shipped, flatten, read_config
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
NOTEBOOK = DOCS / "batch_norm_in_gans.ipynb"
SMALL_RUN = REPOSITORY / "tests" / "golden" / "0.1-mlp.ckpt"
# What is added to a command of bngan that would take minutes as printed. A run that goes on keeps its own end, and every
# study is `smoke`, since to time the parts of another takes minutes, too.
SHORTER = {
    "fit": ["--trainer.max_steps=8", "--metrics.num_samples=200", "--trainer.accelerator=cpu"],
    "validate": ["--metrics.num_samples=200", "--trainer.accelerator=cpu", "--override"],
    "test": ["--metrics.num_samples=200", "--trainer.accelerator=cpu", "--override"],
    "predict": ["--trainer.accelerator=cpu"],
    "study": ["--dry-run"],
    "shapes.py make": ["--num=300"],
}
# Commands whose words alone are checked, and why. All others are run, or marked `<!-- not run: reason -->` above their fence.
WORDS_ALONE = {
    "pip": "what it installs is here",
    "tensorboard": "it serves until it is stopped",
    "pytest": "this is one of its tests",
    "zensical": "test_site_builds_and_its_only_fault_is_the_one_put_in",
}
RUN = ("bngan", "python", "torchrun")
GOES_ON = ("last", "runs/")  # what --ckpt_path names where a run goes on
SOME_RUN = re.compile(r"runs/mnist/\d{8}-\d{6}-[0-9a-f]{4}")  # which stands for one of the reader's
NOTHING_HERE = r"no run in|there is no checkpoint|there is no file|no such file|--jobs must be"
ABOUT_THE_RUN = {"ckpt_path", "run", "override", "print_config"}  # options of fit, validate, test and predict


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which has what commands name in a clone of the repository."""
    for name in ("scripts", "configs", "docs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", sys.argv)
    return tmp_path


@pytest.fixture
def clone_with_data(clone: Path, mnist_root: Path) -> Path:
    """The same, with MNIST where the first command would put it."""
    (clone / "data").symlink_to(mnist_root)
    return clone


# Reading pages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page: its first line's number, its language, its text, and why it is not run, if it is not."""

    line: int
    language: str
    text: str
    not_run: str | None

    def commands(self) -> Iterator[list[str]]:
        """Yield the words of each command, without comments and without what is set before it (NAME=VALUE)."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                if command := [word for word in words[:end] if not re.match(r"[A-Z_]+=", word)]:
                    yield command
                words = words[end + 1 :]


def fences(text: str) -> Iterator[Fence]:
    """Yield the fenced blocks of a page's text."""
    lines, above = text.splitlines(), ""
    numbered = iter(enumerate(lines, start=1))
    for number, line in numbered:
        if match := re.match(r"```(\w*)", line):
            body = []
            for _, inner in numbered:
                if inner == "```":
                    break
                body.append(inner)
            marked = re.fullmatch(r"<!-- not run: (.+) -->", above)
            yield Fence(number, match[1], "\n".join(body), marked[1] if marked else None)
        above = line.strip() or above


def bngan_words(command: list[str]) -> list[str] | None:
    """Return the words after `bngan` or one of its other names, or None of another command."""
    for name in (["bngan"], ["python", "-m", "bngan"], ["python", "scripts/train.py"]):
        if command[: len(name)] == name:
            return command[len(name) :]
    return None


def test_fences_are_read_with_their_marks() -> None:
    text = (
        "<!-- not run: it downloads -->\n\n```bash\na b # c\n```\n\n```bash\nX=1 a 'b c' && d \\\n  e\n```\n```python\nf()\n```"
    )
    bash, also_bash, python = fences(text)
    assert (bash.line, bash.not_run, list(bash.commands())) == (3, "it downloads", [["a", "b"]])
    assert (also_bash.not_run, list(also_bash.commands())) == (None, [["a", "b c"], ["d", "e"]])
    assert (python.language, python.text, python.not_run) == ("python", "f()", None)


# Commands are understood ----------------------------------------------------------------------------------------------


def misunderstood(command: list[str]) -> str | None:
    """Return what is wrong with the words of a command, without doing what it asks for, or None."""
    words = bngan_words(command)
    if words is None:
        return other_misunderstood(command)
    if not words or words[0].startswith("-"):
        return None
    if words[0] in TRAINER_COMMANDS:
        return wrong_setting(words[1:])
    if words[0] in COMMANDS:
        return None
    return f"there is no command {words[0]}"


def wrong_setting(words: list[str]) -> str | None:
    """Return which of the words after fit, validate, test or predict is no setting or no recipe, or None."""
    known = {*flatten(read_config(DEFAULT_CONFIG)), *ABOUT_THE_RUN, "config", "help"}
    for name, _, value in (word.partition("=") for word in words if word.startswith("--")):
        if name[2:].rstrip("+") not in known:
            return f"there is no setting {name}"
        if name == "--config":
            named = value or words[words.index(name) + 1]
            if not named.startswith("runs/") and "/" not in named:
                find_config(named)
    return None


def other_misunderstood(command: list[str]) -> str | None:
    """Return what is wrong with a command that is not bngan's, or None."""
    match command:
        case ["torchrun" | "sbatch", *words]:
            script = next(word for word in words if word.startswith("scripts/"))
            settings = words[words.index(script) + 1 :]
            return wrong_setting(settings[1:] if settings[:1] == ["fit"] else settings)
        case ["python", script, *_]:
            return None if (REPOSITORY / script).is_file() else f"there is no {script}"
        case ["pip", "install", *words]:
            extras = re.findall(r"\[(.*)\]", " ".join(words))
            optional = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            unknown = {extra for group in extras for extra in group.split(",")} - optional.keys()
            return f"there is no extra {unknown}" if unknown else None
        case ["tensorboard", *words]:
            TensorBoard().configure(argv=["tensorboard", *words])
            return None
    return None if command[0] in WORDS_ALONE else "nobody knows how to run it"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("bngan fit --model.batchin joint", "no setting --model.batchin"),
        ("bngan validate --ckpt last", "no setting --ckpt"),
        ("bngan draw last", "no command draw"),
        ("python scripts/absent.py", "no scripts/absent.py"),
        ("pip install -e '.[dev,absent]'", "no extra"),
        ("torchrun --nnodes 2 scripts/train.py fit --model.x 1", "no setting --model.x"),
        ("make docs", "nobody knows"),
    ],
)
def test_commands_that_nobody_understands_are_noticed(command: str, words: str) -> None:
    assert words in str(misunderstood(shlex.split(command)))


def up_to_the_run(words: list[str]) -> list[str]:
    """Return the words of one of bngan's own commands such that it ends where, all else being understood, there is no run."""
    if words[0] == "study":
        find_shipped(words[1], REPOSITORY / "configs" / "study", "study")
        return [*words, "--jobs=0"]
    if "--pretrained" in words:
        at = words.index("--pretrained")
        find_pretrained(words[at + 1])
        return [*words[:at], "last", *words[at + 2 :]]
    return words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_understood(page: Path, clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fence in fences(page.read_text()):
        for command in fence.commands() if fence.language == "bash" else ():
            where = f"{page.name}, line {fence.line}: {shlex.join(command)}"
            assert misunderstood(command) is None, where
            assert fence.not_run or command[0] in (*RUN, *WORDS_ALONE), f"{where}: mark it, or let it be run"
            words = bngan_words(command)
            if words and words[0] in COMMANDS:
                assert main(up_to_the_run(words)) == 2, where
                assert re.search(NOTHING_HERE, told := capsys.readouterr().err), f"{where}: {told}"


# Commands are run -----------------------------------------------------------------------------------------------------


def shortened(words: list[str]) -> list[str]:
    """Return the words of a command of bngan such that it takes seconds, with a run that there is."""
    if any(SOME_RUN.search(word) for word in words):
        newest = max(Path("runs/mnist").glob("*/checkpoints/last.ckpt"), key=os.path.getmtime).parents[1]
        words = [SOME_RUN.sub(str(newest), word) for word in words]
    goes_on = any(word == "--ckpt_path" and after.startswith(GOES_ON) for word, after in pairwise(words))
    if words[0] == "fit" and goes_on:
        return words
    if words[0] == "study":
        words = ["study", "smoke", *words[2:]]
    return [*words, *(word for word in SHORTER.get(words[0], []) if word not in words)]


def run(command: list[str]) -> int:
    """Run a command of a page in the folder where this is, shortened, and return its status."""
    words = bngan_words(command)
    if command[0] == "torchrun" or (words and "--trainer.devices" in words):  # its ranks start from its own command line
        executable = [sys.executable] if command[0] == "python" else [shutil.which(command[0]) or command[0]]
        there = [*executable, *command[1:], *SHORTER["fit"]]
        return subprocess.run(there, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=300).returncode
    if words is not None:
        return main(shortened(words))
    if command[0] == "python":
        name = " ".join([Path(command[1]).name, *command[2:3]])
        sys.argv = [*command[1:], *SHORTER.get(name, [])]
        try:
            runpy.run_path(command[1], run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
    return 0  # of WORDS_ALONE


def walk(page: Path) -> Iterator[str]:
    """Do what a page says, in its order, in the folder where this is, and yield what failed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for fence in fences(page.read_text()):
        if fence.not_run:
            continue
        if fence.language == "python":
            exec(compile(fence.text, f"{page.name}, line {fence.line}", "exec"), names)
        for command in fence.commands() if fence.language == "bash" else ():
            if status := run(command):
                yield f"{page.name}, line {fence.line}: {shlex.join(command)}: {status}"


WALKED = [page for page in PAGES if any(fence.language in ("bash", "python") for fence in fences(page.read_text()))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WALKED, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs_in_its_order(page: Path, clone_with_data: Path) -> None:
    assert list(walk(page)) == []


def test_command_that_fails_is_noticed(clone: Path) -> None:
    page = clone / "page.md"
    page.write_text(
        "<!-- not run: why -->\n```bash\nbngan doctor absent\n```\n```bash\nbngan --version\nbngan sample last\n```\n"
    )
    assert list(walk(page)) == ["page.md, line 5: bngan sample last: 2"]


@pytest.mark.parametrize("page", [page for page in WALKED if "```python" in page.read_text()], ids=lambda page: page.stem)
def test_python_examples_run(page: Path, clone_with_data: Path) -> None:
    (checkpoints := Path("runs/mnist/one/checkpoints")).mkdir(parents=True)
    shutil.copy(SMALL_RUN, checkpoints / "best.ckpt")
    names: dict[str, Any] = {"__name__": "__main__"}
    for fence in fences(page.read_text()):
        if fence.language == "python" and not fence.not_run:
            exec(compile(fence.text, f"{page.name}, line {fence.line}", "exec"), names)


# Generated, linked, built ---------------------------------------------------------------------------------------------


def test_page_of_settings_is_that_of_the_code() -> None:
    assert settings_page.PAGE.read_text() == settings_page.page()
    assert "| `batching` | `joint` | `joint` `separate` |" in settings_page.page()


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead to no file here, of those that lead to no other machine."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    links = [(markdown or html).partition("#")[0] for markdown, html in found]
    return [link for link in links if link and not re.match(r"\w+:", link) and not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_link_that_leads_nowhere_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('[a](page.md#part) ![b](absent.png) [c](https://example.org) <iframe src="gone.html">')
    assert broken_links(page) == ["absent.png", "gone.html"]


def test_site_builds_and_its_only_fault_is_the_one_put_in(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    pytest.importorskip("mkdocstrings_handlers.python")
    shutil.copy(REPOSITORY / "zensical.toml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    (tmp_path / "docs" / "broken.md").write_text("[nowhere](absent.md)\n")
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    told = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
    assert "1 issue found" in told, told
    assert "broken.md:1:" in told
    assert done.returncode != 0
    assert "ReferenceBatchNorm" in (tmp_path / "site" / "python" / "index.html").read_text()


# The notebook ---------------------------------------------------------------------------------------------------------


def cells() -> list[dict[str, Any]]:
    """Return the notebook's cells of code."""
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_notebook_runs(clone_with_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone_with_data / "docs")
    matplotlib.use("agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    sources = ["".join(cell["source"]) for cell in cells()]
    assert sum("ITERATIONS = 600" in source for source in sources) == 1
    for number, source in enumerate(sources, start=1):
        exec(compile(source.replace("ITERATIONS = 600", "ITERATIONS = 4"), f"cell {number}", "exec"), names)
    plt.close("all")


def test_notebook_was_run_from_top_to_bottom_and_names_no_machine() -> None:
    assert [cell["execution_count"] for cell in cells()] == [*range(1, len(cells()) + 1)]
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not re.search(r"/(root|home|tmp|Users)/|C:\\\\", NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < 300_000
