"""Making models and the tiny world: what is written, what is refused, what a crash leaves."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
)

from config import UserError
from tools import make_models, tiny_reviews
from tools.make_models import (
    SIZES,
    draw_piece,
    judged_part,
    length_batches,
    lm_batch,
    main,
    resolve_name,
    tiny_world,
)

STEPS = ["--size", "tiny", "--lm_steps", "2", "--rm_steps", "2"]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "reviews.csv", ["good", "bad"])


@pytest.fixture(scope="module")
def made(reviews: Path) -> Path:
    torch.set_num_threads(1)  # more threads add up in another order
    out = reviews.parent / "nested" / "made"
    main(["--dataset", str(reviews), "--out", str(out), *STEPS])
    return out


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny world of so few rows and steps that it takes a second; its cache folder."""
    recipe = SIZES["tiny"]
    few = replace(recipe, lm=replace(recipe.lm, steps=2), rm=replace(recipe.rm, steps=2), vocab_size=400)
    monkeypatch.setattr(make_models, "TINY", replace(make_models.TINY, train_rows=60, test_rows=20, models=few))
    monkeypatch.setenv("GPT2_PPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_csv(path: Path, names: list[str] | list[int], n: int = 80, column: str = "label") -> Path:
    texts, labels = tiny_reviews.generate_reviews(n, seed=0)
    lines = [f'"{text}",{names[1 - label]}' for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join([f"text,{column}", *lines]) + "\n")
    return path


def make(dataset: Path | str, out: Path, *flags: str) -> Path:
    main(["--dataset", str(dataset), "--out", str(out), *STEPS, *flags])
    return out


# --- what is written ------------------------------------------------------------------------------


def test_policy_folder_is_a_plain_gpt2(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "policy")
    tokenizer = AutoTokenizer.from_pretrained(made / "policy")
    assert isinstance(model, GPT2LMHeadModel)
    assert (made / "policy" / "model.safetensors").is_file()
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert model.config.eos_token_id == model.config.bos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token is None
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("text", ["A film, isn't it?", " and the  ending\n is naïve 🎬"])
def test_policy_tokenizer_keeps_every_character_and_adds_none(made: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "policy")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id not in ids


def test_reward_folder_is_a_classifier_that_pads(made: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(made / "reward")
    tokenizer = AutoTokenizer.from_pretrained(made / "reward")
    batch = tokenizer(["A fine film.", "Dull.", ""], padding=True, return_tensors="pt")
    assert batch["input_ids"][:, 0].tolist() == [tokenizer.cls_token_id] * 3
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        together, alone = (
            model(**batch).logits,
            model(**tokenizer(["Dull."], return_tensors="pt")).logits,
        )
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=0)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.max_position_embeddings == tokenizer.model_max_length


def test_report_holds_what_was_measured(made: Path) -> None:
    report = json.loads((made / "report.json").read_text())
    assert 0 < report["policy"]["held_out_nats_per_token"] < 10
    assert 0 <= report["reward"]["held_out_accuracy"] <= 1
    assert report["reward"]["held_out_texts"] == 8
    assert report["recipe"]["lm"]["steps"] == 2
    assert [p.name for p in made.parent.iterdir()] == ["made"]


def test_same_seed_makes_the_same_models(reviews: Path, made: Path, tmp_path: Path) -> None:
    again = make(reviews, tmp_path / "again")
    for file in ("policy/model.safetensors", "reward/model.safetensors", "policy/tokenizer.json"):
        assert (again / file).read_bytes() == (made / file).read_bytes()


def test_init_continues_model_and_tokenizer(reviews: Path, made: Path, tmp_path: Path) -> None:
    out = make(reviews, tmp_path / "out", "--init", str(made / "policy"), "--lm_lr", "1e-9")
    before, after = (AutoModelForCausalLM.from_pretrained(folder / "policy") for folder in (made, out))
    torch.testing.assert_close(after.state_dict(), before.state_dict(), atol=1e-6, rtol=0)
    old, new = (AutoTokenizer.from_pretrained(folder / "policy") for folder in (made, out))
    assert old.get_vocab() == new.get_vocab()


def test_reward_init_keeps_the_encoder_and_takes_the_labels(made: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "ints.csv", [1, 0])
    out = make(table, tmp_path / "out", "--reward_init", str(made / "reward"), "--rm_lr", "1e-9")
    before, after = (AutoModelForSequenceClassification.from_pretrained(d / "reward") for d in (made, out))
    torch.testing.assert_close(after.distilbert.state_dict(), before.distilbert.state_dict(), atol=1e-6, rtol=0)
    assert after.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}


def test_classifier_rows_stand_between_what_the_tokenizer_puts_around_them() -> None:
    for around in ([], [7], [7, 8], [7, 8, 9]):
        batch = make_models.rm_batch([[1, 2], [3]], [0, 1], Around(around))  # type: ignore[arg-type]
        rows = [[*around[:1], *row, *around[1:]] for row in ([1, 2], [3])]
        found = [ids[mask > 0].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        assert found == rows
        assert batch["input_ids"][batch["attention_mask"] == 0].tolist() == [0]


class Around:
    """A tokenizer as far as rm_batch knows one."""

    pad_token_id = 0

    def __init__(self, around: list[int]) -> None:
        self.around = around

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.around}


def test_rows_without_label_go_to_the_language_model_only(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    texts, labels = tiny_reviews.generate_reviews(60, seed=0)
    rows = [{"text": t, "label": y if i < 40 else -1} for i, (t, y) in enumerate(zip(texts, labels, strict=True))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = json.loads((make(path, tmp_path / "out") / "report.json").read_text())
    assert report["policy"]["texts"] == 56
    assert report["reward"]["texts"] == 36
    assert report["reward"]["held_out_texts"] == 4


# --- what is refused ------------------------------------------------------------------------------


def test_wrong_input_is_refused_in_one_line(reviews: Path, tmp_path: Path) -> None:
    one = write_csv(tmp_path / "one.csv", ["good", "good"])
    (tmp_path / "empty.csv").write_text("text,label\n")
    (tmp_path / "file").write_text("")
    wrong = {
        "missing.csv": ["--dataset", str(tmp_path / "missing.csv")],
        "label_column='stars'": ["--label_column", "stars"],
        "text_column='body'": ["--text_column", "body"],
        "holds 1 different": ["--dataset", str(one)],
        "holds 80 different": ["--label_column", "text"],
        "no text": ["--dataset", str(tmp_path / "empty.csv")],
        "lm_steps=0": ["--lm_steps", "0"],
        "rm_lr=nan": ["--rm_lr", "nan"],
        "--size": ["--size", "huge"],
        "--colour": ["--colour", "red"],
        "exists": ["--out", str(tmp_path)],
        "cannot be written": ["--out", str(tmp_path / "file" / "out")],
        "init=": ["--init", str(tmp_path / "nowhere")],
    }
    for words, flags in wrong.items():
        with pytest.raises(UserError, match=words) as error:
            main(["--dataset", str(reviews), "--out", str(tmp_path / "out"), *STEPS, *flags])
        assert "\n" not in str(error.value), words
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*")), "a temporary folder is left"


def test_a_failure_halfway_leaves_no_folder(reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_models, "train_policy", crash)
    with pytest.raises(KeyboardInterrupt):
        make(reviews, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def crash(*_: object) -> None:
    raise KeyboardInterrupt


def test_diverging_training_is_refused(reviews: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower its step size"):
        make(reviews, tmp_path / "out", "--lm_lr", "1e30", "--lm_steps", "5")


# --- batches --------------------------------------------------------------------------------------


def test_length_batches_deal_every_row_once_within_the_budget() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 90) for _ in range(500)]
    batches = length_batches(lengths, 256, rng)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    widths = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert max(widths) <= 256
    assert sum(lengths) / sum(widths) > 0.9  # little padding


def test_length_batches_allow_a_row_beyond_the_budget() -> None:
    assert sorted(length_batches([5, 300], 64, random.Random(0))) == [[0], [1]]


def test_padding_does_not_change_the_language_model_loss(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made / "policy")
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    with torch.no_grad():
        together = model(**lm_batch(rows)).loss.item() * 7  # 5 + 2 predicted tokens
        alone = model(**lm_batch(rows[:1])).loss.item() * 5 + model(**lm_batch(rows[1:])).loss.item() * 2
    assert together == pytest.approx(alone, rel=1e-5)


def test_draw_piece_cuts_runs_within_the_limits() -> None:
    recipe = replace(SIZES["tiny"], crop_min=4, crop_max=10, crop_start=5)
    row, rng = list(range(30)), random.Random(0)
    pieces = [draw_piece(row, recipe, rng) for _ in range(500)]
    assert {len(piece) for piece in pieces} == set(range(4, 11))
    assert {piece[0] for piece in pieces} == set(range(6))
    assert all(piece == list(range(piece[0], piece[0] + len(piece))) for piece in pieces)
    assert draw_piece([1, 2], recipe, rng) == [1, 2]


def test_judged_part_is_what_follows_the_prompt() -> None:
    recipe = replace(SIZES["tiny"], skip=10, crop_max=4)
    assert judged_part(list(range(20)), recipe) == [10, 11, 12, 13]
    assert judged_part([1, 2, 3], recipe) == [2, 3]


# --- the tiny world -------------------------------------------------------------------------------


def test_tiny_world_is_made_once_and_reused(
    small_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    world = tiny_world()
    assert torch.rand(1) == expected, "making the models must not change the caller's random numbers"
    assert "once" in capsys.readouterr().err
    monkeypatch.setattr(make_models, "make_models", crash)
    assert tiny_world() == world
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
    monkeypatch.setattr(make_models, "make_models", lambda *_: REPORT)
    first = tiny_world()
    monkeypatch.setattr(make_models, "TINY", replace(make_models.TINY, seed=1))
    assert tiny_world() != first


REPORT = {
    "policy": {"held_out_nats_per_token": 1.0},
    "reward": {"held_out_accuracy": 1.0, "held_out_texts": 1},
}


def test_tiny_world_half_made_is_never_used(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(make_models, "train_policy", crash)
        with pytest.raises(KeyboardInterrupt):
            tiny_world()
    assert list(small_world.iterdir()) == []
    # what a power cut leaves, which nothing can clean up, does no harm either
    (small_world / ".tiny-0123.dead" / "policy").mkdir(parents=True)
    assert (tiny_world() / "reward" / "model.safetensors").is_file()


def test_tiny_world_of_another_process_wins(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def beaten(corpus: object, recipe: object, folder: Path, *_: object) -> dict[str, dict[str, float]]:
        winner = small_world / folder.name.split(".")[1]
        winner.mkdir()
        (winner / "mark").write_text("made by the other")
        return REPORT

    monkeypatch.setattr(make_models, "make_models", beaten)
    assert (tiny_world() / "mark").is_file()
    assert len(list(small_world.iterdir())) == 1


def test_unwritable_cache_is_named(tmp_path: Path, small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2_PPO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="GPT2_PPO_CACHE"):
        tiny_world()


def test_cache_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT2_PPO_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert make_models.cache_root() == Path("/a")
    monkeypatch.delenv("GPT2_PPO_CACHE")
    assert make_models.cache_root() == Path("/b/gpt2-ppo")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_models.cache_root() == tmp_path / ".cache" / "gpt2-ppo"


@pytest.mark.parametrize("name", ["gpt2", "./models/mine", "stanfordnlp/imdb", "tiny", ""])
def test_resolve_name_leaves_other_names_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_models, "tiny_world", crash)
    assert resolve_name(name) == name


def test_resolve_name_refuses_what_is_not_in_the_tiny_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_models, "tiny_world", crash)
    with pytest.raises(UserError, match="tiny:other"):
        resolve_name("tiny:other")
    with pytest.raises(UserError, match="tiny:reviews/validation"):
        resolve_name("tiny:reviews", "validation")


def test_resolve_name_gives_paths_that_exist(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in make_models.TINY_NAMES:
        assert os.path.isabs(resolve_name(name))
        assert os.path.exists(resolve_name(name))


def test_what_a_killed_making_left_is_removed_a_day_later(tmp_path: Path) -> None:
    old, young = tmp_path / ".world.00000000", tmp_path / ".world.11111111"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (1, 1))
    with make_models.new_folder(tmp_path / "world"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".world.11111111", "world"]
