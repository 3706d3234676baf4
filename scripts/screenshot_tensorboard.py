"""Open a run's TensorBoard page in headless Chromium and keep pictures of it.

    python scripts/screenshot_tensorboard.py runs --output docs

Writes tensorboard-images.png and tensorboard-batchnorm.png. Needs Chromium (Debian: apt-get install chromium).
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Page and height of the window; batch norm's plots come behind those of the networks and of quality.
VIEWS = {"images": ("#images", 1300), "batchnorm": ("#custom_scalars", 2500)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with served(args.logdir) as address:
        for name, (view, height) in VIEWS.items():
            path = (args.output / f"tensorboard-{name}.png").resolve()
            browse(f"{address}/{view}", f"--screenshot={path}", f"--window-size=1400,{height}")
            print(path)


@contextmanager
def served(logdir: Path) -> Iterator[str]:
    """Serve a folder of runs by TensorBoard and yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port), "--load_fast=false"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{port}"
    try:
        wait_until_loaded(address)
        yield address
    finally:
        server.terminate()
        server.wait()


def wait_until_loaded(address: str, seconds: float = 60.0) -> None:
    """Wait until the server knows the same tags twice in a row: it shows runs before it has read them.

    Raises:
        TimeoutError: if it has found nothing by then.
    """
    known = b""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(1)
        try:
            with urllib.request.urlopen(f"{address}/data/plugin/images/tags", timeout=5) as answer:
                tags = answer.read()
        except OSError:
            continue
        if tags == known and len(tags) > len(b"{}"):
            return
        known = tags
    raise TimeoutError(f"TensorBoard found no pictures within {seconds:.0f} s")


def browse(address: str, *options: str) -> str:
    """Open a page, let it settle, and return what Chromium prints."""
    browser = chromium()
    if browser is None:
        raise FileNotFoundError("there is no Chromium here; install it (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=30000",
            *options,
            address,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout


def chromium() -> str | None:
    """Return the browser's path, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


if __name__ == "__main__":
    main()
