"""Byte-level BPE tokenizers for both models."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from runtime.terminal import progress

END, PAD, CLS = "<|endoftext|>", "<|pad|>", "<|cls|>"


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with this many tokens at most, the special ones included."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, CLS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(progress(texts, "tokenizer", "text"), trainer)
    return bpe


def policy_tokenizer(bpe: Tokenizer, context: int) -> PreTrainedTokenizerBase:
    """The language model's tokenizer: BOS = EOS, and no padding token, as in GPT-2."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, model_max_length=context
    )


def reward_tokenizer(bpe: Tokenizer, context: int) -> PreTrainedTokenizerBase:
    """The classifier's tokenizer: each text starts with a token whose state is classified."""
    bpe = Tokenizer.from_str(bpe.to_str())
    bpe.post_processor = processors.TemplateProcessing(single=f"{CLS} $A", special_tokens=[(CLS, bpe.token_to_id(CLS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, cls_token=CLS, unk_token=PAD, model_max_length=context
    )
