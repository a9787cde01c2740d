"""What every published law says about one training run, side by side, and how far they are apart.

Rates of standard parametrization and μP base rates are never ranked together, nor those of different optimizers.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from etastar.analysis.laws.law import Answer, Law
from etastar.analysis.laws.published import laws
from etastar.analysis.laws.units import UNTOLD, check_arguments, probable_slips
from etastar.schedules import Power

SCHEDULES = ("wsd", "cosine", "linear", "constant", "multistep", "power")
PARAMETRIZATIONS = ("sp", "mup", "norm")
OPTIMIZERS = ("adamw", "muon", "scion")
COLUMNS = ["law", "quantity", "value", "low", "high", "hidden_lr", "applies", "why_not", "extrapolation", "warnings", "note", "source"]
QUANTITIES = ("peak_lr", "eta_max", "batch_tokens", "tau", "lr_times_weight_decay", "peak_lr_at_weight_decay")
POWER_ETA_MAX = 0.02  # arXiv 2408.13359 §4
FAR_BATCH = 2.0  # a rate fitted together with a batch is told to be so when the batch is this many times off


def recommend(params, horizon_tokens, batch_tokens=None, schedule="wsd", parametrization="sp", width=None, base_width=None, depth=None,
              context=None, params_active=None, params_total=None, weight_decay=None, *, optimizer="adamw") -> pd.DataFrame:
    """What every law says for a run: one row a law and quantity, those that apply first; the others with `why_not`.

    `params` non-embedding parameters, `horizon_tokens` and `batch_tokens` (a step) in tokens; of a mixture of experts give
    `params_active` and `params_total` as well; width, depth and context make the compute exact. Columns: law, quantity
    (peak_lr, batch_tokens, tau, lr_times_weight_decay or, with `weight_decay`, peak_lr_at_weight_decay; for schedule "power"
    the Power scheduler's eta_max), value, low, high (over a law's own printed fits), hidden_lr (of hidden matrices: under μP
    base rate over width / base_width), applies, why_not, extrapolation (times beyond the range fitted on; 1 inside, NaN where
    none is told), warnings (a tuple), note (conventions), source. .attrs: `spread` and `batch_spread`, greatest over least of
    the laws that apply (NaN below two), and `slips`, values that look like another unit. Raises ValueError for unknown
    schedules, parametrizations and optimizers, numbers that are not positive, and experts that
    do not add up.
    """
    known = {name: value for name, value in {
        "params": params, "horizon_tokens": horizon_tokens, "batch_tokens": batch_tokens, "width": width, "base_width": base_width,
        "depth": depth, "context": context, "params_active": params_active, "params_total": params_total,
        "weight_decay": weight_decay}.items() if value is not None}
    setting = {"schedule": schedule, "parametrization": parametrization, "optimizer": optimizer}
    _check(known, setting)
    asked = known if "params_total" in known else known | {"active_fraction": 1.0}
    rows = [row for law in laws.values() for row in _rows(law, asked, setting)]
    rows.sort(key=lambda row: (not row["applies"], QUANTITIES.index(row["quantity"])))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.attrs = {"spread": _spread(frame, "peak_lr"), "batch_spread": _spread(frame, "batch_tokens"), "setting": known | setting,
                   "slips": tuple(probable_slips(known))}
    return frame


def over_horizon(params, horizons_tokens, batch_tokens=None, **setting) -> pd.DataFrame:
    """The peak rate of every law that applies, over horizons and both parametrizations: law, horizon_tokens, peak_lr,
    parametrization, extrapolation; other arguments as those of `recommend`.
    """
    parts = []
    for parametrization in PARAMETRIZATIONS:
        for tokens in horizons_tokens:
            told = recommend(params, tokens, batch_tokens, parametrization=parametrization, **setting)
            rates = told[told["applies"] & (told["quantity"] == "peak_lr")]
            parts.append(rates.assign(horizon_tokens=float(tokens), parametrization=parametrization))
    frame = pd.concat(parts, ignore_index=True).rename(columns={"value": "peak_lr"})
    return frame[["law", "horizon_tokens", "peak_lr", "parametrization", "extrapolation"]]


def format_advice(frame: pd.DataFrame) -> str:
    """`recommend`'s frame as text: what applies, what the laws warn of, what does not apply, and the spread in the last line."""
    applies, slips = frame[frame["applies"]], frame.attrs["slips"]
    warned = [(row.law, row.quantity, text) for row in applies.itertuples() for text in row.warnings if text not in slips]
    without = [(row.law, row.quantity, row.why_not) for row in frame[~frame["applies"]].itertuples()]
    table = _short_table(applies).to_string(index=False) if len(applies) else "no law applies"
    parts = [*(f"beware: {slip}" for slip in slips), table, *_told_together("warnings", warned), *_told_together("not applied", without)]
    return "\n".join([*parts, "", _closing(applies)])


def _short_table(applies) -> pd.DataFrame:
    shown = applies[["law", "quantity", "value", "low", "high", "hidden_lr", "extrapolation", "note"]].copy()
    for name in ("value", "low", "high", "hidden_lr", "extrapolation"):
        shown[name] = [(UNTOLD if name == "extrapolation" else "") if math.isnan(v) else f"{v:.4g}" for v in shown[name]]
    empty = [name for name in shown if not shown[name].astype(bool).any()]
    rates_alike = (shown["hidden_lr"] == shown["value"]) | (shown["hidden_lr"] == "")
    return shown.drop(columns=sorted({*empty, *(["hidden_lr"] if rates_alike.all() else [])}))


def _told_together(title: str, said) -> list[str]:
    """Sentences under a title, each once a law with the quantities it is said of."""
    quantities = {}
    for law, quantity, text in said:
        quantities.setdefault((law, text), []).append(quantity)
    return ["\n" + title, *(f"  {law}, {', '.join(of)}: {text}" for (law, text), of in quantities.items())] if said else []


def _closing(applies) -> str:
    lines = []
    for quantity, what in (("batch_tokens", "batches"), ("peak_lr", "peak learning rates")):
        said = applies[applies["quantity"] == quantity].sort_values("value")
        if len(said) > 1:
            low, high = said.iloc[0], said.iloc[-1]
            lines.append(f"{len(said)} {what} span {high['value'] / low['value']:.2f}-fold: {low['value']:.4g} ({low['law']}) … "
                         f"{high['value']:.4g} ({high['law']})")
        else:
            lines.append(f"{what}: no spread, since {len(said)} law{'' if len(said) == 1 else 's'} applied")
    return "\n".join(lines)


def _check(known: Mapping, setting: Mapping) -> None:
    check_arguments(known)
    for name, allowed in (("schedule", SCHEDULES), ("parametrization", PARAMETRIZATIONS), ("optimizer", OPTIMIZERS)):
        if setting[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {setting[name]!r}")
    if ("params_active" in known) != ("params_total" in known):
        raise ValueError("a mixture of experts needs both params_active and params_total; a dense model neither")
    if known.get("params_active", 0) > known.get("params_total", math.inf):
        raise ValueError(f"params_active={known['params_active']:.4g} exceeds params_total={known['params_total']:.4g}")
    if known.get("batch_tokens", 0) > known["horizon_tokens"]:
        raise ValueError("; ".join([f"batch_tokens={known['batch_tokens']:.4g} exceeds horizon_tokens={known['horizon_tokens']:.4g}",
                                    *probable_slips(known)]))


def _rows(law: Law, known: Mapping, setting: Mapping) -> list[dict]:
    rows = [_row(law, "peak_lr", "lr", known, setting), _row(law, "batch_tokens", "batch", known, setting)]
    if law.name == "power" and setting["schedule"] == "power" and rows[0]["applies"]:
        rows[0] = _under_power_schedule(rows[0], law, known)
    if "tau" in law.formulas:
        rows += [_row(law, "tau", "tau", known, setting), _decay_row(law, known, setting)]
    return rows


def _row(law: Law, shown: str, quantity: str, known: Mapping, setting: Mapping) -> dict:
    row = {"law": law.name, "quantity": shown, "value": math.nan, "low": math.nan, "high": math.nan, "hidden_lr": math.nan,
           "applies": False, "why_not": "", "extrapolation": math.nan, "warnings": (), "source": law.source, "note": ""}
    why, answer = _why_not(law, quantity, setting), None
    if not why:
        try:
            answer = law.answer_from(quantity, known)
        except ValueError as error:
            why = str(error)
    if answer is None:
        return row | {"why_not": why or _needs(law, quantity)}
    return row | _told(law, quantity, answer, known, setting)


def _told(law: Law, quantity: str, answer: Answer, known: Mapping, setting: Mapping) -> dict:
    formula = law.formulas[quantity]
    ranged = {name: known[name] for name in formula.ranges if name in known and name not in formula.exponents}
    told = list(dict.fromkeys([*answer.warnings, *formula.range_warnings(ranged), *_mismatches(law, quantity, answer, known, setting)]))
    rate = {"hidden_lr": _hidden(law, answer.value, known)} if quantity == "lr" else {}
    return {"value": answer.value, "low": answer.low, "high": answer.high, "applies": True,
            "extrapolation": formula.extrapolation(ranged | answer.arguments),
            "warnings": tuple(told), "note": _note(law, quantity)} | rate


def _why_not(law: Law, quantity: str, setting: Mapping) -> str:
    formula = law.formulas.get(quantity)
    if formula is None or (formula.prefactor is None and formula.rule is None):
        return law.lacking.get(quantity, f"it has no {quantity}")
    if not setting["optimizer"].startswith("adam" if law.optimizer == UNTOLD else law.optimizer):
        whose = "an optimizer that is not told" if law.optimizer == UNTOLD else law.optimizer
        return f"a law of {whose}, not of {setting['optimizer']}"
    if quantity == "lr" and law.parametrization != setting["parametrization"]:
        names = {"mup": "a μP base rate", "sp": "a rate of standard parametrization", "norm": "a rate of norm-transfer scaling"}
        return f"{names[law.parametrization]}, not one of parametrization {setting['parametrization']!r}"
    return ""


def _needs(law: Law, quantity: str) -> str:
    return "needs " + " or ".join(", ".join(way.takes) for way in law.formulas[quantity].ways)


def _mismatches(law: Law, quantity: str, answer: Answer, known: Mapping, setting: Mapping) -> list[str]:
    told = []
    if law.schedule not in (UNTOLD, setting["schedule"]):
        told.append(f"fitted under {law.schedule} ending at {law.final_lr}; yours is {setting['schedule']}")
    formula = law.formulas[quantity]
    if any("params" in way.takes for way in formula.ways) and law.params_convention in ("with the output head", UNTOLD):
        told.append(f"its N is counted {law.params_convention if law.params_convention != UNTOLD else 'in a way that is not told'}; "
                    "params without embeddings was given")
    batch = law.answer_from("batch", known) if quantity == "lr" and "batch_tokens" in known else None
    if batch and max(batch.value / known["batch_tokens"], known["batch_tokens"] / batch.value) >= FAR_BATCH:
        told.append(f"fitted together with the law's own batch, here {batch.value:.4g} tokens; yours is {known['batch_tokens']:.4g}")
    if quantity == "lr" and law.base_width and known.get("base_width", law.base_width) != law.base_width:
        told.append(f"its base width is {law.base_width}, yours {known['base_width']:g}; with its own, hidden matrices "
                    + (f"get {law.hidden_lr(answer.value, known['width']):.4g}" if "width" in known else "get another rate"))
    return told


def _hidden(law: Law, rate: float, known: Mapping) -> float:
    if law.parametrization != "mup":
        return rate
    base = known.get("base_width", law.base_width)
    return law.hidden_lr(rate, known["width"], base) if base and "width" in known else math.nan


def _note(law: Law, quantity: str) -> str:
    if quantity == "batch":
        return f"printed in {law.batch_unit}" if law.batch_unit != "tokens" else ""
    if quantity != "lr":
        return ""
    kind = "one LR for all"
    if law.parametrization == "mup":
        kind = f"μP base LR, base width {law.base_width or UNTOLD}, {law.multipliers}"
    return kind if law.schedule == UNTOLD else f"{kind}; {law.schedule}"


def _under_power_schedule(row: dict, law: Law, known: Mapping) -> dict:
    """The Power scheduler has one peak rate for every horizon and batch; how high the rate then stands is its law."""
    batch, schedule = known["batch_tokens"], Power()
    late = 0.9 * known["horizon_tokens"]
    rate = float(schedule.rate_at(late, batch_tokens=batch, eta_max=POWER_ETA_MAX))
    return row | {"quantity": "eta_max", "value": POWER_ETA_MAX, "low": math.nan, "high": math.nan,
                  "hidden_lr": _hidden(law, POWER_ETA_MAX, known),
                  "warnings": tuple(text for text in row["warnings"] if not text.startswith("fitted under")),
                  "note": f"η_max of es.Power(a={schedule.a:g}, b={schedule.b:g}), at most; {rate:.4g} after 90 % of the tokens"}


def _decay_row(law: Law, known: Mapping, setting: Mapping) -> dict:
    """The product of rate and decay that the timescale law asks for, or the rate at the decay given."""
    row = _row(law, "lr_times_weight_decay", "weight_decay", known | {"peak_lr": 1.0}, setting)
    if "weight_decay" not in known or not row["applies"]:
        return row
    return row | {"quantity": "peak_lr_at_weight_decay", "value": row["value"] / known["weight_decay"],
                  "note": "the paper holds the rate and sets the decay"}


def _spread(frame: pd.DataFrame, quantity: str) -> float:
    said = frame.loc[frame["applies"] & (frame["quantity"] == quantity), "value"]
    return float(said.max() / said.min()) if len(said) > 1 else np.nan
