"""The report page, in a real browser where there is one."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import run_eval

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_report_works_in_a_real_browser(finished_run: Path, tmp_path: Path) -> None:
    """It opens from a file without a network, filters, shows long texts whole, and logs no error."""
    results, summary = run_eval(finished_run, tmp_path, "--frontier", "4")
    page = (tmp_path / "eval_report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    probe = """<script>
      const count = () => document.querySelectorAll("#samples article").length;
      const set = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("input")); return count(); };
      const seen = [count(), set("change", "better"), set("change", "worse"), set("change", "all"), set("low", "0.2"),
                    set("low", "-1"), set("word", "no such words")];
      set("word", "");
      const missing = [...document.images].filter(image => !image.naturalWidth).length;
      const texts = [...document.querySelectorAll("#samples article")].map(a => a.textContent).join(" ");
      document.title = JSON.stringify([seen, missing, rows.every(r => texts.includes(r.b))]);
    </script></body>"""
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe))
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--dump-dom",
            "--virtual-time-budget=4000",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"file://{tmp_path / 'probe.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen, missing, whole = json.loads(html.unescape(title[1]))
    better, worse = (results.policy_score > results.base_score).sum(), (results.policy_score < results.base_score).sum()
    high = (results.policy_score >= 0.2 - 1e-6).sum()
    assert seen == [20, better, worse, 20, high, 20, 0]
    assert missing == 0
    assert whole
    assert html.escape(summary["verdict"]) in page


def test_damaged_tables_of_the_run_are_left_out_of_the_report(finished_run: Path, tmp_path: Path) -> None:
    (finished_run / "metrics.csv").write_text("step,loss\n1,2\n2,3\n")
    (finished_run / "eval.csv").write_text("\x00,\n" * 3)
    run_eval(finished_run, tmp_path, "--frontier", "2")
    assert "The run" not in (tmp_path / "eval_report.html").read_text()
