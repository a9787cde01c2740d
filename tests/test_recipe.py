"""Recipes: golden ids, what an id is made of, and every impossible run refused before anything is trained."""

import pytest

import etastar as es
from etastar.values import canonical_json

MIXTURE = es.Model(width=64, depth=2, head_dim=32, context=64, tied=False, mixture=es.Mixture(experts=4, experts_per_token=2))


def recipe(**changes):
    given = dict(model=es.Model(width=64, depth=2, head_dim=32, context=64), corpus=es.Corpus("synthetic", vocab=1024),
                 optimizer=es.AdamW(weight_decay=0.1), schedule=es.WSD(warmup_steps=64, cooldown_fraction=0.2, shape="1-sqrt"),
                 parametrization=es.SP(), peak_lr=2**-7, batch_tokens=1024, horizon_tokens=2**20, seed=0)
    return es.Recipe(**(given | changes))


def test_ids_are_golden():
    """These name folders on users' disks: a change here orphans their stores and needs a reason."""
    assert recipe().run_id == "61de25b5bef62adc"
    assert recipe(seed=1).run_id != recipe().run_id


def test_defaults_are_not_in_the_json_so_that_a_new_field_orphans_no_store():
    assert recipe().to_json() == (
        '{"batch_tokens":1024,"corpus":{"kind":"Corpus","source":"synthetic"},"horizon_tokens":1048576,"kind":"Recipe",'
        '"model":{"context":64,"depth":2,"head_dim":32,"kind":"Model","width":64},"optimizer":{"kind":"AdamW"},"peak_lr":0.0078125,'
        '"schedule":{"cooldown_fraction":0.2,"kind":"WSD","shape":"1-sqrt","warmup_steps":64}}')
    assert es.Recipe.from_json(recipe().to_json()) == recipe()


@pytest.mark.parametrize("change", [
    dict(peak_lr=2**-6), dict(seed=1), dict(data_seed=1), dict(optimizer=es.AdamW(beta2=0.99)), dict(horizon_tokens=2**19),
    dict(corpus=es.Corpus("synthetic", vocab=512)), dict(schedule=es.Constant()), dict(parametrization=es.SP(init_std=0.1)),
    dict(execution=es.Execution(micro_batch_sequences=8)), dict(execution=es.Execution(compiled=True)), dict(batch_tokens=2048),
    dict(execution=es.Execution(precision="bf16")), dict(model=es.Model(width=64, depth=3, head_dim=32, context=64)),
    dict(beta2_changes=((2**19, 0.99),)), dict(z_loss=1e-4), dict(model=MIXTURE), dict(parametrization=es.MuP(base_width=32)),
    dict(parametrization=es.CompleteP(base_width=32, base_depth=2)),
], ids=lambda c: next(iter(c)))
def test_whatever_decides_the_bits_is_in_the_id(change):
    assert recipe(**change).run_id != recipe().run_id


def test_the_content_of_the_corpus_is_in_the_id(monkeypatch):
    before = recipe().run_id
    monkeypatch.setattr("etastar.recipe.fingerprint", lambda corpus: "other")
    assert recipe().run_id != before


def test_the_trunk_knows_no_schedule_and_no_horizon():
    trunk = recipe().trunk_id
    assert trunk == recipe(schedule=es.Constant(), peak_lr=0.1, horizon_tokens=2**19).trunk_id == recipe(data_seed=0).trunk_id
    assert trunk != recipe(seed=1).trunk_id and trunk != recipe(data_seed=1).trunk_id
    assert trunk != recipe(optimizer=es.AdamW(weight_decay=0.2)).trunk_id


def test_beta2_changes_are_a_control_that_recipes_without_them_know_nothing_of():
    changed = recipe(beta2_changes=[[2**18, 0.99], [2**19, 0.999]])
    assert changed.beta2_changes == ((2**18, 0.99), (2**19, 0.999)) and changed.trunk_id == recipe().trunk_id
    assert len({changed.run_id, recipe().run_id, changed.replace(beta2_changes=((2**18, 0.99),)).run_id}) == 3
    assert recipe(beta2_changes=()).run_id == recipe().run_id and "beta2" not in recipe().to_json()
    assert '"beta2_changes":[[262144,0.99],[524288,0.999]]' in changed.to_json()
    assert es.Recipe.from_json(changed.to_json()) == changed


def test_beta2_is_an_array_like_the_rate():
    changed = recipe(horizon_tokens=6 * 1024, schedule=es.Constant(), beta2_changes=((2 * 1024, 0.99), (5 * 1024, 0.0)))
    assert changed.beta2().tolist() == [0.95, 0.95, 0.99, 0.99, 0.99, 0.0]
    assert recipe(optimizer=es.ScheduleFreeAdamW(beta2=0.9)).beta2().tolist() == [0.9] * 1024


@pytest.mark.parametrize("make, said", [
    (lambda: es.Model(width=60, depth=2, head_dim=32), "width 60 is not a multiple of head_dim 32"),
    (lambda: es.Model(width=64, depth=0, head_dim=32), "Model.depth must be at least 1; got 0"),
    (lambda: es.Model(width=64, depth=1, head_dim=16, kv_heads=3), "4 query heads cannot share 3"),
    (lambda: es.Model(width=9, depth=1, head_dim=3), "must be even"),
    (lambda: recipe(batch_tokens=1000), "batch_tokens 1000 is not a multiple of the context 64; take 1024"),
    (lambda: recipe(horizon_tokens=10_000), "horizon_tokens 10000 is not a multiple of batch_tokens 1024; take 10240"),
    (lambda: recipe(peak_lr=0), "peak_lr must be positive"),
    (lambda: recipe(schedule=es.WSD(cooldown_steps=2000)), "2000"),
    (lambda: recipe(schedule=es.WSD(cooldown_fraction=0.2, floor=1.5)), "floor"),
    (lambda: recipe(schedule=es.WSD(cooldown_fraction=0.2, cooldown_steps=3)), "exactly one of"),
    (lambda: recipe(execution=es.Execution(micro_batch_sequences=5)), "micro_batch_sequences 5 does not divide"),
    (lambda: recipe(beta2_changes=((1000, 0.99),)), "1000 tokens are not a positive multiple of batch_tokens 1024; take 1024"),
    (lambda: recipe(beta2_changes=((0, 0.99),)), "0 tokens are not a positive multiple of batch_tokens 1024; take 1024"),
    (lambda: recipe(beta2_changes=((-1024, 0.99),)), "-1024 tokens are not a positive multiple"),
    (lambda: recipe(beta2_changes=((2**20, 0.99),)), "1048576 tokens are not before the end of the run at 1048576 tokens; change earlier"),
    (lambda: recipe(beta2_changes=((2048, 0.99), (1024, 0.9))), r"must rise in tokens; got \[2048, 1024\]: sort them"),
    (lambda: recipe(beta2_changes=((1024, 0.99), (1024, 0.9))), r"must rise in tokens; got \[1024, 1024\]"),
    (lambda: recipe(beta2_changes=((1024, 1.0),)), r"beta2 must lie in \[0, 1\); got 1.0 after 1024 tokens"),
    (lambda: recipe(beta2_changes=((1024, float("nan")),)), r"beta2 must lie in \[0, 1\); got nan"),
    (lambda: recipe(beta2_changes=((1024, 0.99),), optimizer=es.ScheduleFreeAdamW()),
     r"beta2_changes \(\(1024, 0.99\),\) are for the optimizer AdamW; got ScheduleFreeAdamW: leave them out"),
    (lambda: recipe(parametrization=es.MuP(base_width=48)), "width 64 is not a whole multiple of base_width 48, .* take a width of 48 or"),
    (lambda: recipe(parametrization=es.CompleteP(base_width=32, base_depth=4)), "depth 2 is below base_depth 4; take a base_depth of at"),
    (lambda: es.CompleteP(base_width=32), "CompleteP is a rule of depth and needs the depth it starts from: give base_depth"),
    (lambda: es.CompleteP(base_width=32, base_depth=2, alpha=1.5), r"alpha in \[0, 1\]; got .*alpha=1.5"),
    (lambda: es.Mixture(experts=4, experts_per_token=5), "a token cannot go through 5 of 4 experts: take 1 ≤ experts_per_token ≤ experts"),
    (lambda: es.Mixture(experts=4, experts_per_token=2, balance=-0.1), "balance and router_z ≥ 0; got -0.1"),
    (lambda: recipe(model=MIXTURE, parametrization=es.UnitNorm()), "UnitNorm has no rule for routers and experts"),
    (lambda: recipe(model=MIXTURE, execution=es.Execution(compiled=True)), r"set Execution\(compiled=False\)"),
    (lambda: es.Model(width=64, depth=2, head_dim=32, normalization="everywhere", qk_norm=True), "leave qk_norm out"),
    (lambda: recipe(z_loss=-1e-4), "z_loss must not be negative; got -0.0001"),
    (lambda: es.AdamW(beta2=1.0), r"AdamW.beta2 must lie in \[0, 1\); got 1.0"),
    (lambda: es.Corpus("wikipedia"), "unknown corpus 'wikipedia'; known"),
    (lambda: es.Recipe.from_json(recipe().to_json().replace('"peak_lr"', '"peak_rl"')), "unknown key 'peak_rl' for Recipe"),
    (lambda: es.Recipe.from_json(canonical_json(es.Constant())), "expected a Recipe"),
])
def test_impossible_runs_are_refused_with_the_values_and_the_mend(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_the_public_surface_is_there():
    assert {"Recipe", "Model", "Corpus", "AdamW", "WSD", "SP", "run", "Observe", "fit_bowl", "compare", "verdicts",
            "to_lambda_lr"} <= set(dir(es))
    for name in es.__all__:
        assert getattr(es, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'wdd'"):
        getattr(es, "wdd")  # noqa: B009
