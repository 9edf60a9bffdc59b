"""train.py: the run folder, reproducibility, wrong input, signals, and what happens when numbers go bad."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import TIMINGS, run, save_classifier
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

import train
import utils
from config import TrainConfig, UserError, parse_config, with_changes
from model import GPT2WithValueHead
from reward import SentimentReward
from tools import run_folder
from tools.run_folder import RunFolder
from tools.states import states

REPOSITORY = Path(train.__file__).parent
CONTRACT = """step episodes sentiment_mean positive_rate kl_seq kl_token reward_mean kl_coef entropy response_len
policy_loss value_loss approx_kl clip_frac ratio_max explained_var grad_norm lr seconds_generate seconds_score
seconds_update tokens_per_second peak_memory_mb"""


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_train_leaves_the_run_folder_of_the_contract(flags: dict[str, str]) -> None:
    folder = run(flags)
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock", "best", "config.json", "curves.png", "eval.csv", "metrics.csv", "policy_lm", "samples.csv", "state",
        "value_head.safetensors",
    ]  # fmt: skip
    metrics = pd.read_csv(folder / "metrics.csv")
    assert set(CONTRACT.split()) <= set(metrics.columns)
    assert metrics.step.tolist() == [1, 2, 3]
    assert metrics.episodes.tolist() == [8, 16, 24]
    assert metrics.drop(columns=["explained_var"]).notna().all().all()
    settings = json.loads((folder / "config.json").read_text())
    assert settings["lr"] == 1e-3
    assert settings["device"] == "cpu"
    assert settings["versions"]["torch"]
    samples = pd.read_csv(folder / "samples.csv", keep_default_na=False)
    assert samples.step.tolist() == [2] * 4 + [3] * 4
    assert {"prompt", "base", "policy", "base_score", "policy_score"} <= set(samples.columns)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_train_evaluates_on_prompts_that_it_never_trains_on(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held: list[train.Parts] = []
    load_parts = train.load_parts
    monkeypatch.setattr(train, "load_parts", lambda cfg: held.append(load_parts(cfg)) or held[-1])
    folder = run(flags, "--eval_every", "2", "--eval_prompts", "3")
    table = pd.read_csv(folder / "eval.csv")
    assert table.step.tolist() == [0, 2, 3]
    assert table.kl_seq_exact[0] == pytest.approx(0, abs=1e-5)
    assert table.kl_seq_exact[1] > 0
    kept_back = {tuple(prompt) for prompt in held[0].held_out.prompts}
    assert len(kept_back) == 3
    assert not kept_back & {tuple(prompt) for prompt in held[0].prompts.prompts}
    assert len(held[0].prompts.prompts) + 3 == 40
    told = capsys.readouterr().out
    assert re.search(r"sentiment mean +-?\d\.\d\d +-?\d\.\d\d", told), "a table before and after"
    without = run({**flags, "ckpt_dir": str(folder) + "2"}, "--eval_every", "0")
    assert not (without / "eval.csv").exists()


def test_best_is_the_highest_sentiment_within_the_kl_budget(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentiment rises at every evaluation; the last is beyond the budget."""
    weights = []
    save, evaluate = run_folder.save_policy, train.evaluate
    monkeypatch.setattr(run_folder, "save_policy", lambda policy, tokenizer, folder: (
        save(policy, tokenizer, folder),
        weights.append(load_file(folder / "policy_lm" / "model.safetensors"))))  # fmt: skip
    scores, kls = iter([0.5, 0.1, 0.2, 0.9]), iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(
        train, "evaluate",
        lambda *args: {**evaluate(*args), "sentiment_mean": next(scores), "kl_seq_exact": next(kls)},
    )  # fmt: skip
    folder = run(flags, "--eval_every", "1", "--kl_budget", "2.5")
    best = load_file(folder / "best" / "policy_lm" / "model.safetensors")
    final = load_file(folder / "policy_lm" / "model.safetensors")
    assert any(not torch.equal(best[name], final[name]) for name in best)
    assert all(torch.equal(best[name], weights[-2 if len(weights) > 3 else 1][name]) for name in best)
    assert AutoModelForCausalLM.from_pretrained(folder / "best" / "policy_lm")


def test_tensorboard_gets_the_columns_of_metrics_or_the_package_is_named(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where the package is missing
    with pytest.raises(SystemExit) as stop:
        run(flags, "--report_to", "tensorboard")
    assert stop.value.code == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not Path(flags["ckpt_dir"]).exists()

    rows: list[tuple[str, float, int]] = []
    closed: list[bool] = []

    class Writer:
        def __init__(self, folder: Path, purge_step: int) -> None:
            assert folder == Path(flags["ckpt_dir"]) / "tensorboard"
            rows[:] = [row for row in rows if row[2] < purge_step]

        def close(self) -> None:
            closed.append(True)

        def add_scalar(self, *row: Any) -> None:
            rows.append(row)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    folder = run(flags, "--report_to", "tensorboard")
    metrics = pd.read_csv(folder / "metrics.csv")
    assert {name for name, _, _ in rows} == set(metrics.columns)
    found = [value for name, value, _ in rows if name == "sentiment_mean"]
    assert found == pytest.approx(metrics.sentiment_mean.tolist())
    shutil.rmtree(folder / "state" / "step_000003")  # so that the last step is taken again
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    assert [step for name, _, step in rows if name == "sentiment_mean"] == [1, 2, 3]
    assert closed == [True, True]


def test_train_saves_a_policy_that_plain_transformers_loads(flags: dict[str, str]) -> None:
    folder = run(flags)
    lm = AutoModelForCausalLM.from_pretrained(folder / "policy_lm").eval()
    ids = AutoTokenizer.from_pretrained(folder / "policy_lm")("A film", return_tensors="pt").input_ids
    ours = GPT2WithValueHead.load(folder)
    assert torch.allclose(lm(ids).logits, ours.lm(ids).logits, atol=1e-4)
    assert ours.value_head.weight.abs().max() > 0  # the critic has learnt something, and it was kept


def test_train_is_a_function_of_the_seed(flags: dict[str, str], tmp_path: Path) -> None:
    runs = [run({**flags, "ckpt_dir": str(tmp_path / name), "seed": seed}) for name, seed in
            (("a", "1"), ("b", "1"), ("c", "2"))]  # fmt: skip
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns=TIMINGS) for folder in runs]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    assert not tables[0].sentiment_mean.equals(tables[2].sentiment_mean)
    assert (runs[0] / "samples.csv").read_bytes() == (runs[1] / "samples.csv").read_bytes()
    weights = [load_file(folder / "policy_lm" / "model.safetensors") for folder in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_train_moves_the_policy_and_neither_reference_nor_reward(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[train.Parts] = []
    load_parts = train.load_parts
    monkeypatch.setattr(train, "load_parts", lambda cfg: held.append(load_parts(cfg)) or held[0])
    folder = run(flags)
    start = AutoModelForCausalLM.from_pretrained(flags["policy_name"]).state_dict()
    reference, judge = held[0].reference.lm.state_dict(), SentimentReward(flags["rm_name"]).model.state_dict()
    assert all(torch.equal(start[name], reference[name]) for name in start)
    assert all(torch.equal(judge[name], x) for name, x in held[0].reward.model.state_dict().items())
    tuned = AutoModelForCausalLM.from_pretrained(folder / "policy_lm").state_dict()
    assert any(not torch.equal(start[name], tuned[name]) for name in start)


def test_train_refuses_a_folder_with_a_run_unless_told_to_overwrite(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(flags)
    (folder / "notes.txt").write_text("mine")
    before = files_in(folder)
    with pytest.raises(SystemExit) as stop:
        run({**flags, "seed": "5"})
    assert stop.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    assert files_in(folder) == before
    run({**flags, "seed": "5"}, "--overwrite")
    after = files_in(folder)
    assert len(pd.read_csv(folder / "metrics.csv")) == 3
    assert after["metrics.csv"] != before["metrics.csv"]
    assert after["notes.txt"] == b"mine"


def test_train_leaves_alone_what_is_not_a_run(flags: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(flags["ckpt_dir"])
    folder.mkdir()
    (folder / "metrics.csv").write_text("mine")
    for extra, words in (((), "metrics.csv"), (("--overwrite",), "not from a run")):
        with pytest.raises(SystemExit) as stop:
            run(flags, *extra)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert (folder / "metrics.csv").read_text() == "mine"


def test_train_does_not_overwrite_the_policy_that_it_starts_from(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run({**flags, "total_steps": "1"})
    before = files_in(folder)
    with pytest.raises(SystemExit) as stop:
        run({**flags, "policy_name": str(folder / "policy_lm")}, "--overwrite")
    assert stop.value.code == 2
    assert "which this run needs" in capsys.readouterr().err
    assert files_in(folder) == before


def test_names_from_the_hub_are_no_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    RunFolder(TrainConfig(ckpt_dir=str(tmp_path), policy_name="gpt2"))
    (tmp_path / "here" / "gpt2").mkdir()
    with pytest.raises(UserError, match="holds gpt2, which this run needs"):
        RunFolder(TrainConfig(ckpt_dir=str(tmp_path), policy_name="gpt2"))


def test_train_needs_no_git(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    folder = run({**flags, "total_steps": "1"})
    assert json.loads((folder / "config.json").read_text())["git_commit"] is None


# --- wrong input ----------------------------------------------------------------------------------------------------

WRONG = {  # what is given -> words that the one line must hold
    "--total_steps -1": ["total_steps", "at least 1"],
    "--total_steps 1.5": ["total_steps"],
    "--total_steps many": ["total_steps"],
    "--minibatch_size 3": ["minibatch_size", "batch_size"],
    "--minibatch_size 16": ["minibatch_size", "batch_size"],
    "--temperature 0": ["temperature"],
    "--top_p 0": ["top_p"],
    "--lr nan": ["lr"],
    "--kl_coef inf": ["kl_coef"],
    "--clip_range -0.2": ["clip_range"],
    "--no_such_flag 1": ["no_such_flag"],
    "--preset huge": ["preset", "tiny"],
    "--preset": ["preset"],
    "--device tpu": ["device", "cpu"],
    "--max_prompt_len 100 --max_new_tokens 100": ["max_prompt_len", "max_new_tokens", "128"],
    "--min_prompt_len 13": ["min_prompt_len", "max_prompt_len"],
    "--target_label joyful": ["target_label", "negative", "positive"],
    "--policy_name ./nowhere": ["policy_name", "nowhere"],
    "--policy_name {empty}": ["policy_name"],
    "--policy_name {classifier}": ["policy_name", "distilbert", "GPT-2"],
    "--policy_name {damaged}": ["policy_name", "damaged"],
    "--policy_name {headless}": ["policy_name"],
    "--ref_name {other_vocabulary}": ["vocabular", "ref_name"],
    "--rm_name ./nowhere": ["rm_name", "nowhere"],
    "--rm_name {gpt2}": ["rm_name"],
    "--dataset ./nowhere.csv": ["dataset", "nowhere.csv"],
    "--dataset {empty_csv}": ["dataset", "empty"],
    "--dataset {latin1}": ["dataset", "UTF-8"],
    "--dataset {short} --min_prompt_len 12": ["min_prompt_len"],
    "--text_column review": ["text_column", "review", "text"],
    "--ckpt_dir {file}/run": ["ckpt_dir"],
}


@pytest.fixture
def places(tmp_path: Path, gpt2_dir: Path, classifier_dir: Path) -> dict[str, str]:
    """Damaged and wrong things to name on the command line."""
    from conftest import make_lm

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    tokenizer = AutoTokenizer.from_pretrained(gpt2_dir)
    for name, lm in (("other_vocabulary", make_lm(320)), ("damaged", make_lm(300)), ("headless", make_lm(300))):
        tokenizer.save_pretrained(folder(name))
        lm.save_pretrained(tmp_path / name)
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "headless" / "model.safetensors").unlink()
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "latin1.csv").write_bytes("text\nun très beau film\n".encode("latin-1"))
    (tmp_path / "short.csv").write_text("text\ngood\nbad\n")
    (tmp_path / "file").write_text("")
    return {
        "empty": str(folder("empty")), "classifier": str(classifier_dir), "gpt2": str(gpt2_dir),
        "empty_csv": str(tmp_path / "empty.csv"), "latin1": str(tmp_path / "latin1.csv"),
        "short": str(tmp_path / "short.csv"), "file": str(tmp_path / "file"),
        **{name: str(tmp_path / name) for name in ("other_vocabulary", "damaged", "headless")},
    }  # fmt: skip


@pytest.mark.parametrize("given", WRONG)
def test_train_wrong_input_is_one_line_and_exit_code_2(
    given: str, flags: dict[str, str], places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(flags, *given.format(**places).split())
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert all(word in err for word in WRONG[given]), err
    assert not Path(flags["ckpt_dir"]).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_train_without_cuda_says_so(flags: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(flags, "--device", "cuda")
    assert "device=cuda" in capsys.readouterr().err


def test_train_takes_any_sequence_classifier(flags: dict[str, str], tmp_path: Path) -> None:
    labels = {0: "terrible", 1: "fine", 2: "great"}
    save_classifier(tmp_path / "bert", labels)  # for its tokenizer
    config = BertConfig(vocab_size=280, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, num_labels=3, id2label=labels,
                        label2id={v: k for k, v in labels.items()})  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    folder = run({**flags, "rm_name": str(tmp_path / "bert"), "target_label": "great", "total_steps": "1"})
    assert pd.read_csv(folder / "metrics.csv").sentiment_mean.between(-1, 1).all()


def test_train_without_a_hub_names_what_is_missing_within_15_seconds(flags: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for setting in ("policy_name", "rm_name", "dataset"):
        argv = [word for name, value in flags.items() if name != setting for word in (f"--{name}", value)]
        environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run([sys.executable, "train.py", *argv], cwd=REPOSITORY, env=environment, text=True,
                              capture_output=True, timeout=15, check=False)  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert setting in done.stderr
        assert "--preset tiny" in done.stderr
        break_early = setting == "policy_name"  # one real process is enough; the others run below, in this one
        if break_early:
            break
    for setting, name in (("rm_name", "lvwerra/distilbert-imdb"), ("dataset", "stanfordnlp/imdb")):
        with pytest.raises(UserError, match=f"{setting}={name} .*--preset tiny"):
            utils.require_hub(setting, name)


# --- the self-audit -------------------------------------------------------------------------------------------------


def test_check_prints_a_line_per_fact_and_writes_nothing(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(flags, "--check")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("ok ") for line in lines)
    assert not Path(flags["ckpt_dir"]).exists()


def break_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.position_ids", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape))


def break_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GPT2WithValueHead.response_hidden
    monkeypatch.setattr(GPT2WithValueHead, "response_hidden", lambda self, seqs: right(self, seqs).roll(-1, 1))


def break_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GPT2WithValueHead.response_hidden
    monkeypatch.setattr(
        GPT2WithValueHead, "response_hidden", lambda self, seqs: torch.dropout(right(self, seqs), 0.3, True)
    )


def break_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    right = train.generate
    monkeypatch.setattr("tools.audit.generate", lambda *a, **k: right(*a, **{**k, "temperature": 0.5}).select(
        torch.arange(4)).__class__(**{**vars(right(*a, **{**k, "temperature": 0.5})), "temperature": 1.0}))  # fmt: skip


def break_reward_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_the_end(scores: Tensor, running: Tensor | None, response_mask: Tensor) -> Tensor:
        return torch.zeros(response_mask.shape).index_fill(1, torch.tensor([-1]), 1) * scores[:, None]

    monkeypatch.setattr("utils.spread_scores", at_the_end)


def break_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda x: x)


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (break_positions, "padding|cross-entropy"), (break_shift, "cross-entropy"), (break_dropout, "cross-entropy"),
        (break_temperature, "the one scored"), (break_reward_place, "last real token"), (break_critic, "critic"),
    ],
)  # fmt: skip
def test_check_refuses_to_train_when_a_fact_fails(
    damage: Any, fact: str, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        run(flags)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "self-check failed" in err
    assert any(part in err for part in fact.split("|")), err
    assert not Path(flags["ckpt_dir"]).exists()


# --- signals and bad numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(("phase", "kept"), [("act", [1]), ("make_rollout", [1]), ("ppo_update", [1, 2])])
def test_train_a_signal_abandons_what_taught_nothing_yet_saves_and_exits(
    number: int, code: int, phase: str, kept: list[int], flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second step: while it acts or scores it is given up, while it learns it is finished."""
    right, calls = getattr(train, phase), []

    def interrupted(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return right(*args, **named)

    monkeypatch.setattr(train, phase, interrupted)
    with pytest.raises(SystemExit) as stop:
        run({**flags, "total_steps": "9", "save_every": "9", "eval_every": "0", "sample_every": "9"})
    assert stop.value.code == code
    folder = Path(flags["ckpt_dir"])
    assert pd.read_csv(folder / "metrics.csv").step.tolist() == kept
    GPT2WithValueHead.load(folder)
    assert [state.name for state in states(folder / "state")] == [f"step_{kept[-1]:06d}"]


def test_train_gives_up_when_no_step_is_finite_and_keeps_the_last_good_policy(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SentimentReward, "__call__", lambda self, texts: torch.full((len(texts),), float("nan")))
    monkeypatch.setattr(train, "audit", lambda *args, **named: None)
    with pytest.raises(SystemExit) as stop:
        run({**flags, "total_steps": "9"})
    assert "3 steps in a row" in str(stop.value.code)
    folder = Path(flags["ckpt_dir"])
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics.skipped.tolist() == [4, 4, 4]
    assert "not finite" in capsys.readouterr().out
    start, kept = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in
                   (flags["policy_name"], folder / "policy_lm"))  # fmt: skip
    assert all(torch.equal(start[name], kept[name]) for name in start)


# --- revisions ------------------------------------------------------------------------------------------------------


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


def test_a_hub_name_that_means_another_commit_by_now_is_refused_on_resume(
    flags: dict[str, str], gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cache = tmp_path / "hub" / "models--someone--gpt2"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(gpt2_dir, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(tmp_path / "hub"))
    run({**flags, "policy_name": "someone/gpt2", "total_steps": "1"})
    (cache / "refs" / "main").write_text("b" * 40)
    more = {"ckpt_dir": flags["ckpt_dir"], "total_steps": "2"}
    with pytest.raises(SystemExit) as stop:
        run(more, "--resume")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "policy_name=someone/gpt2" in error
    assert "a" * 40 in error
    run(more, "--resume", "--allow_changes")


def test_running_scores_are_those_of_the_unfinished_responses(flags: dict[str, str]) -> None:
    """Against one call of the reward per prefix; the step itself pays the same sum."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    cfg = train.resolve(parse_config(TrainConfig, [*words, "--reward_every=3", "--max_new_tokens=10"]))
    parts = train.load_parts(cfg)
    seqs = train.act(parts, cfg, 1)
    running = train.running_scores(parts, cfg, seqs)
    assert running is not None
    assert running.shape == seqs.response_mask.shape
    for row, mask, found in zip(seqs.responses, seqs.response_mask, running, strict=True):
        tokens = row[mask].tolist()
        for t in range(len(tokens)):
            if (t + 1) % 3 or t + 1 == len(tokens):
                assert found[t].isnan()
            else:
                text = parts.tokenizer.decode(tokens[: t + 1])
                assert float(found[t]) == pytest.approx(float(parts.reward([text])), abs=1e-5), (t, text)
    assert train.running_scores(parts, with_changes(cfg, reward_every=0), seqs) is None
    assert train.running_scores(parts, with_changes(cfg, reward_every=99), seqs).isnan().all()
    metrics = pd.read_csv(run(flags, "--reward_every", "3") / "metrics.csv")
    expected = metrics.sentiment_mean - metrics.kl_coef * metrics.kl_seq
    assert metrics.reward_mean.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
