"""A run of the default corpus, out and back: transformers' logits, our bits, and the harness's scores by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import tiny
from etastar.engine.execute import run
from etastar.hub.cloze import cloze_scores, write_cloze
from etastar.hub.evaluate import evaluate
from etastar.hub.export import export
from etastar.hub.folders import load_checkpoint
from etastar.hub.round_trip import round_trip
from etastar.recipe import Corpus, Mixture, MuP
from etastar.text.corpora import prepare

transformers = pytest.importorskip("transformers")

CORPUS = Corpus("python", vocab=512, max_bytes=1_000_000)
DENSE = dataclasses.replace(tiny.MODEL, head_dim=8, kv_heads=2, context=64)
MODELS = {"dense": DENSE, "mixture": dataclasses.replace(DENSE, ffn_width=24, mixture=Mixture(4, 2))}
BY = MuP(base_width=16, init_std=0.1, embedding_multiplier=12.0, residual_multiplier=0.22)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, and every cache in a folder of the tests."""
    folder = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        for name in ("ETASTAR_CACHE", "HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, str(folder / name))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run, folder of its export, tokens) by kind, of runs of sixteen steps."""
    folder = tmp_path_factory.mktemp("round_trip")
    recipes = [tiny.recipe(steps=16, model=model, corpus=CORPUS, parametrization=BY, batch_tokens=4 * model.context,
                           horizon_tokens=64 * model.context, peak_lr=2**-5) for model in MODELS.values()]
    done = run(recipes, store=folder / "store", workers=1)
    return {kind: (one, export(one, folder / kind), prepare(CORPUS)) for kind, one in zip(MODELS, done, strict=True)}


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_has_the_logits_of_a_trained_run_and_we_read_back_its_bits(exported, kind):
    done, folder, tokens = exported[kind]
    text = "def peak(rate):\n    return rate  # η*, naïve\n"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids
    tokens_BxT = torch.cat([torch.from_numpy(tokens.validation[: 3 * 64].astype("int64")).view(3, 64)[:, : len(ids)], torch.tensor([ids])])
    theirs, ours, back = transformers.AutoModelForCausalLM.from_pretrained(folder), done.model(), load_checkpoint(folder)
    with torch.no_grad():
        mine, other = ours(tokens_BxT), theirs(tokens_BxT).logits
    assert float((mine - other).abs().max()) <= 1e-5 and mine.std() > 0.01
    assert all(torch.equal(p, back.parameters_by_name()[name]) for name, p in ours.parameters_by_name().items())
    told = round_trip(done, folder)
    assert told.bits_equal and told.readers_agree and told.val_loss == pytest.approx(done.val_loss, abs=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_the_harness_scores_what_our_decoder_does_by_hand(exported, kind, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install 'etastar[eval]'")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    done, folder, tokens = exported[kind]
    task = write_cloze(tmp_path / "cloze", CORPUS, items=40, context_tokens=24, continuation_tokens=6)
    logged, theirs = [], lm_eval.evaluate
    monkeypatch.setattr(lm_eval, "evaluate", lambda **options: logged.append(theirs(**options)) or logged[0])
    found = evaluate(folder, ["cloze"], task_folder=task, device="cpu", batch_size=16)
    by_hand = cloze_scores(done.model(), task, tokens.tokenizer_path)
    samples = sorted(logged[0]["samples"]["cloze"], key=lambda sample: sample["doc_id"])
    said_IxC = np.array([[nats for nats, _ in sample["filtered_resps"]] for sample in samples])
    np.testing.assert_allclose(said_IxC, by_hand.filter(like="log_likelihood_").to_numpy(), atol=1e-4, rtol=0)
    (score,) = found.scores.to_dict("records")
    assert (score["task"], score["metric"], score["items"]) == ("cloze", "acc", 40)
    assert score["value"] == by_hand["correct"].mean() and 0 < score["value"] < 1
    assert found.items.sort_values("item")["above"].tolist() == by_hand["correct"].astype(float).tolist()
    assert found.settings["checkpoint"]["run_id"] == done.run_id and json.dumps(found.settings)
