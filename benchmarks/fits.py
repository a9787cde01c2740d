"""A bowl fit with its intervals, against the bare parabola through all points that a notebook would fit; no like has the intervals."""

import statistics
import time
from collections.abc import Iterator

import numpy as np

import etastar as es
from benchmarks.rows import in_turns

REFERENCE = "numpy polyfit"
RATES, SEEDS, FITS = 7, (1, 3, 10), 20


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
