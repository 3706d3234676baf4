"""The pictures of a run: which are drawn when, from which weights, and where they go."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bngan import GAN
from bngan.batchnorm.statistics import EvalStatistics
from bngan.callbacks import SampleImages
from bngan.data import ImageDataModule
from bngan.errors import UsageError
from bngan.images import grid, save_png, to_minus1_1
from bngan.sampler import Weights
from tests.test_gan import images, tiny, trainer


@pytest.fixture
def digits(mnist_root: Path) -> ImageDataModule:
    return ImageDataModule(root=str(mnist_root), batch_size=16, predict_samples=5)


def fit(folder: Path, gan: GAN, digits: ImageDataModule, steps: int = 7, every: int = 3) -> None:
    callback = SampleImages(every_n_iterations=every, num_samples=4, walk_steps=3)
    logger = TensorBoardLogger(folder, name="", version="")
    trainer(folder, callback, max_steps=steps, limit_val_batches=0, logger=logger).fit(gan, datamodule=digits)


def digit_gan() -> GAN:
    return tiny(image_shape=(1, 28, 28), g_lr=0.05, ema_decay=0.9)


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def expected(gan: GAN, weights: Weights, folder: Path) -> np.ndarray:
    with gan.sampler(weights) as sampler:
        save_png(grid(sampler.samples(0, 4)), folder / "expected.png")
    return drawn(folder / "expected.png")


def test_pictures_are_shown_of_the_untrained_every_nth_and_the_final_generator(digits: ImageDataModule, tmp_path: Path) -> None:
    fit(tmp_path, digit_gan(), digits)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    shown = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    iterations = [0, 3, 6, 7]
    assert shown == {"samples/fixed_z": iterations, "samples/interpolation": iterations, "samples/real": [0]}
    names = {f"{kind}-{number:06d}.png" for kind in ("iteration", "interpolation") for number in iterations}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {*names, "real.png"}


def test_final_picture_is_drawn_once_where_it_was_due(digits: ImageDataModule, tmp_path: Path) -> None:
    fit(tmp_path, digit_gan(), digits, steps=6)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("samples/fixed_z")] == [0, 3, 6]


def test_samples_are_those_of_the_moving_average(digits: ImageDataModule, tmp_path: Path) -> None:
    gan = digit_gan()
    fit(tmp_path, gan, digits)
    found = drawn(tmp_path / "samples" / "iteration-000007.png")
    assert np.abs(found - expected(gan, "ema", tmp_path)).max() <= 1
    assert np.abs(found - expected(gan, "raw", tmp_path)).max() > 10
    assert np.abs(found - drawn(tmp_path / "samples" / "iteration-000000.png")).max() > 10


def test_walk_has_a_row_for_each_pair_of_latents_and_its_ends_differ(digits: ImageDataModule, tmp_path: Path) -> None:
    fit(tmp_path, digit_gan(), digits)
    walk = drawn(tmp_path / "samples" / "interpolation-000007.png")
    cell = 56 + 2  # digits are shown at twice their size, with two pixels between them
    assert walk.shape[:2] == (4 * cell + 2, 3 * cell + 2)
    first, last = walk[2:58, 2:58], walk[2:58, 2 * cell + 2 : 2 * cell + 58]
    assert np.abs(first - last).max() > 1


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_walk_begins_at_the_sample_of_its_first_latent(
    statistics: EvalStatistics, digits: ImageDataModule, tmp_path: Path
) -> None:
    gan = tiny(image_shape=(1, 28, 28), g_lr=0.05, ema_decay=0.9, eval_statistics=statistics)
    fit(tmp_path, gan, digits)
    walks = drawn(tmp_path / "samples" / "interpolation-000007.png")
    with gan.sampler() as sampler:
        # The grid shows 4 samples, and each walk goes from one of the next to another.
        first = sampler.samples(4, 12)[0::2]
        alone = sampler.generate(gan.sample_latents(4, 12))[0::2]
    for expected, same in ((first, True), (alone, statistics == "running")):
        save_png(grid(expected, columns=1), tmp_path / "column.png")
        column = drawn(tmp_path / "column.png")
        assert (np.abs(walks[:, : column.shape[1]] - column).max() <= 1) == same


def test_real_picture_is_of_held_out_images(digits: ImageDataModule, tmp_path: Path) -> None:
    fit(tmp_path, digit_gan(), digits, steps=1)
    found = drawn(tmp_path / "samples" / "real.png")
    for train in (True, False):
        save_png(grid(to_minus1_1(digits.subset(4, train=train).images)), tmp_path / "subset.png")
        assert np.array_equal(found, drawn(tmp_path / "subset.png")) == (not train)


def test_drawing_leaves_training_as_it_is(digits: ImageDataModule, tmp_path: Path) -> None:
    looked_at, alone = digit_gan(), digit_gan()
    fit(tmp_path, looked_at, digits, every=1)
    trainer(tmp_path, max_steps=7, limit_val_batches=0).fit(alone, datamodule=digits)
    for name, value in alone.state_dict().items():
        assert torch.equal(looked_at.state_dict()[name], value), name


def test_run_without_bngans_data_shows_no_real_picture(tmp_path: Path) -> None:
    trainer(tmp_path, SampleImages(num_samples=4), max_steps=2).fit(tiny(), images())
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert "iteration-000002.png" in names
    assert "real.png" not in names


def test_predicted_samples_are_written_under_their_numbers(
    digits: ImageDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gan = digit_gan()
    trainer(tmp_path, SampleImages()).predict(gan, datamodule=digits)
    assert str(tmp_path / "samples") in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [f"{number:06d}.png" for number in range(5)]
    with gan.sampler() as sampler:
        samples = sampler.samples(0, 5)
    for number, image in enumerate(samples):
        save_png(image, tmp_path / "one.png")
        assert np.abs(drawn(tmp_path / "samples" / f"{number:06d}.png") - drawn(tmp_path / "one.png")).max() <= 1
    assert np.abs(drawn(tmp_path / "samples" / "000000.png") - drawn(tmp_path / "samples" / "000001.png")).max() > 1


@pytest.mark.parametrize("setting", ["every_n_iterations", "num_samples", "walk_steps"])
def test_numbers_below_one_are_refused_by_name(setting: str) -> None:
    with pytest.raises(UsageError, match=rf"images\.{setting} must be at least 1, got 0"):
        SampleImages(**{setting: 0})
    SampleImages(**{setting: 1})


def test_grid_has_a_row_for_each_class_and_a_column_for_each_latent(digits: ImageDataModule, tmp_path: Path) -> None:
    gan = tiny(image_shape=(1, 28, 28), classes=10)
    callback = SampleImages(num_samples=34, walk_steps=3)
    trainer(tmp_path, callback, max_steps=1, limit_val_batches=0).fit(gan, datamodule=digits)
    with gan.sampler() as sampler:
        rows = [sampler.samples(0, 3, label=label) for label in range(10)]
        walk = sampler.walk(34, 35, steps=3, label=34 % 10)
    save_png(grid(torch.cat(rows), columns=3), tmp_path / "expected.png")
    assert np.array_equal(drawn(tmp_path / "samples" / "iteration-000001.png"), drawn(tmp_path / "expected.png"))
    save_png(grid(walk, columns=3), tmp_path / "walk.png")
    expected = drawn(tmp_path / "walk.png")
    assert np.array_equal(drawn(tmp_path / "samples" / "interpolation-000001.png")[: len(expected) - 2], expected[:-2])
