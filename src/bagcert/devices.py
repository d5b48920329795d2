"""Where computations run, and in which precision.

TF32 and bfloat16 products round integers above 2^11 and 2^8. Torch has one setting of them for the whole process, so
all threads that need full products share one switch, `full_precision`.
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
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` as a device that is there.

    Raises:
        UsageError: no such device, or not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"a device is auto, cpu, cuda, cuda:N or mps; got {name!r}") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False) or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise UsageError(f"this machine has no device {name!r}")
    return device


def device_name(device: torch.device) -> str:
    """`cpu`, or the kind and name of the accelerator.

    >>> device_name(torch.device("cpu"))
    'cpu'
    """
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name of a dtype without "torch."; None is float32.

    >>> dtype_name(torch.bfloat16), dtype_name(None)
    ('bfloat16', 'float32')
    """
    return str(dtype or torch.float32).removeprefix("torch.")


def tune_malloc() -> None:
    """Tells glibc to reuse freed memory instead of handing it back to the system.

    Large activations are otherwise mapped and cleared anew at every layer, which costs up to 40 % of a
    forward pass on a CPU. Does nothing elsewhere.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of <malloc.h>
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def peak_memory_mib() -> int:
    """The most memory this process has held so far."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset // 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


_FULL = ["ieee", "ieee"]


class _Switch:
    """The setting of the user, which the first thread to enter puts aside and the last one to leave puts back.

    A setting that somebody else makes meanwhile is not lost: it is what the last thread leaves behind. But until then
    sums may have been rounded, so every thread that was inside at the time is told. What cannot be told: a setting
    that was made and undone between two looks, and one to full precision, which the last thread therefore undoes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._changes = 0  # by others, while a thread was inside
        self._users: list[str] = []

    def enter(self) -> int:
        """Full precision from now on; returns what `leave` is to be given."""
        with self._lock:
            if not self._inside:
                self._users = product_precision()
            else:
                self._look()
            _set(_FULL)
            self._inside += 1
            return self._changes

    def leave(self, changes: int) -> bool:
        """Puts the setting of the user back if no thread is left; returns whether precision was full all the time."""
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
    """No TF32 and no bfloat16 in float32 products inside; afterwards, what the user has set.

    Threads do not wait for each other. Precision is to be set before or after, not meanwhile in another thread: a lower
    one is kept and raises the error below, while full precision set meanwhile is lost.

    Raises:
        UnsoundError: another thread changed the setting meanwhile.
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
    """What is set for float32 products now; torch's older getter fails where its newer setters were used."""
    return [str(backend.fp32_precision) for backend in _backends()]


def _set(precisions: list[str]) -> None:
    for backend, precision in zip(_backends(), precisions, strict=True):
        backend.fp32_precision = precision


def _backends() -> list[Any]:
    homes: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    return [home.matmul for home in homes]
