"""Which device and precision `auto` takes, and memory in the right unit on each system."""

import resource
import sys
from collections.abc import Callable
from types import SimpleNamespace

from config import UserError

import numpy as np
import pytest
import torch

from runtime import cli
from runtime.device import enough_memory, keep_freed_memory, peak_memory_mb, resolve_device


def test_torch_may_not_choose_cudnns_attention_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert resolve_device("cpu") == "cpu"
        assert torch.backends.cuda.cudnn_sdp_enabled()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert resolve_device("auto") == "cuda"
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


TOO_LARGE: list[Callable[[], object]] = [lambda: torch.empty(2**60), lambda: np.empty(2**50), lambda: bytearray(2**62)]


@pytest.mark.parametrize("allocate", TOO_LARGE)
def test_too_little_memory_on_the_cpu_is_one_line(
    allocate: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """What torch, numpy and Python really raise."""
    with pytest.raises(UserError, match="out of memory: lower batch_size"), enough_memory("batch_size"):
        allocate()
    assert cli.run(allocate) == 2
    assert capsys.readouterr().err == "error: out of memory: take a smaller model, batch or text\n"


def test_other_errors_are_not_taken_for_too_little_memory() -> None:
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), OSError()):
        with pytest.raises(type(error)), enough_memory("batch_size"):
            raise error


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_megabytes_on_every_system(monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=500 * 2**20 // unit))
    assert peak_memory_mb("cpu") == 500


def test_peak_memory_on_windows_is_the_first_size_of_its_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """PROCESS_MEMORY_COUNTERS begins with its own size and a count, 32 bits each, and the peak follows."""

    class GetCurrentProcess:
        def __call__(self) -> int:
            return 2**64 - 1  # its handle for this process

    def counters(process: object, found: list[int], size: int) -> int:
        assert (found[0], size) == (72, 72)
        found[1] = 300 * 2**20
        return 1

    library = SimpleNamespace(GetCurrentProcess=GetCurrentProcess(), K32GetProcessMemoryInfo=counters)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr("ctypes.WinDLL", lambda name: library, raising=False)
    assert peak_memory_mb("cpu") == 300


def test_a_system_without_glibc_keeps_its_own_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (TypeError, AttributeError, OSError):  # Windows, macOS, none at all

        def refuse(name: None, error: type[Exception] = error) -> None:
            raise error

        monkeypatch.setattr("ctypes.CDLL", refuse)
        keep_freed_memory()
