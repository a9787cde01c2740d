"""Which kernels a stack uses on a GPU: attention by measurement, and only deterministic ones where a recipe asks for that."""

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from etastar.recipe import Execution, Model

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")  # those that torch takes for deterministic
ROUNDS, REPEATS = 10, 3


def fix_workspace() -> None:
    """Give cuBLAS the fixed workspace that determinism needs; RuntimeError where this process used CUDA before."""
    if os.environ.get(WORKSPACE) in FIXED_WORKSPACES:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(f"deterministic=True needs {WORKSPACE}=:4096:8 before CUDA is first used, and this process has used it; "
                           'set it in the environment and start Python again, or run with backend="local"')
    os.environ[WORKSPACE] = FIXED_WORKSPACES[0]


@contextlib.contextmanager
def determinism(wanted: bool):
    """Within it torch takes deterministic kernels only and refuses what has none; nothing where it is not wanted."""
    if not wanted:
        yield
        return
    mode, filled = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every buffer is written before it is read; filling costs time
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def kernels(execution: Execution, model: Model, sequences: int, device: torch.device):
    """What a step on a GPU stands in: determinism as asked, and the attention that is best for so many sequences; nothing on a CPU."""
    if device.type == "cpu":
        yield
        return
    dtype = torch.bfloat16 if execution.precision == "bf16" else torch.float32
    with determinism(execution.deterministic):
        backend = attention_backend(sequences, model.heads, model.resolved_kv_heads, model.context, model.head_dim, dtype, device,
                                    execution.deterministic)
        with sdpa_kernel(backend):
            yield


@functools.lru_cache(maxsize=256)
def attention_backend(sequences: int, heads: int, kv_heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device,
                      deterministic: bool) -> SDPBackend:
    """The attention that takes least time forward and backward at this shape here, measured once a process.

    Where bits must repeat from process to process a stopwatch may not choose: then the first that works of a fixed order.
    """
    shapes = [(sequences, length, heads, head_dim), *[(sequences, length, kv_heads, head_dim)] * 2]
    tensors = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]  # laid out as the decoder's
    return choose(lambda backend: _seconds(backend, *tensors), deterministic)


def choose(seconds: Callable[[SDPBackend], float | None], deterministic: bool) -> SDPBackend:
    """The fastest backend, None meaning that it does not work here; the first that works if `deterministic`, never cuDNN's."""
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    took = {}
    for backend in order if deterministic else [*order, SDPBackend.CUDNN_ATTENTION]:
        if (found := seconds(backend)) is not None:
            took[backend] = found
            if deterministic:
                break
    if not took:
        raise RuntimeError("no attention of torch works at this shape on this device")
    return min(took, key=took.get)


def _seconds(backend: SDPBackend, q_SxTxAxH, k_SxTxKxH, v_SxTxKxH) -> float | None:
    """Seconds of a forward and a backward pass; None where the backend refuses the shape, the type, the mode or the memory."""
    device, best = q_SxTxAxH.device, float("inf")
    leaves = q_SxTxAxH, k_SxTxKxH, v_SxTxKxH

    def passes(rounds):
        for _ in range(rounds):
            q, k, v = (t.transpose(1, 2) for t in leaves)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    try:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells why a backend is not available
            passes(ROUNDS)
            for _ in range(REPEATS):
                began = time.perf_counter()
                passes(ROUNDS)
                best = min(best, time.perf_counter() - began)
    except RuntimeError:
        return None
    return best / ROUNDS
