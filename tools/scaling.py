"""What more processes bring: measured so far, and by a stated model up to 1,024 of them.

    torchrun --nproc_per_node=1 -m tools.benchmark --sweep batch=16,32,64 --csv results/scaling.csv
    torchrun --nproc_per_node=1 -m tools.benchmark --sweep minibatch=4,8,16 --csv results/scaling.csv     (then =2, …)
    python -m tools.scaling results/scaling.csv
    python -m tools.scaling results/scaling.csv --gb_s 50 --latency_us 20       on another wire

The model. A process with r rows of the batch takes a + b r seconds to sample and score them, and c u + d e r to learn
in u optimiser steps over e epochs; a, b, c, d are fitted to what one process took for several batches and minibatches.
Then n processes send, per optimiser step, G bytes of gradients around a ring, 2 (n - 1) / n G / bandwidth, and 2 (n -
1) latencies for each bucket of 24 MB and each of two small sums. What fits beside the last backward pass, a third of
the optimiser step, costs nothing. Once per step they gather the rollout, some 60 bytes per token in a dozen pieces.
Process 0 alone writes the tables, which takes no longer with more of them. Weak: the rows of each process stay the
same, and batch and minibatch grow with n. Strong: batch and minibatch stay the same.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from config import UserError, opt, parse_tool, run_tool  # isort: skip  (before torch: see there)

import numpy as np
import pandas as pd

from tools.tables import read_table
from utils import GradientSum

TOKEN_BYTES = 60  # of a rollout, per response token: four-byte numbers, and tokens of eight
PIECES = 12  # messages that a rollout is gathered in
SUMS = 2  # small messages per optimiser step
BUCKET_BYTES = 4 * GradientSum.BUCKET
SHAPES = ["models", "device", "dtype", "prompt", "response", "epochs"]
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
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        raise UserError("name the CSV file that tools.benchmark wrote: python -m tools.scaling results/scaling.csv")
    flags = words[0 if words[0].startswith("-") else 1 :]
    cfg = parse_tool(ScalingConfig, flags, __doc__)
    for shapes, rows in read_table(Path(words[0]), *SHAPES).groupby(SHAPES):
        told = ", ".join(f"{name} {value}" for name, value in zip(SHAPES, shapes, strict=True))
        print(f"{told}\n\nmeasured\n{measured(rows).to_string(index=False)}\n")
        model = Model(rows, cfg)
        print(f"model, {model.batch} rows in minibatches of {model.minibatch} per process (weak) or in all (strong)")
        print(f"{model.table().to_string(index=False)}\n")


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds per step, against one process with as many rows each (weak) and in all (strong)."""
    seconds = rows.groupby(["processes", "batch", "minibatch"])["seconds"].median()

    def alone(batch: float, minibatch: float) -> float:
        return float(seconds.get((1, batch, minibatch), np.nan))

    found = [
        {"processes": n, "batch": batch, "minibatch": minibatch, "s per step": round(took, 2),
         "weak efficiency, %": (100 * alone(batch / n, minibatch / n) / took),
         "strong: times faster": round(alone(batch, minibatch) / took, 2)}
        for (n, batch, minibatch), took in seconds.items()
    ]  # fmt: skip
    return pd.DataFrame(found).round({"weak efficiency, %": 0})


class Model:
    """Seconds of a step for any number of processes, from the constants of one."""

    def __init__(self, rows: pd.DataFrame, cfg: ScalingConfig) -> None:
        """Fit to the rows of one process (raises UserError where these do not determine the constants)."""
        one = rows[rows.processes == 1]
        if one.batch.nunique() < 2 or one.minibatch.nunique() < 2:
            raise UserError("the model needs one process at several batch and minibatch sizes: tools.benchmark --sweep")
        sampled = np.polyfit(one.batch, one.seconds_generate + one.seconds_score, 1)
        steps = one.epochs * one.batch / one.minibatch
        design = np.stack([steps, one.epochs * one.batch], 1)
        self.per_row, self.fixed = float(sampled[0]), max(0.0, float(sampled[1]))
        updated = np.linalg.lstsq(design, one.seconds_update)[0]
        self.per_step, self.per_update_row = (max(0.0, float(x)) for x in updated)
        first, wire = one.iloc[0], rows.sort_values("processes").iloc[-1]
        self.epochs, self.response, self.gradient_bytes = first.epochs, first.response, 4 * float(first.weights)
        self.batch, self.minibatch = int(one.batch.max()), int(one.minibatch.max())
        self.bandwidth = 1e9 * (cfg.gb_s or float(wire.wire_gb_s))
        self.latency = 1e-6 * (cfg.latency_us or float(wire.wire_latency_us))
        if not self.bandwidth > 0 or not self.latency >= 0:
            raise UserError("only one process was measured, which sends nothing: give --gb_s and --latency_us")

    def seconds(self, processes: int, batch: int, minibatch: int) -> dict[str, float]:
        """Seconds of a step with so many rows in all: computing, and waiting for what is sent."""
        each, steps = batch / processes, self.epochs * batch / minibatch
        update = self.per_step * steps + self.per_update_row * self.epochs * each
        messages = SUMS + -(-self.gradient_bytes // BUCKET_BYTES)
        waiting = steps * max(0.0, self._ring(processes, self.gradient_bytes, messages) - HIDDEN * update / steps)
        waiting += self._ring(processes, batch * self.response * TOKEN_BYTES, PIECES)
        return {"computing": self.fixed + self.per_row * each + update, "waiting": waiting}

    def _ring(self, processes: int, size: float, messages: float) -> float:
        return 2 * (processes - 1) * (size / processes / self.bandwidth + messages * self.latency)

    def table(self) -> pd.DataFrame:
        """The same for many processes, weak and strong, with efficiencies."""
        alone = sum(self.seconds(1, self.batch, self.minibatch).values())
        found = []
        for n in COUNTS:
            row: dict[str, float] = {"processes": n}
            for kind, times in (("weak", n), ("strong", 1)):
                took = self.seconds(n, self.batch * times, self.minibatch * times)
                total = sum(took.values())
                row[f"{kind}: s per step"] = round(total, 3)
                row[f"{kind}: waiting, %"] = round(100 * took["waiting"] / total)
                row[f"{kind}: efficiency, %"] = round(100 * alone * times / n / total)
            found.append(row)
        return pd.DataFrame(found)


if __name__ == "__main__":
    run_tool(main)
