"""What a worker is handed: runs of one shape at a time, as many as are trained in step at that shape."""

import pytest

import etastar as es
from etastar.engine.dispatch import Dispatch
from etastar.engine.execute import default_layout, prepare_sweep
from etastar.engine.slots import stack_key
from tiny import BATCH, recipe

SMALL = [recipe(8, seed=seed) for seed in range(5)]
LARGE = [recipe(4, seed=seed, batch_tokens=2 * BATCH, horizon_tokens=8 * BATCH) for seed in range(5)]


@pytest.fixture
def dispatch(tmp_path):
    sweep = prepare_sweep([*SMALL, *LARGE], tmp_path)
    return Dispatch(sweep, {stack_key(SMALL[0]): 2, stack_key(LARGE[0]): 4})


def shapes(tasks):
    return {stack_key(task.recipe) for task in tasks}


def test_a_worker_gets_one_shape_at_a_time_and_another_once_it_holds_none(dispatch):
    first = dispatch.take([])
    key = stack_key(first[0].recipe)
    assert shapes(first) == {key} and len(first) == dispatch.slots[key] == first[0].slots
    assert dispatch.take(first) == []
    taken = len(first)
    while more := dispatch.take(first[:1]):  # one slot is still at work, the others are free again and again
        assert shapes(more) == {key} and len(more) <= dispatch.slots[key] - 1
        taken += len(more)
    assert taken == 5
    other = dispatch.take([])
    assert key not in shapes(other) and len(other) == dispatch.slots[stack_key(other[0].recipe)]


def test_tasks_of_a_worker_that_died_are_handed_out_again_first(dispatch):
    lost = dispatch.take([])
    dispatch.give_back(lost)
    assert {t.node for t in dispatch.take([])} == {t.node for t in lost}


def test_a_sweep_of_two_shapes_in_step_has_the_bits_of_each_run_alone(tmp_path):
    runs = es.run([*SMALL, *LARGE], store=tmp_path / "mixed", backend="inline", slots=3, progress=False)
    for run in (runs[1], runs[-1]):
        (alone,) = es.run([run.recipe], store=tmp_path / run.recipe.run_id, backend="inline", slots=1, progress=False)
        assert alone.val_loss == run.val_loss and alone.curve.train_loss.equals(run.curve.train_loss)


def test_the_smaller_the_step_the_more_runs_a_worker_trains_in_it(tmp_path):
    def slots(batch):
        r = [es.Recipe(model=es.Model(width=32, depth=2, head_dim=16, context=64), corpus=es.Corpus("synthetic", vocab=64),
                       optimizer=es.AdamW(), schedule=es.Constant(), peak_lr=0.01, batch_tokens=batch, horizon_tokens=batch, seed=s)
             for s in range(32)]
        return default_layout(prepare_sweep(r, tmp_path), 2, None)[1][stack_key(r[0])]

    assert [slots(batch) for batch in (2048, 1024, 512, 256, 128, 64)] == [1, 2, 4, 8, 8, 8]


def test_runs_are_trained_in_step_so_that_no_worker_is_left_with_a_few(tmp_path):
    def slots(count, batch=64):
        r = [recipe(64, seed=s, batch_tokens=batch, horizon_tokens=64 * batch) for s in range(count)]
        return default_layout(prepare_sweep(r, tmp_path), 2, None)[1][stack_key(r[0])]

    assert [slots(n) for n in (1, 3, 9, 10, 16, 20)] == [1, 2, 5, 5, 8, 5]
