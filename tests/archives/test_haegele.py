"""The traps of the runs of arXiv 2405.18392, on made-up files, and that the published files are read whole."""

import numpy as np
import pandas as pd
import pytest

import etastar as es
from etastar.archives import NotFetched, curves, evaluations, haegele


@pytest.fixture
def published(listed, mirror):
    """Puts made-up runs into a mirror as if published."""

    def publish(*runs):
        files = {"LICENSE": b"MIT"} | dict(runs)
        mirror(listed(files), files)
        return es.archive("haegele")

    return publish


def test_a_licence_alone_is_no_data(published):
    with pytest.raises(NotFetched):
        published()


def test_floors_are_told_by_the_configuration_not_by_the_name(published, made_up_run):
    frame = published(
        made_up_run("cos-10-124m", decay="_decay_sqrt_0.0", config={"cos_final_lr": -1, "wsd_fract_decay": 0.0, "decay_type": "sqrt"}),
        made_up_run("cos-zero-124m", decay="_decay_sqrt_0.0", config={"cos_final_lr": 1e-7, "wsd_fract_decay": 0.0}),
        made_up_run("sl", steps=2000)).set_index("series")
    assert frame["floor"].to_dict() == pytest.approx({"cos-10-124m": 0.1, "cos-zero-124m": 1e-4, "sl": 0.1})
    assert set(frame["schedule"]) == {"cosine"} and frame["cooldown_fraction"].isna().all()


def test_cooldowns_constants_batches_and_unknown_schedules(published, made_up_run):
    frame = published(
        made_up_run("ann0.2", scheduler="wsd", config={"wsd_fract_decay": 0.2}),
        made_up_run("ann124-0.4", scheduler="wsd", decay="_decay_sqrt_0.4", config={"wsd_fract_decay": 0.4, "decay_type": "sqrt"}),
        made_up_run("sl166", scheduler="wsd", config={"wsd_fract_decay": 0.0}),
        made_up_run("extend-50k", "slimpajama_chunk1", "wsd_twostage", decay="_decay_linear_0.2", folder="data/horizon_transfer",
                    config={"wsd_fract_decay": 0.2, "decay_type": "linear"}),
        made_up_run("", "openwebtext2", lr=0.002)).set_index("series")
    assert frame["schedule"].to_dict() == {"ann0.2": "wsd", "ann124-0.4": "wsd", "sl166": "constant", "extend-50k": "wsd_twostage",
                                           "": "cosine"}
    assert frame.loc["ann0.2", ["cooldown_fraction", "shape", "floor"]].tolist() == [0.2, "linear", 0.0]
    assert frame.loc["ann124-0.4", ["cooldown_fraction", "shape"]].tolist() == [0.4, "1-sqrt"]
    assert frame.loc["sl166", "floor"] == 1.0 and pd.isna(frame.loc["sl166", "shape"])
    assert frame.loc["extend-50k", "dataset"] == "slimpajama_chunk1" and frame.loc["extend-50k", "run"].startswith("horizon_transfer/")
    assert frame.loc["", "dataset"] == "openwebtext2"
    assert (frame["batch_tokens"] == 200 * 512).all()  # 50 × 2 × 2 sequences: names are already divided by the devices
    with pytest.raises(ValueError, match="only in its log"):
        haegele.learning_rates(frame.loc["extend-50k"])


def test_what_a_configuration_lacks_is_read_from_the_name(published, made_up_run):
    path, _ = made_up_run("ann0.2", scheduler="wsd", decay="_decay_linear_0.2", lr=0.002)
    bare = b'{"summary": {}, "config": {}, "history": {}}'
    row = published((path, bare)).iloc[0]
    assert row[["peak_lr", "steps", "schedule", "cooldown_fraction", "dataset"]].tolist() == [0.002, 1000, "wsd", 0.2, "slimpajama"]
    assert np.isnan(row["final_loss"]) and np.isnan(row["last_loss_32_batches"])
    with pytest.raises(ValueError, match="neither its name nor its configuration tells dataset"):
        published(("data/whatever.json", bare))
    contradicting = made_up_run("sl", config={"lr": 0.003})
    with pytest.raises(ValueError, match="the name says lr 0.001, the logged configuration 0.003"):
        published(contradicting)


def test_the_two_validation_losses_are_never_mixed(published, made_up_run):
    history = {"val": {"iter": [200, 800, 400], "val_loss": [5.0, 3.0, 4.0]},
               "final-val": {"iter": [1000, 500], "final_val_loss": [3.036, 3.5], "final_val_best_loss_wa": [3.02, 3.4]}}
    frame = published(made_up_run("sl", history=history, summary={"final-val/loss": 3.036, "final-val/best_loss_wa": 3.02}),
                      made_up_run("none", steps=2000, history={"val": {"iter": [1800], "val_loss": [2.9]}}))
    sl, other = frame.set_index("series").loc[["sl", "none"]].to_dict("records")
    assert (sl["final_loss"], sl["last_loss_32_batches"], sl["last_step_32_batches"], sl["swa_loss"]) == (3.036, 3.0, 800, 3.02)
    assert np.isnan(other["final_loss"]) and other["last_loss_32_batches"] == 2.9
    read = evaluations("haegele")
    assert read[["step", "loss", "swa_loss"]].values.tolist() == [[500, 3.5, 3.4], [1000, 3.036, 3.02]]
    assert read["tokens"].tolist() == [500 * 102_400, 1000 * 102_400]


def test_reruns_are_found_by_their_recipe(published, made_up_run):
    first = made_up_run("cos-10-124m")
    again = made_up_run("cos-10-124m", folder="data/grad_norm")
    frame = published(first, again, made_up_run("sl", lr=0.002)).set_index("run")
    name = first[0].removeprefix("data/").removesuffix(".json")
    assert frame.loc[f"grad_norm/{name}", "replicate_of"] == name and pd.isna(frame.loc[name, "replicate_of"])
    assert frame["group"].nunique() == 2


def steps_of(frame):
    return frame["step"].tolist()


def test_a_cooldowns_curve_gets_its_trunk_and_is_put_in_order(published, made_up_run):
    trunk = made_up_run("stable", scheduler="wsd", steps=2000, config={"wsd_fract_decay": 0.0}, history={
        "train": {"iter": [50, 600, 300, 600, 900, 1200], "train_loss": [9, 6, 7, 6.5, 5, 4], "train_lr": [1e-3] * 6}})
    name = trunk[0].removeprefix("data/").removesuffix(".json")
    history = {"train": {"iter": [850, 1000, 900, 900], "train_loss": [4, 3, 3.5, 3.7], "train_lr": [7.5e-4, 0, 5e-4, 5e-4]},
               "val": {"iter": [1000], "val_loss": [3.2]}}
    cooldown = made_up_run("ann0.2", scheduler="wsd", history=history, config={
        "wsd_fract_decay": 0.2, "resume_from": f"/elsewhere/exps/{name}/ckpts/800"})
    published(trunk, cooldown)
    run = cooldown[0].removeprefix("data/").removesuffix(".json")
    whole = curves("haegele", runs=[run])
    assert steps_of(whole) == [50, 300, 600, 850, 900, 1000] and not whole.attrs["without_trunk"]
    assert whole["logged_by"].tolist() == [name] * 3 + [run] * 3
    assert whole.loc[whole["step"] == 600, "train_loss"].item() == 6.25 and whole.loc[whole["step"] == 900, "train_loss"].item() == 3.6
    assert whole["loss_32_batches"].dropna().tolist() == [3.2]
    assert steps_of(curves("haegele", runs=[run], whole=False)) == [850, 900, 1000]
    with pytest.raises(ValueError, match="no run nope among the 2"):
        curves("haegele", runs=["nope"])


def test_a_log_that_begins_late_leaves_a_gap_and_no_false_trunk(published, made_up_run):
    trunk = made_up_run("stable", scheduler="wsd", steps=2000, config={"wsd_fract_decay": 0.0}, history={
        "train": {"iter": [100, 200, 300, 400], "train_loss": [9, 8, 7, 6], "train_lr": [1e-3] * 4}})
    late = made_up_run("ann0.8", scheduler="wsd", config={"wsd_fract_decay": 0.8, "resume_from": "/x/lost/ckpts/0"}, history={
        "train": {"iter": [500, 1000], "train_loss": [5, 4], "train_lr": [6e-4, 0]}})
    published(trunk, late)
    run = late[0].removeprefix("data/").removesuffix(".json")
    assert steps_of(curves("haegele", runs=[run])) == [100, 500, 1000]  # the cooldown began at 200: the trunk's 300 and 400 are not its own
    published(late)
    alone = curves("haegele", runs=[run])
    assert steps_of(alone) == [500, 1000] and alone.attrs["without_trunk"] == [run]


@pytest.mark.archive
def test_the_published_runs_are_read_whole_and_have_the_rates_their_schedules_say(skip_if_not_fetched):
    with skip_if_not_fetched():
        runs, logged = es.archive("haegele"), curves("haegele")
    assert len(runs) + len([p for p in runs.attrs["missing"] if haegele.is_data(p)]) == 235
    assert runs["run"].is_unique and runs.attrs["licence"] == "MIT" and not logged.attrs["without_trunk"]
    own = dict(list(logged[logged["lr"].notna()].groupby("run")))
    known = runs[runs["schedule"].isin(["cosine", "constant", "wsd"])]
    for run in known.to_dict("records"):
        curve = own[run["run"]]
        assert curve["step"].is_monotonic_increasing and curve["step"].is_unique
        curve = curve[curve["step"] < run["steps"]]
        assert np.allclose(haegele.learning_rates(run)[curve["step"]], curve["lr"], atol=1e-6 * run["peak_lr"], rtol=0), run["run"]
