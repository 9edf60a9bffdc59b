"""docs/from_trl.md: what it says of this project is so."""

import importlib
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

from config import EvalConfig, TrainConfig, reward_names

import pandas as pd
import pytest
from conftest import run

from runtime.cli import parse_config

PAGE = (Path(__file__).parent.parent / "docs" / "from_trl.md").read_text(encoding="utf-8")
SETTINGS = PAGE.split("## Settings")[1].split("## Calls")[0]
CALLS = PAGE.split("## Calls")[1].split("## Logged")[0]
COLUMNS = PAGE.split("## Logged columns")[1]


def third_cells(section: str) -> list[str]:
    """The column 'here' of a section's table."""
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [row[2] for row in rows[2:]]


def test_our_settings_exist() -> None:
    named = re.findall(r"`(\w+)`", " ".join(third_cells(SETTINGS)))
    assert len(named) > 20
    assert set(named) <= {field.name for field in fields(TrainConfig)}


def test_our_functions_exist() -> None:
    named = re.findall(r"`(model|ppo)\.(\w+)`", CALLS)
    assert len(named) == 6
    for module, name in named:
        assert hasattr(importlib.import_module(module), name)


def test_our_columns_exist(flags: dict[str, str]) -> None:
    named = re.findall(r"`(\w+)`", " ".join(third_cells(COLUMNS)))
    assert len(named) > 12
    assert set(named) <= set(pd.read_csv(run(flags) / "metrics.csv").columns)


@pytest.mark.parametrize("line", re.findall(r"^python (?:train|eval)\.py .+", PAGE, re.MULTILINE))
def test_our_commands_parse(line: str) -> None:
    _, script, *words = shlex.split(line)
    cfg = parse_config(TrainConfig if script == "train.py" else EvalConfig, words)
    assert "my_rewards.py:my_reward" in reward_names(str(cfg.rm_name))


def test_the_preset_is_as_the_page_says() -> None:
    cfg = parse_config(TrainConfig, ["--preset", "trl"])
    assert (cfg.max_prompt_len, cfg.max_new_tokens, cfg.lr, cfg.kl_coef) == (8, 16, 1.41e-5, 0.2)
    assert (cfg.adaptive_kl_target, cfg.gae_lambda, cfg.reward_every) == (6.0, 0.95, 0)
    assert cfg.adaptive_kl_gain == pytest.approx(cfg.batch_size / 10_000)


REWARD = """
def my_reward(prompts, completions, **kwargs):
    return [float(len(text) > len(prompt)) for prompt, text in zip(prompts, completions)]
"""


def test_their_reward_function_runs_unchanged(flags: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARD)
    folder = run({**flags, "rm_name": f"{tmp_path / 'my_rewards.py'}:my_reward"}, "--total_steps=1")
    assert pd.read_csv(folder / "metrics.csv").score_mean.between(0, 1).all()


def test_the_function_on_the_page_trains_beside_another(
    flags: dict[str, str], tmp_path: Path, no_pictures: None
) -> None:
    """With the weights of the command on the page, and a data set that has the column it asks for."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (command,) = (line for line in PAGE.splitlines() if "--reward_weights" in line)
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text(example + REWARD)
    rows = [json.dumps({"text": f"{i} a film this good is rare", "solution": "e"}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    flags |= {"rm_name": command.split("--rm_name ")[1].split()[0].replace("my_rewards.py", str(rewards))}
    flags |= {"dataset": str(tmp_path / "rows.jsonl"), "reward_weights": command.split("--reward_weights ")[1]}
    metrics = pd.read_csv(run({**flags, "total_steps": "1", "eval_every": "0"}) / "metrics.csv")
    total = metrics.reward_accuracy_reward + 0.5 * metrics.reward_my_reward
    assert metrics.score_mean.tolist() == pytest.approx(total.tolist())
