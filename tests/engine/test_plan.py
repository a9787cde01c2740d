"""The trie over control prefixes: every distinct prefix is trained once, whatever the schedules are called."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etastar.engine.execute import prepare_sweep, run
from etastar.engine.plan import Node, build_segments, control_bytes, controls, critical_order, prefix_hash, schedule_length
from etastar.schedules import WSD, Constant, Cosine, Table
from tiny import BATCH, recipe, wsd


def distinct_prefixes(recipes):
    """Steps that have to be trained at least: distinct (trunk, control prefix) pairs, counted by brute force."""
    seen = set()
    for one in recipes:
        pairs = list(zip(one.lr().tolist(), one.beta2().tolist(), strict=True))
        seen |= {(one.trunk_id, tuple(pairs[: step + 1])) for step in range(len(pairs))}
    return len(seen)


def steps(segments):
    return sum(s.stop - s.start for s in segments)


def test_branches_of_one_trunk_share_it():
    recipes = [recipe(40, schedule=wsd(8)), recipe(40, schedule=wsd(8, "1-sqrt")), recipe(20, schedule=wsd(4))]
    segments = build_segments(recipes)
    # trunk to 16, cooldown of the short run 16–20, trunk 16–32, two cooldowns 32–40
    assert sorted((s.start, s.stop) for s in segments) == [(0, 16), (16, 20), (16, 32), (32, 40), (32, 40)]
    assert steps(segments) == 16 + 4 + 16 + 8 + 8
    assert [len(s.ends) for s in sorted(segments, key=lambda s: (s.stop, s.start))] == [0, 1, 0, 1, 1]


def test_a_run_that_is_a_prefix_of_another_ends_inside_it():
    segments = build_segments([recipe(10), recipe(25)])
    assert [(s.start, s.stop, len(s.ends)) for s in segments] == [(0, 10, 1), (10, 25, 1)]
    assert segments[1].parent == segments[0].node


@pytest.mark.parametrize("change", [dict(seed=1), dict(data_seed=7), dict(batch_tokens=2 * BATCH, horizon_tokens=24 * BATCH * 2)])
def test_what_is_not_a_control_is_never_shared(change):
    assert steps(build_segments([recipe(24), recipe(24, **change)])) == 48


def test_a_peak_lr_is_a_control_and_parts_the_paths_at_the_first_step():
    assert steps(build_segments([recipe(24), recipe(24, peak_lr=2**-7)])) == 48


def test_a_run_whose_beta2_changes_shares_the_steps_before():
    segments = build_segments([recipe(40), recipe(40, beta2_changes=((25 * BATCH, 0.99),))])
    assert [(s.start, s.stop) for s in segments] == [(0, 25), (25, 40), (25, 40)]
    back = recipe(40, beta2_changes=((10 * BATCH, 0.95), (25 * BATCH, 0.99), (30 * BATCH, 0.99)))  # 0.95 is the optimizer's own
    assert steps(build_segments([recipe(40), recipe(40, beta2_changes=((25 * BATCH, 0.99),)), back])) == 40 + 15


def test_names_of_states_before_a_change_are_those_of_rates_alone():
    """Stores hold states of runs made before beta2 could change."""
    plain, changed = recipe(20, schedule=wsd(4)), recipe(20, schedule=wsd(4), beta2_changes=((12 * BATCH, 0.99), (15 * BATCH, 0.95)))
    for one, last in ((plain, 20), (changed, 12)):
        for step in range(last + 1):
            assert prefix_hash(controls(one)[:step]).digest() == hashlib.sha256(plain.lr()[:step].tobytes()).digest()
    for step in range(13, 21):  # however far back it is
        assert prefix_hash(controls(changed)[:step]).digest() != prefix_hash(controls(plain)[:step]).digest()


def test_names_do_not_depend_on_where_a_path_is_cut():
    moved = controls(recipe(20, schedule=wsd(4), beta2_changes=((7 * BATCH, 0.99), (8 * BATCH, 0.0), (15 * BATCH, 0.95))))
    whole = control_bytes(moved)
    assert len(whole) == 8 * (20 + 8)
    assert all(control_bytes(moved[:cut]) + control_bytes(moved[cut:]) == whole for cut in range(21))


def test_a_beta2_is_never_taken_for_a_rate():
    def one(rates, beta2):
        changes = tuple((step * BATCH, given) for step, given in enumerate(beta2) if step)
        return recipe(3, peak_lr=1.0, schedule=Table(factors=rates), beta2_changes=changes)

    a, b = one((1.0, 0.5, 0.25), (0.95, 0.95, 0.5)), one((1.0, 0.5, 0.5), (0.95, 0.25, 0.95))
    assert len({s.node.id for s in build_segments([a, b])}) == 3


def test_equal_recipes_are_one_run():
    assert len(build_segments([recipe(24), recipe(24)])) == 1


pairs = st.tuples(st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([0.95, 0.95, 0.5, 0.0]))  # of a rate and a beta2
tables = st.lists(st.lists(pairs, min_size=1, max_size=7), min_size=1, max_size=12)


def of_table(table, seed):
    """A recipe with this rate and beta2 at each step; at the first the optimizer's own beta2 is in force."""
    changes = tuple((step * BATCH, beta2) for step, (_, beta2) in enumerate(table) if step)
    return recipe(len(table), peak_lr=1.0, schedule=Table(factors=tuple(rate for rate, _ in table)), beta2_changes=changes, seed=seed)


@settings(max_examples=150, deadline=None)
@given(tables, st.data())
def test_steps_trained_equal_distinct_prefixes(arrays, data):
    recipes = [of_table(a, seed=data.draw(st.integers(0, 1))) for a in arrays]
    segments = build_segments(recipes)
    assert steps(segments) == distinct_prefixes(recipes)
    ends = [run_id for s in segments for run_id in s.ends]
    assert sorted(ends) == sorted({r.run_id for r in recipes})
    assert len({(s.node.trunk, s.node.id) for s in segments}) == len(segments)
    seen = {None}
    for s in segments:  # parents first, contiguous
        parent = s.parent and (s.parent.trunk, s.parent.id)
        assert parent in seen and s.start == (s.parent.step if s.parent else 0) < s.stop == s.node.step
        seen.add((s.node.trunk, s.node.id))


def test_node_names_are_hashes_of_the_control_prefix():
    one = recipe(10)
    (segment,) = build_segments([one])
    assert segment.node == Node(one.trunk_id, 10, prefix_hash(one.lr()).hexdigest()[:16])


def test_stored_states_are_started_from_and_cut_segments():
    one = recipe(30, schedule=wsd(6))
    at = Node(one.trunk_id, 11, prefix_hash(one.lr()[:11]).hexdigest()[:16])
    other = Node(one.trunk_id, 15, "0" * 16)  # same trunk, another path
    segments = build_segments([one], lambda trunk: {at.id: 11, other.id: 15})
    assert [(s.start, s.stop, s.parent) for s in segments] == [(11, 30, at)]


def test_the_deepest_stored_state_wins_and_covers_what_is_before_it():
    short, long = recipe(20, schedule=wsd(4)), recipe(40, schedule=wsd(8))
    trunk_end = Node(long.trunk_id, 32, prefix_hash(long.lr()[:32]).hexdigest()[:16])
    segments = build_segments([short, long], lambda trunk: {trunk_end.id: 32})
    # the short branch leaves before the stored state, so its trunk has to be trained again
    assert sorted((s.start, s.stop) for s in segments) == [(0, 16), (16, 20), (32, 40)]


def test_a_run_that_ends_at_a_stored_state_keeps_a_segment_without_steps():
    one = recipe(20)
    end = Node(one.trunk_id, 20, prefix_hash(one.lr()).hexdigest()[:16])
    (segment,) = build_segments([one], lambda trunk: {end.id: 20})
    assert (segment.start, segment.stop, segment.parent, segment.ends) == (20, 20, end, (one.run_id,))


def test_critical_order_is_longest_path_first_and_parents_before_children():
    segments = build_segments([recipe(40, schedule=wsd(8)), recipe(20, schedule=wsd(4)), recipe(12, seed=5)])
    order = critical_order(segments, {s.node.id: float(s.stop - s.start) for s in segments})
    assert [(s.start, s.stop) for s in order] == [(0, 16), (16, 40), (0, 12), (16, 20)]


def test_schedule_length_by_hand():
    segments = build_segments([recipe(40, schedule=wsd(8)), recipe(20, schedule=wsd(4)), recipe(12, seed=5)])
    seconds = {s.node.id: float(s.stop - s.start) for s in segments}
    assert schedule_length(segments, seconds, workers=1) == 16 + 24 + 12 + 4
    assert schedule_length(segments, seconds, workers=2) == 40.0


def test_sharing_does_not_ask_what_a_schedule_is_called():
    straight = recipe(30, schedule=WSD(warmup_steps=4, cooldown_steps=6))
    cut = recipe(24, schedule=Constant(warmup_steps=4))
    assert steps(build_segments([straight, cut])) == 30
    cosine = recipe(24, schedule=Cosine(warmup_steps=4))
    assert steps(build_segments([straight, cosine])) == 30 + 24 - _common(straight.lr(), cosine.lr())


def _common(a, b):
    n = min(len(a), len(b))
    return int(np.argmax(a[:n] != b[:n]))


def test_states_are_kept_where_recipes_to_come_will_leave(tmp_path):
    trunk, later = recipe(16), recipe(16, schedule=wsd(5))
    plain, cut = build_segments([trunk]), build_segments([trunk], later=[trunk, later])
    assert [s.stop for s in plain] == [16] and [(s.start, s.stop) for s in cut] == [(0, 11), (11, 16)]
    assert [s.ends for s in cut] == [(), (trunk.run_id,)]
    run([trunk], store=tmp_path, later=[later], backend="inline", progress=False)
    left = prepare_sweep([later], tmp_path).segments
    assert [(s.start, s.stop) for s in left] == [(11, 16)]
