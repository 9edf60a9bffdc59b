"""The report page, in a real browser where there is one."""

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
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
    steps = {"episodes": [8, 16], "score_mean": [0.1, 0.2], "kl_seq_exact": [0.0, 0.1], "entropy": [2.0, 1.9]}
    whole = {"metrics.csv": pd.DataFrame(steps).to_csv(index=False), "eval.csv": "kl_seq_exact,score_mean\n0,0\n"}
    damaged = {"metrics.csv": "step,loss\n1,2\n2,3\n", "eval.csv": "\x00,\n" * 3}
    headings, drawn = {}, {}
    for name, tables in (("whole", whole), ("damaged", damaged)):
        for table, text in tables.items():
            (finished_run / table).write_text(text)
        run_eval(finished_run, tmp_path / name, "--frontier", "2")
        page = (tmp_path / name / "eval_report.html").read_text()
        headings[name] = re.findall(r"<h2>(.*?)</h2>", page)
        images = [base64.b64decode(image).decode() for image in re.findall(r"base64,([\w+/=]+)\"", page)]
        drawn[name] = any("during training" in image for image in images)
    assert headings["whole"] == ["Scores", "How far from the best possible", "The run", "Samples"]
    assert headings["damaged"] == ["Scores", "How far from the best possible", "Samples"]
    assert drawn == {"whole": True, "damaged": False}
