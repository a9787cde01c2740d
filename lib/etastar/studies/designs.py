"""What a preset spends: model, data, horizon, seeds and LR grids of each study, and how `--minutes` scales them."""

import dataclasses

from etastar.model.parametrization import count_parameters
from etastar.recipe import SP, AdamW, Corpus, Execution, Model, Recipe

# Seeds below 1000 chose the grids (pilot). 1000–1003 were judged once under a design whose arms had grids of their own, which
# left twice the noise in every difference (LOG.md); the design was changed and the verdicts are from fresh seeds.
VERDICT_SEED = 2000
CYCLE_ARMS = ("cycle_0.50_hold", "cycle_0.50_loop", "cycle_0.75_hold", "cycle_0.75_loop", "cycle_1.25", "cycle_2.00")


@dataclasses.dataclass(frozen=True)
class Design:
    """Everything a preset decides for a study with LR bowls.

    `centre` is the log2 rate, amid the pilot's best of all arms, about which the grid lies `offsets` octaves; all arms have the
    same grid, because what a seed does at one rate is common to the arms and cancels from their differences only there.
    `branch_tokens_per_param` are horizons, in tokens a parameter, at which branches of one trunk meet fresh cosines, at
    `branch_offsets` around the centre less `branch_shift` octaves. `sd_nats` and `slope_nats` are the pilot's, for the power
    plan. `minutes` is what it takes on the preset's hardware.
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
    cycles: tuple[str, ...] = ()
    branch_tokens_per_param: tuple[int, ...] = ()
    branch_offsets: tuple[float, ...] = (0.0,)
    branch_shift: float = 0.0
    branch_seed_count: int = 0
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
        return [VERDICT_SEED + i for i in range(self.seed_count)]

    @property
    def branch_seeds(self) -> list[int]:
        """The seeds of the branch horizons."""
        return [VERDICT_SEED + i for i in range(self.branch_seed_count)]

    @property
    def grid(self) -> list[float]:
        """Peak rates of every arm, rising."""
        return [2.0 ** (self.centre + offset) for offset in self.offsets]

    @property
    def branch_grid(self) -> list[float]:
        """Peak rates at the branch horizons."""
        return [2.0 ** (self.centre - self.branch_shift + offset) for offset in self.branch_offsets]

    def tokens_per_param(self, ratio: float) -> int:
        """A horizon of so many tokens a parameter, in whole batches."""
        params = count_parameters(self.model, self.corpus.vocab)["total"]
        return max(1, round(ratio * params / self.batch_tokens)) * self.batch_tokens

    def recipe(self, schedule, peak_lr: float, horizon_tokens: int, seed: int) -> Recipe:
        """One run of the design."""
        return Recipe(model=self.model, corpus=self.corpus, optimizer=self.optimizer, schedule=schedule, peak_lr=peak_lr,
                      batch_tokens=self.batch_tokens, horizon_tokens=horizon_tokens, parametrization=self.parametrization,
                      seed=seed, execution=self.execution)


def scaled(design: Design, minutes: float | None) -> Design:
    """The design cut or stretched to about so many minutes: seeds first (two at least, never fewer arms), then the horizon.

    Raises ValueError for minutes that are not positive.
    """
    if minutes is None:
        return design
    if not minutes > 0:
        raise ValueError(f"minutes must be positive; got {minutes}")
    share = minutes / design.minutes
    seeds = max(2, round(design.seed_count * share))
    left = share * design.seed_count / seeds
    steps = max(64, int(design.horizon_steps * min(1.0, left)) // 16 * 16)
    branch = round(design.branch_seed_count * share)
    return dataclasses.replace(design, seed_count=seeds, horizon_steps=steps, minutes=minutes,
                               warmup_steps=max(1, min(design.warmup_steps, steps // 20)),
                               branch_seed_count=branch if branch >= 2 else 0,
                               branch_tokens_per_param=design.branch_tokens_per_param if branch >= 2 else ())


TINY = Model(width=32, depth=2, head_dim=16, context=64, tied=False)
SMALL = Model(width=128, depth=4, head_dim=32, context=128, tied=False)
PAPER = Model(width=384, depth=8, head_dim=64, context=512, ffn_width=1024)  # the 33M model of arXiv 2405.18392
PYTHON = Corpus("python", vocab=512)

# LR centres are from bowls over pilot seeds 1–3 at the cpu preset's horizon (LOG.md has the table); where
# they are off on another machine or corpus the study extends the grid.
COSINE_VS_WSD = {
    "smoke": Design(
        model=TINY, corpus=Corpus("python", vocab=512, max_bytes=8_000_000), batch_tokens=1024, horizon_steps=64, warmup_steps=3,
        seed_count=2, centre=-6.0, offsets=(-1.0, 0.0, 1.0), cycles=("cycle_2.00",), minutes=1.0,
    ),
    "cpu": Design(
        model=TINY, corpus=PYTHON, batch_tokens=1024, horizon_steps=512, warmup_steps=24, seed_count=4,
        centre=-6.25, offsets=(-1.5, -0.75, 0.0, 0.75, 1.5),
        cycles=CYCLE_ARMS, minutes=6.0,
    ),
    "night": Design(
        model=TINY, corpus=PYTHON, batch_tokens=1024, horizon_steps=2048, warmup_steps=64, seed_count=8,
        centre=-6.75, offsets=(-1.5, -0.75, 0.0, 0.75, 1.5), cycles=CYCLE_ARMS, minutes=75.0,
        branch_tokens_per_param=(20, 40, 80), branch_offsets=(-0.75, 0.0, 0.75), branch_seed_count=5,
    ),
    "gpu": Design(
        model=SMALL, corpus=Corpus("python", vocab=1024), batch_tokens=16_384, horizon_steps=1280, warmup_steps=64, seed_count=5,
        centre=-7.25, offsets=(-2.0, -1.0, 0.0, 1.0, 2.0), cycles=CYCLE_ARMS, minutes=30.0,
        branch_tokens_per_param=(20,), branch_offsets=(-1.0, 0.0, 1.0), branch_seed_count=5, execution=Execution(device="cuda"),
    ),
    # planned and costed here; to run it, put the paper's SlimPajama-6B as files below data/ and bring a cluster
    "paper": Design(
        model=PAPER, corpus=Corpus("files:data/slimpajama/*.jsonl", vocab=50_304), batch_tokens=102_400, horizon_steps=7000,
        warmup_steps=300, seed_count=3, centre=-9.0, offsets=(-1.5, -0.75, 0.0, 0.75, 1.5), cycles=CYCLE_ARMS,
        minutes=60.0 * 300, parametrization=SP(), execution=Execution(device="cuda", precision="bf16"),
    ),
}
