"""The reward: a sequence classifier that turns texts into scores in [-1, 1].

The label to steer towards is found by its name, never by its index, and no gradient leaves this file.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from config import UserError

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from runtime.hub import DEFAULT_REVISION, load_tokenizer, loading, refuse_missing_weights

SHORT_NAMES = {"pos": "positive", "neg": "negative", "neu": "neutral"}


class SentimentReward:
    """score = 2 P(target_label) - 1 under a Hugging Face sequence classifier."""

    def __init__(
        self, name: str, target_label: str = "positive", device: str | torch.device = "cpu", batch_size: int = 64,
        dtype: torch.dtype = torch.float32, revision: str | None = None, setting: str = "rm_name",
        cut_left: bool = False,
    ) -> None:  # fmt: skip
        """Load the classifier that `setting` names (raises UserError where it, its tokenizer or label is missing).

        Texts that are too long are cut at the end, or at the beginning where cut_left is set.
        """
        self.model: Any = _load_classifier(setting, name, revision).to(device).eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(setting, name, revision)
        if self.tokenizer.pad_token_id is None:
            raise UserError(f"{setting}={name} has a tokenizer without a padding token: save one with it")
        if cut_left:
            self.tokenizer.truncation_side = "left"
        self.target = find_label(self.model.config, target_label, f"{setting}={name}")
        self.batch_size, self.dtype = batch_size, dtype
        longest = getattr(self.model.config, "max_position_embeddings", 512)
        self.max_length = min(self.tokenizer.model_max_length, longest)

    def score(self, texts: Sequence[str]) -> Tensor:
        """Texts -> scores (B,) float32 in [-1, 1], on the model's device."""
        return (self.log_odds(texts) / 2).tanh()  # 2 sigmoid(x) - 1 = tanh(x / 2)

    __call__ = score

    @torch.no_grad()
    def log_odds(self, texts: Sequence[str]) -> Tensor:
        """log P(target) - log (1 - P(target)) of each text (B,), which differ even where scores are all near 1."""
        found = torch.empty(len(texts), device=self.model.device)
        if not texts:
            return found
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        encoded = [ids or [self.tokenizer.pad_token_id] for ids in encoded]  # an empty text may have no token
        by_length = sorted(range(len(texts)), key=lambda i: len(encoded[i]))  # little padding
        for first in range(0, len(texts), self.batch_size):
            rows = by_length[first : first + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt")
            found[rows] = self._log_odds(batch.to(self.model.device))
        return found

    def _log_odds(self, batch: dict[str, Tensor]) -> Tensor:
        half = self.dtype != torch.float32
        with torch.autocast(self.model.device.type, self.dtype) if half else nullcontext():
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        target = logits[:, self.target]
        if logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification":
            return target  # one output per label, independent of the others
        others = [i for i in range(logits.shape[1]) if i != self.target]
        return target - logits[:, others].logsumexp(-1)


def score_texts(reward: Callable[[list[str]], Tensor], texts: list[str], name: str) -> Tensor:
    """Scores (n,) of texts (raises UserError where the reward `name` fails or returns something else)."""
    try:
        scores = reward(texts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"rm_name={name} failed on a batch ({type(error).__name__}: {error})") from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != (len(texts),):
        found = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"rm_name={name} returned {found} instead of one real number per response")
    return scores


def find_label(config: PretrainedConfig, target_label: str, model: str) -> int:
    """Index of a model's label, found by its name in any case; pos, neg and neu count as their long forms."""
    labels = {full_label(label): int(index) for index, label in config.id2label.items()}
    if full_label(target_label) not in labels:
        known = ", ".join(config.id2label.values())
        raise UserError(f"target_label={target_label!r} is not a label of {model}: choose {known}")
    return labels[full_label(target_label)]


def full_label(label: str) -> str:
    """The long form of a label's name, in lower case."""
    return SHORT_NAMES.get(label.lower(), label.lower())


def _load_classifier(setting: str, name: str, revision: str | None) -> torch.nn.Module:
    with loading(setting, name, "sequence classifier"):
        config = AutoConfig.from_pretrained(name, revision=revision or DEFAULT_REVISION, trust_remote_code=False)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, revision=revision or DEFAULT_REVISION, config=config, dtype=torch.float32, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    refuse_missing_weights(setting, name, info, "sequence classifier")
    return model
