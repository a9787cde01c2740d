"""Archive findings on Fitting: on made-up grids of known laws, on the released ones by literal numbers, and where there are none."""

import math
import types

import numpy as np
import pandas as pd
import pytest

from etastar.analysis.claims import load_claims
from etastar.analysis.cooldown_archive import RerunNoise
from etastar.analysis.paired import Estimate
from etastar.archives import NotFetched
from etastar.studies import mup_vs_fitting_published as published
from etastar.studies.mup_vs_fitting_published import Released
from etastar.studies.power_laws_published import Grids

pytestmark = pytest.mark.filterwarnings("ignore:steplaw. params=:UserWarning")  # sizes beyond the range of its fit
SIZES, HORIZONS = (2e8, 2.7e8, 4e8, 5.4e8, 1.08e9), (4e9, 1.2e10, 2.5e10, 1e11)


def made_up(size, in_tokens, in_batch=0.3, bend=0.0, seed=0):
    """Grids whose best rate is a power law in size, tokens and batch, bent over size by `bend`; a little scatter of each cell's rate."""
    lr, batch = (a.ravel() for a in np.meshgrid(2.0 ** np.arange(-16, -3.9, 0.5), 2.0 ** np.arange(17, 23)))
    draw, cells = np.random.default_rng(seed), []
    for n in SIZES:
        for d in HORIZONS:
            x = np.log2(n / 4e8)
            best = 2.0 ** (-10 + size * x + bend * x**2 / 2) * (d / 1e10) ** in_tokens * (batch / 2**17) ** in_batch * 2 ** (
                0.02 * draw.normal())
            x, z = np.log2(lr / best), np.log2(batch / (0.58 * d**0.571))
            cells.append(pd.DataFrame({"cell": f"{n:g}, {d:g}", "params": n, "horizon_tokens": d, "peak_lr": lr, "batch_tokens": batch,
                                       "steps": d / batch, "smooth_loss": 2 + 40 * d**-0.2 + 0.012 * x**2 + 0.004 * z**2}))
    runs = pd.concat(cells, ignore_index=True)
    runs.attrs["paper"] = "arXiv 2503.04715"
    return Released(Grids(runs, pd.DataFrame()))


def judged(of, *claims):
    known = load_claims(published.STUDY)
    return [published._judge(known[claim], of) for claim in claims]


def test_without_the_grids_every_claim_they_speak_of_is_untested_and_told_how_to_test(nowhere):
    found = {f.claim.id: f for f in published.published_findings()}
    assert set(found) == set(published.MEASURES) and len(found) == 8
    for finding in found.values():
        assert (finding.verdict, finding.evidence, finding.estimate) == ("untested", "archive", None)
        assert finding.reason.endswith("`etastar fetch archives steplaw`") and not finding.claim.primary
    assert published.published_tables() == published.published_figures() == {}
    assert "`etastar fetch archives steplaw`" in published.published_note()


def test_contested_claims_name_both_sides(nowhere):
    claims = {c.id: c for c in published._claims()}
    contested = {"fitting_horizon_exponent", "fitting_size_exponent", "steplaw_size_exponent", "fitted_rule_beats_kept_rate",
                 "rate_bends_over_size"}
    assert contested <= {name for name, c in claims.items() if "," in c.paper}
    told = {name: claims[name].published for name in ("fitting_horizon_exponent", "fitting_size_exponent", "steplaw_size_exponent")}
    assert told == {"fitting_horizon_exponent": -0.3509, "fitting_size_exponent": -0.2219, "steplaw_size_exponent": -0.713}


def test_planted_exponents_reproduce_the_law_they_are_of_and_not_its_rival(nowhere):
    of = made_up(-0.2219, -0.3509)
    horizon, size, at_best = judged(of, "fitting_horizon_exponent", "fitting_size_exponent", "steplaw_size_exponent")
    assert horizon.estimate.value == pytest.approx(-0.351, abs=0.01) and size.estimate.value == pytest.approx(-0.222, abs=0.02)
    assert (horizon.verdict, size.verdict) == ("reproduced", "reproduced") and (horizon.estimate.df, size.estimate.df) == (17, 4)
    assert at_best.verdict == "contradicted" and "the authors' own released runs" in at_best.reason
    assert "without μP" in horizon.reason and "logs of WSD are not on this machine" in horizon.reason
    other = judged(made_up(-0.713, 0.307), "fitting_horizon_exponent", "fitting_size_exponent", "steplaw_size_exponent")
    assert [f.verdict for f in other] == ["differs at this scale", "differs at this scale", "reproduced"]


def test_a_planted_law_is_predicted_ahead_and_a_kept_rate_is_not(nowhere):
    of = made_up(-0.7, -0.3)
    fitted, three = judged(of, "fitted_rule_beats_kept_rate", "three_rates_suffice")
    assert fitted.verdict == "reproduced" and fitted.estimate.value < -0.0005
    assert fitted.estimate.n == 8  # targets of two sizes, those with two sizes at half of theirs or less
    assert three.verdict == "reproduced" and abs(three.estimate.value) < 5e-4
    level = judged(made_up(0.0, 0.0), "fitted_rule_beats_kept_rate")[0]
    assert level.verdict != "reproduced" and abs(level.estimate.value) < 1e-4


def test_a_planted_bend_over_size_is_seen(nowhere):
    bent, straight = (judged(made_up(-0.5, -0.3, bend=bend), "rate_bends_over_size")[0] for bend in (0.4, 0))
    assert bent.verdict == "reproduced" and bent.estimate.value == pytest.approx(0.4, abs=0.06)
    assert straight.verdict == "inconclusive" and abs(straight.estimate.value) < 0.1


def test_a_loss_that_is_a_power_law_at_every_rate_finds_the_longest_horizons_rate(nowhere):
    still, = judged(made_up(-0.5, 0.0), "loss_law_finds_rate")
    assert still.estimate.value == pytest.approx(0, abs=0.1) and still.estimate.df == 4 and still.verdict == "reproduced"


@pytest.mark.parametrize("count, verdict", [("params", "reproduced"), ("params_active", "contradicted")])
def test_mixtures_are_judged_by_the_dense_law_with_their_total(nowhere, monkeypatch, count, verdict):
    of = made_up(-0.713, 0.0, in_batch=0.4)
    active = {2e8: 1.9e8, 2.7e8: 2.3e8, 4e8: 5.9e8, 5.4e8: 1.24e9}
    runs = of.runs[of.runs["params"] < 1e9].assign(params_active=lambda r: r["params"].map(active), total=2.15e9)
    own = runs["total" if count == "params" else count]
    runs = runs.assign(peak_lr=runs["peak_lr"] * (own / runs["params"]) ** -0.713, params=2.15e9).drop(columns="total")
    monkeypatch.setattr(published, "archive", lambda name: runs)
    finding, = judged(of, "dense_rule_holds_for_moe")
    assert finding.verdict == verdict and finding.estimate.n == 16 and "16 cells of mixtures" in finding.reason
    tables = published.mixtures(of)
    assert tables["published_mixtures"]["share_of_total"].median() == pytest.approx(float(count == "params"), abs=0.1)
    assert tables["published_mixture_horizons"]["horizon"].abs().max() < 0.05


def test_mixtures_that_are_not_here_leave_their_claim_alone_untested(nowhere):
    finding, = judged(made_up(-0.7, 0.2), "dense_rule_holds_for_moe")
    assert finding.verdict == "untested" and finding.reason.endswith("`etastar fetch archives steplaw_moe`")


def test_cooldowns_whose_losses_follow_the_law_are_predicted_and_their_error_is_of_reruns():
    rows = [{"steps": steps, "arm": "10 % linear", "peak_lr": 2.0**x, "runs": 1,
             "loss": 2.5 + 0.01 * (x + 10.5) ** 2 + (1 + 0.02 * (x + 9.5) ** 2) * (steps / 15_000) ** -0.5}
            for steps in (15_000, 25_000, 35_000, 50_000) for x in (-11, -10, -9)]
    once, twice = (published.wsd_loss_law(types.SimpleNamespace(table=pd.DataFrame(rows), noise=RerunNoise(sd, 18, 0.003)))
                   for sd in (0.0001, 0.0002))
    assert once.value == pytest.approx(0, abs=1e-4) and (once.unit, once.df) == ("octaves", 18)
    assert twice.se == pytest.approx(2 * once.se) and once.se > 0
    longest = [row | {"loss": row["loss"] - 0.006 * np.log2(row["peak_lr"])} if row["steps"] == 50_000 else row for row in rows]
    off = published.wsd_loss_law(types.SimpleNamespace(table=pd.DataFrame(longest), noise=RerunNoise(0.0001, 18, 0.003)))
    # a slope of −0.006 nats an octave moves the vertex by 0.006 / (2 · bend), where the bend is 0.01 + 0.02 · 0.3^½
    assert off.value == pytest.approx(-0.006 / (2 * (0.01 + 0.02 * 0.3**0.5)), rel=1e-3)


def test_the_spread_over_windows_is_in_the_error():
    found = [Estimate(value, 0.3, 4, 5, "exponent") for value in (1.0, 2.0, 4.0)]
    spread = published._with_spread(found)
    assert spread.value == 2 and spread.se == pytest.approx(math.hypot(0.3, np.std([1, 2, 4])))


@pytest.fixture(scope="module")
def released(skip_if_not_fetched):
    with skip_if_not_fetched():
        return published.released()


@pytest.mark.archive
@pytest.mark.parametrize("claim, value, se, n, verdict", [
    ("fitting_size_exponent", -0.500, 0.0477, 15, "differs at this scale"),
    ("steplaw_size_exponent", -0.713, 0.0490, 17, "reproduced"),
    ("three_rates_suffice", 0.00074, 0.00017, 148, "inconclusive"),
    ("fitted_rule_beats_kept_rate", -0.00107, 0.00035, 5, "reproduced"),
    ("rate_bends_over_size", 0.044, 0.182, 17, "inconclusive"),
])
def test_what_the_released_runs_say_of_each_claim(released, claim, value, se, n, verdict):
    finding, = judged(released, claim)
    assert finding.estimate.value == pytest.approx(value, rel=0.02) and finding.estimate.se == pytest.approx(se, rel=0.02)
    assert (finding.estimate.n, finding.verdict, finding.evidence) == (n, verdict, "archive")


@pytest.mark.archive
@pytest.mark.slow  # reads the logs of WSD as well
@pytest.mark.parametrize("claim, value, se, n, told", [
    ("fitting_horizon_exponent", -0.310, 0.0388, 15, "-0.31 at 131k, -0.16 at 262k, -0.04 at 393k, +0.05 at 524k"),
    ("loss_law_finds_rate", 0.923, 0.490, 6, "off by up to 2.2 octaves"),
])
def test_what_the_released_runs_say_beside_the_logs_of_wsd(released, claim, value, se, n, told):
    finding, = judged(released, claim)
    assert finding.estimate.value == pytest.approx(value, rel=0.01) and finding.estimate.se == pytest.approx(se, rel=0.01)
    assert finding.estimate.n == n and finding.verdict == "inconclusive" and told in finding.reason


@pytest.mark.archive
def test_the_fitted_search_cost_many_runs_of_the_target(released):
    finding, = judged(released, "fitted_rule_beats_kept_rate")
    assert "misses by 0.17 octaves, the kept rate by 0.63, but its search cost as much as 71 runs of the target" in finding.reason


@pytest.mark.archive
@pytest.mark.slow
def test_the_notebook_gets_tables_figures_and_a_source(released):
    tables, figures = published.published_tables(), published.published_figures()
    assert all(len(table) for table in tables.values()) and len(figures) == 2 and all(figure.axes for figure in figures.values())
    bends = tables["published_bends"].query("direction == 'horizon'").set_index("batch_tokens")
    assert bends["bend"].round(2).tolist()[:4] == [-0.01, -0.23, -0.25, -0.23] and (bends["high"].iloc[1:4] < 0).all()
    slopes = tables["published_ratio_slopes"].set_index("way")["slope"]
    assert slopes["kept"] == pytest.approx(0.0041, abs=1e-4) and slopes["Fitting's exponents"] == pytest.approx(0.0008, abs=1e-4)
    by_ratio = tables["published_by_ratio"].set_index(["way", "ratio"])
    assert by_ratio.loc[("kept", 5.0), "excess"] == pytest.approx(0.0061, abs=1e-4)
    assert "1911 released runs" in published.published_note()


@pytest.mark.archive
def test_the_released_mixtures_are_judged(released, skip_if_not_fetched):
    with skip_if_not_fetched():
        tables = published.mixtures(released)
    cells = tables["published_mixtures"]
    assert cells["params_active"].nunique() == 4 and np.isfinite(cells["total_octaves"]).all()
    finding, = judged(released, "dense_rule_holds_for_moe")
    assert finding.verdict != "untested" and finding.estimate.value == pytest.approx(cells["total_octaves"].mean())


def test_not_fetched_is_what_a_missing_archive_raises(nowhere):
    with pytest.raises(NotFetched, match="etastar fetch archives steplaw"):
        published.released()
