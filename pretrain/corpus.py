"""What the models learn from: texts, labelled texts, and held-out labelled texts."""

import itertools
import random
from dataclasses import dataclass

from config import UserError

from data import load_examples, load_labelled


@dataclass(frozen=True)
class Corpus:
    """Texts for the language model, labelled texts for the classifier, and held-out labelled texts.

    A label is an index into `names`.
    """

    lm_texts: list[str]
    texts: list[str]
    labels: list[int]
    held_texts: list[str]
    held_labels: list[int]
    names: list[str]


def load_corpus(
    dataset: str,
    split: str,
    text_column: str,
    label_column: str,
    lm_split: str | None = None,
    seed: int = 0,
    names: str | None = None,
    config: str | None = None,
) -> Corpus:
    """Read a data set, and hold out a tenth of its labelled rows, 2,000 at most.

    lm_split names splits for the language model, joined by +; names and config are label_names and dataset_config.
    """
    texts, labels = load_labelled(dataset, split, text_column, label_column, names, config=config)
    rows = [(text, label) for text, label in zip(texts, labels, strict=True) if label is not None]
    classes = sorted({label for _, label in rows})
    where = f"label_column={label_column!r} of {dataset} holds {len(classes)} different labels"
    if len(classes) < 2:
        raise UserError(f"{where}, and a classifier needs two or more")
    if len(classes) > 20:
        raise UserError(f"{where}: is it the column of the labels?")
    random.Random(seed).shuffle(rows)
    count = min(2000, max(1, len(rows) // 10))
    held_out = rows[:count]
    training = rows[count:]
    held_out_texts = {text for text, _ in held_out}
    lm_texts = texts
    if lm_split is not None:
        splits = [load_examples(dataset, name, text_column, config=config)[0] for name in lm_split.split("+")]
        lm_texts = list(itertools.chain.from_iterable(splits))
    return Corpus(
        lm_texts=[text for text in lm_texts if text not in held_out_texts],
        texts=[text for text, _ in training],
        labels=[classes.index(label) for _, label in training],
        held_texts=[text for text, _ in held_out],
        held_labels=[classes.index(label) for _, label in held_out],
        names=classes,
    )
