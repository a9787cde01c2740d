"""What a sweep costs: runs, tokens with and without sharing, FLOPs, disk, and the time expected on this machine."""

from etastar.cores import cores
from etastar.engine.execute import Sweep, default_layout, disk_bytes
from etastar.engine.measure import measured
from etastar.engine.plan import Cost, Segment, build_segments, schedule_length
from etastar.engine.slots import stack_key
from etastar.model.shapes import flops_per_token
from etastar.recipe import Corpus, Recipe

START_SECONDS = 6.0  # a worker process imports torch and opens the corpus before its first step


def cost(sweep: Sweep, workers: int | None = None, slots: int | None = None, measure: bool = True) -> Cost:
    """What a sweep will take here; with `measure` the time too, from a few seconds of training each new shape."""
    segments = sweep.segments
    tokens = sum(s.tokens for s in segments)
    workers, slots = default_layout(sweep, workers, slots) if segments else (workers or cores(), {})
    flops = sum(s.tokens * flops_per_token(s.recipe.model, s.recipe.corpus.vocab)["exact"] for s in segments)
    seconds = 0.0 if not segments else _seconds(sweep, workers, slots) if measure else None
    return Cost(runs=len({r.run_id for r in sweep.recipes}), done=len(sweep.finished), segments=len(segments),
                steps=sum(s.stop - s.start for s in segments), tokens=tokens,
                tokens_without_sharing=sum(r.horizon_tokens for r in sweep.missing.values()), flops=flops,
                disk_bytes=disk_bytes(segments), seconds=seconds, workers=workers)


def cost_without_corpus(recipes: list[Recipe]) -> Cost:
    """Counts and FLOPs of recipes whose corpus need not be here, no time: what a cluster's share would be."""
    stand_ins = [r.replace(corpus=Corpus("synthetic", vocab=r.corpus.vocab)) for r in recipes]
    segments = build_segments(stand_ins)
    tokens = sum(s.tokens for s in segments)
    flops = sum(s.tokens * flops_per_token(s.recipe.model, s.recipe.corpus.vocab)["exact"] for s in segments)
    return Cost(runs=len({r.run_id for r in stand_ins}), done=0, segments=len(segments), steps=sum(s.stop - s.start for s in segments),
                tokens=tokens, tokens_without_sharing=sum(r.horizon_tokens for r in {r.run_id: r for r in stand_ins}.values()),
                flops=flops, disk_bytes=disk_bytes(segments), seconds=None, workers=0)


def _seconds(sweep: Sweep, workers: int, slots: dict[str, int]) -> float:
    """Start-up, and shape after shape: workers keep to one while there is work of it."""
    shapes: dict[str, list[Segment]] = {}
    for segment in sweep.segments:
        shapes.setdefault(stack_key(segment.recipe), []).append(segment)
    start, total = 0.0, START_SECONDS
    for key, members in shapes.items():
        rate = measured(members[0].recipe, workers, slots[key])
        seconds = {s.node.id: (s.stop - s.start) * rate["step"] + bool(s.ends) * rate["validation"] + rate["write"] for s in members}
        start, total = max(start, rate["start"]), total + schedule_length(members, seconds, workers, slots[key])
    return total + start
