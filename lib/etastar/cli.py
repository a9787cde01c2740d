"""The `etastar` command, all verbs but those for the hub, which are in cli_hub."""

import argparse
import json
import os
import sys
from pathlib import Path

from etastar import cli_hub
from etastar.cli_hub import show

PRESETS = ("auto", "smoke", "cpu", "night", "gpu", "paper")
RECOMMEND_NUMBERS = {
    "params": "parameters without embeddings", "horizon_tokens": "tokens of the whole run", "batch_tokens": "tokens a step",
    "width": "model dimension", "base_width": "model dimension of the μP base", "depth": "layers", "context": "tokens a sequence",
    "params_active": "of a mixture of experts: those a token passes", "params_total": "of a mixture of experts: all",
    "weight_decay": "AdamW's λ"}


def main(argv: list[str] | None = None) -> int:
    """Entry of the `etastar` command; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        return options.act(options) or 0
    except BrokenPipeError:  # the reader of a pipe, head for one, has seen enough
        sys.stdout = open(os.devnull, "w")
        return 0
    except KeyboardInterrupt:
        print("\nstopped; finished runs and the state of running ones are kept, the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        if options.traceback:
            raise
        print(f"etastar: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="etastar", description="Re-test what the learning-rate papers claim, on this machine.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="machine-readable output")
    common.add_argument("--store", default="runs", help="folder of the runs (default: runs)")
    budget = argparse.ArgumentParser(add_help=False)
    budget.add_argument("--preset", choices=PRESETS, default="auto", help="how much to spend (default: auto)")
    budget.add_argument("--minutes", type=float, help="spend about this long in place of the preset's own time")
    layout = argparse.ArgumentParser(add_help=False)
    layout.add_argument("--device", choices=("cpu", "cuda"), help="where to train (default: what the preset says)")
    layout.add_argument("--workers", type=int, help="worker processes (default: one a core)")
    layout.add_argument("--slots", type=int, help="runs a worker trains in step (default: 1 on a CPU)")
    layout.add_argument("--execution", choices=("auto",), help="compute in the way that is fastest here, by measurement; held by the store")

    verb = verbs.add_parser("doctor", parents=[common], help="what this machine has and how runs will be executed")
    verb.add_argument("--measure", action="store_true", help="time the ways of training a small shape (half a minute, then kept)")
    verb.set_defaults(act=_doctor)

    verb = verbs.add_parser("plan", parents=[common, budget, layout], help="what a study or a file of recipes will cost")
    verb.add_argument("what", help="a study's name or a JSON file holding recipes")
    verb.add_argument("--resolve", type=float, metavar="NATS", help="seeds and minutes needed to resolve this difference")
    verb.add_argument("--parameters", action="store_true", help="print the parametrization as a table")
    verb.add_argument("--write", metavar="FILE.json", help="write the recipes, to `etastar run FILE.json` on another machine")
    verb.add_argument("--no-measure", dest="measure", action="store_false", help="do not time this machine")
    verb.set_defaults(act=_plan)

    verb = verbs.add_parser("run", parents=[common, budget, layout], help="train a study's runs or a file of recipes")
    verb.add_argument("what", help="a study's name or a JSON file holding recipes")
    verb.set_defaults(act=_run)

    verb = verbs.add_parser("runs", parents=[common], help="look at, clean up or export a store")
    verb.add_argument("do", choices=("list", "show", "gc", "export"))
    verb.add_argument("run_id", nargs="?", help="for show: the run; for export: a .csv or .parquet file to write")
    verb.add_argument("--states", action="store_true", help="gc: drop the shared states too (runs stay)")
    verb.add_argument("--damaged", action="store_true", help="gc: set damaged runs and states aside")
    verb.add_argument("--unfinished", action="store_true", help="list: runs that a sweep began and has not finished")
    verb.set_defaults(act=_runs)

    verb = verbs.add_parser("reproduce", parents=[common, budget], help="run the notebooks of one study or all; write the report")
    verb.add_argument("--study", default="all", help="a study's name, or all (default)")
    verb.add_argument("--results", default="results", help="folder of the results (default: results)")
    verb.set_defaults(act=_reproduce)

    verb = verbs.add_parser("branch", parents=[common, layout], help="continue any run from any point under another schedule")
    verb.add_argument("run_id")
    verb.add_argument("--at-tokens", type=int, required=True, help="leave the run after this many tokens")
    verb.add_argument("--schedule", required=True, help='JSON of a schedule over the rest, as {"kind": "WSD", "cooldown_fraction": 1}')
    verb.add_argument("--horizon-tokens", type=int, required=True, help="tokens in all at the end of the branch")
    verb.add_argument("--peak-lr", type=float, help="peak of the new schedule (default: the rate at the branch point)")
    verb.set_defaults(act=_branch)

    verb = verbs.add_parser("recommend", parents=[common], help="what every published law says about a run's learning rate and batch")
    for name, unit in RECOMMEND_NUMBERS.items():
        verb.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=unit, required=name in ("params", "horizon_tokens"))
    for name, usual in (("schedule", "wsd"), ("parametrization", "sp"), ("optimizer", "adamw")):
        verb.add_argument(f"--{name}", default=usual, help=f"of the run (default: {usual})")
    verb.set_defaults(act=_recommend)

    _tune_words(verbs.add_parser("tune", parents=[common, layout], help="the learning rate for a run on your own data, from small runs"))

    verb = verbs.add_parser("coordinates", parents=[common], help="whether activations keep their size as a network grows, trained here")
    verb.add_argument("--parametrization", choices=("sp", "mup", "completep"), default="mup", help="what to check (default: mup)")
    for name, usual, what in (("widths", "64,128,256", "model dimensions, the smallest the base"), ("depths", "2", "layers")):
        verb.add_argument(f"--{name}", type=lambda ns: [_count(n) for n in ns.split(",")], default=usual, help=f"{what} (default: {usual})")
    verb.add_argument("--seeds", type=_count, default=3, metavar="N", help="of the intervals (default: 3)")
    verb.set_defaults(act=_coordinates)

    cli_hub.add_verbs(verbs, common)

    verb = verbs.add_parser("report", parents=[common, budget], help="write the HTML report of a preset's results again")
    verb.add_argument("--results", default="results", help="folder of the results (default: results)")
    verb.set_defaults(act=_report)

    # No word may begin with NUL, so all of them, --help too, go to the benchmarks' own parser.
    verb = verbs.add_parser("bench", prefix_chars="\0", add_help=False, help="speed and memory of this machine beside named references")
    verb.add_argument("words", nargs="*")
    verb.set_defaults(act=_bench)
    return parser


def _tune_words(verb) -> None:
    asked = {"width": "model dimension", "depth": "layers", "horizon_tokens": "tokens in all", "batch_tokens": "tokens a step"}
    verb.add_argument("--corpus", required=True, help="files:GLOB, hf:REPO@COMMIT, python or synthetic")
    for name, unit in asked.items():
        verb.add_argument(f"--{name.replace('_', '-')}", type=_count, required=True, metavar="N", help=f"{unit} of the run asked about")
    for name, usual, what in (("vocab", 4096, "BPE vocabulary"), ("context", 512, "tokens a sequence"), ("head-dim", 64, "of attention"),
                              ("least-steps", 256, "of the shortest run")):
        verb.add_argument(f"--{name}", type=_count, default=usual, metavar="N", help=f"{what} (default: {usual})")
    for name, usual, what in (("init-std", 0.1, "of the weights"), ("weight-decay", 0.1, "AdamW's λ"),
                              ("cooldown-fraction", 0.2, "of WSD")):
        verb.add_argument(f"--{name}", type=float, default=usual, metavar="X", help=f"{what} (default: {usual})")
    verb.add_argument("--untied", action="store_true", help="an output head of its own")
    verb.add_argument("--budget", type=_seconds, required=True, metavar="TIME", help="time to spend: 90s, 30m, 2h")
    verb.add_argument("--parametrization", choices=("sp", "mup"), default="sp", help="mup trusts that widths have the same rate")
    verb.add_argument("--base-width", type=_count, metavar="N", help="mup: width at which it is sp (default: that of the small runs)")
    verb.add_argument("--small-batch-tokens", type=_count, nargs="+", default=(), metavar="N", help="of the small runs (default: chosen)")
    verb.add_argument("--plan-only", action="store_true", help="print what would be run and how long it takes")
    verb.add_argument("--results", default="results/tune", help="folder of tune.json and the figure (default: results/tune)")
    verb.set_defaults(act=_tune)


def _doctor(options):
    from etastar.doctor import doctor, format_doctor

    found = doctor(options.store, options.measure)
    print(json.dumps(found, indent=1) if options.json else format_doctor(found))


def _recipes(options):
    """Recipes of a study at a preset, or of a JSON file: a list of recipes."""
    path = Path(options.what)
    if path.suffix == ".json":
        from etastar.recipe import Recipe

        if not path.exists():
            raise ValueError(f"no file {path}")
        body = json.loads(path.read_text())
        return [Recipe.from_json(item) for item in (body if isinstance(body, list) else [body])]
    study, preset = _study(options)
    return study.recipes(preset, minutes=options.minutes)


def _plan(options):
    from etastar.engine.execute import prepare_sweep
    from etastar.engine.speed import cost, cost_without_corpus

    recipes, study = _recipes(options), None if Path(options.what).suffix == ".json" else _study(options)
    if options.write:
        Path(options.write).write_text("[\n" + ",\n".join(r.to_json() for r in recipes) + "\n]\n")
    if options.parameters:
        from etastar.model.parametrization import as_table

        return show({"parameters": (table := as_table(recipes[0])), "forward": table.attrs["forward"]}, options)
    if options.preset == "paper" or _meant_for_another_machine(recipes):
        told = cost_without_corpus(recipes)
    else:
        sweep = prepare_sweep(recipes, options.store, options.device, execution=options.execution)
        told = cost(sweep, options.workers, options.slots, options.measure)
    shown = {"cost": told.as_dict() if options.json else str(told)}
    if study:
        module, preset = study
        shown["power"] = module.power(preset, minutes=options.minutes)
        if options.resolve:
            plan = module.design(preset, options.minutes)
            shown["resolve"] = plan.resolve(options.resolve, _measured_sd(plan, options.store))
    show(shown, options)


def _measured_sd(plan, store) -> float | None:
    """How much paired runs near a design's scale differ from seed to seed in a store (nats); None where none were trained."""
    from etastar.studies.noise import from_store

    try:
        return from_store(store).sd_for(plan.model.width, plan.horizon_tokens, paired=True).sd
    except ValueError:
        return None


def _meant_for_another_machine(recipes) -> bool:
    import torch

    return any(r.execution.device == "cuda" for r in recipes) and not torch.cuda.is_available()


def _study(options):
    from etastar.studies import find_study, resolve_preset

    return find_study(options.what), resolve_preset(options.preset)


def _run(options):
    from etastar.engine.execute import run

    done = run(_recipes(options), store=options.store, device=options.device, workers=options.workers, slots=options.slots,
               execution=options.execution)
    rows = [{"run_id": r.run_id, "status": r.status, "val_loss": None if r.status == "diverged" else r.val_loss} for r in done]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{len(rows)} runs in {options.store}, {sum(r['status'] == 'diverged' for r in rows)} diverged")


def _runs(options):
    from etastar.engine.run import find_run
    from etastar.engine.store import Store

    store = Store(options.store)
    if options.do == "gc":
        done = store.collect_garbage(states=options.states, damaged=options.damaged)
        print("\n".join(done) or "nothing to remove")
    elif options.do == "show":
        if not options.run_id:
            raise ValueError("runs show needs a run id; `etastar runs list` names them")
        found = find_run(store, options.run_id)
        told = {"run_id": found.run_id, "status": found.status, "stored_tokens": found.stored_tokens}
        print(json.dumps(told | getattr(found, "summary", {}) | {"recipe": json.loads(found.recipe.to_json())}, indent=1))
    elif options.do == "export":
        _export(store.table(), options.run_id)
    else:
        table = _unfinished(store) if options.unfinished else store.table()
        if options.json:
            print(table.to_json(orient="records", indent=1))
        else:
            shown = [c for c in ("run_id", "status", "val_loss", "peak_lr", "horizon_tokens", "seed", "schedule") if c in table]
            print(table[shown].to_string(index=False) if len(table)
                  else f"no {'unfinished' if options.unfinished else 'finished'} runs in {store.path}")


def _unfinished(store):
    """One row a run that a sweep began and has not finished."""
    import pandas as pd

    from etastar.recipe import Recipe
    from etastar.values import canonical_json

    rows = []
    for run_id, (sweep, body) in store.unfinished().items():
        recipe = Recipe.from_json(body)
        rows.append({"run_id": run_id, "status": "running" if store.is_running(sweep) else "interrupted", "peak_lr": recipe.peak_lr,
                     "horizon_tokens": recipe.horizon_tokens, "seed": recipe.seed, "schedule": canonical_json(recipe.schedule)})
    return pd.DataFrame(rows)


def _export(table, path):
    if path is None or Path(path).suffix not in (".csv", ".parquet"):
        raise ValueError(f"runs export needs a file that ends in .csv or .parquet; got {path!r}")
    table.to_csv(path, index=False) if path.endswith(".csv") else table.to_parquet(path, index=False)
    print(f"{len(table)} runs written to {path}")


def _branch(options):
    from etastar.engine.execute import run
    from etastar.engine.run import find_run

    trunk = find_run(options.store, options.run_id)
    recipe = trunk.branch_recipe(at_tokens=options.at_tokens, schedule=_schedule(options.schedule),
                                 horizon_tokens=options.horizon_tokens, peak_lr=options.peak_lr)
    done = run([recipe], store=options.store, device=options.device, workers=options.workers, slots=options.slots,
               execution=options.execution, beside=True)[0]
    print(json.dumps({"run_id": done.run_id, "status": done.status, "val_loss": done.summary["val_loss"]})
          if options.json else f"{done.run_id}: {done.status}, validation loss {done.val_loss:.4f} nats per token")


def _schedule(text: str):
    """The schedule in a JSON text; ValueError naming the known kinds for anything else."""
    from etastar import _PUBLIC
    from etastar.values import decode

    known = _PUBLIC["schedules"]
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--schedule is not JSON: {error}; got {text!r}") from None
    if not isinstance(body, dict) or body.get("kind") not in known:
        raise ValueError(f"--schedule needs the kind of a schedule, one of {', '.join(known)}; got {text}")
    return decode(body)


def _reproduce(options):
    from etastar.reproduce import reproduce

    return reproduce(options.preset, options.study, options.minutes, Path(options.store), Path(options.results))


def _recommend(options):
    from etastar.analysis.laws import format_advice, recommend

    asked = {name: getattr(options, name) for name in (*RECOMMEND_NUMBERS, "schedule", "parametrization", "optimizer")}
    advice = recommend(**asked)
    if options.json:
        spreads = {k: None if v != v else v for k, v in advice.attrs.items() if k.endswith("spread")}
        print(json.dumps(spreads | {"laws": json.loads(advice.to_json(orient="records", double_precision=15))}, indent=1))
    else:
        print(format_advice(advice))


def _count(text: str) -> int:
    """A whole number, also written as 2e9."""
    number = float(text)
    if number != int(number):
        raise argparse.ArgumentTypeError(f"{text} is no whole number")
    return int(number)


def _seconds(text: str) -> float:
    """Seconds of a time such as 90s, 30m, 2h."""
    try:
        return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1:]]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 30m or 2h") from None


def _tune(options):
    from etastar.recipe import AdamW, Corpus, Execution, Model
    from etastar.tune import Question, tune
    from etastar.tune.carry_out import as_json

    model = Model(width=options.width, depth=options.depth, head_dim=options.head_dim, context=options.context, tied=not options.untied)
    question = Question(model, Corpus(options.corpus, vocab=options.vocab), options.horizon_tokens, options.batch_tokens,
                        options.parametrization, options.base_width, options.init_std, AdamW(weight_decay=options.weight_decay),
                        options.cooldown_fraction, tuple(options.small_batch_tokens), Execution(device=options.device or "cpu"),
                        options.least_steps)
    layout = {"workers": options.workers, "slots": options.slots, "execution": options.execution}
    plan, found = tune(question, options.budget, options.store, options.results, plan_only=options.plan_only,
                       tell=(lambda said: None) if options.json else lambda said: print(said, flush=True), **layout)
    if options.json:
        print(json.dumps(as_json(plan, found), indent=1))


def _coordinates(options):
    from etastar.coordinates import check_named

    passed, parts = check_named(options.parametrization, options.widths, options.depths, options.seeds)
    return show(parts | ({"passed": passed} if options.json else {}), options) or int(not passed)


def _report(options):
    from etastar.report import write_report
    from etastar.studies import resolve_preset

    print(write_report(Path(options.results) / resolve_preset(options.preset)))


def _bench(options):
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "__main__.py").exists():
        raise ValueError(f"bench needs a source checkout, and there is no benchmarks/ in {root}: clone the repository and run `make bench`")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root / "lib"), os.environ.get("PYTHONPATH", "")])}
    return subprocess.call([sys.executable, "-m", "benchmarks", *options.words], cwd=root, env=environment)


if __name__ == "__main__":
    sys.exit(main())
