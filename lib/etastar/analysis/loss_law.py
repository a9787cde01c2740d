"""The loss law L(N, D) = E + A/N^alpha + B/D^beta, and its one-variable forms, by Huber's loss of ln L (arXiv 2203.15556, its third
approach).

The objective is summed over points, not averaged: in nats² it is about 1e-3, and an average of it lies below the default
tolerances of common optimizers, which then stop where they started (beta stays near .285 on the paper's own runs). Here all
starts, and all bootstrap resamples, go down together as one stack of small damped Gauss–Newton problems; the best are polished.
"""

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
from scipy import optimize, special

from etastar.analysis.log_points import refuse_not_positive
from etastar.analysis.units import warn_of_units

DELTA = 1e-3
NAMES = {"params": ("A", "alpha"), "tokens": ("B", "beta")}
# ln A (and ln B), ln E, alpha (and beta): 4,500 starts with both terms
GRID = {"level": (0, 5, 10, 15, 20, 25), "exponent": (0, 0.5, 1, 1.5, 2), "floor": (-1, -0.5, 0, 0.5, 1)}
STACK = 500  # problems side by side: more do not fit a core's cache
ROUNDS = ((8, 1000), (25, 160), (150, 8))  # (steps, starts that go on), the last of which are polished
BOOTSTRAP_STEPS = 150


@dataclasses.dataclass(frozen=True)
class LossLaw:
    """A fitted loss law; nats per token, N in parameters, D in tokens; the letters of a term that was not fitted are NaN.

    `objective` is the summed Huber loss, `r2` that of ln L, `n` the points. Lows and highs are percentiles over `draws`, the
    bootstrap's refits to resampled points (columns as the fields), and NaN without one.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    E_low: float
    E_high: float
    A_low: float
    A_high: float
    alpha_low: float
    alpha_high: float
    B_low: float
    B_high: float
    beta_low: float
    beta_high: float
    objective: float
    delta: float
    r2: float
    n: int
    draws: pd.DataFrame = dataclasses.field(compare=False, repr=False)

    def predict(self, params=None, tokens=None) -> np.ndarray:
        """The loss in nats; takes what the fit took. Raises ValueError otherwise."""
        given = {name: np.asarray(v, dtype=float) for name, v in {"params": params, "tokens": tokens}.items() if v is not None}
        fitted = [name for name in NAMES if not math.isnan(getattr(self, NAMES[name][1]))]
        if list(given) != fitted:
            raise ValueError(f"this law is in {' and '.join(fitted)}; got {' and '.join(given) or 'nothing'}")
        return self.E + sum(getattr(self, NAMES[n][0]) * x ** -getattr(self, NAMES[n][1]) for n, x in given.items())

    @property
    def params_exponent(self) -> float:
        """a of best params ∝ compute^a: beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def optimal_split(self, compute) -> tuple[np.ndarray, np.ndarray]:
        """(params, tokens) of least loss at compute = 6 · params · tokens FLOPs, in closed form."""
        product, a = np.asarray(compute, dtype=float) / 6, self.params_exponent
        balance = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return balance * product**a, product ** (1 - a) / balance


def fit_loss_law(params, tokens, loss, *, starts=None, delta: float = DELTA, bootstrap: int = 0, seed: int = 0,
                 level: float = 0.95) -> LossLaw:
    """Fit E + A/N^alpha + B/D^beta to losses in nats (points,); params=None or tokens=None leaves its term out.

    `starts`: rows of (ln E, ln A, alpha, ln B, beta), of the fitted terms alone; by default a grid of 4,500 (150 with one
    term). `bootstrap`: how many resamples of points give the intervals. Raises ValueError for values that are missing or not
    positive, unequal lengths, fewer points than coefficients, or a regressor that does not vary.
    """
    problem = _problem(params, tokens, loss, delta)
    starts = problem.grid() if starts is None else np.atleast_2d(np.asarray(starts, dtype=float))
    if starts.shape[1] != problem.size:
        raise ValueError(f"starts needs {problem.size} columns, {', '.join(problem.labels)}; got {starts.shape[1]}")
    best = problem.to_centred(starts)
    for steps, keep in ROUNDS:
        best, objective = problem.descend(best, np.ones((1, problem.count)), steps)
        best = best[np.argsort(objective)[:keep]]
    theta, objective = min((problem.polish(row) for row in best), key=lambda fit: fit[1])
    return _law(problem, theta, objective, problem.bootstrap(theta, bootstrap, seed), level)


def huber_objective(law: LossLaw, params, tokens, loss) -> float:
    """The objective that `fit_loss_law` minimizes, of any law at these points."""
    residual = np.log(law.predict(params, tokens)) - np.log(np.asarray(loss, dtype=float))
    return float(special.huber(law.delta, residual).sum())


def loss_law(E: float, A: float = math.nan, alpha: float = math.nan, B: float = math.nan, beta: float = math.nan,
             delta: float = DELTA) -> LossLaw:
    """A law of given coefficients, a printed one for example; without intervals."""
    unknown = dict.fromkeys((f.name for f in dataclasses.fields(LossLaw) if f.name.endswith(("_low", "_high"))), math.nan)
    return LossLaw(E, A, alpha, B, beta, **unknown, objective=math.nan, delta=delta, r2=math.nan, n=0, draws=pd.DataFrame())


def _problem(params, tokens, loss, delta) -> "_Problem":
    given = {name: np.asarray(v, dtype=float) for name, v in {"params": params, "tokens": tokens}.items() if v is not None}
    loss = np.asarray(loss, dtype=float)
    if not given:
        raise ValueError("give params, tokens or both")
    if len({len(v) for v in (*given.values(), loss)}) != 1:
        raise ValueError("points must be equally many; got " + ", ".join(f"{n}: {len(v)}" for n, v in (given | {"loss": loss}).items()))
    for name, values in (given | {"loss": loss}).items():
        refuse_not_positive(name, values)
        warn_of_units(name, values, stacklevel=3)
    if not delta > 0:
        raise ValueError(f"delta must be positive; got {delta}")
    if len(loss) < 1 + 2 * len(given):
        raise ValueError(f"{1 + 2 * len(given)} coefficients need as many points; got {len(loss)}")
    few = [name for name, v in given.items() if len(np.unique(v)) < 3]
    if few:
        raise ValueError(f"a power and a floor need at least 3 different values of {' and '.join(few)}; leave the term out, or vary it")
    return _Problem(tuple(given), np.array([np.log(v) for v in given.values()]), np.log(loss), delta)


class _Problem:
    """ln L of a stack of coefficient rows θ (M, 1 + 2T): ln E, then per term its ln level at the mean ln x, and its exponent.

    Levels at the centre make exponent and level nearly independent, which takes the condition number from 1e5 to about 10.
    """

    def __init__(self, names: tuple, log_x_TxP: np.ndarray, log_loss: np.ndarray, delta: float):
        self.names, self.delta, self.log_loss = names, delta, log_loss
        self.centre = log_x_TxP.mean(1)
        self.x_TxP = log_x_TxP - self.centre[:, None]
        self.count, self.size = len(log_loss), 1 + 2 * len(names)
        self.labels = ["ln E", *itertools.chain.from_iterable((f"ln {NAMES[n][0]}", NAMES[n][1]) for n in names)]

    def grid(self) -> np.ndarray:
        """The default starts: (ln E, ln A, alpha, …)."""
        terms = [GRID["level"], GRID["exponent"]] * len(self.names)
        return np.array(list(itertools.product(GRID["floor"], *terms)), dtype=float)

    def to_centred(self, theta_MxQ) -> np.ndarray:
        """Levels at ln x = 0 as levels at the centre."""
        moved = theta_MxQ.copy()
        moved[:, 1::2] -= theta_MxQ[:, 2::2] * self.centre
        return moved

    def from_centred(self, theta_MxQ) -> np.ndarray:
        """Levels at the centre as levels at ln x = 0."""
        moved = theta_MxQ.copy()
        moved[:, 1::2] += theta_MxQ[:, 2::2] * self.centre
        return moved

    def residual(self, theta_MxQ):
        """(ln model − ln loss (M, P), shares of the terms in the model (M, 1 + T, P))."""
        terms = np.empty((len(theta_MxQ), 1 + len(self.names), self.count))
        terms[:, 0] = theta_MxQ[:, :1]
        terms[:, 1:] = theta_MxQ[:, 1::2, None] - theta_MxQ[:, 2::2, None] * self.x_TxP
        top = terms.max(1, keepdims=True)
        shares = np.exp(terms - top)
        total = shares.sum(1, keepdims=True)
        return (top + np.log(total))[:, 0] - self.log_loss, shares / total

    def jacobian(self, shares) -> np.ndarray:
        """(M, Q, P) of ln model over θ, from the terms' shares."""
        found = np.empty((len(shares), self.size, self.count))
        found[:, 0] = shares[:, 0]
        found[:, 1::2] = shares[:, 1:]
        found[:, 2::2] = -shares[:, 1:] * self.x_TxP
        return found

    def objective(self, residual, counts) -> np.ndarray:
        """Summed Huber loss, each point as often as it counts."""
        return (counts * special.huber(self.delta, residual)).sum(-1)

    def gradient(self, theta) -> tuple[float, np.ndarray]:
        """(objective, its gradient) of one row of coefficients, every point counted once."""
        residual, shares = self.residual(theta[None])
        slope = self.jacobian(shares)[0] @ np.clip(residual[0], -self.delta, self.delta)
        return float(self.objective(residual[0], 1.0)), slope

    def descend(self, theta_MxQ, counts_MxP, steps: int):
        """(θ, objective) after damped Gauss–Newton steps, all rows at once; a step that does not help is damped tenfold."""
        parts = [self._descend(theta_MxQ[i:i + STACK], counts_MxP[i:i + STACK] if len(counts_MxP) > 1 else counts_MxP, steps)
                 for i in range(0, len(theta_MxQ), STACK)]
        return tuple(np.concatenate(p) for p in zip(*parts, strict=True))

    def _descend(self, theta, counts, steps):
        theta, damping = theta.copy(), np.full(len(theta), 1e-2)
        residual, shares = self.residual(theta)
        value = self.objective(residual, counts)
        for _ in range(steps):
            # Huber's loss is at most the parabola of these weights through the present residuals, which is what is stepped on.
            weight = counts / np.maximum(np.abs(residual) / self.delta, 1.0)
            jacobian = self.jacobian(shares)
            weighted = jacobian * weight[:, None]
            hessian, slope = weighted @ jacobian.transpose(0, 2, 1), (weighted @ residual[..., None])
            diagonal = np.einsum("mqq->mq", hessian)
            diagonal += damping[:, None] * diagonal + 1e-12 * diagonal.max(1, keepdims=True)
            trial = theta - np.clip(np.linalg.solve(hessian, slope)[..., 0], -3.0, 3.0)
            tried, tried_shares = self.residual(trial)
            reached = self.objective(tried, counts)
            better = reached < value
            theta[better], residual[better], shares[better], value[better] = (trial[better], tried[better], tried_shares[better],
                                                                              reached[better])
            damping = np.clip(np.where(better, damping / 5, damping * 10), 1e-9, 1e6)
        return theta, value

    def polish(self, theta):
        """(θ, objective) of one row by BFGS, in units of delta² so that its tolerances bind."""
        found = optimize.minimize(lambda at: tuple(v / self.delta**2 for v in self.gradient(at)), theta, jac=True, method="BFGS",
                                  options={"gtol": 1e-4, "maxiter": 500})
        return found.x, found.fun * self.delta**2

    def bootstrap(self, theta, count: int, seed: int) -> np.ndarray:
        """(count, Q) refits to resampled points, all from the fit to the whole."""
        if not count:
            return np.empty((0, self.size))
        drawn = np.random.default_rng(seed).multinomial(self.count, np.full(self.count, 1 / self.count), size=count)
        return self.descend(np.repeat(theta[None], count, axis=0), drawn.astype(float), BOOTSTRAP_STEPS)[0]


def _law(problem: _Problem, theta, objective: float, draws_MxQ, level: float) -> LossLaw:
    def letters(rows):
        moved = problem.from_centred(rows)
        columns = {"E": np.exp(moved[:, 0])}
        for t, name in enumerate(problem.names):
            columns |= {NAMES[name][0]: np.exp(moved[:, 1 + 2 * t]), NAMES[name][1]: moved[:, 2 + 2 * t]}
        return pd.DataFrame(columns)

    found, draws = letters(theta[None]).iloc[0].to_dict(), letters(draws_MxQ)
    tails = ((1 - level) / 2, (1 + level) / 2)
    limits = {f"{name}_{side}": float(draws[name].quantile(q)) for name in draws for side, q in zip(("low", "high"), tails, strict=True)}
    residual = problem.residual(theta[None])[0][0]
    r2 = 1 - (residual**2).sum() / ((problem.log_loss - problem.log_loss.mean()) ** 2).sum()
    return dataclasses.replace(loss_law(**found, delta=problem.delta), **limits, objective=float(objective), r2=float(r2), n=problem.count,
                               draws=draws)
