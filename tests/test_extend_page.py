"""docs/extend.md: every diff applies to the code as it is, and what it adds works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import save_classifier
from transformers import AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n.*?```diff\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL))
FOLDERS = ("evaluation", "pretrain", "runtime", "tools", "training", "docs")
TEXTS = ["a fine film", "a bad film, and long"]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def copy_of_the_repository(folder: Path) -> Path:
    """What the diffs change and what the program needs."""
    for path in ROOT.glob("*.py"):
        if path.name != "rewards.py":  # that is a user's own
            shutil.copy(path, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "test_config.py", folder / "tests")
    return folder


def git_apply(diff: str, folder: Path, *flags: str) -> str:
    """Apply a diff in a folder; returns what git says against it."""
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}  # else a repository around it would count
    command = ["git", "apply", "--verbose", *flags, "-"]
    done = subprocess.run(command, input=diff, cwd=folder, env=outside, capture_output=True, text=True, check=False)
    skipped = [line for line in done.stderr.splitlines() if line.startswith("Skipped")]
    return "\n".join(skipped) if done.returncode == 0 else done.stderr


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_repository(tmp_path_factory.mktemp("untouched"))


@pytest.mark.parametrize("title", SECTIONS)
def test_a_diff_applies(title: str, untouched: Path) -> None:
    problems = git_apply(SECTIONS[title], untouched, "--check")
    assert not problems, f"the diff of '{title}' in docs/extend.md no longer fits the code, mend it there:\n{problems}"


def test_every_section_has_a_diff_and_says_what_git_needs() -> None:
    assert list(SECTIONS) == re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert PAGE.count("```diff") == len(SECTIONS) == 7


def test_a_diff_that_does_not_fit_is_noticed(untouched: Path) -> None:
    assert "patch does not apply" in git_apply(SECTIONS["A setting"].replace("lr=cfg.lr", "lr=0"), untouched, "--check")


# Uses everything that was added, in one process, because imports take most of the time
PROBE = """
import json
import sys

from config import EvalConfig, TrainConfig

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import eval as eval_script
import train
import training.run_folder
from model import GPT2WithValueHead
from ppo import build_optimizer
from reward import load_reward
from runtime.cli import parse_config, run
from tools.make_models import read_settings

training.run_folder.plot_curves = lambda *_: None
seen = {}

cfg = parse_config(TrainConfig, json.loads(sys.argv[1]))
assert run(lambda: train.main(cfg)) == 0
policy = GPT2WithValueHead.from_pretrained(cfg.policy_name)
seen["eps"] = [build_optimizer(policy, c).param_groups[0]["eps"] for c in (TrainConfig(), cfg)]

words = ["--policy_path=run", "--rm_name=rewards.py:variety", "--n_samples=6", "--judge=none", "--device=cpu"]
assert run(lambda: eval_script.main(parse_config(EvalConfig, words))) == 0

seen["stars"] = load_reward("stars")(json.loads(sys.argv[2]), []).tolist()

preset = parse_config(TrainConfig, ["--preset=laptop", "--lr=1e-5"])
seen["preset"] = [preset.max_prompt_len, preset.max_new_tokens, preset.total_steps, preset.lr]

recipe = read_settings(["--dataset=x.csv", "--out=models/355m", "--size=355m"]).recipe
shape = {"n_layer": recipe.lm.layers, "n_embd": recipe.lm.width, "n_head": recipe.lm.heads}
with torch.device("meta"):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=recipe.vocab_size, n_positions=recipe.context, **shape))
seen["weights"] = model.num_parameters()
print("seen:" + json.dumps(seen))
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, gpt2_dir: Path, reviews: Path) -> dict[str, Any]:
    """What there is to see after all diffs: the folder, what was printed, and the numbers of the probe."""
    folder = copy_of_the_repository(tmp_path_factory.mktemp("extended"))
    for title, diff in SECTIONS.items():
        assert not git_apply(diff, folder), f"'{title}' in docs/extend.md does not fit with those before it"
    save_classifier(folder / "stars", {0: "1 star", 1: "2 stars", 2: "3 stars"})
    flags = {
        "policy_name": str(gpt2_dir),
        "rm_name": "rewards.py:variety",
        "dataset": str(reviews),
        "ckpt_dir": "run",
        "adam_eps": "0.001",
        "device": "cpu",
        "dtype": "float32",
        "total_steps": "1",
        "batch_size": "4",
        "minibatch_size": "4",
        "eval_prompts": "4",
        "max_prompt_len": "12",
        "min_prompt_len": "4",
        "max_new_tokens": "8",
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(words), json.dumps(TEXTS)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {"folder": folder, "out": done.stdout, **json.loads(done.stdout.split("seen:")[1])}


def test_the_column_is_in_both_tables(extended: dict[str, Any]) -> None:
    run = extended["folder"] / "run"
    scores = pd.read_csv(run / "samples.csv").policy_score  # of the whole batch, which is four
    assert pd.read_csv(run / "metrics.csv").score_std.item() == pytest.approx(scores.std(ddof=0)) != 0
    assert (pd.read_csv(run / "eval.csv").score_std > 0).all()
    page = (extended["folder"] / "docs" / "run_folder.md").read_text(encoding="utf-8")
    assert "| `score_std` |" in page


def test_the_setting_reaches_the_optimizer_and_is_recorded(extended: dict[str, Any]) -> None:
    assert extended["eps"] == [1e-5, 1e-3]
    assert json.loads((extended["folder"] / "run" / "config.json").read_text())["adam_eps"] == 1e-3


def test_the_python_reward_trains(extended: dict[str, Any]) -> None:
    samples = pd.read_csv(extended["folder"] / "run" / "samples.csv", keep_default_na=False)
    assert samples.policy_score.tolist() == [len({*text.split()}) for text in samples.policy]


def test_the_kind_of_reward_gives_the_expected_stars(extended: dict[str, Any]) -> None:
    folder = extended["folder"] / "stars"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, score in zip(TEXTS, extended["stars"], strict=True):
        with torch.no_grad():
            one, two, three = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0).tolist()
        assert score == pytest.approx(one + 2 * two + 3 * three, abs=1e-5)


def test_the_row_is_in_summary_terminal_and_report(extended: dict[str, Any]) -> None:
    folder = extended["folder"] / "run"
    results = pd.read_csv(folder / "eval_results.csv", keep_default_na=False)
    summary = json.loads((folder / "eval_summary.json").read_text())
    for name in ("policy", "base"):
        asked = results[f"{name}_text"].str.contains("?", regex=False).mean()
        assert summary[name]["question_rate"] == pytest.approx(asked)
        low, high = summary[name]["question_rate_ci"]
        assert low <= asked <= high
    title = "responses that ask a question, %"
    assert title in extended["out"]
    assert title in (folder / "eval_report.html").read_text()


def test_the_preset_and_the_size_are_taken(extended: dict[str, Any]) -> None:
    assert extended["preset"] == [64, 48, 40, 1e-5]
    assert extended["weights"] == 354_823_168, "GPT-2 medium"
