"""Where a sweep's time went, as its store tells it."""

import json

import pytest

import etastar as es
from tiny import BATCH, recipe


@pytest.mark.parametrize("backend, workers", [("inline", None), ("local", 2)])
def test_every_sweep_leaves_a_line_on_what_its_workers_spent_their_time(tmp_path, backend, workers):
    es.run([recipe(seed=i) for i in range(2)], store=tmp_path, backend=backend, workers=workers, progress=False)
    es.run([recipe(seed=i) for i in range(3)], store=tmp_path, backend=backend, workers=workers, progress=False)
    first, second = map(json.loads, (tmp_path / "sweeps.jsonl").read_text().splitlines())
    assert (first["runs"], second["runs"]) == (2, 1)
    assert (first["tokens"], second["tokens"]) == (2 * 24 * BATCH, 24 * BATCH)
    for told in (first, second):
        parts = [told[name] for name in ("training", "validating", "writing", "loading", "waiting")]
        assert min(parts) >= 0 and told["training"] > 0 and "compiling" not in told
        assert sum(parts) <= told["wall_s"] * told["workers"] + 0.1
