"""Which tokens a step sees: a bijection an epoch, pure in (seed, j), the same data at every batch size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etastar.recipe import AdamW, Corpus, Model, Recipe
from etastar.schedules import Constant
from etastar.text.batches import batch, check_fits, epoch_sequences, sequence_index, validation_batches
from etastar.text.corpora import prepare

CORPUS = Corpus("synthetic", vocab=64, options=(("tokens", 50_000), ("validation_tokens", 9_000)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3_000), st.integers(0, 2**31))
def test_an_epoch_is_a_permutation_and_the_next_another(size, seed):
    first, second = sequence_index(seed, np.arange(size), size), sequence_index(seed, np.arange(size, 2 * size), size)
    assert sorted(first) == sorted(second) == list(range(size))
    if size > 50:
        assert (first != second).any() and (first != np.arange(size)).any()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 10**7), st.integers(0, 10**6), st.lists(st.integers(0, 10**8), min_size=1, max_size=9))
def test_any_sequence_is_found_at_once_whatever_is_asked_beside_it(size, seed, js):
    together = sequence_index(seed, js, size)
    assert [int(sequence_index(seed, j, size)[0]) for j in js] == together.tolist()
    assert ((together >= 0) & (together < size)).all()


def test_the_order_of_a_seed_is_fixed_for_ever():
    assert sequence_index(7, np.arange(8), 1000).tolist() == ORDER_OF_SEED_7


ORDER_OF_SEED_7 = [566, 668, 204, 731, 379, 928, 263, 426]


def test_a_permutation_looks_random():
    index = sequence_index(3, np.arange(20_000), 20_000)
    assert abs(np.corrcoef(np.arange(20_000), index)[0, 1]) < 0.03
    neighbours = np.abs(np.diff(index))
    assert 0.3 < neighbours.mean() / 20_000 < 0.37  # a third for a random order


def test_batches_of_every_size_see_the_same_data():
    tokens = prepare(CORPUS).train
    small = np.concatenate([batch(tokens, 32, 5, step, 4) for step in range(6)])
    assert (small == np.concatenate([batch(tokens, 32, 5, step, 12) for step in range(2)])).all()
    assert small.shape == (24, 33) and small.dtype == np.int64


def test_windows_do_not_overlap_in_what_they_predict():
    tokens = np.arange(3_201, dtype=np.uint16)
    n = epoch_sequences(len(tokens), 32)
    assert n == 100
    predicted = np.concatenate([batch(tokens, 32, 0, step, 10)[:, 1:].ravel() for step in range(10)])
    assert sorted(predicted) == list(range(1, 3_201))


def test_validation_windows_are_fixed_spread_and_know_their_document():
    tokens = prepare(CORPUS)
    first = [(t.copy(), d.copy()) for t, d in validation_batches(tokens, 32, max_tokens=4_096)]
    sequences, documents = (np.concatenate(parts) for parts in zip(*first, strict=True))
    assert len(sequences) == 128
    starts = [next(i for i in range(0, 9_000, 32) if (tokens.validation[i : i + 33] == s).all()) for s in sequences[:5]]
    assert [int(np.searchsorted(tokens.validation_starts, i, side="right") - 1) for i in starts] == documents[:5].tolist()
    assert documents[0] == 0 and documents[-1] >= len(tokens.validation_starts) - 2


def recipe(**changes):
    given = dict(model=Model(width=32, depth=1, head_dim=16, context=32), corpus=CORPUS, optimizer=AdamW(), schedule=Constant(),
                 peak_lr=0.01, batch_tokens=128, horizon_tokens=128 * 390)
    return Recipe(**(given | changes))


def test_one_epoch_and_no_more():
    tokens = prepare(CORPUS)
    check_fits(tokens, recipe())
    with pytest.raises(ValueError, match=r"needs 50,048 tokens but one epoch .* has 49,984; .*repeat=True"):
        check_fits(tokens, recipe(horizon_tokens=128 * 391))
    check_fits(tokens, recipe(horizon_tokens=128 * 391, repeat=True))
    with pytest.raises(ValueError, match="batch of 2000 sequences is larger"):
        check_fits(tokens, recipe(batch_tokens=64_000, horizon_tokens=64_000, repeat=True))
