"""The model card: what the library reads is what was meant, results come and go with the weights, no path leaks."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import run, run_eval
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.card import add_results, eval_results, hub_name, public_name, write_card

pytestmark = pytest.mark.usefixtures("no_pictures")


def with_settings(folder: Path, **changes: object) -> Path:
    """The run folder with other settings in its config.json."""
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "public", "on_hub"),
    [
        ("gpt2", "gpt2", True),
        ("lvwerra/gpt2-imdb", "lvwerra/gpt2-imdb", True),
        ("/home/ann/my/gpt2/", "gpt2", False),
        ("/home/ann/rewards.py:brevity", "rewards.py:brevity", False),
        ("tiny:policy", "tiny:policy", False),
        ("C:\\Users\\ann\\gpt2", "gpt2", False),
        ("/home/ann/reviews.csv", "reviews.csv", False),
    ],
)
def test_names_lose_the_folders_of_this_machine(name: str, public: str, on_hub: bool) -> None:
    assert public_name(name) == public
    assert (hub_name(name) == name) is on_hub


def test_an_exported_policy_has_a_card_and_still_loads(flags: dict[str, str], tmp_path: Path) -> None:
    folder = run(flags, "--eval_every=1")
    for policy in (folder / "policy_lm", folder / "best" / "policy_lm"):
        page = (policy / "README.md").read_text()
        assert str(tmp_path) not in page
        assert str(tmp_path.parent) not in page, "nor those of the models and the data"
        assert "{{" not in page
        card = ModelCard.load(policy / "README.md")
        assert card.data.to_dict() == yaml.safe_load(REGEX_YAML_BLOCK.search(page)[2])
        assert card.data.pipeline_tag == "text-generation"
        assert card.data.get("base_model") is card.data.get("datasets") is card.data.get("license") is None
        assert AutoModelForCausalLM.from_pretrained(policy)
        assert AutoTokenizer.from_pretrained(policy)
    page = (folder / "policy_lm" / "README.md").read_text()
    for words in (
        "| lr | 0.001 | 5e-05 |",
        "3 steps of 8 responses, 24 in all",
        "`reviews.jsonl`",
        "Not evaluated yet",
        "| 0 |",
        "| 3 |",
        "(2·P(positive) − 1)",
        "max_new_tokens=8",
    ):
        assert words in page, words


def test_a_resumed_run_writes_the_same_card(flags: dict[str, str], tmp_path: Path) -> None:
    whole = run({**flags, "ckpt_dir": str(tmp_path / "whole")})
    folder = run(flags)
    shutil.rmtree(folder / "state" / "step_000003")
    (folder / "policy_lm" / "README.md").write_text("damaged")
    run({"ckpt_dir": str(folder)}, "--resume")
    assert (folder / "policy_lm" / "README.md").read_bytes() == (whole / "policy_lm" / "README.md").read_bytes()


def test_hub_names_are_in_the_metadata_and_linked(finished_run: Path) -> None:
    with_settings(finished_run, policy_name="gpt2", dataset="stanfordnlp/imdb", rm_name="/home/ann/r.py:brevity")
    write_card(finished_run, finished_run / "policy_lm")
    card = ModelCard.load(finished_run / "policy_lm" / "README.md")
    assert (card.data.base_model, card.data.datasets) == ("gpt2", ["stanfordnlp/imdb"])
    assert "[`stanfordnlp/imdb`](https://huggingface.co/datasets/stanfordnlp/imdb)" in card.text
    assert "the Python function `r.py:brevity`" in card.text
    assert "ann" not in card.text.split()


def test_an_evaluation_puts_its_results_into_the_card(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_card(finished_run, finished_run / "policy_lm")
    path = finished_run / "policy_lm" / "README.md"
    mine = path.read_text().replace("library_name:", "license: mit\nlibrary_name:") + "\nMine.\n"
    path.write_text(mine)
    summaries = [run_eval(finished_run, tmp_path, "--seed", seed)[1] for seed in ("1", "2")]
    assert f"model card: {path}" in capsys.readouterr().out
    card = ModelCard.load(path)
    assert card.data.eval_results == eval_results(summaries[1])
    assert card.data.to_dict()["model-index"][0]["name"] == card.data.model_name
    score, low = summaries[1]["policy"]["score_mean"], summaries[1]["policy"]["score_ci"][0]
    assert card.data.eval_results[0].metric_value == pytest.approx(score, abs=1e-4)
    assert card.data.eval_results[0].metric_args["interval_95"][0] == pytest.approx(low, abs=1e-4)
    assert f"{score:+.3f} [{low:+.3f}" in card.text
    assert summaries[1]["verdict"] in card.text
    assert card.text.count("win-rate") == mine.count("win-rate") + 2, "the older results are gone"
    assert str(tmp_path) not in path.read_text()
    assert card.data.license == "mit"
    assert card.text.endswith("\nMine.\n")
    assert not [name for name in path.parent.iterdir() if "partial" in name.name]


def test_results_are_added_where_there_is_no_card_and_keep_a_page_without_marks(
    finished_run: Path, tmp_path: Path
) -> None:
    path = finished_run / "policy_lm" / "README.md"
    _, summary = run_eval(finished_run, tmp_path)
    assert ModelCard.load(path).data.eval_results == eval_results(summary)
    path.write_text("---\nlicense: mit\n---\nMy own page.\n")
    add_results(finished_run, path.parent, summary, {"Score": [("mean score", "1", "0")]})
    card = ModelCard.load(path)
    assert card.text == "My own page.\n"
    assert (card.data.license, card.data.eval_results) == ("mit", eval_results(summary))


@pytest.mark.parametrize("harm", ["damaged", "not writable"])
def test_a_card_that_cannot_be_updated_is_noted(
    harm: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished_run / "policy_lm" / "README.md"
    if harm == "damaged":
        path.write_text("---\nmodel-index: [{\n---\n")
    else:
        (path.parent / f".{path.name}.partial").mkdir()  # root may write everywhere else
    before = path.read_bytes() if path.exists() else None
    run_eval(finished_run, tmp_path)
    assert f"note: the model card {path} is left as it was (" in capsys.readouterr().out
    assert (path.read_bytes() if path.exists() else None) == before
