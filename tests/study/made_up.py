"""A small study and results drawn at random, in which everything that statistics and reports ask for is filled."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from bngan.study.spec import Arm, Block, Choice, Claim, Contrast, Look, Result, Run, Study, runs_of

WITH_NORM = {"a1", "a3", "aa"}  # the arms that have the effect
NETWORKS = {"generator": ("layers.3", "layers.6"), "discriminator": ("layers.2", "layers.4")}
PROBES = ("gradient_cosine", "loss_range", "predictiveness", "offset_response", "mates_share")
CURVES = {
    "offset_response": [{"probe": "offset_curve", "offset": offset} for offset in (0.5, 0.2, 0.05)],
    "mates_share": [{"probe": "mates_curve", "batch": size} for size in (16, 64, 256)],
}
FAILED = 0.3  # share of runs without norm that fail


def made_up_study(fresh: int = 12, pilots: int = 3) -> Study:
    """Return a study with pilots, chosen rates, an A/A arm, a mixture, controls, and claims of every rule.

    Args:
        fresh: seeds of the fresh runs.
        pilots: seeds of the pilot runs.
    """
    return Study(
        name="made_up",
        title="The source's MLP on MNIST and a ring of Gaussians; 1,404 iterations",
        settings={"lr_decay_start": 1.0},
        contexts={"T": {"loss": "non_saturating", "ema_decay": 0.0}, "B": {"loss": "relativistic"}},
        arms={
            "a0": Arm("none", {"g_norm": "none", "d_norm": "none"}),
            "a1": Arm("BN in G", {"g_norm": "batch", "d_norm": "none"}),
            "a3": Arm("BN in both, joint", {"g_norm": "batch", "d_norm": "batch", "batching": "joint"}),
            "p2": Arm("none, packs of 2", {"g_norm": "none", "d_norm": "none", "pack": 2}),
        },
        blocks=blocks(tuple(range(1, fresh + 1)), tuple(range(101, 101 + pilots))),
        claims=claims(),
        sha256="0" * 64,
        source="title: <b>made up</b> & escaped\n",
    )


def blocks(fresh: tuple[int, ...], pilots: tuple[int, ...]) -> tuple[Block, ...]:
    """Return a grid of rates, fresh runs at chosen ones, and a ring that chooses for itself."""
    arms = {"T": ("a0", "a1", "a3"), "B": ("a0", "a1", "a3")}
    early, late = (44, 88, 176, 351, 702, 1053), Look(iteration=1404, samples=10_000, whole=True, probes=PROBES)
    points: dict[str, Any] = {"network": "points", "latent_dim": 2}
    return (
        Block(
            name="A",
            task="digits",
            arms=arms,
            axes={"g_lr d_lr": (2e-4, 6e-4, 2e-3)},
            chosen_from=None,
            seeds={"pilot": pilots},
            iterations=1404,
            batch_size=128,
            looks=(Look(iteration=702, samples=2500), Look(iteration=1404, samples=2500)),
        ),
        Block(
            name="F",
            task="digits",
            arms=arms,
            axes={},
            chosen_from="A",
            seeds={"fresh": fresh},
            iterations=1404,
            batch_size=128,
            looks=(*(Look(iteration, samples=2500, probes=PROBES[:1]) for iteration in early), late),
            aa={"B": "a3"},
            aa_seeds=tuple(seed + 20 for seed in fresh),
        ),
        Block(
            name="G",
            task="ring",
            arms={"T": ("a0", "a1", "p2"), "B": ("a0", "a1", "p2")},
            axes={"g_lr d_lr": (2e-4, 6e-4)},
            chosen_from="G",
            seeds={"pilot": pilots, "fresh": fresh},
            iterations=4000,
            batch_size=128,
            looks=(Look(iteration=2000, samples=2500), Look(iteration=4000, samples=2500, whole=True)),
            settings=points,
        ),
    )


def claims() -> tuple[Claim, ...]:
    """Return a claim of each kind of endpoint and each rule."""

    def contrast(arm: str, baseline: str | None, block: str, endpoint: str, margin: float, more: bool = False) -> Contrast:
        return Contrast(arm, baseline, (block,), endpoint, margin, "more" if more else "less")

    return (
        Claim(
            name="1",
            statement="Batch norm makes training more stable.",
            primary=contrast("a3", "a0", "A", "failure", 0.1),
            contexts=("T", "B"),
            secondary=(contrast("a1", "a0", "A", "failure", 0.1), contrast("a1", "a0", "A", "point_collapse", 0.1)),
        ),
        Claim(
            name="2",
            statement="Batch norm makes training converge faster.",
            primary=contrast("a3", "a0", "F", "time_to_useful", 1.25),
            contexts=("T", "B"),
            secondary=(contrast("a3", "a0", "F", "fid", 1.25), contrast("a3", "a0", "F", "time_to_good", 1.25)),
        ),
        Claim(
            name="3b",
            statement="Batch norm in G drops fewer modes.",
            primary=contrast("a1", "a0", "G", "modes_share", 0.05, more=True),
            contexts=("T",),
            controls=(contrast("p2", "a0", "G", "modes_share", 0.05, more=True),),
            secondary=(contrast("a1", "a0", "F", "coverage", 0.05, more=True),),
        ),
        Claim(
            name="4",
            statement="Batch norm in D leaks what else is in the batch.",
            primary=contrast("a3", "a0", "F", "mates_share", 0.05, more=True),
            contexts=("T", "B"),
            secondary=(contrast("a3", "a0", "F", "offset_response", 0.05),),
        ),
        Claim(
            name="5",
            statement="Running statistics serve.",
            primary=contrast("a1", None, "F", "running_to_precise", 1.05),
            contexts=("T", "B"),
            rule="within",
        ),
        Claim(
            name="6",
            statement="Batch norm lowers the shift of a layer's inputs.",
            primary=contrast("a1", "a0", "F", "gradient_cosine", 0.05, more=True),
            contexts=("T", "B"),
            also=(contrast("a3", "a0", "F", "gradient_cosine", 0.05, more=True),),
        ),
        Claim(
            name="7",
            statement="Batch norm goes with any loss.",
            primary=contrast("a3", "a0", "F", "fid", 1.25),
            contexts=("T", "B"),
            rule="not_worse",
        ),
        Claim(
            name="A/A",
            statement="The same arm again shows no effect.",
            primary=contrast("aa", "a3", "F", "fid", 1.25),
            contexts=("B",),
        ),
    )


def made_up_choice(block: Block) -> Choice:
    """Return the middle rate for every arm, as if pilots had chosen it."""
    middle = {name: values[len(values) // 2] for name, values in block.axes.items()} or {"g_lr d_lr": 6e-4}
    return {(context, arm): middle for context, arms in block.arms.items() for arm in arms}


def made_up_results(study: Study, effect: float = 0.5, seed: int = 0) -> list[Result]:
    """Return a result for every planned run.

    Args:
        study: such as made_up_study returns.
        effect: FID of arms with norm over that of arms without; their share of failures and of missed modes is multiplied
            by it, too. 1 is no effect.
        seed: of everything that is drawn.
    """
    generator = np.random.default_rng(seed)
    return [
        made_up_result(run, effect if run.arm in WITH_NORM else 1.0, generator)
        for block in study.blocks
        for run in runs_of(study, block, made_up_choice(block))
    ]


def made_up_result(run: Run, effect: float, generator: np.random.Generator) -> Result:
    """Return what may have come out of a run; one in three failures ends before its time."""
    failed = generator.random() < FAILED * effect
    ended = failed and generator.random() < 1 / 3
    failure = "loss is NaN after iteration 60" if ended else None
    looks = [look for look in run.looks if not ended or look.iteration < 60]
    quality = 6.0 * effect * math.exp(generator.normal(scale=0.15))
    entries = digits_entries if run.task == "digits" else points_entries
    measured = [entry for look in looks for entry in entries(run, look, quality, failed, effect, generator)]
    probed = [entry for look in looks for name in look.probes for entry in probe_entries(run, look, name, generator)]
    return Result(run=run, failure=failure, seconds=40.0, measured=tuple(measured), probed=tuple(probed))


def digits_entries(
    run: Run, look: Look, quality: float, failed: bool, effect: float, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """Return what is measured of digits at a look: raw weights and EMA, and three statistics at a whole look."""
    entries: list[dict[str, Any]] = []
    normalized = run.settings.get("g_norm") != "none"
    kinds = ("running", "batch", "precise") if look.whole and normalized else ("running",)
    weights = ("raw",) if run.settings.get("ema_decay") == 0.0 else ("raw", "ema")
    still_to_go = 1 + 3 * math.exp(-look.iteration / (500 * effect))
    for weight in weights:
        for statistics in kinds:
            fid = (
                60.0
                if failed
                else quality * still_to_go * math.exp(generator.normal(scale=0.02)) * (0.9 if weight == "ema" else 1)
            )
            entry = {
                "iteration": look.iteration,
                "weights": weight,
                "statistics": statistics,
                "samples": look.samples,
                "fid": 60.0 if failed else fid,
                "classes": 4 if failed else 10,
                "class_kl": 1.0 if failed else 0.02,
                "pixel_variance": 0.05 if failed and look.iteration > 146 else 0.9,
            }
            spaces = {"fid_random": 9 * entry["fid"], "fid_pixels": 2 + entry["fid"]}
            whole = {"coverage": 0.02 if failed else 0.8 / (1 + quality / 20), **spaces}
            entries.append(entry | (whole if look.whole else {}))
        if look.whole and normalized:
            entries.append({**entries[-3], "momentum": 0.01})
    return entries


def points_entries(
    run: Run, look: Look, quality: float, failed: bool, effect: float, generator: np.random.Generator
) -> list[dict[str, Any]]:
    """Return what is measured of a ring of 8 at a look, with a point of each mode at a whole one; packs of 2 find all modes."""
    missed = 0 if run.arm == "p2" else generator.binomial(n=4, p=0.5 * effect)
    entry = {"iteration": look.iteration, "weights": "raw", "statistics": "running", "samples": look.samples}
    modes = 1 if failed and run.arm != "p2" else 8 - int(missed)
    angles = [2 * math.pi * mode / 8 for mode in range(modes)]
    points = {"points": [[math.cos(angle), math.sin(angle)] for angle in angles]} if look.whole else {}
    return [{**entry, "modes": modes, "high_quality": 0.9, **points}]


def probe_entries(run: Run, look: Look, probe: str, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Return what a probe tells of a run."""
    entry: dict[str, Any] = {"iteration": look.iteration, "probe": probe}
    if probe == "gradient_cosine":
        entries = []
        for network, layers in NETWORKS.items():
            values = (0.8 if run.arm in WITH_NORM else 0.6) + generator.normal(scale=0.05, size=len(layers))
            entries += [
                {**entry, "network": network, "layer": layer, "value": x} for layer, x in zip(layers, values, strict=True)
            ]
            entries.append({**entry, "network": network, "value": values.mean()})
        return [{**entry, "value": float(entry["value"])} for entry in entries]
    in_d = run.settings.get("d_norm", "batch") == "batch"
    means: Mapping[str, float] = {"offset_response": 0.1 if in_d else 0.21, "mates_share": 0.2 if in_d else 0.0}
    noise = generator.normal(scale=0.01) if probe != "mates_share" or in_d else 0.0
    value = means.get(probe, 1.0) + noise
    if probe == "loss_range":
        return [{**entry, "network": network, "value": value} for network in NETWORKS]
    curve = [{**entry, **part, "value": value / (1 + place)} for place, part in enumerate(CURVES.get(probe, ()))]
    return [{**entry, "value": value}, *curve]
