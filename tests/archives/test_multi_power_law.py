"""Loss curves of arXiv 2503.12811: schedules by name, on made-up files and on the published ones."""

import numpy as np
import pytest

import etastar as es
from etastar.archives import curves, evaluations, multi_power_law


def made_up_curve(name, size=25, shift=0.0):
    rates = multi_power_law.learning_rates(name)
    steps = list(range(2176, len(rates), 2000))
    rows = "".join(f"{s},{float(rates[s] + shift)!r},{4 - s / 1e5!r}\n" for s in reversed(steps))
    return f"loss_curve_repo/csv_{size}/{name}.csv", ("step,lr,loss\n" + rows).encode()


def test_curves_of_other_lengths_and_sizes_are_read_by_their_names(listed, mirror):
    files = dict([made_up_curve("cosine_48000"), made_up_curve("wsd_10000_12000", 400), made_up_curve("wsdcon_6")])
    mirror(listed(files, "multi_power_law"), files)
    frame = es.archive("multi_power_law").set_index("run")
    assert frame["steps"].to_dict() == {"25M/cosine_48000": 48000, "400M/wsd_10000_12000": 12000, "25M/wsdcon_6": 16000}
    assert frame["floor"].to_dict() == pytest.approx({"25M/cosine_48000": 0.1, "400M/wsd_10000_12000": 0.1, "25M/wsdcon_6": 0.2}, abs=1e-3)
    long = curves("multi_power_law")
    with pytest.raises(ValueError, match="multi_power_law has no evaluations"):
        evaluations("multi_power_law")
    assert all(c["step"].is_monotonic_increasing for _, c in long.groupby("run")) and long["tokens"].iloc[0] == 2176 * 128 * 4096


def test_a_file_whose_rates_are_not_those_of_its_name_is_refused(listed, mirror):
    files = dict([made_up_curve("constant_24000", shift=1e-6)])
    mirror(listed(files, "multi_power_law"), files)
    with pytest.raises(ValueError, match="constant_24000.csv: logged rates are not those of schedule"):
        curves("multi_power_law")


def test_schedules_by_literal_values():
    for name, step, factor in (("constant_24000", 23999, 1), ("cosine_24000", 2160, 1), ("cosine_24000", 13080, 0.55),
                               ("wsd_20000_24000", 22000, 10**-0.5), ("wsdld_20000_24000", 22000, 0.55), ("wsdcon_9", 7999, 1),
                               ("wsdcon_9", 8000, 0.3), ("wsdcon_9", 15999, 0.3)):
        assert multi_power_law.learning_rates(name)[step] == pytest.approx(3e-4 * factor), name
    warmup = multi_power_law.learning_rates("constant_24000")[:2161]
    assert warmup[0] == 0 and warmup[2159] == warmup[2160] == 3e-4 and np.allclose(np.diff(warmup[:2160]), 3e-4 / 2159)
    for name in ("wsd_20000", "cosine_24000_3", "else_1"):
        with pytest.raises(ValueError, match="no schedule is known"):
            multi_power_law.learning_rates(name)


@pytest.mark.archive
def test_the_published_curves_are_read(skip_if_not_fetched):
    with skip_if_not_fetched():
        frame = es.archive("multi_power_law")
    final = frame.set_index("run")["final_loss"]
    # at one peak and one floor, a cooldown over the last sixth beats the cosine by 0.028 nats at both sizes
    for size in ("25M", "100M"):
        assert round(final[f"{size}/cosine_24000"] - final[f"{size}/wsd_20000_24000"], 3) == 0.028
    assert frame["floor"].between(0.09, 1).all()
