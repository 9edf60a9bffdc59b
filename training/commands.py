"""The commands that a program names for its user to run next: they run as they stand, in the same folder and shell."""

from pathlib import Path

from config import EvalConfig, TrainConfig, runs_python

from runtime.cli import shell_command


def flag(name: str, value: str) -> list[str]:
    """A flag with its value; one that begins with a dash is no flag only if an equals sign ties it to its own."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]


def eval_command(policy: Path, rm_name: str, *flags: str) -> str:
    """The command that evaluates a policy of a run; the run's settings say the rest.

    A Python reward is named, because a run folder alone never makes eval.py run code.
    """
    words = ["python", "eval.py"]
    if policy != Path(EvalConfig.policy_path):
        words += flag("policy_path", str(policy))
    if runs_python(rm_name):
        words += flag("rm_name", rm_name)
    return shell_command(*words, *flags)


def resume_command(cfg: TrainConfig) -> str:
    """The command that resumes a run; it names a Python reward, as eval_command does."""
    words = ["python", "train.py", "--resume"]
    if cfg.ckpt_dir != TrainConfig.ckpt_dir:
        words[-1:] = flag("resume", cfg.ckpt_dir)
    if runs_python(cfg.rm_name):
        words += flag("rm_name", cfg.rm_name)
    return shell_command(*words)
