"""The benchmarks measure like with like, and say it in rows of one format. No times are asserted."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from etastar import cli
from etastar.model.shapes import parameter_shapes

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import fits, plain, plan, shapes, train, ways, worker  # noqa: E402
from benchmarks.rows import show, table  # noqa: E402

STEPS = 30
ROW = {"bench": str, "shape": str, "way": str, "layout": str, "slots": int, "processes": int, "threads": int, "device": str,
       "precision": str, "tokens_per_s": float, "gflops": float, "gemm_gflops": float, "gemm_share": float, "ratio_to_plain": float,
       "peak_bytes": int, "torch_bytes": int, "counted_bytes": int, "compile_s": float, "rounds": int}


@pytest.fixture(scope="module")
def engine_curves():
    """Losses of two seeds trained by the engine."""
    return ways.build("engine", shapes.TINY, "cpu", 2)(STEPS)


@pytest.mark.parametrize("way, models", [("plain", 1), ("script", 1), ("vmap", 2)])
def test_every_way_trains_the_same_model_on_the_same_batches(engine_curves, way, models):
    curves = ways.build(way, shapes.TINY, "cpu", models)(STEPS)
    assert curves.shape == (models, STEPS) and curves[0, -1] < curves[0, 0] - 0.05
    np.testing.assert_allclose(curves, engine_curves[:models], atol=1e-3)


def test_a_trainer_goes_on_where_it_stood(engine_curves):
    more = ways.build("plain", shapes.TINY, "cpu", 1)
    np.testing.assert_allclose(np.concatenate([more(10), more(20)], axis=1), engine_curves[:1], atol=1e-3)


def test_parameters_in_another_order_are_refused():
    given = {name: torch.zeros(shape) for name, shape in parameter_shapes(shapes.TINY.model, shapes.TINY.vocab).items()}
    with pytest.raises(ValueError, match="embedding is .* but the module has"):
        plain.load(plain.Plain(shapes.TINY.model, 2 * shapes.TINY.vocab), given)


def test_counted_bytes_are_the_literal_ones():
    # 30,880 parameters of 16 bytes; a token keeps 2 · (8 · 32 + 3 · 96) + 2 · 32 = 1152 floats and 64 probabilities
    assert shapes.counted_bytes(shapes.TINY, 1, "fp32") == 16 * 30_880 + 128 * (4 * 1152 + 4 * 64)


def test_rows_of_train_come_as_json_lines(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)  # one process a way is enough here
    options = SimpleNamespace(device="cpu", shapes=["tiny"], ways=["engine", "plain"], rounds=1, seconds=0.05, shared_core=False)
    show(train.rows(options), as_json=True)
    check_rows(capsys.readouterr().out, {"engine", "plain"})


@pytest.mark.slow
def test_every_way_of_the_command_prints_its_rows(capfd):
    words = ["bench", "train", "--json", "--shapes", "tiny", "--rounds", "1", "--seconds", "0.05", "--shared-core"]
    assert cli.main(words) == 0
    rows = check_rows(capfd.readouterr().out, {"engine", "engine_compiled", "plain", "plain_compiled", "vmap", "script"})
    assert {row["way"] for row in rows if row["bench"] == "shared_core"} == {"engine", "plain"}
    assert all(row["compile_s"] > 0 for row in rows if row.get("way", "").endswith("_compiled"))


def check_rows(text: str, ways_wanted: set[str]) -> list[dict]:
    rows = [json.loads(line) for line in text.splitlines()]
    trained = [row for row in rows if row["bench"] == "train"]
    assert {row["way"] for row in trained} == ways_wanted and rows[0]["bench"] == "machine"
    for row in trained:
        assert all(isinstance(row[name], kind) for name, kind in ROW.items()) and row["tokens_per_s"] > 0
    assert [row["ratio_to_plain"] for row in trained if row["way"] == "plain" and row["best"]] == [1.0]
    assert {row["part"] for row in rows if row["bench"] == "part"} == {"step", "data", "forward", "backward", "optimizer", "validation",
                                                                       "checkpoint"}
    return rows


def test_an_unknown_benchmark_gives_one_clear_line(capfd):
    assert cli.main(["bench", "nope"]) == 2
    err = capfd.readouterr().err
    assert "unknown benchmark 'nope'; known: train, optimizer, fits, data, plan, norms, mixture, distributed_scion" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_unknown_shape_or_way_is_named_with_the_known_ones(device):
    with pytest.raises(ValueError, match=f"unknown shape 'Q' for device {device}; known: "):
        shapes.shapes(["Q"], device)
    with pytest.raises(ValueError, match=f"unknown way 'Q' on device {device}; known: engine, "):
        ways.ways(["Q"], device)


def test_bench_outside_a_source_checkout_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lib" / "etastar" / "cli.py"))
    assert cli.main(["bench", "train"]) == 2
    assert "needs a source checkout" in capsys.readouterr().err


def test_the_other_rows_name_their_reference(capsys):
    show(fits.rows(SimpleNamespace(rounds=1)), as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["reference"] for row in rows} == {"numpy polyfit", "scipy BFGS"} and all(row["ratio"] > 0 for row in rows)


def test_the_grid_shares_its_trunks_and_one_run_more_touches_no_other(tmp_path):
    told = plan.plan("build_segments", 40)
    assert told["steps"] < told["steps_without_sharing"] / 1.5
    plan.write(str(tmp_path), 3)
    added = plan.add(str(tmp_path), 3)
    assert (added["files_new"], added["files_changed"]) == (2, 0) and plan.open_table(str(tmp_path), "Store.table")["runs"] == 4


def test_a_turn_lasts_as_long_as_asked_and_trains_at_least_once():
    done = []
    assert worker.turn(done.append, 3, 0.0)[0] == 3 and done == [3]


def test_a_table_says_what_is_alike_once():
    rows = [{"bench": "b", "way": way, "speed": speed, "device": "cpu"} for way, speed in (("x", 12345.6), ("y", None))]
    text = table(rows)
    assert text.splitlines()[0] == "  device cpu" and "12,346" in text and "–" in text
