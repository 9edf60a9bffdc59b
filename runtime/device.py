"""The machine: which device and precision to use, what memory suffices for, and how long things take."""

import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, Literal, TypeVar, cast

from config import UserError

import torch
from torch import Tensor

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


def resolve_device(device: str) -> Literal["cpu", "cuda"]:
    """auto -> cuda where present, else cpu (raises UserError where cuda was asked for and is missing).

    On CUDA torch may not choose cuDNN's attention from then on: it plans anew for every shape, of which a step has
    many, and is known to return NaN gradients for some masks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but this machine or this torch has no CUDA: use --device cpu or auto")
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    torch.backends.cuda.enable_cudnn_sdp(False)
    return "cuda"


def resolve_dtype(dtype: Literal["auto", "float32", "bfloat16"], device: str) -> Literal["float32", "bfloat16"]:
    """auto -> bfloat16 where the hardware multiplies it fast, else float32."""
    if dtype == "auto":
        return "bfloat16" if has_fast_bfloat16(torch.device(device)) else "float32"
    return dtype


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def on_cpu(function: Function) -> Function:
    """A function of small tensors, computed on the CPU wherever they are; tensors that it returns go back there.

    For thousands of operations on a few numbers each, which a GPU would take longer to launch than the CPU to do.
    """

    @wraps(function)
    def call(*args: Any) -> Any:
        device = next(x.device for x in args if isinstance(x, Tensor))
        found = function(*(x.cpu() if isinstance(x, Tensor) else x for x in args))
        if isinstance(found, tuple):
            return tuple(x.to(device, non_blocking=True) for x in found)
        return found.to(device, non_blocking=True) if isinstance(found, Tensor) else found

    return cast(Function, call)


# --- memory ---------------------------------------------------------------------------------------------------------


def keep_freed_memory() -> None:
    """Let the process reuse memory that it freed instead of returning it to the system (glibc only).

    A step allocates and frees gigabytes, and fresh pages cost up to eight times what it takes to fill them.
    """
    with suppress(OSError, AttributeError, TypeError):  # Windows has no library without a name
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too


@contextmanager
def enough_memory(to_lower: str) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the settings to lower (raises UserError)."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"memory does not suffice: lower {to_lower}") from None


class FittingSize:
    """The number of rows that memory suffices for: it is halved whenever it turns out too large."""

    def __init__(self, size: int) -> None:
        """Start with `size` rows."""
        self.size = size

    def run(self, work: Callable[[int], T]) -> T:
        """Return work(size), repeated with half the size as long as memory does not suffice (raises at size 1)."""
        while True:
            try:
                return work(self.size)
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size = -(-self.size // 2)
            torch.cuda.empty_cache()  # outside the except block, where the failed work is no longer referenced


def reset_peak_memory(device: str) -> None:
    """Let CUDA's peak memory start anew; that of a process cannot."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb(device: str) -> float:
    """Peak memory so far: CUDA's, or that of this process; NaN where the system does not tell."""
    return (torch.cuda.max_memory_allocated() if device == "cuda" else process_peak_bytes()) / 2**20


def process_peak_bytes() -> float:
    """The most memory that this process has held; NaN where the system does not tell."""
    try:
        import resource
    except ImportError:
        return _windows_peak_bytes()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _windows_peak_bytes() -> float:
    """The same from PROCESS_MEMORY_COUNTERS: its size, page faults, then sizes of which the peak comes first."""
    counters = (ctypes.c_size_t * 9)()  # the two 32-bit fields at its start fill the first place
    try:
        library = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
        library.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(library.GetCurrentProcess())
        counters[0] = size = ctypes.sizeof(counters)
        return float(counters[1]) if library.K32GetProcessMemoryInfo(process, counters, size) else math.nan
    except (AttributeError, OSError):
        return math.nan


# --- time -----------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds between laps; on a GPU each lap waits until all work has finished."""

    def __init__(self, device: torch.device | str) -> None:
        """Start the watch."""
        self.cuda = torch.device(device).type == "cuda"
        self.last = self._now()

    def lap(self) -> float:
        """Seconds since the lap before."""
        now = self._now()
        seconds, self.last = now - self.last, now
        return seconds

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
