"""Fingerprints differ where what they are of differs, and nowhere else."""

from pathlib import Path

import torch
from conftest import make_lm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runtime.fingerprints import saved_weights_sha256, texts_sha256, tokenizer_sha256, weights_sha256


def test_texts_are_told_apart_by_their_borders_and_order() -> None:
    same = {texts_sha256(["ab", "c\ud800"]), texts_sha256(iter(["ab", "c\ud800"]))}
    others = [["a", "bc\ud800"], ["c\ud800", "ab"], ["abc\ud800"], ["ab", "c\ud800", ""], []]
    assert len(same) == 1
    assert len(same | {texts_sha256(texts) for texts in others}) == 1 + len(others)


def test_one_bit_of_one_weight_is_seen() -> None:
    lm, twin = make_lm(), make_lm()
    assert weights_sha256(lm) == weights_sha256(twin)
    with torch.no_grad():
        weight = twin.transformer.h[1].mlp.c_fc.bias
        weight[3] = torch.nextafter(weight[3], torch.tensor(9.0))
    assert weights_sha256(lm) != weights_sha256(twin)


def test_saved_weights_are_those_of_the_file(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_lm(seed=seed).save_pretrained(tmp_path / name)
    a, b, c = (saved_weights_sha256(tmp_path / name) for name in "abc")
    assert a == b != c
    assert saved_weights_sha256(tmp_path) == saved_weights_sha256(tmp_path / "nowhere") == ""


def test_a_tokenizer_is_its_rules_and_not_its_last_call(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a film"], truncation=True, max_length=3)
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_sha256(other) == before
    other.add_tokens(["new"])
    assert tokenizer_sha256(other) != before
