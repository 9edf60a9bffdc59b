"""Fingerprints of texts, weights and tokenizers: equal ones have equal fingerprints, wherever they are kept."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from runtime.files import sha256

NO_PART_OF_A_MODEL = {"_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"}


def texts_sha256(texts: Iterable[str]) -> str:
    """The SHA-256 checksum of some texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", errors="surrogatepass")
        digest.update(f"{len(encoded)}:".encode())
        digest.update(encoded)
    return digest.hexdigest()


def columns_sha256(columns: dict[str, list[Any]]) -> str:
    """The SHA-256 checksum of some columns of a data set; empty where there are none."""
    return texts_sha256(f"{name} {cells!r}" for name, cells in sorted(columns.items())) if columns else ""


def weights_sha256(model: nn.Module) -> str:
    """The SHA-256 checksum of a model's weights, by name, in the precision in which it keeps them."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data.cast("B"))
    return digest.hexdigest()


def model_sha256(model: nn.Module) -> str:
    """The SHA-256 checksum of a model of the library: of its weights, and of what its config makes of them."""
    settings: dict[str, Any] = cast(Any, model).config.to_dict()
    config = {name: value for name, value in settings.items() if name not in NO_PART_OF_A_MODEL}
    return texts_sha256([weights_sha256(model), json.dumps(config, sort_keys=True, default=str)])


def saved_weights_sha256(folder: Path) -> str:
    """The SHA-256 checksum of the weights that a model's folder holds; empty where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    return texts_sha256(map(sha256, files)) if files else ""


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """The SHA-256 checksum of a tokenizer's rules, or of its vocabulary where it does not show them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for setting in ("truncation", "padding"):  # of the last call, and no part of the tokenizer
        rules.pop(setting, None)
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
