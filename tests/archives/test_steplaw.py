"""Grids of arXiv 2503.04715, dense models: on a made-up file of the published layout and on the published one."""

import io

import numpy as np
import pandas as pd
import pytest

import etastar as es
from etastar.archives import bootstrap, curves, steplaw

RUN = {"h": 960, "ffnh": 9368, "numh": 15, "numl": 7, "lr": 0.000488, "bs": 32, "ti": 61035, "loss": 2.61, "smooth loss": 2.65,
       "exp_name": "a", "D": 4_000_000_000, "N": 214_663_680, "D/N": 18.6}
COEFFICIENTS = {"lr_intercept": [0.5, 0.7], "lr_coefN": [-0.7, -0.72], "lr_coefD": [0.3, 0.31], "bs_intercept": [-0.5, -0.6],
                "bs_coefD": [0.57, 0.58]}


def csv(table) -> bytes:
    text = io.StringIO()
    pd.DataFrame(table).to_csv(text, index=False)
    return text.getvalue().encode()


def test_runs_are_told_in_our_units_by_size_horizon_batch_and_rate(listed, mirror):
    rows = [RUN | {"exp_name": "b", "N": 1_073_741_824, "D": 56_900_000_000}, RUN | {"bs": 16, "exp_name": "c", "loss": 7.5}, RUN]
    files = {steplaw.GRID: csv(rows)}
    mirror(listed(files, "steplaw"), files)
    frame = es.archive("steplaw")
    assert frame["run"].tolist() == ["c", "a", "b"] and frame["cell"].tolist() == ["215M, 4B", "215M, 4B", "1.07B, 56.9B"]
    assert frame["batch_tokens"].tolist() == [32_768, 65_536, 65_536] and frame["batch_sequences"].tolist() == [16, 32, 32]
    first = frame.set_index("run").loc["a"]
    assert first[["params", "horizon_tokens", "peak_lr", "steps", "loss", "smooth_loss"]].tolist() == [214_663_680, 4e9, 0.000488, 61035,
                                                                                                      2.61, 2.65]
    assert first[["width", "depth", "heads", "ffn_width"]].tolist() == [960, 7, 15, 9368]
    assert frame["loss"].max() == 7.5  # diverged, and kept
    assert frame.attrs["licence"] == "MIT" and frame.attrs["missing"] == []


def test_the_bootstrap_is_reached_by_its_own_name_and_says_logs(listed, mirror):
    files = {steplaw.GRID: csv([RUN]), steplaw.BOOTSTRAP: csv(COEFFICIENTS)}
    archive = listed(files, "steplaw")
    mirror(archive, files)
    frame = bootstrap("steplaw")
    assert frame.to_dict("list") == {"log_lr_prefactor": [0.5, 0.7], "lr_params_exponent": [-0.7, -0.72],
                                     "lr_tokens_exponent": [0.3, 0.31], "log_batch_prefactor": [-0.5, -0.6],
                                     "batch_tokens_exponent": [0.57, 0.58]}
    with pytest.raises(ValueError, match="steplaw has no curves"):
        curves("steplaw")


def test_a_lone_bootstrap_is_no_grid_and_says_what_to_fetch(listed, mirror):
    files = {steplaw.GRID: csv([RUN]), steplaw.BOOTSTRAP: csv(COEFFICIENTS)}
    mirror(listed(files, "steplaw"), {steplaw.BOOTSTRAP: files[steplaw.BOOTSTRAP]})
    assert bootstrap("steplaw").attrs["missing"] == [steplaw.GRID]
    with pytest.raises(FileNotFoundError, match="dense_lr_bs_loss.csv is not here; run `etastar fetch archives steplaw`"):
        es.archive("steplaw")


def test_a_file_of_another_layout_is_refused_by_name(listed, mirror):
    files = {steplaw.GRID: csv([{k: v for k, v in RUN.items() if k not in ("bs", "N")}])}
    mirror(listed(files, "steplaw"), files)
    with pytest.raises(ValueError, match="dense_lr_bs_loss.csv: no column 'N', 'bs'; it has h, ffnh"):
        es.archive("steplaw")


@pytest.mark.archive
def test_the_published_grids_are_read(skip_if_not_fetched):
    with skip_if_not_fetched():
        runs = es.archive("steplaw")
    sizes = runs.groupby("cell").size()
    assert (len(runs), len(sizes), runs["run"].nunique()) == (1911, 17, 1911)
    assert sizes["1.07B, 56.9B"] == 47 and sizes.drop("1.07B, 56.9B").between(100, 120).all()
    assert not runs.duplicated(["cell", "peak_lr", "batch_tokens"]).any() and runs["peak_lr"].between(2.44e-4, 2.21e-2).all()
    assert np.allclose(runs["steps"] * runs["batch_tokens"] / runs["horizon_tokens"], 1, atol=0.003)
    without_embedding = runs["depth"] * runs["width"] * (4 * runs["width"] + 3 * runs["ffn_width"])
    assert (runs["params"] == without_embedding).all()
    assert not ((runs["params"] > 1e9) & (runs["horizon_tokens"] == 100e9)).any()  # the paper's held-out cell
    assert runs["loss"].max() > 11 and np.isfinite(runs["smooth_loss"]).all()


@pytest.mark.archive
def test_the_papers_law_is_the_mean_of_its_bootstraps(skip_if_not_fetched):
    with skip_if_not_fetched():
        mean = bootstrap("steplaw").mean()
    assert np.exp(mean["log_lr_prefactor"]) == pytest.approx(1.79, abs=0.01)  # arXiv 2503.04715 prints 1.79, -0.713, 0.307, 0.58, 0.571
    assert mean.drop(["log_lr_prefactor", "log_batch_prefactor"]).round(3).tolist() == [-0.713, 0.307, 0.571]
    assert round(np.exp(mean["log_batch_prefactor"]), 2) == 0.58
