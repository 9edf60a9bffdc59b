"""The reward against the library's own classifier, one text at a time."""

import json
from pathlib import Path

from config import UserError

import pytest
import torch
from conftest import save_classifier, train_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from reward import SentimentReward

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
    assert scores[0] == scores[1]
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
