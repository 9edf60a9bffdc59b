"""A user's code and the program in one process: neither changes the other's settings, nor hides its modules."""

import hashlib
import os
import signal
import sys
import textwrap
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from config import UserError

import numpy as np
import pytest
import torch

import utils
from runtime.user_code import PROGRAM, ROOT, UserCode


def load(folder: Path, source: str = "", name: str = "mine.py", **neighbours: str) -> tuple[UserCode, ModuleType]:
    """Code of this source, with neighbours as module_name=source, as it is after being loaded."""
    for neighbour, text in neighbours.items():
        (folder / f"{neighbour}.py").write_text(textwrap.dedent(text))
    (folder / name).write_text(textwrap.dedent(source))
    code = UserCode(str(folder / name), "rm_name")
    with code.running():
        module = code.load()
    return code, module


def call(code: UserCode, module: ModuleType, name: str, *args: Any) -> Any:
    with code.running():
        return getattr(module, name)(*args)


# --- processes ------------------------------------------------------------------------------------------------------

POOL = """
    import multiprocessing

    def one(text): return float(len(text))

    def score(texts, method):
        with multiprocessing.get_context(method).Pool(1) as pool:
            return pool.map_async(one, texts).get(timeout=60)
"""


@pytest.mark.parametrize("method", [m for m in ("spawn", "forkserver") if sys.platform != "win32" or m == "spawn"])
def test_a_process_pool_can_import_the_code(method: str, tmp_path: Path) -> None:
    code, module = load(tmp_path, POOL, "pooled.py")
    assert call(code, module, "score", ["four", "sixsix"], method) == [4, 6]
    assert module.__name__ == "pooled"


def test_a_process_imports_the_neighbours_and_not_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", __import__("ppo"))  # what processes import where they are spawned
    source = f"import config, utils\n{textwrap.dedent(POOL)}\ndef one(text): return [config.A, utils.B]\n"
    source += "import os, sys\ndef main(text): return 'torch' in sys.modules\n"
    code, module = load(tmp_path, source, config="A = 1", utils="B = 2")
    assert call(code, module, "score", ["x"], "spawn") == [[1, 2]]
    module.one = module.main  # type: ignore[attr-defined]
    assert call(code, module, "score", ["x"], "spawn") == [False], "quick to start, and little memory"


def test_an_executor_that_is_kept_is_used_by_later_calls(tmp_path: Path) -> None:
    source = """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        def one(x): return x + 1
        def score(xs): return [*pool.map(one, xs, timeout=60)]
        def close(): pool.shutdown()
        """
    code, module = load(tmp_path, source)
    assert call(code, module, "score", [1, 2]) == [2, 3]
    assert call(code, module, "score", [3]) == [4]
    call(code, module, "close")


# --- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["utils", "config", "data", "reward", "ppo", "runtime"])
def test_a_neighbour_named_like_a_module_of_the_program(name: str, tmp_path: Path) -> None:
    before = sys.modules.get(name)
    code, module = load(
        tmp_path,
        f"import {name}\nVALUE = {name}.VALUE\ndef late():\n  import {name}\n  return {name}.VALUE",
        **{name: "VALUE = 'the neighbour'"},
    )
    assert module.VALUE == call(code, module, "late") == "the neighbour"
    if before is not None:
        assert sys.modules[name] is before
    assert not hasattr(__import__(name), "VALUE")
    assert sys.modules["runtime.user_code"].UserCode is UserCode


def test_a_package_beside_the_code_hides_no_submodule_of_the_program(tmp_path: Path) -> None:
    package = tmp_path / "runtime"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text("VALUE = 1")
    (package / "other.py").write_text("VALUE = 2")
    code, module = load(
        tmp_path,
        "import runtime.cli\nfrom runtime.other import VALUE as OTHER\nVALUE = runtime.cli.VALUE\n"
        "def late():\n  from runtime import cli\n  return cli.VALUE\n",
    )
    assert (module.VALUE, module.OTHER, call(code, module, "late")) == (1, 2, 1)
    import runtime.cli

    assert hasattr(runtime.cli, "Stopped")
    assert "runtime.other" not in sys.modules


def test_the_programs_modules_remain_at_hand(tmp_path: Path) -> None:
    _, module = load(tmp_path, "import utils\nfrom reward import SentimentReward as R", utils="")
    assert module.R is __import__("reward").SentimentReward
    assert utils is sys.modules["utils"] is not module.utils


def test_the_file_itself_may_be_named_like_a_module_of_the_program(tmp_path: Path) -> None:
    code, module = load(tmp_path, POOL, "utils.py")
    assert module.__name__ == "utils"
    assert call(code, module, "score", ["four"], "spawn") == [4]
    assert sys.modules["utils"] is utils


def test_a_neighbour_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "utils.py").write_text("X = []")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "utils.py").symlink_to(tmp_path / "elsewhere" / "utils.py")
    code, module = load(tmp_path / "a", "import utils\ndef f():\n  import utils\n  utils.X.append(1)\n  return utils.X")
    assert [len(call(code, module, "f")) for _ in range(3)] == [1, 2, 3]
    assert sys.modules["utils"] is utils
    before = code.sha256()
    assert before == load(tmp_path / "b", Path(code.file).read_text())[0].sha256()
    (tmp_path / "elsewhere" / "utils.py").write_text("X = [0]")
    assert code.sha256() != before


def test_two_folders_do_not_share_their_modules(tmp_path: Path) -> None:
    loaded = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        source = f"import helper\ndef f():\n  import later, helper\n  return {name!r}, helper.X, later.X"
        loaded.append(load(tmp_path / name, source, "same.py", helper=f"X = '{name} helper'", later=f"X = '{name}'"))
    for _ in range(2):
        for name, (code, module) in zip("ab", loaded, strict=True):
            assert call(code, module, "f") == (name, f"{name} helper", name)


def test_code_within_code(tmp_path: Path) -> None:
    """One reward may load and call another."""
    (tmp_path / "inner").mkdir()
    inner, module = load(tmp_path / "inner", "import utils\ndef f():\n  import utils\n  return utils.X", utils="X = 1")
    outer, other = load(
        tmp_path, "def f(g):\n  import utils\n  a = utils.X, g()\n  import utils\n  return *a, utils.X", utils="X = 2"
    )
    assert call(outer, other, "f", lambda: call(inner, module, "f")) == (2, 1, 2)
    assert sys.modules["utils"] is utils


def test_the_same_file_is_read_anew(tmp_path: Path) -> None:
    """Of the same length, in the same second: no compiled file of an older text is used."""
    assert [load(tmp_path, f"X = {i}")[1].X for i in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "name", ["random.py", "types.py", "torch.py", "numpy.py", "a.b.py", "__init__.py", "__main__.py"]
)
def test_a_name_that_cannot_be_imported_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rename the file") as caught:
        load(tmp_path, "raise SystemExit", name)
    assert str(caught.value).startswith("rm_name")


@pytest.mark.parametrize("name", ["my-rewards.py", "mine 2.py", "größe.py"])
def test_a_name_may_be_no_identifier(name: str, tmp_path: Path) -> None:
    code, module = load(tmp_path, POOL, name)
    assert call(code, module, "score", ["four"], "spawn") == [4]


def test_a_module_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named package.module, with relative imports, and a neighbour of the package that is named like one of ours."""
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "scores.py").write_text(
        "import utils\nfrom . import near\nX = utils.X, near.X\n" + textwrap.dedent(POOL)
    )
    (tmp_path / "a_package" / "near.py").write_text("X = 2")
    (tmp_path / "utils.py").write_text("X = 1")
    monkeypatch.chdir(tmp_path)
    code = UserCode("a_package.scores", "rm_name")
    with code.running():
        module = code.load()
    assert module.X == (1, 2)
    assert call(code, module, "score", ["four"], "spawn") == [4]
    assert sys.modules["utils"] is utils
    assert code.file == str(tmp_path / "a_package" / "scores.py")


@pytest.mark.parametrize("name", ["transformers.utils.versions", "json.decoder", "numpy"])
def test_a_module_of_a_library_is_imported_as_ever(name: str) -> None:
    before = {key: module for key, module in sys.modules.items() if key.startswith(("torch", "numpy", "transformers"))}
    code = UserCode(name, "rm_name")
    with code.running():
        module = code.load()
        assert sys.modules[name] is module
        assert sys.modules["torch"] is torch
    assert all(sys.modules[key] is module for key, module in before.items())


def test_the_hash_covers_the_neighbours_that_are_imported(tmp_path: Path) -> None:
    source = "from helper import X"
    alone = load(tmp_path, "X = 1", helper="X = 1")[0].sha256()
    assert alone == hashlib.sha256(b"X = 1").hexdigest(), "not those that are not"
    first = load(tmp_path, source, helper="X = 1")[0].sha256()
    assert load(tmp_path, source, helper="X = 1", other="Y = 1")[0].sha256() == first
    assert load(tmp_path, source, helper="X = 2")[0].sha256() != first
    assert load(tmp_path, source + " ", helper="X = 1")[0].sha256() != first
    (tmp_path / "elsewhere").mkdir()
    assert load(tmp_path / "elsewhere", source, helper="X = 1")[0].sha256() == first


def test_every_module_of_the_program_is_listed() -> None:
    rooms = {path.stem for path in [*ROOT.glob("*.py"), *(p.parent for p in ROOT.glob("[a-z]*/__init__.py"))]}
    assert rooms - {"rewards"} <= PROGRAM


# --- settings -------------------------------------------------------------------------------------------------------

CHANGES = {
    "torch.set_grad_enabled(False)": torch.is_grad_enabled,
    "torch.set_default_dtype(torch.float64)": lambda: torch.tensor([1.0]).dtype,
    "torch.set_default_device('meta')": lambda: torch.ones(1).device,
    "torch.set_num_threads(torch.get_num_threads() + 1)": torch.get_num_threads,
    "torch.use_deterministic_algorithms(True)": torch.are_deterministic_algorithms_enabled,
    "torch.autograd.set_detect_anomaly(True)": torch.is_anomaly_enabled,
    "torch.set_float32_matmul_precision('medium')": torch.get_float32_matmul_precision,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": lambda: torch.backends.cuda.matmul.fp32_precision,
    "torch.backends.cudnn.benchmark = True": lambda: torch.backends.cudnn.benchmark,
    "torch.backends.cuda.enable_flash_sdp(False)": torch.backends.cuda.flash_sdp_enabled,
    "numpy.seterr(all='raise')": np.geterr,
    "os.chdir(os.path.dirname(__file__))": os.getcwd,
    "sys.path.insert(0, 'somewhere')": lambda: [*sys.path],
    "sys.path = ['somewhere']": lambda: [*sys.path],
    "warnings.simplefilter('error')": lambda: [*warnings.filters],
    "warnings.filters.clear()": lambda: [*warnings.filters],
    "signal.signal(signal.SIGINT, signal.SIG_IGN)": lambda: signal.getsignal(signal.SIGINT),
    "signal.signal(signal.SIGTERM, print)": lambda: signal.getsignal(signal.SIGTERM),
    "sys.stdout = open(os.devnull, 'w')": lambda: sys.stdout,
    "sys.stderr = open(os.devnull, 'w')": lambda: sys.stderr,
    "sys.modules['__main__'] = os": lambda: sys.modules["__main__"],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("end", ["", "raise ValueError", "raise KeyboardInterrupt"])
def test_a_setting_of_the_code_is_not_one_of_the_program(change: str, end: str, tmp_path: Path) -> None:
    """Changed by a call, which may fail."""
    source = f"import numpy, os, signal, sys, torch, warnings\ndef f(state):\n  {change}\n  {end}\n"
    code, module = load(tmp_path, source)
    state = CHANGES[change]
    here = [*sys.path]
    before = state()
    try:
        call(code, module, "f", state)
    except (ValueError, KeyboardInterrupt):
        assert end
    assert state() == before
    assert torch.tensor([1.0], requires_grad=True).exp().requires_grad
    assert sys.path == here


@pytest.mark.parametrize("change", [x for x in CHANGES if x.startswith(("torch.set_default", "numpy", "os", "warn"))])
def test_a_setting_made_on_import_is_in_force_in_calls(change: str, tmp_path: Path) -> None:
    state = CHANGES[change]
    before = state()
    code, module = load(tmp_path, f"import numpy, os, sys, torch, warnings\n{change}\ndef f(state): return state()")
    assert state() == before
    assert call(code, module, "f", state) == call(code, module, "f", state) != before
    assert state() == before


def test_a_working_folder_that_is_gone_is_not_gone_back_to(tmp_path: Path) -> None:
    source = "import os, tempfile\nwith tempfile.TemporaryDirectory() as d: os.chdir(d)\ndef f(): return 1"
    here = os.getcwd()
    code, module = load(tmp_path, source)
    assert call(code, module, "f") == 1
    assert os.getcwd() == here


def test_random_numbers_are_the_codes_own(tmp_path: Path) -> None:
    """They go on from call to call: a noise that began anew in every call would be the same noise."""
    code, module = load(tmp_path, "import random, torch\ndef f(): return random.random(), torch.rand(1).item()")
    assert call(code, module, "f") != call(code, module, "f")


def test_settings_are_put_back_where_loading_fails(tmp_path: Path) -> None:
    here, main = os.getcwd(), sys.modules["__main__"]
    with pytest.raises(ZeroDivisionError):
        load(tmp_path, "import os, torch, utils\nos.chdir('/')\ntorch.set_default_dtype(torch.half)\n1 / 0", utils="")
    assert os.getcwd() == here
    assert torch.get_default_dtype() == torch.float32
    assert sys.modules["__main__"] is main
    assert sys.modules["utils"] is utils
