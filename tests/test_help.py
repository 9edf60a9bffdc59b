"""Every command explains itself."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [*(ROOT / "tools").glob("*.py"), *(ROOT / "experiments").glob("*.py")]
COMMANDS = sorted(
    f"{path.parent.name}.{path.stem}" for path in SCRIPTS if "def main(argv" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its usage is what one types, its text is that of the module, and no flag stands there twice."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{name.replace('.', '/')}.py"), "--help"])
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m {name} ")
    assert str(module.__doc__).splitlines()[0] in out
    flags = [line.split()[0] for line in out.splitlines() if line.startswith("  --")]
    assert flags
    assert len(flags) == len(set(flags))
    assert "['" not in out
