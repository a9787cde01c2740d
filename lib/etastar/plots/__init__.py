"""Figures: pure functions from a frame to a matplotlib Figure, all in one style, plus `save`."""

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
from etastar.plots.style import LINES, LOSS, MARKERS, STYLE, Drawing, save

__all__ = [
    "LINES", "LOSS", "MARKERS", "STYLE", "UNITS", "VERDICT_MARKS", "Drawing", "averaging_spans", "law_predictions", "length_lines",
    "loss_curves", "loss_on_line", "lr_bowls", "overshoot", "paired_differences", "perplexity_lines", "published_lengths",
    "published_shapes", "save", "schedule_lines", "verdict_forest",
]
