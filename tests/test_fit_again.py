"""A run of an ensemble is what `bngan fit` makes of its seed: weights to 1e-9 in float64, and what a script compares of FID."""

from dataclasses import replace
from pathlib import Path

import fit_again
import pytest
import torch

from bngan.checkpoint import read_checkpoint
from bngan.cli import main
from bngan.study.ensemble import Ensemble
from bngan.study.spec import Look, Result, Run
from bngan.study.tasks import TASKS
from bngan.study.training import TrainingImages, build_gan

RUN = Run(
    id="F/T/a3/1",
    block="F",
    context="T",
    arm="a3",
    axes={},
    seed=1,
    role="fresh",
    task="digits",
    settings={"hidden_dim": 4, "latent_dim": 3, "loss": "hinge", "batching": "separate", "instance_noise": 0.5, "g_clip": None},
    batch_size=16,
    iterations=12,
    looks=(Look(iteration=12, samples=64),),
)
EXACTLY = ("--trainer.precision=64-true", "--trainer.accelerator=cpu")


def test_member_of_an_ensemble_is_what_the_command_fit_trains(mnist_root: Path, tmp_path: Path) -> None:
    runs = [RUN, replace(RUN, seed=2)]
    data = TASKS["digits"].load(mnist_root, RUN.seed, "cpu")
    images = [TrainingImages(data, RUN.batch_size, run.seed) for run in runs]
    ensemble = Ensemble([build_gan(run).double() for run in runs], total=RUN.iterations)
    ensemble.train(lambda done: torch.stack([of(done).double() for of in images], dim=1), RUN.iterations)

    assert main(fit_again.fit_command(RUN, tmp_path, mnist_root, *EXACTLY)) == 0
    fitted = read_checkpoint(fit_again.checkpoint_of(RUN, tmp_path))["state_dict"]
    found, other = (ensemble.member(run).state_dict() for run in range(2))
    assert found.keys() == fitted.keys()
    assert max(float((found[name] - fitted[name]).abs().max()) for name in found) < 1e-9
    assert max(float((other[name] - fitted[name]).abs().max()) for name in found) > 1e-3


def results_with(fids: list[float]) -> list[Result]:
    known = {"iteration": 12, "weights": "raw", "statistics": "running", "samples": 64, "classes": 10, "pixel_variance": 1.0}
    runs = [replace(RUN, id=f"F/T/a3/{seed}", seed=seed) for seed in range(len(fids))]
    return [Result(run, None, 1.0, ({**known, "fid": fid},)) for run, fid in zip(runs, fids, strict=True)]


def test_fid_by_fit_is_alike_where_the_interval_of_the_ratio_has_1_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    in_study = results_with([4.0, 4.4, 3.8, 4.1, 4.3, 4.0, 3.9, 4.2])
    assert fit_again.is_alike(results_with([4.1, 3.9, 4.3]), in_study)
    assert not fit_again.is_alike(results_with([5.1, 4.9, 5.3]), in_study)
    assert "FID by fit (n=3) : in the study (n=8) = 1.2" in capsys.readouterr().out
    assert not fit_again.is_alike(results_with([2.0, 8.0, 4.0]), in_study), "a wide interval is no agreement"
    assert "too wide to tell" in capsys.readouterr().out
