"""What a person sees who opens TensorBoard in a browser."""

from pathlib import Path

import pytest
from screenshot_tensorboard import browse, chromium, served

from tests.conftest import QUICK, Command

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")

PICTURE = 'alt="Image at step {}" src="data/plugin/timeseries/imageData'


def card(tag: str) -> str:
    """Return how the page heads the card of a tag; the filter's text stands elsewhere."""
    return f'title="{tag}"'


def look(address: str, tag: str) -> str:
    """Return the page filtered by a tag; it fills itself bit by bit, so look again if the card is not there yet."""
    page = ""
    for _ in range(4):
        page = browse(f"{address}/?tagFilter={tag}#timeseries", "--dump-dom", "--window-size=1400,1600")
        if card(tag) in page:
            break
    return page


def test_page_shows_samples_and_batch_norm(train: Command, mnist_root: Path, tmp_path: Path) -> None:
    settings = ("--images.every_n_iterations=5", "--batchnorm.every_n_iterations=5", f"--data.root={mnist_root}")
    assert train("fit", *QUICK, *settings, cwd=tmp_path).returncode == 0
    with served(tmp_path / "runs") as address:
        for tag, step in (("samples/fixed_z", 10), ("samples/interpolation", 10), ("samples/real", 0)):
            page = look(address, tag)
            assert card(tag) in page
            assert PICTURE.format(step) in page
        for quantity in ("running_mean/mean", "running_var/max", "kl_to_running"):
            tag = f"bn/generator.net.1/{quantity}"
            page = look(address, tag)
            assert card(tag) in page
            assert card("samples/fixed_z") not in page
        assert card("no/such/tag") not in look(address, "no/such/tag")
