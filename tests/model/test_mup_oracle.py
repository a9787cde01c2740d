"""μP of a dense decoder under Adam against the package of its authors (arXiv 2203.03466, `mup` 1.0.0), matrix by matrix."""

import pytest
import torch
from torch import nn

import etastar as es
from etastar.model.parametrization import numbers, scalars
from etastar.model.shapes import parameter_shapes

mup = pytest.importorskip("mup", reason="the package mup, this test's oracle, is not installed: pip install --no-deps mup")

BASE, VOCAB, LR, DECAY, STD = 64, 40, 0.01, 0.1, 0.05
BY = es.MuP(base_width=BASE, init_std=STD)


def model_of(width: int) -> es.Model:
    return es.Model(width=width, depth=2, head_dim=16, context=8, tied=False, ffn_width=3 * width)


class Likeness(nn.Module):
    """Layers of the shapes of our parameters, of the kinds that mup tells apart."""

    def __init__(self, width: int):
        super().__init__()
        self.of, shapes = nn.ModuleDict(), parameter_shapes(model_of(width), VOCAB)
        for name, shape in shapes.items():
            self.of[name.replace(".", "/")] = _layer(name, shape)

    def parameters_by_ours(self) -> dict[str, nn.Parameter]:
        return {name.replace("/", "."): layer.weight for name, layer in self.of.items()}


def _layer(name: str, shape) -> nn.Module:
    if len(shape) == 1:
        return nn.LayerNorm(shape, bias=False)
    if name == "embedding":
        return nn.Embedding(*shape)
    return (mup.MuReadout if name == "head" else nn.Linear)(shape[1], shape[0], bias=False)


@pytest.fixture(scope="module", params=[64, 128, 192, 512])
def pair(request) -> tuple[int, Likeness]:
    torch.manual_seed(0)
    likeness = Likeness(request.param)
    mup.set_base_shapes(likeness, Likeness(BASE), delta=Likeness(2 * BASE))
    return request.param, likeness


def test_rates_and_the_product_of_rate_and_decay_are_those_of_mup(pair):
    width, likeness = pair
    optimizer = mup.MuAdamW(likeness.parameters(), lr=LR, weight_decay=DECAY)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    table = numbers(BY, model_of(width), VOCAB)
    for name, weight in likeness.parameters_by_ours().items():
        row, group = table[name], group_of[id(weight)]
        assert LR * row.lr_multiplier == pytest.approx(group["lr"], rel=1e-12), name
        if row.decay_multiplier:  # mup leaves it to its users that gains and the token table do not decay
            assert DECAY * row.decay_multiplier == pytest.approx(group["weight_decay"], rel=1e-12), name
    assert sum(row.decay_multiplier > 0 for row in table.values()) == 9  # four matrices a block, and the head


def test_initial_spreads_scale_with_width_as_those_of_mup(pair):
    width, likeness = pair
    ours, at_base = (numbers(BY, model_of(w), VOCAB) for w in (width, BASE))
    for name, weight in likeness.parameters_by_ours().items():
        if ours[name].role == "norm":
            continue
        drawn = torch.empty_like(weight)
        torch.manual_seed(1)
        nn.init.normal_(drawn, std=STD)
        torch.manual_seed(1)
        mup.normal_(weight, std=STD)  # that of torch, scaled by what mup finds
        scale = float((weight.detach() / drawn).median())
        assert ours[name].init_std / at_base[name].init_std == pytest.approx(scale, rel=1e-6), name


def test_the_head_divides_by_the_ratio_of_widths_as_the_readout_of_mup_does(pair):
    width, likeness = pair
    head, x = likeness.of["head"], torch.randn(5, width)
    torch.testing.assert_close(head(x), nn.functional.linear(x, head.weight) / scalars(BY, model_of(width)).logits)
