"""The generated reviews: balance, distinctness, openings that tell nothing, and tidy English."""

import random
import re
from collections import Counter

import pytest

from pretrain import tiny_reviews
from pretrain.tiny_reviews import GRAMMARS, generate_reviews, write_opening

Corpus = tuple[list[str], list[int]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return generate_reviews(6000, seed=3)


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=\.) ", text)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 500])
def test_generate_reviews_is_balanced_and_distinct(n: int) -> None:
    texts, labels = generate_reviews(n, seed=0)
    assert len(set(texts)) == len(labels) == n
    assert abs(2 * sum(labels) - n) <= 1


def test_generate_reviews_depends_on_the_seed_alone() -> None:
    assert generate_reviews(200, seed=1) == generate_reviews(200, seed=1)
    assert not set(generate_reviews(200, seed=1)[0]) & set(generate_reviews(200, seed=2)[0])


def test_generate_reviews_leaves_the_global_random_state_alone() -> None:
    random.seed(5)
    before = random.getstate()
    generate_reviews(10, seed=0)
    assert random.getstate() == before


def test_labels_come_in_random_order(corpus: Corpus) -> None:
    changes = sum(a != b for a, b in zip(corpus[1], corpus[1][1:], strict=False))
    assert 2800 < changes < 3200  # 3000 +- 5 standard deviations


def test_reviews_have_lengths_within_the_limits(corpus: Corpus) -> None:
    for text in corpus[0]:
        assert tiny_reviews.MIN_WORDS <= len(text.split()) <= tiny_reviews.MAX_WORDS
        assert len(sentences(text)[0].split()) >= 14
        assert len(sentences(text)) >= 3


def test_openings_do_not_depend_on_the_label(corpus: Corpus) -> None:
    counts = {label: Counter[str]() for label in (0, 1)}
    for text, label in zip(*corpus, strict=True):
        counts[label].update(set(re.findall(r"[\w'-]+", sentences(text)[0])))
    scores = []
    for word in counts[0] + counts[1]:
        a, b = counts[0][word], counts[1][word]
        scores.append((a - b) / (a + b) ** 0.5)  # standard normal if the label makes no difference
    assert max(map(abs, scores)) < 5
    assert 0.7 < sum(z * z for z in scores) / len(scores) < 1.3


def test_bodies_depend_on_the_label(corpus: Corpus) -> None:
    good = sum("recommended" in t and "Not recommended" not in t for t, y in zip(*corpus, strict=True) if y)
    bad = sum("recommended" in t and "Not recommended" not in t for t, y in zip(*corpus, strict=True) if not y)
    assert good > 50
    assert bad == 0


def test_no_word_alone_carries_a_label(corpus: Corpus) -> None:
    positive = [text for text, label in zip(*corpus, strict=True) if label]
    counts = Counter(word for text in positive for word in set(re.findall(r"\w+", text.lower())))
    negative = Counter(
        word for text, label in zip(*corpus, strict=True) if not label for word in set(re.findall(r"\w+", text.lower()))
    )
    telling = {w: n / len(positive) for w, n in counts.items() if n > 2 * negative[w]}
    assert len(telling) > 80
    assert max(telling.values()) < 0.12


def variants(symbol: str, grammar: tiny_reviews.Grammar) -> int:
    """In how many ways a symbol can be written out."""
    total = 0
    for line in grammar[symbol]:
        ways = 1
        for part in line[1::2] if isinstance(line, list) else []:
            ways *= variants(part, grammar)
        total += ways
    return total


def test_count_of_reviews_is_beyond_any_corpus() -> None:
    """Counted on one opening and one pair of sentences, whose parts the text tells apart."""
    grammar = GRAMMARS[1]
    slots = ("when", "title_adj", "title_noun", "genre", "hero", "same.actor", "same.me")
    lower_bound = 1
    for slot in slots:
        assert len(set(map(str, grammar[slot]))) == len(grammar[slot])
        lower_bound *= len(grammar[slot])
    assert lower_bound > 1_000_000
    assert variants("opening", grammar) > 10**8


def test_first_twelve_words_take_many_forms() -> None:
    grammar = GRAMMARS[0]
    starts = [f"{a} {b} saw The X Y".split() for a in grammar["when"] for b in grammar["who"]]
    titles = len(grammar["title_adj"]) * len(grammar["title_noun"])
    assert sum(len(start) <= 12 for start in starts) * titles >= 100_000
    rng = random.Random(0)
    seen = {tuple(write_opening(rng).split()[:12]) for _ in range(5000)}
    assert len(seen) > 4950  # 100,000 equally likely ones would leave about 4,880


def test_every_symbol_is_defined_and_used() -> None:
    for grammar in GRAMMARS.values():
        used = {part for lines in grammar.values() for line in lines if isinstance(line, list) for part in line[1::2]}
        assert used <= set(grammar)
        unused = {s for s in grammar if not s.startswith("other.")} - used
        assert unused == {"opening", "plot", *tiny_reviews.LINES["sentences"]}


def test_every_choice_of_a_symbol_is_distinct() -> None:
    for symbol, lines in GRAMMARS[0].items():
        assert len(lines) == len({str(line) for line in lines}), symbol


def test_punctuation_and_capitals(corpus: Corpus) -> None:
    for text in corpus[0]:
        assert not re.search(r"  |^ | $|[{}|]| [.,:]|[.,:]{2}", text), text
        assert text.endswith(".")
        assert all(s[0].isupper() and s.endswith(".") for s in sentences(text)), text
        assert not re.search(r"(?<![.] )(?<!^)\b(It|There|At|In|Nothing|Go|Do|Granted|Yes)\b", text), text


def test_articles_agree_with_the_next_word(corpus: Corpus) -> None:
    vowel_sound = re.compile(r"[aeiou]|hour|honest", re.IGNORECASE)
    for text in corpus[0]:
        for article, word in re.findall(r"\b(an?) ([\w-]+)", text, re.IGNORECASE):
            assert bool(vowel_sound.match(word)) == (article.lower() == "an"), f"{article} {word}: {text}"


def test_no_word_is_doubled_and_i_is_capital(corpus: Corpus) -> None:
    for text in corpus[0]:
        assert not re.search(r"\b(\w+) \1\b", text), text
        assert not re.search(r"\bi\b", text), text


def test_vocabulary_is_small(corpus: Corpus) -> None:
    words = {word.lower() for text in corpus[0] for word in re.findall(r"[\w'-]+", text)}
    assert 600 <= len(words) <= 1000
