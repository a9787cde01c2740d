"""The processes of one way, started once and asked all at once; and functions run in a process of their own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.ways import Layout
from etastar.engine.environment import one_thread_environment

ROOT = Path(__file__).resolve().parents[1]


class CrewFailed(RuntimeError):
    """A process of a crew ended; the message holds the last line it wrote."""


class Crew:
    """All processes of a way in a layout. Starting returns at once, `ready` waits until every one can train."""

    def __init__(self, way: str, shape: str, device: str, precision: str, layout: Layout):
        self.way, self.layout = way, layout
        self.folder = tempfile.TemporaryDirectory(prefix="etastar-bench-")  # its own compiler cache: every compile_s is a cold one
        job = json.dumps({"way": way, "shape": shape, "device": device, "precision": precision, "threads": layout.threads,
                          "slots": layout.slots})
        environment = environment_of(layout.threads, way.startswith("engine")) | {"TORCHINDUCTOR_CACHE_DIR": self.folder.name}
        self.logs = [Path(self.folder.name) / f"{i}.log" for i in range(layout.processes)]
        self.processes = []
        for log in self.logs:
            with open(log, "w") as file:
                self.processes.append(subprocess.Popen([sys.executable, "-m", "benchmarks.worker", job], cwd=ROOT, env=environment,
                                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True))

    def ready(self) -> float:
        """Wait; seconds spent compiling, those of the slowest process."""
        return max(told["compile_s"] for told in self._hear())

    def tokens_per_s(self, seconds: float) -> float:
        """A turn of training, summed over the processes."""
        return sum(told["tokens_per_s"] for told in self._ask({"train_seconds": seconds}))

    def gemm_gflops(self, seconds: float) -> float:
        """Matrix products in all processes at once, summed."""
        return sum(told["gemm_gflops"] for told in self._ask({"gemm_seconds": seconds}))

    def peak_bytes(self) -> int:
        """Most memory so far, summed over the processes."""
        return sum(told["peak_bytes"] for told in self._ask({}))

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            try:
                process.stdin.close()
            except BrokenPipeError:
                pass
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:  # still compiling, or in a long step
                process.kill()
                process.wait()
            process.stdout.close()
        self.folder.cleanup()

    def _ask(self, body: dict) -> list[dict]:
        for process in self.processes:
            try:
                process.stdin.write(json.dumps(body) + "\n")
                process.stdin.flush()
            except BrokenPipeError:  # it died; hearing nothing from it says so
                pass
        return self._hear()

    def _hear(self) -> list[dict]:
        heard = [process.stdout.readline() for process in self.processes]
        for line, log in zip(heard, self.logs, strict=True):
            if not line:
                said = log.read_text(errors="replace").strip().splitlines() or ["(it wrote nothing)"]
                raise CrewFailed(f"{self.way}: {said[-1]}")
        return [json.loads(line) for line in heard]


def environment_of(threads: int, engine: bool) -> dict[str, str]:
    """The environment in which the engine starts its workers, or the caller's own with a number of threads; benchmarks/ to import."""
    theirs = one_thread_environment()
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), theirs["PYTHONPATH"]])}
    if engine:
        return theirs | path
    return {**os.environ, **{name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}, **path}


def apart(function: str, *arguments, engine: bool = False):
    """What "module:function" of benchmarks returns (JSON) in a fresh one-thread process, whose memory is its own."""
    module, name = function.split(":")
    code = f"import json, sys; from benchmarks.{module} import {name} as f; print('\\n' + json.dumps(f(*json.loads(sys.argv[1]))))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], cwd=ROOT, env=environment_of(1, engine), text=True,
                          capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{function} failed: {(done.stderr.strip().splitlines() or ['(it wrote nothing)'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
