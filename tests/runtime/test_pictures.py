"""Pictures are drawn whatever the environment says of windows and notebooks."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DRAW = """
import sys
from pathlib import Path
import pandas as pd
from evaluation import pictures, runs_page
from experiments import pictures as study_pictures
from training.plots import plot_curves

plot_curves(Path("results/tiny_metrics.csv"), Path(sys.argv[1]), "positive")
print("".join(pictures.as_image(pictures.new_figure(1)[0], "empty"))[:10])
print(study_pictures.line_style(3))
"""


@pytest.mark.parametrize("backend", ["inline"])
def test_a_backend_that_is_not_installed_keeps_no_picture_from_being_drawn(backend: str, tmp_path: Path) -> None:
    environment = {**os.environ, "MPLBACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(tmp_path / "curves.png")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<img alt" in done.stdout


def test_matplotlib_is_imported_in_one_place() -> None:
    """Anywhere else the environment's backend would be looked up."""
    importers = {
        str(path.relative_to(ROOT))
        for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
        if path.parent.name != "tests"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(alias.name.startswith("matplotlib") for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("matplotlib"))
    }
    assert importers == {os.path.join("runtime", "pictures.py")}
