"""Fits against what a notebook would do: a bowl with its intervals against a bare parabola, a loss law from many starts, and its
bootstrap, against one BFGS after another. No like has the intervals of a bowl."""

import statistics
import time
from collections.abc import Iterator

import numpy as np
from scipy import optimize, special

import etastar as es
from benchmarks.rows import in_turns
from etastar.analysis.loss_law import DELTA, GRID, fit_loss_law, loss_law

REFERENCE = "numpy polyfit"
RATES, SEEDS, FITS = 7, (1, 3, 10), 20
START_BY_START = "scipy BFGS"
POINTS = 240
STARTS = len(GRID["floor"]) * (len(GRID["level"]) * len(GRID["exponent"])) ** 2


def rows(options) -> Iterator[dict]:
    """A row a number of seeds and way: milliseconds of a fit of seven rates an octave apart."""
    for seeds in SEEDS:
        lr, loss, seed = _losses(seeds)
        ways = {"fit_bowl": lambda at=(lr, loss, seed if seeds > 1 else None): es.fit_bowl(*at),
                REFERENCE: lambda at=(lr, loss): _vertex(*at)}
        measured = in_turns({way: lambda call=call: _ms(call) for way, call in ways.items()}, options.rounds)
        for way in ways:
            ratios = [of / own for own, of in zip(measured[way], measured[REFERENCE], strict=True)]
            yield {"bench": "fits", "way": way, "rates": RATES, "seeds": seeds, "ms": statistics.median(measured[way]),
                   "reference": REFERENCE, "ratio": statistics.median(ratios), "rounds": options.rounds}
    yield from _loss_law_rows(options.rounds)


def _loss_law_rows(rounds: int) -> Iterator[dict]:
    """Seconds to fit E + A/N^alpha + B/D^beta from all starts, and to refit it to resampled points; `objective` is the least reached.

    The reference goes from a few random starts, or refits a few resamples, and is scaled to all of them.
    """
    runs, few = _runs(), 4 * rounds
    resamples = 200 * rounds
    plain, reached = _seconds(lambda: _one_after_another(*runs, starts=few))
    own, fit = _seconds(lambda: fit_loss_law(*runs))
    best = [[np.log(fit.E), np.log(fit.A), fit.alpha, np.log(fit.B), fit.beta]]
    plain_resampled, _ = _seconds(lambda: _one_after_another(*runs, starts=few, at=best[0]))
    own_resampled, _ = _seconds(lambda: fit_loss_law(*runs, starts=best, bootstrap=resamples))
    for what, count, of_plain, of_own in (("starts", STARTS, plain, own), ("resamples", resamples, plain_resampled, own_resampled)):
        scaled = of_plain * count / few
        for way, seconds, objective in (("fit_loss_law", of_own, fit.objective), (START_BY_START, scaled, reached)):
            yield {"bench": "fits", "shape": f"loss law, {POINTS} points, {what}", "way": way, what: count, "seconds": seconds,
                   "objective": float(objective), "reference": START_BY_START, "ratio": scaled / seconds}


def _seconds(call) -> tuple[float, object]:
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def _runs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Params, tokens and losses of a made-up law with a noise of half a percent."""
    rng = np.random.default_rng(0)
    params, tokens = 10 ** rng.uniform(7.7, 10.2, POINTS), 10 ** rng.uniform(9, 11.5, POINTS)
    law = loss_law(E=1.8, A=480, alpha=0.35, B=2100, beta=0.37)
    return params, tokens, law.predict(params, tokens) * np.exp(0.005 * rng.normal(size=POINTS))


def _one_after_another(params, tokens, loss, starts: int, at=None) -> float:
    """Least objective of BFGS with numeric gradients from random starts of the grid, or, from `at`, over resampled points."""
    log_n, log_d, log_loss = np.log(params), np.log(tokens), np.log(loss)

    def objective(p, points):
        model = special.logsumexp([np.full(POINTS, p[0]), p[1] - p[2] * log_n, p[3] - p[4] * log_d], axis=0)
        return special.huber(DELTA, model - log_loss)[points].sum()

    rng, axes = np.random.default_rng(0), [GRID[k] for k in ("floor", "level", "exponent", "level", "exponent")]
    found = []
    for _ in range(starts):
        start = [rng.choice(axis) for axis in axes] if at is None else at
        points = np.arange(POINTS) if at is None else rng.integers(POINTS, size=POINTS)
        found.append(optimize.minimize(objective, start, args=(points,), method="BFGS").fun)
    return min(found)


def _losses(seeds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of a bowl of 0.01 nats per octave² with a noise of 0.003 nats."""
    octaves = np.tile(np.arange(RATES) - RATES // 2, seeds)
    noise = np.random.default_rng(0).normal(scale=0.003, size=len(octaves))
    return 2.0 ** (octaves - 7), 3 + 0.01 * (octaves - 0.3) ** 2 + noise, np.repeat(np.arange(seeds), RATES)


def _vertex(lr: np.ndarray, loss: np.ndarray) -> float:
    curvature, slope, _ = np.polyfit(np.log2(lr), loss, 2)
    return 2 ** (-slope / (2 * curvature))


def _ms(call) -> float:
    began = time.perf_counter()
    for _ in range(FITS):
        call()
    return 1e3 * (time.perf_counter() - began) / FITS
