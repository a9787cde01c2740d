"""Stability and feature learning logged while runs train: what is read off their models, the same in a branch as in a straight run, and
no bit of the training changes."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import etastar as es
from etastar.engine.checkpoint import read_json, write_json
from etastar.engine.curve import LOGGED_COLUMNS, passed, with_logged
from etastar.engine.feature_log import effective_rank, features, imbalance, probe_tokens, slot_features, update_ratio
from etastar.engine.slots import SlotStack
from etastar.engine.store import Store
from etastar.model.activations import activations
from etastar.model.decoder import Decoder, init_parameters
from etastar.model.parametrization import numbers, scalars
from etastar.model.shapes import parameter_shapes, role_of
from etastar.observe import LOGS, Observe
from etastar.text.corpora import prepare
from tiny import BATCH, CORPUS, MODEL, counted, interrupted_after, recipe, trained_alone, wsd

FAST = dict(progress=False, backend="inline")
OBSERVE = es.Observe(features_every_tokens=5 * BATCH)
BOTH = es.Observe(features_every_tokens=5 * BATCH, norms_every_tokens=4 * BATCH)
TRUNK, BRANCH = recipe(22), recipe(22, schedule=wsd(9))
COLUMNS = list(LOGS["features"])
DENSE = COLUMNS[:-1]  # load_imbalance is a mixture's


def logged(run, columns=tuple(DENSE)) -> pd.DataFrame:
    return run.curve.set_index("step")[list(columns)].dropna()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return trained_alone(tmp_path_factory.mktemp("straight"), observe=BOTH, **FAST)


def probe(model=MODEL) -> torch.Tensor:
    """The probe in its own words: 2048 tokens of validation, sequences spread evenly."""
    held, context = torch.from_numpy(prepare(CORPUS).validation.astype(np.int64)), model.context
    windows = (len(held) - 1) // context
    return torch.stack([held[int(i) * context : int(i) * context + context] for i in np.linspace(0, windows - 1, 2048 // context)])


def expected(decoder: Decoder, start: Decoder) -> dict[str, float]:
    """The columns by the singular values of the features and by the logits that the decoder itself gives."""
    tokens, model = probe(decoder.model), decoder.model
    now, then = (activations(of.parameters_by_name(), tokens, model, of.scalars) for of in (decoder, start))
    last = f"layers.{model.depth - 1}.stream"
    x, x_0 = (found[last].detach().double().flatten() for found in (now, then))
    features_NxD = now["final"].detach().double().flatten(0, 1)
    share = torch.linalg.svdvals(features_NxD - features_NxD.mean(0)).square()
    share = share / share.sum()
    with torch.no_grad():
        log_z = torch.log(decoder(tokens).double().exp().sum(-1))
    attention = torch.cat([found[found.isfinite()].flatten() for name, found in now.items() if name.endswith("attention_logits")])
    return {"attention_logit_max": float(attention.abs().max()), "stream_rms": float(x.norm()) / math.sqrt(len(x)),
            "stream_delta": float((x - x_0).norm() / x_0.norm()), "feature_rank": math.exp(-float((share * share.log()).sum())),
            "log_z_max": float(log_z.abs().max())}


def assert_same_curve(run, other):
    assert run.observed == other.observed == BOTH
    pd.testing.assert_frame_equal(run.curve, other.curve, check_exact=True)


@pytest.mark.parametrize("changes", [
    {}, dict(model=es.Model(width=32, depth=2, head_dim=16, context=32, kv_heads=1, tied=False), parametrization=es.MuP(base_width=16)),
    dict(model=es.Model(width=32, depth=1, head_dim=16, context=32, normalization="everywhere")),
    dict(model=es.Model(width=32, depth=2, head_dim=16, context=32, mixture=es.Mixture(4, 2), qk_norm=True)),
    dict(optimizer=es.ScheduleFreeAdamW(), peak_lr=2**-5)], ids=["tied", "untied μP", "everywhere", "mixture", "Schedule-Free"])
def test_what_is_logged_is_worked_out_again_from_the_models(changes, tmp_path):
    long = recipe(13, seed=3, **changes)
    (run,) = es.run([long], store=tmp_path, observe=OBSERVE, **FAST)
    (short,) = es.run([long.replace(horizon_tokens=5 * BATCH)], store=tmp_path / "short", **FAST)
    start = Decoder(long.model, CORPUS.vocab, long.parametrization, seed=long.seed)
    for steps, of in ((5, short), (13, run)):
        wanted = expected(of.model(), start)
        assert logged(run, wanted).index.tolist() == [5, 10, 13]  # and at the end
        np.testing.assert_allclose(logged(run, wanted).loc[steps], list(wanted.values()), rtol=1e-5)
    assert run.curve.load_imbalance.isna().all() == (long.model.mixture is None)
    assert run.curve.update_ratio.isna().all() == isinstance(long.optimizer, es.ScheduleFreeAdamW)


def test_the_update_ratio_is_that_of_the_last_step_the_weights_took(tmp_path):
    plain = recipe(6, optimizer=es.AdamW(weight_decay=0.0), lr_ratios=(3.0, 0.5, 1.0))
    (run,) = es.run([plain], store=tmp_path, observe=es.Observe(features_every_tokens=BATCH), **FAST)
    states = []
    for steps in (5, 6):
        (short,) = es.run([plain.replace(horizon_tokens=steps * BATCH)], store=tmp_path / str(steps), **FAST)
        states.append({name: p.detach() for name, p in short.model().parameters_by_name().items() if role_of(name) == "hidden"})
    before, after = states
    moved = math.sqrt(sum(float((after[name].double() - before[name]).square().sum()) for name in after))
    size = math.sqrt(sum(float(p.double().square().sum()) for p in after.values()))
    assert len(after) == 8 and run.curve.update_ratio.iloc[-1] == pytest.approx(moved / size, rel=1e-4)
    assert run.curve.update_ratio.notna().all()


def test_the_update_ratio_takes_beta2_and_multipliers_as_the_optimizer_did():
    model, steps = es.Model(width=32, depth=1, head_dim=16, context=32), 10
    of = recipe(steps, model=model, parametrization=es.MuP(base_width=16, eps="scaled"),
                optimizer=es.AdamW(weight_decay=0.0, eps=1e-3), beta2_changes=((6 * BATCH, 0.8),))
    stack = SlotStack(of, prepare(CORPUS))
    stack.load(0, of, None)
    found, wanted = [], []
    for step in range(steps):
        if step == 6:
            stack.set_beta2(0, step)
        before = {name: p.detach().double().clone() for name, p in stack.params.items() if role_of(name) == "hidden"}
        stack.train(of.lr()[None, step : step + 1])
        moved = sum(float((stack.params[name].detach().double() - was).square().sum()) for name, was in before.items())
        wanted.append(math.sqrt(moved / sum(float(stack.params[name].detach().double().square().sum()) for name in before)))
        found.append(slot_features(stack, [0])[0][COLUMNS.index("update_ratio")])
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_the_update_ratio_of_known_moments_has_its_closed_form():
    of = recipe(4, parametrization=es.SP(), optimizer=es.AdamW(beta1=0.9, beta2=0.95, eps=1e-12))
    table = numbers(of.parametrization, of.model, CORPUS.vocab)
    ones = {name: torch.full(row.shape, 2.0) for name, row in table.items()}
    m, v = ({name: bias * p for name, p in ones.items()} for bias in (1 - 0.9**3, (1 - 0.95**3) * 2))  # m̂ = 2, √v̂ = 2
    assert update_ratio(ones, m, v, table, of, 3) == pytest.approx(float(of.lr()[2]) / 2, rel=1e-6)


def test_logging_changes_neither_id_nor_bit(straight, tmp_path):
    (plain,) = es.run([BRANCH], store=tmp_path, **FAST)
    seen, columns = straight(BRANCH), list(LOGGED_COLUMNS)
    assert plain.run_id == seen.run_id and plain.val_loss == seen.val_loss
    assert plain.curve.drop(columns=columns).equals(seen.curve.drop(columns=columns)) and plain.curve[columns].isna().all(axis=None)
    assert (plain.curve[columns].dtypes == np.float64).all() and (seen.curve[columns].dtypes == np.float64).all()
    ours, theirs = plain.model().parameters_by_name(), seen.model().parameters_by_name()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("layout", [
    pytest.param(FAST, id="inline"), pytest.param(FAST | dict(slots=3), id="stack"),
    pytest.param(dict(progress=False, workers=2), id="workers", marks=pytest.mark.slow)])
def test_branches_log_what_straight_runs_do_and_each_its_own_end(layout, straight, tmp_path):
    early = recipe(8)  # ends on the trunk's way, where norms are due and features are not
    runs = es.run([TRUNK, BRANCH, early, recipe(22, peak_lr=2**-7, seed=1)], store=tmp_path, observe=BOTH, **layout)
    for run in runs:
        assert_same_curve(run, straight(run.recipe))
    assert logged(runs[0]).index.tolist() == [5, 10, 15, 20, 22] and logged(runs[2]).index.tolist() == [5, 8]
    assert logged(runs[0], LOGS["norms"]).index.tolist() == [4, 8, 12, 16, 20, 22]


def test_an_interrupted_run_goes_on_with_what_it_logged(straight, tmp_path):
    with interrupted_after(12):
        es.run([BRANCH], store=tmp_path, observe=BOTH, snapshot_seconds=0.0, **FAST)
    at = max(meta["step"] for meta in Store(tmp_path).stored_nodes(BRANCH.trunk_id, BOTH).values())
    stopped = es.run([recipe(at)], store=tmp_path, observe=BOTH, **FAST)[0]  # ends with a snapshot: not a step is left
    assert_same_curve(stopped, straight(recipe(at)))
    (run,) = es.run([BRANCH], store=tmp_path, observe=BOTH, snapshot_seconds=0.0, **FAST)
    assert_same_curve(run, straight(BRANCH))


def test_a_run_beside_a_sweep_and_those_after_it_tell_what_straight_ones_do(straight, tmp_path):
    es.run([recipe(8)], store=tmp_path, observe=BOTH, **FAST)
    (beside,) = es.run([BRANCH], store=tmp_path, observe=BOTH, beside=True, **FAST)  # from the state after 8, packed with its curve
    assert_same_curve(beside, straight(BRANCH))
    (after,) = es.run([TRUNK], store=tmp_path, observe=BOTH, **FAST)
    assert_same_curve(after, straight(TRUNK))


def test_a_run_that_was_not_logged_so_is_trained_again_and_only_then(tmp_path, monkeypatch):
    steps = counted(monkeypatch)
    for observe, trained in ((Observe(), 13), (OBSERVE, 26), (OBSERVE, 26), (Observe(), 26), (BOTH, 39), (OBSERVE, 39),
                             (es.Observe(features_every_tokens=4 * BATCH), 52)):
        (run,) = es.run([recipe(13)], store=tmp_path, observe=observe, **FAST)
        assert sum(steps) == trained
    assert logged(run).index.tolist() == [4, 8, 12, 13]


def test_a_store_from_before_there_were_features_is_read_and_gone_on_with(tmp_path):
    (trunk,) = es.run([TRUNK], store=tmp_path, **FAST)
    for path in tmp_path.glob(".nodes/*/*/meta.json"):
        write_json(path, {key: told for key, told in read_json(path).items() if key != "features_every_tokens"})
    (run,) = es.run([recipe(26)], store=tmp_path, **FAST)
    assert run.curve.train_loss[:22].equals(trunk.curve.train_loss) and run.curve[COLUMNS].isna().all(axis=None)


def test_a_diverged_run_keeps_what_it_logged_and_its_neighbours_theirs(straight, tmp_path):
    wild = recipe(22, peak_lr=1e30, schedule=es.Constant(warmup_steps=0), optimizer=es.AdamW(clip_norm=None), seed=9)
    runs = es.run([wild, BRANCH], store=tmp_path, observe=es.Observe(features_every_tokens=BATCH), slots=2, **FAST)
    assert [run.status for run in runs] == ["diverged", "done"]
    last = runs[0].curve.iloc[-1]
    assert np.isnan(last.train_loss) and last[COLUMNS].isna().all()
    assert runs[0].curve.update_ratio.iloc[:-1].notna().all() and len(runs[0].curve) > 1
    pd.testing.assert_frame_equal(logged(runs[1]).loc[[5, 10, 15, 20, 22]], logged(straight(BRANCH)), check_exact=True)


@pytest.mark.parametrize("mixture", [None, es.Mixture(4, 2)], ids=["dense", "mixture"])
def test_slots_are_logged_as_each_alone_is_bit_for_bit(mixture):
    of = recipe(model=es.Model(width=32, depth=2, head_dim=16, context=32, mixture=mixture))
    stacked = SlotStack(of, prepare(CORPUS), slots=3)
    for slot in range(3):
        stacked.load(slot, of.replace(seed=slot), None)
    stacked.train(np.full((3, 4), 2**-6))
    together = slot_features(stacked, [2, 0, 1])
    for slot, found in zip((2, 0, 1), together, strict=True):
        alone = SlotStack(of, prepare(CORPUS))
        alone.load(0, of.replace(seed=slot), None)
        alone.train(np.full((1, 4), 2**-6))
        assert np.array_equal(slot_features(alone, [0])[0], found, equal_nan=True)
    assert together[0] != together[1]


def test_the_probe_is_2048_validation_tokens_at_most_and_sequences_longer_than_that_are_cut():
    assert torch.equal(probe_tokens(CORPUS, 32), probe()) and probe().shape == (64, 32)
    assert probe_tokens(CORPUS, 4096).shape == (1, 2048) and probe_tokens(CORPUS, 700).shape == (2, 700)
    assert torch.equal(probe_tokens(CORPUS, 4096)[0], torch.from_numpy(prepare(CORPUS).validation[:2048].astype(np.int64)))


def test_parts_of_the_probe_give_what_all_of_it_does(monkeypatch):
    params, by = init_parameters(MODEL, CORPUS.vocab, es.SP(init_std=0.1), 0), scalars(es.SP(), MODEL)
    start = torch.ones(2048, 32)
    whole = features(params, start, probe(), MODEL, by)
    monkeypatch.setattr("etastar.engine.feature_log.HELD_BYTES", 2**18)  # 16 sequences
    parts = features(params, start, probe(), MODEL, by)
    assert whole.keys() == parts.keys() == set(DENSE) - {"update_ratio"}
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-6, atol=0)


def test_the_effective_rank_is_the_width_of_an_even_cloud_one_of_a_line_and_exp_entropy_between():
    even = torch.cat([torch.eye(6), -torch.eye(6)]) + 3.0  # the mean is taken out
    assert effective_rank(even).item() == pytest.approx(6)
    assert effective_rank(torch.arange(5.0)[:, None] * torch.tensor([[1.0, 2.0, -1.0]])).item() == pytest.approx(1)
    uneven = even - 3.0
    uneven[:, 0] *= 3  # shares of the variance 9/14 and five of 1/14
    wanted = math.exp(9 / 14 * math.log(14 / 9) + 5 / 14 * math.log(14))
    assert effective_rank(uneven).item() == pytest.approx(wanted)
    wide = torch.cat([uneven, torch.zeros(12, 40)], dim=1)  # fewer tokens than units
    assert effective_rank(wide).item() == pytest.approx(wanted)
    assert math.isnan(effective_rank(torch.ones(5, 3))) and math.isnan(effective_rank(torch.full((5, 3), math.nan)))


def test_the_load_imbalance_is_one_where_choices_are_even_and_the_experts_over_the_chosen_where_all_choose_alike():
    model = es.Model(width=32, depth=1, head_dim=16, mixture=es.Mixture(4, 2))
    alike, even = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 8), torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]] * 4)
    assert imbalance(alike, model).item() == 2.0 and imbalance(even, model).item() == 1.0
    assert imbalance(torch.cat([alike, even]), model).item() == 1.5


def test_a_mixtures_features_have_the_imbalance_of_its_worst_layer():
    model = es.Model(width=32, depth=2, head_dim=16, context=32, mixture=es.Mixture(4, 1))
    shapes = parameter_shapes(model, CORPUS.vocab)
    params = {name: torch.ones(shape) if role_of(name) == "norm" else torch.randn(shape) / 8 for name, shape in shapes.items()}
    params["layers.1.router"].zero_()
    found = features(params, torch.ones(2048, 32), probe(), model, scalars(es.SP(), MODEL))
    assert found["load_imbalance"].item() == 4.0  # a router of zeros sends every token to one expert
    assert found.keys() == set(COLUMNS) - {"update_ratio"}


def test_a_stretch_that_is_passed_keeps_of_its_last_row_what_was_due():
    frame = with_logged(pd.DataFrame({"step": [4, 5], "tokens": [4 * BATCH, 5 * BATCH]}),
                        {step: dict.fromkeys(LOGGED_COLUMNS, float(step)) for step in (4, 5)})
    kept = passed(frame.copy(), BOTH)
    assert kept.loc[0, list(LOGGED_COLUMNS)].eq(4).all() and kept.loc[1, COLUMNS].eq(5).all()
    assert kept.loc[1, list(LOGS["norms"])].isna().all() and frame.loc[1, "norm_hidden"] == 5
    assert passed(pd.DataFrame(), BOTH).empty
    assert with_logged(frame[["step"]], {})[COLUMNS].isna().all(axis=None)


def test_features_are_due_as_other_cadences_are_and_part_of_what_is_covered():
    with pytest.raises(ValueError, match="features_every_tokens must be at least 1; got 0"):
        es.Observe(features_every_tokens=0)
    assert [step for step in range(1, 13) if OBSERVE.log_due("features", step, 2 * BATCH)] == [3, 5, 8, 10]
    assert not any(OBSERVE.log_due("norms", step, 2 * BATCH) for step in range(13))
    assert OBSERVE.logs == ("features",) and BOTH.logs == ("norms", "features") and es.Observe().logs == ()
    assert OBSERVE.covers(es.Observe()) and OBSERVE.covers(OBSERVE) and not es.Observe().covers(OBSERVE)
    assert BOTH.covers(OBSERVE) and not OBSERVE.covers(BOTH) and not es.Observe(features_every_tokens=BATCH).covers(OBSERVE)
    assert es.Observe.from_meta({"kind": "end", "val_every_tokens": 7}).features_every_tokens is None


def test_a_sweep_tells_the_time_spent_on_features(tmp_path):
    es.run([TRUNK], store=tmp_path, observe=OBSERVE, **FAST)
    line = pd.read_json(tmp_path / "sweeps.jsonl", lines=True)
    assert line.features[0] > 0 and "norms" not in line
