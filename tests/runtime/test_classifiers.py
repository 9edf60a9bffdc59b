"""Padding on the right, and the longest text that a model takes."""

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from runtime.classifiers import longest_input, pad_rows

SMALL = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def test_rows_are_padded_on_the_right() -> None:
    ids, mask = pad_rows([[5, 6, 7], [8], []], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "settings", "longest"),
    [
        ("Bert", {"max_position_embeddings": 40}, 40),
        ("Roberta", {"max_position_embeddings": 40, "pad_token_id": 1}, 38),
        ("XLMRoberta", {"max_position_embeddings": 40, "pad_token_id": 1}, 38),
        ("Camembert", {"max_position_embeddings": 40, "pad_token_id": 1}, 38),
        ("MPNet", {"max_position_embeddings": 40, "pad_token_id": 1}, 38),
        ("Data2VecText", {"max_position_embeddings": 40, "pad_token_id": 3}, 36),
        ("Longformer", {"max_position_embeddings": 40, "pad_token_id": 1, "attention_window": 4}, 38),
        ("GPT2", {"n_positions": 40, "n_embd": 8, "n_head": 2, "n_layer": 1}, 40),
        ("OPT", {"max_position_embeddings": 40, "word_embed_proj_dim": 8, "ffn_dim": 8}, 40),  # a table of 42
        ("Mpt", {"max_seq_len": 40, "d_model": 8, "n_heads": 2, "n_layers": 1}, 40),
        ("XLNet", {"d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8}, 50),  # it has no limit of its own
        ("Bert", {"max_position_embeddings": 90}, 50),
    ],
)
def test_the_longest_text_is_what_model_and_tokenizer_take(
    name: str, settings: dict, longest: int, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model does take it: a text one token longer fails in all that have fewer than 50 positions."""
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings})
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    monkeypatch.setattr(tokenizer, "model_max_length", 50)
    assert longest_input(model, tokenizer) == longest
    with torch.no_grad():
        model(input_ids=torch.full((1, longest), 7))
        if longest < 50:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, longest + 1), 7))
