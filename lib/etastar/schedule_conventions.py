"""Where the steps of a warm-up and of a cooldown stand on their ramps: this kit's convention and other codebases'.

For the same words (T = 100 steps, warm-up 10, linear decay 20) the public codebases apply different rates:

    convention   factor at step 0     1     9    10    79    80    81     99    sum
    etastar                 1/10  2/10     1     1     1 20/21 19/21   1/21    85.5
    epfml                   .01  .109  .901     1     1     1   .95    .05    85.055
    torchtitan, nanochat     .1    .2     1     1     1     1   .95    .05    86
    olmo                      0    .1    .9     1     1     1   .95    .05    85
    fabian-sp             1e-10    .1    .9     1     1   .95    .9      0    84
    lingua (floor .1)         0    .1    .9     1     1     1   .69   .105    80.103

Lengths in steps are counted as this kit counts them; the conventions say only what the rates within them are.
"""

import math

import numpy as np


def _from_one_over_w(step, warmup):
    return (step + 1.0) / warmup


def _from(first):
    return lambda step, warmup: first + (1 - first) * step / warmup


def _before_the_end(k, steps):
    return (k + 1.0) / (steps + 1)


def _at_the_start(k, steps):
    return k / steps


def _at_the_end(k, steps):
    return (k + 1.0) / steps


# name: (factor of warm-up step s of W, position x in [0, 1] of cooldown step k of D)
_CONVENTIONS = {
    "etastar": (_from_one_over_w, _before_the_end),
    "epfml": (_from(1 / 100), _at_the_start),
    "torchtitan": (_from_one_over_w, _at_the_start),
    "nanochat": (_from_one_over_w, _at_the_start),
    "olmo": (_from(0.0), _at_the_start),
    "fabian-sp": (_from(1e-10), _at_the_end),
    "lingua": (_from(0.0), _at_the_start),
}


def warmup_factor(convention: str, steps: int) -> np.ndarray:
    """Share of the peak at each warm-up step: float64 (steps,)."""
    rule, _ = _CONVENTIONS[convention]
    return rule(np.arange(steps), steps)


def cooldown_position(convention: str, steps: int) -> np.ndarray:
    """Where each cooldown step stands between the plateau (0) and the floor (1): float64 (steps,)."""
    _, rule = _CONVENTIONS[convention]
    return rule(np.arange(steps), steps)


def one_cycle(total_steps: int, warmup: int, cycle: int, floor: float) -> np.ndarray:
    """torch's OneCycleLR with div_factor 100 and a last rate of `floor`, as epfml's cosine: factors (total_steps,).

    The peak is step `warmup` − 1, the floor step `cycle` − 1; both ramps are half cosines.
    """
    step, top, last = np.arange(total_steps), warmup - 1, cycle - 1
    up = np.clip(step / max(top, 1), 0, 1)
    down = np.clip((step - top) / max(last - top, 1), 0, 1)
    rise = 1 + (1 / 100 - 1) * (1 + np.cos(math.pi * up)) / 2
    fall = floor + (1 - floor) * (1 + np.cos(math.pi * down)) / 2
    return np.where(step < top, rise, fall)
