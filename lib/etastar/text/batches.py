"""Which tokens a step sees: sequence j of a data seed is a pure function of (seed, j), so any step can be started from.

Sequences are non-overlapping windows of `context` predicted tokens (context + 1 tokens, the last shared with the next
window's first). Their order is a keyed permutation, a new one every epoch, without replacement within one.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from etastar.text.corpora import TokenSet

_ROUNDS = 4


def epoch_sequences(train_tokens: int, context: int) -> int:
    """Sequences in one pass over so many tokens."""
    return (train_tokens - 1) // context


def sequence_index(data_seed: int, j, sequences: int) -> np.ndarray:
    """The window that is j-th in the order of a data seed: int64, element-wise in j, O(1) each.

    A Feistel network on ⌈log2⌉ bits, walked along its cycle until it falls below `sequences`: a bijection of each epoch.
    """
    j = np.atleast_1d(np.asarray(j, dtype=np.int64))
    out = np.empty_like(j)
    epochs = j // sequences
    for epoch in np.unique(epochs):
        mine = epochs == epoch
        out[mine] = _permute(j[mine] - epoch * sequences, sequences, _keys(data_seed, int(epoch)))
    return out


def _permute(i: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    half = max(1, (max(2, size) - 1).bit_length() + 1 >> 1)
    out = _feistel(i.astype(np.uint64), half, keys)
    while (outside := out >= size).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = x >> shift, x & mask
    for key in keys:
        mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
    return left << shift | right


def _keys(data_seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.sha256(f"order:{data_seed}:{epoch}".encode()).digest()
    return np.frombuffer(digest, dtype="<u8")[:_ROUNDS]


def batch(tokens: np.ndarray, context: int, data_seed: int, step: int, batch_sequences: int) -> np.ndarray:
    """Sequences step·B … step·B + B − 1 of a data seed: int64 (B, context + 1)."""
    j = np.arange(step * batch_sequences, (step + 1) * batch_sequences)
    window = sequence_index(data_seed, j, epoch_sequences(len(tokens), context))
    return tokens[window[:, None] * context + np.arange(context + 1)].astype(np.int64)


def validation_batches(tokens: TokenSet, context: int, max_tokens: int = 2**16,
                       batch_tokens: int = 8192) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(sequences (b, context + 1), documents (b,)): fixed windows spread evenly over the held-out tokens."""
    windows = epoch_sequences(tokens.validation_tokens, context)
    if windows < 1:
        raise ValueError(f"{tokens.validation_tokens} validation tokens are fewer than one context of {context}")
    chosen = np.linspace(0, windows - 1, min(windows, max_tokens // context)).astype(np.int64)
    documents = np.searchsorted(tokens.validation_starts, chosen * context, side="right") - 1
    size = max(1, batch_tokens // context)
    for i in range(0, len(chosen), size):
        at = chosen[i : i + size, None] * context + np.arange(context + 1)
        yield tokens.validation[at].astype(np.int64), documents[i : i + size]


def check_fits(tokens: TokenSet, recipe) -> None:
    """ValueError where a run's batch or horizon asks for more than one epoch holds and the recipe does not say `repeat`."""
    have = epoch_sequences(tokens.train_tokens, recipe.model.context)
    if recipe.batch_sequences > have:
        raise ValueError(f"a batch of {recipe.batch_sequences} sequences is larger than the corpus {recipe.corpus.source!r} of {have} "
                         f"sequences of {recipe.model.context} tokens; take a smaller batch or a larger corpus")
    needed = recipe.total_steps * recipe.batch_sequences
    if needed > have and not recipe.repeat:
        raise ValueError(f"the run needs {needed * recipe.model.context:,} tokens but one epoch of {recipe.corpus.source!r} has "
                         f"{have * recipe.model.context:,}; shorten the horizon, take a larger corpus, or say repeat=True "
                         "(which bars the run from horizon claims)")
