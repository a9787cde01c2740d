"""Study 07, what is measured: of the kit's own exports by every reader there is, of fetched checkpoints by what was kept of them."""

import contextlib
import dataclasses
import importlib.util
import io
import math
from pathlib import Path

import pandas as pd

from etastar.engine.run import Run
from etastar.hub.checkpoints import find_fetched
from etastar.hub.cloze import cloze_scores, read_items, write_cloze, write_items
from etastar.hub.evaluate import evaluate
from etastar.hub.evaluation import Evaluation, read_evaluation
from etastar.hub.export import export
from etastar.hub.folders import load_checkpoint
from etastar.hub.measure import checkpoint_norms, power_law_says
from etastar.hub.perplexity import perplexity, ratio
from etastar.hub.released import load_released
from etastar.hub.round_trip import round_trip
from etastar.hub.scores import benchmarks, published
from etastar.model.decoder import Decoder
from etastar.model.norms import operator_norms
from etastar.studies.released_design import ARMS, ReleasedDesign, cooldown_fraction
from etastar.text.corpora import prepare

MEGABITS = (100, 1000)  # of a network, a second: the times told for downloads
WINDOW_TOKENS = 2**14  # held-out tokens of the sliding windows, the first few contexts of each document
CHANCE = 25.0  # of four continuations


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """What the exports of a preset show, and evaluations of released checkpoints that are kept.

    `table` has one row an export: arm, seed, run_id, folder, params, tokens, val_loss and what came back of it; `norms` the matrices of
    each arm's first seed; `windows` nats per token and bits per byte by stride; `cloze` the accuracy in points by arm, seed and reader:
    "hand" is our decoder alone, "harness" lm-evaluation-harness, "untrained" the run's own start, "placebo" has the starts of items
    changed about. `rates` is what the Power law says; `evaluations` are by name of a model with printed scores.
    """

    table: pd.DataFrame
    norms: pd.DataFrame
    windows: pd.DataFrame
    cloze: pd.DataFrame
    rates: pd.DataFrame
    evaluations: dict[str, Evaluation]

    def first(self, arm: str) -> pd.Series:
        """The export of an arm's first seed."""
        return self.table[self.table.arm == arm].iloc[0]


def measure_exports(runs: list[Run], plan: ReleasedDesign, arm_of, folder, evaluations=None, checkpoint: str = "") -> Checkpoints:
    """Export finished runs below `folder` and measure what is there; `evaluations` is a folder of kept ones, `checkpoint` one more.

    Raises ValueError for a checkpoint that is not here, before anything is exported, and for a run that diverged.
    """
    fetched = find_fetched(checkpoint) if checkpoint else None
    kept = read_kept(evaluations)
    runs = sorted(runs, key=lambda run: (list(ARMS).index(arm_of(run.recipe)), run.recipe.seed))
    folders = [export(run, Path(folder) / f"{arm_of(run.recipe)}-{run.recipe.seed}") for run in runs]
    table = pd.DataFrame([_row(run, arm_of(run.recipe), at) for run, at in zip(runs, folders, strict=True)])
    named = {arm_of(run.recipe): (run, at) for run, at in zip(runs, folders, strict=True) if run.recipe.seed == runs[0].recipe.seed}
    norms = pd.concat([_norms(arm, *pair) for arm, pair in named.items()] + ([_given_norms(checkpoint, fetched)] if fetched else []))
    cloze = _cloze(runs, folders, named, plan, arm_of, Path(folder) / "cloze")
    return Checkpoints(table, norms.reset_index(drop=True), _windows(named), cloze, power_rates(table), kept)


def read_kept(folder) -> dict[str, Evaluation]:
    """Evaluations that `etastar eval` kept, by the name of the model with printed scores; none where there is no folder."""
    found = {}
    for name in published():
        path = Path(folder or "") / name
        if folder and (path / "settings.json").exists():
            found[name] = read_evaluation(path)
    return found


def _row(run: Run, arm: str, folder: Path) -> dict:
    back, told = round_trip(run, folder), run.summary
    return {"arm": arm, "seed": run.recipe.seed, "run_id": run.run_id, "folder": str(folder), "params": told["params_total"],
            "active": told["params_active"], "tokens": run.recipe.horizon_tokens, "batch_tokens": run.recipe.batch_tokens,
            "val_loss": run.val_loss, "val_loss_read_back": back.val_loss, "bits_equal": back.bits_equal, "logits_gap": back.logits_gap,
            "largest_logit": back.largest_logit, "readers_agree": back.readers_agree, "weight_bytes": back.weight_bytes}


# -- norms and rates ---------------------------------------------------------------------------------------------------


def _norms(arm: str, run: Run, folder: Path) -> pd.DataFrame:
    """Own norms of every matrix of an export, read from its file, beside those at the run's start."""
    recipe = run.recipe
    start = Decoder(recipe.model, recipe.corpus.vocab, recipe.parametrization, seed=recipe.seed)
    ended = checkpoint_norms(folder)
    began = operator_norms(start).groupby("role").norm.mean()
    return ended.assign(checkpoint=arm, at_start=ended.role.map(began))


def _given_norms(name: str, folder: Path) -> pd.DataFrame:
    return checkpoint_norms(folder).assign(checkpoint=Path(name).name, at_start=math.nan)


def power_rates(table: pd.DataFrame) -> pd.DataFrame:
    """What the Power law says for the released models and for the exports here; rates are μP base rates, batches in tokens."""
    rows = {name: (told.batch_tokens, told.horizon_tokens, told.cooldown_fraction) for name, told in load_released().items()}
    rows |= {f"{arm} (here)": (own.batch_tokens, own.tokens, cooldown_fraction(arm))
             for arm in ARMS for own in [table[table.arm == arm].iloc[0]]}
    told = {name: power_law_says(*asked) for name, asked in rows.items()}
    return pd.DataFrame([{"checkpoint": name, "batch_tokens": says.batch_tokens, "horizon_tokens": says.horizon_tokens,
                          "wsd_peak_lr": says.wsd_peak_lr, "low": says.low, "high": says.high, "schedule_lr": says.schedule_lr,
                          "cap_until_tokens": says.cap_until_tokens, "warnings": "; ".join(says.warnings)}
                         for name, says in told.items()])


# -- perplexity and cloze ----------------------------------------------------------------------------------------------


def _windows(named: dict) -> pd.DataFrame:
    rows = []
    for arm, (run, folder) in named.items():
        decoder, context = load_checkpoint(folder), run.recipe.model.context
        for stride in (context, context // 2, context // 4):
            told = perplexity(decoder, run.recipe.corpus, stride=stride, max_tokens=WINDOW_TOKENS, document_tokens=2 * context)
            rows.append({"arm": arm, "stride": stride, "least_context": context - stride, "nats_per_token": told.nats_per_token,
                         "nats_per_token_se": told.nats_per_token_se, "bits_per_byte": told.bits_per_byte,
                         "bits_per_byte_se": told.bits_per_byte_se, "tokens": told.tokens, "documents": told.documents})
    return pd.DataFrame(rows)


def _cloze(runs, folders, named, plan: ReleasedDesign, arm_of, folder: Path) -> pd.DataFrame:
    """Accuracies in points by our decoder of every export; of each arm's first seed also untrained, on the placebo, by the harness."""
    context, tokenizer = plan.model.context, prepare(plan.corpus).tokenizer_path
    task = write_cloze(folder, plan.corpus, items=plan.items, context_tokens=3 * context // 8, continuation_tokens=max(4, context // 10))
    other = _placebo(task, folder.with_name("placebo"))

    def row(run, reader, told):
        return {"arm": arm_of(run.recipe), "seed": run.recipe.seed, "reader": reader} | told

    def by_hand(run, reader, decoder, items):
        return row(run, reader, _accuracy(cloze_scores(decoder, items, tokenizer)))

    rows = [by_hand(run, "hand", load_checkpoint(at), task) for run, at in zip(runs, folders, strict=True)]
    for run, at in named.values():
        recipe = run.recipe
        start = Decoder(recipe.model, recipe.corpus.vocab, recipe.parametrization, seed=recipe.seed)
        rows += [by_hand(run, "untrained", start, task), by_hand(run, "placebo", load_checkpoint(at), other)]
        if importlib.util.find_spec("lm_eval") is not None:
            rows.append(row(run, "harness", _harness_accuracy(at, task)))
    return pd.DataFrame(rows)


def _placebo(task: Path, folder: Path) -> Path:
    """The same task, the start of every item taken from the next one: what is left tells the true continuation from no other."""
    items = read_items(task)
    turned = [item | {"context": after["context"]} for item, after in zip(items, items[1:] + items[:1], strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    write_items(folder, turned)
    return folder


def _accuracy(scored: pd.DataFrame) -> dict:
    """In points, with the error clustered by the document an item is from."""
    by_document = scored.groupby("document").correct.agg(["sum", "size"])
    value, se = ratio(by_document["sum"], by_document["size"])
    return {"accuracy": 100 * value, "se": 100 * se, "items": len(scored)}


def _harness_accuracy(folder: Path, task: Path) -> dict:
    """In points, with the error over items."""
    with contextlib.redirect_stderr(io.StringIO()):  # its bars, of no use on a page
        found = evaluate(folder, ["cloze"], task_folder=task).scores
    score = found[found.metric == "acc"].iloc[0]
    return {"accuracy": 100 * score.value, "se": 100 * score.se, "items": int(score["items"])}


# -- what the notebook tells of the released ones ----------------------------------------------------------------------


def downloads() -> pd.DataFrame:
    """Size, time and command of every released checkpoint the kit knows; sizes are about."""
    return pd.DataFrame([{
        "checkpoint": name, "what": told.what, "parameters": told.params_about, "files": len(told.shard_bytes_about),
        "GB": told.bytes_about / 1e9, **{f"minutes at {m} Mbit/s": told.minutes_about(m) for m in MEGABITS},
        "licence": told.licence, "command": told.command,
    } for name, told in load_released().items()])


def commands(name: str) -> pd.DataFrame:
    """The exact commands from a name to a verdict."""
    told = load_released()[name]
    return pd.DataFrame([
        {"command": f"{told.command} --dry-run", "does": "files, sizes and free space; downloads nothing"},
        {"command": told.command, "does": f"about {told.bytes_about / 1e9:.2f} GB into the hub's cache, taken up where it broke, checked"},
        {"command": f"etastar eval {name} --dtype bfloat16", "does": "the benchmarks, beside the printed scores; kept for this page"},
        {"command": f"etastar eval {name} --limit 100 --tasks piqa winogrande", "does": "a part of it, for a first look"},
    ])


def printed_scores() -> pd.DataFrame:
    """Printed scores of the released models and of those beside them: model, beside, benchmark, score (points)."""
    return pd.DataFrame([{"released": name, "model": model, "benchmark": benchmarks()[benchmark].title, "score": score}
                         for name in ARMS.values() for model in (name, *published()[name].beside)
                         for benchmark, score in published()[model].scores.items()])
