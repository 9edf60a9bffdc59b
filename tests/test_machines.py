"""Other systems, as far as one machine can tell: without Unix-only modules, on a console that is not UTF-8."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
AS_ON_WINDOWS = """
import sys, warnings
for name in ("resource", "fcntl", "termios", "pwd", "grp", "tty", "pty", "syslog"):
    sys.modules[name] = None
sys.modules["psutil"] = None  # where it is installed, transformers imports it, and psutil for Linux imports resource
ours = r"(config|train|eval|ppo|model|reward|data|utils|runtime|training|evaluation|pretrain)\\b.*"
warnings.filterwarnings("error", category=EncodingWarning, module=ours)
import train, eval, runtime.files
from config import EvalConfig, TrainConfig
from runtime.cli import parse_config, run

runtime.files.WINDOWS = True
first, then = " ".join(sys.argv[1:]).split(" then ")
code = run(lambda: train.main(parse_config(TrainConfig, first.split("|"))))
sys.exit(code or run(lambda: eval.main(parse_config(EvalConfig, then.split("|")))))
"""


def test_training_and_evaluation_need_nothing_that_only_unix_has(
    tmp_path: Path, flags: dict[str, str], reviews: Path
) -> None:
    """In a folder with a space and an umlaut, on texts that the console cannot show; files are opened as UTF-8."""
    folder = tmp_path / "a b ü"
    folder.mkdir()
    for name in ("policy_name", "rm_name"):
        flags[name] = str(shutil.copytree(flags[name], folder / f"{name} é"))
    rows = reviews.read_text(encoding="utf-8").replace('"text": "', '"text": "映β ')
    (folder / "critique é.jsonl").write_text(rows, encoding="utf-8")
    flags |= {"dataset": "critique é.jsonl", "ckpt_dir": "run 1 ü", "total_steps": "2", "eval_every": "0"}
    train = "|".join(f"--{name}={value}" for name, value in flags.items())
    evaluate = "--policy_path=run 1 ü/policy_lm|--n_samples=4|--judge=none|--device=cpu|--dtype=float32"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8"}
    command = [sys.executable, "-X", "warn_default_encoding", "-c", AS_ON_WINDOWS, train, "then", evaluate]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, encoding="cp1252", check=False)
    assert done.returncode == 0, done.stderr
    assert "done: see run 1 ü/curves.png" in done.stdout
    assert pd.read_csv(folder / "run 1 ü" / "metrics.csv").peak_memory_mb.isna().all(), "no module tells"
    assert pd.read_csv(folder / "run 1 ü" / "samples.csv").prompt.str.startswith("映β ").all()
    assert pd.read_csv(folder / "run 1 ü" / "eval_results.csv").prompt.str.startswith("映β ").all()
