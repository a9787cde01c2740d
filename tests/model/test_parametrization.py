"""μP as numbers: the published table by literal values, the base width as standard parametrization, and what it is for."""

import dataclasses

import numpy as np
import pytest
import torch

import etastar as es
from etastar.model.decoder import Decoder
from etastar.model.parametrization import Scalars, as_table, numbers, scalars

WIDE = es.Model(width=128, depth=2, head_dim=32, context=32, tied=False)
MUP = es.MuP(base_width=32, init_std=0.08, embedding_multiplier=12.0, residual_multiplier=0.26)


def test_the_table_of_arxiv_2408_13359_at_four_times_the_base_width():
    table = numbers(MUP, WIDE, vocab=100)
    qkv, out, head, embedding, norm = (table[n] for n in ("layers.0.qkv", "layers.1.mlp_out", "head", "embedding", "final_norm"))
    assert (qkv.init_std, qkv.lr_multiplier, qkv.decay_multiplier) == (0.04, 0.25, 4.0)
    assert (out.init_std, out.lr_multiplier) == (0.08 / 2 / 2, 0.25)  # √m = 2 and √(2·depth) = 2
    assert (head.init_std, head.lr_multiplier, head.decay_multiplier) == (0.08, 1.0, 1.0)
    assert (embedding.init_std, embedding.lr_multiplier, embedding.decay_multiplier) == (0.08, 1.0, 0.0)
    assert (norm.init_std, norm.lr_multiplier) == (None, 1.0)
    assert scalars(MUP, WIDE) == Scalars(embedding=12.0, residual=0.26, attention=1 / 32, logits=4.0)  # logits are divided by m


def test_the_decay_of_hidden_matrices_is_independent_of_the_rate_or_coupled_with_it():
    by_width = {decay: [numbers(dataclasses.replace(MUP, decay=decay), dataclasses.replace(WIDE, width=w), 100)["layers.0.qkv"]
                        for w in (32, 64, 128)] for decay in ("independent", "coupled")}
    assert [n.lr_multiplier * n.decay_multiplier for n in by_width["independent"]] == [1.0, 1.0, 1.0]
    assert [n.lr_multiplier * n.decay_multiplier for n in by_width["coupled"]] == [1.0, 0.5, 0.25]


def test_at_the_base_width_it_is_standard_parametrization_but_for_attention():
    plain = es.MuP(base_width=128, init_std=0.02)
    assert numbers(plain, WIDE, 100) == numbers(es.SP(), WIDE, 100)
    assert dataclasses.replace(scalars(plain, WIDE), attention=32**-0.5) == scalars(es.SP(), WIDE)


def test_bad_constants_are_told():
    for wrong in (dict(base_width=0), dict(base_width=32, init_std=0.0), dict(base_width=32, residual_multiplier=-1.0)):
        with pytest.raises(ValueError, match="MuP needs"):
            es.MuP(**wrong)
    with pytest.raises(ValueError, match="decay"):
        es.MuP(base_width=32, decay="none")


def test_a_recipe_with_it_has_an_id_of_its_own_and_survives_json():
    recipe = _recipe(MUP, 64)
    assert es.Recipe.from_json(recipe.to_json()) == recipe
    assert len({recipe.run_id, _recipe(es.SP(), 64).run_id, _recipe(dataclasses.replace(MUP, base_width=64), 64).run_id}) == 3
    row = as_table(recipe).set_index("parameter").loc["layers.0.qkv"]
    assert (row.peak_lr, row.weight_decay) == (recipe.peak_lr / 2, 0.2)


def test_training_moves_the_logits_of_every_width_alike_and_in_standard_parametrization_those_of_wide_models_more(tmp_path):
    widths = (32, 64, 128, 256)
    moved = {}
    for name, by in (("mup", es.MuP(base_width=32, init_std=0.1)), ("sp", es.SP(init_std=0.1))):
        runs = es.run([_recipe(by, w) for w in widths], store=tmp_path / name, backend="inline", progress=False)
        moved[name] = [_moved(run, by) for run in runs]
    slope = {name: np.polyfit(np.log2(widths), np.log2(values), 1)[0] for name, values in moved.items()}
    assert abs(slope["mup"]) < 0.1 and slope["sp"] > 0.2  # in the first few steps both fall as 1/√width beside that: random heads


def _recipe(by, width) -> es.Recipe:
    corpus = es.Corpus("synthetic", vocab=64)
    return es.Recipe(model=es.Model(width=width, depth=2, head_dim=16, context=32, tied=False), corpus=corpus, parametrization=by,
                     optimizer=es.AdamW(), schedule=es.Constant(), peak_lr=0.01, batch_tokens=256, horizon_tokens=16 * 256, seed=3)


def _moved(run, by) -> float:
    """Root mean square of what training added to the logits of the same tokens."""
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
    before = Decoder(run.recipe.model, 64, by, seed=run.recipe.seed)
    with torch.no_grad():
        return float((run.model()(tokens) - before(tokens)).square().mean().sqrt())
