"""What a person sees who opens TensorBoard in a browser."""

from pathlib import Path

import pytest
from screenshot_tensorboard import browse, chromium, served

from tests.conftest import QUICK, Command

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")


def test_page_shows_samples_and_batch_norm(train: Command, mnist_root: Path, tmp_path: Path) -> None:
    settings = ("--images.every_n_iterations=5", "--batchnorm.every_n_iterations=5", f"--data.root={mnist_root}")
    assert train("fit", *QUICK, *settings, cwd=tmp_path).returncode == 0
    with served(tmp_path / "runs") as address:
        pictures = browse(f"{address}/?tagFilter=samples#timeseries", "--dump-dom")
        for tag in ("samples/fixed_z", "samples/interpolation", "samples/real"):
            assert tag in pictures
        assert 'alt="Image at step 10" src="data/plugin/timeseries/imageData' in pictures
        statistics = browse(f"{address}/?tagFilter=bn/generator.net.1/#timeseries", "--dump-dom")
        for tag in ("running_mean/mean", "running_var/max", "divergence", "gamma", "beta"):
            assert f"bn/generator.net.1/{tag}" in statistics
        assert "samples/fixed_z" not in statistics
