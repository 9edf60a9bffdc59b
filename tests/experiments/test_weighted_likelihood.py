"""Weighted likelihood: the loss, the weights, and the policy that it must find."""

import json
import shlex
from pathlib import Path

from config import TrainConfig, UserError

import numpy as np
import pytest
import torch
from conftest import EOS, make_policy, sample
from test_convergence import BETA, RESPONSES, divergence, log_distribution

from experiments.weighted_likelihood import Draw, main, optimizer_step, weigh, weighted_loss
from model import Sequences
from training import estimate

VOCAB, LONGEST, PROMPT = 5, 3, 2


def every_response() -> Sequences:
    """All 85 responses of the enumerable language, to one prompt of one token."""
    tokens = torch.tensor([[PROMPT, *y, *[EOS] * (LONGEST - len(y))] for y in RESPONSES])
    lengths = torch.tensor([len(y) for y in RESPONSES])
    mask = torch.arange(LONGEST) < lengths[:, None]
    return Sequences.of(
        tokens, torch.cat([torch.ones(85, 1, dtype=torch.bool), mask], 1), mask, torch.zeros(85, LONGEST)
    )


def test_the_loss_is_the_weighted_likelihood_on_average() -> None:
    """Over the whole language, weighted by base's probabilities: the gradients of both are the same."""
    policy, reference, seqs = make_policy(VOCAB), make_policy(VOCAB, seed=1), every_response()
    base = log_distribution(reference).exp().float()
    weights = torch.rand(85) * 2
    weights /= (base * weights).sum()
    gradients = []
    for plain in (True, False):
        policy.zero_grad()
        for i in range(85):
            one = seqs.select(slice(i, i + 1))
            if plain:
                loss = -weights[i] * policy.evaluate_responses(one)[0].sum()
            else:
                loss = weighted_loss(policy, reference, one, weights[i : i + 1])
            (base[i] * loss).backward()
        gradients.append(torch.cat([w.grad.flatten() for w in policy.lm.parameters() if w.grad is not None]))
    assert gradients[0].abs().max() > 0.1
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_it_finds_the_optimal_policy() -> None:
    policy, reference, seqs = make_policy(VOCAB), make_policy(VOCAB), every_response()
    rewards = torch.rand(85, generator=torch.Generator().manual_seed(1)) * 2 - 1
    start = log_distribution(reference)
    best = torch.log_softmax(start + rewards / BETA, 0)
    cfg = TrainConfig(batch_size=256, minibatch_size=256)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 100)
        rows = torch.multinomial(start.exp(), 256, replacement=True, generator=generator)
        optimizer_step(policy, reference, optimizer, Draw(seqs.select(rows), (best - start).exp()[rows].float()), cfg)
    learned = log_distribution(policy)
    assert divergence(learned, best) < 0.04
    assert divergence(start, best) > 0.3, "else this would not tell"


def test_weights_are_those_of_the_optimal_policy_at_the_kl_asked_for() -> None:
    """Draw d of batch b is to prompts 4 b to 4 b + 3; the KL of the weights is found again from their definition."""
    scores = np.random.default_rng(0).uniform(-1, 1, (8, 16))
    seqs = [sample(make_policy(), rows=4, seed=i) for i in range(32)]
    draws = weigh(seqs, scores, 0.5)
    found = torch.stack([draw.weights for draw in draws]).double()
    for prompt in range(8):
        own = found[16 * (prompt // 4) : 16 * (prompt // 4) + 16, prompt % 4].numpy()
        assert own.mean() == pytest.approx(1, abs=1e-5)
        line = np.polyfit(scores[prompt], np.log(own), 1)  # log weight = score / beta + a constant
        np.testing.assert_allclose(np.polyval(line, scores[prompt]), np.log(own), atol=1e-4)
    assert (found * found.log()).mean() == pytest.approx(0.5, rel=0.06)
    assert all(draw.seqs is x for draw, x in zip(draws, seqs, strict=True))


def test_it_leaves_a_run_that_eval_and_interpolate_take(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(f"--{name}={value}" for name, value in flags.items() if name != "ckpt_dir")
    out = tmp_path / "the limit"
    monkeypatch.setattr(estimate, "SHORT", 0.0)
    main(["--kl", "0.2", "--answers", "4", "--batches", "2", "--train", words, "--out", str(out)])
    said = capsys.readouterr().out
    assert "the optimal policy scores" in said
    assert shlex.split(said.splitlines()[-1])[1:] == ["python", "eval.py", "--policy_path", str(out / "policy_lm")]
    for title in ("sampling base", "weighted likelihood"):
        assert f"{title} will take another" in said
    assert (out / "policy_lm" / "model.safetensors").is_file()
    assert json.loads((out / "config.json").read_text())["weighted_likelihood"]["kl"] == 0.2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "."], "out=. exists"),
        (["--kl", "3"], "log"),
        (["--answers", "1"], "answers=1 must"),
        (["--train", "--top_k 5"], "top_k"),
        (["--train", "'"], "quotation mark"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        main([*(["--out", str(tmp_path / "x")] if "--out" not in words else []), *words])


def test_a_common_offset_of_the_embedding_costs_bfloat16_nothing() -> None:
    """GPT-2's rows share a large offset, and logits that hold it are too coarse to tell tokens apart."""
    policy, reference, seqs, weights = make_policy(VOCAB), make_policy(VOCAB, seed=1), every_response(), torch.rand(85)
    exact = weighted_loss(policy, reference, seqs, weights)
    for lm in (policy.lm, reference.lm):
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight + 30)  # not tied: inputs stay as they are
    policy.dtype = reference.dtype = torch.bfloat16
    torch.testing.assert_close(weighted_loss(policy, reference, seqs, weights), exact, rtol=0.03, atol=0)
