"""Optima over rate and batch and the norm there: closed forms, known truths, edges, seeds, rivals, the power of a design, refusals."""

import math

import numpy as np
import pandas as pd
import pytest

import etastar as es
from etastar.analysis.fixed_batch import fixed_batch
from etastar.analysis.joint_surface import _Problem, fit_joint_surface
from etastar.analysis.lr_batch_grid import lr_batch_grid, slopes, window_spread
from etastar.analysis.lr_batch_surface import fit_surfaces
from etastar.analysis.norm_rivals import rivals
from etastar.analysis.surface_truth import SurfaceTruth, norm_slope_uncertainty

HORIZONS = (20.0, 22.0, 24.0, 26.0)  # log2 tokens, 23 in the middle
LR, BATCH, ALONG, SLOPE = -0.28, 0.45, 0.6, 0.03  # exponents of tokens, of the batch in the rate; octaves of norm per octave of tokens
K, KAPPA = 0.08, 0.06  # nats per octave² along the rate and, on the valley, along the batch
BY_LR, BY_BATCH = 0.7, -0.8  # octaves of the norm per octave
RATES, BATCHES = np.arange(-9.0, 0.0), np.arange(9.0, 17.0)
BOTH = pytest.mark.parametrize("fit", [fit_surfaces, fit_joint_surface], ids=["two-step", "joint"])


def sweep(rng=None, *, seeds=3, noise=0.0, skews=(0.0, 0.0), rates=RATES, batches=BATCHES, lr=-5.0, batch=13.0,
          kappa=KAPPA, wander=0.0, bent=0.02, keep=lambda v, w, b: v == v):
    """Rows of runs whose optimum at the middle horizon is rate 2^lr, batch 2^batch, norm 2^7; `wander` moves a seed's lr and batch
    exponents by ± so much. `keep` says, by octaves v off the valley and w off the best batch, which cells are there.
    """
    rng = rng or np.random.default_rng(0)
    x, b = (a.ravel() for a in np.meshgrid(rates, batches))
    rows = []
    for s in range(seeds):
        trunk, own = rng.normal(0, noise, (2, len(x)))
        for h in HORIZONS:
            d, moved = h - 23, wander * (s - (seeds - 1) / 2)
            w = b - batch - (BATCH + moved) * d
            u = x - lr - (LR + moved) * d
            v = u - ALONG * w
            loss = 4 - 0.05 * d + 0.1 * s + K * bowl(v, skews[0]) + kappa * bowl(w, skews[1]) + (trunk + rng.normal(0, noise, len(x))) / 2
            norm = 7 + SLOPE * d + BY_LR * u + BY_BATCH * w + bent * (u * w - u**2) + own
            rows.append(pd.DataFrame({"horizon_tokens": 2**h, "batch_tokens": 2**b, "peak_lr": 2**x, "seed": 1000 + s, "loss": loss,
                                      "log2_norm": norm})[keep(v, w, b)])
    return pd.concat(rows, ignore_index=True)


def bowl(u, s):
    return u**2 / 2 if s == 0 else (np.exp(s * u) - s * u - 1) / s**2


def within(octaves):
    """Cells so many octaves about the optimum: a ragged grid that moves with the horizon."""
    return lambda v, w, b: (np.abs(v) <= octaves) & (np.abs(w) <= octaves)


# -- closed forms ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("ragged", [{}, {"keep": within(2.2)}, {"rates": np.arange(-9, 0, 0.5), "keep": within(1.7)}])
def test_a_quadratic_surface_is_recovered_exactly(fit, ragged):
    found = fit(sweep(**ragged))
    assert (found.lr_exponent, found.batch_exponent, found.norm_slope) == pytest.approx((LR, BATCH, SLOPE), abs=1e-6)
    assert np.log2(found.cells["best_lr"]).tolist() == pytest.approx([-4.16, -4.72, -5.28, -5.84], abs=1e-5)
    assert np.log2(found.cells["best_batch_tokens"]).tolist() == pytest.approx([11.65, 12.55, 13.45, 14.35], abs=1e-5)
    assert found.cells["log2_norm"].tolist() == pytest.approx([6.91, 6.97, 7.03, 7.09], abs=1e-5)
    assert found.cells["best_loss"].tolist() == pytest.approx([4.25, 4.15, 4.05, 3.95], abs=1e-6)
    assert found.norm_slope_high - found.norm_slope_low < 1e-5 and found.seeds == (1000, 1001, 1002)
    assert found.cells["edge"].tolist() == [""] * 4 and found.n == 4


def test_two_steps_tell_every_horizons_curvatures_and_valley():
    cells = fit_surfaces(sweep()).cells
    assert cells["lr_curvature"].tolist() == pytest.approx([K] * 4) and cells["batch_curvature"].tolist() == pytest.approx([KAPPA] * 4)
    assert cells["lr_batch_exponent"].tolist() == pytest.approx([ALONG] * 4)


def test_the_joint_fit_tells_skews_and_the_rule_of_the_best_rate_at_a_given_batch():
    found = fit_joint_surface(sweep(skews=(0.25, 0.4)), worst_excess=3)
    assert (found.lr_exponent, found.batch_exponent, found.norm_slope) == pytest.approx((LR, BATCH, SLOPE), abs=1e-6)
    assert (found.lr_batch_exponent, found.lr_horizon_exponent) == pytest.approx((0.6, -0.28 - 0.6 * 0.45), abs=1e-6)
    assert (found.lr_curvature, found.batch_curvature, found.lr_skew, found.batch_skew) == pytest.approx((K, KAPPA, 0.25, 0.4), rel=1e-5)
    assert found.r2 == pytest.approx(1) and found.scatter < 1e-6
    plain = fit_joint_surface(sweep(skews=(0.25, 0.4)), skew="none")
    assert plain.lr_skew == plain.batch_skew == 0 and plain.r2 < 0.999


def test_at_a_given_batch_the_rule_and_the_norms_slope_are_those_of_the_valley():
    found = fixed_batch(sweep(bent=0.0, rates=np.arange(-10.0, 0.0)))
    assert (found.lr_batch_exponent, found.lr_horizon_exponent) == pytest.approx((0.6, -0.55), abs=1e-6)
    assert found.log2_prefactor == pytest.approx(-5 - 0.6 * 13 + 0.55 * 23, abs=1e-5)
    risen = SLOPE - (BY_LR * ALONG + BY_BATCH) * BATCH  # the batch stays where the best one grows: 0.201
    assert found.norm_slope == pytest.approx(risen, abs=1e-6) and found.batches["norm_slope"].tolist() == pytest.approx([risen] * 8)
    assert found.batches["n"].tolist() == [4] * 8 and found.n == 32
    ragged = fixed_batch(sweep(bent=0.0, rates=np.arange(-10.0, 0.0), keep=within(2.7)))  # batches stand at unlike horizons
    assert ragged.norm_slope == pytest.approx(risen, abs=1e-6) and ragged.batches["n"].nunique() > 1
    one = found.cells[(found.cells["horizon_tokens"] == 2.0**24) & (found.cells["batch_tokens"] == 2.0**12)].iloc[0]
    assert math.log2(one["best_lr"]) == pytest.approx(-5 - 0.55 + 0.6 * -1) and one["lr_curvature"] == pytest.approx(K)


def test_the_slope_of_the_printed_optima_is_flat():
    assert slopes(np.array([31.0, 33, 35, 37]), np.array([[6.92, 7.29, 6.89, 6.95]]))[0] == pytest.approx(-0.0155)  # 2510.03871 Fig. 12a


@BOTH
def test_the_vertex_keeps_the_norm_where_the_best_cell_wanders(fit):
    rows = sweep()
    mean = rows.groupby(["horizon_tokens", "batch_tokens", "peak_lr"], as_index=False)[["loss", "log2_norm"]].mean()
    best = mean.loc[mean.groupby("horizon_tokens")["loss"].idxmin(), "log2_norm"] - 7 - SLOPE * np.array([-3.0, -1, 1, 3])
    assert np.abs(best).max() > 0.2  # octaves, by the octave grid alone
    found = fit(rows).cells["log2_norm"] - 7 - SLOPE * np.array([-3.0, -1, 1, 3])
    assert np.abs(found).max() < 1e-5


# -- seeds -------------------------------------------------------------------------------------------------------------


@BOTH
def test_a_seeds_own_exponents_are_told_and_the_interval_is_students(fit):
    found = fit(sweep(wander=0.01, bent=0.0, noise=0.0))
    assert np.array(found.batch_exponent_per_seed) - BATCH == pytest.approx([-0.01, 0, 0.01], abs=2e-4)
    assert np.array(found.lr_exponent_per_seed) - LR == pytest.approx([-0.01, 0, 0.01], abs=2e-4)
    half = 4.302653 * np.std(found.batch_exponent_per_seed, ddof=1) / math.sqrt(3)
    assert found.batch_exponent_high - found.batch_exponent == pytest.approx(half, rel=1e-3)
    assert found.batch_exponent - found.batch_exponent_low == pytest.approx(half, rel=1e-3)
    assert found.norm_slope_per_seed == pytest.approx((SLOPE,) * 3, abs=1e-4)  # each seed's norm is read at its own optimum
    floors = 4.302653 * 0.1 / math.sqrt(3)  # seeds' losses lie 0.1 nats apart
    assert (found.cells["best_loss_high"] - found.cells["best_loss"]).tolist() == pytest.approx([floors] * 4, rel=3e-4)


def test_a_seeds_own_rule_at_a_given_batch_is_told():
    found = fixed_batch(sweep(wander=0.01, bent=0.0))
    assert np.array(found.lr_horizon_exponent_per_seed) + 0.55 == pytest.approx([-0.004, 0, 0.004], abs=1e-4)  # 0.01 (1 − ALONG)
    assert np.array(found.norm_slope_per_seed) - 0.201 == pytest.approx([-0.0038, 0, 0.0038], abs=1e-4)


@BOTH
def test_a_seed_that_reads_another_norm_moves_its_own_slope_alone(fit):
    rows = sweep()
    extra = np.where(rows["seed"] == 1001, 0.01 * (np.log2(rows["horizon_tokens"]) - 23), 0.0)
    found = fit(rows.assign(log2_norm=rows["log2_norm"] + extra))
    assert found.norm_slope_per_seed == pytest.approx((SLOPE, SLOPE + 0.01, SLOPE), abs=1e-6)
    assert found.norm_slope == pytest.approx(SLOPE + 0.01 / 3, abs=1e-6)


@BOTH
def test_one_seed_has_estimates_and_no_interval(fit):
    found = fit(sweep(seeds=1))
    assert found.norm_slope == pytest.approx(SLOPE, abs=1e-6) and len(found.norm_slope_per_seed) == 1
    assert math.isnan(found.norm_slope_low) and math.isnan(found.lr_exponent_high) and found.cells["best_lr_low"].isna().all()
    assert math.isnan(rivals(sweep(seeds=1)).table["drift_low"][0]) and math.isnan(fixed_batch(sweep(seeds=1)).norm_slope_low)


def test_the_spread_over_windows_counts_what_noise_does_not_explain():
    assert window_spread([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]) == pytest.approx(math.sqrt(2 / 3))
    assert window_spread([[1.0, -1.0], [-0.9, 1.0]]) == 0
    bent = fit_surfaces(sweep(skews=(0.5, 0.5), rates=np.arange(-9.2, 0.0)))
    assert bent.norm_slope_high - bent.norm_slope > 1.9 * bent.window_sd["norm_slope"] > 1e-4


# -- diverged runs and edges -------------------------------------------------------------------------------------------


@BOTH
def test_diverged_corners_are_no_loss_and_take_nothing_from_the_fit(fit):
    rows = sweep()
    corner = (np.log2(rows["peak_lr"]) > -3.5) & (np.log2(rows["batch_tokens"]) < 11.5)
    found = fit(rows.assign(loss=rows["loss"].mask(corner), log2_norm=rows["log2_norm"].mask(corner)))
    assert (found.lr_exponent, found.batch_exponent, found.norm_slope) == pytest.approx((LR, BATCH, SLOPE), abs=1e-5)
    one = fit(rows.assign(loss=rows["loss"].mask(corner & (rows["seed"] == 1001))))  # one seed diverged: the cell is out for all
    assert one.cells["n"].tolist() == found.cells["n"].tolist() and one.norm_slope == pytest.approx(SLOPE, abs=1e-5)


def test_a_diverged_rate_pulls_the_joint_vertex_back():
    rows = sweep(lr=-3.0, rates=np.arange(-8.0, 1.0), keep=lambda v, w, b: np.abs(w) < 2.2)
    kept = np.log2(rows["peak_lr"]) < -2.5  # the shortest horizon has its optimum at −2.16
    open_end = fit_joint_surface(rows[kept])
    walled = fit_joint_surface(rows.assign(loss=rows["loss"].where(kept)))
    assert math.log2(open_end.cells["best_lr"][0]) == pytest.approx(-2.16, abs=1e-3) and open_end.cells["edge"][0] == "lr high"
    assert walled.cells["best_lr"][0] < 0.97 * open_end.cells["best_lr"][0] and walled.censored > open_end.censored


def test_an_optimum_beyond_the_grid_is_flagged_and_enters_no_line():
    rows = sweep(batches=np.arange(12.0, 17.0))  # best batches 11.65, 12.55, 13.45, 14.35
    found = fit_surfaces(rows)
    assert found.cells["edge"].tolist() == ["batch low", "", "", ""] and found.n == 3
    bent = rows.assign(log2_norm=rows["log2_norm"].mask(rows["horizon_tokens"] == 2.0**20, 99.0))
    assert fit_surfaces(bent).norm_slope == pytest.approx(SLOPE, abs=1e-6)
    joint = fit_joint_surface(rows)
    assert joint.cells["edge"].tolist() == ["batch low", "", "", ""] and joint.n == 4 and joint.batch_exponent == pytest.approx(BATCH)
    high = fit_surfaces(sweep(rates=np.arange(-9.0, -4.0)))
    assert high.cells["edge"].tolist() == ["lr high", "lr high", "", ""]


@BOTH
def test_fewer_than_two_bracketed_horizons_are_refused_by_side(fit):
    with pytest.raises(es.EdgeOptimum, match=r"1 of 4 horizons .*1.049e\+06 tokens: .*batch low; 4.194e\+06 tokens: batch low; 1"):
        fit(sweep(batches=np.arange(14.0, 18.0)))


def test_a_surface_that_bends_down_along_the_batch_is_a_saddle():
    rows = sweep()
    rows["loss"] -= np.where(rows["horizon_tokens"] == 2.0**22, 0.1 * (np.log2(rows["batch_tokens"]) - 12.5) ** 2, 0)
    found = fit_surfaces(rows)
    assert found.cells["edge"][1].startswith("saddle") and math.isnan(found.cells["best_lr"][1]) and found.n == 3
    assert found.lr_exponent == pytest.approx(LR)


def test_bowls_at_a_given_batch_are_flagged_at_their_edges():
    found = fixed_batch(sweep(rates=np.arange(-7.0, -3.0), keep=lambda v, w, b: np.abs(w) < 2.5))
    edges = found.cells.set_index(["horizon_tokens", "batch_tokens"])["edge"]
    assert edges[2.0**26, 2.0**12] == "lr low" and edges[2.0**20, 2.0**14] == "lr high" and edges[2.0**22, 2.0**12] == ""
    assert found.n == (found.cells["edge"] == "").sum() < len(found.cells)
    assert (found.lr_batch_exponent, found.lr_horizon_exponent) == pytest.approx((0.6, -0.55), abs=1e-6)
    with pytest.raises(es.EdgeOptimum, match="0 of 32 best rates lie within their grids"):
        fixed_batch(sweep(rates=np.arange(-16.0, -12.0)))


def test_the_jacobian_is_that_of_the_residuals():
    rows = sweep(np.random.default_rng(4), noise=0.01, skews=(0.2, 0.2))
    problem = _Problem(lr_batch_grid(rows.assign(loss=rows["loss"].mask(rows["peak_lr"] > 0.2))), 0.2, 2)
    for batch in (0.0, 5.0):  # at 5 far cells lie below the best, so that their hinges push
        at = np.array([-5.0, -0.5, 0.5, batch, 0.4, math.log(0.08), math.log(0.05), 0.2, 0.3])
        numeric = np.column_stack([(problem.both(at + 1e-6 * e)[0] - problem.both(at - 1e-6 * e)[0]) / 2e-6 for e in np.eye(9)])
        assert problem.both(at)[1] == pytest.approx(numeric, abs=1e-7)
    assert (problem.both(at)[0][~problem.near] < 0).any()


# -- rivals ------------------------------------------------------------------------------------------------------------


def test_rivals_are_told_in_half_widths_of_their_own_basin():
    rows = sweep(bent=0.0)
    rows["log2_lr_steps"] = np.log2(rows["peak_lr"] * rows["horizon_tokens"] / rows["batch_tokens"])
    found = rivals(rows, ["log2_lr_steps", "log2_norm"], excess=0.01)
    octave = math.sqrt(2 * 0.01 / K)  # half a unit of the rate: K u²/2 = 0.01
    assert found.table["candidate"].tolist() == ["log2_norm", "log2_lr_steps"]
    assert found.table["half_width"].tolist() == pytest.approx([0.7 * octave, octave])
    assert found.table["slope"].tolist() == pytest.approx([SLOPE, LR + 1 - BATCH])
    assert found.table["drift_in_widths"].tolist() == pytest.approx([6 * 0.03 / (0.7 * octave), 6 * 0.27 / octave])
    steps = found.cells[found.cells["candidate"] == "log2_lr_steps"]
    assert steps["value"].tolist() == pytest.approx([-5 + 23 - 13 + 0.27 * d for d in (-3, -1, 1, 3)])
    assert rivals(rows, excess=0.04).table["half_width"][0] == pytest.approx(0.7 * 2 * octave)


def test_a_seed_with_a_wider_basin_counts_its_drift_as_less():
    rows = sweep(bent=0.0)
    other = rows["seed"] == 1002
    wider = rows.assign(loss=rows["loss"].where(~other, 4 + (rows["loss"] - 4) * 0.98))
    table = rivals(wider).table.iloc[0]
    half = 4.302653 * np.std([0, 0, 0.01], ddof=1) / math.sqrt(3) * table["drift_in_widths"]  # √(1/0.98) ≈ 1.01
    assert table["drift_in_widths_high"] - table["drift_in_widths"] == pytest.approx(half, rel=0.05)


# -- known truths, fresh seeds -----------------------------------------------------------------------------------------

TRUTH = {"lr_exponent": LR, "batch_exponent": BATCH, "norm_slope": SLOPE}


def draws_of(fit, n, **case):
    entropy = np.random.SeedSequence().entropy
    rng = np.random.default_rng(entropy)
    found = [fit(sweep(rng, noise=0.015, **case)) for _ in range(n)]
    for name, truth in TRUTH.items():
        own = np.array([getattr(f, name) for f in found])
        covered = np.mean([getattr(f, name + "_low") <= truth <= getattr(f, name + "_high") for f in found])
        bias, sd = own.mean() - truth, own.std()
        yield bias, sd, covered, f"{name}, seed {entropy}: bias {bias:.4f}, sd {sd:.4f}, coverage {covered}"


@pytest.mark.parametrize("fit, case, draws", [(fit_surfaces, {}, 60), (fit_joint_surface, {"skews": (0.2, 0.2)}, 20)])
def test_intervals_cover_and_biases_are_small_beside_the_spread(fit, case, draws):
    for bias, sd, covered, said in draws_of(fit, draws, keep=within(2.2), **case):
        assert abs(bias) < 0.4 * sd + 4 * sd / math.sqrt(draws), said  # four errors of the mean beside the limit
        assert covered >= 0.95 - 5 * math.sqrt(0.95 * 0.05 / draws), said


@pytest.mark.slow
@pytest.mark.parametrize("fit, case", [(fit_surfaces, {}), (fit_joint_surface, {"skews": (0.2, 0.2)}), (fit_joint_surface, {"seeds": 5})])
def test_intervals_cover_as_told(fit, case):
    for bias, sd, covered, said in draws_of(fit, 1000, keep=within(2.2), **case):
        assert abs(bias) < 0.4 * sd and 0.92 <= covered <= 0.98, said


# -- the power of a design ---------------------------------------------------------------------------------------------


def design(batch_step=1.0):
    """Rates and batches of three octaves to each side, at four horizons."""
    cells = [(2**h, 2**b, 2**x) for h in HORIZONS for b in np.arange(10, 16.1, batch_step) for x in np.arange(-9.0, -1.0)]
    return pd.DataFrame(cells, columns=["horizon_tokens", "batch_tokens", "peak_lr"])


KNOWN = SurfaceTruth(best_lr=2**-5.0, best_batch_tokens=2**13.0, horizon_tokens=2**23.0, norm_slope=SLOPE, lr_skew=0, batch_skew=0)


def test_the_control_surface_has_its_optimum_curvatures_and_norm_where_it_says():
    at = pd.DataFrame({"horizon_tokens": 2.0 ** np.array([23, 25, 23, 23]), "batch_tokens": 2.0 ** np.array([13, 13.9, 13, 14]),
                       "peak_lr": 2.0 ** np.array([-5, -5.56, -4, -4.4])})
    loss, norm = KNOWN.expected(at)
    assert loss.tolist() == pytest.approx([4.0, 3.9, 4.04, 4.03]) and norm.tolist() == pytest.approx([7, 7.06, 7.7, 7.22])
    rows = SurfaceTruth(**{**vars(KNOWN), "norm_sd": 0.06}).draw(at, 400, np.random.default_rng(0))
    first, third = (rows[rows["peak_lr"] == lr].set_index("seed")["loss"] for lr in (2**-5.0, 2**-4.0))
    assert rows.groupby("peak_lr")["log2_norm"].std().tolist() == pytest.approx([0.06] * 4, rel=0.15)
    assert (third - first).std() == pytest.approx(0.01 * math.sqrt(2), rel=0.1)
    assert first.std() == pytest.approx(math.hypot(0.01, 0.02), rel=0.1)


def test_what_a_design_can_show_follows_from_its_noise():
    quiet = norm_slope_uncertainty(design(), KNOWN, seeds=3, draws=24, rng=1, fit=fit_surfaces)
    loud = norm_slope_uncertainty(design(), SurfaceTruth(**{**vars(KNOWN), "run_sd": 0.02, "norm_sd": 0.06}), seeds=3, draws=24, rng=1,
                                  fit=fit_surfaces)
    assert loud.sd / quiet.sd == pytest.approx(2, rel=0.25) and abs(quiet.bias) < quiet.sd
    assert quiet.detectable == pytest.approx((4.302653 + 1.060660) * quiet.sd, rel=1e-5)
    assert quiet.provable_margin == pytest.approx((2.919986 + 1.885618) * quiet.sd, rel=1e-5)
    assert quiet.runs == 3 * 7 * 8 and quiet.refused == 0 and quiet.coverage > 0.8


def test_the_joint_fit_needs_less_noise_to_be_sure():
    two, one = (norm_slope_uncertainty(design(), KNOWN, seeds=3, draws=8, rng=2, fit=fit) for fit in (fit_surfaces, fit_joint_surface))
    assert one.sd < two.sd


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, said", [
    (lambda r: r.drop(columns=["seed", "peak_lr"]), "the frame lacks peak_lr, seed; it has horizon_tokens"),
    (lambda r: r.drop(columns="log2_norm"), "the frame lacks log2_norm"),
    (lambda r: r.assign(peak_lr=np.log2(r["peak_lr"])), "peak_lr must be positive and finite.*passed as 2"),
    (lambda r: r.assign(batch_tokens=0), "batch_tokens must be positive"),
    (lambda r: r.assign(horizon_tokens=np.nan), "horizon_tokens must be positive"),
    (lambda r: r[r["horizon_tokens"] == 2.0**20], r"1 horizon \(1.049e\+06 tokens\) has no exponent; add"),
    (lambda r: r[(r["batch_tokens"] < 2**10.5) | (r["horizon_tokens"] > 2**21)], r"2 batches at horizon_tokens 1.049e\+06"),
    (lambda r: r[r["peak_lr"] < 2**-7.5], r"2 rates at horizon_tokens 1.049e\+06, .* 6.711e\+07; add runs there"),
    (lambda r: r.assign(loss=r["loss"].mask(r["peak_lr"] > 2**-7.5)), "2 rates at"),
    (lambda r: r.drop(index=5), r"seed 1000 has 0 at .* 2\^20, batch_tokens 2\^9, peak_lr 2\^-4 \(1 such in all\); a diverged run"),
    (lambda r: pd.concat([r, r.head(2)]), r"seed 1000 has 2 at .* \(2 such in all\); keep one"),
    (lambda r: r.assign(log2_norm=r["log2_norm"].mask(r.index == 5)), r"log2_norm is missing or infinite in 1 runs .* peak_lr 2\^-4"),
    (lambda r: r[((np.log2(r["peak_lr"]) + 5).abs() < 0.1) | (r["batch_tokens"] == 2.0**12)], "do not determine a quadratic"),
])
def test_bad_rows_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        fit_surfaces(change(sweep()))


def test_a_cross_of_cells_is_no_surface_for_the_joint_fit_either():
    rows = sweep()
    with pytest.raises(ValueError, match="cells near the best do not determine a quadratic in rate and batch; give three batches"):
        fit_joint_surface(rows[((np.log2(rows["peak_lr"]) + 5).abs() < 0.1) | (rows["batch_tokens"] == 2.0**12)])


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="worst_excess is a number of nats above the best loss, positive and finite; got 0"):
        fit_surfaces(sweep(), worst_excess=0)
    with pytest.raises(ValueError, match="skew is 'none', 'lr', 'both'; got 'batch'"):
        fit_joint_surface(sweep(), skew="batch")
    with pytest.raises(ValueError, match=r"candidate columns and an excess above 0 nats; got \[\] and 0.01"):
        rivals(sweep(), [])
    flat = sweep().assign(log2_batch=lambda r: np.log2(r["batch_tokens"]))
    with pytest.raises(ValueError, match="log2_batch does not change with the rate along the best batch"):
        rivals(flat, ["log2_batch"])
    with pytest.raises(ValueError, match="a surface needs these above 0: lr_curvature=0"):
        SurfaceTruth(2**-5.0, 2**13.0, 2**23.0, lr_curvature=0)
    with pytest.raises(ValueError, match="shared is a share of variance, 0 … 1; got 2"):
        SurfaceTruth(2**-5.0, 2**13.0, 2**23.0, shared=2)
    with pytest.raises(ValueError, match="at least 2 seeds and 2 draws; got 1 and 10"):
        norm_slope_uncertainty(design(), KNOWN, seeds=1, draws=10)
    with pytest.raises(ValueError, match="the design lacks peak_lr"):
        norm_slope_uncertainty(design().drop(columns="peak_lr"), KNOWN, seeds=2)
    with pytest.raises(ValueError, match="3 of 3 draws of this design cannot be fitted, the last because a horizon needs .* 2 rates"):
        norm_slope_uncertainty(design().query("peak_lr < 2**-7.5"), KNOWN, seeds=2, draws=3)
