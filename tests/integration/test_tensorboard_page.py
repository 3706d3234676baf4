"""What a person sees who opens TensorBoard in a browser."""

from pathlib import Path
from urllib.parse import quote

import pytest
from screenshot_tensorboard import browse, chromium, served

from bngan.cli import main
from tests.conftest import QUICK

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")

PICTURE = 'alt="Image at step {}" src="data/plugin/timeseries/imageData'


def card(tag: str) -> str:
    """Return how the page heads the card of a tag; the filter's text stands elsewhere."""
    return f'title="{tag}"'


def look(address: str, tags: list[str]) -> str:
    """Return the page of these tags alone; it fills itself bit by bit, so look again if a card is not there yet."""
    page = ""
    for _ in range(4):
        page = browse(f"{address}/?tagFilter={quote('|'.join(tags))}#timeseries", "--dump-dom", "--window-size=1400,1600")
        if all(card(tag) in page for tag in tags):
            break
    return page


def test_page_shows_samples_and_batch_norm(mnist_root: Path, tmp_path: Path) -> None:
    settings = ("--images.every_n_iterations=5", "--batchnorm.every_n_iterations=5", f"--data.root={mnist_root}")
    assert main(["fit", *QUICK, *settings, f"--trainer.default_root_dir={tmp_path / 'runs'}"]) == 0
    pictures = {"samples/fixed_z": 10, "samples/interpolation": 10, "samples/real": 0}
    plots = [f"bn/generator.net.1/{quantity}" for quantity in ("running_mean/mean", "running_var/max", "kl_to_running")]
    with served(tmp_path / "runs") as address:
        page = look(address, list(pictures))
        for tag, step in pictures.items():
            assert card(tag) in page
            assert PICTURE.format(step) in page
        for tag in plots:
            assert card(tag) not in page
        page = look(address, plots)
        for tag in plots:
            assert card(tag) in page
        assert card("samples/fixed_z") not in page
