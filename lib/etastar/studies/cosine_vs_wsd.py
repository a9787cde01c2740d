"""Study 01, cosine against WSD: same loss at equal tokens? which floor? which learning rate? which cycle length?

Papers: Hägele et al. 2405.18392 (WSD against cosine to 10 %, LR ratio, floor), Hoffmann et al. 2203.15556 App. D (cosine
cycle length), Hu et al. 2404.06395 (MiniCPM: branches of one trunk against a fresh cosine each).

Arms share seeds: the same initial parameters and the same data order, so that every difference is paired. Each arm has
its own LR bowl per seed; a seed is judged at the vertex of the other seeds' bowl, read off its own bowl.
"""

import dataclasses
import math

import numpy as np
import pandas as pd

from etastar.recipe import AdamW, Corpus, Execution, Model, Recipe
from etastar.schedules import WSD, Cosine

STUDY = "01_cosine_vs_wsd"
VERDICT_SEED = 1000  # seeds below chose the grids (pilot); these and up are judged
CYCLES = {  # cosine cycle length as a multiple of the run, and what follows a cycle that ends early
    "cycle_0.50_hold": (0.5, "hold"), "cycle_0.50_loop": (0.5, "loop"),
    "cycle_0.75_hold": (0.75, "hold"), "cycle_0.75_loop": (0.75, "loop"),
    "cycle_1.25": (1.25, "hold"), "cycle_2.00": (2.0, "hold"),
}


@dataclasses.dataclass(frozen=True)
class Design:
    """Everything a preset decides: model, data, horizon, seeds, and the LR grid of each arm (log2, from pilot seeds).

    `centre` is the pilot's best log2 LR of an arm; the grid is `offsets` octaves around it. `branch_tokens_per_param` are
    the horizons at which branches of one WSD trunk meet fresh cosines.
    """

    model: Model
    vocab: int
    corpus_bytes: int | None
    batch_tokens: int
    horizon_steps: int
    warmup_steps: int
    seeds: int
    centre: dict[str, float]
    offsets: tuple[float, ...]
    branch_tokens_per_param: tuple[int, ...]
    branch_seeds: int
    minutes: float
    execution: Execution = Execution()

    @property
    def horizon_tokens(self) -> int:
        """Tokens of the main horizon."""
        return self.horizon_steps * self.batch_tokens

    @property
    def seed_list(self) -> list[int]:
        """The seeds that are judged."""
        return [VERDICT_SEED + i for i in range(self.seeds)]


def schedule_of(arm: str, horizon_tokens: int, warmup_steps: int):
    """The schedule of an arm over a horizon."""
    if arm == "cos10":
        return Cosine(floor=0.1, warmup_steps=warmup_steps)
    if arm == "cos0":
        return Cosine(floor=0.0, warmup_steps=warmup_steps)
    if arm == "wsd20":
        return WSD(warmup_steps=warmup_steps, cooldown_fraction=0.2, shape="1-sqrt")
    share, after = CYCLES[arm]
    return Cosine(floor=0.1, warmup_steps=warmup_steps, cycle_tokens=round(share * horizon_tokens), after=after)


def label(recipe: Recipe) -> str:
    """The arm a recipe belongs to."""
    warmup = recipe.schedule.warmup_steps
    for arm in ("cos10", "cos0", "wsd20", *CYCLES):
        if schedule_of(arm, recipe.horizon_tokens, warmup) == recipe.schedule:
            return arm
    raise ValueError(f"recipe {recipe.run_id} is no arm of study {STUDY}: {recipe.schedule}")
