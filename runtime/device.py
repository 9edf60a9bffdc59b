"""The machine: which device and precision to use, what memory suffices for, and how long things take."""

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, Literal, TypeVar, cast

from config import UserError

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Device = Literal["cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16", "float16"]
WITHOUT_FLOAT64 = {"mps"}  # Apple's GPUs


def resolve_device(device: str) -> Device:
    """auto -> cuda where present, else mps (Apple's GPUs), else cpu (raises UserError where a named one is missing).

    On CUDA torch may not choose cuDNN's attention from then on: it plans anew for every shape, of which a step has
    many, and is known to return NaN gradients for some masks.
    """
    present: dict[Device, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    usable = [name for name, there in present.items() if there and device in (name, "auto")]
    if not usable:
        raise UserError(f"device={device}, but this machine or torch has no {device.upper()}: use --device cpu or auto")
    if usable[0] == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return usable[0]


def resolve_dtype(dtype: Literal["auto", "float32", "bfloat16", "float16"], device: str) -> Dtype:
    """auto -> bfloat16 where the hardware multiplies it fast, then float16 (T4, V100), else float32."""
    if dtype != "auto":
        return dtype
    if has_fast_bfloat16(torch.device(device)):
        return "bfloat16"
    return "float16" if device == "cuda" and torch.cuda.get_device_capability() >= (7, 0) else "float32"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def widest_float(device: torch.device) -> torch.dtype:
    """float64, but float32 on a device that has nothing wider."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def device_name(device: str) -> str:
    """What the device is called, for the record."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores" + (" and their GPU" if device == "mps" else "")


def on_cpu(function: Function) -> Function:
    """A function of small tensors, computed on the CPU wherever they are; tensors that it returns go back there.

    For thousands of operations on a few numbers each, which a GPU would take longer to launch than the CPU to do.
    """

    @wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        device = next(x.device for x in args if isinstance(x, Tensor))
        result = function(*(x.cpu() if isinstance(x, Tensor) else x for x in args), **settings)
        if isinstance(result, tuple):
            return tuple(x.to(device, non_blocking=True) for x in result)
        if isinstance(result, Tensor):
            return result.to(device, non_blocking=True)
        return result

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


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a GPU or the machine is out of memory.

    On the CPU torch raises a RuntimeError like any other, and numpy and Python a MemoryError.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


@contextmanager
def enough_memory(to_lower: str) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the settings to lower (raises UserError)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise UserError(f"out of memory: lower {to_lower}") from None


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
        wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
        self.synchronize = wait.get(torch.device(device).type, lambda: None)
        self.last = self._now()

    def lap(self) -> float:
        """Seconds since the lap before."""
        now = self._now()
        seconds, self.last = now - self.last, now
        return seconds

    def _now(self) -> float:
        self.synchronize()
        return time.perf_counter()


def best_seconds(call: Callable[[], object], device: str, times: int = 5) -> float:
    """Shortest seconds of a call over a few, after one to warm up."""
    watch = Stopwatch(device)
    laps = []
    for _ in range(times + 1):
        call()
        laps.append(watch.lap())
    return min(laps[1:])


def matmul_rate(device: str, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s that this machine reaches now in one large matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b, device)
