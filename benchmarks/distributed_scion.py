"""A training step with ScionOptimizer against torch's fused AdamW: in one process and on two ranks under DDP and FSDP2, bytes counted.

`python -m benchmarks.distributed_scion [--shapes S M] [--rounds 5] [--json]`. Each rank has one thread and its share of the batch; every
nn.Linear of the plain module is one matrix, so that all rows divide evenly and the bytes follow by arithmetic.
"""

import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from benchmarks.crew import apart
from benchmarks.plain import Plain
from benchmarks.rows import in_turns
from benchmarks.shapes import shapes
from etastar.optim.distributed_scion import ScionOptimizer, scion_groups

RANKS, STEPS_A_TURN, WARM_UP = 2, 3, 2
REFERENCE = "AdamW fused"
WAYS = [(way, optimizer) for way in ("one process", "DDP", "FSDP2") for optimizer in (REFERENCE, "Scion")]


def rows(options) -> Iterator[dict]:
    """A row a shape, way and optimizer: milliseconds of a step and of its optimizer, and bytes that all ranks send in it."""
    if options.device != "cpu":
        raise ValueError("distributed_scion measures two ranks of a CPU; leave --device out")
    for shape in shapes(options.shapes, options.device):
        for ranks in (1, RANKS):
            yield from apart("distributed_scion:measure", shape.name, ranks, options.rounds)


def measure(shape_name: str, ranks: int, rounds: int) -> list[dict]:
    """All ways of so many ranks in turns; called in a process of its own, which forks the ranks."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        told = fork.Queue()
        world = [fork.Process(target=_rank, args=(rank, ranks, folder, shape_name, rounds, told)) for rank in range(ranks)]
        for process in world:
            process.start()
        found = told.get(timeout=600)
        for process in world:
            process.join()
    return found


def _rank(rank: int, ranks: int, folder: str, shape_name: str, rounds: int, told) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    shape, taken = shapes([shape_name], "cpu")[0], [way for way in WAYS if (way[0] == "one process") == (ranks == 1)]
    trainings = {way: _training(shape, *way, rank, ranks) for way in taken}
    turns = {(way, part): turn for way, (_, _, *both) in trainings.items() for part, turn in zip(("step", "optimizer"), both, strict=True)}
    measured = in_turns(turns, rounds)
    counted = {way: _sent(optimizer, steps, ranks) for way, (optimizer, steps, *_) in trainings.items()}
    if rank == 0:
        told.put([_row(shape, way, ranks, rounds, measured, counted[way]) for way in trainings])
    if ranks > 1:
        dist.destroy_process_group()


def _training(shape, way: str, kind: str, rank: int, ranks: int):
    """(optimizer, count of its steps, a turn of training, a turn of the optimizer alone); a turn gives milliseconds a step."""
    inner = Plain(shape.model, shape.vocab)
    module = _shared(inner, way)
    tokens = torch.randint(shape.vocab, (shape.batch_tokens // shape.model.context, shape.model.context + 1),
                           generator=torch.Generator().manual_seed(0))[rank::ranks]
    optimizer = ScionOptimizer(scion_groups(inner), lr=2**-8, momentum=0.1) if kind == "Scion" else torch.optim.AdamW(
        inner.parameters(), lr=1e-3, fused=True)
    steps = itertools.count()

    def step():
        optimizer.zero_grad()
        module(tokens).backward()
        update()

    def update():
        next(steps)
        optimizer.step()

    for _ in range(WARM_UP):
        step()
    return optimizer, steps, lambda: _ms_a_step(step), lambda: _ms_a_step(update)


def _shared(module, way: str):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if way == "FSDP2":
        fully_shard(module)
    return DistributedDataParallel(module) if way == "DDP" else module


def _ms_a_step(step) -> float:
    began = time.perf_counter()
    for _ in range(STEPS_A_TURN):
        step()
    return 1e3 * (time.perf_counter() - began) / STEPS_A_TURN


def _sent(optimizer, steps, ranks: int) -> float | None:
    """Bytes a step that all ranks together sent for the optimizer, after the agreement of the first."""
    if ranks == 1 or not isinstance(optimizer, ScionOptimizer):
        return None
    mine = sum(count["sent"] for kind, count in optimizer.communicated_bytes.items() if kind != "agreement")
    total = torch.tensor(mine)
    dist.all_reduce(total)
    return total.item() / next(steps)


def closed_form_bytes(shape, way: str, ranks: int) -> float:
    """Bytes a step that all ranks send by arithmetic, where rows and work divide evenly.

    Of N numbers in hidden matrices, 4 bytes each: DDP sends every one to all other ranks. FSDP2 sends what is not its owner's there
    and back, and sums the squares of every gain, 8 bytes each, around the ring of ranks twice.
    """
    model = shape.model
    hidden, gains = model.depth * model.width * (4 * model.width + 3 * model.resolved_ffn_width), 2 * model.depth + 1
    return (ranks - 1) * (4 * hidden if way == "DDP" else 2 * 4 * hidden / ranks + 2 * 8 * gains)


def _row(shape, way, ranks, rounds, measured, sent) -> dict:
    own, reference = ({part: measured[(way[0], kind), part] for part in ("step", "optimizer")} for kind in (way[1], REFERENCE))
    return {"bench": "distributed_scion", "shape": shape.name, "way": way[0], "ranks": ranks, "optimizer": way[1],
            "step_ms": statistics.median(own["step"]), "optimizer_ms": statistics.median(own["optimizer"]), "reference": REFERENCE,
            "ratio": statistics.median(of / mine for mine, of in zip(own["step"], reference["step"], strict=True)),
            "sent_bytes_a_step": sent, "closed_form_bytes_a_step": sent and closed_form_bytes(shape, way[0], ranks),
            "device": "cpu", "precision": "fp32", "threads": 1, "rounds": rounds}


if __name__ == "__main__":
    from benchmarks.__main__ import _parser
    from benchmarks.rows import show

    given = _parser().parse_args(["train", *sys.argv[1:]])
    show(rows(given), given.json)
