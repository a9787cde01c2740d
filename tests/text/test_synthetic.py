"""The synthetic source: its entropy and its learning-curve exponent are what they are said to be."""

import math

import numpy as np
import pytest

from etastar.recipe import Corpus
from etastar.text.corpora import prepare
from etastar.text.synthetic import UNIT, Source, source_of

SOURCE = Source(vocab=256, alpha=0.6, noise=0.1, seed=0)


def test_entropy_of_a_source_one_can_compute_by_hand():
    tiny = Source(vocab=16, alpha=1.0, noise=0.0)  # 6 groups, 4 answers, 36 contexts with p ∝ 1/k²
    weight = [1 / k**2 for k in range(1, 37)]
    p = [w / sum(weight) for w in weight]
    assert tiny.entropy_rate() == pytest.approx(-sum(q * math.log(q) for q in p) / 3)
    noisy = Source(vocab=16, alpha=1.0, noise=0.5)
    hit, miss = 0.5 + 0.125, 0.125
    assert noisy.answer_entropy() == pytest.approx(-hit * math.log(hit) - 3 * miss * math.log(miss))


def test_the_stream_has_the_entropy_it_says():
    tokens = SOURCE.tokens(3_000_000, stream=0).reshape(-1, UNIT).astype(np.int64)
    rank = tokens[:, 0] * SOURCE.groups + tokens[:, 1] - SOURCE.groups
    p = SOURCE.context_probabilities()
    # cross-entropy of the true law on the sample: an unbiased estimate of the entropy
    right = np.zeros(SOURCE.groups**2, dtype=int)
    for r, a in zip(rank, tokens[:, 2] - 2 * SOURCE.groups, strict=True):
        right[r] = a  # the last answer seen; repaired below by the majority
    answers = np.zeros((SOURCE.groups**2, SOURCE.answers))
    np.add.at(answers, (rank, tokens[:, 2] - 2 * SOURCE.groups), 1)
    hit = answers.max(1).sum() / len(rank)
    assert hit == pytest.approx(1 - SOURCE.noise + SOURCE.noise / SOURCE.answers, abs=0.01)
    assert (-np.log(p[rank]).mean() + SOURCE.answer_entropy()) / UNIT == pytest.approx(SOURCE.entropy_rate(), abs=0.005)


def test_an_ideal_learner_has_the_exponent_and_stays_above_the_floor():
    """Answers by a learner that knows the noise and remembers what it saw: excess ∝ units^(−α/(1+α))."""
    source = Source(vocab=1024, alpha=0.6, noise=0.0, seed=1)
    units = 400_000
    tokens = source.tokens(units * UNIT, stream=0).reshape(-1, UNIT).astype(np.int64)
    rank = tokens[:, 0] * source.groups + tokens[:, 1] - source.groups
    first = np.zeros(units, dtype=bool)
    first[np.unique(rank, return_index=True)[1]] = True  # a context's first answer costs log A, later ones nothing
    sizes = 2 ** np.arange(11, 19)
    excess = [first[n // 2 : n].mean() * math.log(source.answers) for n in sizes]
    slope = np.polyfit(np.log(sizes), np.log(excess), 1)[0]
    assert all(e > 0 for e in excess)
    assert slope == pytest.approx(-source.learning_curve_exponent(), abs=0.03)
    assert source.learning_curve_exponent() == pytest.approx(0.6 / 1.6)


def test_streams_are_pure_functions_of_their_seeds():
    assert (SOURCE.tokens(1_000, 0) == SOURCE.tokens(1_000, 0)).all()
    assert (SOURCE.tokens(1_000, 0) != SOURCE.tokens(1_000, 1)).any()
    assert (SOURCE.tokens(999, 0) != Source(256, 0.6, 0.1, seed=1).tokens(999, 0)).any()
    assert SOURCE.tokens(1_000, 0).max() < 256


def test_a_corpus_of_it_knows_its_floor():
    corpus = Corpus("synthetic", vocab=64, options=(("tokens", 5_000), ("validation_tokens", 2_000)))
    tokens = prepare(corpus)
    assert (tokens.train_tokens, tokens.validation_tokens, tokens.vocab) == (5_000, 2_000, 64)
    assert tokens.entropy_floor == pytest.approx(source_of(corpus)[0].entropy_rate())


@pytest.mark.parametrize("options, said", [((("alfa", 1.0),), "does not know 'alfa'"), ((("alpha", -1.0),), "alpha > 0")])
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        prepare(Corpus("synthetic", vocab=64, options=options))
