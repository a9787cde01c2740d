"""What this machine can do: matrix products, memory bandwidth, and what a process with torch in it weighs."""

import resource
import time
from pathlib import Path

import torch

SIDE = {"cpu": 1024, "cuda": 8192}  # of the products timed; a GPU needs them larger to be busy
COPY_BYTES = 256 * 2**20


def measure(device: str) -> dict:
    """The machine row. Called in a fresh process: it begins with what torch alone takes."""
    a = torch.randn(SIDE["cpu"], SIDE["cpu"], device=device)
    torch.mm(a, a)
    torch_bytes = peak_bytes(device)
    from etastar.cores import cores  # not above: these imports weigh something too
    from etastar.engine.provenance import machine

    speed = {}
    for name, threads in (("one_thread", 1), ("all_cores", cores())):
        torch.set_num_threads(threads)
        speed[f"gemm_gflops_{name}"] = gemm_gflops("cpu")
        speed[f"copy_gb_per_s_{name}"] = copy_gb_per_s("cpu")
    if device == "cuda":
        speed |= {"gemm_gflops_gpu": gemm_gflops(device, "bf16"), "copy_gb_per_s_gpu": copy_gb_per_s(device)}
    told = machine()
    return {"bench": "machine", "device": device, "cpu": told["cpu"], "gpu": told["gpu"], "cores": cores(), "torch": told["torch"],
            "commit": told["commit"], **speed, "torch_bytes": torch_bytes}


def gemm_gflops(device: str, precision: str = "fp32", seconds: float = 0.2) -> float:
    """GFLOP/s of square matrix products (1024 a side on a CPU, 8192 on a GPU) over about `seconds`."""
    side = SIDE[device]
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    out = a @ a
    spent = _seconds_a_call(lambda: torch.mm(a, a, out=out), device, seconds)
    return 2 * side**3 / spent / 1e9


def copy_gb_per_s(device: str, seconds: float = 0.3) -> float:
    """GB/s of a copy of 256 MiB, each byte read once and written once (STREAM's way of counting)."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES / _seconds_a_call(lambda: target.copy_(source), device, seconds) / 1e9


def _seconds_a_call(call, device: str, seconds: float) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    wait()
    began, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not calls:
        call()
        wait()
        calls += 1
    return spent / calls


def peak_bytes(device: str) -> int:
    """Most memory so far: the GPU's, or this process's own.

    VmHWM and not ru_maxrss where Linux tells it: the latter is at least what the parent had when it started this process.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
