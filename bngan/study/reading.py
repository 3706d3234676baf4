"""What does the file of a study say, and can it be run as it stands? Every mistake is told before the first run."""

import hashlib
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import yaml

from bngan.errors import UsageError
from bngan.gan import GAN
from bngan.recipes import SHIPPED, find_shipped, read_config, yaml_fault
from bngan.settings import Settings, check_settings
from bngan.study.endpoints import ENDPOINTS
from bngan.study.ensemble import structure
from bngan.study.power import can_decide
from bngan.study.probes import PROBE_BATCHES, PROBES
from bngan.study.spec import AA, DEFAULTS, Arm, Block, Claim, Contrast, Look, Role, Run, Study, Value, planned_runs
from bngan.study.tasks import TASKS

STUDIES = SHIPPED / "study"
HINTS = get_type_hints(Settings)
GIVEN_ELSEWHERE = {"image_shape": "it comes from the task", "seed": "give `seeds` of a block"}
MOST_SEEDS = 100_000
MOST_NUMBER = 2**63
MOST_BATCH = 60_000 // PROBE_BATCHES  # probes look at several batches of the 60,000 digits
FEWEST_SAMPLES, MOST_SAMPLES = 100, 100_000  # more than the digit net has features; as many as are held at once
MOST_RATIO = 10.0  # of a margin: the worst FID is no more times the best
UNFIT = '/\\:*?"<>|'  # for names of files
Counts = Mapping[tuple[str, str, str], Counter[str]]  # of runs, by context, arm and role; then by values of the axes


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

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int | float) and not abs(value) < MOST_NUMBER:
                raise OverflowError
        except (ValueError, LookupError, AttributeError, OverflowError) as error:  # as of 2020-13-45, a date, or !!int ""
            kind, text = node.tag.rpartition(":")[2], str(node.value)
            shown = text if len(text) < 30 else f"{text[:20]}..."
            problem = f"{shown!r} is no {kind} that can be used"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error
        return value


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789"))


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(yaml_fault(error)) from error
    except RecursionError as error:
        raise UsageError("not valid YAML: its lists and names are nested too deeply to be read") from error


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
    optional = "axes chosen_from chosen_as neighbours settings aa"
    block = _section(given, where, required="task arms seeds iterations batch_size looks", optional=optional)
    seeds = _section(block["seeds"], f"{where}: seeds", optional="pilot fresh aa")
    roles: tuple[Role, ...] = get_args(Role)
    return Block(
        name=name,
        task=_choice(block["task"], TASKS, f"{where}: unknown task"),
        arms={context: _names(arms, f"{where}: arms of {context}") for context, arms in _section(block["arms"], where).items()},
        axes=_axes(block.get("axes") or {}, where),
        chosen_from=None if block.get("chosen_from") is None else str(block["chosen_from"]),
        seeds={role: _seeds(seeds[role], f"{where}: seeds of {role} runs") for role in roles if role in seeds},
        iterations=_count(block["iterations"], f"{where}: iterations"),
        batch_size=_count(block["batch_size"], f"{where}: batch_size", most=MOST_BATCH),
        looks=_looks(block["looks"], f"{where}: looks"),
        settings=_settings(block.get("settings"), where),
        chosen_as={context: str(other) for context, other in _section(block.get("chosen_as") or {}, where).items()},
        aa={context: str(arm) for context, arm in _section(block.get("aa") or {}, f"{where}: aa").items()},
        aa_seeds=_seeds(seeds["aa"], f"{where}: seeds of aa") if "aa" in seeds else (),
        neighbours=_flag(block.get("neighbours", False), f"{where}: neighbours"),
    )


def _looks(given: Any, where: str) -> tuple[Look, ...]:
    looks = _section(given, where, optional="at samples whole whole_samples probes")
    whole = _counts(looks.get("whole", []), f"{where}: whole")
    every = sorted({*_counts(looks.get("at", []), f"{where}: at"), *whole})
    samples, whole_samples = (
        _count(looks.get(key, default), f"{where}: {key}", FEWEST_SAMPLES, MOST_SAMPLES)
        for key, default in (("samples", 2_500), ("whole_samples", 10_000))
    )
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
    optional = "rule also controls secondary conditions"
    claim = _section(given, where, required="name statement primary contexts", optional=optional)
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
        conditions=_conditions(claim.get("conditions") or {}, f"{where}: conditions"),
        **others,
    )


def _conditions(given: Any, where: str) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    conditions = {}
    for name, levels in _section(given, where).items():
        if not isinstance(levels, list) or len(levels) != 2:
            raise UsageError(f"{where}: {name} must be two lists of contexts, such as [[T], [B]], got {levels!r}")
        first, second = (_names(level, f"{where}: {name}") for level in levels)
        _distinct((*first, *second), f"{where}: {name}")
        conditions[name] = (first, second)
    return conditions


def _contrast(given: Any, where: str) -> Contrast:
    optional = "baseline pairs cross_fitted"
    contrast = _section(given, where, required="arm blocks endpoint margin better", optional=optional)
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
        pairs=_pairs(contrast.get("pairs", []), f"{where}: pairs"),
        cross_fitted=_flag(contrast.get("cross_fitted", False), f"{where}: cross_fitted"),
    )


def _pairs(given: Any, where: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for pair in _list(given, where, allow_empty=True):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UsageError(f"{where} must be lists of an arm and its baseline, such as [[a3, a2]], got {pair!r}")
        pairs.append((str(pair[0]), str(pair[1])))
    return tuple(pairs)


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


def _flag(given: Any, where: str) -> bool:
    if not isinstance(given, bool):
        raise UsageError(f"{where} must be true or false, got {given!r}")
    return given


def _count(given: Any, where: str, least: int = 1, most: int = MOST_NUMBER) -> int:
    if type(given) is not int or not least <= given <= most:
        limit = "" if most == MOST_NUMBER else f" and at most {most:,}"
        raise UsageError(f"{where} must be a whole number of at least {least:,}{limit}, got {given!r}")
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


def _axes(given: Any, where: str) -> dict[str, tuple[Value, ...]]:
    """Return the values of axes, no two of which vary the same setting."""
    axes = _section(given, where)
    _distinct((name for names in axes for name in names.split()), f"{where}: settings of axes")
    return {names: _axis(names, values, where) for names, values in axes.items()}


def _axis(names: str, given: Any, where: str) -> tuple[Value, ...]:
    """Return the values of an axis, each of which all settings take that its name tells, parted by spaces."""
    where = f"{where}: axis {names!r}"
    if not names.split():
        raise UsageError(f"{where} names no setting; give one or more, such as g_lr d_lr")
    values = [_setting(name, value, where) for value in _list(given, where) for name in names.split()]
    return _distinct(values[:: len(names.split())], where)


def _settings(given: Any, where: str) -> dict[str, Value]:
    """Return settings, on top of those of a `recipe` where one is named."""
    settings = _section(given or {}, where)
    recipe = _recipe(settings.pop("recipe"), where) if "recipe" in settings else {}
    return recipe | {name: _setting(name, value, where) for name, value in settings.items()}


def _recipe(name: Any, where: str) -> dict[str, Value]:
    """Return a shipped recipe's settings of the networks and their training that are not the default.

    Its batch size and length are not among them: they are the block's. A file of anybody's is no recipe here, for it could
    change while the study's file, by whose hash results are known, does not.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    model = read_config(shipped[_choice(name, shipped, f"{where}: unknown recipe")]).get("model", {})
    settings = {key: _setting(key, value, f"recipe {name}") for key, value in model.items()}
    return {key: value for key, value in settings.items() if value != DEFAULTS[key]}


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
    _check_names(study)
    for block in study.blocks:
        _check_arms(study, block)
        _check_seeds(block)
        _check_choice(study, block)
        _check_neighbours(study, block)
        if (last := block.looks[-1].iteration if block.looks else 0) != block.iterations:
            raise UsageError(
                f"block {block.name}: the last look must be after iteration {block.iterations}, and is after {last}"
            )
    of_role = {role: {seed for block in study.blocks for seed in block.seeds.get(role, ())} for role in ("pilot", "fresh")}
    again = {seed for block in study.blocks for seed in block.aa_seeds}
    if both := sorted(of_role["pilot"] & (of_role["fresh"] | again)):
        raise UsageError(f"seed {both[0]} is both pilot and fresh; runs that choose learning rates must not be reported")
    runs = {block.name: planned_runs(study, block) for block in study.blocks}
    _check_pictures(run for of_block in runs.values() for run in of_block)
    _check_runs(run for of_block in runs.values() for run in of_block)
    _distinct((claim.name for claim in study.claims), "claims")
    counts = {block: _counted(of_block) for block, of_block in runs.items()}
    for claim in study.claims:
        _check_claim(study, claim, counts)
        _check_measured(claim, runs)


def _check_names(study: Study) -> None:
    """Refuse names that cannot be parts of the runs' ids and of the names of their pictures."""
    if AA in study.arms:
        raise UsageError(f"arm {AA}: this name is that of an arm trained a second time; take another")
    for kind, names in (("block", [block.name for block in study.blocks]), ("context", study.contexts), ("arm", study.arms)):
        for name in names:
            if not name or set(name) & set(UNFIT):
                raise UsageError(f"{kind} {name!r}: files are named by it; take a name without {' '.join(UNFIT)}")


def _check_arms(study: Study, block: Block) -> None:
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
    for context in block.chosen_as:
        _choice(context, block.arms, f"{where}: chosen_as is for the contexts of the block, not for")
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


def _check_neighbours(study: Study, block: Block) -> None:
    """Refuse neighbours of nothing, of what has no order, and those that no contrast reads."""
    where = f"block {block.name}"
    if not block.neighbours:
        return
    sources = [source for source in study.blocks if source.name == block.chosen_from]
    if not sources:
        raise UsageError(f"{where}: neighbours are those of a chosen value; give chosen_from, too")
    values = [value for axis in sources[0].axes.values() for value in axis]
    if len(sources[0].axes) > 1 or any(isinstance(value, str | bool | None) for value in values):
        raise UsageError(f"{where}: neighbours need a single axis of numbers in block {sources[0].name}")
    contrasts = [contrast for claim in study.claims for contrast in claim.contrasts if contrast.cross_fitted]
    if not any(block.name in contrast.blocks for contrast in contrasts):
        raise UsageError(f"{where}: no contrast reads its neighbours; give those that should cross_fitted: true")


def _check_pictures(runs: Iterable[Run]) -> None:
    """Refuse names of blocks, contexts and arms by which two runs would draw into one file."""
    pictures: dict[str, Run] = {}
    for run in runs:
        other = pictures.setdefault(run.picture, run)
        if (other.block, other.context, other.arm) != (run.block, run.context, run.arm):
            raise UsageError(f"{other.id} and {run.id} would both draw {run.picture}; name a block, context or arm otherwise")


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
    for context in (context for levels in claim.conditions.values() for level in levels for context in level):
        _choice(context, claim.contexts, f"{where}: conditions: no context of the claim")
    if claim.conditions and claim.rule == "not_worse":
        raise UsageError(f"{where}: rule not_worse asks for every context, and so has no conditions; leave one of both out")
    for contrast in claim.contrasts:
        _check_contrast(claim, contrast, counts)
    places = 1 if claim.rule == "not_worse" else len(claim.contexts)
    for context in claim.contexts:
        n, strata = _strata(primary, context, counts)
        if not can_decide(ENDPOINTS[primary.endpoint].kind, n, primary.margin, strata, places):
            raise UsageError(
                f"{where}: too few seeds for any verdict in context {context}: power is below 0.5, whatever is true, with "
                f"{n * strata} an arm at the margin {primary.margin:g}; give more"
            )


def _check_contrast(claim: Claim, contrast: Contrast, counts: Mapping[str, Counts]) -> None:
    """Refuse a contrast of arms that a block does not have in a context of the claim, or with a margin without meaning."""
    where, kind = f"claim {claim.name}", ENDPOINTS[contrast.endpoint].kind
    for block in contrast.blocks:
        _choice(block, counts, f"{where}: unknown block")
        for context in claim.contexts:
            for arm in contrast.arms:
                sizes = _sizes(counts[block], context, arm, contrast)
                if not sizes:
                    raise UsageError(f"{where}: block {block} has no arm {arm!r} in context {context}")
                if contrast.cross_fitted and min(len(sizes), *sizes) < 2:
                    raise UsageError(f"{where}: cross_fitted needs two values of an axis of block {block}, with two seeds each")
    if contrast.baseline is None and (contrast.pairs or contrast.cross_fitted):
        raise UsageError(f"{where}: pairs and cross_fitted need a baseline, too")
    _distinct(contrast.arms, f"{where}: arms of pairs, whose differences must be independent")
    if not (1 < contrast.margin <= MOST_RATIO if kind == "ratio" else 0 < contrast.margin < 1):
        allowed = (
            f"above 1, for it is a ratio, and at most {MOST_RATIO:g}"
            if kind == "ratio"
            else "between 0 and 1, for it is a difference"
        )
        raise UsageError(f"{where}: margin of {contrast.endpoint} must be {allowed}, got {contrast.margin:g}")


def _check_measured(claim: Claim, runs: Mapping[str, Iterable[Run]]) -> None:
    """Refuse a claim with an endpoint that the looks at a block's runs, or the runs themselves, do not give."""
    for contrast, context in product(claim.contrasts, claim.contexts):
        for run in (run for block in contrast.blocks for run in runs[block]):
            asked = run.context == context and run.arm in contrast.arms
            if asked and (missing := ENDPOINTS[contrast.endpoint].needs.missing(run)):
                where = f"block {run.block}, context {context}, arm {run.arm}"
                raise UsageError(f"claim {claim.name}: {contrast.endpoint} is not measured in {where}: {missing}")


def _counted(runs: Iterable[Run]) -> Counts:
    counts: dict[tuple[str, str, str], Counter[str]] = {}
    for run in runs:
        counts.setdefault((run.context, run.arm, run.role), Counter())[repr(run.axes)] += 1
    return counts


def _sizes(counts: Counts, context: str, arm: str, contrast: Contrast) -> list[int]:
    """Return how many runs of an arm a contrast reads at each value: fresh ones, or all where there are none."""
    found = counts.get((context, arm, "fresh")) or counts.get((context, arm, "pilot")) or Counter()
    beside = counts.get((context, arm, "neighbour"), Counter()) if contrast.cross_fitted else Counter()
    return [*found.values(), *beside.values()]


def _strata(contrast: Contrast, context: str, counts: Mapping[str, Counts]) -> tuple[int, int]:
    """Return how many runs each arm has at least in each stratum of a contrast in a context, and how many strata there are."""
    cells = [[_sizes(counts[block], context, arm, contrast) for arm in contrast.arms] for block in contrast.blocks]
    n = min(min(sizes) for block in cells for sizes in block)
    values = len(contrast.blocks) if contrast.cross_fitted else sum(len(block[0]) for block in cells)
    return n, values * len(contrast.comparisons)
