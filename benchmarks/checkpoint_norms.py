"""The norms of a checkpoint of PowerLM-3B's shape, streamed from float32 shards: memory, and time beside singular values.

`etastar bench checkpoint_norms --shapes PowerLM-3B` writes 14 GB of random weights into the folder for temporary files and removes them
afterwards; without it two of the forty layers do. Peak memory is a process's resident set, in which pages mapped from files count.
"""

import dataclasses
import json
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.crew import apart
from benchmarks.machine import peak_bytes
from etastar.model.granite import granite_config, to_granite_state
from etastar.model.parametrization import Scalars
from etastar.model.shapes import parameter_shapes
from etastar.model.stored import INDEX
from etastar.recipe import Model

REFERENCE = "torch.linalg.matrix_norm"
VOCAB, SHARD_BYTES, BLOCK = 49_152, 5e9, 2**22
POWERLM = Model(width=2304, depth=40, head_dim=64, context=4096, ffn_width=9216)  # arXiv 2408.13359 Table 4
SHAPES = {"PowerLM-3B": POWERLM, "PowerLM-3B-2-layers": dataclasses.replace(POWERLM, depth=2)}


def rows(options) -> Iterator[dict]:
    """A row a shape."""
    asked = [name for name in options.shapes or () if name in SHAPES]
    if options.bench == "checkpoint_norms" and (unknown := sorted(set(options.shapes or ()) - set(SHAPES))):
        raise ValueError(f"unknown shape {unknown[0]!r} of checkpoint_norms; known: {', '.join(SHAPES)}")
    for name in asked or list(SHAPES)[1:]:
        with tempfile.TemporaryDirectory(prefix="etastar-bench-") as folder:
            apart("checkpoint_norms:write", folder, name)
            yield {"bench": "checkpoint_norms", "shape": name} | apart("checkpoint_norms:measure", folder)


def write(folder: str, name: str) -> None:
    """A granite folder of random float32 weights, in shards, some rows at a time."""
    model = SHAPES[name]
    nothing = {name: torch.empty(shape, device="meta") for name, shape in parameter_shapes(model, VOCAB).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in to_granite_state(nothing, model).items()}
    config = granite_config(model, VOCAB, Scalars(12.0, 0.22, 1 / 64, 8.0))
    (Path(folder) / "config.json").write_text(json.dumps(config))
    shards, bytes_left = [], 0
    for name, shape in shapes.items():
        if bytes_left < (size := _bytes(shape)):
            shards.append({})
            bytes_left = SHARD_BYTES
        shards[-1][name] = shape
        bytes_left -= size
    stream, where = torch.Generator().manual_seed(0), {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(Path(folder) / file, shard, stream)
        where |= dict.fromkeys(shard, file)
    (Path(folder) / INDEX).write_text(json.dumps({"weight_map": where}))


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], stream: torch.Generator) -> None:
    """A safetensors file of these float32 tensors, drawn from a normal distribution of deviation 0.02 as they are written."""
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at := at + _bytes(shape)]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        for left in range(at // 4, 0, -BLOCK):
            torch.randn(min(BLOCK, left), generator=stream).mul_(0.02).numpy().tofile(file)


def measure(folder: str) -> dict:
    """Norms of a folder, and of one MLP matrix by either way. Called in a fresh process, whose memory is its own."""
    from etastar.hub.measure import checkpoint_norms
    from etastar.model.norms import operator_norms

    torch.set_num_threads(1)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    torch_bytes, began, worked = peak_bytes("cpu"), time.perf_counter(), time.process_time()
    table = checkpoint_norms(folder)
    seconds, cpu_seconds, peak = time.perf_counter() - began, time.process_time() - worked, peak_bytes("cpu")
    w = torch.randn(POWERLM.resolved_ffn_width, POWERLM.width, generator=torch.Generator().manual_seed(1))
    matrix_s, reference_s = _seconds(lambda: operator_norms(w)), _seconds(lambda: torch.linalg.matrix_norm(w, 2))
    return {"file_bytes": sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")), "matrices": len(table),
            "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "torch_bytes": torch_bytes,
            "widest_bound": float(table["spectral_error"].max()), "matrix_s": matrix_s, "reference": REFERENCE,
            "reference_s": reference_s, "ratio": reference_s / matrix_s, "device": "cpu", "threads": 1}


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(shape).numel()


def _seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
