"""Grids of arXiv 2503.04715, mixtures of experts: on a made-up file of the published layout."""

import io

import pandas as pd
import pytest

import etastar as es
from etastar.archives import steplaw_moe

RUN = {"h": 1024, "ffnh": 352, "numh": 8, "numl": 16, "lr": 0.001, "bs": 64, "ti": 15258, "loss": 2.9, "smooth loss": 2.91, "exp_name": "a",
       "D": 2_000_000_000, "N": 2_150_000_000, "D/N": 0.93, "seq_len": 2048, "topk": 1, "nume": 89, "moeh": 352, "sed": 0, "Nattn": 1,
       "Na": 188_000_000, "M": 2.0}


@pytest.fixture
def published(listed, mirror):
    def put(*rows):
        text = io.StringIO()
        pd.DataFrame(rows).to_csv(text, index=False)
        files = {steplaw_moe.GRID: text.getvalue().encode()}
        mirror(listed(files, "steplaw_moe"), files)

    return put


def test_params_are_the_total_and_cells_are_told_by_the_active_ones(published):
    published(RUN, RUN | {"exp_name": "b", "Na": 1_240_000_000, "topk": 3, "nume": 8, "bs": 32})
    frame = es.archive("steplaw_moe").set_index("run")
    assert frame["params"].tolist() == [2_150_000_000] * 2 and frame.loc["a", "params_active"] == 188_000_000
    assert frame["cell"].to_dict() == {"a": "188M of 2.15B, 2B", "b": "1.24B of 2.15B, 2B"}
    assert frame.loc["b", ["batch_tokens", "experts", "experts_active", "expert_width"]].tolist() == [65_536, 8, 3, 352]


def test_other_sequence_lengths_and_a_dense_file_are_refused(published):
    published(RUN, RUN | {"seq_len": 4096})
    with pytest.raises(ValueError, match="sequences of 4096 tokens; this reader knows 2048 alone"):
        es.archive("steplaw_moe")
    published({k: v for k, v in RUN.items() if k not in ("Na", "topk")})
    with pytest.raises(ValueError, match="moe_lr_bs_loss.csv: no column 'Na', 'topk'"):
        es.archive("steplaw_moe")


@pytest.mark.archive
def test_the_published_mixtures_are_read(skip_if_not_fetched):
    with skip_if_not_fetched():
        runs = es.archive("steplaw_moe")
    assert len(runs) == 708 and runs["params_active"].lt(runs["params"]).all()
