"""Give freed memory back to the system."""

import ctypes
import gc
import sys


def release_freed_memory() -> None:
    """Collect cycles, then ask the C library for the pages of freed tensors, where it can.

    A graph and its module refer to each other, so a program that nothing holds keeps its weights
    until the collector comes by. glibc keeps freed blocks of up to 32 MiB for later; between
    passes that is a large part of what a process holds, and none of it is in use.
    """
    gc.collect()
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
