"""What an evaluation is run with: the settings of the run that made the policy, and the flags of eval.py."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from config import PRESETS, EvalConfig, TrainConfig, UserError, reward_names, runs_python

from reward import part_names
from runtime.device import resolve_device, resolve_dtype
from runtime.saved_run import SavedRun
from training.parts import absolute_reward

OF_RUN = {f.name for f in fields(TrainConfig)} - {"split"}  # prompts come from another split than in training
RUN_SETTINGS = sorted(f.name for f in fields(EvalConfig) if f.default is None and f.name in OF_RUN)
BELONGS_TO = {"rm_revision": "rm_name", "dataset_revision": "dataset", "dataset_config": "dataset"}


def eval_config(flags: object, **settings: Any) -> EvalConfig:
    """The settings of eval.py that a tool's flags of the same names ask for."""
    same = {f.name: getattr(flags, f.name) for f in fields(EvalConfig) if hasattr(flags, f.name)}
    return EvalConfig(**{**same, **settings})


def settings_of_run(cfg: EvalConfig, with_reward: bool = True) -> TrainConfig:
    """The settings of the run that made the policy, else those of the preset, with the flags of eval.py in their place.

    Raises UserError where only the run names a Python reward, unless no reward is needed.
    """
    # 1. what the policy was trained with
    if cfg.policy_path == EvalConfig.policy_path and not Path(cfg.policy_path).exists():
        raise UserError(f"policy_path={cfg.policy_path} does not exist yet: run python train.py, or name a policy")
    home = SavedRun.of_policy(cfg.policy_path)
    if home is None:
        run = PRESETS[TrainConfig][cfg.preset]
        if not cfg.policy_path.startswith("tiny:"):
            defaults = "train.py's defaults" if cfg.preset == "default" else f"the settings of --preset {cfg.preset}"
            print(f"note: {cfg.policy_path} is not part of a run, so {defaults} apply where no flag is given")
    else:
        try:
            run = TrainConfig(**home.settings)
        except UserError as error:
            raise UserError(f"{home.config_json} is damaged ({error}): fix it, or move the policy elsewhere") from None
        if with_reward and runs_python(run.rm_name) and cfg.rm_name is None:
            raise UserError(home.refuse_code())
    # 2. what flags say instead
    flags = {name: getattr(cfg, name) for name in RUN_SETTINGS if getattr(cfg, name) is not None}
    for setting, owner in BELONGS_TO.items():
        named = flags.get(owner, getattr(run, owner))
        if named != getattr(run, owner) and not (owner == "rm_name" and absolute_reward(named) == run.rm_name):
            flags.setdefault(setting, None)  # the run's is that of another model or data set
    if "reward_weights" not in flags:
        flags["reward_weights"] = weights_of_run(run, flags.get("rm_name", run.rm_name))
    flags.setdefault("ref_name", run.policy_name if run.ref_name is None else run.ref_name)
    # 3. where it runs
    device = resolve_device(cfg.device)
    flags["normalize_parts"] = False  # it is how a score is paid: scores are compared as they are
    return replace(run, **flags, device=device, dtype=resolve_dtype(cfg.dtype, device))


def weights_of_run(run: TrainConfig, rm_name: str) -> str | None:
    """The run's reward_weights for the rewards that are named now, wherever they are kept and in whatever order.

    None where one other reward is named; UserError where several are that the run's weights do not fit.
    """
    if run.reward_weights is None:
        return None
    names = part_names(reward_names(run.rm_name))
    named = part_names(reward_names(rm_name))
    if sorted(named) != sorted(names):
        if len(named) == 1:
            return None
        raise UserError(
            f"rm_name={rm_name} names other rewards than the run, whose reward_weights={run.reward_weights} were for "
            f"{', '.join(names)}: give --reward_weights"
        )
    weights = run.reward_weights.split(",")
    if named == names or "=" in run.reward_weights or len(weights) != len(names):  # which the reward itself refuses
        return run.reward_weights
    weight_of = dict(zip(names, weights, strict=True))
    return ",".join(weight_of[name] for name in named)
