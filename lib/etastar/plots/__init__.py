"""Figures: pure functions from a frame to a matplotlib Figure, all in one style, plus `save`."""

from etastar.plots.checkpoints import cloze_accuracy, norms_by_layer, printed_scores, window_losses
from etastar.plots.common import UNITS, VERDICT_MARKS, loss_curves, lr_bowls, paired_differences, schedule_lines, verdict_forest
from etastar.plots.cooldown import (
    averaging_spans,
    law_predictions,
    length_lines,
    loss_on_line,
    overshoot,
    perplexity_lines,
    published_lengths,
    published_shapes,
)
from etastar.plots.laws import law_lines, recommendation
from etastar.plots.mup_target import head_to_head, regret_by_ratio
from etastar.plots.mup_vs_fitting import best_rates, drift_forest, scaling_bowls, steadiness
from etastar.plots.noise import noise_levels, pairing
from etastar.plots.norm_rules import invariants, layer_groups, rule_exponents
from etastar.plots.norm_transfer import loss_by_norm, norm_growth, norm_locations, optimal_norm, surfaces
from etastar.plots.power_laws import local_slopes, power_sensitivity, prediction, regrets, valley_bowls, valley_lines
from etastar.plots.published_laws import batch_exponents, exponent_estimates, law_costs, law_map
from etastar.plots.style import LINES, LOSS, MARKERS, STYLE, Drawing, save
from etastar.plots.tune import tuned

__all__ = [
    "LINES", "LOSS", "MARKERS", "STYLE", "UNITS", "VERDICT_MARKS", "Drawing", "averaging_spans", "batch_exponents", "best_rates",
    "cloze_accuracy", "drift_forest", "exponent_estimates", "head_to_head", "invariants", "law_costs", "law_lines", "law_map",
    "law_predictions", "layer_groups", "length_lines", "local_slopes", "loss_by_norm", "loss_curves", "loss_on_line", "lr_bowls",
    "noise_levels", "norm_growth", "norm_locations", "norms_by_layer", "optimal_norm", "overshoot", "paired_differences", "pairing",
    "perplexity_lines", "power_sensitivity", "prediction", "printed_scores", "published_lengths", "published_shapes", "recommendation",
    "regret_by_ratio", "regrets", "rule_exponents", "save", "scaling_bowls", "schedule_lines", "steadiness", "surfaces", "tuned",
    "valley_bowls", "valley_lines", "verdict_forest", "window_losses",
]
