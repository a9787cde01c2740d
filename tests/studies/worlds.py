"""Made-up runs of studies: recipes with losses from a known world, and the verdicts on them."""

import dataclasses
import math

import etastar as es
from etastar.analysis.board import verdicts


@dataclasses.dataclass
class FakeRun:
    recipe: es.Recipe
    val_loss: float

    @property
    def status(self):
        return "done" if math.isfinite(self.val_loss) else "diverged"

    @property
    def run_id(self):
        return self.recipe.run_id


def live(study, measured):
    """The board of a study's live findings, by claim."""
    return verdicts([f for f in study.judge(measured) if f.evidence == "live"]).set_index("claim")
