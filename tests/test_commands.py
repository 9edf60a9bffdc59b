"""The commands that programs print for their user to run next are run here, as a shell would read them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from config import EvalConfig, TrainConfig

import pandas as pd
import pytest
from conftest import CORPUS, run, run_script

import eval as eval_script
import train
from runtime.cli import shell_command
from training.commands import eval_command, resume_command

SCRIPTS = {"train.py": (TrainConfig, train.main), "eval.py": (EvalConfig, eval_script.main)}
FEW = ["--n_samples", "4", "--judge", "none", "--device", "cpu", "--dtype", "float32"]


def printed_command(text: str) -> list[str]:
    """The words of the last command in a text."""
    return shlex.split(re.findall(r"python \S+\.py.*", text)[-1])


def follow(words: list[str], *more: str) -> None:
    """Run the command of these words in this process."""
    assert words[0] == "python"
    cls, main = SCRIPTS[words[1]]
    sys.argv = [*words[1:], *more]
    run_script(cls, main)


def evaluated(folder: Path) -> dict[str, object]:
    """The settings of the evaluation in a run folder."""
    return json.loads((folder / "eval_summary.json").read_text())["settings"]


@pytest.fixture
def short(flags: dict[str, str], no_pictures: None) -> dict[str, str]:
    return {**flags, "total_steps": "1", "eval_every": "0"}


@pytest.mark.parametrize("name", ["run", "my run", "café's $HOME", 'a "b" #c'])
def test_what_train_prints_evaluates_the_run_wherever_it_is(
    name: str, short: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run({**short, "ckpt_dir": str(tmp_path / name)})
    follow(printed_command(capsys.readouterr().out), *FEW)
    settings = evaluated(folder)
    assert settings["dataset"] == short["dataset"]
    assert (folder / "eval_results.csv").exists()


def test_what_train_prints_is_right_for_the_default_folder(
    short: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run({**short, "ckpt_dir": "ckpts"})
    words = printed_command(capsys.readouterr().out)
    assert words == ["python", "eval.py"]
    follow(words, *FEW)
    assert evaluated(tmp_path / "ckpts")["policy_path"] == "ckpts/policy_lm"


def test_what_train_prints_names_a_python_reward(
    short: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my rewards.py").write_text("def length(responses): return [float(len(r)) for r in responses]\n")
    folder = run({**short, "rm_name": f"{tmp_path}/my rewards.py:length"})
    follow(printed_command(capsys.readouterr().out), *FEW)
    assert evaluated(folder)["rm_name"] == f"{tmp_path}/my rewards.py:length"


@pytest.mark.parametrize("preset", [[], ["--preset", "tiny"]])
def test_a_preset_does_not_hide_the_data_of_the_run(
    preset: list[str], short: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the preset is named once more."""
    folder = run(short, "--preset", "tiny")
    follow(printed_command(capsys.readouterr().out), *FEW, *preset)
    assert evaluated(folder)["dataset"] == short["dataset"]


@pytest.mark.parametrize(("others", "taken"), [((), "train"), (("validation", "extra"), "validation")])
def test_what_train_prints_evaluates_data_without_a_test_split(
    others: tuple[str, ...], taken: str, short: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, name in enumerate(("train", *others)):
        rows = [f'"{i} {j} {text}"' for j, text in enumerate(CORPUS)]
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join(["text", *rows]))
    folder = run({**short, "dataset": str(tmp_path / "data")})
    follow(printed_command(capsys.readouterr().out), *FEW)
    assert f"has no split test, so prompts are taken from its split {taken}" in capsys.readouterr().out
    assert evaluated(folder)["split"] == taken
    numbers = {row.split()[0] for row in pd.read_csv(folder / "eval_results.csv").prompt}
    assert numbers == {str(("train", *others).index(taken))}


def test_data_that_changed_after_training_is_said(
    short: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(shutil.copy(short["dataset"], tmp_path / "reviews.jsonl"))
    run({**short, "dataset": str(file)})
    words, note = printed_command(capsys.readouterr().out), "has changed since this policy was trained on it"
    follow(words, *FEW)
    assert note not in capsys.readouterr().out
    file.write_text(file.read_text().replace("rare", "raw", 1))
    follow(words, *FEW)
    assert f"note: {file} {note}" in capsys.readouterr().out


def test_the_command_to_resume_resumes(
    short: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run with a Python reward, in a folder with a space."""
    (tmp_path / "rewards.py").write_text("def length(responses): return [len(r) for r in responses]\n")
    rm_name = f"{tmp_path}/rewards.py:length"
    folder = run({**short, "ckpt_dir": str(tmp_path / "my run"), "rm_name": rm_name})
    capsys.readouterr()
    follow(shlex.split(resume_command(TrainConfig(ckpt_dir=str(folder), rm_name=rm_name))), "--total_steps", "2")
    assert "resuming after step 1" in capsys.readouterr().out


def test_a_shell_splits_a_command_into_its_words_again() -> None:
    words = ["python", "a b", "it's", 'say "so"', "$HOME", "*", "café", "", "a;b", "#x"]
    listed = ["-c", "import sys, json; print(json.dumps(sys.argv[1:]))"]
    command = shell_command(sys.executable, *listed, *words)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == words


def test_the_defaults_are_left_out() -> None:
    assert eval_command(Path("ckpts/policy_lm"), "lvwerra/distilbert-imdb") == "python eval.py"
    assert eval_command(Path("x/policy_lm"), "a.py:f") == "python eval.py --policy_path x/policy_lm --rm_name a.py:f"
    assert resume_command(TrainConfig()) == "python train.py --resume"
    assert resume_command(TrainConfig(ckpt_dir="x y")) == "python train.py --resume 'x y'"
    assert resume_command(TrainConfig(ckpt_dir="-x")) == "python train.py --resume=-x"
    assert eval_command(Path("-x/policy_lm"), "tiny:reward") == "python eval.py --policy_path=-x/policy_lm"
