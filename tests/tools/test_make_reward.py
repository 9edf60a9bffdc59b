"""From preferences to a reward model by the command line."""

import json
import shutil
from pathlib import Path

from config import UserError

import pytest
import torch
from conftest import made_pairs, make_models, run, write_labelled_csv, write_pairs

from pretrain.preferences import PreferenceTrainer
from tools.make_reward import main


def test_pairs_become_a_reward_that_a_run_takes(
    tmp_path: Path, gpt2_dir: Path, flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_pairs(tmp_path / "pairs.jsonl", made_pairs(100, "the film ")), tmp_path / "rm"
    words = ["--dataset", str(file), "--init", str(gpt2_dir), "--out", str(out), "--lr", "3e-3", "--epochs", "4"]
    main([*words, "--batch_tokens", "512"])
    printed = capsys.readouterr().out.splitlines()
    report = json.loads((out / "report.json").read_text())
    low, high = report["held_out_accuracy_ci"]
    assert low <= report["held_out_accuracy"] <= high
    assert (report["pairs"], report["held_out_pairs"]) == (90, 10)
    assert f"{report['held_out_accuracy']:.1%} [{low:.1%}, {high:.1%}] of 10 others" in printed[0]
    assert printed[1] == f"next: python train.py --rm_name {out} --reward_on_prompt"
    folder = run({**flags, "rm_name": str(out), "total_steps": "1"})
    assert "trained on prompt + response: --reward_on_prompt true" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["reward"]["label"] is None
    with pytest.raises(UserError, match="exists"):
        main(words)


def test_labelled_texts_make_pairs(tmp_path: Path, gpt2_dir: Path, labelled_csv: Path) -> None:
    main(
        [
            "--dataset",
            str(labelled_csv),
            "--init",
            str(gpt2_dir),
            "--out",
            str(tmp_path / "rm"),
            "--chosen_label",
            "GOOD",
        ]
    )
    report = json.loads((tmp_path / "rm" / "report.json").read_text())
    assert report["pairs"] + report["held_out_pairs"] == 40


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "0"], "lr=0.0"),
        (["--epochs", "nan"], "epochs=nan"),
        (["--chosen_label", "excellent"], "bad, good"),
        ([], "no column chosen and rejected"),
        (["--init", "nowhere"], "init=nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    flags: list[str], words: str, tmp_path: Path, gpt2_dir: Path, labelled_csv: Path
) -> None:
    if "--init" in flags:
        flags = [*flags, "--chosen_label", "good"]
    with pytest.raises(UserError, match=words):
        main(["--dataset", str(labelled_csv), "--init", str(gpt2_dir), "--out", str(tmp_path / "rm"), *flags])
    assert not list(tmp_path.iterdir())


def test_a_run_folder_stands_for_its_policy(gpt2_dir: Path, tmp_path: Path) -> None:
    """As what is trained further, by both tools."""
    run_folder = tmp_path / "run"
    shutil.copytree(gpt2_dir, run_folder / "policy_lm")
    PreferenceTrainer(str(run_folder), False, torch.device("cpu"))
    texts = write_labelled_csv(tmp_path / "reviews.csv", ["good", "bad"])
    make_models(texts, tmp_path / "made", "--init", str(run_folder))
