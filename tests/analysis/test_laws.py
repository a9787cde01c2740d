"""The published laws against printed and published numbers, their units, ranges and refusals."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import etastar as es
from etastar.analysis.laws import LawWarning, law_table, laws, lr_and_batch

NAMES = {"power", "deepseek", "minicpm", "steplaw", "kaplan", "bjorck", "porian", "fitting", "scion", "ling_moe", "power_lines"}
SHAPE_7B = {"depth": 30, "width": 4096, "context": 4096, "horizon_tokens": 2e12}
SHAPE_67B = {"depth": 95, "width": 8192, "context": 4096, "horizon_tokens": 2e12}


def quietly(law, quantity, **given):
    return law.answer(quantity, **given).value


def test_the_laws_are_a_read_only_mapping_by_name():
    assert set(laws) == NAMES and all(law.name == name for name, law in laws.items())
    with pytest.raises(TypeError):
        laws["power"] = None
    with pytest.raises(TypeError):
        laws["power"].formulas["lr"].exponents["horizon_tokens"] = 0


@pytest.mark.parametrize("sequences, tokens, rate", [
    (128, 2e9, 0.0106), (128, 256e9, 0.00090), (16, 128e9, 0.00016), (512, 128e9, 0.0051), (1024, 10e12, 0.001104), (1024, 1e12, 0.00357)])
def test_the_power_law_gives_the_published_optima_to_their_digits(sequences, tokens, rate):
    said = quietly(laws["power"], "lr", batch_sequences=sequences, horizon_tokens=tokens)
    assert said == pytest.approx(rate, rel=0.5 * 10 ** -(len(f"{rate:g}".lstrip("0.")) - 1))


def test_the_power_law_takes_tokens_by_sequences_of_4096_and_says_so():
    exact = quietly(laws["power"], "lr", batch_sequences=128, horizon_tokens=32e9)
    with pytest.warns(LawWarning, match="batch_tokens / 4096"):
        assert laws["power"].lr(batch_tokens=128 * 4096, horizon_tokens=32e9) == pytest.approx(exact, rel=1e-12)


def test_the_three_sizes_of_the_power_paper_make_low_and_high():
    told = laws["power"].answer("lr", batch_sequences=1, horizon_tokens=32e9)
    assert (told.low, told.high) == (pytest.approx(4.86 * 32e9**-0.513), pytest.approx(4.46 * 32e9**-0.508))
    assert told.low < told.value < told.high < 1.04 * told.low and told.extrapolation == 16  # one sequence where 16 were the least


@pytest.mark.parametrize("sequences, tokens, rate", [
    (16, 1e9, 0.001645), (32, 1e9, 0.003290), (128, 1e9, 0.013160), (128, 2e9, 0.0092416), (128, 32e9, 0.0022472), (128, 128e9, 0.0011081),
    (512, 1e9, 0.02), (512, 128e9, 0.0044325), (1024, 0.9e12, 0.0032787), (1024, 1e12, 0.0031071), (1024, 2.5e12, 0.0019472),
    (1024, 1e13, 0.00096020)])
def test_the_power_schedule_gives_the_published_vectors(sequences, tokens, rate):
    said = es.Power().rate_at(tokens, batch_tokens=sequences * 4096, eta_max=0.02)
    assert f"{said:.5g}" == f"{rate:.5g}" or said == pytest.approx(rate, abs=5e-7)


@pytest.mark.parametrize("sequences, last_capped", [(16, 7.5e6), (32, 29e6), (64, 113e6), (128, 440e6), (256, 1.71e9), (512, 6.67e9),
                                                    (1024, 26.0e9)])
def test_the_power_schedule_leaves_its_cap_where_published(sequences, last_capped):
    before, after = es.Power().rate_at([0.98 * last_capped, 1.02 * last_capped], batch_tokens=sequences * 4096, eta_max=0.02)
    assert before == 0.02 > after


def test_a_power_schedule_in_torch_takes_the_rates_of_numpy():
    import torch

    schedule = es.Power(warmup_steps=20, cooldown_fraction=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    scheduler = es.to_lambda_lr(schedule, optimizer, 300, batch_tokens=16 * 4096)
    applied = []
    for _ in range(300):
        applied.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = schedule.lr(300, peak_lr=0.02, batch_tokens=16 * 4096)
    assert np.array_equal(applied, rates)
    assert rates[200] == pytest.approx(16 * 4 * (201 * 16 * 4096) ** -0.51) and rates[200] < 0.02


@pytest.mark.parametrize("shape, rate, sequences", [(SHAPE_7B, "0.000425", 2252), (SHAPE_67B, "0.000312", 5043)])
def test_deepseek_gives_its_own_models_their_published_hyperparameters(shape, rate, sequences):
    assert f"{quietly(laws['deepseek'], 'lr', **shape):.3g}" == rate
    assert round(quietly(laws["deepseek"], "batch", **shape) / 4096) == sequences


@pytest.mark.parametrize("compute, rate, batch", [
    (1e17, 2.34e-3, 106e3), (1e18, 1.75e-3, 226e3), (1e19, 1.31e-3, 479e3), (1e20, 9.9e-4, 1.02e6)])
def test_deepseek_by_compute_gives_the_published_table(compute, rate, batch):
    assert quietly(laws["deepseek"], "lr", compute=compute) == pytest.approx(rate, rel=5e-3)
    assert quietly(laws["deepseek"], "batch", compute=compute) == pytest.approx(batch, rel=5e-3)


def test_deepseek_says_that_six_n_d_is_not_its_own_compute():
    with pytest.warns(LawWarning, match=r"6·N·D"):
        said = laws["deepseek"].lr(params=1e9, horizon_tokens=1e9)
    assert said == pytest.approx(0.3118 * 6e18**-0.125)


@pytest.mark.parametrize("loss, batch", [(2.5, 3.98e6), (3.0, 1.28e6), (3.5, 0.487e6), (4.0, 0.212e6), (4.5, 0.102e6)])
def test_minicpm_gives_the_published_batches(loss, batch):
    assert laws["minicpm"].batch(loss=loss) == pytest.approx(batch, rel=5e-3)


def test_minicpm_has_one_base_rate_for_all_sizes():
    assert laws["minicpm"].lr() == 0.01 and laws["minicpm"].parametrization == "mup"


def test_kaplan_gives_the_published_rate_and_ends_where_it_would_be_negative():
    assert f"{laws['kaplan'].lr(params=429e6):.3g}" == "0.000466"
    with pytest.raises(ValueError, match="not positive"):
        laws["kaplan"].lr(params=2e10)
    with pytest.raises(ValueError, match="could not be verified"):
        laws["kaplan"].batch(loss=3.0)


def test_step_law_has_its_printed_constants():
    inside = {"params": 1e9, "horizon_tokens": 1e10}
    assert laws["steplaw"].lr(**inside) == pytest.approx(1.79 * 1e9**-0.713 * 1e10**0.307)
    assert laws["steplaw"].batch(horizon_tokens=1e10) == pytest.approx(0.58 * 1e10**0.571)


def test_step_law_counts_all_experts_and_refuses_the_active_ones():
    assert quietly(laws["steplaw"], "lr", params_total=1e9, horizon_tokens=1e10) == laws["steplaw"].lr(params=1e9, horizon_tokens=1e10)
    with pytest.raises(ValueError, match=r"takes \(params_total, horizon_tokens\) or \(params, horizon_tokens\); got params_active"):
        laws["steplaw"].lr(params_active=1e9, horizon_tokens=1e10)


def test_porian_has_the_constants_of_the_table_it_is_known_from():
    assert laws["porian"].lr(params=1e9) == pytest.approx(3.7 * 1e9**-0.36)
    assert laws["porian"].batch(params=1e9) == pytest.approx(0.7576 * 1e9**0.703)


def test_ling_gives_its_held_out_point_within_the_rounding_of_its_constants():
    law, experts = laws["ling_moe"], 1 / 64
    assert quietly(law, "lr", compute=3e20, active_fraction=experts) == pytest.approx(6.92e-4, rel=3e-3)
    assert quietly(law, "batch", horizon_tokens=159e9, active_fraction=experts) == pytest.approx(5.84e6, rel=3e-3)
    assert law.answer("batch", horizon_tokens=159e9, active_fraction=experts).extrapolation == 2
    guessed = law.answer("lr", params_active=324e6, params_total=12e9, horizon_tokens=159e9)
    assert any("params_active / params_total" in text for text in guessed.warnings)


def test_power_lines_gives_the_published_batch_and_timescale():
    law = laws["power_lines"]
    assert law.batch(horizon_tokens=40e9) == pytest.approx(0.721e6, rel=2e-3)
    assert law.tau(params=1e9, horizon_tokens=20e9) == pytest.approx(1.084 * 20**-0.527)


@given(st.floats(1e8, 3e9), st.floats(1e9, 1e12), st.floats(1e5, 1e7), st.floats(1e-4, 1e-1))
def test_the_decay_of_power_lines_has_its_timescale(params, tokens, batch, rate):
    law, run = laws["power_lines"], {"params": params, "horizon_tokens": tokens}
    decay = quietly(law, "weight_decay", **run, batch_tokens=batch, peak_lr=rate)
    assert batch / (rate * decay * tokens) == pytest.approx(quietly(law, "tau", **run), rel=1e-9)


def test_the_scion_rule_meets_its_worked_example_within_a_quarter_octave():
    said = quietly(laws["scion"], "lr", horizon_tokens=2**33, batch_tokens=128 * 4096)
    assert math.log2(said) == pytest.approx(-4.34, abs=0.005) and abs(math.log2(said) + 4.5) < 0.25
    assert quietly(laws["scion"], "batch", horizon_tokens=2**33) == pytest.approx(0.009 * 2 ** (33 * 0.45) * 4096)


@pytest.mark.parametrize("name, changes, ratio", [
    ("fitting", {"horizon_tokens": (1e9, 4e9)}, 0.615), ("fitting", {"horizon_tokens": (1e9, 1e10)}, 0.446),
    ("fitting", {"params": (1e8, 1e9)}, 0.600), ("bjorck", {"horizon_tokens": (1e9, 1e10)}, 0.479),
    ("bjorck", {"params": (1e8, 1e9)}, 0.589)])
def test_ratios_of_laws_without_units_are_those_of_their_exponents(name, changes, ratio):
    assert round(laws[name].lr_ratio(**changes), 3) == ratio


@pytest.mark.parametrize("name", ["fitting", "bjorck"])
def test_a_law_without_units_refuses_a_rate_and_names_what_to_ask(name):
    with pytest.raises(ValueError, match="lr_ratio"):
        laws[name].lr(params=1e9, horizon_tokens=1e10)
    with pytest.raises(ValueError, match="lr_ratio"):
        laws[name].lr(params_active=1e9)


@given(st.floats(2.2e8, 1e9), st.floats(2.2e8, 1e9), st.floats(5e9, 9e10), st.floats(5e9, 9e10))
def test_a_ratio_is_that_of_the_two_rates(params, other_params, tokens, other_tokens):
    law = laws["steplaw"]
    rates = [law.lr(params=n, horizon_tokens=d) for n, d in ((params, tokens), (other_params, other_tokens))]
    assert law.lr_ratio(params=(params, other_params), horizon_tokens=(tokens, other_tokens)) == pytest.approx(rates[1] / rates[0])
    assert laws["kaplan"].lr_ratio(params=(params, other_params)) == pytest.approx(
        laws["kaplan"].lr(params=other_params) / laws["kaplan"].lr(params=params))


def test_a_ratio_takes_the_batch_in_tokens_or_sequences_and_refuses_what_is_no_pair():
    assert quiet_ratio(batch_tokens=(2**19, 2**20)) == quiet_ratio(batch_sequences=(128, 256)) == pytest.approx(2)
    for wrong in ({"loss": (3, 2)}, {"horizon_tokens": 1e9}, {}, {"horizon_tokens": (1e10, -1)}):
        with pytest.raises(ValueError, match="pair|positive"):
            laws["power"].lr_ratio(**wrong)
    with pytest.raises(ValueError, match="it is constant"):
        laws["minicpm"].lr_ratio(params=(1e9, 2e9))


def quiet_ratio(**changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        return laws["power"].lr_ratio(**changes)


@pytest.mark.parametrize("name, quantity, given, said", [
    ("power", "lr", {"params": 1e9}, r"takes \(horizon_tokens, batch_sequences\) or \(horizon_tokens, batch_tokens\); got params"),
    ("deepseek", "lr", {}, r"takes \(compute\) or .*; got nothing"),
    ("deepseek", "lr", {"compute": 1e18, "params": 1e9}, "takes"),
    ("power", "batch", {"horizon_tokens": 1e10}, "the batch is an input"),
    ("power_lines", "lr", {"params": 1e9}, "sets the weight decay"),
    ("deepseek", "lr", {"compute": -1.0}, "compute=-1.0 must be positive"),
    ("kaplan", "lr", {"params": math.nan}, "params=nan must be positive"),
    ("kaplan", "lr", {"params": "1e9"}, "params='1e9' must be positive")])
def test_bad_questions_are_refused_with_what_the_law_takes(name, quantity, given, said):
    with pytest.raises(ValueError, match=said):
        laws[name].answer(quantity, **given)


def test_beyond_the_range_the_factor_is_told_by_name():
    with pytest.warns(LawWarning, match=r"steplaw: params=1.074e\+10 is 10 times beyond the range fitted on, 2.147e\+08 … 1.074e\+09"):
        laws["steplaw"].lr(params=10 * 1_073_741_824, horizon_tokens=1e10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        laws["steplaw"].lr(params=1_073_741_824, horizon_tokens=4e9)
    assert laws["steplaw"].answer("lr", params=5e8, horizon_tokens=1e9).extrapolation == 4
    assert math.isnan(laws["kaplan"].answer("lr", params=5e8).extrapolation)


def test_warnings_point_at_the_line_that_asked():
    with pytest.warns(LawWarning) as caught:
        laws["deepseek"].lr(compute=1e23)
        laws["steplaw"].lr_ratio(horizon_tokens=(1e10, 1e13))
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("name, given, meant", [
    ("kaplan", {"params": 1.3}, "looks like billions: 1.3e+09"), ("kaplan", {"params": 1300}, "looks like millions: 1.3e+09"),
    ("steplaw", {"params": 1e9, "horizon_tokens": 100}, "horizon_tokens=100 looks like billions"),
    ("steplaw", {"params": 1e9, "horizon_tokens": 1e5}, "horizon_tokens=1e+05 looks like millions"),
    ("power", {"horizon_tokens": 1e11, "batch_tokens": 1024}, "looks like sequences"),
    ("power", {"horizon_tokens": 1e11, "batch_tokens": 4}, "looks like millions"),
    ("power", {"horizon_tokens": 1e11, "batch_sequences": 4194304}, "looks like tokens"), ("deepseek", {"compute": 846.0}, "PF-days")])
def test_numbers_in_another_unit_are_told_with_the_unit_meant(name, given, meant):
    assert any(meant in text for text in laws[name].answer("lr", **given).warnings)


def test_a_perplexity_in_place_of_a_loss_is_told_and_small_real_runs_are_not():
    assert any("perplexity: 3 nats" in text for text in laws["minicpm"].answer("batch", loss=20.1).warnings)
    tiny = laws["power"].answer("lr", horizon_tokens=2**20, batch_tokens=1024).warnings
    assert not any("looks like" in text for text in tiny)


def test_rates_of_hidden_matrices_are_divided_under_mup_alone():
    assert laws["power"].hidden_lr(0.01, width=2048) == 0.01 / 8 and laws["power"].hidden_lr(0.01, 2048, base_width=512) == 0.01 / 4
    assert laws["steplaw"].hidden_lr(0.01, width=2048) == 0.01
    with pytest.raises(ValueError, match="base width is not published"):
        laws["minicpm"].hidden_lr(0.01, width=2048)


def test_a_grid_asks_every_law_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = {name: lr_and_batch(name, params=429e6, horizon_tokens=40e9) for name in laws}
    assert {name for name, (lr, _) in said.items() if lr} == {"deepseek", "minicpm", "steplaw", "kaplan", "porian", "scion"}
    assert {name for name, (_, batch) in said.items() if batch} == {"deepseek", "steplaw", "porian", "power_lines", "scion"}
    assert said["steplaw"] == (pytest.approx(1.79 * 429e6**-0.713 * 40e9**0.307), pytest.approx(0.58 * 40e9**0.571))
    own_batch = 2 ** 9.8 * (0.009 * 40e9**0.45) ** 0.62 * 40e9**-0.56
    assert said["scion"][0] == pytest.approx(own_batch)


def test_a_grid_may_give_compute_and_batch():
    assert lr_and_batch("deepseek", compute=1e18)[0] == pytest.approx(0.3118 * 1e18**-0.125)
    assert lr_and_batch("power", horizon_tokens=32e9, batch_tokens=2**19) == (pytest.approx(128 * 4.6 * 32e9**-0.51), None)
    with pytest.raises(ValueError, match="no law 'nope'; there are power"):
        lr_and_batch("nope", params=1e9)
    with pytest.raises(ValueError, match="unknown argument tokens"):
        lr_and_batch("power", tokens=1e9)


def test_every_law_says_where_it_comes_from_and_what_its_numbers_mean():
    table = law_table()
    assert set(table["law"]) == NAMES
    told = table.drop(columns="takes")
    assert (told.map(lambda cell: isinstance(cell, str) and bool(cell.strip()))).all().all()
    assert laws["power"].units == {"horizon_tokens": "tokens of the whole run", "batch_tokens": "tokens a step",
                                   "batch_sequences": "sequences of 4096 tokens a step"}
    assert laws["steplaw"].units["params"] == "parameters, non-embedding; of an MoE the total"
    assert table.set_index(["law", "quantity"]).loc[("steplaw", "lr"), "fitted_on"] == (
        "params 2.147e+08 … 1.074e+09; horizon_tokens 4e+09 … 1e+11")


@pytest.mark.archive
def test_the_range_of_step_law_is_that_of_its_released_runs(skip_if_not_fetched):
    from etastar.archives import locate
    from etastar.archives.fetch import NotFetched
    from etastar.archives.manifest import find_archive

    with skip_if_not_fetched():
        here = locate(find_archive("steplaw")).paths
        if not (path := next((at for name, at in here.items() if name.endswith("dense_lr_bs_loss.csv")), None)):
            raise NotFetched("steplaw", "nothing in ETASTAR_MIRROR or the cache")
    runs = pd.read_csv(path)
    ranges = laws["steplaw"].formulas["lr"].ranges
    assert ranges == {"params": (runs["N"].min(), runs["N"].max()), "horizon_tokens": (runs["D"].min(), runs["D"].max())}
