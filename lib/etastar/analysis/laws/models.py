"""What published models were trained with, beside what the laws say for them."""

import dataclasses
import math

import pandas as pd

from etastar.analysis.laws.advice import recommend
from etastar.analysis.laws.published import laws


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """A training run as reported: `settings` are arguments of `recommend`; rates are base rates where it is μP."""

    name: str
    own_law: str
    settings: dict
    used_lr: float
    used_batch_tokens: float
    source: str


MODELS = (
    # Depth and width of DeepSeek's models give the published compute: M·D = 8.46e22 and 9.95e23 FLOPs.
    PublishedModel("DeepSeek 7B", "deepseek", {"params": 7e9, "horizon_tokens": 2e12, "batch_tokens": 2304 * 4096, "depth": 30,
                                               "width": 4096, "context": 4096, "schedule": "multistep", "parametrization": "sp"},
                   4.2e-4, 2304 * 4096, "arXiv 2401.02954; params: the name's"),
    PublishedModel("DeepSeek 67B", "deepseek", {"params": 67e9, "horizon_tokens": 2e12, "batch_tokens": 4608 * 4096, "depth": 95,
                                                "width": 8192, "context": 4096, "schedule": "multistep", "parametrization": "sp"},
                   3.2e-4, 4608 * 4096, "arXiv 2401.02954; params: the name's"),
    PublishedModel("PowerLM-3B", "power", {"params": 3.4e9, "horizon_tokens": 1.25e12, "batch_tokens": 1024 * 4096, "depth": 40,
                                           "width": 2304, "context": 4096, "schedule": "wsd", "parametrization": "mup"},
                   0.0031071, 1024 * 4096, "arXiv 2408.13359 §5.2: Power(a=4, b=−0.51) at 1T tokens, where its decay began"),
    PublishedModel("Step Law 1B", "steplaw", {"params": 1_073_741_824, "horizon_tokens": 20e9, "batch_tokens": 256 * 2048, "context": 2048,
                                              "schedule": "cosine", "parametrization": "sp"},
                   1.381e-3, 256 * 2048, "best of the released grid (118 runs), arXiv 2503.04715"),
    PublishedModel("MiniCPM-2.4B", "minicpm", {"params": 2_442_057_984, "horizon_tokens": 1.1e12, "batch_tokens": 3.93e6, "depth": 40,
                                               "width": 2304, "schedule": "wsd", "parametrization": "mup"},
                   0.01, 3.93e6, "arXiv 2404.06395 §6"),
)


def published_models() -> pd.DataFrame:
    """Five published runs, two rows each: model, quantity (peak_lr, batch_tokens), parametrization, params, horizon_tokens, used, source,
    own_law, own (what that says; NaN where it needs what is not published), own_over_used, and one column a law.

    A law of the other parametrization or optimizer is NaN, as is one that needs more than is known.
    """
    rows = [_row(model, quantity, used) for model in MODELS
            for quantity, used in (("peak_lr", model.used_lr), ("batch_tokens", model.used_batch_tokens))]
    frame = pd.DataFrame(rows)
    return frame.drop(columns=[name for name in laws if frame[name].isna().all()])


def _row(model: PublishedModel, quantity: str, used: float) -> dict:
    told = recommend(**model.settings)
    said = told[told["applies"] & (told["quantity"] == quantity)].set_index("law")["value"]
    own = float(said.get(model.own_law, math.nan))
    return {"model": model.name, "quantity": quantity, "parametrization": model.settings["parametrization"],
            "params": model.settings["params"], "horizon_tokens": model.settings["horizon_tokens"], "used": used, "source": model.source,
            "own_law": model.own_law, "own": own, "own_over_used": own / used} | {name: said.get(name, math.nan) for name in laws}
