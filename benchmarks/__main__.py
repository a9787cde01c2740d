"""The one entry of all benchmarks, `etastar bench`: rows as JSON, one a line, or as tables."""

import argparse
import importlib
import sys

import torch

from benchmarks.rows import show

BENCHES = ("train", "optimizer", "fits", "data", "plan", "norms", "mixture", "distributed_scion", "checkpoint_norms")
ON_CPU = ("distributed_scion", "checkpoint_norms")  # told for a CPU alone, and left out where all are run on a GPU


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark or all of them; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        if options.bench not in (None, *BENCHES):
            raise ValueError(f"unknown benchmark {options.bench!r}; known: {', '.join(BENCHES)}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda was asked for but torch sees no GPU; use --device cpu or install a CUDA build of torch")
        every = [bench for bench in BENCHES if options.device == "cpu" or bench not in ON_CPU]
        for bench in (options.bench,) if options.bench else every:
            show(importlib.import_module(f"benchmarks.{bench}").rows(options), options.json)
    except (ValueError, RuntimeError) as error:
        print(f"etastar bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe, head for one, has seen enough
        sys.stdout = None
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="etastar bench", description="Speed and memory, each beside a named reference.")
    parser.add_argument("bench", nargs="?", metavar="|".join(BENCHES), help="which (default: all, one after another)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="train, optimizer, data: shapes by name (default: all of the device)")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="train: ways by name (default: all of the device)")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns that each way gets (default: 5)")
    parser.add_argument("--seconds", type=float, default=1.5, help="train: length of a turn (default: 1.5)")
    parser.add_argument("--runs", type=_positive, default=10_000, help="plan: recipes to plan and runs to store (default: 10000)")
    parser.add_argument("--shared-core", action="store_true", help="train: once more with one core taken by another process")
    parser.add_argument("--json", action="store_true", help="one JSON row a line")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
