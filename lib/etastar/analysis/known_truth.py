"""Gradient descent on a quadratic whose every answer is known: expected losses, best rates and their exponents in closed form.

Mode k = 1 … K has the curvature λ_k = k^−a and starts δ_k from its minimum, λ_k δ_k² ∝ k^−(1 + a·p): a power-law spectrum and
source. A gradient has noise of variance s·λ_k in mode k, s = noise_tokens / batch_tokens, as label noise makes it. With m_k = E δ_k²

    a step at rate η      m_k ← (1 − ηλ_k)² m_k + η² s λ_k
    n steps at rate η     m_k ← r m_k + (1 − r) η s / (2 − ηλ_k),  r = (1 − ηλ_k)^2n              (exact: the recursion is linear)
    loss                  floor + ½ Σ λ_k m_k

For n = T and small η the bias is ½ Σ λ_k δ_k² exp(−2ηTλ_k) ∝ (ηT)^−p (a Gamma integral over k), and the noise ηs/4 · Σ λ_k. Their sum
is least at η* ∝ (s T^p)^−1/(1+p): exponent −p/(1+p) in tokens at a fixed batch and, as s ∝ 1/batch, 1 in the batch at fixed tokens.
A rate that falls to zero as (1 − x)^r does leaves noise ∝ s η (ηT)^−κ, κ = r/(1+r): mode k forgets what it gained before its last
(λ_k η T)^−1/(1+r) of the run. Modes not yet learned keep theirs, so that κ ≤ 1 − 1/a. Then η* has the exponent −(p − κ)/(1 + p − κ) in
tokens and the excess loss −p/(1 + p − κ): a decay that ends more gently is better by a power of the horizon, up to that bound.
These are the exponents of small rates and long runs, nearly reached at 512 steps of a constant rate and slowly by decays; what
`expected_loss` tells is exact at any length.
"""

import dataclasses
import functools
import math

import numpy as np
import pandas as pd
from scipy import optimize, stats

from etastar.analysis.bowl import fit_bowl
from etastar.analysis.claims import LEVEL, Claim, judge
from etastar.analysis.controls import FALSE_ALARM, Control
from etastar.analysis.paired import Estimate
from etastar.schedules import Constant, Schedule

SPINE = "exponents of a known truth"
OFFSETS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
MARGIN = 0.1  # within it an exponent counts as the truth's; the planted wrong one lies twice as far off


@dataclasses.dataclass(frozen=True)
class QuadraticTask:
    """The quadratic of this module: losses in nats, `initial_excess` that of the start above `floor`; rates from 2 on diverge."""

    spectrum_exponent: float = 2.0
    bias_exponent: float = 1.0
    initial_excess: float = 6.0
    noise_tokens: float = 16_384.0
    floor: float = 3.0
    modes: int = 512

    def __post_init__(self):
        positive = ("spectrum_exponent", "bias_exponent", "initial_excess", "modes")
        if bad := [f"{name}={getattr(self, name)}" for name in positive if not getattr(self, name) > 0]:
            raise ValueError(f"QuadraticTask: {', '.join(bad)} must be positive")
        if self.spectrum_exponent <= 1 or self.noise_tokens < 0:
            raise ValueError(f"QuadraticTask needs spectrum_exponent > 1 (a finite trace) and noise_tokens ≥ 0; got "
                             f"{self.spectrum_exponent} and {self.noise_tokens}")

    @functools.cached_property
    def curvatures(self) -> np.ndarray:
        """λ_k: (modes,)."""
        return np.arange(1, self.modes + 1, dtype=float) ** -self.spectrum_exponent

    @functools.cached_property
    def squares(self) -> np.ndarray:
        """δ_k² at the start: (modes,)."""
        share = np.arange(1, self.modes + 1, dtype=float) ** -(1 + self.spectrum_exponent * self.bias_exponent)
        return 2 * self.initial_excess * share / share.sum() / self.curvatures

    def expected_loss(self, rates, batch_tokens: int) -> np.ndarray:
        """Expected loss (…) after all steps of `rates` (…, total_steps); steps at one rate are taken at once."""
        rates = _rates(rates)
        changes = (np.diff(rates) != 0).any(tuple(range(rates.ndim - 1)))
        return self._losses(rates, np.flatnonzero(np.append(changes, True)) + 1, batch_tokens)[..., -1]

    def expected_curve(self, rates, batch_tokens: int) -> np.ndarray:
        """Expected loss after each step: (…, total_steps), as `rates`."""
        rates = _rates(rates)
        return self._losses(rates, np.arange(1, rates.shape[-1] + 1), batch_tokens)

    def _losses(self, rates, stops, batch_tokens):
        noise, square = self.noise_tokens / batch_tokens, np.broadcast_to(self.squares, (*rates.shape[:-1], self.modes))
        losses = np.empty((*rates.shape[:-1], len(stops)))
        for i, (start, stop) in enumerate(zip((0, *stops), stops, strict=False)):
            rate = rates[..., start, None]
            with np.errstate(all="ignore"):  # what diverges overflows, and is NaN from then on
                kept = (1 - rate * self.curvatures) ** (2 * (stop - start))
                square = kept * square + (1 - kept) * rate * noise / (2 - rate * self.curvatures)
                losses[..., i] = self.floor + square @ self.curvatures / 2
        return np.where(np.isfinite(losses), losses, np.inf)

    def best_lr(self, schedule: Schedule, horizon_tokens: int, batch_tokens: int) -> float:
        """The peak rate of least expected loss; ValueError where it lies at an end of 2^−16 … 1."""
        steps = _steps(horizon_tokens, batch_tokens)

        def loss(log2_lr):
            return float(self.expected_loss(schedule.lr(steps, peak_lr=2.0**log2_lr, batch_tokens=batch_tokens), batch_tokens))

        found = optimize.minimize_scalar(loss, bounds=(-16.0, 0.0), method="bounded", options={"xatol": 1e-6}).x
        if min(found + 16, -found) < 1e-3:
            raise ValueError(f"the best rate of {horizon_tokens:,} tokens in batches of {batch_tokens:,} is not within 2^−16 … 1; "
                             "take a task with other noise_tokens or a longer run")
        return float(2.0**found)

    def noise_exponent(self, decay_power: float) -> float:
        """κ of a rate that ends as (1 − x)^decay_power: 0 for a constant, 1 for a line, 2 for a cosine to zero."""
        return min(decay_power / (1 + decay_power), 1 - 1 / self.spectrum_exponent)

    def horizon_exponent(self, decay_power: float = 0.0) -> float:
        """Exponent of the best rate in tokens at a fixed batch; at fixed tokens its exponent in the batch is 1."""
        gap = self.bias_exponent - self.noise_exponent(decay_power)
        return -gap / (1 + gap)

    def loss_exponent(self, decay_power: float = 0.0) -> float:
        """Exponent in tokens of the excess loss at the best rate."""
        return -self.bias_exponent / (1 + self.bias_exponent - self.noise_exponent(decay_power))


def one_mode_best_rates(total_steps: int, curvature: float, square: float, noise: float) -> np.ndarray:
    """The best of all schedules of one mode: η_t = 1 / (λ(t + 1) + s/δ²), t = 0 … total_steps − 1: (total_steps,).

    A step's best rate is m/(λm + s), which takes 1/m to 1/m + λ/s; a smaller m is better whatever follows, so that the best steps
    make the best run. 1/m grows by λ/s each step: the rate falls as 1/t, for any horizon, and the loss as 1/T.
    """
    return 1 / (curvature * (np.arange(total_steps) + 1.0) + noise / square)


def simulated_sweep(task: QuadraticTask, *, horizons_tokens, batches_tokens, seeds, rng, schedule: Schedule | None = None,
                    offsets=OFFSETS, seed_sd: float = 0.02, run_sd: float = 0.004) -> pd.DataFrame:
    """Final losses as a study's runs would have them: horizon_tokens, batch_tokens, peak_lr, seed, loss (nats, NaN diverged).

    About the expected loss a seed shifts all of its runs by `seed_sd` and every run has `run_sd` of its own. A cell's rates lie
    `offsets` octaves about its best, to the nearest half octave. ValueError where a horizon is no whole number of steps.
    """
    schedule, shift, rows = schedule or Constant(), rng.normal(0, seed_sd, len(seeds)), []
    for horizon in horizons_tokens:
        for batch in batches_tokens:
            expected = _cell(task, schedule, int(horizon), int(batch), tuple(offsets))
            for seed, of_seed in zip(seeds, shift, strict=True):
                noise = rng.normal(of_seed, run_sd, len(expected))
                rows += [(horizon, batch, lr, seed, loss + e) for (lr, loss), e in zip(expected, noise, strict=True)]
    return pd.DataFrame(rows, columns=["horizon_tokens", "batch_tokens", "peak_lr", "seed", "loss"])


@functools.lru_cache(maxsize=256)  # a control draws many sweeps of the same cells
def _cell(task, schedule, horizon_tokens, batch_tokens, offsets) -> tuple:
    """(peak rate, expected loss) pairs of a cell."""
    centre = round(2 * math.log2(task.best_lr(schedule, horizon_tokens, batch_tokens))) / 2
    peaks, steps = [2.0 ** (centre + o) for o in offsets], _steps(horizon_tokens, batch_tokens)
    rates = np.array([schedule.lr(steps, peak_lr=peak, batch_tokens=batch_tokens) for peak in peaks])
    losses = task.expected_loss(rates, batch_tokens)
    return tuple(zip(peaks, np.where(losses < task.floor + task.initial_excess, losses, np.nan).tolist(), strict=True))


# -- the control -------------------------------------------------------------------------------------------------------


def spine_recovers(seed: int, task: QuadraticTask | None = None, draws: int = 40, seeds: int = 4, batch_tokens: int = 1024,
                   bowl=fit_bowl, fit=None, judge_one=judge) -> Control:
    """Simulated sweeps of rate, horizon and batch go through the kit's own bowls, power laws and verdicts; the truth must come out.

    Of `draws` sweeps over a 16-fold range of horizons and a 4-fold one of batches, at constant rates: the 95 % intervals of both
    exponents must miss those of the exact best rates as seldom as 95 % intervals do, the truth must nearly always be judged
    reproduced, and a planted exponent 0.2 off seldom. `bowl`, `fit` (es.fit_power_law where None) and `judge_one` are what is
    under control; where they refuse a sweep the control fails.
    """
    if fit is None:
        from etastar.analysis.power_law import fit_power_law as fit
    if draws < 20 or seeds < 2:
        raise ValueError(f"the control needs at least 20 draws and 2 seeds; got {draws} and {seeds}")
    task, rng = task or QuadraticTask(), np.random.default_rng(seed)
    cells = {"horizons_tokens": [512 * batch_tokens * 4**i for i in range(3)], "batches_tokens": [batch_tokens * 2**i for i in range(3)]}
    truths = _true_exponents(task, **cells)
    try:
        drawn = [_exponents(simulated_sweep(task, **cells, seeds=range(seeds), rng=rng), seeds, bowl, fit) for _ in range(draws)]
    except ValueError as error:
        return Control(SPINE, False, f"a simulated sweep was refused: {error}")
    most = stats.binom.ppf(1 - FALSE_ALARM, draws, LEVEL)
    passed, told = True, []
    for name, truth in truths.items():
        estimates = [found[name] for found in drawn]
        missed = sum(not low <= truth <= high for low, high in (e.interval() for e in estimates))
        found, planted = (sum(_reproduced(target, truth, e, judge_one) for e in estimates) for target in (truth, truth - 2 * MARGIN))
        passed &= bool(missed <= most and found >= 0.8 * draws and planted <= most)
        told.append(f"{name}: {np.mean([e.value for e in estimates]):+.3f} for {truth:+.3f}, missed by {missed} of {draws} intervals "
                    f"({most:.0f} allowed), judged reproduced in {found}, one {2 * MARGIN:g} off in {planted}")
    return Control(SPINE, passed, "; ".join(told))


def _true_exponents(task: QuadraticTask, horizons_tokens, batches_tokens) -> dict[str, float]:
    """Exponents of the exact best constant rates over these cells, a line in logarithms through all of them."""
    cells = [(h, b) for h in horizons_tokens for b in batches_tokens]
    log_lr = [math.log(task.best_lr(Constant(), h, b)) for h, b in cells]
    coefficients = np.linalg.lstsq(np.column_stack([np.log(cells), np.ones(len(cells))]), log_lr, rcond=None)[0]
    return dict(zip(("horizon_tokens", "batch_tokens"), coefficients[:2].tolist(), strict=True))


def _exponents(sweep: pd.DataFrame, seeds: int, bowl, fit) -> dict[str, Estimate]:
    """Exponents of the best rate over seeds, from the bowls of every horizon and batch."""
    rows = []
    for (horizon, batch), cell in sweep.groupby(["horizon_tokens", "batch_tokens"]):
        fitted = bowl(cell["peak_lr"], cell["loss"], cell["seed"])
        rows += [(horizon, batch, s, 2.0**v) for s, v in zip(fitted.seeds, fitted.vertices, strict=True)]
    best = pd.DataFrame(rows, columns=["horizon_tokens", "batch_tokens", "seed", "lr"])
    names = ["horizon_tokens", "batch_tokens"]
    law = fit({name: best[name].to_numpy() for name in names}, best["lr"].to_numpy(), seed=best["seed"].to_numpy())
    t = stats.t.ppf(1 - LEVEL / 2, seeds - 1)
    return {name: Estimate(value, (high - low) / 2 / t, seeds - 1, seeds, "exponent")
            for name, value, low, high in zip(names, law.exponents, law.exponents_low, law.exponents_high, strict=True)}


def _reproduced(target: float, truth: float, estimate: Estimate, judge_one) -> bool:
    """Whether a claim of the exponent `target` is judged reproduced; its rival is what lies on the truth's other side."""
    claim = Claim(id="planted", study="", paper="", place="", statement="", kind="number", estimand="exponent", arms=(), unit="exponent",
                  published=target, published_note="", primary=False, minimum_scale={}, matching="", margin=MARGIN,
                  rival=truth + 4 * MARGIN, rival_name="a far one")
    return judge_one(claim, estimate, evidence="live", scale={}, matching=True).verdict == "reproduced"


def _rates(rates) -> np.ndarray:
    rates = np.asarray(rates, dtype=float)
    if rates.ndim < 1 or not rates.shape[-1] or not (np.isfinite(rates) & (rates >= 0)).all():
        raise ValueError(f"rates must be finite and not negative, one a step; got shape {rates.shape}, least {rates.min(initial=0):g}")
    return rates


def _steps(horizon_tokens: int, batch_tokens: int) -> int:
    if horizon_tokens < batch_tokens or horizon_tokens % batch_tokens:
        raise ValueError(f"horizon_tokens {horizon_tokens} is not a whole number of batches of {batch_tokens} tokens; "
                         f"take {max(1, round(horizon_tokens / batch_tokens)) * batch_tokens}")
    return horizon_tokens // batch_tokens
