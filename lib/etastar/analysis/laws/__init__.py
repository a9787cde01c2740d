"""The published learning-rate and batch laws: what they say, with their units, ranges and disagreements."""

from etastar.analysis.laws.advice import format_advice, over_horizon, recommend
from etastar.analysis.laws.law import Answer, Law, LawWarning
from etastar.analysis.laws.models import published_models
from etastar.analysis.laws.published import law_table, laws, lr_and_batch

__all__ = ["Answer", "Law", "LawWarning", "format_advice", "law_table", "laws", "lr_and_batch", "over_horizon",
           "published_models", "recommend"]
