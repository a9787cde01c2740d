"""Which way of computing is taken, from made-up timings; and that a store holds what was chosen first."""

import pytest

import etastar as es
from etastar.engine import execute, measure, tuning
from etastar.engine.slots import stack_key
from etastar.engine.store import Store
from etastar.recipe import Execution
from tiny import recipe as tiny


def recipe(**changes):
    given = dict(model=es.Model(width=64, depth=2, head_dim=32, context=64), corpus=es.Corpus("synthetic", vocab=1024),
                 optimizer=es.AdamW(), schedule=es.Constant(), peak_lr=0.01, batch_tokens=6144, horizon_tokens=6144)
    return es.Recipe(**(given | changes))


def test_the_plain_way_is_first_and_parts_divide_the_batch():
    ways = [(r.execution.micro_batch_sequences, slots) for r, slots in tuning.eager_ways(recipe())]
    assert ways == [(None, 1), (None, 4), (16, 1), (32, 1)]
    assert [r.execution.micro_batch_sequences for r, _ in tuning.eager_ways(recipe(batch_tokens=1024, horizon_tokens=1024))] == [None, None]
    seven = recipe(batch_tokens=7 * 64 * 5, horizon_tokens=7 * 64 * 5)  # 35 sequences: no part but 5, 7 and 1
    assert [r.execution.micro_batch_sequences for r, _ in tuning.eager_ways(seven)][2:] == [7]


def timings(**step):
    """A stand-in for the measurement: seconds of a step by way."""
    def told(ways, workers, seconds):
        names = ["compiled" if r.execution.compiled else "parts" if r.execution.micro_batch_sequences else f"stack{slots}"
                 for r, slots in ways]
        return [{"start": 40.0 if name == "compiled" else 1.0, "step": step[name], "validation": 0.1, "write": 0.0} for name in names]
    return told


@pytest.mark.parametrize("tokens, step, expected", [
    (10**6, dict(stack1=1.0, stack4=4.1, parts=0.97, compiled=0.1), (None, False, 1)),  # 3 % is no reason
    (10**6, dict(stack1=1.0, stack4=4.1, parts=0.8, compiled=0.1), (16, False, 1)),  # 81 s of work: the compiler is not asked
    (10**6, dict(stack1=1.0, stack4=2.0, parts=0.8, compiled=0.1), (None, False, 4)),
    (10**7, dict(stack1=1.0, stack4=4.1, parts=0.8, compiled=0.7), (None, True, 1)),
    (4 * 10**6, dict(stack1=1.0, stack4=4.1, parts=0.8, compiled=0.79), (16, False, 1)),  # its 40 s do not come back
])
def test_the_fastest_way_for_so_many_tokens_is_taken(monkeypatch, tokens, step, expected):
    monkeypatch.setattr(tuning, "measured_ways", timings(**step))
    choice = tuning.choose(recipe(), tokens, workers=2)
    assert (choice.execution.micro_batch_sequences, choice.execution.compiled, choice.slots) == expected
    assert choice.table.chosen.sum() == 1


def test_a_recipe_that_says_how_it_is_computed_is_left_alone(monkeypatch):
    monkeypatch.setattr(tuning, "choose", lambda *_: pytest.fail("nothing to choose"))
    own = recipe(execution=Execution(compiled=True))
    assert tuning.tuned([own], 2, {}) == ([own], {})


def test_a_store_holds_what_was_chosen_first_and_a_resumed_sweep_trains_nothing_again(monkeypatch, tmp_path):
    def choice(micro):
        return lambda *_: tuning.Choice(Execution(micro_batch_sequences=micro), 1, None)

    monkeypatch.setattr(tuning, "choose", choice(1))
    first = es.run([tiny()], store=tmp_path, backend="inline", progress=False, execution="auto")[0]
    assert first.recipe.execution.micro_batch_sequences == 1
    assert Store(tmp_path).held_execution()[stack_key(tiny())]["execution"]["micro_batch_sequences"] == 1
    monkeypatch.setattr(tuning, "choose", choice(2))
    assert not execute.prepare_sweep([tiny()], tmp_path, execution="auto").segments
    plain = es.run([tiny()], store=tmp_path, backend="inline", progress=False)[0]
    assert plain.run_id == tiny().run_id != first.run_id


def test_an_unknown_execution_is_refused_by_name():
    with pytest.raises(ValueError, match="'fast'"):
        execute.prepare_sweep([tiny()], execution="fast")


def test_measuring_is_kept_for_the_next_time(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "cache_folder", lambda: tmp_path)
    told = measure.measured_ways([(tiny(), 1), (tiny(), 2)], workers=1, seconds=0.05)
    assert all(set(t) == {"start", "step", "validation", "write"} and t["step"] > 0 for t in told)
    monkeypatch.setattr(measure, "_run", lambda *_: pytest.fail("measured again"))
    assert measure.measured_ways([(tiny(), 2)], workers=1) == told[1:]
