"""Training on a source of known entropy: the loss comes down towards the floor and never goes below it."""

import pytest

import etastar as es
from etastar.text.corpora import prepare

CORPUS = es.Corpus("synthetic", vocab=256, options=(("tokens", 1_500_000), ("validation_tokens", 2**17), ("alpha", 0.8)))


@pytest.mark.slow
def test_the_loss_approaches_the_entropy_from_above(tmp_path):
    steps = (64, 256, 1024)
    recipes = [es.Recipe(model=es.Model(width=48, depth=2, head_dim=16, context=64, tied=False), corpus=CORPUS, optimizer=es.AdamW(),
                         parametrization=es.SP(init_std=0.1), schedule=es.WSD(warmup_steps=16, cooldown_fraction=0.3), peak_lr=2**-6,
                         batch_tokens=1024, horizon_tokens=s * 1024) for s in steps]
    runs = es.run(recipes, store=tmp_path, progress=False)
    floor = prepare(CORPUS).entropy_floor
    excess = [run.val_loss - floor for run in runs]
    noise = [run.validation.loss.std() / len(run.validation) ** 0.5 for run in runs]
    assert excess[0] > excess[1] > excess[2] > -3 * noise[2], (excess, noise)
    assert excess[2] < 0.5 * excess[0], (excess, noise)
    assert runs[-1].curve.train_loss.tail(100).mean() > floor - 0.05
