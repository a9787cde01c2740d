"""Steps driven by tables on the device: the bits of steps driven by the host, on the CPU; what a capture relies on, without a GPU."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend

from etastar.compiling import compiled_alone
from etastar.engine import kernels
from etastar.engine.graph import StepTables, resident
from etastar.engine.slots import SlotStack
from etastar.model import decoder
from etastar.model.parametrization import scalars
from etastar.optim.adamw import _update
from etastar.optim.stacked import masked
from etastar.recipe import SP, AdamW, Execution
from etastar.text.batches import batch
from etastar.text.corpora import prepare
from tiny import BATCH, CORPUS, MODEL, recipe

TOKENS = prepare(CORPUS)
WILD = dict(peak_lr=1e30, optimizer=AdamW(clip_norm=None))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stack_of(way, slots, execution, rows=None):
    """A stack whose tables, where it has some, hold so many rows."""
    made = SlotStack(recipe(execution=execution), TOKENS, slots, way=way)
    if rows and made.tables:
        made.tables = StepTables(TOKENS, MODEL.context, slots, made.batch_sequences, made.flat.data.device, graphed=False, rows=rows)
    return made


def story(way, execution=None, rows=None):
    """Four slots, 20 steps: one idle, one diverges, one is refilled on the way; all that was told and all states at the end."""
    execution = execution or Execution()
    stack, told = stack_of(way, 4, execution, rows), []
    recipes = {0: recipe(seed=1, data_seed=5, execution=execution), 1: recipe(seed=2, execution=execution, **WILD),
               3: recipe(seed=3, data_seed=5, beta2_changes=((12 * BATCH, 0.5),), execution=execution)}
    for slot, given in recipes.items():
        stack.load(slot, given, None)
    rng = np.random.default_rng(0)
    for steps in (7, 1, 4, 8):
        lr_MxS = rng.uniform(2**-9, 2**-6, (4, steps))
        lr_MxS[1] = 1e30
        told.append(stack.train(lr_MxS))
        if len(told) == 2:
            saved = stack.state(0)
            stack.clear(0)
            stack.load(0, recipe(seed=8, data_seed=9, execution=execution), None)
        if len(told) == 3:
            stack.set_beta2(3, 12)
    stack.clear(3)
    stack.load(3, recipes[0], saved)
    told.append(stack.train(np.full((4, 3), 2**-7)))
    losses, norms = (np.concatenate(parts, axis=1) for parts in zip(*told, strict=True))
    return losses, norms, [stack.state(slot) for slot in (0, 1, 3)], stack


def assert_same_story(a, b):
    assert a[0].shape == (4, 23) and a[0].dtype == b[0].dtype == np.float32
    assert np.array_equal(a[0], b[0], equal_nan=True) and np.array_equal(a[1], b[1], equal_nan=True)
    for (params_a, moments_a, step_a), (params_b, moments_b, step_b) in zip(a[2], b[2], strict=True):
        assert step_a == step_b
        for name, tensor in (params_a | moments_a).items():
            assert torch.equal(tensor, (params_b | moments_b)[name]), name


@pytest.mark.parametrize("rows", [512, 3], ids=["one stretch", "stretches that do not divide"])
@pytest.mark.parametrize("micro", [None, 2], ids=["whole", "micro-batches"])
def test_tables_train_the_bits_that_the_host_trains(micro, rows):
    execution = Execution(micro_batch_sequences=micro)
    by_host, by_tables = story("host", execution), story("tables", execution, rows)
    assert_same_story(by_host, by_tables)
    losses, norms, states, _ = by_host
    assert np.isfinite(losses[0]).all() and np.isnan(losses[2]).all() and np.isnan(norms[2]).all()
    assert np.isnan(losses[1, -1]) and np.isfinite(losses[1, 0]) and [step for *_, step in states][1] < 20
    assert [states[0][2], states[2][2]] == [23 - 8, 8 + 3]


@pytest.mark.parametrize("way", ["host", "tables"])
def test_a_slot_whose_run_diverged_is_refilled_like_a_new_one(way):
    fresh, used = stack_of(way, 2, Execution()), stack_of(way, 2, Execution())
    used.load(0, recipe(seed=2, **WILD), None)
    used.train(np.full((2, 8), 1e30))
    assert not used.is_alive(0)
    for stack in (fresh, used):
        stack.load(0, recipe(seed=3), None)
    told = [stack.train(np.full((2, 5), 2**-6)) for stack in (fresh, used)]
    assert np.isfinite(told[1][0][0]).all() and np.array_equal(told[0][0], told[1][0], equal_nan=True)
    assert torch.equal(fresh.flat.data[0], used.flat.data[0])


def test_no_tensor_that_a_capture_holds_is_replaced_by_training_loading_or_clearing():
    stack = stack_of("tables", 3, Execution())

    def places():
        tensors = [stack.flat.data, stack.grad_MxP, stack.optimizer.m_MxP, stack.optimizer.v_MxP, stack.step_M, stack.alive_M,
                   *stack.optimizer.options.values(), *stack.params.values(), *stack.grads.values(), stack.tables.corpus,
                   stack.tables.at_1, stack.tables.window_SxMxB, stack.tables.lr_SxM, stack.tables.told_2xSxM]
        return [tensor.data_ptr() for tensor in tensors]

    before = places()
    for seed in range(3):
        stack.load(seed, recipe(seed=seed), None)
    stack.train(np.full((3, 4), 2**-6))
    stack.load(0, recipe(beta2_changes=((2 * BATCH, 0.5), (6 * BATCH, 0.6))), stack.state(0))
    stack.set_beta2(0, 6)
    stack.load(1, recipe(seed=7, optimizer=AdamW(beta2=0.9)), stack.state(0))
    stack.clear(2)
    stack.train(np.full((3, 2), 2**-6))
    stack.train(np.full((3, 2), np.nan))
    assert places() == before


def test_a_rehearsal_changes_no_bit_of_state_and_not_the_data_that_comes_next():
    plain, rehearsed = stack_of("tables", 3, Execution()), stack_of("tables", 3, Execution())
    for stack in (plain, rehearsed):
        for slot, seed in ((0, 1), (2, 4)):
            stack.load(slot, recipe(seed=seed), None)
        stack.train(np.full((3, 5), 2**-6))
    before = [t.clone() for t in (rehearsed.flat.data, rehearsed.optimizer.m_MxP, rehearsed.optimizer.v_MxP, rehearsed.step_M,
                                  rehearsed.alive_M)]
    rehearsed.tables.lr_SxM.fill_(float("nan"))  # whatever the tables hold
    rehearsed.tables.rehearse(rehearsed._step, rehearsed.alive_M)
    after = [rehearsed.flat.data, rehearsed.optimizer.m_MxP, rehearsed.optimizer.v_MxP, rehearsed.step_M, rehearsed.alive_M]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and rehearsed.alive_M.tolist() == [True, False, True]
    told = [stack.train(np.full((3, 6), 2**-7)) for stack in (plain, rehearsed)]
    assert np.array_equal(told[0][0], told[1][0], equal_nan=True) and torch.equal(plain.flat.data, rehearsed.flat.data)


def test_a_step_sees_the_batch_of_its_slots_own_step_whatever_was_worked_out_ahead():
    tables = StepTables(TOKENS, MODEL.context, 3, 4, torch.device("cpu"), graphed=False, rows=4)
    tables.graphed, seen = True, []  # so that it looks ahead
    tables.graph = type("Replay", (), {"replay": lambda _: tables._once(step)})()

    def step(tokens_MxBxT, lr_M):
        seen.append(tokens_MxBxT.clone())
        return lr_M.float(), -lr_M.float()

    alive, lr_MxS = torch.ones(3, dtype=torch.bool), np.arange(18.0).reshape(3, 6)
    for first, seeds in (((0, 10, 3), (1, 1, 2)), ((6, 16, 9), (1, 1, 2)), ((2, 3, 4), (2, 1, None))):
        seen.clear()
        losses, norms = tables.train(step, alive, seeds, first, lr_MxS)
        assert np.array_equal(losses, lr_MxS) and np.array_equal(norms, -lr_MxS)
        for slot, seed in enumerate(seeds):
            for s in range(6 if seed is not None else 0):
                assert np.array_equal(seen[s][slot], batch(TOKENS.train, MODEL.context, seed, first[slot] + s, 4))
    assert not tables.ahead.keys() - {(2, 8), (1, 9)} and resident(TOKENS, torch.device("cpu")) is tables.corpus


def test_tokens_of_sixteen_bits_come_back_whole():
    tokens = dataclasses.replace(TOKENS, train=np.arange(2**16 - 400, 2**16, dtype=np.uint16))
    tables, seen = StepTables(tokens, 16, 1, 2, torch.device("cpu"), graphed=False), []
    tables.train(lambda t, lr: (seen.append(t), (lr.float(), lr.float()))[1], torch.ones(1, dtype=torch.bool), [0], [0], np.ones((1, 2)))
    assert np.array_equal(seen[1][0], batch(tokens.train, 16, 0, 1, 2)) and seen[1].min() >= 2**16 - 400


@pytest.mark.slow
def test_a_compiled_update_is_the_eager_one_to_the_last_digits_and_freezes_like_it():
    def tensors(seed=0):
        gen = torch.Generator().manual_seed(seed)
        data, m, grad = (torch.randn(3, 512, generator=gen) for _ in range(3))
        grad[1] = float("nan")
        ones = torch.rand(3, 1, generator=gen) * 0.1 + 1e-3
        groups = [(1 - ones, -ones, ones * 1e-5), (None, -2 * ones, ones * 1e-6)]
        return (_update, (data, m, m.square()), grad, torch.tensor([[True], [False], [True]]), ((ones, 1 - ones, ones, ones), groups),
                ((0, 320), (320, 512)))

    eager, compiled, held = tensors(), tensors(), tensors()
    for _ in range(3):
        masked(*eager)
        torch.compile(masked, dynamic=False)(*compiled)
    for a, b, before in zip(eager[1], compiled[1], held[1], strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=3e-7)
        assert torch.equal(b[1], before[1]) and not torch.equal(b[0], before[0])


def test_what_is_compiled_for_a_device_needs_nothing_from_the_host():
    """A graph cannot record a copy from the host; the device here is torch's one without memory."""
    nodes, elsewhere = [], []

    def look(module, _):
        for node in module.graph.nodes:
            value = node.meta.get("example_value")
            for t in value if isinstance(value, tuple | list) else [value]:
                nodes.append(node.name)
                if isinstance(t, torch.Tensor) and t.device.type != "meta":
                    elsewhere.append(node.name)
        return module

    params = {name: p[None].to("meta") for name, p in decoder.init_parameters(MODEL, 64, SP(), 0).items()}
    torch.compiler.reset()
    decoder.tell_compiler()
    torch.compile(decoder.loss, dynamic=False, backend=look)(
        params, torch.empty(1, 4, MODEL.context + 1, dtype=torch.int64, device="meta"), MODEL, scalars(SP(), MODEL))
    assert len(nodes) > 100 and not elsewhere


def test_a_ninth_shape_is_compiled_like_the_first(monkeypatch):
    calls, compile_ = [], torch.compile

    def counting(module, _):
        return lambda *given: calls.append(1) or module(*given)

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counting, **options))

    def square(x):
        return x * x

    kept = [compiled_alone(square) for _ in range(10)]
    for size, function in enumerate(kept):
        assert function(torch.full((size + 2,), 3.0)).tolist() == [9.0] * (size + 2)
    assert len(calls) == 10
    shared = compile_(square, dynamic=False, backend=counting)
    for size in range(10):
        shared(torch.ones(size + 2))
    assert len(calls) < 20  # what it is for; if torch should compile without end, it is not needed any more


def test_attention_is_the_fastest_that_works_and_where_bits_must_repeat_the_first_of_a_fixed_order():
    took = {SDPBackend.FLASH_ATTENTION: None, SDPBackend.EFFICIENT_ATTENTION: 3.0, SDPBackend.MATH: 2.0, SDPBackend.CUDNN_ATTENTION: 1.0}
    assert kernels.choose(took.get, deterministic=False) is SDPBackend.CUDNN_ATTENTION
    assert kernels.choose(took.get, deterministic=True) is SDPBackend.EFFICIENT_ATTENTION
    with pytest.raises(RuntimeError, match="no attention"):
        kernels.choose({SDPBackend.CUDNN_ATTENTION: 1.0}.get, deterministic=True)


def test_attention_is_measured_once_a_shape_and_what_a_device_lacks_is_passed_over():
    shape = (4, 2, 1, 16, 8, torch.float32, torch.device("cpu"), False)
    kernels.attention_backend.cache_clear()
    assert kernels.attention_backend(*shape) in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
    assert kernels.attention_backend(*shape) and kernels.attention_backend.cache_info().misses == 1
    q = torch.randn(2, 4, 2, 8, requires_grad=True)
    assert kernels._seconds(SDPBackend.CUDNN_ATTENTION, q, q, q) is None


def test_determinism_is_asked_for_in_time_or_refused(monkeypatch):
    monkeypatch.setenv(kernels.WORKSPACE, ":0:0")
    kernels.fix_workspace()
    assert kernels.os.environ[kernels.WORKSPACE] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    kernels.fix_workspace()
    monkeypatch.delenv(kernels.WORKSPACE)
    with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 before CUDA is first used"):
        kernels.fix_workspace()


def test_determinism_ends_with_the_steps_that_asked_for_it():
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(KeyError), kernels.determinism(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory == filled
    with kernels.determinism(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_execution_is_in_the_id_and_its_default_is_not():
    assert recipe(execution=Execution(deterministic=False)).run_id == recipe().run_id
    assert recipe(execution=Execution(deterministic=True)).run_id != recipe().run_id
