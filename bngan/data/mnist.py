"""MNIST, carried inside the package: verified, unpacked once, laid out where torchvision looks for it."""

import hashlib
import lzma
from pathlib import Path

from bngan.errors import UsageError
from bngan.files import write_whole

PACKAGED = Path(__file__).parent / "mnist"

# MD5 of the uncompressed IDX files, as torchvision's copies have them.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


def lay_out(root: Path) -> None:
    """Make `root`/MNIST/raw a complete torchvision MNIST folder; files already there are verified and kept.

    Each file appears whole or not at all, so processes that start together cannot disturb one another.

    Raises:
        UsageError: if a file, packaged or already in the folder, does not have its published MD5, or if the folder cannot be
            read and written.
    """
    raw = root / "MNIST" / "raw"
    try:
        for name, md5 in MD5.items():
            if (raw / name).exists():
                _verify(raw / name, md5)
            else:
                write_whole(raw / name, _unpack(PACKAGED / f"{name}.xz", md5))
    except OSError as error:
        remedy = "make room and allow it, or give another folder by --data.root"
        raise UsageError(f"{raw} cannot be written ({error.strerror}); {remedy}") from error


def _verify(path: Path, md5: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, _md5).hexdigest()  # in pieces: it may be as large as the data
    if found != md5:
        raise UsageError(f"{path} is corrupt; delete it and it is made anew (MD5 {found}, expected {md5})")


def _unpack(packaged: Path, md5: str) -> bytes:
    try:
        content = lzma.decompress(packaged.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise UsageError(f"{packaged} is missing or corrupt; reinstall bngan ({error})") from error
    if (found := _md5(content).hexdigest()) != md5:
        raise UsageError(f"{packaged} is corrupt; reinstall bngan (MD5 {found}, expected {md5})")
    return content


def _md5(content: bytes = b"") -> "hashlib._Hash":
    return hashlib.md5(content, usedforsecurity=False)
