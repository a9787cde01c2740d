"""The verbs for checkpoints from end to end: a run is exported, looked at, pushed for show and evaluated; what cannot be is one line."""

import json

import pandas as pd
import pytest

from tiny import recipe


@pytest.fixture
def etastar(command, tmp_path, monkeypatch):
    """A command, without a network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return command


def test_a_run_is_exported_and_would_be_pushed_with_its_table(etastar, tmp_path):
    (tmp_path / "one.json").write_text(recipe(4).to_json())
    run_id = json.loads(etastar("run", "one.json", "--json")[1])[0]["run_id"]
    status, out, _ = etastar("export", run_id, "mine", "--json")
    told = json.loads(out)
    assert status == 0 and told["run_id"] == run_id and set(told["files"]) == {path.name for path in (tmp_path / "mine").iterdir()}
    assert f"run {run_id} is in" in etastar("export", run_id, "mine", "--licence", "mit")[1]
    assert "license: mit" in (tmp_path / "mine/README.md").read_text()
    pushed = json.loads(etastar("push", "mine", "me/small", "--dry-run", "--json")[1])
    assert pushed["private"] and pushed["commit"] is None and "model.safetensors" in pushed["files"]
    assert "public dataset me/sweep; nothing was sent" in etastar("push", "runs", "me/sweep", "--public", "--dry-run")[1]


def test_an_export_is_evaluated_from_the_shell_and_kept(etastar, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "one.json").write_text(recipe(4, corpus=words(tmp_path)).to_json())
    run_id = json.loads(etastar("run", "one.json", "--json")[1])[0]["run_id"]
    etastar("export", run_id, "mine")
    (tmp_path / "tasks").mkdir()
    items = [{"context": "a b", "choices": [" c", " d"], "label": i % 2} for i in range(4)]
    (tmp_path / "tasks/items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "tasks/even.yaml").write_text(
        f"task: even\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/tasks/items.jsonl}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: context\ndoc_to_choice: choices\ndoc_to_target: label\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n")
    status, out, err = etastar("eval", "mine", "--tasks", "even", "--task-folder", "tasks", "--json")
    assert status == 0, err
    score, = json.loads(out)["scores"]
    assert (score["task"], score["metric"], score["value"], score["items"]) == ("even", "acc", 0.5, 4)
    assert json.loads((tmp_path / "results/evaluations/mine/settings.json").read_text())["checkpoint"]["run_id"] == run_id


def words(folder):
    from etastar.recipe import Corpus

    for i in range(40):
        (folder / f"{i}.txt").write_text("a b c d e f g " * 60 + str(i))
    return Corpus(f"files:{folder}/*.txt", vocab=270)


@pytest.mark.parametrize(("given", "told"), [
    (("export", "0" * 16, "mine"), "0000000000000000"),
    (("push", "nowhere", "me/x"), "neither the folder of a model nor a table"),
    (("push", "table.csv", "x"), "OWNER/NAME"),
    (("push", "table.csv", "me/x"), "HF_HUB_OFFLINE is set"),
    (("eval", "nowhere"), "no checkpoint 'nowhere'; there are PowerLM-3B, PowerMoE-3B"),
    (("eval", "PowerLM-3B"), "`etastar fetch checkpoint PowerLM-3B` fetches it"),
    (("fetch", "checkpoint"), "needs one NAME"),
    (("fetch", "checkpoint", "PowerLM-3B"), "HF_HUB_OFFLINE is set, and there is no record here"),
    (("fetch", "checkpoint", "me/x@0123456"), "all 40 digits"),
    (("fetch", "archives", "--dry-run"), "--folder and --dry-run are of fetch checkpoint"),
])
def test_what_cannot_be_is_one_line(etastar, tmp_path, given, told):
    pd.DataFrame({"run_id": ["a"]}).to_csv(tmp_path / "table.csv", index=False)
    status, _, err = etastar(*given)
    assert status == 2 and told in err and err.count("\n") == 1
