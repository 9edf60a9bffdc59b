"""Labelled short film reviews from a small grammar, for models made offline within minutes.

A review is an opening that does not judge, then a few sentences that do, and often a verdict. The opening is drawn
before the label is used, so nothing in it predicts the rest.

The grammar is in tiny_reviews.json. Each symbol stands for one of its lines, chosen evenly; {symbol} in a line is
replaced in turn. {same.x} is a line of the label's own words, {other.x} one of the opposite label's. Whoever changes a
text there raises reviews_version in tiny_world.py: caches of models are keyed by it.
"""

import json
import random
import re
from pathlib import Path

MIN_WORDS = 34
MAX_WORDS = 52
EXTRAS = (("aside", 0.15), ("plot", 0.25))  # optional sentences between the others, and their probability
LINES: dict[str, dict[str, list[str]]] = json.loads(
    Path(__file__).with_name("tiny_reviews.json").read_text(encoding="utf-8")
)
JUDGING = [name for name in LINES["sentences"] if name not in ("aside", "verdict")]

# A line without symbols is a string; any other is cut into text, symbol, text, symbol, …, text.
Grammar = dict[str, list[str | list[str]]]


def _grammar(same: dict[str, list[str]], other: dict[str, list[str]]) -> Grammar:
    """One label's grammar: `same` has the words that agree with it, `other` those of the opposite."""
    lines = LINES["neutral"] | LINES["sentences"]
    lines |= {f"same.{name}": choices for name, choices in same.items()}
    lines |= {f"other.{name}": choices for name, choices in other.items()}
    return {
        symbol: [re.split(r"[{}]", line) if "{" in line else line for line in choices]
        for symbol, choices in lines.items()
    }


GRAMMARS = {0: _grammar(LINES["bad"], LINES["good"]), 1: _grammar(LINES["good"], LINES["bad"])}


def generate_reviews(n: int, seed: int) -> tuple[list[str], list[int]]:
    """Write n distinct reviews in random order, half positive (label 1) and half negative (0)."""
    rng = random.Random(seed)
    labels = [i % 2 for i in range(n)]
    rng.shuffle(labels)
    texts: dict[str, None] = {}  # in order of writing
    for label in labels:
        opening = write_opening(rng)
        text = opening
        while text in texts or text == opening:
            text = f"{opening} {_write_body(opening, label, rng)}"
        texts[text] = None
    return list(texts), labels


def write_opening(rng: random.Random) -> str:
    """One sentence of at least 14 words about what was seen and with whom; it does not depend on the label."""
    return _sentence(GRAMMARS[0], "opening", rng)


def _write_body(opening: str, label: int, rng: random.Random) -> str:
    """The sentences that judge; opening and body together have MIN_WORDS to MAX_WORDS words."""
    while True:
        kinds = rng.sample(JUDGING, rng.choice((2, 3, 3)))
        for extra, probability in EXTRAS:
            if rng.random() < probability:
                kinds.insert(rng.randrange(1, len(kinds)), extra)  # never first or last
        if rng.random() < 0.6:
            kinds.append("verdict")
        body = " ".join(_sentence(GRAMMARS[label], kind, rng) for kind in kinds)
        if MIN_WORDS <= len(opening.split()) + len(body.split()) <= MAX_WORDS:
            return body


def _sentence(grammar: Grammar, symbol: str, rng: random.Random) -> str:
    text = _expand(grammar, symbol, rng)
    return text[0].upper() + text[1:]


def _expand(grammar: Grammar, symbol: str, rng: random.Random) -> str:
    choices = grammar[symbol]
    line = choices[int(rng.random() * len(choices))]
    if isinstance(line, str):
        return line
    return "".join([_expand(grammar, part, rng) if i % 2 else part for i, part in enumerate(line)])
