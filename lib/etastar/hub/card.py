"""The model card of an exported run: what was trained on what, its loss, its licence, and how to use it."""

import glob
import json
import math
import re
from pathlib import PurePath

from etastar.engine.run import Run
from etastar.fingerprint import TRAIN_PACKAGES, VALIDATION_PACKAGES
from etastar.recipe import Corpus
from etastar.text.corpora import TokenSet
from etastar.values import canonical_json

OURS = "apache-2.0"  # of the kit, and so of what it makes of a corpus that comes with it
_OWN_FILES = re.compile(r'files:(?=[/~])((?:[^"\\]|\\.)*)')  # in JSON too


def checked_licence(corpus: Corpus, licence: str | None) -> str:
    """The licence a card states: as given, else the kit's own for a corpus of the kit and "other" for texts of somebody else's.

    Raises ValueError for what is no licence identifier of the hub, which are lower case.
    """
    if licence is None:
        return OURS if corpus.source in ("python", "synthetic") else "other"
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise ValueError(f"licence {licence!r} is no identifier of the hub; write it as 'apache-2.0', 'cc-by-4.0', 'mit' or 'other'")
    return licence


def without_folders(text: str) -> str:
    """A text (a recipe as JSON, say) in which a corpus of files on this machine is named below the folder that holds them.

    "files:/data/texts/*.txt" is told as "files:*.txt"; a relative pattern stays as it is.
    """
    return _OWN_FILES.sub(lambda found: f"files:{_below_folder(found[1])}", text)


def _below_folder(pattern: str) -> str:
    parts = PurePath(pattern).parts
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[first:])


def model_card(run: Run, tokens: TokenSet, licence: str, kind: str) -> str:
    """README.md of an export: front matter for the hub, a table of facts, the corpus, the licence, the recipe, and the way to load it."""
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(run, kind).items())
    recipe = json.dumps(json.loads(without_folders(run.recipe.to_json())), indent=1)
    here = ", in the folder that holds its texts" if run.recipe.corpus.source.startswith("files:") else ""
    text = tokens.tokenizer_path is not None
    return "\n\n".join((
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: {licence}\ntags:\n- etastar\n- {kind}\n"
        "- learning-rate\n---",
        f"# etastar run {run.run_id}",
        "A small decoder trained by etastar, a kit that re-tests what the learning-rate papers claim. It is a measurement of a learning "
        "rate, not an assistant: it was trained on the corpus below alone and knows nothing else.",
        f"| | |\n|---|---|\n{facts}",
        f"## Corpus\n\n{_corpus(run.recipe.corpus, text)}\n\nFingerprint of its tokens: `{tokens.fingerprint}`.",
        f"## Licence\n\n{_licence(run.recipe.corpus, licence)}",
        f"## Use\n\n{_use(text)}",
        f"## Recipe\n\n`es.run([es.Recipe.from_json(text)])` trains it again{here}.\n\n```json\n{recipe}\n```",
    )) + "\n"


def _facts(run: Run, kind: str) -> dict[str, str]:
    recipe, told = run.recipe, run.summary
    return {
        "Validation loss": f"{run.val_loss:.4f} nats per token (perplexity {math.exp(run.val_loss):.4g}), on what was held out of training",
        "Architecture": f"{kind}: width {recipe.model.width}, depth {recipe.model.depth}, context {recipe.model.context} tokens, "
                        f"vocabulary {recipe.corpus.vocab}",
        "Parameters": f"{told['params_total']:,} ({told['params_non_embedding']:,} without embeddings, {told['params_active']:,} active)",
        "Trained on": f"{recipe.horizon_tokens:,} tokens in {told['steps']:,} steps of {recipe.batch_tokens:,}",
        "Peak learning rate": f"{recipe.peak_lr:.6g}",
        "Schedule": f"`{canonical_json(recipe.schedule)}`",
        "Optimizer": f"`{canonical_json(recipe.optimizer)}`",
        "Parametrization": f"`{canonical_json(recipe.parametrization)}`",
        "Seed": str(recipe.seed),
        "Precision": f"trained in {recipe.execution.precision}, stored in fp32",
    }


def _corpus(corpus: Corpus, text: bool) -> str:
    made = f"a byte-level BPE vocabulary of {corpus.vocab}" if text else f"{corpus.vocab} symbols, written as numbers: `3 41 5`"
    return {
        "python": f"Python sources of installed packages, by {made}. Training: {', '.join(TRAIN_PACKAGES)}. Held out: "
                  f"{', '.join(VALIDATION_PACKAGES)}.",
        "synthetic": f"A synthetic source of known entropy: {made}.",
        "hf": f"The dataset `{corpus.source.removeprefix('hf:')}` of the hub, by {made}.",
    }.get(corpus.source.split(":")[0], f"Files of the trainer's own, by {made}.")


def _licence(corpus: Corpus, licence: str) -> str:
    whose = {"python": "The packages it was trained on are under their own licences.",
             "synthetic": "Its corpus was made by the kit."}
    texts = whose.get(corpus.source, "The texts it was trained on are under their own terms, which the kit does not know.")
    return f"The weights are stated to be under `{licence}` by whoever exported them. {texts}"


def _use(text: bool) -> str:
    note = ("Documents follow `<|endoftext|>` in training; put it before a text of your own." if text else
            "The tokenizer takes symbols as numbers parted by spaces.")
    return f"```python\n{_EXAMPLE}```\n\n{note}"


_EXAMPLE = """import etastar as es
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
decoder = es.load_checkpoint(folder)  # the same bits, in the kit's own decoder
"""
