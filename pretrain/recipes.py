"""The shapes and schedules of the models that are trained here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Net:
    """Shape and training of one model; a batch holds about `batch_tokens` tokens."""

    layers: int
    width: int
    heads: int
    dropout: float
    steps: int
    batch_tokens: int
    lr: float


@dataclass(frozen=True)
class Recipe:
    """Every number that shapes the two models; lengths are in tokens.

    The classifier learns from pieces of crop_min to crop_max tokens that start at most crop_start tokens into the text,
    because it will score responses and not whole reviews. Its accuracy is that on what follows the first `skip` tokens,
    up to crop_max of them.
    """

    vocab_size: int
    context: int
    lm: Net
    rm: Net
    crop_min: int
    crop_max: int
    crop_start: int
    skip: int


RECIPES = {
    "tiny": Recipe(
        vocab_size=2048,
        context=128,
        lm=Net(layers=2, width=128, heads=8, dropout=0.0, steps=560, batch_tokens=1024, lr=4e-3),
        rm=Net(layers=2, width=128, heads=4, dropout=0.0, steps=240, batch_tokens=2048, lr=1.5e-3),
        crop_min=4,
        crop_max=80,
        crop_start=16,
        skip=10,
    ),
    "small": Recipe(
        vocab_size=8192,
        context=256,
        lm=Net(layers=4, width=256, heads=4, dropout=0.0, steps=700, batch_tokens=4096, lr=2e-3),
        rm=Net(layers=3, width=256, heads=4, dropout=0.1, steps=1000, batch_tokens=4096, lr=5e-4),
        crop_min=24,
        crop_max=200,
        crop_start=10_000,
        skip=16,
    ),
    "124m": Recipe(
        vocab_size=50257,
        context=1024,
        lm=Net(layers=12, width=768, heads=12, dropout=0.1, steps=2000, batch_tokens=32768, lr=3e-4),
        rm=Net(layers=6, width=768, heads=12, dropout=0.1, steps=2000, batch_tokens=16384, lr=5e-5),
        crop_min=24,
        crop_max=200,
        crop_start=10_000,
        skip=16,
    ),
}
