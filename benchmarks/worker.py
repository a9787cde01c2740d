"""A process that trains one shape in one way when it is its turn, and otherwise sleeps.

`python -m benchmarks.worker JOB` answers each JSON line on its standard input with one on its standard output.
"""

import json
import os
import signal
import sys
import time

WARM_STEPS = 2
CHUNK_SECONDS = 0.1


def main() -> None:
    """Build, report how long that took, then take turns until the input ends."""
    job = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes our input
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes to the log

    import torch

    from benchmarks.machine import gemm_gflops, peak_bytes
    from benchmarks.shapes import shapes
    from benchmarks.ways import build

    torch.set_num_threads(job["threads"])
    torch.set_flush_denormal(True)
    device, shape = job["device"], shapes([job["shape"]], job["device"])[0]
    train = build(job["way"], shape, device, job["slots"])
    first, later = seconds_of(train, WARM_STEPS), seconds_of(train, WARM_STEPS)
    chunk = max(1, round(CHUNK_SECONDS * WARM_STEPS / later))
    tell(pipe, {"compile_s": max(0.0, first - later)})
    for line in sys.stdin:
        asked = json.loads(line)
        if "train_seconds" in asked:
            steps, seconds = turn(train, chunk, asked["train_seconds"])
            tell(pipe, {"tokens_per_s": steps * job["slots"] * shape.batch_tokens / seconds})
        elif "gemm_seconds" in asked:
            tell(pipe, {"gemm_gflops": gemm_gflops(device, job["precision"], asked["gemm_seconds"])})
        else:
            tell(pipe, {"peak_bytes": peak_bytes(device)})


def turn(train, chunk: int, seconds: float) -> tuple[int, float]:
    """Train in chunks of steps for at least so many seconds: (steps, seconds)."""
    began, steps = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not steps:
        train(chunk)
        steps += chunk
    return steps, spent


def seconds_of(train, steps: int) -> float:
    """Seconds of some steps."""
    began = time.perf_counter()
    train(steps)
    return time.perf_counter() - began


def tell(pipe, body: dict) -> None:
    """One answer; a parent that is gone needs none."""
    try:
        pipe.write(json.dumps(body) + "\n")
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
