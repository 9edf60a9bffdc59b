"""Reading every kind of file, cutting prompts, and dealing them out."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from config import UserError

import pandas as pd
import pytest
import torch
from conftest import EOS, train_tokenizer
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data import PromptStream, cut, describe_labels, label_names, load_examples, load_labelled, load_prompts, pad_left
from runtime.hub import load_tokenizer
from runtime.tables import is_file

TEXTS = ['A good film, "rare" even.', "Dull; too long\tby far.", "naïve ☃ 10/10"]


LABELS = ["positive", "negative", "positive"]


def save_csv(path: Path) -> None:
    pd.DataFrame({"text": TEXTS, "label": LABELS}).to_csv(path, index=False)


def save_tsv(path: Path) -> None:
    pd.DataFrame({"text": TEXTS, "label": LABELS}).to_csv(path, index=False, sep="\t")


def save_jsonl(path: Path) -> None:
    rows = zip(TEXTS, LABELS, strict=True)
    path.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in rows), "utf-8")


def save_parquet(path: Path) -> None:
    pd.DataFrame({"text": TEXTS, "label": LABELS}).to_parquet(path)


SAVERS = {"csv": save_csv, "tsv": save_tsv, "jsonl": save_jsonl, "parquet": save_parquet}


def refused(dataset: Path | str, split: str = "train", text_column: str = "text", **kw: str) -> str:
    with pytest.raises(UserError) as caught:
        load_examples(str(dataset), split, text_column, **kw)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", SAVERS)
def test_load_examples_reads_every_kind_of_table(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{kind}"
    SAVERS[kind](path)
    assert is_file(str(path))
    assert load_examples(str(path), "train", "text") == (TEXTS, None)
    assert load_examples(str(path), "test", "text", "label") == (TEXTS, LABELS)


@pytest.mark.parametrize("kind", SAVERS)
def test_load_examples_names_the_columns_when_one_is_missing(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{kind}"
    SAVERS[kind](path)
    message = refused(path, text_column="review")
    assert "text_column" in message
    assert "review" in message
    assert "text" in message.replace("text_column", "")
    assert "label" in message
    refused(path, label_column="stars")


def test_load_examples_reads_a_text_file_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "reviews.txt"
    path.write_text("First one.\n\n  \nThe, second\tone ☃\n", "utf-8")
    texts, labels = load_examples(str(path), "train", "text")
    assert [text.strip() for text in texts] == ["First one.", "The, second\tone ☃"]
    assert labels is None


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_load_examples_turns_line_breaks_into_spaces_and_drops_empty_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{kind}"
    frame = pd.DataFrame(
        {"text": ["One.<br /><br />Two.", "", "   ", None, "a<br/>b"], "label": ["p", "n", "n", "n", "q"]}
    )
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    texts, labels = load_examples(str(path), "train", "text", "label")
    assert [" ".join(text.split()) for text in texts] == ["One. Two.", texts[1]]
    assert "<br />" not in texts[0]
    assert texts[1] in ("a b", "a<br/>b")
    assert labels == ["p", "q"], "labels stay with their texts"


@pytest.mark.parametrize("word", ["NA", "null", "None", "nan", "1984", "True"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_load_examples_keeps_texts_that_look_like_something_else(word: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{kind}"
    path.write_text(f"text\n{word}\n", "utf-8")
    assert load_examples(str(path), "train", "text")[0] == [word]


def test_load_examples_refuses_a_missing_file(tmp_path: Path) -> None:
    for name in ("gone.csv", "gone.txt", "gone.parquet"):
        message = refused(tmp_path / name)
        assert "dataset" in message
        assert name in message


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "txt"])
def test_load_examples_refuses_an_empty_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{kind}"
    path.touch()
    assert path.name in refused(path)


def test_load_examples_refuses_a_file_with_empty_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text('text\n""\n" "\n')
    assert path.name in refused(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "jsonl"])
def test_load_examples_refuses_what_is_not_utf8(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviews.{kind}"
    text = {"jsonl": '{"text": "na\xefve"}\n'}.get(kind, "text\nna\xefve film\n")
    path.write_bytes(text.encode("latin-1"))
    message = refused(path)
    assert path.name in message
    assert "dataset" in message


def test_load_examples_refuses_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    assert path.name in refused(path)
    path = tmp_path / "reviews.parquet"
    path.write_bytes(b"PAR1 but not really")
    assert path.name in refused(path)


def test_load_examples_reads_a_saved_folder_with_named_classes(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {"text": TEXTS, "label": [1, 0, -1]}
    data = Dataset.from_dict(rows, features=features)
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "imdb")
    folder = str(tmp_path / "imdb")
    assert not is_file(folder)
    assert load_examples(folder, "train", "text", "label") == (TEXTS, ["pos", "neg", None])
    assert load_examples(folder, "test", "text", "label") == (TEXTS[1:2], ["neg"])
    message = refused(folder, split="validation")
    assert "split" in message
    assert "train" in message
    assert "test" in message
    assert "text_column" in refused(folder, text_column="review")


def test_load_examples_reads_a_folder_of_files(tmp_path: Path) -> None:
    pd.DataFrame({"text": TEXTS}).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    pd.DataFrame({"text": TEXTS[:1]}).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert load_examples(str(tmp_path), "train", "text")[0] == TEXTS
    assert load_examples(str(tmp_path), "test", "text")[0] == TEXTS[:1]


def test_load_examples_refuses_an_empty_folder_and_an_unknown_name(tmp_path: Path) -> None:
    assert "dataset" in refused(tmp_path)
    assert "dataset" in refused("nobody-at-all/no-such-data")


def write_rows(path: Path, **columns: list) -> str:
    frame = pd.DataFrame(columns, dtype=object)
    path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    return str(path)


def test_rows_that_are_left_out_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", text=["good", 5, None, " ", 7.5, "bad"])
    assert load_examples(path, "train", "text")[0] == ["good", "bad"]
    assert capsys.readouterr().out == (
        f"note: 4 of 6 rows of {path} have no text in column 'text' and are left out: 1 int, 2 blank, 1 float\n"
    )
    load_examples(write_rows(tmp_path / "b.jsonl", text=["good"]), "train", "text")
    assert capsys.readouterr().out == ""
    assert "(its rows: 2 int)" in refused(write_rows(tmp_path / "c.jsonl", text=[1, 2]))


def test_half_a_character_is_replaced(tmp_path: Path) -> None:
    """JSON can spell one, and no tokenizer takes it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b \\ud83c\\udfac"}')
    assert load_examples(str(path), "train", "text")[0] == ["a\N{REPLACEMENT CHARACTER} b 🎬"]


# --- labels ---------------------------------------------------------------------------------------------------------

NAMED = {
    "negative and positive": ([0, 1, 1, None], ["NEGATIVE", "POSITIVE", "POSITIVE", None]),
    "NA among numbers": (["0", "1", "NA", "nan"], ["NEGATIVE", "POSITIVE", None, None]),
    "NA among names": (["good", "NA"], ["good", "NA"]),
    "floats because of a blank": ([0.0, 1.0, None], ["NEGATIVE", "POSITIVE", None]),
    "spelt": (["0", "1", "", " 1 "], ["NEGATIVE", "POSITIVE", None, "POSITIVE"]),
    "spelt as floats": (["0.0", "1.0", "1"], ["NEGATIVE", "POSITIVE", "POSITIVE"]),
    "truth values": ([True, False, None], ["POSITIVE", "NEGATIVE", None]),
    "spelt truth values": (["False", "True", "TRUE"], ["NEGATIVE", "POSITIVE", "POSITIVE"]),
    "signs": (["+1", "-1", "1"], ["POSITIVE", "NEGATIVE", "POSITIVE"]),
    "none": ([-1, -1], [None, None]),
    "one class only": ([1, 1], ["1", "1"]),
    "stars": ([5, 1.0, 3], ["5", "1", "3"]),
    "a scale around 0": ([-2, -1, 0, 1], ["-2", "-1", "0", "1"]),
    "names": (["pos", "neg", None, " pos"], ["pos", "neg", None, "pos"]),
    "names and numbers": (["spam", 0, 1.0], ["spam", "0", "1"]),
    "codes": (["007", "7"], ["007", "7"]),
}


@pytest.mark.parametrize("case", NAMED)
def test_labels_are_decided_from_all_of_them(case: str, tmp_path: Path) -> None:
    labels, names = NAMED[case]
    path = write_rows(tmp_path / "a.jsonl", text=[f"text {i}" for i in range(len(labels))], label=labels)
    assert load_labelled(path, "train", "text", "label")[1] == names
    if all(isinstance(label, str) for label in labels):
        table = pd.DataFrame({"text": [f"text {i}" for i in range(len(labels))], "label": labels})
        table.to_csv(tmp_path / "a.csv", index=False)
        assert load_labelled(str(tmp_path / "a.csv"), "train", "text", "label")[1] == names


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0.1, 0.9, 1.0], "holds 0.1, which is a degree"),
        (["0", "0.5", ""], "holds 0.5, which is a degree"),
        ([1, float("inf")], "holds inf, which is a degree"),
        ([-1, 0, 1], "--label_names 0=...,1=...,-1=..."),
        (["-1", "0", "1"], "--label_names 0=...,1=...,-1=..."),
        ([-1, 0, None], "--label_names 0=...,-1=..."),
        ([-1, 0, 1, 2], "--label_names 0=...,1=...,2=...,-1=..."),
        ([[0], [1]], "holds [0], which is not a label"),
        ([{"name": "pos"}], "which is not a label"),
    ],
    ids=str,
)
def test_labels_that_may_mean_several_things_are_refused(labels: list, words: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", text=["text"] * len(labels), label=labels)
    with pytest.raises(UserError) as caught:
        load_labelled(path, "train", "text", "label")
    assert words in str(caught.value)


@given(
    labels=st.lists(st.none() | st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=9),
    form=st.sampled_from([str, float, int]),
    kind=st.sampled_from(["csv", "jsonl", "parquet"]),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_do_not_depend_on_how_they_are_written(
    labels: list[int | None], form: Callable, kind: str, tmp_path: Path
) -> None:
    written = [None if label is None else form(label) for label in labels]
    texts = [f"text {i}" for i in range(len(labels))]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_rows(path, text=texts, label=written)
    elif kind == "csv":
        pd.DataFrame({"text": texts, "label": written}, dtype=object).to_csv(path, index=False)
    else:
        pd.DataFrame({"text": texts, "label": written}).to_parquet(path)
    plain = {0, 1} == set(labels) - {None}
    names = {0: "NEGATIVE", 1: "POSITIVE"} if plain else {label: str(label) for label in labels}
    expected = [None if label is None else names[label] for label in labels]
    assert load_labelled(str(path), "train", "text", "label") == (texts, expected)


def test_names_can_be_given_to_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", text=["a", "b", "c", "d"], label=[-1, 0, 1, 0])
    given = "-1=so bad, 0=neutral,1="
    assert load_labelled(path, "train", "text", "label", given)[1] == ["so bad", "neutral", None, "neutral"]
    assert capsys.readouterr().out == "labels: -1 = so bad (1), 0 = neutral (2), none (1)\n"
    for wrong, words in (("0=x,1=y", "lacks the label -1"), ("bad,good", "is not understood"), ("", "not understood")):
        with pytest.raises(UserError, match=words):
            load_labelled(path, "train", "text", "label", wrong)


def test_what_labels_are_is_said_in_one_line() -> None:
    labels = [0, 1] * 12_500 + [None]
    line = describe_labels(labels, label_names(labels))
    assert line == "labels: 0 = NEGATIVE (12,500), 1 = POSITIVE (12,500), none (1)"
    assert describe_labels(["b", "a", "b"], ["b", "a", "b"]) == "labels: a (1), b (2)"
    assert describe_labels([None], [None]) == "labels: none (1)"
    many = [f"{i:02}" for i in range(30)]
    assert describe_labels(many, many).endswith("11 (1), 18 others")


# --- prompts --------------------------------------------------------------------------------------------------------


def test_load_tokenizer_round_trip_and_refusals(
    gpt2_dir: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = load_tokenizer("policy_name", str(gpt2_dir))
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert loaded.eos_token_id == EOS
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="policy_name") as caught:
            load_tokenizer("policy_name", name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_load_tokenizer_refuses_a_model_folder_without_one(gpt2_dir: Path, tmp_path: Path) -> None:
    """The library would make up a tokenizer without a vocabulary."""
    (tmp_path / "config.json").write_text((gpt2_dir / "config.json").read_text())
    with pytest.raises(UserError, match="policy_name"):
        load_tokenizer("policy_name", str(tmp_path))


def test_load_prompts_cuts_and_leaves_out(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["A good film", "x", "The acting is superb, and the ending made me cry!", "ab"]
    whole = [tokenizer(text)["input_ids"] for text in texts]
    assert len(whole[1]) == 1
    assert len(whole[2]) > 8
    assert len(whole[3]) == 2
    assert load_prompts(tokenizer, texts, 1, 8) == {i: whole[i][:8] for i in range(4)}
    assert load_prompts(tokenizer, texts, 2, 8) == {i: whole[i][:8] for i in (0, 2, 3)}
    assert load_prompts(tokenizer, texts, 3, 3) == {i: whole[i][:3] for i in (0, 2)}


def test_load_prompts_refuses_when_none_is_left(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="min_prompt_len") as caught:
        load_prompts(tokenizer, ["x", "y"], 5, 9)
    assert "\n" not in str(caught.value)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


long_texts = st.lists(st.one_of(words, st.sampled_from(TEXTS)), min_size=1, max_size=30).map(" ".join)


@given(text=long_texts, longest=st.integers(1, 40), repeat=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_load_prompts_cuts_exactly_as_if_the_whole_text_were_tokenised(text: str, longest: int, repeat: int) -> None:
    tokenizer = _TOKENIZER[0]
    text = text * repeat
    ids = tokenizer(text)["input_ids"]
    if whole := whole_characters(tokenizer, text, longest):
        assert load_prompts(tokenizer, [text], 1, longest) == {0: ids[:whole]}


def whole_characters(tokenizer: PreTrainedTokenizerFast, text: str, longest: int) -> int:
    """How many tokens, `longest` at most, spell whole characters: by the places in the text that the library gives."""
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    ends = [n for n in range(len(spans)) if not n or spans[n - 1][1] <= spans[n][0]] + [len(spans)]
    return max(n for n in ends if n <= longest)


LONG_WORDS = ["incomprehensibilities", "unforgettable", "cinematography", "melodrama", "of"]


LONG_TOKENS = PreTrainedTokenizerFast(
    tokenizer_object=train_tokenizer(
        600, ["<|endoftext|>"], [" " + " ".join(LONG_WORDS) + " " * 40 + "\n" * 9 + "!" * 30] * 20
    ),
    eos_token="<|endoftext|>",
)


@given(
    parts=st.lists(
        st.sampled_from([*(f" {word}" for word in LONG_WORDS), " " * 41, "\n" * 9, "!" * 30, " "]),
        min_size=1,
        max_size=60,
    ),
    longest=st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_load_prompts_cuts_exactly_where_tokens_are_long(parts: list[str], longest: int) -> None:
    ids = LONG_TOKENS("".join(parts))["input_ids"]
    assert load_prompts(LONG_TOKENS, ["".join(parts), "of it"], 1, longest)[0] == ids[:longest]


def test_long_tokens_are_long() -> None:
    assert all(len(LONG_TOKENS(f" {word}")["input_ids"]) == 1 for word in LONG_WORDS)


@pytest.mark.parametrize(
    "text", ["a" * 5000, " " * 5000, "é" * 3000, "the " * 2000, "good" * 2000, "\n" * 500 + "film"]
)
def test_load_prompts_cuts_texts_without_word_ends(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for longest in (1, 7, 64):
        ids = tokenizer(text)["input_ids"]
        if whole := whole_characters(tokenizer, text, longest):
            assert load_prompts(tokenizer, [text], 1, longest) == {0: ids[:whole]}
        else:
            with pytest.raises(UserError, match=f"max_prompt_len={longest} holds no whole character"):
                load_prompts(tokenizer, [text], 1, longest)


@given(text=st.text("电影ñé🎬👩‍👩‍👧 a.\N{REPLACEMENT CHARACTER}", min_size=1, max_size=12), longest=st.integers(0, 40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_cut_prompt_ends_with_a_whole_character(text: str, longest: int) -> None:
    """It spells the beginning of the text, and with one more character it would be too long."""
    tokenizer = _TOKENIZER[0]
    ids = cut(tokenizer, tokenizer(text)["input_ids"], longest)
    beginning = tokenizer.decode(ids)
    assert text.startswith(beginning)
    assert len(ids) == whole_characters(tokenizer, text, longest)


_TOKENIZER: list[PreTrainedTokenizerFast] = []


@pytest.fixture(autouse=True)
def remember_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Hypothesis does not mix with fixtures it could not reset; the tokenizer never changes."""
    _TOKENIZER[:] = [tokenizer]


def test_pad_left_puts_the_prompt_last() -> None:
    ids, mask = pad_left([[5, 6, 7], [8], [9, 4]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (10, 4), (7, 3), (5, 5), (3, 8), (1, 4), (9, 1)])
def test_prompt_stream_deals_every_prompt_once_per_epoch(n: int, batch: int) -> None:
    """Laid end to end, each n indices are a permutation, also where a batch spans two epochs."""
    stream = PromptStream([[i] for i in range(n)], batch, seed=3)
    steps = -(-6 * n // batch)
    dealt = [stream.indices(step) for step in range(1, steps + 1)]
    assert all(len(indices) == batch for indices in dealt)
    flat = [i for indices in dealt for i in indices]
    epochs = [flat[i : i + n] for i in range(0, 6 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 4:
        assert len({tuple(epoch) for epoch in epochs}) == 6, "each epoch has its own order"


def test_prompt_stream_is_a_function_of_seed_and_step() -> None:
    prompts = [[i] for i in range(50)]
    make: Callable[[int], PromptStream] = lambda seed: PromptStream(prompts, 8, seed)  # noqa: E731
    forwards = {step: make(0).indices(step) for step in range(1, 30)}
    stream = make(0)
    backwards = {step: stream.indices(step) for step in reversed(range(1, 30))}
    assert forwards == backwards
    assert make(1).indices(1) != make(0).indices(1)
    before = torch.get_rng_state()
    make(0).indices(5)
    assert torch.equal(before, torch.get_rng_state())


def test_prompt_stream_orders_are_uniform() -> None:
    """Every prompt is as often first as any other."""
    first = Counter(PromptStream([[i] for i in range(5)], 5, seed).indices(1)[0] for seed in range(1000))
    # binomial with mean 200 and standard deviation 12.6; five of them
    assert all(abs(first[i] - 200) < 64 for i in range(5))


def test_prompt_stream_batch_holds_the_prompts_of_its_indices() -> None:
    prompts = [[i + 1] * (i + 1) for i in range(6)]
    stream = PromptStream(prompts, 4, seed=0)
    for step in (1, 2, 3):
        batch = stream.batch(step)
        expected = [prompts[i] for i in stream.indices(step)]
        assert [row[m].tolist() for row, m in zip(batch.ids, batch.mask, strict=True)] == expected
        assert batch.ids.shape == batch.mask.shape == (4, max(map(len, expected)))
        assert batch.mask[:, -1].all()
        assert (batch.ids[~batch.mask] == 0).all()


def test_load_prompts_without_any_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="min_prompt_len"):
        load_prompts(tokenizer, [], 1, 4)
