"""What every law says for one run, and `etastar recommend`."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from etastar import cli, plots
from etastar.analysis.laws import format_advice, laws, over_horizon, published_models, recommend
from etastar.analysis.laws.models import MODELS

RUN = {"params": 1.3e9, "horizon_tokens": 100e9, "batch_tokens": 2e6}


def value(frame, law, quantity="peak_lr", column="value"):
    return frame.set_index(["law", "quantity"]).loc[(law, quantity), column]


def test_laws_of_standard_parametrization_are_not_mixed_with_mup():
    sp, mup = recommend(**RUN), recommend(**RUN, parametrization="mup", width=2048, base_width=256)
    rates = [set(f.loc[f["applies"] & (f["quantity"] == "peak_lr"), "law"]) for f in (sp, mup)]
    assert rates == [{"deepseek", "steplaw", "kaplan", "porian"}, {"power", "minicpm"}]
    assert value(sp, "power", column="why_not") == "a μP base rate, not one of parametrization 'sp'"
    assert value(sp, "steplaw", column="hidden_lr") == value(sp, "steplaw") == pytest.approx(1.79 * 1.3e9**-0.713 * 100e9**0.307)


def test_mup_laws_give_the_base_rate_and_that_of_hidden_matrices():
    mup = recommend(**RUN, parametrization="mup", width=2048, base_width=256)
    assert value(mup, "power") == pytest.approx(2e6 / 4096 * 4.6 * 100e9**-0.51)
    assert value(mup, "power", column="hidden_lr") == pytest.approx(value(mup, "power") / 8)
    assert value(mup, "minicpm", column="hidden_lr") == pytest.approx(0.01 / 8)
    without = recommend(**RUN, parametrization="mup", width=2048)
    assert value(without, "power", column="hidden_lr") == pytest.approx(value(mup, "power") / 8)  # the law's own base width
    assert math.isnan(value(without, "minicpm", column="hidden_lr"))
    other = recommend(**RUN, parametrization="mup", width=2048, base_width=512)
    assert any("its base width is 256, yours 512" in text for text in value(other, "power", column="warnings"))


def test_every_law_has_a_row_and_those_that_do_not_apply_say_why():
    frame = recommend(**RUN)
    assert set(frame["law"]) == set(laws)
    assert (frame.loc[~frame["applies"], "why_not"] != "").all() and (frame.loc[frame["applies"], "why_not"] == "").all()
    assert frame.loc[~frame["applies"], "value"].isna().all() and (frame.loc[frame["applies"], "value"] > 0).all()
    assert "lr_ratio" in value(frame, "fitting", column="why_not") and value(frame, "minicpm", "batch_tokens", "why_not") == "needs loss"
    assert "needs horizon_tokens, batch_sequences" in value(recommend(1e9, 1e10, parametrization="mup"), "power", column="why_not")


def test_the_spread_is_the_greatest_over_the_least_rate_that_applies():
    frame = recommend(**RUN)
    rates = [value(frame, name) for name in ("deepseek", "steplaw", "kaplan", "porian")]
    assert frame.attrs["spread"] == pytest.approx(max(rates) / min(rates)) and frame.attrs["spread"] == pytest.approx(6.22, abs=0.01)
    ends = [value(frame, name, "batch_tokens") for name in ("power_lines", "deepseek")]
    assert frame.attrs["batch_spread"] == pytest.approx(ends[1] / ends[0])
    assert math.isnan(recommend(1.3e9, 100e9, parametrization="mup").attrs["spread"])  # MiniCPM alone


def test_extrapolation_counts_what_is_not_in_the_formula_too():
    frame = recommend(**RUN, parametrization="mup")
    assert value(frame, "power", column="extrapolation") == pytest.approx(1.3e9 / 121e6)
    assert any("params=1.3e+09 is 10.7 times beyond" in text for text in value(frame, "power", column="warnings"))
    inside = recommend(5e8, 10e9, 5e5, schedule="cosine")
    assert value(inside, "steplaw", column="extrapolation") == 1 and value(inside, "steplaw", column="warnings") == ()
    assert math.isnan(value(inside, "kaplan", column="extrapolation"))
    untold = recommend(1e8, 10e9, 5e5, parametrization="mup")  # MiniCPM: sizes are told, horizons are not
    assert math.isnan(value(untold, "minicpm", column="extrapolation"))


def test_another_schedule_batch_and_count_of_parameters_are_warned_of():
    frame = recommend(1e9, 50e9, 1e5)
    assert any("fitted under cosine ending at 1e-5" in text for text in value(frame, "steplaw", column="warnings"))
    assert any("fitted together with the law's own batch" in text for text in value(frame, "steplaw", column="warnings"))
    assert any("counted with the output head" in text for text in value(frame, "porian", column="warnings"))


def test_width_depth_and_context_make_the_compute_exact():
    exact = recommend(7e9, 2e12, width=4096, depth=30, context=4096, schedule="multistep")
    assert f"{value(exact, 'deepseek'):.3g}" == "0.000425"
    assert any("6·N·D" in t for t in value(recommend(7e9, 2e12), "deepseek", column="warnings"))
    assert not any("6·N·D" in t for t in value(exact, "deepseek", column="warnings"))


def test_under_the_power_schedule_its_cap_is_told_and_not_ranked_with_peaks():
    frame = recommend(**RUN, schedule="power", parametrization="mup", width=2048)
    assert value(frame, "power", "eta_max") == 0.02 and value(frame, "power", "eta_max", "hidden_lr") == 0.02 / 8
    late = 2e6 / 4096 * 4 * 90e9**-0.51
    assert f"{late:.4g} after 90 %" in value(frame, "power", "eta_max", "note") and math.isnan(frame.attrs["spread"])


def test_weight_decay_makes_a_rate_of_the_timescale_law():
    product = value(recommend(**RUN), "power_lines", "lr_times_weight_decay")
    assert product == pytest.approx(2e6 / (100e9 * 1.084 * (100 / 1.3) ** -0.527))
    assert value(recommend(**RUN, weight_decay=0.1), "power_lines", "peak_lr_at_weight_decay") == pytest.approx(product / 0.1)


def test_other_optimizers_have_laws_of_their_own():
    muon = recommend(3e8, 20e9, 5e5, optimizer="muon")
    assert set(muon.loc[muon["applies"], "law"]) == {"ling_moe"}
    assert value(muon, "ling_moe") == pytest.approx(0.8343 * (6 * 3e8 * 20e9) ** -0.1385)  # dense: all experts are active
    experts = recommend(3e8, 20e9, 5e5, optimizer="muon", params_active=3e8, params_total=4.8e9)
    assert value(experts, "ling_moe") == pytest.approx(value(muon, "ling_moe") * (1 / 16) ** 0.1361)
    scion = recommend(69e6, 2**33, 2**19, optimizer="scion", parametrization="norm", schedule="constant")
    assert set(scion.loc[scion["applies"], "law"]) == {"scion"} and math.log2(value(scion, "scion")) == pytest.approx(-4.34, abs=0.005)


def test_experts_go_to_the_laws_as_each_counts_them():
    moe = recommend(1.3e9, 100e9, 2e6, params_active=1.3e9, params_total=12e9)
    assert value(moe, "steplaw") == pytest.approx(1.79 * 12e9**-0.713 * 100e9**0.307)
    assert value(moe, "deepseek") == pytest.approx(value(recommend(**RUN), "deepseek"))


@pytest.mark.parametrize("wrong, said", [
    ({"schedule": "wds"}, "schedule must be one of wsd, cosine"), ({"parametrization": "µp"}, "parametrization must be one of sp, mup"),
    ({"params": -1}, "params=-1 must be positive"), ({"params_active": 1e9}, "needs both params_active and params_total"),
    ({"params_active": 2e9, "params_total": 1e9}, "exceeds params_total"),
    ({"horizon_tokens": 100}, "horizon_tokens=100 looks like billions")])
def test_bad_input_is_refused_by_name(wrong, said):
    with pytest.raises(ValueError, match=said):
        recommend(**(RUN | wrong))


def test_values_that_look_like_another_unit_head_the_text():
    text = format_advice(recommend(1300, 100e9, 512))
    assert text.splitlines()[0] == "beware: params=1300 looks like millions: 1.3e+09 meant?"
    assert text.splitlines()[1].startswith("beware: batch_tokens=512 looks like sequences")


def test_published_models_are_near_what_their_own_law_says():
    frame = published_models().set_index(["model", "quantity"])
    assert len(frame) == 10 and frame["used"].gt(0).all() and frame["source"].str.contains("arXiv").all()
    rows = {(m, q): (frame.loc[(m, q), "used"], f"{frame.loc[(m, q), 'own']:.3g}") for m, q in frame.index}
    assert rows["DeepSeek 7B", "peak_lr"] == (4.2e-4, "0.000425") and rows["DeepSeek 67B", "peak_lr"] == (3.2e-4, "0.000312")
    batches = frame.loc[("DeepSeek 67B", "batch_tokens"), ["used", "own"]] / 4096
    assert [round(batch) for batch in batches] == [4608, 5043]
    assert rows["PowerLM-3B", "peak_lr"][1] == f"{1024 * 4.6 * 1.25e12**-0.51:.3g}" and rows["MiniCPM-2.4B", "peak_lr"] == (0.01, "0.01")
    assert (frame.loc[("PowerLM-3B", "peak_lr"), ["deepseek", "steplaw", "kaplan"]].isna()).all()
    assert np.isclose(frame.loc[("Step Law 1B", "peak_lr"), "own"], 1.79 * 1_073_741_824**-0.713 * 20e9**0.307)


def test_the_rate_powerlm_used_is_that_of_its_schedule():
    import etastar as es

    model = next(m for m in MODELS if m.name == "PowerLM-3B")
    assert es.Power().rate_at(1e12, batch_tokens=model.used_batch_tokens, eta_max=0.02) == pytest.approx(model.used_lr, rel=1e-4)


@pytest.mark.archive
def test_what_step_law_used_is_the_best_of_its_grid(skip_if_not_fetched):
    from etastar.archives import locate
    from etastar.archives.fetch import NotFetched
    from etastar.archives.manifest import find_archive

    with skip_if_not_fetched():
        here = locate(find_archive("steplaw")).paths
        if not (path := next((at for name, at in here.items() if name.endswith("dense_lr_bs_loss.csv")), None)):
            raise NotFetched("steplaw", "nothing in ETASTAR_MIRROR or the cache")
    model = next(m for m in MODELS if m.name == "Step Law 1B")
    runs = pd.read_csv(path).query("N == @model.settings['params'] and D == @model.settings['horizon_tokens']")
    best = runs.loc[runs["smooth loss"].idxmin()]
    assert len(runs) == 118 and best["lr"] == pytest.approx(model.used_lr, rel=1e-3) and best["bs"] * 2048 == model.used_batch_tokens


def test_the_command_prints_the_table_and_closes_with_the_spread(capsys):
    words = ["recommend", "--params", "1.3e9", "--horizon-tokens", "100e9", "--batch-tokens", "2e6"]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "4 peak learning rates span 6.22-fold: 0.0003115 (kaplan) … 0.001937 (porian)"
    assert "4 batches span" in lines[-2] and any(line.split()[:3] == ["steplaw", "peak_lr", "0.001354"] for line in lines)


def test_the_command_speaks_json_and_mup(capsys):
    words = ["recommend", "--params", "1.3e9", "--horizon-tokens", "100e9", "--batch-tokens", "2e6", "--parametrization", "mup",
             "--width", "2048", "--base-width", "256", "--json"]
    assert cli.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    power = next(row for row in told["laws"] if row["law"] == "power" and row["quantity"] == "peak_lr")
    assert power["hidden_lr"] == pytest.approx(power["value"] / 8) and told["spread"] == pytest.approx(0.01 / power["value"])
    assert cli.main(["recommend", "--params", "1e9", "--horizon-tokens", "1e10", "--schedule", "nope"]) == 2
    assert "schedule must be one of" in capsys.readouterr().err


def test_lines_are_solid_where_a_law_was_fitted_dashed_beyond_and_dotted_where_no_range_is_told():
    frame = over_horizon(5e8, [1e9, 10e9, 50e9, 1e12], 5e5)
    fig = plots.law_lines(frame)
    colours = {line.get_label(): line.get_color() for line in fig.axes[0].lines if not line.get_label().startswith("_")}

    def styles(law):
        return [line.get_linestyle() for line in fig.axes[0].lines if line.get_color() == colours[law] and len(line.get_xdata()) == 2]

    assert styles("steplaw") == ["--", "-", "--"] and styles("kaplan") == [":"] * 3 and len(fig.axes) == 2


def test_the_spread_is_drawn_with_filled_points_inside_the_range():
    frame = recommend(5e8, 10e9, 5e5, schedule="cosine")
    ax = plots.recommendation(frame).axes[0]
    filled = [line.get_markerfacecolor() != "white" for line in ax.lines]
    said = frame[frame["applies"] & (frame["quantity"] == "peak_lr")].sort_values("value")
    assert filled == list(said["extrapolation"] == 1) and sum(filled) == 1
    with pytest.raises(ValueError, match="why_not"):
        plots.recommendation(recommend(1e9, 1e10, parametrization="norm"))
