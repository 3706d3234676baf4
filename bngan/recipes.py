"""What may a file of settings say? Groups of settings, and classes by name, which are given plain values."""

import pkgutil
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import Enum
from inspect import formatannotation, signature
from pathlib import Path
from typing import Any, get_args

import yaml
from jsonargparse import Namespace

from bngan.errors import UsageError
from bngan.files import expand_home

_INSTALLED, _SOURCE = Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _SOURCE
DEFAULT_CONFIG = SHIPPED / "default.yaml"
GROUPS = ("model", "data", "trainer", "images", "batchnorm", "metrics", "progress", "checkpoint")
UNGROUPED = ("seed_everything", "name")
# Settings that name classes.
CLASSES = ("trainer.callbacks", "trainer.logger", "trainer.plugins", "trainer.profiler", "metrics.feature")
OWN = ("bngan.", "lightning.", "torch.")
PATHS = ("data.root", "data.folder", "trainer.default_root_dir")
PLAIN = (type(None), bool, int, float, str, Enum, Path, timedelta)


def find_config(name: str | None) -> Path:
    """Return the file of that name, or the shipped recipe: `dcgan` is configs/dcgan.yaml; see find_shipped."""
    return find_shipped(name, SHIPPED, "recipe", "--config ")


def find_shipped(name: str | None, folder: Path, kind: str, option: str = "") -> Path:
    """Return the file of that name, or the one in the folder of those that are shipped that has this name without .yaml.

    Raises:
        UsageError: if there is none, naming those that are shipped, and what was to be given.
    """
    if name and (path := Path(expand_home(name))).is_file():
        return path
    shipped = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    found = "needs a file" if name is None else f"{name}: there is no such file"
    raise UsageError(f"{option}{found}; name a YAML file, or a {kind} that is shipped: {', '.join(shipped)}")


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a file, none of which are checked but for their groups' names.

    Raises:
        UsageError: if it is missing or malformed, saying what is wrong in which line.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read ({type(error).__name__}); name a YAML file") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is {yaml_fault(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} holds no settings; it should have lines such as 'model:' and '  g_lr: 0.001'")
    for name, settings in content.items():
        if name not in (*GROUPS, *UNGROUPED):
            raise UsageError(f"--config {path}: unknown group {name!r}; choose from {', '.join(GROUPS)}")
        if name in GROUPS and not isinstance(settings, dict):
            raise UsageError(f"--config {path}: {name} should hold settings, not {settings!r}")
    return content


def yaml_fault(error: yaml.YAMLError) -> str:
    """Return what is wrong with a text that is no YAML, and in which line."""
    mark = getattr(error, "problem_mark", None)
    where = f" at line {mark.line + 1}" if mark else ""
    return f"not valid YAML{where}: {getattr(error, 'problem', None) or error}"


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by their full names: {"model": {"g_lr": 0.1}} becomes {"model.g_lr": 0.1}."""
    flat = {}
    for group, values in settings.items():
        flat |= {f"{group}.{name}": value for name, value in values.items()} if isinstance(values, Mapping) else {group: values}
    return flat


def to_yaml(flat: Mapping[str, Any]) -> str:
    """Return settings by their full names as the text of a file.

    Raises:
        UsageError: if one of them is no plain value.
    """
    settings: dict[str, Any] = {}
    for full, value in flat.items():
        group, _, name = full.partition(".")
        if name:
            settings.setdefault(group, {})[name] = value
        else:
            settings[group] = value
    try:
        return yaml.safe_dump(settings)
    except yaml.YAMLError as error:
        raise UsageError(f"settings should be numbers, words and lists of them, not {error.args[-1]!r}") from error


def expand_homes(value: Any, setting: str = "") -> Any:
    """Return settings in which what begins with ~ is written out in full, wherever it stands: nothing but a path begins so.

    Raises:
        UsageError: if a path can be none.
    """
    if isinstance(value, str) and (value.startswith(("~", "$")) or "\0" in value or setting in PATHS):
        return expand_home(value)
    if isinstance(value, list):
        return [expand_homes(item) for item in value]
    if isinstance(value, dict):
        return {name: expand_homes(item) for name, item in value.items()}
    if isinstance(value, Namespace):
        return Namespace({name: expand_homes(item, f"{setting}.{name}".lstrip(".")) for name, item in vars(value).items()})
    return value


def check_nulls(kind: type, settings: Mapping[str, Any], prefix: str) -> None:
    """Refuse null, which every parser lets pass, where a class's argument cannot be None.

    Args:
        kind: the class.
        settings: its arguments by name.
        prefix: what stands before a name in the message.

    Raises:
        UsageError: naming the setting and what it takes.
    """
    for name, parameter in signature(kind).parameters.items():
        taken = parameter.annotation
        if name in settings and settings[name] is None and type(None) not in get_args(taken):
            raise UsageError(f"{prefix}{name}: null is not allowed; expected {formatannotation(taken)}")


def names_foreign_code(setting: str, value: Any) -> bool:
    """Whether a setting, as a file has it, names code that is not of bngan, Lightning or torch, or gives it code.

    It is asked of a run's own file before anything in it is looked up, for to name a class is to import its module.
    """
    if setting not in CLASSES:
        return setting.count(".") > 1  # trainer.callbacks.class_path: part of a setting
    if isinstance(value, list):
        return any(names_foreign_code(setting, item) for item in value)
    if isinstance(value, dict):
        arguments = [(name, item) for name, item in _leaves(value) if name != "class_path"]
        code = any("class_path" in name or _is_dotted_name(item) for name, item in arguments)
        return code or names_foreign_code(setting, value.get("class_path"))
    return isinstance(value, str) and "." in value and not value.startswith(OWN)


def check_class(setting: str, given: Any) -> None:
    """Refuse what would call more than a named class with plain values, in settings that a person gives.

    Args:
        setting: its name.
        given: what was parsed for it: class_path, and init_args or dict_kwargs; or what a module has ready.

    Raises:
        UsageError: naming what is not plain.
    """
    kind = pkgutil.resolve_name(given.class_path) if isinstance(given, Namespace) else None
    if not isinstance(kind, type):
        raise UsageError(f"--{setting} must name a class, and {getattr(given, 'class_path', given)} is none")
    parameters = signature(kind).parameters
    for group in ("init_args", "dict_kwargs"):
        for name, value in _leaves(given.get(group) or {}):
            own = name in parameters and value is parameters[name].default
            if not own and (not isinstance(value, PLAIN) or name.endswith("class_path")):
                raise UsageError(
                    f"--{setting} {given.class_path}: {name} would run code ({value}); settings may hold numbers, words and "
                    "lists of them"
                )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of everything that is no mapping, namespace, list, tuple or set."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value


def _is_dotted_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", value) is not None
