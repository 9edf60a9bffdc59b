"""The model card: README.md of an exported policy, in the hub's own format.

With it `hf upload NAME ckpts/policy_lm` gives a complete page. It is made of what the run folder holds, so a run and
its resume write the same one. Of folders and files on this machine it has the last part of the name only.
"""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from config import TrainConfig, python_reward

import pandas as pd
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from reward import score_title
from runtime.files import write_atomic
from runtime.tables import has_splits

TEMPLATE = Path(__file__).with_name("model_card.md")
RESULTS = re.compile(r"(<!-- results of eval\.py -->\n).*?(\n<!-- end of results -->)", re.DOTALL)
NAMED_ELSEWHERE = {"policy_name", "ref_name", "rm_name", "dataset"}
NO_MATTER = {
    "preset",
    "ckpt_dir",
    "overwrite",
    "resume",
    "allow_changes",
    "check",
    "device",
    "dtype",
    "report_to",
    "save_every",
    "keep_last",
    "sample_every",
    "eval_every",
}
COURSE = {  # column of eval.csv or metrics.csv -> its title and how it is written
    "step": ("step", "{:.0f}"),
    "score_mean": ("mean score", "{:+.3g}"),
    "positive_rate": ("share above 0", "{:.2f}"),
    "kl_seq_exact": ("KL to base, nats per response", "{:.2f}"),
    "entropy": ("entropy, nats per token", "{:.2f}"),
    "response_len": ("response length, tokens", "{:.1f}"),
}
ROWS = 6  # of the run's course


def write_card(run_dir: Path, policy_dir: Path) -> None:
    """Write the card of a policy of the run in run_dir, with the course of the run so far and no results yet."""
    about = _about(run_dir)
    course, steps = _course(run_dir)
    blanks = {
        "title": title_of(about),
        "base": _link(about["policy_name"]),
        "reference": _link(_reference(about)),
        "dataset": _link(about["dataset"], "datasets/"),
        "reward": _reward(about),
        "interpolated": _interpolated(about),
        "training": _training(about, steps),
        "settings": _settings(about),
        "course": course,
        **{name: f"{about[name]}" for name in ("temperature", "top_k", "top_p", "max_new_tokens", "max_prompt_len")},
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda place: blanks[place[1]], TEMPLATE.read_text(encoding="utf-8"))
    write_atomic(policy_dir / "README.md", f"---\n{_metadata(about).to_yaml()}\n---\n\n{text}")


def add_results(run_dir: Path, policy_dir: Path, summary: dict[str, Any], rows: list[tuple[str, str, str]]) -> None:
    """Put an evaluation into the policy's card, in place of an older one; what else its owner wrote there stays.

    summary is that of eval_summary.json, rows are those of the printed table. A folder that cannot be written, or a
    card that cannot be read, is only noted.
    """
    path = policy_dir / "README.md"
    try:
        if not path.exists():  # of a run of an older version
            write_card(run_dir, policy_dir)
        card = ModelCard.load(path)
        card.data.model_name = card.data.model_name or title_of(_about(run_dir))
        card.data.eval_results = eval_results(summary)
        results = _results(summary, rows)
        if RESULTS.search(card.text):
            card.text = RESULTS.sub(lambda place: place[1] + results + place[2], card.text)
        else:
            card.text += f"\n## Results\n\n<!-- results of eval.py -->\n{results}\n<!-- end of results -->\n"
        write_atomic(path, str(card))
        print(f"model card: {path}")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        print(f"note: the model card {path} is left as it was ({' '.join(f'{error}'.split())})")


def _about(run_dir: Path) -> dict[str, Any]:
    return dict(json.loads((run_dir / "config.json").read_text(encoding="utf-8")))


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


def title_of(about: dict[str, Any]) -> str:
    """What the card calls the model, by its base: gpt2-ppo."""
    base = public_name(about["policy_name"]).split("/")[-1]
    return re.sub(r"[^\w.-]+", "-", base) + "-ppo"


def _link(name: str, kind: str = "") -> str:
    shown = f"`{public_name(name)}`"
    return f"[{shown}](https://huggingface.co/{kind}{name})" if hub_name(name) else shown


def _reference(about: dict[str, Any]) -> str:
    return about["ref_name"] or about["policy_name"]


# --- parts of the card ----------------------------------------------------------------------------------------------


def _metadata(about: dict[str, Any]) -> ModelCardData:
    """The metadata of the page; no licence, which is for whoever publishes it to choose."""
    dataset = hub_name(about["dataset"])
    return ModelCardData(
        base_model=hub_name(about["policy_name"]),
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "ppo", "rlhf"],
    )


def _reward(about: dict[str, Any]) -> str:
    name, label = _link(about["rm_name"]), about.get("reward", {}).get("label")
    if python_reward(about["rm_name"]):
        return f"the Python function {name}"
    return f"the reward model {name}" if label is None else f"the classifier {name} (2·P({label}) − 1)"


def _interpolated(about: dict[str, Any]) -> str:
    """That the weights lie between base and policy, as tools.interpolate makes them."""
    if "interpolated" not in about:
        return ""
    runs, alpha, kl = (about["interpolated"][name] for name in ("runs", "alpha", "kl_seq_exact"))
    return (
        f"\n\nIts weights are base + {alpha:.3f} · (policy − base), averaged over {len(runs)} trained policies, "
        f"which puts it {kl:.2f} nats per response from its base."
    )


def _training(about: dict[str, Any], steps: int) -> str:
    """One paragraph on what was done with what."""
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("torch", "transformers"))
    dataset, batch_size = _link(about["dataset"], "datasets/"), about["batch_size"]
    return (
        f"{steps} steps of {batch_size} responses, {steps * batch_size:,} in all, to prompts from {dataset}; "
        f"step size {about['lr']:g}, price of KL {about['kl_coef']:g} per nat, seed {about['seed']}; "
        f"{versions}."
    )


def _settings(about: dict[str, Any]) -> str:
    """The settings that differ from train.py's defaults, as a table."""
    known = [f for f in fields(TrainConfig) if f.name in about and f.name not in NAMED_ELSEWHERE | NO_MATTER]
    rows = [(f.name, _shown(about[f.name]), _shown(f.default)) for f in known if about[f.name] != f.default]
    if not rows:
        return "All settings are the defaults."
    return "Settings that differ from the defaults:\n\n" + markdown_table(("setting", "value", "default"), rows)


def _shown(value: object) -> str:
    return "none" if value is None else f"`{public_name(value)}`" if isinstance(value, str) else f"{value}"


def _course(run_dir: Path) -> tuple[str, int]:
    """A few rows of the run, of held-out prompts where it had evaluations, as a table; and how many steps it took."""
    tables = {
        name: pd.read_csv(run_dir / name) if (run_dir / name).exists() else pd.DataFrame()
        for name in ("metrics.csv", "eval.csv")
    }
    steps = int(tables["metrics.csv"]["step"].iloc[-1]) if len(tables["metrics.csv"]) else 0
    what, table = ("held-out prompts", tables["eval.csv"])
    if not len(table):
        what, table = "the batches it was trained on", tables["metrics.csv"]
    if not len(table):
        return "", steps
    columns = [name for name in COURSE if name in table]
    chosen = sorted({round(i * (len(table) - 1) / (ROWS - 1)) for i in range(ROWS)})
    rows = [[COURSE[name][1].format(table[name].iloc[i]) for name in columns] for i in chosen]
    heading = f"Its course, on {what}:\n\n"
    return heading + markdown_table([COURSE[name][0] for name in columns], rows), steps


def _results(summary: dict[str, Any], rows: list[tuple[str, str, str]]) -> str:
    """The verdict and the table of an evaluation, and how it was made."""
    settings = summary["settings"]
    decoding = ", ".join(f"{name} {settings[name]:g}" for name in ("temperature", "top_k", "top_p", "max_new_tokens"))
    dataset = _link(settings["dataset"], "datasets/")
    dataset += f", split {settings['split']}" if has_splits(settings["dataset"]) else ""
    made = (
        f"{summary['n']} prompts from {dataset}, the same random numbers for policy and base; {decoding}; seed "
        f"{settings['seed']}. Brackets are 95 % intervals."
    )
    return f"{summary['verdict']}\n\n{made}\n\n{markdown_table(('', 'policy', 'base'), rows)}"


def eval_results(summary: dict[str, Any]) -> list[EvalResult]:
    """The main figures for the hub's metadata, each with its 95 % interval."""
    settings, ours = summary["settings"], summary["policy"]
    title, dataset = score_title(summary["label"]), public_name(settings["dataset"]).replace(":", "-")
    figures = [
        ("score_mean", f"mean {title}", ours["score_mean"], ours["score_ci"]),
        ("positive_rate", f"share of {summary['label']} responses", ours.get("positive_rate"), ours.get("positive_ci")),
        ("win_rate", "win-rate against base", summary["win_rate"], summary["win_rate_ci"]),
        ("kl_to_base", "KL to base, nats per response", summary["kl_seq_exact"], summary["kl_seq_exact_ci"]),
    ]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=kind,
            dataset_split=settings["split"] if has_splits(settings["dataset"]) else None,
            metric_name=name,
            metric_value=round(value, 4),
            metric_args={"interval_95": [round(end, 4) for end in interval], "prompts": summary["n"]},
        )
        for kind, name, value, interval in figures
        if value is not None
    ]


def markdown_table(columns: Any, rows: Any) -> str:
    """Rows of texts as a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.strip().replace('|', '&#124;') for cell in line)} |" for line in lines)
