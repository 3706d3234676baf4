"""The data sets by name: read from where torchvision puts them, in no more memory than they take."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torchvision import datasets

from bngan.data import ImageDataModule
from bngan.data.datasets import DATASETS, Downloaded, read_idx
from bngan.errors import UsageError


def write_idx(path: Path, content: Tensor) -> None:
    """Write bytes as MNIST's files hold them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = [0x800 + content.ndim, *content.shape]
    path.write_bytes(b"".join(number.to_bytes(4, "big") for number in header) + content.numpy().tobytes())


def write_downloaded(raw: Path, count: int, prefixes: tuple[str, str] = ("train", "t10k"), first_class: int = 0) -> Tensor:
    """Put a small data set where torchvision would, an image a class; return its training images (N, 28, 28)."""
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
    for prefix, some in zip(prefixes, (images, images[:3]), strict=True):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", some)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", first_class + torch.arange(len(some), dtype=torch.uint8))
    return images


def test_mnists_labels_have_the_published_counts(mnist_root: Path) -> None:
    train, test = (DATASETS["mnist"].load(mnist_root, train=train) for train in (True, False))
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)


def test_files_are_read_as_torchvision_reads_them(mnist_root: Path) -> None:
    for train in (True, False):
        theirs, ours = datasets.MNIST(str(mnist_root), train=train), DATASETS["mnist"].load(mnist_root, train=train)
        assert torch.equal(ours.images[:, 0], theirs.data)
        assert torch.equal(ours.labels, theirs.targets)


def test_downloaded_sets_are_read_from_where_torchvision_puts_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are not downloaded again; EMNIST's images, which lie on their side, are stood upright, and letters count from 0."""
    monkeypatch.setattr("bngan.data.datasets.CHUNK", 2)
    lying = {}
    for split in ("letters", "balanced", "digits"):
        prefixes = (f"emnist-{split}-train", f"emnist-{split}-test")
        lying[f"emnist_{split}"] = write_downloaded(tmp_path / "EMNIST" / "raw", 5, prefixes, split == "letters")
    upright = {
        "kmnist": write_downloaded(tmp_path / "KMNIST" / "raw", 5),
        "fashion_mnist": write_downloaded(tmp_path / "FashionMNIST" / "raw", 5),
        **{name: images.mT for name, images in lying.items()},
    }
    for name, expected in upright.items():
        DATASETS[name].prepare(tmp_path)
        assert torch.equal(DATASETS[name].load(tmp_path, train=True).images[:, 0], expected)
        images, labels = DATASETS[name].load(tmp_path, train=False)
        assert torch.equal(images[:, 0], expected[:3])
        assert labels.dtype == torch.int64
        assert labels.tolist() == [0, 1, 2]


def test_a_damaged_data_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_idx(path, torch.arange(24, dtype=torch.uint8).view(2, 3, 4))
    good = path.read_bytes()
    assert torch.equal(read_idx(path, 3), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))
    huge = good[:4] + b"\xff" * 12 + good[16:]
    for bad in (b"", b"\0", good[:4], good[:15], good[:16], good[:-1], good + b"\0", b"\0\0\r" + good[3:], huge, bytes(40)):
        path.write_bytes(bad)
        with pytest.raises(UsageError, match=f"{path} is damaged .*; delete it, and the next run puts it there anew"):
            read_idx(path, 3)
    path.write_bytes(good)
    with pytest.raises(UsageError, match="does not begin like bytes in 1 dimensions"):
        read_idx(path, 1)
    path.unlink()
    with pytest.raises(UsageError, match=rf"{path} cannot be read \(No such file .*\); .* another folder by --data.root"):
        read_idx(path, 3)


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "KMNIST" / "raw"
    write_downloaded(raw, 5)
    write_idx(raw / "train-labels-idx1-ubyte", torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte holds 5 images and .*train-labels-idx1-ubyte 4 labels"):
        DATASETS["kmnist"].load(tmp_path, train=True)
    assert len(DATASETS["kmnist"].load(tmp_path, train=False).images) == 3


def peak_mb() -> float:
    """The most memory that this process has had since the kernel was told to forget it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="the peak of memory is read from /proc")
def test_images_take_no_more_memory_than_their_own_size(tmp_path: Path) -> None:
    megabytes, raw = 256, tmp_path / "EMNIST" / "raw"
    count = megabytes * 2**20 // 28**2
    write_downloaded(raw, 5, ("emnist-digits-train", "emnist-digits-test"))
    with (raw / "emnist-digits-train-images-idx3-ubyte").open("wb") as file:
        file.write(b"".join(number.to_bytes(4, "big") for number in (0x803, count, 28, 28)))
        file.truncate(16 + count * 28**2)
    write_idx(raw / "emnist-digits-train-labels-idx1-ubyte", torch.zeros(count, dtype=torch.uint8))
    DATASETS["emnist_digits"].load(tmp_path, train=False)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_mb()
    DATASETS["emnist_digits"].load(tmp_path, train=True)
    assert 0.9 * megabytes <= peak_mb() - before <= 1.1 * megabytes


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_failed_download_says_which_where_and_what_to_do(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: object, **settings: object) -> None:
        assert settings["download"], "prepare should download"
        raise kind("name resolution failed")

    for name in ("FashionMNIST", "KMNIST", "EMNIST"):
        monkeypatch.setattr(datasets, name, unreachable)
    for name, title in (("fashion_mnist", "Fashion-MNIST"), ("kmnist", "KMNIST"), ("emnist_digits", "EMNIST digits")):
        data = ImageDataModule(cast(Any, name), root=str(tmp_path))
        with pytest.raises(UsageError, match=f"{title} could not be downloaded into {tmp_path} .*failed.*copy the files"):
            data.prepare_data()


def test_a_mistake_in_the_program_is_no_failed_download(tmp_path: Path) -> None:
    def mistaken(root: str, train: bool) -> None:
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        Downloaded("Anything", "Anything", mistaken).prepare(tmp_path)
