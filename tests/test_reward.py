"""The reward against the library's own classifier, one text at a time; Python functions, good ones and bad ones."""

import hashlib
import json
import textwrap
from pathlib import Path

from config import UserError, python_reward

import pytest
import torch
from conftest import save_classifier, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from reward import PythonReward, SentimentReward, load_reward

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
    """A reward of this source in a file of its own."""
    (folder / "my_rewards.py").write_text(textwrap.dedent(source))
    return PythonReward(f"{folder / 'my_rewards.py'}:{name}")


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
    "dict(a=1, b=2, c=3)": ["returned dict"],
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
    ],
)
def test_whatever_it_raises_is_one_line_that_says_where(body: str, words: str, line: int, tmp_path: Path) -> None:
    source = f"import sys, json\n\ndef f(responses):\n    {body}\n\ndef deeper(responses):\n    return dict()[3]\n"
    reward = python_reward_of(tmp_path, source + "def deepest(x):\n    return deepest(x)\n")
    with pytest.raises(UserError) as caught:
        reward(GIVEN)
    message = str(caught.value)
    assert words in message
    assert f"{tmp_path / 'my_rewards.py'}:{line}" in message, message
    assert "\n" not in message


def test_too_little_memory_and_an_interruption_pass_through(tmp_path: Path) -> None:
    for error in ("torch.OutOfMemoryError('full')", "MemoryError()", "KeyboardInterrupt()"):
        reward = python_reward_of(tmp_path, f"import torch\ndef f(responses): raise {error}")
        with pytest.raises((torch.OutOfMemoryError, MemoryError, KeyboardInterrupt)):
            reward(GIVEN)


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("def g(responses): return 1", "f", ["has no 'f'", "it has g"]),
        ("def f(responses):\n  return [", "f", ["SyntaxError", "my_rewards.py:2"]),
        ("import nothing_of_the_sort", "f", ["ModuleNotFoundError", "my_rewards.py:1"]),
        ("f = 3", "f", ["int", "cannot be called"]),
        ("def f(): return 1", "f", ["must take (responses)", "my_rewards.py:1"]),
        ("def f(a, b, c): return 1", "f", ["(a, b, c)", "my_rewards.py:1"]),
        ("def f(responses, *, key): return 1", "f", ["must take (responses)"]),
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
def test_any_result_is_three_finite_numbers_or_one_line(result: object) -> None:
    reward = PythonReward.__new__(PythonReward)
    reward.name, reward.device, reward.file, reward.takes_prompts = "x.py:f", "cpu", "x.py", False
    reward.function = lambda responses: result
    try:
        scores = reward(GIVEN)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert scores.isfinite().all()
        assert scores.tolist() == pytest.approx([float(x) for x in result], rel=1e-6)  # type: ignore[attr-defined]


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
