"""Several alternations in one step of the Trainer are the same training, told and kept as if each had a step of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bngan import GAN
from bngan.cli import main
from bngan.data import ImageDataModule
from bngan.data.loader import ShardedBatches, TensorLoader
from tests.conftest import REPOSITORY
from tests.test_resume import assert_same, fit, last, runs, series

# 46 alternations of 4 pictures an epoch, and 3 pictures left over. Neither 4 nor 7 divides 46; both divide 28.
EPOCH, PICTURES = 46, 208
GROUPS = (4, 7)
SETTINGS = (
    *("--data.name=folder", "--data.batch_size=4", "--model.hidden_dim=8", "--metrics.num_samples=0"),
    *("--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"),
    *("--trainer.val_check_interval=28", "--trainer.log_every_n_steps=5", "--checkpoint.monitor=val/d_loss"),
    *("--images.every_n_iterations=9", "--images.num_samples=4", "--batchnorm.every_n_iterations=10"),
)
MORE: dict[str, tuple[str, ...]] = {
    "plain": (),
    "two updates of D in two parts": ("--model.n_critic=2", "--data.batch_size=8", "--model.accumulate=2"),
    "dropout, virtual norm": ("--model.d_dropout=0.3", "--model.d_norm=virtual", "--data.batch_size=64"),
    "read by workers": ("--data.in_memory_gb=0", "--data.num_workers=2"),
    "bf16-mixed": ("--trainer.precision=bf16-mixed",),
    "no validation": ("--trainer.limit_val_batches=0", "--images.num_samples=6"),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(PICTURES):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the folder of an uninterrupted run with so many alternations a step, made once."""
    made: dict[tuple[object, ...], Path] = {}

    def of(group: int, *more: str) -> Path:
        if (group, *more) not in made:
            folder = made[group, *more] = tmp_path_factory.mktemp("run")
            where = (f"--data.folder={pictures}", f"--data.alternations_per_step={group}")
            assert fit(folder, *SETTINGS, *where, *more) == 0
        return made[group, *more]

    return of


def assert_same_training(one: Path, other: Path) -> None:
    mine, theirs = last(one), last(other)
    for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert_same(mine[part], theirs[part], part)
    assert mine["global_step"] == int(mine["state_dict"]["iteration"])
    for name in ("Checkpoints", "RunProgress"):
        assert_same(*(next(v for key, v in kept["callbacks"].items() if key.startswith(name)) for kept in (mine, theirs)))


def shown(folder: Path) -> dict[str, list[Any]]:
    """Return all that TensorBoard has of a run, but for the clock's time."""
    events = EventAccumulator(str(runs(folder)[0]), size_guidance={"scalars": 0, "histograms": 0, "images": 0}).Reload()
    tags = events.Tags()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    found |= {f"{tag}, histogram": [(e.step, e.histogram_value) for e in events.Histograms(tag)] for tag in tags["histograms"]}
    return found | {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
def test_training_and_its_plots_are_those_of_single_alternations(
    more: tuple[str, ...], group: int, run: Callable[..., Path]
) -> None:
    if "--data.batch_size=8" in more or "--data.batch_size=64" in more:
        more = (*more, "--trainer.val_check_interval=1.0")
    single, grouped = run(1, *more), run(group, *more)
    assert_same_training(single, grouped)
    expected, found = shown(single), shown(grouped)
    assert expected.keys() == found.keys()
    for tag, values in expected.items():
        assert values == found[tag], tag
    names = {
        folder: {str(path.relative_to(runs(folder)[0])) for path in runs(folder)[0].rglob("*.png")}
        for folder in (single, grouped)
    }
    assert names[single] == names[grouped]


def group_of(folder: Path) -> int:
    """Return the alternations that a step had in the newest run there."""
    return last(folder)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["group"]


@pytest.mark.parametrize(
    ("settings", "group"),
    [
        ((), 7),
        (("--trainer.val_check_interval=1.0",), 8),
        (("--trainer.val_check_interval=20",), 5),
        (("--trainer.val_check_interval=0.5",), 1),  # every 23 alternations
        (("--trainer.limit_val_batches=0",), 8),
        (("--trainer.limit_train_batches=12", "--trainer.val_check_interval=1.0"), 6),
        (("--trainer.limit_train_batches=0.44", "--trainer.val_check_interval=0.5"), 5),  # 20 and 10
        (("--trainer.max_steps=10", "--trainer.val_check_interval=1.0"), 5),
        (("--trainer.max_steps=3", "--trainer.val_check_interval=1.0"), 3),
        (("--trainer.max_steps=1", "--trainer.val_check_interval=1.0"), 1),
        (("--trainer.val_check_interval=46", "--trainer.check_val_every_n_epoch=null"), 1),
        (("--checkpoint.every_n_iterations=10", "--trainer.val_check_interval=1.0"), 2),
        (("--checkpoint.every_n_iterations=7", "--trainer.val_check_interval=1.0"), 1),
        (("--trainer.callbacks+=tests.interruptions.StopAfter", "--trainer.callbacks.iteration=1000"), 1),
        (("--trainer.callbacks+=tests.interruptions.StopInValidation", "--trainer.callbacks.iteration=1000"), 7),
        (("--data.image_size=256", "--trainer.max_epochs=1", "--trainer.val_check_interval=1.0"), 3),
        (("--data.alternations_per_step=4",), 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_step_has_as_many_alternations_as_nothing_falls_within(
    settings: tuple[str, ...], group: int, pictures: Path, tmp_path: Path
) -> None:
    assert fit(tmp_path, *SETTINGS, f"--data.folder={pictures}", *settings) == 0
    assert group_of(tmp_path) == group


def test_steps_of_chosen_length_are_the_same_training_and_a_run_keeps_them_within_an_epoch(
    run: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    assert fit(tmp_path / "whole", *SETTINGS, f"--data.folder={pictures}") == 0
    assert group_of(tmp_path / "whole") == 7
    assert_same_training(run(1), tmp_path / "whole")
    # One alternation a step because of the callback, and as many for the rest of the epoch though that is gone.
    stop = ("--trainer.callbacks+=tests.interruptions.StopAfter", "--trainer.callbacks.iteration=54")
    assert fit(tmp_path, *SETTINGS, f"--data.folder={pictures}", *stop) == 143
    assert fit(tmp_path, "--name=mnist", "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert group_of(tmp_path) == 4  # 54 is 8 alternations into the second epoch
    assert_same_training(run(1), tmp_path)


@pytest.fixture(scope="module")
def kept(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoints of a run whose steps have two alternations, because one is kept after every two."""
    folder = tmp_path_factory.mktemp("kept")
    keep = ("--checkpoint.every_n_iterations=2", "--checkpoint.keep_all=true")
    assert fit(folder, *SETTINGS, f"--data.folder={pictures}", *keep) == 0
    assert group_of(folder) == 2
    return runs(folder)[0] / "checkpoints"


@pytest.mark.parametrize(("iteration", "group"), [(4, 4), (20, 4), (28, 7), (46, 7), (50, 4), (52, 2), (74, 7), (90, 4)])
def test_run_goes_on_within_an_epoch_by_longer_steps_that_fit_its_place(
    iteration: int, group: int, kept: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    other = ("--checkpoint.every_n_iterations=null", "--checkpoint.keep_all=false")
    assert fit(tmp_path, f"--ckpt_path={kept / f'iteration-{iteration:06d}.ckpt'}", *other) == 0
    assert group_of(tmp_path) == group
    assert_same_training(run(1), tmp_path)


def test_comparison_sees_each_kind_of_plot_at_iterations_within_steps(run: Callable[..., Path]) -> None:
    found = shown(run(7))
    steps = {tag: [step for step, _ in values] for tag, values in found.items()}
    assert steps["train/d_loss"] == list(range(5, 2 * EPOCH + 1, 5))
    assert steps["samples/fixed_z"] == [*range(0, 2 * EPOCH, 9), 2 * EPOCH]
    assert steps["bn/generator.net.1/divergence"] == steps["bn/generator.net.1/gamma, histogram"] == list(range(10, 92, 10))
    assert steps["val/d_loss"] == [28, EPOCH + 28]
    with pytest.raises(AssertionError):
        assert_same_training(run(7), run(7, "--seed_everything=1"))


@pytest.mark.parametrize("iteration", [8, 28, 44, 46, 54, 90])
def test_stopped_run_goes_on_as_if_it_had_not_stopped(
    iteration: int, run: Callable[..., Path], pictures: Path, tmp_path: Path
) -> None:
    where = (f"--data.folder={pictures}", "--data.alternations_per_step=4")
    stop = ("--trainer.callbacks+=tests.interruptions.StopAfter", f"--trainer.callbacks.iteration={iteration}")
    assert fit(tmp_path, *SETTINGS, *where, *stop) == 143
    assert int(last(tmp_path)["state_dict"]["iteration"]) == iteration
    assert fit(tmp_path, "--name=mnist", "--ckpt_path=last", "--trainer.callbacks=null") == 0
    assert_same_training(run(4), tmp_path)
    assert series(run(4)) == series(tmp_path)


def test_within_an_epoch_a_run_keeps_its_steps_and_at_its_end_it_may_change_them(
    run: Callable[..., Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ("--checkpoint.every_n_iterations=10", "--checkpoint.keep_all=true")
    assert fit(tmp_path, *SETTINGS, f"--data.folder={pictures}", "--data.alternations_per_step=4", *keep) == 0
    kept = sorted(path.name for path in (runs(tmp_path)[0] / "checkpoints").glob("iteration-*.ckpt"))
    # Every tenth iteration, or the end of the step that it lies in; the second epoch's steps end at 46 + 4, 46 + 8, ...
    assert kept == [f"iteration-{number:06d}.ckpt" for number in (12, 20, 32, 40, 50, 62, 70, 82, 90)]
    others = ("--data.alternations_per_step=7", "--trainer.callbacks=null")
    within = runs(tmp_path)[0] / "checkpoints" / "iteration-000020.ckpt"
    capsys.readouterr()
    assert fit(tmp_path, f"--ckpt_path={within}", *others) == 2
    first, *more = capsys.readouterr().err.splitlines()
    assert "within an epoch of --data.alternations_per_step 4, and here it is 7" in first
    assert len(more) <= 1

    half = (*SETTINGS, f"--data.folder={pictures}", "--data.alternations_per_step=4")
    assert fit(tmp_path / "half", *half, "--trainer.max_epochs=1", "--model.noise=0", "--model.lr_decay_start=1") == 0
    assert fit(tmp_path / "half", "--ckpt_path=last", "--trainer.max_epochs=2", *others) == 0
    assert_same_training(run(1, "--model.noise=0", "--model.lr_decay_start=1"), tmp_path / "half")


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        (("max_steps=10",), "give 8 or 12"),
        (("max_steps=45",), "give 44 or 46"),
        (("max_steps=3",), "give 4"),
        (("max_steps=48",), "give 46 or 50"),
        (("max_steps=14", "limit_train_batches=12"), "give 12 or 16"),
        (("limit_train_batches=10",), "give 8 or 12"),
        (("limit_train_batches=45",), "give 44 or 46"),
        (("val_check_interval=22",), "give 20 or 28"),  # 24 would be each sixth step, and so the twelfth, which ends at 46
        (("val_check_interval=12",), "give 20"),
        (("val_check_interval=45",), "give 44 or 46"),
        (("val_check_interval=47",), "more than the 46 alternations"),
        (("val_check_interval=12", "check_val_every_n_epoch=null"), "give 46"),
        (("val_check_interval=47", "check_val_every_n_epoch=null"), "give 46 or 92"),
        (("val_check_interval=10", "check_val_every_n_epoch=null", "limit_train_batches=12"), "give 8 or 12"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_numbers_that_fall_within_steps_are_refused_with_the_nearest_that_do_not(
    settings: tuple[str, ...], nearest: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"--trainer.{setting}" for setting in settings]
    where = (f"--data.folder={pictures}", "--data.alternations_per_step=4")
    assert fit(tmp_path, *SETTINGS, "--trainer.val_check_interval=1.0", *where, *given) == 2
    message = capsys.readouterr().err
    assert nearest in message
    assert settings[0].replace("=", " ") in message
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize(
    ("settings", "iterations", "validations"),
    [
        (("max_steps=12",), 12, []),
        (("max_steps=46", "max_epochs=-1"), 46, [46]),
        (("max_steps=54", "max_epochs=-1"), 54, [46]),
        (("max_steps=1001", "max_epochs=1"), 46, [46]),
        (("limit_train_batches=12",), 24, [12, 24]),
        (("limit_train_batches=1000",), 92, [46, 92]),
        (("limit_train_batches=0.5",), 48, [24, 48]),
        (("val_check_interval=20",), 92, [20, 40, 66, 86]),
        (("val_check_interval=46",), 92, [46, 92]),
        (("val_check_interval=0.5",), 92, [24, 46, 70, 92]),
        (("val_check_interval=92", "check_val_every_n_epoch=null"), 92, [92]),
        (("val_check_interval=8", "check_val_every_n_epoch=null", "limit_train_batches=12"), 24, [8, 16, 24]),
        (("fast_dev_run=3", "max_steps=10"), 3, None),
        (("limit_val_batches=0", "val_check_interval=5"), 92, []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_numbers_count_alternations(
    settings: tuple[str, ...], iterations: int, validations: list[int] | None, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    given = [f"--trainer.{setting}" for setting in settings]
    where = (f"--data.folder={pictures}", "--data.alternations_per_step=4")
    assert fit(tmp_path, *SETTINGS, "--trainer.val_check_interval=1.0", *where, *given) == 0
    printed = capsys.readouterr()
    assert f"{iterations} iterations in" in printed.out
    assert f"iteration {iterations}/{iterations} " in printed.out
    assert "logging interval" not in printed.err
    if validations is not None:
        steps = [step for step, _ in series(tmp_path).get("val/d_loss", [])]
        assert steps == validations
        assert last(tmp_path)["global_step"] == iterations


def test_trainer_has_its_settings_back_after_a_fit(pictures: Path, tmp_path: Path) -> None:
    data = ImageDataModule("folder", folder=str(pictures), batch_size=4, alternations_per_step=4)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=12,
        val_check_interval=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    for _ in range(2):
        gan = GAN(image_shape=(1, 9, 9), latent_dim=8, hidden_dim=8)
        trainer.fit(gan, datamodule=data)
        assert (trainer.limit_train_batches, trainer.val_check_interval) == (12, 8)
        assert gan.total_iterations == 12
        trainer.fit_loop.epoch_progress.reset()
        assert gan.iterations_done == 12


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("group", [1, 3, 4, 100])
def test_steps_hold_the_batches_in_their_order(group: int, ranks: int) -> None:
    for rank in range(ranks):
        settings = {"seed": 1, "rank": rank, "ranks": ranks, "parts": 2}
        single = ShardedBatches(87, 8, train=True, **settings)
        grouped = ShardedBatches(87, 8, train=True, **settings, group=group)
        assert single.num_batches == grouped.num_batches == len(single) == 10
        assert len(grouped) == -(-10 // group) == len(list(grouped))
        assert list(chain(*grouped)) == list(chain(*single))
        assert {len(step) for step in list(grouped)[:-1]} <= {group * 8 // ranks}
        held_out = [ShardedBatches(87, 8, train=False, rank=rank, ranks=ranks, group=number) for number in (1, group)]
        assert list(held_out[0]) == list(held_out[1])


def test_place_in_the_data_counts_batches() -> None:
    def loader(group: int) -> TensorLoader:
        batches = ShardedBatches(43, 4, train=True, group=group)
        return TensorLoader(torch.arange(43, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(43), batches)

    first = loader(4)
    steps = iter(first)
    next(steps)
    assert first.state_dict() == {"epoch": 0, "batches": 4, "group": 4}
    again = loader(4)
    again.load_state_dict(first.state_dict())
    rest = [labels.tolist() for _, labels in again]
    assert rest == [labels.tolist() for _, labels in steps]
    assert again.state_dict()["batches"] == first.state_dict()["batches"] == 10
    with pytest.raises(ValueError, match=r"alternations_per_step 4, and here it is 5"):
        loader(5).load_state_dict({"epoch": 0, "batches": 4, "group": 4})
    with pytest.raises(ValueError, match=r"alternations_per_step 1, and here it is 5"):
        loader(5).load_state_dict({"epoch": 0, "batches": 5})
    loader(5).load_state_dict({"epoch": 0, "batches": 0, "group": 4})


def test_fewer_than_one_alternation_a_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--data.alternations_per_step=0", f"--trainer.default_root_dir={tmp_path}"]) == 2
    assert "alternations_per_step must be at least 1, got 0" in capsys.readouterr().err


def test_two_ranks_are_one_process_with_several_alternations_a_step_too(pictures: Path, tmp_path: Path) -> None:
    for group, devices in ((1, 1), (4, 2)):
        settings = (*SETTINGS, f"--data.folder={pictures}", f"--data.alternations_per_step={group}", "--trainer.max_epochs=1")
        many = (f"--trainer.devices={devices}", "--trainer.precision=64-true", "--model.n_critic=2", "--model.accumulate=2")
        command = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), "fit", *settings, *many, "--data.batch_size=8"]
        done = subprocess.run(
            [*command, "--trainer.val_check_interval=1.0", f"--trainer.default_root_dir={tmp_path / str(devices)}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    one, other = last(tmp_path / "1"), last(tmp_path / "2")
    assert one["global_step"] == other["global_step"] == 11
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=0, atol=1e-9)
