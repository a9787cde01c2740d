"""What a preset spends: model, data, horizon, seeds and LR grids of each study, and how `--minutes` scales them."""

import dataclasses

from etastar.analysis.power import seeds_needed
from etastar.model.shapes import count_parameters
from etastar.recipe import SP, AdamW, Corpus, Execution, Model, Recipe

# Seeds below 1000 chose the grids (pilot). 1000–1003 were judged once under a design whose arms had grids of their own, which
# left twice the noise in every difference (LOG.md); the design was changed and the verdicts are from fresh seeds.
VERDICT_SEED = 2000
COOLDOWN_SEED = 3000  # studies 02 and 03, which share their trunks
CYCLE_ARMS = ("cycle_0.50_hold", "cycle_0.50_loop", "cycle_0.75_hold", "cycle_0.75_loop", "cycle_1.25", "cycle_2.00")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Design:
    """Everything a preset decides for a study with LR bowls.

    `centre` is the log2 rate, amid the pilot's best of all arms, about which the grid lies `offsets` octaves; all arms have the
    same grid, because what a seed does at one rate is common to the arms and cancels from their differences only there.
    `sd_nats` and `slope_nats` are the pilot's, for the power plan. `minutes` is what it takes on the preset's hardware.
    """

    model: Model
    corpus: Corpus
    batch_tokens: int
    horizon_steps: int
    warmup_steps: int
    seed_count: int
    centre: float
    offsets: tuple[float, ...]
    minutes: float
    first_seed: int
    sd_nats: float = 0.0045
    slope_nats: float = 0.2
    parametrization: SP = SP(init_std=0.1)
    optimizer: AdamW = AdamW()
    execution: Execution = Execution()

    @property
    def horizon_tokens(self) -> int:
        """Tokens of the main horizon."""
        return self.horizon_steps * self.batch_tokens

    @property
    def seeds(self) -> list[int]:
        """The seeds that are judged."""
        return [self.first_seed + i for i in range(self.seed_count)]

    @property
    def grid(self) -> list[float]:
        """Peak rates of every arm, rising."""
        return [2.0 ** (self.centre + offset) for offset in self.offsets]

    @property
    def middle(self) -> float:
        """The peak rate amid the grid, at which arms without a bowl are compared."""
        return self.grid[len(self.offsets) // 2]

    @property
    def params(self) -> int:
        """Parameters of the model in all."""
        return count_parameters(self.model, self.corpus.vocab)["total"]

    def tokens_per_param(self, ratio: float) -> int:
        """A horizon of so many tokens a parameter, in whole batches."""
        return max(1, round(ratio * self.params / self.batch_tokens)) * self.batch_tokens

    def recipe(self, schedule, peak_lr: float, horizon_tokens: int, seed: int, **changes) -> Recipe:
        """One run of the design; `changes` are other fields of its recipe."""
        own = {"model": self.model, "batch_tokens": self.batch_tokens, "optimizer": self.optimizer, "parametrization": self.parametrization}
        return Recipe(corpus=self.corpus, schedule=schedule, peak_lr=peak_lr, horizon_tokens=horizon_tokens, seed=seed,
                      execution=self.execution, **(own | changes))

    def resolve(self, effect_nats: float, sd_nats: float | None = None) -> dict:
        """Seeds that resolve an effect in nats with 80 % power and the minutes they take, at a deviation measured or the pilot's."""
        sd_nats = sd_nats or self.sd_nats
        seeds = seeds_needed(sd_nats, effect_nats)
        return {"effect_nats": effect_nats, "effect_tokens": effect_nats / self.slope_nats, "sd_nats": sd_nats, "seeds": seeds,
                "minutes": self.minutes * seeds / self.seed_count}

    def scaled(self, minutes: float | None) -> "Design":
        """The design cut or stretched to about so many minutes: seeds first (two at least, never fewer arms), then the horizon.

        Raises ValueError for minutes that are not positive.
        """
        if minutes is None:
            return self
        if not minutes > 0:
            raise ValueError(f"minutes must be positive; got {minutes}")
        share = minutes / self.minutes
        seeds = max(2, round(self.seed_count * share))
        steps = max(64, int(self.horizon_steps * min(1.0, share * self.seed_count / seeds)) // 16 * 16)
        return dataclasses.replace(self, seed_count=seeds, horizon_steps=steps, minutes=minutes,
                                   warmup_steps=max(1, min(self.warmup_steps, steps // 20)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CycleDesign(Design):
    """Study 01: cosine cycles of other lengths, and branches of a WSD trunk beside fresh cosines.

    `branch_tokens_per_param` are horizons, in tokens a parameter, at which branches of one trunk meet fresh cosines, at
    `branch_offsets` around the centre less `branch_shift` octaves.
    """

    first_seed: int = VERDICT_SEED
    cycles: tuple[str, ...] = ()
    branch_tokens_per_param: tuple[int, ...] = ()
    branch_offsets: tuple[float, ...] = (0.0,)
    branch_shift: float = 0.0
    branch_seed_count: int = 0

    @property
    def branch_seeds(self) -> list[int]:
        """The seeds of the branch horizons."""
        return [self.first_seed + i for i in range(self.branch_seed_count)]

    @property
    def branch_grid(self) -> list[float]:
        """Peak rates at the branch horizons."""
        return [2.0 ** (self.centre - self.branch_shift + offset) for offset in self.branch_offsets]

    def scaled(self, minutes: float | None) -> "CycleDesign":
        """As every design; branches are given up where fewer than two of their seeds are left."""
        made = super().scaled(minutes)
        branch = made.branch_seed_count if minutes is None else round(self.branch_seed_count * minutes / self.minutes)
        return dataclasses.replace(made, branch_seed_count=branch if branch >= 2 else 0,
                                   branch_tokens_per_param=self.branch_tokens_per_param if branch >= 2 else ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class CooldownDesign(Design):
    """Studies 02 and 03, which share trunks: constant rates with windows of their averages, and cooldowns off them.

    `tuned` are the linear cooldowns with a bowl, in per cent of the steps. `full` adds every length at every shape and rate, and every
    line to 10 %.
    `long_horizons` is how many main horizons the long run has (0: none). `windows` is how many windows of averages a run has, and
    `ema_shares` the horizons of the exponential ones as shares of the run. `schedule_free` maps (beta1, beta2) to log2 rates, which
    the pilot chose. `branch_sd_nats` is the deviation of a difference between branches of one trunk.

    Bowls take many rates and few seeds, differences one rate and many seeds: `more_seeds` are trained at the rates alone that pilot
    seeds found best, the middle one of the grid for cooldowns and `cosine_offset` octaves from it for cosine, which has a bowl only
    with `cosine_bowl`.
    """

    first_seed: int = COOLDOWN_SEED
    sd_nats: float = 0.009
    slope_nats: float = 0.3
    branch_sd_nats: float = 0.005
    more_seeds: int = 0
    cosine_offset: float = 0.0
    cosine_bowl: bool = True
    tuned: tuple[int, ...] = (10, 20, 40)
    full: bool = False
    long_horizons: int = 0
    windows: int = 16
    ema_shares: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8)
    schedule_free: tuple[tuple[tuple[float, float], tuple[float, ...]], ...] = ()

    @property
    def all_seeds(self) -> list[int]:
        """The seeds of the bowls, then those at the chosen rates alone."""
        return [self.first_seed + i for i in range(self.seed_count + self.more_seeds)]

    @property
    def some_seeds(self) -> list[int]:
        """Four of them, for what costs whole runs."""
        return self.all_seeds[: max(4, self.seed_count)]

    @property
    def cosine_rate(self) -> float:
        """The peak rate that pilot seeds found best for cosine."""
        return 2.0 ** (self.centre + self.cosine_offset)

    def scaled(self, minutes: float | None) -> "CooldownDesign":
        """As every design; the seeds at chosen rates go first."""
        made = super().scaled(minutes)
        return made if minutes is None else dataclasses.replace(made, more_seeds=round(self.more_seeds * min(1.0, minutes / self.minutes)))

    @property
    def window_tokens(self) -> int:
        """Tokens of a window of the weights' average."""
        return self.horizon_tokens // self.windows

    @property
    def evaluation_tokens(self) -> int:
        """Tokens between two evaluations of a run whose curve is looked at."""
        return self.horizon_tokens // 8


TINY = Model(width=32, depth=2, head_dim=16, context=64, tied=False)
SMALL = Model(width=128, depth=4, head_dim=32, context=128, tied=False)
PAPER = Model(width=384, depth=8, head_dim=64, context=512, ffn_width=1024)  # the 33M model of arXiv 2405.18392
PYTHON = Corpus("python", vocab=512)

# LR centres are from bowls over pilot seeds 1–3 at the cpu preset's horizon (LOG.md has the table); where
# they are off on another machine or corpus the study extends the grid.
COSINE_VS_WSD = {
    "smoke": CycleDesign(
        model=TINY, corpus=Corpus("python", vocab=512, max_bytes=8_000_000), batch_tokens=1024, horizon_steps=64, warmup_steps=3,
        seed_count=2, centre=-6.0, offsets=(-1.0, 0.0, 1.0), cycles=("cycle_2.00",), minutes=1.0,
    ),
    "cpu": CycleDesign(
        model=TINY, corpus=PYTHON, batch_tokens=1024, horizon_steps=512, warmup_steps=24, seed_count=4,
        centre=-6.25, offsets=(-1.5, -0.75, 0.0, 0.75, 1.5),
        cycles=CYCLE_ARMS, minutes=6.0,
    ),
    "night": CycleDesign(
        model=TINY, corpus=PYTHON, batch_tokens=1024, horizon_steps=2048, warmup_steps=64, seed_count=8,
        centre=-6.75, offsets=(-1.5, -0.75, 0.0, 0.75, 1.5), cycles=CYCLE_ARMS, minutes=75.0,
        branch_tokens_per_param=(20, 40, 80), branch_offsets=(-0.75, 0.0, 0.75), branch_seed_count=5,
    ),
    "gpu": CycleDesign(
        model=SMALL, corpus=Corpus("python", vocab=1024), batch_tokens=16_384, horizon_steps=1280, warmup_steps=64, seed_count=5,
        centre=-7.25, offsets=(-2.0, -1.0, 0.0, 1.0, 2.0), cycles=CYCLE_ARMS, minutes=30.0,
        branch_tokens_per_param=(20,), branch_offsets=(-1.0, 0.0, 1.0), branch_seed_count=5, execution=Execution(device="cuda"),
    ),
    # planned and costed here; to run it, put the paper's SlimPajama-6B as files below data/ and bring a cluster
    "paper": CycleDesign(
        model=PAPER, corpus=Corpus("files:data/slimpajama/*.jsonl", vocab=50_304), batch_tokens=102_400, horizon_steps=7000,
        warmup_steps=300, seed_count=3, centre=-9.0, offsets=(-1.5, -0.75, 0.0, 0.75, 1.5), cycles=CYCLE_ARMS,
        minutes=60.0 * 300, parametrization=SP(), execution=Execution(device="cuda", precision="bf16"),
    ),
}

# Pilot seeds 1–3 at the cpu preset's horizon (LOG.md): cooldowns of 10 to 40 % are best near log2 rate −7, cosine to 10 % near −6.3;
# Schedule-Free near −5 at β (0.9, 0.95) and near −5.5 at the other three.
SCHEDULE_FREE = (((0.9, 0.95), (-5.0,)), ((0.9, 0.99), (-5.5,)), ((0.95, 0.95), (-5.5,)), ((0.95, 0.99), (-5.5,)))
SCHEDULE_FREE_MORE = tuple((betas, (rates[0] - 1.0, *rates, rates[0] + 1.0)) for betas, rates in (
    *SCHEDULE_FREE, ((0.9, 0.999), (-5.5,)), ((0.98, 0.99), (-5.5,)), ((0.9, 0.9999), (-5.5,))))
STEPS_OF_GRID = (-1.5, -0.75, 0.0, 0.75, 1.5)

COOLDOWN = {
    "smoke": CooldownDesign(
        model=TINY, corpus=Corpus("python", vocab=512, max_bytes=8_000_000), batch_tokens=768, horizon_steps=64, warmup_steps=3,
        seed_count=2, centre=-6.5, offsets=(-1.0, 0.0, 1.0), windows=8, ema_shares=(1 / 8,), schedule_free=SCHEDULE_FREE, minutes=1.0,
    ),
    "cpu": CooldownDesign(
        model=TINY, corpus=PYTHON, batch_tokens=768, horizon_steps=512, warmup_steps=12, seed_count=3, more_seeds=5,
        centre=-7.0, cosine_offset=0.75, cosine_bowl=False, offsets=STEPS_OF_GRID, schedule_free=SCHEDULE_FREE, minutes=4.0,
    ),
    "night": CooldownDesign(
        model=TINY, corpus=PYTHON, batch_tokens=768, horizon_steps=2048, warmup_steps=48, seed_count=4, centre=-7.5,
        offsets=STEPS_OF_GRID, tuned=(5, 10, 20, 40, 60), full=True, long_horizons=4, schedule_free=SCHEDULE_FREE_MORE,
        minutes=190.0,
    ),
    "gpu": CooldownDesign(
        model=SMALL, corpus=Corpus("python", vocab=1024), batch_tokens=16_384, horizon_steps=1280, warmup_steps=64, seed_count=4,
        centre=-7.75, offsets=(-2.0, -1.0, 0.0, 1.0, 2.0), tuned=(5, 10, 20, 40, 60), long_horizons=4, schedule_free=SCHEDULE_FREE,
        minutes=30.0, execution=Execution(device="cuda"),
    ),
    # planned and costed here, as study 01's
    "paper": CooldownDesign(
        model=PAPER, corpus=Corpus("files:data/slimpajama/*.jsonl", vocab=50_304), batch_tokens=102_400, horizon_steps=7000,
        warmup_steps=300, seed_count=3, centre=-9.5, offsets=STEPS_OF_GRID, tuned=(5, 10, 20, 40, 60), full=True,
        windows=14, schedule_free=SCHEDULE_FREE_MORE, minutes=60.0 * 900, parametrization=SP(),
        execution=Execution(device="cuda", precision="bf16"),
    ),
}
