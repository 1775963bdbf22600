"""Native CPU code: shared headers, and the builder that compiles and loads every cpu.cpp."""

from fxopt.kernels.native.build import NativeStatus, ensure_native, native_status

__all__ = ["NativeStatus", "ensure_native", "native_status"]
