"""The notebook panel: it shows what recommend says and follows its inputs."""

import pytest

from etastar.analysis.laws import recommend
from etastar.panel import law_panel


@pytest.fixture
def panel():
    return law_panel(params=5e8, horizon_tokens=40e9, batch_tokens=5e5)


def shown(panel):
    """(text of the table, bytes of the two figures)."""
    _, table, *figures = panel.children
    return table.value, [bytes(figure.value) for figure in figures]


def test_the_panel_shows_the_advice_and_two_figures(panel):
    text, figures = shown(panel)
    asked = recommend(5e8, 40e9, 5e5, width=2048, base_width=256)
    assert panel.advice.equals(asked) and f"{asked.attrs['spread']:.2f}-fold" in text
    assert all(figure.startswith(b"\x89PNG") for figure in figures)


def test_the_panel_follows_its_inputs(panel):
    before = shown(panel)[1]
    panel.inputs["parametrization"].value = "mup"
    panel.inputs["width"].value = 1024
    row = panel.advice.set_index(["law", "quantity"]).loc[("power", "peak_lr")]
    assert row["hidden_lr"] == pytest.approx(row["value"] / 4) and shown(panel)[1] != before


def test_what_cannot_be_computed_is_told_and_an_empty_batch_means_none(panel):
    panel.inputs["horizon_tokens"].value = 0
    text, figures = shown(panel)
    assert "horizon_tokens=0.0 must be positive" in text and figures == [b"", b""] and panel.advice is None
    panel.inputs["batch_tokens"].value = 0
    panel.inputs["horizon_tokens"].value = 1e10
    assert "batch_tokens" not in panel.advice.attrs["setting"] and all(shown(panel)[1])
