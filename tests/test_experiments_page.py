"""docs/experiments.md: its commands run, at short settings, and its table is that of results/experiments.csv."""

import re
import shlex
from pathlib import Path

from config import EvalConfig, TrainConfig

import pandas as pd
import pytest
from conftest import run

from experiments.bugs import find_bug
from runtime.cli import parse_config

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python (train\.py .+?)(?: &)?$", PAGE, re.MULTILINE)
SETTINGS = {
    "plain": "kl_coef=0.06",
    "1. β doubled": "kl_coef=0.12",
    "2. no KL": "kl_coef=0",
    "3a. λ 0.5, score at the end": "gae_lambda=0.5 reward_every=0",
    "3b. λ 0.5, partial scores": "gae_lambda=0.5 reward_every=1",
    "6a. half as many steps": "total_steps=25",
    "6b. twice as many": "total_steps=100",
    "9. top-k 10": "top_k=10",
}


def mean_and_range(values: pd.Series, form: str) -> str:
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"


@pytest.mark.parametrize(("title", "setting"), SETTINGS.items())
def test_the_table_is_that_of_the_results(title: str, setting: str) -> None:
    table = pd.read_csv(ROOT / "results" / "experiments.csv")
    runs = table[table.setting == setting]
    assert sorted(runs.seed) == [0, 1, 2]
    cells = [
        title,
        mean_and_range(runs.score, "+.2f"),
        mean_and_range(runs.kl, ".2f"),
        mean_and_range(runs.length_ratio, ".2f"),
        mean_and_range(100 * runs.optimal_share, ".0f"),
    ]
    assert f"| {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize("command", [line for line in COMMANDS if "--resume" not in line])
def test_a_command_trains(
    command: str, flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    (tmp_path / "rewards.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0])
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)[1:]
    folder = run(flags, *words, "--preset=default", "--total_steps=1", f"--ckpt_dir={tmp_path / 'run'}")
    assert len(pd.read_csv(folder / "metrics.csv")) == 1


def test_all_settings_of_its_commands_are_settings() -> None:
    assert len(COMMANDS) == 12
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if "--resume" not in words:
            assert parse_config(TrainConfig, words).preset == "tiny"
    for command in re.findall(r"^python eval\.py (.+)$", PAGE, re.MULTILINE):
        assert parse_config(EvalConfig, shlex.split(command)).policy_path.startswith("runs/")
    for bug in re.findall(r"--bug (\w+)", PAGE):
        assert find_bug(bug) is not None
