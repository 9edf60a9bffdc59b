"""How a run is asked to stop: by Ctrl-C, SIGTERM, a terminal that was closed, or a scheduler's warning.

The first signal lets the run finish its step and save. A second Ctrl-C or SIGTERM ends it at once. SIGHUP comes twice
when a terminal is closed, from the system and from the shell, and SIGTERM follows a scheduler's warning: neither means
haste.
"""

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from runtime.cli import Stopped
from runtime.distributed import all_reduce_max, is_main_process, world_size

HASTY = (signal.SIGINT, signal.SIGTERM)  # where one of them follows another
# A closed terminal, and what SLURM sends by --signal=USR1@120; Windows has neither
WARNINGS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """The signal that asked the run to stop, if any."""

    def __init__(self, what_is_left: Callable[[], str], what_is_kept: Callable[[], str]) -> None:
        """what_is_left() tells what the run does before it ends, what_is_kept() from where it can be resumed."""
        self.signal: int | None = None
        self.what_is_left = what_is_left
        self.what_is_kept = what_is_kept

    def on_any_rank(self) -> bool:
        """Whether any rank was asked to stop; all ranks must call this."""
        self.signal = int(all_reduce_max(self.signal or 0)) or None
        return self.signal is not None

    def receive(self, number: int, frame: object) -> None:
        """Handle a signal. Raises Stopped for a second one that means haste."""
        # torchrun repeats the signals that its processes have received
        may_end_at_once = world_size() == 1 and number in HASTY
        if self.signal is None:
            self.signal = number
            _leave_lost_terminal()
            hint = "; a second Ctrl-C ends at once" if may_end_at_once else ""
            if is_main_process():
                with suppress(OSError, RuntimeError):  # stderr may be closed
                    tqdm.write(f"stopping: {self.what_is_left()}{hint}", file=sys.stderr)
        elif self.signal not in HASTY:
            self.signal = number
        elif may_end_at_once:
            raise Stopped(128 + number, f"stopped at once; {self.what_is_kept()}")


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
def stop_signals(stop: StopRequest) -> Iterator[None]:
    """Hand signals to a stop request; outside the main thread, where none arrives, there will be no request.

    A warning that is ignored stays so, as under nohup, and so does one that something other than Python handles.
    """
    handlers_before: dict[Any, Any] = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [number for number in WARNINGS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
        for number in (*HASTY, *wanted):
            handlers_before[number] = signal.signal(number, stop.receive)
    try:
        yield
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python did not set
