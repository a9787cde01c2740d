"""What theory makes of published cooldowns: the cost of a sweep that branches, best rates by a convex bound, losses by curve laws.

`runs` is `es.archive("haegele")` or any frame with its columns; losses are in nats per token.
"""

import dataclasses

import numpy as np
import pandas as pd

from etastar.analysis.cooldown_archive import SIZE_124M, rate_optima, rate_table
from etastar.analysis.schedule_laws import convex_bound, fit_annealing_law, fit_multi_power_law
from etastar.schedules import WSD, Cosine


@dataclasses.dataclass(frozen=True)
class SweepSize:
    """A model size of a scaling sweep with the lengths it was trained for; one head is 64 wide."""

    name: str
    width: int
    depth: int
    heads: int
    feedforward: int
    sequences: int
    steps: tuple[int, ...]


# arXiv 2405.18392, Tables 3 and 4 and flops.ipynb of epfml/schedules-and-scaling at 17e78d6. The notebook counts 360M at 200 sequences
# a step, half its batch; here it has its own 400.
PUBLISHED_SWEEP = (
    SweepSize("33M", 384, 8, 6, 1024, 200, (3000, 7000, 10000)),
    SweepSize("53M", 512, 8, 8, 1536, 200, (3750, 7500, 11250)),
    SweepSize("60M", 512, 10, 8, 1536, 200, (7500, 12500, 17500)),
    SweepSize("93M", 640, 12, 10, 1792, 200, (10000, 17500, 25000)),
    SweepSize("124M", 768, 12, 12, 2048, 200, (15000, 25000, 35000)),
    SweepSize("151M", 768, 16, 12, 2048, 200, (25000, 37500, 50000)),
    SweepSize("210M", 768, 24, 12, 2048, 200, (37500, 50000, 62500)),
    SweepSize("360M", 1024, 24, 16, 2816, 400, (25000, 37500, 50000)),
)


def training_flops(size: SweepSize, sequence: int = 512, vocab: int = 50257) -> float:
    """FLOPs of training on one sequence, by the formula of arXiv 2405.18392's notebook: three times the forward pass's."""
    s, d, inner = sequence, size.width, 64 * size.heads
    attention = 2 * 3 * s * d * inner + 2 * s**2 * inner + 3 * size.heads * s**2 + 2 * s**2 * inner + 2 * s * inner * d
    return 3.0 * (2 * s * vocab * d + size.depth * (attention + 2 * s * 3 * d * size.feedforward) + 2 * s * vocab * d)


def branched_share(lengths, fraction: float = 0.2) -> float:
    """Cost of a sweep of `lengths` whose shorter runs branch off the longest's trunk to cool down, over that of one run each.

    The longest is a cooldown too, so its trunk ends where that begins; every other length costs its cooldown alone.
    """
    lengths = np.asarray(lengths, dtype=float)
    return float((lengths.max() + fraction * (lengths.sum() - lengths.max())) / lengths.sum())


def sweep_costs(sweep=PUBLISHED_SWEEP, fraction: float = 0.2) -> pd.DataFrame:
    """What a scaling sweep costs apart and branched: size, apart, branched (10^18 FLOPs), share; the last row is the total."""
    rows = []
    for size in sweep:
        apart = np.array(size.steps) * size.sequences * training_flops(size) / 1e18
        rows.append({"size": size.name, "apart": apart.sum(), "branched": branched_share(apart, fraction) * apart.sum()})
    table = pd.DataFrame(rows)
    table.loc[len(table)] = {"size": "total", "apart": table["apart"].sum(), "branched": table["branched"].sum()}
    return table.assign(share=table["branched"] / table["apart"])


def rate_ratios(runs: pd.DataFrame, horizons=(25_000, 50_000)) -> pd.DataFrame:
    """Best rates over that of a 20 % linear cooldown, by the convex bound of arXiv 2501.18965 and as measured at 124M.

    Columns: arm, theory, and `measured_STEPS` a horizon (NaN where the best rate is at the grid's edge; about ±20 %). The bound is
    of 50,000 steps without warm-up.
    """
    arms = rate_table(runs)[["arm", "schedule", "cooldown_fraction", "shape"]].drop_duplicates("arm").set_index("arm")
    table = pd.DataFrame({"theory": {name: convex_bound(_factors(name, arm)).best_lr for name, arm in arms.iterrows()}})
    for steps in horizons:
        table[f"measured_{steps}"] = rate_optima(runs, steps).set_index("arm")["best_lr"]
    return (table / table.loc["20 % linear"]).sort_values("theory").rename_axis("arm").reset_index()


def _factors(name: str, arm, steps: int = 50_000) -> np.ndarray:
    if arm["schedule"] == "cosine":
        schedule = Cosine(floor=0.1 if name == "cosine to 10 %" else 0.0)
    else:
        fraction = arm["cooldown_fraction"]
        schedule = WSD(cooldown_fraction=fraction, convention="fabian-sp", **({"shape": arm["shape"]} if fraction else {}))
    return schedule.lr(steps, peak_lr=1.0, batch_tokens=1)


def fitted_runs(runs: pd.DataFrame, steps: int = 50_000, peak_lrs=(1e-3, 2e-3)) -> pd.DataFrame:
    """Constant runs and cosines to 0 at 124M: what the curve laws are fitted on."""
    flat = (runs["schedule"] == "constant") | ((runs["schedule"] == "cosine") & (runs["floor"] < 0.01))
    return runs[flat & (runs["params"] == SIZE_124M) & (runs["steps"] == steps) & runs["peak_lr"].isin(peak_lrs)]


def law_predictions(runs: pd.DataFrame, curves: pd.DataFrame, learning_rates, memories=(0.999, 0.9995), steps: int = 50_000,
                    peak_lrs=(1e-3, 2e-3)) -> pd.DataFrame:
    """Final losses of cooldowns as laws predict them that were fitted, a peak rate each, on constant and cosine-to-0 curves alone.

    `curves` are those of `fitted_runs`, `learning_rates` gives a run's rates. Columns: law ("annealing" of arXiv 2408.11029, "multi-power"
    of 2503.12811), memory (NaN for the latter), peak_lr, cooldown_fraction, shape, predicted, measured (full validation set). Curves
    are on 32 batches of it, so a law predicts the difference to the cosine to 0 alone, and the cosine's own final loss is added to
    that. Two curves leave the multi-power law's C, β and γ all but free; its paper fits a third, of two stages.
    """
    seen, parts = fitted_runs(runs, steps, peak_lrs), []
    cooled = runs[(runs["schedule"] == "wsd") & (runs["params"] == SIZE_124M) & (runs["steps"] == steps) & runs["final_loss"].notna()]
    for rate in peak_lrs:
        of, judged = seen[seen["peak_lr"] == rate], cooled[cooled["peak_lr"] == rate]
        data = [(learning_rates(run), *logged_curve(curves, run)) for _, run in of.iterrows()]
        cosine = of[of["schedule"] == "cosine"]
        for (law, memory), fitted in _laws(data, memories, int(of["warmup_steps"].iloc[0])).items():
            above = cosine["final_loss"].mean() - _last(fitted, learning_rates(cosine.iloc[0]))
            found = judged[["peak_lr", "cooldown_fraction", "shape"]].assign(
                law=law, memory=memory, measured=judged["final_loss"],
                predicted=[above + _last(fitted, learning_rates(run)) for _, run in judged.iterrows()])
            parts.append(found)
    keys = ["law", "memory", "peak_lr", "cooldown_fraction", "shape"]
    return pd.concat(parts).groupby(keys, dropna=False)[["predicted", "measured"]].mean().reset_index()


def _laws(data, memories, warmup_steps: int) -> dict:
    laws = {("annealing", memory): fit_annealing_law(data, memory, warmup_steps) for memory in memories}
    return laws | {("multi-power", np.nan): fit_multi_power_law(data, block=256)}  # finer blocks move no prediction by 0.001


def _last(law, rates) -> float:
    return float(law.predict(rates, np.array([len(rates) - 1]))[0])


def logged_curve(curves: pd.DataFrame, run) -> tuple[np.ndarray, np.ndarray]:
    """Steps and 32-batch losses (nats) of a run from the end of warm-up on."""
    rows = curves[(curves["run"] == run["run"]) & curves["loss_32_batches"].notna() & (curves["step"] >= run["warmup_steps"])
                  & (curves["step"] < run["steps"])]
    return rows["step"].to_numpy(), rows["loss_32_batches"].to_numpy()


def law_errors(predictions: pd.DataFrame) -> pd.DataFrame:
    """Errors of `law_predictions`: law, memory, peak_lr, mae, bias (mean of predicted − measured), shortest (the shortest cooldown's)."""
    off = predictions.assign(error=predictions["predicted"] - predictions["measured"]).sort_values("cooldown_fraction")
    by = off.groupby(["law", "memory", "peak_lr"], dropna=False)["error"]
    return by.agg(mae=lambda e: e.abs().mean(), bias="mean", shortest="first").reset_index()
