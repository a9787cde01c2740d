"""Operator norms against numpy's SVD and brute force over unit balls; bounds that hold; matrices of anybody's model."""

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from etastar.model import norms, spectral
from etastar.model.decoder import Decoder, init_parameters, stack
from etastar.model.matrices import role_by_name
from etastar.model.norms import operator_norms
from etastar.model.shapes import fused_rows, parameter_shapes
from etastar.model.spectral import spectral_bracket
from etastar.recipe import SP, Model, UnitNorm

MODEL = Model(width=64, depth=3, head_dim=16, context=32, kv_heads=2, ffn_width=96, tied=False)
EVERY = ("rms_to_inf", "rms_to_rms", "one_to_rms", "inf_to_inf", "frobenius")
MATRICES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))


def drawn(rows, columns, seed=0, lead=()):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(*lead, rows, columns)))


def root_mean_square(x, axis):
    return np.sqrt((x**2).mean(axis))


def with_singular_values(values, rows, seed=0):
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(rows, len(values))))[0]
    v = np.linalg.qr(rng.normal(size=(len(values), len(values))))[0]
    return torch.from_numpy((u * values) @ v.T)


def test_norms_of_a_small_matrix_are_the_ones_worked_out_by_hand():
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0], [0.0, 0.0]])  # 2 in, 4 out; WᵀW = [[9, 12], [12, 17]]
    largest = math.sqrt(13 + math.sqrt(160))
    wanted = {"rms_to_inf": math.sqrt(2) * 5, "one_to_rms": math.sqrt(17) / 2, "inf_to_inf": 7, "frobenius": math.sqrt(26),
              "rms": math.sqrt(26 / 8), "spectral": largest, "rms_to_rms": largest * math.sqrt(2 / 4)}
    for name, value in wanted.items():
        assert getattr(norms, name)(w).item() == pytest.approx(value, rel=1e-9), name


def test_the_three_closed_forms_are_what_no_vector_of_the_unit_ball_exceeds_and_one_reaches():
    w = drawn(5, 6, seed=3).numpy()
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=6))).T
    assert np.abs(w @ signs).max() == pytest.approx(norms.inf_to_inf(torch.from_numpy(w)).item(), rel=1e-12)  # corners of the ∞ ball
    columns = root_mean_square(w @ np.eye(6), 0).max()  # corners of the 1 ball
    assert columns == pytest.approx(norms.one_to_rms(torch.from_numpy(w)).item(), rel=1e-12)
    x = np.random.default_rng(1).normal(size=(6, 20_000))
    x /= root_mean_square(x, 0)
    best = w.T / root_mean_square(w.T, 0)  # each row's own direction
    longest, gain = norms.rms_to_inf(torch.from_numpy(w)).item(), norms.rms_to_rms(torch.from_numpy(w)).item()
    assert np.abs(w @ x).max() <= longest and np.abs(w @ best).max() == pytest.approx(longest, rel=1e-12)
    v = np.linalg.svd(w)[2][:1].T * math.sqrt(6)
    assert root_mean_square(w @ x, 0).max() <= gain * (1 + 1e-12)
    assert root_mean_square(w @ v, 0)[0] == pytest.approx(gain, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.floats(-1e3, 1e3).filter(lambda a: abs(a) > 1e-3))
def test_norms_scale_and_obey_the_triangle(shape, factor):
    rows, columns, seed = shape
    a, b = drawn(rows, columns, seed), drawn(rows, columns, seed + 1)
    for name in EVERY:
        norm = getattr(norms, name)
        assert norm(factor * a).item() == pytest.approx(abs(factor) * norm(a).item(), rel=1e-9)
        assert norm(a + b) <= (norm(a) + norm(b)) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(MATRICES, st.integers(1, 6))
def test_norms_of_a_map_after_another_multiply_at_most(shape, inner):
    rows, columns, seed = shape
    a, b = drawn(rows, inner, seed), drawn(inner, columns, seed + 1)
    for name in ("rms_to_rms", "inf_to_inf"):
        norm = getattr(norms, name)
        assert norm(a @ b) <= norm(a) * norm(b) * (1 + 1e-9)
    assert norms.rms_to_inf(a @ b) <= norms.rms_to_inf(a) * norms.rms_to_rms(b) * (1 + 1e-9)
    assert norms.one_to_rms(a @ b) <= norms.rms_to_rms(a) * norms.one_to_rms(b) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(MATRICES)
def test_norms_do_not_mind_the_order_of_rows_and_columns(shape):
    rows, columns, seed = shape
    w, rng = drawn(rows, columns, seed), np.random.default_rng(seed)
    mixed = w[torch.from_numpy(rng.permutation(rows))][:, torch.from_numpy(rng.permutation(columns))]
    for name in EVERY:
        assert getattr(norms, name)(mixed).item() == pytest.approx(getattr(norms, name)(w).item(), rel=1e-9)


SIZE = 288  # above what is worked out exactly


@pytest.mark.parametrize("values", [
    np.linspace(2.0, 0.1, SIZE),
    np.r_[5.0, np.linspace(1.0, 0.1, SIZE - 1)],
    np.r_[np.linspace(1.0, 0.9999, 40), np.linspace(0.9999, 0.1, SIZE - 40)],  # a cluster
    np.r_[1.0 + 3e-3, np.ones(SIZE - 1)],  # one beside all others, too near for a search to tell
    np.ones(SIZE), np.r_[1.0, np.zeros(SIZE - 1)],
], ids=["even", "apart", "cluster", "one of many", "orthogonal", "rank one"])
def test_the_largest_singular_value_lies_between_the_bounds_however_the_others_lie(values):
    for w in (with_singular_values(values, SIZE + 12), with_singular_values(values, SIZE + 12).mT):
        for start in (None, with_singular_values(values, SIZE, seed=5)[0]):
            bracket, true = spectral_bracket(w, start=start), values.max()
            assert bracket.low <= true * (1 + 1e-12) and true * (1 - 1e-12) <= bracket.high
            assert bracket.high / bracket.low - 1 <= 1.01e-3


def test_bounds_hold_where_the_search_is_led_astray():
    values = np.r_[2.0, np.ones(SIZE - 1)]
    w = with_singular_values(values, SIZE)
    wrong = torch.from_numpy(np.linalg.svd(w.numpy())[2][7])  # of the value 1: products lead away from it by rounding alone
    bracket = spectral_bracket(w, start=wrong)
    assert 2 * (1 - 1e-3) <= bracket.low.item() <= 2 * (1 + 1e-12) and 2 * (1 - 1e-12) <= bracket.high.item() <= 2 * (1 + 1.01e-3)


def test_a_refused_certificate_is_answered_by_all_eigenvalues(monkeypatch):
    w, asked = with_singular_values(np.r_[1.1, np.linspace(1.0, 0.9, SIZE - 1)], SIZE), []
    eigvalsh = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda g: (asked.append(g.shape), eigvalsh(g))[1])
    monkeypatch.setattr(spectral, "STEPS", 2)  # a search that has not converged
    bracket = spectral_bracket(torch.stack([w, with_singular_values(np.r_[9.0, np.full(SIZE - 1, 1e-3)], SIZE)]))
    assert asked == [(1, SIZE, SIZE)]  # of the one that needs it
    np.testing.assert_allclose(bracket.low, [1.1, 9.0], rtol=1e-5)
    assert (bracket.high.numpy() >= np.array([1.1, 9.0]) * (1 - 1e-12)).all()


@pytest.mark.parametrize("shape", [(3, 40), (64, 64), (200, 30), (300, 310), (700, 280)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_spectral_norm_is_that_of_numpy_on_either_side_of_the_size_that_is_exact(shape, dtype):
    w = drawn(*shape, seed=2).to(dtype)
    true = np.linalg.svd(w.double().numpy(), compute_uv=False)[0]
    bracket = spectral_bracket(w)
    assert bracket.low.item() == pytest.approx(true, rel=1e-6) and bracket.low <= true * (1 + 1e-12) <= bracket.high * (1 + 2e-12)


def test_a_search_that_goes_on_from_the_last_vector_is_as_close_for_half_the_products(monkeypatch):
    w = drawn(300, 300, seed=4)
    first = spectral_bracket(w)
    products, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (products.append(1), bmm(a, b))[1])
    moved = w + 1e-3 * drawn(300, 300, seed=5)
    warm, warm_products = spectral_bracket(moved, start=first.vector), len(products)
    cold = spectral_bracket(moved)
    assert warm_products < (len(products) - warm_products) / 2
    assert warm.low.item() == pytest.approx(cold.low.item(), rel=1e-5) and warm.high / warm.low < 1 + 1.01e-3


def test_a_table_that_is_read_in_blocks_has_the_same_norms(monkeypatch):
    w = drawn(70, 33, seed=6, lead=(2,))
    whole = [getattr(norms, name)(w) for name in (*EVERY, "rms")]
    monkeypatch.setattr(spectral, "BLOCK", 200)
    for expected, name in zip(whole, (*EVERY, "rms"), strict=True):
        torch.testing.assert_close(getattr(norms, name)(w), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(70, 33), (33, 70), (300, 280), (1, 5)], ids=str)
@pytest.mark.parametrize("role", ["hidden", "output", "embedding"])
@pytest.mark.parametrize("block", [spectral.BLOCK, 500], ids=["whole", "in blocks"])
def test_one_pass_over_a_stack_gives_what_each_norm_alone_does(shape, role, block, monkeypatch):
    w = drawn(*shape, seed=10, lead=(3,)).float()
    monkeypatch.setattr(spectral, "BLOCK", block)
    table, of = operator_norms(w, role), w.mT if role == "embedding" else w
    for name in (*EVERY, "rms", "spectral"):
        np.testing.assert_allclose(table[name], getattr(norms, name)(of), rtol=1e-9, err_msg=name)
    np.testing.assert_allclose(table.spectral, np.linalg.svd(w.double().numpy(), compute_uv=False)[:, 0], rtol=1e-6)


def test_a_stack_has_the_norms_of_each_of_its_matrices():
    stacked = drawn(20, 300, seed=7, lead=(3,)).float()
    table = operator_norms(stacked)
    assert table.slot.tolist() == [0, 1, 2] and (table.role == "hidden").all() and (table.norm == table.rms_to_rms).all()
    for slot in range(3):
        alone = operator_norms(stacked[slot].numpy())
        assert alone.drop(columns="slot").iloc[0].equals(table.drop(columns="slot").iloc[slot])


def test_a_token_table_is_taken_as_the_map_from_tokens():
    table_VxD = drawn(50, 8, seed=8)
    as_stored, of_tokens = operator_norms(table_VxD, role="output").iloc[0], operator_norms(table_VxD, role="embedding").iloc[0]
    turned = operator_norms(table_VxD.mT.contiguous()).iloc[0]
    assert as_stored.norm == as_stored.rms_to_inf == pytest.approx(math.sqrt(8) * np.linalg.norm(table_VxD, axis=1).max())
    assert of_tokens.norm == of_tokens.one_to_rms == pytest.approx(np.linalg.norm(table_VxD, axis=1).max() / math.sqrt(8))
    columns = ["rms_to_inf", "rms_to_rms", "one_to_rms", "inf_to_inf", "frobenius", "rms"]
    np.testing.assert_allclose(of_tokens[columns].astype(float), turned[columns].astype(float), rtol=1e-9)
    assert of_tokens["shape"] == (50, 8)


def test_unit_norm_starts_every_matrix_at_norm_1_and_those_back_into_the_stream_at_less():
    table = operator_norms(Decoder(MODEL, 100, UnitNorm(), seed=3)).set_index(["name", "part"])
    back = table.index.get_level_values("name").str.endswith("_out")
    assert len(table) == 2 + 7 * MODEL.depth and back.sum() == 2 * MODEL.depth
    np.testing.assert_allclose(table.norm[~back], 1, rtol=1e-5)
    np.testing.assert_allclose(table.norm[back], 1 / math.sqrt(2 * MODEL.depth), rtol=1e-5)
    assert set(table.role[~back]) == {"embedding", "hidden", "output"}


@pytest.mark.parametrize("model", [MODEL, Model(width=64, depth=1, head_dim=16)], ids=["grouped keys", "own keys"])
def test_fused_parameters_are_told_by_their_matrices(model):
    params = init_parameters(model, 80, SP(), seed=0)
    table = operator_norms(params).set_index(["name", "part"])
    for name in parameter_shapes(model, 80):
        rows = fused_rows(name, model)
        if rows:
            parts = ("q", "k", "v") if len(rows) == 3 else ("gate", "up")
            for part, piece in zip(parts, params[name].split(rows), strict=True):
                row = table.loc[(name, part)]
                assert row["shape"] == tuple(piece.shape)
                assert row.spectral == pytest.approx(np.linalg.svd(piece, compute_uv=False)[0], rel=1e-5)


def test_a_stack_of_runs_has_the_rows_of_each_run():
    runs = [init_parameters(MODEL, 40, SP(), seed) for seed in (0, 1)]
    table = operator_norms(stack(runs))
    for slot, params in enumerate(runs):
        own = operator_norms(params).drop(columns="slot")
        assert table[table.slot == slot].drop(columns="slot").reset_index(drop=True).equals(own)


def test_a_head_that_is_the_token_table_is_told_in_both_roles():
    tied = Model(width=32, depth=1, head_dim=16)
    table = operator_norms(Decoder(tied, 40, SP()))
    both = table[table.name == "embedding"]
    assert both.role.tolist() == ["embedding", "output"]
    assert both.norm.iloc[1] == pytest.approx(32 * both.norm.iloc[0])


class Small(torch.nn.Module):
    """Somebody's model: a tied head, a convolution, a bare parameter."""

    def __init__(self, tied=True):
        super().__init__()
        self.wte, self.wpe = torch.nn.Embedding(30, 8), torch.nn.Embedding(60, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        self.conv, self.mix = torch.nn.Conv1d(8, 8, 3), torch.nn.Parameter(torch.ones(4, 4))
        self.lm_head = torch.nn.Linear(8, 30, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


def test_modules_give_the_roles_of_their_matrices():
    table = operator_norms(Small()).set_index("name")
    assert table.role.to_dict() == {"wte.weight": "embedding", "wpe.weight": "embedding", "layers.0.weight": "hidden",
                                    "layers.1.weight": "hidden", "lm_head.weight": "output", "mix": "other", "conv.weight": "other"}
    assert table.loc["conv.weight"].drop(["part", "slot", "role", "shape"]).isna().all() and table.loc["conv.weight", "shape"] == (8, 8, 3)
    assert table.loc["layers.1.weight", "norm"] == table.loc["layers.1.weight", "rms_to_rms"]
    named_otherwise = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False))
    named_otherwise[1].weight = named_otherwise[0].weight
    assert operator_norms(named_otherwise).role.tolist() == ["embedding", "output"]


def in_folder(folder, module, shards=1):
    state = {name: t.detach().clone() for name, t in module.state_dict().items()}
    if module.lm_head.weight is module.wte.weight:
        del state["lm_head.weight"]
    names = sorted(state)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    folder.mkdir(exist_ok=True)
    for i, file in enumerate(files):
        save_file({name: state[name] for name in names[i::shards]}, folder / file)
    if shards > 1:
        where = {name: files[i % shards] for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_folder_of_safetensors_has_the_rows_of_the_module(tmp_path, shards, tied):
    module = Small(tied)
    folder = in_folder(tmp_path / "model", module, shards)
    save_file({"consolidated": torch.ones(3, 3)}, folder / "other.safetensors")  # what the model does not name is not read
    wanted = operator_norms(module)
    wanted = wanted[wanted.name != "mix"]  # a matrix in a file is taken to be a linear map
    wanted["name"] = wanted.name.replace({"lm_head.weight": "wte.weight"}) if tied else wanted.name
    found = operator_norms(str(folder))
    assert found[found.name == "mix"].role.tolist() == ["hidden"]
    order = ["name", "role"]
    found = found[found.name != "mix"].sort_values(order).reset_index(drop=True)
    assert found.equals(wanted.sort_values(order).reset_index(drop=True))


def test_one_file_and_a_plain_folder_do_and_a_config_may_say_that_no_head_is_tied(tmp_path):
    save_file({"embed.weight": torch.randn(9, 4)}, tmp_path / "a.safetensors")
    save_file({"layers.0.up.weight": torch.randn(5, 4), "layers.0.experts": torch.randn(2, 5, 4), "step": torch.tensor(3),
               "layers.0.ids": torch.ones(3, 3, dtype=torch.int64)}, tmp_path / "b.safetensors")
    table = operator_norms(tmp_path)
    assert table.groupby("role").size().to_dict() == {"embedding": 1, "hidden": 3, "other": 1, "output": 1}
    assert table[table.name == "layers.0.experts"].slot.tolist() == [0, 1]
    assert len(operator_norms(tmp_path / "b.safetensors")) == 4
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    assert "output" not in set(operator_norms(tmp_path).role)


@pytest.mark.parametrize("name, role", [
    ("embedding", "embedding"), ("head", "output"), ("layers.3.qkv", "hidden"), ("layers.0.attention_norm", None), ("final_norm", None),
    ("model.embed_tokens.weight", "embedding"), ("tok_embeddings.weight", "embedding"), ("transformer.wte.weight", "embedding"),
    ("lm_head.weight", "output"), ("output.weight", "output"), ("embed_out.weight", "output"), ("model.layers.0.output.weight", "hidden"),
    ("layers.1.feed_forward.w2.weight", "hidden"), ("param/embedding", "embedding"), ("model.norm.weight", None)])
def test_names_give_roles(name, role):
    assert role_by_name(name) == role


@pytest.mark.parametrize("wrong, said", [
    (torch.ones(3), r"shape \(3,\)"), (np.float64(1.0), "got a float64"), (torch.ones(2, 2, 2, 2), r"shape \(2, 2, 2, 2\)"),
    (torch.ones(0, 4), "not empty"), (torch.ones(2, 2, dtype=torch.complex64), "real matrix"), ([[1.0]], "got a list"),
    (torch.nn.LayerNorm(3), "no matrix in a LayerNorm"), ({"gain": torch.ones(3)}, "no matrix in a dict"),
    ({"w": np.ones((2, 2))}, "must be torch tensors; got {'w': 'a ndarray'}"), ({}, "no matrix"),
    ({"a.weight": torch.tensor([[1.0, math.nan]])}, "'a.weight' has entries that are NaN or infinite"),
    ({"layers.0.gate_up": torch.tensor([[1.0], [math.inf]])}, r"'layers.0.gate_up' \(up\) has entries"),
], ids=str)
def test_what_has_no_norm_is_refused_by_name(wrong, said):
    with pytest.raises(ValueError, match=said):
        operator_norms(wrong)


def test_entries_that_cancel_to_no_number_are_told_by_name_and_not_by_a_warning_too():
    w = torch.ones(4, 4)
    w[1, 1], w[2, 1] = math.inf, -math.inf
    with warnings.catch_warnings(), pytest.raises(ValueError, match="'a.weight' has entries that are NaN or infinite"):
        warnings.simplefilter("error")
        operator_norms({"a.weight": w})


def test_paths_without_a_model_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is no safetensors file and no folder of any"):
        operator_norms(tmp_path)
    with pytest.raises(ValueError, match="nowhere is no safetensors file"):
        operator_norms(tmp_path / "nowhere")
    folder = in_folder(tmp_path / "model", Small(), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model-00002-of-00002.safetensors, which its index names"):
        operator_norms(folder)
    save_file({"gain": torch.ones(3)}, tmp_path / "gains.safetensors")
    with pytest.raises(ValueError, match="no matrix in .*gains.safetensors"):
        operator_norms(tmp_path / "gains.safetensors")


def test_a_role_is_of_a_single_matrix_and_known():
    with pytest.raises(ValueError, match="unknown role 'router'; known: embedding, hidden, output"):
        operator_norms(torch.ones(2, 2), role="router")
    with pytest.raises(ValueError, match="role='output' is for a single matrix or stack; in a Small"):
        operator_norms(Small(), role="output")
