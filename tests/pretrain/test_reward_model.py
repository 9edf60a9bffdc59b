"""The classifier: its folder, its labels, the pieces it learns from."""

import random
from dataclasses import replace
from pathlib import Path

import torch
from conftest import make_models, write_labelled_csv
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pretrain.recipes import RECIPES
from pretrain.reward_model import draw_piece, response_part, rm_batch


def test_reward_folder_is_a_classifier_that_pads(made_models: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(made_models / "reward")
    tokenizer = AutoTokenizer.from_pretrained(made_models / "reward")
    batch = tokenizer(["A fine film.", "Dull.", ""], padding=True, return_tensors="pt")
    assert batch["input_ids"][:, 0].tolist() == [tokenizer.cls_token_id] * 3
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        together, alone = (model(**batch).logits, model(**tokenizer(["Dull."], return_tensors="pt")).logits)
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=0)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.max_position_embeddings == tokenizer.model_max_length


def test_reward_init_keeps_the_encoder_and_takes_the_labels(made_models: Path, tmp_path: Path) -> None:
    table = write_labelled_csv(tmp_path / "ints.csv", [1, 0])
    out = make_models(table, tmp_path / "out", "--reward_init", str(made_models / "reward"), "--rm_lr", "1e-9")
    before, after = (AutoModelForSequenceClassification.from_pretrained(d / "reward") for d in (made_models, out))
    torch.testing.assert_close(after.distilbert.state_dict(), before.distilbert.state_dict(), atol=1e-6, rtol=0)
    assert after.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}


def test_classifier_rows_get_the_special_tokens() -> None:
    for around in ([], [7], [7, 8], [7, 8, 9]):
        batch = rm_batch([[1, 2], [3]], [0, 1], Around(around))  # type: ignore[arg-type]
        rows = [[*around[:1], *row, *around[1:]] for row in ([1, 2], [3])]
        found = [ids[mask > 0].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        assert found == rows
        assert batch["input_ids"][batch["attention_mask"] == 0].tolist() == [0]


class Around:
    """A tokenizer as far as rm_batch knows one."""

    pad_token_id = 0

    def __init__(self, around: list[int]) -> None:
        self.around = around

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.around}


def test_draw_piece_cuts_runs_within_the_limits() -> None:
    recipe = replace(RECIPES["tiny"], crop_min=4, crop_max=10, crop_start=5)
    row, rng = list(range(30)), random.Random(0)
    pieces = [draw_piece(row, recipe, rng) for _ in range(500)]
    assert {len(piece) for piece in pieces} == set(range(4, 11))
    assert {piece[0] for piece in pieces} == set(range(6))
    assert all(piece == list(range(piece[0], piece[0] + len(piece))) for piece in pieces)
    assert draw_piece([1, 2], recipe, rng) == [1, 2]


def test_response_part_is_what_follows_the_prompt() -> None:
    recipe = replace(RECIPES["tiny"], skip=10, crop_max=4)
    assert response_part(list(range(20)), recipe) == [10, 11, 12, 13]
    assert response_part([1, 2, 3], recipe) == [2, 3]
