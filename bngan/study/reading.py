"""What does the file of a study say, and can it be run as it stands? Every mistake is told before the first run."""

import hashlib
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml

from bngan.errors import UsageError
from bngan.gan import GAN
from bngan.recipes import SHIPPED, find_shipped, yaml_fault
from bngan.settings import Settings, check_settings
from bngan.study.endpoints import ENDPOINTS
from bngan.study.ensemble import structure
from bngan.study.power import can_decide
from bngan.study.probes import PROBES
from bngan.study.spec import AA, Arm, Block, Claim, Contrast, Look, Role, Run, Study, Value, planned_runs
from bngan.study.tasks import TASKS

STUDIES = SHIPPED / "study"
HINTS = get_type_hints(Settings)
GIVEN_ELSEWHERE = {"image_shape": "it comes from the task", "seed": "give `seeds` of a block"}
MOST_SEEDS = 100_000
Counts = Counter[tuple[str, str, str]]  # of runs, by context, arm and role


def find_study(name: str) -> Path:
    """Return the file of that name, or the shipped study: `smoke` is configs/study/smoke.yaml; see find_shipped."""
    return find_shipped(name, STUDIES, "study")


def read_study(path: Path) -> Study:
    """Return the study that a file describes, all of which is checked.

    Raises:
        UsageError: naming the first thing that is wrong, and what is allowed.
    """
    try:
        source = path.read_bytes()
        text = source.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({type(error).__name__}); name a YAML file") from error
    try:
        study = _study(path.stem, _parse(text), hashlib.sha256(source).hexdigest(), text)
        check_study(study)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return study


# From YAML to a study -------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads YAML in which no key stands twice, and 2e-4 is a number as it is in Python."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name!r} stands twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789"))


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(yaml_fault(error)) from error


def _study(name: str, content: Any, sha256: str, source: str) -> Study:
    given = _section(content, "the study", required="contexts arms blocks claims", optional="title settings")
    contexts = _section(given["contexts"], "contexts")
    arms = _section(given["arms"], "arms")
    claims = _list(given["claims"], "claims")
    return Study(
        name=name,
        title=str(given.get("title", name)),
        settings=_settings(given.get("settings"), "settings"),
        contexts={key: _settings(settings, f"context {key}") for key, settings in contexts.items()},
        arms={key: _arm(key, arm) for key, arm in arms.items()},
        blocks=tuple(_block(key, block) for key, block in _section(given["blocks"], "blocks").items()),
        claims=tuple(_claim(claim, f"claim {number}") for number, claim in enumerate(claims, start=1)),
        sha256=sha256,
        source=source,
    )


def _arm(name: str, given: Any) -> Arm:
    arm = dict(_section(given or {}, f"arm {name}"))
    return Arm(label=str(arm.pop("label", name)), settings=_settings(arm, f"arm {name}"))


def _block(name: str, given: Any) -> Block:
    where = f"block {name}"
    block = _section(
        given, where, required="task arms seeds iterations batch_size looks", optional="axes chosen_from chosen_as settings aa"
    )
    seeds = _section(block["seeds"], f"{where}: seeds", optional="pilot fresh aa")
    roles: tuple[Role, ...] = get_args(Role)
    return Block(
        name=name,
        task=_choice(block["task"], TASKS, f"{where}: unknown task"),
        arms={context: _names(arms, f"{where}: arms of {context}") for context, arms in _section(block["arms"], where).items()},
        axes={str(key): _axis(key, values, where) for key, values in _section(block.get("axes") or {}, where).items()},
        chosen_from=None if block.get("chosen_from") is None else str(block["chosen_from"]),
        seeds={role: _seeds(seeds[role], f"{where}: seeds of {role} runs") for role in roles if role in seeds},
        iterations=_count(block["iterations"], f"{where}: iterations"),
        batch_size=_count(block["batch_size"], f"{where}: batch_size"),
        looks=_looks(block["looks"], f"{where}: looks"),
        settings=_settings(block.get("settings"), where),
        chosen_as={context: str(other) for context, other in _section(block.get("chosen_as") or {}, where).items()},
        aa={context: str(arm) for context, arm in _section(block.get("aa") or {}, f"{where}: aa").items()},
        aa_seeds=_seeds(seeds["aa"], f"{where}: seeds of aa") if "aa" in seeds else (),
    )


def _looks(given: Any, where: str) -> tuple[Look, ...]:
    looks = _section(given, where, optional="at samples whole whole_samples probes")
    whole = _counts(looks.get("whole", []), f"{where}: whole")
    every = sorted({*_counts(looks.get("at", []), f"{where}: at"), *whole})
    samples = _count(looks.get("samples", 2_500), f"{where}: samples")
    whole_samples = _count(looks.get("whole_samples", 10_000), f"{where}: whole_samples")
    probes: dict[int, list[str]] = {iteration: [] for iteration in every}
    for probe, iterations in _section(looks.get("probes") or {}, f"{where}: probes").items():
        _choice(probe, PROBES, f"{where}: unknown probe")
        for iteration in _counts(iterations, f"{where}: {probe}"):
            if iteration not in probes:
                raise UsageError(f"{where}: {probe} is asked for after iteration {iteration}, where no look is; add it to `at`")
            probes[iteration].append(probe)
    return tuple(
        Look(iteration, whole_samples if iteration in whole else samples, iteration in whole, tuple(probes[iteration]))
        for iteration in every
    )


def _claim(given: Any, where: str) -> Claim:
    claim = _section(given, where, required="name statement primary contexts", optional="rule also controls secondary")
    others = {
        kind: tuple(
            _contrast(one, f"{where}: {kind}") for one in _list(claim.get(kind, []), f"{where}: {kind}", allow_empty=True)
        )
        for kind in ("also", "controls", "secondary")
    }
    return Claim(
        name=str(claim["name"]),
        statement=str(claim["statement"]),
        primary=_contrast(claim["primary"], f"{where}: primary"),
        contexts=_names(claim["contexts"], f"{where}: contexts"),
        rule=_choice(claim.get("rule", "beyond"), get_args(get_type_hints(Claim)["rule"]), f"{where}: unknown rule"),
        **others,
    )


def _contrast(given: Any, where: str) -> Contrast:
    contrast = _section(given, where, required="arm blocks endpoint margin better", optional="baseline")
    margin = contrast["margin"]
    if isinstance(margin, bool) or not isinstance(margin, int | float):
        raise UsageError(f"{where}: margin must be a number, got {margin!r}")
    baseline = contrast.get("baseline")
    return Contrast(
        arm=str(contrast["arm"]),
        baseline=None if baseline is None else str(baseline),
        blocks=_names(contrast["blocks"], f"{where}: blocks"),
        endpoint=_choice(contrast["endpoint"], ENDPOINTS, f"{where}: unknown endpoint"),
        margin=float(margin),
        better=_choice(contrast["better"], ("less", "more"), f"{where}: unknown better"),
    )


# Parts of it ----------------------------------------------------------------------------------------------------------


def _section(given: Any, where: str, required: str = "", optional: str = "") -> dict[str, Any]:
    """Return a mapping that has all required keys and, where any are named, no others than these and optional ones."""
    if not isinstance(given, dict):
        raise UsageError(f"{where} should hold names with values, not {given!r}")
    section = {str(key): value for key, value in given.items()}
    known = [*required.split(), *optional.split()]
    for key in section:
        if known and key not in known:
            raise UsageError(f"{where}: unknown {key!r}; choose from {', '.join(known)}")
    for key in required.split():
        if section.get(key) is None:
            raise UsageError(f"{where}: {key} is missing")
    return section


def _list(given: Any, where: str, *, allow_empty: bool = False) -> list[Any]:
    items = given if isinstance(given, list) else [given]
    if not items and not allow_empty:
        raise UsageError(f"{where} is empty; name at least one")
    return items


def _names(given: Any, where: str) -> tuple[str, ...]:
    return _distinct((str(name) for name in _list(given, where)), where)


def _counts(given: Any, where: str) -> tuple[int, ...]:
    return _distinct((_count(item, where) for item in _list(given, where, allow_empty=True)), where)


def _count(given: Any, where: str) -> int:
    if type(given) is not int or given < 1:
        raise UsageError(f"{where} must be a whole number of at least 1, got {given!r}")
    return given


def _seeds(given: Any, where: str) -> tuple[int, ...]:
    """Return the seeds of `7`, `1..12`, `1..3, 7` or a list of such."""
    seeds: list[int] = []
    for part in _list(given, where) if isinstance(given, list) else str(given).split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\.\.(\d{1,9}))?\s*", str(part))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + MOST_SEEDS:
            raise UsageError(f"{where}: {part!r} is no seed and no range of seeds, such as 1..12")
        seeds += range(first, last + 1)
    return _distinct(seeds, where)


def _axis(names: str, given: Any, where: str) -> tuple[Value, ...]:
    """Return the values of an axis, each of which all settings take that its name tells, parted by spaces."""
    where = f"{where}: axis {names!r}"
    values = [_setting(name, value, where) for value in _list(given, where) for name in names.split()]
    return _distinct(values[:: len(names.split())], where)


def _settings(given: Any, where: str) -> dict[str, Value]:
    return {name: _setting(name, value, where) for name, value in _section(given or {}, where).items()}


def _setting(name: str, value: Any, where: str) -> Value:
    """Return a setting's value, a float where it takes floats."""
    if name not in HINTS or name in GIVEN_ELSEWHERE:
        raise UsageError(f"{where}: {name!r} is no setting here; {GIVEN_ELSEWHERE.get(name, 'see bngan fit --help')}")
    allowed = get_args(HINTS[name]) or (HINTS[name],)
    if get_origin(HINTS[name]) is Literal:
        return _choice(value, allowed, f"{where}: unknown {name}")
    if type(value) is int and float in allowed and int not in allowed:
        return float(value)
    if type(value) not in allowed:
        words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        raise UsageError(f"{where}: {name} must be {words}, got {value!r}")
    return value


def _choice(given: Any, allowed: Iterable[str], wrong: str) -> Any:
    if given not in (known := list(allowed)):
        raise UsageError(f"{wrong} {given!r}; choose from {', '.join(known)}")
    return given


def _distinct(given: Iterable[Any], where: str) -> tuple[Any, ...]:
    values = tuple(given)
    if twice := [value for value in values if values.count(value) > 1]:
        raise UsageError(f"{where}: {twice[0]!r} stands twice")
    return values


# Checks of the whole --------------------------------------------------------------------------------------------------


def check_study(study: Study) -> None:
    """Refuse a study that cannot be run, or whose claims cannot be tested by its runs.

    Raises:
        UsageError: naming the first thing that is wrong.
    """
    if AA in study.arms:
        raise UsageError(f"arm {AA}: this name is that of an arm trained a second time; take another")
    for block in study.blocks:
        _check_names(study, block)
        _check_seeds(block)
        _check_choice(study, block)
        if (last := block.looks[-1].iteration if block.looks else 0) != block.iterations:
            raise UsageError(
                f"block {block.name}: the last look must be after iteration {block.iterations}, and is after {last}"
            )
    of_role = {role: {seed for block in study.blocks for seed in block.seeds.get(role, ())} for role in ("pilot", "fresh")}
    again = {seed for block in study.blocks for seed in block.aa_seeds}
    if both := sorted(of_role["pilot"] & (of_role["fresh"] | again)):
        raise UsageError(f"seed {both[0]} is both pilot and fresh; runs that choose learning rates must not be reported")
    runs = {block.name: planned_runs(study, block) for block in study.blocks}
    _check_runs(run for of_block in runs.values() for run in of_block)
    _distinct((claim.name for claim in study.claims), "claims")
    counts = {block: Counter((run.context, run.arm, run.role) for run in of_block) for block, of_block in runs.items()}
    for claim in study.claims:
        _check_claim(study, claim, counts)


def _check_names(study: Study, block: Block) -> None:
    where = f"block {block.name}"
    for context, arms in block.arms.items():
        _choice(context, study.contexts, f"{where}: unknown context")
        for arm in arms:
            _choice(arm, study.arms, f"{where}: unknown arm")
    for context, arm in block.aa.items():
        _choice(arm, block.arms.get(context, ()), f"{where}: aa repeats, in context {context}, what is no arm there,")


def _check_seeds(block: Block) -> None:
    where = f"block {block.name}"
    if not any(block.seeds.values()):
        raise UsageError(f"{where}: seeds are missing; give `pilot`, `fresh` or both, such as fresh: 1..12")
    if bool(block.aa) != bool(block.aa_seeds):
        raise UsageError(f"{where}: an arm that is trained again needs both `aa` and, among the seeds, those of `aa`")
    if both := sorted(set(block.aa_seeds) & set(block.seeds.get("fresh", ()))):
        raise UsageError(f"{where}: seed {both[0]} is both fresh and of aa, which needs seeds of its own")


def _check_choice(study: Study, block: Block) -> None:
    """Refuse a block whose fresh runs wait for what is never chosen."""
    where, known = f"block {block.name}", {other.name: other for other in study.blocks}
    if block.chosen_from is None:
        return
    _choice(block.chosen_from, known, f"{where}: chosen_from is the unknown block")
    source = known[block.chosen_from]
    if study.blocks.index(source) > study.blocks.index(block):
        raise UsageError(f"{where}: chosen_from {source.name} comes later; put that block first")
    if source is not block and block.axes:
        raise UsageError(f"{where}: it has axes, and takes their values from block {source.name}; leave one of both out")
    if not source.axes or "pilot" not in source.seeds or "fresh" not in block.seeds:
        raise UsageError(f"{where}: chosen_from needs axes and pilot seeds in block {source.name}, and fresh seeds here")
    for context, arms in block.arms.items():
        like = block.chosen_as.get(context, context)
        for arm in arms:
            _choice(arm, source.arms.get(like, ()), f"{where}: block {source.name} has, in context {like}, no arm")


def _check_runs(runs: Iterable[Run]) -> None:
    """Refuse settings that training would refuse; of each structure a pair of networks is built, without its weights."""
    checked, built = set(), set()
    for run in runs:
        given: dict[str, Any] = run.settings
        settings = Settings(**given)
        if (run.task, run.batch_size, settings) in checked:
            continue
        checked.add((run.task, run.batch_size, settings))
        try:
            check_settings(settings)
            if (like := (run.task, run.batch_size, structure(settings))) not in built:
                built.add(like)
                with torch.device("meta"):
                    GAN(**given, image_shape=TASKS[run.task].image_shape).check_batch(run.batch_size)
        except UsageError as error:
            raise UsageError(f"block {run.block}, context {run.context}, arm {run.arm}: {error}") from error


def _check_claim(study: Study, claim: Claim, counts: Mapping[str, Counts]) -> None:
    """Refuse a claim that the blocks' runs cannot test.

    Args:
        study: the study.
        claim: one of its claims.
        counts: of runs, by block.
    """
    where, primary = f"claim {claim.name}", claim.primary
    for context in claim.contexts:
        _choice(context, study.contexts, f"{where}: unknown context")
    for contrast in claim.contrasts:
        _check_contrast(claim, contrast, counts)
    # The verdict of last resort is of all contexts together.
    runs = min(sum(_count_runs(counts[block], context, primary.arm) for context in claim.contexts) for block in primary.blocks)
    if not can_decide(ENDPOINTS[primary.endpoint].kind, runs, primary.margin):
        raise UsageError(
            f"{where}: too few seeds for any verdict: power is below 0.5, whatever is true, with {runs} an arm at the margin "
            f"{primary.margin:g}; give more"
        )


def _check_contrast(claim: Claim, contrast: Contrast, counts: Mapping[str, Counts]) -> None:
    """Refuse a contrast of arms that a block does not have in a context of the claim, or with a margin without meaning."""
    where, kind = f"claim {claim.name}", ENDPOINTS[contrast.endpoint].kind
    for block in contrast.blocks:
        _choice(block, counts, f"{where}: unknown block")
        for context in claim.contexts:
            for arm in (contrast.arm, contrast.baseline):
                if arm is not None and not _count_runs(counts[block], context, arm):
                    raise UsageError(f"{where}: block {block} has no arm {arm!r} in context {context}")
    if not (contrast.margin > 1 if kind == "ratio" else 0 < contrast.margin < 1):
        allowed = "above 1, for it is a ratio" if kind == "ratio" else "between 0 and 1, for it is a difference"
        raise UsageError(f"{where}: margin of {contrast.endpoint} must be {allowed}, got {contrast.margin:g}")


def _count_runs(counts: Counts, context: str, arm: str) -> int:
    """Return how many runs of an arm a verdict is of: the fresh ones of a block, or all where there are none."""
    return counts[context, arm, "fresh"] or counts[context, arm, "pilot"]
