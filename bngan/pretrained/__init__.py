"""Which trained networks come with the package? scripts/pretrained.py has made them."""

import hashlib
from pathlib import Path

from bngan.errors import UsageError

FOLDER = Path(__file__).parent
SUMS = FOLDER / "SHA256SUMS"  # as `sha256sum` writes and checks them
DISCRIMINATOR = "-discriminator"  # at the end of a name


def names() -> list[str]:
    """Return the names of the generators."""
    return [name for name in _sums() if not name.endswith(DISCRIMINATOR)]


def find_pretrained(name: str) -> Path:
    """Return the file of the generator of that name; or of its discriminator, if the name ends so.

    Raises:
        UsageError: if there is none, naming those there are, or if it is not the file that was shipped.
    """
    sums = _sums()
    if name not in sums:
        raise UsageError(f"--pretrained {name}: there is no such network; choose from {', '.join(names())}")
    path = FOLDER / f"{name}.safetensors"
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "that of no file"
    if found != sums[name]:
        raise UsageError(f"{path} is missing or corrupt (SHA-256 {found}, expected {sums[name]}); reinstall bngan")
    return path


def _sums() -> dict[str, str]:
    """Return the SHA-256 of each network's file by its name."""
    lines = [line.split() for line in SUMS.read_text().splitlines()]
    return {name.removesuffix(".safetensors"): digest for digest, name in lines}
