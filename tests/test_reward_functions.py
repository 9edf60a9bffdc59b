"""Reward functions as people write them for TRL run unchanged, with columns, weights and tokens."""

import inspect
import json
import re
import shlex
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from config import EvalConfig, TrainConfig, UserError, reward_names

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CORPUS, as_processes, make_policy, make_rollout, run, run_script, sample
from matplotlib.figure import Figure

import eval as eval_script
from data import load_texts
from evaluation.settings import settings_of_run, weights_of_run
from ppo import estimate_advantages
from reward import (
    Context,
    PythonReward,
    ScoreScale,
    choose_columns,
    distinct_names,
    load_reward,
    normalized_sum,
    score_responses,
)
from runtime.cli import parse_config
from runtime.user_function import Source, match_arguments
from tools.interpolate import main as interpolate_main
from tools.sample import main as sample_main
from training.plots import PARTS
from training.ranks import check_same_on_all_ranks
from utils import compute_gae, map_tensors, whiten

# In the styles of public users, unchanged
FUNCTIONS = r'''
import asyncio
import re


def format_reward(completions, **kwargs):
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^.*[a-z]\.?$"
    matches = [re.match(pattern, content, re.DOTALL) for content in completions]
    return [1.0 if match else 0.0 for match in matches]


def length_reward(completions, target=20, **kwargs):
    return [-abs(target - len(completion)) / target for completion in completions]


def answer_reward(prompts, completions, answer, **kwargs):
    for prompt, a in zip(prompts, answer):
        if not prompt.startswith(a + " "):
            raise ValueError(f"{prompt} is not the prompt of {a}")
    return [len(set(c) & set(a)) + len(c) / 8 for c, a in zip(completions, answer)]


class Client:
    async def score(self, prompt, completion):
        await asyncio.sleep(0)
        return float(completion.count("e"))


client = Client()


async def async_reward(prompts, completions, **kwargs):
    return await asyncio.gather(*(client.score(p, c) for p, c in zip(prompts, completions)))


def all_columns(completions, **kwargs):
    assert sorted(kwargs) == ["answer", "completion_ids", "other", "prompts", "text"], sorted(kwargs)
    assert all(text.startswith(answer) for text, answer in zip(kwargs["text"], kwargs["answer"]))
    assert all(other is None or other == int(answer) for other, answer in zip(kwargs["other"], kwargs["answer"]))
    return [float(len(ids)) for ids in kwargs["completion_ids"]]


def parts(completions):
    return {"e": [c.count("e") for c in completions], "a or o": [c.count("a") + c.count("o") for c in completions]}


def per_token(completions, completion_ids):
    return [[token % 7 / 7 for token in ids] for ids in completion_ids]
'''


def format_of(text: str, row: str) -> float:
    return float(re.match(r"^.*[a-z]\.?$", text, re.DOTALL) is not None)


def length_of(text: str, row: str) -> float:
    return -abs(20 - len(text)) / 20


ORACLES = {
    "format_reward": format_of,
    "length_reward": length_of,
    "answer_reward": lambda text, row: len({*text} & {*row}) + len(text) / 8,
    "async_reward": lambda text, row: float(text.count("e")),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path / "functions.py"


@pytest.fixture
def paid(flags: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Settings with a data set whose column names the row; rows between are too short, or without text."""
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(CORPUS):
        rows.append({"text": f"{i} {text}", "answer": str(i), "other": i if i % 3 else None})
        rows.append({"text": ["x", " ", None][i % 3], "answer": "wrong", "other": -1})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"dataset": str(tmp_path / "rows.jsonl"), "total_steps": "2", "sample_every": "1", "eval_every": "1"}
    return {**flags, **few}


def samples_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "samples.csv", keep_default_na=False)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["format_reward"], None),
        (["length_reward"], None),
        (["answer_reward"], None),
        (["async_reward"], None),
        (["answer_reward", "length_reward"], "1,0.5"),
    ],
)
def test_a_function_of_trl_trains_unchanged(
    names: list[str], weights: str | None, place: Path, paid: dict[str, str], no_pictures: None
) -> None:
    """Each score is what the function gives that response and that row of the data set, worked out by hand."""
    paid["rm_name"] = ",".join(f"{place}:{name}" for name in names)
    folder = run(paid, *([f"--reward_weights={weights}"] if weights else []))
    samples = samples_of(folder)
    weight_of = [float(w) for w in weights.split(",")] if weights else [1.0]
    for model in ("base", "policy"):
        expected = [
            sum(w * ORACLES[name](text, prompt.split()[0]) for name, w in zip(names, weight_of, strict=True))
            for text, prompt in zip(samples[model], samples.prompt, strict=True)
        ]
        assert samples[f"{model}_score"].tolist() == pytest.approx(expected, abs=1e-5)
    metrics, evaluations = (pd.read_csv(folder / name) for name in ("metrics.csv", "eval.csv"))
    for table in (metrics, evaluations):
        parts = [column for column in table if column.startswith("reward_") and column != "reward_mean"]
        assert parts == ([f"reward_{name}" for name in names] if weights else [])
        if weights:
            total = sum(w * table[part] for w, part in zip(weight_of, parts, strict=True))
            assert table.score_mean.tolist() == pytest.approx(total.tolist(), abs=1e-5)


# --- columns --------------------------------------------------------------------------------------------------------


def test_the_right_rows_reach_the_reward_everywhere(
    place: Path, paid: dict[str, str], tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function fails on a prompt that is not that of its row: in evaluations, frontier and curves, too."""
    monkeypatch.chdir(tmp_path)
    paid["rm_name"] = f"{place}:answer_reward"
    folder = run(paid, "--batch_size=6", "--minibatch_size=3", "--eval_prompts=9")
    few = ["--n_samples=10", "--batch_size=4", "--frontier=2", "--judge=none", "--device=cpu", "--dtype=float32"]
    words = ["eval.py", "--policy_path", str(folder), "--rm_name", paid["rm_name"], *few]
    sys.argv = words
    run_script(EvalConfig, eval_script.main)
    results = pd.read_csv(folder / "eval_results.csv", keep_default_na=False)
    for model in ("base", "policy"):
        expected = [
            ORACLES["answer_reward"](text, prompt.split()[0])
            for text, prompt in zip(results[f"{model}_text"], results.prompt, strict=True)
        ]
        assert results[f"{model}_score"].tolist() == pytest.approx(expected)
    curve = ["--curve", "--alphas=1", "--csv", str(tmp_path / "curve.csv"), "--rm_name", paid["rm_name"]]
    interpolate_main([str(folder), *curve, *few])
    assert pd.read_csv(tmp_path / "curve.csv").n[0] == 10


def test_each_process_has_its_own_rows(place: Path, paid: dict[str, str], tmp_path: Path, no_pictures: None) -> None:
    """And parts are normalised over the rows of all processes; one of three has a row less."""
    paid["rm_name"] = f"{place}:answer_reward,{place}:length_reward"
    words = ["--normalize_parts", "true", "--batch_size=8", "--total_steps=1", "--eval_every=0", "--sample_every=9"]
    alone = run({**paid, "ckpt_dir": str(tmp_path / "alone")}, *words)
    many = {**paid, "ckpt_dir": str(tmp_path / "many")}
    printed = tmp_path / "printed.txt"
    assert as_processes(3, partial(run, many, *words), printed) == [0] * 3, printed.read_text()
    columns = ["score_mean", "reward_answer_reward", "reward_length_reward", "reward_mean", "policy_loss"]
    ours, theirs = (pd.read_csv(folder / "metrics.csv")[columns] for folder in (Path(many["ckpt_dir"]), alone))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-4, atol=1e-5)
    metrics = pd.read_csv(alone / "metrics.csv")
    price_of_kl = metrics.kl_coef * metrics.kl_seq
    assert metrics.reward_mean.tolist() == pytest.approx((-price_of_kl).tolist(), abs=1e-5), (
        "normalised parts have mean 0"
    )


def test_all_columns_reach_a_function_that_takes_anything(place: Path, paid: dict[str, str], no_pictures: None) -> None:
    folder = run({**paid, "rm_name": f"{place}:all_columns", "total_steps": "1"})
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics.score_mean[0] == pytest.approx(metrics.response_len[0]), "EOS is a token of a response"


def rewards(folder: Path, **sources: str) -> str:
    """Reward functions in files of their own, as rm_name lists them."""
    names = []
    for name, source in sources.items():
        (folder / f"{name}_file.py").write_text(source)
        names.append(f"{folder / f'{name}_file.py'}:f")
    return ",".join(names)


COLUMNS = ["text", "answer", "reference_text", "prompt", "id"]


@pytest.mark.parametrize(
    ("parameters", "chosen"),
    [
        ("completions", []),
        ("completions, answer", ["answer"]),
        ("answer, completions", ["answer"]),
        ("reference_text, completions", ["reference_text"]),
        ("completions, reference_text=None", ["reference_text"]),
        ("prompts, completions, prompt", ["prompt"]),
        ("response, text", ["text"]),
        ("text", []),
        ("answer", []),
        ("text, answer", ["answer"]),
        ("x, answer", ["answer"]),
        ("completions, *, id", ["id"]),
        ("completions, **kwargs", COLUMNS),
        ("completions, answer, **kwargs", ["answer", "text", "reference_text", "prompt", "id"]),
        ("completions, unit=1", []),
    ],
)
def test_a_parameter_named_as_a_column_gets_it(parameters: str, chosen: list[str], tmp_path: Path) -> None:
    """A function of the arguments' own names and values shows which of them got what."""
    source = f"def f({parameters}):\n  seen.append(dict(locals()))\n  return [1.0, 2.0]\nseen = []\n"
    reward = load_reward(rewards(tmp_path, one=source))
    assert isinstance(reward, PythonReward)
    assert choose_columns(reward, COLUMNS) == chosen
    columns = {name: [f"{name} 1", f"{name} 2"] for name in chosen}
    score_responses(reward, ["r1", "r2"], ["p1", "p2"], "f", Context([[1], [2]], columns))
    (seen,) = reward.function.__globals__["seen"]
    seen |= seen.pop("kwargs", {})
    for name in chosen:
        assert seen[name] == columns[name]
    if chosen == COLUMNS:
        assert seen["prompts"] == ["p1", "p2"]
        assert seen["completion_ids"] == [[1], [2]]
    assert ["r1", "r2"] in seen.values()


@pytest.mark.parametrize(
    ("parameters", "unknown"),
    [("completions, answr", "answr"), ("completions, answr=None", "answr"), ("x, y", "y"), ("completions, Id", "Id")],
)
def test_what_no_column_is_called_is_refused_with_the_list(parameters: str, unknown: str, tmp_path: Path) -> None:
    reward = load_reward(rewards(tmp_path, one=f"def f({parameters}): return [1.0]"))
    with pytest.raises(UserError, match=f"nothing says what '{unknown}' is") as caught:
        choose_columns(reward, COLUMNS)
    assert "completion_ids" in str(caught.value)
    assert "text, answer, reference_text, prompt, id" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_prompt_that_is_typed_has_no_columns(finished_run: Path, place: Path) -> None:
    with pytest.raises(UserError, match=r"'answer' is: .* and no column, without a data set"):
        sample_main([str(finished_run), "--prompt", "A film", "--rm_name", f"{place}:answer_reward", "--device", "cpu"])


def test_a_column_that_has_changed_is_noticed_on_resume(place: Path, paid: dict[str, str], no_pictures: None) -> None:
    paid |= {"rm_name": f"{place}:answer_reward", "eval_every": "0"}
    folder = run({**paid, "total_steps": "1"})
    again = ("--resume", str(folder), "--rm_name", paid["rm_name"], "--total_steps", "2")
    data = Path(paid["dataset"])
    before = data.read_text()
    data.write_text(before.replace('"answer": "3"', '"answer": "3 "'))
    sys.argv = ["train.py", *again]
    with pytest.raises(SystemExit):
        run({}, *again)


# --- parts ----------------------------------------------------------------------------------------------------------

LENGTH = "def f(completions): return [len(c) for c in completions]"
WORDS = "def f(completions): return [len(c.split()) for c in completions]"
TEXTS = ["one", "two words", "three more words", ""]


def scored(name: str, weights: str | None = None, normalize: bool = False, **context: Any) -> Any:
    reward = load_reward(name, weights=weights, normalize_parts=normalize)
    return score_responses(reward, TEXTS, [""] * len(TEXTS), name, Context(**context))


def test_the_score_is_the_weighted_sum_and_same_names_get_columns_of_their_own(tmp_path: Path) -> None:
    scores = scored(rewards(tmp_path, a=LENGTH, b=WORDS), "1,-0.5")
    assert scores.total.tolist() == pytest.approx([3 - 0.5, 9 - 1, 16 - 1.5, 0])
    assert {name: part.total.tolist() for name, part in scores.parts.items()} == {
        "f": [3, 9, 16, 0],
        "f_2": [1, 2, 3, 0],
    }
    assert scored(rewards(tmp_path, a=LENGTH, b=WORDS), "f_2=2,f=1").total.tolist() == [5, 13, 22, 0]
    assert scored(rewards(tmp_path, a=LENGTH, b=WORDS)).total.tolist() == [4, 11, 19, 0]


def test_a_classifier_may_be_a_part(classifier_dir: Path, tmp_path: Path) -> None:
    alone = load_reward(str(classifier_dir))(TEXTS, [""] * 4)
    scores = scored(f"{classifier_dir},{rewards(tmp_path, a=WORDS)}", "10,1")
    assert scores.total.tolist() == pytest.approx((10 * alone + torch.tensor([1, 2, 3, 0])).tolist(), abs=1e-4)
    assert list(scores.parts) == [re.sub(r"\W", "_", classifier_dir.name), "f"]


DICT = "def f(completions): return {'letters': [len(c) for c in completions], 'mean': [1.0 for c in completions]}"


@pytest.mark.parametrize(
    ("weights", "total"), [(None, [4, 10, 17, 1]), ("2,1", [7, 19, 33, 1]), ("mean_2=1,letters=2", [7, 19, 33, 1])]
)
def test_a_dict_is_the_sum_of_its_parts(weights: str | None, total: list[float], tmp_path: Path) -> None:
    """reward_mean is a column of its own, so a part of that name is called otherwise."""
    scores = scored(rewards(tmp_path, a=DICT), weights)
    assert scores.total.tolist() == total
    assert list(scores.parts) == ["letters", "mean_2"]
    both = scored(rewards(tmp_path, a=DICT, b=WORDS), "1,10")
    assert list(both.parts) == ["f_letters", "f_mean_2", "f_2"]
    assert both.total.tolist() == [14, 30, 47, 1]


@pytest.mark.parametrize(
    ("names", "settings", "words"),
    [
        ("two", {"weights": "1"}, r"one weight for each of the 2 parts, f, f_2"),
        ("two", {"weights": "1,2,3"}, r"one weight for each of the 2 parts"),
        ("two", {"weights": "f=1,g=2"}, r"one weight for each of the 2 parts"),
        ("two", {"weights": "f=1,f=2"}, r"one weight for each of the 2 parts"),
        ("two", {"weights": "f=1,2"}, r"is not understood"),
        ("two", {"weights": "1,x"}, r"is not understood"),
        ("two", {"weights": "1,nan"}, r"is not understood"),
        ("two", {"weights": "1,"}, r"is not understood"),
        ("one", {"weights": "1"}, r"reward_weights=1 needs several parts"),
        ("one", {"normalize": True}, r"normalize_parts needs several parts"),
        ("dict", {"weights": "1,2,3"}, r"one weight for each of the 2 parts, letters, mean_2"),
        ("classifier", {"weights": "1"}, r"needs several parts"),
        ("gap", {}, r"nothing between two of its commas"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    names: str, settings: dict[str, Any], words: str, tmp_path: Path, classifier_dir: Path
) -> None:
    rm_name = {
        "two": rewards(tmp_path, a=LENGTH, b=WORDS),
        "one": rewards(tmp_path, a=LENGTH),
        "dict": rewards(tmp_path, parts=DICT),
        "classifier": str(classifier_dir),
        "gap": rewards(tmp_path, a=LENGTH, b=WORDS).replace(",", ",,"),
    }[names]
    with pytest.raises(UserError, match=words) as caught:
        scored(rm_name, **settings)
    assert "\n" not in str(caught.value)


def test_other_parts_than_before_are_one_line(tmp_path: Path) -> None:
    source = "def f(completions): return {str(len(completions)): [1.0] * len(completions)}"
    reward = load_reward(rewards(tmp_path, a=source))
    reward(TEXTS, [""] * 4)
    with pytest.raises(UserError, match=r"other parts than before \(1 instead of 4\)"):
        reward(TEXTS[:1], [""])


def test_parts_are_normalised_before_they_are_summed() -> None:
    """Against numpy; a constant part gives 0, also where rounding makes its deviation more than 0."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(5, 1e-4, 64), rng.normal(-3, 1e4, 64)
    parts = {"a": a, "b": b, "c": np.full(64, 0.1), "d": np.zeros(64)}
    found = normalized_sum(
        {k: torch.tensor(v, dtype=torch.float64) for k, v in parts.items()}, dict(a=1, b=2, c=3, d=4)
    )
    assert found.numpy() == pytest.approx((a - a.mean()) / a.std() + 2 * (b - b.mean()) / b.std())
    constant = {"c": torch.full((64,), 0.1)}
    assert normalized_sum(constant, {"c": 1.0}).tolist() == [0] * 64
    assert normalized_sum({"c": torch.tensor([7.0])}, {"c": 1.0}).tolist() == [0]


def test_normalised_parts_are_paid_on_the_last_token() -> None:
    seqs = sample(make_policy(), rows=6)
    parts = {"a": torch.arange(6.0), "b": 100 * torch.tensor([1.0, 0, 0, 1, 0, 0])}
    rollout = make_rollout(make_policy(), make_policy(), seqs, parts["a"] + parts["b"], kl_coef=0.0)
    paid = type(rollout)(**{**vars(rollout), "parts": parts, "normalized_weights": {"a": 1.0, "b": 1.0}})
    a, b = (x.numpy() for x in parts.values())
    expected = (a - a.mean()) / a.std() + (b - b.mean()) / b.std()
    assert paid.rewards().sum(1).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert paid.metrics()["score_mean"] == pytest.approx(float((a + b).mean())), "raw, whatever is paid"
    assert paid.metrics()["reward_b"] == pytest.approx(float(b.mean()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_every": 1}, "normalize_parts compares finished responses"),
        ({"reward_every": 0, "standardize_scores": True}, "two units for one score"),
    ],
)
def test_normalised_parts_exclude_other_units(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TrainConfig(normalize_parts=True, **changes)


def test_parts_are_in_tables_summary_report_and_picture(
    place: Path, paid: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paid |= {"rm_name": f"{place}:parts,{place}:length_reward", "reward_weights": "2,1"}
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), Path(path).touch()))
    folder = run({**paid, "total_steps": "1", "sample_every": "9", "eval_every": "0"})
    monkeypatch.undo()
    metrics = pd.read_csv(folder / "metrics.csv")
    (panel,) = (axis for axis in figures[-1].axes if axis.get_title() == PARTS)
    parts = ["reward_parts_e", "reward_parts_a_or_o", "reward_length_reward"]
    words = [part.removeprefix("reward_") for part in parts]
    assert [text.get_text() for text in panel.get_legend().get_texts()] == words
    assert [line.get_ydata()[0] for line in panel.lines[::2]] == metrics[parts].iloc[0].tolist()
    capsys.readouterr()
    few = ["--n_samples=8", "--judge=none", "--device=cpu", "--dtype=float32"]
    sys.argv = ["eval.py", "--policy_path", str(folder), *few]
    with pytest.raises(SystemExit):
        run_script(EvalConfig, eval_script.main)
    assert "is Python code, which is never run because" in capsys.readouterr().err
    monkeypatch.chdir(place.parent)  # the same functions by other names
    relative = "functions.py:parts,functions.py:length_reward"
    sys.argv = ["eval.py", "--policy_path", str(folder), "--rm_name", relative, *few]
    run_script(EvalConfig, eval_script.main)
    printed = capsys.readouterr().out
    results = pd.read_csv(folder / "eval_results.csv", keep_default_na=False)
    summary = json.loads((folder / "eval_summary.json").read_text())
    e = [text.count("e") for text in results.policy_text]
    assert results.policy_reward_parts_e.tolist() == e
    assert summary["policy"]["reward_parts_e"] == pytest.approx(np.mean(e))
    assert len(summary["policy"]["reward_parts_e_ci"]) == 2
    total = 2 * (results.base_reward_parts_e + results.base_reward_parts_a_or_o) + results.base_reward_length_reward
    assert results.base_score.tolist() == pytest.approx(total.tolist()), "the weights are those of the run"
    for page in (printed, (folder / "eval_report.html").read_text()):
        assert all(name in page for name in ("its part parts_e", "its part parts_a_or_o", "its part length_reward"))


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_a_reward_per_token_is_credited_on_its_token(place: Path, paid: dict[str, str], no_pictures: None) -> None:
    """In a real run, whose scores are their sums; and by hand: what is earned at a token is in its advantage."""
    folder = run({**paid, "rm_name": f"{place}:per_token", "standardize_scores": "false"})
    assert pd.read_csv(folder / "metrics.csv").score_mean.between(0, 8).all()

    seqs = sample(make_policy(), rows=5)
    mask = seqs.response_mask
    given = torch.where(mask, torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)), 0)
    plain = make_rollout(make_policy(critic=True), make_policy(seed=1), seqs, given.sum(1) + 2, kl_coef=0.3)
    rollout = type(plain)(**{**vars(plain), "token_rewards": given})
    expected = given - 0.3 * plain.kl
    for row, length in enumerate(seqs.lengths.tolist()):
        expected[row, length - 1] += 2  # what is no token's own is paid at the end
    assert torch.allclose(rollout.rewards(), expected, atol=1e-6)
    cfg = TrainConfig(reward_every=0, gae_lambda=0.9, batch_size=5, minibatch_size=5)
    batch, _ = estimate_advantages(rollout, cfg, step=1)
    advantages, _ = compute_gae(expected, plain.values, mask, 1.0, 0.9)
    assert torch.allclose(batch.advantages, whiten(advantages, mask), atol=1e-5)
    scaled = type(plain)(**{**vars(rollout), "score_scale": ScoreScale(mean=1.0, std=4.0)})
    on_scale = given / 4 - 0.3 * plain.kl
    for row, length in enumerate(seqs.lengths.tolist()):
        on_scale[row, length - 1] += (2 - 1) / 4
    assert torch.allclose(scaled.rewards(), on_scale, atol=1e-6)
    wider = rollout.widened(mask.shape[1] + 3)
    assert torch.allclose(wider.rewards()[:, : mask.shape[1]], expected, atol=1e-6)


def test_rewards_per_token_of_several_functions_are_weighted(tmp_path: Path) -> None:
    tokens = [[5], [1, 2], [1, 2, 3], [0]]
    each = "def f(completions, completion_ids): return [[float(x) for x in ids] for ids in completion_ids]"
    scores = scored(rewards(tmp_path, a=each, b=WORDS), "2,10", completion_ids=tokens)
    assert scores.total.tolist() == [20, 26, 42, 0]
    assert scores.token_rewards.tolist() == [[10, 0, 0], [2, 4, 0], [2, 4, 6], [0, 0, 0]]
    inside = "def f(completions, completion_ids): return {'a': [[1.0] * len(x) for x in completion_ids], 'b': [5] * 4}"
    assert scored(rewards(tmp_path, a=inside), "1,2", completion_ids=tokens).total.tolist() == [11, 12, 13, 11]
    with pytest.raises(UserError, match="not one per token"):
        scored(rewards(tmp_path, a=each, b=WORDS), normalize=True, completion_ids=tokens)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            "[ids[:-1] for ids in completion_ids]",
            r"returned 0 numbers for response 1 of 4 \('one'\), which has 1 tokens",
        ),
        ("[[1.0], [2.0, float('nan')], [0] * 3, [0]]", r"returned nan for response 2 of 4"),
        ("[[1.0], 2.0, [0] * 3, [0]]", r"returned list instead of one real number"),
        ("[[1.0], [0] * 2, [0] * 3]", r"returned list instead of one real number"),
        ("[['a'], [0] * 2, [0] * 3, [0]]", r"returned list instead of one real number"),
    ],
)
def test_a_wrong_number_of_rewards_is_one_line(result: str, words: str, tmp_path: Path) -> None:
    name = rewards(tmp_path, a=f"def f(completions, completion_ids): return {result}")
    with pytest.raises(UserError, match=words) as caught:
        scored(name, completion_ids=[[5], [1, 2], [1, 2, 3], [0]])
    assert "\n" not in str(caught.value)


def test_rewards_per_token_need_finished_responses(place: Path, paid: dict[str, str], no_pictures: None) -> None:
    with pytest.raises(SystemExit):
        run({**paid, "rm_name": f"{place}:per_token"}, "--reward_every", "2")


# --- the page -------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
ON_THE_PAGE = PAGE.split("## Columns of the data set")[1].split("## From preferences")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", ON_THE_PAGE, re.DOTALL)
GIVEN = ["It is Santiago.", "12 " * 32]
EXPECTED = {  # of GIVEN, by hand
    "correct": {"": [1, 0]},
    "short": {"": [0, -2]},
    "styled": {"ends": [1, 0], "digits": [0, -64]},
    "judged": {"": [1, 0]},
    "no_repeats": {"": [0, -2]},
}


def test_every_example_of_the_page_is_tried() -> None:
    assert [re.findall(r"def (\w+)", code)[-1] for code in EXAMPLES] == list(EXPECTED)


@pytest.mark.parametrize("code", EXAMPLES, ids=EXPECTED)
def test_an_example_of_the_page_gives_what_is_expected(code: str, tmp_path: Path) -> None:
    name = re.findall(r"def (\w+)", code)[-1]
    (tmp_path / "rewards.py").write_text(code)
    reward = load_reward(f"{tmp_path / 'rewards.py'}:{name}")
    columns = {column: ["Santiago", "Lima"] for column in choose_columns(reward, ["text", "answer"])}
    context = Context([[1, 2, 1], [3, 3, 3, 4]], columns)
    scores = score_responses(reward, GIVEN, ["?", GIVEN[1]], name, context)
    parts = {part: one.total.tolist() for part, one in scores.parts.items()} or {"": scores.total.tolist()}
    assert parts == EXPECTED[name]


@pytest.mark.parametrize("line", re.findall(r"^python train\.py .+", ON_THE_PAGE, re.MULTILINE))
def test_a_command_of_the_page_parses(line: str) -> None:
    cfg = parse_config(TrainConfig, shlex.split(line)[2:])
    assert (cfg.reward_every, cfg.critic) == (0, "own"), "as suits Python rewards, also where there are several"
    assert reward_names(cfg.rm_name)[0] == "rewards.py:correct"


# --- what a review found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_cells_reach_a_function_as_plain_values(kind: str, tmp_path: Path) -> None:
    """Whole numbers stay whole beside a missing one, which is None, and lists stay lists."""
    rows = [
        {"text": "one", "answer": 42, "marks": [1, 2], "note": "NaN"},
        {"text": "two", "answer": None, "marks": [3], "note": ""},
    ]
    place = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(place))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(place))
    texts = load_texts(str(place), "train", "text", lambda names: [name for name in names if name != "text"])
    assert texts.columns == {"answer": [42, None], "marks": [[1, 2], [3]], "note": ["NaN", ""]}
    assert [type(cell) for cell in texts.columns["answer"]] == [int, type(None)]


def test_what_trl_alone_gives_stays_none() -> None:
    def f(completions, solution, trainer_state=None, log_extra=None, log_metric=None, **kwargs):  # type: ignore[no-untyped-def]
        raise AssertionError

    arguments = match_arguments(inspect.signature(f), columns=["solution"])
    assert arguments.kept == ["trainer_state", "log_extra", "log_metric"]
    with pytest.raises(ValueError, match="'other'"):
        match_arguments(inspect.signature(lambda completions, other=None: None))


def test_a_column_named_like_a_text_goes_before_the_word_in_a_name() -> None:
    columns = ["prompt", "response"]
    arguments = match_arguments(inspect.signature(lambda prompt, response: None), columns=columns)
    assert arguments.by_position == [Source("prompt", is_column=True), Source("responses")]
    with pytest.raises(ValueError, match="'prompt_id'"):
        match_arguments(inspect.signature(lambda completions, prompt_id: None))


@pytest.mark.parametrize(
    ("of_run", "weights", "named", "expected"),
    [
        ("/a/r.py:correct,/a/r.py:short", "1,0.05", "/b/r.py:correct,/b/r.py:short", "1,0.05"),
        ("/a/r.py:correct,/a/r.py:short", "1,0.05", "r.py:short,r.py:correct", "0.05,1"),
        ("/a/r.py:correct,/a/r.py:short", "short=0.05,correct=1", "r.py:short,r.py:correct", "short=0.05,correct=1"),
        ("/a/r.py:parts", "1,2", "/b/r.py:parts", "1,2"),
        ("/a/r.py:correct,/a/r.py:short", "1,0.05", "lvwerra/distilbert-imdb", None),
        ("/a/r.py:correct,/a/r.py:short", None, "r.py:short,r.py:other", None),
    ],
)
def test_an_evaluation_weighs_the_rewards_as_the_run_did(
    of_run: str, weights: str | None, named: str, expected: str | None
) -> None:
    run_cfg = TrainConfig(rm_name=of_run, reward_weights=weights, reward_every=0, gae_lambda=1.0)
    assert weights_of_run(run_cfg, named) == expected


def test_weights_given_for_other_rewards_count(finished_run: Path, place: Path) -> None:
    """And are not refused for being others than the run's."""
    record = finished_run / "config.json"
    settings = json.loads(record.read_text())
    settings |= {"rm_name": f"{place}:length_reward,{place}:format_reward", "reward_weights": "1,2"}
    record.write_text(json.dumps(settings))
    named = f"{place}:format_reward,{place}:parts"
    cfg = EvalConfig(policy_path=str(finished_run), rm_name=named, reward_weights="3,4", device="cpu")
    assert settings_of_run(cfg).reward_weights == "3,4"
    with pytest.raises(UserError, match="give --reward_weights"):
        settings_of_run(replace(cfg, reward_weights=None))


def test_weights_of_other_rewards_are_refused() -> None:
    run_cfg = TrainConfig(rm_name="r.py:a,r.py:b", reward_weights="1,2", reward_every=0, gae_lambda=1.0)
    with pytest.raises(UserError, match=r"whose reward_weights=1,2 were for a, b: give --reward_weights"):
        weights_of_run(run_cfg, "r.py:a,r.py:c")


def test_dicts_of_tensors_are_mapped_in_one_order_on_every_rank() -> None:
    """Parts of a score, whose order a set may have decided: a collective must meet the same part on all ranks."""

    @dataclass
    class Parts:
        parts: dict[str, torch.Tensor]

    met: list[float] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        met.append(float(x))
        return x

    a, b = torch.tensor(1.0), torch.tensor(2.0)
    assert list(map_tensors(note, Parts({"b": b, "a": a})).parts) == ["b", "a"]
    map_tensors(note, Parts({"a": a, "b": b}))
    assert met == [1, 2, 1, 2]


def test_a_part_is_never_called_like_an_interval() -> None:
    assert distinct_names(["x", "x_ci", "mean"]) == ["x", "x_ci_2", "mean_2"]


def test_ranks_whose_functions_return_their_parts_in_another_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """reward_weights without names would weigh other parts there."""
    (tmp_path / "two_parts.py").write_text("def f(responses):\n    return {'a': [1.0], 'b': [2.0]}\n")
    reward = PythonReward(f"{tmp_path / 'two_parts.py'}:f")
    reward.scores(["x"])
    assert reward.returned_parts == ["a", "b"]
    monkeypatch.setattr("training.ranks.world_size", lambda: 2)
    monkeypatch.setattr("training.ranks.all_gather", lambda own: [own, {**own, "parts of rm_name": [["b", "a"]]}])
    with pytest.raises(UserError, match=r"process 1 has parts of rm_name=\[\['b', 'a'\]\] where process 0 has"):
        check_same_on_all_ranks(TrainConfig(), make_policy(), [[1]], reward)
    monkeypatch.setattr("training.ranks.all_gather", lambda own: [own, own])
    check_same_on_all_ranks(TrainConfig(), make_policy(), [[1]], reward)
