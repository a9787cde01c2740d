"""The optimum of one horizon: a known quadratic comes out exactly, with the width of its basin in the norm."""

import itertools
import math

import pandas as pd
import pytest

from etastar.analysis.norm_rivals import horizon_optimum

A11, A12, A22, LR, BATCH = 0.08, -0.04, 0.06, -3.3, 9.4  # nats per octave², log2 of the best rate and batch


def grid(seeds=(1, 2, 3), lr=LR, batch=BATCH, rates=range(-6, 0), batches=(8, 9, 10, 11), tokens=2**18):
    rows = []
    for seed, r, b in itertools.product(seeds, rates, batches):
        v, w = r - lr - 0.1 * (seed - 2), b - batch
        rows.append({"horizon_tokens": tokens, "batch_tokens": 2**b, "peak_lr": 2.0**r, "seed": seed,
                     "loss": 2.0 + 0.01 * seed + A11 * v**2 / 2 + A12 * v * w + A22 * w**2 / 2,
                     "log2_norm": 5.0 + 0.7 * (r - lr) - 0.2 * w})
    return pd.DataFrame(rows)


def test_a_quadratic_comes_out_exactly():
    row = horizon_optimum(grid(), excess=0.01, worst_excess=5.0)
    assert math.log2(row["best_lr"]) == pytest.approx(LR, abs=1e-9)
    assert math.log2(row["best_batch_tokens"]) == pytest.approx(BATCH, abs=1e-9)
    assert (row["a11"], row["a12"], row["a22"]) == pytest.approx((A11, A12, A22), abs=1e-9)
    assert row["best_loss"] == pytest.approx(2.02, abs=0.002) and row["edge"] == "" and row["seeds"] == (1, 2, 3)
    assert row["log2_norm"] == pytest.approx(5.0, abs=1e-9)
    assert row["norm_per_seed"] == pytest.approx([4.93, 5.0, 5.07], abs=1e-9)  # each at its own best rate
    assert row["basin"] == pytest.approx(0.7 * math.sqrt(2 * 0.01 / A11), abs=1e-9)


def test_one_seed_has_no_interval_and_an_optimum_outside_is_told():
    alone = horizon_optimum(grid(seeds=(2,)), worst_excess=5.0)
    assert alone["log2_norm"] == pytest.approx(5.0) and math.isnan(alone["log2_norm_low"])
    assert horizon_optimum(grid(lr=1.0), worst_excess=5.0)["edge"] == "lr high"


def test_several_horizons_are_refused():
    with pytest.raises(ValueError, match="one horizon is asked for"):
        horizon_optimum(pd.concat([grid(), grid(tokens=2**20)]))
