"""The command line of scripts and tools: how settings are read and how a program ends."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from config import OneLineParser, UserError

T = TypeVar("T")


class Stopped(BaseException):
    """The program ends early with an exit code of its own; whatever had to be saved is saved.

    at_once leaves without the interpreter's clean-up, which would wait for processes that have died. It is no
    Exception, so that handlers of errors let it pass.
    """

    def __init__(self, code: int, message: str, at_once: bool = False) -> None:
        super().__init__(message)
        self.code, self.at_once = code, at_once


def run(main: Callable[[], object]) -> int:
    """Run a script's main function and return the exit code: 0 done, 2 wrong input, otherwise that of Stopped.

    Wrong input is one line on stderr. 130 is Ctrl-C before there was anything to save.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a stream that is no file
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a console may lack letters of a text
    try:
        main()
    except UserError as error:
        return _report(2, f"error: {' '.join(str(error).split())}")
    except Stopped as stop:
        if not stop.at_once:
            return _report(stop.code, str(stop))
        print(stop, end="\n" if str(stop) else "", file=sys.stderr, flush=True)
        os._exit(stop.code)
    except (RuntimeError, MemoryError) as error:
        from runtime.device import lacks_memory  # it loads torch, which other programs need not

        if not lacks_memory(error):
            raise
        return _report(2, "error: out of memory: take a smaller model, batch or text")
    except BrokenPipeError:  # the reader has gone: `python train.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    return 0


def was_launched() -> bool:
    """Whether torchrun, or another launcher of several processes, started this one.

    Some machines set WORLD_SIZE for no reason, and shells keep LOCAL_RANK.
    """
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def _report(code: int, line: str) -> int:
    # every rank of a machine fails alike, and the first says so; without a meeting place there are no others
    others_report = was_launched() and "MASTER_ADDR" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
    if line and not others_report:
        print(line, file=sys.stderr)
    return code


def parse_flags(cls: type[T], argv: Sequence[str] | None, doc: str | None, first: str = "") -> T:
    """Read a tool's command line into its settings dataclass (raises UserError).

    Words before the first flag are the values of the setting `first`, where one is named.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if first and given and not given[0].startswith("-"):
        given = [f"--{first}", *given]
    return cls(**vars(OneLineParser(cls, doc, words=first).parse_args(given)))


def command(script: str, **settings: object) -> str:
    """A command that runs a script with some settings, as a shell reads it."""
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return shell_command("python", script, *words)


def numbers(name: str, text: str, kind: type) -> list[Any]:
    """Split a setting that lists numbers: `1,2` -> [1, 2] (raises UserError)."""
    try:
        return [kind(x) for x in text.split(",")]
    except ValueError:
        raise UserError(f"{name}={text!r} is not understood: write numbers with commas between them") from None


def shell_command(*words: str) -> str:
    """A command line that this system's shell splits into these words again."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def words(name: str, text: str) -> list[str]:
    """Split a setting that holds a command line into its words (raises UserError)."""
    try:
        return shlex.split(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not understood: a quotation mark is not closed") from None
