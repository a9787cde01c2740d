"""Transfer of a tuned rate to a larger run: what each rule multiplies, what stays, and what has no rule."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import etastar as es
from etastar.analysis.laws import laws
from etastar.model.parametrization import numbers, scalars
from etastar.transfer import transfer

MODEL = es.Model(width=64, depth=2, head_dim=16, context=64)
MUP, COMPLETEP = es.MuP(base_width=32), es.CompleteP(base_width=32, base_depth=2)
MIXED = dataclasses.replace(MODEL, mixture=es.Mixture(experts=4, experts_per_token=2))


def proxy(by=COMPLETEP, **changes) -> es.Recipe:
    given = dict(model=MODEL, corpus=es.Corpus("synthetic", vocab=64), optimizer=es.AdamW(weight_decay=0.1), parametrization=by,
                 schedule=es.WSD(warmup_steps=8, cooldown_fraction=0.2), peak_lr=2**-6, batch_tokens=1024, horizon_tokens=2**18, seed=7)
    return es.Recipe(**(given | changes))


def test_nothing_asked_is_the_proxy_itself():
    assert transfer(proxy()) == proxy() and transfer(proxy(es.SP())).run_id == proxy(es.SP()).run_id


def test_over_width_and_depth_the_peak_rate_stays_and_the_multipliers_follow():
    target = transfer(proxy(), width=256, depth=8)
    assert (target.model.width, target.model.depth, target.model.heads, target.model.head_dim) == (256, 8, 16, 16)
    assert target.replace(model=MODEL) == proxy()  # all else is the proxy's
    hidden = numbers(target.parametrization, target.model, 64)["layers.7.qkv"]
    assert (hidden.lr_multiplier, hidden.decay_multiplier, hidden.eps_multiplier) == (1 / 8, 8.0, 1 / 32)
    assert scalars(target.parametrization, target.model).residual == 1 / 4


def test_all_that_follows_the_width_grows_in_exact_proportion():
    assert MODEL.resolved_ffn_width == 176 and es.Model(width=256, depth=2, head_dim=16).resolved_ffn_width == 688
    assert transfer(proxy(MUP), width=256).model.ffn_width == 704  # 4 · 176, not 688
    shared = dataclasses.replace(MODEL, kv_heads=2, ffn_width=100)
    grown = transfer(proxy(MUP, model=shared), width=96).model
    assert (grown.heads, grown.kv_heads, grown.ffn_width) == (6, 3, 150)
    assert transfer(proxy(MUP, model=shared), width=128, ffn_width=64).model.ffn_width == 64
    own_keys = dataclasses.replace(MODEL, kv_heads=4)
    assert transfer(proxy(es.MuP(16), model=own_keys), width=80).model.kv_heads == 5
    in_proportion = dataclasses.replace(MODEL, width=96)  # 256 of 96 units is what the default of 192 has too
    assert transfer(proxy(MUP, model=in_proportion), width=192).model == dataclasses.replace(MODEL, width=192)


@pytest.mark.parametrize("law, at_four, at_ten", [("fitting", 0.615, 0.446), ("bjorck", 0.6417, 0.4786)])
def test_over_tokens_the_peak_rate_falls_by_a_law_at_fixed_batch(law, at_four, at_ten):
    for times, share in ((4, at_four), (10, at_ten)):
        target = transfer(proxy(), horizon_tokens=times * 2**18, lr_exponent=law)
        assert target.peak_lr / proxy().peak_lr == pytest.approx(share, abs=5e-4)
        assert target == transfer(proxy(), horizon_tokens=times * 2**18, lr_exponent=laws[law].formulas["lr"].exponents["horizon_tokens"])
    assert transfer(proxy(), horizon_tokens=2**20).peak_lr == proxy().peak_lr  # without a rule it stays


def test_over_the_batch_the_peak_rate_rises_by_the_exponent_given():
    assert transfer(proxy(), batch_tokens=4096, batch_exponent=0.5).peak_lr == 2 * proxy().peak_lr
    assert transfer(proxy(), batch_tokens=4096).peak_lr == proxy().peak_lr


def test_the_timescale_of_decay_is_held_in_epochs():
    target = transfer(proxy(), width=128, horizon_tokens=2**21, batch_tokens=2048, lr_exponent=-0.5, decay_rule="timescale")
    assert target.peak_lr == pytest.approx(2**-6 * 8**-0.5) and target.total_steps == 4 * proxy().total_steps
    assert target.optimizer.weight_decay == pytest.approx(0.1 * 8**0.5 / 4)
    spent = [r.peak_lr * r.optimizer.weight_decay * r.total_steps for r in (proxy(), target)]
    assert spent[0] == pytest.approx(2**-6 * 0.1 * 256) and spent[1] == pytest.approx(spent[0])
    assert dataclasses.replace(target.optimizer, weight_decay=0.1) == proxy().optimizer
    assert transfer(proxy(), horizon_tokens=2**21, lr_exponent=-0.5).optimizer == proxy().optimizer


def test_decay_that_falls_with_width_cannot_hold_a_timescale_and_that_of_one_width_can():
    coupled = proxy(es.MuP(base_width=32, decay="coupled"))
    with pytest.raises(ValueError, match=r"makes η·λ of the hidden matrices 0.25 times the proxy's; take decay=\"independent\""):
        transfer(coupled, width=256, decay_rule="timescale")
    assert transfer(coupled, horizon_tokens=2**20, decay_rule="timescale").optimizer.weight_decay == 0.025
    with pytest.raises(ValueError, match="0.5 times"):
        transfer(proxy(es.CompleteP(32, 2, alpha=0.5)), depth=8, decay_rule="timescale")


def test_experts_and_how_many_a_token_goes_through_are_held_or_scaled():
    wide = transfer(proxy(model=MIXED), width=128)
    assert (wide.model.mixture, wide.model.resolved_ffn_width) == (MIXED.mixture, 352)
    assert transfer(proxy(model=MIXED), experts=16).model.mixture == es.Mixture(16, 2)
    assert transfer(proxy(model=MIXED), experts=16, experts_per_token=8).model.mixture == es.Mixture(16, 8)
    assert transfer(proxy(es.SP(), model=MIXED), experts=16).peak_lr == proxy().peak_lr


@given(widths=st.tuples(st.integers(1, 4), st.integers(1, 4)), depths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
       horizons=st.tuples(st.integers(1, 8), st.integers(1, 8)), exponent=st.floats(-1, 1))
def test_two_transfers_one_after_the_other_are_one(widths, depths, horizons, exponent):
    def step(recipe, wide, deep, long):
        return transfer(recipe, width=recipe.model.width * wide, depth=recipe.model.depth * deep, lr_exponent=exponent,
                        horizon_tokens=recipe.horizon_tokens * long, decay_rule="timescale")

    twice = step(step(proxy(), widths[0], depths[0], horizons[0]), widths[1], depths[1], horizons[1])
    once = step(proxy(), widths[0] * widths[1], depths[0] * depths[1], horizons[0] * horizons[1])
    assert (twice.model, twice.horizon_tokens) == (once.model, once.horizon_tokens)
    assert twice.peak_lr == pytest.approx(once.peak_lr)
    assert twice.optimizer.weight_decay == pytest.approx(once.optimizer.weight_decay)


BELOW = es.MuP(base_width=256)  # of which the proxy is a small run


@pytest.mark.parametrize("make, said", [
    (lambda: transfer(proxy(BELOW), width=128), "base_width 256 is larger than the target's width 128, .* at most 64 or a larger target"),
    (lambda: transfer(proxy(), depth=1), "base_depth 2 is larger than the target's depth 1"),
    (lambda: transfer(proxy(), width=32), "the proxy's width 64 is larger than the target's 32; tune a proxy of at most 32"),
    (lambda: transfer(proxy(es.MuP(32, residual_depth_exponent=0.5)), depth=1), "the proxy's depth 2 is larger than the target's 1"),
    (lambda: transfer(proxy(), horizon_tokens=2**17), "the proxy's horizon_tokens 262144 is larger than the target's 131072"),
    (lambda: transfer(proxy(model=MIXED), experts=2), "the proxy's experts 4 is larger than the target's 2"),
    (lambda: transfer(proxy(), width=0), "base_width 32 is larger than the target's width 0"),
    (lambda: transfer(proxy(), width=100), "width 100 is not a multiple of head_dim 16"),
    (lambda: transfer(proxy(), width=80), "width 80 is not a whole multiple of base_width 32, .* take a width of"),
    (lambda: transfer(proxy(MUP, model=dataclasses.replace(MODEL, kv_heads=1)), width=96),
     "the proxy's kv_heads 1 at 3/2 of its width is 1.5, no whole number; take a whole multiple of the proxy's width"),
    (lambda: transfer(proxy(es.SP()), width=128), "SP has no rule of width, from 64 to 128; take MuP or CompleteP"),
    (lambda: transfer(proxy(es.SP()), depth=4), "SP has no rule of depth, from 2 to 4; take CompleteP, or MuP with"),
    (lambda: transfer(proxy(MUP), depth=4), "MuP has no rule of depth, from 2 to 4; take CompleteP, or MuP with a residual_depth_exponent"),
    (lambda: transfer(proxy(optimizer=es.Scion()), width=128), "CompleteP's multipliers are Adam's, and the proxy is trained by Scion"),
    (lambda: transfer(proxy(optimizer=es.Scion()), decay_rule="timescale"), 'decay_rule "timescale" is a rule of AdamW; got Scion'),
    (lambda: transfer(proxy(), decay_rule="held"), """decay_rule is "fixed" or "timescale"; got 'held'"""),
    (lambda: transfer(proxy(), experts=8), "experts=8, experts_per_token=None were asked of a proxy without a mixture"),
    (lambda: transfer(proxy(model=MIXED), experts_per_token=5), "a token cannot go through 5 of 4 experts"),
    (lambda: transfer(proxy(), horizon_tokens=2**18 + 1), "horizon_tokens 262145 is not a multiple of batch_tokens 1024"),
    (lambda: transfer(proxy(), batch_tokens=0, batch_exponent=-1.0), "batch_tokens 0 is not a multiple of the context 64"),
    (lambda: transfer(proxy(), lr_exponent="steplaw"), "lr_exponent 'steplaw' names no law over tokens at fixed batch; .* bjorck, fitting"),
])
def test_what_has_no_rule_is_refused_with_the_values_and_the_mend(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_depth_rule_of_mup_lets_the_depth_grow():
    target = transfer(proxy(es.MuP(32, residual_multiplier=1.5, residual_depth_exponent=0.5)), depth=9)
    assert target.peak_lr == proxy().peak_lr and scalars(target.parametrization, target.model).residual == 0.5
