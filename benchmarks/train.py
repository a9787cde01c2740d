"""Training speed and memory of the engine beside plain torch: every way in its own processes, taking turns.

A way is idle but for its turn, so none disturbs another, and whatever else the machine does hits all alike. Ratios are taken
within a round, then their median: a machine that slows down for a while does not move them. The engine's processes have the
environment that the engine gives its workers, all others the caller's own.
"""

import contextlib
import statistics
from collections.abc import Iterator

from benchmarks.crew import Crew, CrewFailed, apart
from benchmarks.rows import orders
from benchmarks.shapes import Shape, counted_bytes, recipe_of, shapes
from benchmarks.shared_core import busy_core
from benchmarks.ways import compiles, layouts, ways
from etastar.model.shapes import flops_per_token

REFERENCE = "plain"
KEPT_WAYS = ("engine", "plain")  # measured again on a shared core


def rows(options) -> Iterator[dict]:
    """The machine, then for each shape a row a way and layout, and a row a part of the engine's step."""
    chosen, named = shapes(options.shapes, options.device), ways(options.ways, options.device)
    machine = apart("machine:measure", options.device)
    yield machine
    for shape in chosen:
        yield from _of_shape(shape, named, options, machine["torch_bytes"])
        if "engine" in named:
            yield from apart("parts:parts", shape.name, options.device, options.rounds, engine=True)


def _of_shape(shape: Shape, named: list[str], options, torch_bytes: int) -> Iterator[dict]:
    precision = recipe_of(shape, options.device).execution.precision
    with contextlib.ExitStack() as stack:
        crews, compile_s, failed = _start(shape, named, options.device, precision, stack)
        yield from ({"bench": "train", "shape": shape.name, "way": way, "error": said} for way, said in failed.items())
        speeds, gemms = _take_turns(crews, options.rounds, options.seconds)
        facts = {"device": options.device, "precision": precision, "torch_bytes": torch_bytes, "rounds": options.rounds}
        yield from _rows(shape, crews, speeds, gemms, compile_s, facts)
        if options.shared_core:
            again = [crew for crew in crews if crew.way in KEPT_WAYS]
            with busy_core():
                shared, _ = _take_turns(again, options.rounds, options.seconds, gemm=False)
            for crew in again:
                quiet, kept = statistics.median(speeds[crew]), statistics.median(shared[crew])
                yield {"bench": "shared_core", "shape": shape.name, "way": crew.way, "layout": str(crew.layout),
                       "device": options.device, "quiet_tokens_per_s": quiet, "tokens_per_s": kept, "kept": kept / quiet}


def _start(shape, named, device, precision, stack) -> tuple[list[Crew], dict[Crew, float], dict[str, str]]:
    """Start every crew and wait for it; one that compiles is alone while it does, so that its time is its own."""
    asked = [(way, layout) for way in named for layout in layouts(way, shape, device)]
    groups = [[one for one in asked if not compiles(one[0], device)], *([one] for one in asked if compiles(one[0], device))]
    compile_s, failed = {}, {}
    for group in groups:
        started = [Crew(way, shape.name, device, precision, layout) for way, layout in group]
        for crew in started:
            stack.callback(crew.close)
        for crew in started:
            try:
                spent = crew.ready()
                compile_s[crew] = spent if compiles(crew.way, device) else 0.0
            except CrewFailed as error:  # no compiler here, not enough memory: the other ways can still be measured
                failed[crew.way] = str(error)
    return sorted(compile_s, key=lambda crew: asked.index((crew.way, crew.layout))), compile_s, failed


def _take_turns(crews, rounds, seconds, gemm=True) -> tuple[dict[Crew, list[float]], dict[Crew, list[float]]]:
    """Tokens/s and GFLOP/s of matrix products of every crew, round by round."""
    speeds, gemms = {crew: [] for crew in crews}, {crew: [] for crew in crews}
    for _, order in zip(range(rounds), orders(crews), strict=False):
        for crew in order:
            speeds[crew].append(crew.tokens_per_s(seconds))
            if gemm:
                gemms[crew].append(crew.gemm_gflops(min(0.2, seconds)))
    return speeds, gemms


def _rows(shape, crews, speeds, gemms, compile_s, facts) -> Iterator[dict]:
    flops = flops_per_token(shape.model, shape.vocab)["exact"]
    best = _best(crews, speeds)
    for crew in crews:
        layout, tokens_per_s, gemm = crew.layout, statistics.median(speeds[crew]), statistics.median(gemms[crew])
        ratios = [own / of for own, of in zip(speeds[crew], speeds[best[REFERENCE]], strict=True)] if REFERENCE in best else []
        models = layout.processes * layout.slots
        yield {"bench": "train", "shape": shape.name, "way": crew.way, "best": best[crew.way] is crew, "layout": str(layout),
               "slots": layout.slots, "processes": layout.processes, "threads": layout.threads,
               "tokens_per_s": tokens_per_s, "gflops": tokens_per_s * flops / 1e9, "gemm_gflops": gemm,
               "gemm_share": tokens_per_s * flops / 1e9 / gemm, "ratio_to_plain": statistics.median(ratios) if ratios else None,
               "ratio_low": min(ratios, default=None), "ratio_high": max(ratios, default=None), "peak_bytes": crew.peak_bytes(),
               "counted_bytes": counted_bytes(shape, models, facts["precision"]), "compile_s": compile_s[crew]} | facts


def _best(crews: list[Crew], speeds: dict[Crew, list[float]]) -> dict[str, Crew]:
    """The faster layout of each way; of `script` the one that is plain's best, for the two are to be compared like for like."""
    best = {}
    for crew in sorted(crews, key=lambda crew: statistics.median(speeds[crew])):
        best[crew.way] = crew
    if "script" in best and REFERENCE in best:
        best["script"] = next((c for c in crews if c.way == "script" and c.layout == best[REFERENCE].layout), best["script"])
    return best
