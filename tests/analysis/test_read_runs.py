"""Tables of runs in other people's layouts: read into ours, refused with the mend, warned of where units are off."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import etastar as es
from etastar.analysis.power_law import fit_power_law
from etastar.analysis.read_runs import SYNONYMS, read_runs
from etastar.analysis.units import UnitWarning

ROW = {"run": "a", "params": 124_000_000, "horizon_tokens": 2_000_000_000, "batch_tokens": 524_288, "peak_lr": 3e-4, "seed": 1, "loss": 3.5}


@pytest.fixture(autouse=True)
def no_unexpected_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnitWarning)
        warnings.simplefilter("error", UserWarning)
        yield


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_a_spreadsheet_with_units_in_its_names(tmp_path):
    path = write(tmp_path, "sweep.csv", "lr,tokens (B),val_loss,n_params,schedule,note\n3e-4,2,3.5,124M,wsd,x\n2^-9,0.5,nan,1.3B,wsd,y\n")
    runs = read_runs(path)
    assert runs.peak_lr.tolist() == [3e-4, 2**-9] and runs.horizon_tokens.tolist() == [2_000_000_000, 500_000_000]
    assert runs.params.tolist() == [124_000_000, 1_300_000_000] and runs.horizon_tokens.dtype == "int64"
    assert runs.status.tolist() == ["done", "diverged"] and math.isnan(runs.loss[1])
    assert runs.run.tolist() == ["0", "1"] and runs.note.tolist() == ["x", "y"] and runs.schedule.tolist() == ["wsd", "wsd"]


def test_a_wandb_export_with_dotted_config_and_states(tmp_path):
    path = write(tmp_path, "wandb.tsv", "Name\tState\tconfig.optimizer.lr\tconfig.seed\tsummary.eval/loss\ttrain/loss\n"
                                        "r1\tfinished\t0.01\t0\t3.1\t3.0\nr2\tfinished\t0.02\t1\tInfinity\t9\nr3\trunning\t0.04\t0\t4.0\t4.1\n")
    with pytest.warns(UserWarning, match="1 of 3 runs have not finished .1 running"):
        runs = read_runs(path)
    assert runs.run.tolist() == ["r1", "r2", "r3"] and runs.status.tolist() == ["done", "diverged", "running"]
    assert runs.peak_lr.tolist() == [0.01, 0.02, 0.04] and runs.loss.tolist()[::2] == [3.1, 4.0] and "train/loss" in runs


def test_a_tracker_export_whose_cells_are_printed_dicts(tmp_path):
    table = pd.DataFrame({"name": ["a", "b"], "config": ["{'lr': 0.01, 'bs': 524288, 'x': None}", "{'lr': 0.02, 'bs': 524288, 'x': None}"],
                          "summary": ["{'val_loss': 3.0}", "{'val_loss': nan}"]})
    table.to_csv(tmp_path / "runs.csv", index=False)
    runs = read_runs(tmp_path / "runs.csv")
    assert runs.peak_lr.tolist() == [0.01, 0.02] and runs.batch_tokens.tolist() == [524_288] * 2
    assert runs.status.tolist() == ["done", "diverged"]


def test_scalars_in_long_form_give_each_runs_last_loss_and_highest_rate():
    rate, loss = {1: 0.01, 2: 0.02, 3: 0.005}, {1: 5.0, 3: 4.0}
    rows = [(run, step, tag, value) for run in ("b", "a") for tag, values in (("train_lr", rate), ("eval/loss", loss))
            for step, value in values.items()]
    runs = read_runs(pd.DataFrame(rows, columns=["run", "step", "tag", "value"]))
    assert runs.run.tolist() == ["b", "a"] and runs.peak_lr.tolist() == [0.02, 0.02] and runs.loss.tolist() == [4.0, 4.0]


def test_jsonl_with_nested_config(tmp_path):
    rows = [{"run": "a", "config": {"learning_rate": {"value": 0.1}, "N": 5}, "final_loss": 2.0},
            {"run": "b", "config": {"learning_rate": {"value": 0.2}, "N": 5}, "final_loss": "diverged"}]
    runs = read_runs(write(tmp_path, "runs.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"))
    assert runs.peak_lr.tolist() == [0.1, 0.2] and runs.status.tolist() == ["done", "diverged"]


def test_a_folder_of_summaries_beside_their_configs(tmp_path):
    for i, lr in enumerate((1e-3, 2e-3)):
        (folder := tmp_path / "sweep" / f"run{i}").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"lr": lr, "seed": i, "tokens": 10**9}))
        (folder / "summary.json").write_text(json.dumps({"val_loss": 3.0 + i}))
    runs = read_runs(tmp_path / "sweep")
    assert runs.run.tolist() == ["run0", "run1"] and runs.peak_lr.tolist() == [1e-3, 2e-3] and runs.loss.tolist() == [3.0, 4.0]
    for i in range(2):
        (tmp_path / f"{i}.json").write_text(json.dumps({"lr": 0.5, "loss": i}))
    (tmp_path / "flat").mkdir()
    [(tmp_path / f"{i}.json").rename(tmp_path / "flat" / f"{i}.json") for i in range(2)]
    assert read_runs(tmp_path / "flat").run.tolist() == ["0", "1"]


def test_a_store_and_its_export_are_read_alike(tmp_path):
    from tiny import recipe

    done = es.run([recipe(4), recipe(4, peak_lr=2**-5), recipe(8, seed=1)], store=tmp_path / "runs", backend="inline", progress=False)
    with pytest.warns(UnitWarning):  # 512 tokens in all are few indeed
        runs = read_runs(tmp_path / "runs").set_index("run")
    for run in done:
        row = runs.loc[run.run_id]
        assert (row.peak_lr, row.horizon_tokens, row.loss, row.seed, row.status) == (
            run.recipe.peak_lr, run.recipe.horizon_tokens, run.val_loss, run.recipe.seed, "done")
    from etastar.engine.store import Store

    table = Store(tmp_path / "runs").table().assign(run_id=lambda t: Store(tmp_path / "runs").run_ids())
    table.to_csv(tmp_path / "export.csv", index=False)
    with pytest.warns(UnitWarning):
        again = read_runs(tmp_path / "export.csv").set_index("run")
    same = ["params", "peak_lr", "loss", "seed"]
    pd.testing.assert_frame_equal(again[same].sort_index(), runs[same].sort_index())


def test_other_separators_than_the_suffix_says_are_found(tmp_path):
    for name, text in (("a.csv", "lr;loss\n0.1;3\n"), ("b.txt", "lr,loss\n0.1,3\n")):
        assert read_runs(write(tmp_path, name, text))[["peak_lr", "loss"]].iloc[0].tolist() == [0.1, 3.0]


def test_json_tables_in_three_shapes(tmp_path):
    rows = [{"lr": 0.1, "loss": 1.0}, {"lr": 0.2, "loss": 2.0}]
    for body in (rows, {"runs": rows}, {"lr": [0.1, 0.2], "loss": [1.0, 2.0]}, {"0": rows[0], "1": rows[1]}):
        assert read_runs(write(tmp_path, "t.json", json.dumps(body)))[["peak_lr", "loss"]].to_numpy().tolist() == [[0.1, 1.0], [0.2, 2.0]]


SAFE = st.floats(1e-6, 1.0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(SAFE, st.one_of(st.floats(0.5, 12), st.just(math.nan)), st.integers(0, 99), st.integers(10**6, 10**12)),
                     min_size=1, max_size=6),
       names=st.fixed_dictionaries({o: st.sampled_from([n for n in SYNONYMS[o] if not n.endswith(("ppl", "perplexity"))])
                                    for o in ("peak_lr", "loss", "seed", "horizon_tokens")}),
       kind=st.sampled_from(["csv", "tsv", "parquet", "jsonl", "json"]), upper=st.booleans())
def test_whatever_it_is_called_and_kept_in_the_same_comes_back(tmp_path, rows, names, kind, upper):
    ours = pd.DataFrame(rows, columns=["peak_lr", "loss", "seed", "horizon_tokens"])
    theirs = ours.rename(columns={o: n.upper() if upper and len(n) > 1 else n for o, n in names.items()})
    path = tmp_path / f"t.{kind}"
    {"csv": lambda: theirs.to_csv(path, index=False), "tsv": lambda: theirs.to_csv(path, sep="\t", index=False, na_rep="NaN"),
     "parquet": lambda: theirs.to_parquet(path), "json": lambda: theirs.to_json(path, orient="records", double_precision=15),
     "jsonl": lambda: path.write_text("\n".join(json.dumps(row) for row in theirs.to_dict("records")))}[kind]()
    back = read_runs(path)
    np.testing.assert_allclose(back[list(ours)].to_numpy(dtype=float), ours.to_numpy(dtype=float), rtol=1e-12)
    assert (back.status == np.where(ours.loss.isna(), "diverged", "done")).all()


# -- units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours, unit, theirs, expected", [
    ("horizon_tokens", "billions", 2.5, 2.5e9), ("horizon_tokens", "M", 2500, 2.5e9), ("horizon_tokens", "steps", 1000, 1000 * 524_288),
    ("batch_tokens", "sequences of 2048", 256, 524_288), ("loss", "bits", 5.0, 5 * math.log(2)), ("loss", "perplexity", 20.0, math.log(20)),
    ("peak_lr", "log2", -9.0, 2**-9), ("peak_lr", "log10", -3.0, 1e-3), ("peak_lr", "ln", -5.0, math.exp(-5)), ("peak_lr", 1e-3, 0.3, 3e-4),
    ("params", "millions", 124.0, 1.24e8), ("params", "trillions", 1.0, 1e12),
])
def test_units_are_converted(ours, unit, theirs, expected):
    runs = read_runs(pd.DataFrame([ROW | {ours: theirs}]), units={ours: unit})
    assert runs[ours][0] == pytest.approx(expected, rel=1e-12)
    others = [name for name in ("params", "horizon_tokens", "batch_tokens", "peak_lr", "loss") if name != ours]
    assert runs[others].iloc[0].tolist() == [ROW[name] for name in others]


@pytest.mark.parametrize("name, value, ours, expected", [
    ("log2_lr", -9.0, "peak_lr", 2**-9), ("tokens_millions", 2000, "horizon_tokens", 2e9), ("params_b", 0.124, "params", 124e6),
    ("val_ppl", 20.0, "loss", math.log(20)),
])
def test_a_unit_in_the_name_is_read(name, value, ours, expected):
    row = {k: v for k, v in ROW.items() if k != ours} | {name: value}
    assert read_runs(pd.DataFrame([row]))[ours][0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("changes, said", [
    ({"horizon_tokens": 2.0}, "'horizon_tokens': 'billions'"), ({"horizon_tokens": 2000.0}, "'horizon_tokens': 'millions'"),
    ({"horizon_tokens": 2e18}, "plain already, or FLOPs"),
    ({"params": 124.0}, "'params': 'millions'"), ({"params": 1.3}, "'params': 'billions'"),
    ({"loss": 33.0}, "'loss': 'perplexity'"), ({"peak_lr": 3.0}, "multiples of 0.001"), ({"batch_tokens": 64}, "sequences"),
    ({"batch_tokens": 256, "steps": 3815}, "'batch_tokens': 'sequences of 2048'"),
])
def test_values_that_speak_for_another_unit_are_warned_of_with_the_mend(changes, said):
    with pytest.warns(UnitWarning) as warned:
        read_runs(pd.DataFrame([ROW | changes]))
    assert any(said in str(w.message) for w in warned)


def test_a_batch_that_does_not_say_tokens_may_be_in_sequences():
    row = {k: v for k, v in ROW.items() if k != "batch_tokens"}
    with pytest.warns(UnitWarning, match="sequences of 2048"):
        read_runs(pd.DataFrame([row | {"global_batch_size": 512}]))
    assert read_runs(pd.DataFrame([row | {"global_batch_size": 512}]), units={"batch_tokens": "sequences of 2048"}).batch_tokens[0] == 2**20


def test_steps_are_told_in_tokens_after_the_batch_is():
    runs = read_runs(pd.DataFrame([ROW | {"horizon_tokens": 1000, "batch_tokens": 256}]),
                     units={"horizon_tokens": "steps", "batch_tokens": "sequences of 2048"})
    assert runs.horizon_tokens[0] == 1000 * 256 * 2048


def test_tokens_follow_from_steps_and_batch():
    row = {k: v for k, v in ROW.items() if k != "horizon_tokens"} | {"max_steps": 1000}
    assert read_runs(pd.DataFrame([row])).horizon_tokens[0] == 1000 * 524_288


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table, given, said", [
    ({"a_rate": [1], "train_loss": [2]}, {}, r"columns=\{'a_rate': 'peak_lr', 'train_loss': 'loss'\}"),
    ({"lr": [1.0], "max_lr": [2.0], "loss": [3]}, {}, r"'lr' and 'max_lr' differ .* columns=\{'lr': 'peak_lr'\}"),
    ({"lr": [0.1], "loss": [3], "val_loss": [2]}, {}, "'loss' and 'val_loss' differ and may each be loss"),
    ({"lr": [0.1], "x": [3]}, {"columns": {"y": "loss"}}, "the table has lr, x; our names are run, "),
    ({"lr": [0.1], "x": [3]}, {"columns": {"loss": "x"}}, "turn it round"),
    ({"lr": [-9.0], "loss": [3]}, {}, r'units=\{"peak_lr": "log2"\}'),
    ({"lr": [0.1, None], "loss": [3, 3]}, {}, "drop the rows without one"),
    ({"lr": [0.1], "loss": [3]}, {"units": {"params": "millions"}}, "no such column of numbers was found; found are peak_lr, loss"),
    ({"lr": [0.1], "loss": [3], "N": [5e6]}, {"units": {"params": "dozens"}}, "is not known; known are thousands"),
    ({"lr": [0.1], "loss": [3], "tokens": ["many"]}, {}, "'many' in row 0"),
    ({"lr": [0.1], "loss": [3], "steps": [5], "tokens": [7]}, {"units": {"horizon_tokens": "steps"}}, "needs batch_tokens"),
])
def test_what_is_missing_ambiguous_or_impossible_is_one_clear_error(table, given, said):
    with pytest.raises(ValueError, match=said):
        read_runs(pd.DataFrame(table), **given)


@pytest.mark.parametrize("name, text, said", [
    ("x.xls", "", "cannot read '.xls'"), ("x.csv", "lr,loss\n", "has no rows"), ("x.jsonl", "{lr}\n", "x.jsonl:1 is not JSON"),
    ("x.json", "[1]", "rows of names and values"),
])
def test_files_that_cannot_be_read_are_named(tmp_path, name, text, said):
    with pytest.raises(ValueError, match=said):
        read_runs(write(tmp_path, name, text))
    with pytest.raises(ValueError, match="no file or folder"):
        read_runs(tmp_path / "nowhere.csv")


def test_columns_that_agree_are_not_ambiguous_and_a_map_decides_where_they_do_not():
    assert read_runs(pd.DataFrame({"lr": [0.1], "config.lr": [0.1], "loss": [3.0]})).peak_lr[0] == 0.1
    table = pd.DataFrame({"lr": [0.1], "max_lr": [0.2], "loss": [3.0], "eval/nll": [2.0]})
    runs = read_runs(table, columns={"max_lr": "peak_lr", "eval/nll": "loss"})
    assert (runs.peak_lr[0], runs.loss[0], runs.lr[0]) == (0.2, 2.0, 0.1)


# -- what follows ------------------------------------------------------------------------------------------------------


def test_what_is_read_goes_straight_into_the_fits(tmp_path):
    rows = [{"learning_rate": 2.0**k, "seed": s, "tokens_b": d, "val_loss": 3 + 0.05 * (k + 8 + 0.5 * math.log2(d)) ** 2 + 0.01 * s,
             "arm": "x" if k < -8 else "y"} for d in (1, 2, 4, 8) for k in range(-12, -5) for s in (0, 1, 2)]
    pd.DataFrame(rows).to_csv(tmp_path / "grid.csv", index=False)
    runs = read_runs(tmp_path / "grid.csv")
    bowls = {d: es.fit_bowl(r.peak_lr, r.loss, r.seed) for d, r in runs.groupby("horizon_tokens")}
    law = fit_power_law(np.array(list(bowls), dtype=float), [b.best_lr for b in bowls.values()])
    assert law.exponents[0] == pytest.approx(-0.5, abs=1e-6) and list(bowls) == [10**9, 2 * 10**9, 4 * 10**9, 8 * 10**9]
    at = runs[(runs.horizon_tokens == 10**9)].pivot(index="seed", columns="peak_lr", values="loss")
    assert es.compare(at[2.0**-8], at[2.0**-6]).verdict == "lower"


@pytest.mark.archive
def test_a_published_grid_is_read_by_its_short_names():
    import os
    from pathlib import Path

    found = sorted(Path(os.environ.get("ETASTAR_MIRROR", ".")).rglob("dense_lr_bs_loss.csv"))
    if not found:
        pytest.skip("needs ETASTAR_MIRROR with the steplaw archive: etastar fetch archives steplaw")
    runs = read_runs(found[0], columns={"ti": "steps"}, units={"batch_tokens": "sequences of 2048"})
    assert len(runs) == 1911 and runs.batch_tokens.min() == 16 * 2048 and runs.horizon_tokens.nunique() >= 12
    assert (runs.steps * runs.batch_tokens / runs.horizon_tokens).between(0.99, 1.01).all()
