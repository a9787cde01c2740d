"""Fitting against transfer at one target: two ways to predict its learning rate from proxies, and two parametrizations to use it in.

Fitting (arXiv 2601.05049) trains proxies in standard parametrization and extrapolates η*(N, D); transfer takes the base's best rate
through μP, with a rule for the tokens. What is predicted for a seed comes from the other seeds' proxies, and is judged on the seed's own
bowl at the target: nothing is chosen on what it is reported on. Each parametrization's own tuned rate stands beside the prediction, so
that what a parametrization is worth and what a prediction misses are told apart.
"""

import dataclasses
import math

import numpy as np
import pandas as pd

from etastar.analysis.search_factor import fit_horizon_law, fit_parabola
from etastar.analysis.size_horizon import published_exponents
from etastar.studies.measured import Contrast
from etastar.studies.mup_vs_fitting_grids import Bowls, Grid, joint_valley

LEAST_PARAMS = 8  # times the proxy's
LEAST_TOKENS = 4  # times the proxy's
FITTED, TRANSFERRED, KEPT, BY_LOSSES = "fitted", "transferred", "base's rate kept, SP", "fitted by losses (eq. 4)"


@dataclasses.dataclass(frozen=True, eq=False)
class Proxies:
    """Cells in standard parametrization from which a target is predicted: `cells` as those of a Grid; `base` is an arm's name."""

    cells: pd.DataFrame
    base: str
    bowls: Bowls

    @staticmethod
    def of(grid: Grid, bowls: Bowls, params: float, tokens: float) -> "Proxies":
        """All that have a bowl and are no larger and no longer than these."""
        cells = grid.plain()
        keep = [(arm, tokens) in bowls for arm, tokens in zip(cells.arm, cells.horizon_tokens, strict=True)]
        cells = cells[np.array(keep) & (cells.params <= params) & (cells.horizon_tokens <= tokens)]
        return Proxies(cells, grid.arm("sp"), bowls)

    @property
    def of_base(self) -> pd.DataFrame:
        """The base's cells, by rising horizon."""
        return self.cells[self.cells.arm == self.base].sort_values("horizon_tokens")

    @property
    def enough(self) -> bool:
        """Whether there are two sizes, and the base is among them."""
        return self.cells.params.nunique() >= 2 and len(self.of_base) > 0

    def rows(self, cells: pd.DataFrame) -> pd.DataFrame:
        """The runs of some cells."""
        return pd.concat([self.bowls.rows[cell.arm, cell.horizon_tokens] for cell in cells.itertuples()])

    def law(self, params: float, tokens: float, seeds) -> float:
        """Log2 η* by the power law in parameters and tokens, one valley through the proxies (eq. 6's form, exponents ours)."""
        axes = [axis for axis in ("params", "horizon_tokens") if self.cells[axis].nunique() > 1]  # one horizon tells nothing of tokens
        valley = joint_valley(self.rows(self.cells), axes, seeds)
        at = {"params": params, "horizon_tokens": tokens}
        return math.log2(float(valley.predict({axis: [at[axis]] for axis in axes})[0]))

    def by_losses(self, params: float, tokens: float, seeds) -> float:
        """Log2 η* by eq. 4: the loss at each rate extrapolated over the tokens, a parabola, then a power law in parameters; NaN where
        fewer than three horizons share three rates."""
        ends = []
        for (_, size), own in self.cells.groupby(["arm", "params"]):
            rows = self.rows(own)
            rows = rows[rows.seed.isin(seeds)].groupby(["peak_lr", "horizon_tokens"]).loss.mean().unstack()
            rows = rows.dropna()
            if rows.shape[1] < 3 or len(rows) < 3:
                continue
            ahead = [float(fit_horizon_law(rows.columns, losses).predict(tokens)) for losses in rows.to_numpy()]
            try:
                ends.append((math.log2(size), math.log2(fit_parabola(rows.index, ahead).best_lr)))
            except ValueError:  # the extrapolated losses do not bend upwards
                continue
        if len(ends) < 2:
            return math.nan
        slope, at_one = np.polyfit(*np.array(ends).T, 1)
        return float(at_one + slope * math.log2(params))

    def anchor(self, seeds) -> tuple[float, float, float]:
        """(log2 best rate, parameters, tokens) of the largest proxy at its longest horizon, from all its horizons in one valley."""
        last = self.cells.sort_values(["params", "horizon_tokens"]).iloc[-1]
        own = self.cells[self.cells.arm == last.arm]
        return self._of_one(own, float(last.horizon_tokens), seeds), float(last.params), float(last.horizon_tokens)

    def _of_one(self, cells: pd.DataFrame, tokens: float, seeds) -> float:
        """Log2 best rate of one size at some tokens: by its horizons' valley, or where there is one horizon by its bowl."""
        if cells.horizon_tokens.nunique() > 1:
            return math.log2(float(joint_valley(self.rows(cells), ["horizon_tokens"], seeds).predict({"horizon_tokens": [tokens]})[0]))
        own = self.bowls.vertices(cells.arm.iloc[0], cells.horizon_tokens.iloc[0])
        return float(own[own.index.isin(seeds)].mean())

    def published(self, params: float, tokens: float, seeds) -> float:
        """Log2 η* by the published exponents from the largest proxy at its longest horizon."""
        at, size, longest = self.anchor(seeds)
        fitting = published_exponents()["fitting"]  # arXiv 2601.05049 eq. 6, as ratios only
        return at + fitting["size"] * math.log2(params / size) + fitting["horizon"] * math.log2(tokens / longest)

    def transferred(self, tokens: float, seeds, exponent: float | None = None) -> float:
        """Log2 η* of the base at the target's tokens: by its own horizons' valley, or from the longest by an exponent."""
        longest = float(self.of_base.horizon_tokens.max())
        if exponent is None:
            return self._of_one(self.of_base, tokens, seeds)
        return self._of_one(self.of_base, longest, seeds) + exponent * math.log2(tokens / longest)

    def paid(self, seeds) -> list:
        """As many of the seeds as transfer's search FLOPs pay for a fitting search with, one at least."""
        share = self.of_base.flops.sum() / self.cells.flops.sum()
        return list(seeds)[: max(1, int(len(seeds) * share))]


def predictions(proxies: Proxies, params: float, tokens: float, seeds) -> dict[str, tuple[str, float, float]]:
    """Method → (parametrization it is for, log2 rate, FLOPs of its search), from the proxies of some seeds."""
    per_seed = proxies.cells.assign(each=proxies.cells.flops / proxies.cells.seeds)
    whole, base = (float(rows.each.sum()) * len(seeds) for rows in (per_seed, per_seed[per_seed.arm == proxies.base]))
    paid, horizon = proxies.paid(seeds), published_exponents()["bjorck"]["horizon"]  # arXiv 2409.19913
    last = float(per_seed[per_seed.arm == proxies.base].each.iloc[-1]) * len(seeds)
    return {
        FITTED: ("sp", proxies.law(params, tokens, seeds), whole),
        "fitted, at transfer's FLOPs": ("sp", proxies.law(params, tokens, paid), whole * len(paid) / len(seeds)),
        BY_LOSSES: ("sp", proxies.by_losses(params, tokens, seeds), whole),
        "published exponents": ("sp", proxies.published(params, tokens, seeds), last),
        KEPT: ("sp", proxies.transferred(tokens, seeds, 0.0), last),
        TRANSFERRED: ("mup", proxies.transferred(tokens, seeds), base),
        "transferred, published horizon rule": ("mup", proxies.transferred(tokens, seeds, horizon), last),
        "transferred, no horizon rule": ("mup", proxies.transferred(tokens, seeds, 0.0), last),
    }


def at_target(grid: Grid, bowls: Bowls, proxies: Proxies, width: int, tokens: int) -> pd.DataFrame:
    """One row a method and seed: predicted log2 rate, octaves from the seed's own best, loss there, tuned loss, regret (nats), FLOPs.

    Empty where SP or μP has no bowl at the target, or there are fewer than two sizes of proxies.
    """
    arms = {scaling: grid.arm(scaling, width) for scaling in ("sp", "mup")}
    if not proxies.enough or any((arm, tokens) not in bowls for arm in arms.values()):
        return pd.DataFrame()
    params = float(grid.frame[grid.frame.arm == arms["sp"]].params.iloc[0])
    own = {scaling: bowls.vertices(arm, tokens) for scaling, arm in arms.items()}
    seeds, rows = sorted(set(own["sp"].index) & set(own["mup"].index) & _seeds(proxies)), []
    for seed in seeds if len(seeds) > 1 else ():
        others = [s for s in seeds if s != seed]
        for method, (scaling, log2_lr, flops) in predictions(proxies, params, tokens, others).items():
            if math.isfinite(log2_lr):
                tuned = float(own[scaling][others].mean())
                loss, best = (bowls.loss_at(arms[scaling], tokens, seed, at) for at in (log2_lr, tuned))
                rows.append({"method": method, "parametrization": scaling, "seed": seed, "width": width, "params": params,
                             "log2_lr": log2_lr, "octaves": log2_lr - float(own[scaling][seed]), "loss": loss, "tuned_loss": best,
                             "regret": loss - best, "search_flops": flops})
    return pd.DataFrame(rows)


def _seeds(proxies: Proxies) -> set:
    return set.intersection(*(set(proxies.bowls.vertices(c.arm, c.horizon_tokens).index) for c in proxies.cells.itertuples()))


def target_table(grid: Grid, bowls: Bowls) -> pd.DataFrame:
    """`at_target` of the study's target, from proxies of an eighth of its parameters and a quarter of its tokens at most."""
    width, tokens = grid.target
    size = grid.frame[grid.frame.arm == grid.arm("sp", width)].params
    if size.empty:
        return pd.DataFrame()
    return at_target(grid, bowls, Proxies.of(grid, bowls, size.iloc[0] / LEAST_PARAMS, tokens / LEAST_TOKENS), width, tokens)


def ratio_table(grid: Grid, bowls: Bowls) -> pd.DataFrame:
    """`at_target` of every width beyond the base at the widths' horizon, from the base and what is smaller; `ratio` in parameters."""
    tokens, plain = grid.width_tokens, grid.plain()
    base = plain[plain.arm == grid.arm("sp")].params
    if base.empty:
        return pd.DataFrame()
    proxies = Proxies.of(grid, bowls, base.iloc[0], tokens)
    proxies = dataclasses.replace(proxies, cells=proxies.cells[proxies.cells.horizon_tokens == tokens])
    made = [at_target(grid, bowls, proxies, int(width), tokens) for width in sorted(plain[plain.width > grid.base[0]].width.unique())]
    made = [rows.assign(ratio=rows.params / base.iloc[0]) for rows in made if len(rows)]
    return pd.concat(made, ignore_index=True) if made else pd.DataFrame()


def contrasts(table: pd.DataFrame, by_ratio: pd.DataFrame, ratio_slope: float, horizon_tokens: int) -> dict[str, Contrast]:
    """What the claims on fitting and transfer are judged by; `ratio_slope` is |dL/d log D| at the widths' horizon."""
    made = {}
    if len(table):
        fitted, carried = (table[table.method == name].set_index("seed") for name in (FITTED, TRANSFERRED))
        made["fitted − transferred"] = Contrast((fitted.loss - carried.loss).to_numpy(), family="target")
        made["fitted − transferred: regret"] = Contrast((fitted.regret - carried.regret).to_numpy(), family="regret")
        made["sp − mup, both tuned"] = Contrast((fitted.tuned_loss - carried.tuned_loss).to_numpy(), family="target")
        made["fitted: octaves"] = Contrast(fitted.octaves.to_numpy(), "octaves", "predicted", horizon_tokens)
        made["transferred: octaves"] = Contrast(carried.octaves.to_numpy(), "octaves", "predicted", horizon_tokens)
        kept, by_losses = (table[table.method == name].set_index("seed") for name in (KEPT, BY_LOSSES))
        made["fitted − kept"] = Contrast((fitted.loss / kept.loss - 1).to_numpy(), "loss_fraction", "kept", horizon_tokens)
        if len(by_losses) == len(fitted):
            made["fitted by losses: octaves"] = Contrast(by_losses.octaves.to_numpy(), "octaves", "predicted", horizon_tokens)
    if len(by_ratio) and by_ratio.ratio.nunique() > 1 and ratio_slope > 0:
        gap = by_ratio.pivot_table(index=["seed", "ratio"], columns="method", values="loss")
        gap = ((gap[FITTED] - gap[TRANSFERRED]).unstack() / ratio_slope).dropna()
        slopes = np.polyfit(np.log2(gap.columns.to_numpy(float)), gap.to_numpy().T, 1)[0]
        made["gap over the ratio"] = Contrast(slopes, "token_fraction", "ratio")
    return made


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: rate, octaves from the best with its deviation over seeds, loss, regret (nats), search FLOPs."""
    if table.empty:
        return table
    by = table.groupby(["parametrization", "method"], sort=False)
    return by.agg(best_guess=("log2_lr", lambda x: 2.0 ** x.mean()), octaves=("octaves", "mean"), octaves_sd=("octaves", "std"),
                  loss=("loss", "mean"), tuned_loss=("tuned_loss", "mean"), regret=("regret", "mean"), regret_sd=("regret", "std"),
                  search_flops=("search_flops", "mean"), seeds=("seed", "nunique")).reset_index()
