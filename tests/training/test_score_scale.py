"""A run paid by a Python reward or a single output: units, resume, failures, and whose code runs."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from config import PAID_AT_END, TrainConfig, UserError

import pandas as pd
import pytest
import torch
from conftest import TIMINGS, as_processes, exact, run, run_eval, save_classifier
from safetensors.torch import load_file

from pretrain import tiny_world
from reward import PythonReward, ScalarReward, SentimentReward
from runtime.cli import parse_config
from training.parts import load_parts, resolve
from training.score_scale import PROMPTS, measure

BREVITY = (
    "def brevity(responses, prompts):\n    return [1000 - 7.0 * len(r) + len(p) for r, p in zip(responses, prompts)]\n"
)
STEPS = {"total_steps": "6", "eval_every": "3", "eval_prompts": "4", "save_every": "3", "lr": "3e-3"}


@pytest.fixture
def python(flags: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Flags of a run that is paid by a function in a file."""
    (tmp_path / "my_rewards.py").write_text(BREVITY)
    return {**flags, **STEPS, "rm_name": f"{tmp_path / 'my_rewards.py'}:brevity"}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], work: Callable[[], object]) -> str:
    """The one line on stderr of a run that ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        work()
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert len(error) == 1
    return error[0]


def test_a_python_reward_trains_in_its_own_units(python: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(python)
    printed = capsys.readouterr()
    metrics, config = pd.read_csv(folder / "metrics.csv"), config_of(folder)
    assert "positive_rate" not in metrics
    assert metrics.score_mean.between(200, 1100).all(), "the reward's own units"
    about = config["reward"]
    assert (about["label"], about["scores"]) == (None, "score")
    assert about["file"] == python["rm_name"].removesuffix(":brevity")
    assert len(about["sha256"]) == 64
    scale = f"(score {-about['mean']:+.4g}) / {about['std']:.4g}"
    assert scale in printed.out
    assert "paid on their last token, with a critic of its own, gae_lambda 0.7" in printed.out
    assert "mean score" in printed.out
    assert "sentiment" not in printed.out + printed.err
    assert "positive" not in printed.out + printed.err
    paid = (metrics.score_mean - about["mean"]) / about["std"]
    expected = paid - metrics.kl_coef * metrics.kl_seq
    assert metrics.reward_mean.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    state = json.loads((folder / "state" / "step_000003" / "state.json").read_text())
    assert state["score_scale"] == {"mean": about["mean"], "std": about["std"]}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_scale_is_that_of_the_base_on_the_first_prompts(python: dict[str, str]) -> None:
    """Against plain arithmetic over responses sampled batch by batch; the policy's weights play no part."""
    parts = load_parts(resolve(parse_config(TrainConfig, [f"--{name}={value}" for name, value in python.items()])))
    cfg = parse_config(TrainConfig, [f"--{name}={value}" for name, value in python.items()])
    seen: list[float] = []
    function = parts.models.reward.function

    def noted(responses: list[str], prompts: list[str]) -> list[float]:
        seen.extend(found := function(responses, prompts))
        return found

    parts.models.reward.function = noted
    scale = measure(parts, cfg)
    assert len(seen) == PROMPTS == 256
    mean = sum(seen) / 256
    assert scale.mean == pytest.approx(mean, rel=1e-6)
    assert scale.std == pytest.approx((sum((x - mean) ** 2 for x in seen) / 256) ** 0.5, rel=1e-6)
    with torch.no_grad():
        for weight in parts.models.policy.parameters():
            weight.mul_(1.5)
    assert measure(parts, cfg) == scale


def test_a_base_whose_scores_are_all_alike_is_noted(python: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(python["rm_name"].removesuffix(":brevity")).write_text("def brevity(responses): return [5.0] * len(responses)")
    folder = run({**python, "total_steps": "1"})
    assert "score 5; PPO learns from differences" in capsys.readouterr().out
    assert config_of(folder)["reward"]["std"] == 1


@pytest.mark.parametrize(
    ("setting", "label", "scaled"), [("", 2, False), ("true", 2, True), ("", 1, True), ("false", 1, False)]
)
def test_only_scores_of_any_size_are_scaled_unless_asked(
    setting: str, label: int, scaled: bool, flags: dict[str, str], tmp_path: Path
) -> None:
    names = {0: "negative", 1: "positive"} if label == 2 else {0: "LABEL_0"}
    asked = {"standardize_scores": setting} if setting else {}
    folder = run({**flags, **asked, "rm_name": str(save_classifier(tmp_path / "rm", names)), "total_steps": "1"})
    about = config_of(folder)["reward"]
    assert ((about["mean"], about["std"]) != (0, 1)) == scaled
    assert ("positive_rate" in pd.read_csv(folder / "metrics.csv")) == (label == 2)


def test_resume_needs_the_function_again_and_ends_alike(
    python: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], no_pictures: None
) -> None:
    whole = run({**python, "ckpt_dir": str(tmp_path / "whole")})
    half = run({**python, "total_steps": "6"})
    shutil.rmtree(half / "state" / "step_000006")
    again = {"ckpt_dir": str(half)}
    error = refused(capsys, lambda: run(again, "--resume"))
    assert "is never run because" in error
    assert f"--rm_name {python['rm_name']}" in error
    run({**again, "rm_name": python["rm_name"]}, "--resume")
    assert exact(half) == exact(whole)
    assert config_of(half)["reward"] == config_of(whole)["reward"]


def test_a_changed_function_is_named_on_resume(python: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run({**python, "total_steps": "3"})
    file = Path(python["rm_name"].removesuffix(":brevity"))
    file.write_text(BREVITY.replace("7.0", "8.0"))
    more = {"ckpt_dir": str(folder), "rm_name": python["rm_name"], "total_steps": "4"}
    error = refused(capsys, lambda: run(more, "--resume"))
    assert f"rm_name={python['rm_name']} has changed since the run began" in error
    assert str(file) in error
    scale = config_of(folder)["reward"]["mean"]
    run(more, "--resume", "--allow_changes")
    assert config_of(folder)["reward"]["mean"] == scale, "it is paid in the units it began with"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise OSError('disk\\nof the reward')", "OSError: disk of the reward"),
        ("return [float('nan')] * len(responses)", "returned nan for response 1 of 8"),
        ("return [1.0]", "list of shape (1,)"),
        ("return 'abc'", "returned str"),
        ("raise KeyboardInterrupt", "(KeyboardInterrupt)"),
    ],
)
def test_a_function_that_fails_later_loses_nothing(
    fault: str, words: str, python: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its 37th call, which is that of the fourth step; the steps before are saved and resumed from."""
    file = Path(python["rm_name"].removesuffix(":brevity"))
    file.write_text(
        "calls = []\n\ndef brevity(responses):\n    calls.append(1)\n"
        f"    if len(calls) == 37:\n        {fault}\n    return [-float(len(r)) for r in responses]\n"
    )
    python |= {"eval_every": "0", "sample_every": "9", "save_every": "9"}
    error = refused(capsys, lambda: run(python))
    assert words in error
    line = 6 if "raise" in fault else 3
    assert f"in brevity, {file}:{line}" in error
    folder = Path(python["ckpt_dir"])
    steps = len(pd.read_csv(folder / "metrics.csv"))
    assert 2 <= steps < 6
    assert (folder / "state" / f"step_{steps:06d}").is_dir()
    assert (folder / "policy_lm").is_dir()
    run({"ckpt_dir": str(folder), "rm_name": python["rm_name"]}, "--resume")
    assert pd.read_csv(folder / "metrics.csv").step.tolist() == [1, 2, 3, 4, 5, 6]


NUISANCE = """
import os, random, signal, sys, tempfile, warnings
import numpy, torch

def disturb():
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0), numpy.random.seed(0), random.seed(0)
    numpy.seterr(all="raise")
    warnings.simplefilter("error")
    os.chdir(tempfile.gettempdir())
    sys.path.insert(0, "nowhere")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

disturb()
import utils, config

class brevity:
    def __init__(self): disturb()
    def __call__(self, responses, prompts):
        disturb()
        return [1000 - 7.0 * len(r) + len(p) for r, p in zip(responses, prompts)]
"""


@pytest.mark.usefixtures("no_pictures")
def test_a_reward_cannot_disturb_the_run(
    python: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rewards of equal scores, of which one changes what it can, train equal policies, where they were told to."""
    monkeypatch.chdir(tmp_path)
    python |= {"total_steps": "2", "eval_every": "0", "batch_size": "16"}
    calm = run({**python, "ckpt_dir": "calm"})
    for name in ("utils", "config"):
        (tmp_path / f"{name}.py").write_text("")
    Path(python["rm_name"].removesuffix(":brevity")).write_text(NUISANCE)
    disturbed = run({**python, "ckpt_dir": "disturbed"})
    weights = [load_file(tmp_path / folder / "policy_lm" / "model.safetensors") for folder in (calm, disturbed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    rows = [pd.read_csv(tmp_path / folder / "metrics.csv").drop(columns=TIMINGS) for folder in (calm, disturbed)]
    pd.testing.assert_frame_equal(*rows, check_exact=True)


@pytest.mark.parametrize("kind", ["SentimentReward", "load_reward"])
def test_names_mean_in_a_reward_what_they_mean_on_the_command_line(
    kind: str, classifier_dir: Path, flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_world, "tiny_world", lambda: tmp_path / "world")
    shutil.copytree(classifier_dir, tmp_path / "world" / "reward")
    (tmp_path / "mine.py").write_text(
        f"from reward import {kind}\nclass Mine:\n  def __init__(self): self.judge = {kind}('tiny:reward')\n"
        "  def __call__(self, responses, prompts): return self.judge(responses, prompts)\n"
    )
    reward = PythonReward(f"{tmp_path / 'mine.py'}:Mine")
    assert torch.equal(reward(["good", "bad"], ["", ""]), SentimentReward(str(classifier_dir))(["good", "bad"]))


def test_what_a_reward_needs_and_does_not_find_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from reward import SentimentReward\n\njudge = SentimentReward('./nowhere')\n")
    with pytest.raises(UserError, match=r"nowhere does not exist: check the path.*mine\.py:3") as caught:
        PythonReward(f"{file}:judge")
    assert str(caught.value).startswith(f"rm_name={file}:judge cannot be loaded")
    (tmp_path / "reward.py").write_text("")
    with pytest.raises(UserError, match=r"beside it are reward, which it gets instead of this program's"):
        PythonReward(f"{file}:judge")


@pytest.mark.parametrize("where", ["file", "module"])
def test_no_run_folder_can_run_code(
    where: str,
    flags: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A folder from elsewhere, whose config.json names code: neither eval.py nor --resume touch it."""
    ran = tmp_path / "it_ran"
    (tmp_path / "evil_module.py").write_text(
        f"open({str(ran)!r}, 'w')\ndef f(responses): return [0.0] * len(responses)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    folder = run({**flags, "total_steps": "2", "save_every": "1"})
    evil = f"{tmp_path / 'evil_module.py'}:f" if where == "file" else "evil_module:f"
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "rm_name": evil}))
    shutil.rmtree(folder / "state" / "step_000002")
    for work in (
        lambda: run({"ckpt_dir": str(folder)}, "--resume"),
        lambda: run({}, "--resume", str(folder)),
        lambda: run({}, "--resume", str(folder / "state" / "step_000001")),
        lambda: run({"ckpt_dir": str(folder)}, "--resume", "--allow_changes", "--check"),
        lambda: run_eval(folder, tmp_path),
    ):
        error = refused(capsys, work)
        assert evil in error
        assert "config.json" in error
    assert not ran.exists()
    run_eval(folder, tmp_path, "--rm_name", flags["rm_name"])  # a reward of one's own choice is fine
    assert not ran.exists()


def test_settings_for_rewards_that_are_paid_at_the_end() -> None:
    ours = parse_config(TrainConfig, ["--rm_name", "rewards.py:f"])
    assert {name: getattr(ours, name) for name in PAID_AT_END} == PAID_AT_END
    assert (ours.critic, ours.gae_lambda) == ("own", 0.7)
    shared = parse_config(TrainConfig, ["--rm_name", "rewards.py:f", "--critic", "shared"])
    assert (shared.reward_every, shared.gae_lambda, shared.lambda_warmup_steps) == (0, 1, 0)
    asked = parse_config(TrainConfig, ["--rm_name", "rewards.py:f", "--gae_lambda", "0.9"])
    assert (asked.reward_every, asked.gae_lambda) == (0, 0.9)
    partial_scores = parse_config(TrainConfig, ["--rm_name", "rewards.py:f", "--reward_every", "4"])
    assert (partial_scores.reward_every, partial_scores.gae_lambda) == (4, TrainConfig.gae_lambda)
    assert partial_scores.critic == "shared"
    assert parse_config(TrainConfig, ["--rm_name", "rewards.py:f", "--reward_every", "0"]) == ours
    classifier = parse_config(TrainConfig, ["--rm_name", "some/classifier"])
    assert classifier.reward_every == TrainConfig.reward_every
    tiny = parse_config(TrainConfig, ["--preset", "tiny", "--rm_name", "rewards.py:f"])
    assert tiny.lr == parse_config(TrainConfig, ["--preset", "tiny"]).lr


def test_it_is_called_once_a_batch_with_the_rows_of_each_process(python: dict[str, str], tmp_path: Path) -> None:
    """As many processes as you like learn what one learns."""
    file = Path(python["rm_name"].removesuffix(":brevity"))
    file.write_text(
        f"{BREVITY}    # {{}}\n".replace("    return", "    print('called with', len(responses))\n    return")
    )
    python |= {"eval_every": "0", "sample_every": "99", "total_steps": "3"}
    printed = {count: tmp_path / f"{count}.txt" for count in (1, 2)}
    for count, said in printed.items():
        folder = {**python, "ckpt_dir": str(tmp_path / str(count))}
        assert as_processes(count, partial(run, folder), said) == [0] * count, said.read_text()
    calls = {count: said.read_text().count("called with") for count, said in printed.items()}
    self_check, measured = 1, PROMPTS // 8
    assert calls[1] == self_check + measured + 3 + 1, "a sample of the base at the end"
    one, two = (pd.read_csv(tmp_path / str(count) / "metrics.csv").drop(columns=TIMINGS) for count in (1, 2))
    pd.testing.assert_frame_equal(one, two, rtol=1e-4, atol=1e-4)
    assert config_of(tmp_path / "1")["reward"] == config_of(tmp_path / "2")["reward"]


@pytest.mark.parametrize("name", ["rewards.py", "nowhere.py:f", "nowhere:f"])
def test_a_reward_that_is_not_there_is_refused_before_anything_is_written(
    name: str, flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, lambda: run({**flags, "rm_name": name}))
    assert name in error
    assert not Path(flags["ckpt_dir"]).exists()


def test_the_check_calls_a_function_with_an_empty_response(
    python: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(python["rm_name"].removesuffix(":brevity")).write_text("def brevity(r): return [1 / len(x) for x in r]")
    assert "ZeroDivisionError" in refused(capsys, lambda: run(python))
    with pytest.raises(UserError):
        load_parts(
            resolve(
                TrainConfig(
                    rm_name="nowhere.py:f", policy_name=python["policy_name"], dataset=python["dataset"], device="cpu"
                )
            )
        )


def test_a_function_may_judge_prompt_and_response(python: dict[str, str]) -> None:
    Path(python["rm_name"].removesuffix(":brevity")).write_text(
        "def brevity(r, prompts):\n    assert all(x.startswith(p) for x, p in zip(r, prompts) if len(x) > 50)\n"
        "    return [float(len(x)) for x in r]"
    )
    on_prompt = run({**python, "total_steps": "1"}, "--reward_on_prompt", "true")
    assert pd.read_csv(on_prompt / "metrics.csv").score_mean[0] > 20


DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
FIVE = DOCS.read_text(encoding="utf-8").split("\n## A Python function\n")[1].split("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", FIVE, re.DOTALL)
EXPECTED = {  # what the first four give "a film. good! " + 30 words, by hand
    "about_20_words": lambda n: -abs(n - 20),
    "avoid_words": lambda n: -1,
    "exclaim": lambda n: 0.5,
}


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: re.search(r"(?:def|class) (\w+)", code)[1])
def test_the_examples_of_the_docs_train(code: str, flags: dict[str, str], tmp_path: Path) -> None:
    """Each as it is printed, with models of this test in place of those of the hub."""
    assert len(code.strip().splitlines()) <= 15
    name = re.search(r"(?:def|class) (\w+)", code)[1]  # type: ignore[index]
    preference = save_classifier(tmp_path / "preferences", {0: "LABEL_0"})
    code = code.replace("lvwerra/distilbert-imdb", flags["rm_name"]).replace("models/preferences", str(preference))
    (tmp_path / "rewards.py").write_text(code)
    reward = PythonReward(f"{tmp_path / 'rewards.py'}:{name}")
    text = "a film. good! " + "word " * 30
    score = reward([text, ""])[0].item()
    if name in EXPECTED:
        assert score == EXPECTED[name](33)
    else:
        sentiment = SentimentReward(flags["rm_name"]).score([text]).item()
        other = -0.05 * (33 - 25) if name == "BriefPraise" else 0.1 * ScalarReward(str(preference))([text]).item()
        assert score == pytest.approx((1 if name == "BriefPraise" else 0.5) * sentiment + other, abs=1e-5)
    folder = run({**flags, "rm_name": f"{tmp_path / 'rewards.py'}:{name}", "total_steps": "1", "eval_every": "0"})
    assert pd.read_csv(folder / "metrics.csv").score_mean.notna().all()


def test_the_docs_have_five_examples() -> None:
    assert len(EXAMPLES) == 5
