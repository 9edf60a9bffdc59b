"""The floors of the house: imports only ever point down, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [
    {"config"},
    {"runtime"},
    {"utils"},
    {"model", "reward", "data", "pretrain"},
    {"ppo"},
    {"training", "evaluation"},
    {"train", "eval"},
    {"tools", "experiments"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SAME_FLOOR = {
    ("evaluation", "training"),  # it loads runs, and writes into their model cards
    ("pretrain", "data"),  # models are pretrained from texts that data.py reads
    ("reward", "pretrain"),  # a user's reward may build a classifier of the tiny world by its name
}
MODULES = sorted(
    path.relative_to(ROOT)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
    if path.parent.name != "tests" and path != ROOT / "rewards.py"
)  # that is a user's own


def imports(source: str) -> set[str]:
    """First names of all modules imported anywhere in the source, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            found.add((node.module or "").split(".")[0])
    return found


def breaches(room: str, source: str) -> set[str]:
    """Which rooms this one must not import, but does; a folder may import from itself."""
    rooms = {name for name in imports(source) & FLOOR.keys() if name != room}
    wrong = {name for name in rooms if FLOOR[name] >= FLOOR[room] and (room, name) not in SAME_FLOOR}
    return wrong | imports(source) & {"tests", "conftest"}


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_down(path: Path) -> None:
    assert not breaches(room_of(path), (ROOT / path).read_text(encoding="utf-8"))


def test_every_module_is_on_a_floor_and_every_floor_has_modules() -> None:
    assert {room_of(path) for path in MODULES} == FLOOR.keys()


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("utils", "import ppo", {"ppo"}),
        ("utils", "from runtime.files import fsync", set()),
        ("runtime", "from utils import whiten", {"utils"}),
        ("runtime", "from runtime.cli import run", set()),
        ("model", "from reward import x", {"reward"}),
        ("model", "def f():\n    import data", {"data"}),
        ("pretrain", "import data", set()),
        ("pretrain", "import reward", {"reward"}),
        ("reward", "from pretrain.tiny_world import x", set()),
        ("reward", "import data", {"data"}),
        ("data", "from pretrain.corpus import x", {"pretrain"}),
        ("ppo", "from training.parts import x", {"training"}),
        ("training", "from evaluation.summary import x", {"evaluation"}),
        ("train", "from training.parts import x\nimport ppo", set()),
        ("eval", "from train import main", {"train"}),
        ("train", "from experiments.benchmark import x", {"experiments"}),
        ("train", "from tools.sample import x", {"tools"}),
        ("train", "import conftest", {"conftest"}),
    ],
)
def test_a_breach_is_found(room: str, source: str, wrong: set[str]) -> None:
    assert breaches(room, source) == wrong


def test_config_needs_no_torch() -> None:
    assert not imports((ROOT / "config.py").read_text(encoding="utf-8")) & {"torch", "datasets"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_importing_does_nothing(path: Path) -> None:
    """At the top of a module stand definitions and constants, and no call whose result is thrown away.

    Two exceptions must come before torch is imported: a default for the environment, and a refusal of old Pythons.
    """
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    for node in tree.body:
        if ast.unparse(node).startswith(("os.environ.setdefault(", "if sys.version_info <", "if __name__ ==")):
            continue
        is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        assert not is_call, f"{path}:{node.lineno} acts on import"
        assert not isinstance(node, ast.If | ast.For | ast.While | ast.With), f"{path}:{node.lineno}"


def test_config_is_imported_before_torch_everywhere() -> None:
    """It sets a variable that torch reads once; the linter sorts it there."""
    for path in MODULES:
        names = [
            n.module or "" if isinstance(n, ast.ImportFrom) else n.names[0].name
            for n in ast.parse((ROOT / path).read_text(encoding="utf-8")).body
            if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        if "config" in names and "torch" in names:
            assert names.index("config") < names.index("torch"), path


@pytest.mark.parametrize(("file", "code"), [("rewards.py", 0), ("tools/rewards.py", 1)])
def test_a_users_rewards_are_not_held_to_this_style(file: str, code: int) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--force-exclude", "--no-cache", "--stdin-filename", file, "-"]
    assert subprocess.run(command, input=b"import os,sys", cwd=ROOT, capture_output=True).returncode == code
