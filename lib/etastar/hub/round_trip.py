"""Whether an exported run is the run: its bits read back, and its logits by transformers' own code."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import torch

from etastar.engine.run import Run
from etastar.engine.slots import validate
from etastar.hub.folders import WEIGHTS, load_checkpoint
from etastar.text.batches import validation_batches
from etastar.text.corpora import prepare

AGREE = 1e-5  # of a logit, or of the largest one where that is above 1: two codes in fp32


@dataclasses.dataclass(frozen=True)
class RoundTrip:
    """What came back of an export.

    `bits_equal`: every weight has the run's own bits. `val_loss` is worked out again from the folder, as the run did (nats per token).
    `logits_gap` is the largest difference of a logit between transformers' code and our decoder (NaN without transformers), beside
    `largest_logit`. `weight_bytes` is the size of model.safetensors.
    """

    bits_equal: bool
    val_loss: float
    logits_gap: float
    largest_logit: float
    weight_bytes: int

    @property
    def readers_agree(self) -> bool:
        """Whether both codes have the same logits, within AGREE."""
        return self.logits_gap <= AGREE * max(1.0, self.largest_logit)


def round_trip(run: Run, folder, sequences: int = 4) -> RoundTrip:
    """Read an exported run back by our decoder, and by transformers' AutoModelForCausalLM on so many held-out sequences.

    Raises ValueError where the folder cannot be read (`load_checkpoint`).
    """
    folder, tokens = Path(folder), prepare(run.recipe.corpus)
    ours = load_checkpoint(folder)
    mine, theirs = ours.parameters_by_name(), run.model().parameters_by_name()
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    val_loss, _, _ = validate(mine, ours.model, ours.scalars, tokens)
    some_BxT1, _ = next(validation_batches(tokens, ours.model.context))
    tokens_BxT = torch.from_numpy(some_BxT1[:sequences, :-1])
    with torch.no_grad():
        logits_BxTxV = ours(tokens_BxT)
        gap = _gap(folder, tokens_BxT, logits_BxTxV)
    return RoundTrip(same, val_loss, gap, float(logits_BxTxV.abs().max()), (folder / WEIGHTS).stat().st_size)


def _gap(folder: Path, tokens_BxT: torch.Tensor, logits_BxTxV: torch.Tensor) -> float:
    if importlib.util.find_spec("transformers") is None:
        return math.nan
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=logits_BxTxV.dtype)
    return float((model(tokens_BxT).logits - logits_BxTxV).abs().max())
