"""Experiment trackers: what report_to names gets the rows of metrics.csv, and W&B also the samples and the picture.

The run folder stays the record. A tracker is opened with all that its tables hold, so that a run that was killed, or
that named its tracker late, has every step there exactly once. A tracker that fails never stops training.
"""

import importlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError

import pandas as pd
from tqdm import tqdm

from runtime.files import write_atomic

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
Row = dict[str, Any]
Rows = Sequence[Row]


def tracker_module(name: str) -> Any:
    """Import what a tracker needs (raises UserError where its package is missing)."""
    try:
        return importlib.import_module(MODULES[name])
    except ImportError:
        raise UserError(f"report_to={name} needs a package: pip install {name}, or leave it out") from None


class TensorBoard:
    """Scalars in tensorboard/ of the run folder; it draws curves itself, and samples are in samples.csv."""

    def __init__(self, cfg: TrainConfig, folder: Path) -> None:
        """Begin at step 1, whatever an earlier start has written: its rows are sent again."""
        self.writer = tracker_module("tensorboard").SummaryWriter(folder / "tensorboard", purge_step=1)

    def add(self, step: int, metrics: Row, samples: Rows, picture: Path | None) -> None:
        """Add a scalar for each column of the metrics."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is kept in wandb/ of the run folder.

    A resume goes on in the same run. Steps that W&B has are not sent again: retaken, they are the same bit for bit. A
    resume with --allow_changes takes other ones and gets a run of its own.
    """

    def __init__(self, cfg: TrainConfig, folder: Path) -> None:
        """Start or resume the run (raises UserError where W&B refuses, such as without a login)."""
        self.wandb = tracker_module("wandb")
        run_id = folder / "wandb" / "run_id"
        if not run_id.exists() or cfg.allow_changes:
            run_id.parent.mkdir(exist_ok=True)
            write_atomic(run_id, uuid.uuid4().hex[:8])
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "gpt2-ppo"),
                name=folder.resolve().name,
                dir=str(folder),
                id=run_id.read_text(encoding="utf-8"),
                resume="allow",
                allow_val_change=True,
                config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
                settings=self.wandb.Settings(silent=True, console="off"),
            )
        except self.wandb.Error as error:
            raise UserError(
                f"report_to=wandb cannot start ({error}): run `wandb login`, or set WANDB_MODE=offline, then --resume"
            ) from None
        self.first_step = self.run.step  # the first one that W&B does not have; offline it cannot know
        place = f"offline, in {folder / 'wandb'}/" if self.run.offline else self.run.url
        print(f"W&B run {self.run.id}: {place}")

    def add(self, step: int, metrics: Row, samples: Rows, picture: Path | None) -> None:
        """Log the metrics, the samples as a table, and the picture as it is now."""
        if step < self.first_step:
            return
        values = dict(metrics)
        if samples:
            cells = [list(row.values()) for row in samples]
            values["samples"] = self.wandb.Table(columns=list(samples[0]), data=cells)
        if picture:
            values["curves"] = self.wandb.Image(str(picture))
        self.run.log(values, step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self.run.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Trackers:
    """The trackers that report_to names, as one."""

    def __init__(self, cfg: TrainConfig, folder: Path) -> None:
        """Open them with what the tables of the run folder hold (raises UserError where one cannot be opened)."""
        self.open = {name: TRACKERS[name](cfg, folder) for name in cfg.trackers}
        samples = _rows(folder / "samples.csv", keep_default_na=False)
        for row in _rows(folder / "metrics.csv") if self.open else []:
            self.add(row["step"], row, [sample for sample in samples if sample["step"] == row["step"]])

    def add(self, step: int, metrics: Row | None = None, samples: Rows = (), picture: Path | None = None) -> None:
        """Send what there is of a step: its row of metrics.csv, its rows of samples.csv, the curves up to it."""
        self._each(lambda tracker: tracker.add(step, metrics or {}, samples, picture))

    def close(self) -> None:
        """Close all of them."""
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Any], None]) -> None:
        """Let every tracker act; one that fails is left out from then on."""
        for name, tracker in list(self.open.items()):
            try:
                act(tracker)
            except Exception as error:  # of a server or a network: no reason to lose a run
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                tqdm.write(f"note: report_to={name} failed ({reason}) and is left out; --resume sends what it lacks")
                del self.open[name]


def _rows(table: Path, **options: bool) -> list[Row]:
    """The rows of a table of the run folder as they were added; none if there is no table yet."""
    return pd.read_csv(table, **options).to_dict("records") if table.exists() else []
