"""Runs that are trained as one give what each gives by itself, and one that fails leaves the others alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bngan.study.spec import Look, Result, Run
from bngan.study.tasks import TASKS
from bngan.study.together import TrainingTogether, most, structure, train_together
from bngan.study.training import Training, train

SETTINGS = {"hidden_dim": 8, "latent_dim": 4, "instance_noise": 0.5}
RING = Run(
    id="R/T/a/1",
    block="R",
    context="T",
    arm="a",
    axes={},
    seed=1,
    role="fresh",
    task="ring",
    settings={**SETTINGS, "network": "points"},
    batch_size=16,
    iterations=6,
    looks=(Look(iteration=3, samples=64), Look(iteration=6, samples=64, whole=True, probes=("mates_share",))),
)
DIGITS = replace(RING, id="F/T/a/1", task="digits", settings=SETTINGS)


def with_seeds(run: Run, seeds: Sequence[int]) -> list[Run]:
    """The run with these seeds, at rates of their own."""
    return [
        replace(run, id=f"{run.id[:-1]}{seed}", seed=seed, settings={**run.settings, "g_lr": 0.001 * seed}) for seed in seeds
    ]


def numbers(result: Result) -> list[dict[str, object]]:
    """What was measured and probed, its numbers as what is nearly equal."""
    return [
        {key: pytest.approx(value, rel=1e-2, abs=1e-3) if isinstance(value, float) else value for key, value in entry.items()}
        for entry in (*result.measured, *result.probed)
    ]


@pytest.mark.parametrize("run", [RING, pytest.param(DIGITS, marks=pytest.mark.slow)], ids=lambda run: run.task)
def test_each_gives_what_it_gives_by_itself(run: Run, mnist_root: Path, tmp_path: Path) -> None:
    runs = with_seeds(run, seeds=(1, 2))
    together = train_together(runs, tmp_path / "together", mnist_root, "cpu")
    for member, result in zip(runs, together, strict=True):
        alone = train(member, folder=tmp_path / "alone", root=mnist_root)
        assert result.run == member
        assert result.failure is alone.failure is None
        assert [*result.measured, *result.probed] == numbers(alone)
        assert len(result.measured) == 2 + 2 * 4  # raw and EMA; the whole look by three statistics and a second momentum
    assert together[0].probed != together[1].probed
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == [f"{run.id[0]}_T_a_{seed}.png" for seed in (1, 2)]


def test_digits_are_trained_with_their_own_labels_in_each_run(mnist_root: Path) -> None:
    looks = (Look(iteration=2, samples=64),)
    runs = with_seeds(replace(DIGITS, iterations=2, looks=looks, settings={**SETTINGS, "classes": 10}), seeds=(1, 2))
    together = TrainingTogether(runs, mnist_root, "cpu")
    assert not torch.equal(*together.labels(0).unbind(dim=1))
    for place, run in enumerate(runs):
        alone = Training(run, TASKS["digits"].load(mnist_root, run.seed, "cpu")).images
        assert torch.equal(together.images(1)[:, place], alone(1))
        assert torch.equal(together.labels(1)[:, place], alone.labels(1))
    before = together.ensemble.gan.state_dict()["generator.net.1.gamma"].clone()  # (R, K, C)
    together.advance(2)
    moved = (together.ensemble.gan.state_dict()["generator.net.1.gamma"] - before).abs().amax(dim=2) > 0  # (R, K)
    for place in range(2):
        met = torch.cat([together.labels(done)[:, place] for done in (0, 1)]).unique()
        assert moved[place].nonzero().flatten().tolist() == met.tolist()


def test_run_that_fails_is_a_result_and_leaves_the_others_alone(mnist_root: Path, tmp_path: Path) -> None:
    runs = with_seeds(RING, seeds=(1, 2))
    broken = replace(runs[1], settings={**runs[1].settings, "g_lr": 1e38, "d_lr": 1e38})
    with_it = train_together([runs[0], broken], tmp_path / "pictures", mnist_root, "cpu")
    without = train_together(runs, tmp_path / "others", mnist_root, "cpu")
    assert with_it[1].failure is not None
    assert "iteration 3" in with_it[1].failure
    assert with_it[1].measured == ()
    assert with_it[0].measured == without[0].measured
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["R_T_a_1.png"]


def test_structure_is_what_runs_of_an_ensemble_share() -> None:
    same = replace(RING, seed=7, settings={**RING.settings, "g_lr": 0.5, "d_lr": 0.1, "instance_noise": 0.25})
    assert structure(same) == structure(RING)
    for other in (
        replace(RING, task="grid"),
        replace(RING, iterations=7),
        replace(RING, batch_size=32),
        replace(RING, looks=RING.looks[1:]),
        replace(RING, settings={**RING.settings, "beta2": 0.9}),
        replace(RING, settings={**RING.settings, "instance_noise": 0.0}),  # an iteration that draws none
    ):
        assert structure(other) != structure(RING)
    assert most(RING, "cpu") > 1
