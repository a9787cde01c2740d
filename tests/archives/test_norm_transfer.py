"""Run tables in the layout of the norm-transfer toolkit: literal files, our runs written and read back, a made-up tracking server."""

import re
import sys
import types

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etastar.archives import norm_transfer
from etastar.archives.norm_transfer import from_tracker, read_tables, table_name, write_table

HEADER = "step,output_norm,train_loss,run_name,bs,seed,momentum,lr,lr_hidden,lr_in,lr_out,horizon"
ROWS = ["128,16.0,5.5,lr-0.125-bs-32-seed-30,32,30,1.0,0.125,0.125,0.125,0.125,16777216",
        "256,64.0,nan,lr-0.125-bs-32-seed-30,32,30,1.0,0.125,0.125,0.125,0.125,33554432"]
LAYERS = "128,8.0,5.0,lr-i1h0o2-bs-64,64,30,1.0,,0.0625,0.5,0.25,33554432"
# what their preprocessing accepts as the name of a run
THEIR_NAME = re.compile(r"^lr-(\d+(\.\d*)?([eE][+-]?\d+)?|i\d+h\d+o\d+)-bs-\d+(-momentum-\d+(\.\d*)?([eE][+-]?\d+)?(-.*)?|(-seed-\d+)?)$")


BASE = table_name("base", seed=30)
ARGS = ("--training.seed=30", "--training.global_batch_size=32", "--optimizer.momentum=1.0", "--job.dump")


@pytest.fixture
def table(tmp_path):
    """Writes rows of a CSV file in the layout; returns its path."""

    def write(*rows, name=BASE, header=HEADER):
        path = tmp_path / name
        path.write_text("\n".join([header, *rows]) + "\n")
        return path

    return write


def ours(steps=(10, 20), batches=(4, 8), rates=(0.5, 2.0**-7), context=64, **more):
    """Rows of our runs at every batch, rate and step."""
    rows = [{"model": "width 64", "steps": s, "batch_sequences": b, "horizon_tokens": s * b * context, "peak_lr": lr, "seed": 1000,
             "log2_norm": np.log2(1 + lr * s), "loss": 6 - 0.1 * s * lr} | more for b in batches for lr in rates for s in steps]
    return pd.DataFrame(rows)


def test_a_table_is_told_in_our_columns_and_units(table):
    frame = read_tables(table(*ROWS).parent)
    first, second = frame.to_dict("records")
    assert first == {"model": "base", "scan": "lr-bs-scan", "run": "lr-0.125-bs-32-seed-30", "steps": 128, "horizon_tokens": 2**24,
                     "batch_tokens": 2**17, "batch_sequences": 32, "peak_lr": 0.125, "lr_input": 0.125, "lr_hidden": 0.125,
                     "lr_output": 0.125, "momentum": 1.0, "decayed": False, "seed": 30, "log2_norm": 4.0, "loss": 5.5}
    assert second["log2_norm"] == 6 and np.isnan(second["loss"])  # a lost run keeps its rows


@pytest.mark.parametrize("name, model, scan", [
    ("lr-bs-scan-x4-width-momentum-1.0-preprocessed-seeds.csv", "x4-width", "lr-bs-scan"),
    ("lr-bs-scan-per-layer-base-momentum-1.0-preprocessed-seeds.csv", "base", "lr-bs-scan-per-layer"),
    ("mass-scan-per-layer-base-momentum-1.0-preprocessed-seeds-30-3034.csv", "base", "mass-scan-per-layer"),
    ("lr-bs-scan-x8-depth-momentum-0.1-decayed-preprocessed-seed-30.csv", "x8-depth", "lr-bs-scan"),
    ("my runs.csv", "my runs", ""),
])
def test_the_model_is_read_from_the_files_name(table, name, model, scan):
    frame = read_tables(table(ROWS[0], name=name))
    assert (frame["model"].item(), frame["scan"].item()) == (model, scan)


def test_rates_of_layer_groups_and_decay_are_kept_apart(table):
    decayed = ROWS[0].replace("-seed-30", "-momentum-0.1-seed-30-decayed").replace(",1.0,", ",0.1,")
    frame = read_tables(table(LAYERS, decayed)).set_index("batch_sequences")
    assert frame.loc[64, ["lr_input", "lr_hidden", "lr_output"]].tolist() == [0.5, 0.0625, 0.25] and np.isnan(frame.loc[64, "peak_lr"])
    assert frame["decayed"].to_dict() == {32: True, 64: False} and frame["momentum"].to_dict() == {32: 0.1, 64: 1.0}


def test_a_folders_tables_are_read_together_without_aggregates_and_minima(table):
    table(*ROWS)
    table(ROWS[0], name=table_name("x4-width"))
    table("1,2", name="lr-bs-scan-base-momentum-1.0-preprocessed-seeds-agg.csv", header="bs,train_loss_mean")
    table("1,2", name="_minima_more_horizons.csv", header="bs,lr")
    assert read_tables(table(*ROWS).parent)["model"].tolist() == ["base", "base", "x4-width"]


@pytest.mark.parametrize("rows, header, said", [
    ([ROWS[0]], HEADER.replace("output_norm", "norm").replace(",bs,", ",batch,"), "no column 'output_norm', 'bs'; it has step, norm"),
    ([ROWS[0].replace(",16.0,", ",-1.0,")], HEADER, "output_norm -1 in 1 rows; norms, rates and batches must be positive"),
    ([ROWS[0].replace(",16.0,", ",0,"), ROWS[1].replace(",64.0,", ",,")], HEADER, "output_norm 0 in 1 rows"),
    ([ROWS[0].replace(",0.125", ",0")], HEADER, "lr_in 0 in 1 rows; lr_hidden 0 in 1 rows; lr_out 0 in 1 rows; lr 0 in 1 rows"),
    ([ROWS[0].replace(",1.0,", ",1.5,")], HEADER, "momentum 1.5 in 1 rows"),
    ([ROWS[0].replace("128,", "128.5,", 1)], HEADER, "step 128.5 in 1 rows"),
    ([ROWS[0], ROWS[1].replace("33554432", "3355443")], HEADER, "one whole context; contexts found: 409.6, 4096"),
    ([ROWS[0].replace("128,", "0,", 1)], HEADER, "contexts found: none"),
    ([], HEADER, "no rows"),
])
def test_what_no_run_can_have_logged_is_refused_in_one_error(table, rows, header, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        read_tables(table(*rows, header=header))
    assert BASE in str(refused.value)


def test_tables_of_several_contexts_and_empty_folders_are_refused(table, tmp_path):
    table(ROWS[0])
    table(ROWS[0].replace("16777216", "8388608"), name=table_name("x4-width"))
    with pytest.raises(ValueError, match="several contexts, 2048, 4096 tokens a sequence"):
        read_tables(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no run table"):
        read_tables(tmp_path / "empty")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(2**-12, 4), min_size=1, max_size=4, unique=True), st.sampled_from([1.0, 0.1, 0.05]), st.booleans(),
       st.sampled_from([64, 4096]))
def test_what_our_runs_write_is_read_back(tmp_path_factory, rates, momentum, decayed, context):
    frame = ours(rates=rates, context=context, momentum=momentum, decayed=decayed).sample(frac=1, random_state=0)
    path = tmp_path_factory.mktemp("tables") / table_name("width 64", momentum, decayed, 1000)
    back = read_tables(write_table(frame, path))
    keys = ["batch_sequences", "peak_lr", "steps"]
    for name in [c for c in back if c in frame]:
        got, given_ = (f.sort_values(keys)[name].tolist() for f in (back, frame))
        assert got == (pytest.approx(given_, rel=1e-14) if name == "log2_norm" else given_), name
    assert (back["batch_tokens"] == back["batch_sequences"] * context).all() and back["run"].nunique() == 2 * len(rates)
    if momentum != 1 or not decayed:  # theirs has no name for decay without momentum
        assert all(THEIR_NAME.match(name) for name in back["run"])


def test_a_file_of_ours_has_their_columns_in_their_units(tmp_path):
    path = write_table(ours(steps=(3,), batches=(4,), rates=(0.5,), log2_norm=5.0), tmp_path / "new" / "ours.csv")
    assert path.read_text().splitlines() == [HEADER, "3,32.0,5.85,lr-0.5-bs-4-seed-1000,4,1000,1.0,0.5,0.5,0.5,0.5,768"]


def test_layer_groups_are_named_by_places_and_told_by_columns(tmp_path):
    frame = ours(steps=(3,), batches=(4,), rates=(0.5, 0.25)).assign(lr_hidden=[0.0625, 0.125])
    back = read_tables(write_table(frame, tmp_path / "x.csv"))
    assert back["run"].tolist() == ["lr-i0h1o0-bs-4-seed-1000", "lr-i1h0o1-bs-4-seed-1000"] and back["peak_lr"].isna().all()
    assert all(THEIR_NAME.match(name) for name in back["run"])
    assert back[["lr_input", "lr_hidden", "lr_output"]].values.tolist() == [[0.25, 0.125, 0.25], [0.5, 0.0625, 0.5]]


@pytest.mark.parametrize("change, said", [
    (lambda f: f.drop(columns=["loss", "seed"]), "no column 'loss', 'seed'"),
    (lambda f: f.assign(model=["a", "b"] * 4), "one file holds one model, got a, b"),
    (lambda f: f.assign(decayed=[True, False] * 4), "one file holds one decayed"),
    (lambda f: pd.concat([f, f.head(1)]), "1 rows have the name and step of another, lr-0.5-bs-4-seed-1000 for example"),
    (lambda f: f.assign(horizon_tokens=f["horizon_tokens"] + f["batch_sequences"] * (f["steps"] == 20)), "contexts found"),
])
def test_frames_their_scripts_would_mix_are_not_written(tmp_path, change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        write_table(change(ours()), tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()


def tracked(name="lr-0.125-bs-32-seed-30", rates=((0.125,) * 3,) * 2, args=ARGS):
    history = [{"_step": 128 * (i + 1), norm_transfer.NORM: 16.0, norm_transfer.LOSS: 5.5 - i, "lr/opt_0/group_0": hidden,
                "lr/opt_0/group_1": first, "lr/opt_0/group_2": last} for i, (first, hidden, last) in enumerate(rates)]
    told = None if args is None else {"args": list(args)}
    return types.SimpleNamespace(name=name, metadata=told, scan_history=lambda keys: iter(history))


class Server:
    """A tracking server with these runs, which remembers what it was asked."""

    def __init__(self, *runs):
        self.held, self.asked = runs, []

    def runs(self, project, filters):
        self.asked.append((project, filters))
        return list(self.held)


def test_runs_of_the_tracker_come_as_those_of_a_table(table):
    server = Server(tracked(), tracked("lost", args=None), tracked("test", args=ARGS[:1]), tracked("empty", rates=()))
    frame = from_tracker("base", "scan", client=server)
    assert server.asked == [("sdlaml-llm/norm-transfer", {"group": "scan"})] and frame.attrs["left_out"] == ["lost", "test", "empty"]
    exported = read_tables(table(ROWS[0], ROWS[1].replace("64.0,nan", "16.0,4.5")))
    pd.testing.assert_frame_equal(frame.drop(columns="scan"), exported.drop(columns="scan"))


def test_a_decayed_run_of_the_tracker_has_the_rate_it_began_with_and_layer_groups_have_their_own():
    falling = tracked("lr-0.25-bs-32-momentum-0.1-decayed", rates=((0.25,) * 3, (0.125,) * 3))
    groups = tracked("lr-i1h0o2-bs-32", rates=((0.5, 0.0625, 0.25),))
    frame = from_tracker("base", "scan", client=Server(falling, groups)).set_index("run")
    assert frame.loc[falling.name, "peak_lr"].tolist() == [0.25, 0.25] and frame.loc[falling.name, "decayed"].all()
    assert frame.loc[groups.name, ["lr_input", "lr_hidden", "lr_output"]].tolist() == [0.5, 0.0625, 0.25]
    with pytest.raises(ValueError, match="group 'scan' has no run with logged norms; 1 runs left out"):
        from_tracker("base", "scan", client=Server(tracked(args=None)))


def test_without_the_trackers_client_the_error_says_how_to_go_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb.*or export the runs with the authors' scripts"):
        from_tracker("base", "scan")
