"""experiments/benchmark.py: the work it times is the work it says."""

import sys
from dataclasses import replace
from pathlib import Path

from config import TrainConfig, UserError

import pandas as pd
import pytest

from experiments.benchmark import BenchConfig, append, main, make_config, measure, measure_peer, sweep
from experiments.random_models import Workload, make_random_models
from reward import SentimentReward
from runtime.cli import parse_flags
from training.parts import load_parts

SMALL = Workload((2, 32, 2), (1, 32, 2), batch=4, prompt=6, response=5, epochs=1, minibatch=2)


def test_sweep_sets_one_shape_and_refuses_nonsense() -> None:
    assert sweep(SMALL, None) == [SMALL]
    assert [work.response for work in sweep(SMALL, "response=1,2,30")] == [1, 2, 30]
    for wrong in ("width=3", "batch", "batch=a", "gpt2=1"):
        with pytest.raises(UserError, match="sweep"):
            sweep(SMALL, wrong)


def test_measure_times_every_phase_and_counts_every_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = make_random_models(SMALL, tmp_path, vocabulary=300)
    cfg = TrainConfig(
        **names,
        device="cpu",
        dtype="float32",
        batch_size=4,
        minibatch_size=2,
        ppo_epochs=1,
        max_prompt_len=6,
        min_prompt_len=6,
        max_new_tokens=5,
    )
    texts: list[int] = []
    score = SentimentReward.score
    monkeypatch.setattr(SentimentReward, "__call__", lambda self, some, _: texts.append(len(some)) or score(self, some))
    measure(replace(cfg, reward_every=2), steps=1)
    assert len(texts) == 4, "a step to warm up and one more, whole responses and unfinished ones"
    assert texts[0] == texts[2] == 4
    texts.clear()
    row = measure(replace(cfg, reward_every=0), steps=1)
    assert texts == [4, 4]
    phases = [row[f"seconds_{name}"] for name in ("generate", "score", "update")]
    assert all(seconds > 0 for seconds in phases)
    assert row["seconds"] == pytest.approx(sum(phases))
    assert row["times_floor"] > 1, "nothing runs faster than the machine"
    assert row["first_seconds"] > 0
    lengths = [len(line.split()) for line in (tmp_path / "prompts.txt").read_text().splitlines()]
    assert len(lengths) == 16
    assert min(lengths) < SMALL.prompt + 8 == max(lengths), "prompts are ragged, and long enough"
    append(tmp_path / "b.csv", [row])
    append(tmp_path / "b.csv", [{**row, "peer_seconds": 7.0}])
    table = pd.read_csv(tmp_path / "b.csv")
    assert len(table) == 2
    assert table.peer_seconds.tolist()[1] == 7.0


def test_the_text_is_read_from_the_column_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = make_random_models(SMALL, tmp_path, vocabulary=300)
    lines = Path(names["dataset"]).read_text().splitlines()
    rows = pd.DataFrame({"text": "w1", "body": lines})
    rows.to_csv(tmp_path / "reviews.csv", index=False)
    models = [f"--{name}={names[name]}" for name in ("policy_name", "rm_name")]
    config = parse_flags(BenchConfig, [*models, f"--dataset={tmp_path / 'reviews.csv'}", "--text_column=body"], None)
    train_cfg = make_config(config, replace(SMALL, prompt=8), tmp_path)
    assert load_parts(train_cfg).prompts.prompts, "texts of one word would be too short"
    assert train_cfg.text_column == "body"
    with pytest.raises(UserError, match="text_column"):
        main(["--text_column=body"])


def test_peer_is_the_median_without_the_first_step() -> None:
    talk = "for x in (9, 2, 4, 3): print(f'step total {x:.2f} s  done')"
    assert measure_peer(f'{sys.executable} -c "{talk}"')["peer_seconds"] == 3
    for wrong in (f"{sys.executable} -c 1/0", "no_such_program", "", "'"):
        with pytest.raises(UserError, match="peer"):
            measure_peer(wrong)
