"""eval.py: paired, reproducible, held out, recomputable, and honest intervals."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CORPUS

import eval as evaluation
from config import EvalConfig, TrainConfig, run_cli
from eval import bootstrap_ci, summarise


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
    from model import GPT2WithValueHead
    from train import describe

    cfg = TrainConfig(
        policy_name=str(gpt2_dir), rm_name=str(classifier_dir), dataset=str(split_reviews), device="cpu",
        max_prompt_len=12, min_prompt_len=4, max_new_tokens=8, ckpt_dir=str(tmp_path / "run"),
    )  # fmt: skip
    policy = GPT2WithValueHead.from_pretrained(str(gpt2_dir))
    with torch.no_grad():
        policy.lm.transformer.wte.weight += 0.05 * torch.randn_like(policy.lm.transformer.wte.weight)
    policy.save_pretrained(tmp_path / "run")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gpt2_dir).save_pretrained(tmp_path / "run" / "policy_lm")
    (tmp_path / "run" / "config.json").write_text(json.dumps(describe(cfg)))
    return tmp_path / "run"


def run(folder: Path, out: Path, *extra: str) -> tuple[pd.DataFrame, dict]:
    sys.argv = ["eval.py", "--policy_path", str(folder / "policy_lm"), "--n_samples", "20", "--batch_size", "8",
                "--out_csv", str(out / "eval_results.csv"), "--device", "cpu", *extra]  # fmt: skip
    run_cli(EvalConfig, evaluation.main)
    results = pd.read_csv(out / "eval_results.csv", keep_default_na=False)
    return results, json.loads((out / "eval_summary.json").read_text())


def test_eval_takes_everything_from_the_run_and_every_number_follows_from_the_csv(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, summary = run(finished_run, tmp_path)
    assert summary["n"] == len(results) == 20
    for name in ("policy", "base"):
        assert summary[name]["sentiment_mean"] == pytest.approx(results[f"{name}_score"].mean())
        assert summary[name]["positive_rate"] == pytest.approx((results[f"{name}_score"] > 0).mean())
        low, high = summary[name]["sentiment_ci"]
        assert low < summary[name]["sentiment_mean"] < high
    wins = (results.policy_score > results.base_score) + 0.5 * (results.policy_score == results.base_score)
    assert summary["win_rate"] == pytest.approx(wins.mean())
    assert summary["kl_seq"] == pytest.approx(results.kl_seq.mean())
    assert results.policy_len.between(1, 8).all()
    assert "win-rate" in capsys.readouterr().out
    again = json.loads(json.dumps(summarise(results, EvalConfig(n_samples=20))))
    assert {k: v for k, v in again.items() if k not in ("settings", "seed")} == {
        k: v for k, v in summary.items() if k not in ("settings", "seed")
    }


def test_eval_leaves_out_reviews_that_were_trained_on(finished_run: Path, tmp_path: Path) -> None:
    results, _ = run(finished_run, tmp_path)
    numbers = [int(prompt.split()[0]) for prompt in results.prompt]
    assert sorted(numbers) == list(range(100, 120))


def test_eval_is_a_function_of_the_seed(finished_run: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(finished_run, tmp_path / name, "--seed", seed)
    files = [(tmp_path / name / "eval_results.csv").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_eval_of_the_base_against_itself_is_a_tie_everywhere(
    finished_run: Path, tmp_path: Path, gpt2_dir: Path
) -> None:
    flags = json.loads((finished_run / "config.json").read_text())
    results, summary = run(
        finished_run, tmp_path, "--policy_path", str(gpt2_dir), "--ref_name", str(gpt2_dir), "--rm_name",
        flags["rm_name"], "--dataset", flags["dataset"], "--max_prompt_len", "12", "--max_new_tokens", "8",
    )  # fmt: skip
    assert results.policy_text.tolist() == results.base_text.tolist()
    assert summary["win_rate"] == 0.5
    assert summary["sentiment_gain"] == 0
    assert summary["kl_seq"] == pytest.approx(0, abs=1e-5)


def test_eval_batch_size_changes_no_answer(finished_run: Path, tmp_path: Path) -> None:
    one, _ = run(finished_run, tmp_path / "one", "--batch_size", "1")
    all_, _ = run(finished_run, tmp_path / "all", "--batch_size", "20")
    assert one.policy_text.tolist() == all_.policy_text.tolist()
    assert np.allclose(one.kl_seq, all_.kl_seq, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--policy_path ckpts/policy_lm", ["policy_path", "python train.py"]),
        ("--policy_path nowhere/policy_lm", ["policy_path", "nowhere"]),
        ("--n_samples 0", ["n_samples"]),
        ("--split validation", ["split", "validation"]),
        ("--out_csv /dev/null/x.csv", ["out_csv"]),
        ("--temperature 0", ["temperature"]),
        ("--max_new_tokens 200", ["max_new_tokens", "128"]),
    ],
)
def test_eval_wrong_input_is_one_line_and_exit_code_2(
    given: str, words: list[str], finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(finished_run, tmp_path, *given.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert [line for line in err if line.startswith("error")] == err[-1:]
    assert "Traceback" not in "".join(err)
    assert all(word in err[-1] for word in words), err


def test_bootstrap_intervals_cover_the_truth() -> None:
    """95 % intervals of 400 synthetic evaluations whose mean is known; 400 trials scatter by 1.1 % around 95 %."""
    rng = np.random.default_rng(0)
    covered = {"score": 0, "win": 0}
    for trial in range(400):
        low, high = bootstrap_ci(np.tanh(rng.normal(size=500)), seed=trial)  # skew-free, true mean 0
        covered["score"] += low <= 0 <= high
        low, high = bootstrap_ci((rng.random(500) < 0.7).astype(float), seed=trial)
        covered["win"] += low <= 0.7 <= high
    assert all(0.92 <= n / 400 <= 0.98 for n in covered.values()), covered
