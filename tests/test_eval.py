"""eval.py: paired, reproducible, held out, recomputable, and honest intervals."""

import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

from config import PRESETS, EvalConfig, TrainConfig

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CORPUS, run, run_eval, run_script, save_classifier
from transformers import AutoTokenizer, GPT2LMHeadModel

import eval as eval_script
from evaluation.summary import summarise
from reward import SentimentReward
from runtime.fingerprints import model_sha256
from tools.compare import find_evaluations
from training.parts import load_models
from training.run_record import reward_sha256


def test_eval_takes_everything_from_the_run_and_every_number_follows_from_the_csv(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, summary = run_eval(finished_run, tmp_path)
    assert summary["n"] == len(results) == 20
    for name in ("policy", "base"):
        assert summary[name]["score_mean"] == pytest.approx(results[f"{name}_score"].mean())
        assert summary[name]["positive_rate"] == pytest.approx((results[f"{name}_score"] > 0).mean())
        low, high = summary[name]["score_ci"]
        assert low < summary[name]["score_mean"] < high
    wins = (results.policy_score > results.base_score) + 0.5 * (results.policy_score == results.base_score)
    assert summary["win_rate"] == pytest.approx(wins.mean())
    assert summary["kl_seq"] == pytest.approx(results.kl_seq.mean())
    assert results.policy_len.between(1, 8).all()
    assert "win-rate" in capsys.readouterr().out
    again = json.loads(json.dumps(summarise(results, "positive")))
    assert again == {k: v for k, v in summary.items() if k not in ("settings", "seed", "policy_sha256", "judge_sha256")}


def test_every_number_of_the_summary_can_be_recomputed_from_the_csv(finished_run: Path, tmp_path: Path) -> None:
    """With nothing but the table and a few lines of arithmetic."""
    t, summary = run_eval(finished_run, tmp_path, "--frontier", "4")
    draws = np.array([row.split() for row in t.base_draws], dtype=float)
    assert draws.shape == (20, 4)
    for name in ("policy", "base"):
        texts = [text.split() for text in t[f"{name}_text"]]
        shorter = [min(len(a.split()), len(b.split())) for a, b in zip(t.policy_text, t.base_text, strict=True)]
        pairs = [p for words, n in zip(texts, shorter, strict=True) for p in itertools.pairwise(words[:n])]
        triples = [list(zip(words, words[1:], words[2:], strict=False)) for words in texts]
        expected = {
            "score_mean": t[f"{name}_score"].mean(),
            "positive_rate": (t[f"{name}_score"] > 0).mean(),
            "log_odds": t[f"{name}_log_odds"].mean(),
            "perplexity": math.exp(t[f"{name}_nll_base"].sum() / t[f"{name}_len"].sum()),
            "human_perplexity": math.exp(t[f"human_nll_{name}"].sum() / t.human_len.sum()),
            "distinct_2": len(set(pairs)) / len(pairs),
            "distinct_rate": t[f"{name}_text"].nunique() / 20,
            "repetition_rate": sum(len(x) - len(set(x)) for x in triples) / sum(map(len, triples)),
            "response_len": t[f"{name}_len"].mean(),
            "eos_rate": t[f"{name}_eos"].mean(),
        }
        assert summary[name]["commonest"] == t[f"{name}_text"].value_counts().iloc[0]
        for key, value in expected.items():
            assert summary[name][key] == pytest.approx(value), (name, key)
            low, high = summary[name][
                {"score_mean": "score_ci", "positive_rate": "positive_ci", "eos_rate": "eos_ci"}.get(key, f"{key}_ci")
            ]
            assert low <= summary[name][key] <= high
        # Wilson's interval holds the shares p for which the observed one is no further than 1.96 standard errors away
        for key in ("positive_rate", "eos_rate"):
            share = summary[name][key]
            for p in summary[name][key.replace("rate", "ci")]:
                if p != pytest.approx(share, abs=1e-9):
                    assert abs(p - share) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 20), abs=1e-6)
        # score and log-odds are one quantity
        assert np.allclose(t[f"{name}_score"], 2 / (1 + np.exp(-t[f"{name}_log_odds"])) - 1, atol=1e-6)
    assert summary["kl_token_exact"] == pytest.approx(t.kl_seq_exact.sum() / t.policy_len.sum())
    assert summary["best_of_n"][2]["score_mean"] == pytest.approx(draws.max(1).mean())
    assert summary["best_of_n"][0]["score_mean"] == pytest.approx(draws.mean())
    per_token = [json.loads(row) for row in t.policy_tokens]
    assert [sum(kl for _, kl in row) for row in per_token] == pytest.approx(t.kl_seq_exact.tolist(), abs=5e-3)
    assert [len(row) for row in per_token] == t.policy_len.tolist()


@pytest.mark.parametrize("where", ["evaluate_both", "Comparison.base_draws"])
def test_too_little_memory_names_what_to_lower(
    where: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cramped(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"evaluation.comparison.{where}", cramped)
    with pytest.raises(SystemExit) as stop:
        run_eval(finished_run, tmp_path / "out", "--frontier", "2")
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: out of memory: lower batch_size or max_new_tokens"
    assert list((tmp_path / "out").iterdir()) == []


def test_perplexities_equal_the_library_loss(finished_run: Path, tmp_path: Path, gpt2_dir: Path) -> None:
    """Of the base on the policy's responses and of both on what the authors wrote; also under another decoding."""
    t, _ = run_eval(finished_run, tmp_path, "--top_k", "20", "--temperature", "0.7")
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    reviews = [f"{100 + i} {text}" for i, text in enumerate(CORPUS[:20])]
    models = {"base": str(gpt2_dir), "policy": str(finished_run / "policy_lm")}
    loaded = {name: GPT2LMHeadModel.from_pretrained(folder).eval() for name, folder in models.items()}

    def nll(name: str, prompt: list[int], response: list[int]) -> float:
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            return float(loaded[name](torch.tensor([prompt + response]), labels=labels).loss) * len(response)

    for row in t.head(6).itertuples():
        review = next(text for text in reviews if text.startswith(row.prompt.split()[0] + " "))
        ids = tokenizer(review).input_ids
        prompt, written = ids[:12], ids[12:20]
        assert row.human_len == len(written)
        for name, found in (("policy", row.human_nll_policy), ("base", row.human_nll_base)):
            assert found == pytest.approx(nll(name, prompt, written), abs=2e-3)
        response = tokenizer(row.base_text).input_ids
        if len(response) == row.base_len:  # the text gives the tokens back, and no EOS was left out
            assert row.base_nll_base == pytest.approx(nll("base", prompt, response), abs=2e-3)


def test_the_second_judge_is_fitted_on_labels_or_named(
    finished_run: Path, tmp_path: Path, classifier_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, summary = run_eval(finished_run, tmp_path / "a")
    said = capsys.readouterr().out
    assert "note: there is no second judge (see --judge): label_column='label' is not in" in said
    assert "name one of its columns, text, with --label_column" in said
    assert "policy_judge" not in plain
    assert "judge_gain" not in summary
    named, summary = run_eval(finished_run, tmp_path / "b", "--judge", str(classifier_dir))
    assert np.allclose(named.policy_judge, named.policy_score, atol=1e-5), "the same classifier as the reward"
    assert summary["judge_gain"] == pytest.approx(summary["score_gain"], abs=1e-5)
    assert summary["judge_gain_expected"] == pytest.approx(summary["score_gain"], abs=1e-5), "one scale"
    other = summarise(named.assign(base_judge=0.1 + 0.3 * named.base_score), "positive")
    assert other["judge_gain_expected"] == pytest.approx(0.3 * summary["score_gain"], abs=1e-6), "a cooler judge"
    exact = np.array(summary["score_gain_ci"]) * 0.3
    assert other["judge_gain_expected_ci"] == pytest.approx(exact, abs=0.01), "a slope without noise adds no doubt"
    noisy = summarise(
        named.assign(base_judge=0.3 * named.base_score + np.random.default_rng(0).normal(0, 0.5, len(named))),
        "positive",
    )
    widths = [np.ptp(found["judge_gain_expected_ci"]) for found in (other, noisy)]
    assert widths[1] > widths[0] + 0.01, "one with noise does"
    assert "judge_gain_expected" not in summarise(named.assign(base_score=0.5), "positive")
    labelled = tmp_path / "labelled"
    train = [f"{i} {text}" for i, text in enumerate(CORPUS)]
    rows = {"text": train, "label": [("pos", "neg")[i % 4 == 1] for i in range(len(train))]}
    tests = {"text": [f"{100 + i} {text}" for i, text in enumerate(CORPUS[:20])], "label": ["pos"] * 20}
    splits = {"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict(tests)}
    datasets.DatasetDict(splits).save_to_disk(labelled)
    fitted, summary = run_eval(finished_run, tmp_path / "c", "--dataset", str(labelled))
    assert fitted.policy_judge.between(-1, 1).all()
    assert "judge_mean" in summary["base"]
    assert "the second judge, or what it was fitted on" not in capsys.readouterr().out
    flipped = {**rows, "label": [{"pos": "neg", "neg": "pos"}[label] for label in rows["label"]]}
    datasets.DatasetDict({**splits, "train": datasets.Dataset.from_dict(flipped)}).save_to_disk(tmp_path / "flipped")
    run_eval(finished_run, tmp_path / "c", "--dataset", str(tmp_path / "flipped"))
    assert "the second judge, or what it was fitted on" in capsys.readouterr().out
    rows["label"] = [int(label == "pos") for label in rows["label"]]
    splits["train"] = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "numbered")
    numbered, _ = run_eval(finished_run, tmp_path / "d", "--dataset", str(tmp_path / "numbered"))
    assert (numbered.policy_judge == fitted.policy_judge).all(), "0 is negative, 1 positive"
    with pytest.raises(SystemExit):
        run_eval(finished_run, tmp_path / "e", "--judge", str(tmp_path / "nowhere"))
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: judge=")


def test_labels_of_the_second_judge_are_named_or_asked_for(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = [f"{i} {text}" for i, text in enumerate(CORPUS)]
    tests = [f"{100 + i} {text}" for i, text in enumerate(CORPUS[:20])]
    for split, texts in (("train", train), ("test", tests)):
        rows = pd.DataFrame({"text": texts, "stars": [(-1, 0, 1)[i % 3] for i in range(len(texts))]})
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_csv(tmp_path / "data" / f"{split}.csv", index=False)
    data = ("--dataset", str(tmp_path / "data"))
    run_eval(finished_run, tmp_path / "a", *data)
    assert "name one of its columns, text, stars, with --label_column" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_eval(finished_run, tmp_path / "b", *data, "--label_column", "stars")
    assert "--label_names 0=...,1=...,-1=..." in capsys.readouterr().err.splitlines()[-1]
    named = ("--label_column", "stars", "--label_names", "-1=neg,0=neutral,1=pos")
    results, _ = run_eval(finished_run, tmp_path / "c", *data, *named)
    n = len(CORPUS)
    counts = [len(range(first, n, 3)) for first in range(3)]
    said = capsys.readouterr().out
    assert f"labels: -1 = neg ({counts[0]}), 0 = neutral ({counts[1]}), 1 = pos ({counts[2]})" in said
    assert "policy_judge" in results


def test_a_saved_data_set_without_splits_is_evaluated_like_a_file(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{i} {text}" for i, text in enumerate(CORPUS[:30])]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "saved.csv", index=False)
    found = []
    for name in ("saved", "saved.csv"):
        found.append(run_eval(finished_run, tmp_path / f"of_{name}", "--dataset", str(tmp_path / name))[0])
        assert "these prompts are not held out" in capsys.readouterr().out
        card = (finished_run / "policy_lm" / "README.md").read_text()
        assert "split test" not in card
    pd.testing.assert_frame_equal(*found)


def test_prompts_end_and_continuations_begin_with_whole_characters(
    finished_run: Path, tmp_path: Path, gpt2_dir: Path
) -> None:
    texts = [f"{'电影🎬' * 3}{i}电影很好看" + "é" * 9 for i in range(20)]
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "a.csv", index=False)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    for longest in (11, 12, 13):
        results, _ = run_eval(
            finished_run,
            tmp_path,
            "--dataset",
            str(tmp_path / "a.csv"),
            "--max_prompt_len",
            str(longest),
            "--judge",
            "none",
        )
        for row in results.itertuples():
            text = next(text for text in texts if text.startswith(row.prompt))
            spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            assert len(row.prompt) == max(end for _, end in spans[:longest] if end <= spans[longest][0])
            assert row.human_len == 8


def test_best_is_evaluated_with_the_settings_of_its_run(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "policy_lm", finished_run / "best" / "policy_lm")
    plain, _ = run_eval(finished_run, tmp_path / "a")
    best, _ = run_eval(finished_run / "best", tmp_path / "b")
    pd.testing.assert_frame_equal(plain, best)


def test_eval_leaves_out_reviews_that_were_trained_on(finished_run: Path, tmp_path: Path) -> None:
    results, _ = run_eval(finished_run, tmp_path)
    numbers = [int(prompt.split()[0]) for prompt in results.prompt]
    assert sorted(numbers) == list(range(100, 120))


def test_two_evaluations_in_one_folder_do_not_overwrite_each_other(finished_run: Path, tmp_path: Path) -> None:
    run_eval(finished_run, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("eval_*")}
    assert before.keys() == {"eval_results.csv", "eval_summary.json", "eval_report.html"}
    run_eval(finished_run, tmp_path, "--out_csv", str(tmp_path / "other.csv"), "--seed", "5")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("eval_*")} == before
    assert (tmp_path / "other_report.html").exists()
    settings = json.loads((tmp_path / "other_summary.json").read_text())["settings"]
    assert settings["max_new_tokens"] == 8, "as the run had it, which no flag said"


def evaluate(policy_path: str, *extra: str) -> None:
    """Run eval.py in the current folder, without naming where the results go."""
    sys.argv = [
        "eval.py",
        "--policy_path",
        policy_path,
        "--n_samples",
        "4",
        "--judge",
        "none",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *extra,
    ]
    run_script(EvalConfig, eval_script.main)


@pytest.mark.parametrize("name", ["run", "run/", "run/policy_lm", "./run/policy_lm/"])
def test_results_go_into_the_folder_of_the_run(
    name: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the run's folder stands for its policy, and where an earlier evaluation of it is replaced."""
    monkeypatch.chdir(tmp_path)
    evaluate(name)
    said = capsys.readouterr().out
    assert "written: run/eval_results.csv, run/eval_summary.json, and to look at: run/eval_report.html" in said
    assert "replaced" not in said
    assert not list(tmp_path.glob("eval_*"))
    evaluate("run/policy_lm", "--seed", "5")
    assert "in run/eval_results.csv will be replaced" in capsys.readouterr().out
    assert json.loads((finished_run / "eval_summary.json").read_text())["seed"] == 5


def test_the_best_policy_of_a_run_has_results_of_its_own(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_run / "policy_lm", finished_run / "best" / "policy_lm")
    monkeypatch.chdir(tmp_path)
    evaluate("run")
    evaluate("run/best", "--seed", "5")
    for name, seed in (("eval", 1234), ("best_eval", 5)):
        assert json.loads((finished_run / f"{name}_summary.json").read_text())["seed"] == seed
        assert len(pd.read_csv(finished_run / f"{name}_results.csv")) == 4
    folders = find_evaluations([Path("run")], [])
    assert sorted(one["seed"] for one in folders[Path("run")]) == [5, 1234]


def test_results_of_another_policy_are_not_replaced_unasked(
    finished_run: Path,
    gpt2_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Policies that are in no run share the working folder."""
    flags = json.loads((finished_run / "config.json").read_text())
    models = [
        "--ref_name",
        str(gpt2_dir),
        "--rm_name",
        flags["rm_name"],
        "--dataset",
        flags["dataset"],
        "--max_prompt_len",
        "12",
        "--max_new_tokens",
        "8",
    ]
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        shutil.copytree(gpt2_dir, tmp_path / name)
    evaluate("a", *models)
    evaluate("a", *models)
    before = (tmp_path / "eval_results.csv").read_bytes()
    with pytest.raises(SystemExit) as stop:
        evaluate("b", *models)
    assert stop.value.code == 2
    assert "eval_results.csv has the results of a: name another file" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "eval_results.csv").read_bytes() == before
    evaluate("b", *models, "--out_csv", "eval_results.csv")
    assert "note: the results of a in eval_results.csv will be replaced" in capsys.readouterr().out


def test_reward_and_base_that_the_run_did_not_have_are_named(
    finished_run: Path, gpt2_dir: Path, classifier_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, reward = (shutil.copytree(folder, tmp_path / folder.name) for folder in (gpt2_dir, classifier_dir))
    saved = json.loads((finished_run / "config.json").read_text())
    models = load_models(
        TrainConfig(
            policy_name=str(policy),
            rm_name=str(reward),
            device="cpu",
            dtype="float32",
            max_new_tokens=8,
            max_prompt_len=12,
        )
    )
    prints = {"ref_name": model_sha256(models.reference.lm), "rm_name": reward_sha256(models.reward)}
    (finished_run / "config.json").write_text(json.dumps({**saved, "fingerprints": prints}))
    names = ["--ref_name", str(policy), "--rm_name", str(reward)]
    run_eval(finished_run, tmp_path / "a", *names)
    assert "not the version of it" not in capsys.readouterr().out, "other folders, the same weights"
    save_classifier(reward, {0: "negative", 1: "positive"}, swap=True)
    run_eval(finished_run, tmp_path / "b", *names)
    said = capsys.readouterr().out
    assert f"note: {reward} is not the reward, or not the version of it" in said
    assert "not the base" not in said
    run_eval(finished_run, tmp_path / "c", "--ref_name", str(finished_run / "policy_lm"))
    assert "policy_lm is not the base, or not the version of it" in capsys.readouterr().out


def test_a_policy_in_no_run_takes_the_settings_of_the_preset(
    gpt2_dir: Path,
    classifier_dir: Path,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    evaluate(
        str(gpt2_dir),
        "--preset",
        "tiny",
        "--ref_name",
        str(gpt2_dir),
        "--rm_name",
        str(classifier_dir),
        "--dataset",
        str(reviews),
    )
    settings = json.loads((tmp_path / "eval_summary.json").read_text())["settings"]
    tiny = PRESETS[TrainConfig]["tiny"]
    for name in ("max_prompt_len", "min_prompt_len", "max_new_tokens"):
        assert settings[name] == getattr(tiny, name)
    assert "is not part of a run, so the settings of --preset tiny apply" in capsys.readouterr().out


def test_a_broken_reward_or_policy_is_one_line(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log_odds = SentimentReward.log_odds
    with monkeypatch.context() as broken:
        broken.setattr(SentimentReward, "log_odds", lambda self, texts: log_odds(self, texts) / 0)
        with pytest.raises(SystemExit):
            run_eval(finished_run, tmp_path)
    assert re.search("error: rm_name=.* not finite", capsys.readouterr().err.splitlines()[-1])
    lm = GPT2LMHeadModel.from_pretrained(finished_run / "policy_lm")
    with torch.no_grad():
        lm.transformer.ln_f.weight.fill_(torch.nan)
    lm.save_pretrained(finished_run / "policy_lm")
    with pytest.raises(SystemExit):
        run_eval(finished_run, tmp_path)
    assert re.search("error: policy_path=.* not finite", capsys.readouterr().err.splitlines()[-1])


def test_eval_is_a_function_of_the_seed(finished_run: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run_eval(finished_run, tmp_path / name, "--seed", seed)
    files = [(tmp_path / name / "eval_results.csv").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_eval_of_the_base_against_itself_is_a_tie_everywhere(
    finished_run: Path, tmp_path: Path, gpt2_dir: Path
) -> None:
    flags = json.loads((finished_run / "config.json").read_text())
    results, summary = run_eval(
        finished_run,
        tmp_path,
        "--policy_path",
        str(gpt2_dir),
        "--ref_name",
        str(gpt2_dir),
        "--rm_name",
        flags["rm_name"],
        "--dataset",
        flags["dataset"],
        "--max_prompt_len",
        "12",
        "--max_new_tokens",
        "8",
    )
    assert results.policy_text.tolist() == results.base_text.tolist()
    assert summary["win_rate"] == 0.5
    assert summary["score_gain"] == 0
    assert summary["kl_seq"] == pytest.approx(0, abs=1e-5)


def test_eval_batch_size_changes_no_answer(finished_run: Path, tmp_path: Path) -> None:
    one, _ = run_eval(finished_run, tmp_path / "one", "--batch_size", "1")
    all_, _ = run_eval(finished_run, tmp_path / "all", "--batch_size", "20")
    assert one.policy_text.tolist() == all_.policy_text.tolist()
    assert np.allclose(one.kl_seq, all_.kl_seq, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--policy_path ckpts/policy_lm", ["policy_path", "python train.py"]),
        ("--policy_path nowhere/policy_lm", ["policy_path", "nowhere"]),
        ("--n_samples 1", ["n_samples", "interval"]),
        ("--split validation", ["split", "validation"]),
        ("--out_csv /dev/null/x.csv", ["out_csv"]),
        ("--temperature 0", ["temperature"]),
        ("--max_new_tokens 200", ["max_new_tokens", "128"]),
    ],
)
def test_eval_wrong_input_is_one_line_and_exit_code_2(
    given: str,
    words: list[str],
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_eval(finished_run, tmp_path, *given.split())
    assert stop.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    assert [line for line in err if line.startswith("error")] == err[-1:]
    assert "Traceback" not in "".join(err)
    assert all(word in err[-1] for word in words), err


# --- any reward -----------------------------------------------------------------------------------------------------


def words_reward(folder: Path, unit: float) -> str:
    """A Python reward: minus the words of a response, in some unit, with an offset."""
    file = folder / f"words_{unit:g}.py"
    file.write_text(f"def words(responses): return [{unit} * (40 - len(r.split())) for r in responses]\n")
    return f"{file}:words"


def test_eval_compares_on_a_python_reward_in_its_own_units(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A unit 1,000 times smaller multiplies every score by 1,000 and changes nothing else."""
    found = {}
    for unit in (1, 1000):
        (tmp_path / str(unit)).mkdir()
        flags = ("--rm_name", words_reward(tmp_path, unit), "--frontier", "8", "--judge", "none")
        found[unit] = (*run_eval(finished_run, tmp_path / str(unit), *flags), capsys.readouterr())
    (results, summary, said), (_, thousands, _) = found[1], found[1000]
    for name in ("policy", "base"):
        expected = [40 - len(text.split()) for text in results[f"{name}_text"]]
        assert results[f"{name}_score"].tolist() == expected
        assert thousands[name]["score_mean"] == pytest.approx(1000 * summary[name]["score_mean"])
        assert not {"positive_rate", "log_odds", "sentiment_mean"} & summary[name].keys()
    assert (summary["label"], summary["score_unit"]) == (None, pytest.approx(results.base_score.std(ddof=0)))
    assert "policy_log_odds" not in results
    for key in ("win_rate", "kl_seq", "optimal_share_rate", "response_len_expected", "kl_certain"):
        assert (key in summary) == (key in thousands)
        if key in summary:
            assert thousands[key] == pytest.approx(summary[key], rel=1e-4), key
    for name, factor in (("kl", 1), ("score_mean", 1000)):
        theirs = np.array(summary["optimal_curve"][name])
        assert thousands["optimal_curve"][name] == pytest.approx((factor * theirs).tolist(), rel=1e-3, abs=1e-6)
    assert "mean score" in said.out
    page = (tmp_path / "1" / "eval_report.html").read_text()
    for words in ("sentiment", "positive"):
        assert words not in said.out
        assert words not in page.replace("standardize", "").split("<footer>")[0]
    assert summary["verdict"] in " ".join(said.out.split())
    assert "is not the reward" in said.out, "the run was paid by a classifier"
    assert f"{summary['policy']['score_mean']:.4g} against {summary['base']['score_mean']:.4g} on average" in said.out


def test_a_run_paid_in_log_odds_is_compared_in_log_odds(flags: dict[str, str], tmp_path: Path) -> None:
    """Without a flag of eval.py; against the difference of the library's own logits."""
    folder = run(flags, "--score_log_odds", "true", "--total_steps", "1", "--eval_every", "0")
    results, summary = run_eval(folder, tmp_path, "--judge", "none")
    plain = results[~results.policy_text.str.startswith("'")]  # a quote is put before what a spreadsheet would compute
    classifier = SentimentReward(flags["rm_name"])
    logits = [classifier.logits([text])[0] for text in plain.policy_text]
    assert plain.policy_score.tolist() == pytest.approx([float(x[1] - x[0]) for x in logits], abs=1e-4)
    assert len(plain) > 10
    assert summary["label"] is None
    assert "positive_rate" not in summary["policy"]


@pytest.mark.parametrize(("label", "adverb"), [("positive", "positively"), ("negative", "negatively"), ("joy", None)])
def test_words_fit_the_label(
    label: str, adverb: str | None, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {0: "negative", 1: "positive"} if adverb else {0: "joy", 1: "neutral", 2: "anger"}
    classifier = save_classifier(tmp_path / "rm", names)
    _, summary = run_eval(finished_run, tmp_path, "--rm_name", str(classifier), "--target_label", label)
    said = capsys.readouterr().out
    assert f"{label} responses, %" in said
    assert f"log-odds of {label}" in said
    assert ("sentiment" in said) == (label != "joy")
    assert (f"{adverb} " in summary["verdict"]) == (adverb is not None)
    assert ("scores" in summary["verdict"]) == (label == "joy")
    assert f"{summary['base']['positive_rate']:.0%} {label}" in summary["verdict"]


def test_a_second_judge_of_something_else_says_nothing_of_the_reward() -> None:
    """Words are counted, and the judge judges sentiment: what it sees is in the table and not in the verdict."""
    rng, n = np.random.default_rng(0), 400
    frame = {f"{m}_{c}": np.ones(n) for m in ("policy", "base") for c in ("eos", "nll_base", "len")} | {
        "policy_score": rng.normal(60, 5, n),
        "base_score": rng.normal(50, 5, n),
        "kl_seq": np.ones(n),
        "kl_seq_exact": np.ones(n),
        "policy_text": [f"policy {i}" for i in range(n)],
        "base_text": [f"base {i}" for i in range(n)],
        "policy_judge": rng.choice([-0.9, 0.9], n),
        "base_judge": rng.choice([-0.9, 0.9], n),
    }
    apart = summarise(pd.DataFrame(frame), None)
    assert abs(apart["judge_slope"]) < 0.2
    assert "judge" not in apart["verdict"]
    assert "judge_gap_rate" not in apart, "an unlabelled reward claims no positives"
    assert not apart["gamed"]
    same = {**frame, "base_judge": np.where(frame["base_score"] > 50, 0.9, -0.9)}
    gamed = summarise(pd.DataFrame({**same, "policy_judge": same["base_judge"]}), None)
    assert gamed["gamed"]
    assert "WARNING" in gamed["verdict"]
    honest = summarise(pd.DataFrame({**same, "policy_judge": np.full(n, 0.9)}), None)
    assert "confirms it" in honest["verdict"]


def test_a_judge_whose_labels_are_numbers_is_one_line(
    finished_run: Path, classifier_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(classifier_dir, judge)
    config = json.loads((judge / "config.json").read_text()) | {"id2label": {"0": 0, "1": 1}}
    (judge / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        run_eval(finished_run, tmp_path, "--judge", str(judge))
    assert stop.value.code == 2
    assert f"target_label='positive' is not a label of judge={judge}: choose 0, 1" in capsys.readouterr().err
