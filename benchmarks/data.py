"""Tokens a second out of the corpus: `batch` against torch's DataLoader and nanoGPT's get_batch over the same windows."""

import itertools
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.crew import apart
from benchmarks.rows import in_turns
from benchmarks.shapes import recipe_of, shapes
from etastar.text.batches import batch, epoch_sequences
from etastar.text.corpora import prepare

REFERENCE = "torch DataLoader"
TURN_SECONDS = 0.2


class Windows(torch.utils.data.Dataset):
    """The windows that `batch` draws from, one an item."""

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context

    def __len__(self):
        return epoch_sequences(len(self.tokens), self.context)

    def __getitem__(self, i):
        return torch.from_numpy(self.tokens[i * self.context : (i + 1) * self.context + 1].astype(np.int64))


def rows(options) -> Iterator[dict]:
    """A row a shape and way, on one thread; no way has helpers, since on a CPU all cores train."""
    for shape in shapes(options.shapes, options.device):
        yield from apart("data:measure", shape.name, options.device, options.rounds)


def measure(shape_name: str, device: str, rounds: int) -> list[dict]:
    """All ways in turns; called in a one-thread process."""
    recipe = recipe_of(shapes([shape_name], device)[0], device)
    tokens, context, size = prepare(recipe.corpus).train, recipe.model.context, recipe.batch_sequences
    loader = torch.utils.data.DataLoader(Windows(tokens, context), size, shuffle=True, drop_last=True)
    starts = torch.randint(len(tokens) - context, (100, size)).tolist()
    ways = {
        "batch": (torch.from_numpy(batch(tokens, context, 0, i, size)) for i in itertools.count()),
        REFERENCE: itertools.chain.from_iterable(itertools.repeat(loader)),
        "nanoGPT get_batch": (torch.stack([torch.from_numpy(tokens[i : i + context + 1].astype(np.int64)) for i in some])
                              for some in itertools.cycle(starts)),
    }
    measured = in_turns({way: lambda batches=batches: _tokens_per_s(batches, context) for way, batches in ways.items()}, rounds)
    return [{"bench": "data", "shape": shape_name, "way": way, "tokens_per_s": statistics.median(speeds), "reference": REFERENCE,
             "ratio": statistics.median(own / of for own, of in zip(speeds, measured[REFERENCE], strict=True)), "threads": 1,
             "rounds": rounds} for way, speeds in measured.items()]


def _tokens_per_s(batches, context: int) -> float:
    began, tokens = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < TURN_SECONDS:
        tokens += len(next(batches)) * context
    return tokens / spent
