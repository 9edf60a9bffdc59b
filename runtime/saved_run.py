"""A run folder as a later program finds it: what its config.json says, and where its policy is."""

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, policy_folder


@dataclass(frozen=True)
class SavedRun:
    """The run in a folder; nothing is read before it is asked for."""

    folder: Path

    @classmethod
    def of_policy(cls, policy_path: str) -> "SavedRun | None":
        """The run that made a policy, be it its policy_lm or best/policy_lm; None where the policy is in no run."""
        for parent in Path(policy_folder(policy_path)).absolute().parents[:2]:
            if cls(parent).exists:
                inside = parent.is_relative_to(Path.cwd())
                return cls(parent.relative_to(Path.cwd()) if inside else parent)
        return None

    @property
    def config_json(self) -> Path:
        """Where the settings and all that the run was made of are written down."""
        return self.folder / "config.json"

    @property
    def policy(self) -> Path:
        """The policy as the run left it, a plain Hugging Face folder."""
        return self.folder / "policy_lm"

    @property
    def exists(self) -> bool:
        """Whether config.json, whole or damaged, is that of a run and not of a model, say."""
        try:
            return "total_steps" in self.config_json.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False

    @cached_property
    def record(self) -> dict[str, Any]:
        """All of config.json: settings, versions, fingerprints, machine. Empty where there is no run."""
        if not self.exists:
            return {}
        try:
            return dict(json.loads(self.config_json.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError) as error:
            raise UserError(
                f"{self.config_json} is damaged ({error}): fix it, or leave out what refers to it"
            ) from None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of train.py in it; one of an older version may lack some."""
        return {f.name: self.record[f.name] for f in fields(TrainConfig) if f.name in self.record}

    @property
    def label(self) -> str | None:
        """The label whose probability the scores are, None where they are any numbers."""
        try:
            label = self.record["reward"]["label"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.config_json} is not that of a run ({type(error).__name__}): name the folder of a run"
            ) from None
        return None if label is None else str(label)

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of data, models and code, by setting; a run of an older version has that of a Python reward at most.

        An empty text means unknown.
        """
        of_reward = self.record.get("reward", {}).get("sha256", "")
        return {"rm_name": of_reward, **self.record.get("fingerprints", {})}

    def refuse_code(self) -> str:
        """Why the Python reward that the folder names is not run: such a folder may be from anyone."""
        rm_name = self.record["rm_name"]
        return (
            f"rm_name={rm_name} is Python code, which is never run because {self.config_json} says so: read it, then "
            f"name it on the command line, --rm_name {rm_name}"
        )
