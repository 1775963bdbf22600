"""Give freed memory back to the system."""

import ctypes
import gc
import sys

# To look through the heap of a process that has captured a few models takes a second.
WORTHWHILE_BYTES = 32 << 20


def release_freed_memory(freed: int) -> None:
    """Collect cycles, then ask the C library for the pages of freed tensors, where it can.

    A graph and its module refer to each other, so a program that nothing holds keeps its weights
    until the collector comes by. glibc keeps freed blocks of up to 32 MiB for later; between
    passes that is a large part of what a process holds, and none of it is in use. For fewer than
    32 MiB of `freed` bytes nothing is done.
    """
    if freed < WORTHWHILE_BYTES:
        return
    gc.collect()
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
