import base64
import html
import json
import re

import pytest

from etastar.report import write_report

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
ROW = {
    "claim": "wsd20_matches_cos10", "paper": "2405.18392", "evidence": "live", "published": -0.009, "estimate": 0.0213,
    "low": -0.03, "high": 0.07, "n": 5, "verdict": "reproduced", "reason": "inside the margin of 12 %", "primary": True,
    "unit": "token_fraction", "p_raw": 0.001, "p_adjusted": 0.0123, "detectable": 0.05, "exploratory": False,
    "statement": "WSD ends where <cosine> ends.",
}  # fmt: skip


def _board(folder, rows=(ROW,), controls=({"name": "A/A", "passed": True, "detail": "p = 0.6"},), **more):
    body = {"rows": list(rows), "controls": list(controls), "expected_false_verdicts": 0.05} | more
    (folder / "claims.json").write_text(json.dumps(body))


def _text(path):
    """What a reader sees, white space folded."""
    page = re.sub(r"<style>.*?</style>|<title>.*?</title>", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "smoke"
    folder.mkdir()
    return folder


def test_the_board_shows_every_part_of_a_verdict(results):
    _board(results)
    text = _text(write_report(results))
    shown = ("● reproduced", "WSD ends where <cosine> ends. ★", "wsd20_matches_cos10", "2405.18392", "margin of 12 %",
             "% of tokens −0.9 2.1 −3.0 … 7.0 5.0 5 0.0123", "live evidence", "claims: 0.05")  # fmt: skip
    assert [part for part in shown if part not in text] == []
    assert "exploratory" not in text


def test_markup_in_results_is_shown_and_never_run(results):
    _board(results, [ROW | {"reason": "<script>alert(1)</script>"}])
    assert "<script" not in write_report(results).read_text()


def test_a_command_in_a_reason_is_set_as_code(results):
    _board(results, [ROW | {"reason": "too small; `make reproduce PRESET=cpu` tests it"}])
    assert "too small; <code>make reproduce PRESET=cpu</code> tests it" in write_report(results).read_text()


def test_controls_stand_above_the_board(results):
    _board(
        results,
        controls=[{"name": "A/A", "passed": True, "detail": ""}, {"name": "truth", "passed": False, "detail": "off"}],
    )
    text = _text(write_report(results))
    assert text.index("do not trust this board") < text.index("FAILED: truth (off)") < text.index("Verdicts:")
    _board(results)
    assert "All controls passed" in _text(write_report(results))
    _board(results, controls=[])
    assert "No control ran" in _text(write_report(results))


def test_kinds_of_evidence_have_boards_of_their_own(results):
    _board(results, [ROW, ROW | {"evidence": "archive", "verdict": "contradicted"}])
    text = _text(write_report(results))
    assert (
        text.index("live evidence")
        < text.index("● reproduced")
        < text.index("archive evidence")
        < text.index("✗ contradicted")
    )


def test_changing_one_row_changes_the_page(results):
    _board(results)
    before = write_report(results).read_text()
    _board(results, [ROW | {"estimate": 0.0313}])
    after = write_report(results).read_text()
    assert ">2.1<" in before and ">3.1<" in after and ">2.1<" not in after


def test_a_row_with_hardly_anything_is_still_shown(results):
    _board(results, [{"claim": "b", "verdict": "untested", "estimate": None, "low": None, "detectable": float("nan")}])
    text = _text(write_report(results))
    assert "– untested" in text and "nan" not in text.lower() and "None" not in text


def test_claims_may_be_a_bare_list_or_not_be_there(results):
    assert "no verdict board yet" in _text(write_report(results))
    (results / "claims.json").write_text(json.dumps([ROW]))
    assert "● reproduced" in _text(write_report(results))


def test_figures_are_inlined_notebooks_linked_and_provenance_told(results):
    study = results / "01_cosine_vs_wsd"
    study.mkdir()
    (study / "lr_bowls.png").write_bytes(PIXEL)
    (study / "findings.json").write_text(
        json.dumps(
            {
                "findings": [{"hidden": 1}],
                "preset": "smoke",
                "provenance": {"torch": "2.13.0", "commit": "abc", "gpu": None},
            }
        )
    )
    (results / "notebooks").mkdir()
    (results / "notebooks" / "01_cosine_vs_wsd.ipynb").write_text("{}")
    path = write_report(results)
    page, text = path.read_text(), _text(path)
    assert base64.b64encode(PIXEL).decode() in page and 'alt="lr bowls"' in page
    assert 'href="notebooks/01_cosine_vs_wsd.ipynb"' in page
    assert "torch 2.13.0" in text and "commit abc" in text and "hidden" not in text
    assert re.findall(r'(?:src|href)="(?!data:|https://arxiv\.org|notebooks/|claims\.json)', page) == []


def test_what_cannot_be_read_is_said(tmp_path, results):
    with pytest.raises(FileNotFoundError, match="make reproduce PRESET=cpu"):
        write_report(tmp_path / "cpu")
    (results / "claims.json").write_text("{")
    with pytest.raises(ValueError, match="claims.json is no JSON"):
        write_report(results)
