"""Checkpoints through lm-evaluation-harness: judged against log-likelihoods worked out by hand; published scores and their verdicts."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from etastar.hub import evaluate as evaluating
from etastar.hub.evaluate import data_revision, eval_command, evaluate
from etastar.hub.evaluation import read_evaluation
from etastar.hub.record import RECORD, HubFile, Record
from etastar.hub.scores import average, averaged, benchmarks, beside_published, best_beside, find_published, printed_average, published

ITEMS = [("two and two are", [" four", " five hundred"], 0), ("the sky is", [" green", " blue"], 1), ("water is", [" wet", " dry"], 0),
         ("a dog can", [" bark", " fly to the moon and back"], 1), ("ice is", [" cold", " hot"], 1), ("snow is", [" white", " black"], 0),
         ("fire is", [" hot", " cold"], 0)]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
"""
CHOICE = """doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean}, {metric: acc_norm, aggregation: mean}]
"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{question}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder of a tiny random granite with a byte-level tokenizer, as transformers writes it."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install 'etastar[eval]'")
    transformers = pytest.importorskip("transformers")
    from etastar.text.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("granite")
    train_tokenizer([f"{q}{''.join(c)}" for q, c, _ in ITEMS] * 3, 270).save(str(folder / "trained.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "trained.json"), bos_token="<|endoftext|>",
                                                     eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    torch.manual_seed(3)
    config = transformers.GraniteConfig(vocab_size=270, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, logits_scaling=1.5,
                                        bos_token_id=0, eos_token_id=0, pad_token_id=0)
    transformers.GraniteForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder of two tasks in the harness's own format, and every cache inside the test's folder."""
    for name, folder in (("ETASTAR_CACHE", "cache"), ("HF_HOME", "hf"), ("HF_DATASETS_CACHE", "hf/datasets")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    if evaluating.importlib.util.find_spec("datasets"):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf/datasets")
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps({"question": q, "choices": c, "label": label}) + "\n" for q, c, label in ITEMS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, kind, rest in (("small_facts", "multiple_choice", CHOICE), ("small_text", "loglikelihood_rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, kind=kind, data=data) + rest)
    return folder


@pytest.fixture(scope="module")
def by_hand(checkpoint):
    """A function: the log-likelihood of a text after another, by our own decoder in float64, token by token."""
    from tokenizers import Tokenizer

    from etastar.hub.folders import load_checkpoint

    decoder, tokenizer = load_checkpoint(checkpoint, torch.float64), Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    @torch.no_grad()
    def log_likelihood(before: str, after: str) -> float:
        ids = tokenizer.encode(before + after).ids if before else [0, *tokenizer.encode(after).ids]
        known = len(tokenizer.encode(before).ids) if before else 1
        logp = decoder(torch.tensor([ids])).log_softmax(-1)[0]
        return sum(float(logp[i - 1, ids[i]]) for i in range(known, len(ids)))

    return log_likelihood


def test_a_local_task_scores_what_log_likelihoods_by_hand_say(checkpoint, tasks, by_hand):
    found = evaluate(checkpoint, ["small_facts", "small_text"], task_folder=tasks, batch_size=2)
    said = np.array([[by_hand(q, choice) for choice in choices] for q, choices, _ in ITEMS])
    lengths = np.array([[len(choice) for choice in choices] for _, choices, _ in ITEMS])
    labels = np.array([label for *_, label in ITEMS])
    for metric, liking in (("acc", said), ("acc_norm", said / lengths)):
        right = (liking.argmax(1) == labels).astype(float)
        row = _row(found.scores, "small_facts", metric)
        assert 0 < right.mean() < 1
        assert (row["value"], row["items"]) == (pytest.approx(right.mean(), abs=1e-12), 7)
        assert row["se"] == pytest.approx(right.std(ddof=1) / math.sqrt(7), rel=1e-9)
        assert found.items.query("task == 'small_facts' and metric == @metric")["above"].tolist() == right.tolist()
    texts = [q + choices[0] for q, choices, _ in ITEMS]
    nats = -np.array([by_hand("", text) for text in texts])
    words, size = np.array([len(text.split()) for text in texts]), np.array([len(text) for text in texts])
    perplexity, bits = _row(found.scores, "small_text", "word_perplexity"), _row(found.scores, "small_text", "bits_per_byte")
    assert perplexity["value"] == pytest.approx(math.exp(nats.sum() / words.sum()), rel=1e-4)
    assert bits["value"] == pytest.approx(nats.sum() / size.sum() / math.log(2), rel=1e-5)
    residual = nats - nats.sum() / size.sum() * size
    assert bits["se"] == pytest.approx(math.sqrt(7 / 6 * (residual**2).sum()) / size.sum() / math.log(2), rel=1e-4)


def test_how_it_was_evaluated_is_recorded(checkpoint, tasks):
    found = evaluate(checkpoint, "small_facts", limit=3, task_folder=tasks, batch_size=2, dtype="bfloat16", device="cpu")
    told = found.settings
    assert (told["dtype"], told["batch_size"], told["limit"], told["device"], told["seed"]) == ("bfloat16", 2, 3, "cpu", 1234)
    assert set(told["versions"]) == {"lm_eval", "transformers", "datasets", "torch", "etastar"} and all(told["versions"].values())
    task = told["tasks"]["small_facts"]
    assert (task["items"], task["shots"], task["revision"], task["dataset"]) == (3, 0, None, "json") and len(task["items_sha256"]) == 64
    more = evaluate(checkpoint, "small_facts", limit=4, task_folder=tasks).settings["tasks"]["small_facts"]
    assert more["items_sha256"] != task["items_sha256"] and json.dumps(told)
    assert told["groups"] == {} and told["checkpoint"]["folder"] == str(checkpoint)


def _options(checkpoint, tasks, results, **changes):
    given = dict(checkpoint=str(checkpoint), tasks=["small_facts"], limit=None, dtype="float32", batch_size=8, device="cpu",
                 task_folder=tasks, run_code=False, published=None, results=str(results))
    return SimpleNamespace(**given | changes)


def test_the_command_keeps_the_evaluation_under_the_folders_name_and_shows_it(checkpoint, tasks, tmp_path):
    shown = eval_command(_options(checkpoint, tasks, tmp_path / "kept"))
    assert list(shown) == ["scores", "settings", "kept in"] and _row(shown["scores"], "small_facts", "acc")["items"] == 7
    kept = read_evaluation(shown["kept in"])
    assert Path(shown["kept in"]) == tmp_path / "kept" / checkpoint.name
    pd.testing.assert_frame_equal(kept.scores, shown["scores"])
    assert kept.settings == shown["settings"] and len(kept.items) == 2 * 7


def test_a_part_never_takes_the_place_of_the_whole(checkpoint, tasks, tmp_path):
    first = [eval_command(_options(checkpoint, tasks, tmp_path, limit=limit))["kept in"] for limit in (3, 5, 4, None)]
    name = str(tmp_path / checkpoint.name)
    assert first == [name, name, f"{name}-2", name]
    options = _options(checkpoint, tasks, tmp_path)
    both = eval_command(SimpleNamespace(**vars(options) | {"tasks": ["small_facts", "small_text"]}))["kept in"]
    assert both == name and eval_command(options)["kept in"] == f"{name}-2"
    other = tmp_path / "other" / checkpoint.name
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    assert eval_command(_options(checkpoint, tasks, tmp_path / "other"))["kept in"] == f"{other}-2"


def test_a_checkpoint_that_was_fetched_is_evaluated_by_its_name_beside_its_own_printed_scores(checkpoint, tasks, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    repo, commit = "ibm-research/PowerLM-3b", "5" * 40
    storage = tmp_path / "hf" / "hub" / "models--ibm-research--PowerLM-3b"
    shutil.copytree(checkpoint, storage / "snapshots" / commit)
    files = tuple(HubFile(path.name, path.stat().st_size, sha256="0" * 64) for path in (storage / "snapshots" / commit).iterdir())
    Record(repo, {"main": commit}, {commit: files}).write(storage / RECORD)
    asked = []
    monkeypatch.setattr(evaluating.Evaluation, "beside", lambda self, model: asked.append(model) or self.scores)
    shown = eval_command(_options("powerlm-3b", tasks, tmp_path / "kept", limit=2))
    assert shown["kept in"] == str(tmp_path / "kept" / "PowerLM-3B") and asked == ["PowerLM-3B"]
    told = shown["settings"]["checkpoint"]
    assert (told["repo"], told["commit"]) == (repo, commit) and "run_id" not in told
    assert list(shown) == ["scores", "beside the published scores of PowerLM-3B (points)", "settings", "kept in"]
    assert eval_command(_options(f"{repo}@main", tasks, tmp_path / "kept", published="gemma2-2b", limit=2)) and asked[1] == "Gemma2-2B"
    with pytest.raises(ValueError, match="etastar fetch checkpoint PowerMoE-3B"):
        eval_command(_options("PowerMoE-3B", tasks, tmp_path / "kept"))


@pytest.mark.slow  # the harness reads all its tasks
def test_a_task_that_nobody_has_is_refused(checkpoint, tasks):
    with pytest.raises(ValueError, match="no task or group hellaswagg"):
        evaluate(checkpoint, ["hellaswagg"], task_folder=tasks)


def _row(scores: pd.DataFrame, task: str, metric: str) -> dict:
    (row,) = scores[(scores["task"] == task) & (scores["metric"] == metric)].to_dict("records")
    return row


def test_what_cannot_be_evaluated_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="is no folder of a transformers checkpoint with safetensors"):
        evaluate(tmp_path, ["piqa"])
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="limit is a whole number from 1; got 0"):
        evaluate(tmp_path, ["piqa"], limit=0)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(ValueError, match="humaneval, mbpp runs programs that the model wrote"):
        evaluate(tmp_path, ["humaneval", "mbpp"], run_code=True)
    monkeypatch.setattr(evaluating.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'etastar\[eval\]'"):
        evaluate(tmp_path, ["piqa"])


def test_the_papers_benchmarks_are_asked_with_their_shots_and_none_of_them_runs_code_unasked():
    asked = evaluating._asked(None)
    assert asked["mmlu"] == 5 and asked["gsm8k_cot"] == 8 and asked["arc_challenge"] == 0 and "wikitext" in asked
    assert not {"humaneval", "mbpp"} & set(asked) and evaluating._asked(["mbpp", "lambada_openai"]) == {"mbpp": 0, "lambada_openai": None}


FIRST, SECOND = "a" * 40, "b" * 40


class Manager:
    """Loads a task as the harness does, its data at the commit asked for, or at the newest; offline at what is there."""

    all_groups, offline_at = ("mmlu",), None

    def __init__(self):
        self.specs = []

    def load(self, specs):
        (spec,) = specs
        self.specs.append(spec)
        asked = spec["task"][0]["dataset_kwargs"]["revision"] if isinstance(spec, dict) else FIRST
        split = SimpleNamespace(cache_files=[{"filename": f"/hf/datasets/o___x/main/0.0.0/{self.offline_at or asked}/x-test.arrow"}])
        task = SimpleNamespace(dataset={"test": split}, config=SimpleNamespace(dataset_kwargs=None), get_config=lambda key: None,
                               set_config=lambda key, value: None, set_fewshot_seed=lambda seed: None)
        return {"tasks": {leaf: task for leaf in _leaf_names(spec)}}


def _leaf_names(spec) -> list[str]:
    if isinstance(spec, dict):
        return [task["task"] for task in spec["task"]]
    return ["mmlu_one", "mmlu_two"] if spec == "mmlu" else [spec]


def test_task_data_are_pinned_at_the_commit_they_were_first_loaded_at(tmp_path, monkeypatch):
    monkeypatch.setenv("ETASTAR_CACHE", str(tmp_path / "cache"))
    manager = Manager()
    loaded = evaluating._load(manager, "piqa", 0, {})
    assert manager.specs == ["piqa"] and data_revision(loaded["piqa"].dataset) == FIRST
    evaluating._load(manager, "piqa", 0, {})
    assert manager.specs[1] == {"group": "pinned", "task": [{"task": "piqa", "dataset_kwargs": {"revision": FIRST}}]}
    evaluating._load(manager, "mmlu", 5, {"mmlu": SECOND})
    pinned = [{"task": f"mmlu_{n}", "dataset_kwargs": {"revision": SECOND}} for n in ("one", "two")]
    assert manager.specs[2:] == ["mmlu", {"group": "pinned", "task": pinned}]
    manager.offline_at = SECOND
    with pytest.raises(ValueError, match=f"the data of piqa are at {SECOND} and pinned at {FIRST}"):
        evaluating._load(manager, "piqa", 0, {})


@pytest.mark.slow  # the harness reads all its tasks
@pytest.mark.parametrize("name, shots", [("mmlu", 5), ("piqa", 0)])
def test_the_harness_takes_a_pin_into_every_task_of_a_group(name, shots, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install 'etastar[eval]'")
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("ETASTAR_CACHE", str(tmp_path / "cache"))
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, options.get("revision")))
        row = {"question": "q", "goal": "g", "sol1": "a", "sol2": "b", "choices": ["a", "b", "c", "d"], "answer": 0, "label": 0,
               "subject": name}
        return datasets.DatasetDict({split: datasets.Dataset.from_list([row]) for split in ("train", "dev", "validation", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tasks = evaluating._load(TaskManager(), name, shots, {name: FIRST})
    assert len(tasks) == {"mmlu": 57, "piqa": 1}[name] and {revision for _, revision in asked[-len(tasks):]} == {FIRST}
    assert all(leaf.startswith(name) and task.get_config("num_fewshot") == shots for leaf, task in tasks.items())


def test_data_from_local_files_have_no_commit():
    assert data_revision(None) is None
    assert data_revision({"test": SimpleNamespace(cache_files=[{"filename": f"/hf/json/default/0.0.0/{'c' * 64}/test.arrow"}])}) is None


def test_a_group_has_a_score_over_all_its_items_and_a_metric_that_is_no_mean_has_no_error_and_no_group():
    rows = [("a", "acc", "none", i, float(i < 1), 1.0, "") for i in range(2)] + [("b", "acc", "none", i, 1.0, 1.0, "") for i in range(6)]
    rows += [(task, "median", "none", i, float(i), 1.0, "") for task in "ab" for i in range(6)]
    items = pd.DataFrame(rows, columns=["task", "metric", "filter", "item", "above", "below", "doc_hash"])
    results = {"a": {"acc,none": 0.5, "median,none": 3.0}, "b": {"acc,none": 1.0, "median,none": 3.0}}
    scores = evaluating._scores(items, results, {"group": {"a": None, "b": None}})
    assert _row(scores, "group", "acc") == {"task": "group", "metric": "acc", "filter": "none", "value": 7 / 8, "items": 8,
                                            "se": pytest.approx(np.std([1, 0, 1, 1, 1, 1, 1, 1], ddof=1) / math.sqrt(8))}
    assert math.isnan(_row(scores, "b", "median")["se"]) and _row(scores, "b", "median")["value"] == 3.0
    assert scores.loc[scores["task"] == "group", "metric"].tolist() == ["acc"]


def _scores(**values) -> pd.DataFrame:
    rows = [(task, *metric.split("/"), "none", *number) for metric_task, number in values.items()
            for task, metric in [metric_task.rsplit("__", 1)]]
    return pd.DataFrame(rows, columns=["task", "metric", "filter", "value", "se", "items"])


def test_published_scores_are_as_printed():
    lm, moe = find_published("powerlm-3b"), find_published("ibm-research/PowerMoE-3b")
    assert lm.scores == {"arc": 60.5, "boolq": 72.0, "hellaswag": 74.6, "openbookqa": 43.6, "piqa": 79.9, "winogrande": 70.0,
                         "gsm8k": 34.9, "gsm8k_cot": 49.7, "humaneval": 26.8, "mbpp": 33.6, "mmlu": 49.2}
    assert lm.places["piqa"].endswith("Table 6") and lm.places["mmlu"].endswith("Table 7")
    # Printed averages of Table 6 check what was typed in; they and the scores are rounded to a tenth.
    averages = {"Qwen1.5-4B": 63.5, "Gemma2-2B": 66.7, "PowerLM-3B": 66.8, "Qwen1.5-1.8B": 57.2, "Qwen2-1.5B": 60.7, "SmolLM-1.7B": 61.7,
                "PowerMoE-3B": 63.3}
    zero_shot = ("arc", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande")
    assert {n: pytest.approx(np.mean([m.scores[b] for b in zero_shot]), abs=0.1) for n, m in published().items()} == averages
    assert moe.beside == ("SmolLM-1.7B", "Qwen1.5-1.8B", "Qwen2-1.5B")
    with pytest.raises(ValueError, match="no published scores of 'PowerLM', did you mean PowerLM-3B"):
        find_published("PowerLM")


def test_a_score_is_judged_by_the_rules_for_a_published_number():
    near, far = _scores(piqa__acc_norm=(0.799, 0.0093, 1838)), _scores(piqa__acc_norm=(0.70, 0.0093, 1838))
    (row,) = beside_published(near, "PowerLM-3B").to_dict("records")
    assert (row["published"], row["score"], row["margin"], row["verdict"]) == (79.9, pytest.approx(79.9), 3.0, "reproduced")
    assert (row["Gemma2-2B"], row["Qwen1.5-4B"]) == (79.2, 77.0) and row["low"] < 79.9 < row["high"]
    assert beside_published(far, "PowerLM-3B")["verdict"].item() == "contradicted"
    assert beside_published(far, "PowerLM-3B", whole=False)["verdict"].item() == "differs at this scale"
    few = beside_published(_scores(piqa__acc_norm=(0.799, 0.05, 64)), "PowerLM-3B")
    assert few["verdict"].item() == "inconclusive" and "smallest margin" in few["reason"].item()


def test_what_the_paper_does_not_say_how_to_measure_is_shown_and_not_judged():
    scores = _scores(arc_easy__acc_norm=(0.80, 0.01, 2000), arc_challenge__acc_norm=(0.41, 0.02, 1000))
    (row,) = beside_published(scores, "PowerLM-3B").to_dict("records")
    assert (row["score"], row["se"], row["verdict"]) == (pytest.approx(60.5), pytest.approx(50 * math.hypot(0.01, 0.02)), "untested")
    assert "does not say what its ARC is" in row["reason"] and row["items"] == 3000
    assert beside_published(scores.iloc[:1], "PowerLM-3B").empty  # half of ARC is not ARC


FIVE = {"boolq__acc": (0.75, 0.008, 3270), "hellaswag__acc_norm": (0.74, 0.004, 10042), "openbookqa__acc_norm": (0.40, 0.022, 500),
        "piqa__acc_norm": (0.80, 0.009, 1838), "winogrande__acc": (0.70, 0.013, 1267)}


def test_printed_averages_are_of_the_zero_shot_benchmarks_whose_reading_is_printed():
    assert [b.name for b in averaged("PowerLM-3B")] == ["boolq", "hellaswag", "openbookqa", "piqa", "winogrande"]
    printed = {"PowerLM-3B": 68.02, "Gemma2-2B": 67.06, "Qwen1.5-4B": 66.08, "PowerMoE-3B": 64.32, "Qwen2-1.5B": 63.16,
               "SmolLM-1.7B": 61.98, "Qwen1.5-1.8B": 59.24}
    assert {name: printed_average(name) for name in published()} == pytest.approx(printed, abs=1e-9)
    assert best_beside("PowerLM-3B") == ("Gemma2-2B", pytest.approx(67.06))
    assert best_beside("PowerMoE-3B") == ("Qwen2-1.5B", pytest.approx(63.16))
    with pytest.raises(ValueError, match="no model is printed beside Gemma2-2B"):
        best_beside("Gemma2-2B")


def test_an_average_of_scores_has_the_error_of_independent_draws_and_needs_all_of_them():
    found = average(_scores(**FIVE, arc_easy__acc_norm=(0.1, 0.1, 100)), "PowerLM-3B")
    assert found.value == pytest.approx(67.8) and found.n == 16917 and found.unit == "points"
    assert found.se == pytest.approx(100 * math.sqrt(0.008**2 + 0.004**2 + 0.022**2 + 0.009**2 + 0.013**2) / 5)
    for name in FIVE:
        assert average(_scores(**{other: told for other, told in FIVE.items() if other != name}), "PowerLM-3B") is None


def test_the_mean_stands_last_beside_the_published_ones_with_its_own_margin():
    *_, row = beside_published(_scores(**FIVE), "PowerLM-3B").to_dict("records")
    assert row["benchmark"] == "mean of BoolQ, HellaSwag, OpenBookQA, PIQA, WinoGrande"
    assert (row["score"], row["published"], row["difference"]) == (pytest.approx(67.8), pytest.approx(68.02), pytest.approx(-0.22))
    assert (row["margin"], row["items"], row["verdict"]) == (1.5, 16917, "reproduced") and row["low"] < 67.8 < row["high"]
    assert (row["Gemma2-2B"], row["Qwen1.5-4B"]) == (pytest.approx(67.06), pytest.approx(66.08))
    low = beside_published(_scores(**FIVE | {"hellaswag__acc_norm": (0.55, 0.005, 10042)}), "PowerLM-3B")
    assert low["verdict"].iloc[-1] == "contradicted" and low["score"].iloc[-1] == pytest.approx(64.0)
    four = {name: told for name, told in FIVE.items() if name != "boolq__acc"}
    assert len(beside_published(_scores(**four), "PowerLM-3B")) == 4


@pytest.mark.slow  # the harness reads all its tasks
def test_every_benchmark_names_tasks_and_metrics_that_the_harness_has():
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install 'etastar[eval]'")
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    assert {task for b in benchmarks().values() for task in b.tasks} <= {*manager.all_subtasks, *manager.all_groups}
    assert Path(lm_eval.__file__).exists()
