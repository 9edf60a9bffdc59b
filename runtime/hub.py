"""Models and data from the hub, its cache or a folder: what can be reached, and errors in one line."""

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from config import UserError

import torch
from huggingface_hub import constants, get_session
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from runtime.device import lacks_memory

DEFAULT_REVISION = "main"
LOAD_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, EOFError, ImportError,
               pickle.UnpicklingError)  # fmt: skip


def quiet_libraries() -> None:
    """Silence progress bars and notices of the libraries that a user cannot act on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def require_hub(setting: str, name: str) -> None:
    """Check that `name` is a folder, is in the cache, or is on a hub that answers (raises UserError).

    Where the hub does not answer but the cache has the name, the libraries are switched to offline mode, which saves
    half a minute of retries.
    """
    try:
        if Path(name).exists():
            return
    except OSError as error:
        raise UserError(f"{setting}={name} cannot be looked up: {error.strerror}") from None
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise UserError(f"{setting}={name} does not exist: check the path")
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    elif _hub_answers():
        return
    else:
        reason = f"the hub at {constants.ENDPOINT} does not answer"
    if not (_cache_folder(setting, name) / "snapshots").is_dir():
        raise UserError(
            f"{setting}={name} is neither a folder nor in the cache, and {reason}: "
            "connect, name a folder, or use --preset tiny, which needs no network"
        )
    _go_offline()


def _cache_folder(setting: str, name: str) -> Path:
    kind = "datasets" if setting.startswith("dataset") else "models"
    return Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"


def _go_offline() -> None:
    constants.HF_HUB_OFFLINE = True
    with suppress(ImportError):
        import datasets

        datasets.config.HF_HUB_OFFLINE = True


def _hub_answers(timeout: float = 3.0) -> bool:
    """One request, in a thread, because a name look-up can hang for longer than any timeout."""
    answers: list[object] = []

    def ask() -> None:
        with suppress(Exception):  # whatever went wrong, the hub did not answer
            answers.append(get_session().head(constants.ENDPOINT, timeout=timeout))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout + 1)
    return bool(answers)


@contextmanager
def loading(setting: str, name: str, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads `name` into a UserError of one line."""
    require_hub(setting, name)
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{setting}={name} has damaged weights ({error}): fetch or save them again") from None
    except (*LOAD_ERRORS, MemoryError) as error:
        if lacks_memory(error):
            raise UserError(f"{setting}={name} does not fit into memory: take a smaller model") from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{setting}={name} cannot be loaded as a {what}: {reason}") from None


def load_tokenizer(setting: str, name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model (raises UserError where there is none: the library would make one up)."""
    with loading(setting, name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or DEFAULT_REVISION, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{setting}={name} has no tokenizer: save it with the model")
    return tokenizer


def refuse_missing_weights(setting: str, name: str, info: dict[str, Any], what: str) -> None:
    """Raise UserError where a model lacks some of its weights, which the library would fill with noise."""
    if info["missing_keys"]:
        first = min(info["missing_keys"])
        raise UserError(f"{setting}={name} lacks the weights of {first}: it is not a complete {what}")


def resolved_commit(setting: str, name: str, revision: str | None = None) -> str | None:
    """The commit that a hub name stood for when it was loaded; None for a folder or a file."""
    cache = _cache_folder(setting, name)
    if Path(name).exists() or not cache.is_dir():
        return None
    reference = cache / "refs" / (revision or DEFAULT_REVISION)
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision


def load_gpt2(name: str, setting: str, revision: str | None = None) -> GPT2LMHeadModel:
    """Load a complete GPT-2 in float32 from the hub or a folder (raises UserError)."""
    with loading(setting, name, "GPT-2"):
        kind = GPT2Config.get_config_dict(name, revision=revision or DEFAULT_REVISION)[0].get("model_type")
        if kind != "gpt2":
            raise UserError(f"{setting}={name} is a {kind} model: choose a GPT-2")
        lm, info = GPT2LMHeadModel.from_pretrained(
            name, revision=revision or DEFAULT_REVISION, dtype=torch.float32, output_loading_info=True
        )
    refuse_missing_weights(setting, name, info, "GPT-2 language model")
    if lm.config.activation_function == "gelu_new":  # the same function in one kernel instead of eight
        for block in lm.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
    return lm
