"""The arguments of the laws, their units, and numbers that look as if they were given in another unit."""

import math
from collections.abc import Mapping
from numbers import Real

ARGUMENTS = {
    "params": "parameters, counted as the law counts them",
    "params_active": "parameters a token passes through",
    "params_total": "parameters, those of all experts",
    "active_fraction": "active experts over all experts; 1 when dense",
    "horizon_tokens": "tokens of the whole run",
    "batch_tokens": "tokens a step",
    "batch_sequences": "sequences a step, of the law's own length",
    "compute": "training FLOPs",
    "loss": "nats per token",
    "weight_decay": "AdamW λ, multiplied by the rate",
    "peak_lr": "peak learning rate",
    "width": "model dimension",
    "base_width": "model dimension of the μP base",
    "depth": "layers",
    "context": "tokens a sequence",
}

UNTOLD = "not told"
LEAST_PARAMS = 1e4  # below, no language model: our smallest decoders have 6e4
LEAST_HORIZON_TOKENS = 1e5
LEAST_COMPUTE = 1e9
GREATEST_LOSS = 15.0  # ln of a vocabulary of three million
GREATEST_BATCH_SEQUENCES = 2**15
LEAST_LONG_RUN_BATCH = 1e4  # tokens a step, for a horizon of LONG_RUN_TOKENS: more than 1e5 steps of two or three sequences
LONG_RUN_TOKENS = 1e9


def check_arguments(given: Mapping) -> None:
    """ValueError that names what is no argument of any law, no number, or not positive and finite."""
    if unknown := [name for name in given if name not in ARGUMENTS]:
        raise ValueError(f"unknown argument {', '.join(unknown)}; laws know {', '.join(ARGUMENTS)}")
    if bad := [f"{n}={v!r}" for n, v in given.items() if isinstance(v, bool) or not isinstance(v, Real) or not 0 < v < math.inf]:
        raise ValueError(f"{', '.join(bad)} must be positive and finite numbers")


def probable_slips(given: Mapping) -> list[str]:
    """A sentence for every value that is off by a thousand or more and so was probably meant in another unit."""
    slips = [_slip(name, given[name], *_params_unit(given[name])) for name in ("params", "params_active", "params_total")
             if given.get(name, math.inf) < LEAST_PARAMS]
    horizon, batch = given.get("horizon_tokens", math.nan), given.get("batch_tokens", math.nan)
    if horizon < LEAST_HORIZON_TOKENS:
        slips.append(_slip("horizon_tokens", horizon, "billions", 1e9))
    elif horizon < given.get("params", 0) / 1e3:
        slips.append(_slip("horizon_tokens", horizon, "millions", 1e6))
    if batch < 64:
        slips.append(_slip("batch_tokens", batch, "millions", 1e6))
    elif batch < LEAST_LONG_RUN_BATCH and horizon >= LONG_RUN_TOKENS:
        slips.append(_slip("batch_tokens", batch, "sequences (of 4096 tokens, say)", 4096))
    if given.get("batch_sequences", 0) >= GREATEST_BATCH_SEQUENCES:
        slips.append(f"batch_sequences={given['batch_sequences']:.4g} looks like tokens: give it as batch_tokens")
    if given.get("compute", math.inf) < LEAST_COMPUTE:
        slips.append(f"compute={given['compute']:.4g} FLOPs looks like multiples of 1e18 or like PF-days (8.64e19 FLOPs)")
    if given.get("loss", 0) > GREATEST_LOSS:
        slips.append(f"loss={given['loss']:.4g} looks like a perplexity: {math.log(given['loss']):.3g} nats?")
    return slips


def range_text(low: float | None, high: float | None) -> str:
    """A range for eyes; an end that no text tells is a question mark."""
    return f"{'?' if low is None else f'{low:.4g}'} … {'?' if high is None else f'{high:.4g}'}"


def _params_unit(value: float) -> tuple[str, float]:
    return ("billions", 1e9) if value < 100 else ("millions", 1e6)


def _slip(name: str, value: float, unit: str, factor: float) -> str:
    return f"{name}={value:.4g} looks like {unit}: {value * factor:.4g} meant?"
