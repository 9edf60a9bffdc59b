"""How a run is asked to stop: Ctrl-C or SIGTERM once to stop soon and save, twice to stop at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tqdm import tqdm

from runtime.cli import Interrupted, Stopped
from runtime.distributed import all_reduce_max, is_main_process, world_size


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
            if alone:
                raise Stopped(128 + number, "")
            return  # torchrun repeats the signals that its processes have received, and kills them if they are slow
        self.signal = number
        with suppress(OSError, RuntimeError):  # stderr may be closed
            if is_main_process():
                tqdm.write("stopping" + " (again: at once)" * alone, file=sys.stderr)
        if self.interruptible:
            raise Interrupted


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request to stop."""
    stop = StopRequest()
    before = {number: signal.signal(number, stop.receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
