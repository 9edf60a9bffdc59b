"""Times one PPO step by phase, against what this machine can do and against any other program.

    python -m experiments.benchmark                                    random-weight models of size `mini`
    python -m experiments.benchmark --size 124m --steps 3 --csv results/benchmark.csv
    python -m experiments.benchmark --policy_name DIR --rm_name DIR --dataset DATA
    python -m experiments.benchmark --critic own                       a value head of its own network
    python -m experiments.benchmark --sweep response=16,32,64          how cost grows
    python -m experiments.benchmark --peer 'python other_ppo.py'       and a peer that prints "total 12.3 s"

The floor is the time that the step's matrix products would take at the rate measured for one large product, plus the
time to read the weights once per decoded token at the rate measured for copying.
"""

import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from config import TrainConfig, UserError, opt

import pandas as pd
import torch

from experiments.random_models import Workload, make_random_models
from experiments.runner import write_table
from ppo import build_optimizer, build_scaler, collect_rollout, ppo_update
from runtime.cli import parse_flags, run, words
from runtime.device import best_seconds, keep_freed_memory, matmul_rate, peak_memory_mb, reset_peak_memory
from runtime.distributed import is_main_process, process_group, world_size
from runtime.files import check_table_path, read_table
from runtime.hub import quiet_libraries
from training.estimate import flops
from training.parts import load_parts, resolve
from utils import uniforms

GPT2, DISTILBERT = (12, 768, 12), (6, 768, 12)  # layers, width, heads
WORKLOADS = {
    "mini": Workload(),
    "124m": Workload(GPT2, DISTILBERT, batch=8, prompt=64, response=32, minibatch=4),
    "gpu": Workload(GPT2, DISTILBERT, batch=64, prompt=128, response=64),
}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of `python -m experiments.benchmark`."""

    size: Literal["mini", "124m", "gpu"] = opt("mini", "Shapes of the step, and of the models where none are named.")
    policy_name: str | None = opt(None, "A GPT-2 to time instead of one with random weights.", path="read")
    rm_name: str | None = opt(None, "Its reward model.", path="read")
    dataset: str | None = opt(None, "Its prompts.", path="read")
    split: str = opt(TrainConfig.split, "Split of the data set (a file has no splits and is used whole).")
    text_column: str = opt(TrainConfig.text_column, "Column that holds the text.")
    device: Literal["auto", "cpu", "cuda", "mps"] = opt(
        "auto", "auto takes cuda, else mps (Apple), else cpu.", heading="Where and how it runs"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = opt("auto", "Precision of matrix products.")
    reward_every: int = opt(0, "As train.py's; 0, whole responses only, is what other programs do.")
    critic: Literal["shared", "own"] = opt("shared", "As train.py's.")
    steps: int = opt(3, "Steps timed, after one that is not.", heading="What is timed")
    sweep: str | None = opt(None, "Shapes to go through, such as batch=16,32,64 or response=16,64.")
    peer: str | None = opt(None, "Another command to time after this one; the same command again alternates.")
    csv: str | None = opt(None, "File to append the figures to.", path="written")


def main(argv: list[str] | None = None) -> None:
    """Measure, print and append to the CSV file."""
    cfg = parse_flags(BenchConfig, argv, __doc__)
    if cfg.steps < 1:
        raise UserError(f"steps={cfg.steps} must be at least 1")
    quiet_libraries()
    names = Path(cfg.policy_name).name if cfg.policy_name else f"random {cfg.size}"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # each process makes its own models before they join: once joined, the library lets only one of them save
        works = sweep(WORKLOADS[cfg.size], cfg.sweep)
        configs = [make_config(cfg, work, Path(folder)) for work in works]
        with process_group(cfg.device):
            for work, train_cfg in zip(works, configs, strict=True):
                row = {"models": names, **shapes(work), "reward_every": cfg.reward_every, "critic": cfg.critic}
                row |= measure(train_cfg, cfg.steps)
                if cfg.peer:
                    row |= measure_peer(cfg.peer)
                    row["times_faster"] = row["peer_seconds"] / row["seconds"]
                    row["of_its_memory"] = row["peak_memory_mb"] / row["peer_memory_mb"]
                print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
                rows.append(row)
            if cfg.csv and is_main_process():
                append(Path(cfg.csv), rows)


# --- the work -------------------------------------------------------------------------------------------------------


def sweep(work: Workload, spec: str | None) -> list[Workload]:
    """`name=a,b,c` -> the work with that shape set to a, then b, then c (raises UserError)."""
    if spec is None:
        return [work]
    name, _, values = spec.partition("=")
    if name not in shapes(work) or not re.fullmatch(r"\d+(,\d+)*", values):
        raise UserError(f"sweep={spec!r} is not understood: write {'|'.join(shapes(work))}=N,N,…")
    return [replace(work, **{name: int(value)}) for value in values.split(",")]  # type: ignore[arg-type]


def shapes(work: Workload) -> dict[str, Any]:
    """The numbers of a work that a sweep can change."""
    return {name: size for name, size in asdict(work).items() if isinstance(size, int)}


def make_config(cfg: BenchConfig, work: Workload, folder: Path) -> TrainConfig:
    """Settings of train.py for this work, with random-weight models made in `folder` unless others are named."""
    names = {"policy_name": cfg.policy_name, "rm_name": cfg.rm_name, "dataset": cfg.dataset}
    texts = {"split": cfg.split, "text_column": cfg.text_column}
    if not any(names.values()):
        if texts != {name: getattr(TrainConfig, name) for name in texts}:
            raise UserError("split and text_column are those of a dataset: name policy_name, rm_name and dataset, too")
        names = dict(make_random_models(work, folder / str(hash(work))))
    elif None in names.values():
        raise UserError("policy_name, rm_name and dataset go together: name all three or none")
    settings: dict[str, Any] = {**names, **texts}
    return resolve(
        TrainConfig(
            **settings,
            device=cfg.device,
            dtype=cfg.dtype,
            batch_size=work.batch,
            minibatch_size=work.minibatch,
            ppo_epochs=work.epochs,
            max_prompt_len=work.prompt,
            max_new_tokens=work.response,
            reward_every=cfg.reward_every,
            critic=cfg.critic,
        )
    )


# --- the measurement ------------------------------------------------------------------------------------------------


def measure(cfg: TrainConfig, steps: int) -> dict[str, Any]:
    """Median seconds of each phase over `steps` steps after a first one, whose seconds stand apart; rates and floor."""
    parts = load_parts(cfg)
    models, policy = parts.models, parts.models.policy
    keep_freed_memory()
    reset_peak_memory(cfg.device)
    optimizer = build_optimizer(policy, cfg)
    scaler = build_scaler(policy)

    # 1. the steps
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 2):
        noise = uniforms(cfg.seed, step, cfg.batch_size, cfg.max_new_tokens)
        rollout = collect_rollout(models, parts.prompts.batch(step), noise, cfg, cfg.kl_coef)
        update = ppo_update(policy, optimizer, rollout, cfg, step, scaler)
        seconds = {**rollout.seconds, "seconds_update": update["seconds_update"]}
        total = sum(seconds.values())
        rate = int(rollout.mask.sum()) / total
        rows.append(
            {"seconds": total, **seconds, "tokens_per_second": rate, "peak_memory_mb": peak_memory_mb(cfg.device)}
        )
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    medians["seconds"] = sum(medians[f"seconds_{phase}"] for phase in ("generate", "score", "update"))

    # 2. what this machine reaches now: FLOP/s of one large product, bytes/s read and written by a copy
    on_gpu = cfg.device == "cuda"
    matmul = matmul_rate(cfg.device, getattr(torch, cfg.dtype), 8192 if on_gpu else 2048)
    source, target = torch.ones(2, (256 if on_gpu else 16) * 2**20, device=cfg.device)
    copy = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), cfg.device)

    # 3. the floor
    work = flops(models, cfg)
    weights = sum(p.numel() for p in policy.lm.parameters())
    bytes_read = weights * (4 if cfg.dtype == "float32" else 2)
    floor = sum(work.values()) / matmul / world_size() + cfg.max_new_tokens * bytes_read / copy
    return {
        "processes": world_size(),
        "weights": weights,
        "device": cfg.device,
        "dtype": cfg.dtype,
        **medians,
        "first_seconds": rows[0]["seconds"],
        "matmul_gflops": matmul / 1e9,
        "copy_gb": copy / 1e9,
        "update_of_matmul": work["update"] / medians["seconds_update"] / matmul / world_size(),
        "floor_seconds": floor,
        "times_floor": medians["seconds"] / floor,
    }


def measure_peer(command: str) -> dict[str, float]:
    """Run another program to its end: median of the step times that it prints, without the first; its peak memory."""
    try:
        peer = subprocess.run(words("peer", command), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except (OSError, IndexError) as error:
        raise UserError(f"peer={command!r} cannot be started ({error})") from None
    seconds = [float(x) for x in re.findall(r"total ([\d.]+) s", peer.stdout)]
    if peer.returncode or not seconds:
        raise UserError(f"peer={command!r} ended with code {peer.returncode} and printed no step times")
    return {"peer_seconds": statistics.median(seconds[1:] or seconds), "peer_memory_mb": children_peak_mb()}


def children_peak_mb() -> float:
    """The most memory that a program started here has held, of those that have ended (Linux; NaN on Windows)."""
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return float("nan")


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file, with the command that made them; columns that one lacks stay empty."""
    table = pd.DataFrame(rows).assign(command="python -m experiments.benchmark " + shlex.join(sys.argv[1:]))
    check_table_path(path)
    if path.exists():
        table = pd.concat([read_table(path), table])
    write_table(path, table)


if __name__ == "__main__":
    sys.exit(run(main))
