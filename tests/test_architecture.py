"""Imports point one way, starting is quick, and no batch norm gets a number that is not named."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import QUICK

PACKAGE = Path(__file__).parents[1] / "bngan"
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
IMPORTS_ALLOWED = {
    "bngan.norms": {"bngan.batchnorm"},
    "bngan.losses": set(),
    "bngan.batchnorm": set(),
    "bngan.randomness": set(),
    "bngan.wires": set(),
    "bngan.threads": set(),
    "bngan.adam": set(),
    "bngan.distributed": {"bngan.batchnorm", "bngan.wires", "bngan.threads"},
    "bngan.networks": {"bngan.norms"},
    "bngan.gan": {
        "bngan.networks",
        "bngan.losses",
        "bngan.batchnorm",
        "bngan.distributed",
        "bngan.randomness",
        "bngan.norms",
        "bngan.adam",
    },
}
PLAIN_PYTORCH = ["bngan.norms", "bngan.losses", "bngan.batchnorm", "bngan.networks", "bngan.metrics"]


def imports(source: str, known: frozenset[str] = frozenset(SOURCES)) -> set[str]:
    """Return the modules that a source text imports anywhere in it; of `from a import b`, a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known
            if not inner <= known:
                found.add(node.module)
    return found


@cache
def imports_of(module: str) -> set[str]:
    return imports(SOURCES[module].read_text())


def within(room: str) -> list[str]:
    """The modules of a file or folder of the package."""
    found = [module for module in SOURCES if module == room or module.startswith(f"{room}.")]
    assert found, f"there is no {room}"
    return found


def ours(modules: set[str]) -> set[str]:
    return {module for module in modules if module.split(".")[0] == "bngan"}


def reached(module: str) -> set[str]:
    """Everything a module imports, also through other modules of the package."""
    found, waiting = set(), [module]
    while waiting:
        new = imports_of(waiting.pop()) - found
        found |= new
        waiting += [name for name in new if name in SOURCES]
    return found


def uses_lightning(modules: set[str]) -> bool:
    return any(module.split(".")[0] in ("lightning", "pytorch_lightning") for module in modules)


def test_import_finder_sees_every_way_of_importing() -> None:
    source = """
from bngan import gan, GAN
import lightning.pytorch as pl
def later():
    from bngan.data.module import ImageDataModule
    if True:
        import torch, numpy
"""
    expected = {"bngan.gan", "bngan", "lightning.pytorch", "bngan.data.module", "torch", "numpy"}
    assert imports(source) == expected
    assert uses_lightning(expected)
    assert not uses_lightning({"torch", "lightning_utilities", "bngan.gan"})


@pytest.mark.parametrize("module", sorted(IMPORTS_ALLOWED))
def test_a_room_imports_only_the_rooms_below_it(module: str) -> None:
    found = ours(imports_of(module))
    assert found <= IMPORTS_ALLOWED[module]


def test_rooms_do_import_what_they_stand_on() -> None:
    """So that the test above does not pass because nothing was found."""
    assert ours(imports_of("bngan.gan")) >= {"bngan.networks", "bngan.losses", "bngan.batchnorm", "bngan.distributed"}
    assert ours(imports_of("bngan.networks")) == {"bngan.norms"}
    assert "bngan.gan" in reached("bngan.sampling")
    assert "bngan.norms" in reached("bngan.sampling")


@pytest.mark.parametrize("room", PLAIN_PYTORCH)
def test_plain_pytorch_never_reaches_lightning(room: str) -> None:
    for module in within(room):
        assert not uses_lightning(reached(module)), module
    assert uses_lightning(imports_of("bngan.gan"))
    assert uses_lightning(reached("bngan.sampling"))


def test_metrics_know_only_libraries_and_one_another() -> None:
    for module in within("bngan.metrics"):
        assert all(name.startswith("bngan.metrics") for name in ours(imports_of(module))), module


def test_data_knows_neither_the_gan_nor_its_callbacks() -> None:
    for module in within("bngan.data"):
        allowed = ("bngan.data", "bngan.randomness", "bngan.distributed")
        found = ours(imports_of(module)) - {"bngan"}
        assert all(name.startswith(allowed) for name in found), module
    assert "bngan.randomness" in imports_of("bngan.data.loader")


def test_callbacks_do_not_know_the_command_line() -> None:
    for module in within("bngan.callbacks"):
        found = ours(reached(module))
        assert not found & {"bngan.cli", "bngan.trainer_cli"}, module
    assert any("bngan.gan" in imports_of(module) for module in within("bngan.callbacks"))
    assert "bngan.callbacks" in imports_of("bngan.trainer_cli")


def test_no_import_goes_in_a_circle() -> None:
    for module in SOURCES:
        if module != "bngan":  # which imports its parts when they are asked for
            assert module not in reached(module), module


def loaded_by(statement: str) -> set[str]:
    """Which heavy libraries a fresh Python has loaded after a statement."""
    program = f"import sys; {statement}; print(*({{'torch', 'lightning', 'torchvision', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_or_its_command_line_loads_neither_torch_nor_lightning() -> None:
    assert loaded_by("import bngan, bngan.cli") == set()
    assert "numpy" in loaded_by("import numpy")


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["sample", "--help"]])
def test_help_loads_neither_torch_nor_lightning(arguments: list[str]) -> None:
    assert loaded_by(f"from bngan.cli import main; assert main({arguments}) == 0") == set()
    assert "torch" in loaded_by("from bngan.cli import main; main(['sample', 'absent.ckpt'])")


@pytest.mark.parametrize("before", ["enable", "disable"])
def test_garbage_is_looked_for_after_the_imports_as_before(before: str) -> None:
    program = (
        f"import gc; gc.{before}(); from bngan.cli import main; main(['fit', '--trainer.absent=1']); "
        "first = gc.get_freeze_count(); main(['fit', '--trainer.absent=1']); "
        "print(gc.isenabled(), first > 100_000, gc.get_freeze_count() <= first)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [str(before == "enable"), "True", "True"]


FIRST = """
import os, sys
from lightning.pytorch import Callback

class First(Callback):
    def on_train_batch_end(self, *_):
        print(*sys.modules, flush=True)
        os._exit(0)  # nothing that comes later counts
"""
# What fit needs beyond torch, Lightning and torchmetrics, with what these packages themselves load.
NEEDED = {"bngan", "jsonargparse", "docstring_parser", "typeshed_client", "attr", "attrs", "safetensors"}
NEEDED |= {"tensorboard", "google", "absl"}
HEAVY = ("torch._inductor", "torch._dynamo", "torch.onnx", "torchvision.models", "torchmetrics.", "tensorboard.backend")


def test_fit_has_loaded_nothing_unneeded_at_its_first_alternation(mnist_root: Path, tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(FIRST)
    fit = [str(PACKAGE.parent / "scripts" / "train.py"), "fit", *QUICK, f"--data.root={mnist_root}"]
    python_path = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])

    def loaded(*command: str) -> set[str]:
        environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        return set(done.stdout.splitlines()[-1].split())

    libraries = loaded("-c", "import sys, torch, lightning.pytorch, torchmetrics; print(*sys.modules)")
    added = loaded(*fit, "--trainer.callbacks+=first.First") - libraries
    packages = {name.partition(".")[0] for name in added} - {name.partition(".")[0] for name in libraries}
    own = {name for name in packages - sys.stdlib_module_names if not name.startswith("_")}
    assert {"bngan", "tensorboard", "first"} <= own <= {*NEEDED, "first"}
    assert [name for name in added if name.startswith(HEAVY)] == []
    assert "bngan.trainer_cli" in added
    assert "bngan.doctor" not in added


# Named numbers --------------------------------------------------------------------------------------------------------


def unnamed_numbers(source: str) -> list[int]:
    """Return the lines on which a batch norm is built with more than its channels unnamed, also under another name."""
    tree = ast.parse(source)

    def is_batch_norm(node: ast.AST) -> bool:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return "BatchNorm" in name

    aliases = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Name) and any(is_batch_norm(part) for part in ast.walk(node.value))
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (is_batch_norm(node.func) or (isinstance(node.func, ast.Name) and node.func.id in aliases))
        and (len(node.args) > 1 or any(isinstance(argument, ast.Starred) for argument in node.args))
    ]


def test_unnamed_numbers_are_noticed() -> None:
    source = """
nn.BatchNorm1d(256, 0.8)
torch.nn.BatchNorm2d(256, eps=1e-5)
kind = nn.BatchNorm1d if flat else nn.BatchNorm2d
kind(256, 0.8)
kind(256, eps=1e-5)
ReferenceBatchNorm(256, 0.8)
nn.BatchNorm1d(*numbers)
nn.Linear(256, 128)
"""
    assert unnamed_numbers(source) == [2, 5, 7, 8]


def test_batch_norms_numbers_are_named_throughout() -> None:
    """BatchNorm1d(256, 0.8) sets eps, where its author meant momentum."""
    assert {module: lines for module, path in SOURCES.items() if (lines := unnamed_numbers(path.read_text()))} == {}
    assert any("BatchNorm2d" in path.read_text() for path in SOURCES.values())
