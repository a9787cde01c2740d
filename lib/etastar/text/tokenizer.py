"""Byte-level BPE by the `tokenizers` library: deterministic, trained on a fixed sample of the training documents."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"  # id 0, after every document
SAMPLE_BYTES = 4_000_000


def train_tokenizer(documents: Iterable[str], vocab: int) -> Tokenizer:
    """A BPE tokenizer of exactly `vocab` tokens from the first `SAMPLE_BYTES` of text; ValueError where text or vocab is short."""
    if vocab < 257:
        raise ValueError(f"a byte-level vocabulary needs at least 257 tokens (256 bytes and end of text); got {vocab}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_first_bytes(documents, SAMPLE_BYTES), trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"the corpus is too small for a vocabulary of {vocab}: only {tokenizer.get_vocab_size()} tokens could be "
                         "learnt; take a smaller vocab or more text")
    return tokenizer


def _first_bytes(documents: Iterable[str], limit: int):
    taken = 0
    for text in documents:
        yield text
        taken += len(text)
        if taken >= limit:
            return
