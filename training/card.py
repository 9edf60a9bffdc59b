"""The model card: README.md of an exported policy, in the hub's own format.

With it `hf upload NAME ckpts/policy_lm` gives a complete page. It is made of what the run folder holds, so a run and
its resume write the same one. Of folders and files on this machine it has the last part of the name only.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, reward_names, runs_python

import pandas as pd
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from reward import score_title
from runtime.files import write_atomic
from runtime.saved_run import SavedRun
from runtime.tables import has_splits
from training.earlier_run import SILENT

TEMPLATE = Path(__file__).with_name("model_card.md")
RESULTS = re.compile(r"(?<=<!-- results of eval\.py -->\n).*?(?=\n<!-- end of results -->)", re.DOTALL)
NAMED_ELSEWHERE = {"policy_name", "ref_name", "rm_name", "dataset"}
NO_MATTER = SILENT | {"device", "dtype", "report_to", "save_every", "keep_last", "sample_every", "eval_every"}
COURSE = {  # column of eval.csv or metrics.csv -> its title and how it is written
    "step": ("step", "{:.0f}"),
    "score_mean": ("mean score", "{:+.3g}"),
    "positive_rate": ("share above 0", "{:.2f}"),
    "kl_seq_exact": ("KL to base, nats per response", "{:.2f}"),
    "entropy": ("entropy, nats per token", "{:.2f}"),
    "response_len": ("response length, tokens", "{:.1f}"),
}
COURSE_ROWS = 6


def write_card(run_dir: Path, policy_dir: Path) -> None:
    """Write the card of a policy of the run in run_dir, with the course of the run so far and no results yet."""
    record = SavedRun(run_dir).record
    metrics = _table(run_dir / "metrics.csv")
    method = method_of(record)
    decoding = ("temperature", "top_k", "top_p", "max_new_tokens", "max_prompt_len")
    blanks = {
        "title": title_of(record),
        "method": "proximal policy optimisation (PPO)" if method == "ppo" else f"`{method}`",
        "base": _link(record["policy_name"]),
        "reference": _link(record["ref_name"] or record["policy_name"]),
        "dataset": _link(record["dataset"], "datasets/"),
        "reward": _reward(record),
        "interpolated": _interpolated(record),
        "training": _training(record, steps=len(metrics)),
        "settings": _settings(record),
        "course": _course(metrics, _table(run_dir / "eval.csv")),
        **{name: str(record[name]) for name in decoding},
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda place: blanks[place[1]], TEMPLATE.read_text(encoding="utf-8"))
    dataset = hub_name(record["dataset"])
    metadata = ModelCardData(  # no licence: whoever publishes the policy chooses it
        base_model=hub_name(record["policy_name"]),
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", method, "rlhf"],
    )
    write_atomic(policy_dir / "README.md", f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def add_results(
    run_dir: Path, policy_dir: Path, summary: dict[str, Any], groups: Mapping[str, Iterable[Sequence[str]]]
) -> None:
    """Put an evaluation between the marks of the policy's card and into its metadata; all else in it stays.

    summary is that of eval_summary.json, groups those of the printed table. A folder that cannot be written, or a
    card that cannot be read, is only noted.
    """
    path = policy_dir / "README.md"
    try:
        if not path.exists():  # of a run of an older version
            write_card(run_dir, policy_dir)
        card = ModelCard.load(path)
        card.data.model_name = card.data.model_name or title_of(SavedRun(run_dir).record)
        card.data.eval_results = eval_results(summary)
        results = _results(summary, groups)
        card.text = RESULTS.sub(lambda _: results, card.text)
        write_atomic(path, str(card))
        print(f"model card: {path}")
    except (UserError, OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        print(f"note: the model card {path} is left as it was ({' '.join(f'{error}'.split())})")


# --- names ----------------------------------------------------------------------------------------------------------


def hub_name(name: str) -> str | None:
    """The name if it is one on the hub; settings in a config.json name folders by absolute paths."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_name(name: str) -> str:
    """A name without the folders of this machine: the last part of a path, and a function with its file alone."""
    return name if hub_name(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def title_of(record: dict[str, Any]) -> str:
    """What the card calls the model, by its base and method: gpt2-ppo."""
    base = public_name(record["policy_name"]).split("/")[-1]
    return re.sub(r"[^\w.-]+", "-", base) + f"-{method_of(record)}"


def method_of(record: dict[str, Any]) -> str:
    """ppo, or the method that experiments.rivals planted in its place, such as rloo."""
    method: str = record.get("method", "ppo")
    return "ppo" if method.startswith("ppo") else method


def _link(name: str, kind: str = "") -> str:
    shown = f"`{public_name(name)}`"
    return f"[{shown}](https://huggingface.co/{kind}{name})" if hub_name(name) else shown


# --- the run --------------------------------------------------------------------------------------------------------


def _reward(record: dict[str, Any]) -> str:
    names = reward_names(record["rm_name"])
    if len(names) > 1:
        weights = record.get("reward_weights")
        weighted = f", reward_weights {weights}" if weights else ""
        return f"the sum of {', '.join(_link(name) for name in names)}{weighted}"
    name = _link(record["rm_name"])
    label = record.get("reward", {}).get("label")
    if runs_python(record["rm_name"]):
        return f"the Python function {name}"
    if record.get("score_log_odds"):
        return f"the classifier {name} (log-odds of {record['target_label']})"
    return f"the reward model {name}" if label is None else f"the classifier {name} (2·P({label}) − 1)"


def _interpolated(record: dict[str, Any]) -> str:
    """That the weights lie between base and policy, as tools.interpolate makes them."""
    if "interpolated" not in record:
        return ""
    made = record["interpolated"]
    return (
        f"\n\nIts weights are base + {made['alpha']:.3f} · (policy − base), averaged over {len(made['runs'])} trained "
        f"policies, which puts it {made['kl_seq_exact']:.2f} nats per response from its base."
    )


def _training(record: dict[str, Any], steps: int) -> str:
    """One paragraph on what was done with what."""
    responses = steps * record["batch_size"]
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers"))
    return (
        f"{steps} steps of {record['batch_size']} responses, {responses:,} in all, to prompts from "
        f"{_link(record['dataset'], 'datasets/')}; step size {record['lr']:g}, price of KL {record['kl_coef']:g} per "
        f"nat, seed {record['seed']}; {versions}."
    )


def _settings(record: dict[str, Any]) -> str:
    """The settings that differ from train.py's defaults, as a table."""
    rows = [
        (f.name, _shown(record[f.name]), _shown(f.default))
        for f in fields(TrainConfig)
        if f.name not in NAMED_ELSEWHERE | NO_MATTER and record.get(f.name, f.default) != f.default
    ]
    if not rows:
        return "All settings are the defaults."
    return "Settings that differ from the defaults:\n\n" + markdown_table(("setting", "value", "default"), rows)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f"`{public_name(value)}`"
    return "none" if value is None else str(value)


def _table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def _course(metrics: pd.DataFrame, evaluations: pd.DataFrame) -> str:
    """A few rows of the run as a table, of held-out prompts where it had evaluations; nothing before the first step."""
    table = metrics if evaluations.empty else evaluations
    on = "the batches it was trained on" if evaluations.empty else "held-out prompts"
    if table.empty:
        return ""
    columns = [name for name in COURSE if name in table]
    chosen = sorted({round(i * (len(table) - 1) / (COURSE_ROWS - 1)) for i in range(COURSE_ROWS)})
    rows = [[COURSE[name][1].format(table[name].iloc[i]) for name in columns] for i in chosen]
    return f"Its course, on {on}:\n\n" + markdown_table([COURSE[name][0] for name in columns], rows)


# --- an evaluation --------------------------------------------------------------------------------------------------


def _results(summary: dict[str, Any], groups: Mapping[str, Iterable[Sequence[str]]]) -> str:
    """The verdict and the table of an evaluation, and how it was made."""
    settings = summary["settings"]
    decoding = ", ".join(f"{name} {settings[name]:g}" for name in ("temperature", "top_k", "top_p", "max_new_tokens"))
    dataset = _link(settings["dataset"], "datasets/")
    if has_splits(settings["dataset"]):
        dataset += f", split {settings['split']}"
    made = (
        f"{summary['n']} prompts from {dataset}, the same random numbers for policy and base; {decoding}; seed "
        f"{settings['seed']}. Brackets are 95 % intervals."
    )
    tables = [markdown_table((group, "policy", "base"), rows) for group, rows in groups.items()]
    return "\n\n".join([summary["verdict"], made, *tables])


def eval_results(summary: dict[str, Any]) -> list[EvalResult]:
    """The main figures for the hub's metadata, each with its 95 % interval."""
    settings = summary["settings"]
    ours = summary["policy"]
    label = summary["label"]
    dataset = public_name(settings["dataset"]).replace(":", "-")
    split = settings["split"] if has_splits(settings["dataset"]) else None
    figures = [
        ("score_mean", f"mean {score_title(label)}", ours["score_mean"], ours["score_ci"]),
        ("win_rate", "win-rate against base", summary["win_rate"], summary["win_rate_ci"]),
        ("kl_to_base", "exact KL to base, nats per response", summary["kl_seq_exact"], summary["kl_seq_exact_ci"]),
    ]
    if "positive_rate" in ours:
        positive = ("positive_rate", f"share of {label} responses", ours["positive_rate"], ours["positive_ci"])
        figures.insert(1, positive)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=kind,
            dataset_split=split,
            metric_name=name,
            metric_value=round(value, 4),
            metric_args={"interval_95": [round(end, 4) for end in interval], "prompts": summary["n"]},
        )
        for kind, name, value, interval in figures
    ]


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of texts as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.strip().replace('|', '&#124;') for cell in line)} |" for line in lines)
