"""Every setting of training and evaluation, its help, its allowed range, and the presets.

Edit the defaults here, or pass a flag of the same name: `python train.py --lr 1e-5`. Nothing else in the
project names a flag. This file needs no torch.
"""

import copy
import json
import math
import os
import re
import sys
import typing
from argparse import SUPPRESS, Action, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from transformers.hf_argparser import HfArgumentParser, string_to_bool

# Threads that wait should sleep: where another program wants the cores too, spinning makes torch several times slower.
# torch reads this once, when it is imported; pyproject.toml makes the linter put imports from this file before it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if sys.version_info < (3, 10):  # noqa: UP036 (before a newer function is missing in the middle of a run)
    raise SystemExit("error: this needs Python 3.10 or newer")

T = TypeVar("T")


class UserError(Exception):
    """Wrong input, in one line that names the setting or file and the remedy; the program ends with exit code 2."""


PathUse = Literal["", "read", "written"]


# Help of settings that training, evaluation and tools have in common
DATASET_CONFIG_HELP = "Configuration of the data set, where it has several."
LABEL_NAMES_HELP = (
    "What numbered labels mean: 0=neutral,1=positive,-1=negative; -1= means no label (default: as noted)."
)


def opt(default: T, help: str, heading: str = "", path: PathUse = "") -> T:
    """A dataclass field whose help text is also that of its flag; a heading starts a new group in --help.

    path says what is done with the file or folder that the setting names, if it may name one.
    """
    return typing.cast(T, field(default=default, metadata={"help": help, "heading": heading, "path": path}))


LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes, on nearly all systems
LONGER_NAMES = 32  # bytes that the names of temporary files and of tables beside each other add

# The range of a number: the words for the error message, and the test. NaN fails every one of them.
Range = tuple[str, Callable[[float], bool]]
AT_LEAST_0: Range = ("at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1: Range = ("at least 1", lambda x: 1 <= x < math.inf)
AT_LEAST_2: Range = ("at least 2, for an interval", lambda x: 2 <= x < math.inf)
POSITIVE: Range = ("more than 0", lambda x: 0 < x < math.inf)
UNIT: Range = ("between 0 and 1", lambda x: 0 <= x <= 1)
UNIT_OPEN: Range = ("more than 0 and at most 1", lambda x: 0 < x <= 1)

RANGES: dict[str, Range] = {
    "seed": ("between 0 and 4294967295", lambda x: 0 <= x < 2**32),
    "total_steps": AT_LEAST_1,
    "batch_size": AT_LEAST_1,
    "ppo_epochs": AT_LEAST_1,
    "minibatch_size": AT_LEAST_1,
    "micro_batch_size": AT_LEAST_0,
    "max_prompt_len": AT_LEAST_1,
    "min_prompt_len": AT_LEAST_1,
    "max_new_tokens": AT_LEAST_1,
    "temperature": POSITIVE,
    "top_k": AT_LEAST_0,
    "top_p": UNIT_OPEN,
    "lr": AT_LEAST_0,
    "warmup_steps": AT_LEAST_0,
    "kl_coef": AT_LEAST_0,
    "adaptive_kl_target": POSITIVE,
    "adaptive_kl_gain": POSITIVE,
    "gamma": UNIT,
    "gae_lambda": UNIT,
    "clip_range": POSITIVE,
    "value_clip_range": POSITIVE,
    "value_coef": AT_LEAST_0,
    "ent_coef": AT_LEAST_0,
    "max_grad_norm": POSITIVE,
    "target_kl": POSITIVE,
    "save_every": AT_LEAST_1,
    "sample_every": AT_LEAST_1,
    "reward_every": AT_LEAST_0,
    "reward_batch_size": AT_LEAST_1,
    "n_samples": AT_LEAST_2,
    "frontier": AT_LEAST_0,
    "eval_every": AT_LEAST_0,
    "eval_prompts": AT_LEAST_1,
    "keep_last": AT_LEAST_1,
    "kl_budget": POSITIVE,
}
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `python train.py`, which tunes GPT-2 by PPO towards a reward; the defaults are in config.py."""

    preset: str = opt(
        "default", "Named set of values to start from: default; tiny (offline, minutes); original, trl, rl4lms."
    )

    policy_name: str = opt(
        "gpt2", "GPT-2 to fine-tune: a hub name or a folder.", "What is trained, on what", path="read"
    )
    ref_name: str | None = opt(None, "Frozen GPT-2 that anchors the policy (default: policy_name).", path="read")
    rm_name: str = opt(
        "lvwerra/distilbert-imdb",
        "Reward: a sequence classifier (hub name or folder), or Python, file.py:function (docs/rewards.md).",
        path="read",
    )
    policy_revision: str | None = opt(None, "Commit, branch or tag of policy_name on the hub.")
    rm_revision: str | None = opt(None, "Commit, branch or tag of rm_name on the hub.")
    dataset_revision: str | None = opt(None, "Commit, branch or tag of dataset on the hub.")
    target_label: str = opt("positive", "Label of the reward model to steer towards; its score is 2 P(label) - 1.")
    reward_on_prompt: bool = opt(False, "Score prompt + response instead of the response alone.")
    standardize_scores: bool | None = opt(
        None,
        "Pay (score - mean) / deviation, as measured on the base's own responses (default: true unless the score is a "
        "label's probability, which is between -1 and 1 already).",
    )
    # Scoring the unfinished response shows which tokens earned the score. Scored after every token, and with lambda
    # 0.5, a batch's gradient has 13 times the signal to noise of a score paid at the end (results/gradients.csv)
    reward_every: int = opt(
        1,
        "Tokens between scores of the unfinished response; each token is credited with the change it made. Larger is "
        "cheaper and noisier and needs a higher gae_lambda: 4 with 0.8; 0 (all at the end) with 1.",
    )
    dataset: str = opt(
        "stanfordnlp/imdb",
        "Prompts: a hub name, a folder, or a .csv .tsv .json .jsonl .parquet .txt file, packed (.gz .zip) or not.",
        path="read",
    )
    dataset_config: str | None = opt(None, DATASET_CONFIG_HELP)
    split: str = opt("train", "Split of the data set (a file has no splits and is used whole).")
    text_column: str = opt("text", "Column that holds the text.")

    ckpt_dir: str = opt(
        "ckpts", "Folder for everything that the run leaves behind.", "Where and how it runs", path="written"
    )
    overwrite: bool = opt(False, "Replace a run in ckpt_dir.")
    resume: str | None = opt(
        None,
        "Resume the run in ckpt_dir (--resume alone), in another run folder, or from one of its checkpoints.",
        path="read",
    )
    allow_changes: bool = opt(False, "Resume with changed settings even where that changes the result.")
    check: bool = opt(False, "Check the facts that PPO relies on, on the real models, and train nothing.")
    seed: int = opt(0, "Every random choice is a function of this seed and the step.")
    device: Literal["auto", "cpu", "cuda", "mps"] = opt("auto", "auto takes cuda, else mps (Apple), else cpu.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt(
        "auto", "Precision of matrix products; auto takes bfloat16 or float16 where the hardware is fast at them."
    )

    total_steps: int = opt(200, "PPO steps; each samples one response to batch_size prompts.", "Size of the run")
    batch_size: int = opt(64, "Prompts per step.")
    ppo_epochs: int = opt(2, "Passes over each step's responses.")
    minibatch_size: int = opt(16, "Responses per optimiser step; divides batch_size.")
    micro_batch_size: int = opt(
        0, "Responses per forward and backward pass (0: as many as fit into memory); changes no result."
    )
    reward_batch_size: int = opt(64, "Texts per forward pass of the reward model.")
    max_prompt_len: int = opt(128, "Tokens kept of each review as its prompt.")
    min_prompt_len: int = opt(8, "Reviews with fewer tokens than this are left out.")
    max_new_tokens: int = opt(64, "Longest response, in tokens.")

    temperature: float = opt(1.0, "Divides the logits, in sampling and scoring alike.", "What is sampled from")
    top_k: int = opt(0, "Sample among the k likeliest tokens only (0: all).")
    top_p: float = opt(1.0, "Sample among the likeliest tokens that hold this much probability (1: all).")

    # In 40 steps on real reviews (64 + 48 tokens) these give +0.66 at 2.2 nats, sd 0.03 over 10 seeds
    # (results/study_imdb.csv). With lr 2e-5 one run ended at +0.63 and 1.9 nats; with 5e-5 it ended at +0.68 and 2.4
    # (results/tried.csv)
    lr: float = opt(5e-5, "AdamW step size.", "PPO")
    lr_schedule: Literal["linear", "constant"] = opt("linear", "linear falls evenly towards 0 over total_steps.")
    warmup_steps: int = opt(0, "Steps over which the step size rises from 0.")
    kl_coef: float = opt(0.08, "beta: price of one nat of log-probability ratio to the reference.", "KL")
    kl_in_loss: bool = opt(False, "Exact KL in the loss, not in the rewards: long runs keep the length of responses.")
    adaptive_kl_target: float | None = opt(None, "Steer beta to this KL to the reference, nats per response.")
    adaptive_kl_gain: float = opt(0.1, "Change of beta in a step, per relative error of the KL (0.2 counts at most).")
    gamma: float = opt(1.0, "Discount per token.", "PPO")
    # Without reward_every this should be 1. Below 1 the final score reaches early tokens only through a critic that
    # is still untrained, and the policy learns to stop early: 25 tokens at 0.95, 38 at 1 (results/lambda.csv)
    gae_lambda: float = opt(0.5, "GAE's lambda; 1 gives every token the full return. Set it to 1 with reward_every 0.")
    clip_range: float = opt(0.2, "PPO's epsilon: the ratio is clipped to 1 +- this.")
    value_clip_range: float = opt(0.2, "A value may move this far from the acting critic's.")
    value_coef: float = opt(0.1, "Weight of the value loss.")
    ent_coef: float = opt(0.0, "Weight of the entropy bonus.")
    max_grad_norm: float = opt(1.0, "Gradients are scaled down to this norm.")
    target_kl: float | None = opt(None, "Stop a step's epochs once approx_kl passes this, nats per token.")

    save_every: int = opt(50, "Steps between checkpoints, from which --resume continues.", "What is saved and reported")
    keep_last: int = opt(2, "Checkpoints kept for --resume; more than one guards against a damaged disk.")
    sample_every: int = opt(10, "Steps between rows of samples.csv, one of them printed, and pictures.")
    eval_every: int = opt(20, "Steps between evaluations on held-out prompts (0: none).")
    eval_prompts: int = opt(64, "Held-out prompts for these evaluations.")
    kl_budget: float | None = opt(
        None, "best/ holds the policy with the highest mean score within this KL, nats per response."
    )
    report_to: str = opt(
        "none", "Where to send metrics.csv as well: none, tensorboard, wandb, or several with commas between them."
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.minibatch_size > self.batch_size or self.batch_size % self.minibatch_size:
            raise UserError(
                f"minibatch_size={self.minibatch_size} must divide batch_size={self.batch_size}: change one of them"
            )
        if self.micro_batch_size > self.minibatch_size:
            raise UserError(
                f"micro_batch_size={self.micro_batch_size} is larger than minibatch_size={self.minibatch_size}: "
                "lower it, or 0 for a whole minibatch"
            )
        if self.warmup_steps >= self.total_steps and self.warmup_steps:
            raise UserError(
                f"warmup_steps={self.warmup_steps} must be less than total_steps={self.total_steps}: lower it"
            )
        if self.gamma < 1 and self.reward_every:
            raise UserError(
                f"gamma={self.gamma} with reward_every={self.reward_every} would favour scores that come early: take "
                "reward_every=0, or gamma=1"
            )
        if self.adaptive_kl_target is None and self.adaptive_kl_gain != TrainConfig.adaptive_kl_gain:
            raise UserError(
                f"adaptive_kl_gain={self.adaptive_kl_gain} steers nothing without adaptive_kl_target: set that, too"
            )
        check_prompt_lengths(self.min_prompt_len, self.max_prompt_len)
        for name in self.trackers:
            if name not in TRACKERS:
                raise UserError(
                    f"report_to={self.report_to!r} is unknown: choose none, or {' or '.join(TRACKERS)}, or both "
                    "with a comma between them"
                )

    @property
    def trackers(self) -> list[str]:
        """The experiment trackers that report_to names."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [] if names == ["none"] else list(dict.fromkeys(names))

    @property
    def ref_revision(self) -> str | None:
        """The reference's revision: the policy's where it is the same model."""
        return self.policy_revision if self.ref_name in (None, self.policy_name) else None


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `python eval.py`; unset ones are taken from the run that made the policy."""

    preset: str = opt("default", "default or tiny: train.py's settings for a policy that is in no run.")
    policy_path: str = opt(
        "ckpts/policy_lm", "Tuned policy: the folder of a run, or any GPT-2.", "What is compared, on what", path="read"
    )
    ref_name: str | None = opt(None, "Base GPT-2 to compare with (default: the run's).", path="read")
    rm_name: str | None = opt(None, "Reward (default: the run's, but a Python reward must be named here).", path="read")
    target_label: str | None = opt(None, "Label to score (default: the run's).")
    reward_on_prompt: bool | None = opt(None, "true or false: score prompt + response (default: the run's).")
    dataset: str | None = opt(None, "Prompts (default: the run's).", path="read")
    dataset_config: str | None = opt(None, f"{DATASET_CONFIG_HELP[:-1]} (default: the run's).")
    split: str | None = opt(
        None, "Split of the data set (default: test, else validation, else the run's; a file is used whole)."
    )
    text_column: str | None = opt(None, "Column that holds the text (default: the run's).")
    label_column: str = opt("label", "Column of labels to fit the second judge on, if the data set has one.")
    label_names: str | None = opt(None, LABEL_NAMES_HELP)
    judge: str = opt(
        "labels",
        "Second judge: labels (fitted on those of the training split), none, or any classifier.",
        "How it is measured",
        path="read",
    )
    frontier: int = opt(0, "Base responses per prompt, for the best possible reward at each KL (0: none; 64 is good).")
    n_samples: int = opt(500, "Prompts to compare on.")
    batch_size: int = opt(100, "Prompts per forward pass.")
    max_prompt_len: int | None = opt(
        None, "Tokens kept of each review as its prompt (default: the run's).", "Lengths and sampling"
    )
    min_prompt_len: int | None = opt(None, "Reviews with fewer tokens are left out (default: the run's).")
    max_new_tokens: int | None = opt(None, "Longest response, in tokens (default: the run's).")
    temperature: float | None = opt(None, "Sampling temperature (default: the run's).")
    top_k: int | None = opt(None, "Sample among the k likeliest tokens only (default: the run's).")
    top_p: float | None = opt(None, "Sample among the likeliest tokens of this probability (default: the run's).")
    seed: int = opt(1234, "Seed of the prompts drawn and of both models' sampling.", "Where and how it runs")
    device: Literal["auto", "cpu", "cuda", "mps"] = opt("auto", "auto takes cuda, else mps (Apple), else cpu.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "Precision of matrix products.")
    out_csv: str | None = opt(
        None,
        "One row per prompt (default: eval_results.csv in the policy's run folder, or here if it is in none); "
        "eval_summary.json and eval_report.html, named after it, are written beside it.",
        path="written",
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.frontier == 1:
            raise UserError("frontier=1 draws nothing to choose from: take 0, or 2 and more")
        if self.min_prompt_len is not None and self.max_prompt_len is not None:
            check_prompt_lengths(self.min_prompt_len, self.max_prompt_len)


def python_reward(name: str) -> tuple[str, str] | None:
    """Place and function of a Python reward, `rewards.py:brevity` or `package.module:brevity`; None for other names."""
    place, _, function = name.rpartition(":")
    is_place = place.endswith(".py") or all(part.isidentifier() for part in place.split("."))
    return (place, function) if is_place and function.isidentifier() and not name.startswith("tiny:") else None


def check_prompt_lengths(min_prompt_len: int, max_prompt_len: int) -> None:
    """Refuse a shortest prompt that is longer than the longest."""
    if min_prompt_len > max_prompt_len:
        raise UserError(f"min_prompt_len={min_prompt_len} is larger than max_prompt_len={max_prompt_len}: lower it")


def check_values(cfg: TrainConfig | EvalConfig) -> None:
    """Refuse the first value that has the wrong type or lies outside its range."""
    for name, hint in typing.get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        _check_type(name, value, hint)
        if name in RANGES and value is not None and not RANGES[name][1](value):
            raise UserError(f"{name}={value} must be {RANGES[name][0]}")
        if isinstance(value, str) and not value:
            raise UserError(f"{name} is empty: give it a value or leave it out")
    for setting in fields(cfg):
        value, use = getattr(cfg, setting.name), setting.metadata["path"]
        if value is not None and use:
            check_path(setting.name, value, use)
    if cfg.preset not in PRESETS.get(type(cfg), {cfg.preset: cfg}):
        raise UserError(f"preset={cfg.preset!r} is unknown: choose {' or '.join(PRESETS[type(cfg)])}")


def check_path(setting: str, path: str, use: PathUse) -> None:
    """Refuse a path that the system cannot store, or that run folders and tables, which are UTF-8, cannot hold."""
    try:
        encoded = [os.fsencode(part) for part in Path(path).parts]
        path.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{setting}={path!r} has letters that this system cannot encode: rename it") from None
    if "\0" in path:
        raise UserError(f"{setting}={path!r} has a character NUL in it: leave it out")
    more = LONGER_NAMES if use == "written" else 0
    *folders, name = encoded or [b""]
    if max(map(len, (*folders, name + b"." * more))) > LONGEST_NAME:
        raise UserError(f"{setting} has a name of more than {LONGEST_NAME - more} bytes, {path[:40]}…: shorten it")
    if len(os.fsencode(os.path.abspath(path))) + 4 * more > LONGEST_PATH:
        raise UserError(f"{setting} is longer than {LONGEST_PATH - 4 * more} bytes, {path[:40]}…: shorten it")


def whole_path(setting: str, path: str, use: PathUse) -> str:
    """A path with the home folder in the place of its ~, which shells leave in `--setting=~/x` (raises UserError)."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise UserError(f"{setting}={path} begins with ~, but there is no such user: write the path out, or ./{path}")
    check_path(setting, expanded, use)
    return expanded


def _check_type(name: str, value: object, hint: Any) -> None:
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise UserError(f"{name}={value!r} is unknown: choose {', '.join(typing.get_args(hint))}")
        return
    kinds = typing.get_args(hint) or (hint,)
    number_fits = float in kinds and isinstance(value, int) and not isinstance(value, bool)
    if type(value) not in kinds and not number_fits:
        wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise UserError(f"{name}={value!r} must be of type {wanted}")


PRESETS: dict[type, dict[str, Any]] = {}
PRESETS[TrainConfig] = {
    "default": TrainConfig(),
    # The score is paid on the last token, as in the formula; in so small a world that reaches +0.96 of at most +1
    "tiny": TrainConfig(
        preset="tiny",
        policy_name="tiny:policy",
        rm_name="tiny:reward",
        dataset="tiny:reviews",
        device="cpu",
        max_prompt_len=10,
        min_prompt_len=10,
        max_new_tokens=60,
        total_steps=50,
        ppo_epochs=2,
        lr=1e-4,
        kl_coef=0.06,
        reward_every=0,
        gae_lambda=1.0,
        save_every=25,
        sample_every=10,
        eval_every=10,
        eval_prompts=128,
    ),
    # Published set-ups as closely as this method allows: see "Against published figures" in docs/results.md.
    # They pay on the last token with lambda 0.95, against which the comment at gae_lambda warns. TRL steers beta with
    # batch / horizon = 128 / 10,000, and RL4LMs with 0.1
    "original": TrainConfig(
        preset="original",
        top_k=50,
        top_p=0.9,
        total_steps=10,
        ppo_epochs=4,
        lr=5e-6,
        lr_schedule="constant",
        kl_coef=1.0,
        ent_coef=0.02,
        reward_every=0,
        gae_lambda=0.95,
    ),
    "trl": TrainConfig(
        preset="trl",
        policy_name="lvwerra/gpt2-imdb",
        min_prompt_len=2,
        max_prompt_len=8,
        max_new_tokens=16,
        total_steps=194,
        batch_size=128,
        ppo_epochs=4,
        lr=1.41e-5,
        lr_schedule="constant",
        kl_coef=0.2,
        adaptive_kl_target=6.0,
        adaptive_kl_gain=0.0128,
        reward_every=0,
        gae_lambda=0.95,
    ),
    "rl4lms": TrainConfig(
        preset="rl4lms",
        policy_name="lvwerra/gpt2-imdb",
        reward_on_prompt=True,
        max_prompt_len=64,
        max_new_tokens=48,
        total_steps=50,
        batch_size=28,
        minibatch_size=14,
        ppo_epochs=5,
        lr=1e-6,
        lr_schedule="constant",
        kl_coef=0.1,
        adaptive_kl_target=4.8,
        gamma=0.99,
        reward_every=0,
        gae_lambda=0.95,
    ),
}
FIRST = {  # in --help
    TrainConfig: ("preset", "policy_name", "rm_name", "dataset", "ckpt_dir", "resume", "total_steps", "lr", "kl_coef"),
    EvalConfig: ("preset", "policy_path", "rm_name", "dataset", "frontier", "n_samples", "out_csv"),
}
PRESETS[EvalConfig] = {"default": EvalConfig(), "tiny": EvalConfig(preset="tiny", device="cpu")}


# A Python reward judges finished texts: scores of unfinished ones would mean little, and be up to 63 more texts per
# response. It is paid on the last token, with settings that are good for that, unless --reward_every is given
PAID_AT_END: dict[str, Any] = {"reward_every": 0, "gae_lambda": 1.0}


class HelpFormatter(RawDescriptionHelpFormatter):
    """Help with defaults and one spelling of each flag."""

    def _format_action_invocation(self, action: Action) -> str:
        one = copy.copy(action)
        one.option_strings = [flag for flag in action.option_strings if "_" in flag] or action.option_strings
        return super()._format_action_invocation(one)

    def _get_help_string(self, action: Action) -> str | None:
        default = " ".join(action.default) if isinstance(action.default, list) else action.default
        return action.help if default in (None, "", SUPPRESS) else f"{action.help} (default: {default})"


class OneLineParser(HfArgumentParser):
    """A parser of command lines whose errors are UserErrors; its help has headings, and the flags in `first` on top."""

    def __init__(self, cls: type, about: str | None, first: Sequence[str] = (), words: str = "") -> None:
        """Flags for the fields of a dataclass; `words` names the one that takes the words before the first flag."""
        self.first, self.heading, self.groups = first, "Settings", dict[str, Any]()
        self.paths: dict[str, PathUse] = {}
        script = Path(sys.argv[0])
        room = script.parent.name
        name = f"-m {room}.{script.stem}" if room in ("tools", "experiments") else script.name
        usage = f"python {name} {f'[{words} ...] ' if words else ''}[--setting value ...]"
        super().__init__(cls, allow_abbrev=False, description=about, usage=usage, formatter_class=HelpFormatter)
        self._negative_number_matcher = re.compile(r"-\d.*")  # --label_names -1=bad,1=good: a value and no flag

    def add_argument(self, *flags: str, heading: str = "", path: PathUse = "", **about: Any) -> Action:
        """Add a flag under its heading, or under that of the flag before."""
        if path:
            self.paths[flags[0].removeprefix("--")] = path
        if flags[0] == "-h":
            return ArgumentParser.add_argument(self, *flags, **about)
        if heading:
            self.heading = heading
        title = "What matters first" if flags[0].removeprefix("--") in self.first else self.heading
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        if "type" in about and not about.get("choices"):
            kinds = {str: "TEXT", int: "N", float: "X", string_to_bool: "true|false"}
            about["metavar"] = kinds.get(about["type"], "VALUE")
        added: Action = self.groups[title].add_argument(*flags, **about)
        return added

    def parse_args(self, *given: Any) -> Any:
        """Read a command line, with ~ expanded in every path (raises UserError, also where no path can be such)."""
        settings = super().parse_args(*given)
        for name, use in self.paths.items():
            value = getattr(settings, name)
            if isinstance(value, list):
                setattr(settings, name, [whole_path(name, path, use) for path in value])
            elif value:
                setattr(settings, name, whole_path(name, value, use))
        return settings

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UserError(f"{message.removeprefix('argument ')} (see --help)")


Config = TypeVar("Config", TrainConfig, EvalConfig)


def parse_config(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Command line -> settings: the preset's values first, then every flag given (raises UserError)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    preset_parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    preset_parser.add_argument("--preset", nargs="?", default="default")
    name = preset_parser.parse_known_args(argv)[0].preset or ""
    if name not in PRESETS[cls]:
        raise UserError(f"preset={name!r} is unknown: choose {' or '.join(PRESETS[cls])}")
    parser = OneLineParser(cls, cls.__doc__, FIRST[cls])
    parser.set_defaults(**asdict(PRESETS[cls][name]))
    for action in parser._actions:
        if action.dest == "resume":
            action.nargs, action.const = "?", NEWEST
    values = vars(parser.parse_args(argv))
    if cls is TrainConfig and values["reward_every"] and python_reward(values["rm_name"]):
        parser.set_defaults(**PAID_AT_END)
        at_end = vars(parser.parse_args(argv))
        values = values if at_end["reward_every"] else at_end
    if values.get("resume"):
        values = _with_saved_settings(cls, parser, argv, values)
    return cls(**{f.name: values[f.name] for f in fields(cls)})


def _with_saved_settings(
    cls: type[Config], parser: ArgumentParser, argv: Sequence[str], values: dict[str, Any]
) -> dict[str, Any]:
    """The settings of the run to resume, with every flag given in their place (raises UserError)."""
    path = resume_folder(values["resume"], values["ckpt_dir"]) / "config.json"
    saved = saved_settings(path)
    if not saved and values["resume"] != NEWEST:
        raise UserError(f"resume={values['resume']} is neither the folder of a run nor one of its checkpoints")
    if not saved:
        return values
    _check_saved(cls, saved, path)
    left_out = ["resume", "allow_changes", "overwrite", "check"]  # these belong to one start, not to the run
    if python_reward(saved.get("rm_name", "")):
        if values["rm_name"] == PRESETS[cls][values["preset"]].rm_name and not python_reward(values["rm_name"]):
            raise UserError(refuse_code(path, saved["rm_name"]))
        left_out.append("rm_name")
    parser.set_defaults(**{name: value for name, value in saved.items() if name not in left_out})
    return {**vars(parser.parse_args(argv)), "ckpt_dir": str(path.parent)}


NEWEST = "newest"


def resume_folder(resume: str, ckpt_dir: str) -> Path:
    """The run folder that --resume means: ckpt_dir, the folder named, or the run of the checkpoint named."""
    if resume == NEWEST:
        return Path(ckpt_dir)
    path = Path(resume)
    return path.parent.parent if (path / "state.json").is_file() else path


def saved_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's config.json; none where there is no run (raises UserError)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {f.name: found[f.name] for f in fields(TrainConfig) if "total_steps" in found and f.name in found}
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): fix it, or leave out what refers to it") from None


def refuse_code(config_json: Path, rm_name: str) -> str:
    """Why a Python reward that a run folder names is not run: such a folder may be from anyone."""
    return (
        f"rm_name={rm_name} is Python code, which is never run because {config_json} says so: read it, then name "
        f"it on the command line, --rm_name {rm_name}"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder's config.json, whole or damaged, is that of a run and not of a model, say."""
    try:
        return "total_steps" in (folder / "config.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def policy_folder(name: str) -> str:
    """The model that a name stands for: the policy_lm of a run folder or of its best/, any other name as it is."""
    try:
        return str(Path(name) / "policy_lm") if (Path(name) / "policy_lm").is_dir() else name
    except (OSError, ValueError):  # no name of a folder
        return name


def _check_saved(cls: type[Config], saved: dict[str, Any], path: Path) -> None:
    try:
        cls(**saved)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}): fix it, or start anew without --resume") from None
