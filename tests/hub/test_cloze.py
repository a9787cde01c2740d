"""The cloze task: passages cut where text gives back the tokens, one true continuation, and log-likelihoods summed by hand."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from etastar.hub.cloze import cloze_scores, write_cloze
from etastar.model.decoder import Decoder
from etastar.recipe import SP, Corpus, Model
from etastar.text.corpora import prepare
from small_texts import corpus_of

MODEL = Model(width=32, depth=2, head_dim=16, context=24)
WORDS = ["the", "nightingale", "sings", "naïve", "songs,", "über", "λ", "rivers", "and", "日本", "roads;", "of", "η*", "never", "'again'"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two hundred texts of words that are drawn with all kinds of white space between, in a cache of the tests' own."""
    drawn, spaces = np.random.default_rng(0), [" ", "\n", "  ", "\n\t"]
    parts = (zip(drawn.choice(WORDS, 400), drawn.choice(spaces, 400), strict=True) for _ in range(200))
    with corpus_of(("".join(word + space for word, space in some) for some in parts), tmp_path_factory) as made:
        yield made


def items_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def test_text_gives_back_the_tokens_of_the_corpus_and_the_true_choice_is_what_follows(corpus, tmp_path):
    tokens = prepare(corpus)
    tokenizer, held_out = Tokenizer.from_file(str(tokens.tokenizer_path)), "\n\n".join(_documents(tokens))
    items = items_of(write_cloze(tmp_path, corpus, items=60, context_tokens=12, continuation_tokens=5))
    assert len(items) == 60 and len({item["context"] for item in items}) == 60
    for item in items:
        known = tokenizer.encode(item["context"]).ids
        assert len(known) == 12 and len(set(item["choices"])) == 4
        for choice in item["choices"]:
            whole = tokenizer.encode(item["context"] + choice).ids
            assert whole[:12] == known and len(whole) == 17 and choice[0].isspace() and not choice[-1].isspace()
        assert item["context"] + item["choices"][item["label"]] in held_out
    assert np.bincount([item["label"] for item in items], minlength=4).min() > 5


def test_other_choices_are_of_other_documents(corpus, tmp_path):
    texts = _documents(prepare(corpus))
    for item in items_of(write_cloze(tmp_path, corpus, items=60, context_tokens=12, continuation_tokens=8)):
        (own,) = [text for text in texts if item["context"] + item["choices"][item["label"]] in text]
        homes = [[i for i, text in enumerate(texts) if choice in text] for choice in item["choices"]]
        assert all(set(home) - {texts.index(own)} for n, home in enumerate(homes) if n != item["label"])
        assert texts.index(own) == item["document"]


def _documents(tokens) -> list[str]:
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_path))
    parts = np.split(np.asarray(tokens.validation), tokens.validation_starts[1:])
    return [tokenizer.decode(part.tolist()) for part in parts]


def test_a_seed_gives_the_same_bytes_and_another_seed_others(corpus, tmp_path):
    folder = write_cloze(tmp_path / "a", corpus, items=20, context_tokens=10, continuation_tokens=4)
    first = (folder / "items.jsonl").read_bytes()
    assert folder == tmp_path / "a" and (folder / "cloze.yaml").read_text().startswith("task: cloze\n")
    write_cloze(folder, corpus, items=20, context_tokens=10, continuation_tokens=4)
    assert (folder / "items.jsonl").read_bytes() == first
    assert write_cloze(tmp_path / "b", corpus, items=20, context_tokens=10, continuation_tokens=4, seed=1) == tmp_path / "b"
    assert (tmp_path / "b" / "items.jsonl").read_bytes() != first


def test_log_likelihoods_are_sums_over_the_choices_tokens_each_after_all_before_it(corpus, tmp_path):
    folder, path = write_cloze(tmp_path, corpus, items=30, context_tokens=12, continuation_tokens=5), prepare(corpus).tokenizer_path
    decoder, tokenizer = Decoder(MODEL, 290, SP(init_std=0.3), seed=1), Tokenizer.from_file(str(path))
    found, exact = cloze_scores(decoder, folder, path), decoder.double()
    nats_IxC = np.array([[_by_hand(exact, tokenizer, item["context"], choice) for choice in item["choices"]] for item in items_of(folder)])
    np.testing.assert_allclose(found.filter(like="log_likelihood_").to_numpy(), nats_IxC, rtol=1e-5)
    labels = np.array([item["label"] for item in items_of(folder)])
    assert found["correct"].tolist() == (nats_IxC.argmax(1) == labels).tolist() and 0 < found["correct"].mean() < 1
    assert list(found)[:3] == ["item", "document", "label"] and (found["chosen"] == nats_IxC.argmax(1)).all()


@torch.no_grad()
def _by_hand(decoder, tokenizer, before: str, after: str) -> float:
    known, ids = len(tokenizer.encode(before).ids), tokenizer.encode(before + after).ids
    return sum(float(decoder(torch.tensor([ids[:i]]))[0, -1].log_softmax(-1)[ids[i]]) for i in range(known, len(ids)))


def test_a_mixture_of_lengths_is_scored_as_each_alone(corpus, tmp_path):
    path = prepare(corpus).tokenizer_path
    decoder, tokenizer = Decoder(MODEL, 290, SP(init_std=0.3), seed=1), Tokenizer.from_file(str(path))
    row = {"document": 0, "context": "the rivers", "choices": [" sing", " never and never again of roads"], "label": 1}
    (tmp_path / "items.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = cloze_scores(decoder, tmp_path, path).to_dict("records")
    for n, choice in enumerate(row["choices"]):
        assert found[f"log_likelihood_{n}"] == pytest.approx(_by_hand(decoder.double(), tokenizer, row["context"], choice), rel=1e-5)
        decoder.float()


def test_items_longer_than_the_decoders_context_are_refused_and_the_longest_that_fit_are_not(corpus, tmp_path):
    path, decoder = prepare(corpus).tokenizer_path, Decoder(MODEL, 290, SP(), seed=0)
    fits = write_cloze(tmp_path / "fits", corpus, items=4, context_tokens=20, continuation_tokens=5)
    assert len(cloze_scores(decoder, fits, path)) == 4
    longer = write_cloze(tmp_path / "longer", corpus, items=4, context_tokens=21, continuation_tokens=5)
    with pytest.raises(ValueError, match="items of 26 tokens are longer than the decoder's context of 24"):
        cloze_scores(decoder, longer, path)
    with pytest.raises(ValueError, match="has no items.jsonl; write_cloze makes it"):
        cloze_scores(decoder, tmp_path, path)


@pytest.mark.parametrize("options, said", [
    (dict(items=0), "1 item or more.* got items=0"),
    (dict(choices=1), "got items=200, choices=1"),
    (dict(items=10**6, context_tokens=10, continuation_tokens=4), "too little held-out text: .* for 1000000 items"),
    (dict(items=1, choices=150, context_tokens=10, continuation_tokens=4), "for 1 items and 150 choices of as many documents"),
])
def test_what_a_corpus_cannot_give_is_refused_and_nothing_is_written(corpus, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        write_cloze(tmp_path / "out", corpus, **options)
    assert not (tmp_path / "out").exists()


def test_symbols_have_no_text_to_continue(tmp_path, monkeypatch):
    monkeypatch.setenv("ETASTAR_CACHE", str(tmp_path / "cache"))
    symbols = Corpus("synthetic", vocab=64, options=(("tokens", 50_000), ("validation_tokens", 4096)))
    with pytest.raises(ValueError, match="'synthetic' is made of symbols and has no text"):
        write_cloze(tmp_path / "out", symbols)
