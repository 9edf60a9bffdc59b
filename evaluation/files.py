"""What an evaluation writes: eval_results.csv, and beside it eval_summary.json and eval_report.html."""

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import EvalConfig, UserError

import pandas as pd

from evaluation.report import write_report
from evaluation.table import table_groups
from runtime.files import write_atomic
from runtime.saved_run import SavedRun

RESULTS = "eval_results.csv"


@dataclass(frozen=True)
class ResultFiles:
    """Where the three files go: the table, and the others named after it."""

    table: Path

    @classmethod
    def of(cls, cfg: EvalConfig) -> "ResultFiles":
        """Those of out_csv, else of the policy's run folder, else here.

        A run's best/ is another policy than its policy_lm: it has best_eval_results.csv.
        """
        if cfg.out_csv is not None:
            return cls(Path(cfg.out_csv))
        home = SavedRun.of_policy(cfg.policy_path)
        if home is None:
            return cls(Path(RESULTS))
        place = Path(cfg.policy_path).absolute().parent
        prefix = "" if place == home.folder.absolute() else f"{place.name}_"
        return cls(home.folder / f"{prefix}{RESULTS}")

    @property
    def summary(self) -> Path:
        """eval_summary.json for eval_results.csv, x_summary.json for x.csv."""
        return self._beside("summary.json")

    @property
    def report(self) -> Path:
        """eval_report.html."""
        return self._beside("report.html")

    def _beside(self, ending: str) -> Path:
        return self.table.with_name(f"{self.table.stem.removesuffix('_results')}_{ending}")

    def check_writable(self) -> None:
        """Refuse a file that cannot be written, before any work (raises UserError)."""
        try:
            if self.table.is_dir() or not self.table.name:
                raise UserError(f"out_csv={self.table} is not a name for a CSV file: choose another")
            self.table.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(self.table.parent, os.W_OK):
                raise UserError(f"out_csv={self.table} is in a folder that cannot be written: choose another file")
        except OSError as error:
            raise self._unwritable(error) from None

    def earlier(self, cfg: EvalConfig) -> dict[str, Any]:
        """The summary that is to be replaced, with a note; empty where there is none.

        Raises UserError where that would replace another policy's results, unless out_csv asks for it.
        """
        summary = read_summary(self.summary)
        if self.table.exists():
            policy = summary.get("settings", {}).get("policy_path", "an unknown policy")
            shared = cfg.out_csv is None and SavedRun.of_policy(cfg.policy_path) is None
            if shared and policy != cfg.policy_path:
                raise UserError(
                    f"{self.table} has the results of {policy}: name another file with --out_csv, or remove it"
                )
            print(f"note: the results of {policy} in {self.table} will be replaced")
        return summary

    def write(self, results: pd.DataFrame, summary: dict[str, Any]) -> None:
        """Write all three, each whole or not at all (raises UserError where the folder cannot be written)."""
        home = SavedRun.of_policy(summary["settings"]["policy_path"])
        try:
            write_atomic(self.table, results.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"))
            write_atomic(self.summary, json.dumps(summary, indent=2) + "\n")
            write_report(results, summary, table_groups(summary), home, self.report)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"out_csv={self.table} cannot be written ({error.strerror}): choose another file")


def read_summary(path: Path) -> dict[str, Any]:
    """A summary of eval.py; empty where there is none, or the file is something else."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) and isinstance(summary.get("settings"), dict) else {}
