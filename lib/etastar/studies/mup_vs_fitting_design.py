"""What a preset spends on study 06: bowls over width, depth, experts, decay and tokens, and a target beyond all that predict it."""

import dataclasses
import math

from etastar.recipe import SP, AdamW, CompleteP, Corpus, Execution, Mixture, Model, MuP, Recipe
from etastar.schedules import WSD, Power
from etastar.studies.designs import Design
from etastar.studies.power_law_design import POWER_B

COOLDOWN_SHARE = 0.2
FFN_MULTIPLE = 3  # of the width: fan-ins then grow with the width exactly, as μP reckons
GRAIN = 4  # as many experts, each a quarter as wide, four times as many a token
GROUPS = ("input", "hidden", "output")
ALPHAS = {"completep": 1.0, "alpha 0.5": 0.5, "alpha 0": 0.0}


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of scaling and what else differs from the base: "sp", "mup", or a depth rule ("completep", "alpha 0.5", "alpha 0").

    `experts` (0: dense) of which a token takes `experts_per_token`; `grain` divides the width of an expert. `decay_time` is η·λ·T at the
    valley (0: the optimizer's own decay), `coupled` says that λ is the same at every width.
    """

    scaling: str
    width: int
    depth: int
    experts: int = 0
    experts_per_token: int = 0
    grain: int = 1
    decay_time: float = 0.0
    coupled: bool = False
    qk_norm: bool = False
    z_loss: float = 0.0
    lr_ratios: tuple[float, float, float] = (1.0, 1.0, 1.0)
    power: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs of an arm at one horizon, at some log2 rates and seeds; `role` says what they are for."""

    role: str
    arm: Arm
    horizon_tokens: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferDesign(Design):
    """Proxies at short horizons; widths under SP and μP; a target wider and longer than every proxy; then everything else.

    The base is the model itself, at which μP is SP and is not trained twice. Grids lie on multiples of `rate_step` about the valley that
    pilot seeds found, log2 rate `centre` for the base at `width_tokens`, moving by the `..._slope`s per octave; `rate_count` of them.
    `proxy_widths` run at `proxy_tokens`, the base also at `horizons`; `widths` at `width_tokens`; `target_width` at `target_tokens` and
    half of them. Mixtures have `experts` and `experts_per_token`, their expert a share of the MLP that keeps the active size. Depths,
    decay and mixtures have `some_count` seeds and `some_rates`, the target `target_count` and `target_rates`
    (None: all); of four rates a skewed bowl is taken for a parabola, which at `rate_step` 0.75 is off by some 0.002 nats at its bottom.
    """

    first_seed: int = 9100
    sd_nats: float = 0.01
    slope_nats: float = 0.25
    exponent_sd: float = 0.12
    drift_sd: float = 0.25  # octaves, of a seed's drift between two cells
    offsets: tuple[float, ...] = (0.0,)
    parametrization: SP = SP(init_std=0.1)
    some_count: int = 3
    rate_step: float = 0.75
    rate_count: int = 5
    some_rates: int = 4
    target_count: int | None = None
    target_rates: int | None = None
    sp_width_slope: float = -0.8
    horizon_slope: float = -0.25
    sp_depth_slope: float = -0.1
    proxy_widths: tuple[int, ...]
    proxy_tokens: tuple[int, ...]
    horizons: tuple[int, ...] = ()
    width_tokens: int
    widths: tuple[int, ...]
    target_width: int
    experts: int = 4
    experts_per_token: int = 2
    mixture_widths: tuple[int, ...] = ()
    mixture_experts: tuple[int, ...] = ()
    mixture_shift: float = 0.0
    grain_width: int = 0
    depths: tuple[int, ...] = ()
    depth_rules: tuple[str, ...] = ("completep", "sp")
    completep_shift: float = 0.0
    decay_times: tuple[float, ...] = ()
    decay_width: int = 0
    modules: bool = False
    module_moves: tuple[float, ...] = (-2.0, 2.0)
    steady_width: int = 0
    steady_rates: tuple[float, ...] = (1.0, 2.0, 3.0)
    power: bool = False

    @property
    def target_tokens(self) -> int:
        """Tokens of the target: the horizon of the design."""
        return self.horizon_tokens

    @property
    def base(self) -> tuple[int, int]:
        """Width and depth at which every way of scaling starts."""
        return self.model.width, self.model.depth

    @property
    def cells(self) -> list[Cell]:
        """All of a preset, the primary claims' first; a run that serves two purposes stands in both."""
        every, some = tuple(self.seeds), tuple(self.seeds[: self.some_count])
        made = [self.cell("width", arm, self.width_tokens, every) for w in (self.model.width, *self.widths) for arm in self.both(w)]
        made += [self.cell("proxy", self.arm("sp", w), tokens, every) for w in self.proxy_widths for tokens in self.proxy_tokens]
        made += self._target(tuple(self.seeds[: self.target_count]))
        made += [self.cell("horizon", self.arm("sp"), tokens, every) for tokens in self.horizons]
        made += self._mixtures(some) + self._depths(some) + self._decays(some) + self._modules(some) + self._steady(some)
        return list(dict.fromkeys(made))

    def arm(self, scaling: str, width: int | None = None, depth: int | None = None, **more) -> Arm:
        """An arm at a width and depth, the base's where none is given; μP is SP at the base."""
        width, depth = width or self.model.width, depth or self.model.depth
        scaling = "sp" if scaling == "mup" and width == self.model.width and not more.get("coupled") else scaling
        return Arm(scaling, width, depth, **more)

    def both(self, width: int, **more) -> list[Arm]:
        """SP and μP at a width, once at the base."""
        return list(dict.fromkeys(self.arm(scaling, width, **more) for scaling in ("sp", "mup")))

    def cell(self, role: str, arm: Arm, horizon_tokens: int, seeds, rates: int | None = None) -> Cell:
        """The cell of an arm at a horizon, its rates on the lattice about the valley."""
        count = rates or (self.rate_count if len(seeds) == len(self.seeds) else self.some_rates)
        return Cell(role, arm, horizon_tokens, self.lattice(self.valley(arm, horizon_tokens), count), tuple(seeds))

    def lattice(self, middle: float, count: int) -> tuple[float, ...]:
        """So many log2 rates about a middle, whole `rate_step`s."""
        first = round(middle / self.rate_step - (count - 1) / 2)
        return tuple((first + i) * self.rate_step for i in range(count))

    def valley(self, arm: Arm, horizon_tokens: int) -> float:
        """The log2 rate that pilot seeds found best for the kind of an arm."""
        wider = math.log2(arm.width / self.model.width) if arm.scaling == "sp" else 0.0
        deeper = math.log2(arm.depth / self.model.depth) if arm.scaling in ("sp", "mup") else 0.0
        shift = self.mixture_shift * bool(arm.experts) + self.completep_shift * (arm.scaling in ALPHAS)
        return (self.centre + shift + self.sp_width_slope * wider + self.sp_depth_slope * deeper
                + self.horizon_slope * math.log2(horizon_tokens / self.width_tokens))

    def _target(self, seeds) -> list[Cell]:
        """SP and μP at the target, SP also at half of its tokens, for the worth of tokens."""
        sp, mup = self.both(self.target_width)
        return [self.cell("target", arm, tokens, seeds, self.target_rates or self.rate_count)
                for arm, tokens in ((sp, self.target_tokens), (mup, self.target_tokens), (sp, self.target_tokens // 2))]

    def _mixtures(self, some) -> list[Cell]:
        """Over width (SP and μP), over the number of experts and over granularity; and the Power scheduler on one."""
        if not self.mixture_widths:
            return []
        of = {"experts": self.experts, "experts_per_token": self.experts_per_token}
        made = [self.cell("mixture", arm, self.width_tokens, some) for w in (self.model.width, *self.mixture_widths)
                for arm in self.both(w, **of)]
        made += [self.cell("experts", self.arm("mup", **of | {"experts": n}), self.width_tokens, some) for n in self.mixture_experts]
        if self.grain_width:
            fine = {"experts": GRAIN * self.experts, "experts_per_token": GRAIN * self.experts_per_token, "grain": GRAIN}
            made += [self.cell("grain", self.arm("mup", self.grain_width, **kind), self.width_tokens, some) for kind in (of, fine)]
        if self.power:
            for tokens in self.proxy_tokens:
                plain = self.cell("power", self.arm("mup", **of), tokens, some)
                at_pivot = (self.valley(plain.arm, self.width_tokens),)
                made += [plain, Cell("power", self.arm("mup", **of, power=True), tokens, at_pivot, some)]
        return made

    def _depths(self, some) -> list[Cell]:
        return [self.cell("depth", self.arm(rule, depth=depth), self.width_tokens, some) for rule in self.depth_rules
                for depth in ((self.model.depth, *self.depths) if self.depths else ())]

    def _decays(self, some) -> list[Cell]:
        """The base, and the wider model with λ over the width independent and coupled."""
        made = []
        for time in self.decay_times:
            arms = [self.arm("mup", decay_time=time)]
            arms += [self.arm("mup", self.decay_width, decay_time=time, coupled=coupled) for coupled in (False, True)]
            made += [self.cell("decay", arm, self.width_tokens, some) for arm in arms]
        return made

    def _modules(self, some) -> list[Cell]:
        """One rate for all layer groups at a few rates, and each group's moved from the middle one, with and without QK-norm."""
        made = []
        for qk_norm in (False, True) if self.modules else ():
            arm = self.arm("sp", self.target_width, qk_norm=qk_norm)
            equal = self.cell("modules", arm, self.width_tokens, some)
            middle = self.lattice(self.valley(arm, self.width_tokens), 1)
            made.append(equal)
            made += [Cell("modules", dataclasses.replace(arm, lr_ratios=_moved(group, octaves)), self.width_tokens, middle, tuple(some))
                     for group in GROUPS for octaves in self.module_moves]
        return made

    def _steady(self, some) -> list[Cell]:
        """Rates above the best, where runs get unsteady, for SP and μP; plain, with QK-norm, with a z-loss."""
        made = []
        for mended in ({}, {"qk_norm": True}, {"z_loss": 1e-4}) if self.steady_width else ():
            for arm in self.both(self.steady_width, **mended):
                grid = self.cell("steady", arm, self.width_tokens, some)
                above = tuple(round((grid.rates[-1] + octaves) / self.rate_step) * self.rate_step for octaves in self.steady_rates)
                made.append(dataclasses.replace(grid, rates=tuple(dict.fromkeys((*grid.rates, *above)))))
        return made

    def recipes(self, cell: Cell) -> list[Recipe]:
        """The runs of a cell."""
        arm = cell.arm
        own = {"model": self.model_of(arm), "parametrization": self.parametrization_of(arm), "z_loss": arm.z_loss,
               "lr_ratios": arm.lr_ratios, "optimizer": self._optimizer(arm)}
        return [self.recipe(self._schedule(arm, rate), 2.0**rate, cell.horizon_tokens, seed, **own)
                for rate in cell.rates for seed in cell.seeds]

    def model_of(self, arm: Arm) -> Model:
        """The decoder of an arm; the experts that a token takes have as much width together as the dense MLP."""
        ffn, mixture = FFN_MULTIPLE * arm.width, None
        if arm.experts:
            ffn, mixture = ffn // (self.experts_per_token * arm.grain), Mixture(arm.experts, arm.experts_per_token)
        return dataclasses.replace(self.model, width=arm.width, depth=arm.depth, ffn_width=ffn, mixture=mixture, qk_norm=arm.qk_norm)

    def parametrization_of(self, arm: Arm) -> SP | MuP | CompleteP:
        """The parametrization of an arm; attention scores are over the root of head_dim everywhere, which the width does not change."""
        width, depth = self.base
        more = {"init_std": self.parametrization.init_std, "attention": "root", "decay": "coupled" if arm.coupled else "independent"}
        if arm.scaling == "sp":
            return self.parametrization
        if arm.scaling == "mup":
            return MuP(base_width=width, **more)
        return CompleteP(base_width=width, base_depth=depth, alpha=ALPHAS[arm.scaling], **more)

    def _optimizer(self, arm: Arm) -> AdamW:
        if not arm.decay_time:
            return self.optimizer
        steps = self.width_tokens // self.batch_tokens
        at_valley = 2.0 ** self.lattice(self.valley(self.arm("sp"), self.width_tokens), 1)[0]
        return dataclasses.replace(self.optimizer, weight_decay=round(arm.decay_time / (at_valley * steps), 4))

    def _schedule(self, arm: Arm, rate: float) -> WSD | Power:
        if not arm.power:
            return WSD(warmup_steps=self.warmup_steps, cooldown_fraction=COOLDOWN_SHARE, shape="linear")
        pivot, sequence = self.width_tokens / 4, self.model.context
        return Power(a=2.0**rate * pivot**-POWER_B * sequence / self.batch_tokens, b=POWER_B, sequence_tokens=sequence,
                     warmup_steps=self.warmup_steps, cooldown_fraction=COOLDOWN_SHARE)

    def scaled(self, minutes: float | None) -> "TransferDesign":
        """As every design; all horizons are divided alike."""
        made = super().scaled(minutes)
        if minutes is None:
            return made
        fold = 2 ** math.ceil(math.log2(self.horizon_steps / made.horizon_steps))
        return dataclasses.replace(made, horizon_steps=self.horizon_steps // fold, width_tokens=self.width_tokens // fold,
                                   proxy_tokens=tuple(tokens // fold for tokens in self.proxy_tokens),
                                   horizons=tuple(tokens // fold for tokens in self.horizons),
                                   some_count=min(self.some_count, made.seed_count))


def _moved(group: str, octaves: float) -> tuple[float, float, float]:
    return tuple(2.0**octaves if name == group else 1.0 for name in GROUPS)


NANO = Model(width=16, depth=2, head_dim=8, context=32, tied=False)
BYTES = Corpus("python", vocab=257)

# Valleys are from bowls over pilot seeds 1 and 2 with the cpu preset's models (LOG.md has the tables)
MUP_VS_FITTING = {
    "smoke": TransferDesign(
        model=NANO, corpus=Corpus("python", vocab=257, max_bytes=4_000_000), batch_tokens=128, horizon_steps=256, warmup_steps=2,
        seed_count=2, some_count=2, centre=-6.0, rate_step=1.0, rate_count=3, some_rates=3, proxy_widths=(8, 16),
        proxy_tokens=(2**12, 2**13), width_tokens=2**13, widths=(32,), target_width=32, mixture_widths=(32,), minutes=1.0,
    ),
    "cpu": TransferDesign(
        model=NANO, corpus=BYTES, batch_tokens=128, horizon_steps=2048, warmup_steps=12, seed_count=4, centre=-6.6,
        proxy_widths=(8, 16), proxy_tokens=(2**15, 2**16), horizons=(2**15, 2**16, 2**18), width_tokens=2**15,
        widths=(32, 64), target_width=64, target_count=3, target_rates=4, mixture_widths=(64,), mixture_experts=(16,), depths=(8,),
        minutes=10.0,
    ),
    "night": TransferDesign(
        model=dataclasses.replace(NANO, width=16), corpus=BYTES, batch_tokens=256, horizon_steps=16_384, warmup_steps=12, seed_count=4,
        centre=-6.5, proxy_widths=(8, 16, 32), proxy_tokens=(2**16, 2**17, 2**18, 2**19, 2**20), horizons=(2**21, 2**22),
        width_tokens=2**17, widths=(32, 64, 128, 256), target_width=128, mixture_widths=(32, 64, 128), mixture_experts=(8, 16, 32),
        grain_width=32, depths=(4, 8, 16, 32), depth_rules=("completep", "alpha 0.5", "alpha 0", "sp"), decay_times=(1.0, 3.0, 10.0),
        decay_width=64, modules=True, steady_width=64, power=True, minutes=420.0,
    ),
    "gpu": TransferDesign(
        model=Model(width=128, depth=2, head_dim=64, context=256, tied=False), corpus=Corpus("python", vocab=1024), batch_tokens=8192,
        horizon_steps=2048, warmup_steps=12, seed_count=3, centre=-6.5, parametrization=SP(init_std=0.05), proxy_widths=(64, 128, 256),
        proxy_tokens=(2**21, 2**22), horizons=(2**23, 2**24), width_tokens=2**21, widths=(256, 512, 1024), target_width=512,
        mixture_widths=(256, 512), mixture_experts=(8, 16), grain_width=256, depths=(4, 8, 16, 32), decay_times=(3.0,), decay_width=512,
        modules=True, steady_width=256, power=True, minutes=15.0, execution=Execution(device="cuda"),
    ),
    # planned and costed here: the scale of arXiv 2409.19913 and below that of 2601.05049
    "paper": TransferDesign(
        model=Model(width=256, depth=4, head_dim=64, context=4096, tied=False),
        corpus=Corpus("files:data/slimpajama/*.jsonl", vocab=50_304), batch_tokens=2**19,
        horizon_steps=2**16, warmup_steps=200, seed_count=3, centre=-8.0, parametrization=SP(init_std=0.02),
        proxy_widths=(256, 512, 1024), proxy_tokens=(2**31, 2**32, 2**33), horizons=(2**34, 2**35), width_tokens=2**31,
        widths=(512, 1024, 2048), target_width=2048, experts=8, mixture_widths=(512, 1024), mixture_experts=(16, 64), grain_width=512,
        depths=(8, 16, 32), decay_times=(1.0, 3.0, 10.0), decay_width=1024, modules=True, steady_width=512, power=True,
        minutes=60.0 * 4000, execution=Execution(device="cuda", precision="bf16"),
    ),
}
