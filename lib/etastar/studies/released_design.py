"""What a preset spends on study 07: a small model of each released one's form, trained, exported and measured as those are."""

import dataclasses
import math

from etastar.recipe import AdamW, Corpus, Execution, Mixture, Model, MuP, Recipe
from etastar.schedules import Power
from etastar.studies.designs import Design

PEAK = math.log2(0.02)  # η_max of arXiv 2408.13359 §4
ARMS = {"dense": "PowerLM-3B", "mixture": "PowerMoE-3B"}  # and the released model whose form it has


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleasedDesign(Design):
    """A dense model of PowerLM's form and a mixture of PowerMoE's, under the paper's μP (Table 4) and its Power schedule.

    `width_ratios` are m_width of both, the width over that of the μP base. β of the schedule counts sequences of the model's own
    context, where the paper's have 4096 tokens: counted in those, a step of a few thousand tokens would hardly train. The last fifth
    (mixture: sixth) of the steps is the exponential cooldown. `items` are those of the cloze task.
    """

    mixture: Model
    width_ratios: tuple[int, int] = (4, 4)
    items: int
    first_seed: int = 10_000
    centre: float = PEAK
    offsets: tuple[float, ...] = (0.0,)
    optimizer: AdamW = AdamW(beta1=0.9, beta2=0.95, weight_decay=0.1)

    def run_of(self, arm: str, seed: int) -> Recipe:
        """The run of an arm and a seed."""
        model, ratio = (self.model, self.width_ratios[0]) if arm == "dense" else (self.mixture, self.width_ratios[1])
        schedule = Power(a=4.0, b=-0.51, sequence_tokens=model.context, warmup_steps=self.warmup_steps,
                         cooldown_fraction=cooldown_fraction(arm))
        by = MuP(base_width=model.width // ratio, init_std=0.1, embedding_multiplier=12.0, residual_multiplier=0.22)
        return self.recipe(schedule, self.middle, self.horizon_tokens, seed, model=model, parametrization=by)


def cooldown_fraction(arm: str) -> float:
    """The paper's second stage as a share of the tokens: 250B of 1.25T, 500B of 3T."""
    return {"dense": 0.2, "mixture": 0.1667}[arm]


def forms(width: int, depth: int, context: int, head_dim: int = 16) -> dict[str, Model]:
    """Shapes with Table 4's ratios: an MLP four times the width; 40 experts of a third of it, 8 a token, keys a third of queries."""
    own = {"depth": depth, "head_dim": head_dim, "context": context, "tied": True}
    sparse = head_dim * 3 * max(1, round(width / head_dim / 4.5))  # 1536 where the dense one has 2304
    return {"model": Model(width=width, ffn_width=4 * width, **own),
            "mixture": Model(width=sparse, ffn_width=sparse // 3, kv_heads=sparse // head_dim // 3, mixture=Mixture(40, 8), **own)}


RELEASED = {
    "smoke": ReleasedDesign(
        **forms(32, 2, 64, head_dim=8), corpus=Corpus("python", vocab=257, max_bytes=4_000_000), batch_tokens=256, horizon_steps=32,
        warmup_steps=2, seed_count=1, items=24, minutes=0.5,
    ),
    "cpu": ReleasedDesign(
        **forms(64, 4, 128), corpus=Corpus("python", vocab=1024), batch_tokens=1024, horizon_steps=256, warmup_steps=12, seed_count=3,
        items=500, minutes=2.0,
    ),
    "night": ReleasedDesign(
        **forms(144, 8, 256), corpus=Corpus("python", vocab=4096), batch_tokens=4096, horizon_steps=2048, warmup_steps=50, seed_count=3,
        items=2000, minutes=100.0,
    ),
    "gpu": ReleasedDesign(
        **forms(576, 12, 512, head_dim=64), corpus=Corpus("python", vocab=4096), batch_tokens=2**16, horizon_steps=1024,
        warmup_steps=25, seed_count=2, items=2000, minutes=15.0, execution=Execution(device="cuda"),
    ),
    # planned and costed here: PowerLM-3B and PowerMoE-3B themselves (Table 4), both over the dense one's tokens
    "paper": ReleasedDesign(
        model=Model(width=2304, depth=40, head_dim=64, context=4096, ffn_width=9216, tied=True),
        mixture=Model(width=1536, depth=32, head_dim=64, context=4096, kv_heads=8, ffn_width=512, tied=True, mixture=Mixture(40, 8)),
        corpus=Corpus("files:data/slimpajama/*.jsonl", vocab=49_152), batch_tokens=2**22, horizon_steps=298_023, warmup_steps=238,
        width_ratios=(8, 6), seed_count=1, items=2000, minutes=60.0 * 50_000, execution=Execution(device="cuda", precision="bf16"),
    ),
}
