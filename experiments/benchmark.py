"""Times one PPO step by phase, against what this machine can do and against any other program.

    python -m experiments.benchmark                                    random-weight models of size `mini`
    python -m experiments.benchmark --size 124m --steps 3 --csv results/benchmark.csv
    python -m experiments.benchmark --policy_name DIR --rm_name DIR --dataset DATA
    python -m experiments.benchmark --sweep response=16,32,64          how cost grows
    python -m experiments.benchmark --peer 'python other_ppo.py'       alternates with a peer that prints "total 12.3 s"

The floor is the time that the step's matrix products would take at the rate measured for one large product, plus the
time to read the weights once per decoded token at the rate measured for copying.
"""

import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from config import TrainConfig, UserError, opt

import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from ppo import build_optimizer, build_scaler, collect_rollout, ppo_update
from runtime.cli import parse_flags, run, words
from runtime.device import best_seconds, keep_freed_memory, matmul_rate, peak_memory_mb, reset_peak_memory
from runtime.distributed import is_main_process, process_group, world_size
from runtime.files import check_table_path, read_table, write_atomic
from runtime.hub import quiet_libraries
from training.estimate import flops
from training.parts import load_parts, resolve
from utils import uniforms


@dataclass(frozen=True)
class Workload:
    """One PPO step: models and shapes. gpt2 and distilbert are layers, width, heads; None: trained models are named."""

    gpt2: tuple[int, int, int] = (4, 256, 4)
    distilbert: tuple[int, int, int] = (2, 256, 4)
    batch: int = 64
    prompt: int = 64
    response: int = 48
    epochs: int = 4
    minibatch: int = 16


WORKLOADS = {
    "mini": Workload(),
    "124m": Workload((12, 768, 12), (6, 768, 12), batch=8, prompt=64, response=32, minibatch=4),
    "gpu": Workload((12, 768, 12), (6, 768, 12), batch=64, prompt=128, response=64),
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
    steps: int = opt(3, "Steps timed, after one that is not.", heading="What is timed")
    sweep: str | None = opt(None, "Shapes to go through, such as batch=16,32,64 or response=16,64.")
    peer: str | None = opt(None, "Another command to time, alternating with this one.")
    rounds: int = opt(1, "How often to alternate with the peer.")
    csv: str | None = opt(None, "File to append the figures to.", path="written")


def main(argv: list[str] | None = None) -> None:
    """Measure, print and append to the CSV file."""
    cfg = parse_flags(BenchConfig, argv, __doc__)
    if cfg.steps < 1 or cfg.rounds < 1:
        raise UserError("steps and rounds must be at least 1")
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as joined:
        # each process makes its own before they join: once joined, the library lets only one of them save
        configs = [(work, make_config(cfg, work, Path(folder))) for work in sweep(WORKLOADS[cfg.size], cfg.sweep)]
        joined.enter_context(process_group(cfg.device))
        for work, train_cfg in configs:
            for turn in range(cfg.rounds):
                models = Path(cfg.policy_name).name if cfg.policy_name else f"random {cfg.size}"
                row = {
                    "models": models,
                    **shapes(work),
                    "reward_every": cfg.reward_every,
                    "turn": turn,
                    **measure(train_cfg, cfg.steps),
                }
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
    changes: list[dict[str, Any]] = [{name: int(value)} for value in values.split(",")]
    return [replace(work, **change) for change in changes]


def shapes(work: Workload) -> dict[str, int]:
    """The numbers of a work that a sweep can change."""
    return {f.name: getattr(work, f.name) for f in fields(work) if isinstance(getattr(work, f.name), int)}


def make_config(cfg: BenchConfig, work: Workload, folder: Path) -> TrainConfig:
    """Settings of train.py for this work, with random-weight models made in `folder` unless others are named."""
    names = {name: getattr(cfg, name) for name in ("policy_name", "rm_name", "dataset")}
    if None in names.values():
        if any(names.values()):
            raise UserError("policy_name, rm_name and dataset go together: name all three or none")
        if (cfg.split, cfg.text_column) != (BenchConfig.split, BenchConfig.text_column):
            raise UserError("split and text_column are those of a dataset: name policy_name, rm_name and dataset, too")
        names = make_random_models(work, folder / str(hash(work)))
    else:
        names |= {"split": cfg.split, "text_column": cfg.text_column}
    return resolve(
        TrainConfig(
            **names,
            device=cfg.device,
            dtype=cfg.dtype,
            batch_size=work.batch,
            minibatch_size=work.minibatch,
            ppo_epochs=work.epochs,
            max_prompt_len=work.prompt,
            max_new_tokens=work.response,
            reward_every=cfg.reward_every,
        )
    )


def make_random_models(work: Workload, folder: Path, vocabulary: int = 50257) -> dict[str, str]:
    """Full-size models with random weights, tokenizers of made-up words, and prompts of these words."""
    torch.manual_seed(0)
    layers, width, heads = work.gpt2
    lm = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary))
    lm.save_pretrained(folder / "policy")
    word_tokenizer(vocabulary, eos_token=f"w{vocabulary - 1}").save_pretrained(folder / "policy")
    layers, width, heads = work.distilbert
    labels = {0: "negative", 1: "positive"}
    DistilBertForSequenceClassification(
        DistilBertConfig(
            n_layers=layers,
            dim=width,
            hidden_dim=4 * width,
            n_heads=heads,
            vocab_size=30522,
            id2label=labels,
            label2id={name: i for i, name in labels.items()},
        )
    ).save_pretrained(folder / "reward")
    word_tokenizer(30522, pad_token="w0").save_pretrained(folder / "reward")
    words = torch.randint(1000, 20000, (4 * work.batch, work.prompt + 8)).tolist()
    words[::4] = [row[: 8 + i % work.prompt] for i, row in enumerate(words[::4])]  # real prompts are ragged, too
    (folder / "prompts.txt").write_text("\n".join(" ".join(f"w{i}" for i in row) for row in words), encoding="utf-8")
    return {
        "policy_name": str(folder / "policy"),
        "rm_name": str(folder / "reward"),
        "dataset": str(folder / "prompts.txt"),
    }


def word_tokenizer(size: int, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, …"""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w1", model_max_length=512, **special)


# --- the measurement ------------------------------------------------------------------------------------------------


def measure(cfg: TrainConfig, steps: int) -> dict[str, Any]:
    """Median seconds of each phase over `steps` steps after a first one, whose seconds stand apart; rates and floor."""
    parts = load_parts(cfg)
    keep_freed_memory()
    reset_peak_memory(cfg.device)
    models, optimizer = parts.models, build_optimizer(parts.models.policy, cfg)
    scaler = build_scaler(models.policy)
    rows: list[dict[str, float]] = []
    for step in range(1, steps + 2):
        noise = uniforms(cfg.seed, step, cfg.batch_size, cfg.max_new_tokens)
        rollout = collect_rollout(models, parts.prompts.batch(step), noise, cfg, cfg.kl_coef)
        update = ppo_update(models.policy, optimizer, rollout, cfg, step, scaler)
        took = {**rollout.seconds, "seconds_update": update["seconds_update"]}
        rate = int(rollout.mask.sum()) / sum(took.values())
        rows.append({**took, "tokens_per_second": rate, "peak_memory_mb": peak_memory_mb(cfg.device)})
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    seconds = sum(medians[f"seconds_{phase}"] for phase in ("generate", "score", "update"))
    matmul, copy = ceilings(cfg)
    work = flops(models, cfg)
    weights = sum(p.numel() for p in models.policy.lm.parameters())
    read = weights * (4 if cfg.dtype == "float32" else 2)
    floor = sum(work.values()) / matmul / world_size() + cfg.max_new_tokens * read / copy
    return {
        "processes": world_size(),
        "weights": weights,
        "device": cfg.device,
        "dtype": cfg.dtype,
        "seconds": seconds,
        **medians,
        "first_seconds": sum(rows[0][f"seconds_{phase}"] for phase in ("generate", "score", "update")),
        "matmul_gflops": matmul / 1e9,
        "copy_gb": copy / 1e9,
        "update_of_matmul": work["update"] / medians["seconds_update"] / matmul / world_size(),
        "floor_seconds": floor,
        "times_floor": seconds / floor,
    }


def ceilings(cfg: TrainConfig, size: int = 2048) -> tuple[float, float]:
    """What this machine reaches now: FLOP/s of one large matrix product, bytes/s read and written by a copy."""
    dtype = getattr(torch, cfg.dtype)
    size = 8192 if cfg.device == "cuda" else size
    memory, target = torch.ones(2, (256 if cfg.device == "cuda" else 16) * 2**20, device=cfg.device)
    seconds = best_seconds(lambda: target.copy_(memory), cfg.device)
    return matmul_rate(cfg.device, dtype, size), 2 * memory.nbytes / seconds


def measure_peer(command: str) -> dict[str, float]:
    """Run another program to its end: median of the step times that it prints, without the first; its peak memory."""
    peak = 0.0
    with tempfile.TemporaryFile("w+") as out:
        try:
            peer = subprocess.Popen(words("peer", command), stdout=out, stderr=subprocess.DEVNULL)
        except (OSError, IndexError) as error:
            raise UserError(f"peer={command!r} cannot be started ({error})") from None
        while peer.poll() is None:
            peak = max(peak, peer_memory_mb(peer.pid))
            time.sleep(0.2)
        out.seek(0)
        seconds = [float(x) for x in re.findall(r"total ([\d.]+) s", out.read())]
    if peer.returncode or not seconds:
        raise UserError(f"peer={command!r} ended with code {peer.returncode} and printed no step times")
    return {"peer_seconds": statistics.median(seconds[1:] or seconds), "peer_memory_mb": peak}


def peer_memory_mb(pid: int) -> float:
    """The most memory that a running process has held so far (Linux; 0 elsewhere)."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file, with the command that made them; columns that one lacks stay empty."""
    table = pd.DataFrame(rows).assign(command="python -m experiments.benchmark " + shlex.join(sys.argv[1:]))
    check_table_path(path)
    if path.exists():
        table = pd.concat([read_table(path), table])
    write_atomic(path, table.to_csv(index=False, float_format="%.5g", lineterminator="\n"))


if __name__ == "__main__":
    sys.exit(run(main))
