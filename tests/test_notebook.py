"""docs/first_steps.ipynb: it runs from its first cell to its last, and what it is kept with is clean."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from experiments.bugs import BUGS
from runtime.terminal import SHADES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "first_steps.ipynb"
NOTEBOOK = nbformat.read(PAGE, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PROSE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
OUTPUTS = [output for cell in CODE for output in cell.outputs]


def tagged(notebook: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode:
    """The only cell with a tag."""
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
    return cell


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def cell_with(notebook: nbformat.NotebookNode, words: str) -> nbformat.NotebookNode:
    """The only cell of code with these words."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source]
    return cell


def test_it_runs(flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on the tests' models; the packages are there, so nothing is installed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(PAGE, as_version=4)
    notebook.cells.remove(tagged(notebook, "install"))
    runs = tmp_path / "runs"
    settings = {**flags, "total_steps": "2", "eval_every": "0"}
    del settings["ckpt_dir"]
    more = " ".join(f"--{name}={value}" for name, value in settings.items())
    tagged(notebook, "parameters").source = f"RUNS = {str(runs)!r}\nMORE = {more!r}"

    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(PAGE.parent)}}).execute()

    for cell in notebook.cells:
        assert "error" not in [output.output_type for output in cell.get("outputs", ())], cell.source
    for name in ("right", "sick", "words"):
        assert len(pd.read_csv(runs / name / "metrics.csv")) == 2
    samples = printed(cell_with(notebook, "shade_scale"))
    assert samples.count("\x1b[30;48;5;") > len(SHADES), "tokens are shaded, too"
    assert "FAILED" in printed(cell_with(notebook, "%run -m experiments.pitfalls")), "the self-check finds the bug"
    assert "words" in printed(cell_with(notebook, "--rm_name {RUNS}"))


def test_it_was_run_once_from_top_to_bottom() -> None:
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert "error" not in [output.output_type for output in OUTPUTS]
    assert sum("image/png" in output.get("data", {}) for output in OUTPUTS) == 2


def test_its_outputs_are_small_and_name_no_machine() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not re.search(r"/(tmp|root|home|Users|work|content)/", re.sub(r'"image/png": "[^"]*"', "", text))


def test_its_reward_is_that_of_the_page_on_rewards() -> None:
    reward = cell_with(NOTEBOOK, "%%writefile").source.split("\n", 1)[1]
    assert reward in (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_it_counts_the_bugs() -> None:
    assert f"has {len(BUGS)} such bugs" in PROSE
    assert f"each of the {len(BUGS)} bugs costs" in PROSE
    assert f"from 0 to {len(BUGS) - 1}," in PROSE


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", PROSE)
    assert len(links) > 5
    for link in links:
        assert (PAGE.parent / link).exists(), link
