"""Runs as folders that transformers loads unchanged: the same logits, the same token ids, and the same bits when they are read back."""

import argparse
import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import tiny
from etastar.engine.execute import run
from etastar.engine.run import Run, UnfinishedRun, find_run
from etastar.hub.card import without_folders
from etastar.hub.export import export, export_command
from etastar.hub.folders import load_checkpoint
from etastar.recipe import CompleteP, Corpus, Mixture, MuP
from etastar.text.corpora import prepare

transformers = pytest.importorskip("transformers")

SHARED = dataclasses.replace(tiny.MODEL, head_dim=8, kv_heads=2, tied=False, ffn_width=48, rope_theta=500.0)
MUP = MuP(base_width=16, init_std=0.1, embedding_multiplier=11.3, residual_multiplier=0.22)
SHAPES = {"text": ("granite", True, 2), "shared": ("granite", False, 2), "deep": ("granite", True, 2), "symbols": ("granitemoe", False, 2)}
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
SCALARS = {"text": (1, 1, 1 / 4, 1), "shared": (11.3, 0.22, 1 / 8, 2), "deep": (1, 1 / 2, 1 / 8, 2), "symbols": (11.3, 0.22, 1 / 8, 2)}
TEXT = "def f(x):\n\treturn  x+1  # naïve, 日本語 \U0001f600\r\n\n  'It''s' . <|endoftext|> the end"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each kind, by name, trained in one store on words of our own and on symbols."""
    folder, drawn = tmp_path_factory.mktemp("runs"), random.Random(7)
    words = [f"{drawn.choice('aeiou')}{drawn.randrange(999)}é" for _ in range(300)]
    for i in range(60):
        (folder / f"{i}.txt").write_text("\n\t".join(" ".join(drawn.choices(words, k=20)) for _ in range(20)))
    before, os.environ["ETASTAR_CACHE"] = os.environ.get("ETASTAR_CACHE"), str(folder / "cache")
    try:
        deep = CompleteP(base_width=16, base_depth=1, init_std=0.1)
        text = dict(corpus=Corpus(f"files:{folder}/*.txt", vocab=300), steps=6)
        kinds = {"text": tiny.recipe(**text), "shared": tiny.recipe(model=SHARED, parametrization=MUP, **text),
                 "deep": tiny.recipe(model=dataclasses.replace(SHARED, tied=True), parametrization=deep, **text),
                 "symbols": tiny.recipe(steps=6, model=dataclasses.replace(SHARED, mixture=Mixture(4, 2)), parametrization=MUP),
                 "queries": tiny.recipe(steps=6, model=dataclasses.replace(tiny.MODEL, qk_norm=True))}
        yield dict(zip(kinds, run(list(kinds.values()), store=folder / "store", workers=1), strict=True))
    finally:
        os.environ.pop("ETASTAR_CACHE") if before is None else os.environ.update(ETASTAR_CACHE=before)


@pytest.mark.parametrize("kind", ["text", "shared", "deep", "symbols"])
def test_a_run_goes_out_and_comes_back_with_the_same_bits(runs, kind, tmp_path):
    done = runs[kind]
    folder = export(done, tmp_path / "models" / "mine")
    assert folder == tmp_path / "models" / "mine" and [path.name for path in folder.parent.iterdir()] == ["mine"]
    ours, back = done.model(), load_checkpoint(folder)
    told = json.loads((folder / "config.json").read_text())
    assert (told["model_type"], told["tie_word_embeddings"], told["num_key_value_heads"]) == SHAPES[kind]
    assert {name: told[name] for name in MULTIPLIERS} == pytest.approx(dict(zip(MULTIPLIERS, SCALARS[kind], strict=True)))
    assert back.parameters_by_name().keys() == ours.parameters_by_name().keys() and back.scalars == ours.scalars
    assert all(torch.equal(p, back.parameters_by_name()[name]) for name, p in ours.parameters_by_name().items())
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    tokens_BxT = torch.from_numpy(prepare(done.recipe.corpus).validation[:96].astype("int64")).view(3, 32)
    with torch.no_grad():
        mine, read, other = ours(tokens_BxT), back(tokens_BxT), theirs.eval()(tokens_BxT).logits
    assert torch.equal(mine, read) and mine.std() > 0.01 and theirs.dtype == torch.float32
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_the_exported_tokenizer_gives_the_ids_the_run_was_trained_on(runs, tmp_path):
    folder = export(runs["text"], tmp_path / "out")
    theirs, tokens = transformers.AutoTokenizer.from_pretrained(folder), prepare(runs["text"].recipe.corpus)
    ours = Tokenizer.from_file(str(tokens.tokenizer_path))
    held_out = [theirs.decode(part) for part in (tokens.validation[:500].tolist(), tokens.validation[500:900].tolist())]
    for text in (TEXT, *held_out, "", " ", "\n"):
        assert theirs(text).input_ids == ours.encode(text).ids and theirs.decode(theirs(text).input_ids) == text
    assert "".join(held_out) == theirs.decode(tokens.validation[:900].tolist()) and "é" in held_out[0]
    assert theirs(TEXT).input_ids.count(0) == 1 and len(theirs) == 300 and theirs.model_max_length == 32
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 0)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 0, 0)
    @given(st.text())
    def comes_back(text):
        assert theirs(text).input_ids == ours.encode(text).ids and theirs.decode(theirs(text).input_ids) == text

    comes_back()
    assert held_out[0].encode() == "".join(held_out).encode()[: len(held_out[0].encode())]


def test_a_run_on_symbols_has_a_tokenizer_of_their_numbers(runs, tmp_path):
    folder = export(runs["symbols"], tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = prepare(runs["symbols"].recipe.corpus).validation[:50].tolist()
    text = " ".join(map(str, ids))
    assert theirs(text).input_ids == ids and theirs.decode(ids) == text and len(theirs) == 64
    assert theirs.eos_token_id is None and transformers.GenerationConfig.from_pretrained(folder).eos_token_id is None
    assert transformers.AutoConfig.from_pretrained(folder).eos_token_id is None  # or generation ends at symbol 0, the commonest


def test_generation_goes_on_where_the_decoder_would(runs, tmp_path):
    folder = export(runs["shared"], tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens_1xT = torch.tensor([[0, 40, 41, 42]])
    told = theirs.generate(tokens_1xT, max_new_tokens=5, attention_mask=torch.ones_like(tokens_1xT))
    for _ in range(told.shape[1] - tokens_1xT.shape[1]):
        tokens_1xT = torch.cat((tokens_1xT, runs["shared"].model()(tokens_1xT)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(told, tokens_1xT) and told.shape[1] > 4


def test_the_card_tells_recipe_corpus_loss_and_licence(runs, tmp_path):
    card = (export(runs["shared"], tmp_path / "mine") / "README.md").read_text()
    done = runs["shared"]
    assert yaml.safe_load(card.split("---\n")[1]) == {"library_name": "transformers", "pipeline_tag": "text-generation", "license": "other",
                                                      "tags": ["etastar", "granite", "learning-rate"]}
    assert f"{done.val_loss:.4f} nats per token" in card and "768 tokens in 6 steps of 128" in card
    assert "| Peak learning rate | 0.015625 |" in card
    assert f"{sum(p.numel() for p in done.model().parameters()):,} (" in card and prepare(done.recipe.corpus).fingerprint in card
    told = json.loads(card.split("```json\n")[1].split("```")[0])
    assert done.recipe.replace(corpus=Corpus("files:*.txt", vocab=300)) == type(done.recipe).from_json(json.dumps(told))
    assert "trains it again, in the folder that holds its texts." in card
    assert "under their own terms, which the kit does not know" in card
    card = (export(runs["symbols"], tmp_path / "theirs") / "README.md").read_text()
    assert "license: apache-2.0" in card and "- granitemoe" in card and "made by the kit" in card
    assert "license: mit" in (export(runs["text"], tmp_path / "given", licence="mit") / "README.md").read_text()
    with pytest.raises(ValueError, match="licence 'Apache 2.0' is no identifier"):
        export(runs["text"], tmp_path / "wrong", licence="Apache 2.0")
    assert not (tmp_path / "wrong").exists()


def test_the_command_exports_a_run_of_a_store_and_tells_the_files(runs, tmp_path):
    done = runs["text"]
    options = dict(store=str(done.store.path), run_id=done.run_id, folder=str(tmp_path / "out"), licence=None)
    told = json.loads(export_command(argparse.Namespace(**options, json=True)))
    assert told["run_id"] == done.run_id and told["folder"] == str(tmp_path / "out")
    assert told["files"] == {path.name: path.stat().st_size for path in sorted((tmp_path / "out").iterdir())}
    said = export_command(argparse.Namespace(**options, json=False))
    assert f"run {done.run_id}" in said and str(tmp_path / "out") in said
    with pytest.raises(ValueError, match="no run 'nothing' in the store"):
        export_command(argparse.Namespace(**options | {"run_id": "nothing"}, json=True))


def test_what_was_written_is_told_and_readable_by_all(runs, tmp_path):
    folder = export(runs["text"], tmp_path / "out")
    told = json.loads((folder / "etastar.json").read_text())
    assert {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "etastar.json"} == {
        name: of["bytes"] for name, of in told["files"].items()}
    assert set(told["files"]) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                  "generation_config.json", "README.md"}
    assert told["run_id"] == runs["text"].run_id and told["val_loss"] == runs["text"].val_loss
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_an_export_is_replaced_by_the_next_and_nothing_else_is(runs, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    export(runs["text"], folder)
    export(runs["shared"], folder)
    assert json.loads((folder / "etastar.json").read_text())["run_id"] == runs["shared"].run_id
    for name, match in (("notes.txt", "did not write, or was changed since: notes.txt"), ("README.md", "changed since: README.md")):
        before = (folder / "README.md").read_text()
        (folder / name).write_text("of my own")
        with pytest.raises(ValueError, match=match):
            export(runs["text"], folder)
        assert (folder / name).read_text() == "of my own"
        (folder / name).unlink() if name == "notes.txt" else (folder / name).write_text(before)
    export(runs["text"], folder)


def test_no_file_of_an_export_names_a_folder_of_this_machine(runs, tmp_path):
    folder = export(runs["text"], tmp_path / "out")
    texts = os.path.dirname(runs["text"].recipe.corpus.source.removeprefix("files:"))
    own = {str(path) for path in (texts, runs["text"].store.path, tmp_path, Path.home(), Path.cwd())}
    assert {path.name: name for path in folder.iterdir() for name in own if name.encode() in path.read_bytes()} == {}


@pytest.mark.parametrize("source, told", [
    ("files:/data/me/texts/*.txt", "files:*.txt"), ("files:/data/me/my texts/**/*.jsonl", "files:**/*.jsonl"),
    ("files:~me/a.txt", "files:a.txt"), ('{"source":"files:/data/m\\"e/*.txt","vocab":300}', '{"source":"files:*.txt","vocab":300}'),
    ("files:texts/*.txt", "files:texts/*.txt"), ("python", "python"), ("hf:owner/set@" + "0" * 40, "hf:owner/set@" + "0" * 40)])
def test_a_corpus_of_files_is_told_without_their_folder(source, told):
    assert without_folders(source) == told


def test_a_run_of_a_store_that_was_moved_is_exported(runs, tmp_path):
    done = runs["text"]
    before = export(done, tmp_path / "before")
    moved = Path(shutil.copytree(done.store.path, tmp_path / "store")).rename(tmp_path / "moved")
    after = export(find_run(moved, done.run_id), tmp_path / "after")
    assert {path.name: path.read_bytes() for path in after.iterdir()} == {path.name: path.read_bytes() for path in before.iterdir()}


def test_the_working_folder_and_the_store_are_no_place_for_an_export(runs, tmp_path, monkeypatch):
    (inner := tmp_path / "empty" / "inner").mkdir(parents=True)
    monkeypatch.chdir(inner)
    for place in (".", "..", inner):
        with pytest.raises(ValueError, match="is the working folder, or holds it; name a folder of the export's own"):
            export(runs["text"], place)
    store = runs["text"].store.path
    for place in (store, store / "out", runs["text"].path, store / ".nodes" / "out"):
        with pytest.raises(ValueError, match="is in the store .* name a folder outside"):
            export(runs["text"], place)
    assert not list(inner.iterdir()) and not (store / "out").exists()
    assert export(runs["text"], "out") == inner / "out"


def test_a_pickle_in_an_export_is_in_the_way_and_not_opened(runs, tmp_path, trap):
    folder = export(runs["text"], tmp_path / "out")
    (folder / "pytorch_model.bin").write_bytes(trap[0])
    with pytest.raises(ValueError, match="did not write, or was changed since: pytorch_model.bin"):
        export(runs["text"], folder)
    assert not trap[2].exists()


@pytest.mark.parametrize("there, match", [("file", "is a file"), ("folder", "is no export of etastar")])
def test_a_place_that_is_taken_is_refused_and_left_alone(runs, there, match, tmp_path):
    place = tmp_path / "taken"
    if there == "file":
        place.write_text("mine")
    if there == "folder":
        place.mkdir()
        (place / "config.json").write_text("mine")
    before = sorted(place.iterdir()) if place.is_dir() else place.read_text()
    with pytest.raises(ValueError, match=match):
        export(runs["text"], place)
    assert before == (sorted(place.iterdir()) if place.is_dir() else place.read_text())


def test_a_failure_while_writing_leaves_what_was_there(runs, tmp_path, monkeypatch):
    folder = export(runs["text"], tmp_path / "out")
    monkeypatch.setattr("etastar.hub.export.save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "disk full")))
    for place in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            export(runs["shared"], place)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((folder / "etastar.json").read_text())["run_id"] == runs["text"].run_id


def test_a_run_that_has_no_such_form_is_refused_before_anything_is_written(runs, tmp_path):
    done = runs["text"]
    everywhere = dataclasses.replace(tiny.MODEL, normalization="everywhere")
    refused = {
        "qk_norm=True, which normalizes": runs["queries"],
        'normalization="everywhere", which cannot': Run(done.store, done.recipe.replace(model=everywhere), done.summary),
        "diverged after 6 steps": Run(done.store, done.recipe, done.summary | {"status": "diverged", "val_loss": None}),
        "is finished, 0 of 640 tokens stored": UnfinishedRun(done.store, done.recipe.replace(horizon_tokens=640), done.run_id, "sweep"),
    }
    for match, run_ in refused.items():
        with pytest.raises(ValueError, match=match):
            export(run_, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_has_changed_since_is_refused(runs, tmp_path):
    done = runs["text"]
    store = shutil.copytree(done.store.path, tmp_path / "store")
    source = done.recipe.corpus.source.removeprefix("files:")
    other = shutil.copytree(os.path.dirname(source), tmp_path / "texts", ignore=lambda _, names: [n for n in names if n[-4:] != ".txt"])
    (other / "0.txt").write_text("something else " * 100)
    changed = done.recipe.replace(corpus=Corpus(f"files:{other}/*.txt", vocab=300))
    with pytest.raises(ValueError, match="is not what run .* was trained on .* its tokenizer is not here"):
        export(Run(type(done.store)(store), changed, done.summary), tmp_path / "out")
    assert not (tmp_path / "out").exists()
