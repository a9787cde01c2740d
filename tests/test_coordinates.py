"""The coordinate check: what it measures is what is there, right parametrizations pass, and every fault is caught in its own role."""

import dataclasses
import json
import math

import pandas as pd
import pytest
import torch

from etastar import cli
from etastar.coordinates import CORPUS, MODEL, all_passed, coordinate_check, judge_coordinates, measure_coordinates
from etastar.model.activations import activations
from etastar.model.decoder import Decoder
from etastar.model.parametrization import numbers, scalars
from etastar.recipe import SP, CompleteP, Corpus, Mixture, Model, MuP, UnitNorm
from etastar.text.batches import batch, validation_batches
from etastar.text.corpora import prepare

SMALL = dataclasses.replace(MODEL, width=32, head_dim=8, context=16)
MIXED = dataclasses.replace(SMALL, mixture=Mixture(4, 2, balance=0.0, router_z=0.0))
QUICK = {"model": SMALL, "draws": 2, "steps": 3, "seeds": 2}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def invented(values, axis="width", layer="layers.0.stream", quantity="size"):
    """Measurements of one activation: {(size, seed, step): value}."""
    rows = [{"axis": axis, "width": 64, "depth": 2, "seed": seed, "step": step, "layer": layer, "role": "hidden", "quantity": quantity,
             "value": value, axis: size} for (size, seed, step), value in values.items()]
    return pd.DataFrame(rows)


def test_slopes_of_known_powers():
    table = judge_coordinates(invented({(w, seed, t): 3 * w ** (0.5 + 0.1 * (-1) ** seed) * (t == 1) + w**0.04 * (t == 2) - w * (t == 3) * 0
                                        + 7 * (t == 3) for w in (64, 128, 512) for seed in (0, 1) for t in (1, 2, 3)}))
    assert table["step"].tolist() == [1, 2] and table["slope"].tolist() == pytest.approx([0.5, 0.04])
    half = 12.706204736 * 0.1 * math.sqrt(2) / math.sqrt(2)  # t of one degree of freedom, sd 0.1 √2 of two seeds
    assert table[["low", "high"]].iloc[0].tolist() == pytest.approx([0.5 - half, 0.5 + half], rel=1e-6)
    assert table["passed"].tolist() == [False, True] and table["band"].tolist() == [0.05, 0.05] and not all_passed(table)


def test_the_steepest_step_is_judged_and_logits_at_the_last():
    falling = {(w, seed, t): w ** (-0.5 / t) for w in (64, 128) for seed in (0, 1) for t in (1, 2, 3)}
    stream, logits = judge_coordinates(invented(falling)), judge_coordinates(invented(falling, layer="logits"))
    assert stream["step"].tolist() == [1, 2] and logits["step"].tolist() == [1, 3]
    assert logits["exempt"].tolist() == [True, False] and logits["passed"].tolist() == [False, True] and all_passed(logits)
    assert not stream["exempt"].any() and not all_passed(stream)


def test_what_diverged_has_no_slope_and_does_not_pass():
    flat = {(w, seed, t): 1.0 for w in (64, 128) for seed in (0, 1) for t in (1, 2, 3)}
    table = judge_coordinates(invented(flat | {(128, 1, 3): math.nan}))
    assert table["step"].tolist() == [1, 3] and math.isnan(table["slope"].iloc[1]) and not all_passed(table)
    assert all_passed(judge_coordinates(invented(flat)))


def test_what_is_measured_is_what_torch_makes_of_the_same_run():
    """A run beside it: the decoder as a module, torch.optim.AdamW with a group for each rate, activations before and after."""
    by, model = MuP(base_width=16), dataclasses.replace(SMALL, width=32, ffn_width=96)
    found = measure_coordinates(by, (32, 64), seeds=2, model=model, draws=1, steps=3, peak_lr=0.01, weight_decay=0.1)
    tokens, table = prepare(CORPUS), numbers(by, model, 256)
    probe = torch.from_numpy(next(validation_batches(tokens, 16, batch_tokens=64))[0][:, :-1])
    decoder = Decoder(model, 256, by, seed=1)
    params = decoder.parameters_by_name()
    optimizer = torch.optim.AdamW([{"params": [params[name]], "lr": 0.01 * row.lr_multiplier, "weight_decay": 0.1 * row.decay_multiplier}
                                   for name, row in table.items()], betas=(0.9, 0.95), eps=1e-12)
    start = {name: p.detach().clone() for name, p in params.items()}
    before = activations(start, probe, model, scalars(by, model))
    for step in (0, 1):
        t = torch.from_numpy(batch(tokens.train, 16, 1, step, 4))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(decoder(t[:, :-1]).flatten(0, 1), t[:, 1:].flatten()).backward()
        optimizer.step()
    params = {name: p.detach() for name, p in params.items()}
    after = activations(params, probe, model, scalars(by, model))
    mine = found[(found["seed"] == 1) & (found["width"] == 32)].set_index(["quantity", "layer", "step"])["value"]
    for name, x in after.items():
        seen = x.isfinite()
        assert mine["size", name, 3] == pytest.approx(float(x[seen].abs().mean()), rel=1e-3), name
        assert mine["size", name, 1] == pytest.approx(float(before[name][seen].abs().mean()), rel=1e-5), name
        assert mine["change", name, 3] == pytest.approx(float((x - before[name])[seen].abs().mean()), rel=2e-3), name
    moved = {name: float(((params[name] - w).square().mean() / w.square().mean()).sqrt()) for name, w in start.items()}
    assert mine["update", "head", 3] == pytest.approx(moved["head"], rel=1e-3)
    both = math.sqrt(moved["layers.0.mlp_out"] * moved["layers.1.mlp_out"]) * math.sqrt(96)
    assert mine["update", "layers.*.mlp_out", 3] == pytest.approx(both, rel=1e-3)


def slopes(parametrization, tamper=None, **setting):
    """Slopes by quantity and layer at the step that is judged; small networks, few initializations."""
    given = {"widths": (32, 128), "depths": (1,), "seeds": 2, "model": SMALL, "draws": 2, "steps": 3, "peak_lr": 2**-8}
    table = judge_coordinates(measure_coordinates(parametrization, tamper=tamper, **given | setting))
    return table[table["step"] > 1].set_index(["quantity", "layer"])["slope"]


def wrong(role=None, rate=0.0, std=0.0, **scalars_):
    """A fault: the numbers of a role, or scalars, times a power of the width."""

    def tamper(table, by, model):
        m = model.width / 32
        told = {name: dataclasses.replace(row, lr_multiplier=row.lr_multiplier * m**rate, init_std=row.init_std and row.init_std * m**std)
                if row.role == role else row for name, row in table.items()}
        return told, dataclasses.replace(by, **{name: getattr(by, name) * m**power for name, power in scalars_.items()})

    return tamper


FAULTS = {  # what is wrong, where it is seen, and the slope it has there; at a rate of 2^−8
    "the embedding's rate over m": (wrong("embedding", rate=-1), ("change", "embedding"), -1),
    "the embedding's start over √m": (wrong("embedding", std=-0.5), ("size", "embedding"), -0.5),
    "the embedding's multiplier times √m": (wrong(embedding=0.5), ("change", "embedding"), 0.5),
    "the hidden rate not over m": (wrong("hidden", rate=1), ("update", "layers.*.qkv"), 1),
    "the hidden start not over √m": (wrong("hidden", std=0.5), ("update", "layers.*.mlp_out"), -0.5),
    "the head's rate over m": (wrong("output", rate=-1), ("update", "head"), -1),
    "the head's start over √m": (wrong("output", std=-0.5), ("update", "head"), 0.5),
    "logits not over m": (wrong(logits=-1), ("change", "logits"), 1),
    "the gains' rate over m": (wrong("norm", rate=-1), ("update", "final_norm"), -1),
    "block outputs over √m": (wrong(residual=-0.5), ("change", "layers.0.mlp"), -0.5),
}
MIXTURE_FAULTS = {
    "the router's rate not over m": (wrong("router", rate=1), ("update", "layers.*.router"), 1),
    "the router's start not over m": (wrong("router", std=1), ("update", "layers.*.router"), -1),
    "the experts' rate not over m": (wrong("expert", rate=1), ("update", "layers.*.experts_gate_up"), 1),
    "the experts' start not over √m": (wrong("expert", std=0.5), ("update", "layers.*.experts_out"), -0.5),
}


@pytest.fixture(scope="module")
def right():
    return {shape: slopes(MuP(base_width=32), model=shape) for shape in (SMALL, MIXED)}


@pytest.mark.parametrize(("tamper", "where", "slope", "shape"),
                         [(*fault, SMALL) for fault in FAULTS.values()] + [(*fault, MIXED) for fault in MIXTURE_FAULTS.values()],
                         ids=[*FAULTS, *MIXTURE_FAULTS])
def test_a_fault_is_caught_in_its_own_role(right, tamper, where, slope, shape):
    assert abs(right[shape][where]) < 0.15
    assert slopes(MuP(base_width=32), tamper, model=shape)[where] == pytest.approx(slope, abs=0.15)


def test_attention_over_the_root_is_caught_where_the_size_of_heads_grows():
    where, setting = ("change", "layers.0.attention_logits"), {"peak_lr": 2**-6, "draws": 4, "steps": 4}
    by, root = MuP(base_width=32), MuP(base_width=32, attention="root")
    assert abs(slopes(by, heads="held", **setting)[where]) < 0.15
    assert slopes(root, heads="held", **setting)[where] == pytest.approx(0.5, abs=0.15)
    assert abs(slopes(root, **setting)[where]) < 0.15  # more heads of one size hide it


def test_depth_is_kept_by_alpha_1_and_by_nothing_else():
    depth = {"widths": (32,), "depths": (2, 8)}
    whole, half, none = (slopes(CompleteP(base_width=32, base_depth=2, alpha=a), **depth) for a in (1.0, 0.5, 0.0))
    assert whole.abs().max() < 0.2
    assert half["update", "layers.*.qkv"] == pytest.approx(-0.5, abs=0.1) and half["size", "layers.last.stream"] < 0.15
    assert none["update", "layers.*.mlp_norm"] == pytest.approx(-1, abs=0.1) and none["size", "layers.last.stream"] > 0.2
    shallow = slopes(MuP(base_width=32), **depth)
    assert shallow["size", "layers.last.stream"] > 0.3 < shallow["change", "layers.middle.stream"]
    heavy = slopes(CompleteP(base_width=32, base_depth=2),
                   lambda table, by, model: (table, dataclasses.replace(by, residual=1.0)), **depth)
    assert heavy["change", "layers.last.stream"] > 0.5


def test_standard_parametrization_fails_beside_the_right_one():
    table = coordinate_check(MuP(base_width=32), (32, 128), **QUICK | {"draws": 4})
    later = table[(table["step"] > 1) & (table["quantity"] == "size")].set_index("layer")
    assert (later.loc[["layers.0.mlp", "layers.1.mlp", "layers.1.attention"], "control_slope"] > 0.5).all()
    assert not later["control_passed"][["layers.0.mlp", "layers.1.attention_logits"]].any()
    alone = coordinate_check(SP(), (32, 128), **QUICK)
    assert "control_slope" not in alone and not all_passed(alone)
    pd.testing.assert_frame_equal(coordinate_check(MuP(base_width=32), (32, 128), control=False, **QUICK | {"draws": 4}),
                                  table.drop(columns=["control_slope", "control_passed"]))


def test_the_command_prints_the_table_and_a_line_and_fails_where_the_check_does(monkeypatch, capsys):
    asked = []

    def made_up(by, widths, depths, seeds, **setting):
        asked.append((by, widths, depths, seeds))
        power = 0.5 if isinstance(by, SP) else 0.01
        return invented({(w, seed, t): w**power for w in widths for seed in range(seeds) for t in (1, 2, 3)})

    monkeypatch.setattr("etastar.coordinates.measure_coordinates", made_up)
    assert cli.main(["coordinates", "--parametrization", "completep", "--widths", "32,64", "--depths", "4,8", "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert asked == [(CompleteP(base_width=32, base_depth=4), [32, 64], [4, 8], 2), (SP(), [32, 64], [4, 8], 2)]
    assert "layers.0.stream" in out and "verdict\npassed: all 2 slopes lie within their bands" in out
    assert cli.main(["coordinates", "--parametrization", "sp", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] is False and told["coordinates"][1]["slope"] == 0.5 and asked[2] == (SP(), [64, 128, 256], [2], 3)
    where = "layers.0.stream size at step {} over width: +0.50 (band 0.05)"
    assert told["verdict"] == f"failed: 2 of 2 slopes lie outside their bands: {where.format(1)}; {where.format(2)}"
    monkeypatch.undo()
    assert cli.main(["coordinates", "--widths", "64"]) == 2 and "two widths or two depths" in capsys.readouterr().err


def test_the_band_of_sizes_is_wider_over_depth():
    rising = {(w, seed, t): w**0.1 for w in (2, 4, 8) for seed in (0, 1) for t in (1, 2)}
    over_depth = judge_coordinates(invented(rising, axis="depth", layer="layers.last.stream"))
    assert over_depth["band"].eq(0.25).all() and all_passed(over_depth) and not all_passed(judge_coordinates(invented(rising)))


def test_rows_come_in_the_order_of_computing_with_width_before_depth():
    table = coordinate_check(MuP(base_width=32), (32, 64), (2, 4), control=False, **QUICK)
    assert list(table.columns) == ["axis", "layer", "role", "quantity", "step", "slope", "low", "high", "band", "passed", "exempt"]
    assert table["axis"].drop_duplicates().tolist() == ["width", "depth"]
    assert table["quantity"][table["axis"] == "depth"].drop_duplicates().tolist() == ["size", "change", "update"]
    depth = table[(table["axis"] == "depth") & (table["quantity"] == "size") & (table["step"] == 1)]
    assert depth["layer"].tolist() == ["embedding", "layers.*.attention_logits", "layers.middle.stream", "layers.last.stream",
                                       "final", "logits"]
    roles = table.drop_duplicates("layer").set_index("layer")["role"]
    assert roles[["embedding", "layers.0.mlp", "logits", "head", "final_norm", "layers.*.qkv"]].tolist() == [
        "embedding", "hidden", "output", "output", "norm", "hidden"]


def test_what_grows_with_width_and_what_is_kept():
    from etastar.coordinates import _shapes

    grown = _shapes(Model(width=128, depth=3, head_dim=8, kv_heads=4, ffn_width=320, context=16), [32, 64], [2], "grow")["width"]
    assert [(m.width, m.depth, m.head_dim, m.kv_heads, m.ffn_width) for m in grown] == [(32, 2, 8, 4, 80), (64, 2, 8, 8, 160)]
    held = _shapes(SMALL, [32, 96], [2, 4], "held")
    assert [(m.heads, m.head_dim, m.ffn_width) for m in held["width"]] == [(4, 8, 96), (4, 24, 288)]
    assert [(m.width, m.depth) for m in held["depth"]] == [(32, 2), (32, 4)]


@pytest.mark.parametrize(("parametrization", "setting", "said"), [
    (MuP(base_width=64), {"widths": (64, 96)}, r"widths \[96\] are not multiples of the smallest, 64"),
    (MuP(base_width=48), {"widths": (64, 128)}, "width 64 is not a multiple of base_width 48"),
    (MuP(base_width=128), {}, "base_width 128 is larger than the smallest width 64"),
    (CompleteP(base_width=64, base_depth=4), {"depths": (2, 4)}, "base_depth 4 is larger than the smallest depth 2"),
    (SP(), {"widths": (40, 80)}, "width 40 is not a multiple of head_dim 16"),
    (SP(), {"widths": (64,)}, r"two widths or two depths; got widths \(64,\) and depths \(2,\)"),
    (SP(), {"widths": ()}, "two widths or two depths"),
    (SP(), {"seeds": 1}, "2 seeds or more for an interval.*seeds=1"),
    (SP(), {"steps": 1}, "2 steps.*steps=1"),
    (SP(), {"draws": 0}, "draws=0"),
    (SP(), {"peak_lr": 0.0}, "rate > 0.*peak_lr=0.0"),
    (UnitNorm(), {}, "knows SP, MuP and CompleteP; got UnitNorm"),
    (SP(), {"corpus": Corpus("synthetic", vocab=32, options=(("tokens", 100), ("validation_tokens", 2000)))}, "under 4 sequences of 32"),
])
def test_what_cannot_be_checked_is_refused_before_anything_is_trained(monkeypatch, parametrization, setting, said):
    monkeypatch.setattr("etastar.coordinates._measured", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=said):
        measure_coordinates(parametrization, **setting)


@pytest.mark.slow
@pytest.mark.parametrize("parametrization", [MuP(base_width=64), CompleteP(base_width=64, base_depth=2)], ids=["mup", "completep"])
def test_right_parametrizations_pass_at_widths_64_to_256(parametrization):
    table = coordinate_check(parametrization, depths=(2, 4, 8) if isinstance(parametrization, CompleteP) else (2,))
    assert all_passed(table), table[~table["passed"] & ~table["exempt"]].to_string()
    sizes = table[(table["axis"] == "width") & (table["quantity"] == "size") & (table["step"] > 1)].set_index("layer")
    assert not sizes["control_passed"][[f"layers.{i}.{name}" for i in (0, 1) for name in ("attention", "mlp", "stream")]].any()
