"""What the C library does with memory that a step has freed."""

import ctypes
import os

__all__ = ["keep_freed_memory"]

# Of glibc's malloc.h, for mallopt.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
USERS_CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees for its next allocations, instead of giving it back to the system.

    glibc gets every block above 32 MB from the system and gives it back when it is freed. Activations of eleven groups
    are larger than that, and each page of them would be mapped, filled with zeros and unmapped at every layer of every
    step. What is kept stays with this process until it ends.

    Returns:
        Whether it does so now: not without glibc, nor where the environment says how glibc should allocate.
    """
    environment = os.environ
    if any(name in environment for name in USERS_CHOICES) or "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - other libraries' mallopt has other constants, if there is one
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):  # macOS and musl have no mallopt, Windows no library without a name
        return False
    return bool(mallopt(MMAP_MAX, 0)) and bool(mallopt(TRIM_THRESHOLD, -1))
