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


def require_trackers(names: Sequence[str]) -> None:
    """Import the package of each tracker (raises UserError where one is missing)."""
    for name in names:
        _package(name)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError:
        raise UserError(f"report_to={name} needs a package: pip install {name}, or leave it out") from None


class TensorBoard:
    """Scalars in tensorboard/ of the run folder."""

    def __init__(self, cfg: TrainConfig, folder: Path) -> None:
        """Begin at step 1, whatever an earlier start has written: its rows are sent again."""
        self.writer = _package("tensorboard").SummaryWriter(folder / "tensorboard", purge_step=1)

    def add_metrics(self, row: Row) -> None:
        """Add a scalar for each column."""
        for name, value in row.items():
            self.writer.add_scalar(name, value, row["step"])

    def add_samples(self, rows: list[Row]) -> None:
        """Samples are in samples.csv."""

    def add_picture(self, picture: Path) -> None:
        """TensorBoard draws curves itself."""

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
        self.wandb, run_id = _package("wandb"), folder / "wandb" / "run_id"
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
        self.first, self.step = self.run.step, 0  # the first step that W&B does not have; offline it cannot know
        offline = self.run.offline
        print(f"W&B run {self.run.id}: " + (f"offline, in {folder / 'wandb'}/" if offline else f"{self.run.url}"))

    def add_metrics(self, row: Row) -> None:
        """Log the row at its own step."""
        self.step = row["step"]
        self._log(row)

    def add_samples(self, rows: list[Row]) -> None:
        """Log the samples of a step as a table."""
        self._log({"samples": self.wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])})

    def add_picture(self, picture: Path) -> None:
        """Log curves.png as it is now."""
        self._log({"curves": self.wandb.Image(str(picture))})

    def _log(self, values: Row) -> None:
        if self.step >= self.first:
            self.run.log(values, step=self.step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self.run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


class Trackers:
    """The trackers that report_to names, as one."""

    def __init__(self, cfg: TrainConfig, folder: Path) -> None:
        """Open them with what the tables of the run folder hold (raises UserError where one cannot be opened)."""
        self.open = {name: TRACKERS[name](cfg, folder) for name in cfg.trackers}
        if self.open:
            samples = _rows(folder / "samples.csv")
            for row in _rows(folder / "metrics.csv"):
                self.add_metrics(row)
                self.add_samples([sample for sample in samples if sample["step"] == row["step"]])

    def add_metrics(self, row: Row) -> None:
        """Send a row of metrics.csv."""
        self._each(lambda tracker: tracker.add_metrics(row))

    def add_samples(self, rows: list[Row]) -> None:
        """Send the samples of the step whose metrics were sent last."""
        if rows:
            self._each(lambda tracker: tracker.add_samples(rows))

    def add_picture(self, picture: Path) -> None:
        """Send the curves up to the step whose metrics were sent last."""
        self._each(lambda tracker: tracker.add_picture(picture))

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


def _rows(table: Path) -> list[Row]:
    """The rows of a table of the run folder as they were added; none if there is no table yet."""
    if not table.exists():
        return []
    texts = {"keep_default_na": False} if table.name == "samples.csv" else {}
    return pd.read_csv(table, **texts).to_dict("records")
