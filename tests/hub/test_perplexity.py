"""Perplexity by sliding window: against sums by hand, the engine's validation loss, and the bytes of the text itself."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etastar.engine.execute import run
from etastar.hub.perplexity import _windows, perplexity, ratio, sliding_losses, token_bytes
from etastar.model.decoder import Decoder
from etastar.model.granite import granite_config, to_granite_state
from etastar.recipe import SP, Corpus, Model
from etastar.text.corpora import prepare
from small_texts import corpus_of
from tiny import recipe

MODEL = Model(width=32, depth=2, head_dim=16, context=24)
WORDS = ["the", "nightingale", "sings", "naïve", "songs", "über", "λ", "rivers", "and", "日本", "roads", "of", "η*", "never", "again"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of two hundred short texts, some letters of which are two or three bytes long, and its cache in the test's own folder."""
    rng = np.random.default_rng(0)
    with corpus_of((" ".join(rng.choice(WORDS, 50)) for _ in range(200)), tmp_path_factory) as made:
        yield made


def decoder(vocab, seed=0) -> Decoder:
    return Decoder(MODEL, vocab, SP(init_std=0.3), seed=seed)


def test_at_stride_equal_to_context_it_is_the_validation_loss(tmp_path):
    corpus = Corpus("synthetic", vocab=64, options=(("tokens", 50_000), ("validation_tokens", 128 * 32 + 1)))
    (trained,) = run([recipe(corpus=corpus)], store=tmp_path)
    told = perplexity(trained.model(), corpus)
    assert (told.tokens, told.context, told.stride, told.dtype) == (4096, 32, 32, "float32")
    assert told.nats_per_token == pytest.approx(trained.val_loss, abs=1e-6)
    assert told.perplexity == pytest.approx(math.exp(trained.val_loss), rel=1e-6)
    assert told.bytes == 0 and math.isnan(told.bits_per_byte)


@pytest.mark.parametrize("context, stride", [(24, 24), (24, 7), (10, 1)])
def test_every_token_costs_what_the_decoder_says_after_the_tokens_of_its_window(context, stride):
    model, tokens = decoder(50), np.random.default_rng(1).integers(50, size=70)
    nats = sliding_losses(model, tokens, context, stride, batch_tokens=3 * context)
    with torch.no_grad():
        for i in range(1, len(tokens)):
            start = 0 if i <= context else min(-(-(i - context) // stride) * stride, len(tokens) - 1 - context)
            logp = model(torch.from_numpy(tokens[start:i])[None]).log_softmax(-1)[0, -1]
            assert nats[i - 1] == pytest.approx(-float(logp[tokens[i]]), abs=2e-5)


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_each_token_is_predicted_once_with_enough_before_it(predicted, context, data):
    stride = data.draw(st.integers(1, context))
    times = np.zeros(predicted, dtype=int)
    for start, length, kept in _windows(predicted, context, stride):
        assert 0 <= start and start + length <= predicted and length == min(context, predicted)
        first = start + length - kept
        times[first : start + length] += 1
        assert first == 0 or first - start >= context - stride
    assert (times == 1).all()


def test_another_stride_predicts_the_same_tokens_after_others(corpus):
    model = decoder(290)
    whole, sliding = (perplexity(model, corpus, stride=stride, max_tokens=400) for stride in (24, 6))
    assert whole.nats_per_token != sliding.nats_per_token and whole.tokens == sliding.tokens == 400


def test_bits_per_byte_are_of_the_text_itself(corpus):
    tokens, model = prepare(corpus), decoder(290)
    told = perplexity(model, corpus, max_tokens=None)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_path))
    texts = tokenizer.decode(tokens.validation.tolist(), skip_special_tokens=True)
    assert told.bytes == len(texts.encode()) - len(tokenizer.id_to_token(int(tokens.validation[0]))) > 500
    assert told.documents == len(tokens.validation_starts) > 1
    assert told.bits_per_byte == pytest.approx(told.nats_per_token * told.tokens / math.log(2) / told.bytes, rel=1e-12)


def test_a_folder_reads_the_same_text_in_its_own_tokens(corpus, tmp_path):
    """With the corpus's own tokenizer it is the same as the decoder; with one of single bytes it has more tokens and the same bytes."""
    from safetensors.torch import save_file

    from etastar.text.tokenizer import train_tokenizer

    model, tokens = decoder(290), prepare(corpus)
    save_file(to_granite_state({n: p.detach() for n, p in model.parameters_by_name().items()}, MODEL), tmp_path / "model.safetensors")
    config = granite_config(MODEL, 290, model.scalars)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        perplexity(tmp_path, corpus)
    (tmp_path / "tokenizer.json").write_bytes(tokens.tokenizer_path.read_bytes())
    ours, theirs = perplexity(model, corpus, stride=12, max_tokens=600), perplexity(tmp_path, corpus, stride=12, max_tokens=600)
    assert (theirs.nats_per_token, theirs.nats_per_token_se) == pytest.approx((ours.nats_per_token, ours.nats_per_token_se), rel=1e-6)
    assert (theirs.tokens, theirs.documents) == (ours.tokens, ours.documents) == (600, ours.documents) and ours.documents > 1
    assert abs(theirs.bytes - ours.bytes) <= 3  # of a letter that the first token cuts
    train_tokenizer(["abc"], 257).save(str(tmp_path / "tokenizer.json"))
    bytewise, words = perplexity(tmp_path, corpus, max_tokens=None), perplexity(model, corpus, max_tokens=None)
    assert bytewise.tokens > 1.5 * words.tokens and bytewise.documents == words.documents
    assert abs(bytewise.bytes - words.bytes) < 12  # the first token, which is not predicted, is another there
    double = perplexity(tmp_path, corpus, max_tokens=300, dtype=torch.float64)
    assert (double.tokens, double.dtype) == (300, "float64")
    with pytest.raises(ValueError, match="float32 or float64, .* are torch.bfloat16"):
        perplexity(tmp_path, corpus, dtype=torch.bfloat16)
    train_tokenizer([" ".join(WORDS) * 9], 310).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="its model has 290: they do not belong together"):
        perplexity(tmp_path, corpus, max_tokens=None)


@pytest.mark.parametrize("text, offsets, counts", [
    ("aé b", [(0, 1), (1, 2), (1, 2), (2, 4)], [1, 2, 0, 2]),  # é of two bytes in two tokens
    ("日 x ", [(0, 1), (2, 3)], [3, 2]),  # a space that no token covers goes to the next; one at the end to none
    ("", [], []),
])
def test_bytes_of_tokens_from_their_places_in_the_text(text, offsets, counts):
    assert token_bytes(text, offsets) == counts


def test_the_error_of_a_ratio_is_clustered():
    rng = np.random.default_rng(5)
    sample = rng.normal(size=30)
    value, se = ratio(sample, np.ones(30))
    assert (value, se) == (pytest.approx(sample.mean()), pytest.approx(sample.std(ddof=1) / math.sqrt(30)))
    nats, tokens = np.array([30.0, 44.0, 12.0]), np.array([10, 11, 6])
    r = 86 / 27
    assert ratio(nats, tokens) == (pytest.approx(r), pytest.approx(
        math.sqrt(1.5 * ((30 - 10 * r) ** 2 + (44 - 11 * r) ** 2 + (12 - 6 * r) ** 2)) / 27))
    assert ratio([3.0], [2])[0] == 1.5 and math.isnan(ratio([3.0], [2])[1]) and math.isnan(ratio([1.0], [0])[0])


def test_the_clustered_error_is_what_documents_of_unlike_length_scatter_by():
    """Over 4,000 draws of 40 documents, each with a level of its own, the told error is the scatter of the mean to within 6 %."""
    rng, values, errors = np.random.default_rng(8), [], []
    for _ in range(4000):
        tokens = rng.integers(20, 200, 40)
        value, se = ratio(tokens * (3 + rng.normal(0, 0.5, 40)), tokens)
        values.append(value)
        errors.append(se)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.06)


def test_what_cannot_be_asked_is_refused(corpus):
    for given_, said in (({"context": 25}, "context=25"), ({"stride": 0}, "stride=0"), ({"context": 8, "stride": 9}, "stride=9"),
                         ({"max_tokens": 0}, "no token to predict")):
        with pytest.raises(ValueError, match=said):
            perplexity(decoder(290), corpus, **given_)
    with pytest.raises(ValueError, match="vocabulary of 300 and corpus .* one of 290"):
        perplexity(decoder(300), corpus)


def test_the_first_tokens_of_each_document_alone_can_be_asked_for(corpus):
    tokens, model = prepare(corpus), decoder(prepare(corpus).vocab)
    ends = [*tokens.validation_starts[1:], len(tokens.validation)]
    begun = [np.asarray(tokens.validation[start:end][:9]) for start, end in zip(tokens.validation_starts, ends, strict=True)]
    told = perplexity(model, corpus, max_tokens=None, document_tokens=9)
    assert told.documents == len(begun) > 5 and told.tokens == sum(map(len, begun)) - 1
    nats = sliding_losses(model, np.concatenate(begun).astype(np.int64), 24, 24)
    assert told.nats_per_token == pytest.approx(nats.mean(), abs=1e-9)
    with pytest.raises(ValueError, match="document of 1 tokens"):
        perplexity(model, corpus, document_tokens=1)
