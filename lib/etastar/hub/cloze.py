"""A small task of our own in the harness's format: which of several continuations is the true one, from a corpus's held-out text."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from etastar.model.decoder import Decoder
from etastar.text.corpora import TokenSet, prepare

TASK, ITEMS = "cloze", "items.jsonl"
END, ROWS = 0, 64  # the end-of-text token; sequences read at once
SPACES = "ĠĊĉč"  # space, line feed, tab and carriage return in the byte-level alphabet
YAML = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def write_cloze(folder, corpus, items: int = 200, choices: int = 4, context_tokens: int = 48, continuation_tokens: int = 12,
                seed: int = 0) -> Path:
    """Write a multiple-choice task `cloze` of lm-evaluation-harness, cloze.yaml and items.jsonl, into a folder; returns its path.

    An item is `context_tokens` of a held-out document and `choices` continuations of `continuation_tokens` each, in random order: the
    true one, and others from other documents. Contexts do not overlap. Parts begin at white space and end before it, so that text gives
    back the very tokens; all have as many in the corpus's own tokens, so that a sum of log-likelihoods favours none.
    Raises ValueError for numbers too small, a corpus of symbols, and one with too few documents or too little text.
    """
    if min(items, choices - 1, context_tokens, continuation_tokens) < 1:
        raise ValueError(f"a cloze task has 1 item or more, 2 choices or more, and 1 token or more in each part; got items={items}, "
                         f"choices={choices}, context_tokens={context_tokens}, continuation_tokens={continuation_tokens}")
    tokens = prepare(corpus)
    if tokens.tokenizer_path is None:
        raise ValueError(f"corpus {corpus.source!r} is made of symbols and has no text to continue; take a corpus of text")
    rows = _rows(tokens, corpus.source, items, choices, context_tokens, continuation_tokens, seed)
    folder = Path(folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_items(folder, rows)
    (folder / f"{TASK}.yaml").write_text(YAML.format(task=TASK, items=json.dumps(str(folder / ITEMS))))
    return folder


def write_items(folder: Path, items: list[dict]) -> None:
    """Put items (document, context, choices, label) into a folder, one a line."""
    (folder / ITEMS).write_text("".join(json.dumps(item) + "\n" for item in items))


def read_items(folder) -> list[dict]:
    """The items in a folder; ValueError where there are none."""
    path = Path(folder).expanduser() / ITEMS
    if not path.is_file():
        raise ValueError(f"{folder} has no {ITEMS}; write_cloze makes it")
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def cloze_scores(decoder: Decoder, folder, tokenizer_path) -> pd.DataFrame:
    """What our decoder alone makes of a task of `write_cloze`: one row an item, and the accuracy that the harness should find.

    Columns: item, document, label, log_likelihood_0, … (nats, of each choice after the context), chosen (the likeliest), correct. The
    mean of `correct` is the accuracy; items of one document may go together. Text is split as the harness does: the tokens of context
    and choice together, less those of the context. Raises ValueError for a folder without items, and for items longer than the
    decoder's context.
    """
    from tokenizers import Tokenizer

    items, tokenizer = read_items(folder), Tokenizer.from_file(str(tokenizer_path))
    known = [len(tokenizer.encode(item["context"]).ids) for item in items for _ in item["choices"]]
    encoded = [tokenizer.encode(item["context"] + choice).ids for item in items for choice in item["choices"]]
    longest = max(map(len, encoded))
    if longest - 1 > decoder.model.context:
        raise ValueError(f"items of {longest} tokens are longer than the decoder's context of {decoder.model.context} (and one predicted); "
                         "write them with smaller context_tokens")
    nats = [_log_likelihoods(decoder, encoded[i : i + ROWS], known[i : i + ROWS]) for i in range(0, len(encoded), ROWS)]
    nats_IxC = np.concatenate(nats).reshape(len(items), -1)
    scored = pd.DataFrame(nats_IxC).add_prefix("log_likelihood_")
    for at, name in enumerate(("document", "label")):
        scored.insert(at, name, [item[name] for item in items])
    scored.insert(0, "item", range(len(items)))
    return scored.assign(chosen=nats_IxC.argmax(1), correct=lambda told: told["chosen"] == told["label"])


def _log_likelihoods(decoder: Decoder, encoded: list[list[int]], known: list[int]) -> np.ndarray:
    """Nats of the tokens of each sequence from its number of known ones on, (rows,) float64; shorter rows are filled up behind."""
    length, device = max(map(len, encoded)), next(decoder.parameters()).device
    tokens_BxT1 = torch.tensor([ids + [END] * (length - len(ids)) for ids in encoded], device=device)
    logp_BxTxV = decoder(tokens_BxT1[:, :-1]).float().log_softmax(-1)
    logp_BxT = logp_BxTxV.gather(-1, tokens_BxT1[:, 1:, None])[..., 0].double().cpu().numpy()
    return np.array([row[start - 1 : len(ids) - 1].sum() for row, start, ids in zip(logp_BxT, known, encoded, strict=True)])


def _rows(tokens: TokenSet, source: str, items: int, choices: int, context_tokens: int, continuation_tokens: int, seed: int) -> list[dict]:
    from tokenizers import Tokenizer

    tokenizer, drawn = Tokenizer.from_file(str(tokens.tokenizer_path)), np.random.default_rng(seed)
    ids = np.asarray(tokens.validation)
    starts = _windows(ids, _begins_word(ids, tokenizer), context_tokens, continuation_tokens)
    document = np.cumsum(ids == END)[starts]
    if len(starts) < items or len(np.unique(document)) < choices:
        raise ValueError(f"corpus {source!r} has too little held-out text: {len(starts)} passages of {context_tokens} + "
                         f"{continuation_tokens} tokens between white space in {len(np.unique(document))} documents, for {items} items "
                         f"and {choices} choices of as many documents; ask for fewer or shorter ones, or take a larger corpus")
    before, after = ([tokenizer.decode(ids[at + start : at + stop].tolist()) for at in starts]
                     for start, stop in ((0, context_tokens), (context_tokens, context_tokens + continuation_tokens)))
    rows = []
    for chosen in drawn.permutation(len(starts))[:items].tolist():
        given = [chosen, *_others(chosen, document, after, choices - 1, drawn, source)]
        order = drawn.permutation(choices).tolist()
        rows.append({"document": int(document[chosen]), "context": before[chosen], "choices": [after[given[i]] for i in order],
                     "label": order.index(0)})
    return rows


def _begins_word(ids: np.ndarray, tokenizer) -> np.ndarray:
    """Whether a token begins with white space and the one before ends in a plain letter or sign, where text can be cut: bool (N,)."""
    texts = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    opens = np.array([text[0] in SPACES for text in texts])
    closes = np.array(["!" <= text[-1] <= "~" for text in texts])
    closes[END] = False
    return np.concatenate([[False], opens[ids[1:]] & closes[ids[:-1]]])


def _windows(ids: np.ndarray, cut: np.ndarray, context_tokens: int, continuation_tokens: int) -> np.ndarray:
    """Where passages start that can be cut at both ends and between context and continuation, within one document; none overlaps."""
    length = context_tokens + continuation_tokens
    at = np.arange(max(len(ids) - length, 0))
    ends = np.cumsum(ids == END)
    fit = at[cut[at] & cut[at + context_tokens] & cut[at + length] & (ends[at] == ends[at + length])]
    kept, free = [], 0
    for start in fit:
        if start >= free:
            kept.append(start)
            free = start + length
    return np.array(kept, dtype=np.int64)


def _others(chosen: int, document: np.ndarray, after: list[str], count: int, drawn: np.random.Generator, source: str) -> list[int]:
    """Passages of other documents, each of another one, whose continuations differ from the true one and from one another."""
    found, texts, documents = [], {after[chosen]}, {document[chosen]}
    for i in drawn.permutation(len(after)):
        if len(found) == count:
            break
        if document[i] not in documents and after[i] not in texts:
            found.append(i)
            texts.add(after[i])
            documents.add(document[i])
    if len(found) < count:
        raise ValueError(f"corpus {source!r} has too few documents with continuations that differ; take a larger corpus")
    return found
