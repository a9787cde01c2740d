"""Losses of the averages of finished runs: validated by one-thread processes side by side, and kept in the store.

What was validated stands in store/.averages/RUN_ID.json, one entry a read-out; a file that is not whole is made again.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from etastar.cores import cores
from etastar.engine.checkpoint import Damaged, read_json, write_json
from etastar.engine.environment import one_thread_environment

FEW = 8  # losses that this process works out itself sooner than others start


def kept_losses(store: Path, run_id: str) -> dict[str, dict]:
    """The losses of a run's read-outs that were worked out before, by what `read_out_key` calls them."""
    try:
        return read_json(_file(store, run_id))
    except Damaged:
        return {}


def keep_losses(store: Path, run_id: str, losses: dict[str, dict]) -> None:
    """Put them there for the next time."""
    _file(store, run_id).parent.mkdir(exist_ok=True)
    write_json(_file(store, run_id), losses)


def _file(store: Path, run_id: str) -> Path:
    return store / ".averages" / f"{run_id}.json"


def read_averages(runs: Sequence, windows: Sequence[int] | None = None, workers: int | None = None) -> pd.DataFrame:
    """`Run.averages(windows)` of many runs, run_id first; what is not in the store yet is worked out by `workers` processes.

    Raises RuntimeError with the last words of a process that failed.
    """
    lacking = [(run, lost) for run in runs if (lost := run.lacks_averages(windows))]
    workers = min(workers or cores(), len(lacking))
    if workers > 1 and sum(lost for _, lost in lacking) > FEW:
        _side_by_side([run for run, _ in lacking], windows, workers)
    return pd.concat([run.averages(windows).assign(run_id=run.run_id) for run in runs], ignore_index=True)


def _side_by_side(runs, windows, workers: int) -> None:
    given = [json.dumps({"store": str(run.store.path), "run_id": run.run_id, "windows": windows and list(windows)}) for run in runs]
    crew = [subprocess.Popen([sys.executable, "-m", "etastar.engine.read_outs"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, env=one_thread_environment()) for _ in range(workers)]
    try:
        for number, process in enumerate(crew):
            process.stdin.write("\n".join(given[number::workers]) + "\n")
            process.stdin.close()
            process.stdin = None  # all is said; communicate() must not flush it again
        for process in crew:
            _, words = process.communicate()
            if process.returncode:
                raise RuntimeError(f"a process that validates averages ended with status {process.returncode}:\n{words[-2000:]}")
    finally:
        for process in crew:
            process.kill()
            process.wait()


def main() -> None:
    """Entry of such a process: JSON lines that name runs on standard input."""
    import torch

    from etastar.engine.run import find_run

    torch.set_num_threads(1)
    for line in sys.stdin:
        told = json.loads(line)
        find_run(told["store"], told["run_id"]).averages(told["windows"])


if __name__ == "__main__":
    main()
