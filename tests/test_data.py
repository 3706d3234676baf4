"""From files to batches: MNIST's files, the module, which rows each rank sees, and a person's own pictures."""

import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision import datasets

from bngan import distributed
from bngan.data import ImageDataModule, mnist
from bngan.data.datasets import DATASETS, Downloaded, Labelled, read_idx
from bngan.data.folder import Pictures
from bngan.data.loader import PictureLoader, ShardedBatches, TensorLoader, to_unit_range
from tests.conftest import REPOSITORY

Loader = TensorLoader | PictureLoader


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# MNIST's files --------------------------------------------------------------------------------------------------------

SMALL = "t10k-labels-idx1-ubyte"


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


def test_mnists_labels_have_the_published_counts(mnist_root: Path) -> None:
    train, test = (DATASETS["mnist"].load(mnist_root, train=train) for train in (True, False))
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)


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
        with pytest.raises(ValueError, match=f"{file} is corrupt; delete it and it is made anew"):
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
        with pytest.raises(ValueError, match=f"{small} is corrupt; reinstall bngan"):
            mnist.lay_out(root)
        assert contents(root) == {}
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
    def full(descriptor: int, mode: int) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fchmod", full)  # called after the content is written
        with pytest.raises(OSError, match="No space left"):
            mnist.lay_out(tmp_path / "root")
    assert contents(tmp_path / "root") == {}


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


# The data sets by name ------------------------------------------------------------------------------------------------


def write_idx(path: Path, content: Tensor) -> None:
    """Write bytes as MNIST's files hold them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = [0x800 + content.ndim, *content.shape]
    path.write_bytes(b"".join(number.to_bytes(4, "big") for number in header) + content.numpy().tobytes())


def write_downloaded(raw: Path, count: int, prefixes: tuple[str, str] = ("train", "t10k")) -> Tensor:
    """Put a small data set where torchvision would; return its training images (N, 28, 28)."""
    images = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)
    for prefix, some in zip(prefixes, (images, images[:3]), strict=True):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", some)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", torch.arange(len(some), dtype=torch.uint8))
    return images


def test_files_are_read_as_torchvision_reads_them(mnist_root: Path) -> None:
    for train in (True, False):
        theirs, ours = datasets.MNIST(str(mnist_root), train=train), DATASETS["mnist"].load(mnist_root, train=train)
        assert torch.equal(ours.images[:, 0], theirs.data)
        assert torch.equal(ours.labels, theirs.targets)


def test_downloaded_sets_are_read_from_where_torchvision_puts_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are not downloaded again; EMNIST's images, which lie on their side, are stood upright."""
    monkeypatch.setattr("bngan.data.datasets.CHUNK", 2)
    lying = {}
    for split in ("letters", "balanced", "digits"):
        prefixes = (f"emnist-{split}-train", f"emnist-{split}-test")
        lying[f"emnist_{split}"] = write_downloaded(tmp_path / "EMNIST" / "raw", 5, prefixes)
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
        with pytest.raises(ValueError, match=f"{path} is damaged .*; delete it, and the next run puts it there anew"):
            read_idx(path, 3)
    path.write_bytes(good)
    with pytest.raises(ValueError, match="does not begin like bytes in 1 dimensions"):
        read_idx(path, 1)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_idx(path, 3)


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "KMNIST" / "raw"
    write_downloaded(raw, 5)
    write_idx(raw / "train-labels-idx1-ubyte", torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte holds 5 images and .*train-labels-idx1-ubyte 4 labels"):
        DATASETS["kmnist"].load(tmp_path, train=True)
    assert len(DATASETS["kmnist"].load(tmp_path, train=False).images) == 3


def test_images_take_no_more_memory_than_their_own_size(tmp_path: Path) -> None:
    """Measured in a process of its own, in which nothing else happens meanwhile."""
    megabytes, raw = 512, tmp_path / "EMNIST" / "raw"
    count = megabytes * 2**20 // 28**2
    raw.mkdir(parents=True)
    with (raw / "emnist-digits-train-images-idx3-ubyte").open("wb") as file:
        file.write(b"".join(number.to_bytes(4, "big") for number in (0x803, count, 28, 28)))
        file.truncate(16 + count * 28**2)
    write_idx(raw / "emnist-digits-train-labels-idx1-ubyte", torch.zeros(count, dtype=torch.uint8))
    for kind, few in (
        ("images-idx3", torch.zeros(2, 28, 28, dtype=torch.uint8)),
        ("labels-idx1", torch.zeros(2, dtype=torch.uint8)),
    ):
        write_idx(raw / f"emnist-digits-test-{kind}-ubyte", few)
    program = (  # which reads two images first, for which it imports what it needs
        "import sys, pathlib; sys.path.append('scripts'); from benchmark import peak_mb; "
        "from bngan.data.datasets import DATASETS; load, root = DATASETS['emnist_digits'].load, pathlib.Path(sys.argv[1]); "
        "load(root, train=False); before = peak_mb(); load(root, train=True); print(peak_mb() - before)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert megabytes <= float(done.stdout) <= 1.1 * megabytes


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
        with pytest.raises(OSError, match=f"{title} could not be downloaded into {tmp_path} .*failed.*copy the files"):
            data.prepare_data()


def test_a_mistake_in_the_program_is_no_failed_download(tmp_path: Path) -> None:
    def mistaken(root: str, train: bool) -> None:
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        Downloaded("Anything", "Anything", mistaken).prepare(tmp_path)


# The module -----------------------------------------------------------------------------------------------------------


def batches_of(loader: Iterable[Any], data: ImageDataModule) -> list[tuple[Tensor, Tensor]]:
    """A loader's batches as the networks get them."""
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def test_mnist_comes_in_batches_between_minus_1_and_1(mnist_root: Path) -> None:
    data = ImageDataModule(root=str(mnist_root), batch_size=128, updates_per_batch=3)
    data.prepare_data()
    loader = data.train_dataloader()
    assert len(loader) == 60_000 // (128 * 3)
    images, labels = next(iter(loader))
    assert images.shape == (128 * 3, *data.image_shape) == (384, 1, 28, 28)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (-1, 1)
    assert len(labels.unique()) == 10
    held_out = torch.cat([labels for _, labels in data.val_dataloader()])
    assert torch.equal(held_out, DATASETS["mnist"].load(mnist_root, train=False).labels)


def test_bytes_map_to_the_unit_range_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    mapped = to_unit_range(levels)
    assert mapped.dtype == torch.float32
    assert (mapped[0], mapped[255]) == (-1, 1)
    assert torch.equal(((mapped + 1) * 127.5).round().to(torch.uint8), levels)
    data = ImageDataModule()
    assert torch.equal(data.on_after_batch_transfer([levels, levels], 0)[0], mapped)
    assert data.on_after_batch_transfer([mapped, levels], 0)[0] is mapped


def test_image_size_resizes_a_named_data_set(mnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageDataModule(root=str(mnist_root), image_size=8)
    images = data.load(train=False).images
    monkeypatch.setattr("bngan.data.module.CHUNK", 3_000)
    assert torch.equal(ImageDataModule(root=str(mnist_root), image_size=8).load(train=False).images, images)
    assert data.image_shape == (1, 8, 8)
    assert images.shape == (10_000, 1, 8, 8)
    assert images.dtype == torch.uint8
    original = ImageDataModule(root=str(mnist_root)).load(train=False).images
    # Resized with care for aliasing, each picture keeps its brightness.
    brightness = torch.stack([images.float().mean(dim=(1, 2, 3)), original.float().mean(dim=(1, 2, 3))])
    assert torch.corrcoef(brightness)[0, 1] > 0.98


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"name": "minst"}, "unknown data set 'minst'; choose from mnist, .*, folder"),
        ({"name": "folder"}, "--data.name folder and --data.folder PATH belong together"),
        ({"folder": "pictures"}, "--data.name folder and --data.folder PATH belong together"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1, got 0"),
        ({"predict_samples": 0}, "predict_samples must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers and in_memory_gb must be at least 0"),
        ({"in_memory_gb": -1.0}, "num_workers and in_memory_gb must be at least 0"),
        ({"image_size": 3}, "image_size must be at least 4, got 3"),
        ({"channels": 2}, r"channels must be 1 \(grey\) or 3 \(colour\), got 2"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ImageDataModule(**settings)
    ImageDataModule(batch_size=1, eval_batch_size=1, predict_samples=1, num_workers=0, in_memory_gb=0, image_size=4)


def test_predict_numbers_every_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageDataModule(predict_samples=130, eval_batch_size=50)
    alone = list(data.predict_dataloader())
    assert [len(batch) for batch in alone] == [50, 50, 30]
    assert torch.equal(torch.cat(alone), torch.arange(130))
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    together = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        together += list(data.predict_dataloader())
    assert torch.equal(torch.cat(together).sort().values, torch.arange(130))


# Which rows each rank sees --------------------------------------------------------------------------------------------


def chained(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


def sharded(
    num_rows: int, batch_size: int, *, train: bool, ranks: int, epoch: int = 0, seed: int = 0, parts: int = 1
) -> list[list[list[int]]]:
    """For each rank its batches of row numbers."""
    found = []
    for rank in range(ranks):
        batches = ShardedBatches(num_rows, batch_size, train=train, seed=seed, rank=rank, ranks=ranks, parts=parts)
        batches.set_epoch(epoch)
        found.append(list(batches))
        assert len(found[-1]) == len(batches)
    return found


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_train_on_what_one_process_would(ranks: int, parts: int) -> None:
    alone = sharded(100, 24, train=True, ranks=1, parts=parts)[0]
    together = sharded(100, 24, train=True, ranks=ranks, parts=parts)
    for number, batch in enumerate(alone):
        shares = [batches[number] for batches in together]
        assert [len(share) for share in shares] == [24 // ranks] * ranks
        assert sorted(chained(shares)) == sorted(batch)
        for part in range(parts):
            size, own = 24 // parts, 24 // parts // ranks
            shared = chained(share[part * own : (part + 1) * own] for share in shares)
            assert shared == batch[part * size : (part + 1) * size]


def test_rows_are_dealt_out_as_noise_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image and the noise for it meet on the same rank only if both are dealt in the same way."""
    whole = torch.tensor(sharded(100, 24, train=True, ranks=1)[0][0])
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for rank, (batch, *_) in enumerate(sharded(100, 24, train=True, ranks=4, parts=3)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        assert distributed.own_rows(whole, parts=3).tolist() == batch
        assert distributed.own_rows(whole, parts=1).tolist() != batch


@pytest.mark.parametrize(("num_rows", "batch_size", "ranks"), [(100, 24, 1), (101, 24, 4), (7, 4, 2), (50, 7, 4)])
def test_evaluation_sees_every_row_once_even_where_sizes_do_not_divide(num_rows: int, batch_size: int, ranks: int) -> None:
    found = sharded(num_rows, batch_size, train=False, ranks=ranks)
    assert sorted(row for batches in found for batch in batches for row in batch) == list(range(num_rows))
    assert len({len(batches) for batches in found}) == 1  # or a rank would wait for another for ever
    alone = sharded(num_rows, batch_size, train=False, ranks=1)[0]
    assert chained(alone) == list(range(num_rows))


def test_training_drops_the_incomplete_last_batch_alone() -> None:
    for num_rows, count in ((96, 4), (100, 4), (119, 4), (120, 5)):
        (batches,) = sharded(num_rows, 24, train=True, ranks=1)
        assert [len(batch) for batch in batches] == [24] * count
        rows = chained(batches)
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(num_rows))
    missing = [set(range(100)) - set(chained(sharded(100, 24, train=True, ranks=1, epoch=epoch)[0])) for epoch in (0, 1)]
    assert missing[0] != missing[1]  # other rows are left out each time


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(epoch: int, seed: int) -> list[list[int]]:
        torch.randn(7)
        return sharded(100, 10, train=True, ranks=1, epoch=epoch, seed=seed)[0]

    assert order(epoch=3, seed=5) == order(epoch=3, seed=5)
    orders = [order(epoch, seed) for epoch in range(3) for seed in range(3)]
    assert all(one != other for number, one in enumerate(orders) for other in orders[:number])
    assert all(sorted(chained(batches)) == list(range(100)) for batches in orders)
    assert chained(orders[0]) != list(range(100))


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a batch of 24 images needs as many, but there are 23; lower --data.batch_size"):
        ShardedBatches(23, 24, train=True)
    assert len(ShardedBatches(23, 24, train=False)) == 1
    with pytest.raises(ValueError, match=r"by 2 devices in 3 parts; change --data.batch_size to a multiple of 6"):
        ShardedBatches(100, 20, train=True, ranks=2, parts=3)
    assert len(ShardedBatches(100, 24, train=True, ranks=2, parts=3)) == 4
    assert len(ShardedBatches(100, 20, train=False, ranks=2, parts=3)) == 5


# Loaders and where they are in the data -------------------------------------------------------------------------------


class Numbered(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Pictures whose every pixel is their number."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), index, dtype=torch.uint8), index % 3


def loader_of(kind: str, *, train: bool = True) -> Loader:
    batches = ShardedBatches(40, 8, train=train, seed=1)
    if kind == "tensor":
        rows = [Numbered()[index] for index in range(40)]
        return TensorLoader(torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows]), batches)
    return PictureLoader(Numbered(), batches, num_workers=int(kind))


def seen(batch: Any) -> tuple[list[int], list[int]]:
    """Numbers of the pictures in a batch of either loader, and their labels."""
    images, labels = batch
    numbers = images if images.dtype == torch.uint8 else ((images + 1) * 127.5).round()
    return numbers[:, 0, 0, 0].int().tolist(), labels.tolist()


def set_epoch(loader: Loader, epoch: int) -> None:
    (loader.batch_sampler if isinstance(loader, TensorLoader) else loader.batches).set_epoch(epoch)


KINDS = [pytest.param("tensor", id="in_memory"), pytest.param("0", id="no_worker"), pytest.param("1", id="one_worker")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_gives_the_rows_of_its_batches_with_their_labels(kind: str) -> None:
    for train in (True, False):
        loader = loader_of(kind, train=train)
        rows = list(ShardedBatches(40, 8, train=train, seed=1))
        assert len(loader) == len(rows) == 5
        assert [seen(batch) for batch in loader] == [(batch, [row % 3 for row in batch]) for batch in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_continues_in_the_middle_of_an_epoch(kind: str) -> None:
    original = loader_of(kind)
    set_epoch(original, 2)
    running = iter(original)
    before = [seen(next(running)) for _ in range(3)]
    state = original.state_dict()
    assert state == {"epoch": 2, "batches": 3, "group": 1}
    rest = [seen(batch) for batch in running]

    resumed = loader_of(kind)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # a run that ends before its first batch must not lose its place
    set_epoch(resumed, 2)
    running = iter(resumed)
    first = seen(next(running))
    assert resumed.state_dict() == {"epoch": 2, "batches": 4, "group": 1}
    assert [first, *(seen(batch) for batch in running)] == rest
    assert len(rest) == 2
    assert rest != before[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_loader_starts_the_next_epoch_at_its_beginning(kind: str) -> None:
    original, resumed = loader_of(kind), loader_of(kind)
    resumed.load_state_dict({"epoch": 2, "batches": 3})
    set_epoch(resumed, 2)
    assert len(list(resumed)) == 2
    for loader in (original, resumed):
        set_epoch(loader, 3)
    whole = [seen(batch) for batch in resumed]
    assert whole == [seen(batch) for batch in original]
    assert len(whole) == 5
    assert resumed.state_dict() == {"epoch": 3, "batches": 5, "group": 1}


class Recorder(LightningModule):
    """Notes which pictures a Trainer shows it in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.epochs: list[list[list[int]]] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.epochs[-1].append(seen(batch)[0])

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_shows_the_pictures_of_each_epoch_in_an_order_of_its_own(kind: str) -> None:
    recorder = Recorder()
    trainer = Trainer(max_epochs=3, accelerator="cpu", barebones=True, use_distributed_sampler=False)
    trainer.fit(recorder, train_dataloaders=loader_of(kind))
    expected = [sharded(40, 8, train=True, ranks=1, seed=1, epoch=epoch)[0] for epoch in range(3)]
    assert recorder.epochs == expected
    assert expected[0] != expected[1] != expected[2]


# A person's own pictures ----------------------------------------------------------------------------------------------

GREY, COLOUR = "L", "RGB"


def picture(path: Path, mode: str = GREY, size: tuple[int, int] = (8, 8), level: int | None = None) -> Path:
    """Write a picture of one level, or of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    shape = (height, width) if mode == GREY else (height, width, 3)
    pixels = torch.randint(0, 256, shape) if level is None else torch.full(shape, level)
    Image.fromarray(pixels.numpy().astype(np.uint8)).save(path)
    return path


def pictures(folder: Path, count: int, mode: str = GREY, size: tuple[int, int] = (8, 8)) -> Path:
    """Fill a folder with pictures, each of the level that is its number."""
    for number in range(count):
        picture(folder / f"{number:03d}.png", mode, size, level=number)
    return folder


def module_of(folder: Path, **settings: Any) -> ImageDataModule:
    return ImageDataModule("folder", folder=str(folder), num_workers=0, **{"batch_size": 2, **settings})


def levels(labelled: Labelled) -> list[int]:
    return labelled.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(("mode", "channels"), [(GREY, 1), (COLOUR, 3)])
def test_pictures_keep_their_colours(mode: str, channels: int, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", mode)
    found = Pictures(tmp_path)
    image, label = found[0]
    assert found.image_shape == image.shape == (channels, 8, 8)
    assert (image.dtype, label) == (torch.uint8, 0)
    original = torch.from_numpy(np.array(Image.open(path)))
    assert torch.equal(image, original.reshape(8, 8, channels).permute(2, 0, 1))
    assert Pictures(tmp_path, channels=1).image_shape == (1, 8, 8)
    assert Pictures(tmp_path, channels=3)[0][0].shape == (3, 8, 8)


def test_sixteen_bit_pictures_keep_their_shades(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image, _ = Pictures(tmp_path)[0]
    assert image.shape == (1, 8, 8)
    assert torch.equal(image[0].int(), torch.arange(0, 256, 4).reshape(8, 8).int())


def test_flat_folder_is_one_class_with_a_tenth_held_out(tmp_path: Path) -> None:
    data = module_of(pictures(tmp_path, 20))
    train, test = data.load(train=True), data.load(train=False)
    assert (len(train.images), len(test.images)) == (18, 2)
    assert sorted([*levels(train), *levels(test)]) == list(range(20))
    assert train.labels.tolist() == [0] * 18
    assert data.image_shape == (1, 8, 8)
    again = module_of(tmp_path, seed=1).load(train=False)
    assert levels(again) == levels(test)  # whatever the seed, or a resumed run would train on them
    for images, _ in data.train_dataloader():
        assert images.shape == (2, 1, 8, 8)
        assert images.dtype == torch.float32
        assert images.min() >= -1
        assert images.max() < -0.8  # levels up to 19 of 255


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for number, name in enumerate(("cats", "dogs", "empty", ".hidden")):
        for copy in range(4 if name in ("cats", "dogs") else 0):
            picture(tmp_path / name / "deep" / f"{copy}.png", level=10 * number + copy)
    picture(tmp_path / ".hidden" / "thumbnail.png", level=200)
    (tmp_path / "empty").mkdir()
    data = module_of(tmp_path)
    both = [data.load(train=train) for train in (True, False)]
    found = {(level, label) for part in both for level, label in zip(levels(part), part.labels.tolist(), strict=True)}
    assert found == {(copy, 0) for copy in range(4)} | {(10 + copy, 1) for copy in range(4)}


def test_train_and_test_subfolders_are_used_as_they_are(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 5)
    picture(tmp_path / "test" / "a.png", level=77)
    data = module_of(tmp_path)
    assert sorted(levels(data.load(train=True))) == list(range(5))
    assert levels(data.load(train=False)) == [77]
    shutil.rmtree(tmp_path / "test")  # then train is a class like any other, and some of it is held out
    assert len(module_of(tmp_path).load(train=True).images) == 4


def test_held_out_pictures_take_the_training_pictures_colours(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 3, COLOUR)
    pictures(tmp_path / "test", 2, GREY)
    data = module_of(tmp_path)
    assert data.image_shape == (3, 8, 8)
    assert data.load(train=False).images.shape == (2, 3, 8, 8)
    assert module_of(tmp_path, channels=1).load(train=False).images.shape == (2, 1, 8, 8)


def test_held_out_pictures_of_another_size_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "train", 3)
    pictures(tmp_path / "test", 2, size=(10, 10))
    with pytest.raises(ValueError, match=r"train have sides of 8, those in .*test of 10; give --data.image_size"):
        module_of(tmp_path).load(train=False)
    assert module_of(tmp_path, image_size=6).load(train=False).images.shape == (2, 1, 6, 6)


def test_pictures_of_different_sizes_are_refused_naming_both_and_the_remedy(tmp_path: Path) -> None:
    first, second = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", size=(10, 12))
    complaint = f"{first} is 8 x 8, {second} is 10 x 12; give --data.image_size 64"
    with pytest.raises(ValueError, match=complaint):
        Pictures(tmp_path)
    assert [Pictures(tmp_path, size=6)[number][0].shape for number in (0, 1)] == [(1, 6, 6)] * 2
    second.unlink()
    assert Pictures(tmp_path).image_shape == (1, 8, 8)


def test_oblong_pictures_are_refused_until_a_size_is_given(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", size=(10, 8))
    with pytest.raises(ValueError, match=f"{path} is 10 x 8, not square: give --data.image_size 64"):
        Pictures(tmp_path)
    assert Pictures(tmp_path, size=8).image_shape == (1, 8, 8)


@pytest.mark.parametrize("upright", [True, False])
def test_image_size_resizes_the_shorter_side_and_cuts_the_centre_out(upright: bool, tmp_path: Path) -> None:
    """Of a band of three equal squares, black, grey and white, the middle one is left."""
    band = np.repeat(np.repeat(np.array([[0, 100, 255]], dtype=np.uint8), 12, axis=0), 12, axis=1)
    Image.fromarray(band.T.copy() if upright else band).save(tmp_path / "a.png")
    image, _ = Pictures(tmp_path, size=6)[0]
    assert image.shape == (1, 6, 6)
    assert (image[:, 1:-1, 1:-1] == 100).all()
    enlarged, _ = Pictures(tmp_path, size=48)[0]
    assert (enlarged[:, 8:-8, 8:-8] == 100).all()


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    good = picture(tmp_path / "a.png", size=(32, 32))
    content = good.read_bytes()
    bad = tmp_path / "b.png"
    bad.write_bytes(content)
    assert Pictures(tmp_path)[1][0].shape == (1, 32, 32)
    bad.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{bad} is damaged .*; repair or remove it"):
        Pictures(tmp_path)[1]
    huge = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little") + 2 * (60_000).to_bytes(4, "little")
    for unreadable in (b"no picture", b"", content[:20], huge + b"\1\0\x18\0" + bytes(24)):
        bad.write_bytes(unreadable)
        with pytest.raises(ValueError, match=f"{bad} is not a picture that can be read .*; repair or remove it"):
            Pictures(tmp_path)
    with pytest.raises(ValueError, match=f"{bad} is not a picture"):
        Pictures(tmp_path, size=8)[1]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path / 'absent'}; give one with pictures by --data.folder"):
        Pictures(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "class").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} holds no pictures; png, jpg"):
        Pictures(tmp_path)
    picture(tmp_path / "class" / "a.png")
    assert len(Pictures(tmp_path)) == 1


@pytest.mark.parametrize("split", [False, True])
def test_pictures_are_looked_for_and_read_once(split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "test"):
        pictures(tmp_path / part if split else tmp_path, 20)
    opened: list[str] = []
    open_picture = Image.open
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_picture(path))
    data = module_of(tmp_path)
    for train in (True, False):
        from_files = data.subset(2, train=train)
        data.load(train=train)
        data._loader(train=train, batch_size=2, parts=1)
        before = len(opened)
        from_memory = data.subset(2, train=train)
        assert len(opened) == before
        for seen, again in zip(from_files, from_memory, strict=True):
            assert torch.equal(seen, again)
    # Once to know the size, once to read it; the first and the two for a subset, once more.
    assert len(opened) == (2 * 40 + 2 * 3 if split else 2 * 20 + 1 + 2 * 2)


def test_one_picture_is_too_few_to_train_and_hold_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="holds one picture; at least 2 are needed"):
        module_of(tmp_path).load(train=True)
    picture(tmp_path / "b.png")
    data = module_of(tmp_path)
    assert [len(data.load(train=train).images) for train in (True, False)] == [1, 1]


@pytest.mark.parametrize("mode", [GREY, COLOUR])
def test_pictures_too_many_for_memory_give_the_same_batches(mode: str, tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / f"{number % 3}" / f"{number}.png", mode, size=(10 + number, 12))
    held, read = (module_of(tmp_path, image_size=8, batch_size=4, in_memory_gb=size) for size in (2.0, 0.0))
    for name, kinds in (("train_dataloader", [TensorLoader, PictureLoader]), ("val_dataloader", [TensorLoader, PictureLoader])):
        loaders = [getattr(data, name)() for data in (held, read)]
        assert [type(loader) for loader in loaders] == kinds
        batches = [batches_of(loader, data) for loader, data in zip(loaders, (held, read), strict=True)]
        assert len(batches[0]) == len(batches[1]) > 0
        for (images, labels), (same_images, same_labels) in zip(*batches, strict=True):
            assert images.std() > 0.1
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)


def test_pictures_beside_subfolders_are_not_lost(tmp_path: Path) -> None:
    for name in ("a.png", "inside/b.png", "inside/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / name)
    assert len(Pictures(tmp_path)) == 3
    (tmp_path / "a.png").unlink()
    assert Pictures(tmp_path).classes == ["inside"]
    assert len(Pictures(tmp_path)) == 2


@pytest.mark.parametrize(("rows", "ranks"), [(101, 2), (100, 2), (50, 4), (203, 4), (5, 4)])
def test_no_rank_is_left_without_rows_in_evaluation(rows: int, ranks: int) -> None:
    shares = [list(ShardedBatches(rows, 50, train=False, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert all(len(batch) > 0 for share in shares for batch in share)
    assert {len(share) for share in shares} == {len(ShardedBatches(rows, 50, train=False, ranks=ranks))}
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(rows))
    with pytest.raises(ValueError, match="cannot be shared"):
        ShardedBatches(ranks - 1, 50, train=False, ranks=ranks)
