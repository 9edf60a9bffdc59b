"""The command line of scripts and tools: how settings are read and how a program ends."""

import copy
import os
import re
import shlex
import subprocess
import sys
from argparse import SUPPRESS, Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from config import (
    PAID_AT_END,
    PAID_AT_END_SHARED,
    PRESETS,
    EvalConfig,
    PathUse,
    Range,
    TrainConfig,
    UserError,
    check_path,
    check_ranges,
    runs_python,
)

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from runtime.saved_run import NEWEST, SavedRun, resume_folder

T = TypeVar("T")
Config = TypeVar("Config", TrainConfig, EvalConfig)

# What --help shows on top
FIRST = {
    TrainConfig: ("preset", "policy_name", "rm_name", "dataset", "ckpt_dir", "resume", "total_steps", "lr", "kl_coef"),
    EvalConfig: ("preset", "policy_path", "rm_name", "dataset", "frontier", "n_samples", "out_csv"),
}
OF_ONE_START = {"resume", "allow_changes", "overwrite", "check"}  # settings that a resumed run does not take over
METAVARS = {str: "TEXT", int: "N", float: "X", string_to_bool: "true|false"}


# --- how a program ends ---------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """The program ends early with an exit code of its own; whatever had to be saved is saved.

    at_once leaves without the interpreter's clean-up, which would wait for processes that have died. It is no
    Exception, so that handlers of errors let it pass.
    """

    def __init__(self, code: int, message: str, at_once: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.at_once = at_once


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


# --- how settings are read ------------------------------------------------------------------------------------------


def parse_config(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The settings that a command line gives to train.py or eval.py; flags win over all else."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # 1. The preset's values
    parser = OneLineParser(cls, cls.__doc__, FIRST[cls])
    preset = preset_of(argv)
    if preset not in PRESETS[cls]:
        raise UserError(f"preset={preset!r} is unknown: choose {' or '.join(PRESETS[cls])}")
    parser.set_defaults(**asdict(PRESETS[cls][preset]))
    values = vars(parser.parse_args(argv))
    # 2. What suits a Python reward
    if cls is TrainConfig and PRESETS[cls][preset].reward_every and runs_python(values["rm_name"]):
        parser.set_defaults(**PAID_AT_END)
        paid_at_end = vars(parser.parse_args(argv))
        if paid_at_end["critic"] == "shared":
            parser.set_defaults(**PAID_AT_END_SHARED)
            paid_at_end = vars(parser.parse_args(argv))
        if not paid_at_end["reward_every"]:  # otherwise a flag asks for partial scores
            values = paid_at_end
    # 3. The settings of the run to resume
    if values.get("resume"):
        run = run_to_resume(values["resume"], values["ckpt_dir"])
        if run.exists:
            parser.set_defaults(**settings_to_resume(run, values["rm_name"], PRESETS[cls][preset].rm_name))
            values = {**vars(parser.parse_args(argv)), "ckpt_dir": str(run.folder)}
    return cls(**{f.name: values[f.name] for f in fields(cls)})


def preset_of(argv: Sequence[str]) -> str:
    """The preset that a command line names; it is read first, because its values are the defaults of the flags."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", default="default", const="")
    return str(parser.parse_known_args(argv)[0].preset)


def run_to_resume(resume: str, ckpt_dir: str) -> SavedRun:
    """The run that --resume means; without a value, there may be none yet."""
    run = SavedRun(resume_folder(resume, ckpt_dir))
    if not run.exists and resume != NEWEST:
        raise UserError(f"resume={resume} is neither the folder of a run nor one of its checkpoints")
    return run


def settings_to_resume(run: SavedRun, rm_name: str, default_rm_name: str) -> dict[str, Any]:
    """The settings of a run that are those of its continuation, where no flag gives another value.

    A Python reward must be named by the user: a run folder may be from anyone. rm_name is the one named now.
    """
    saved = run.settings
    try:
        TrainConfig(**saved)
    except UserError as error:
        raise UserError(f"{run.config_json} is damaged ({error}): fix it, or start anew without --resume") from None
    kept = {name: value for name, value in saved.items() if name not in OF_ONE_START}
    if runs_python(saved.get("rm_name", "")):
        if rm_name == default_rm_name and not runs_python(rm_name):
            raise UserError(run.refuse_code())
        del kept["rm_name"]
    return kept


def parse_flags(cls: type[T], argv: Sequence[str] | None, doc: str | None, first: str = "") -> T:
    """The settings that a command line gives to a tool.

    Words before the first flag are the values of the setting `first`, where one is named.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    if first and given and not given[0].startswith("-"):
        given = [f"--{first}", *given]
    settings = cls(**vars(OneLineParser(cls, doc, words=first).parse_args(given)))
    check_ranges(settings)
    return settings


def numbers(name: str, text: str, kind: type) -> list[Any]:
    """Split a setting that lists numbers: `1,2` -> [1, 2]."""
    try:
        return [kind(x) for x in text.split(",")]
    except ValueError:
        raise UserError(f"{name}={text!r} is not understood: write numbers with commas between them") from None


def words(name: str, text: str) -> list[str]:
    """Split a setting that holds a command line into its words."""
    try:
        return shlex.split(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not understood: a quotation mark is not closed") from None


def shell_command(*words: str) -> str:
    """A command line that this system's shell splits into these words again."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def whole_path(setting: str, path: str, use: PathUse) -> str:
    """A path with the home folder in the place of its ~, which shells leave in `--setting=~/x`."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise UserError(f"{setting}={path} begins with ~, but there is no such user: write the path out, or ./{path}")
    check_path(setting, expanded, use)
    return expanded


class OneLineParser(HfArgumentParser):
    """A parser of command lines whose errors are UserErrors; its help has headings, and the flags in `first` on top."""

    def __init__(self, cls: type, doc: str | None, first: Sequence[str] = (), words: str = "") -> None:
        """Flags for the fields of a dataclass; `words` names the one that takes the words before the first flag."""
        self.first = first
        self.heading = "Settings"
        self.groups: dict[str, Any] = {}  # heading -> its group of flags
        super().__init__(
            cls,
            allow_abbrev=False,
            description=doc,
            usage=f"python {script_name()} {f'[{words} ...] ' if words else ''}[--setting value ...]",
            formatter_class=HelpFormatter,
        )
        self._negative_number_matcher = re.compile(r"-\d.*")  # --label_names -1=bad,1=good: a value and no flag

    def add_argument(
        self, *flags: str, within: Range | None = None, heading: str = "", path: PathUse = "", **settings: Any
    ) -> Action:
        """Add a flag under its heading, or under that of the flag before; its range is checked later."""
        if flags[0] == "-h":
            return ArgumentParser.add_argument(self, *flags, **settings)
        name = flags[0].removeprefix("--")
        if name == "resume":
            settings |= {"nargs": "?", "const": NEWEST}
        if "type" in settings and not settings.get("choices"):
            settings["metavar"] = METAVARS.get(settings["type"], "VALUE")
        if path:
            settings["type"] = lambda text: whole_path(name, text, path)
        self.heading = heading or self.heading
        title = "What matters first" if name in self.first else self.heading
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        added: Action = self.groups[title].add_argument(*flags, **settings)
        return added

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UserError(f"{message.removeprefix('argument ')} (see --help)")


class HelpFormatter(RawDescriptionHelpFormatter):
    """Help with defaults and one spelling of each flag."""

    def _format_action_invocation(self, action: Action) -> str:
        one = copy.copy(action)
        one.option_strings = [flag for flag in action.option_strings if "_" in flag] or action.option_strings
        return super()._format_action_invocation(one)

    def _get_help_string(self, action: Action) -> str | None:
        default = " ".join(action.default) if isinstance(action.default, list) else action.default
        return action.help if default in (None, "", SUPPRESS) else f"{action.help} (default: {default})"


def script_name() -> str:
    """How the running script is called: `train.py`, or `-m tools.sample`."""
    script = Path(sys.argv[0])
    room = script.parent.name
    return f"-m {room}.{script.stem}" if room in ("tools", "experiments") else script.name
