"""Making models and the tiny world: what is written, what is refused, what a crash leaves."""

import json
import shlex
from pathlib import Path

from config import TrainConfig, UserError

import pytest
from conftest import MAKING, make_models, write_labelled_csv

import train
from pretrain import tiny_reviews
from runtime.cli import parse_config
from tools.make_models import main


def test_report_holds_what_was_measured(made_models: Path) -> None:
    report = json.loads((made_models / "report.json").read_text())
    assert 0 < report["policy"]["held_out_nats_per_token"] < 10
    assert 0 <= report["reward"]["held_out_accuracy"] <= 1
    assert report["reward"]["held_out_texts"] == 8
    assert report["recipe"]["lm"]["steps"] == 2
    assert [p.name for p in made_models.parent.iterdir()] == ["made"]


@pytest.mark.parametrize("names", [["good one", "bad one"], ["positive", "negative"]])
def test_the_command_printed_at_the_end_trains(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell reads it, from a folder whose name has a blank; the self-check runs on the real models."""
    monkeypatch.chdir(tmp_path)
    data = write_labelled_csv(tmp_path / "my reviews.csv", names)
    data.write_text(data.read_text().replace("text,label", "body,label"))
    main(["--dataset", "my reviews.csv", "--text_column", "body", "--out", "näw models/1", *MAKING])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    python, script, *flags = shlex.split(line.removeprefix("next: "))
    assert (python, script) == ("python", "train.py")
    cfg = parse_config(TrainConfig, [*flags, "--check", "--device=cpu"])
    assert cfg.target_label == ("positive" if "positive" in names else "good one")
    train.main(cfg)


def test_same_seed_makes_the_same_models(labelled_csv: Path, made_models: Path, tmp_path: Path) -> None:
    again = make_models(labelled_csv, tmp_path / "again")
    for file in ("policy/model.safetensors", "reward/model.safetensors", "policy/tokenizer.json"):
        assert (again / file).read_bytes() == (made_models / file).read_bytes()


def test_the_shape_of_the_language_model_can_be_chosen(labelled_csv: Path, tmp_path: Path) -> None:
    folder = make_models(labelled_csv, tmp_path / "out", "--lm_layers", "1", "--lm_width", "192")
    config = json.loads((folder / "policy" / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"], config["n_head"]) == (1, 192, 3)


@pytest.mark.parametrize(("missing", "flags"), [(None, []), (-1, ["--label_names", "-1=,0=bad,1=good"])])
def test_rows_without_label_go_to_the_language_model_only(
    missing: int | None, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.jsonl"
    texts, labels = tiny_reviews.generate_reviews(60, seed=0)
    rows = [{"text": t, "label": y if i < 40 else missing} for i, (t, y) in enumerate(zip(texts, labels, strict=True))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = json.loads((make_models(path, tmp_path / "out", *flags) / "report.json").read_text())
    names = ("bad", "good") if flags else ("NEGATIVE", "POSITIVE")
    counts = [f"{y} = {names[y]} ({labels[:40].count(y)})" for y in (0, 1)]
    assert f"labels: {counts[0]}, {counts[1]}, none (20)" in capsys.readouterr().out.splitlines()
    assert report["policy"]["texts"] == 56
    assert report["reward"]["texts"] == 36
    assert report["reward"]["held_out_texts"] == 4


def test_wrong_input_is_refused_in_one_line(labelled_csv: Path, tmp_path: Path) -> None:
    one = write_labelled_csv(tmp_path / "one.csv", ["good", "good"])
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "file").write_text("")
    wrong = {
        "missing.csv": ["--dataset", str(tmp_path / "missing.csv")],
        "label_column='stars'": ["--label_column", "stars"],
        "text_column='body'": ["--text_column", "body"],
        "holds 1 different": ["--dataset", str(one)],
        "holds 80 different": ["--label_column", "text"],
        "no text": ["--dataset", str(tmp_path / "empty.csv")],
        "lm_steps=0": ["--lm_steps", "0"],
        "lm_width=200": ["--lm_width", "200"],
        "rm_lr=nan": ["--rm_lr", "nan"],
        "--size": ["--size", "huge"],
        "--colour": ["--colour", "red"],
        "exists": ["--out", str(tmp_path)],
        "cannot be written": ["--out", str(tmp_path / "file" / "out")],
        "init=": ["--init", str(tmp_path / "nowhere")],
    }
    for words, flags in wrong.items():
        with pytest.raises(UserError, match=words) as error:
            main(["--dataset", str(labelled_csv), "--out", str(tmp_path / "out"), *MAKING, *flags])
        assert "\n" not in str(error.value), words
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*")), "a temporary folder is left"


def test_a_failure_leaves_no_folder(labelled_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.models.train_policy", crash)
    with pytest.raises(KeyboardInterrupt):
        make_models(labelled_csv, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def crash(*_: object) -> None:
    raise KeyboardInterrupt


def test_diverging_training_is_refused(labelled_csv: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower its step size"):
        make_models(labelled_csv, tmp_path / "out", "--lm_lr", "1e30", "--lm_steps", "5")
