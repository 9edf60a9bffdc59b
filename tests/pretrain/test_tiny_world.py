"""The tiny world: made once, whole or not at all, found without loading what makes it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from config import UserError

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pretrain import tiny_world
from pretrain.recipes import RECIPES
from pretrain.tiny_world import resolve_name


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny world of so few rows and steps that it takes a second; its cache folder."""
    recipe = RECIPES["tiny"]
    few = replace(recipe, lm=replace(recipe.lm, steps=2), rm=replace(recipe.rm, steps=2), vocab_size=400)
    monkeypatch.setattr(tiny_world, "TINY", replace(tiny_world.TINY, train_rows=60, test_rows=20, models=few))
    monkeypatch.setenv("GPT2_PPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def crash(*_: object) -> None:
    raise KeyboardInterrupt


def test_tiny_world_is_made_once_and_reused(
    small_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    world = tiny_world.tiny_world()
    assert torch.rand(1) == expected, "making the models must not change the caller's random numbers"
    assert "once" in capsys.readouterr().err
    monkeypatch.setattr("pretrain.models.make_models", crash)
    assert tiny_world.tiny_world() == world
    assert capsys.readouterr().err == ""
    assert [p.name for p in small_world.iterdir()] == [world.name]
    assert world.is_absolute()


def test_tiny_world_holds_models_and_disjoint_reviews(small_world: Path) -> None:
    train, test = (
        [json.loads(line) for line in Path(resolve_name(f"tiny:reviews/{split}")).read_text().splitlines()]
        for split in ("train", "test")
    )
    assert (len(train), len(test)) == (60, 20)
    assert {row["label"] for row in train} == {"positive", "negative"}
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert AutoModelForCausalLM.from_pretrained(resolve_name("tiny:policy"))
    reward = AutoModelForSequenceClassification.from_pretrained(resolve_name("tiny:reward"))
    assert reward.config.label2id == {"negative": 0, "positive": 1}


def test_tiny_world_changes_folder_with_its_recipe(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.models.make_models", lambda *_: REPORT)
    first = tiny_world.tiny_world()
    monkeypatch.setattr(tiny_world, "TINY", replace(tiny_world.TINY, seed=1))
    assert tiny_world.tiny_world() != first


REPORT = {"policy": {"held_out_nats_per_token": 1.0}, "reward": {"held_out_accuracy": 1.0, "held_out_texts": 1}}


def test_tiny_world_half_made_is_never_used(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.models.train_policy", crash)
        with pytest.raises(KeyboardInterrupt):
            tiny_world.tiny_world()
    assert list(small_world.iterdir()) == []
    # what a power cut leaves, which nothing can clean up, does no harm either
    (small_world / ".tiny-0123.dead" / "policy").mkdir(parents=True)
    assert (tiny_world.tiny_world() / "reward" / "model.safetensors").is_file()


def test_tiny_world_of_another_process_wins(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def beaten(corpus: object, recipe: object, folder: Path, *_: object) -> dict[str, dict[str, float]]:
        winner = small_world / folder.name.split(".")[1]
        winner.mkdir()
        (winner / "mark").write_text("made by the other")
        return REPORT

    monkeypatch.setattr("pretrain.models.make_models", beaten)
    assert (tiny_world.tiny_world() / "mark").is_file()
    assert len(list(small_world.iterdir())) == 1


def test_unwritable_cache_is_named(tmp_path: Path, small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2_PPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="GPT2_PPO_CACHE"):
        tiny_world.tiny_world()


def test_cache_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_PPO_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert tiny_world.cache_root() == Path("/a")
    monkeypatch.delenv("GPT2_PPO_CACHE")
    assert tiny_world.cache_root() == Path("/b/gpt2-ppo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiny_world.cache_root() == tmp_path / ".cache" / "gpt2-ppo"


@pytest.mark.parametrize("name", ["gpt2", "./models/mine", "stanfordnlp/imdb", "tiny", ""])
def test_resolve_name_leaves_other_names_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_world, "tiny_world", crash)
    assert resolve_name(name) == name


def test_resolve_name_refuses_what_is_not_in_the_tiny_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_world, "tiny_world", crash)
    with pytest.raises(UserError, match="tiny:other"):
        resolve_name("tiny:other")
    with pytest.raises(UserError, match="tiny:reviews/validation"):
        resolve_name("tiny:reviews", "validation")


def test_looking_up_a_name_loads_nothing_of_what_makes_the_world(small_world: Path) -> None:
    tiny_world.tiny_world()
    code = "import sys, pretrain.tiny_world as t; t.tiny_world = lambda: t.Path('/'); t.resolve_name('tiny:policy'); "
    code += (
        "sys.exit(any(m in sys.modules for m in ('torch', 'tokenizers', 'pretrain.models', 'pretrain.tiny_reviews')))"
    )
    root = Path(tiny_world.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_resolve_name_gives_paths_that_exist(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tiny_world.TINY_NAMES:
        assert os.path.isabs(resolve_name(name))
        assert os.path.exists(resolve_name(name))
