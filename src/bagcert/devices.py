"""Devices, and the precision of float32 matrix products.

TF32 and bfloat16 products round integers above 2^11 and 2^8. Torch has one process-wide setting for them, so all
threads that need exact products share the context manager `full_precision`.
"""

import ctypes
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bagcert.errors import UnsoundError, UsageError


def resolve_device(name: str) -> torch.device:
    """Convert `auto`, `cpu`, `cuda`, `cuda:N` or `mps` to an available device."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"a device must be auto, cpu, cuda, cuda:N or mps; got {name!r}") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UsageError(f"this machine has no device {name!r}")
    return device


def device_name(device: torch.device) -> str:
    """Name of a device: `cpu`, or the type and name of the accelerator.

    >>> device_name(torch.device("cpu"))
    'cpu'
    """
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def dtype_name(dtype: torch.dtype | None) -> str:
    """Name of a dtype without the prefix "torch."; None stands for float32.

    >>> dtype_name(torch.bfloat16), dtype_name(None)
    ('bfloat16', 'float32')
    """
    return str(dtype or torch.float32).removeprefix("torch.")


def tune_malloc() -> None:
    """Configure glibc to reuse freed memory instead of returning it to the operating system.

    Otherwise the memory of large activations is mapped and cleared again for every layer, which costs up to 40 % of a
    forward pass on a CPU. Does nothing on systems without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def peak_memory_mib() -> int:
    """Peak memory of this process in MiB."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset // 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


_FULL = ["ieee", "ieee"]


class _Switch:
    """Reference-counted switch to full precision: the first thread saves the user's setting, the last one restores it.

    If other code changes the setting while threads are inside, the new setting is restored at the end instead. Sums may
    have been rounded in the meantime, so every thread that was inside is notified by `leave`. Two changes cannot be
    detected: one that is made and undone between two checks, and a change to full precision, which is lost at the end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._changes = 0  # number of changes by other code while a thread was inside
        self._users: list[str] = []

    def enter(self) -> int:
        """Enable full precision; return the token that `leave` expects."""
        with self._lock:
            if not self._inside:
                self._users = product_precision()
            else:
                self._look()
            _set(_FULL)
            self._inside += 1
            return self._changes

    def leave(self, changes: int) -> bool:
        """Restore the user's setting if this is the last thread; return whether precision was full all the time."""
        with self._lock:
            self._look()
            self._inside -= 1
            _set(_FULL if self._inside else self._users)
            return self._changes == changes

    def _look(self) -> None:
        now = product_precision()
        if now != _FULL:
            self._changes += 1
            self._users = now


_switch = _Switch()


@contextmanager
def full_precision() -> Iterator[None]:
    """Context manager that disables TF32 and bfloat16 in float32 products and restores the user's setting at the end.

    Several threads can be inside at the same time. Other threads must not change the precision in the meantime: a
    change to a lower precision raises the error below, and a change to full precision is lost.

    Raises:
        UnsoundError: another thread changed the setting while the context was active.
    """
    entered = _switch.enter()
    try:
        yield
    except BaseException:
        _switch.leave(entered)
        raise
    if not _switch.leave(entered):
        raise UnsoundError(
            "another thread changed the precision of float32 products (torch.set_float32_matmul_precision, allow_tf32 "
            "or fp32_precision) while sums were formed, which may have rounded them; set it before or after"
        )


def product_precision() -> list[str]:
    """The current precision settings of float32 products.

    Torch's older getter fails if its newer setters were used, so the settings are read per backend.
    """
    return [str(backend.fp32_precision) for backend in _backends()]


def _set(precisions: list[str]) -> None:
    for backend, precision in zip(_backends(), precisions, strict=True):
        backend.fp32_precision = precision


def _backends() -> list[Any]:
    homes: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    return [home.matmul for home in homes]
