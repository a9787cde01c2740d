"""The rules of verdicts by literal numbers, the registry, and how many claims are corrected for."""

import dataclasses
import math

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from etastar.analysis.board import Board, read_board, read_findings, verdicts, write_findings
from etastar.analysis.claims import Claim, judge, load_claims, registry_hash, untested
from etastar.analysis.controls import Control
from etastar.analysis.paired import Estimate, mean_estimate


def claim(**changes):
    given = dict(id="c", study="s", paper="0000.00000", place="", statement="", kind="direction", estimand="", arms=("a", "b"),
                 unit="nats", published=-0.02, published_note="", primary=True, minimum_scale={"params": 1e6}, matching="",
                 side="lower", smallest_effect=0.01, margin=0.02, rival=0.05, rival_name="rival")
    return Claim(**(given | changes))


def say(c, value, se, df=30, scale=None, matching=True):
    return judge(c, Estimate(value, se, df, 8, c.unit), evidence="live", scale=scale or {"params": 2e6}, matching=matching).verdict


@pytest.mark.parametrize("value, se, verdict", [
    (-0.02, 0.002, "reproduced"), (-0.02, 0.02, "inconclusive"), (-0.006, 0.001, "inconclusive"),  # too small an effect
    (0.02, 0.002, "contradicted"), (0.02, 0.02, "inconclusive"),
])
def test_direction(value, se, verdict):
    assert say(claim(), value, se) == verdict
    assert say(claim(side="higher"), -value, se) == verdict


@pytest.mark.parametrize("value, se, verdict", [
    (0.001, 0.005, "reproduced"), (0.001, 0.02, "inconclusive"), (0.015, 0.005, "inconclusive"), (0.06, 0.005, "contradicted"),
])
def test_equality(value, se, verdict):
    assert say(claim(kind="equality"), value, se) == verdict


EXPONENT = dict(kind="number", unit="exponent", published=-0.51, margin=0.1, rival=-0.32, rival_name="Bjorck")


@pytest.mark.parametrize("value, se, verdict", [
    (-0.50, 0.02, "reproduced"), (-0.42, 0.07, "inconclusive"),  # holds both −0.51 and −0.32: reproduces neither
    (-0.32, 0.02, "contradicted"), (-0.44, 0.02, "inconclusive"),
])
def test_number(value, se, verdict):
    assert say(claim(**EXPONENT), value, se) == verdict


def test_a_number_inside_a_wide_margin_needs_its_rival_excluded():
    wide = claim(**EXPONENT | {"margin": 0.3})
    assert say(wide, -0.42, 0.07) == "inconclusive" and say(wide, -0.50, 0.02) == "reproduced"
    found = judge(wide, Estimate(-0.42, 0.07, 30, 8, "exponent"), evidence="live", scale={"params": 2e6}, matching=True)
    assert "Bjorck (-0.32) is not excluded" in found.reason or "decides neither way" in found.reason


@pytest.mark.parametrize("value, se, verdict", [
    (-0.01, 0.005, "reproduced"), (0.015, 0.005, "inconclusive"), (0.05, 0.005, "contradicted"),
])
def test_no_worse(value, se, verdict):
    assert say(claim(kind="no_worse"), value, se) == verdict


def test_below_its_scale_or_with_other_settings_a_contradiction_is_a_difference_of_scale():
    assert say(claim(), 0.02, 0.002, scale={"params": 1e5}) == "differs at this scale"
    assert say(claim(), 0.02, 0.002, matching=False) == "differs at this scale"
    assert say(claim(), -0.02, 0.002, scale={"params": 1e5}) == "reproduced"


def test_an_inconclusive_verdict_says_what_could_have_been_seen():
    found = judge(claim(), Estimate(-0.02, 0.02, 30, 8), evidence="live", scale={}, matching=True)
    assert found.detectable == pytest.approx(Estimate(0, 0.02, 30, 8).detectable()) and f"{found.detectable:.3g}" in found.reason


def test_wrong_units_and_evidence_are_refused():
    with pytest.raises(ValueError, match="in nats, the estimate in octaves"):
        judge(claim(), Estimate(1, 1, 3, 4, "octaves"), evidence="live", scale={}, matching=True)
    with pytest.raises(ValueError, match="unknown evidence 'hearsay'"):
        judge(claim(), Estimate(1, 1, 3, 4), evidence="hearsay", scale={}, matching=True)


# -- the registry ------------------------------------------------------------------------------------------------------


def test_the_registered_claims_hold_the_papers_numbers():
    claims = load_claims("01_cosine_vs_wsd")
    slope = (3.0518 - 2.9819) / math.log(2)  # nats an e-fold of tokens at 124M, 25k → 50k
    assert slope == pytest.approx(0.101, abs=5e-4)
    assert claims["wsd20_matches_cos10"].published == pytest.approx(-0.0009 / slope, abs=5e-4)
    assert claims["cos0_beats_cos10"].published == pytest.approx((2.9543 - 2.9819) / slope, abs=2e-3)
    assert claims["cycle_1.25_worse"].published == pytest.approx(0.0255 / slope, abs=2e-3)
    assert claims["cycle_2.00_worse"].published == pytest.approx(0.075 / slope, abs=5e-3)
    assert claims["wsd_lr_half_of_cos0"].published == -1 and claims["wsd_lr_half_of_cos0"].rival == 0
    assert sum(c.primary for c in claims.values()) == 3


BASE = """
[[claim]]
id = "one"
study = "s"
paper = "p"
place = "x"
statement = "x"
kind = "direction"
side = "lower"
smallest_effect = 0.01
estimand = "x"
arms = ["a"]
unit = "nats"
published = 0.1
published_note = "x"
primary = true
minimum_scale = { params = 1.0 }
matching = "x"
"""


@pytest.mark.parametrize("edit, said", [
    (lambda t: t.replace("place", "plaice"), "claim 'one': unknown ['plaice'], missing ['place']"),
    (lambda t: t.replace('kind = "direction"', 'kind = "hunch"'), "unknown kind 'hunch'"),
    (lambda t: t.replace("smallest_effect = 0.01\n", ""), "needs smallest_effect"),
    (lambda t: t.replace('side = "lower"', 'side = "left"'), "side must be lower or higher"),
    (lambda t: t + t, "registered twice"),
    (lambda t: "".join(t.replace('"one"', f'"{i}"') for i in range(4)), "4 primary claims, at most 3"),
])
def test_a_bad_registry_is_named(tmp_path, edit, said):
    (tmp_path / "claims.toml").write_text(edit(BASE))
    with pytest.raises(ValueError) as error:
        load_claims(path=tmp_path / "claims.toml")
    assert said in str(error.value)


def test_the_hash_knows_a_changed_claim_from_a_changed_layout(tmp_path):
    (tmp_path / "a.toml").write_text(BASE)
    (tmp_path / "b.toml").write_text("# a comment\n" + BASE.replace(" = ", "="))
    (tmp_path / "c.toml").write_text(BASE.replace("0.01", "0.005"))
    assert registry_hash(tmp_path / "a.toml") == registry_hash(tmp_path / "b.toml") != registry_hash(tmp_path / "c.toml")


# -- the board ---------------------------------------------------------------------------------------------------------


def findings(values, primary, evidence="live"):
    return [judge(claim(id=f"{evidence}{primary}{i}", primary=primary), Estimate(v, 0.004, 20, 8), evidence=evidence,
                  scale={"params": 2e6}, matching=True) for i, v in enumerate(values)]


def test_holm_over_primaries_and_benjamini_hochberg_over_the_rest_by_kind_of_evidence():
    some = findings([-0.03, -0.010, -0.0095], True) + findings([-0.02, -0.011, 0.0], False) + findings([-0.0101], True, "archive")
    board = verdicts(some)
    for primary, method in ((True, "holm"), (False, "fdr_bh")):
        rows = board[(board.evidence == "live") & (board.primary == primary)]
        assert rows.p_adjusted.tolist() == pytest.approx(multipletests(rows.p_raw, method=method)[1].tolist())
    archive = board[board.evidence == "archive"].iloc[0]
    assert archive.p_adjusted == pytest.approx(archive.p_raw)  # a family of its own


def test_a_verdict_that_does_not_survive_correction_is_inconclusive_and_says_so():
    weak = findings([-0.0100] + [0.001, 0.002], True)
    assert weak[0].verdict == "reproduced" and 0.05 / 3 < weak[0].p < 0.05
    row = verdicts(weak).iloc[0]
    assert row.verdict == "inconclusive" and "reproduced before correction" in row.reason


def test_evidence_is_never_pooled():
    one = findings([-0.03], True)
    with pytest.raises(ValueError, match="pool nothing"):
        verdicts(one + one)


def test_a_changed_registry_marks_a_finding_exploratory():
    (one,) = findings([-0.03], True)
    assert not verdicts([one]).exploratory.iloc[0]
    assert verdicts([dataclasses.replace(one, registry="another")]).exploratory.iloc[0]


def test_under_the_null_the_family_wise_rate_is_kept():
    entropy = np.random.SeedSequence().entropy
    rng = np.random.default_rng(entropy)
    wrong, boards = 0, 600
    for _ in range(boards):
        nulls = [judge(claim(id=str(i), smallest_effect=0.0), mean_estimate(rng.normal(0, 0.01, 5)), evidence="live", scale={},
                       matching=True) for i in range(3)]
        wrong += verdicts(nulls).verdict.isin(["reproduced", "contradicted", "differs at this scale"]).any()
    assert wrong / boards <= 0.085, f"seed {entropy}"  # binomial: above it by chance once in 10,000 boards' worth of tests


def test_a_board_and_findings_survive_their_files(tmp_path):
    some = findings([-0.03, 0.0], True) + [untested(claim(id="u", published=math.nan), "live", "no runs; `make x`")]
    controls = [Control("A/A", True, "0 of 4")]
    path = write_findings(tmp_path / "f.json", some, controls, {"preset": "cpu"})
    again, checks, about = read_findings(path)
    assert checks == controls and about == {"preset": "cpu"}
    first, second = verdicts(some), verdicts(again)
    assert first.drop(columns="published").equals(second.drop(columns="published"))
    board = Board(first, tuple(controls))
    told = read_board(board.write(tmp_path / "board.json"))
    assert told.frame.verdict.tolist() == ["reproduced", "inconclusive", "untested"] and told.controls == board.controls
    assert "Controls passed" in board.headline() and board.expected_false == pytest.approx(0.05)
    (tmp_path / "board.json").write_text((tmp_path / "board.json").read_text()[:-20])
    with pytest.raises(ValueError, match="missing or not whole"):
        read_board(tmp_path / "board.json")


def test_a_failed_control_stands_at_the_top():
    board = Board(verdicts(findings([-0.03], True)), (Control("A/A", False, "9 of 10 cells differ"),))
    assert not board.sound and board.headline().startswith("**A control failed")
