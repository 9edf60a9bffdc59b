"""How a run is asked to stop, so that it saves: Ctrl-C, SIGTERM, a terminal that was closed, a scheduler's warning.

Ctrl-C or SIGTERM once stops it soon, twice at once. SIGHUP comes twice when a terminal is closed, from the system and
from the shell, and SIGTERM follows a scheduler's warning: neither means haste.
"""

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from runtime.cli import Interrupted, Stopped
from runtime.distributed import all_reduce_max, is_main_process, world_size

AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # where one of them follows another
# A closed terminal, and what SLURM sends by --signal=USR1@120; Windows has neither
WARNINGS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))


@dataclass
class StopRequest:
    """The signal that asked the run to stop, if any. While `interruptible`, it stops at once (raises Interrupted)."""

    signal: int | None = None
    interruptible: bool = False

    def allow_interruption(self) -> None:
        """From here on nothing is lost by stopping at once (raises Interrupted if a signal has come already).

        Several ranks never interrupt: they stop between steps, all at the same one.
        """
        self.interruptible = world_size() == 1
        if self.interruptible and self.signal is not None:
            raise Interrupted

    def on_any_rank(self) -> bool:
        """Whether any rank was asked to stop; all ranks must call this."""
        self.signal = int(all_reduce_max(self.signal or 0)) or None
        return self.signal is not None

    def receive(self, number: int, frame: object) -> None:
        """Handle a signal (raises Interrupted where allowed, and Stopped for the second signal)."""
        alone = world_size() == 1
        if self.signal is not None:
            # torchrun repeats the signals that its processes have received, and kills them if they are slow
            if alone and self.signal in AT_ONCE and number in AT_ONCE:
                raise Stopped(128 + number, "")
            if self.signal not in AT_ONCE:
                self.signal = number
            return
        self.signal = number
        _leave_lost_terminal()
        with suppress(OSError, RuntimeError):  # stderr may be closed
            if is_main_process():
                again = " (again: at once)" if alone and number in AT_ONCE else ""
                tqdm.write(f"stopping{again}", file=sys.stderr)
        if self.interruptible:
            raise Interrupted


def _leave_lost_terminal() -> None:
    """Send output nowhere where its terminal has gone: a line that cannot be written would end the run unsaved."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # a stream that is no file, or is closed
            handle = stream.fileno()
            if stat.S_ISCHR(os.fstat(handle).st_mode) and not os.isatty(handle):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, handle)
                os.close(nowhere)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn signals into a request to stop; outside the main thread, where none arrives, there will be no request.

    A warning that is ignored stays so, as under nohup, and so does one that something other than Python handles.
    """
    stop, before = StopRequest(), dict[Any, Any]()
    if threading.current_thread() is threading.main_thread():
        wanted = [number for number in WARNINGS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, stop.receive) for number in (*AT_ONCE, *wanted)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
