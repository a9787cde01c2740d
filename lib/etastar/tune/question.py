"""What is asked: the run whose learning rate is wanted, and the smaller runs that may be trained in its place."""

import dataclasses

from etastar.recipe import SP, AdamW, Corpus, Execution, Model, Recipe
from etastar.schedules import WSD

LEAST_HORIZONS = 3
RATE_STEP = 0.75  # octaves between the rates of a ladder
WARMUP_SHARE = 1 / 20  # of the shortest horizon of a ladder
PARAMETRIZATIONS = ("sp", "mup")


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Runs of one width and batch over rising horizons (tokens), which share their trunks."""

    width: int
    batch_tokens: int
    horizons: tuple[int, ...]

    @property
    def name(self) -> str:
        """As tables and figures call it."""
        return f"width {self.width}, batch {self.batch_tokens}"

    @property
    def offsets(self) -> list[float]:
        """Rates of all horizons in octaves about the ladder's centre: more where horizons, and so their best rates, lie further apart."""
        count = 5 if len(self.horizons) <= 4 else 7
        return [(i - count // 2) * RATE_STEP for i in range(count)]


@dataclasses.dataclass(frozen=True)
class Question:
    """The peak learning rate of which run is asked for: model, corpus, horizon and batch in tokens.

    `parametrization` "sp" fits the width too; "mup" trusts that the rate is the same at every width, with `base_width` (default: the
    width of the small runs). `small_batch_tokens` are the batches of the small runs (default: chosen). No small run is shorter than
    `least_steps`. Raises ValueError for what the run or the small ones cannot be, naming the nearest that can.
    """

    model: Model
    corpus: Corpus
    horizon_tokens: int
    batch_tokens: int
    parametrization: str = "sp"
    base_width: int | None = None
    init_std: float = 0.1
    optimizer: AdamW = AdamW()
    cooldown_fraction: float = 0.2
    small_batch_tokens: tuple[int, ...] = ()
    execution: Execution = Execution()
    least_steps: int = 256

    def __post_init__(self):
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization {self.parametrization!r} is not known; known: {', '.join(PARAMETRIZATIONS)}")
        self._recipe(self.model, self.batch_tokens, self.horizon_tokens, 1e-3, 0, warmup_steps=0, base_width=self.model.width)
        batches = self.small_batch_tokens
        if batches and (len(set(batches)) < len(batches) or any(b < 1 or b % self.model.context for b in batches)):
            raise ValueError(f"small_batch_tokens {batches} must be different multiples of the context {self.model.context}")
        if batches and batches != (self.batch_tokens,) and len(batches) < 2:
            raise ValueError(f"one small batch of {batches[0]} tokens tells nothing of how the rate grows towards {self.batch_tokens}; "
                             f"give a second, {4 * batches[0]} for example, or {self.batch_tokens} itself")
        shortest = 2 ** (LEAST_HORIZONS - 1) * self.least_steps * min((*batches, self.model.context))
        if shortest > self.horizon_tokens:
            raise ValueError(f"a horizon of {self.horizon_tokens:,} tokens leaves no room for {LEAST_HORIZONS} shorter ones, each twice "
                             f"the one before and {self.least_steps} steps at least: {shortest:,} tokens are the least; sweep the run "
                             "itself (es.run, docs/own_sweep.md)" + ", or give smaller small_batch_tokens" * bool(batches))

    def small(self, ladder: Ladder, horizon_tokens: int, peak_lr: float, seed: int, base_width: int) -> Recipe:
        """A run of a ladder."""
        warmup = max(1, round(WARMUP_SHARE * ladder.horizons[0] / ladder.batch_tokens))
        model = self.narrowed(ladder.width)
        return self._recipe(model, ladder.batch_tokens, horizon_tokens, peak_lr, seed, warmup, base_width)

    def narrowed(self, width: int) -> Model:
        """The model at another width: a given width of the feed-forward block keeps its ratio; ValueError where heads do not fit."""
        ffn = self.model.ffn_width
        return dataclasses.replace(self.model, width=width, ffn_width=None if ffn is None else max(1, ffn * width // self.model.width))

    def as_dict(self) -> dict:
        """All of it as JSON: what a plan is recognised by."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        parts = {name: dataclasses.asdict(plain[name]) for name in ("model", "corpus", "optimizer", "execution")}
        return plain | parts | {"small_batch_tokens": list(self.small_batch_tokens)}

    def _recipe(self, model, batch_tokens, horizon_tokens, peak_lr, seed, warmup_steps, base_width) -> Recipe:
        schedule = WSD(warmup_steps=warmup_steps, cooldown_fraction=self.cooldown_fraction, shape="1-sqrt")
        return Recipe(model=model, corpus=self.corpus, optimizer=self.optimizer, schedule=schedule, peak_lr=peak_lr,
                      batch_tokens=batch_tokens, horizon_tokens=horizon_tokens, parametrization=self._parametrization(base_width),
                      seed=seed, execution=self.execution)

    def _parametrization(self, base_width: int):
        if self.parametrization == "sp":
            return SP(init_std=self.init_std)
        from etastar.recipe import MuP

        return MuP(base_width=base_width, init_std=self.init_std)
