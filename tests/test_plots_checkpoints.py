"""Figures of checkpoints: what stands where, and no text is cut or covered."""

import numpy as np
import pandas as pd
import pytest
from drawn import assert_text_is_whole_and_apart
from marks import legend, title, xy

from etastar import plots
from etastar.plots.checkpoints import matrix_of
from etastar.studies.released_measures import printed_scores


def _norms(checkpoints=("dense", "mixture"), start=1.5):
    rows = []
    for i, name in enumerate(checkpoints):
        rows += [(name, pd.NA, "embedding", "model.embed_tokens.weight", "", 2.0 + i, start),
                 (name, pd.NA, "output", "lm_head.weight", "", 9.0, 3)]
        rows += [(name, layer, "hidden", f"model.layers.{layer}.self_attn.{matrix}.weight", "", 1 + layer + 0.1 * j, start)
                 for layer in range(4) for j, matrix in enumerate(("q_proj", "k_proj", "o_proj"))]
    return pd.DataFrame(rows, columns="checkpoint layer role name part norm at_start".split())


def _cloze():
    rows = [(arm, seed, reader, {"hand": 50, "harness": 50, "untrained": 30, "placebo": 25}[reader] + seed, 1.5)
            for arm in ("dense", "mixture") for seed in (0, 1, 2) for reader in ("hand", "untrained", "placebo", "harness")
            if reader != "harness" or seed == 0]
    return pd.DataFrame(rows, columns="arm seed reader accuracy se".split())


def _windows():
    rows = [(arm, stride, 4 - 0.1 * k + i, 0.02, 3 - 0.1 * k + i, 0.05)
            for i, arm in enumerate(("dense", "mixture")) for k, stride in enumerate((128, 64, 32))]
    return pd.DataFrame(rows, columns="arm stride nats_per_token nats_per_token_se bits_per_byte bits_per_byte_se".split())


OURS = pd.DataFrame({"benchmark": ["PIQA", "BoolQ", "a mean"], "score": [79.0, 70.5, 67.0], "se": [0.9, 0.8, 0.4]})


@pytest.fixture(scope="module")
def figures():
    given = _norms(("dense", "mixture", "PowerLM-3B"), start=np.nan)
    return {"norms": plots.norms_by_layer(_norms()), "given": plots.norms_by_layer(given),
            "cloze": plots.cloze_accuracy(_cloze(), 25.0), "windows": plots.window_losses(_windows()),
            "printed": plots.printed_scores(printed_scores(), {"PowerLM-3B": OURS}), "bare": plots.printed_scores(printed_scores(), {})}


def test_no_text_of_a_checkpoint_figure_is_cut_or_covered(figures):
    for fig in figures.values():
        assert_text_is_whole_and_apart(fig)


def test_each_matrix_is_a_line_over_the_layers_and_the_ends_stand_in_the_title(figures):
    panel = figures["norms"].axes[1]
    lines = {line.get_label(): xy(line) for line in panel.get_lines()}
    np.testing.assert_allclose(lines["k"], ([0, 1, 2, 3], [1.1, 2.1, 3.1, 4.1]))
    assert set(lines) == {"q", "k", "o", "mean at the start"} and set(lines["mean at the start"][1]) == {1.5}
    assert "embedding 3 (1→RMS)" in title(panel) and "output 9 (RMS→∞)" in title(panel)
    assert "mean at the start" not in legend(figures["given"])


def test_accuracies_have_bars_over_items_and_the_harness_stands_once_an_arm(figures):
    ax, = figures["cloze"].axes
    points = {container.get_label(): xy(container.lines[0]) for container in ax.containers}
    assert len(points["our decoder"][0]) == 6 and len(points["lm-evaluation-harness"][0]) == 2
    assert sorted(points["another text's start"][0]) == [25, 25, 26, 26, 27, 27]
    bars = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(bars[0][:, 0], [50 - 1.96 * 1.5, 50 + 1.96 * 1.5])


def test_windows_have_a_panel_in_nats_and_one_in_bits(figures):
    left, right = figures["windows"].axes
    assert "nats per token" in left.get_ylabel() and "bits per byte" in right.get_ylabel()
    np.testing.assert_allclose(xy(left.containers[0].lines[0]), ([128, 64, 32], [4.0, 3.9, 3.8]))


def test_our_scores_stand_beside_the_printed_ones_of_the_same_benchmark(figures):
    left, right = figures["printed"].axes
    ticks = [label.get_text() for label in left.get_yticklabels()]
    ours = next(c for c in left.containers if c.get_label().startswith("evaluated"))
    assert [(x, ticks[round(y - 0.34)]) for x, y in zip(*xy(ours.lines[0]), strict=True)] == [(79.0, "PIQA"), (70.5, "BoolQ")]
    assert not right.containers and not figures["bare"].axes[0].containers
    printed = {line.get_label(): dict(zip(np.round(xy(line)[1]), xy(line)[0], strict=True)) for line in right.get_lines()}
    assert printed["PowerMoE-3B"][ticks.index("HellaSwag")] == 71.5 and printed["SmolLM-1.7B"][ticks.index("PIQA")] == 75.7


@pytest.mark.parametrize("draw", [plots.norms_by_layer, plots.window_losses, lambda f: plots.cloze_accuracy(f, 25),
                                  lambda f: plots.printed_scores(f, {})])
def test_a_frame_without_rows_or_columns_is_refused(draw):
    with pytest.raises(ValueError, match="no column"):
        draw(pd.DataFrame({"x": [1]}))


def test_matrices_of_experts_go_by_the_names_of_dense_ones():
    named = [("model.layers.0.mlp.down_proj.weight", ""), ("model.layers.3.block_sparse_moe.output_linear.weight", ""),
             ("model.layers.3.block_sparse_moe.input_linear.weight", "gate"), ("model.layers.3.block_sparse_moe.router.layer.weight", "")]
    assert [matrix_of(*pair) for pair in named] == ["down", "down", "gate", "router"]
