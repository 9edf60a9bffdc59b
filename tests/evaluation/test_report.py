"""evaluation/report"""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from config import EvalConfig, TrainConfig

import datasets
import pandas as pd
import pytest
import torch
from conftest import CORPUS, run_script
from transformers import AutoTokenizer

import eval as eval_script
from model import GPT2WithValueHead
from training.run_folder import describe


@pytest.fixture
def split_reviews(tmp_path: Path) -> Path:
    """A saved data set with splits; three reviews of the test split also occur in the training split."""
    train = [f"{i} {text}" for i, text in enumerate(CORPUS)]
    test = [f"{100 + i} {text}" for i, text in enumerate(CORPUS[:20])] + train[:3]
    sets = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in (("train", train), ("test", test))}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "reviews")
    return tmp_path / "reviews"


@pytest.fixture
def finished_run(tmp_path: Path, gpt2_dir: Path, classifier_dir: Path, split_reviews: Path) -> Path:
    """A run folder whose policy is the base with slightly different weights."""

    cfg = TrainConfig(
        policy_name=str(gpt2_dir), rm_name=str(classifier_dir), dataset=str(split_reviews), device="cpu",
        max_prompt_len=12, min_prompt_len=4, max_new_tokens=8, ckpt_dir=str(tmp_path / "run"),
    )  # fmt: skip
    policy = GPT2WithValueHead.from_pretrained(str(gpt2_dir))
    with torch.no_grad():
        policy.lm.transformer.wte.weight += 0.05 * torch.randn_like(policy.lm.transformer.wte.weight)
    policy.save_pretrained(tmp_path / "run")

    AutoTokenizer.from_pretrained(gpt2_dir).save_pretrained(tmp_path / "run" / "policy_lm")
    (tmp_path / "run" / "config.json").write_text(json.dumps(describe(cfg)))
    return tmp_path / "run"


def run(folder: Path, out: Path, *extra: str) -> tuple[pd.DataFrame, dict]:
    sys.argv = ["eval.py", "--policy_path", str(folder / "policy_lm"), "--n_samples", "20", "--batch_size", "8",
                "--out_csv", str(out / "eval_results.csv"), "--device", "cpu", "--dtype", "float32",
                *extra]  # fmt: skip
    run_script(EvalConfig, eval_script.main)
    results = pd.read_csv(out / "eval_results.csv", keep_default_na=False)
    return results, json.loads((out / "eval_summary.json").read_text())


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_report_works_in_a_real_browser(finished_run: Path, tmp_path: Path) -> None:
    """It opens from a file without a network, filters, shows long texts whole, and logs no error."""
    results, summary = run(finished_run, tmp_path, "--frontier", "4")
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
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
         "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'probe.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
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
    run(finished_run, tmp_path, "--frontier", "2")
    assert "The run" not in (tmp_path / "eval_report.html").read_text()
