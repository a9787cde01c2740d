"""Models of arXiv 2403.08540: on made-up files of the published layout and on the published ones that are here."""

import json

import numpy as np
import pytest

import etastar as es
from etastar.archives import evaluations, gadre


def model(name="c4_original-d=96_l=8_h=4-8.0", losses=None, lacking=(), **told):
    told = {"model": "scaling/open_lm_configs/d=96_l=8_h=4.json", "tokens": 1_691_089_920, "warmup": 100, "lr": 0.003, "wd": 0.033,
            "cd": 3e-5, "global_bs": 64, "params": 10_569_312, "params_no_embed": 5_727_840, "chinchilla_multiplier": 8.0} | told
    results = [{"val_data": [f"training/eval_data/{where}/00000001.tar"], "loss": loss, "loss_sequences_lower_95": loss - 0.1,
                "loss_sequences_upper_95": loss + 0.2, "loss_tokens_lower_95": loss - 0.01, "loss_tokens_upper_95": loss + 0.02,
                "sequences": 120, "tokens": 245_760} for where, loss in (losses or {"c4_val": 4.6, "paloma_ptb": 6.2}).items()]
    body = {"name": name, "dataset_name": name.split("-")[0], "hyperparameters": {k: v for k, v in told.items() if k not in lacking},
            "results": results}
    return f"exp_data/models/{name}.json", json.dumps(body).encode()


def test_a_row_a_model_in_our_units(listed, mirror):
    files = dict([model(), model("rpj-open_lm_7b-1.0", losses={"paloma_ptb": 3.5}, global_bs=1, tokens=137_788_211_200)])
    mirror(listed(files, "gadre"), files)
    frame = es.archive("gadre").set_index("run")
    small, large = frame.iloc[0], frame.iloc[1]
    assert small[["dataset", "model", "params", "params_non_embedding", "horizon_tokens"]].tolist() == [
        "c4_original", "d=96_l=8_h=4", 10_569_312, 5_727_840, 1_691_089_920]
    assert small[["peak_lr", "floor_lr", "weight_decay", "warmup_steps", "batch_sequences", "batch_tokens", "steps"]].tolist() == [
        0.003, 3e-5, 0.033, 100, 64, 131_072, 12_901]
    assert small["tokens_per_param"] == pytest.approx(160, abs=0.01) and small["final_loss"] == 4.6
    assert np.isnan(large[["batch_sequences", "batch_tokens", "steps", "final_loss"]].tolist()).all()  # told as 1; not evaluated on C4


def test_evaluations_carry_the_interval_over_sequences(listed, mirror):
    files = dict([model()])
    mirror(listed(files, "gadre"), files)
    frame = evaluations("gadre").set_index("validation_set")
    assert frame.index.tolist() == ["c4_val", "paloma_ptb"]
    worse = frame.loc["paloma_ptb"]
    assert worse[["loss", "low", "high", "low_tokens", "high_tokens"]].tolist() == pytest.approx([6.2, 6.1, 6.4, 6.19, 6.22])
    assert frame.loc["c4_val", ["dataset", "params", "sequences", "tokens"]].tolist() == ["c4_original", 10_569_312, 120, 245_760]


def test_any_subset_is_read_and_the_rest_is_told_missing(listed, mirror):
    here, absent = model(), model("rpj-d=96_l=8_h=4-1.0")
    mirror(listed(dict([here, absent]), "gadre"), dict([here]))
    frame = es.archive("gadre")
    assert len(frame) == 1 and frame.attrs["missing"] == [absent[0]]


def test_a_file_that_tells_too_little_is_refused_by_name(listed, mirror):
    files = dict([model(lacking=("wd", "tokens"))])
    mirror(listed(files, "gadre"), files)
    for read in (es.archive, evaluations):
        with pytest.raises(ValueError, match=r"c4_original-d=96_l=8_h=4-8.0.json: no tokens, wd in it"):
            read("gadre")


@pytest.mark.archive
def test_the_published_models_here_are_read(skip_if_not_fetched):
    with skip_if_not_fetched():
        frame, evaluated = es.archive("gadre"), evaluations("gadre")
    assert (frame["horizon_tokens"] / frame["params"] / frame["chinchilla_multiplier"]).between(19.9, 20.1).all()
    assert (frame["run"].map(evaluated.groupby("run").size()) == 8).all()
    assert ((evaluated["low"] < evaluated["loss"]) & (evaluated["loss"] < evaluated["high"])).all()
    assert len(frame) + len(frame.attrs["missing"]) == 104
    known = frame.set_index("run")["final_loss"]
    if "c4_original-d=512_l=8_h=4-16.0" in known:
        assert known["c4_original-d=512_l=8_h=4-16.0"] == pytest.approx(3.3724, abs=1e-4)
    assert gadre.C4 in set(evaluated["validation_set"])
