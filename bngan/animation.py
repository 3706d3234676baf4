"""How do pictures become a film?"""

import re
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw

from bngan.errors import UsageError
from bngan.files import write_whole

FILMS = (".gif", ".mp4")
LEAST_SIDE = 224  # pixels; smaller pictures are enlarged
CAPTION = 16  # pixels below a picture
PICTURE = re.compile(r"iteration-(\d+)\.png")


def check_film(path: Path) -> None:
    """Refuse what no film can be written as.

    Raises:
        UsageError: if the suffix is another, or the package that an .mp4 needs is not installed.
    """
    if path.suffix.lower() not in FILMS:
        raise UsageError(f"--output {path}: a film is a {' or a '.join(FILMS)}, not {path.suffix or 'a folder'}")
    if path.suffix.lower() == ".mp4" and find_spec("imageio_ffmpeg") is None:
        raise UsageError("an .mp4 needs imageio-ffmpeg; install it by pip install 'bngan[video]', or choose .gif")


def write_film(pictures: list[Image.Image], path: Path, per_second: int) -> None:
    """Write pictures of one size as a .gif that starts over at its end, or as an .mp4; it is there as a whole or not at all.

    Args:
        pictures: one after the other.
        path: of the film.
        per_second: how many of them are shown in a second.

    Raises:
        OSError: if there is no room or no right to.
    """
    width, height = pictures[0].size
    scale = max(1, LEAST_SIDE // min(width, height))
    size = (scale * width, scale * height)
    frames = [picture.convert("RGB").resize(size, Image.Resampling.NEAREST) for picture in pictures]
    write_whole(path, _mp4(frames, per_second) if path.suffix.lower() == ".mp4" else _gif(frames, per_second))


def _gif(frames: list[Image.Image], per_second: int) -> bytes:
    content = BytesIO()
    frames[0].save(content, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / per_second), loop=0)
    return content.getvalue()


def _mp4(frames: list[Image.Image], per_second: int) -> bytes:
    from imageio_ffmpeg import write_frames  # pyright: ignore[reportMissingImports]  # an extra

    with TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        # Players want even sides, and some of them no others than whole macroblocks.
        film = write_frames(str(path), frames[0].size, fps=per_second, macro_block_size=2)
        film.send(None)
        for frame in frames:
            film.send(frame.tobytes())
        film.close()
        return path.read_bytes()


def pictures_of_training(run: Path) -> list[Image.Image]:
    """Return what a run's G made of the same latents as training went on, with the iteration below each picture.

    Raises:
        UsageError: if the run has no two such pictures, or one is damaged.
    """
    paths = {int(match[1]): path for path in (run / "samples").glob("*") if (match := PICTURE.fullmatch(path.name))}
    if len(paths) < 2:
        raise UsageError(
            f"pictures named iteration-*.png in {run / 'samples'}: {len(paths)}, and a film needs two; fit draws them every "
            "--images.every_n_iterations"
        )
    return [_captioned(paths[iteration], iteration) for iteration in sorted(paths)]


def _captioned(path: Path, iteration: int) -> Image.Image:
    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise UsageError(f"{path} cannot be read as a picture; move it away") from error
    captioned = Image.new("RGB", (picture.width, picture.height + CAPTION), color="white")
    captioned.paste(picture, (0, 0))
    place = (4, captioned.height - CAPTION + 2)
    ImageDraw.Draw(captioned).text(place, f"iteration {iteration:,}", fill="black")
    return captioned
