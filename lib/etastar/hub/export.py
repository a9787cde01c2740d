"""A finished run as a folder that AutoModelForCausalLM, AutoTokenizer and lm-eval load unchanged, put in place by one rename."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from etastar.engine.checkpoint import write_whole
from etastar.engine.folders import add_folder, replace_folder
from etastar.engine.run import Run, UnfinishedRun, find_run
from etastar.hub.card import checked_licence, model_card, without_folders
from etastar.hub.folders import WEIGHTS
from etastar.model.granite import granite_config, to_granite_state
from etastar.model.parametrization import scalars
from etastar.text.corpora import TokenSet, prepare
from etastar.text.tokenizer import END_OF_TEXT

MARK = "etastar.json"  # says which run a folder is, and that it is ours to replace


def export(run: Run | UnfinishedRun, folder, licence: str | None = None) -> Path:
    """Write a finished run as a transformers folder, granite or granitemoe in fp32; returns its path.

    Holds config.json, model.safetensors, tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json, a model
    card README.md, and etastar.json with the recipe and the sha256 of all of these; neither names a folder of this machine. `licence` is
    the card's, as the hub spells it ("apache-2.0"); None is that where the kit made the corpus, and "other" for texts of your own. An
    export that is there is replaced.
    Raises ValueError, with nothing written, for a run that is unfinished, diverged or of a shape that granite has not (QK-norm,
    normalization everywhere), for a corpus that has changed since, and for a folder that holds anything else, is the working folder or
    lies in the store.
    """
    recipe, folder = run.recipe, Path(folder).expanduser().resolve()
    config = granite_config(recipe.model, recipe.corpus.vocab, scalars(recipe.parametrization, recipe.model))
    licence = checked_licence(recipe.corpus, licence)
    _refuse_unfinished(run)
    _refuse_place(folder, run.store.path.resolve())
    _refuse_taken(folder)
    state = to_granite_state({name: p.detach() for name, p in run.model().parameters_by_name().items()}, recipe.model)
    made = json.loads(run.store.read(run.run_id, "provenance.json"))
    tokens = _same_tokens(run, made)
    files = {"config.json": _json(config | {"torch_dtype": "float32"} | _ids(tokens))} | _tokenizer_files(tokens, recipe.model.context)
    files |= {"generation_config.json": _json({"do_sample": False} | _ids(tokens)),
              "README.md": model_card(run, tokens, licence, config["model_type"]).encode()}
    about = {"run_id": run.run_id, "val_loss": run.val_loss, "recipe": json.loads(without_folders(recipe.to_json())),
             "made_with": {key: made.get(key) for key in ("etastar", "commit", "torch", "corpus_fingerprint", "lr_sha256")}}
    _place(folder, files, state, about)
    return folder


def export_command(options) -> str:
    """What `etastar export` prints; takes store, run_id, folder, licence and json."""
    run = find_run(options.store, options.run_id)
    folder = export(run, options.folder, options.licence)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if options.json:
        return json.dumps({"run_id": run.run_id, "folder": str(folder), "files": files}, indent=1)
    return f"run {run.run_id} is in {folder}: {len(files)} files, {sum(files.values()):,} bytes"


def _refuse_unfinished(run: Run | UnfinishedRun) -> None:
    if not isinstance(run, Run):
        raise ValueError(f"run {run.run_id} is {run.status}, {run.stored_tokens:,} of {run.recipe.horizon_tokens:,} tokens stored; "
                         "a run is exported when it is finished")


def _same_tokens(run: Run, made: dict) -> TokenSet:
    """The run's corpus; ValueError where it now has other tokens, whose tokenizer would not be the run's."""
    tokens = prepare(run.recipe.corpus)
    if tokens.fingerprint != made["corpus_fingerprint"]:
        raise ValueError(f"the corpus {run.recipe.corpus.source!r} is not what run {run.run_id} was trained on (fingerprint "
                         f"{made['corpus_fingerprint'][:12]}, now {tokens.fingerprint[:12]}), so its tokenizer is not here; restore the "
                         "corpus (`make setup` reinstalls the locked packages)")
    return tokens


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def _ids(tokens: TokenSet) -> dict[str, int | None]:
    """Ids of the special tokens: end of text is 0 in a text corpus, before and after every document; symbols have none."""
    special = None if tokens.tokenizer_path is None else 0
    return {"bos_token_id": special, "eos_token_id": special, "pad_token_id": special}


def _tokenizer_files(tokens: TokenSet, context: int) -> dict[str, bytes]:
    """The corpus's own tokenizer, byte for byte; a synthetic corpus has one of its symbols' numbers, "3 41 5"."""
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context, "clean_up_tokenization_spaces": False}
    if tokens.tokenizer_path is None:
        body, special = _numbers(tokens.vocab).to_str(pretty=True).encode(), {}
    else:
        body, special = tokens.tokenizer_path.read_bytes(), dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return {"tokenizer.json": body, "tokenizer_config.json": _json(told | special), "special_tokens_map.json": _json(special)}


def _numbers(vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


# -- the folder -------------------------------------------------------------------------------------------------------


def _refuse_place(folder: Path, store: Path) -> None:
    """ValueError where a new folder would pull away the one somebody stands in, or pass for a run."""
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"{folder} is the working folder, or holds it; name a folder of the export's own")
    if folder.is_relative_to(store):
        raise ValueError(f"{folder} is in the store {store}, which is for runs; name a folder outside")


def _refuse_taken(folder: Path) -> None:
    """ValueError where something is at a folder's place that export did not write, or that was changed since."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder to export to")
    found = sorted(path.name for path in folder.iterdir())
    if not found:
        return
    try:
        known = json.loads((folder / MARK).read_bytes())["files"] | {MARK: None}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is there and is no export of etastar ({', '.join(found[:3])}); name another folder") from None
    foreign = [name for name in found if name not in known or (name != MARK and _sha256(folder / name) != known[name]["sha256"])]
    if foreign:
        raise ValueError(f"{folder} holds what export did not write, or was changed since: {', '.join(foreign[:3])}; move it away or name "
                         "another folder")


def _place(folder: Path, files: dict[str, bytes], state: dict, about: dict) -> None:
    """Write all files aside and rename their folder into place; a kill leaves nothing behind but a hidden folder."""
    there = folder.exists() and any(folder.iterdir())
    partial = folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_native_id()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = {name: write_whole(partial / name, body) for name, body in files.items()}
        save_file(state, partial / WEIGHTS, metadata={"format": "pt"})  # transformers asks for this word
        shutil.copymode(partial / "config.json", partial / WEIGHTS)  # safetensors lets nobody else read
        written[WEIGHTS] = _flushed(partial / WEIGHTS)
        write_whole(partial / MARK, _json({"kind": "etastar export"} | about | {"files": written}))
        if there:
            replace_folder(partial, folder)
        elif not add_folder(partial, folder):
            raise ValueError(f"{folder} was written by another process meanwhile; name another folder")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flushed(path: Path) -> dict:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str | None:
    """None for what is no file."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(body: dict) -> bytes:
    return (json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
