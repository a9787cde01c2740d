"""Loss curves of arXiv 2503.12811 (thu-yao-01-luo/MultiPowerLaw): nine schedules at each of 25M, 100M and 400M parameters."""

import re
from pathlib import PurePosixPath

import numpy as np
import pandas as pd

PEAK_LR = 3e-4
FLOOR = 0.1
WARMUP_STEPS = 2160
BATCH_TOKENS = 128 * 4096
SWITCH_STEP = 8000  # of the two-stage curves, which end at step 16000
TWO_STAGE_STEPS = 16000
FITTED_ON = ("constant_24000", "cosine_24000", "wsdcon_9")
JUDGED_ON = ("constant_72000", "cosine_72000", "wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_18")

_CURVE = re.compile(r"(?P<kind>constant|cosine|wsd|wsdld|wsdcon)_(?P<first>\d+)(?:_(?P<second>\d+))?")


def is_data(path: str) -> bool:
    """Whether a file of the repository is a loss curve."""
    return re.fullmatch(r"loss_curve_repo/csv_\d+/[^/]+\.csv", path) is not None and _CURVE.fullmatch(PurePosixPath(path).stem) is not None


def read(paths: dict) -> pd.DataFrame:
    """One row a curve: run, size, params (nominal), curve, schedule, steps, tokens, peak_lr, floor, warmup_steps, final_loss.

    The final loss is the last one logged, up to 128 steps before the end, in nats per token.
    """
    rows = []
    for run, logged in read_curves(paths).groupby("run", sort=False):
        first, last = logged.iloc[0], logged.iloc[-1]
        steps = total_steps(first["curve"])
        rates = learning_rates(first["curve"])
        rows.append({"run": run, "size": first["size"], "params": first["params"], "curve": first["curve"],
                     "schedule": _CURVE.fullmatch(first["curve"])["kind"], "steps": steps, "tokens": steps * BATCH_TOKENS,
                     "peak_lr": PEAK_LR, "floor": float(round(rates[-1] / PEAK_LR, 3)), "warmup_steps": WARMUP_STEPS,
                     "final_loss": last["loss"]})
    return pd.DataFrame(rows)


def read_curves(paths: dict) -> pd.DataFrame:
    """Long curves: run, size, params, curve, step, tokens, lr, loss; a row about every 128 steps from the end of warm-up on.

    ValueError where a logged rate is not that of the schedule its name tells.
    """
    parts = []
    for path, at in sorted(paths.items()):
        curve, millions = PurePosixPath(path).stem, int(PurePosixPath(path).parent.name.removeprefix("csv_"))
        logged = pd.read_csv(at).groupby("step", as_index=False).mean()
        rates = learning_rates(curve)
        if logged["step"].max() >= len(rates) or not np.allclose(rates[logged["step"]], logged["lr"], rtol=1e-6):
            raise ValueError(f"{path}: logged rates are not those of schedule {curve}")
        parts.append(logged.assign(run=f"{millions}M/{curve}", size=f"{millions}M", params=millions * 10**6, curve=curve,
                                   tokens=logged["step"] * BATCH_TOKENS))
    return pd.concat(parts, ignore_index=True)[["run", "size", "params", "curve", "step", "tokens", "lr", "loss"]]


def total_steps(curve: str) -> int:
    """Steps of a curve, from its name."""
    name = _parse(curve)
    return {"wsdcon": TWO_STAGE_STEPS, "wsd": name["second"], "wsdld": name["second"]}.get(name["kind"], name["first"])


def learning_rates(curve: str) -> np.ndarray:
    """The rate at each step of a curve named as the repository names them, warm-up included: float64 (steps,).

    constant_T, cosine_T (to 10 %), wsd_B_T and wsdld_B_T (from step B exponentially or linearly to 10 %), wsdcon_R (from step
    8000 on constant at R·1e-5); warm-up is a straight line from 0 at step 0 to the peak at step 2159.
    """
    name, steps = _parse(curve), total_steps(curve)
    step = np.arange(steps)
    if name["kind"] == "constant":
        factor = np.ones(steps)
    elif name["kind"] == "cosine":
        factor = FLOOR + (1 - FLOOR) * (1 + np.cos(np.pi * (step - WARMUP_STEPS) / (steps - WARMUP_STEPS))) / 2
    elif name["kind"] == "wsdcon":
        factor = np.where(step < SWITCH_STEP, 1.0, name["first"] * 1e-5 / PEAK_LR)
    else:
        x = np.clip((step - name["first"]) / (steps - name["first"]), 0, 1)
        factor = FLOOR**x if name["kind"] == "wsd" else 1 - (1 - FLOOR) * x
    factor[:WARMUP_STEPS] = np.linspace(0, 1, WARMUP_STEPS)
    return PEAK_LR * factor


def _parse(curve: str) -> dict:
    name = _CURVE.fullmatch(curve)
    if name is None or (name["kind"] in ("wsd", "wsdld")) != (name["second"] is not None):
        raise ValueError(f"no schedule is known for a curve named {curve!r}")
    return {"kind": name["kind"], "first": int(name["first"]), "second": int(name["second"]) if name["second"] else None}
