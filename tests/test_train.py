"""train.py: the run folder, reproducibility, wrong input, signals, and what happens when numbers go bad."""

import json
import re
from pathlib import Path
from typing import Any

from config import TrainConfig

import pandas as pd
import pytest
import torch
from conftest import TIMINGS, make_lm, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from model import GPT2WithValueHead
from ppo import Rollout
from reward import SentimentReward
from runtime.cli import parse_config
from training.earlier_run import inspect_run_folder
from training.parts import load_parts, resolve
from training.session import open_session

CONTRACT = """step episodes score_mean positive_rate kl_seq kl_token reward_mean kl_coef entropy response_len
policy_loss value_loss approx_kl clip_frac ratio_max explained_var grad_norm lr seconds_generate seconds_score
seconds_update tokens_per_second peak_memory_mb"""


def test_train_leaves_the_run_folder_of_the_contract(flags: dict[str, str]) -> None:
    folder = run(flags)
    assert sorted(p.name for p in folder.iterdir()) == [
        ".lock",
        "best",
        "config.json",
        "curves.png",
        "eval.csv",
        "metrics.csv",
        "policy_lm",
        "samples.csv",
        "state",
        "value_head.safetensors",
    ]
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


def settings_of(flags: dict[str, str], *words: str) -> TrainConfig:
    """The settings of a run with these flags."""
    given = [f"--{name}={value}" for name, value in flags.items()]
    return resolve(parse_config(TrainConfig, [*given, *words]))


def test_train_evaluates_on_prompts_that_it_never_trains_on(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = load_parts(settings_of(flags, "--eval_prompts", "3"))
    folder = run(flags, "--eval_every", "2", "--eval_prompts", "3")
    table = pd.read_csv(folder / "eval.csv")
    assert table.step.tolist() == [0, 2, 3]
    assert table.kl_seq_exact[0] == pytest.approx(0, abs=1e-5)
    assert table.kl_seq_exact[1] > 0
    held_out = {tuple(prompt) for prompt in parts.held_out.prompts}
    assert len(held_out) == 3
    assert not held_out & {tuple(prompt) for prompt in parts.prompts.prompts}
    assert len(parts.prompts.prompts) + 3 == 40
    printed = capsys.readouterr().out
    assert re.search(r"mean sentiment +-?\d\.\d\d +-?\d\.\d\d", printed), "a table before and after"
    without = run({**flags, "ckpt_dir": str(folder) + "2"}, "--eval_every", "0")
    assert not (without / "eval.csv").exists()


def test_train_saves_a_policy_that_plain_transformers_loads(flags: dict[str, str]) -> None:
    folder = run(flags)
    lm = AutoModelForCausalLM.from_pretrained(folder / "policy_lm").eval()
    ids = AutoTokenizer.from_pretrained(folder / "policy_lm")("A film", return_tensors="pt").input_ids
    ours = GPT2WithValueHead.load(folder)
    assert torch.allclose(lm(ids).logits, ours.lm(ids).logits, atol=1e-4)
    assert ours.value_head.weight.abs().max() > 0  # the critic has learnt something, and it was kept


def test_train_is_a_function_of_the_seed(flags: dict[str, str], tmp_path: Path) -> None:
    runs = [
        run({**flags, "ckpt_dir": str(tmp_path / name), "seed": seed})
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    tables = [pd.read_csv(folder / "metrics.csv").drop(columns=TIMINGS) for folder in runs]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    assert not tables[0].score_mean.equals(tables[2].score_mean)
    assert (runs[0] / "samples.csv").read_bytes() == (runs[1] / "samples.csv").read_bytes()
    weights = [load_file(folder / "policy_lm" / "model.safetensors") for folder in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_train_moves_the_policy_and_neither_reference_nor_reward(flags: dict[str, str]) -> None:
    cfg = settings_of(flags)
    parts = load_parts(cfg)
    with open_session(cfg, parts, inspect_run_folder(cfg)) as session:
        train.train(cfg, parts, session)
    folder = Path(cfg.ckpt_dir)
    start = AutoModelForCausalLM.from_pretrained(flags["policy_name"]).state_dict()
    reference = parts.models.reference.lm.state_dict()
    judge = SentimentReward(flags["rm_name"]).model.state_dict()
    assert all(torch.equal(start[name], reference[name]) for name in start)
    assert all(torch.equal(judge[name], x) for name, x in parts.models.reward.model.state_dict().items())
    tuned = AutoModelForCausalLM.from_pretrained(folder / "policy_lm").state_dict()
    assert any(not torch.equal(start[name], tuned[name]) for name in start)


def test_every_step_learns_from_what_the_policy_has_just_written(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every step of a run, not only the first, the ratio starts at 1, and the prompt is no part of the response."""
    ppo_update = train.ppo_update
    parts = load_parts(settings_of(flags))
    steps: list[int] = []

    def spy(
        policy: GPT2WithValueHead, optimizer: Any, rollout: Rollout, cfg: TrainConfig, step: int, *rest: Any
    ) -> Any:
        seqs = rollout.sequences
        with torch.no_grad():
            logprobs, _, _ = policy.evaluate_responses(seqs)
        assert (logprobs - rollout.logprobs)[rollout.mask].abs().max() < 1e-4
        prompts = parts.prompts.batch(step)
        assert torch.equal(seqs.tokens[:, : seqs.prompt_len], prompts.ids)
        assert torch.equal(seqs.attention_mask[:, : seqs.prompt_len], prompts.mask)
        steps.append(step)
        return ppo_update(policy, optimizer, rollout, cfg, step, *rest)

    monkeypatch.setattr(train, "ppo_update", spy)
    run(flags)
    assert steps == [1, 2, 3]


def test_held_out_rewards_are_at_the_price_of_their_step(flags: dict[str, str]) -> None:
    """With an adaptive beta: that which the step after the evaluation takes, and the first one before any step."""
    folder = run(flags, "--eval_every=1", "--adaptive_kl_target=0.001", "--lr=1e-3")
    held_out, steps = pd.read_csv(folder / "eval.csv"), pd.read_csv(folder / "metrics.csv")
    prices = steps.kl_coef.to_numpy()
    assert len(set(prices)) == len(prices) == 3
    for i in range(3):
        row = held_out.iloc[i]
        assert row.reward_mean == pytest.approx(row.score_mean - prices[i] * row.kl_seq, abs=1e-5)
    assert abs(held_out.kl_seq[2]) > 1e-3, "else every price gives the same"


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
        "empty": str(folder("empty")),
        "classifier": str(classifier_dir),
        "gpt2": str(gpt2_dir),
        "empty_csv": str(tmp_path / "empty.csv"),
        "latin1": str(tmp_path / "latin1.csv"),
        "short": str(tmp_path / "short.csv"),
        "file": str(tmp_path / "file"),
        **{name: str(tmp_path / name) for name in ("other_vocabulary", "damaged", "headless")},
    }


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
def test_train_without_cuda_names_the_device(flags: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(flags, "--device", "cuda")
    assert "device=cuda" in capsys.readouterr().err
