"""The noise atlas: how far a final loss strays with initial parameters, order of the data, both, and the way of computing.

No claim of a paper is judged here: what is measured says how many seeds every other study needs. About a base seed the parameters'
seed varies alone, the order's alone, and both together, at the best rate and off it, at a longer horizon and at another width;
arms share seeds, so that what pairing gains is seen too. A run on a CPU repeats to the bit whatever trains beside it, so that plain
reruns stray by 0 there by making (a test of the engine, not a measurement); rerun noise is measured between ways of computing that
round otherwise, a batch taken in parts. The published logs' rerun noise is of GPU runs that were started again.
"""

import dataclasses
import json
import math

import pandas as pd

from etastar import plots
from etastar.analysis.noise_atlas import (
    Deviation,
    by_source,
    deviation,
    deviation_near,
    noise_table,
    pair_table,
    with_relative_rates,
)
from etastar.recipe import SP, AdamW, Corpus, Execution, Model, Recipe
from etastar.schedules import WSD, Cosine, Schedule
from etastar.studies.designs import PYTHON, SMALL, TINY
from etastar.values import canonical_json, digest

STUDY = "noise"
FIRST_SEED = 5000
ARMS = ("linear 20 %", "1-sqrt 20 %", "cosine to 10 %")
SAME_RATE = 0.01  # octaves; pairs of arms are told from pairs of rates by it


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseDesign:
    """What a preset spends: `seed_count` seeds of each kind at the best rate, `outer_seed_count` at the other `offsets` from it.

    `centre` is the log2 rate about which the grid lies; rates are told in units of the measured best one all the same. `parts` are
    the sequences a batch is taken at a time, for the noise of computing. `minutes` is on the preset's hardware, and `long_steps`
    and `widths` are further scales, at the best rate alone.
    """

    model: Model
    corpus: Corpus
    batch_tokens: int
    steps: int
    long_steps: int
    centre: float
    seed_count: int
    outer_seed_count: int
    minutes: float
    offsets: tuple[float, ...] = (-1.5, 0.0, 1.5)
    widths: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()
    parametrization: SP = SP(init_std=0.1)
    execution: Execution = Execution()

    def schedule(self, arm: str, steps: int) -> Schedule:
        """The schedule of an arm; warm-up is 5 % of the steps at most."""
        warmup = max(1, steps // 20)
        if arm == "cosine to 10 %":
            return Cosine(floor=0.1, warmup_steps=warmup)
        return WSD(warmup_steps=warmup, cooldown_fraction=0.2, shape=arm.split()[0])

    def recipe(self, seed: int, data_seed: int | None = None, *, arm: str = ARMS[0], offset: float = 0.0, steps: int | None = None,
               **changes) -> Recipe:
        """One run: `seed` of the parameters, `data_seed` of the order (None: the same)."""
        steps = steps or self.steps
        # A longer run shares its trunk with a shorter one only where their warm-ups agree.
        schedule = dataclasses.replace(self.schedule(arm, steps), warmup_steps=max(1, self.steps // 20))
        return Recipe(**{"model": self.model, "corpus": self.corpus, "optimizer": AdamW(), "schedule": schedule, "seed": seed,
                         "data_seed": data_seed, "peak_lr": 2.0 ** (self.centre + offset), "batch_tokens": self.batch_tokens,
                         "horizon_tokens": steps * self.batch_tokens, "parametrization": self.parametrization,
                         "execution": self.execution, **changes})

    def scaled(self, minutes: float | None) -> "NoiseDesign":
        """The design with seeds for about so many minutes, two at least; ValueError for minutes that are not positive."""
        if minutes is None:
            return self
        if not minutes > 0:
            raise ValueError(f"minutes must be positive; got {minutes}")
        count, outer = (max(2, round(n * minutes / self.minutes)) for n in (self.seed_count, self.outer_seed_count))
        return dataclasses.replace(self, seed_count=count, outer_seed_count=outer, minutes=minutes)


DESIGNS = {
    "smoke": NoiseDesign(model=TINY, corpus=Corpus("python", vocab=512, max_bytes=8_000_000), batch_tokens=768, steps=32, long_steps=64,
                         centre=-6.25, seed_count=2, outer_seed_count=2, parts=(4,), minutes=0.5),
    "cpu": NoiseDesign(model=TINY, corpus=PYTHON, batch_tokens=768, steps=112, long_steps=224, centre=-6.25, seed_count=4,
                       outer_seed_count=3, widths=(16,), parts=(4, 6), minutes=1.0),
    "night": NoiseDesign(model=TINY, corpus=PYTHON, batch_tokens=768, steps=512, long_steps=2048, centre=-6.75, seed_count=10,
                         outer_seed_count=6, offsets=(-2.0, -1.0, 0.0, 1.0, 2.0), widths=(16, 64), parts=(2, 4, 6), minutes=45.0),
    "gpu": NoiseDesign(model=SMALL, corpus=Corpus("python", vocab=1024), batch_tokens=16_384, steps=1280, long_steps=2560, centre=-7.5,
                       seed_count=8, outer_seed_count=4, offsets=(-2.0, -1.0, 0.0, 1.0, 2.0), widths=(64,), parts=(32, 64),
                       minutes=30.0, execution=Execution(device="cuda")),
}


def recipes(preset: str, minutes: float | None = None) -> list[Recipe]:
    """All runs of a preset; ValueError for one that there is no design for."""
    if preset not in DESIGNS:
        raise ValueError(f"the noise atlas has no preset {preset!r}; known: {', '.join(DESIGNS)}")
    plan, made = DESIGNS[preset].scaled(minutes), []
    base, others = FIRST_SEED, [FIRST_SEED + i for i in range(1, plan.seed_count)]
    for offset in plan.offsets:
        some = others if offset == 0 else others[: plan.outer_seed_count - 1]
        made += [plan.recipe(base, offset=offset), *(plan.recipe(s, base, offset=offset) for s in some),
                 *(plan.recipe(base, s, offset=offset) for s in some)]
    made += [plan.recipe(s) for s in others]
    made += [plan.recipe(s, arm=arm) for arm in ARMS[1:] for s in (base, *others)]
    made += [plan.recipe(s, steps=plan.long_steps) for s in (base, *others)]
    for width in plan.widths:
        made += [plan.recipe(s, model=dataclasses.replace(plan.model, width=width)) for s in (base, *others)]
    ways = [dataclasses.replace(plan.execution, micro_batch_sequences=sequences) for sequences in plan.parts]
    return made + [plan.recipe(base, execution=way) for way in ways]


def run(preset: str, store="runs", minutes: float | None = None, **options) -> list:
    """Train what a preset lacks."""
    from etastar.engine.execute import run as train

    return train(recipes(preset, minutes), store=store, **options)


# -- measurements ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NoiseAtlas:
    """`runs` as analysis.noise_atlas has them, `table` the deviations by source and cell, `pairs` what pairing over seeds gains."""

    runs: pd.DataFrame
    table: pd.DataFrame
    pairs: pd.DataFrame

    def sd_for(self, width: int, horizon_tokens: int, relative_lr: float = 1.0, paired: bool = False) -> Deviation:
        """The deviation of a run over seeds, or (`paired`) of the difference of two arms at one rate; ValueError far from all cells.

        At one rate arms are those that are compared in a study: what a seed does to both cancels there.
        """
        if not paired:
            return deviation_near(self.table[self.table["source"] == "both"], width, horizon_tokens, relative_lr)
        near = self.pairs[self.pairs["octaves_apart"] < SAME_RATE] if len(self.pairs) else self.pairs
        if near.empty:
            raise ValueError("no two arms were trained at one rate over the same seeds; etastar.studies.noise.run trains some")
        return deviation_near(near, width, horizon_tokens, relative_lr)


def measure(runs) -> NoiseAtlas:
    """The atlas of any runs (Run objects, of this study or others); ValueError where no two differ in a seed alone."""
    return atlas_of(frame_of([(r.recipe, r.val_loss) for r in runs]))


def atlas_of(frame: pd.DataFrame) -> NoiseAtlas:
    """The atlas of a frame of runs."""
    frame = with_relative_rates(frame)
    return NoiseAtlas(frame, noise_table(frame), pair_table(frame))


def frame_of(losses) -> pd.DataFrame:
    """The frame that analysis.noise_atlas reads, from (recipe, final loss in nats, NaN diverged) pairs."""
    rows = []
    for recipe, loss in losses:
        alike = recipe.replace(seed=0, data_seed=None, execution=Execution(device=recipe.execution.device))
        rows.append({"setting": digest(alike), "arm": arm_of(recipe), "width": recipe.model.width, "horizon_tokens": recipe.horizon_tokens,
                     "peak_lr": recipe.peak_lr, "seed": recipe.seed, "data_seed": recipe.resolved_data_seed,
                     "execution": canonical_json(recipe.execution), "loss": loss})
    return pd.DataFrame(rows)


def arm_of(recipe: Recipe) -> str:
    """The name of a recipe's arm: its schedule where it is one of this study's, else a hash of all that sets it apart but the scale."""
    schedule, warmup = recipe.schedule, getattr(recipe.schedule, "warmup_steps", None)
    if recipe.optimizer == AdamW() and not recipe.beta2_changes:
        if isinstance(schedule, Cosine) and schedule == Cosine(floor=0.1, warmup_steps=warmup):
            return ARMS[2]
        for arm in ARMS[:2]:
            if schedule == WSD(warmup_steps=warmup, cooldown_fraction=0.2, shape=arm.split()[0]):
                return arm
    # The horizon is no part of an arm, but lengths in tokens within a schedule are.
    return f"{type(schedule).__name__} {digest(schedule, recipe.optimizer, recipe.beta2_changes, length=6)}"


def from_store(store="runs") -> NoiseAtlas:
    """The atlas of all finished runs of a store, whatever study they are of; nothing is trained. ValueError where none compare."""
    from etastar.engine.store import Store

    found = Store.at(store)
    pairs = []
    for run_id in found.run_ids():
        summary = found.summary(run_id)
        recipe = Recipe.from_json(json.loads(found.read(run_id, "recipe.json")))
        pairs.append((recipe, math.nan if summary["val_loss"] is None else summary["val_loss"]))
    if not pairs:
        raise ValueError(f"no finished runs in {found.path}; etastar.studies.noise.run trains some")
    return atlas_of(frame_of(pairs))


def published(level: float = 0.95) -> pd.DataFrame:
    """Rerun noise of the published runs (124M, one seed) as a row of the table; NotFetched where the logs are not here."""
    from etastar.analysis.cooldown_archive import rerun_noise
    from etastar.archives import archive

    found = rerun_noise(archive("haegele"))
    return pd.DataFrame([{"source": "rerun", "arm": "published runs of 124M", **dataclasses.asdict(deviation(found.sd, found.pairs, level)),
                          "n": 2 * found.pairs}])


def figures(atlas: NoiseAtlas) -> dict:
    """Name → matplotlib Figure: deviations by source over the rate and the scale, and what pairing leaves of them."""
    drawn = {"noise": plots.noise_levels(atlas.table)}
    return drawn | ({"pairing": plots.pairing(atlas.pairs)} if len(atlas.pairs) else {})


def interpretation(atlas: NoiseAtlas) -> str:
    """What the atlas shows, in sentences whose every number is computed."""
    own = atlas.table[atlas.table["df"] > 0]
    lines = [f"- {source}: {rows['sd'].median():.2g} nats at the median of {len(rows)} cells ({rows['sd'].min():.2g} … "
             f"{rows['sd'].max():.2g})." for source, rows in own.groupby("source")]
    if len(atlas.pairs):
        for name, rows in (("at one rate", atlas.pairs[atlas.pairs["octaves_apart"] < SAME_RATE]),
                           ("at different rates", atlas.pairs[atlas.pairs["octaves_apart"] >= SAME_RATE])):
            if len(rows):
                lines.append(f"- Paired arms {name}: correlation {rows['correlation'].median():+.2f}, difference "
                             f"{rows['sd'].median():.4f} nats where unpaired runs would have {rows['independent_sd'].median():.4f} "
                             f"(medians of {len(rows)} pairs).")
    seeds = by_source(atlas.runs)["seed"].nunique()
    return "\n".join([*lines, f"- {len(atlas.runs)} runs over {seeds} seeds, which cells share: these lines are no independent draws."])
