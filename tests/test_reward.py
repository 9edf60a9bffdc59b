"""The reward against the library's own classifier, one text at a time; Python functions, good ones and bad ones."""

import hashlib
import json
import math
import shutil
import signal
import textwrap
from pathlib import Path
from typing import Any

from config import UserError, python_reward, reward_names, runs_python

import pytest
import torch
import transformers
from conftest import save_classifier, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from reward import PythonReward, SentimentReward, choose_columns, load_reward
from runtime.cli import Stopped

TEXTS = [
    "A film this good is rare.",
    "dull",
    "I've never seen a worse movie; it's dull, badly lit and two hours too long. " * 5,
    "naïve & touching: 10/10 ☃",
    "The plot? Nothing happens.",
    "",
    "A",
]


def library_scores(folder: Path, texts: list[str], index: int) -> list[float]:
    """2 P(label) - 1 from the library's classes, in float64 and without any padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().double()
    scores = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:48]  # the model's longest input, counted from the start
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        scores.append(2 * torch.softmax(logits, 0)[index].item() - 1)
    return scores


def test_score_equals_the_library(classifier_dir: Path) -> None:
    scores = SentimentReward(str(classifier_dir), batch_size=3).score(TEXTS)
    assert scores.shape == (7,)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(library_scores(classifier_dir, TEXTS, 1), abs=1e-5)
    assert scores.std() > 0.1, "texts should differ"


def test_score_of_the_negative_label_is_the_opposite(classifier_dir: Path) -> None:
    good = SentimentReward(str(classifier_dir)).score(TEXTS)
    bad = SentimentReward(str(classifier_dir), target_label="negative").score(TEXTS)
    assert torch.allclose(good, -bad, atol=1e-5)


def test_score_finds_the_label_by_name(tmp_path: Path, classifier_dir: Path) -> None:
    """A model with its two outputs, and their names, exchanged gives the same scores."""
    swapped = save_classifier(tmp_path, {0: "positive", 1: "negative"}, swap=True)
    expected = SentimentReward(str(classifier_dir)).score(TEXTS)
    assert torch.allclose(SentimentReward(str(swapped)).score(TEXTS), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "target", "index"),
    [
        ({0: "NEGATIVE", 1: "POSITIVE"}, "positive", 1),
        ({0: "neg", 1: "pos"}, "positive", 1),
        ({0: "pos", 1: "neg"}, "negative", 1),
        ({0: "Positive", 1: "Neutral", 2: "Negative"}, "positive", 0),
        ({0: "negative", 1: "neutral", 2: "positive"}, "pos", 2),
        ({0: "joy", 1: "anger", 2: "fear"}, "Anger", 1),
        ({0: "1 star", 1: "2 stars", 2: "5 stars"}, "5 stars", 2),
    ],
)
def test_score_takes_any_label(tmp_path: Path, labels: dict[int, str], target: str, index: int) -> None:
    folder = save_classifier(tmp_path, labels)
    scores = SentimentReward(str(folder), target_label=target).score(TEXTS)
    assert scores.tolist() == pytest.approx(library_scores(folder, TEXTS, index), abs=1e-5)


@pytest.mark.parametrize("names", [("negative", "positive"), ("negative", "neutral", "positive")])
def test_log_odds_equal_the_library(tmp_path: Path, names: tuple[str, ...]) -> None:
    """With two labels the difference of their logits, from the library in float64; with more from its probabilities."""
    folder = save_classifier(tmp_path, dict(enumerate(names)))
    reward = load_reward(str(folder), log_odds=True, batch_size=3)
    odds = [(1 + score) / (1 - score) for score in library_scores(folder, TEXTS, len(names) - 1)]
    assert reward.label is None, "the scores are no probability"
    assert reward(TEXTS, []).tolist() == pytest.approx([math.log(x) for x in odds], abs=1e-4)
    assert reward(TEXTS, []).abs().max() > 1, "no bounds"
    assert reward([], []).shape == (0,)
    if len(names) == 2:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(TEXTS[0])["input_ids"]])).logits[0]
        assert float(reward(TEXTS[:1], [])) == pytest.approx(float(logits[1] - logits[0]), abs=1e-5)


def test_log_odds_of_the_other_label_are_the_opposite(classifier_dir: Path) -> None:
    good, bad = (load_reward(str(classifier_dir), label, log_odds=True)(TEXTS, []) for label in ("pos", "neg"))
    assert torch.allclose(good, -bad, atol=1e-5)


def test_a_single_output_is_its_own_log_odds(tmp_path: Path) -> None:
    folder = str(save_classifier(tmp_path, {0: "LABEL_0"}))
    plain, log_odds = (load_reward(folder, log_odds=choice)(TEXTS, []) for choice in (False, True))
    assert plain.tolist() == log_odds.tolist()


def test_unknown_label_names_the_choices(tmp_path: Path, classifier_dir: Path) -> None:
    with pytest.raises(UserError, match="target_label") as caught:
        SentimentReward(str(classifier_dir), target_label="joy")
    message = str(caught.value)
    assert "joy" in message
    assert "negative" in message
    assert "positive" in message
    assert "\n" not in message
    nameless = save_classifier(tmp_path, {0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(UserError, match="LABEL_0"):  # no guess which of them is the good one
        SentimentReward(str(nameless))


def test_score_is_unmoved_by_order_and_padding(classifier_dir: Path) -> None:
    reward = SentimentReward(str(classifier_dir), batch_size=64)
    together = reward.score(TEXTS)
    alone = torch.cat([reward.score([text]) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-5)
    order = [4, 0, 6, 2, 5, 1, 3]
    assert torch.allclose(reward.score([TEXTS[i] for i in order]), together[order], atol=1e-5)
    for size in (1, 2, 3, 7):
        other = SentimentReward(str(classifier_dir), batch_size=size).score(TEXTS)
        assert torch.allclose(other, together, atol=1e-5)


def test_score_cuts_long_texts_at_their_end(classifier_dir: Path) -> None:
    reward = SentimentReward(str(classifier_dir))
    start = "The acting is superb. " * 40
    scores = reward.score([start, start + "dull, bad, worse " * 50, "dull " * 40 + start])
    assert scores[0] == pytest.approx(scores[1].item(), abs=1e-6)
    assert abs(scores[0] - scores[2]) > 1e-3


def test_score_stays_in_range_and_takes_empty_texts(classifier_dir: Path, tmp_path: Path) -> None:
    reward = SentimentReward(str(classifier_dir))
    scores = reward.score(["", "", "dull", "\n"])
    assert scores.isfinite().all()
    assert scores.min() >= -1
    assert scores.max() <= 1
    assert scores[0] == pytest.approx(scores[1].item(), abs=1e-6)
    only_empty = reward.score([""])
    assert only_empty.tolist() == pytest.approx(scores[:1].tolist(), abs=1e-5)
    folder = save_classifier(tmp_path, {0: "negative", 1: "positive"})
    weights = load_file(folder / "model.safetensors")
    weights["classifier.weight"] *= 1e4  # a classifier that is always certain
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    certain = SentimentReward(str(folder)).score(TEXTS)
    assert certain.abs().max() == 1
    assert certain.min() >= -1


def test_score_takes_empty_texts_from_a_tokenizer_that_adds_nothing(classifier_dir: Path, tmp_path: Path) -> None:
    """A tokenizer like GPT-2's turns an empty response into no tokens at all."""
    AutoModelForSequenceClassification.from_pretrained(classifier_dir).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(classifier_dir)
    PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(280, ["<pad>", "<unk>", "<cls>"]),
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=48,
    ).save_pretrained(tmp_path)
    reward = SentimentReward(str(tmp_path))
    assert len(reward.tokenizer("")["input_ids"]) == 0 < len(tokenizer("")["input_ids"])
    mixed, alone = reward.score(["", "dull"]), reward.score([""])
    assert mixed.isfinite().all()
    assert mixed.abs().max() <= 1
    assert alone[0] == pytest.approx(mixed[0].item(), abs=1e-5)


def test_score_has_no_dropout_and_no_gradient(classifier_dir: Path) -> None:
    reward = SentimentReward(str(classifier_dir))
    first = reward.score(TEXTS)
    assert torch.equal(first, reward.score(TEXTS))
    assert not first.requires_grad


def test_score_in_bfloat16_stays_near(classifier_dir: Path) -> None:
    exact = SentimentReward(str(classifier_dir)).score(TEXTS)
    rough = SentimentReward(str(classifier_dir), dtype=torch.bfloat16).score(TEXTS)
    assert rough.dtype == torch.float32
    assert (exact - rough).abs().max() < 0.1  # 8 bits of mantissa in logits of size 1 to 4


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        SentimentReward(str(folder))
    message = str(caught.value)
    assert "rm_name" in message
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_reward_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(tmp_path)
    refused(tmp_path / "nowhere")


def test_reward_model_without_classifier_is_refused(gpt2_dir: Path, tmp_path: Path) -> None:
    """A language model would get a random classifier."""
    refused(gpt2_dir)
    folder = save_classifier(tmp_path, {0: "negative", 1: "positive"})
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder)


def test_reward_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, {0: "negative", 1: "positive"})
    for file in folder.glob("*token*"):
        file.unlink()
    refused(folder)


def test_reward_model_that_is_damaged_is_refused(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, {0: "negative", 1: "positive"})
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    refused(folder)


# --- any architecture -----------------------------------------------------------------------------------------------

FITS = 64  # tokens, special ones included, for all of these but XLNet and T5, which have no limit of their own
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": FITS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
GPT2_SIZES = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": FITS,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
BART_SIZES = {
    "vocab_size": 300,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": FITS,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
FROM_2 = {**SIZES, "max_position_embeddings": FITS + 2}  # positions 0 and 1 are for padding
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", SIZES),
    "RoBERTa": ("Roberta", FROM_2),
    "MPNet": ("MPNet", FROM_2),
    "data2vec": ("Data2VecText", FROM_2),
    "Longformer": ("Longformer", {**FROM_2, "attention_window": 8}),
    "DeBERTa": ("DebertaV2", {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "GPT-2, another padding id": ("GPT2", {**GPT2_SIZES, "pad_token_id": 2}),
    "GPT-2, no padding id": ("GPT2", GPT2_SIZES),
    "OPT": ("OPT", {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 32}),
    "Llama": ("Llama", {**SIZES, "num_key_value_heads": 2}),
    "BART": ("Bart", BART_SIZES),
    # these see their padding
    "FNet": ("FNet", SIZES),
    "MobileBERT": ("MobileBert", {**SIZES, "embedding_size": 32, "intra_bottleneck_size": 32}),
    "ConvBERT": ("ConvBert", {**SIZES, "embedding_size": 32, "conv_kernel_size": 3}),
    "XLNet": ("XLNet", {"vocab_size": 300, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32, "pad_token_id": 1}),
}


def save_kind(folder: Path, kind: str, **tokenizer_settings: object) -> Path:
    """A random classifier of some architecture, with a tokenizer like RoBERTa's and settings written beside it."""
    name, sizes = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**sizes, id2label={0: "negative", 1: "positive"})
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    bpe = train_tokenizer(300, ["<s>", "<pad>", "</s>"])
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    write_settings(folder / "tokenizer_config.json", tokenizer_settings)  # the library leaves some out when it saves
    return folder


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Change some settings in a file of JSON."""
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


LONG_TEXT = "A film this good is rare. " * 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_depends_on_its_text_alone(kind: str, tmp_path: Path) -> None:
    """Texts of all lengths, the empty one and one that is cut, against the library's model and one text at a time.

    The folder would pad and cut on the left.
    """
    folder = save_kind(tmp_path, kind, padding_side="left", truncation_side="left")
    fits = 512 if kind == "XLNet" else FITS
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for text in (*TEXTS, LONG_TEXT):
        ids = tokenizer.encode(text, add_special_tokens=False)[: fits - 2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[0, *ids, 2]])).logits[0]
        if kind == "GPT-2, another padding id":  # the library leaves out EOS here, for it looks like padding
            with torch.no_grad():
                model.config.pad_token_id = 1
                logits = model(input_ids=torch.tensor([[0, *ids, 2]])).logits[0]
        expected.append(2 * torch.softmax(logits.double(), 0)[1].item() - 1)
    reward = SentimentReward(str(folder))
    assert reward([*TEXTS, LONG_TEXT], []).tolist() == pytest.approx(expected, abs=1e-4)
    assert reward([""], []).tolist() == pytest.approx(expected[5:6], abs=1e-4)
    reward.check_longest()
    assert len({round(score, 3) for score in expected}) > 4, "texts should differ"


def test_a_text_that_is_too_long_may_be_cut_at_its_beginning(tmp_path: Path) -> None:
    """Whatever the folder says: cut_left decides."""
    folder = save_kind(tmp_path, "BERT", truncation_side="left")
    start, end = "The acting is superb. " * 60, "dull and badly lit " * 60
    for cut_left, same in ((False, start), (True, end)):
        scores = load_reward(str(folder), cut_left=cut_left)([start + end, same, start, end], []).tolist()
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        assert abs(scores[2] - scores[3]) > 1e-3


@pytest.mark.parametrize("kind", ["BERT", "GPT-2, no padding id"])
def test_other_names_for_padding_change_no_score(kind: str, tmp_path: Path) -> None:
    """The config's padding id is not that of the tokenizer, and tokenizer.json pads and cuts by itself."""
    plain, other = save_kind(tmp_path / "a", kind), tmp_path / "b"
    shutil.copytree(plain, other)
    write_settings(other / "config.json", {"pad_token_id": 7})
    strategy = {"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 7}
    cutting = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {**strategy, "pad_type_id": 0, "pad_token": "<pad>"}
    write_settings(other / "tokenizer.json", {"padding": padding, "truncation": cutting})
    scores = [load_reward(str(folder))(TEXTS, []).tolist() for folder in (plain, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_a_text_is_scored_beside_others_of_its_length_where_padding_would_be_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_reward(str(save_kind(tmp_path / "bert", "BERT")))
    assert "padding" not in capsys.readouterr().out
    reward = SentimentReward(str(save_kind(tmp_path / "fnet", "FNet")), batch_size=3)
    assert "note: scores of rm_name=" in capsys.readouterr().out
    widths: list[tuple[int, ...]] = []
    reward.model.register_forward_pre_hook(
        lambda _, __, named: widths.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    reward(["dull"] * 4 + ["", "dull and dull"], [])
    assert [rows for rows, _ in widths] == [1, 3, 1, 1], "as many at a time as there are, and three at most"


class Undecided(torch.nn.Module):
    """The end of a classifier whose outputs are random."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(x), 2)


def test_a_classifier_that_scores_at_random_is_refused(classifier_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = AutoModelForSequenceClassification.from_pretrained

    def random_outputs(*args: Any, **named: Any) -> Any:
        model, info = load(*args, **named)
        model.classifier = Undecided()
        return model, info

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", random_outputs)
    assert "differently each time" in refused(classifier_dir)


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
ENDS_IN_TYPE_2 = {  # as XLNet's tokenizer ends a text
    "type": "TemplateProcessing",
    "single": [TEXT, {"SpecialToken": {"id": "</s>", "type_id": 2}}],
    "pair": [TEXT, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}},
}


@pytest.mark.parametrize(
    ("kind", "file", "settings", "words"),
    [
        ("BERT", "tokenizer_config.json", {"model_max_length": 2}, "no room for a text in its 2 tokens"),
        ("BERT", "tokenizer_config.json", {"model_max_length": "64"}, "model_max_length"),
        ("BERT", "tokenizer_config.json", {"pad_token": "[new]"}, "ids up to 300, and a model for 300"),
        ("BERT", "tokenizer_config.json", {"pad_token": None}, "padding token"),
        ("BERT", "config.json", {"vocab_size": 200}, r"embeddings.weight is (300, 32) instead of (200, 32)"),
        ("BERT", "config.json", {"max_position_embeddings": 128}, "instead of (128, 32)"),
        ("BERT", "config.json", {"max_position_embeddings": None}, "max_position_embeddings"),
        ("BERT", "config.json", {"pad_token_id": 9999}, "padding_idx"),
        ("BERT", "config.json", {"id2label": {"0": "a", "1": "b", "2": "positive"}}, "is (2,) instead of (3,)"),
        ("BERT", "config.json", {"id2label": {"0": 0, "1": 1}}, "choose 0, 1"),
        ("BERT", "config.json", {"id2label": {"0": None, "1": True}}, "choose None, True"),
        ("BERT", "config.json", {"id2label": {"0": "pos", "1": "positive"}}, "which output is 'positive'"),
        ("BERT", "config.json", {"id2label": {"0": "negative", "5": "positive"}}, "which output is 'positive'"),
        ("BART", "tokenizer.json", {"post_processor": None}, "<eos>"),
        ("XLNet", "tokenizer.json", {"post_processor": ENDS_IN_TYPE_2}, "token types"),
    ],
)
def test_a_model_whose_files_do_not_fit_together_is_one_line(
    kind: str, file: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = save_kind(tmp_path, kind)
    write_settings(folder / file, settings)
    assert words.lower() in refused(folder).lower()


def test_a_label_may_be_a_number(tmp_path: Path) -> None:
    folder = save_kind(tmp_path, "BERT")
    expected = load_reward(str(folder), "positive")(TEXTS, []).tolist()
    write_settings(folder / "config.json", {"id2label": {"0": 0, "1": 1}, "label2id": {"0": 0, "1": 1}})
    assert load_reward(str(folder), "1")(TEXTS, []).tolist() == expected


# --- a single output ------------------------------------------------------------------------------------------------


def test_a_single_output_is_the_score_itself(tmp_path: Path) -> None:
    """As reward models trained on preferences have it; against the library's own logits, one text at a time."""
    folder = save_classifier(tmp_path, {0: "LABEL_0"})
    reward = load_reward(str(folder), batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().double()
    with torch.no_grad():
        expected = [float(model(torch.tensor([tokenizer(text)["input_ids"][:48]])).logits[0, 0]) for text in TEXTS]
    assert reward.label is None
    assert reward(TEXTS, []).tolist() == pytest.approx(expected, abs=1e-5)
    assert reward([], []).shape == (0,)
    assert max(map(abs, expected)) > 1, "not squashed"


def test_a_single_output_that_is_a_label_stays_one(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, {0: "toxic"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    reward = load_reward(str(folder), target_label="toxic")
    assert reward.label == "toxic"
    assert reward(TEXTS, []).abs().max() <= 1


# --- Python ---------------------------------------------------------------------------------------------------------


def python_reward_of(folder: Path, source: str, name: str = "f") -> PythonReward:
    """A reward of this source in a file of its own, with a data set that has no columns."""
    (folder / "my_rewards.py").write_text(textwrap.dedent(source))
    reward = PythonReward(f"{folder / 'my_rewards.py'}:{name}")
    assert choose_columns(reward, []) == []
    return reward


@pytest.fixture(scope="module")
def any_result(tmp_path_factory: pytest.TempPathFactory) -> PythonReward:
    return python_reward_of(tmp_path_factory.mktemp("any"), "def f(responses): return f.result")


GIVEN = ["one", "two words", "three more words"]


@pytest.mark.parametrize(
    "source",
    [
        "def f(responses): return [len(r.split()) for r in responses]",
        "def f(responses, prompts): return [len(r.split()) for r in responses]",
        "def f(responses, prompts=None): return [len(r.split()) for r, p in zip(responses, prompts)]",
        "def f(responses, unit=1): return [unit * len(r.split()) for r in responses]",
        "def f(*texts): return [len(r.split()) for r, p in zip(*texts)]",
        "import numpy as np\ndef f(responses): return np.array([len(r.split()) for r in responses])",
        "import torch\ndef f(responses): return torch.tensor([len(r.split()) for r in responses])",
        "import torch\ndef f(responses): return torch.tensor([1.0, 2, 3], requires_grad=True).bfloat16()",
        "import torch\ndef f(responses): return [torch.tensor(float(len(r.split()))) for r in responses]",
        "import pandas as pd\ndef f(responses): return pd.Series([len(r.split()) for r in responses], index=[7, 8, 9])",
        "def f(responses): return tuple(len(r.split()) for r in responses)",
        "f = lambda responses: [True, 2.0, 3]",
        "class f:\n  def __call__(self, responses): return [len(r.split()) for r in responses]",
        "class f:\n  def __init__(self, device): self.device = device\n"
        "  def __call__(self, responses, prompts): return [len(r.split()) for r in responses if self.device == 'cpu']",
        "class G:\n  def __call__(self, responses): return [len(r.split()) for r in responses]\nf = G()",
        "import functools\ndef g(unit, responses): return [unit * len(r.split()) for r in responses]\n"
        "f = functools.partial(g, 1)",
        "from helper import count\ndef f(responses): return [count(r) for r in responses]",
        "def f(responses):\n  n = len(responses)\n  scores = [len(r.split()) for r in responses]\n"
        "  responses.clear()\n  return scores",
        "import time\ndef f(responses):\n  time.sleep(0.2)\n  return [1, 2, 3]",
    ],
)
def test_any_shape_of_function_and_any_kind_of_numbers(source: str, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def count(text): return len(text.split())\n")
    reward, given = python_reward_of(tmp_path, source), list(GIVEN)
    scores = reward(given, ["a", "b", "c"])
    assert scores.tolist() == [1, 2, 3]
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert given == GIVEN, "a function cannot change the run's own list"
    assert reward([], []).shape == (0,), "a process without rows does not call it"


def test_prompts_arrive_with_their_responses(tmp_path: Path) -> None:
    reward = python_reward_of(
        tmp_path, "def f(responses, prompts): return [len(r) + 100 * len(p) for r, p in zip(responses, prompts)]"
    )
    assert reward(["a", "bb"], ["ccc", "d"]).tolist() == [301, 102]


# Every function below returns 100 times the lengths of the prompts, plus those of the responses.
BOTH = "[100 * len(p) + len(r) for p, r in zip({p}, {r})]"
TIMED = "def timed(g):\n  def call(*args, **kwargs): return g(*args, **kwargs)\n  return call\n"


@pytest.mark.parametrize(
    ("parameters", "p", "r"),
    [
        ("responses, prompts", "prompts", "responses"),
        ("a, prompts", "prompts", "a"),
        ("prompts, completions", "prompts", "completions"),
        ("prompt, response", "prompt", "response"),
        ("prompts, completions, **kwargs", "prompts", "completions"),
        ("completions, prompts, **kwargs", "prompts", "completions"),
        ("completions, **kwargs", "kwargs['prompts']", "completions"),
        ("prompts, **kwargs", "prompts", "kwargs['completions']"),
        ("**kwargs", "kwargs['prompts']", "kwargs['completions']"),
        ("query, response", "query", "response"),
        ("prompt_texts, response_texts", "prompt_texts", "response_texts"),
        ("Prompts, Texts", "Prompts", "Texts"),
        ("prompts=None, completions=None", "prompts", "completions"),
        ("responses, prompt=None", "prompt", "responses"),
        ("a, unit=1, prompts=()", "prompts", "a"),
        ("responses, *, prompts=None", "prompts", "responses"),
        ("a, *, prompts", "prompts", "a"),
        ("*, responses, prompts", "prompts", "responses"),
        ("*, prompts, completions, **rest", "prompts", "completions"),
        ("responses, prompts, /", "prompts", "responses"),
        ("prompts, completions, /", "prompts", "completions"),
        ("*texts", "texts[1]", "texts[0]"),
        ("responses, *rest", "rest[0]", "responses"),
        ("responses, prompts, text_weight=1, output='', unit=1", "prompts if text_weight == 1 else 0", "responses"),
    ],
)
@pytest.mark.parametrize("form", ["plain", "wrapped", "method", "wrapped method"])
def test_a_parameter_gets_what_its_name_says(parameters: str, p: str, r: str, form: str, tmp_path: Path) -> None:
    body = f"return {BOTH.format(p=p, r=r)}"
    decorator = "@timed\n" if "wrapped" in form else ""
    if "method" in form:
        source = "class f:\n" + textwrap.indent(f"{decorator}def __call__(self, {parameters}): {body}", "  ")
    else:
        source = f"{decorator}def f({parameters}): {body}"
    reward = python_reward_of(tmp_path, TIMED + source)
    assert reward(["a", "bb"], ["ccc", "d"]).tolist() == [301, 102]


@pytest.mark.parametrize(
    "parameters",
    [
        "prompts, x",
        "x, completions",
        "prompts",
        "query",
        "texts, responses",
        "prompt, query",
        "samples, prompts, outputs",
        "prompts, completions, answer",
        "*args, **kwargs",
        "",
        "responses, *, weights",
        "a, b",
        "responses, b",
        "responses, answer=None",
        "responses, prompts, text_weight=1, output=None",
    ],
)
def test_what_a_function_wants_is_refused_where_it_is_not_clear(parameters: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can ask for responses \(or completions, texts\), prompts") as caught:
        python_reward_of(tmp_path, f"def f({parameters}): return [1.0, 2.0, 3.0]")
    assert f"({parameters})" in str(caught.value)
    assert "my_rewards.py:1" in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "def f(responses, prompt=None): return [2 * len(r) for r in responses] if prompt else None",
        "import functools\ndef g(responses, prompts): return [prompts[0] * len(r) for r in responses]\n"
        "f = functools.partial(g, prompts=[2])",
        "import functools\n@timed\ndef g(unit, responses): return [unit * len(r) for r in responses]\n"
        "f = functools.partial(g, 2)",
        "import numpy\nf = numpy.vectorize(lambda response: 2 * len(response))",
        "import numpy\n@numpy.vectorize\ndef f(prompt, response): return len(prompt) + 2 * len(response) - 1",
        "import torch\nclass f(torch.nn.Module):\n  def forward(self, responses):\n"
        "    return torch.tensor([2.0 * len(r) for r in responses])",
        "import torch\nclass f(torch.nn.Module):\n  def forward(self, prompts, completions):\n"
        "    return torch.tensor([2.0 * len(r) for r in completions])",
        "import torch\nclass M(torch.nn.Module):\n  def __call__(self, responses):\n"
        "    return torch.tensor([2.0 * len(r) for r in responses])\nf = M()",
        "@timed\n@timed\ndef f(prompts, completions): return [2 * len(r) for r in completions]",
        "class Timed:\n  def __init__(self, g): self.g = g\n"
        "  def __call__(self, *args, **kwargs): return self.g(*args, **kwargs)\n"
        "@Timed\ndef f(responses): return [2 * len(r) for r in responses]",
        "def g(responses): return [2 * len(r) for r in responses]\nf = lambda *args, **kwargs: g(*args, **kwargs)",
        "import functools\ndef each(g):\n  @functools.wraps(g)\n  def call(texts): return [g(2, r) for r in texts]\n"
        "  return call\n@each\ndef f(unit, text): return unit * len(text)",
        "class G:\n  @staticmethod\n  def s(prompts, completions): return [2 * len(r) for r in completions]\nf = G.s",
        "class G:\n  @classmethod\n  def s(cls, completion): return [2 * len(r) for r in completion]\nf = G.s",
        "import torch\n@torch.inference_mode()\ndef f(responses):\n"
        "  return torch.tensor([2.0 * len(r) for r in responses])",
    ],
)
def test_whatever_can_be_called_is(source: str, tmp_path: Path) -> None:
    scores = python_reward_of(tmp_path, TIMED + source)(["four", "sixsix"], ["p", "q"])
    assert scores.tolist() == [8, 12]
    assert not scores.is_inference(), "it can be used in training"


@pytest.mark.filterwarnings("error")
def test_a_coroutine_is_awaited(tmp_path: Path) -> None:
    """In one event loop, which outlives a call: what a client keeps open stays open."""
    source = """
        import asyncio
        loops = []
        async def one(text):
            await asyncio.sleep(0)
            return len(text.split())
        async def f(responses):
            loops.append(asyncio.get_running_loop())
            assert len(set(map(id, loops))) == 1
            return await asyncio.gather(*map(one, responses))
        """
    reward = python_reward_of(tmp_path, source)
    assert [reward(GIVEN).tolist() for _ in range(2)] == [[1, 2, 3]] * 2
    (tmp_path / "failing.py").write_text("async def f(responses): return [1 / 0]")
    with pytest.raises(UserError, match=r"ZeroDivisionError.*in f, .*failing.py:1"):
        PythonReward(f"{tmp_path / 'failing.py'}:f")(GIVEN)


def test_a_buffer_that_is_used_again_does_not_change_earlier_scores(tmp_path: Path) -> None:
    source = """
        import torch
        kept = torch.zeros(2)
        def f(responses):
            kept.copy_(torch.tensor([float(len(r)) for r in responses]))
            return kept
        """
    reward = python_reward_of(tmp_path, source)
    first = reward(["a", "bb"])
    reward(["four", "four"])
    assert first.tolist() == [1, 2]


def test_a_class_is_built_once(tmp_path: Path) -> None:
    reward = python_reward_of(
        tmp_path,
        """
        built = []
        class f:
            def __init__(self):
                built.append(1)
            def __call__(self, responses):
                return [float(len(built)) for _ in responses]
        """,
    )
    assert [reward(GIVEN)[0].item() for _ in range(3)] == [1, 1, 1]


def test_a_function_may_be_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "scores.py").write_text("def f(responses): return [2.0] * len(responses)\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = PythonReward("some_package.scores:f")
    assert reward(GIVEN).tolist() == [2, 2, 2]
    assert reward.file == str(package / "scores.py")
    assert reward.sha256 == hashlib.sha256((package / "scores.py").read_bytes()).hexdigest()


def test_prints_go_above_the_bar_and_not_astray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python_reward_of(tmp_path, "def f(responses):\n  print('hello', len(responses))\n  return [1.0, 2, 3]")(GIVEN)
    assert capsys.readouterr().out == "hello 3\n"


BAD_RESULTS = {
    "[1.0, 2.0]": ["list of shape (2,)", "each of 3 responses"],
    "[1.0, 2.0, float('nan')]": ["returned nan for response 3 of 3", "three more words"],
    "[1.0, float('-inf'), 0]": ["returned -inf for response 2 of 3"],
    "[1e300, 0, 0]": ["returned inf for response 1 of 3"],
    "None": ["returned NoneType"],
    "[None, 1.0, 2.0]": ["returned list"],
    "['1', '2', '3']": ["returned list"],
    "'abc'": ["returned str"],
    "{1.0, 2.0, 3.0}": ["returned set"],
    "dict(a=1, b=2, c=3)": ["returned int of shape () in part 'a'"],
    "dict(a=[1, 2, 3], b=[1, 2])": ["returned list of shape (2,) in part 'b'"],
    "dict(a=[1, 2, 3], b=[1, 2, float('nan')])": ["returned nan in part 'b' for response 3 of 3"],
    "{}": ["returned a dict without names"],
    "{1: [1, 2, 3]}": ["returned a dict without names"],
    "(x for x in [1, 2, 3])": ["returned generator"],
    "3.0": ["float of shape ()"],
    "[[1.0], [2.0], [3.0]]": ["list of shape (3, 1)"],
    "[[1.0], [2.0, 3.0], []]": ["returned list"],
    "torch.zeros(3, 2)": ["Tensor of shape (3, 2)"],
    "torch.zeros(3, dtype=torch.complex64)": ["returned Tensor"],
    "[1j, 2, 3]": ["returned list"],
}


@pytest.mark.parametrize("result", BAD_RESULTS)
def test_a_wrong_result_is_one_line_with_function_file_and_line(result: str, tmp_path: Path) -> None:
    reward = python_reward_of(tmp_path, f"import torch\n\ndef f(responses):\n    return {result}\n")
    with pytest.raises(UserError) as caught:
        reward(GIVEN)
    message = str(caught.value)
    assert all(words in message for words in BAD_RESULTS[result]), message
    assert f"in f, {tmp_path / 'my_rewards.py'}:3" in message
    assert message.startswith("rm_name=")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("body", "words", "line"),
    [
        ("raise ValueError('no\\nluck')", "ValueError: no luck", 4),
        ("return [1 / 0]", "ZeroDivisionError", 4),
        ("sys.exit(3)", "SystemExit: 3", 4),
        ("assert False", "AssertionError", 4),
        ("return deeper(responses)", "KeyError", 7),
        ("return json.loads('{')", "JSONDecodeError", 4),
        ("return [responses[99]]", "IndexError", 4),
        ("while True: raise StopIteration", "StopIteration", 4),
        ("return deepest(responses)", "RecursionError", 9),
        ("raise KeyboardInterrupt", "(KeyboardInterrupt)", 4),
        ("raise GeneratorExit", "(GeneratorExit)", 4),
        ("raise __import__('asyncio').CancelledError", "(CancelledError)", 4),
        ("raise type('PanicException', (BaseException,), {})('a panic')", "(PanicException: a panic)", 4),
        ("raise type('Mute', (Exception,), {'__str__': None})", "(Mute)", 4),
        ("raise __import__('config').UserError('no luck')", "failed (no luck)", 4),
    ],
)
def test_whatever_it_raises_is_one_line_that_says_where(
    body: str, words: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: None)  # as in a run, which waits for Ctrl-C itself
    source = f"import sys, json\n\ndef f(responses):\n    {body}\n\ndef deeper(responses):\n    return dict()[3]\n"
    reward = python_reward_of(tmp_path, source + "def deepest(x):\n    return deepest(x)\n")
    with pytest.raises(UserError) as caught:
        reward(GIVEN)
    message = str(caught.value)
    assert words in message
    assert f"{tmp_path / 'my_rewards.py'}:{line}" in message, message
    assert "\n" not in message


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError(), KeyboardInterrupt(), Stopped(1, "")])
def test_too_little_memory_and_an_interruption_pass_through(
    error: BaseException, any_result: PythonReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(responses: list[str]) -> None:
        raise error

    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)  # also in the background
    monkeypatch.setattr(any_result, "function", fail)
    with pytest.raises(type(error)):
        any_result(GIVEN)


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("def g(responses): return 1", "f", ["has no 'f'", "it has g"]),
        ("def f(responses):\n  return [", "f", ["SyntaxError", "my_rewards.py:2"]),
        ("import nothing_of_the_sort", "f", ["ModuleNotFoundError", "my_rewards.py:1"]),
        ("f = 3", "f", ["int", "cannot be called"]),
        ("def f(): return 1", "f", ["asks for no responses", "my_rewards.py:1"]),
        ("def f(a, b, c): return 1", "f", ["(a, b, c)", "my_rewards.py:1"]),
        ("def f(responses, *, key): return 1", "f", ["nothing says what 'key' is"]),
        ("class f:\n  def __init__(self):\n    raise RuntimeError('no model')", "f", ["no model", "my_rewards.py:3"]),
        ("class f:\n  def __init__(self, path): pass", "f", ["TypeError", "path"]),
        ("class f: pass", "f", ["cannot be called"]),
        ("raise SystemExit('bye')", "f", ["SystemExit: bye"]),
    ],
)
def test_what_cannot_be_loaded_is_one_line(source: str, name: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        python_reward_of(tmp_path, source, name)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.startswith("rm_name=")
    assert "\n" not in message


def test_a_file_or_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/none.py:f", "no_such_package.module:f"):
        with pytest.raises(UserError, match=r"no file|No module named") as caught:
            PythonReward(name)
        assert name in str(caught.value)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    result=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner, inner) | st.dictionaries(st.text(), inner),
        max_leaves=6,
    )
)
def test_any_result_is_three_finite_numbers_or_one_line(result: object, any_result: PythonReward) -> None:
    any_result.function.result = result  # type: ignore[attr-defined]
    reward = any_result
    reward.returned_parts = None
    try:
        scores = reward(GIVEN)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert scores.isfinite().all()
        rows = [*zip(*result.values(), strict=True)] if isinstance(result, dict) else [[x] for x in result]  # type: ignore[attr-defined]
        assert scores.tolist() == pytest.approx([sum(map(float, row)) for row in rows], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rewards.py:f", ("rewards.py", "f")),
        ("/some/where else/r.py:f_2", ("/some/where else/r.py", "f_2")),
        ("C:\\my rewards\\r.py:f", ("C:\\my rewards\\r.py", "f")),
        ("package.module:f", ("package.module", "f")),
        ("module:f", ("module", "f")),
        ("tiny:reward", None),
        ("lvwerra/distilbert-imdb", None),
        ("C:\\models\\rm", None),
        ("rewards.py", None),
        ("rewards.py:", None),
        ("models/rm:2", None),
    ],
)
def test_names_of_python_rewards(name: str, found: tuple[str, str] | None) -> None:
    assert python_reward(name) == found


@pytest.mark.parametrize(
    ("name", "found", "runs"),
    [
        ("rewards.py:f", ["rewards.py:f"], True),
        ("a.py:f, b.py:g", ["a.py:f", "b.py:g"], True),
        ("lvwerra/distilbert-imdb,b.py:g", ["lvwerra/distilbert-imdb", "b.py:g"], True),
        ("b.py:g,lvwerra/distilbert-imdb", ["b.py:g", "lvwerra/distilbert-imdb"], True),
        ("tiny:reward,package.module:g", ["tiny:reward", "package.module:g"], True),
        ("tiny:reward,models/rm", ["tiny:reward", "models/rm"], False),
        ("one, two.py:f", ["one, two.py:f"], True),
        ("models/a,b", ["models/a,b"], False),
    ],
)
def test_a_list_of_rewards(
    name: str, found: list[str], runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file and a folder that are there may have a comma in their names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one, two.py").touch()
    (tmp_path / "models" / "a,b").mkdir(parents=True)
    assert reward_names(name) == found
    assert runs_python(name) == runs
