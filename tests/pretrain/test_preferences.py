"""Preferences: pairs, the Bradley-Terry loss against arithmetic, and a reward model that learns what was chosen."""

import json
import math
from pathlib import Path

from config import UserError

import numpy as np
import pytest
import torch
from conftest import made_pairs, save_classifier, write_pairs

from data import Pair, load_pairs
from pretrain.preferences import (
    LONGEST,
    SHORTEST,
    BradleyTerry,
    PreferenceTrainer,
    join,
    pairs_from_labels,
    split_pairs,
)
from reward import load_reward


def test_the_loss_is_that_of_bradley_and_terry() -> None:
    """Against the definition in double precision: P(chosen beats rejected) = e^a / (e^a + e^b)."""

    class Scores(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            return type("Out", (), {"logits": x[:, None]})

    chosen, rejected = [1.5, -2.0, 0.0], [0.5, 3.0, 0.0]
    out = BradleyTerry(Scores())(x=torch.tensor(chosen + rejected))
    likelihood = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in zip(chosen, rejected, strict=True)]
    assert out.loss.item() == pytest.approx(-sum(map(math.log, likelihood)) / 3, rel=1e-6)
    assert out.margins.tolist() == [1.0, -5.0, 0.0]


@pytest.mark.parametrize("with_prompt", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "language model"])
def test_a_reward_model_learns_what_was_chosen_and_scores_alike_in_training(
    kind: str, with_prompt: bool, tmp_path: Path, gpt2_dir: Path
) -> None:
    """From a classifier, whose head is replaced, and from a language model without a padding token."""
    init = gpt2_dir
    if kind == "encoder":
        init = save_classifier(tmp_path / "init", {0: "negative", 1: "positive"})
        config = json.loads((init / "config.json").read_text()) | {"dropout": 0.0, "seq_classif_dropout": 0.0}
        (init / "config.json").write_text(json.dumps(config))  # half of so small a model is too little to learn with
    pairs = made_pairs(200, "the film " if with_prompt else "")
    kept, held = split_pairs(pairs, seed=0)
    trainer = PreferenceTrainer(str(init), with_prompt, torch.device("cpu"))
    before = (trainer.margins(held, 512) > 0).float().mean()
    trainer.train(kept, epochs=8, lr=3e-3, batch_tokens=512, seed=0)
    margins = trainer.margins(held, 512)
    assert (margins > 0).float().mean() > 0.9 > before
    trainer.model.save_pretrained(tmp_path / "rm")
    trainer.tokenizer.save_pretrained(tmp_path / "rm")
    reward = load_reward(str(tmp_path / "rm"), cut_left=with_prompt)
    assert reward.label is None
    assert reward.on_prompt is with_prompt
    texts = [[join(pair.prompt, text) for text in (pair.chosen, pair.rejected)] for pair in held]
    scores = torch.stack([reward(list(column), []) for column in zip(*texts, strict=True)])
    assert (scores[0] - scores[1]).tolist() == pytest.approx(margins.tolist(), abs=1e-4), "as train.py scores them"


def test_held_out_pairs_share_no_prompt_with_the_others() -> None:
    pairs = [Pair(f"prompt {i % 40}", f"good {i}", f"bad {i}") for i in range(200)]
    kept, held = split_pairs(pairs, seed=1)
    assert sorted(kept + held) == sorted(pairs)
    assert len(held) == 20
    assert not {pair.prompt for pair in kept} & {pair.prompt for pair in held}
    alone = [Pair("", f"good {i % 50}", f"bad {i}") for i in range(100)]
    kept, held = split_pairs(alone, seed=1)
    assert not {pair.chosen for pair in kept} & {pair.chosen for pair in held}
    assert split_pairs(pairs, seed=1) == split_pairs(pairs, seed=1)


def test_pairs_from_labels_prefer_the_label_and_say_nothing_by_length() -> None:
    rng = np.random.default_rng(0)
    words = {"fine": "positive", "poor": "negative", "so-so": "neutral"}
    texts = [(" ".join([word] * rng.integers(60, 200)), words[word]) for word in words for _ in range(400)]
    pairs = pairs_from_labels(texts, "positive", seed=0)
    assert len(pairs) == 400
    assert all(set(pair.chosen.split()) == {"fine"} and "fine" not in pair.rejected for pair in pairs)
    assert {word for pair in pairs for word in pair.rejected.split()} == {"poor", "so-so"}
    lengths = np.array([[len(pair.chosen.split()), len(pair.rejected.split())] for pair in pairs])
    assert lengths.min() >= SHORTEST
    assert lengths.max() <= LONGEST
    assert abs(lengths[:, 0].mean() - lengths[:, 1].mean()) < 4 * lengths.std() * math.sqrt(2 / 400)
    with pytest.raises(UserError, match=r"chosen_label='great'.*negative"):
        pairs_from_labels(texts, "great")


@pytest.mark.parametrize(
    ("prompt", "response", "whole"),
    [
        ("A film", "is on", "A film is on"),
        ("A film", " is on", "A film is on"),
        ("Q:\n", "yes", "Q:\nyes"),
        ("", "yes", "yes"),
        ("A film", "", "A film "),
    ],
)
def test_prompt_and_response_are_joined_by_white_space(prompt: str, response: str, whole: str) -> None:
    assert join(prompt, response) == whole


def test_pairs_are_read_with_and_without_prompts(tmp_path: Path) -> None:
    pairs = made_pairs(5, "the film ")
    assert load_pairs(str(write_pairs(tmp_path / "a.jsonl", pairs)), "train") == pairs
    (tmp_path / "b.csv").write_text("chosen,rejected,score\nNA,None,1\nsame,same,2\n")
    assert load_pairs(str(tmp_path / "b.csv"), "train") == [Pair("", "NA", "None")], "a pair of one text says nothing"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"chosen": "a", "other": "b"}], ["no column rejected", "chosen, other", "--chosen_label"]),
        ([{"chosen": ["a", "b"], "rejected": "b"}], ["column chosen", "list"]),
        ([{"prompt": 3, "chosen": "a", "rejected": "b"}], ["column prompt", "int"]),
    ],
)
def test_pairs_that_cannot_be_used_are_named(rows: list[dict], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as caught:
        load_pairs(str(tmp_path / "a.jsonl"), "train")
    assert all(word in str(caught.value) for word in words), caught.value


def test_pairs_that_are_equal_once_cut_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model reads 48 tokens, from the start; with a prompt, from the end."""
    folder = save_classifier(tmp_path / "init", {0: "negative", 1: "positive"})
    start = "a film that is long and dull and badly lit " * 9
    pairs = [
        Pair("", start + "good", start + "bad"),
        Pair("", "good", "bad"),
        Pair("", "good " + start, "bad " + start),
    ]
    trainer = PreferenceTrainer(str(folder), False, torch.device("cpu"))
    assert trainer.tell_apart(pairs) == pairs[1:]
    assert "note: 1 of 3 pairs are left out" in capsys.readouterr().out
    trainer = PreferenceTrainer(str(folder), True, torch.device("cpu"))
    assert trainer.tell_apart(pairs) == pairs[:2]
    assert trainer.tell_apart(pairs[:2]) == pairs[:2]
    assert capsys.readouterr().out.count("note") == 1


def test_an_encoder_of_another_shape_is_refused_and_a_head_is_not(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "init", {0: "negative", 1: "neutral", 2: "positive"})
    PreferenceTrainer(str(folder), False, torch.device("cpu"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))
    with pytest.raises(UserError, match=r"position_embeddings.weight is \(48, 32\) instead of \(96, 32\)"):
        PreferenceTrainer(str(folder), False, torch.device("cpu"))
