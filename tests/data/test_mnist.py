"""MNIST's files: carried in the package, verified, laid out whole where torchvision looks for them."""

import errno
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision import datasets

from bngan.data import mnist
from bngan.errors import UsageError

SMALL = "t10k-labels-idx1-ubyte"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make the package hold only its smallest file, in a folder of its own that a test may damage."""
    packaged = tmp_path / "packaged"
    packaged.mkdir()
    shutil.copy(mnist.PACKAGED / f"{SMALL}.xz", packaged)
    monkeypatch.setattr(mnist, "PACKAGED", packaged)
    monkeypatch.setattr(mnist, "MD5", {SMALL: mnist.MD5[SMALL]})
    return packaged / f"{SMALL}.xz"


def test_mnist_is_laid_out_as_four_files_that_torchvision_reads(mnist_root: Path) -> None:
    # Beside MNIST's folder other tests may have left the floors of their metrics.
    assert sorted(contents(mnist_root / "MNIST")) == sorted(f"raw/{name}" for name in mnist.MD5)
    assert len(mnist.MD5) == 4
    for train, images in ((True, 60_000), (False, 10_000)):
        assert len(datasets.MNIST(str(mnist_root), train=train)) == images


def test_files_that_are_there_already_are_kept(small: Path, tmp_path: Path) -> None:
    mnist.lay_out(tmp_path)
    (file,) = (tmp_path / "MNIST" / "raw").iterdir()
    os.utime(file, (1_000_000, 1_000_000))
    before = file.stat()
    mnist.lay_out(tmp_path)
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    file.unlink()
    mnist.lay_out(tmp_path)
    assert file.stat().st_mtime_ns != before.st_mtime_ns


def test_a_damaged_file_in_the_folder_is_named_with_what_to_do(small: Path, tmp_path: Path) -> None:
    mnist.lay_out(tmp_path)
    file = tmp_path / "MNIST" / "raw" / SMALL
    good = file.read_bytes()
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b""):
        file.write_bytes(bad)
        with pytest.raises(UsageError, match=f"{file} is corrupt; delete it and it is made anew"):
            mnist.lay_out(tmp_path)
        assert file.read_bytes() == bad
    file.unlink()
    mnist.lay_out(tmp_path)
    assert file.read_bytes() == good


def test_a_damaged_packaged_file_is_named_and_nothing_is_written(small: Path, tmp_path: Path) -> None:
    good = small.read_bytes()
    other = lzma.compress(lzma.decompress(good)[:-1] + b"x")
    root = tmp_path / "root"
    for bad in (good[: len(good) // 2], good[:100] + bytes(8) + good[108:], other, b""):
        small.write_bytes(bad)
        with pytest.raises(UsageError, match=f"{small} is (missing or )?corrupt; reinstall bngan"):
            mnist.lay_out(root)
        assert contents(root) == {}
    small.unlink()
    with pytest.raises(UsageError, match=f"{small} is missing or corrupt; reinstall bngan"):
        mnist.lay_out(root)
    small.write_bytes(good)
    mnist.lay_out(root)
    assert list(contents(root)) == [f"MNIST/raw/{SMALL}"]


def test_a_file_appears_whole_or_not_at_all(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace
    moved = []

    def interrupted(source: str, target: Path) -> None:
        moved.append((Path(source).read_bytes(), target.exists()))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mnist.lay_out(tmp_path / "root")
    assert moved == [(lzma.decompress(small.read_bytes()), False)]  # complete before it got its name
    assert contents(tmp_path / "root") == {}
    monkeypatch.setattr(os, "replace", replace)
    mnist.lay_out(tmp_path / "root")
    assert list(contents(tmp_path / "root")) == [f"MNIST/raw/{SMALL}"]


def test_a_full_disk_leaves_no_partial_file(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)  # called after the content is written
        with pytest.raises(UsageError, match=r"root/MNIST/raw cannot be written \(No space left on device\); make room"):
            mnist.lay_out(tmp_path / "root")
    assert contents(tmp_path / "root") == {}


def test_a_folder_that_cannot_be_used_is_named_with_what_to_do(small: Path, tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    with pytest.raises(UsageError, match=f"{occupied}/MNIST/raw cannot be written .*; .* another folder by --data.root"):
        mnist.lay_out(occupied)
    occupied.unlink()
    mnist.lay_out(occupied)


def test_processes_that_start_together_do_not_disturb_one_another(mnist_root: Path, tmp_path: Path) -> None:
    # Loading mnist.py by itself spares each process the seconds that importing bngan.data takes.
    program = (
        "import runpy, sys, pathlib; lay_out = runpy.run_path(sys.argv[1])['lay_out']; "
        "print('ready', flush=True); sys.stdin.readline(); lay_out(pathlib.Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, mnist.__file__, str(tmp_path)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"MNIST"}
    assert contents(tmp_path / "MNIST") == contents(mnist_root / "MNIST")
