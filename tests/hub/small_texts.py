"""Corpora of a few small texts for tests, in caches of the tests' own."""

import contextlib

import pytest

from etastar.recipe import Corpus


@contextlib.contextmanager
def corpus_of(texts, tmp_path_factory):
    """A context that has a corpus of these texts, by a vocabulary of 290."""
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ETASTAR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Corpus(f"files:{folder}/*.txt", vocab=290)
