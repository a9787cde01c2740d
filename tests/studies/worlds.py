"""Made-up runs of studies: recipes with losses from a known world."""

import dataclasses
import math

import etastar as es


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
