"""How a run is asked to stop: by Ctrl-C or SIGTERM, once to stop soon and be saved, twice to stop at once."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tqdm import tqdm

from utils import is_first, largest, world_size


class Abandoned(BaseException):
    """The run was asked to stop where what it is doing can be forgotten."""


@dataclass
class Stop:
    """The signal that asked the run to stop, if one did; several processes do nothing but in step."""

    alone: bool = True
    signal: int | None = None
    abandoning: bool = False

    @contextmanager
    def may_abandon(self, allowed: bool = True) -> Iterator[None]:
        """Where a request to stop need not wait: what is begun here is forgotten (raises Abandoned)."""
        self.abandoning = allowed and self.alone
        try:
            if self.abandoning and self.signal is not None:
                raise Abandoned
            yield
        finally:
            self.abandoning = False

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all know then."""
        self.signal = int(largest(self.signal or 0)) or None
        return self.signal is not None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM stop the run at the next place where it can be saved; a second stops at once."""
    stop = Stop(alone=world_size() == 1)

    def ask(number: int, frame: object) -> None:
        if stop.signal is not None:
            if stop.alone:
                sys.exit(128 + number)
            return  # torchrun passes on what its processes have been told already, and kills them if they take too long
        stop.signal = number
        with suppress(OSError, RuntimeError):  # nobody may be listening any more
            if is_first():
                tqdm.write("stopping" + " (again: at once)" * stop.alone, file=sys.stderr)
        if stop.abandoning:
            raise Abandoned

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
