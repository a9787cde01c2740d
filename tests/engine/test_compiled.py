"""The compiled step against the eager one over 500 steps: alike to rounding where training is calm, in law where it is not."""

import numpy as np
import pytest
import torch
from scipy import stats

import etastar as es
from etastar.engine.slots import SlotStack
from etastar.recipe import Execution
from etastar.text.corpora import prepare

SEEDS, STEPS, VOCAB = 8, 500, 64
CORPUS = es.Corpus("synthetic", vocab=VOCAB, options=(("tokens", 600_000), ("validation_tokens", 8192)))


@pytest.fixture(scope="module")
def curves():
    """(compiled, LR) → train losses (seeds, steps); each stack is made once, so that the compiler is asked once."""
    stacks = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def train(compiled, lr):
        recipe = es.Recipe(model=es.Model(width=32, depth=2, head_dim=16, context=32, tied=False), corpus=CORPUS, optimizer=es.AdamW(),
                           schedule=es.Constant(), peak_lr=lr, batch_tokens=512, horizon_tokens=512 * STEPS,
                           parametrization=es.SP(init_std=0.1), execution=Execution(compiled=compiled))
        stack = stacks.setdefault(compiled, SlotStack(recipe, prepare(CORPUS), SEEDS))
        for seed in range(SEEDS):
            stack.load(seed, recipe.replace(seed=seed), None)
        return stack.train(np.full((SEEDS, STEPS), lr))[0]

    yield train
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_below_the_best_rate_the_curves_are_one(curves):
    eager, compiled = curves(False, 0.003), curves(True, 0.003)
    assert np.abs(eager - compiled)[:, :50].max() < 1e-4
    assert np.abs(eager - compiled)[:, -100:].mean(1).max() < 0.01  # 0.003 or so; seeds differ by 0.02


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.03, 0.3])
def test_above_it_they_part_but_no_further_than_seeds_do(curves, lr):
    tails = [curves(compiled, lr)[:, -100:].mean(1) for compiled in (False, True)]
    assert stats.ttest_rel(*tails).pvalue > 1e-3
    assert stats.levene(*tails).pvalue > 1e-3


@pytest.mark.slow
def test_near_divergence_the_same_share_diverges(curves):
    shares = []
    for compiled in (False, True):
        tail = curves(compiled, 2.0)[:, -100:].mean(1)
        shares.append(int((~(tail < np.log(VOCAB))).sum()))  # worse than knowing nothing, or not a number
    assert stats.fisher_exact([[share, SEEDS - share] for share in shares])[1] > 0.01, shares
