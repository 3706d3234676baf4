"""Films: every picture in its order, for as long as it should be seen, and of a run what its G made as training went on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bngan import animation
from bngan.animation import CAPTION, LEAST_SIDE, check_film, pictures_of_training, write_film
from bngan.errors import UsageError


def pictures(side: int = 28) -> list[Image.Image]:
    """Return a black, a grey and a white picture."""
    return [Image.new("L", (side, side), color=level) for level in (0, 128, 255)]


def test_gif_shows_the_pictures_enlarged_and_starts_over(tmp_path: Path) -> None:
    write_film(pictures(), tmp_path / "a.gif", per_second=4)
    with Image.open(tmp_path / "a.gif") as film:
        assert (film.info["duration"], film.info["loop"]) == (250, 0)
        assert film.size == (LEAST_SIDE, LEAST_SIDE)
        levels = []
        for number in range(getattr(film, "n_frames", 1)):
            film.seek(number)
            levels.append(int(np.asarray(film.convert("L")).mean().round()))
    assert levels == [0, 128, 255]


def test_large_pictures_stay_as_they_are(tmp_path: Path) -> None:
    write_film(pictures(side=300), tmp_path / "a.gif", per_second=4)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.size == (300, 300)


@pytest.mark.parametrize("side", [28, 301])
def test_mp4_shows_the_pictures(side: int, tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    write_film(pictures(side), tmp_path / "a.mp4", per_second=10)
    frames = ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    about = next(frames)
    levels = [np.frombuffer(frame, dtype=np.uint8).mean() for frame in frames]
    assert about["fps"] == 10
    assert levels == pytest.approx([0, 128, 255], abs=6)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_what_is_no_film_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_film(Path("a.GIF"))
    for path, words in (("a.avi", "a film is a .gif or a .mp4, not .avi"), ("a", "not a folder")):
        with pytest.raises(UsageError, match=words):
            check_film(Path(path))
    monkeypatch.setattr(animation, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"imageio-ffmpeg; install it by pip install 'bngan\[video\]', or choose .gif"):
        check_film(Path("a.mp4"))


def test_pictures_of_training_are_in_its_order_and_say_their_iteration(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    for iteration, level in ((1000, 100), (0, 50), (1_000_000, 150)):
        Image.new("L", (60, 40), color=level).save(tmp_path / "samples" / f"iteration-{iteration:06d}.png")
    for other in ("real.png", "iteration-5 (copy).png"):
        Image.new("L", (60, 40)).save(tmp_path / "samples" / other)
    found = pictures_of_training(tmp_path)
    assert [picture.getpixel((0, 0)) for picture in found] == [(level,) * 3 for level in (50, 100, 150)]
    assert {picture.size for picture in found} == {(60, 40 + CAPTION)}
    captions = [np.asarray(picture)[40:].astype(int) for picture in found]
    assert all((caption == 255).any() and (caption < 64).any() for caption in captions)
    assert not np.array_equal(captions[0], captions[1])


def test_run_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "samples" / "iteration-000000.png")
    with pytest.raises(UsageError, match=r"iteration-\*.png in .*: 1, and a film needs two; .*--images.every_n_iterations"):
        pictures_of_training(tmp_path)
