"""The loss along the straight line between the weights of two runs."""

from collections.abc import Sequence

import pandas as pd
import torch

from etastar.engine.run import Run


@torch.no_grad()
def loss_between(before: Run, after: Run, shares: Sequence[float] = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)) -> pd.DataFrame:
    """Validation loss of (1 − share) · weights of `before` + share · weights of `after`, in nats per token: one row a share.

    Before and after a cooldown the line leads down into a basin (arXiv 2405.18392, Fig. 7). Raises ValueError for runs of another
    model, corpus or parametrization, and for one that diverged.
    """
    for name in ("model", "corpus", "parametrization"):
        given = [getattr(run.recipe, name) for run in (before, after)]
        if given[0] != given[1]:
            raise ValueError(f"runs {before.run_id} and {after.run_id} are not of one {name}: {given[0]} and {given[1]}; "
                             "no line leads from one's weights to the other's")
    start, end = (run.model().parameters_by_name() for run in (before, after))
    ends = {0.0: before.val_loss, 1.0: after.val_loss}  # the same bits as validated again
    losses = [ends[share] if share in ends else before.validate({name: start[name].lerp(end[name], share) for name in start})[0]
              for share in shares]
    return pd.DataFrame({"share": [float(share) for share in shares], "val_loss": losses})
