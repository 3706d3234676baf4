"""What glibc does with memory that was given back to it; nothing elsewhere."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BLOCK, KEPT_TOTAL = 1 << 25, 1 << 28


def keep_freed_memory() -> None:
    """Let glibc keep what is given back to it: a step's large tensors are the next one's, and the kernel takes 0.5 to 10
    microseconds to find a page of 4 KB anew, of which a step at batch 512 has asked for up to 2,000."""
    for option, size in ((M_MMAP_THRESHOLD, KEPT_BLOCK), (M_TRIM_THRESHOLD, KEPT_TOTAL)):
        _call("mallopt", option, size)


def release_freed_memory() -> None:
    """Let glibc give the kernel what nobody holds: where blocks of other sizes come next, they would be added to it."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
