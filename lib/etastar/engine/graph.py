"""Training steps that read all they need from tables on the device, so that a GPU can record one step and replay it.

The host fills the tables for a stretch of steps (which windows of the corpus, which rates), starts the steps without waiting,
and reads losses and gradient norms back once. On a GPU the step is captured as a CUDA graph at first use: from then on a step is
one launch. Captured kernels hold addresses, so no tensor that a step touches is ever replaced while the stack lives.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from etastar.text.batches import epoch_sequences, sequence_index
from etastar.text.corpora import TokenSet

TABLE_STEPS = 512  # rows of the tables: the longest stretch between two read-backs
WARM_UP_STEPS = 3  # torch asks for some before a capture: libraries, compilers and allocators settle in them

Step = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # tokens (M, B, T + 1), lr (M,) -> loss, norm (M,)


@functools.lru_cache(maxsize=2)
def resident(tokens: TokenSet, device: torch.device) -> torch.Tensor:
    """The training tokens on a device, (tokens,) int16: the 16 bits of a uint16, which few operations take."""
    return torch.from_numpy(np.array(tokens.train).view(np.int16)).to(device)


class StepTables:
    """Tables of a stack of M slots and the loop over them; `train` runs any number of steps.

    `graphed` captures the step at first use and replays it. `rows` is how many steps the tables hold.
    """

    def __init__(self, tokens: TokenSet, context: int, slots: int, batch_sequences: int, device: torch.device, graphed: bool,
                 rows: int = TABLE_STEPS):
        self.corpus, self.context, self.rows, self.graphed = resident(tokens, device), context, rows, graphed
        self.sequences, self.batch_sequences = epoch_sequences(tokens.train_tokens, context), batch_sequences
        self.offset_T = torch.arange(context + 1, device=device)
        self.at_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.window_SxMxB = torch.zeros(rows, slots, batch_sequences, dtype=torch.int64, device=device)
        self.lr_SxM = torch.zeros(rows, slots, dtype=torch.float64, device=device)
        self.told_2xSxM = torch.zeros(2, rows, slots, device=device)  # losses and gradient norms
        self.host = [torch.zeros(t.shape, dtype=t.dtype, pin_memory=device.type == "cuda") for t in (self.window_SxMxB, self.lr_SxM)]
        self.ahead: dict[tuple[int, int], np.ndarray] = {}
        self.graph: torch.cuda.CUDAGraph | None = None

    def train(self, step: Step, alive_M: torch.Tensor, seeds: Sequence[int | None], first: Sequence[int],
              lr_MxS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run S steps: losses and gradient norms (M, S). Slot m sees the batches `first[m]` … of data seed `seeds[m]`.

        A seed of None is an idle slot, which sees any batch. `alive_M` is what `step` freezes slots by.
        """
        told = []
        for begin in range(0, lr_MxS.shape[1], self.rows):
            part_MxS, starts = lr_MxS[:, begin : begin + self.rows], [step_number + begin for step_number in first]
            self.launch(step, alive_M, seeds, starts, part_MxS)
            self._look_ahead(seeds, starts, part_MxS.shape[1])
            told.append(self.told_2xSxM[:, : part_MxS.shape[1]].to("cpu", copy=True))  # the one place where the host waits
        loss_SxM, norm_SxM = torch.cat(told, dim=1).numpy()
        return np.ascontiguousarray(loss_SxM.T), np.ascontiguousarray(norm_SxM.T)

    def launch(self, step: Step, alive_M: torch.Tensor, seeds: Sequence[int | None], first: Sequence[int], lr_MxS: np.ndarray) -> None:
        """Fill the tables and start up to `rows` steps; on a GPU, once the step is captured, without waiting for anything."""
        count = lr_MxS.shape[1]
        window_SxMxB, lr_SxM = self.host
        for slot, (seed, start) in enumerate(zip(seeds, first, strict=True)):
            if seed is not None:
                window_SxMxB[:count, slot] = torch.from_numpy(self._windows(seed, start, count))
        lr_SxM[:count] = torch.from_numpy(np.ascontiguousarray(lr_MxS.T))
        for table, host in zip((self.window_SxMxB, self.lr_SxM), self.host, strict=True):
            table[:count].copy_(host[:count], non_blocking=True)  # the read-back keeps the next fill from overtaking it
        if self.graphed and self.graph is None:
            self._capture(step, alive_M)
        self.at_1.zero_()
        for _ in range(count):
            self.graph.replay() if self.graphed else self._once(step)

    def _once(self, step: Step) -> None:
        """One step from row `at` of the tables, and on to the next row: nothing in it depends on a number the host knows."""
        window_MxB = self.window_SxMxB.index_select(0, self.at_1)[0]
        place_MxBxT = window_MxB[..., None] * self.context + self.offset_T
        tokens_MxBxT = self.corpus.index_select(0, place_MxBxT.flatten()).view(place_MxBxT.shape).long() & 0xFFFF
        told_2xM = torch.stack(step(tokens_MxBxT, self.lr_SxM.index_select(0, self.at_1)[0]))
        self.told_2xSxM.index_copy_(1, self.at_1, told_2xM[:, None])
        self.at_1 += 1

    def _capture(self, step: Step, alive_M: torch.Tensor) -> None:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.rehearse(step, alive_M)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records; nothing is computed
            self._once(step)
        self.graph = graph

    def rehearse(self, step: Step, alive_M: torch.Tensor) -> None:
        """Some steps with every slot frozen: all is compiled and allocated, and not one bit of any slot's state has changed."""
        held_M = alive_M.clone()
        alive_M.zero_()
        self.at_1.zero_()
        for _ in range(WARM_UP_STEPS):
            self._once(step)
            self.at_1.zero_()
        alive_M.copy_(held_M)

    def _windows(self, seed: int, start: int, count: int) -> np.ndarray:
        """Windows of steps `start` … `start` + `count` − 1 of a data seed: int64 (count, B)."""
        known = self.ahead.get((seed, start))
        if known is None or len(known) < count:
            j = np.arange(start * self.batch_sequences, (start + count) * self.batch_sequences)
            known = self.ahead[seed, start] = sequence_index(seed, j, self.sequences).reshape(count, self.batch_sequences)
        return known[:count]

    def _look_ahead(self, seeds: Sequence[int | None], first: Sequence[int], count: int) -> None:
        """Work out the next stretch's windows while the device is busy with this one; whether they are used changes no bit."""
        self.ahead = {}
        for seed, start in zip(seeds, first, strict=True):
            if seed is not None and self.graphed:
                self._windows(seed, start + count, count)


def to_host(tensors: Sequence[torch.Tensor], stream: torch.cuda.Stream) -> list[torch.Tensor]:
    """CPU copies of device tensors as they are now, through `stream`; waits for these copies and for nothing queued after them."""
    clones = [t.detach().clone() for t in tensors]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in clones]
        done = torch.cuda.Event()
        done.record()
    done.synchronize()  # the clones are freed after it, so the allocator cannot hand them out while they are read
    return copies
