import numpy as np
import pandas as pd
import pytest
from drawn import assert_text_is_whole_and_apart
from marks import bare, crosses, faint, joined, legend, marked_points, notes, only, segments, title, xy

from etastar import plots


def _rules():
    values = {"best rate over tokens": (-0.3, -0.28), "best batch over tokens": (0.5, 0.45), "slope of the norm": (0.01, np.nan)}
    rows = [(rule, optimizer, method, value + shift, value + shift - 0.1, value + shift + 0.12, told if optimizer == "Scion" else np.nan)
            for rule, (value, told) in values.items() for optimizer, shift in (("Scion", 0), ("AdamW", 0.05))
            for method in ("two-step", "joint")]
    return pd.DataFrame(rows, columns="rule optimizer method value low high published".split())


def _rivals():
    drifts = {"output norm RMS→∞": 0.4, "hidden norm RMS→RMS": -2.5, "rate · steps": 3.2}
    rows = [(name, optimizer, way * drift, way * drift - 0.5, way * drift + 0.6)
            for name, drift in drifts.items() for optimizer, way in (("Scion", 1), ("AdamW", -1))]
    return pd.DataFrame(rows, columns="candidate optimizer drift low high".split())


def _gains():
    rows = [(optimizer, placed, batch, horizon, *(gain + shift - horizon / 2**22 + aside for aside in (0, -1, 1.5)))
            for optimizer, shift in (("Scion", 1), ("AdamW", 0)) for placed in ("everywhere", "pre")
            for batch, gain in (("B*", 0.5), ("4B*", 3)) for horizon in (2**20, 2**22)]
    return pd.DataFrame(rows, columns="optimizer normalization batch horizon_tokens gain_percent low high".split())


def _ratios(seeds=(0, 1)):
    """The hidden rate is best two octaves below the others; AdamW's output layer diverges four above."""
    rows = [(optimizer, placed, batch, group, x, 0.01 * bend * (x + best) ** 2 + 0.01 * seed, seed)
            for optimizer in ("Scion", "AdamW") for placed in ("everywhere", "pre") for batch in ("B*", "4B*")
            for group, bend, best in (("input", 1, 0), ("hidden", 2, 2), ("output", 3, 0)) for x in (-4, -2, 0, 2, 4) for seed in seeds]
    frame = pd.DataFrame(rows, columns="optimizer normalization batch group log2_ratio loss_excess seed".split())
    lost = (frame["optimizer"] == "AdamW") & (frame["group"] == "output") & (frame["log2_ratio"] == 4)
    return frame.assign(loss_excess=frame["loss_excess"].mask(lost))


@pytest.fixture(scope="module")
def figures():
    return {"rules": plots.rule_exponents(_rules()), "invariants": plots.invariants(_rivals()),
            "groups": plots.layer_groups(_gains(), _ratios())}


@pytest.fixture(scope="module")
def scarce():
    """One optimizer, one seed, one rule, one horizon."""
    return {
        "rules": plots.rule_exponents(bare(only(_rules(), optimizer="AdamW", rule="slope of the norm"))),
        "invariants": plots.invariants(bare(only(_rivals(), optimizer="Scion"))),
        "groups": plots.layer_groups(bare(only(_gains(), horizon_tokens=2**20)), only(_ratios((0,)), optimizer="Scion")),
    }


def test_no_text_of_a_figure_of_rules_is_cut_or_covered_and_legends_lie_above_the_data(figures, scarce):
    for fig in (*figures.values(), *scarce.values()):
        assert_text_is_whole_and_apart(fig)
        for part in fig.subfigs or [fig]:
            assert all(part.legends[0].get_window_extent().y0 >= ax.get_window_extent().y1 - 1 for ax in part.axes)


def test_figures_of_rules_carry_their_units(figures):
    assert {ax.get_xlabel() for ax in figures["rules"].axes} == {"exponent"}
    assert figures["invariants"].axes[0].get_xlabel().endswith("(half-widths of the loss basin)")
    gains, *ratios = figures["groups"].axes
    assert "(% of the loss)" in gains.get_xlabel() and ratios[-1].get_xlabel().endswith("(log2)")
    assert ratios[0].get_ylabel().endswith("(nats per token)")


def test_exponents_stand_in_the_row_of_their_optimizer_and_method_with_the_published_diamond(figures):
    fig, rules = figures["rules"], _rules()
    assert [title(ax) for ax in fig.axes] == list(rules["rule"].unique())
    told = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert told == ["Scion, two-step", "Scion, joint", "AdamW, two-step", "AdamW, joint"]
    for ax in fig.axes:
        of = rules[rules["rule"] == title(ax)]
        points = [xy(line) for line in marked_points(ax, 7)]
        assert np.concatenate([x for x, _ in points]).tolist() == of["value"].tolist()
        assert np.concatenate([y for _, y in points]).tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(np.concatenate(segments(ax))[:, :, 0], of[["low", "high"]])
        told = np.concatenate([xy(line)[0] for line in ax.get_lines() if line.get_marker() == "d" and len(line.get_xdata())])
        np.testing.assert_array_equal(told, of["published"])
    assert legend(fig) == ["Scion", "AdamW", "published"]
    assert legend(plots.rule_exponents(only(rules, optimizer="AdamW"))) == ["AdamW"]


def test_drifts_stand_in_the_row_of_their_candidate_beside_the_basin(figures):
    ax = figures["invariants"].axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["output norm RMS→∞", "hidden norm RMS→RMS", "rate · steps"]
    points = [xy(line) for line in marked_points(ax, 7)]
    assert [x.tolist() for x, _ in points] == [[0.4, -2.5, 3.2], [-0.4, 2.5, -3.2]]
    assert [np.round(y).tolist() for _, y in points] == [[0, 1, 2]] * 2
    np.testing.assert_allclose(segments(ax)[0][:, :, 0], [[-0.1, 1], [-3, -1.9], [2.7, 3.8]])
    assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_linestyle() == "--" and len(line.get_xdata())] == [-1, 1]
    wide = plots.invariants(_rivals().assign(low=-1e3, high=1e3)).axes[0]
    assert wide.get_xlim() == pytest.approx((-6.4, 6.4))


def test_gains_stand_in_the_row_of_their_setting_a_colour_a_horizon(figures):
    fig = figures["groups"]
    ax, told = fig.axes[0], _gains()
    assert [text.get_text() for text in ax.get_yticklabels()][:3] == [
        "Scion, norm everywhere, batch $B^*$", "Scion, norm everywhere, batch 4$B^*$", "Scion, norm before blocks, batch $B^*$"]
    points = [xy(line) for line in marked_points(ax, 7)]
    for (x, y), horizon in zip(points, (2**20, 2**22), strict=True):
        assert x.tolist() == told[told["horizon_tokens"] == horizon]["gain_percent"].tolist() and np.round(y).tolist() == list(range(8))
    assert legend(fig.subfigs[0]) == ["$2^{20}$ tokens", "$2^{22}$ tokens"]


def test_the_loss_over_a_group_s_rate_is_drawn_a_panel_a_setting(figures):
    fig, ratios = figures["groups"], _ratios()
    panels = fig.subfigs[1].axes
    assert [title(ax) for ax in panels] == ["Scion, norm everywhere", "Scion, norm before blocks", "AdamW, norm everywhere",
                                                  "AdamW, norm before blocks"]
    assert legend(fig.subfigs[1]) == ["input", "hidden", "output", "batch $B^*$", "batch 4$B^*$"]
    for ax, diverged in zip(panels, (False, False, True, True), strict=True):
        means = {(line.get_marker(), line.get_linestyle()): xy(line) for line in joined(ax)}
        assert len(means) == 6
        hidden = means["s", "--"]
        assert hidden[0].tolist() == [-4, -2, 0, 2, 4] and hidden[1] == pytest.approx(0.02 * (hidden[0] + 2) ** 2 + 0.005)
        assert len(means["^", "-"][0]) == (4 if diverged else 5) and bool(crosses(ax)) == diverged
    assert "diverged" in notes(fig.subfigs[1]) and len(faint(panels[0])) == 6
    with pytest.raises(ValueError, match="no layer group 'head'; a group is one of input, hidden, output"):
        plots.layer_groups(_gains(), ratios.assign(group="head"))


@pytest.mark.parametrize("draw, lacking", [
    (plots.rule_exponents, "rule"), (plots.invariants, "candidate"), (lambda f: plots.layer_groups(f, _ratios()), "optimizer"),
    (lambda f: plots.layer_groups(_gains(), f), "optimizer"),
])
def test_a_frame_of_rules_without_its_columns_is_refused_by_name(draw, lacking):
    with pytest.raises(ValueError, match=f"no column '{lacking}'"):
        draw(pd.DataFrame({"x": [1]}))
