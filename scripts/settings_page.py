"""Write docs/settings.md: every setting, with its default, what it takes, and what it does, as the code has them.

python scripts/settings_page.py
"""

import re
from inspect import signature
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import docstring_parser

from bngan.lightning_cli import KINDS, LINKED
from bngan.recipes import DEFAULT_CONFIG, read_config

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# Every setting

<!-- written by scripts/settings_page.py from the code; not to be edited by hand -->

On the command line a setting is `--GROUP.NAME VALUE`, such as `--model.g_lr 0.001`; in a file it is a line below its group:

```yaml
model:
  g_lr: 0.001
```

Settings come from `configs/default.yaml`, then from each `--config` in turn, then from the command line. `bngan fit --help`
prints them with their defaults. `null` is no value: what then happens is said below.
"""
UNGROUPED = """## No group

| setting | default | takes | what it does |
|---|---|---|---|
| `seed_everything` | `0` | integer | seed of all randomness |
| `name` | `mnist` | text | a run lies in `runs/<name>/<id>/` |
"""
NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null"}


def taken(annotation: Any) -> str:
    """Return in words what values a setting's annotation allows."""
    if get_origin(annotation) is Literal:
        return " ".join(f"`{value}`" for value in get_args(annotation))
    if get_args(annotation) and get_origin(annotation) not in (list, dict):
        return " or ".join(dict.fromkeys(taken(part) for part in get_args(annotation)))
    if get_origin(annotation) is list:
        return f"list of {taken(*get_args(annotation))}s"
    return NAMES.get(annotation, annotation.__name__ if isinstance(annotation, type) else str(annotation))


def comments() -> dict[str, str]:
    """Return by its full name what configs/default.yaml says of a setting behind `#`."""
    found, group = {}, ""
    for line in DEFAULT_CONFIG.read_text().splitlines():
        if match := re.match(r"(\w+):\s*(#.*)?$", line):
            group = match[1]
        elif match := re.match(r"  (\w+):.*?\s# (.*)$", line):
            found[f"{group}.{match[1]}"] = match[2]
    return found


def documented(kind: type) -> dict[str, str]:
    """Return what the docstring of a class says of each argument."""
    parameters = docstring_parser.parse(kind.__doc__ or "").params
    return {each.arg_name: " ".join((each.description or "").split()) for each in parameters}


def written(value: Any) -> str:
    """Return a default as a file of settings has it."""
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)


def section(group: str, kind: type, defaults: dict[str, Any]) -> str:
    """Return the settings of a group as a table, in the order of configs/default.yaml."""
    told, said, parameters = documented(kind), comments(), signature(kind).parameters
    lines = [f"## `{group}`", "", "| setting | default | takes | what it does |", "|---|---|---|---|"]
    for name, default in defaults.items():
        text = told.get(name) or said.get(f"{group}.{name}") or "as Lightning's Trainer has it"
        text = text.rstrip(".").replace("|", r"\|").replace("<", r"\<")
        lines.append(f"| `{name}` | `{written(default)}` | {taken(parameters[name].annotation)} | {text} |")
    return "\n".join([*lines, ""])


def page() -> str:
    """Return the text of docs/settings.md."""
    defaults = read_config(DEFAULT_CONFIG)
    sections = [section(group, kind, defaults[group]) for group, kind in KINDS.items() if group in defaults]
    linked = ", ".join(f"`{name}`" for name in sorted(LINKED))
    foot = f"These follow from other settings, and cannot be given: {linked}.\n"
    return "\n".join([HEAD, UNGROUPED, *sections, foot])


if __name__ == "__main__":
    PAGE.write_text(page())
