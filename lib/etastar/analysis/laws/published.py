"""The published laws by name. Constants are the papers' own; what is known from another text says so in `evidence`.

A constant whose unit or origin could not be verified is left out, and the law then gives ratios only.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import pandas as pd

from etastar.analysis.laws.law import Answer, Formula, Law, Way
from etastar.analysis.laws.units import UNTOLD, check_arguments, range_text

FLOPS = "compute taken as 6·N·D; the law's own is M·D with M = 72·depth·width² + 12·depth·width·context (give those, or compute)"


def flops_per_token(depth: int, width: int, context: int) -> float:
    """Non-embedding training FLOPs a token, attention included: M = 72·L·d² + 12·L·d·l (arXiv 2401.02954 §3.2)."""
    return 72.0 * depth * width**2 + 12.0 * depth * width * context


def _from_tokens(sequence_tokens, *kept):
    """The way of a law that counts sequences from `batch_tokens`."""
    def convert(batch_tokens, **others):
        return others | {"batch_sequences": batch_tokens / sequence_tokens}

    return Way((*kept, "batch_tokens"), convert, f"batch_sequences taken as batch_tokens / {sequence_tokens}: shorter or longer "
                                                 "sequences were not tried")


def _six_flops(name):
    return Way((name, "horizon_tokens"), lambda horizon_tokens, **n: {"compute": 6 * n[name] * horizon_tokens}, FLOPS)


COMPUTE_WAYS = (Way(("compute",)),
                Way(("depth", "width", "context", "horizon_tokens"),
                    lambda horizon_tokens, **shape: {"compute": flops_per_token(**shape) * horizon_tokens}),
                _six_flops("params_active"), _six_flops("params"))
# N of an MoE is the total; recommend offers both, so the total comes first.
TOTAL_WAYS = (Way(("params_total", "horizon_tokens"), lambda params_total, horizon_tokens: {"params": params_total,
                                                                                         "horizon_tokens": horizon_tokens}),
              Way(("params", "horizon_tokens")))

POWER = Law(
    name="power", title="Power Scheduler: WSD optimum", source="arXiv 2408.13359 (v2) Eq. 4–6", parametrization="mup", base_width=256,
    multipliers="multipliers 1, initial std 0.02",
    optimizer=UNTOLD, schedule="wsd", final_lr="0, over the last 10 % of the tokens", batch_unit="sequences of 4096 tokens",
    params_convention="none in the law; sizes fitted on count embeddings",
    formulas={"lr": Formula(
        "η = β · 4.6 · T^−0.51",
        "constants printed; base width and tokens a sequence follow from the paper's tables; low, high: also its fits for single sizes",
        (Way(("horizon_tokens", "batch_sequences")), _from_tokens(4096, "horizon_tokens")),
        prefactor=4.6, exponents={"batch_sequences": 1, "horizon_tokens": -0.51},
        ranges={"horizon_tokens": (2e9, 256e9), "batch_sequences": (16, 512), "params": (12e6, 121e6)},
        other_fits=tuple((a, {"batch_sequences": 1, "horizon_tokens": b}) for a, b in ((4.34, -0.507), (4.86, -0.513), (4.46, -0.508))))},
    lacking={"batch": "the batch is an input of this law"})

DEEPSEEK = Law(
    name="deepseek", title="DeepSeek LLM", source="arXiv 2401.02954 Eq. 1", parametrization="sp", optimizer="adamw",
    schedule="multistep", final_lr="10 % of the peak (31.6 % from 80 % of the tokens, 10 % from 90 %)",
    params_convention="none: C = M·D with M the non-embedding FLOPs a token, attention included", batch_unit="tokens",
    formulas={
        "lr": Formula("η = 0.3118 · C^−0.1250", "constants from two independent transcriptions that agree", COMPUTE_WAYS, 0.3118,
                      {"compute": -0.1250}, ranges={"compute": (1e17, 2e19)}),
        "batch": Formula("B = 0.2920 · C^0.3271", "constants from two independent transcriptions that agree", COMPUTE_WAYS, 0.2920,
                         {"compute": 0.3271}, ranges={"compute": (1e17, 2e19)})})

MINICPM = Law(
    name="minicpm", title="MiniCPM", source="arXiv 2404.06395 (v3) §3.2–3.3", parametrization="mup", optimizer="adam",
    schedule=UNTOLD, final_lr=UNTOLD, batch_unit="tokens", params_convention="non-embedding",
    multipliers="embedding × 12, residual × 1.4/√depth, initial std 0.1",
    formulas={
        "lr": Formula("η = 0.01", "printed: found at 9M, the best up to 0.5B and in one check at 2.1B; its base width is not printed",
                      (Way(()),), 0.01, ranges={"params": (9e6, 0.5e9), "horizon_tokens": (None, None)}),
        "batch": Formula("B = 1.21e9 / L^6.24", "printed; L is the loss on C4 with the paper's tokenizer; runs were cosine",
                         (Way(("loss",)),), 1.21e9, {"loss": -6.24}, ranges={"params": (9e6, 0.17e9), "loss": (None, None)})})

STEPLAW = Law(
    name="steplaw", title="Step Law", source="arXiv 2503.04715", parametrization="sp", optimizer="adamw", schedule="cosine",
    final_lr="1e-5, whatever the peak", params_convention="non-embedding; of an MoE the total", batch_unit="tokens",
    formulas={
        "lr": Formula("η = 1.79 · N^−0.713 · D^0.307", "constants printed; range of the released runs", TOTAL_WAYS, 1.79,
                      {"params": -0.713, "horizon_tokens": 0.307},
                      ranges={"params": (214_663_680, 1_073_741_824), "horizon_tokens": (4e9, 100e9)}),
        "batch": Formula("B = 0.58 · D^0.571", "constants printed; range of the released runs", (Way(("horizon_tokens",)),), 0.58,
                         {"horizon_tokens": 0.571},
                         ranges={"params": (214_663_680, 1_073_741_824), "horizon_tokens": (4e9, 100e9)})})


def _kaplan_rate(params):
    return 0.003239 - 0.0001395 * math.log(params)


KAPLAN = Law(
    name="kaplan", title="Kaplan et al.: scaling laws", source="arXiv 2001.08361", parametrization="sp", optimizer=UNTOLD,
    schedule=UNTOLD, final_lr=UNTOLD, params_convention="non-embedding", batch_unit="tokens",
    formulas={"lr": Formula("η = 0.003239 − 0.0001395 · ln N", "constants as transcribed by arXiv 2503.04715, whose figure settles ln",
                            (Way(("params",)),), rule=_kaplan_rate)},
    lacking={"batch": "the constant of its critical batch could not be verified"})

BJORCK = Law(
    name="bjorck", title="Bjorck et al.: scaling over the token horizon", source="arXiv 2409.19913", parametrization="sp",
    optimizer="adamw", schedule=UNTOLD, final_lr=UNTOLD, params_convention=UNTOLD, batch_unit="fixed",
    formulas={"lr": Formula("η ∝ N^−0.23 · D^−0.32 at fixed batch", "exponents as transcribed by arXiv 2503.04715",
                            (Way(("params", "horizon_tokens")),), exponents={"params": -0.23, "horizon_tokens": -0.32})},
    lacking={"lr": "its constant has no verified unit; lr_ratio(params=(from, to), horizon_tokens=(from, to)) can be asked",
             "batch": "it holds the batch fixed"})

PORIAN = Law(
    name="porian", title="Porian et al.: resolving discrepancies", source="arXiv 2406.19146", parametrization="sp", optimizer=UNTOLD,
    schedule=UNTOLD, final_lr=UNTOLD, params_convention="with the output head", batch_unit="tokens",
    formulas={
        "lr": Formula("η = 3.7 · N^−0.36", "constants as transcribed by arXiv 2503.04715", (Way(("params",)),), 3.7, {"params": -0.36}),
        "batch": Formula("B = 0.7576 · N^0.703", "constants as transcribed by arXiv 2503.04715", (Way(("params",)),), 0.7576,
                         {"params": 0.703})})

FITTING = Law(
    name="fitting", title="Fitting or transfer: how to set the learning rate", source="arXiv 2601.05049 Eq. 6", parametrization="sp",
    optimizer=UNTOLD, schedule="wsd", final_lr=UNTOLD, params_convention=UNTOLD, batch_unit="fixed",
    formulas={"lr": Formula("η ∝ N^−0.2219 · D^−0.3509 at fixed batch", "exponents from summaries of the paper that agree",
                            (Way(("params", "horizon_tokens")),), exponents={"params": -0.2219, "horizon_tokens": -0.3509})},
    lacking={"lr": "the units of its constant 38.4588 are not published; "
                   "lr_ratio(params=(from, to), horizon_tokens=(from, to)) can be asked",
             "batch": "it holds the batch fixed"})

SCION = Law(
    name="scion", title="Norm transfer: unconstrained Scion without momentum", source="arXiv 2510.03871 (v1) §3.3",
    parametrization="norm", optimizer="scion", schedule="constant", final_lr="the peak; no warm-up", batch_unit="samples of 4096 tokens",
    params_convention="none in the law; fitted on one model of 69M",
    formulas={
        "lr": Formula("η = 2^9.8 · B^0.62 · D^−0.56", "printed; low and high: also the printed fit on nine horizons",
                      (Way(("horizon_tokens", "batch_sequences")), _from_tokens(4096, "horizon_tokens")), 2**9.8,
                      {"batch_sequences": 0.62, "horizon_tokens": -0.56},
                      ranges={"horizon_tokens": (2**31, 2**37), "batch_sequences": (32, 2048)},
                      other_fits=((2**9.1, {"batch_sequences": 0.55, "horizon_tokens": -0.53}),)),
        "batch": Formula("B = 0.009 · D^0.450 samples", "printed, the constant as 0.009 ± 0.013", (Way(("horizon_tokens",)),), 0.009 * 4096,
                         {"horizon_tokens": 0.450}, ranges={"horizon_tokens": (2**29, 2**37)})})

EXPERTS = "active_fraction taken as params_active / params_total; the law's own is active over all experts"


def _six_flops_of_experts(name):
    return Way((name, "horizon_tokens", "active_fraction"), lambda horizon_tokens, active_fraction, **n: {
        "compute": 6 * n[name] * horizon_tokens, "active_fraction": active_fraction}, FLOPS)


MOE_COMPUTE = (Way(("compute", "active_fraction")), _six_flops_of_experts("params_active"), _six_flops_of_experts("params"),
               Way(("params_active", "params_total", "horizon_tokens"), lambda params_active, params_total, horizon_tokens: {
                   "compute": 6 * params_active * horizon_tokens, "active_fraction": params_active / params_total}, f"{FLOPS}; {EXPERTS}"))
MOE_TOKENS = (Way(("horizon_tokens", "active_fraction")),
              Way(("horizon_tokens", "params_active", "params_total"), lambda horizon_tokens, params_active, params_total: {
                  "horizon_tokens": horizon_tokens, "active_fraction": params_active / params_total}, EXPERTS))

LING_MOE = Law(
    name="ling_moe", title="Hyperparameter scaling laws across MoE sparsity", source="Ling team, 9 Sep 2026", parametrization="sp",
    optimizer="muon", schedule="wsd", final_lr="exponential decay over the last 10 %; its end is not told", batch_unit="tokens",
    params_convention="none: C = M·D with M the active non-embedding FLOPs a token; A active over all experts",
    formulas={
        "lr": Formula("η = 0.8343 · C^−0.1385 · A^0.1361", "printed", MOE_COMPUTE, 0.8343, {"compute": -0.1385, "active_fraction": 0.1361},
                      ranges={"compute": (3e17, None), "active_fraction": (1 / 32, 1), "params_active": (10e6, 324e6)}),
        "batch": Formula("B = 6.4765 · D^0.5181 · A^−0.0841", "printed", MOE_TOKENS, 6.4765,
                         {"horizon_tokens": 0.5181, "active_fraction": -0.0841},
                         ranges={"horizon_tokens": (4.6e9, None), "active_fraction": (1 / 32, 1), "params_active": (10e6, 324e6)})})

POWER_LINES_RANGES = {"params": (111e6, 3.3e9), "horizon_tokens": (None, None)}
POWER_LINES = Law(
    name="power_lines", title="Power Lines: weight decay and batch", source="arXiv 2505.13738", parametrization="mup", optimizer="adamw",
    schedule=UNTOLD, final_lr=UNTOLD, params_convention=UNTOLD, batch_unit="sequences of 2048 tokens",
    formulas={
        "tau": Formula("τ = 1.084 · (D/N)^−0.527", "constants from reviews and two repositories that agree",
                       (Way(("params", "horizon_tokens")),), 1.084, {"params": 0.527, "horizon_tokens": -0.527},
                       ranges=POWER_LINES_RANGES),
        "weight_decay": Formula("λ = B / (η · D · τ)", "follows from τ", (Way(("params", "horizon_tokens", "batch_tokens", "peak_lr")),),
                                1 / 1.084, {"batch_tokens": 1, "peak_lr": -1, "horizon_tokens": -1 + 0.527, "params": -0.527},
                                ranges=POWER_LINES_RANGES),
        "batch": Formula("B = 0.0306 · D^0.383 sequences", "constants from reviews and two repositories that agree",
                         (Way(("horizon_tokens",)),), 0.0306 * 2048, {"horizon_tokens": 0.383}, ranges=POWER_LINES_RANGES)},
    lacking={"lr": "it takes the rate and sets the weight decay: weight_decay(peak_lr=…)"})

_ALL = (POWER, DEEPSEEK, MINICPM, STEPLAW, KAPLAN, BJORCK, PORIAN, FITTING, SCION, LING_MOE, POWER_LINES)
laws: Mapping[str, Law] = MappingProxyType({law.name: law for law in _ALL})


def find_law(name: str) -> Law:
    """The law of this name; ValueError naming those there are."""
    if name not in laws:
        raise ValueError(f"no law {name!r}; there are {', '.join(laws)}")
    return laws[name]


def lr_and_batch(law_name: str, **known) -> tuple[float | None, float | None]:
    """A law's (peak rate, batch in tokens) from whatever is known, None where it has none or needs more; nothing is warned of.

    Known are arguments by name, as `params`, `horizon_tokens`, `compute`, `batch_tokens`; a law that takes the batch for its
    rate takes `batch_tokens` if known, else its own. Raises ValueError for unknown laws and names and for what is not positive.
    """
    law = find_law(law_name)
    check_arguments(known)
    batch = law.answer_from("batch", known)
    if batch and not known.keys() & {"batch_tokens", "batch_sequences"}:
        known = known | {"batch_tokens": batch.value}
    return _value(law.answer_from("lr", known)), _value(batch)


def law_table() -> pd.DataFrame:
    """One row a law and quantity: law, quantity, equation, takes, source, evidence, parametrization, optimizer, schedule, final_lr,
    params_convention, batch_unit, fitted_on (the ranges as text).
    """
    shared = ("source", "parametrization", "optimizer", "schedule", "final_lr", "params_convention", "batch_unit")
    return pd.DataFrame([
        {"law": law.name, "quantity": quantity, "equation": formula.equation, "takes": ", ".join(formula.ways[0].takes),
         "evidence": formula.evidence, **{name: getattr(law, name) for name in shared},
         "fitted_on": "; ".join(f"{name} {range_text(*ends)}" for name, ends in formula.ranges.items()) or UNTOLD}
        for law in laws.values() for quantity, formula in law.formulas.items()])


def _value(answer: Answer | None) -> float | None:
    return None if answer is None else answer.value
