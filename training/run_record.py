"""What a run writes into config.json: settings, versions, machine, and fingerprints of all that it is made of."""

import subprocess
import sys
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from config import TrainConfig, python_reward, reward_names

from ppo import Models
from reward import Classifier, Reward, WeightedRewards, parts_of, score_title
from runtime.device import device_name
from runtime.distributed import torchrun_job
from runtime.fingerprints import model_sha256, texts_sha256, tokenizer_sha256
from runtime.hub import resolved_commit
from training.parts import Parts


def run_record(cfg: TrainConfig, parts: Parts) -> dict[str, Any]:
    """The contents of config.json; by the fingerprints a later start knows that nothing has changed."""
    models = parts.models
    return {
        **describe(cfg),
        "reward": describe_reward(models),
        "fingerprints": {
            "dataset": parts.dataset_sha256,
            "columns": parts.columns_sha256,
            "tokenizer": tokenizer_sha256(models.tokenizer),
            "ref_name": model_sha256(models.reference.lm),
            "rm_name": reward_sha256(models.reward),
        },
    }


def describe(cfg: TrainConfig) -> dict[str, Any]:
    """Every setting as resolved, versions, commits and machine."""
    revisions = {
        "policy_name": cfg.policy_revision,
        "ref_name": cfg.ref_revision,
        "rm_name": cfg.rm_revision,
        "dataset": cfg.dataset_revision,
    }
    return {
        **asdict(cfg),
        "job": torchrun_job(),
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "numpy", "tokenizers")},
        "python": sys.version.split()[0],
        "git_commit": git_commit(),
        "hub_commits": {
            setting: resolved_commit(setting, str(getattr(cfg, setting)), revision)
            for setting, revision in revisions.items()
            if not (setting == "rm_name" and (len(reward_names(cfg.rm_name)) > 1 or python_reward(cfg.rm_name)))
        },
        "device_name": device_name(cfg.device),
    }


def describe_reward(models: Models) -> dict[str, Any]:
    """What the scores are, in which scale they are paid, and a user's code."""
    reward = models.reward
    files = [getattr(part, "file", "") for part in parts_of(reward)]
    return {
        "scores": score_title(reward.label),
        "label": reward.label,
        "mean": models.score_scale.mean,
        "std": models.score_scale.std,
        "file": ",".join(filter(None, dict.fromkeys(files))),
        "sha256": reward_sha256(reward) if any(files) else "",
    }


def reward_sha256(reward: Reward) -> str:
    """The fingerprint of a reward: of a classifier and its tokenizer, of a user's code, or of all parts of a sum."""
    if isinstance(reward, WeightedRewards):
        shas = [reward_sha256(part) for part in parts_of(reward)]
        return shas[0] if len(shas) == 1 else texts_sha256(shas)
    if isinstance(reward, Classifier):
        return texts_sha256([model_sha256(reward.model), tokenizer_sha256(reward.tokenizer)])
    return str(getattr(reward, "sha256", ""))


GIT_SECONDS = 10  # git may wait for a disk of another machine; a run does not


@cache
def git_commit() -> str | None:
    """The commit of this code, where it is a git checkout, git is installed and answers in time."""
    command = ["git", "rev-parse", "HEAD"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            command, cwd=here, capture_output=True, encoding="utf-8", check=False, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
