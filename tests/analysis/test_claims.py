"""The rules of verdicts by literal numbers, the registry, and how many claims are corrected for."""

import dataclasses
import json
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


# -- controls on the board ---------------------------------------------------------------------------------------------

AA, TRUTH = Control("A/A", True, "0 of 4"), Control("truth", None, "not run: no half horizon")


def test_a_failed_control_stands_at_the_top():
    board = Board(verdicts(findings([-0.03], True)), (Control("A/A", False, "9 of 10 cells differ"),))
    assert not board.sound and board.headline().startswith("**A control failed")


def test_a_control_that_did_not_run_is_no_pass_and_stands_at_the_top(tmp_path):
    board = Board(verdicts(findings([-0.03], True)), (AA, TRUTH))
    assert not board.sound and Board(board.frame, (AA,)).sound
    head, told = board.headline(), board.interpretation()
    assert head.startswith("**A control did not run; this board is not fully controlled.** truth: not run: no half horizon.")
    assert "Controls passed: A/A (0 of 4)." in head and told.startswith("**A control did not run")
    assert board.controls_frame().passed.tolist() == ["yes", "not run"]
    again = read_board(board.write(tmp_path / "board.json"))
    assert again.controls == board.controls and again.headline() == head
    assert json.loads((tmp_path / "board.json").read_text())["sound"] is False


def test_a_board_without_controls_is_not_sound_and_says_so():
    decided, idle = Board(verdicts(findings([-0.03], True)), ()), Board(verdicts([untested(claim(), "live", "too small")]), ())
    assert not decided.sound and decided.headline().startswith("**No control ran; this board is not controlled.**")
    assert decided.interpretation().startswith("**No control ran")
    assert not idle.sound and idle.headline().startswith("No control ran: nothing on this board") and "ran" not in idle.interpretation()


def test_a_board_whose_controls_all_passed_says_nothing_else():
    board = Board(verdicts(findings([-0.03], True)), (AA,))
    assert board.warning() == "" and board.headline().startswith("**1 claims**") and board.interpretation().startswith("- *")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A study's findings and their board, one claim of them untested."""
    some = findings([-0.03, 0.0], True) + [untested(claim(id="u", published=math.nan), "live", "no runs; `make x`")]
    return write_findings(tmp_path / "f.json", some, [AA], {"preset": "cpu"}), Board(verdicts(some), (AA,)).write(tmp_path / "b.json")


def edited(path, change):
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))
    return path


def test_a_board_read_after_the_registry_changed_is_exploratory(files, tmp_path):
    _, path = files
    assert not read_board(path).frame.exploratory.any() and "exploratory" not in read_board(path).headline()
    board = read_board(edited(path, lambda b: b.update(registry="of yesterday")))
    assert board.frame.exploratory.all() and board.headline().startswith("**3 of 3 claims are exploratory**")
    assert read_board(board.write(tmp_path / "again.json")).frame.exploratory.all()  # writing it anew does not launder it


def put(place, item):
    """An edit that sets what stands at a dotted place; `...` takes it away."""
    *way, last = [int(p) if p.isdigit() else p for p in place.split(".")]

    def change(body):
        for step in way:
            body = body[step]
        if item is ...:
            del body[last]
        else:
            body[last] = item

    return change


@pytest.mark.parametrize("place, item, said", [
    ("registry", ..., "registry is missing"), ("registry", 7, "registry must be str; got 7"), ("rows", {}, "rows must be list; got {}"),
    ("controls", ..., "controls is missing"), ("rows.1", "x", "rows[1] must be named fields; got 'x'"),
    ("rows.1.low", ..., "rows[1].low is missing"), ("rows.1.lower", 1, "rows[1].lower is unknown"),
    ("rows.0.estimate", "big", "rows[0].estimate must be float; got 'big'"), ("rows.0.estimate", True, "rows[0].estimate must be float"),
    ("rows.0.estimate", None, "rows[0].estimate cannot be nan where the verdict is reproduced"),
    ("rows.0.n", 2.5, "rows[0].n must be int; got 2.5"), ("rows.0.primary", "no", "rows[0].primary must be bool; got 'no'"),
    ("rows.0.verdict", "proven", "rows[0].verdict must be one of reproduced, contradicted"),
    ("rows.0.evidence", "hearsay", "rows[0].evidence must be one of archive, recorded, live; got 'hearsay'"),
    ("rows.0.p_adjusted", 1.5, "rows[0].p_adjusted cannot be 1.5"), ("rows.0.p_raw", None, "rows[0].p_raw cannot be nan"),
    ("rows.1.claim", "liveTrue0", "rows[1].claim 'liveTrue0' has two findings of live evidence"),
    ("controls.0", [], "controls[0] must be named fields"), ("controls.0.passed", "yes", "controls[0].passed must be bool | None"),
    ("controls.0.passed", ..., "controls[0].passed is missing"),
])
def test_a_malformed_board_is_told_by_file_field_and_mend(files, place, item, said):
    path = edited(files[1], put(place, item))
    with pytest.raises(ValueError) as error:
        read_board(path)
    assert str(error.value).startswith(f"{path} is malformed: {said}") and "run the study again" in str(error.value)


@pytest.mark.parametrize("place, item, said", [
    ("findings", None, "findings must be list; got None"), ("findings.0.registry", ..., "findings[0].registry is missing"),
    ("findings.0.claim", 3, "findings[0].claim must be dict; got 3"), ("findings.0.claim.kind", "hunch", "findings[0].claim.kind must be"),
    ("findings.0.claim.margin", "wide", "findings[0].claim.margin must be float; got 'wide'"),
    ("findings.0.claim.arms", "ab", "findings[0].claim.arms must be tuple; got 'ab'"),
    ("findings.0.claim.mood", 1, "findings[0].claim.mood is unknown"),
    ("findings.0.estimate.se", -1.0, "findings[0].estimate.se cannot be -1.0"),
    ("findings.0.estimate.df", ..., "findings[0].estimate.df is missing"),
    ("findings.0.estimate.n", 0, "findings[0].estimate.n cannot be 0"),
    ("findings.0.estimate", None, "findings[0].estimate cannot be nan where the verdict is reproduced"),
    ("findings.0.p", -0.1, "findings[0].p cannot be -0.1"), ("findings.0.verdict", None, "findings[0].verdict must be str; got None"),
    ("findings.1.claim.id", "liveTrue0", "findings[1].claim 'liveTrue0' has two"),
    ("controls.0.detail", 5, "controls[0].detail must be str"),
])
def test_malformed_findings_are_told_by_file_field_and_mend(files, place, item, said):
    path = edited(files[0], put(place, item))
    with pytest.raises(ValueError) as error:
        read_findings(path)
    assert str(error.value).startswith(f"{path} is malformed: {said}") and "run the study again" in str(error.value)


@pytest.mark.parametrize("read", [read_board, read_findings])
@pytest.mark.parametrize("text, said", [
    ("", "is missing or not whole"), ('{"rows": [', "is missing or not whole"), ("[]", "is malformed: the file holds []"),
    ("3", "is malformed: the file holds 3"), ("null", "is malformed: the file holds None"), (None, "is missing or not whole"),
    (b"\xff\xfe", "is missing or not whole"),
])
def test_what_is_no_file_of_ours_is_refused(tmp_path, read, text, said):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path} {said}") and "run the study again" in str(error.value)
