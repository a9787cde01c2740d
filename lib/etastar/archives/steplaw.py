"""Runs of arXiv 2503.04715 (step-law/steplaw), dense models: 17 grids of learning rate by batch size, 215M to 1.07B parameters.

AdamW, cosine to the fixed rate 1e-5 (not a share of the peak), 2048 tokens a sequence, one run a point of a grid. The held-out
cell of the paper (1.07B, 100B tokens) is not among the released rows. The files carry no licence: they are read, never copied.
"""

import pandas as pd

SEQUENCE_TOKENS = 2048
FLOOR_LR = 1e-5
GRID = "data/dense_lr_bs_loss.csv"
BOOTSTRAP = "data/1004_fitted_lr_bs_scaling_model_parameters.csv"
COLUMNS = {"exp_name": "run", "N": "params", "D": "horizon_tokens", "lr": "peak_lr", "bs": "batch_sequences", "ti": "steps",
           "loss": "loss", "smooth loss": "smooth_loss", "h": "width", "numl": "depth", "numh": "heads", "ffnh": "ffn_width"}
COEFFICIENTS = {"lr_intercept": "log_lr_prefactor", "lr_coefN": "lr_params_exponent", "lr_coefD": "lr_tokens_exponent",
                "bs_intercept": "log_batch_prefactor", "bs_coefD": "batch_tokens_exponent"}


def is_data(path: str) -> bool:
    """Whether a file of the repository is the grid or the paper's bootstrap."""
    return path in (GRID, BOOTSTRAP)


def read(paths: dict) -> pd.DataFrame:
    """One row a run: run, cell, params, horizon_tokens, peak_lr, batch_tokens, batch_sequences, steps, loss, smooth_loss, width,
    depth, heads, ffn_width.

    `params` leave out the embedding and the head. Losses are on training data in nats per token, the last one logged and the
    authors' Gaussian smoothing of it, which they fit to. A cell is one size at one horizon, as "215M, 100B"; `steps` × `batch_tokens`
    is its horizon within 0.3 %. Diverged runs are kept with the finite losses they were logged with.
    """
    frame = renamed(_table(paths, GRID), COLUMNS, GRID)
    return with_cells(frame)[["run", "cell", "params", "horizon_tokens", "peak_lr", "batch_tokens", "batch_sequences", "steps", "loss",
                              "smooth_loss", "width", "depth", "heads", "ffn_width"]]


def read_bootstrap(paths: dict) -> pd.DataFrame:
    """The coefficients of the paper's 1,000 bootstraps: log_lr_prefactor, lr_params_exponent, lr_tokens_exponent,
    log_batch_prefactor, batch_tokens_exponent.

    Natural logarithms; the rate is in params (no embedding, no head) and tokens, the batch in tokens of tokens. The paper's
    law is their mean.
    """
    return renamed(_table(paths, BOOTSTRAP), COEFFICIENTS, BOOTSTRAP)


def renamed(table: pd.DataFrame, columns: dict, path: str) -> pd.DataFrame:
    """The columns of a published table under our names; ValueError names those it lacks."""
    if lacking := [name for name in columns if name not in table]:
        raise ValueError(f"{path}: no column {', '.join(map(repr, lacking))}; it has {', '.join(map(str, table))}")
    return table.rename(columns=columns)[list(columns.values())]


def with_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds batch_tokens, and the cell told by params and horizon_tokens; by size, horizon, batch and rate."""
    names = [f"{short(n)}, {d / 1e9:g}B" for n, d in zip(frame["params"], frame["horizon_tokens"], strict=True)]
    frame = frame.assign(cell=names, batch_tokens=frame["batch_sequences"] * SEQUENCE_TOKENS)
    return frame.sort_values(["params", "horizon_tokens", "batch_tokens", "peak_lr"], ignore_index=True)


def short(params: float) -> str:
    """A count of parameters as "215M" or "1.07B"."""
    return f"{params / 1e6:.0f}M" if params < 1e9 else f"{params / 1e9:.2f}B"


def _table(paths: dict, path: str) -> pd.DataFrame:
    if path not in paths:
        raise FileNotFoundError(f"archive steplaw: {path} is not here; run `etastar fetch archives steplaw`")
    return pd.read_csv(paths[path])
