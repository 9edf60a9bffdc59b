"""Loading: revisions, and any sequence classifier."""

import copy
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from config import PRESETS, EvalConfig, TrainConfig, UserError

import pandas as pd
import pytest
import torch
from conftest import make_lm, make_policy, run, run_script, save_classifier, train_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import eval as eval_script
from tools.sample import main as sample_main
from training.parts import check_fit, load_run_reward


def test_train_takes_any_sequence_classifier(flags: dict[str, str], tmp_path: Path) -> None:
    labels = {0: "terrible", 1: "fine", 2: "great"}
    save_classifier(tmp_path / "bert", labels)  # for its tokenizer
    config = BertConfig(
        vocab_size=280,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    folder = run({**flags, "rm_name": str(tmp_path / "bert"), "target_label": "great", "total_steps": "1"})
    assert pd.read_csv(folder / "metrics.csv").score_mean.between(-1, 1).all()


def test_a_revision_chooses_among_commits_and_is_recorded(
    flags: dict[str, str], gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commits of one name in a hub's cache, with different weights."""
    cache = tmp_path / "hub" / "models--someone--gpt2"
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for revision, commit in commits.items():
        shutil.copytree(gpt2_dir, cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
    weights = cache / "snapshots" / commits["v1"] / "model.safetensors"
    changed = {name: weight + 0.01 for name, weight in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(tmp_path / "hub"))
    still = {**flags, "policy_name": "someone/gpt2", "lr": "0", "total_steps": "1"}
    for revision in (None, "v1", commits["v1"]):
        words = [] if revision is None else ["--policy_revision", revision]
        folder = run({**still, "ckpt_dir": str(tmp_path / str(revision))}, *words)
        commit = commits["main" if revision is None else "v1"]
        recorded = json.loads((folder / "config.json").read_text())["hub_commits"]
        assert recorded == {"policy_name": commit, "ref_name": commit, "rm_name": None, "dataset": None}
        kept = load_file(folder / "policy_lm" / "model.safetensors")
        expected = load_file(cache / "snapshots" / commit / "model.safetensors")
        assert all(torch.equal(kept[name], expected[name]) for name in expected)
        assert pd.read_csv(folder / "metrics.csv").kl_seq_exact[0] == pytest.approx(0, abs=1e-5)
    with pytest.raises(SystemExit):
        run({**still, "ckpt_dir": str(tmp_path / "none")}, "--policy_revision", "v2")


def test_check_fit_names_what_does_not_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    n = len(tokenizer)
    policy = make_policy(n)
    check_fit(policy, make_policy(n), tokenizer, 64)
    with pytest.raises(UserError, match="ref_name"):
        check_fit(policy, make_policy(n + 1), tokenizer, 64)
    with pytest.raises(UserError, match="max_new_tokens"):
        check_fit(policy, make_policy(n), tokenizer, 65)
    with pytest.raises(UserError, match="max_new_tokens"):
        check_fit(policy, make_policy(n, n_positions=32), tokenizer, 33)
    with pytest.raises(UserError, match="tokenizer"):
        check_fit(make_policy(n - 1), make_policy(n - 1), tokenizer, 64)
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(UserError, match="EOS"):
        check_fit(policy, make_policy(n), without, 64)


@pytest.mark.parametrize(("split", "notes"), [("train", 0), ("validation", 1)])
def test_a_split_of_what_has_none_is_noted(
    split: str, notes: int, flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run({**flags, "split": split, "total_steps": "1", "eval_every": "0"})
    said = capsys.readouterr().out
    assert said.count(f"{flags['dataset']} has no splits: it is used whole, and split={split} says nothing") == notes


def test_ids_without_text_are_counted(tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a vocabulary that was padded to a multiple of 64."""
    n = len(tokenizer)
    check_fit(make_policy(n), make_policy(n), tokenizer, 64)
    assert not capsys.readouterr().out
    check_fit(make_policy(n + 5), make_policy(n + 5), tokenizer, 64)
    assert f"note: 5 of the model's {n + 5} ids have no text" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["train", "eval", "sample"])
def test_a_reference_with_other_tokens_of_the_same_number_is_refused(
    script: str,
    flags: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    gpt2_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "other"
    make_lm(len(tokenizer), n_positions=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    commands = {
        "train": lambda: run(flags, "--check", "--ref_name", str(folder)),
        "eval": lambda: run_script_with("eval.py", flags, gpt2_dir, folder),
        "sample": lambda: sample_main(
            [str(gpt2_dir), "--prompt", "a film", "--ref_name", str(folder), "--device", "cpu"]
        ),
    }
    commands[script]()  # the same tokens
    assert "another tokenizer" not in capsys.readouterr().out
    eos = "<|endoftext|>"
    corpus = ["Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich."] * 9
    other = train_tokenizer(len(tokenizer), [eos], [*corpus, "quick brown fox " * 9])
    PreTrainedTokenizerFast(tokenizer_object=other, bos_token=eos, eos_token=eos, unk_token=eos).save_pretrained(folder)
    with pytest.raises((SystemExit, UserError)) as stop:
        commands[script]()
    message = capsys.readouterr().err if isinstance(stop.value, SystemExit) else str(stop.value)
    assert f"ref_name={folder} has another tokenizer" in message
    for file in folder.glob("token*"):
        file.unlink()
    commands[script]()
    assert "note: ref_name=" in capsys.readouterr().out


def run_script_with(script: str, flags: dict[str, str], policy: Path, reference: Path) -> None:
    """eval.py on a few of the run's reviews, against a reference."""
    sys.argv = [
        script,
        "--policy_path",
        str(policy),
        "--ref_name",
        str(reference),
        "--judge",
        "none",
        "--n_samples",
        "4",
        "--device",
        "cpu",
        "--out_csv",
        f"{reference.parent}/results.csv",
    ]
    names = ("rm_name", "dataset", "max_prompt_len", "min_prompt_len", "max_new_tokens")
    sys.argv += [word for name in names for word in (f"--{name}", flags[name])]
    run_script(EvalConfig, eval_script.main)


@pytest.mark.parametrize("kind", ["one output", "Python", "labels"])
def test_a_target_label_that_changes_nothing_is_said(
    kind: str, flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = {
        "one output": str(save_classifier(tmp_path / "rm", {0: "LABEL_0"})),
        "labels": flags["rm_name"],
        "Python": f"{tmp_path}/r.py:size",
    }
    (tmp_path / "r.py").write_text("def size(responses): return [float(len(x)) for x in responses]\n")
    for label, said in ((None, False), ("positive", False), ("Pos", False), ("negative", kind != "labels")):
        words = [] if label is None else ["--target_label", label]
        run({**flags, "rm_name": rewards[kind]}, "--check", *words)
        assert ("note: target_label=negative does not change" in capsys.readouterr().out) is said
    run({**flags, "rm_name": rewards[kind]}, "--check", "--score_log_odds", "true", "--target_label", "negative")
    notes = capsys.readouterr().out
    for setting in ("target_label=negative", "score_log_odds"):
        assert (f"note: {setting} does not change" in notes) is (kind != "labels")


def test_the_preset_abc_takes_a_gpt2_classifier_without_names_of_labels(tmp_path: Path, gpt2_dir: Path) -> None:
    """As the published one is made: a GPT-2 that pads with EOS; the score is the difference of its two logits."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir, pad_token=AutoTokenizer.from_pretrained(gpt2_dir).eos_token)
    config = AutoConfig.from_pretrained(gpt2_dir, pad_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "rm")
    cfg = PRESETS[TrainConfig]["abc"]
    reward = load_run_reward(replace(cfg, rm_name=str(tmp_path / "rm"), device="cpu", dtype="float32"))
    texts = ["A film this good is rare.", "dull"]
    with torch.no_grad():
        logits = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
    assert reward(texts, []).tolist() == pytest.approx([float(x[1] - x[0]) for x in logits], abs=1e-5)
