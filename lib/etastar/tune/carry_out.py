"""From a question to its answer: time this machine, plan, scout, train, fit, and write tune.json and the figure."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from etastar.analysis.board import plain
from etastar.analysis.bowl import fit_bowl
from etastar.engine.plan import Cost, build_segments
from etastar.recipe import Recipe
from etastar.studies.measured import losses, train
from etastar.tune.answer import Answer, answer, law_lines
from etastar.tune.plan import EXPECTED_SLOPE, Plan, make_plan
from etastar.tune.question import Ladder, Question

PLAN_FILE, ANSWER_FILE, FIGURE = "plan.json", "tune.json", "tune"
SCOUT_SIGMA = 0.01  # nats; only so that one seed's bowl of three rates has an error at all


def tune(question: Question, budget_seconds: float, store="runs", results="results/tune", tell: Callable[[str], None] = lambda said: None,
         plan_only: bool = False, **options) -> tuple[Plan, Answer | None]:
    """Plan, train what the store lacks, and answer; `tell` gets the plan before anything is trained, then the answer.

    `options` are es.run's (device, workers, slots, backend …). Once training begins the plan is kept in `results` and held for the same
    question and budget, so that the same call goes on where it was stopped. Writes tune.json, runs.csv, tune.png and tune.svg there.
    Raises ValueError before anything is trained for what can be known: see Question and make_plan.
    """
    results, epoch = Path(results), epoch_tokens(question)
    plan = held_plan(question, budget_seconds, results)
    if plan is None:
        plan = make_plan(question, budget_seconds, epoch, lambda recipes: expected_cost(recipes, options).seconds or 0.0)
    tell(f"{plan}\n{expected_cost([*plan.scouts(), *plan.recipes(plan.unscouted)], options)}")
    if plan_only:
        return plan, None
    results.mkdir(parents=True, exist_ok=True)
    (results / PLAN_FILE).write_text(json.dumps(plan.as_dict(), indent=1))
    found = answer(plan, carry_out(plan, store, **options), epoch)
    tell(f"{found}\n\n{beside(published_laws(question))}")
    write(found, results)
    return plan, found


def carry_out(plan: Plan, store="runs", **options) -> pd.DataFrame:
    """Train the scouts, then the ladders about their vertices; grids with the best rate at an edge are extended, twice at most.

    Returns one row a run: arm (the ladder's name), peak_lr, seed, horizon_tokens, loss, status, run_id.
    """
    arms = [ladder.name for ladder in plan.ladders]
    scouted = losses(train(plan.scouts(), plan.ladder_of, arms, store, **options), plan.ladder_of)
    centres = {ladder.name: _centre(scouted[scouted.arm == ladder.name], ladder) for ladder in plan.ladders}
    return losses(train(plan.recipes(centres), plan.ladder_of, arms, store, **options), plan.ladder_of)


def _centre(rows: pd.DataFrame, ladder: Ladder) -> float:
    """Log2 rate amid a ladder's grid, in quarter octaves: the scouts' vertex, moved to the middle of the horizons."""
    rows = rows.dropna(subset="loss").sort_values("peak_lr")
    if rows.empty:
        raise ValueError(f"every scout of {ladder.name} diverged: are the model, the corpus and the init std as they should be?")
    best = int(rows.loss.to_numpy().argmin())
    about = rows.iloc[max(0, best - 1) : best + 2]
    try:
        vertex = fit_bowl(about.peak_lr, about.loss, sigma=SCOUT_SIGMA).best_log2_lr
    except ValueError:  # at the edge of what does not diverge: the ladder's own grid will tell
        vertex = math.log2(rows.peak_lr.iloc[best])
    return round(4 * (vertex + EXPECTED_SLOPE * (len(ladder.horizons) - 1) / 2)) / 4


# -- before: what is there, what it costs ------------------------------------------------------------------------------


def epoch_tokens(question: Question) -> int:
    """Tokens of one epoch of the corpus in whole sequences; the corpus is tokenized where it was not yet."""
    from etastar.text.batches import epoch_sequences
    from etastar.text.corpora import prepare

    context = question.model.context
    return epoch_sequences(prepare(question.corpus).train_tokens, context) * context


def expected_cost(recipes: list[Recipe], options: dict) -> Cost:
    """What recipes cost on this machine from the start, whatever a store has of them: the same whenever it is asked."""
    from etastar.engine.execute import Sweep, resolve
    from etastar.engine.speed import cost
    from etastar.engine.store import Store
    from etastar.observe import Observe

    resolved = tuple(resolve(recipe, options.get("device")) for recipe in recipes)
    sweep = Sweep(resolved, {}, build_segments(list(resolved)), frozenset(), Store("."), Observe())
    return cost(sweep, 1 if options.get("backend") == "inline" else options.get("workers"), options.get("slots"))


def held_plan(question: Question, budget_seconds: float, results: Path) -> Plan | None:
    """The plan made before for the same question and budget, so that what was begun is gone on with; None where there is none."""
    path = results / PLAN_FILE
    if not path.exists():
        return None
    body = json.loads(path.read_text())
    asked = json.loads(json.dumps({"question": question.as_dict(), "budget_seconds": budget_seconds}))
    if any(body.get(name) != asked[name] for name in asked):
        return None
    ladders = tuple(Ladder(**(ladder | {"horizons": tuple(ladder["horizons"])})) for ladder in body["ladders"])
    return Plan(**(body | {"question": question, "ladders": ladders}))


# -- after: beside the published laws, and files -----------------------------------------------------------------------


def published_laws(question: Question) -> pd.DataFrame | None:
    """What the published laws say of the asked run; None where they are not part of this installation."""
    try:
        from etastar.analysis.laws import recommend
    except ImportError:
        return None
    from etastar.model.shapes import count_parameters

    model = question.model
    return recommend(params=count_parameters(model, question.corpus.vocab)["non_embedding"], horizon_tokens=question.horizon_tokens,
                     batch_tokens=question.batch_tokens, parametrization=question.parametrization, width=model.width, depth=model.depth,
                     context=model.context, base_width=question.base_width if question.parametrization == "mup" else None)


def beside(published: pd.DataFrame | None) -> str:
    """The published laws' peak rates as text."""
    if published is None:
        return "published laws: not part of this installation"
    from etastar.analysis.laws import format_advice

    rates = published[published["quantity"] == "peak_lr"].reset_index(drop=True)
    return "what published laws, of other data and models, say (all they say: etastar recommend):\n" + format_advice(rates)


def as_json(plan: Plan, found: Answer | None) -> dict:
    """Question, plan and answer (None: only planned) beside the published laws, ready for JSON."""
    published = published_laws(plan.question)
    body = {"question": plan.question.as_dict(), "plan": plan.as_dict(), "answer": None if found is None else found.as_dict(),
            "published": None if published is None else published.to_dict("records")}
    body["plan"].pop("question")
    return plain(body)


def write(found: Answer, results: Path) -> list[Path]:
    """tune.json, the figure and the table of runs; returns the paths."""
    from etastar import plots
    from etastar.engine.provenance import machine

    results.mkdir(parents=True, exist_ok=True)
    (results / ANSWER_FILE).write_text(json.dumps(as_json(found.plan, found) | {"machine": plain(machine())}, indent=1))
    found.runs.to_csv(results / "runs.csv", index=False)
    figure = plots.tuned(found.runs, found.bowls, found.cells, law_lines(found))
    return [results / ANSWER_FILE, results / "runs.csv", *plots.save(figure, results, FIGURE)]
