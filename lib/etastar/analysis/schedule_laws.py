"""Laws that predict a loss curve from its learning rates: the multi-power law, the annealing law, and a convex bound.

A schedule is the array of rates applied, warm-up included, step 0 first; a loss at step t follows the rates up to and
including that of step t. Curves to fit are (rates, steps, losses) triples.
"""

import dataclasses
import functools

import numpy as np
from scipy import optimize

HUBER_DELTA = 1e-3  # on the log of the loss, as both papers have it


@dataclasses.dataclass(frozen=True)
class MultiPowerLaw:
    """L(t) = L0 + A·S1^−α − B·Σ_k (η_{k−1} − η_k)·(1 − (1 + C·η_k^−γ·S_k)^−β), arXiv 2503.12811 Eq. 1, in nats.

    S1 sums all rates up to t, S_k those from k to t. The sum over k begins with warm-up, as the authors' code has it: their
    formula begins after it, and their parameters are 0.1 nats and more off there.
    """

    L0: float
    A: float
    alpha: float
    B: float
    C: float
    beta: float
    gamma: float

    def predict(self, lr, steps) -> np.ndarray:
        """Loss (len(steps),) in nats at `steps` of the schedule `lr` (total_steps,)."""
        lr, steps = np.asarray(lr, dtype=float), np.asarray(steps)
        change = np.flatnonzero(np.diff(lr)) + 1
        knots = _Knots.of(lr, steps, change, lr[change] - lr[change - 1])
        return np.concatenate([self._at(part) for part in knots.chunks()]) if len(steps) else np.empty(0)

    def _at(self, knots: "_Knots") -> np.ndarray:
        left = self.C * knots.rate ** -self.gamma * knots.since
        return self.L0 + self.A * knots.total**-self.alpha + self.B * ((1 - (1 + left) ** -self.beta) @ knots.jump)


# arXiv 2503.12811, repository thu-yao-01-luo/MultiPowerLaw at 8da9f19, src/config.py. The README's three digits do not give its
# own scores (their R² falls by 0.0001–0.0002); these do.
PUBLISHED_MULTI_POWER = {
    "25M": MultiPowerLaw(3.04045406, 0.52468604, 0.50786857, 363.78751622, 2.06560812, 0.58279013, 0.64142257),
    "100M": MultiPowerLaw(2.6514477, 0.60115152, 0.45295811, 437.9464276, 2.13245612, 0.59785199, 0.65523644),
    "400M": MultiPowerLaw(2.37474466, 0.65421216, 0.42878731, 523.42464371, 2.02462735, 0.59350493, 0.63472457),
}


@dataclasses.dataclass(frozen=True)
class AnnealingLaw:
    """L(s) = L0 + A·S1^−α − C·S2, arXiv 2408.11029 Eq. 1, in nats: S2 sums a momentum of the rate's falls, decaying by `memory`.

    Warm-up counts as if it had the peak rate, as the paper has it.
    """

    L0: float
    A: float
    alpha: float
    C: float
    memory: float = 0.999
    warmup_steps: int = 0

    def predict(self, lr, steps) -> np.ndarray:
        """Loss (len(steps),) in nats at `steps` of the schedule `lr` (total_steps,)."""
        area, annealing = annealing_areas(lr, self.memory, self.warmup_steps)
        return self.L0 + self.A * area[steps] ** -self.alpha - self.C * annealing[steps]


def annealing_areas(lr, memory: float = 0.999, warmup_steps: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """S1 and S2 of arXiv 2408.11029 at every step: (total_steps,) each; the first `warmup_steps` have the rate that follows them."""
    from scipy.signal import lfilter

    lr = np.array(lr, dtype=float)
    lr[:warmup_steps] = lr[warmup_steps]
    momentum = lfilter([1.0], [1.0, -memory], -np.diff(lr, prepend=lr[0]))
    return np.cumsum(lr), np.cumsum(momentum)


@dataclasses.dataclass(frozen=True)
class _Knots:
    """Where a schedule's rate changes, as seen from the steps to predict, with the sums of rates that both have before them."""

    steps: np.ndarray
    total: np.ndarray  # S1 at each of the steps
    knots: np.ndarray
    before: np.ndarray  # the same before each of the knots
    rate: np.ndarray
    jump: np.ndarray

    @staticmethod
    def of(lr, steps, knots, jump) -> "_Knots":
        area = np.cumsum(lr)
        return _Knots(steps, area[steps], knots, area[knots] - lr[knots], lr[knots], jump)

    @functools.cached_property
    def since(self) -> np.ndarray:
        """S_k(t), 0 for changes that are still to come: (steps, knots)."""
        return np.where(self.knots <= self.steps[:, None], self.total[:, None] - self.before, 0.0)

    def chunks(self, most: int = 1 << 22):
        """The same for a few steps at a time, so that 72,000 changes seen from 500 steps need no gigabytes."""
        size = max(1, most // max(1, len(self.knots)))
        for at in range(0, len(self.steps), size):
            yield dataclasses.replace(self, steps=self.steps[at : at + size], total=self.total[at : at + size])


def _coarse_knots(lr, steps, block: int) -> _Knots:
    """Changes of `block` steps taken together at their centre of mass, which is exact for a single jump."""
    lr = np.asarray(lr, dtype=float)
    change = np.diff(lr, prepend=lr[0])
    starts = np.arange(0, len(lr), block)
    weight, jump = np.add.reduceat(np.abs(change), starts), np.add.reduceat(change, starts)
    moment = np.add.reduceat(np.abs(change) * np.arange(len(lr)), starts)
    kept = weight > 0
    return _Knots.of(lr, np.asarray(steps), np.rint(moment[kept] / weight[kept]).astype(int), jump[kept])


def fit_multi_power_law(curves, block: int = 64, every: int = 2) -> MultiPowerLaw:
    """The law's seven parameters from curves: Huber loss on log residuals, from several starts.

    For speed, changes within `block` steps are taken together and every `every`-th logged loss is used. ValueError for losses
    that are not positive and finite. B, C, β and γ are told apart poorly by few curves: judge by curves that were left out.
    """
    knots = [_coarse_knots(lr, np.asarray(steps)[::every], block) for lr, steps, _ in curves]
    target = _log_losses(curves, every)
    peak = max(np.max(lr) for lr, *_ in curves)

    def residual(theta):
        with np.errstate(all="ignore"):
            law = MultiPowerLaw(theta[0], *np.exp(theta[1:]))
            return _log(np.concatenate([law._at(k) for k in knots])) - target

    lowest = np.exp(target.min())
    starts = [[share * lowest, *np.log([0.5, alpha, 0.1 / peak, 2.0, 0.6, 0.6])] for share, alpha in ((0.9, 0.5), (0.8, 0.3))]
    best = _best_fit(residual, starts)
    return MultiPowerLaw(float(best[0]), *(float(v) for v in np.exp(best[1:])))


def fit_annealing_law(curves, memory: float = 0.999, warmup_steps: int = 0) -> AnnealingLaw:
    """The law's four parameters from curves, by the same loss; `memory` is given, 0.999 in the paper."""
    areas = [annealing_areas(lr, memory, warmup_steps) for lr, *_ in curves]
    area = np.concatenate([a[np.asarray(steps)] for (a, _), (_, steps, _) in zip(areas, curves, strict=True)])
    annealing = np.concatenate([s[np.asarray(steps)] for (_, s), (_, steps, _) in zip(areas, curves, strict=True)])
    target = _log_losses(curves)
    scale = max(annealing.max(), 1e-300)

    def residual(theta):
        with np.errstate(all="ignore"):
            return _log(theta[0] + np.exp(theta[1]) * area ** -np.exp(theta[2]) - theta[3] * annealing / scale) - target

    lowest = np.exp(target.min())
    best = _best_fit(residual, [[share * lowest, np.log(0.5), np.log(0.5), 0.1] for share in (0.95, 0.8, 0.6)])
    return AnnealingLaw(float(best[0]), float(np.exp(best[1])), float(np.exp(best[2])), float(best[3] / scale), memory, warmup_steps)


def _log_losses(curves, every: int = 1) -> np.ndarray:
    losses = np.concatenate([np.asarray(loss, dtype=float)[::every] for *_, loss in curves])
    if not (np.isfinite(losses) & (losses > 0)).all():
        raise ValueError("losses to fit must be positive and finite; leave out diverged steps")
    return np.log(losses)


def _log(loss):
    return np.log(np.where(np.isfinite(loss) & (loss > 1e-6), loss, 1e-6))


def _best_fit(residual, starts) -> np.ndarray:
    """Also from where plain least squares lead: far from the curves Huber's loss is so flat that a fit may stay where it began."""
    rough = [optimize.least_squares(residual, start, x_scale="jac", max_nfev=100).x for start in starts]
    fits = [optimize.least_squares(residual, start, loss="huber", f_scale=HUBER_DELTA, x_scale="jac", max_nfev=300)
            for start in (*starts, *rough)]
    return min(fits, key=lambda fit: fit.cost).x


def score(predicted, loss) -> dict[str, float]:
    """R², MAE and RMSE (nats), mean and worst relative error of one curve, as arXiv 2503.12811's tables have them."""
    predicted, loss = np.asarray(predicted, dtype=float), np.asarray(loss, dtype=float)
    error = predicted - loss
    return {"r2": 1 - float((error**2).sum() / ((loss - loss.mean()) ** 2).sum()), "mae": float(np.abs(error).mean()),
            "rmse": float(np.sqrt((error**2).mean())), "mean_relative": float(np.abs(error / loss).mean()),
            "worst_relative": float(np.abs(error / loss).max())}


@dataclasses.dataclass(frozen=True)
class ConvexBound:
    """Suboptimality bound of SGD's last iterate, distance_term/γ + noise_term·γ for a base rate γ (arXiv 2501.18965 Thm 3.1)."""

    distance_term: float
    noise_term: float

    @property
    def best_lr(self) -> float:
        """The base rate at which the bound is least."""
        return float(np.sqrt(self.distance_term / self.noise_term))

    @property
    def best(self) -> float:
        """The bound at `best_lr`."""
        return float(2 * np.sqrt(self.distance_term * self.noise_term))


def convex_bound(factors, distance: float = 1.0, gradient: float = 1.0) -> ConvexBound:
    """The bound for a schedule of `factors` (total_steps,) of the base rate, gradient norms up to `gradient`, start at `distance`.

    arXiv 2501.18965, from 2310.07831 Theorem 10. Steps with rate 0 at the end are left out: they change nothing.
    """
    rates = np.asarray(factors, dtype=float)
    rates = rates[: np.flatnonzero(rates)[-1] + 1]
    after = np.cumsum(rates[::-1])[::-1]  # Σ_{t ≥ k} η_t
    squares = np.cumsum(rates[::-1] ** 2)[::-1] * gradient**2
    inner = (rates[:-1] / after[1:] * squares[:-1] / after[:-1]).sum()
    return ConvexBound(distance**2 / (2 * after[0]), float(squares[0] / (2 * after[0]) + inner / 2))
