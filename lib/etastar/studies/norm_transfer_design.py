"""What a preset spends on study 05: grids of rate × batch about a valley that pilot seeds found, horizons sharing trunks."""

import dataclasses
import math

from etastar.recipe import AdamW, Corpus, Execution, Model, Recipe, Scion, UnitNorm
from etastar.schedules import WSD, Constant
from etastar.studies.designs import Design

EVERYWHERE = {"normalization": "everywhere", "norm_eps": 1e-20}  # arXiv 2510.03871 §2.2
DECAY_SHARE = 0.2  # of the whole run: constant to D, then linear to 0 over D / 4 more, as its Fig. 13b
GROUPS = ("input", "hidden", "output")
LAYERS = tuple((optimizer, normalization, more) for normalization in ("everywhere", "pre") for more in (1, 4)
               for optimizer in ("scion", "adamw"))


@dataclasses.dataclass(frozen=True)
class Valley:
    """Where the best rate (log2) and batch (tokens) lie at `horizon_tokens`, and the exponents in tokens and batch that a grid follows."""

    horizon_tokens: int
    batch_tokens: int
    rate: float
    batch_of_tokens: float = 0.5
    rate_of_batch: float = 0.75
    rate_of_tokens: float = -0.56

    def batch(self, horizon_tokens: int) -> float:
        """Best batch at a horizon, in tokens."""
        return self.batch_tokens * (horizon_tokens / self.horizon_tokens) ** self.batch_of_tokens

    def rate_at(self, horizon_tokens: int, batch_tokens: float) -> float:
        """Best log2 rate at a horizon and batch."""
        return (self.rate + self.rate_of_batch * math.log2(batch_tokens / self.batch_tokens)
                + self.rate_of_tokens * math.log2(horizon_tokens / self.horizon_tokens))


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of training: optimizer, shape and normalization, rates of the layer groups, decay at the end."""

    name: str
    optimizer: Scion | AdamW
    width: int
    depth: int
    normalization: str = "everywhere"
    lr_ratios: tuple[float, float, float] = (1.0, 1.0, 1.0)
    decayed: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs of an arm at one horizon and batch, at some log2 rates and seeds; `role` is "surface", "layers" or "growth"."""

    role: str
    arm: Arm
    horizon_tokens: int
    batch_tokens: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormDesign(Design):
    """Surfaces over rate and batch for Scion and AdamW at several horizons, two octaves apart; other shapes, momentum, decay; layer groups.

    Grids lie about the valleys: `batch_count` powers of two and `rate_count` rates, whole `rate_step`s so that horizons share trunks.
    Scion has `seed_count` seeds, everything else `some_count`. Momentum and decay are at `side_tokens`, shapes at `shape_tokens`, on
    three by three; AdamW has `adamw_count` batches and rates, at `adamw_tokens` (empty: all horizons);
    layer groups at `layer_tokens` and a quarter of it, `layers` being (optimizer, normalization, multiple of the best batch). `moves` are
    the octaves by which a group's rate is moved on its own. `growth_rates` go with the first of `growth_batches`, and these with the
    first rate.
    """

    first_seed: int = 8000
    sd_nats: float = 0.02
    slope_nats: float = 0.15
    warmup_steps: int = 0
    centre: float = 0.0  # valleys say where grids lie
    offsets: tuple[float, ...] = (0.0,)
    parametrization: UnitNorm = UnitNorm()
    horizons_back: int = 2
    some_count: int = 3
    scion: Valley
    adamw: Valley
    batch_count: int = 4
    rate_count: int = 4
    rate_step: float = 1.0
    side_tokens: int = 2**16
    shape_tokens: int = 2**15
    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    adamw_shapes: bool = False
    adamw_count: int = 3
    adamw_tokens: tuple[int, ...] = ()
    momentum: float | None = 0.1
    decayed: bool = True
    layer_tokens: int = 0
    layers: tuple[tuple[str, str, int], ...] = LAYERS
    layer_rates: tuple[float, ...] = (-1.0, 0.0, 1.0)
    moves: tuple[float, ...] = (-2.0, 2.0)
    growth_rates: tuple[float, ...] = (-4.0, -5.0, -6.0)
    growth_batches: tuple[int, ...] = (128, 256, 512)
    growth_steps: int = 1024
    growth_count: int = 3
    run_sd_nats: float = 0.012  # of a run about what its seed does to all

    @property
    def horizons(self) -> list[int]:
        """Tokens of the main horizons, two octaves apart, rising."""
        return [self.horizon_tokens >> (2 * k) for k in range(self.horizons_back, -1, -1)]

    @property
    def cells(self) -> list[Cell]:
        """All of a preset, the primary claims' first."""
        every, some, scion = tuple(self.seeds), tuple(self.seeds[: self.some_count]), self.arm("scion")
        made = self._growth(every[: self.growth_count]) + self._surface(scion, self.horizons, every)
        made += self._surface(self.arm("adamw"), self.adamw_tokens or self.horizons, some)
        made += self._layers(some)
        for width, depth in [(w, self.model.depth) for w in self.widths] + [(self.model.width, d) for d in self.depths]:
            for optimizer in ("scion", "adamw") if self.adamw_shapes else ("scion",):
                made += self._surface(self.arm(optimizer, width=width, depth=depth), [self.shape_tokens], some)
        if self.momentum:
            made += self._surface(self.arm(f"scion, momentum {self.momentum:g}", Scion(momentum=self.momentum)), [self.side_tokens], some)
        if self.decayed:
            made += self._surface(dataclasses.replace(scion, name="scion, decayed", decayed=True), [self.side_tokens], some)
        return made

    def arm(self, name: str, optimizer=None, width: int | None = None, depth: int | None = None, normalization: str = "everywhere") -> Arm:
        """An arm of the design by its name; "scion" and "adamw" say the optimizer."""
        optimizer = optimizer or (Scion() if name.startswith("scion") else AdamW(weight_decay=0.0))
        width, depth = width or self.model.width, depth or self.model.depth
        more = f", width {width}" * (width != self.model.width) + f", depth {depth}" * (depth != self.model.depth)
        return Arm(name + more + ", pre-norm" * (normalization == "pre"), optimizer, width, depth, normalization)

    def valley(self, arm: Arm) -> Valley:
        """The valley an arm's grid is laid about."""
        return self.adamw if isinstance(arm.optimizer, AdamW) else self.scion

    def batches(self, arm: Arm, horizon_tokens: int) -> list[int]:
        """Batches of an arm's grid at a horizon: powers of two about the best one."""
        count = self._count(arm, self.batch_count)
        first = max(round(math.log2(self.valley(arm).batch(horizon_tokens)) - (count - 1) / 2), round(math.log2(self.model.context)))
        return [2 ** (first + i) for i in range(count)]

    def rates(self, arm: Arm, horizon_tokens: int, batch_tokens: int) -> tuple[float, ...]:
        """Log2 rates of an arm's grid at a horizon and batch, whole steps."""
        count = self._count(arm, self.rate_count)
        first = round(self.valley(arm).rate_at(horizon_tokens, batch_tokens) / self.rate_step - (count - 1) / 2)
        return tuple((first + i) * self.rate_step for i in range(count))

    def _count(self, arm: Arm, most: int) -> int:
        if arm == self.arm("adamw"):
            return min(self.adamw_count, most)
        return most if arm == self.arm("scion") or arm.decayed else 3  # those decayed leave the main trunks

    def _surface(self, arm: Arm, horizons, seeds) -> list[Cell]:
        return [Cell("surface", arm, tokens, batch, self.rates(arm, tokens, batch), seeds)
                for tokens in horizons for batch in self.batches(arm, tokens)]

    def _growth(self, seeds) -> list[Cell]:
        pairs = [(batch, self.growth_rates[0]) for batch in self.growth_batches]
        pairs += [(self.growth_batches[0], rate) for rate in self.growth_rates[1:]]
        steps = {rate: self.growth_steps if rate == self.growth_rates[0] else self.growth_steps // 2 for rate in self.growth_rates}
        return [Cell("growth", self.arm("scion"), steps[rate] * batch, batch, (rate,), seeds) for batch, rate in pairs]

    def _layers(self, seeds) -> list[Cell]:
        """One rate for all groups at a few rates, and each group's moved on its own from the middle one."""
        made = []
        for optimizer, normalization, more in self.layers if self.layer_tokens else ():
            arm = self.arm(optimizer, normalization=normalization)
            batch = more * 2 ** round(math.log2(self.valley(arm).batch(self.layer_tokens)))
            for tokens in (self.layer_tokens // 4, self.layer_tokens):
                middle = round(self.valley(arm).rate_at(self.layer_tokens, batch) / self.rate_step) * self.rate_step
                rates = tuple(middle + octaves for octaves in self.layer_rates)
                made.append(Cell("layers", arm, tokens, batch, rates, seeds))
                made += [Cell("layers", dataclasses.replace(arm, lr_ratios=_moved(group, octaves)), tokens, batch, (middle,), seeds)
                         for group in GROUPS for octaves in self.moves]
        return made

    def recipes(self, cell: Cell) -> list[Recipe]:
        """The runs of a cell."""
        arm = cell.arm
        model = dataclasses.replace(self.model, width=arm.width, depth=arm.depth)
        if arm.normalization == "pre":
            model = dataclasses.replace(model, normalization="pre", norm_eps=1e-5)
        tokens, schedule = cell.horizon_tokens, Constant()
        if arm.decayed:
            tokens = round(tokens / (1 - DECAY_SHARE) / cell.batch_tokens) * cell.batch_tokens
            schedule = WSD(warmup_steps=0, cooldown_fraction=DECAY_SHARE, shape="linear")
        return [self.recipe(schedule, 2.0**rate, tokens, seed, model=model, optimizer=arm.optimizer, batch_tokens=cell.batch_tokens,
                            lr_ratios=arm.lr_ratios) for rate in cell.rates for seed in cell.seeds]

    def scaled(self, minutes: float | None) -> "NormDesign":
        """As every design; all horizons are divided alike, batches following the valleys."""
        made = super().scaled(minutes)
        if minutes is None:
            return made
        fold = 2 ** math.ceil(math.log2(self.horizon_steps / made.horizon_steps))
        return dataclasses.replace(made, horizon_steps=self.horizon_steps // fold, side_tokens=self.side_tokens // fold,
                                   shape_tokens=self.shape_tokens // fold,
                                   adamw_tokens=tuple(tokens // fold for tokens in self.adamw_tokens),
                                   layer_tokens=self.layer_tokens // fold, some_count=min(self.some_count, made.seed_count))


def _moved(group: str, octaves: float) -> tuple[float, float, float]:
    return tuple(2.0**octaves if name == group else 1.0 for name in GROUPS)


NANO = Model(width=32, depth=2, head_dim=16, context=32, tied=False, **EVERYWHERE)
BYTES = Corpus("python", vocab=257)  # a batch of Scion's is best at a few vocabularies, so a small one leaves it the most steps

SCION_VALLEY = Valley(2**16, 380, -2.3, batch_of_tokens=0.35, rate_of_batch=0.7)
ADAMW_VALLEY = Valley(2**18, 190, -7.4, batch_of_tokens=0.9, rate_of_batch=0.45, rate_of_tokens=0.0)

# Valleys are from surfaces over pilot seed 1 with the cpu preset's model (LOG.md has the tables)
NORM_TRANSFER = {
    "smoke": NormDesign(
        model=NANO, corpus=Corpus("python", vocab=257, max_bytes=4_000_000), batch_tokens=256, horizon_steps=64,
        seed_count=2, some_count=2, horizons_back=1, scion=SCION_VALLEY, adamw=ADAMW_VALLEY, batch_count=3, rate_count=3,
        adamw_tokens=(2**14,), side_tokens=2**12, momentum=None, decayed=False, growth_batches=(64, 128, 256), growth_count=1, minutes=1.0,
    ),
    "cpu": NormDesign(
        model=NANO, corpus=BYTES, batch_tokens=512, horizon_steps=512, seed_count=4,
        scion=SCION_VALLEY, adamw=ADAMW_VALLEY, batch_count=3, widths=(16, 64), momentum=None, layer_tokens=2**18,
        layers=(("scion", "everywhere", 1),), adamw_tokens=(2**16,), growth_batches=(64, 128, 256), minutes=9.0,
    ),
    "night": NormDesign(
        model=NANO, corpus=BYTES, batch_tokens=512, horizon_steps=8192, seed_count=4,
        horizons_back=4, scion=SCION_VALLEY, adamw=ADAMW_VALLEY, rate_count=5, adamw_count=4, side_tokens=2**20, shape_tokens=2**20,
        widths=(16, 64), depths=(1, 8), adamw_shapes=True, layer_tokens=2**20, layer_rates=(-2.0, -1.0, 0.0, 1.0),
        moves=(-4.0, -2.0, 2.0), growth_batches=(128, 512, 2048), minutes=280.0,
    ),
    "gpu": NormDesign(
        model=Model(width=256, depth=4, head_dim=64, context=256, tied=False, **EVERYWHERE), corpus=Corpus("python", vocab=1024),
        batch_tokens=8192, horizon_steps=2048, seed_count=3, horizons_back=4,
        scion=Valley(2**22, 16_384, -3.0, batch_of_tokens=0.45, rate_of_batch=0.75), adamw=Valley(2**22, 4096, -8.0, 0.35, 0.5, -0.25),
        side_tokens=2**20, shape_tokens=2**20, widths=(128, 512, 1024), depths=(2, 16, 32),
        adamw_shapes=True, layer_tokens=2**20, growth_batches=(2048, 4096, 8192), minutes=15.0, execution=Execution(device="cuda"),
    ),
    # planned and costed here: the paper's proxy; its batches are told in sequences of 4096 tokens
    "paper": NormDesign(
        model=Model(width=256, depth=4, head_dim=64, context=4096, ffn_width=704, tied=False, **EVERYWHERE),
        corpus=Corpus("files:data/nemotron/*.jsonl", vocab=65_536), batch_tokens=2**19, horizon_steps=2**18, seed_count=3,
        horizons_back=3, scion=Valley(2**33, 2**19, -4.3, batch_of_tokens=0.45, rate_of_batch=0.62),
        adamw=Valley(2**33, 2**18, -10.0, 0.45, 0.5, -0.3), batch_count=7, rate_count=7, adamw_count=7, rate_step=0.5, side_tokens=2**33,
        shape_tokens=2**33, widths=(1024, 3072), depths=(32, 128), adamw_shapes=True, layer_tokens=2**33,
        growth_batches=(2**17, 2**19, 2**21), minutes=60.0 * 5000, execution=Execution(device="cuda", precision="bf16"),
    ),
}
