"""What a checkpoint shows without being run: the norms of its matrices, and what the Power law says for its batch and tokens."""

import dataclasses
import re
from pathlib import Path

import pandas as pd

from etastar.analysis.laws import laws
from etastar.schedules import Power

PAPER_CAP = 0.02  # η_max of arXiv 2408.13359 §4


def checkpoint_norms(folder) -> pd.DataFrame:
    """`operator_norms` of a checkpoint, read one tensor at a time: one row a matrix, and `layer`, its number (NA outside layers).

    `folder` holds safetensors, whole or in shards, or is one such file; other kinds of weights are never opened. Memory is that of the
    largest tensor and its float64 work, whatever the size of the checkpoint. An expert of a mixture is a `slot` of its layer's
    parameter, and of its first one `part` "gate" and "up" are matrices of their own, as in ours. Roles, columns and refusals are those
    of `operator_norms`; ValueError too for a folder without safetensors, with a shard missing or with a damaged file.
    """
    from etastar.model.norms import operator_norms

    frame = operator_norms(Path(folder))
    numbers = [re.search(r"(?:^|\.)(\d+)\.", name) for name in frame["name"]]
    frame.insert(1, "layer", pd.array([int(found[1]) if found else None for found in numbers], dtype="Int64"))
    return frame


@dataclasses.dataclass(frozen=True)
class PowerSays:
    """What arXiv 2408.13359 recommends for a batch and a horizon in tokens; rates are μP base rates.

    `wsd_peak_lr` (with `low` and `high` over the paper's fits) is its law for a WSD run of that horizon, Eq. 5; `schedule_lr` is where
    its Power scheduler (a = 4, b = −0.51, η_max = 0.02; Eq. 7) stands when the cooldown begins, and `cap_until_tokens` until when that
    is at η_max. `warnings` say what lies outside the range the law was fitted on.
    """

    batch_tokens: float
    horizon_tokens: float
    wsd_peak_lr: float
    low: float
    high: float
    schedule_lr: float
    cap_until_tokens: float
    warnings: tuple[str, ...]


def power_law_says(batch_tokens: float, horizon_tokens: float, cooldown_fraction: float = 0.1) -> PowerSays:
    """What the Power law (es.laws["power"]) would have recommended for a checkpoint's batch and tokens; see PowerSays.

    `cooldown_fraction` of the tokens are the cooldown's (0.2 of PowerLM-3B's). The rates suppose the paper's μP (base width 256,
    sequences of 4096 tokens), and are not comparable with rates of standard parametrization. Raises ValueError for numbers that are not
    positive, a batch beyond the horizon, and a cooldown of the whole run. arXiv 2408.13359 Eq. 5–7.
    """
    answer = laws["power"].answer("lr", horizon_tokens=horizon_tokens, batch_tokens=batch_tokens)
    if batch_tokens > horizon_tokens:
        raise ValueError(f"a batch of {batch_tokens:,.0f} tokens is more than the horizon of {horizon_tokens:,.0f}; both are in tokens")
    if not 0 <= cooldown_fraction < 1:
        raise ValueError(f"cooldown_fraction is a share of the tokens, 0 … 1 without 1; got {cooldown_fraction}")
    schedule = Power()
    late = schedule.rate_at((1 - cooldown_fraction) * horizon_tokens, batch_tokens=batch_tokens, eta_max=PAPER_CAP)
    cap = (schedule.a * answer.arguments["batch_sequences"] / PAPER_CAP) ** (-1 / schedule.b)
    return PowerSays(float(batch_tokens), float(horizon_tokens), answer.value, answer.low, answer.high, float(late), cap, answer.warnings)
