"""The learning rate for one's own data: bowls of small runs, a power law through their vertices, and what it says of the large run."""

from etastar.tune.answer import Answer
from etastar.tune.carry_out import tune
from etastar.tune.plan import Plan, make_plan
from etastar.tune.question import Question

__all__ = ["Answer", "Plan", "Question", "make_plan", "tune"]
