"""The language model: its folder, its tokenizer, its loss."""

from pathlib import Path

import pytest
import torch
from conftest import make_models
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from pretrain.language_model import lm_batch


def test_policy_folder_is_a_plain_gpt2(made_models: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made_models / "policy")
    tokenizer = AutoTokenizer.from_pretrained(made_models / "policy")
    assert isinstance(model, GPT2LMHeadModel)
    assert (made_models / "policy" / "model.safetensors").is_file()
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert model.config.eos_token_id == model.config.bos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token is None
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("text", ["A film, isn't it?", " and the  ending\n is naïve 🎬"])
def test_policy_tokenizer_keeps_every_character_and_adds_none(made_models: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made_models / "policy")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id not in ids


def test_init_continues_model_and_tokenizer(labelled_csv: Path, made_models: Path, tmp_path: Path) -> None:
    out = make_models(labelled_csv, tmp_path / "out", "--init", str(made_models / "policy"), "--lm_lr", "1e-9")
    before, after = (AutoModelForCausalLM.from_pretrained(folder / "policy") for folder in (made_models, out))
    torch.testing.assert_close(after.state_dict(), before.state_dict(), atol=1e-6, rtol=0)
    old, new = (AutoTokenizer.from_pretrained(folder / "policy") for folder in (made_models, out))
    assert old.get_vocab() == new.get_vocab()


def test_padding_does_not_change_the_language_model_loss(made_models: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made_models / "policy")
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    with torch.no_grad():
        together = model(**lm_batch(rows)).loss.item() * 7  # 5 + 2 predicted tokens
        alone = model(**lm_batch(rows[:1])).loss.item() * 5 + model(**lm_batch(rows[1:])).loss.item() * 2
    assert together == pytest.approx(alone, rel=1e-5)
