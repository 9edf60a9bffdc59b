"""Models and data from the hub, its cache or a folder: what can be reached, and errors in one line."""

import textwrap
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
from transformers.utils import is_protobuf_available, is_sentencepiece_available
from transformers.utils import logging as transformers_logging

from runtime.device import lacks_memory

DEFAULT_REVISION = "main"


def quiet_libraries() -> None:
    """Silence progress bars and notices of the libraries that a user cannot act on."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def require_hub(setting: str, name: str) -> None:
    """Check that `name` is a folder, is in the cache, or is on a hub that answers.

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
    if not constants.HF_HUB_OFFLINE and _hub_answers():
        return
    is_prepared = setting.startswith("dataset") and only_prepared(name)
    if not is_prepared and not _in_cache(setting, name):
        unreachable = f"the hub at {constants.ENDPOINT} does not answer"
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable
        raise UserError(
            f"{setting}={name} is neither a folder nor in the cache, and {reason}: "
            "connect, name a folder, or use --preset tiny, which needs no network"
        )
    _go_offline()


def _in_cache(setting: str, name: str) -> bool:
    return (_cache_folder(setting, name) / "snapshots").is_dir()


def _cache_folder(setting: str, name: str) -> Path:
    kind = "datasets" if setting.startswith("dataset") else "models"
    return Path(constants.HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}"


def only_prepared(name: str) -> bool:
    """Whether a data set's files are not in the cache of the hub, but a copy that `datasets` has prepared is."""
    if _in_cache("dataset", name):
        return False
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, last = name.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(last)])
    return any(Path(datasets.config.HF_DATASETS_CACHE).glob(f"{folder}/*/*/*/dataset_info.json"))


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
    except UserError:
        raise
    except Exception as error:  # of any kind: a library checks what it reads in many ways
        if lacks_memory(error):
            raise UserError(f"{setting}={name} does not fit into memory: take a smaller model") from None
        raise UserError(f"{setting}={name} cannot be loaded as a {what}: {in_one_line(error)}") from None


def in_one_line(error: Exception) -> str:
    """All that a library's error says, on one line of a few hundred characters at most."""
    return textwrap.shorten(str(error), 300, placeholder=" …").rstrip(" :") or type(error).__name__


def refuse_other_folder(setting: str, name: str) -> None:
    """Raise UserError where a name is that of a folder without a model, which may hide one of the hub."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{setting}={name} is a folder without a model (it has no config.json): name the folder that a model was "
            f"saved in, or, if a model of the hub is meant, rename this folder"
        )


def load_tokenizer(setting: str, name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model; where there is none, the library would make one up, so it is refused."""
    refuse_other_folder(setting, name)
    with loading(setting, name, "tokenizer"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision or DEFAULT_REVISION, trust_remote_code=False
            )
        except (ValueError, ImportError) as error:
            raise UserError(f"{setting}={name} {_why_no_tokenizer(error)}") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{setting}={name} has no tokenizer: save it with the model")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise UserError(f"{setting}={name} has a model_max_length in tokenizer_config.json that is no number: mend it")
    return tokenizer


def _why_no_tokenizer(error: Exception) -> str:
    """What is wrong with a tokenizer, and the remedy, where the library's own words would mislead."""
    message = in_one_line(error)
    if "instantiate the backend tokenizer" in message:
        return "has no tokenizer: save it with the model"
    if "tiktoken" in message and not (is_sentencepiece_available() and is_protobuf_available()):
        # the library asks for tiktoken, its last resort, which cannot read such a file
        return "has a SentencePiece tokenizer without tokenizer.json: pip install sentencepiece protobuf"
    return f"cannot be loaded as a tokenizer: {message}"


def load_weights(kind: Any, setting: str, name: str, what: str, new_head: bool = False, **settings: Any) -> Any:
    """Load a complete model in float32 by a class of the library; `what` it is stands in error messages.

    With new_head the weights of the encoder must fit, and those of the head are drawn anew. settings are the library's.
    """
    refuse_other_folder(setting, name)
    with loading(setting, name, what):
        model, info = kind.from_pretrained(
            name,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    if new_head:
        encoder = f"{model.base_model_prefix}."
        mismatched = [mismatch for mismatch in info["mismatched_keys"] if mismatch[0].startswith(encoder)]
        info = {"mismatched_keys": mismatched, "missing_keys": []}
    refuse_missing_weights(setting, name, info, what)
    return model


def refuse_missing_weights(setting: str, name: str, info: dict[str, Any], what: str) -> None:
    """Raise UserError where a model lacks some of its weights, or has them in another shape than its config says.

    The library would fill either with noise.
    """
    if info["mismatched_keys"]:
        weight, saved, wanted = min(info["mismatched_keys"])
        raise UserError(
            f"{setting}={name} has weights that do not fit its config.json: {weight} is {tuple(saved)} instead of "
            f"{tuple(wanted)}; save both together"
        )
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
    """Load a complete GPT-2 in float32 from the hub or a folder."""
    revision = revision or DEFAULT_REVISION
    refuse_other_folder(setting, name)
    with loading(setting, name, "GPT-2"):
        kind = GPT2Config.get_config_dict(name, revision=revision)[0].get("model_type")
    if kind != "gpt2":
        raise UserError(f"{setting}={name} is a {kind} model: choose a GPT-2")
    lm = load_weights(GPT2LMHeadModel, setting, name, "GPT-2 language model", revision=revision)
    if lm.config.activation_function == "gelu_new":  # the same function in one kernel instead of eight
        for block in lm.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
    return lm
