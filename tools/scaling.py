"""What more processes bring: measured so far, and by a stated model up to 1,024 of them.

    torchrun --nproc_per_node=1 -m tools.benchmark --sweep batch=16,32,64 --csv results/scaling.csv     (then =2, …)
    python -m tools.scaling results/scaling.csv
    python -m tools.scaling results/scaling.csv --gb_s 50 --latency_us 20       on another wire

The model. A process with r rows of the batch takes a + b r seconds to sample and score them and u (c + d r / m) for u
optimiser steps in m minibatches, with a, b, c, d fitted to what one process took for several r. Then n processes
send, per optimiser step, G bytes of gradients around a ring, 2 (n - 1) / n G / bandwidth + 2 (n - 1) latency, of which
what fits beside the last backward pass (a third of an optimiser step's time) costs nothing; and once per step the
rollout, some 60 bytes per token of it. Process 0 alone writes the tables, which takes no longer with more of them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from config import UserError, opt  # isort: skip  (before torch: see there)

import numpy as np
import pandas as pd
from transformers.hf_argparser import HfArgumentParser

TOKEN_BYTES = 60  # of a rollout, per response token: four-byte numbers, and tokens of eight
HIDDEN = 1 / 3  # of an optimiser step is the backward pass that sending can hide behind
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024)


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Settings of `python -m tools.scaling`."""

    gb_s: float | None = opt(None, "Bandwidth between processes, GB/s (default: as measured).")
    latency_us: float | None = opt(None, "Time for the smallest message, microseconds (default: as measured).")


def main(argv: list[str] | None = None) -> None:
    """Print what was measured and what the model says."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0].startswith("-"):
        raise UserError("name the CSV file that tools.benchmark wrote: python -m tools.scaling results/scaling.csv")
    cfg = ScalingConfig(**vars(HfArgumentParser(ScalingConfig, description=__doc__).parse_args(words[1:])))
    try:
        table = pd.read_csv(Path(words[0]))
        kinds = table.groupby(["models", "device", "dtype"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{words[0]} is no file that tools.benchmark wrote ({error})") from None
    for (models, device, dtype), rows in kinds:
        print(f"{models} on {device} in {dtype}\n\nmeasured\n{measured(rows).to_string(index=False)}\n")
        print(f"model, {rows.batch.min()} rows per process (weak) and {rows.batch.max()} in all (strong)")
        print(f"{Model(rows, cfg).table().to_string(index=False)}\n")


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds per step by processes and batch; efficiency against one process, for as many rows each and in all."""
    seconds = rows.groupby(["processes", "batch"])["seconds"].median()

    def alone(batch: float) -> float:
        return float(seconds.get((1, batch), np.nan))

    found = [
        {"processes": n, "rows in all": batch, "rows each": batch / n, "s per step": round(took, 2),
         "weak efficiency, %": round(100 * alone(batch / n) / took),
         "strong: times faster": round(alone(batch) / took, 2)}
        for (n, batch), took in seconds.items() if not np.isnan(alone(batch / n) + alone(batch))
    ]  # fmt: skip
    return pd.DataFrame(found)


class Model:
    """Seconds of a step for any number of processes, from the constants of one."""

    def __init__(self, rows: pd.DataFrame, cfg: ScalingConfig) -> None:
        """Fit to the rows of one process (raises UserError where these are of one batch size only)."""
        one = rows[rows.processes == 1]
        if one.batch.nunique() < 2:
            raise UserError("the model needs one process at two batch sizes or more: tools.benchmark --sweep batch=…")
        sampled = np.polyfit(one.batch, one.seconds_generate + one.seconds_score, 1)
        updated = np.polyfit(one.batch, one.seconds_update, 1)
        self.per_row, self.fixed = float(sampled[0]), max(0.0, float(sampled[1]))
        self.update_per_row, self.update_fixed = float(updated[0]), max(0.0, float(updated[1]))
        first, wire = one.iloc[0], rows.sort_values("processes").iloc[-1]
        self.epochs, self.minibatches = int(first.epochs), int(one.batch.max() / first.minibatch)
        self.response, self.gradient_bytes = int(first.response), 4 * float(first.weights)
        self.largest, self.smallest = int(one.batch.max()), int(one.batch.min())
        self.bandwidth = 1e9 * (cfg.gb_s or float(wire.wire_gb_s))
        self.latency = 1e-6 * (cfg.latency_us or float(wire.wire_latency_us))
        if not self.bandwidth > 0:
            raise UserError("only one process was measured, which sends nothing: give --gb_s and --latency_us")

    def seconds(self, processes: int, rows: int) -> dict[str, float]:
        """Seconds of a step with so many rows in all: computing, sending that is not hidden, and both."""
        each = rows / processes
        update = self.update_fixed + self.update_per_row * each
        steps = self.epochs * self.minibatches
        sent = self._ring(processes, self.gradient_bytes)
        waiting = steps * max(0.0, sent - HIDDEN * update / steps)
        waiting += self._ring(processes, rows * self.response * TOKEN_BYTES)
        return {"computing": self.fixed + self.per_row * each + update, "waiting": waiting}

    def _ring(self, processes: int, size: float) -> float:
        return 2 * (processes - 1) * (size / processes / self.bandwidth + self.latency)

    def table(self) -> pd.DataFrame:
        """The same, weak (smallest batch per process) and strong (largest batch in all), with efficiencies."""
        found = []
        for n in COUNTS:
            row: dict[str, float] = {"processes": n}
            for kind, rows in (("weak", self.smallest * n), ("strong", self.largest)):
                took = self.seconds(n, rows)
                alone = sum(self.seconds(1, self.smallest if kind == "weak" else rows).values())
                total = sum(took.values())
                row[f"{kind}: s per step"] = round(total, 3)
                row[f"{kind}: waiting, %"] = round(100 * took["waiting"] / total)
                row[f"{kind}: efficiency, %"] = round(100 * alone / total / (1 if kind == "weak" else n))
            found.append(row)
        return pd.DataFrame(found)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
