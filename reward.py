"""The reward: responses and their prompts in, one score per response out.

There are three kinds. A classifier's label scores 2 P(label) - 1; it is found by its name, never by its index. A
classifier with a single output, as reward models trained on preferences have, gives that output. A Python function or
class gives what it likes. No gradient leaves this file.
"""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from config import UserError, python_reward

import numpy as np
import torch
from torch import Tensor
from tqdm.contrib import DummyTqdmFile
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig

from runtime.device import lacks_memory
from runtime.hub import DEFAULT_REVISION, load_tokenizer, loading, refuse_missing_weights

SHORT_NAMES = {"pos": "positive", "neg": "negative", "neu": "neutral"}
SENTIMENTS = ("positive", "negative", "neutral")


class Reward(Protocol):
    """Scores responses; label is the one whose probability is scored as 2 P - 1, None where scores are any numbers."""

    label: str | None

    def __call__(self, responses: Sequence[str], prompts: Sequence[str]) -> Tensor:
        """Responses and the prompts they continue -> scores (B,) float32."""


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
    name: str, target_label: str = "positive", device: str | torch.device = "cpu", batch_size: int = 64,
    dtype: torch.dtype = torch.float32, revision: str | None = None, setting: str = "rm_name", cut_left: bool = False,
) -> Reward:  # fmt: skip
    """The reward that a setting names: Python, or a classifier with one output or several (raises UserError)."""
    if python_reward(name):
        return PythonReward(name, device)
    with loading(setting, name, "sequence classifier"):
        config = AutoConfig.from_pretrained(name, revision=revision or DEFAULT_REVISION, trust_remote_code=False)
    rest = (device, batch_size, dtype, revision, setting, cut_left)
    return ScalarReward(name, *rest) if is_scalar(config) else SentimentReward(name, target_label, *rest)


def score_title(label: str | None) -> str:
    """What scores are called in pictures and tables: sentiment where the label is one, else score."""
    return "sentiment" if label is not None and full_label(label) in SENTIMENTS else "score"


def show_score(score: float, label: str | None) -> str:
    """A score with its sign: two digits behind the point if it is a label's probability, else four in all."""
    return f"{score:+.4g}" if label is None else f"{score:+.2f}"


def score_responses(reward: Reward, responses: list[str], prompts: list[str], name: str) -> Tensor:
    """Scores (n,) of responses (raises UserError where the reward `name` fails or returns something else)."""
    try:
        scores = reward(responses, prompts)
    except UserError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise UserError(f"rm_name={name} failed on a batch ({type(error).__name__}: {error})") from error
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != (len(responses),):
        found = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(f"rm_name={name} returned {found} instead of one real number per response")
    return scores


# --- classifiers ----------------------------------------------------------------------------------------------------


class Classifier:
    """A Hugging Face sequence classifier with its tokenizer."""

    def __init__(
        self, name: str, device: str | torch.device = "cpu", batch_size: int = 64, dtype: torch.dtype = torch.float32,
        revision: str | None = None, setting: str = "rm_name", cut_left: bool = False,
    ) -> None:  # fmt: skip
        """Load the classifier that `setting` names (raises UserError where it or its tokenizer is missing).

        Texts that are too long are cut at the end, or at the beginning where cut_left is set.
        """
        self.model: Any = _load_classifier(setting, name, revision).to(device).eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(setting, name, revision)
        if self.tokenizer.pad_token_id is None:
            raise UserError(f"{setting}={name} has a tokenizer without a padding token: save one with it")
        if cut_left:
            self.tokenizer.truncation_side = "left"
        self.batch_size, self.dtype = batch_size, dtype
        # whether it was trained on prompt and response, if known
        self.on_prompt: bool | None = getattr(self.model.config, "reward_on_prompt", None)
        longest = getattr(self.model.config, "max_position_embeddings", 512)
        self.max_length = min(self.tokenizer.model_max_length, longest)

    @torch.no_grad()
    def logits(self, texts: Sequence[str]) -> Tensor:
        """The model's outputs (B, labels) float32 for texts, on its device."""
        device = self.model.device
        if not texts:
            return torch.empty(0, self.model.config.num_labels, device=device)
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        encoded = [ids or [self.tokenizer.pad_token_id] for ids in encoded]  # an empty text may have no token
        order = sorted(range(len(texts)), key=lambda i: -len(encoded[i]))  # little padding
        found = [self._forward([encoded[i] for i in rows]) for rows in self._batches(order, [*map(len, encoded)])]
        return torch.cat(found)[torch.tensor(order).argsort().to(device, non_blocking=True)]

    def _batches(self, order: list[int], lengths: list[int]) -> Iterator[list[int]]:
        """Texts in order, batch_size at a time; on a GPU as many short ones as fill the room of that many long ones."""
        while order:
            fitting = self.batch_size * self.max_length // lengths[order[0]]
            size = self.batch_size if self.model.device.type == "cpu" else max(self.batch_size, fitting)
            yield order[:size]
            order = order[size:]

    def _forward(self, rows: list[list[int]]) -> Tensor:
        """The model's outputs (b, labels) float32 for tokens; no copy waits for the device."""
        device, half = self.model.device, self.dtype != torch.float32
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        ids, mask = (batch[key].to(device, non_blocking=True) for key in ("input_ids", "attention_mask"))
        with torch.autocast(device.type, self.dtype) if half else nullcontext():
            return self.model(input_ids=ids, attention_mask=mask).logits.float()


class SentimentReward(Classifier):
    """score = 2 P(target_label) - 1 under a classifier with a label of that name."""

    def __init__(
        self, name: str, target_label: str = "positive", device: str | torch.device = "cpu", batch_size: int = 64,
        dtype: torch.dtype = torch.float32, revision: str | None = None, setting: str = "rm_name",
        cut_left: bool = False,
    ) -> None:  # fmt: skip
        """Load the classifier (raises UserError as Classifier does, and where it has no such label)."""
        super().__init__(name, device, batch_size, dtype, revision, setting, cut_left)
        self.target = find_label(self.model.config, target_label, f"{setting}={name}")
        self.label: str | None = full_label(target_label)

    def __call__(self, responses: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
        """Scores of the responses alone."""
        return self.score(responses)

    def score(self, texts: Sequence[str]) -> Tensor:
        """Texts -> scores (B,) float32 in [-1, 1], on the model's device."""
        return (self.log_odds(texts) / 2).tanh()  # 2 sigmoid(x) - 1 = tanh(x / 2)

    def log_odds(self, texts: Sequence[str]) -> Tensor:
        """log P(target) - log (1 - P(target)) of each text (B,), which differ even where scores are all near 1."""
        logits = self.logits(texts)
        target = logits[:, self.target]
        if logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification":
            return target  # one output per label, independent of the others
        others = torch.cat([logits[:, : self.target], logits[:, self.target + 1 :]], 1)
        return target - others.logsumexp(-1)


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


# --- Python ---------------------------------------------------------------------------------------------------------


class PythonReward:
    """A user's function of responses, or of responses and prompts, that returns one real number per response.

    A class is built once, with the run's device where it takes `device`, and its instance is called.
    """

    label: str | None = None

    def __init__(self, name: str, device: str | torch.device = "cpu") -> None:
        """Load `file.py:function` or `package.module:function` (raises UserError where that fails)."""
        self.name, self.device = name, device
        place, function = python_reward(name) or ("", "")
        self.file, self.sha256 = place, ""
        with self._one_line_errors("cannot be loaded"):
            module = self._load_file(Path(place)) if place.endswith(".py") else self._load_module(place)
            if not hasattr(module, function):
                known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
                raise UserError(f"rm_name={name}: {place} has no {function!r}; it has {', '.join(known) or 'none'}")
            found = getattr(module, function)
            if isinstance(found, type):
                found = found(device=device) if "device" in inspect.signature(found).parameters else found()
        self.function: Callable[..., Any] = found
        if not callable(found):
            raise UserError(f"rm_name={name} is {type(found).__name__}, which cannot be called: name a function")
        self.takes_prompts = self._takes_prompts()

    @torch.no_grad()
    def __call__(self, responses: Sequence[str], prompts: Sequence[str] = ()) -> Tensor:
        """Scores (B,) float32 (raises UserError with file and line where the function fails)."""
        if not responses:
            return torch.empty(0, device=self.device)
        given = (list(responses), list(prompts)) if self.takes_prompts else (list(responses),)
        with self._one_line_errors("failed"), redirect_stdout(DummyTqdmFile(sys.stdout)):
            found = self.function(*given)
        return self._checked(found, responses).to(self.device, non_blocking=True)

    def _load_file(self, path: Path) -> ModuleType:
        """Run a file as a module of its own; it can import the files beside it."""
        if not path.is_file():
            raise UserError(f"rm_name={self.name}: there is no file {path}")
        source = path.read_bytes()  # read once: what is recorded is what runs
        self.file, self.sha256 = str(path.resolve()), hashlib.sha256(source).hexdigest()
        module = ModuleType(f"python_reward_{path.stem}")
        module.__file__ = self.file
        sys.modules[module.__name__] = module  # where dataclasses and pickle look
        if str(path.resolve().parent) not in sys.path:
            sys.path.append(str(path.resolve().parent))  # at the end: its neighbours hide no module of this project
        exec(compile(source, self.file, "exec"), module.__dict__)
        return module

    def _load_module(self, place: str) -> ModuleType:
        """Import a module, which may be in the current folder."""
        if "" not in sys.path:
            sys.path.append("")
        module = importlib.import_module(place)
        if module.__file__:
            self.file = module.__file__
            self.sha256 = hashlib.sha256(Path(self.file).read_bytes()).hexdigest()
        return module

    def _takes_prompts(self) -> bool:
        """Whether the function has a second parameter for the prompts (raises UserError where it wants still more)."""
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # some functions written in C have none
            return False
        places = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = [p for p in signature.parameters.values() if p.kind == p.KEYWORD_ONLY]
        needed = [p for p in (*places, *named) if p.default is p.empty]
        both = len(needed) == 2 or any(p.name == "prompts" for p in places[1:2]) or any(
            p.kind == p.VAR_POSITIONAL for p in signature.parameters.values()
        )  # fmt: skip
        try:
            signature.bind(*([[]] * (2 if both else 1)))
        except TypeError as error:
            raise UserError(
                f"rm_name={self.name} takes {signature}, {self._place()}: it must take (responses) or "
                f"(responses, prompts) ({error})"
            ) from None
        return both

    def _checked(self, found: Any, responses: Sequence[str]) -> Tensor:
        """What the function returned as scores (B,) float32 on the CPU (raises UserError where it is not that)."""
        n, scores = len(responses), _as_tensor(found)
        if scores is None or scores.shape != (n,):
            what = type(found).__name__ if scores is None else f"{type(found).__name__} of shape {tuple(scores.shape)}"
            raise UserError(
                f"rm_name={self.name} returned {what} instead of one real number for each of {n} responses, "
                f"{self._place()}: fix it"
            )
        for i, score in enumerate(scores.tolist()):
            if not np.isfinite(score):
                text = " ".join(responses[i].split())[:60]
                raise UserError(
                    f"rm_name={self.name} returned {score} for response {i + 1} of {n} ({text!r}), {self._place()}: "
                    "fix it"
                )
        return scores

    @contextmanager
    def _one_line_errors(self, what: str) -> Iterator[None]:
        """Whatever the user's code raises becomes a UserError that says where; too little memory passes."""
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            if lacks_memory(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"rm_name={self.name} {what} ({reason}), {self._place(error)}: fix it") from error

    def _place(self, error: BaseException | None = None) -> str:
        """Function, file and line: of the user's code that raised an error, else where the function begins."""
        if isinstance(error, SyntaxError) and error.filename == self.file:
            return f"{self.file}:{error.lineno}"
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == self.file] if error else []
        if frames:
            return f"in {frames[-1].name}, {self.file}:{frames[-1].lineno}"
        function: Any = getattr(self, "function", None)
        function = function.func if isinstance(function, partial) else function
        call = inspect.unwrap(function) if hasattr(function, "__code__") else type(function).__call__
        code = getattr(call, "__code__", None)
        return f"in {call.__name__}, {code.co_filename}:{code.co_firstlineno}" if code else f"in {self.file}"


def _as_tensor(found: Any) -> Tensor | None:
    """Real numbers as a float32 tensor on the CPU, whatever holds them; None where there is something else."""
    if isinstance(found, Tensor):
        return None if found.is_complex() else found.detach().float().cpu()
    if isinstance(found, list | tuple):
        found = [x.item() if isinstance(x, Tensor) and x.numel() == 1 else x for x in found]
    try:
        array = np.asarray(found)
    except ValueError:  # rows of different lengths
        return None
    return torch.from_numpy(array.astype(np.float64)).float() if array.dtype.kind in "biuf" else None
