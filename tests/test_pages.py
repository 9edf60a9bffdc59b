"""Pages: every picture and file that they link to is there, and results/README.md lists each file with its command."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", RESULTS / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_what_a_page_links_to_is_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in link or (page.parent / link).exists(), link


def listed() -> dict[str, str]:
    """File -> command, from the table of results/README.md; `.png` after `a.csv` is a.png, a star stands for any."""
    commands: dict[str, str] = {}
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", (RESULTS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    for files, command in rows:
        stem = ""
        for name in re.findall(r"`([\w.*]+)`", files):
            stem = stem if name[0] in "._" else name.removesuffix(".csv")
            full = stem + name if name[0] in "._" else name
            commands |= {path.name: command for path in RESULTS.glob(full)} or {full: command}
    return commands


def test_each_file_of_results_is_listed_with_its_command() -> None:
    commands = listed()
    assert set(commands) == {path.name for path in RESULTS.iterdir()} - {"README.md"}
    assert all(commands.values())
