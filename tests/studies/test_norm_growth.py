"""The law of growth of Scion's output norm on real runs: one function of rate · steps, never above its bound."""

import math

import numpy as np
import pytest

import etastar as es
from etastar.studies import norm_transfer as study
from etastar.studies import norm_transfer_measures as measures
from etastar.studies.norm_transfer_grids import norms_of

BOUND, AGREEMENT = 1e-6, 0.15  # octaves


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    plan = study.design("smoke")
    recipes = [recipe for cell in plan.cells if cell.role == "growth" for recipe in plan.recipes(cell)]
    runs = es.run(recipes, store=tmp_path_factory.mktemp("growth"), observe=es.Observe(norms_every_tokens=16 * 64))
    return runs, measures.growth(runs)


def test_three_rates_and_three_batches_grow_by_one_law(grown):
    table = grown[1]
    assert table.peak_lr.nunique() == table.batch_tokens.nunique() == 3 and table.peak_lr.max() <= 2**-4
    assert table.log2_lr_steps.min() == 0 and table.log2_lr_steps.max() == 6
    by = table.groupby("log2_lr_steps").log2_norm
    assert (by.max() - by.min()).max() < AGREEMENT
    assert (by.mean().diff().dropna() > 0.4).all()  # and it is growth: half an octave or more for an octave of steps


def test_the_norm_is_never_more_than_one_and_the_sum_of_the_rates(grown):
    for run in grown[0]:
        curve = run.curve.dropna(subset="norm_output")
        assert len(curve) >= 32
        assert (np.log2(curve.norm_output) <= np.log2(1 + run.recipe.peak_lr * curve.step) + BOUND).all()
        at_end = math.log2(float(curve.norm_output.iloc[-1]))
        assert norms_of(run)["log2_norm"] == pytest.approx(at_end, abs=1e-5)  # the log is the weights' own
