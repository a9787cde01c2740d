"""Scion for anybody's module: steps by hand, torch's Muon, the stacked optimizer, and worlds of ranks against one process."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import etastar as es
from etastar.model.decoder import Decoder
from etastar.model.parametrization import numbers
from etastar.optim import distributed_scion
from etastar.optim.distributed_scion import ScionOptimizer, scion_groups
from etastar.optim.scion import StackedScion
from etastar.optim.stacked import Flat

HERE = Path(__file__)


def stepped(role, weight, *grads, **options):
    """One parameter under one role after a step a gradient."""
    p = nn.Parameter(torch.tensor(weight))
    optimizer = ScionOptimizer([{"params": [p], "role": role}], **{"lr": 0.5} | options)
    for grad in grads:
        p.grad = torch.tensor(grad)
        optimizer.step()
    return p.detach()


def quintic(singular, steps=5):
    for _ in range(steps):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return singular


@pytest.mark.parametrize("role, direction", [
    ("embedding", [[3 / 5 * 2**0.5, 4 / 5 * 2**0.5], [0.0, -(2**0.5)]]),  # each row over its RMS
    ("output", [[3 / 5 / 2**0.5, 4 / 5 / 2**0.5], [0.0, -1 / 2**0.5]]),  # each row over √2 times its length
    ("embedding_sign", [[1.0, 1.0], [0.0, -1.0]]),
    ("output_sign", [[0.5, 0.5], [0.0, -0.5]]),
])
def test_rules_of_rows_step_as_computed_by_hand(role, direction):
    made = stepped(role, [[1.0, 2.0], [3.0, 4.0]], [[3.0, 4.0], [0.0, -7.0]], radius=2.0)
    torch.testing.assert_close(made, torch.tensor([[1.0, 2.0], [3.0, 4.0]]) - 0.5 * 2.0 * torch.tensor(direction))


def test_a_vector_steps_by_its_gradient_over_its_rms():
    torch.testing.assert_close(stepped("norm", [1.0, 1.0], [3.0, 4.0]), torch.tensor([1 - 0.5 * 3 / 5 * 2**0.5, 1 - 0.5 * 4 / 5 * 2**0.5]))


def test_a_hidden_matrix_steps_by_its_polar_factor_times_the_root_of_out_over_in():
    # One row: the singular value 1 goes through the quintic five times, and √(out/in) is √(1/2)
    made = stepped("hidden", [[0.0, 0.0]], [[3.0, 4.0]])
    torch.testing.assert_close(made, -0.5 * quintic(1.0) * 0.5**0.5 * torch.tensor([[0.6, 0.8]]))
    # Two orthogonal columns of one length: both singular values start at 1/√2, and √(out/in) is √(3/2)
    made = stepped("hidden", [[0.0, 0.0]] * 3, [[2.0, 0.0], [0.0, 0.0], [0.0, -2.0]], newton_schulz_steps=3)
    torch.testing.assert_close(made, -0.5 * quintic(0.5**0.5, 3) * 1.5**0.5 * torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -1.0]]))


def test_momentum_averages_gradients_and_decay_shrinks_before_the_step():
    # 0.25 · (4, 0) = (1, 0), then 0.75 · (1, 0) + 0.25 · (0, 3) = (0.75, 0.75); each over its RMS
    made = stepped("norm", [8.0, 8.0], [4.0, 0.0], [0.0, 3.0], momentum=0.25, weight_decay=0.5, radius=3.0)
    first = [0.75 * 8 - 1.5 * 2**0.5, 0.75 * 8]
    torch.testing.assert_close(made, torch.tensor([0.75 * first[0] - 1.5, 0.75 * first[1] - 1.5]))


def test_the_constrained_form_brings_a_norm_to_its_radius_and_keeps_it_there():
    module = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        module.weight.mul_(100)
    optimizer = ScionOptimizer([{"params": [module.weight], "role": "output"}], lr=0.1, weight_decay=1.0, radius=3.0)
    for _ in range(200):
        module.weight.grad = torch.ones(4, 6)
        optimizer.step()
    norm = module.weight.detach().norm(dim=1).max() * math.sqrt(6)
    assert norm == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8)])
def test_without_nesterov_and_where_out_is_not_below_in_it_is_torchs_muon(shape):
    gen = torch.Generator().manual_seed(0)
    ours, muons = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    groups = [{"params": [ours], "role": "hidden"}]
    optimizer = ScionOptimizer(groups, lr=0.02, momentum=0.05, weight_decay=0.1, dtype=torch.bfloat16)
    reference = torch.optim.Muon([muons], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=False, adjust_lr_fn="original")
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=gen)
        muons.grad = ours.grad.clone()
        before = muons.detach().clone()
        optimizer.step()
        reference.step()
    moved = (muons.detach() - before).abs().max()
    torch.testing.assert_close(ours, muons, rtol=0, atol=2**-7 * moved)  # a rounding of bfloat16, should kernels differ


def test_the_stacked_optimizer_of_the_engine_takes_the_same_steps_of_a_decoder():
    model = es.Model(width=24, depth=2, head_dim=6, kv_heads=2, ffn_width=20, context=8, tied=False)
    by = es.Scion(momentum=0.1, weight_decay=0.1, radius_embedding=2.0, radius_hidden=3.0, radius_output=5.0, radius_norm=0.5)
    decoder = Decoder(model, 50, es.SP())
    flat = Flat(numbers(es.SP(), model, 50), 1, "cpu")
    for name, view in flat.views(flat.data).items():
        view[0] = decoder.parameters_by_name()[name].detach()
    stacked = StackedScion(flat)
    stacked.configure(0, by)
    radii = {role: {"radius": getattr(by, f"radius_{role}")} for role in ("embedding", "hidden", "output", "norm")}
    optimizer = ScionOptimizer(scion_groups(decoder, options=radii), lr=0.01, momentum=0.1, weight_decay=0.1)
    assert sorted(group["matrix_rows"] for group in optimizer.param_groups if group["role"] == "hidden") == [(), (20, 20), (24, 12, 12)]
    gen = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        grad = flat.like()
        for name, view in flat.views(grad).items():
            view.copy_(torch.randn(view.shape, generator=gen))
            decoder.parameters_by_name()[name].grad = view[0].clone()
        stacked.step(grad, torch.tensor([0.01], dtype=torch.float64), torch.tensor([step]), torch.tensor([True]))
        optimizer.step()
    for name, view in flat.views(flat.data).items():
        torch.testing.assert_close(decoder.parameters_by_name()[name].detach(), view[0], rtol=0, atol=1e-6, msg=name)


def test_a_module_tells_the_role_of_each_parameter_and_rules_go_before_it():
    layers = {"output": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "tokens": nn.Embedding(9, 4), "lm_head": nn.Linear(4, 9)}
    plain = {"tokens.weight": "embedding", "output.weight": "hidden", "lm_head.weight": "output"}  # a head's name, but not the last layer
    plain |= {f"{layer}.bias": "norm" for layer in ("output", "norm", "lm_head")} | {"norm.weight": "norm"}

    def told(rules):
        return {name: group["role"] for group in scion_groups(nn.ModuleDict(layers), rules) for name, _ in group["params"]}

    assert told({}) == plain
    assert told({"head.weight": "output_sign"}) == plain | {"lm_head.weight": "output_sign"}


def test_frozen_parameters_are_in_no_group_and_shared_ones_in_one():
    module = nn.ModuleDict({"tokens": nn.Embedding(9, 4), "frozen": nn.Linear(4, 4), "head": nn.Linear(4, 9, bias=False)})
    module["frozen"].requires_grad_(False)
    module["head"].weight = module["tokens"].weight
    assert [(group["role"], [name for name, _ in group["params"]]) for group in scion_groups(module)] == [("embedding", ["tokens.weight"])]


def test_each_matrix_that_a_parameter_holds_steps_as_it_would_alone():
    gen = torch.Generator().manual_seed(0)
    fused = nn.Linear(6, 9, bias=False)
    parts = [nn.Parameter(part.clone()) for part in fused.weight.detach().split((4, 5))]
    together = ScionOptimizer(scion_groups(fused, splits={"weight": (4, 5)}), lr=0.1)
    alone = ScionOptimizer([{"params": parts, "role": "hidden"}], lr=0.1)
    fused.weight.grad = torch.randn(9, 6, generator=gen)
    for part, grad in zip(parts, fused.weight.grad.split((4, 5)), strict=True):
        part.grad = grad
    together.step()
    alone.step()
    torch.testing.assert_close(fused.weight.detach(), torch.cat([part.detach() for part in parts]))


@pytest.mark.parametrize("ask, told", [
    (lambda: scion_groups(nn.Sequential(nn.Conv1d(2, 3, 4), nn.Linear(2, 2))), r"names 0.weight \(3, 2, 4\), 0.bias \(3,\); give"),
    (lambda: scion_groups(nn.Linear(2, 2), {"wieght": "output"}), r"no parameter has a name with \['wieght'\]"),
    (lambda: scion_groups(nn.Linear(2, 2), {"weight": "head"}), "no such role in {'weight': 'head'}"),
    (lambda: scion_groups(nn.Linear(2, 2), options={"hidden": {"radus": 1}}), "no such option in {'hidden': 'radus'}"),
    (lambda: ScionOptimizer(nn.Linear(2, 2).parameters(), lr=0.1), "needs a role.*scion_groups"),
    (lambda: ScionOptimizer(scion_groups(nn.Linear(3, 2), {"bias": "hidden"}), lr=0.1), r'"hidden" is for matrices.* bias \(2,\)'),
    (lambda: ScionOptimizer(scion_groups(nn.Linear(3, 2), {"weight": "norm"}), lr=0.1), r'"norm" is for vectors.* weight \(2, 3\)'),
    (lambda: ScionOptimizer(scion_groups(nn.Linear(2, 2), options={"hidden": {"radius": 0}}), lr=0.1), "radius=0.*hidden"),
    (lambda: ScionOptimizer(scion_groups(nn.Linear(2, 2)), lr=0.1, radius=math.inf), "radius=inf"),
    (lambda: ScionOptimizer(scion_groups(nn.Linear(2, 2)), lr=0.1, momentum=0), r"momentum 1 − β in \(0, 1\].*momentum=0 "),
    (lambda: ScionOptimizer(scion_groups(nn.Linear(2, 2)), lr=0.1, momentum=1.5), "momentum=1.5"),
    (lambda: ScionOptimizer(scion_groups(nn.Linear(2, 2)), lr=-1.0), "lr=-1.0"),
    (lambda: ScionOptimizer(scion_groups(nn.Linear(2, 5), splits={"weight": (3, 3)}), lr=0.1), r"weight has 5 rows.*\(3, 3\)"),
])
def test_what_cannot_be_is_one_clear_error(ask, told):
    with pytest.raises(ValueError, match=told):
        ask()


def test_a_sparse_gradient_is_refused():
    module = nn.Embedding(5, 2, sparse=True)
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradient.*sparse=False"):
        ScionOptimizer(scion_groups(module), lr=0.1).step()


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was_and_a_good_one_is_stepped():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    optimizer = ScionOptimizer(scion_groups(first), lr=0.1)
    first.weight.grad = second.weight.grad = torch.eye(3)
    optimizer.step()
    with pytest.raises(ValueError, match="radius=-1"):
        optimizer.add_param_group({"params": [("late", second.weight)], "role": "hidden", "radius": -1})
    assert len(optimizer.param_groups) == 1
    before = second.weight.detach().clone()
    optimizer.add_param_group({"params": [("late", second.weight)], "role": "hidden", "lr": 0.3})
    optimizer.step()
    torch.testing.assert_close(second.weight.detach(), before - 0.3 * quintic(3**-0.5) * torch.eye(3))


def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(tmp_path):
    whole, halves = (worker.built("odd", torch.float32) for _ in range(2))
    worker.train(whole, ScionOptimizer(worker.groups(whole), **worker.PLAIN), steps=range(6))
    first = ScionOptimizer(worker.groups(halves), **worker.PLAIN)
    worker.train(halves, first, steps=range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = ScionOptimizer(worker.groups(halves), lr=9.0)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    worker.train(halves, second, steps=range(3, 6))
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_closure_is_asked_with_gradients_and_a_schedule_sets_the_rate():
    module = nn.Linear(2, 1, bias=False)
    optimizer = ScionOptimizer(scion_groups(module, {"weight": "output"}), lr=0.5)
    scheduler = es.to_lambda_lr(es.WSD(warmup_steps=2, cooldown_fraction=0.5, shape="linear"), optimizer, 6)

    def closure():
        optimizer.zero_grad()
        loss = module(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    for lr in (0.25, 0.5, 0.5):
        before = module.weight.detach().clone()
        assert optimizer.step(closure).item() == pytest.approx(before.sum().item())
        torch.testing.assert_close(module.weight.detach(), before - lr / 2)  # (1, 1) over √2 times its length
        scheduler.step()


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_matrices_are_dealt_out_once_each_and_evenly(costs, ranks):
    dealt = distributed_scion._deal(costs, ranks)
    assert sorted(itertools.chain(*dealt)) == list(range(len(costs)))
    load = [sum(costs[place] for place in places) for places in dealt]
    assert max(load) - min(load) <= max(costs, default=0)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 9))
@settings(deadline=None)
def test_rows_of_a_matrix_are_where_a_chunked_parameter_has_them(rows, ranks):
    whole, first = torch.arange(sum(rows) * 2).view(-1, 2), 0
    chunks = [*whole.chunk(ranks), *[whole[:0]] * ranks][:ranks]
    for count in rows:
        matrix = distributed_scion._Matrix(whole, {}, first, (count, 2))
        held = torch.cat([chunk[matrix.rows(rank, ranks)] for rank, chunk in enumerate(chunks)])
        assert torch.equal(held, whole[first:first + count])
        first += count


def world(ranks, folder, device="cpu"):
    """What the ranks of a world found, in order."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[2] / "lib"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE.with_name("distributed_worker.py"), str(ranks), folder, device], timeout=300,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def one_process(case, device="cpu"):
    _, kind, options, dtype = worker.CASES[case]
    module = worker.built(kind, dtype, device)
    worker.train(module, ScionOptimizer(worker.groups(module), **options), device=device)
    return {name: p.detach().cpu() for name, p in module.named_parameters()}


def assert_as_one_process(found, device="cpu"):
    for case in found[0]["cases"]:
        tolerance = 1e-12 if "float64" in case else 1e-5
        alone = one_process(case, device)
        for rank, of_rank in enumerate(found):
            parameters = of_rank["cases"][case][0]
            assert parameters.keys() == alone.keys()
            for name, p in alone.items():
                assert (parameters[name] - p).abs().max() <= tolerance, f"{case}, rank {rank}, {name}"


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return world(4, tmp_path_factory.mktemp("four"))


def test_four_ranks_and_pairs_of_them_end_where_one_process_does(four):
    assert len(four[0]["cases"]) == len(worker.CASES)
    assert_as_one_process(four)


def moved(found, case, way):
    """Bytes a step by kind, summed over the ranks."""
    counts = [of_rank["cases"][case][1] for of_rank in found]
    return {kind: sum(count[kind][way] for count in counts) / (worker.STEPS // 2) for kind in counts[0] if kind != "agreement"}


def test_bytes_that_travel_are_those_counted_by_hand(four):
    # Four matrices of 8 × 8 floats, 256 bytes each, one a rank. Gathered: each goes to three others.
    # Dealt out: each rank has two rows of each, 64 bytes, and sends those of three matrices away; the same comes back.
    for way in ("sent", "received"):
        assert moved(four, "ddp even", way) == {"directions": 4 * 3 * 256}
        assert moved(four, "fsdp even", way) == {"rows_to_owners": 4 * 3 * 64, "rows_from_owners": 4 * 3 * 64}
    # One matrix of 6 × 6 on four ranks: rows 2, 2, 2, 0, and rank 0 is the owner; in bfloat16 half as much
    assert moved(four, "fsdp lone, constrained", "sent") == {"rows_to_owners": 4 * 6 * 4, "rows_from_owners": 4 * 6 * 4}
    assert moved(four, "fsdp bf16", "sent") == {"rows_to_owners": 4 * 6 * 2, "rows_from_owners": 4 * 6 * 2}
    assert moved(four, "ddp bf16", "sent") == {"directions": 4 * 3 * 36 * 2}


def test_ranks_that_differ_are_named_on_every_rank_before_anything_else_is_sent(four):
    for of_rank in four:
        for what, named in (("options", "options"), ("shapes", "shapes"), ("names", "parameter names")):
            assert of_rank["refusals"][what].startswith(f"ranks [0, 2, 3] and [1] of ScionOptimizer differ in their {named}; ")


def test_a_matrix_sharded_by_columns_is_refused(four):
    assert four[0]["refusals"]["torn"].startswith("Scion needs whole rows, and weight (8, 8) is placed as (Shard(dim=1),)")


@pytest.mark.slow
def test_a_world_of_two_ranks_ends_where_one_process_does(tmp_path):
    assert_as_one_process(world(2, tmp_path))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: nccl takes one rank a GPU")
def test_two_gpus_over_nccl_end_where_one_does(tmp_path):
    assert_as_one_process(world(2, tmp_path, "cuda"), "cuda")
