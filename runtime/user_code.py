"""Runs a user's Python: imported under its own name, with the program's state restored after it.

While it runs, the code finds the modules beside it first, as a script does, and what it has set for itself is in force:
the working folder, sys.path, torch's defaults. In between the program's are. Neither disturbs the other. Processes that
the code starts import it by the name of its file.

Left as the code sets them: environment variables, start methods, logging, and the libraries' random numbers, which the
run does not draw from.
"""

import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from config import UserError

import numpy as np
import torch

from runtime.cli import Stopped
from runtime.device import lacks_memory

ROOT = Path(__file__).resolve().parent.parent
FILES = {"config", "data", "eval", "model", "ppo", "reward", "train", "utils"}
FOLDERS = {"evaluation", "experiments", "pretrain", "runtime", "tests", "tools", "training"}
PROGRAM = FILES | FOLDERS  # beside which a user's files may stand
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # their handlers save a run


class UserCode:
    """A file or module of the user's: loaded once, then entered with `running` whenever it is called."""

    folders = {ROOT}  # noqa: RUF012 # of all user code and of the program; their modules may have the same names

    def __init__(self, place: str, setting: str) -> None:
        """`place` is file.py or package.module; where it cannot be that, UserError begins with `setting`."""
        self.place = place
        self.setting = setting
        self.file = place
        self.source = b""
        self.modules: dict[str, ModuleType] = {}  # those from its folder, by their names in sys.modules
        self.main = ModuleType("__main__")
        self.settings: list[Any] = []  # its own, once it has run; likewise its filters of warnings
        self.filters: list[Any] = []
        self.is_file = place.endswith(".py")
        if self.is_file and not Path(place).is_file():
            raise UserError(f"{setting}: there is no file {place}")
        self.folder = Path(place).resolve().parent if self.is_file else _folder_of_package(place)
        self.names = self._top_level_names()
        if self.is_file:
            self._check_name(Path(place).resolve().stem)
        if self.folder is not None:
            if not _holds_libraries(self.folder):
                UserCode.folders.add(self.folder)
            if str(self.folder) not in sys.path:
                sys.path.append(str(self.folder))  # at the end: its modules hide none of the program

    def load(self) -> ModuleType:
        """Import the module; to be called while it is `running`."""
        first = str(self.folder or os.getcwd())
        sys.path[:] = [first, *(path for path in sys.path if path != first)]
        importlib.invalidate_caches()
        if not self.is_file:
            module = importlib.import_module(self.place)
            if module.__file__:
                self.file = module.__file__
                self.source = Path(module.__file__).read_bytes()
            return module
        path = Path(self.place).resolve()
        self.file = str(path)
        self.source = path.read_bytes()  # read once: what is recorded is what runs
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # where pickle and child processes look
        exec(compile(self.source, self.file, "exec", dont_inherit=True), module.__dict__)
        return module

    def sha256(self) -> str:
        """Hash of the file and of the modules from its folder that it has imported; of the file alone without any."""
        own = hashlib.sha256(self.source).hexdigest()
        lines = [own]
        for name, module in sorted(self.modules.items()):
            if module.__file__ and Path(module.__file__).resolve() != Path(self.file).resolve():
                lines.append(f"{name} {hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest() if len(lines) > 1 else own

    def hidden_modules(self) -> list[str]:
        """Modules of the program that have a namesake beside the code, which the code imports instead."""
        return sorted(self.names & PROGRAM) if self.folder != ROOT else []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Put the code's own modules and settings in force, and the program's again at the end.

        Its child processes do not import the program: __main__ is empty meanwhile.
        """
        settings = _settings()
        handlers = _stop_handlers()
        main = sys.modules["__main__"]
        others = self._set_aside()
        sys.modules["__main__"] = self.main
        with (
            warnings.catch_warnings(),
            redirect_stdout(sys.stdout),
            redirect_stderr(sys.stderr),
            torch.set_grad_enabled(torch.is_grad_enabled()),
        ):
            try:
                if self.settings:
                    _restore(self.settings)
                    warnings.filters[:] = self.filters  # type: ignore[index]
                yield
            finally:
                self.settings = _settings()
                self.filters = list(warnings.filters)
                self._put_back(others)
                sys.modules["__main__"] = main
                for number, handler in handlers.items():
                    if signal.getsignal(number) is not handler:
                        signal.signal(number, handler)
                _restore(settings)

    def _top_level_names(self) -> set[str]:
        """Names that are imported from the code's folder, but those of the program where the two share one."""
        if self.folder is None:
            return set()
        own = Path(self.place).resolve().stem if self.is_file else _top(self.place)
        if _holds_libraries(self.folder):
            return {own}
        files = {path.stem for path in self.folder.glob("*.py")}
        packages = {path.parent.name for path in self.folder.glob("*/__init__.py")}
        of_the_program = PROGRAM if self.folder == ROOT else set()
        return {own} | ((files | packages) - of_the_program)

    def _check_name(self, name: str) -> None:
        """Refuse a file that cannot be imported by its name."""
        other = sys.modules.get(name)
        if "." in name or name in ("__init__", "__main__", "__mp_main__"):
            reason = "a file of this name cannot be imported by other processes"
        elif name in sys.stdlib_module_names:
            reason = f"it would hide Python's own module {name!r}"
        elif other is not None and _origin(other) not in UserCode.folders | {self.folder}:
            reason = f"it would hide the module {name!r} of {_origin(other)}"
        else:
            return
        raise UserError(f"{self.setting}: {reason}: rename the file")

    def _set_aside(self) -> dict[str, ModuleType]:
        """Take modules with names of this code out of sys.modules, and put its own in; returns those taken."""
        taken = self._loaded_from(UserCode.folders)
        for name in taken:
            del sys.modules[name]
        sys.modules.update(self.modules)
        return taken

    def _put_back(self, taken: dict[str, ModuleType]) -> None:
        """Undo _set_aside. A name that nobody else had stays: threads of the code may import and pickle later."""
        self.modules = self._loaded_from({self.folder})
        tops = {_top(name) for name in taken}
        for name in self.modules:
            if _top(name) in tops:
                del sys.modules[name]
        sys.modules.update(taken)

    def _loaded_from(self, folders: Container[Path | None]) -> dict[str, ModuleType]:
        """The loaded modules with names of this code that come from some folders."""
        return {
            name: module
            for name, module in list(sys.modules.items())
            if _top(name) in self.names and _origin(sys.modules.get(_top(name))) in folders
        }


def is_of_the_program(error: BaseException) -> bool:
    """Whether an error that left a user's code is no fault of it.

    It is a request to stop, too little memory, or Ctrl-C where nothing else waits for it.
    """
    if isinstance(error, KeyboardInterrupt):
        in_main_thread = threading.current_thread() is threading.main_thread()  # Ctrl-C comes nowhere else
        return in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, Stopped) or lacks_memory(error)


# --- modules --------------------------------------------------------------------------------------------------------


def _top(name: str) -> str:
    return name.partition(".")[0]


def _origin(module: ModuleType | None) -> Path | None:
    """The folder that a top-level module was imported from."""
    if file := getattr(module, "__file__", None):
        path = Path(file)
        return (path.parent.parent if path.stem == "__init__" else path.parent).resolve()
    places = list(getattr(module, "__path__", []))
    return Path(places[0]).resolve().parent if places else None


def _folder_of_package(place: str) -> Path | None:
    """The folder that package.module would be imported from, the current one before others; None for a library's."""
    spec = importlib.machinery.PathFinder.find_spec(_top(place), [os.getcwd(), *sys.path])
    if spec is None:
        return None
    package = list(spec.submodule_search_locations or [])
    if package:
        folder = Path(package[0]).resolve().parent
    elif spec.origin:
        folder = Path(spec.origin).resolve().parent
    else:
        return None
    return None if _holds_libraries(folder) else folder


def _holds_libraries(folder: Path) -> bool:
    return any(_origin(sys.modules.get(name)) == folder for name in ("os", "numpy", "torch", "transformers"))


# --- settings -------------------------------------------------------------------------------------------------------


def _working_folder() -> str | None:
    with suppress(OSError):  # it may have been removed
        return os.getcwd()
    return None


def _change_folder(folder: str | None) -> None:
    if folder is not None and os.path.isdir(folder):
        os.chdir(folder)


def _set_path(path: list[str]) -> None:
    sys.path[:] = path


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


def _matmul_precision() -> str | None:
    with suppress(RuntimeError):  # torch refuses to tell where fp32_precision was set as well
        return torch.get_float32_matmul_precision()
    return None


def _set_matmul_precision(precision: str | None) -> None:
    if precision is not None:
        torch.set_float32_matmul_precision(precision)


def _attribute(owner: Any, names: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    *places, name = names.split(".")
    for place in places:
        owner = getattr(owner, place)
    return partial(getattr, owner, name), partial(setattr, owner, name)


SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (_working_folder, _change_folder),
    (lambda: list(sys.path), _set_path),
    (np.geterr, lambda kinds: np.seterr(**kinds)),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, _set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (_matmul_precision, _set_matmul_precision),  # before the precisions by backend, which it changes
    _attribute(torch.backends, "fp32_precision"),
    _attribute(torch.backends, "cuda.matmul.fp32_precision"),
    _attribute(torch.backends, "cudnn.conv.fp32_precision"),
    _attribute(torch.backends, "mkldnn.matmul.fp32_precision"),
    _attribute(torch.backends, "cudnn.benchmark"),
    _attribute(torch.backends, "cudnn.deterministic"),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
]


def _settings() -> list[Any]:
    return [get() for get, _ in SETTINGS]


def _restore(values: list[Any]) -> None:
    for (get, set_to), value in zip(SETTINGS, values, strict=True):
        if get() != value:
            set_to(value)


def _stop_handlers() -> dict[int, Any]:
    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    return {number: handler for number in numbers if (handler := signal.getsignal(number)) is not None}
