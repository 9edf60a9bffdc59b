"""The reward: responses and their prompts in, one score per response out.

There are three kinds. A classifier's label scores 2 P(label) - 1, or its log-odds; it is found by its name, never by
its index. A classifier with a single output, as reward models trained on preferences have, gives that output. A Python
function or class gives what it likes. A weighted sum of several is a reward, too. No gradient leaves this file.
"""

import asyncio
import inspect
import math
import re
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from config import UserError, python_reward, reward_names

import numpy as np
import torch
from torch import Tensor
from tqdm.contrib import DummyTqdmFile
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from pretrain.tiny_world import resolve_name
from runtime.classifiers import longest_input, pad_rows
from runtime.device import lacks_memory
from runtime.hub import DEFAULT_REVISION, in_one_line, load_tokenizer, load_weights, loading, refuse_other_folder
from runtime.tables import Columns, column_list
from runtime.user_code import UserCode, is_of_the_program
from runtime.user_function import RESPONSES_ALONE, Arguments, Source, called_signature, match_arguments

SHORT_NAMES = {"pos": "positive", "neg": "negative", "neu": "neutral"}
SENTIMENTS = ("positive", "negative", "neutral")
TRIAL_TEXTS = ["", "I loved it.", "I saw it yesterday, a wonderful film.", "I saw it yesterday and hated it. " * 5]
ROUNDING = 1e-4  # of a logit in float32, where one text is computed in batches of different widths
PART = "reward_"  # begins the columns and keys of parts of a score
LONG = 1024  # tokens: a trial of a longer text takes too long


class Reward(Protocol):
    """Scores responses; label is the one whose probability is scored as 2 P - 1, None where scores are any numbers."""

    label: str | None

    def __call__(self, responses: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """Responses and the prompts they continue -> scores (B,) float32."""


@dataclass(frozen=True)
class Context:
    """What else is known of responses: their tokens, EOS included, and cells of the data set's columns, one for each.

    Without tokens there are no rewards per token.
    """

    completion_ids: list[list[int]] | None = None
    columns: Columns = field(default_factory=dict)


NO_CONTEXT = Context()


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores (B,) of responses, and the parts that they are the weighted sum of, if they are one, by name.

    token_rewards (B, longest response), 0 after a response, are what of a score is credited token by token; None where
    nothing is.
    """

    total: Tensor
    token_rewards: Tensor | None = None
    parts: dict[str, "Scores"] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def weighted_sum(cls, parts: dict[str, "Scores"], weights: dict[str, float]) -> "Scores":
        """The scores of some parts, each with its weight."""
        total = torch.stack([weights[name] * part.total for name, part in parts.items()]).sum(0)
        credited = [
            weights[name] * part.token_rewards for name, part in parts.items() if part.token_rewards is not None
        ]
        return cls(total, torch.stack(credited).sum(0) if credited else None, parts, weights)


@dataclass(frozen=True)
class ScoreScale:
    """Mean and standard deviation of the base's own scores; the policy is paid (score - mean) / std.

    So beta and step size mean the same for rewards of any unit (Ziegler et al. 2019, section 2.2).
    """

    mean: float = 0.0
    std: float = 1.0

    def standardize(self, scores: Tensor) -> Tensor:
        """Scores of any shape in units of the base's deviation."""
        return (scores - self.mean) / self.std


UNSCALED = ScoreScale()


def load_reward(
    name: str,
    target_label: str = "positive",
    weights: str | None = None,
    normalize_parts: bool = False,
    log_odds: bool = False,
    **options: Any,
) -> Reward:
    """The reward of this name, or the weighted sum of those that it lists with commas between them.

    weights, normalize_parts and log_odds are settings, the last one score_log_odds. options are those of
    ClassifierOptions, of which Python gets the device.
    """
    names = reward_names(name)
    if len(names) == 1 and weights is None and not normalize_parts:
        return _load_one(name, target_label, log_odds, **options)
    if "" in names:
        raise UserError(f"rm_name={name} has nothing between two of its commas: leave one out")
    if weights is not None:
        parse_weights(weights)
    rewards = [_load_one(one, target_label, log_odds, **options) for one in names]
    return WeightedRewards(dict(zip(part_names(names), rewards, strict=True)), name, weights, normalize_parts)


def _load_one(name: str, target_label: str, log_odds: bool, **options: Any) -> Reward:
    """The reward of one name: Python, or a classifier with one output or several."""
    chosen = ClassifierOptions(**options)
    if python_reward(name):
        return PythonReward(name, chosen.device)
    name = resolve_name(name)
    refuse_other_folder(chosen.setting, name)
    with loading(chosen.setting, name, "sequence classifier"):
        config = AutoConfig.from_pretrained(name, revision=chosen.revision or DEFAULT_REVISION, trust_remote_code=False)
    if log_odds and not is_scalar(config):
        return LogOddsReward(name, target_label, **options)
    return ScalarReward(name, **options) if is_scalar(config) else SentimentReward(name, target_label, **options)


def score_title(label: str | None) -> str:
    """What scores are called in pictures and tables: sentiment where the label is one, else score."""
    return "sentiment" if label is not None and full_label(label) in SENTIMENTS else "score"


def show_score(score: float, label: str | None) -> str:
    """A score with its sign: two digits behind the point if it is a label's probability, else four in all."""
    return f"{score:+.4g}" if label is None else f"{score:+.2f}"


def choose_columns(reward: Reward, available: Sequence[str]) -> list[str]:
    """Those of the data set's columns that a reward is given (raises UserError where it asks for something else)."""
    chosen: dict[str, None] = {}
    for part in parts_of(reward):
        if isinstance(part, PythonReward):
            chosen |= dict.fromkeys(part.choose_columns(available))
    return list(chosen)


def parts_of(reward: Reward) -> list[Reward]:
    """The rewards of a weighted sum, or the one reward."""
    return list(reward.rewards.values()) if isinstance(reward, WeightedRewards) else [reward]


def score_responses(
    reward: Reward, responses: list[str], prompts: list[str], name: str, context: Context = NO_CONTEXT
) -> Scores:
    """The scores of n responses; where the reward `name` fails or returns something else, it is refused."""
    try:
        if isinstance(reward, PythonReward | WeightedRewards):
            return reward.scores(responses, prompts, context)
        scores = reward(responses, prompts)
    except UserError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise UserError(f"rm_name={name} failed on a batch ({type(error).__name__}: {error})") from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != (len(responses),):
        returned = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"rm_name={name} returned {returned} instead of one real number per response")
    return Scores(scores)


# --- parts ----------------------------------------------------------------------------------------------------------


class WeightedRewards:
    """The weighted sum of several rewards, or of the parts that one Python function returns by name."""

    label: str | None = None

    def __init__(
        self, rewards: dict[str, Reward], name: str, weights: str | None = None, normalize_parts: bool = False
    ) -> None:
        """`rewards` by the names of their parts; the others are the settings rm_name, reward_weights, normalize_parts.

        Raises UserError where the weights do not fit.
        """
        self.rewards = rewards
        self.rm_names = reward_names(name)
        self.weights = weights
        self.normalize_parts = normalize_parts
        if len(rewards) > 1:
            match_weights(weights, list(rewards))

    def __call__(self, responses: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
        """Weighted sums (B,) float32."""
        return self.scores(responses, prompts).total

    def scores(self, responses: Sequence[str], prompts: Sequence[str] = (), context: Context = NO_CONTEXT) -> Scores:
        """Weighted sums with their parts; a reward that has parts of its own counts as those (raises UserError)."""
        scored = [
            score_responses(reward, list(responses), list(prompts), name, context)
            for reward, name in zip(self.rewards.values(), self.rm_names, strict=True)
        ]
        whole = self._sum_of_one(scored[0]) if len(scored) == 1 else self._sum_of_several(scored)
        if self.normalize_parts and whole.token_rewards is not None:
            raise UserError(
                "normalize_parts needs one number per response in each part, not one per token: leave it out"
            )
        return whole

    def _sum_of_one(self, scored: Scores) -> Scores:
        if not scored.parts:
            setting = "normalize_parts" if self.weights is None else f"reward_weights={self.weights}"
            raise UserError(
                f"{setting} needs several parts, but rm_name={self.rm_names[0]} gives one number per response: name "
                "several rewards with commas between them, return a dict of parts, or leave it out"
            )
        return Scores.weighted_sum(scored.parts, match_weights(self.weights, list(scored.parts)))

    def _sum_of_several(self, scored: list[Scores]) -> Scores:
        weight_of = match_weights(self.weights, list(self.rewards))
        parts: dict[str, Scores] = {}
        weights: dict[str, float] = {}
        for name, one in zip(self.rewards, scored, strict=True):
            for inner, part in one.parts.items() or [("", one)]:
                unique = distinct_names([*parts, f"{name}_{inner}" if inner else name])[-1]
                parts[unique] = part
                weights[unique] = weight_of[name]
        return Scores.weighted_sum(parts, weights)


def normalized_sum(parts: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum (B,) of parts (B,), each first brought to mean 0 and deviation 1; a constant part gives 0.

    This is the normalisation of GDPO (Liu et al. 2026, arXiv 2601.05242), over a batch instead of a group.
    """
    normalized = []
    for name, part in parts.items():
        std = part.std(unbiased=False)
        is_constant = std <= 1e-6 * part.abs().max()  # but for rounding
        normalized.append(weights[name] * torch.where(is_constant, 0, (part - part.mean()) / std))
    return torch.stack(normalized).sum(0)


def parse_weights(text: str) -> list[tuple[str, float]]:
    """The setting reward_weights as pairs of a name, '' where it has none, and a finite number (raises UserError)."""
    pairs = []
    for item in text.split(","):
        name, _, number = item.rpartition("=")
        try:
            pairs.append((name.strip(), float(number)))
        except ValueError:
            pairs.append(("", math.nan))
    named = [bool(name) for name, _ in pairs]
    if not all(math.isfinite(number) for _, number in pairs) or any(named) != all(named):
        raise UserError(
            f"reward_weights={text!r} is not understood: write numbers with commas between them, 1,0.5, each with its "
            "name or none, format=1,length=0.5"
        )
    return pairs


def match_weights(text: str | None, names: Sequence[str]) -> dict[str, float]:
    """The weight of each part, 1 by default (raises UserError where the setting does not have one for each)."""
    if text is None:
        return dict.fromkeys(names, 1.0)
    pairs = parse_weights(text)
    in_order = not any(name for name, _ in pairs)
    given = list(names) if in_order else [name for name, _ in pairs]
    if len(pairs) != len(names) or sorted(given) != sorted(names):
        raise UserError(
            f"reward_weights={text} does not have one weight for each of the {len(names)} parts, {', '.join(names)}: "
            "give one for each"
        )
    weight_of = {name: number for name, (_, number) in zip(given, pairs, strict=True)}
    return {name: weight_of[name] for name in names}


def part_names(names: Sequence[str]) -> list[str]:
    """What the parts of rm_name are called: by their functions, or the last part of a classifier's name."""
    short = []
    for name in names:
        python = python_reward(name)
        short.append(python[1] if python else re.split(r"[/\\]", name.rstrip("/\\"))[-1])
    return distinct_names(short)


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names fit for columns reward_<name>, different from each other, from reward_mean and from intervals: f, f_2."""
    result: list[str] = []
    for name in names:
        stem = re.sub(r"\W+", "_", name).strip("_") or "part"
        candidates = (stem if k == 1 else f"{stem}_{k}" for k in range(1, len(names) + 2))
        result.append(next(x for x in candidates if x not in (*result, "mean") and not x.endswith("_ci")))
    return result


# --- classifiers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassifierOptions:
    """How a classifier is loaded and run; a user's own reward may give some of them.

    Texts that are too long are cut at the end, or at the beginning with cut_left. `setting` is the one that names the
    classifier, for messages.
    """

    device: str | torch.device = "cpu"
    batch_size: int = 64
    dtype: torch.dtype = torch.float32
    revision: str | None = None
    setting: str = "rm_name"
    cut_left: bool = False


class Classifier:
    """A Hugging Face sequence classifier with its tokenizer; a text's score does not depend on the rest of a batch."""

    def __init__(self, name: str, **options: Any) -> None:
        """Load the classifier; options are those of ClassifierOptions."""
        chosen = ClassifierOptions(**options)
        name = resolve_name(name)  # here as well as on the command line: a user's reward may build its own
        self.source = f"{chosen.setting}={name}"
        self.model: Any = load_weights(
            AutoModelForSequenceClassification,
            chosen.setting,
            name,
            "sequence classifier",
            revision=chosen.revision or DEFAULT_REVISION,
        )
        self.model.eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(chosen.setting, name, chosen.revision)
        self.max_length = longest_input(self.model, self.tokenizer)
        self._check_tokenizer()
        # sides of padding and cutting are decided here, whatever was saved with the tokenizer
        self.tokenizer.truncation_side = "left" if chosen.cut_left else "right"
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id  # where GPT-2 ends a text
        self.batch_size = chosen.batch_size
        # whether it was trained on prompt and response, if its folder says so
        self.on_prompt: bool | None = getattr(self.model.config, "reward_on_prompt", None)
        self.dtype = torch.float32  # while it is tried
        self.without_padding = False
        self.without_padding = self._sees_padding()
        if self.without_padding:
            print(f"note: scores of {self.source} change with padding, so texts of one length are scored at a time")
        self.dtype = chosen.dtype
        self.model.to(chosen.device)

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> Tensor:
        """The model's outputs (B, labels) float32 for texts, on its device."""
        device = self.model.device
        if not texts:
            return torch.empty(0, self.model.config.num_labels, device=device)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        rows = [ids or [self.tokenizer.pad_token_id] for ids in encoded]  # an empty text may have no token
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # little padding
        outputs = [
            self._forward([rows[i] for i in batch]) for batch in self._batches(order, [len(row) for row in rows])
        ]
        back = torch.tensor(order).argsort().to(device, non_blocking=True)
        return torch.cat(outputs)[back]

    def check_longest(self) -> None:
        """Refuse a classifier that fails on the longest text that it should take."""
        try:
            self.logits(["film " * min(self.max_length, LONG)])
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"{self.source} cannot score a text of {self.max_length} tokens, which its config and tokenizer allow "
                f"({type(error).__name__}: {in_one_line(error)}): save its tokenizer with a smaller model_max_length"
            ) from error

    def _check_tokenizer(self) -> None:
        """Refuse a tokenizer that does not fit the model, or that this class does not serve."""
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is None:
            raise UserError(f"{self.source} has a tokenizer without a padding token: save one with it")
        size = getattr(self.model.config.get_text_config(), "vocab_size", None)
        largest = max(tokenizer.get_vocab().values())
        if size is not None and largest >= size:
            raise UserError(
                f"{self.source} has a tokenizer with ids up to {largest}, and a model for {size}: save them together"
            )
        if self.max_length <= len(tokenizer("")["input_ids"]):
            raise UserError(
                f"{self.source} leaves no room for a text in its {self.max_length} tokens: see model_max_length in its "
                "tokenizer_config.json, and max_position_embeddings in its config.json"
            )
        takes_types = "token_type_ids" in inspect.signature(self.model.forward).parameters
        if takes_types and any(tokenizer("", return_token_type_ids=True)["token_type_ids"]):
            raise UserError(f"{self.source} needs token types, as XLNet does, which are not supported: choose another")

    def _sees_padding(self) -> bool:
        """Whether texts score differently beside a longer one; a model whose scores are random is refused."""
        try:
            alone = torch.cat([self.logits([text]) for text in TRIAL_TEXTS])
            again = torch.cat([self.logits([text]) for text in TRIAL_TEXTS])
            together = self.logits(TRIAL_TEXTS)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.source} cannot score texts ({type(error).__name__}: {in_one_line(error)}): choose another"
            ) from error
        allowed = ROUNDING * alone.abs().max().clamp(min=1)
        if (alone - again).abs().max() > allowed:
            raise UserError(f"{self.source} scores the same text differently each time: choose another")
        return bool((alone - together).abs().max() > allowed)

    def _batches(self, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """Texts in order, batch_size at a time; on a GPU as many short ones as fill the room of that many long ones."""
        while order:
            longest = lengths[order[0]]
            size = self.batch_size
            if self.model.device.type != "cpu":
                size = max(size, self.batch_size * self.max_length // longest)
            if self.without_padding:
                size = min(size, sum(lengths[i] == longest for i in order))
            yield order[:size]
            order = order[size:]

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """The model's outputs (b, labels) float32 for tokens; no copy waits for the device."""
        device = self.model.device
        ids, mask = (x.to(device, non_blocking=True) for x in pad_rows(rows, self.tokenizer.pad_token_id))
        with torch.autocast(device.type, self.dtype) if self.dtype != torch.float32 else nullcontext():
            return self.model(input_ids=ids, attention_mask=mask).logits.float()


class LabelReward(Classifier):
    """A classifier with a label to steer towards; a subclass says how its probability becomes a score."""

    def __init__(self, name: str, target_label: str = "positive", **options: Any) -> None:
        """Load the classifier, and refuse one that has no such label; options are those of ClassifierOptions."""
        super().__init__(name, **options)
        self.target = find_label(self.model.config, target_label, self.source)

    def log_odds(self, texts: Sequence[str]) -> Tensor:
        """log P(target) - log (1 - P(target)) of each text (B,), which differ even where scores are all near 1."""
        logits = self.logits(texts)
        target = logits[:, self.target]
        if logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification":
            return target  # one output per label, independent of the others
        others = torch.cat([logits[:, : self.target], logits[:, self.target + 1 :]], 1)
        return target - others.logsumexp(-1)


class SentimentReward(LabelReward):
    """score = 2 P(target_label) - 1 under a classifier with a label of that name."""

    def __init__(self, name: str, target_label: str = "positive", **options: Any) -> None:
        """Load the classifier, and refuse one that has no such label; options are those of ClassifierOptions."""
        super().__init__(name, target_label, **options)
        self.label: str | None = full_label(target_label)

    def __call__(self, responses: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
        """Scores of the responses alone."""
        return self.score(responses)

    def score(self, texts: Sequence[str]) -> Tensor:
        """Texts -> scores (B,) float32 in [-1, 1], on the model's device."""
        return (self.log_odds(texts) / 2).tanh()  # 2 sigmoid(x) - 1 = tanh(x / 2)


class LogOddsReward(LabelReward):
    """score = log P(target_label) - log (1 - P(target_label)): with two labels the difference of their logits."""

    label: str | None = None  # of a score between -1 and 1

    def __call__(self, responses: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
        """Scores (B,) float32 of the responses alone, on the model's device."""
        return self.log_odds(responses)


class ScalarReward(Classifier):
    """score = the single output of a classifier, as reward models trained on preferences have; any real number."""

    label: str | None = None

    def __call__(self, responses: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
        """Scores (B,) float32 of the responses alone, on the model's device."""
        return self.logits(responses).squeeze(1)


def is_scalar(config: PretrainedConfig) -> bool:
    """Whether a classifier has one output, and it is a score and not the log-odds of a label."""
    return config.num_labels == 1 and config.problem_type != "multi_label_classification"


def find_label(config: PretrainedConfig, target_label: str, model: str) -> int:
    """Index of a model's label, found by its name in any case; pos, neg and neu count as their long forms."""
    names = {int(index): str(label) for index, label in config.id2label.items()}
    choices = ", ".join(names.values())
    matching = [index for index, label in names.items() if full_label(label) == full_label(target_label)]
    if not matching:
        raise UserError(f"target_label={target_label!r} is not a label of {model}: choose {choices}")
    if len(matching) > 1 or matching[0] >= len(names):
        raise UserError(f"{model} does not say which output is {target_label!r}: number id2label in its config.json")
    return matching[0]


def full_label(label: str) -> str:
    """The long form of a label's name, in lower case."""
    return SHORT_NAMES.get(label.lower(), label.lower())


# --- Python ---------------------------------------------------------------------------------------------------------


class PythonReward:
    """A user's function of responses and what goes with them, that returns real numbers.

    It returns one number per response, or a list of one per token of each response, or a dict of such parts. A class is
    built once, with the run's device where it takes `device`, and its instance is called. A coroutine is awaited. The
    user's code is kept apart from the program's: see runtime/user_code.py.
    """

    label: str | None = None

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        """Load `file.py:function` or `package.module:function`."""
        self.name = name
        self.device = device
        place, function = python_reward(name) or ("", "")
        self.code = UserCode(place, f"rm_name={name}")
        with self._one_line_errors("cannot be loaded"), self.code.running():
            module = self.code.load()
            if not hasattr(module, function):
                names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
                raise UserError(f"rm_name={name}: {place} has no {function!r}; it has {', '.join(names) or 'none'}")
            target = getattr(module, function)
            if isinstance(target, type):
                takes_device = "device" in inspect.signature(target).parameters
                target = target(device=device) if takes_device else target()
        self.function: Callable[..., Any] = target
        if not callable(target):
            raise UserError(f"rm_name={name} is {type(target).__name__}, which cannot be called: name a function")
        self.file = self.code.file
        self.sha256 = self.code.sha256()
        # those of the dict that it returns, none where it returns something else; None before its first call
        self.returned_parts: list[str] | None = None
        self.event_loop: asyncio.AbstractEventLoop | None = None  # once it has returned a coroutine

    def __call__(self, responses: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
        """Scores (B,) float32; where the function fails, UserError names file and line."""
        return self.scores(responses, prompts).total

    def scores(self, responses: Sequence[str], prompts: Sequence[str] = (), context: Context = NO_CONTEXT) -> Scores:
        """Scores with their parts; where the function fails, UserError names file and line."""
        if not responses:
            nothing = Scores(torch.empty(0, device=self.device))
            empty = dict.fromkeys(self.returned_parts or [], nothing)
            return Scores.weighted_sum(empty, dict.fromkeys(empty, 1.0)) if empty else nothing
        numbers = self._call(responses, prompts, context)
        if isinstance(numbers, _Numbers):
            self._check_part_names([])
            return self._checked(numbers, "", responses, context.completion_ids)
        if not numbers or not all(isinstance(name, str) for name in numbers):
            raise UserError(f"rm_name={self.name} returned a dict without names of parts, {self._place()}: fix it")
        names = distinct_names(list(numbers))
        self._check_part_names(names)
        parts = {
            name: self._checked(part, f" in part {key!r}", responses, context.completion_ids)
            for name, (key, part) in zip(names, numbers.items(), strict=True)
        }
        return Scores.weighted_sum(parts, dict.fromkeys(parts, 1.0))

    def _call(
        self, responses: Sequence[str], prompts: Sequence[str], context: Context
    ) -> "_Numbers | dict[str, _Numbers]":
        """What the function returns for some responses, unchecked: numbers, or a dict of them."""
        arguments = self._match_arguments(list(context.columns))
        given = {"responses": responses, "prompts": prompts, "completion_ids": context.completion_ids}

        def values_of(source: Source) -> list[Any]:
            values = context.columns[source.name] if source.is_column else given[source.name]
            if values is None:
                raise UserError(f"rm_name={self.name} asks for completion_ids, which these responses do not have")
            return list(values)

        by_position = [values_of(source) for source in arguments.by_position]
        by_keyword = {
            name: values_of(source)
            for name, source in arguments.by_keyword.items()
            if source != Source("completion_ids") or context.completion_ids is not None
        }
        with self._one_line_errors("failed"), self.code.running(), torch.no_grad():
            with redirect_stdout(DummyTqdmFile(sys.stdout)):
                result = self.function(*by_position, **by_keyword)
                if inspect.isawaitable(result):
                    result = self._awaited(result)
            if isinstance(result, Mapping):
                return {name: _Numbers.of(part) for name, part in dict(result).items()}
            return _Numbers.of(result)

    def choose_columns(self, available: Sequence[str]) -> list[str]:
        """Those of the data set's columns that the function is given (raises UserError on parameters unknown)."""
        arguments = self._match_arguments(available)
        if arguments.kept:
            print(f"note: no column of the data set sets {', '.join(arguments.kept)} of rm_name={self.name}")
        return arguments.columns

    def _match_arguments(self, columns: Sequence[str]) -> Arguments:
        """What the function's parameters mean; where that is not clear, it is refused."""
        bound = self.function.keywords if isinstance(self.function, partial) else {}
        try:
            signature = called_signature(self.function)
        except ValueError:  # some functions written in C have none
            return RESPONSES_ALONE
        try:
            return match_arguments(signature, bound, columns)
        except ValueError as reason:
            listed = (
                f"the columns of the data set: {column_list(columns)}" if columns else "no column, without a data set"
            )
            raise UserError(
                f"rm_name={self.name} takes {signature}, {self._place()}, and {reason}: it can ask for responses (or "
                f"completions, texts), prompts, completion_ids and {listed}"
            ) from None

    def _awaited(self, result: Any) -> Any:
        """The result of a coroutine; one event loop serves all calls, so that the function may keep a client."""
        if self.event_loop is None:
            self.event_loop = asyncio.new_event_loop()
            weakref.finalize(self, self.event_loop.close)
        return self.event_loop.run_until_complete(result)

    def _check_part_names(self, names: list[str]) -> None:
        """Refuse parts that are not those of the calls before: metrics.csv has a column for each."""
        if self.returned_parts is not None and names != self.returned_parts:
            now, before = (", ".join(some) or "none" for some in (names, self.returned_parts))
            raise UserError(
                f"rm_name={self.name} returned other parts than before ({now} instead of {before}), {self._place()}: "
                "return the same in every call"
            )
        self.returned_parts = names

    def _checked(
        self, numbers: "_Numbers", part: str, responses: Sequence[str], completion_ids: list[list[int]] | None
    ) -> Scores:
        """Scores of finite numbers, one per response or one per token; anything else is refused."""
        n = len(responses)
        if numbers.tensor is not None and numbers.tensor.shape == (n,):
            self._check_finite(numbers.tensor[:, None], part, responses)
            return Scores(numbers.tensor.to(self.device, non_blocking=True))
        if numbers.rows is None or len(numbers.rows) != n or completion_ids is None:
            shape = "" if numbers.tensor is None else f" of shape {tuple(numbers.tensor.shape)}"
            raise UserError(
                f"rm_name={self.name} returned {numbers.kind}{shape}{part} instead of one real number for each of {n} "
                f"responses, {self._place()}: fix it"
            )
        for i, (row, tokens) in enumerate(zip(numbers.rows, completion_ids, strict=True)):
            if len(row) != len(tokens):
                raise UserError(
                    f"rm_name={self.name} returned {len(row)} numbers{part} for {self._named(i, responses)}, which has "
                    f"{len(tokens)} tokens, EOS included, {self._place()}: return one per token of completion_ids"
                )
        token_rewards = torch.nn.utils.rnn.pad_sequence(numbers.rows, batch_first=True)
        self._check_finite(token_rewards, part, responses)
        token_rewards = token_rewards.to(self.device, non_blocking=True)
        return Scores(token_rewards.sum(1), token_rewards)

    def _check_finite(self, numbers: Tensor, part: str, responses: Sequence[str]) -> None:
        """Refuse numbers (B, n) among which one is not finite."""
        bad = (~numbers.isfinite()).nonzero()
        if len(bad):
            i, place = bad[0].tolist()
            raise UserError(
                f"rm_name={self.name} returned {float(numbers[i, place])}{part} for {self._named(i, responses)}, "
                f"{self._place()}: fix it"
            )

    @staticmethod
    def _named(i: int, responses: Sequence[str]) -> str:
        """Which response it is, with its first words."""
        return f"response {i + 1} of {len(responses)} ({' '.join(responses[i].split())[:60]!r})"

    @contextmanager
    def _one_line_errors(self, what: str) -> Iterator[None]:
        """Whatever the user's code raises becomes a UserError that says where; too little memory passes."""
        try:
            yield
        except BaseException as error:
            of_this_class = isinstance(error, UserError) and not self._frames(error)
            if of_this_class or is_of_the_program(error):
                raise
            reason = _describe(error)
            if isinstance(error, ImportError) and (hidden := self.code.hidden_modules()):
                reason += f"; beside it are {', '.join(hidden)}, which it gets instead of this program's"
            raise UserError(f"rm_name={self.name} {what} ({reason}), {self._place(error)}: fix it") from error

    def _frames(self, error: BaseException) -> list[traceback.FrameSummary]:
        return [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.code.file]

    def _place(self, error: BaseException | None = None) -> str:
        """Function, file and line: of the user's code that raised an error, else where the function begins."""
        file = self.code.file
        if isinstance(error, SyntaxError) and error.filename == file:
            return f"{file}:{error.lineno}"
        if error is not None and (frames := self._frames(error)):
            return f"in {frames[-1].name}, {file}:{frames[-1].lineno}"
        function: Any = getattr(self, "function", None)
        if isinstance(function, partial):
            function = function.func
        called = inspect.unwrap(function) if hasattr(function, "__code__") else type(function).__call__
        code = getattr(called, "__code__", None)
        return f"in {called.__name__}, {code.co_filename}:{code.co_firstlineno}" if code else f"in {file}"


def _describe(error: BaseException) -> str:
    """An error's kind and message on one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # a class of the user's own
        message = ""
    if isinstance(error, UserError):
        return message
    return f"{type(error).__name__}: {message[:300]}" if message else type(error).__name__


@dataclass(frozen=True)
class _Numbers:
    """What a user's function returned: as one tensor, and as one vector for each of its items, where it is numbers."""

    kind: str
    tensor: Tensor | None
    rows: list[Tensor] | None

    @classmethod
    def of(cls, result: Any) -> "_Numbers":
        """Read what was returned."""
        tensor = _as_tensor(result)
        rows = None
        has_items = isinstance(result, list | tuple) or (isinstance(result, np.ndarray | Tensor) and result.ndim == 2)
        if has_items and (tensor is None or tensor.dim() == 2):
            vectors = [_as_tensor(item) for item in result]
            if all(vector is not None and vector.dim() == 1 for vector in vectors):
                rows = [vector for vector in vectors if vector is not None]
        return cls(type(result).__name__, tensor, rows)


def _as_tensor(result: Any) -> Tensor | None:
    """Real numbers as a new float32 tensor on the CPU, whatever holds them; None where there is something else."""
    if isinstance(result, Tensor):
        return None if result.is_complex() else result.detach().cpu().to(torch.float32, copy=True)
    if isinstance(result, list | tuple):
        result = [x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in result]
    try:
        array = np.asarray(result)
    except ValueError:  # rows of different lengths
        return None
    if array.dtype.kind not in "biuf":
        return None
    return torch.from_numpy(array.astype(np.float64)).float()
