"""The wheel holds all that the package needs, and works away from its source tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bngan import __version__
from tests.conftest import QUICK, REPOSITORY

IN_SOURCE_TREE = ("bngan", "configs", "pyproject.toml", "README.md")


class Installed:
    """The package as its wheel installs it, in a folder of its own, beside the libraries that are here."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        self.wheel, self.folder = wheel, folder

    def run(self, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def python(self, *arguments: str, cwd: Path) -> str:
        done = self.run(sys.executable, *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in IN_SOURCE_TREE:  # a copy, for a build leaves things behind
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(source / "dist")]
    for command in (build, [*pip, "install", "--no-deps", "--target", str(folder)]):
        wheels = [] if command is build else [str(path) for path in (source / "dist").glob("*.whl")]
        done = subprocess.run([*command, *wheels], cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    return Installed(wheel, folder)


def test_wheel_holds_every_file_of_the_package(installed: Installed) -> None:
    held = set(zipfile.ZipFile(installed.wheel).namelist())
    for folder, inside in ((REPOSITORY / "bngan", "bngan"), (REPOSITORY / "configs", "bngan/configs")):
        files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert files
        for path in files:
            assert f"{inside}/{path.relative_to(folder)}" in held


def test_what_is_installed_is_tried_and_not_the_source_tree(installed: Installed, tmp_path: Path) -> None:
    told = installed.python("-c", "import bngan, bngan.recipes as r; print(bngan.__file__, r.SHIPPED)", cwd=tmp_path)
    assert told.split() == [str(installed.folder / "bngan" / "__init__.py"), str(installed.folder / "bngan" / "configs")]


def test_command_and_module_tell_the_version(installed: Installed, tmp_path: Path) -> None:
    assert installed.python("-m", "bngan", "--version", cwd=tmp_path) == f"bngan {__version__}\n"
    assert installed.python(str(installed.folder / "bin" / "bngan"), "--version", cwd=tmp_path) == f"bngan {__version__}\n"
    assert f"bngan-{__version__}-" in installed.wheel.name


def test_help_is_the_shipped_default_recipe(installed: Installed, tmp_path: Path) -> None:
    assert (REPOSITORY / "configs" / "default.yaml").read_text() in installed.python(
        "-m", "bngan", "fit", "--help", cwd=tmp_path
    )


def test_shipped_recipe_trains_by_its_name_and_is_sampled(installed: Installed, mnist_root: Path, tmp_path: Path) -> None:
    small = ("--model.hidden_dim=4", "--trainer.max_steps=2", f"--data.root={mnist_root}", "--run=first")
    installed.python("-m", "bngan", "fit", "--config", "dcgan", *QUICK, *small, cwd=tmp_path)
    run = tmp_path / "runs" / "dcgan" / "first"
    assert "network: conv" in (run / "config.yaml").read_text()
    assert '"git": null' in (run / "run.json").read_text()
    installed.python("-m", "bngan", "sample", str(run / "checkpoints" / "last.ckpt"), "--num", "4", cwd=tmp_path)
    assert (tmp_path / "samples.png").is_file()


def test_recipe_that_is_not_shipped_is_refused_by_naming_those_that_are(installed: Installed, tmp_path: Path) -> None:
    done = installed.run(sys.executable, "-m", "bngan", "fit", "--config", "resnet", cwd=tmp_path)
    assert done.returncode == 2
    assert "best_mlp, conditional, dcgan, default, literal, pictures" in done.stderr
