"""From tensors to pictures and back: ranges, grids, PNG files, walks between latents."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from bngan.errors import NonFiniteLoss, UsageError
from bngan.images import check_range, grid, save_png, slerp, to_minus1_1, to_uint8, write_images


def test_bytes_map_to_minus_1_to_1_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    mapped = to_minus1_1(levels)
    assert mapped.dtype == torch.float32
    assert (mapped[0], mapped[255]) == (-1, 1)
    assert (mapped.diff() - 2 / 255).abs().max() < 1e-6
    assert torch.equal(to_uint8(mapped), levels)
    assert torch.equal(levels, torch.arange(256, dtype=torch.uint8)), "they were left as they are"


def test_values_between_two_bytes_go_to_the_nearest() -> None:
    levels = torch.arange(1, 255)
    for off, nearest in ((0.4, 0), (-0.4, 0), (0.6, 1), (-0.6, -1)):
        assert torch.equal(to_uint8((levels + off) / 127.5 - 1), (levels + nearest).to(torch.uint8))


def test_values_beyond_the_range_go_to_its_ends() -> None:
    assert to_uint8(torch.tensor([-3.0, -1.01, 1.01, 3.0], requires_grad=True)).tolist() == [0, 0, 255, 255]


def test_values_that_are_none_are_refused(tmp_path: Path) -> None:
    images = torch.zeros(2, 1, 4, 4)
    assert to_uint8(images).unique().tolist() == [128]
    images[1, 0, 2, 3] = math.nan
    for write in (to_uint8, lambda images: save_png(grid(images), tmp_path / "a.png")):
        with pytest.raises(NonFiniteLoss, match=r"images have NaN values.*earlier checkpoint"):
            write(images)
    assert not list(tmp_path.iterdir())


def test_images_beyond_the_range_are_refused_and_those_of_half_of_it_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    images = torch.rand(4, 1, 8, 8)
    for beyond in (images * 255, images - 2):
        with pytest.raises(UsageError, match=r"must be in \[-1, 1\], and these reach from .* add Normalize"):
            check_range(beyond)
    check_range(2 * images - 1)
    assert capsys.readouterr().out == ""
    check_range(images)
    assert "No pixel of the first batch is below 0" in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_tiles_images_row_by_row(channels: int) -> None:
    images = torch.linspace(-1, 1, 6).reshape(6, 1, 1, 1).repeat(1, channels, 64, 64)
    tiled = grid(images, columns=3)
    assert tiled.shape == (3, 2 * 66 + 2, 3 * 66 + 2)  # a border of 2 around each; grey comes in three channels
    for number, image in enumerate(images):
        row, column = divmod(number, 3)
        tile = tiled[:, 2 + 66 * row :, 2 + 66 * column :][:, :64, :64]
        assert (tile == image[0, 0, 0]).all()
    assert (tiled[:, :2] == -0.5).all()
    assert (tiled[:, :, -2:] == -0.5).all()


@pytest.mark.parametrize(("count", "columns"), [(64, 8), (16, 4), (10, 3), (1, 1)])
def test_grid_is_about_square(count: int, columns: int) -> None:
    width = grid(torch.zeros(count, 1, 60, 60)).shape[2]
    assert width == (60 if count == 1 else columns * 62 + 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("count", "columns"), [(1, None), (5, None), (7, 3), (2, 8), (12, 12)])
def test_grid_is_torchvisions(count: int, columns: int | None, channels: int) -> None:
    images = torch.rand(count, channels, 60, 57, generator=torch.Generator().manual_seed(0))
    expected = make_grid(images, nrow=columns or round(count**0.5), padding=2, pad_value=-0.5)
    assert torch.equal(grid(images, columns), expected)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_numbers_are_written_part_by_part(suffix: str, tmp_path: Path) -> None:
    images = to_minus1_1(torch.randint(256, (20, 3, 5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    write_images(iter(images.split(7)), tmp_path / f"a{suffix}", "numbers", count=20)
    found = np.load(tmp_path / f"a{suffix}")
    numbers = found if suffix == ".npy" else found["images"]
    assert np.array_equal(numbers, to_uint8(images).numpy())
    assert numbers.dtype == np.uint8


@pytest.mark.parametrize("kind", ["numbers", "grid"])
def test_file_is_there_as_a_whole_or_as_it_was(kind: Any, tmp_path: Path) -> None:
    def broken() -> Iterator[Tensor]:
        yield torch.zeros(2, 1, 4, 4)
        raise KeyboardInterrupt

    path = tmp_path / ("a.npy" if kind == "numbers" else "a.png")
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_images(broken(), path, kind, count=4)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_no_folder_is_made_for_images_that_do_not_come(tmp_path: Path) -> None:
    write_images(iter([]), tmp_path / "a", "folder", count=0)
    assert not list(tmp_path.iterdir())
    write_images(torch.zeros(3, 1, 4, 4).split(2), tmp_path / "a", "folder", count=3)
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == ["000000.png", "000001.png", "000002.png"]


@pytest.mark.parametrize(("size", "shown"), [(8, 56), (19, 38), (28, 56), (29, 29), (56, 56), (64, 64)])
def test_small_images_are_enlarged(size: int, shown: int) -> None:
    images = torch.rand(2, 1, size, size)
    tile = grid(images, columns=2)[:, 2:-2, 2 : 2 + shown]
    assert tile.shape == (3, shown, shown)
    scale = shown // size
    assert torch.equal(tile[0, ::scale, ::scale], images[0, 0])
    assert torch.equal(tile[0, scale - 1 :: scale, scale - 1 :: scale], images[0, 0])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_holds_the_pixels(channels: int, mode: str, tmp_path: Path) -> None:
    pixels = torch.randint(256, (channels, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_png(to_minus1_1(pixels), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert (image.mode, image.size) == (mode, (7, 5))
        assert np.array_equal(np.asarray(image).reshape(5, 7, channels), pixels.permute(1, 2, 0).numpy())


def test_walks_go_from_end_to_end_one_after_the_other() -> None:
    start, end = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0))
    walks = slerp(start, end, steps=5).view(3, 5, 100)
    torch.testing.assert_close(walks[:, 0], start)
    torch.testing.assert_close(walks[:, -1], end)


@pytest.mark.parametrize("degrees", [2, 90, 175])
def test_a_walk_is_along_a_great_circle(degrees: float) -> None:
    angles = torch.linspace(0, math.radians(degrees), 4, dtype=torch.float64)
    circle = 2 * torch.stack([angles.cos(), angles.sin(), torch.zeros(4)], dim=1)
    walk = slerp(circle[:1], circle[-1:], steps=4)
    torch.testing.assert_close(walk, circle, rtol=0, atol=1e-9)
    straight = torch.lerp(circle[0], circle[-1], 0.5)
    assert straight.norm() < 2 - 1e-4, "which a straight line is not"


def test_a_walk_to_the_same_or_the_opposite_latent_is_finite() -> None:
    start = torch.tensor([[1.0, 2.0]])
    for end in (start, -start):
        assert slerp(start, end, steps=3).isfinite().all()
    torch.testing.assert_close(slerp(start, start, steps=3), start.expand(3, 2), rtol=1e-3, atol=1e-3)
