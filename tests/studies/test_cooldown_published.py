"""Archive findings: on made-up logs whose answers are known, on the published ones by literal numbers, and where there are none."""

import numpy as np
import pandas as pd
import pytest

from etastar.analysis.claims import load_claims
from etastar.analysis.cooldown_archive import RerunNoise
from etastar.analysis.paired import Estimate
from etastar.archives import NotFetched
from etastar.studies import cooldown_published as published
from etastar.studies.cooldown_published import in_tokens, published_figures, published_findings, published_note, published_tables

STUDIES = ("01_cosine_vs_wsd", "02_cooldown", "03_averaging")
JUDGED = {"wsd20_matches_cos10", "cooldown_20_passes_cos10", "plateau_after_20", "sqrt_beats_linear", "cooldown_10_no_worse",
          "sqrt_gain_grows_with_lr", "lr_transfers_over_lengths", "best_length_grows_with_lr", "averaging_recovers_share",
          "swa_short_of_cooldown", "swa_short_of_cos10", "cosine_averaged_gains", "averaging_after_cooldown_hurts"}


@pytest.fixture(scope="module")
def logs(skip_if_not_fetched):
    with skip_if_not_fetched():
        return published.published_logs()


def findings(*studies):
    return {f.claim.id: f for study in studies for f in published_findings(study)}


def test_without_logs_every_claim_they_speak_of_is_untested_and_told_how_to_test(nowhere):
    found = findings(*STUDIES)
    assert set(found) == JUDGED
    for finding in found.values():
        assert (finding.verdict, finding.evidence, finding.estimate) == ("untested", "archive", None)
        assert "archive haegele" in finding.reason and finding.reason.endswith("`etastar fetch archives haegele`")
    assert published_tables("02_cooldown") == published_figures("03_averaging") == {}
    assert "`etastar fetch archives haegele`" in published_note("02_cooldown")


def test_logs_that_are_here_in_part_count_as_not_here(monkeypatch, nowhere):
    runs = pd.DataFrame({"run": ["a"]})
    runs.attrs["missing"] = ["data/sl_slimpajama_llama_norm_x.json", "data/openwebtext2_llama_norm_y.json"]
    monkeypatch.setattr(published, "archive", lambda name: runs)
    with pytest.raises(NotFetched, match="1 of its runs on SlimPajama"):
        published.published_logs()
    assert {f.verdict for f in published_findings("02_cooldown")} == {"untested"}


def test_a_claim_that_no_public_log_speaks_of_has_no_archive_finding():
    silent = {c for study in STUDIES for c in load_claims(study)} - JUDGED
    assert {"short_cooldown_gains_with_horizon", "five_percent_on_the_long_run", "ema_worse_than_swa"} <= silent
    assert not silent & (set(published.GRID) | set(published.SWEEP))


def grid(best, depth=0.0):
    """Losses of the 124M grid: parabolas in octaves with the given best log2 rate, `depth` lower by arm; 0.1 nats less an e-fold."""
    rates = (1e-4, 5e-4, 1e-3, 2e-3, 3e-3)
    rows = [{"steps": steps, "arm": arm, "peak_lr": lr, "runs": 1,
             "loss": 3 - 0.1 * np.log(steps / 50_000) + 0.01 * (np.log2(lr) - best[arm]) ** 2 - depth.get(arm, 0.0)}
            for steps in (25_000, 50_000) for arm in published.ARMS for lr in rates]
    return pd.DataFrame(rows)


class MadeUp(published.Logs):
    table = None

    def __init__(self, table, noise=0.001):
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "noise", RerunNoise(noise, 18, 0.003))


def judged(table, *claims):
    known = load_claims("02_cooldown")
    return [published._judge(known[claim], MadeUp(table)) for claim in claims]


def test_planted_effects_are_found_with_the_error_of_reruns():
    best = dict.fromkeys(published.ARMS, -10.0) | {"40 % linear": -9.2}
    passed, plateau, transfers, sqrt = judged(grid(best, {"20 % linear": 0.02, "40 % linear": 0.02, "20 % 1-sqrt": 0.026}),
                                              "cooldown_20_passes_cos10", "plateau_after_20", "lr_transfers_over_lengths",
                                              "sqrt_beats_linear")
    assert passed.estimate.value == pytest.approx(-0.2) and passed.verdict == "reproduced"
    assert (passed.estimate.df, passed.estimate.n, passed.evidence) == (18, 1, "archive")
    assert plateau.estimate.value == pytest.approx(0, abs=1e-6)
    assert transfers.estimate.value == pytest.approx(0.8) and transfers.verdict == "contradicted"
    assert sqrt.estimate.value == pytest.approx(-0.06)
    # Two runs, and the slope's two in the quotient: 0.001·√2 over 0.1, and 0.06·0.001·√2 / (0.1·ln 2).
    assert sqrt.estimate.se == pytest.approx(np.hypot(0.01 * np.sqrt(2), 0.06 * 0.01 * np.sqrt(2) / np.log(2)), rel=1e-3)
    for finding in (passed, plateau, transfers, sqrt):
        assert "seeds were never varied" in finding.reason and "18 rerun pairs (0.0010 nats a run)" in finding.reason


def test_the_form_of_the_fit_is_added_where_a_parabola_is_not_the_curve():
    best = dict.fromkeys(published.ARMS, -10.0) | {"40 % linear": -9.6}
    table = grid(best, {})
    straight, = judged(table, "lr_transfers_over_lengths")
    steep = table["arm"].eq("40 % linear") & table["peak_lr"].eq(3e-3)
    bent, = judged(table.assign(loss=table["loss"] + 0.01 * steep), "lr_transfers_over_lengths")
    assert "form of the fit" not in straight.reason and "for the form of the fit" in bent.reason
    assert bent.estimate.value == pytest.approx(straight.estimate.value) and bent.estimate.se > 1.02 * straight.estimate.se


def test_a_best_rate_at_the_edge_of_the_grid_is_not_extrapolated():
    with pytest.raises(ValueError, match="best rate of 40 % linear at 50000 steps is at the edge"):
        judged(grid(dict.fromkeys(published.ARMS, -10.0) | {"40 % linear": -5.0}, {}), "lr_transfers_over_lengths")


def test_tokens_carry_both_errors():
    found = in_tokens(Estimate(0.02, 0.002, 7, 16), Estimate(-0.1, 0.01, 18, 1))
    assert (found.value, found.df, found.n, found.unit) == (pytest.approx(0.2), 7, 16, "token_fraction")
    assert found.se == pytest.approx(np.hypot(0.02, 0.2 * 0.1))


@pytest.mark.archive
def test_an_e_fold_of_tokens_is_worth_a_tenth_of_a_nat(logs):
    assert (round(logs.slope.value, 3), round(logs.slope.se, 3), logs.slope.df) == (-0.101, 0.002, 18)


@pytest.mark.archive
@pytest.mark.parametrize("claim, value, se, verdict", [
    ("wsd20_matches_cos10", -0.009, 0.0105, "reproduced"),
    ("cooldown_20_passes_cos10", -0.150, 0.016, "reproduced"),
    ("plateau_after_20", -0.125, 0.014, "contradicted"),
    ("sqrt_beats_linear", -0.061, 0.012, "reproduced"),
    ("cooldown_10_no_worse", -0.003, 0.016, "reproduced"),
    ("sqrt_gain_grows_with_lr", -0.143, 0.020, "reproduced"),
    ("lr_transfers_over_lengths", 0.621, 0.121, "contradicted"),
    ("best_length_grows_with_lr", -0.182, 0.023, "reproduced"),
    ("averaging_recovers_share", 0.822, 0.016, "reproduced"),
    ("swa_short_of_cooldown", 0.221, 0.026, "reproduced"),
    ("swa_short_of_cos10", 0.219, 0.024, "reproduced"),
    ("cosine_averaged_gains", -0.143, 0.015, "reproduced"),
    ("averaging_after_cooldown_hurts", 0.062, 0.016, "reproduced"),
])
def test_what_the_logs_say_of_each_claim(logs, claim, value, se, verdict):
    finding = findings(next(c.study for c in load_claims().values() if c.id == claim))[claim]
    assert finding.estimate.value == pytest.approx(value, abs=6e-4) and finding.estimate.se == pytest.approx(se, abs=6e-4)
    assert finding.verdict == verdict and "seeds were never varied" in finding.reason


@pytest.mark.archive
def test_how_far_ten_per_cent_falls_short_does_not_shrink_with_the_horizon(logs):
    table = published.contrasts(logs).set_index("contrast")
    short = table.loc[published.SHORT_OF_LINEAR].drop("unit").astype(float)
    assert short.round(4).tolist() == [0.0150, 0.0163, 0.0163, 0.0157]
    assert table["50k steps"].notna().all() and np.isnan(table.loc["cooldown_20_passes_cos10", "15k steps"])


@pytest.mark.archive
@pytest.mark.parametrize("study", STUDIES)
def test_notebooks_get_tables_figures_and_a_source(logs, study):
    tables, figures = published_tables(study), published_figures(study)
    assert all(len(table) for table in tables.values()) and all(figure.axes for figure in figures.values()) and figures
    note = published_note(study)
    assert "MIT" in note and "202 published runs" in note and "one seed" in note
