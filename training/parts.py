"""Loading: settings become models, tokenizer and prompts. train.py, eval.py and the tools all load through here."""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, python_reward, reward_names

import torch
from transformers import PreTrainedTokenizerBase

from data import PromptStream, Texts, load_prompts, load_texts, select_cells, split_held_out
from model import GPT2WithValueHead, add_own_critic, load_reference
from ppo import Models
from pretrain.tiny_world import resolve_name
from reward import Classifier, LabelReward, Reward, choose_columns, full_label, load_reward, parts_of
from runtime.device import resolve_device, resolve_dtype
from runtime.fingerprints import columns_sha256, texts_sha256
from runtime.hub import load_tokenizer, require_hub
from runtime.saved_run import policy_folder
from runtime.tables import has_splits, is_file


@dataclass(frozen=True)
class Parts:
    """What a run trains and on what: the models on their device, the prompts, and the held-out ones."""

    models: Models
    prompts: PromptStream
    held_out: PromptStream  # its first step is all of them
    dataset_sha256: str = ""  # of the texts that the prompts are cut from
    columns_sha256: str = ""  # of the columns that the reward is given


def resolve(cfg: TrainConfig) -> TrainConfig:
    """Decide every `auto`, make paths absolute, and check that hub names can be reached."""
    device = resolve_device(cfg.device)
    names = {
        "policy_name": policy_folder(cfg.policy_name),
        "ref_name": policy_folder(cfg.ref_name or cfg.policy_name),
        "dataset": cfg.dataset,
    }
    absolute: dict[str, Any] = {"rm_name": absolute_reward(cfg.rm_name), **names}
    for setting, name in names.items():
        if Path(name).exists():
            absolute[setting] = str(Path(name).resolve())
    classifiers = [("rm_name", name) for name in reward_names(cfg.rm_name) if not python_reward(name)]
    for setting, name in [*names.items(), *classifiers]:
        if setting == "rm_name" and name.endswith(".py"):
            raise UserError(f"rm_name={name} names a file: say which function in it, {name}:NAME")
        if setting == "dataset" and is_file(name):
            if not Path(name).exists():
                raise UserError(f"dataset {name} does not exist: check the path given to --dataset")
        elif not name.startswith("tiny:"):
            require_hub(setting, name)
    return replace(cfg, device=device, dtype=resolve_dtype(cfg.dtype, device), **absolute)


def absolute_reward(rm_name: str) -> str:
    """The setting rm_name with absolute paths, so that it means the same in any folder."""
    rewards = []
    for name in reward_names(rm_name):
        place, function = python_reward(name) or (name, "")
        place = os.path.expanduser(place)
        if function:
            rewards.append(f"{Path(place).resolve() if place.endswith('.py') else place}:{function}")
        else:
            rewards.append(str(Path(place).resolve()) if os.path.exists(place) else name)
    return ",".join(rewards)


def load_parts(cfg: TrainConfig) -> Parts:
    """Load everything that a run needs."""
    models = load_models(cfg)
    name = resolve_name(cfg.dataset, cfg.split)
    if cfg.split != TrainConfig.split and not has_splits(name):
        print(f"note: {cfg.dataset} has no splits: it is used whole, and split={cfg.split} says nothing")
    data = load_run_texts(cfg, cfg.split, models.reward)
    prompts = load_prompts(models.tokenizer, data.texts, cfg.min_prompt_len, cfg.max_prompt_len)
    eval_prompts = cfg.eval_prompts if cfg.eval_every else 0
    train, held_out = split_held_out(prompts, eval_prompts, cfg.seed)

    def stream(rows: list[int], batch_size: int) -> PromptStream:
        return PromptStream([prompts[i] for i in rows], batch_size, cfg.seed, select_cells(data.columns, rows))

    return Parts(
        models,
        prompts=stream(train, cfg.batch_size),
        held_out=stream(held_out, len(held_out)),
        dataset_sha256=texts_sha256(data.texts),
        columns_sha256=columns_sha256(data.columns),
    )


def load_run_texts(cfg: TrainConfig, split: str, reward: Reward | None) -> Texts:
    """The texts of a split of the run's data set, and those of its columns that the reward, if any, is given."""
    return load_texts(
        resolve_name(cfg.dataset, split),
        split,
        cfg.text_column,
        (lambda _: []) if reward is None else partial(choose_columns, reward),
        cfg.dataset_revision,
        cfg.dataset_config,
    )


def load_models(cfg: TrainConfig, policy_path: str | None = None) -> Models:
    """Load policy, reference, reward and tokenizer; eval.py names a tuned policy by its path."""
    policy, tokenizer = load_policy(cfg, policy_path)
    reference = load_base(cfg)
    check_same_tokens(cfg, tokenizer, policy_path)
    check_fit(policy, reference, tokenizer, cfg.max_prompt_len + cfg.max_new_tokens)
    if cfg.critic == "own" and policy_path is None:
        add_own_critic(policy, reference)
    return Models(policy, reference, load_run_reward(cfg), tokenizer)


def load_policy(cfg: TrainConfig, policy_path: str | None = None) -> tuple[GPT2WithValueHead, PreTrainedTokenizerBase]:
    """Load the policy to start from, or a tuned one by its path, with its tokenizer."""
    setting = "policy_path" if policy_path else "policy_name"
    name = resolve_name(policy_folder(policy_path or cfg.policy_name))
    revision = None if policy_path else cfg.policy_revision
    tokenizer = load_tokenizer(setting, name, revision)
    policy = GPT2WithValueHead.from_pretrained(name, setting, getattr(torch, cfg.dtype), revision)
    return policy.to(cfg.device), tokenizer


def load_base(cfg: TrainConfig) -> GPT2WithValueHead:
    """Load the frozen reference."""
    name = resolve_name(policy_folder(cfg.ref_name or cfg.policy_name))
    return load_reference(name, dtype=getattr(torch, cfg.dtype), revision=cfg.ref_revision).to(cfg.device)


def load_run_reward(cfg: TrainConfig) -> Reward:
    """Load the reward of a run, and note settings that do not fit it."""
    reward = load_reward(
        cfg.rm_name,
        cfg.target_label,
        weights=cfg.reward_weights,
        normalize_parts=cfg.normalize_parts,
        log_odds=cfg.score_log_odds,
        device=cfg.device,
        batch_size=cfg.reward_batch_size,
        dtype=getattr(torch, cfg.dtype),
        revision=cfg.rm_revision,
        cut_left=cfg.reward_on_prompt,  # of prompt and response, keep the end
    )
    parts = parts_of(reward)
    for name, part in zip(reward_names(cfg.rm_name), parts, strict=True):
        if isinstance(part, Classifier) and part.on_prompt not in (None, cfg.reward_on_prompt):
            trained_on = "prompt + response" if part.on_prompt else "responses alone"
            print(f"note: {name} was trained on {trained_on}: --reward_on_prompt {str(part.on_prompt).lower()}")
    if not any(isinstance(part, LabelReward) for part in parts):
        unused = {
            f"target_label={cfg.target_label}": full_label(cfg.target_label) != TrainConfig.target_label,
            "score_log_odds": cfg.score_log_odds,
        }
        for setting in [setting for setting, is_set in unused.items() if is_set]:
            print(f"note: {setting} does not change the scores of {cfg.rm_name}, which has no labels")
    return reward


def check_same_tokens(cfg: TrainConfig, tokenizer: PreTrainedTokenizerBase, policy_path: str | None = None) -> None:
    """Refuse a reference in which the ids of the policy's tokenizer stand for other tokens."""
    name = cfg.ref_name or cfg.policy_name
    revision = cfg.ref_revision
    if policy_path is None and (name, revision) == (cfg.policy_name, cfg.policy_revision):
        return
    try:
        theirs = load_tokenizer("ref_name", resolve_name(policy_folder(name)), revision)
    except UserError:
        print(f"note: ref_name={name} has no tokenizer, so nothing shows whether it reads tokens as the policy does")
        return
    own = {index: token for token, index in tokenizer.get_vocab().items()}
    different = sum(own.get(index, token) != token for token, index in theirs.get_vocab().items())
    if different:
        raise UserError(
            f"ref_name={name} has another tokenizer than {policy_path or cfg.policy_name} ({different} of its "
            f"{len(theirs)} tokens differ): name the model that the policy was trained from"
        )


def check_fit(
    policy: GPT2WithValueHead, reference: GPT2WithValueHead, tokenizer: PreTrainedTokenizerBase, length: int
) -> None:
    """Refuse models that disagree on the vocabulary, or a context too short for `length` tokens."""
    vocabulary = policy.lm.config.vocab_size
    if vocabulary != reference.lm.config.vocab_size:
        raise UserError(
            f"policy and reference have different vocabularies ({vocabulary} and {reference.lm.config.vocab_size} "
            "tokens): change ref_name"
        )
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer of policy_name has no EOS token: save one that has")
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer of policy_name has {len(tokenizer)} tokens, its model only {vocabulary}: save them together"
        )
    without_text = len(set(range(vocabulary)) - set(tokenizer.get_vocab().values()))
    if without_text:
        print(
            f"note: {without_text} of the model's {vocabulary} ids have no text in its tokenizer: where one is "
            "sampled, the text of the response lacks it"
        )
    context = min(policy.lm.config.n_positions, reference.lm.config.n_positions)
    if length > context:
        raise UserError(
            f"max_prompt_len + max_new_tokens = {length} is longer than the model's context of {context}: lower one"
        )
