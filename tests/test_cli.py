"""The command line from end to end on tiny recipes, and one clear line for what cannot be."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import etastar as es
from etastar.studies import cosine_vs_wsd
from tiny import BATCH, recipe, wsd


@pytest.fixture
def etastar(command, tmp_path):
    """A command, in a folder that has a small sweep."""
    (tmp_path / "sweep.json").write_text(json.dumps([json.loads(recipe(20, schedule=wsd(4)).to_json()),
                                                     json.loads(recipe(12).to_json())]))
    return command


def test_plan_run_look_branch_export_and_clean_up(etastar, tmp_path):
    status, out, _ = etastar("plan", "sweep.json", "--json", "--no-measure")
    cost = json.loads(out)["cost"]
    assert status == 0 and (cost["runs"], cost["done"], cost["tokens"]) == (2, 0, 20 * BATCH)
    assert cost["tokens_without_sharing"] == 32 * BATCH and cost["seconds"] is None
    status, out, _ = etastar("run", "sweep.json", "--json", "--workers", 1)
    rows = json.loads(out)
    assert status == 0 and [r["status"] for r in rows] == ["done", "done"]
    assert json.loads(etastar("plan", "sweep.json", "--json")[1])["cost"]["tokens"] == 0
    _, out, _ = etastar("runs", "list", "--json")
    assert {r["run_id"] for r in json.loads(out)} == {r["run_id"] for r in rows}
    _, out, _ = etastar("runs", "show", rows[0]["run_id"])
    assert json.loads(out)["recipe"]["schedule"]["kind"] == "WSD"
    status, out, _ = etastar("branch", rows[1]["run_id"], "--at-tokens", 8 * BATCH, "--horizon-tokens", 10 * BATCH, "--schedule",
                             '{"kind": "WSD", "cooldown_fraction": 1}', "--json")
    assert status == 0 and json.loads(out)["status"] == "done"
    for name, read in (("table.csv", pd.read_csv), ("table.parquet", pd.read_parquet)):
        assert "3 runs written" in etastar("runs", "export", name)[1] and list(read(tmp_path / name).observed) == ["{}"] * 3
    assert "removed .nodes" in etastar("runs", "gc", "--states")[1]


def test_recipes_can_be_planned_and_written_here_and_run_elsewhere(etastar, tmp_path):
    status, out, _ = etastar("plan", "01", "--preset", "gpu", "--write", "gpu.json", "--no-measure")
    assert status == 0 and "training FLOPs" in out
    recipes = [es.Recipe.from_json(body) for body in json.loads((tmp_path / "gpu.json").read_text())]
    assert recipes == cosine_vs_wsd.recipes("gpu") and recipes[0].execution.device == "cuda"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_runs_for_a_gpu_are_refused_where_there_is_none(etastar, tmp_path):
    body = json.loads(recipe(4).to_json()) | {"execution": {"kind": "Execution", "device": "cuda"}}
    (tmp_path / "gpu.json").write_text(json.dumps(body))
    status, _, err = etastar("run", "gpu.json")
    assert status == 2 and "sees no GPU" in err


def test_parameters_are_printed_as_a_table(etastar):
    _, out, _ = etastar("plan", "sweep.json", "--parameters")
    assert "layers.1.mlp_out" in out and "weight_decay" in out


def test_a_study_is_planned_with_its_power_and_what_an_effect_needs(etastar):
    status, out, _ = etastar("plan", "01_cosine_vs_wsd", "--preset", "paper", "--resolve", "0.002", "--json")
    told = json.loads(out)
    assert status == 0 and told["cost"]["flops"] > 1e18 and told["resolve"]["seeds"] > 10
    assert told["power"][0]["contrast"] == "wsd20 − cos10"


def test_what_an_effect_needs_follows_the_noise_of_the_store_where_it_has_any(etastar, monkeypatch):
    def told():
        return json.loads(etastar("plan", "01_cosine_vs_wsd", "--preset", "paper", "--resolve", "0.002", "--json")[1])["resolve"]

    pilot = told()
    monkeypatch.setattr("etastar.studies.noise.from_store", lambda store: SimpleNamespace(
        sd_for=lambda width, horizon_tokens, paired: SimpleNamespace(sd=2 * pilot["sd_nats"])))
    assert told()["sd_nats"] == 2 * pilot["sd_nats"] and told()["seeds"] > 2 * pilot["seeds"]


@pytest.mark.parametrize("words, said", [
    (("run", "nope"), "unknown study 'nope'"),
    (("run", "nope.json"), "no file nope.json"),
    (("runs", "show"), "needs a run id"),
    (("runs", "show", "abc"), "no run 'abc'"),
    (("runs", "export", "x.xls"), "ends in .csv or .parquet"),
    (("reproduce", "--study", "nope", "--preset", "smoke"), "unknown study 'nope'"),
    (("plan", "01", "--preset", "smoke", "--minutes", "-3", "--no-measure"), "minutes must be positive"),
])
def test_one_clear_line_for_what_cannot_be(etastar, words, said):
    status, _, err = etastar(*words)
    assert status == 2 and said in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_an_unknown_key_in_a_file_of_recipes_is_named(etastar, tmp_path):
    (tmp_path / "bad.json").write_text((tmp_path / "sweep.json").read_text().replace("peak_lr", "peak_rl"))
    status, _, err = etastar("run", "bad.json")
    assert status == 2 and "unknown key 'peak_rl'" in err
