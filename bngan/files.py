"""A path as it is meant, and a file that is there as a whole or not at all, whatever stops the process that writes it."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bngan.errors import UsageError


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is there as a whole or not at all; see open_whole."""
    with open_whole(path) as file:
        file.write(content)


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Within the block write a file beside its place; force it to the disk, and only then put it there, for good.

    Its folder is made.

    Raises:
        OSError: if there is no room or no right to; what was there before is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """Within the block a file or a folder that cannot be written to is a person's mistake.

    Raises:
        UsageError: saying which, and why.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write to {output}: {error.strerror or error}; choose another --output") from error


def refuse_to_replace(*paths: Path, force: bool) -> None:
    """Refuse to write over a file, or into a folder that is not empty, unless that is asked for.

    Raises:
        UsageError: naming the first that is there, or if one cannot be looked into.
    """
    for path in paths:
        with writing(path):
            is_there = any(path.iterdir()) if path.is_dir() else path.is_file()
        if is_there and not force:
            raise UsageError(f"{path} exists; choose another --output, or add --force to replace it")


def expand_home(path: str) -> str:
    """Return a path with ~ or ~user at its beginning written out in full, as a shell does only where a word begins.

    Raises:
        UsageError: if it can be no path.
    """
    if not path or "\0" in path:
        raise UsageError(f"{path!r} is no path; name a file or a folder")
    if os.path.expandvars(path) != path:  # which some libraries do, so that half of a run would lie elsewhere
        raise UsageError(f"{path} names a variable of the shell; write out what it stands for")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UsageError(f"{path}: there is no user {path.partition('/')[0]}; write ./{path} for what is called that")
    return expanded


def _sync(folder: Path) -> None:
    """Force what a folder says of its files to the disk; Windows, which opens no folders, has its own ways."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
