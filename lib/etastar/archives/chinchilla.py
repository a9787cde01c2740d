"""Runs of arXiv 2203.15556 as digitised from its figure by arXiv 2404.10102 (epoch-research/analyzing-chinchilla): 245 points.

Losses were read off a colour scale: they take 99 values, so runs of one colour tie. The file carries no licence: it is read,
never copied.
"""

import pandas as pd

RUNS = "data/svg_extracted_data.csv"
OUTLIERS = 5  # arXiv 2404.10102 leaves the five highest losses out of its fit
COLUMNS = {"Model Size": "params", "Training FLOP": "compute", "loss": "loss", "hex_color": "colour"}


def is_data(path: str) -> bool:
    """Whether a file of the repository is the digitised runs."""
    return path == RUNS


def read(paths: dict) -> pd.DataFrame:
    """One row a run: run, params, tokens, compute, loss, colour, outlier, by falling loss.

    Params and compute (FLOPs) are as digitised from the figure's axes; tokens = compute / (6 · params); losses in nats per token.
    `outlier` marks the five highest losses: by loss, since the rows of the file are in no order to rely on. Raises ValueError
    for a file without these columns or where two colours of one row disagree.
    """
    table = pd.read_csv(paths[RUNS])
    if lacking := [name for name in (*COLUMNS, "color") if name not in table]:
        raise ValueError(f"{RUNS}: no column {', '.join(map(repr, lacking))}; it has {', '.join(map(str, table))}")
    if (unlike := table["color"] != table["hex_color"]).any():
        raise ValueError(f"{RUNS}: {int(unlike.sum())} rows name two colours, row {int(unlike.idxmax())} for example")
    frame = table.rename(columns=COLUMNS)[list(COLUMNS.values())]
    frame = frame.sort_values(["loss", "params", "compute"], ascending=False, ignore_index=True)
    frame = frame.assign(tokens=frame["compute"] / (6 * frame["params"]), outlier=frame.index < OUTLIERS,
                         run=[f"{n / 1e6:.0f}M, {c:.2e} FLOPs" for n, c in zip(frame["params"], frame["compute"], strict=True)])
    return frame[["run", "params", "tokens", "compute", "loss", "colour", "outlier"]]
