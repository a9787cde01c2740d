"""The verbs of the `etastar` command for what comes from elsewhere or goes there: fetch, export, push, eval."""

import json
import sys


def add_verbs(verbs, common) -> None:
    """Add the four verbs to the command's parser; `common` has the words that all verbs take."""
    verb = verbs.add_parser("fetch", parents=[common], help="download published run logs or a released checkpoint, and check them")
    verb.add_argument("what", choices=("archives", "checkpoint"))
    verb.add_argument("names", nargs="*", metavar="NAME",
                      help="archives of data/archives.toml (default: all), or one checkpoint: a name of data/checkpoints.toml or "
                           "OWNER/REPO@REVISION")
    verb.add_argument("--folder", help="checkpoint: where to put it (default: the hub's own cache)")
    verb.add_argument("--dry-run", action="store_true", help="checkpoint: tell files, sizes and the space they need, and stop")
    verb.set_defaults(act=_fetch)

    verb = verbs.add_parser("export", parents=[common], help="a finished run as a folder that transformers and lm-eval load")
    verb.add_argument("run_id")
    verb.add_argument("folder")
    verb.add_argument("--licence", help="of the weights, as the hub spells it: apache-2.0 (default: by the corpus)")
    verb.set_defaults(act=_export)

    verb = verbs.add_parser("push", parents=[common], help="upload an exported run or a table of runs to the hub, private by default")
    verb.add_argument("what", help="an exported folder, a .csv or .parquet of runs, or the folder of a store")
    verb.add_argument("repo_id", metavar="OWNER/NAME")
    verb.add_argument("--public", action="store_true", help="for everybody to see")
    verb.add_argument("--message", help="of the commit")
    verb.add_argument("--dry-run", action="store_true", help="list what would be sent, and stop")
    verb.set_defaults(act=_push)
    _eval_words(verbs.add_parser("eval", parents=[common], help="a checkpoint's scores on benchmarks, beside the published ones"))


def _eval_words(verb) -> None:
    verb.add_argument("checkpoint", help="a folder, or the name of a checkpoint that was fetched")
    verb.add_argument("--tasks", nargs="+", metavar="TASK", help="benchmarks or the harness's own tasks (default: the papers' benchmarks)")
    verb.add_argument("--limit", type=int, metavar="N", help="the first N items of each task (default: all)")
    verb.add_argument("--published", metavar="MODEL", help="whose printed scores stand beside (default: the checkpoint's own)")
    verb.add_argument("--dtype", default="float32", help="of the weights as they are computed with (default: float32)")
    verb.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    verb.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    verb.add_argument("--task-folder", help="tasks of your own in the harness's YAML format")
    verb.add_argument("--run-code", action="store_true", help="run programs that the model writes, on this machine (HumanEval, MBPP)")
    verb.add_argument("--results", default="results/evaluations", help="where evaluations are kept (default: results/evaluations)")
    verb.set_defaults(act=_eval)


def _fetch(options):
    if options.what == "checkpoint":
        from etastar.hub.checkpoints import fetch_command

        return show(fetch_command(options), options)
    if options.folder or options.dry_run:
        raise ValueError("--folder and --dry-run are of fetch checkpoint; archives go to the cache (ETASTAR_CACHE)")
    return _fetch_archives(options)


def _fetch_archives(options):
    from etastar.archives.fetch import fetch_archives, summary

    files = fetch_archives(options.names, progress=False if options.json else None)
    rows, problems = summary(files), [f for f in files if not f.here]
    if options.json:
        print(json.dumps({"archives": rows, "missing": [vars(f) for f in problems]}, indent=1))
    else:
        import pandas as pd

        print(pd.DataFrame(rows).to_string(index=False))
        for reason in dict.fromkeys((f.archive, f.reason) for f in problems):
            print(f"{reason[0]}: {sum((f.archive, f.reason) == reason for f in problems)} not here: {reason[1]}", file=sys.stderr)
    # A host that cannot be reached is no failure where a mirror or the cache has a part: what can be read is read.
    return int(any(f.state in ("refused", "failed") for f in problems) or any(not row["here"] for row in rows))


def _export(options):
    from etastar.hub.export import export_command

    print(export_command(options))


def _push(options):
    from etastar.hub.push import push_command

    print(push_command(options))


def _eval(options):
    from etastar.hub.evaluate import eval_command

    show(eval_command(options), options)


def show(parts: dict, options) -> None:
    """Print tables, dicts and texts by name, for eyes or as JSON."""
    if options.json:
        print(json.dumps({k: json.loads(v.to_json(orient="records")) if hasattr(v, "to_json") else v for k, v in parts.items()}, indent=1))
        return
    for name, part in parts.items():
        text = part.to_string(index=False) if hasattr(part, "to_string") else part
        print(f"{name}\n{text if isinstance(text, str) else json.dumps(text, indent=1)}\n")
