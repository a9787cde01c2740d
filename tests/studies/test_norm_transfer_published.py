"""Archive evidence on norm transfer: on exported tables of a made-up world, without any, and what the printed numbers say by themselves."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from etastar.analysis.claims import Claim
from etastar.archives.norm_transfer import table_name, write_table
from etastar.studies import norm_transfer_published as published

START = 11.765
IDS = tuple(published.MEASURES)


def claim(name, published_value=0.0, kind="number", unit="exponent", **more):
    more = {"margin": 0.06, "rival": 9.0, "rival_name": "nothing"} | more
    return Claim(name, published.STUDY, "2510.03871", "§3", "as told", kind, "as told", ("scion",), unit, published_value, "", False,
                 {"params": 6.5e7, "horizon_tokens": 2e9}, "as told", **more)


CLAIMS = [claim("norm_invariant_scion", kind="equality", rival=0.15), claim("lr_exponent_scion", -0.281, margin=0.1),
          claim("batch_exponent_scion", 0.45, margin=0.1), claim("lr_rule_batch", 0.62), claim("lr_rule_tokens", -0.56),
          claim("norm_not_sufficient", math.nan, "direction", "nats", side="higher", smallest_effect=0.02)]


@pytest.fixture
def registered(monkeypatch):
    """Registers these claims as the study's."""
    def register(*claims):
        monkeypatch.setattr(published, "load_claims", lambda study: {c.id: c for c in claims})

    monkeypatch.delenv(published.VARIABLE, raising=False)
    register(*CLAIMS, claim("something_else"))
    return register


def world(drift=0.0, centre=7.0):
    """Logged rows of a base model whose optimum norm is 2^centre at the best batch, moved by `drift` octaves per octave of tokens, and
    whose rates and batches follow the printed rules. Losses are parabolas through the loss at initialisation."""
    rows = []
    for b in range(5, 12):
        for lr in np.arange(-11, 3.5, 0.5):
            for d in range(29, 38):
                off = b - 0.45 * d + 6.85
                best, least = centre - 0.35 * off + drift * (d - 33), 4.3 - 0.06 * (d - 33) + 0.05 * off**2
                octaves = lr - (0.62 * b - 0.56 * d + 9.8)
                if abs(octaves) > 3:
                    continue
                x = best + 0.6 * octaves
                loss = min(12.0, (START - least) / best**2 * (x - best) ** 2 + least)
                steps = 2 ** (d - b - 12)
                rows += [(steps + s, 2**b, (steps + s) * 2**b * 4096, 2.0**lr, 30, x, loss) for s in (-1, 0, 1)]
    return pd.DataFrame(rows, columns=["steps", "batch_sequences", "horizon_tokens", "peak_lr", "seed", "log2_norm", "loss"])


def test_without_exported_tables_every_registered_claim_is_untested_and_told_how_to_test(registered):
    found = {f.claim.id: f for f in published.published_findings()}
    assert set(found) == set(IDS)
    for finding in found.values():
        assert (finding.verdict, finding.evidence, finding.estimate) == ("untested", "archive", None)
        assert finding.reason.endswith("`ETASTAR_NORM_TRANSFER=FOLDER make reproduce STUDY=05_norm_transfer`")
    registered(CLAIMS[0])
    assert [f.claim.id for f in published.published_findings()] == ["norm_invariant_scion"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with the tables of a world in which everything holds, and others that must not be mixed in."""
    folder = tmp_path_factory.mktemp("exported")
    write_table(world(), folder / table_name("base", seed=30))
    write_table(world(drift=0.3).assign(momentum=0.1), folder / table_name("base", 0.1, seed=30))
    write_table(world(drift=0.3), folder / table_name("x4-width", seed=30))
    write_table(world(drift=0.15), folder / "drifting" / table_name("base", seed=30))
    return folder


def test_a_world_in_which_all_holds_is_reproduced(registered, exported, monkeypatch):
    monkeypatch.setenv(published.VARIABLE, str(exported))
    found = {f.claim.id: f for f in published.published_findings()}
    assert {i: f.verdict for i, f in found.items()} == dict.fromkeys(IDS, "reproduced")
    truth = {"norm_invariant_scion": 0, "lr_exponent_scion": -0.281, "batch_exponent_scion": 0.45, "lr_rule_batch": 0.62,
             "lr_rule_tokens": -0.56}
    for name, value in truth.items():
        assert found[name].estimate.value == pytest.approx(value, abs=0.03), name
    assert found["norm_invariant_scion"].estimate.n == 7
    # 2^37 tokens: batch 2^5 (least loss 5.212 at norm 8.68) at the norm 6.93 of batch 2^10 (least loss 4.062)
    farthest = 5.212 + (START - 5.212) / 8.68**2 * (8.68 - 6.93) ** 2 - 4.062
    assert found["norm_not_sufficient"].estimate.value == pytest.approx(farthest, abs=1e-3)
    assert found["lr_rule_batch"].estimate.n == 49
    assert "of the 69M model" in found["lr_rule_batch"].reason and "for the way of fitting" in found["lr_rule_batch"].reason


def test_a_world_whose_norm_drifts_is_a_contradiction(registered, exported):
    registered(CLAIMS[0])
    (finding,) = published.published_findings(exported / "drifting")
    assert finding.verdict == "contradicted" and finding.estimate.value == pytest.approx(0.15, abs=0.02)


def test_the_way_of_fitting_is_in_the_error(exported):
    points = published.scan_points(published.read_tables(exported))
    optima = published.optima_by_fit(points)
    estimate, spread = published.over_fits(optima, published.invariant)
    alone = published.invariant(published.norms.norm_optima(points, initial_loss=START))
    assert list(optima)[0] == "as the paper" and spread > 0 and estimate.value == alone.value
    assert estimate.se == pytest.approx(math.hypot(alone.se, spread))


def test_a_best_batch_at_the_edge_is_untested_and_other_tables_are_refused(registered, tmp_path):
    registered(CLAIMS[0])
    rows = world()
    write_table(rows[rows["batch_sequences"] >= 256], tmp_path / table_name("base", seed=30))
    (finding,) = published.published_findings(tmp_path)
    assert finding.verdict == "untested" and "best batch is at the edge of the grid" in finding.reason
    other = tmp_path / "other"
    write_table(world().assign(momentum=0.1), other / table_name("base", 0.1, seed=30))
    with pytest.raises(ValueError, match="no runs of the base model without momentum.*models base, momenta 0.1, decayed False"):
        published.published_findings(other)


# -- the printed numbers


def test_the_printed_minima_are_those_of_the_paper():
    table = published.minima().set_index(["model", "log2_horizon_tokens", "batch_sequences"])
    assert len(table) == 52 and table.index.is_unique
    for at, norm, loss in [(("base", 31, 128), 6.92, 4.40), (("base", 37, 1024), 6.95, 3.86), (("base", 31, 2048), 5.45, 5.39),
                           (("x12-width", 33, 64), 7.66, 3.55), (("x32-depth", 33, 1024), 5.08, 4.26)]:
        assert table.loc[at, ["log2_norm", "loss"]].tolist() == [norm, loss]
    row = table.loc[("base", 31, 32)]
    assert row["a"] * row["log2_norm"] ** 2 + row["b"] * row["log2_norm"] + row["c"] == pytest.approx(row["loss"])
    assert row[["a", "b"]].tolist() == pytest.approx([0.123, -1.879], abs=1e-3)  # as printed beside the curve
    assert table.groupby("model")["params"].first().to_dict() == {"base": 69e6, "x4-width": 314e6, "x12-width": 1.3e9, "x8-depth": 91e6,
                                                                "x32-depth": 168e6}


def test_every_printed_number_is_cited():
    for name in ("minima", "series", "numbers"):
        table = published._printed(name)
        assert table["place"].str.len().gt(3).all()
    assert published._printed("numbers")["name"].is_unique
    law = [published.number(n).value for n in ("lr_batch_exponent", "lr_tokens_exponent", "lr_log2_prefactor", "batch_exponent")]
    assert law == [0.62, -0.56, 9.8, 0.45]


def test_constancy_of_the_printed_minima():
    found = published.norms.constancy(published.base_minima())
    assert found.fixed["sd"].round(2).tolist() == [0.30, 0.32, 0.36, 0.42, 0.51, 0.45, 0.57] and (found.fixed["slope"] > 0.1).all()
    assert (round(found.sd, 2), found.random_share) == (0.19, 33 / 7**4) and found.random_sd[:2] == pytest.approx((0.286, 0.685), abs=1e-3)
    assert found.wander_sd == pytest.approx((0.09, 0.295, 0.52), abs=0.01)


def test_tables_say_what_the_paper_prints_and_what_follows():
    tables = published.printed_tables()
    assert {name: len(t) for name, t in tables.items()} == {"printed_minima": 52, "printed_constancy": 7, "printed_choices": 4,
                                                            "printed_exponents": 2, "printed_questions": 18}
    choices = tables["printed_choices"].set_index("batch")
    assert choices["sd"].round(2).tolist() == [0.19, 0.12, 0.07, 0.06] and choices["slope"].abs().max() < 0.02
    rate = tables["printed_exponents"].set_index("quantity").loc["rate at the best batch"]
    assert rate["scion"] < 0 < rate["steplaw"] and rate["in_errors"] == pytest.approx(-8.09, abs=0.01)


def test_questions_are_answered_with_numbers_of_the_tables():
    answers = published.questions().set_index("question")["answer"]
    for asked, told in [("Is the optimum norm constant at a fixed batch?", "rises by 0.11 to 0.21"),
                        ("Would a batch chosen at random", "1.4 % of all choices"), ("Do the optima lie", "3 of 4 do; outside: 7.29"),
                        ("Are 7.0 over horizons", "6.92 and 7.38"), ("Was log loss fitted", "a = 0.123 for the loss and 0.016 for its log"),
                        ("Was the exponent of the best rate", "= -0.281 ± 0.068"), ("Is the rate's exponent", "8.1 errors apart"),
                        ("Does the rate go as", "2.4 errors from 0.5"), ("Which sign", "3.8 times with +0.96"),
                        ("Is it enough", "one step off lose 0.079 nats"), ("One seed", "0.01, 0.04, 0.05, 0.02 nats"),
                        ("Is it constant for output RMS→∞ with momentum and decay", "slope +0.24")]:
        (answer,) = answers[answers.index.str.startswith(asked)].iloc[:1]
        assert told in answer, asked


def test_an_answer_follows_the_row_it_is_computed_from(monkeypatch):
    before, table = published.questions().set_index("question")["answer"], published._printed("minima").copy()
    table.loc[(table["log2_horizon_tokens"] == 33) & (table["model"] == "base") & (table["batch_sequences"] == 128), "log2_norm"] += 0.5
    read = published._printed
    monkeypatch.setattr(published, "_printed", lambda name: table if name == "minima" else read(name))
    after = published.questions().set_index("question")["answer"]
    changed = {q for q in after.index if after[q] != before.get(q)}
    assert len(changed) >= 6 and "outside: 7.79" in " ".join(after)


def test_figures_show_every_batch_and_horizon():
    norms, choices = published.figures().values()
    labels = [text.get_text() for text in norms.legends[0].get_texts()]
    assert [t for t in labels if t.startswith("batch ")] == [f"batch {2**k} sequences" for k in range(5, 12)]
    assert "printed band 7 ± 0.2" in labels and "(RMS→∞)" in norms.axes[0].get_ylabel()
    left, right = choices.axes
    assert len(left.get_yticklabels()) == 11 and "octaves per octave" in right.get_xlabel() and len(left.lines) == 4


def test_findings_are_of_the_papers_own_settings(registered, exported):
    registered(dataclasses.replace(CLAIMS[0], unit="octaves per octave"))
    (finding,) = published.published_findings(exported)
    assert finding.estimate.unit == "octaves per octave" and finding.verdict == "reproduced"
