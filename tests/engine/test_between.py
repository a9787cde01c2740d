"""The loss between two runs: their own losses at the ends of the line, the loss of the weights in between and beyond."""

import pytest
import torch

import etastar as es
from etastar.engine.slots import validate
from etastar.model.decoder import Decoder
from etastar.model.parametrization import scalars
from etastar.text.corpora import prepare
from tiny import BATCH, CORPUS, MODEL, recipe, wsd

FAST = dict(progress=False, workers=1)


@pytest.fixture(scope="module")
def cooled(tmp_path_factory):
    """A trunk where its cooldown begins, and the end of the cooldown."""
    return es.run([recipe(30), recipe(40, schedule=wsd(10))], store=tmp_path_factory.mktemp("cooled"), **FAST)


def test_the_ends_of_the_line_are_the_runs_own_losses(cooled):
    before, after = cooled
    found = es.loss_between(before, after)
    assert list(found.columns) == ["share", "val_loss"] and found.share.tolist() == [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    loss = found.set_index("share").val_loss
    assert loss[0.0] == before.val_loss != after.val_loss == loss[1.0]
    assert loss.nunique() == 7
    back = es.loss_between(after, before, shares=[1, 0])
    assert back.val_loss.tolist() == [before.val_loss, after.val_loss] and back.share.dtype == float


@pytest.mark.parametrize("share", [0.25, 0.5, 1.25])
def test_between_and_beyond_it_is_the_loss_of_the_mixed_weights(cooled, share):
    start, end = (run.model().parameters_by_name() for run in cooled)
    mixed = {name: ((1 - share) * start[name].double() + share * end[name].double()).float().detach() for name in start}
    assert isinstance(cooled[0].model(), Decoder) and all(t.dtype == torch.float32 for t in mixed.values())
    expected = validate(mixed, MODEL, scalars(es.SP(), MODEL), prepare(CORPUS))[0]
    (found,) = es.loss_between(*cooled, shares=(share,)).val_loss
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name, change", [
    ("model", dict(model=es.Model(width=32, depth=1, head_dim=16, context=32))),
    ("corpus", dict(corpus=es.Corpus("synthetic", vocab=32, options=CORPUS.options))),
    ("parametrization", dict(parametrization=es.SP(init_std=0.1))),
])
def test_no_line_leads_to_another_kind_of_run(name, change, cooled, tmp_path):
    (other,) = es.run([recipe(1, **change, schedule=es.Constant())], store=tmp_path, **FAST)
    with pytest.raises(ValueError, match=f"{other.run_id} are not of one {name}: .* and .*; no line") as refused:
        es.loss_between(cooled[0], other)
    for run in (cooled[0], other):
        assert str(getattr(run.recipe, name)) in str(refused.value) and run.run_id in str(refused.value)


def test_a_run_that_diverged_has_no_weights(cooled, tmp_path):
    wild = recipe(8, peak_lr=1e30, schedule=es.Constant(), optimizer=es.AdamW(clip_norm=None))
    (diverged,) = es.run([wild], store=tmp_path, **FAST)
    with pytest.raises(ValueError, match="diverged after"):
        es.loss_between(cooled[0], diverged)
    assert diverged.recipe.batch_tokens == BATCH
