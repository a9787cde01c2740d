"""Runs of arXiv 2503.04715 (step-law/steplaw), mixtures of experts: 16 grids of learning rate by batch size at 2.15B parameters.

The paper's law takes the TOTAL parameters of a mixture for its N; `params_active` stands beside them. The file carries no
licence: it is read, never copied.
"""

import pandas as pd

from etastar.archives.steplaw import COLUMNS, SEQUENCE_TOKENS, renamed, short, with_cells

GRID = "data/moe_lr_bs_loss.csv"
MOE_COLUMNS = COLUMNS | {"Na": "params_active", "seq_len": "sequence_tokens", "topk": "experts_active", "nume": "experts",
                         "moeh": "expert_width"}


def is_data(path: str) -> bool:
    """Whether a file of the repository is the grid of mixtures."""
    return path == GRID


def read(paths: dict) -> pd.DataFrame:
    """One row a run: run, cell, params, params_active, horizon_tokens, peak_lr, batch_tokens, batch_sequences, steps, loss,
    smooth_loss, width, depth, heads, ffn_width, experts, experts_active, expert_width.

    `params` are the total without embedding and head, as in the paper's law; a cell is told by the active ones, since the total is
    one and the same. Losses as in the dense archive. ValueError for sequences of another length than the law's 2048.
    """
    frame = renamed(pd.read_csv(paths[GRID]), MOE_COLUMNS, GRID)
    if other := sorted(set(frame["sequence_tokens"]) - {SEQUENCE_TOKENS}):
        raise ValueError(f"{GRID}: sequences of {', '.join(map(str, other))} tokens; this reader knows {SEQUENCE_TOKENS} alone")
    frame = with_cells(frame)
    active = [f"{short(n)} of {cell}" for n, cell in zip(frame["params_active"], frame["cell"], strict=True)]
    return frame.assign(cell=active)[["run", "cell", "params", "params_active", "horizon_tokens", "peak_lr", "batch_tokens",
                                      "batch_sequences", "steps", "loss", "smooth_loss", "width", "depth", "heads", "ffn_width",
                                      "experts", "experts_active", "expert_width"]]
