"""How well a model predicts a text: nats per token and bits per byte by a sliding window, errors clustered by document."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from etastar.model.decoder import Decoder, token_losses
from etastar.text.corpora import TokenSet, prepare

BATCH_TOKENS = 8192  # as validation takes them, so that a batch here and there has the same bits


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What a model paid for a text: nats per token, bits per byte, their standard errors clustered by document.

    `tokens` and `bytes` are those that were predicted; `bytes` is 0 and bits per byte NaN where the corpus has tokens only.
    """

    nats_per_token: float
    nats_per_token_se: float
    bits_per_byte: float
    bits_per_byte_se: float
    tokens: int
    bytes: int
    documents: int
    context: int
    stride: int
    dtype: str

    @property
    def perplexity(self) -> float:
        """e to the nats per token; comparable between models of one tokenizer only."""
        return math.exp(self.nats_per_token)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Held-out documents one after another: token ids, the bytes each token stands for, and the document it belongs to, all (N,)."""

    tokens: np.ndarray
    bytes: np.ndarray
    documents: np.ndarray


def perplexity(model, corpus, context: int | None = None, stride: int | None = None, *, max_tokens: int | None = 2**16,
               document_tokens: int | None = None, batch_tokens: int = BATCH_TOKENS, dtype: torch.dtype = torch.float32) -> Perplexity:
    """Perplexity of a model on the held-out part of a corpus, each token predicted once.

    `model` is one of our decoders, which reads the corpus in its own tokens, or a checkpoint's folder, whose tokenizer reads the same
    text (weights are then taken as `dtype`). Windows of `context` tokens (default: the model's) move on by `stride` (default:
    context), so that a token has at least context − stride tokens before it, or all there are. Documents follow one another as in
    training, each with its end-of-text token, which is predicted too and has no bytes; the first token of all is not predicted.
    `max_tokens` keeps the first so many (None: all), `document_tokens` the first so many of each document, in the corpus's own tokens:
    the error is over documents, and where they are long the first tokens of a corpus are of few. At stride = context and whole windows
    nats per token are the validation loss.
    Raises ValueError for a context beyond the model's, a stride outside 1 … context, another vocabulary, weights in less
    than float32, and no token to predict.
    """
    decoder, stream = _read(model, _beginnings(prepare(corpus), document_tokens), corpus, max_tokens, dtype)
    if (held := next(decoder.parameters()).dtype) not in (torch.float32, torch.float64):
        raise ValueError(f"perplexity is worked out in float32 or float64, its weights are {held}: take them .float()")
    context = decoder.model.context if context is None else context
    stride = context if stride is None else stride
    if not 1 <= stride <= context <= decoder.model.context:
        raise ValueError(f"perplexity needs 1 ≤ stride ≤ context ≤ {decoder.model.context}, the model's; got stride={stride}, "
                         f"context={context}")
    nats_N = sliding_losses(decoder, stream.tokens, context, stride, batch_tokens)
    return _told(nats_N, stream, context, stride, held)


def sliding_losses(decoder: Decoder, tokens_N: np.ndarray, context: int, stride: int, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """Nats that a decoder pays for tokens 1 … N − 1 of a stream, each with the tokens its window has before it: float64 (N − 1,)."""
    params = {name: p.detach()[None] for name, p in decoder.parameters_by_name().items()}
    device, nats = next(decoder.parameters()).device, np.full(len(tokens_N) - 1, np.nan)
    rows = max(1, batch_tokens // context)
    windows = list(_windows(len(tokens_N) - 1, context, stride))
    for i in range(0, len(windows), rows):
        some = windows[i : i + rows]
        tokens_BxT1 = np.stack([tokens_N[start : start + length + 1] for start, length, _ in some]).astype(np.int64)
        with torch.no_grad():
            losses_BxT = token_losses(params, torch.from_numpy(tokens_BxT1)[None].to(device), decoder.model, decoder.scalars)[0]
        for (start, length, kept), row in zip(some, losses_BxT.double().cpu().numpy(), strict=True):
            nats[start + length - kept : start + length] = row[length - kept :]
    return nats


def _windows(predicted: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, length, how many of its last predictions count): all of one length, the last moved back to end with the stream."""
    length = min(context, predicted)
    yield 0, length, length
    done = length
    while done < predicted:
        kept = min(stride, predicted - done)
        done += kept
        yield done - length, length, kept


def _beginnings(tokens: TokenSet, document_tokens: int | None) -> TokenSet:
    """A corpus whose held-out documents have no more than so many tokens each, the first."""
    if document_tokens is None:
        return tokens
    if document_tokens < 2:
        raise ValueError(f"a document of {document_tokens} tokens has none to predict from another; give document_tokens of at least 2")
    ends = np.append(tokens.validation_starts[1:], len(tokens.validation))
    kept = [tokens.validation[start : min(end, start + document_tokens)] for start, end in zip(tokens.validation_starts, ends, strict=True)]
    starts = np.cumsum([0, *map(len, kept[:-1])])
    return dataclasses.replace(tokens, validation=np.concatenate(kept), validation_starts=starts)


def _read(model, tokens: TokenSet, corpus, max_tokens: int | None, dtype) -> tuple[Decoder, Stream]:
    """The decoder and the text in its tokens."""
    if isinstance(model, Decoder):
        if model.vocab != tokens.vocab:
            raise ValueError(f"the decoder has a vocabulary of {model.vocab} and corpus {corpus.source!r} one of {tokens.vocab}; give the "
                             "corpus it was trained on, or the checkpoint's folder, whose tokenizer then reads the text")
        return model, _cut(_own_stream(tokens), max_tokens, corpus)
    from etastar.hub.folders import load_checkpoint

    folder = Path(model)
    decoder = load_checkpoint(folder, dtype)
    if tokens.tokenizer_path is None:
        return _read(decoder, tokens, corpus, max_tokens, dtype)
    stream = _cut(_read_again(tokens, folder, max_tokens), max_tokens, corpus)
    if (most := int(stream.tokens.max())) >= decoder.vocab:
        raise ValueError(f"the tokenizer of {folder} gives token {most}, its model has {decoder.vocab}: they do not belong together")
    return decoder, stream


def _own_stream(tokens: TokenSet) -> Stream:
    """The held-out tokens of a corpus as they are; its byte-level tokens say themselves how many bytes they stand for."""
    ids = np.asarray(tokens.validation).astype(np.int64)
    documents = np.searchsorted(tokens.validation_starts, np.arange(len(ids)), side="right") - 1
    return Stream(ids, _bytes_of_tokens(tokens)[ids], documents)


def _bytes_of_tokens(tokens: TokenSet) -> np.ndarray:
    """Bytes of every token of a corpus's own tokenizer, in whose alphabet a byte is a letter: int64 (V,), 0 where there is no text."""
    if tokens.tokenizer_path is None:
        return np.zeros(tokens.vocab, dtype=np.int64)
    tokenizer = _tokenizer(tokens.tokenizer_path)
    special = tokenizer.get_added_tokens_decoder()
    return np.array([0 if i in special else len(tokenizer.id_to_token(i)) for i in range(tokens.vocab)], dtype=np.int64)


def _tokenizer(path: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _read_again(tokens: TokenSet, folder: Path, max_tokens: int | None) -> Stream:
    """The same text in a folder's tokens, documents ended by its end-of-text token if it has one."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json, so it cannot read text; fetch the whole checkpoint")
    own, theirs = _tokenizer(tokens.tokenizer_path), _tokenizer(folder / "tokenizer.json")
    end, ids, counts, documents, held = _end_of_text(folder), [], [], [], 0
    for number, text in enumerate(_texts(tokens, own)):
        encoding = theirs.encode(text, add_special_tokens=False)
        ids.append([*encoding.ids, *end])
        counts.append([*token_bytes(text, encoding.offsets), *[0] * len(end)])
        documents.append([number] * len(ids[-1]))
        held += len(ids[-1])
        if max_tokens is not None and held > max_tokens:
            break
    return Stream(*(np.concatenate([np.array(part, dtype=np.int64) for part in parts]) for parts in (ids, counts, documents)))


def _texts(tokens: TokenSet, own) -> Iterator[str]:
    """The held-out documents of a corpus, read back from its tokens, which lose nothing."""
    ends = [*tokens.validation_starts[1:], len(tokens.validation)]
    for start, end in zip(tokens.validation_starts, ends, strict=True):
        yield own.decode(tokens.validation[start:end].tolist())


def _end_of_text(folder: Path) -> list[int]:
    told = json.loads((folder / "config.json").read_text()).get("eos_token_id")
    return [] if told is None else [told[0] if isinstance(told, list) else told]


def token_bytes(text: str, offsets: list[tuple[int, int]]) -> list[int]:
    """UTF-8 bytes of a text that each token brings, from the characters (start, end) of each: those up to its end that none before had.

    Characters that no token covers go to the next one, and those of a character cut into several tokens to the first.
    """
    ends = np.maximum.accumulate([end for _, end in offsets]) if offsets else np.zeros(0, dtype=np.int64)
    upto = np.concatenate([[0], np.cumsum([len(letter.encode()) for letter in text])])
    return np.diff(upto[ends], prepend=0).tolist()


def _cut(stream: Stream, max_tokens: int | None, corpus) -> Stream:
    """The first `max_tokens` predictions: one token more."""
    kept = slice(None if max_tokens is None else max_tokens + 1)
    stream = Stream(stream.tokens[kept], stream.bytes[kept], stream.documents[kept])
    if len(stream.tokens) < 2:
        raise ValueError(f"there is no token to predict: corpus {corpus.source!r} has {len(stream.tokens)} with max_tokens={max_tokens}")
    return stream


def _told(nats_N: np.ndarray, stream: Stream, context: int, stride: int, dtype) -> Perplexity:
    _, document_N = np.unique(stream.documents[1:], return_inverse=True)
    nats_D, tokens_D, bytes_D = (np.bincount(document_N, weights) for weights in (nats_N, None, stream.bytes[1:]))
    per_token, per_token_se = ratio(nats_D, tokens_D)
    per_byte, per_byte_se = ratio(nats_D / math.log(2), bytes_D)
    return Perplexity(per_token, per_token_se, per_byte, per_byte_se, len(nats_N), int(bytes_D.sum()), len(nats_D), context, stride,
                      str(dtype).removeprefix("torch."))


def ratio(above_G, below_G) -> tuple[float, float]:
    """Σ above / Σ below over groups (G,) and its standard error when groups are drawn; NaN where the sum is 0 or there is one group.

    The error is that of a ratio estimator, √(G / (G − 1) · Σ (above − ratio · below)²) / Σ below: of a mean, the sample's over √G.
    """
    above, below = np.asarray(above_G, dtype=np.float64), np.asarray(below_G, dtype=np.float64)
    groups, total = len(above), float(below.sum())
    if not total:
        return math.nan, math.nan
    value = float(above.sum()) / total
    if groups < 2:
        return value, math.nan
    return value, math.sqrt(groups / (groups - 1) * float(((above - value * below) ** 2).sum())) / abs(total)
