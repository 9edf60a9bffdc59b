"""Critics compared: what their features may know, how they are fitted, and what is written."""

from dataclasses import replace
from pathlib import Path

from config import UserError

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_policy, sample

from experiments.critics import CRITICS, Examples, examples, explained, join, main
from experiments.gradients import Observed
from training import estimate


def test_features_know_nothing_of_the_token_and_what_follows() -> None:
    policy, at = make_policy(), 4
    seqs = sample(policy, rows=6)
    assert seqs.response_mask.sum(1).max() > at + 1
    partial = torch.rand(seqs.response_mask.shape)
    tokens, later = seqs.tokens.clone(), partial.clone()
    tokens[:, seqs.prompt_len + at :] = 3
    later[:, at:] = 9.0
    scores = torch.rand(6)
    known = [
        examples(policy, Observed(s, scores, p), partial.shape[1] + 2)
        for s, p in ((seqs, partial), (replace(seqs, tokens=tokens), later))
    ]
    until = known[0].position <= at
    for name in known[0].features:
        a, b = (k.features[name] for k in known)
        assert torch.allclose(a[until], b[until], atol=1e-6), name
        assert not torch.allclose(a[~until], b[~until], atol=1e-3), f"{name} sees nothing at all"
    assert known[0].features["partial"].shape[1] == partial.shape[1] + 2


def test_explained_variance_is_that_of_least_squares() -> None:
    random = np.random.default_rng(0)

    def known(n: int) -> Examples:
        x, place = random.normal(size=(n, 3)), random.integers(0, 4, n)
        score = x @ [0.5, -0.2, 0.0] + 0.3 * place + random.normal(0, 0.4, n)
        return Examples({"last": torch.tensor(x)}, torch.tensor(place), torch.tensor(score))

    fit, test = join([known(400), known(400)]), known(500)
    found = explained(fit, test, ["last"], 0.0, [1, 3])

    def design(k: Examples) -> np.ndarray:
        return np.hstack([k.features["last"].numpy(), np.eye(4)[k.position.numpy()]])

    weights = np.linalg.lstsq(design(fit), fit.score.numpy(), rcond=None)[0]
    error, y = test.score.numpy() - design(test) @ weights, test.score.numpy()
    assert found["all tokens"] == pytest.approx(1 - error.var() / y.var(), abs=0.005)
    for token in (1, 3):
        rows = test.position.numpy() == token - 1
        assert found[f"before token {token}"] == pytest.approx(1 - error[rows].var() / y[rows].var(), abs=0.01)
    assert explained(fit, test, ["last"], 1e9, [])["all tokens"] < found["all tokens"] / 2, "the ridge"


def test_the_table_has_every_critic(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "critics.csv"
    train = " ".join(f"--{name}={value}" for name, value in flags.items())
    monkeypatch.setattr(estimate, "SHORT", 0.0)
    main(["--fit", "2", "--test", "1", "--tokens", "1,3", "--csv", str(csv), "--train", train])
    table = pd.read_csv(csv)
    assert table.critic.tolist() == list(CRITICS)
    assert (table["all tokens"] <= 1).all()
    said = capsys.readouterr().out
    assert "partial score and last hidden state" in said
    assert "observing responses will take another" in said


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    for words in (["--fit", "0"], ["--tokens", "a"], ["--ridge", "-1"]):
        with pytest.raises(UserError):
            main([*words, "--csv", str(tmp_path / "x.csv")])
