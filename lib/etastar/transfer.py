"""From a small tuned run to a large one by rule: width and depth by the parametrization, tokens by a power law, decay by its timescale."""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from etastar.analysis.laws import laws
from etastar.model.parametrization import numbers
from etastar.recipe import AdamW, CompleteP, Mixture, Model, MuP, Recipe, ScheduleFreeAdamW


def transfer(proxy: Recipe, *, width: int | None = None, depth: int | None = None, experts: int | None = None,
             experts_per_token: int | None = None, ffn_width: int | None = None, horizon_tokens: int | None = None,
             batch_tokens: int | None = None, lr_exponent: float | str = 0.0, batch_exponent: float = 0.0,
             decay_rule: Literal["fixed", "timescale"] = "fixed") -> Recipe:
    """The recipe of a larger run with the proxy's tuned peak rate carried over; what is not given is the proxy's.

    Width and depth: the peak rate stays, since the multipliers of MuP and CompleteP follow from the new shape (arXiv 2203.03466,
    2505.01618). Heads, groups of heads that share keys, and (by default) `ffn_width` grow exactly with the width, at one `head_dim`.
    Tokens: peak_lr · (horizon_tokens over the proxy's)^`lr_exponent`, a number or the name of a law that holds the batch fixed,
    "fitting" (arXiv 2601.05049 eq. 6) or "bjorck" (2409.19913). Batch: peak_lr · (batch_tokens over the proxy's)^`batch_exponent`.
    Decay: "timescale" holds η·λ·T over T steps, and so the epochs that AdamW's average of updates reaches back (2405.13698);
    "fixed" leaves λ alone. The schedule is as the proxy's is written: steps, tokens and shares of the run stay what they say.
    Raises ValueError for a base or a proxy larger than the target in width, depth, experts or tokens; for a change of width or depth
    without a rule for it; for shapes that cannot be; and where the parametrization itself changes the η·λ that is to be held.
    """
    if decay_rule not in ("fixed", "timescale"):
        raise ValueError(f'decay_rule is "fixed" or "timescale"; got {decay_rule!r}')
    asked = {"width": width, "depth": depth, "experts": experts, "horizon_tokens": horizon_tokens}
    _check_sizes(proxy, {name: size for name, size in asked.items() if size is not None})
    _check_rules(proxy, _or(width, proxy.model.width), _or(depth, proxy.model.depth))
    mixture = _mixture(proxy.model, experts, experts_per_token)
    model = _grown(dataclasses.replace(proxy.model, mixture=mixture, depth=_or(depth, proxy.model.depth)), width, ffn_width)
    target = proxy.replace(model=model, horizon_tokens=_or(horizon_tokens, proxy.horizon_tokens),
                           batch_tokens=_or(batch_tokens, proxy.batch_tokens))
    by_horizon = (target.horizon_tokens / proxy.horizon_tokens) ** _exponent(lr_exponent)
    by_batch = (target.batch_tokens / proxy.batch_tokens) ** batch_exponent
    target = target.replace(peak_lr=proxy.peak_lr * by_horizon * by_batch)
    return target if decay_rule == "fixed" else target.replace(optimizer=_same_timescale(proxy, target))


def _or(given, usual):
    return usual if given is None else given


def _check_sizes(proxy: Recipe, asked: dict[str, int]) -> None:
    """Whether the target is at least as large as the base and as the proxy in all that was asked."""
    mixture = proxy.model.mixture
    has = {"width": proxy.model.width, "depth": proxy.model.depth, "experts": mixture.experts if mixture else 0,
           "horizon_tokens": proxy.horizon_tokens}
    for name, size in asked.items():
        if (base := getattr(proxy.parametrization, f"base_{name}", 0)) > size:
            raise ValueError(f"base_{name} {base} is larger than the target's {name} {size}, and the base is what proxy and target are "
                             f"scaled from; take a base_{name} of at most {has[name]} or a larger target")
        if has[name] > size:
            raise ValueError(f"the proxy's {name} {has[name]} is larger than the target's {size}; tune a proxy of at most {size}")


def _check_rules(proxy: Recipe, width: int, depth: int) -> None:
    """Whether the parametrization says how the rates of another width and depth follow."""
    by, kind, model = proxy.parametrization, type(proxy.parametrization).__name__, proxy.model
    if width != model.width and not isinstance(by, MuP | CompleteP):
        raise ValueError(f"{kind} has no rule of width, from {model.width} to {width}; take MuP or CompleteP, or keep the rate as it is "
                         "with replace(model=…)")
    if depth != model.depth and not (isinstance(by, CompleteP) or (isinstance(by, MuP) and by.residual_depth_exponent)):
        raise ValueError(f"{kind} has no rule of depth, from {model.depth} to {depth}; take CompleteP, or MuP with a "
                         "residual_depth_exponent")
    if (width, depth) != (model.width, model.depth) and not isinstance(proxy.optimizer, AdamW | ScheduleFreeAdamW):
        raise ValueError(f"{kind}'s multipliers are Adam's, and the proxy is trained by {type(proxy.optimizer).__name__}; take AdamW "
                         "for a change of width or depth")


def _mixture(model: Model, experts: int | None, experts_per_token: int | None) -> Mixture | None:
    if experts is None and experts_per_token is None:
        return model.mixture
    if model.mixture is None:
        raise ValueError(f"experts={experts}, experts_per_token={experts_per_token} were asked of a proxy without a mixture; "
                         "leave them out, or tune a proxy that has one")
    was = model.mixture
    return dataclasses.replace(was, experts=_or(experts, was.experts), experts_per_token=_or(experts_per_token, was.experts_per_token))


def _grown(model: Model, width: int | None, ffn_width: int | None) -> Model:
    """The model at another width, all that follows the width in exact proportion; `ffn_width` None where its default is that too."""
    ratio = Fraction(_or(width, model.width), model.width)
    wide = dataclasses.replace(model, width=_or(width, model.width), kv_heads=None)  # refuses a width that the heads do not fit
    if ffn_width is None and ratio != 1 and wide.resolved_ffn_width != model.resolved_ffn_width * ratio:
        ffn_width = _whole("ffn_width", model.resolved_ffn_width, ratio)
    kv_heads = None if model.kv_heads is None else _whole("kv_heads", model.kv_heads, ratio)
    return dataclasses.replace(wide, ffn_width=_or(ffn_width, model.ffn_width), kv_heads=kv_heads)


def _whole(name: str, number: int, ratio: Fraction) -> int:
    if (number * ratio).denominator != 1:
        raise ValueError(f"the proxy's {name} {number} at {ratio} of its width is {float(number * ratio):.6g}, no whole number; "
                         "take a whole multiple of the proxy's width")
    return int(number * ratio)


def _exponent(given: float | str) -> float:
    """A number, or by the name of a published law its exponent of tokens at fixed batch."""
    if not isinstance(given, str):
        return given
    known = {name: law.formulas["lr"].exponents["horizon_tokens"] for name, law in laws.items() if law.batch_unit == "fixed"}
    if given not in known:
        raise ValueError(f"lr_exponent {given!r} names no law over tokens at fixed batch; give a number or one of {', '.join(known)}")
    return known[given]


def _same_timescale(proxy: Recipe, target: Recipe) -> AdamW:
    """The optimizer with the λ that holds η·λ·T (arXiv 2405.13698: τ in epochs is B / (η·λ·D), which is 1 / (η·λ·T))."""
    if not isinstance(proxy.optimizer, AdamW):
        raise ValueError(f'decay_rule "timescale" is a rule of AdamW; got {type(proxy.optimizer).__name__}: take "fixed"')
    was, now = (numbers(r.parametrization, r.model, r.corpus.vocab)["layers.0.qkv"] for r in (proxy, target))
    changed = now.lr_multiplier * now.decay_multiplier / (was.lr_multiplier * was.decay_multiplier)
    if not math.isclose(changed, 1.0, rel_tol=1e-9):
        raise ValueError(f'decay_rule "timescale" holds η·λ·T, but {target.parametrization} makes η·λ of the hidden matrices '
                         f'{changed:.4g} times the proxy\'s; take decay="independent" (and alpha=1), or decay_rule="fixed"')
    longer = target.peak_lr * target.total_steps / (proxy.peak_lr * proxy.total_steps)
    return dataclasses.replace(proxy.optimizer, weight_decay=proxy.optimizer.weight_decay / longer)
