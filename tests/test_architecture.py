"""Imports point one way, nothing reaches into a framework, methods stay short, starting is quick, numbers are named."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from tests.conftest import QUICK

PACKAGE = Path(__file__).parents[1] / "bngan"
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The files and folders of the package, by what may import what: a later line an earlier one.
ORDER = """
errors
files rng
distributed recipes
images batching animation pretrained
batchnorm
spectral
norms losses ema
settings
blocks schedules
networks
iteration
cuda_graph sampler truncation
export
gan
data metrics
explain
rendezvous
trainer
checkpoint
callbacks
run messages effects
lightning_cli
hub outcome
doctor
study
commands
cli
__main__
"""
LINES = {room: number for number, line in enumerate(ORDER.split("\n")) for room in line.split()}
PLAIN_PYTORCH = [*(room for room in LINES if LINES[room] < LINES["gan"]), "metrics"]
# Rooms that may import less than all that is before them.
APART = {"data": {"errors", "files", "rng", "distributed", "images"}, "metrics": {"errors"}}


# Imports --------------------------------------------------------------------------------------------------------------


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


def room_of(module: str) -> str:
    """The file or folder in which a module of the package lies."""
    return module.split(".")[1]


def modules_of(room: str) -> list[str]:
    """The modules of a file or folder of the package."""
    found = [module for module in SOURCES if module == f"bngan.{room}" or module.startswith(f"bngan.{room}.")]
    assert found, f"there is no {room}"
    return found


def rooms_of(modules: set[str]) -> set[str]:
    return {room_of(module) for module in modules if module.startswith("bngan.")}


def reached(module: str) -> set[str]:
    """Everything a module imports, also through others; not through the package itself, whose parts load when asked for."""
    found, waiting = set(), [module]
    while waiting:
        new = imports_of(waiting.pop()) - found - {"bngan"}
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


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room_of(module) for module in SOURCES if module != "bngan"} == LINES.keys()


@pytest.mark.parametrize("room", LINES)
def test_room_imports_only_what_is_before_it(room: str) -> None:
    before = {other for other in LINES if LINES[other] < LINES[room]}
    for module in modules_of(room):
        assert rooms_of(imports_of(module)) <= APART.get(room, before) | {room}, module


def test_rooms_do_import_what_they_stand_on() -> None:
    """So that the test above does not pass because nothing was found."""
    assert rooms_of(imports_of("bngan.gan")) >= {"networks", "losses", "batchnorm", "distributed", "iteration", "sampler"}
    assert rooms_of(imports_of("bngan.networks")) == {"blocks", "errors", "norms", "settings"}
    assert {"bngan.gan", "bngan.norms"} <= reached("bngan.checkpoint")
    assert "rng" in rooms_of(imports_of("bngan.data.loader"))


@pytest.mark.parametrize("room", PLAIN_PYTORCH)
def test_plain_pytorch_never_reaches_lightning(room: str) -> None:
    for module in modules_of(room):
        assert not uses_lightning(reached(module)), module


def test_what_is_around_it_does_reach_lightning() -> None:
    assert uses_lightning(imports_of("bngan.gan"))
    assert uses_lightning(reached("bngan.run"))


def test_data_never_reaches_batch_norm() -> None:
    for module in modules_of("data"):
        assert "batchnorm" not in rooms_of(reached(module)), module
    assert "batchnorm" in rooms_of(reached("bngan.sampler") | reached("bngan.networks"))


def defines_callback(module: str) -> bool:
    kinds = [kind for kind in vars(import_module(module)).values() if isinstance(kind, type)]
    return any(issubclass(kind, Callback) and kind.__module__ == module for kind in kinds)


def test_no_callback_imports_another() -> None:
    callbacks = {module for module in modules_of("callbacks") if defines_callback(module)}
    assert len(callbacks) >= 6
    assert not defines_callback("bngan.callbacks.references")
    for module in callbacks:
        assert not reached(module) & callbacks, module
    assert imports_of("bngan.callbacks") >= callbacks


def test_no_import_goes_in_a_circle() -> None:
    for module in SOURCES:
        assert module not in reached(module), module


# What belongs to others -----------------------------------------------------------------------------------------------

# Documented, whatever they begin with.
NAMED_TUPLES = {"_fields", "_replace", "_asdict", "_make"}
ALLOWED_NAMES = ("os._exit", "torch._foreach_")


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not name.endswith("__")


def stored(body: list[ast.stmt]) -> set[str]:
    """Return the names that these statements, not those within them, define, assign or annotate."""
    found = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return found | {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


class Insides:
    """Finds where a source text reaches into what belongs to others.

    Its own are self, cls and what its top level defines; and of these the members that it defines or assigns itself.
    """

    def __init__(self, source: str) -> None:
        tree = ast.parse(source)
        nodes = list(ast.walk(tree))
        self.functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        self.own = {"self", "cls"} | stored(tree.body)
        self.members = self.functions | {name for node in nodes if isinstance(node, ast.ClassDef) for name in stored(node.body)}
        self.members |= {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and self.is_own(node.value)
        }
        self.found = sorted({(line, name) for node in nodes for line, name in self.look_at(node)})

    def is_own(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self.own

    def is_function(self, node: ast.expr) -> bool:
        """Whether a value is a function of this text's, or made of one."""
        if isinstance(node, ast.Call):
            return ast.unparse(node.func).split(".")[-1] in ("partial", "MethodType")
        return isinstance(node, ast.Lambda) or ast.unparse(node).split(".")[-1] in self.functions

    def look_at(self, node: ast.AST) -> Iterator[tuple[int, str]]:
        """Yield the line and the text of what reaches too far."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from self.look_at_import(node)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            allowed = node.attr in NAMED_TUPLES or name.startswith(ALLOWED_NAMES)
            if is_private(node.attr) and not allowed and not (self.is_own(node.value) and node.attr in self.members):
                yield node.lineno, name
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Attribute) and self.is_replaced(target.value, target.attr, node.value):
                    yield node.lineno, ast.unparse(target)
        elif isinstance(node, ast.Call):
            yield from self.look_at_call(node)

    def look_at_import(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[int, str]]:
        within = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for name in (within + alias.name for alias in node.names):
            if any(is_private(part) or part == "ctypes" for part in name.split(".")):
                yield node.lineno, name

    def look_at_call(self, node: ast.Call) -> Iterator[tuple[int, str]]:
        called = ast.unparse(node.func).split(".")[-1]
        if called == "cast" and ast.unparse(node.args[0]).strip("'").split(".")[-1] == "Any":
            yield node.lineno, ast.unparse(node)
        if called in ("getattr", "setattr", "delattr", "hasattr") and isinstance(node.args[1], ast.Constant):
            base, name, value = node.args[0], str(node.args[1].value), node.args[-1]
            private = is_private(name) and not self.is_own(base)
            if private or (called == "setattr" and self.is_replaced(base, name, value)):
                yield node.lineno, ast.unparse(node)

    def is_replaced(self, base: ast.expr, name: str, value: ast.expr) -> bool:
        """Whether an assignment puts a function in the place of somebody's member, or makes somebody of another class."""
        return name == "__class__" or (self.is_function(value) and not self.is_own(base))


@pytest.mark.parametrize(
    "offence",
    [
        "x._y",
        "x.y._z = 1",
        "torch._dynamo.reset()",
        "print(self._theirs)",
        "super()._y()",
        "Theirs._y",
        "getattr(x, '_y', None)",
        "setattr(x, '_y', 1)",
        "from theirs import _y",
        "from theirs._y import z",
        "import theirs._y",
        "import ctypes",
        "from ctypes.util import find_library",
        "x.step = step",
        "x.step = self.mine",
        "Theirs.step = lambda: None",
        "x.y.step = partial(step, 1)",
        "x.step = types.MethodType(step, x)",
        "setattr(x, 'step', step)",
        "x.__class__ = Mine",
        "self.__class__ = Mine",
        "cast(Any, x).y",
        "typing.cast('Any', x)",
    ],
)
def test_reaching_into_what_belongs_to_others_is_noticed(offence: str) -> None:
    assert len(Insides(f"def step(): ...\nclass Mine:\n    def mine(self):\n        {offence}").found) == 1


def test_what_is_ones_own_or_public_may_be_used() -> None:
    source = """
import os, torch
_loaded = {}
def _step(): ...
class Mine:
    _kept: int
    _number = 1
    def __init__(self, x):
        self._x, self._found = x, _step
        self._again = _step
        self.step = _step
        for _, x.lr in self._x, self._kept, self._number, self._mine(), type(self).__name__, Mine._number, _loaded._y:
            x.lr = 0.1
            x.y = self._x
            setattr(x, name, self._x)
    def _mine(self):
        torch._foreach_add_([], 1)
        os._exit(x._fields)
        cast(float, x)
"""
    assert Insides(source).found == [(12, "_loaded._y")]


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_reaches_into_what_belongs_to_others(module: str) -> None:
    assert Insides(SOURCES[module].read_text()).found == []


# Length ---------------------------------------------------------------------------------------------------------------


def method_lengths(source: str, of: str) -> dict[str, int]:
    """Return the number of lines of each method of a class, without signature and docstring."""
    (found,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == of)
    lengths = {}
    for method in (node for node in found.body if isinstance(node, ast.FunctionDef)):
        body = method.body[1:] if ast.get_docstring(method) is not None else method.body
        lengths[method.name] = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
    return lengths


def test_lengths_are_of_what_a_method_does() -> None:
    source = """
class Other:
    def short(self): pass
class Mine:
    @property
    def documented(
        self,
    ) -> int:
        \"\"\"Return one.

        And nothing else.
        \"\"\"
        # a comment
        one = 1

        return one
    def empty(self): \"\"\"Do nothing.\"\"\"
"""
    assert method_lengths(source, "Mine") == {"documented": 3, "empty": 0}


def test_iteration_is_read_on_few_pages_and_methods_of_the_gan_on_one_screen() -> None:
    assert len(SOURCES["bngan.iteration"].read_text().splitlines()) <= 200
    lengths = method_lengths(SOURCES["bngan.gan"].read_text(), "GAN")
    assert {name: length for name, length in lengths.items() if length > 30 and name != "__init__"} == {}
    assert {"training_step", "validation_step", "sampler"} <= lengths.keys()


# What is loaded, and when ---------------------------------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    """Which heavy libraries a fresh Python has loaded after a statement."""
    program = f"import sys; {statement}; print(*({{'torch', 'lightning', 'torchvision', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_or_its_command_line_loads_neither_torch_nor_lightning() -> None:
    assert loaded_by("import bngan, bngan.cli") == set()
    assert "numpy" in loaded_by("import numpy")


def test_commands_do_load_torch() -> None:
    """So that the test below does not pass because nothing is ever found."""
    assert "torch" in loaded_by("from bngan.cli import main; main(['sample', 'absent.ckpt'])")


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["sample", "--help"]])
def test_help_loads_neither_torch_nor_lightning(arguments: list[str]) -> None:
    assert loaded_by(f"from bngan.cli import main; assert main({arguments}) == 0") == set()


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


def test_fit_has_loaded_nothing_unneeded_at_its_first_iteration(mnist_root: Path, tmp_path: Path) -> None:
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
    assert "bngan.lightning_cli" in added
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
    texts = {path.name: path.read_text() for path in [*SOURCES.values(), *(PACKAGE.parent / "scripts").glob("*.py")]}
    assert {name: lines for name, text in texts.items() if (lines := unnamed_numbers(text))} == {}
    assert sum("BatchNorm1d" in text for text in texts.values()) >= 2
