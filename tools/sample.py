"""Tries a prompt on trained policies and their base, with the same random numbers, and shows where they differ.

    python -m tools.sample --prompt "This film"                     ckpts/policy_lm beside its base
    python -m tools.sample ckpts_a ckpts_b --prompt "This film"     several runs, or any policies, at once
    python -m tools.sample --n 3 --top_k 50 --score                 asks for prompts; three responses each, with scores
    cat prompts.txt | python -m tools.sample --json                 a JSON object per response

Decoding that no flag sets is that of the first policy's run. KL is the exact one of each token, summed over a response.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from config import REWARD_WEIGHTS_HELP, EvalConfig, TrainConfig, UserError, opt

import torch
from transformers import PreTrainedTokenizerBase

from data import pad_left
from evaluation.comparison import real_rows, token_kl
from evaluation.settings import eval_config, settings_of_run
from model import GPT2WithValueHead, Sequences, sample_responses
from reward import Context, Reward, choose_columns, score_responses, show_score
from runtime.cli import parse_flags, run
from runtime.device import enough_memory
from runtime.hub import quiet_libraries
from runtime.saved_run import policy_folder
from runtime.terminal import SHADES, can_shade, cells, paint, side_by_side
from training.parts import check_fit, check_same_tokens, load_base, load_policy, load_run_reward
from utils import uniforms

BASE = "base"


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings of `python -m tools.sample`."""

    policy_path: list[str] = field(
        default_factory=lambda: [EvalConfig.policy_path],
        metadata={"help": "Policies: folders of runs, or any GPT-2; --policy_path may be left out.", "path": "read"},
    )
    ref_name: str | None = opt(None, "Base GPT-2 to compare with (default: that of each policy's run).", path="read")
    prompt: str | None = opt(None, "What to continue (default: every line that is typed or piped in).")
    n: int = opt(1, "Responses per prompt and model.")
    temperature: float | None = opt(None, "Sampling temperature (default: the run's).", heading="How it samples")
    top_k: int | None = opt(None, "Sample among the k likeliest tokens only (default: the run's).")
    top_p: float | None = opt(None, "Sample among the likeliest tokens of this probability (default: the run's).")
    max_new_tokens: int | None = opt(None, "Longest response, in tokens (default: the run's).")
    seed: int = opt(0, "Seed of the random numbers, which are the same for all models.")
    score: bool = opt(False, "Score the responses with the reward of the first policy's run.", heading="Scores")
    rm_name: str | None = opt(None, "Score them with this reward; a Python reward must be named.", path="read")
    reward_weights: str | None = opt(None, f"{REWARD_WEIGHTS_HELP} (default: the run's).")
    json: bool = opt(False, "Write a JSON object per response and nothing else.", heading="Where and how it runs")
    device: Literal["auto", "cpu", "cuda", "mps"] = opt("auto", "auto takes cuda, else mps (Apple), else cpu.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "Precision of matrix products.")


@dataclass(frozen=True)
class Response:
    """One response: kl is its exact KL to base in nats, tokens are its pieces with theirs; score is None if unscored.

    ended says that the model ended it, before max_new_tokens.
    """

    prompt: str
    model: str
    response: str
    kl: float
    score: float | None
    ended: bool
    tokens: list[tuple[str, float]]


def main(argv: Sequence[str] | None = None) -> None:
    """Sample a response of every model to each prompt (raises UserError)."""
    cfg = parse_flags(SampleConfig, argv, __doc__, first="policy_path")
    if cfg.n < 1:
        raise UserError(f"n={cfg.n} must be at least 1")
    quiet_libraries()
    with redirect_stdout(sys.stderr) if cfg.json else nullcontext():  # notes must not get among the objects
        models = load(cfg)
    asks = cfg.prompt is None and sys.stdin.isatty()
    shaded = can_shade(sys.stdout)
    if shaded and not cfg.json:
        print(shade_scale(), end="\n\n")
    for draw, prompt in enumerate(prompts(cfg.prompt)):
        try:
            rows = models.respond(prompt, draw)
        except UserError as error:
            if not asks:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        if cfg.json:
            print("\n".join(json.dumps(asdict(one)) for row in rows for one in row), flush=True)
        else:
            width = shutil.get_terminal_size((100, 24)).columns
            print(shown(rows, models.label, width, shaded), flush=True)


def prompts(prompt: str | None) -> Iterator[str]:
    """The prompt of the command line, else the lines of the standard input until it ends; empty ones are left out."""
    if prompt is not None:
        yield prompt
    elif not sys.stdin.isatty():
        yield from piped_lines()
    else:
        with suppress(ImportError):
            import readline  # noqa: F401 (input then has a history; not on every system)
        print("a prompt and Enter; Ctrl-D ends", file=sys.stderr)
        while True:
            try:
                line = input("> " if sys.stdout.isatty() else "")
            except (EOFError, KeyboardInterrupt) as end:
                print(file=sys.stderr)
                if isinstance(end, EOFError):
                    return
                raise
            if line.strip():
                yield line


def piped_lines() -> Iterator[str]:
    """The lines of the standard input that hold text, without a byte-order mark (raises UserError)."""
    try:
        for number, line in enumerate(sys.stdin):
            text = line.rstrip("\r\n").removeprefix("" if number else "\N{BYTE ORDER MARK}")
            if text.strip():
                yield text
    except UnicodeDecodeError:
        raise UserError("the prompts of the standard input are not UTF-8: save them as UTF-8") from None


# --- the models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A policy with its tokenizer, and the base that it is measured against; a base's base is itself."""

    name: str
    lm: GPT2WithValueHead
    base: GPT2WithValueHead
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSet:
    """Bases and policies that respond to the same prompts, and how they decode; a reward if they are scored."""

    models: list[Model]
    run: TrainConfig
    reward: Reward | None
    n: int
    seed: int

    @property
    def label(self) -> str | None:
        """The label whose probability is scored, if any."""
        return None if self.reward is None else self.reward.label

    def respond(self, prompt: str, draw: int) -> list[list[Response]]:
        """n rows of one response per model; the draw-th prompt has random numbers of its own (raises UserError)."""
        if any("\ud800" <= char <= "\udfff" for char in prompt):  # what Python makes of bytes that are no UTF-8
            raise UserError(f"prompt={prompt!a} is not UTF-8: save it as UTF-8")
        with enough_memory("n or max_new_tokens"):
            columns = [self._respond(model, prompt, draw) for model in self.models]
        return [list(row) for row in zip(*columns, strict=True)]

    def _respond(self, model: Model, prompt: str, draw: int) -> list[Response]:
        run, tokenizer = self.run, model.tokenizer
        ids = self._tokens(model, prompt)
        noise = uniforms(self.seed, draw, self.n, run.max_new_tokens)
        seqs = sample_responses(
            model.lm,
            *pad_left([ids] * self.n),
            noise,
            eos_id=int(tokenizer.eos_token_id),
            temperature=run.temperature,
            top_k=run.top_k,
            top_p=run.top_p,
        )
        kl = torch.zeros_like(seqs.logprobs) if model.lm is model.base else token_kl(model.lm, model.base, seqs)
        columns = (seqs.texts(tokenizer), self._scores(seqs, tokenizer), seqs.token_lists[1], real_rows(kl, seqs))
        return [
            Response(
                prompt=prompt,
                model=model.name,
                response=text,
                kl=round(sum(kls), 4),
                score=score,
                ended=tokens[-1] == tokenizer.eos_token_id,
                tokens=list(zip(pieces(tokenizer, tokens), (round(x, 4) for x in kls), strict=True)),
            )
            for text, score, tokens, kls in zip(*columns, strict=True)
        ]

    def _tokens(self, model: Model, prompt: str) -> list[int]:
        """The tokens of a prompt, which with max_new_tokens must fit into the context (raises UserError)."""
        ids: list[int] = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        context = min(lm.lm.config.n_positions for lm in (model.lm, model.base))
        if not ids:
            raise UserError("prompt is empty: give it a few words")
        if len(ids) + self.run.max_new_tokens > context:
            raise UserError(
                f"prompt has {len(ids)} tokens, which with max_new_tokens={self.run.max_new_tokens} is more than the "
                f"context of {context}: shorten it, or lower max_new_tokens"
            )
        return ids

    def _scores(self, seqs: Sequences, tokenizer: PreTrainedTokenizerBase) -> list[float] | list[None]:
        if self.reward is None:
            return [None] * self.n
        texts = seqs.texts(tokenizer, self.run.reward_on_prompt)
        context = Context(seqs.token_lists[1])
        return score_responses(
            self.reward, texts, seqs.prompt_texts(tokenizer), self.run.rm_name, context
        ).total.tolist()


def load(cfg: SampleConfig) -> ModelSet:
    """Load the policies, each base once, and the reward if scores are wanted (raises UserError)."""
    scored = cfg.score or cfg.rm_name is not None
    policies: list[Model] = []
    bases: dict[tuple[str, str | None], Model] = {}  # by name and revision
    first: TrainConfig | None = None  # its settings are those of all
    for path in dict.fromkeys(cfg.policy_path):
        # 1. the settings of its run
        policy_path = policy_folder(path)
        evaluation = eval_config(cfg, policy_path=policy_path)
        run = settings_of_run(evaluation, with_reward=scored and first is None)
        first = first or run
        # 2. the policy, and its base unless another policy has the same
        lm, tokenizer = load_policy(run, policy_path)
        key = (str(run.ref_name), run.ref_revision)
        if key not in bases:
            base = load_base(run)
            bases[key] = Model(BASE, base, base, tokenizer)
        check_same_tokens(run, tokenizer, policy_path)
        check_fit(lm, bases[key].lm, tokenizer, run.max_new_tokens + 1)
        policies.append(Model(path, lm, bases[key].lm, tokenizer))
    assert first is not None
    if len(bases) > 1:
        bases = {key: replace(model, name=f"{BASE} {key[0]}") for key, model in bases.items()}
    reward = load_run_reward(first) if scored else None
    if reward is not None:
        choose_columns(reward, [])  # prompts that are typed have none
    return ModelSet([*bases.values(), *policies], first, reward, cfg.n, cfg.seed)


# --- what is shown --------------------------------------------------------------------------------------------------


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """The text of each token; that of a character which several tokens spell is with the last of them."""
    texts: list[str] = []
    pending: list[int] = []
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < 4:
            texts.append("")
        else:
            texts.append(text)
            pending = []
    return texts


def shade_scale() -> str:
    """What the shades of `shown` mean."""
    scale = [paint([(char, least) for char in f" {least:g} "], True) for least, _ in SHADES]
    return " ".join(["KL of each token to base, from so many nats on:", *scale])


def shown(rows: list[list[Response]], label: str | None, width: int, shaded: bool) -> str:
    """A prompt and its responses, side by side in `width` characters, each token shaded by its KL if `shaded`."""
    blocks = [paint(cells([(rows[0][0].prompt, 0.0)]), False)]
    for row in rows:
        blocks.append(side_by_side([(heading(one, label), cells(one.tokens)) for one in row], width, shaded))
    return "\n\n".join(blocks) + "\n"


def heading(one: Response, label: str | None) -> str:
    """The model, its KL and its score."""
    words = []
    if not one.model.startswith(BASE):
        words.append(f"{one.kl:.2f} nats")
    if one.score is not None:
        words.append(show_score(one.score, label))
    return f"[{', '.join([*words, one.model])}]"


if __name__ == "__main__":
    sys.exit(run(main))
