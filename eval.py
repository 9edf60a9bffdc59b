"""Compare a tuned policy with base GPT-2 on held-out prompts: is it better, how surely, and at what cost?

    python eval.py                              ckpts/policy_lm against the base it was trained from
    python eval.py --policy_path DIR            another run, or any GPT-2 folder
    python eval.py --top_k 50 --top_p 0.9       both models under another decoding
    python eval.py --frontier 64                and how far that is from the best possible at its KL

Both models respond to the same prompts with the same random numbers, so that differences are paired. Every number
follows from eval_results.csv alone. This is the order of things; the comparison, its statistics and its report are in
evaluation/.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from config import EvalConfig, TrainConfig

import pandas as pd

from evaluation.comparison import TO_LOWER, Comparison, evaluate, note_changed_models
from evaluation.files import ResultFiles
from evaluation.prompts import evaluation_split
from evaluation.settings import RUN_SETTINGS, settings_of_run
from evaluation.table import table, table_groups
from runtime.cli import parse_config
from runtime.cli import run as run_script
from runtime.device import keep_freed_memory
from runtime.distributed import is_main_process, main_process_first, process_group, raise_on_all_ranks
from runtime.fingerprints import saved_weights_sha256
from runtime.hub import quiet_libraries
from runtime.saved_run import SavedRun, policy_folder
from training.card import add_results
from training.parts import load_models


def main(cfg: EvalConfig) -> dict[str, Any]:
    """Evaluate, print the table, write results, summary, report and model card; returns the summary."""
    quiet_libraries()
    cfg = replace(cfg, policy_path=policy_folder(cfg.policy_path))
    files = ResultFiles.of(cfg)
    with process_group(cfg.device):
        with raise_on_all_ranks():
            files.check_writable()
            earlier = files.earlier(cfg)
            run = settings_of_run(cfg)
            cfg = replace(cfg, split=evaluation_split(cfg, run))
        with raise_on_all_ranks(TO_LOWER):
            comparison = load_comparison(cfg, run)
        keep_freed_memory()
        results = evaluate(comparison)
        if not is_main_process():
            return {}
        summary = describe(results, comparison)
        if earlier.get("judge_sha256") and summary["judge_sha256"] not in (None, earlier["judge_sha256"]):
            print("note: the second judge, or what it was fitted on, is not that of the results which are replaced")
        files.write(results, summary)
        print(table(summary))
        print(f"\nwritten: {files.table}, {files.summary}, and to look at: {files.report}")
        home, policy = SavedRun.of_policy(cfg.policy_path), Path(cfg.policy_path)
        if home is not None and policy.is_dir():
            add_results(home.folder, policy, summary, table_groups(summary))
        return summary


def load_comparison(cfg: EvalConfig, run: TrainConfig) -> Comparison:
    """Load all that an evaluation needs, with notes where it is not what the policy was trained on."""
    models = main_process_first(lambda: load_models(run, cfg.policy_path))
    note_changed_models(models, run, SavedRun.of_policy(cfg.policy_path))
    return Comparison.of(cfg, run, models)


def describe(results: pd.DataFrame, comparison: Comparison) -> dict[str, Any]:
    """What eval_summary.json holds: the estimates, the settings, and fingerprints of policy and second judge."""
    cfg, judge = comparison.cfg, comparison.judge
    of_run = {name: getattr(comparison.run, name) for name in RUN_SETTINGS}
    return {
        **comparison.summarise(results),
        "seed": cfg.seed,
        "settings": {**asdict(cfg), **of_run},
        "policy_sha256": saved_weights_sha256(Path(cfg.policy_path)),
        "judge_sha256": None if judge is None else judge.sha256,
    }


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(parse_config(EvalConfig))))
