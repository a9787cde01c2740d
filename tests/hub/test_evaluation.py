"""Evaluations kept and read back to the bit, what tells their checkpoint, and two of them compared item by item."""

import hashlib
import json
import math
import struct

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from etastar.hub.evaluation import Evaluation, checkpoint_identity, read_evaluation, score_of
from etastar.hub.record import RECORD, HubFile, Record

COLUMNS = ["task", "metric", "filter", "item", "above", "below", "doc_hash"]


def made(answers, limit=None, metric="acc", below=None, groups=None, shots=0, hashes=None, **changes) -> Evaluation:
    """An evaluation with these per-item numbers by task; `hashes` are those of documents by item, in place of the item's own."""
    rows = [(task, metric, "none", i, float(value), 1.0 if below is None else float(below[i]), (hashes or {}).get(i, f"{task}{i}"))
            for task, values in answers.items() for i, value in enumerate(values)]
    items = pd.DataFrame(rows, columns=COLUMNS)
    parts = {task: items[items["task"] == task] for task in answers} | {
        name: items[items["task"].isin(leaves)] for name, leaves in (groups or {}).items()}
    scores = [(name, metric, "none", *score_of(metric, some), len(some)) for name, some in parts.items()]
    told = {task: {"items": len(values), "version": 1, "shots": shots} for task, values in answers.items()}
    told = {"checkpoint": {"folder": "x", "config_sha256": "c"}, "limit": limit, "groups": groups or {}, "tasks": told} | changes
    return Evaluation(pd.DataFrame(scores, columns=["task", "metric", "filter", "value", "se", "items"]), items, told)


FIRST = made({"piqa": [1, 0, 1, 1, 0, 1]})
SECOND = made({"piqa": [1, 1, 0, 1, 0, 0]})


def test_what_is_kept_is_read_back_to_the_bit(tmp_path):
    kept = made({"piqa": np.array([1, 0, 1]) / 3, "none": [math.pi]}, metric="NA")
    assert kept.write(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    back = read_evaluation(tmp_path / "a" / "b")
    pd.testing.assert_frame_equal(back.scores, kept.scores, check_exact=True)
    pd.testing.assert_frame_equal(back.items, kept.items, check_exact=True)
    assert back.settings == kept.settings and [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_an_evaluation_takes_the_place_of_another_and_of_nothing_else(tmp_path):
    FIRST.write(tmp_path / "kept")
    SECOND.write(tmp_path / "kept")
    assert read_evaluation(tmp_path / "kept").scores["value"].item() == 0.5
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="kept holds something else than an evaluation; name another folder"):
        FIRST.write(tmp_path / "kept")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file holds something else"):
        FIRST.write(tmp_path / "file")
    assert (tmp_path / "kept" / "notes.txt").read_text() == "mine" == (tmp_path / "file").read_text()


def test_a_failure_while_writing_leaves_what_was_there(tmp_path, monkeypatch):
    FIRST.write(tmp_path / "kept")
    monkeypatch.setattr("etastar.hub.evaluation.write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    for name in ("kept", "new"):
        with pytest.raises(OSError, match="disk full"):
            SECOND.write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert read_evaluation(tmp_path / "kept").scores["value"].item() == pytest.approx(4 / 6)


def test_a_folder_without_an_evaluation_or_with_a_damaged_one_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no evaluation: it has no scores.csv, items.parquet, settings.json; `etastar eval`"):
        read_evaluation(tmp_path)
    FIRST.write(tmp_path / "kept")
    (tmp_path / "kept" / "items.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="kept is damaged .*; evaluate again"):
        read_evaluation(tmp_path / "kept")


# -- which checkpoint --------------------------------------------------------------------------------------------------


def checkpoint_in(folder, config=b"{}", header=b'{"a":{}}', data=b"1234"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(config)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


def test_a_checkpoint_is_told_by_its_config_and_its_headers_and_no_weight_is_read(tmp_path):
    told = checkpoint_identity(checkpoint_in(tmp_path / "a"))
    assert told == {"folder": str(tmp_path / "a"), "config_sha256": hashlib.sha256(b"{}").hexdigest(),
                    "headers_sha256": hashlib.sha256(b'model.safetensors\0{"a":{}}').hexdigest()}
    other_data = checkpoint_identity(checkpoint_in(tmp_path / "b", data=b"5678"))
    assert other_data | {"folder": told["folder"]} == told
    assert checkpoint_identity(checkpoint_in(tmp_path / "c", config=b"{ }"))["config_sha256"] != told["config_sha256"]
    assert checkpoint_identity(checkpoint_in(tmp_path / "d", header=b'{"b":{}}'))["headers_sha256"] != told["headers_sha256"]


def test_the_commit_of_what_was_fetched_and_the_run_of_an_export_are_told(tmp_path):
    one, two, files = "1" * 40, "2" * 40, (HubFile("config.json", 2, git_sha1="0" * 40),)
    snapshots = [checkpoint_in(tmp_path / "models--o--m" / "snapshots" / commit) for commit in (one, two, "3" * 40)]
    Record("o/m", {"main": two}, {one: files, two: files}).write(tmp_path / "models--o--m" / RECORD)
    told = [checkpoint_identity(folder) for folder in snapshots]
    assert [(t.get("repo"), t.get("commit")) for t in told] == [("o/m", one), ("o/m", two), (None, None)]
    own = checkpoint_in(tmp_path / "own")
    Record("o/m", {}, {one: files}).write(own / RECORD)
    (own / "etastar.json").write_text(json.dumps({"run_id": "abc"}))
    told = checkpoint_identity(own)
    assert (told["repo"], told["commit"], told["run_id"]) == ("o/m", one, "abc")


def test_an_evaluation_covers_what_it_has_all_items_of_on_the_same_checkpoint():
    whole, part = made({"piqa": [1, 0, 1], "boolq": [1, 0]}), made({"piqa": [1, 0]}, limit=2)
    assert whole.covers(part) and whole.covers(whole) and not part.covers(whole)
    assert not made({"piqa": [1]}).covers(part)
    moved = made({"piqa": [1, 0]}, checkpoint={"folder": "elsewhere", "config_sha256": "c"})
    assert whole.covers(moved)
    assert not whole.covers(made({"piqa": [1, 0]}, checkpoint={"folder": "x", "config_sha256": "d"}))


# -- two of them -------------------------------------------------------------------------------------------------------


def test_a_difference_is_the_mean_of_the_items_differences_with_their_error():
    (row,) = FIRST.against(SECOND).to_dict("records")
    moves = np.array([0, -1, 1, 0, 0, 1])
    told = stats.ttest_1samp(moves, 0).confidence_interval(0.9)
    assert (row["task"], row["metric"], row["filter"], row["items"]) == ("piqa", "acc", "none", 6)
    assert (row["difference"], row["se"]) == (pytest.approx(1 / 6), pytest.approx(moves.std(ddof=1) / math.sqrt(6)))
    assert (row["low"], row["high"]) == (pytest.approx(told.low), pytest.approx(told.high))
    (back,) = SECOND.against(FIRST, level=0.5).to_dict("records")
    assert back["difference"] == pytest.approx(-1 / 6) and back["high"] - back["low"] < row["high"] - row["low"]


def test_items_are_paired_by_document_and_not_by_place():
    mixed = made({"piqa": [0, 1, 0, 1, 1, 1]}, hashes={i: f"piqa{5 - i}" for i in range(6)})
    (row,) = FIRST.against(mixed).to_dict("records")
    assert (row["difference"], row["se"]) == (pytest.approx(0), pytest.approx(np.std([0, -1, 0, 1, -1, 1], ddof=1) / math.sqrt(6)))
    twice = dict.fromkeys(range(6), "the same")
    (row,) = made({"piqa": [1, 0, 1, 1, 0, 1]}, hashes=twice).against(made({"piqa": [1, 1, 0, 1, 0, 0]}, hashes=twice)).to_dict("records")
    assert row["items"] == 6 and row["se"] == pytest.approx(np.std([0, -1, 1, 0, 0, 1], ddof=1) / math.sqrt(6))


def test_a_group_is_compared_over_all_its_items():
    groups = {"mmlu": ["a", "b"]}
    one, other = (made({"a": first, "b": second}, groups=groups) for first, second in (([1, 0], [1, 1, 1, 0]), ([0, 0], [1, 0, 1, 1])))
    rows = one.against(other).set_index("task")
    assert rows.loc["mmlu", "difference"] == pytest.approx(1 / 6) and rows.loc["mmlu", "items"] == 6
    assert rows.loc["mmlu", "se"] == pytest.approx(np.std([1, 0, 0, 1, 0, -1], ddof=1) / math.sqrt(6))
    assert rows.loc["a", "difference"] == pytest.approx(1 / 2) and list(rows.index) == ["a", "b", "mmlu"]


@pytest.mark.parametrize("metric, of_ratio", [("word_perplexity", math.exp), ("bits_per_byte", lambda nats: nats / math.log(2))])
def test_a_difference_of_ratios_has_the_error_that_draws_of_items_have(metric, of_ratio):
    drawn = np.random.default_rng(5)
    size = drawn.integers(5, 50, 400)
    hard = drawn.normal(1.0, 0.3, 400)
    nats = [(hard + drawn.normal(0, 0.1, 400) + shift) * size for shift in (0.0, 0.2)]
    one, other = (made({"wikitext": part}, metric=metric, below=size) for part in nats)
    (row,) = one.against(other).to_dict("records")
    differences = []
    for _ in range(2000):
        i = drawn.integers(0, 400, 400)
        first, second = (of_ratio(part[i].sum() / size[i].sum()) for part in nats)
        differences.append(first - second)
    assert row["difference"] == pytest.approx(of_ratio(nats[0].sum() / size.sum()) - of_ratio(nats[1].sum() / size.sum()))
    assert row["se"] == pytest.approx(np.std(differences), rel=0.08)
    assert row["se"] < 0.7 * math.hypot(one.scores["se"].item(), other.scores["se"].item())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30))
def test_a_difference_is_that_of_the_scores_and_turns_its_sign_with_the_sides(pairs):
    one, other = (made({"t": [pair[side] for pair in pairs]}) for side in (0, 1))
    (row,), (back,) = one.against(other).to_dict("records"), other.against(one).to_dict("records")
    assert row["difference"] == pytest.approx(one.scores["value"].item() - other.scores["value"].item(), abs=1e-12)
    assert (back["difference"], back["se"]) == (pytest.approx(-row["difference"], abs=1e-12), pytest.approx(row["se"], abs=1e-12))


def test_with_a_smaller_limit_the_items_of_it_count_and_otherwise_both_need_the_same():
    part = made({"piqa": [1, 1, 0, 1]}, limit=4)
    for row in (FIRST.against(part).iloc[0], part.against(FIRST).iloc[0]):
        assert row["items"] == 4 and abs(row["difference"]) == pytest.approx(0)
        assert row["se"] == pytest.approx(np.std([0, -1, 1, 0], ddof=1) / 2)
    shorter = made({"piqa": [1, 1, 0, 1]})
    with pytest.raises(ValueError, match=r"piqa has other items .*: 2 only in the first, 0 only in the second, 4 in both \(limits None"):
        FIRST.against(shorter)
    other = made({"piqa": [1, 1, 0, 1]}, limit=4, hashes={0: "another"})
    with pytest.raises(ValueError, match=r"3 only in the first, 1 only in the second, 3 in both \(limits None and 4\)"):
        FIRST.against(other)


def test_evaluations_of_other_tasks_or_made_in_another_way_are_refused():
    with pytest.raises(ValueError, match="nothing to compare: no score with an error is in both; one has piqa, the other boolq"):
        FIRST.against(made({"boolq": [1, 0]}))
    with pytest.raises(ValueError, match="piqa is another task in the two evaluations: shots 0 and 5"):
        FIRST.against(made({"piqa": [1, 0, 1, 1, 0, 1]}, shots=5))
