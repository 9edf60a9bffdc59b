"""The commands that a program names for its user to run next: they run as they stand, in the same folder and shell."""

from pathlib import Path

from config import EvalConfig, TrainConfig, python_reward

from runtime.cli import shell_command


def eval_command(policy: Path, rm_name: str, *flags: str) -> str:
    """The command that evaluates a policy of a run; the run's settings say the rest.

    A Python reward is named, because a run folder alone never makes eval.py run code.
    """
    words = ["python", "eval.py"]
    if policy != Path(EvalConfig.policy_path):
        words += ["--policy_path", str(policy)]
    if python_reward(rm_name):
        words += ["--rm_name", rm_name]
    return shell_command(*words, *flags)


def resume_command(cfg: TrainConfig) -> str:
    """The command that resumes a run; it names a Python reward, as eval_command does."""
    words = ["python", "train.py", "--resume"]
    if cfg.ckpt_dir != TrainConfig.ckpt_dir:
        words.append(cfg.ckpt_dir)
    if python_reward(cfg.rm_name):
        words += ["--rm_name", cfg.rm_name]
    return shell_command(*words)
