"""The digitised runs of arXiv 2203.15556, on a made-up file and on the published one."""

import numpy as np
import pytest

import etastar as es
from etastar.archives import NotFetched, chinchilla

HEADER = "x,y,color,Model Size,Training FLOP,hex_color,loss\n"
ROWS = ["1,2,#000001,1e8,6e18,#000001,3.0", "1,2,#000002,2e8,6e18,#000002,2.5", "1,2,#000003,4e8,6e18,#000003,3.5",
        "1,2,#000004,1e9,6e20,#000004,2.0", "1,2,#000005,3e8,6e18,#000005,4.5", "1,2,#000006,5e8,6e18,#000006,4.0",
        "1,2,#000007,6e8,6e18,#000007,2.75"]


def made_up(rows=ROWS, header=HEADER):
    return {chinchilla.RUNS: (header + "\n".join(rows) + "\n").encode()}


def test_tokens_are_compute_over_six_params_and_the_five_highest_losses_are_outliers(listed, mirror):
    mirror(listed(made_up(), "chinchilla"), made_up())
    frame = es.archive("chinchilla")
    assert frame["loss"].tolist() == [4.5, 4.0, 3.5, 3.0, 2.75, 2.5, 2.0] and frame["outlier"].tolist() == [True] * 5 + [False] * 2
    best = frame.iloc[-1]
    assert (best["params"], best["compute"], best["tokens"]) == (1e9, 6e20, pytest.approx(1e11))
    assert best["run"] == "1000M, 6.00e+20 FLOPs" and best["colour"] == "#000004" and frame.attrs["licence"] == "MIT"


def test_rows_may_come_in_any_order(listed, mirror):
    mirror(listed(made_up(ROWS[::-1]), "chinchilla"), made_up(ROWS[::-1]))
    assert es.archive("chinchilla")["outlier"].tolist() == [True] * 5 + [False] * 2


@pytest.mark.parametrize("files, said", [
    (made_up(header=HEADER.replace("Training FLOP", "FLOP")), "no column 'Training FLOP'"),
    (made_up([*ROWS[:2], ROWS[2].replace("#000003,3.5", "#00000f,3.5")]), "1 rows name two colours, row 2"),
])
def test_a_file_of_another_form_is_refused(listed, mirror, files, said):
    mirror(listed(files, "chinchilla"), files)
    with pytest.raises(ValueError, match=said):
        es.archive("chinchilla")


@pytest.mark.archive
def test_the_published_file_is_read():
    try:
        frame = es.archive("chinchilla")
    except NotFetched as error:
        pytest.skip(str(error))
    assert len(frame) == 245 and frame["outlier"].sum() == 5 and frame["run"].notna().all()
    assert frame["loss"].is_monotonic_decreasing and frame.loc[~frame["outlier"], "loss"].max() < 3.41
    assert np.allclose(6 * frame["params"] * frame["tokens"], frame["compute"])
    assert frame["colour"].nunique() == frame["loss"].nunique() == 99
