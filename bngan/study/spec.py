"""What is a study? Blocks of arms, rates and seeds, the claims that they are to test, and the runs that this takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any, Literal

from bngan.settings import Settings

Value = float | int | str | bool | None
Role = Literal["pilot", "fresh", "neighbour"]
Choice = Mapping[tuple[str, str], Mapping[str, Value]]  # by context and arm, values of the axes
DEFAULTS: dict[str, Any] = {item.name: item.default for item in fields(Settings)}
AA = "aa"  # the arm that is another one again, with seeds of its own


@dataclass(frozen=True)
class Look:
    """An evaluation of a run.

    Attributes:
        iteration: after which it is made.
        samples: how many samples are measured.
        whole: whether coverage is measured, too, and a batch-normalized G also by batch and precise statistics.
        probes: names of the probes that are made.
    """

    iteration: int
    samples: int
    whole: bool = False
    probes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        id: block/context/arm/values of the axes/seed, in which nothing else is.
        block: name of the block.
        context: name of the context.
        arm: name of the arm.
        axes: values of what the block varies beside arms, by the settings' names; several tied ones are parted by spaces.
        seed: of initialization, data order, latents and noise.
        role: pilot runs choose learning rates, fresh runs are reported; neighbours are fresh seeds at the values beside the
            chosen one, which cross-fitted contrasts read as well.
        task: a name from bngan.study.tasks.TASKS.
        settings: those of bngan.settings.Settings that are not its default, but image_shape and seed.
        batch_size: images in an update.
        iterations: length of the training.
        looks: when it is evaluated, the last time after the last iteration.
    """

    id: str
    block: str
    context: str
    arm: str
    axes: dict[str, Value]
    seed: int
    role: Role
    task: str
    settings: dict[str, Value]
    batch_size: int
    iterations: int
    looks: tuple[Look, ...]

    @property
    def picture(self) -> str:
        """Name of the file with its samples."""
        return f"{self.id.replace('/', '_')}.png"


@dataclass(frozen=True)
class Contrast:
    """Two arms, or one by itself, compared in an endpoint.

    Attributes:
        arm: the arm.
        baseline: what it is compared with; None where the endpoint is a comparison within each run.
        blocks: whose runs are compared; where several, as ring, grid and stack, their mean with equal weights.
        endpoint: a name from bngan.study.endpoints.ENDPOINTS.
        margin: smallest effect of practical importance: a difference, or a ratio above 1.
        better: whether the claim says that the arm has less of it or more.
        pairs: further arms and their baselines that differ in the same, as BN in G does whatever D has: the main effect of a
            factor is their mean with equal weights.
        cross_fitted: whether each half of the seeds is compared at the value that the other half chooses, of a grid's or of
            a chosen one and its neighbours, and the interval's ends against the other arm at its best.
    """

    arm: str
    baseline: str | None
    blocks: tuple[str, ...]
    endpoint: str
    margin: float
    better: Literal["less", "more"]
    pairs: tuple[tuple[str, str], ...] = ()
    cross_fitted: bool = False

    @property
    def comparisons(self) -> tuple[tuple[str, str | None], ...]:
        """Every arm with its baseline."""
        return (self.arm, self.baseline), *self.pairs

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms and baselines."""
        return tuple(arm for pair in self.comparisons for arm in pair if arm is not None)


@dataclass(frozen=True)
class Claim:
    """A claim, and what is compared to test it.

    Attributes:
        name: number of the claim.
        statement: what is claimed, as a sentence.
        primary: the contrast that decides.
        contexts: in which it is tested.
        rule: beyond: supported if the interval is beyond the margin; within: if it is within the margins; not_worse: if in no
            context the arm is worse by the margin (intersection-union).
        also: further contrasts, all of which must be supported as well.
        controls: contrasts that must be supported, or the claim's test tells nothing.
        secondary: contrasts that are shown and decide nothing.
        conditions: on which it may depend: of each, by its name, the contexts of one level and those of the other, as those
            of one loss and of another. Where none are named each context is compared with each other.
    """

    name: str
    statement: str
    primary: Contrast
    contexts: tuple[str, ...]
    rule: Literal["beyond", "within", "not_worse"] = "beyond"
    also: tuple[Contrast, ...] = ()
    controls: tuple[Contrast, ...] = ()
    secondary: tuple[Contrast, ...] = ()
    conditions: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """All of them."""
        return self.primary, *self.also, *self.controls, *self.secondary


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        label: what it is called in figures.
        settings: that make it up, on top of the context's.
    """

    label: str
    settings: dict[str, Value]


@dataclass(frozen=True)
class Block:
    """Runs that belong together.

    Attributes:
        name: of the block.
        task: a name from bngan.study.tasks.TASKS.
        arms: names of arms, by context.
        axes: what is varied beside arms; values by the settings' names. The same arm's `chosen` values come from another block.
        chosen_from: block whose pilot runs choose each arm's values of its axes; None where nothing is chosen.
        seeds: of the runs, by role.
        iterations: length of each run.
        batch_size: images in an update.
        looks: evaluations of each run.
        settings: of all runs of the block, between the context's and the arm's.
        chosen_as: for a context that `chosen_from` does not have, the one whose choice it takes.
        aa: an arm that is trained a second time with seeds of its own, by context, as arm `aa`.
        aa_seeds: those seeds.
        neighbours: whether fresh seeds are also run at the two values nearest to the chosen one.
    """

    name: str
    task: str
    arms: dict[str, tuple[str, ...]]
    axes: dict[str, tuple[Value, ...]]
    chosen_from: str | None
    seeds: dict[Role, tuple[int, ...]]
    iterations: int
    batch_size: int
    looks: tuple[Look, ...]
    settings: dict[str, Value] = field(default_factory=dict)
    chosen_as: dict[str, str] = field(default_factory=dict)
    aa: dict[str, str] = field(default_factory=dict)
    aa_seeds: tuple[int, ...] = ()
    neighbours: bool = False


@dataclass(frozen=True)
class Study:
    """All of a study.

    Attributes:
        name: of the study.
        title: what it tests, on what, for how long.
        settings: of all runs.
        contexts: settings by name, on top of those.
        arms: by name.
        blocks: in the order in which they are trained.
        claims: in the order of the report.
        sha256: of the file that describes it.
        source: text of that file.
    """

    name: str
    title: str
    settings: dict[str, Value]
    contexts: dict[str, dict[str, Value]]
    arms: dict[str, Arm]
    blocks: tuple[Block, ...]
    claims: tuple[Claim, ...]
    sha256: str
    source: str


@dataclass(frozen=True)
class Result:
    """What came out of a run.

    Attributes:
        run: the run.
        failure: what became NaN or infinite, so that it ended before its time; None where nothing did.
        seconds: that it took, evaluations not counted.
        measured: one entry for each look, weights (raw, ema) and statistics (running, batch, precise), with the keys iteration,
            weights, statistics and what was measured: fid, coverage, classes, class_kl, pixel_variance (over that of real
            images), fid_random, fid_pixels (in two other feature spaces); modes, high_quality, class_kl, points.
        probed: one entry for each probe of each look: iteration, probe, value, and what else it tells, such as the layer or
            the weights.
    """

    run: Run
    failure: str | None
    seconds: float
    measured: tuple[dict[str, Any], ...]
    probed: tuple[dict[str, Any], ...] = ()


def reported(results: Sequence[Result]) -> Sequence[Result]:
    """Return those of an arm's results that are reported: of the fresh runs or, where there are none, of all."""
    return [result for result in results if result.run.role == "fresh"] or results


def grid(block: Block) -> list[dict[str, Value]]:
    """Return every combination of the values of a block's axes; the one without any where it has none."""
    return [dict(zip(block.axes, values, strict=True)) for values in product(*block.axes.values())]


def nearest(place: int, count: int) -> list[int]:
    """Return the places of the two of `count` ordered values that are nearest to one; of fewer than three all others."""
    start = max(min(place - 1, count - 3), 0)
    return [other for other in range(start, min(start + 3, count)) if other != place]


def neighbours(source: Block, axes: Mapping[str, Value]) -> list[dict[str, Value]]:
    """Return the two values of a block's only axis that are nearest to a chosen one."""
    ((name, values),) = source.axes.items()
    ordered = sorted(values, key=as_number)
    return [{name: ordered[place]} for place in nearest(ordered.index(axes[name]), len(ordered))]


def as_number(value: Value) -> float:
    """Return what sorts values of an axis; words stay in their order."""
    return float(value) if isinstance(value, int | float) else 0.0


def first_choice(study: Study, block: Block) -> Choice:
    """Return the first values of the axes for every arm, to count and to time runs whose values are not yet chosen."""
    values = next((grid(other)[0] for other in study.blocks if other.name == block.chosen_from), {})
    return {(block.chosen_as.get(context, context), arm): values for context, arms in block.arms.items() for arm in arms}


def runs_of(study: Study, block: Block, chosen: Choice | None = None) -> list[Run]:
    """Return a block's runs: pilot ones on all values of its axes, fresh ones on those that are chosen, or on all likewise.

    Neighbours are the runs of fresh seeds on the values beside the chosen ones.

    Args:
        study: the study.
        block: one of its blocks.
        chosen: the values that pilot runs have chosen for the block's arms; None where they have not yet, and fresh runs that
            wait for them are left out.

    Raises:
        KeyError: if nothing was chosen for an arm of the block.
    """
    runs = []
    for role, context, arm, recipe, seeds in _cells(block):
        for axes, seed in product(_values(study, block, role, (context, recipe), chosen), seeds):
            settings = _settings(study, block, context, recipe, axes)
            parts = [block.name, context, arm, *(str(value) for value in axes.values()), str(seed)]
            run = Run(
                id="/".join(parts),
                block=block.name,
                context=context,
                arm=arm,
                axes=axes,
                seed=seed,
                role=role,
                task=block.task,
                settings=settings,
                batch_size=block.batch_size,
                iterations=block.iterations,
                looks=block.looks,
            )
            runs.append(run)
    return runs


def planned_runs(study: Study, block: Block) -> list[Run]:
    """Return as many runs as the block will have, of the same structures, at the first values of axes not yet chosen."""
    return runs_of(study, block, first_choice(study, block))


def _values(study: Study, block: Block, role: Role, cell: tuple[str, str], chosen: Choice | None) -> Sequence[dict[str, Value]]:
    """Return the values of the axes at which an arm (context, arm) is run."""
    if role == "pilot" or block.chosen_from is None:
        return grid(block)
    if chosen is None:
        return []
    context, arm = cell
    axes = dict(chosen[block.chosen_as.get(context, context), arm])
    if role == "fresh":
        return [axes]
    (source,) = (other for other in study.blocks if other.name == block.chosen_from)
    return neighbours(source, axes)


def _cells(block: Block) -> Iterator[tuple[Role, str, str, str, tuple[int, ...]]]:
    """Yield role, context, arm, the arm whose settings it has, and seeds."""
    for role, seeds in block.seeds.items():
        for context, arms in block.arms.items():
            for arm in arms:
                yield role, context, arm, arm, seeds
                if block.neighbours and role == "fresh":
                    yield "neighbour", context, arm, arm, seeds
    for context, arm in block.aa.items():
        yield "fresh", context, AA, arm, block.aa_seeds


def _settings(study: Study, block: Block, context: str, arm: str, axes: Mapping[str, Value]) -> dict[str, Value]:
    """Return the settings of a run that are not the default: the study's, its context's, block's, arm's and axes', in turn."""
    varied = {name: value for names, value in axes.items() for name in names.split()}
    given = study.settings | study.contexts[context] | block.settings | study.arms[arm].settings | varied
    return {name: value for name, value in given.items() if value != DEFAULTS[name]}
