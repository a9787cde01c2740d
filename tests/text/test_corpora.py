"""From documents to token files: splits, deduplication, caching by content, and every way a corpus can be wrong."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from etastar import fingerprint as prints
from etastar.recipe import Corpus
from etastar.text import corpora, sources
from etastar.text.corpora import prepare
from etastar.text.export import export_tokens


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ETASTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(prints.TOKENS_FILE, raising=False)
    prepare.cache_clear()
    yield tmp_path / "cache"
    prepare.cache_clear()


@pytest.fixture
def folder(tmp_path, cache):
    """A hundred documents in three formats, some of them twice."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"Document {i}. " + " ".join(f"word{(i * j) % 97} and {j}" for j in range(60)) for i in range(100)]
    place = tmp_path / "texts"
    place.mkdir()
    (place / "a.txt").write_text(texts[0])
    (place / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts[1:60] + texts[1:10]) + "\n")
    pq.write_table(pa.table({"text": texts[60:], "n": list(range(40))}), place / "c.parquet")
    return place


def test_files_are_split_by_document_deduplicated_and_decode_to_what_they_were(folder):
    found = sources.documents(Corpus(f"files:{folder}/*", vocab=400))
    assert len(found) == 100 and 1 <= sum(out for _, out in found) <= 15
    tokens = prepare(Corpus(f"files:{folder}/*", vocab=400))
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_path))
    train = [text for text, out in found if not out]
    ends = np.flatnonzero(tokens.train == 0)
    assert len(ends) == len(train) and tokenizer.decode(tokens.train[: ends[0]].tolist()) == train[0]
    held = [text for text, out in found if out]
    assert len(tokens.validation_starts) == len(held) and tokens.train.max() < 400
    assert tokenizer.decode(tokens.validation[: tokens.validation_starts[1] - 1].tolist() if len(held) > 1 else
                            tokens.validation[:-1].tolist()) == held[0]


def test_the_same_content_is_built_once_and_another_is_another(folder, monkeypatch):
    corpus = Corpus(f"files:{folder}/*", vocab=400)
    first = prepare(corpus)
    prepare.cache_clear()
    monkeypatch.setattr(corpora, "_build", lambda *a: pytest.fail("built again"))
    assert (prepare(corpus).train == first.train).all()
    monkeypatch.undo()
    before = prints.fingerprint(corpus)
    (folder / "a.txt").write_text("Another text. " * 100)
    assert prints.fingerprint(corpus) != before
    assert prints.fingerprint(Corpus(f"files:{folder}/*", vocab=401)) != prints.fingerprint(corpus)


def test_a_truncated_cache_is_built_again(folder, cache):
    corpus = Corpus(f"files:{folder}/*", vocab=400)
    first = np.array(prepare(corpus).train)
    (file,) = cache.glob("corpora/*/train.bin")
    file.write_bytes(file.read_bytes()[:-10])
    prepare.cache_clear()
    assert (prepare(corpus).train == first).all()


def test_max_bytes_keeps_a_prefix_of_the_training_documents(folder):
    whole, part = prepare(Corpus(f"files:{folder}/*", vocab=300)), prepare(Corpus(f"files:{folder}/*", vocab=300, max_bytes=20_000))
    assert 0 < part.train_tokens < whole.train_tokens / 2


def test_an_exported_corpus_stands_in_for_its_sources(folder, tmp_path, monkeypatch):
    corpus = Corpus(f"files:{folder}/*", vocab=400)
    first, name = np.array(prepare(corpus).train), prints.fingerprint(corpus)
    path = export_tokens(corpus, tmp_path / "tokens.xz")
    for file in folder.iterdir():
        file.unlink()
    monkeypatch.setenv("ETASTAR_CACHE", str(tmp_path / "elsewhere"))
    prepare.cache_clear()
    with pytest.raises(ValueError, match="matches no file"):
        prepare(corpus)
    monkeypatch.setenv(prints.TOKENS_FILE, str(path))
    assert prints.fingerprint(corpus) == name
    assert (prepare(corpus).train == first).all() and prepare(corpus).tokenizer_path.exists()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    monkeypatch.setenv("ETASTAR_CACHE", str(tmp_path / "third"))
    prepare.cache_clear()
    with pytest.raises(ValueError, match="is damaged"):
        prepare(corpus)


def write(folder, name, data):
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


@pytest.mark.parametrize("name, data, said", [
    ("bad.txt", b"\xff\xfe not utf-8" * 50, "bad.txt is not UTF-8"),
    ("bad.jsonl", '{"text": "fine"}\n{oops\n', "bad.jsonl:2 is not JSON"),
    ("bad.jsonl", '{"body": "x"}\n', "no text under 'text'"),
    ("bad.csv", "a,b", "cannot read '.csv'"),
])
def test_a_bad_file_is_named(folder, name, data, said):
    write(folder, name, data)
    with pytest.raises(ValueError, match=said):
        prepare(Corpus(f"files:{folder}/*", vocab=400))


@pytest.mark.parametrize("corpus, said", [
    (dict(source="files:/nowhere/*.txt", vocab=400), "matches no file"),
    (dict(source="hf:owner/name@main", vocab=400), "40 hex digits"),
    (dict(source="python", vocab=400, options=(("text_key", "x"),)), "does not know the option 'text_key'"),
])
def test_a_bad_corpus_is_named(cache, corpus, said):
    with pytest.raises(ValueError, match=said):
        prepare(Corpus(**corpus))


def test_vocabularies_too_small_and_too_large(folder):
    with pytest.raises(ValueError, match="at least 257"):
        prepare(Corpus(f"files:{folder}/*", vocab=200))
    with pytest.raises(ValueError, match="too small for a vocabulary of 60000"):
        prepare(Corpus(f"files:{folder}/*", vocab=60_000))
    with pytest.raises(ValueError, match="65536"):
        Corpus("python", vocab=70_000)


def test_the_python_corpus_is_the_locked_packages():
    lock = {line.split("==")[0].lower().replace("_", "-") for line in open("requirements.lock") if "==" in line}
    packages = {p.lower().replace("_", "-") for p in prints.TRAIN_PACKAGES + prints.VALIDATION_PACKAGES}
    assert packages <= lock and not set(prints.TRAIN_PACKAGES) & set(prints.VALIDATION_PACKAGES)
    files = prints.python_files(prints.TRAIN_PACKAGES)
    assert 80e6 < sum(path.stat().st_size for *_, path, _ in files) < 130e6
    assert len(prints.fingerprint(Corpus("python", vocab=512))) == 64


def test_an_edited_package_is_named(monkeypatch, cache, tmp_path):
    fake = tmp_path / "mod.py"
    fake.write_text("x = 1\n" * 100)
    monkeypatch.setattr(sources, "python_files", lambda packages: [("pkg", "pkg/mod.py", fake, "not-its-hash")])
    with pytest.raises(ValueError, match=r"pkg/mod.py .* reinstall it: pip install .* pkg"):
        sources.documents(Corpus("python", vocab=400))


def test_a_missing_package_is_named(monkeypatch):
    with pytest.raises(ValueError, match="'no-such-package' is not installed; run `make setup`"):
        prints.python_files(["no-such-package"])
