"""Parametrizations as numbers: the published tables by literal values, the base as standard parametrization, and what they are for."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import etastar as es
from etastar.model.decoder import Decoder, init_parameters, loss
from etastar.model.parametrization import Scalars, as_table, numbers, scalars

FIELDS = ("init_std", "lr_multiplier", "decay_multiplier", "eps_multiplier")
NAMES = {"embedding": "embedding", "gain": "layers.0.mlp_norm", "hidden": "layers.0.qkv", "back": "layers.7.mlp_out",
         "router": "layers.0.router", "expert": "layers.0.experts_gate_up", "expert_back": "layers.7.experts_out",
         "final_gain": "final_norm", "head": "head"}
DEEP = es.Model(width=128, depth=8, head_dim=64, context=32, tied=False)  # four times the base in width and in depth; √(2·depth) = 4
EXPERTS = dataclasses.replace(DEEP, mixture=es.Mixture(experts=4, experts_per_token=2))
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


def rows(by, model=DEEP) -> dict[str, tuple]:
    """(init std, LR, decay, ε multipliers) of one parameter of each kind."""
    table = numbers(by, model, vocab=100)
    return {kind: tuple(getattr(table[name], field) for field in FIELDS) for kind, name in NAMES.items() if name in table}


def test_standard_parametrization_has_one_rate_for_all():
    assert rows(es.SP(init_std=0.08)) == {
        "embedding": (0.08, 1.0, 0.0, 1.0), "gain": (None, 1.0, 0.0, 1.0), "hidden": (0.08, 1.0, 1.0, 1.0), "back": (0.02, 1.0, 1.0, 1.0),
        "final_gain": (None, 1.0, 0.0, 1.0), "head": (0.08, 1.0, 1.0, 1.0)}
    assert scalars(es.SP(), DEEP) == Scalars(embedding=1.0, residual=1.0, attention=1 / 8, logits=1.0)


@pytest.mark.parametrize("decay, hidden_decay", [("independent", 4.0), ("coupled", 1.0)])
@pytest.mark.parametrize("eps, in_blocks", [("fixed", 1.0), ("scaled", 0.25)])
def test_mup_by_arxiv_2203_03466_and_the_mup_column_of_2505_01618_table_1(decay, hidden_decay, eps, in_blocks):
    assert rows(es.MuP(base_width=32, init_std=0.08, decay=decay, eps=eps)) == {
        "embedding": (0.08, 1.0, 0.0, 1.0), "gain": (None, 1.0, 0.0, in_blocks), "hidden": (0.04, 0.25, hidden_decay, in_blocks),
        "back": (0.01, 0.25, hidden_decay, in_blocks), "final_gain": (None, 1.0, 0.0, 1.0), "head": (0.08, 1.0, 1.0, 1.0)}


@pytest.mark.parametrize("alpha, in_blocks, eps, residual", [(1, 1.0, 1 / 16, 1 / 4), (0.5, 1 / 2, 1 / 8, 1 / 2), (0, 1 / 4, 1 / 4, 1.0)])
def test_completep_and_its_controls_by_arxiv_2505_01618_table_1(alpha, in_blocks, eps, residual):
    by = es.CompleteP(base_width=32, base_depth=2, alpha=alpha, init_std=0.08)
    assert rows(by) == {
        "embedding": (0.08, 1.0, 0.0, 1.0), "gain": (None, in_blocks, 0.0, eps), "hidden": (0.04, in_blocks / 4, 4.0, eps),
        "back": (0.04, in_blocks / 4, 4.0, eps), "final_gain": (None, 1.0, 0.0, 1.0), "head": (0.08, 1.0, 1.0, 1.0)}
    assert scalars(by, DEEP) == Scalars(embedding=1.0, residual=residual, attention=1 / 64, logits=4.0)
    coupled = rows(dataclasses.replace(by, decay="coupled", eps="fixed"))
    assert coupled["hidden"] == coupled["back"] == (0.04, in_blocks / 4, 1.0, 1.0) and coupled["gain"][3] == 1.0


def test_minicpms_form_divides_block_outputs_by_the_root_of_depth_and_scores_by_the_root_of_the_head():
    by = es.MuP(base_width=32, embedding_multiplier=10.0, residual_multiplier=1.5, residual_depth_exponent=0.5, attention="root")
    assert scalars(by, dataclasses.replace(DEEP, depth=9)) == Scalars(embedding=10.0, residual=0.5, attention=1 / 8, logits=4.0)
    assert (rows(by)["hidden"], rows(by)["head"]) == ((0.01, 0.25, 4.0, 1.0), (0.02, 1.0, 1.0, 1.0))


def test_granites_form_has_three_constants_and_no_rule_of_depth():
    by = es.MuP(base_width=32, embedding_multiplier=10.0, residual_multiplier=0.3)
    assert scalars(by, DEEP) == scalars(by, dataclasses.replace(DEEP, depth=2)) == Scalars(10.0, 0.3, 1 / 64, 4.0)


def test_the_attention_of_completep_may_be_the_root_too():
    assert scalars(es.CompleteP(base_width=32, base_depth=2, attention="root"), DEEP).attention == 1 / 8


@pytest.mark.parametrize("by, expert, expert_back, router", [
    (es.SP(init_std=0.08), (0.08, 1.0, 1.0, 1.0), (0.02, 1.0, 1.0, 1.0), (0.08, 1.0, 1.0, 1.0)),
    (es.MuP(32, 0.08), (0.04, 0.25, 4.0, 1.0), (0.01, 0.25, 4.0, 1.0), (0.02, 0.25, 4.0, 4.0)),
    (es.MuP(32, 0.08, decay="coupled"), (0.04, 0.25, 1.0, 1.0), (0.01, 0.25, 1.0, 1.0), (0.02, 0.25, 4.0, 4.0)),
    (es.MuP(32, 0.08, eps="scaled"), (0.04, 0.25, 4.0, 0.25), (0.01, 0.25, 4.0, 0.25), (0.02, 0.25, 4.0, 1.0)),
    (es.MuP(32, 0.08, router="hidden"), (0.04, 0.25, 4.0, 1.0), (0.01, 0.25, 4.0, 1.0), (0.04, 0.25, 4.0, 1.0)),
    (es.MuP(32, 0.08, router="hidden", decay="coupled", eps="scaled"),
     (0.04, 0.25, 1.0, 0.25), (0.01, 0.25, 1.0, 0.25), (0.04, 0.25, 1.0, 0.25)),
    (es.CompleteP(32, 2, init_std=0.08), (0.04, 0.25, 4.0, 1 / 16), (0.04, 0.25, 4.0, 1 / 16), (0.02, 0.25, 4.0, 1 / 4)),
    (es.CompleteP(32, 2, 0.5, 0.08), (0.04, 1 / 8, 4.0, 1 / 8), (0.04, 1 / 8, 4.0, 1 / 8), (0.02, 1 / 8, 4.0, 1 / 2)),
    (es.CompleteP(32, 2, 0.5, 0.08, eps="fixed"), (0.04, 1 / 8, 4.0, 1.0), (0.04, 1 / 8, 4.0, 1.0), (0.02, 1 / 8, 4.0, 4.0)),
    (es.CompleteP(32, 2, init_std=0.08, router="hidden"), (0.04, 0.25, 4.0, 1 / 16), (0.04, 0.25, 4.0, 1 / 16), (0.04, 0.25, 4.0, 1 / 16)),
], ids=str)
def test_experts_are_hidden_matrices_and_a_router_is_an_output_or_a_hidden_one(by, expert, expert_back, router):
    found = rows(by, EXPERTS)
    assert (found["expert"], found["expert_back"], found["router"]) == (expert, expert_back, router)
    dense = rows(by)
    assert all(found[kind] == dense[kind] for kind in ("embedding", "gain", "hidden", "final_gain", "head"))


def test_ratios_of_layer_groups_take_routers_and_experts_with_the_blocks():
    table = numbers(es.MuP(base_width=32), EXPERTS, 100, lr_ratios=(2.0, 0.5, 3.0))
    assert {kind: table[NAMES[kind]].lr_multiplier for kind in ("embedding", "router", "expert", "gain", "head")} == {
        "embedding": 2.0, "router": 0.125, "expert": 0.125, "gain": 0.5, "head": 3.0}


def test_unit_norm_refuses_a_mixture():
    with pytest.raises(ValueError, match="UnitNorm has no norms for a router and experts; take SP"):
        numbers(es.UnitNorm(), EXPERTS, 100)


@given(wide=st.integers(1, 12), deep=st.integers(1, 12), alpha=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
       eps=st.sampled_from(["fixed", "scaled"]), router=st.sampled_from(["output", "hidden"]))
def test_only_ratios_to_the_base_matter_and_independent_decay_is_independent_of_width(wide, deep, alpha, eps, router):
    tables = []
    for base in (16, 48):
        model = es.Model(width=base * wide, depth=3 * deep, head_dim=16, mixture=es.Mixture(4, 1))
        by = es.CompleteP(base, 3, alpha, eps=eps, router=router)
        tables.append({name: [getattr(row, field) for field in FIELDS] for name, row in numbers(by, model, 100).items()})
    assert tables[0] == tables[1]
    matrices = [row for name, row in numbers(by, model, 100).items() if name.startswith("layers.") and row.role != "norm"]
    assert [row.lr_multiplier * row.decay_multiplier for row in matrices] == pytest.approx([deep ** (alpha - 1)] * len(matrices))


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


def test_the_table_shows_epsilon_and_the_forward_multipliers():
    table = as_table(_recipe(dataclasses.replace(MUP, eps="scaled"), 64).replace(optimizer=es.AdamW(eps=1e-6)))
    eps = table.set_index("parameter").eps
    assert (eps["layers.0.qkv"], eps["layers.1.attention_norm"], eps["embedding"], eps["head"]) == (5e-7, 5e-7, 1e-6, 1e-6)
    assert table.attrs["forward"] == {"embedding": 12.0, "residual": 0.26, "attention": 1 / 16, "logits": 2.0}
    assert "eps" not in as_table(_recipe(es.SP(), 64).replace(optimizer=es.Scion())).columns  # it has none


LR, DECAY, EPS, STEPS = 0.05, 0.5, 1e-3, 6  # so large that each of them shows in what six steps do


def trained(start, groups, loss_of) -> dict[str, torch.Tensor]:
    """Parameters in float64 after STEPS of torch's AdamW; `groups` are (rate, decay, ε) multipliers by name."""
    params = {name: tensor.double().clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.AdamW([{"params": [params[name]], "lr": LR * lr, "weight_decay": DECAY * decay, "eps": EPS * eps}
                                   for name, (lr, decay, eps) in groups.items()])
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(params, step).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in params.items()}


def of_table(table) -> dict[str, tuple]:
    return {name: (row.lr_multiplier, row.decay_multiplier, row.eps_multiplier) for name, row in table.items()}


@pytest.mark.parametrize("by", [es.MuP(16, 0.3), es.MuP(16, 0.3, eps="scaled", decay="coupled"), es.CompleteP(16, 1, 0.5, 0.3)], ids=str)
def test_logits_over_m_are_the_multiplier_free_form_of_the_head_step_by_step(by):
    """Lemma J.1 of arXiv 2203.03466: W = θ·w trains alike with std, rate and 1/ε over θ, where λ keeps its product with the rate."""
    model, m = es.Model(width=48, depth=2, head_dim=16, context=8, tied=False, ffn_width=48), 3
    table, given, start = numbers(by, model, 20), scalars(by, model), init_parameters(model, 20, by, seed=5)
    tokens = torch.randint(20, (STEPS, 1, 3, 9), generator=torch.Generator().manual_seed(0))
    free = dataclasses.replace(given, logits=1.0)
    lr, decay, eps = of_table(table)["head"]
    ours, other = (trained(params, groups, lambda p, i, s=s: loss({n: t[None] for n, t in p.items()}, tokens[i], model, s).sum())
                   for params, groups, s in ((start, of_table(table), given),
                                             (start | {"head": start["head"].double() / m},
                                              of_table(table) | {"head": (lr / m, decay * m, eps * m)}, free)))
    other["head"] = other["head"] * m
    assert (ours["head"] - start["head"]).abs().max() > 0.1
    for name in ours:
        torch.testing.assert_close(other[name], ours[name], rtol=1e-7, atol=1e-9)


def mixed(params, x_NxD, multiplier) -> torch.Tensor:
    """A hidden matrix, then two of four experts a token by a router whose logits are multiplied."""
    h_NxD = x_NxD @ params["qkv"].T
    chosen, which = (h_NxD @ params["router"].T * multiplier).topk(2, dim=-1)
    outs_NxExD = torch.einsum("nd,efd->nef", h_NxD, params["experts"]).tanh()
    picked = outs_NxExD.gather(1, which[..., None].expand(-1, -1, outs_NxExD.shape[-1]))
    return (chosen.softmax(-1)[..., None] * picked).sum(1)


@pytest.mark.parametrize("by, slower, eps", [
    (es.MuP(16, 0.3), 1.0, 1.0), (es.MuP(16, 0.3, decay="coupled"), 1.0, 1.0), (es.MuP(16, 0.3, eps="scaled"), 1.0, 1 / 3),
    (es.CompleteP(16, 1, 0.5, 0.3), 2**-0.5, 1 / (3 * 2**0.5)), (es.CompleteP(16, 1, 1.0, 0.3, eps="fixed", decay="coupled"), 1.0, 1.0),
], ids=str)
def test_the_router_with_1_over_m_in_its_weights_trains_as_one_with_that_multiplier(by, slower, eps):
    """The form with a multiplier has the head's numbers: std as given, the rate and λ without m, and the ε of its block."""
    model = es.Model(width=48, depth=2, head_dim=16, ffn_width=48, mixture=es.Mixture(4, 2))
    table = numbers(by, model, 20)
    mine = {"qkv": table["layers.0.qkv"], "router": table["layers.0.router"], "experts": table["layers.0.experts_out"]}
    random = torch.Generator().manual_seed(7)
    normal = {n: torch.randn({"qkv": (48, 48)}.get(n, row.shape), generator=random, dtype=torch.float64) for n, row in mine.items()}
    x, y = torch.randn(2, STEPS, 40, 48, generator=random, dtype=torch.float64)
    absorbed = {n: normal[n] * row.init_std for n, row in mine.items()}
    explicit = absorbed | {"router": normal["router"] * 0.3}
    stored = trained(absorbed, of_table(mine), lambda p, i: (mixed(p, x[i], 1.0) - y[i]).square().mean())
    spoken = trained(explicit, of_table(mine) | {"router": (slower, 1.0, eps)},
                     lambda p, i: (mixed(p, x[i], 1 / 3) - y[i]).square().mean())
    assert (stored["router"] * 3 - explicit["router"]).abs().max() > 0.05
    torch.testing.assert_close(stored["router"] * 3, spoken["router"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(mixed(stored, x[0], 1.0), mixed(spoken, x[0], 1 / 3), rtol=1e-7, atol=1e-9)


def test_training_moves_the_logits_of_every_width_alike_and_in_standard_parametrization_those_of_wide_models_more(tmp_path):
    widths = (32, 64, 128, 256)
    moved = {}
    for name, by in (("mup", es.MuP(base_width=32, init_std=0.1)), ("sp", es.SP(init_std=0.1))):
        runs = es.run([_recipe(by, w) for w in widths], store=tmp_path / name, backend="inline", progress=False)
        moved[name] = [_moved(run, by) for run in runs]
    slope = {name: np.polyfit(np.log2(widths), np.log2(values), 1)[0] for name, values in moved.items()}
    assert abs(slope["mup"]) < 0.1 and slope["sp"] > 0.2  # in the first few steps both fall as 1/√width beside that: random heads


def _recipe(by, width) -> es.Recipe:
    corpus = es.Corpus("synthetic", vocab=64, options=(("tokens", 50_000), ("validation_tokens", 2048)))
    return es.Recipe(model=es.Model(width=width, depth=2, head_dim=16, context=32, tied=False), corpus=corpus, parametrization=by,
                     optimizer=es.AdamW(), schedule=es.Constant(), peak_lr=0.01, batch_tokens=256, horizon_tokens=16 * 256, seed=3)


def _moved(run, by) -> float:
    """Root mean square of what training added to the logits of the same tokens."""
    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
    before = Decoder(run.recipe.model, 64, by, seed=run.recipe.seed)
    with torch.no_grad():
        return float((run.model()(tokens) - before(tokens)).square().mean().sqrt())
