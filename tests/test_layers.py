"""Imports only ever point down, and siblings do not import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOOR = {
    "train": 4,
    "eval": 4,
    "ppo": 3,
    "model": 2,
    "reward": 2,
    "data": 2,
    "utils": 1,
    "config": 0,
}
ROOMS = sorted(room for room in FLOOR if (ROOT / f"{room}.py").exists())


def imports(source: str) -> set[str]:
    """First names of all modules imported anywhere in the source, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the layout is flat: no relative imports"
            found.add((node.module or "").split(".")[0])
    return found


def breaches(room: str, source: str) -> set[str]:
    """Which rooms this one must not import, but does."""
    names = imports(source)
    wrong = {name for name in names & FLOOR.keys() if FLOOR[name] >= FLOOR[room]}
    if FLOOR[room] < 4:
        wrong |= names & {"tools"}
    return wrong | names & {"tests", "conftest"}


@pytest.mark.parametrize("room", ROOMS)
def test_layers_imports_point_down(room: str) -> None:
    assert not breaches(room, (ROOT / f"{room}.py").read_text(encoding="utf-8"))


def test_layers_are_complete() -> None:
    """No room without a floor, and the rooms below the entry scripts all exist."""
    assert {path.stem for path in ROOT.glob("*.py")} <= FLOOR.keys()
    assert {room for room, floor in FLOOR.items() if floor < 4} <= set(ROOMS)


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("utils", "import ppo", {"ppo"}),
        ("model", "from reward import x", {"reward"}),
        ("model", "def f():\n    import data", {"data"}),
        ("model", "import torch\nfrom utils import x\nfrom config import UserError", set()),
        ("ppo", "from tools.bench import x", {"tools"}),
        ("train", "from tools.make_models import x\nimport ppo", set()),
        ("eval", "from train import main", {"train"}),
        ("train", "import conftest", {"conftest"}),
    ],
)
def test_layers_breach_is_found(room: str, source: str, wrong: set[str]) -> None:
    assert breaches(room, source) == wrong


def test_config_needs_no_torch() -> None:
    names = imports((ROOT / "config.py").read_text(encoding="utf-8"))
    assert "torch" not in names
    assert "datasets" not in names


@pytest.mark.parametrize("room", ROOMS)
def test_layers_importing_does_nothing(room: str) -> None:
    """At the top of a module stand definitions and constants, and no call whose result is thrown away.

    A default for the environment may stand there, because it must be said before torch is imported.
    """
    tree = ast.parse((ROOT / f"{room}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if ast.unparse(node).startswith("os.environ.setdefault("):
            continue
        is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        assert not is_call, f"{room}.py:{node.lineno} acts on import"
        assert not isinstance(node, ast.For | ast.While | ast.With), f"{room}.py:{node.lineno}"
