"""The coordinate check: whether what a network computes keeps its size as the network grows, over the first steps of training.

In a parametrization that scales rightly every activation is as large in a wide network as in a narrow one, and so is what training
does to it (arXiv 2203.03466; over depth arXiv 2505.01618). Networks of several widths, or depths, train for a few steps from
many initializations; what is judged is the slope of log2 of a size per doubling. `measure_coordinates` trains, `judge_coordinates`
says what the measurements show, `coordinate_check` does both.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy import stats

from etastar.model import decoder
from etastar.model.activations import activations
from etastar.model.parametrization import ParameterNumbers, Scalars, numbers, scalars
from etastar.model.shapes import count_parameters
from etastar.optim.adamw import StackedAdamW
from etastar.optim.stacked import Flat
from etastar.recipe import SP, AdamW, CompleteP, Corpus, Model, MuP
from etastar.text.batches import batch, epoch_sequences, validation_batches
from etastar.text.corpora import TokenSet, prepare

Table = dict[str, ParameterNumbers]
Tamper = Callable[[Table, Scalars, Model], tuple[Table, Scalars]]
Params = dict[str, torch.Tensor]

MODEL = Model(width=64, depth=2, head_dim=16, context=32, tied=False)
CORPUS = Corpus("synthetic", vocab=256, options=(("tokens", 2**18), ("validation_tokens", 2**13)))
PEAK_LR = 2.0**-10
STEPS = 10
DRAWS = 16
BATCH_SEQUENCES, PROBE_SEQUENCES = 4, 4
EPS = 1e-12  # of AdamW: so small that it plays no part, being checked by the parametrization's table and not here
STACK_PARAMETERS = 2**19  # of the runs that train side by side: what a core's cache holds

HIDDEN_BAND = 0.05  # octaves a doubling of width
BAND = 0.25  # half the least slope that a wrong power of width or depth gives, 1/2
HIDDEN = ("embedding", "attention", "mlp", "stream", "final")
LOGITS = ("logits", "attention_logits", "router")


def coordinate_check(parametrization: MuP | CompleteP | SP, widths: Sequence[int] = (64, 128, 256), depths: Sequence[int] = (2,),
                     seeds: int = 3, *, control: bool = True, **setting) -> pd.DataFrame:
    """Whether activations and updates keep their size over widths and depths: one row an activation and quantity, with its slope.

    Columns: axis ("width", "depth"); layer; role; quantity ("size" mean |x|, "change" mean |x − x at step 1|, "update": how far a
    parameter has moved beside its size); step; slope in octaves per doubling and its 95 % t interval low … high, the seed being the
    unit; band; passed: |slope| < band; exempt: not judged. `judge_coordinates` says which steps and bands. `control` adds
    control_slope and control_passed, the same of SP, with a quarter of the draws. `all_passed` sums up. `setting` is that of
    `measure_coordinates`, without a fault in the control. Raises ValueError as that does.
    """
    table = judge_coordinates(measure_coordinates(parametrization, widths, depths, seeds, **setting))
    if not control or isinstance(parametrization, SP):
        return table
    setting |= {"draws": max(1, setting.get("draws", DRAWS) // 4), "tamper": None}
    standard = judge_coordinates(measure_coordinates(SP(parametrization.init_std), widths, depths, seeds, **setting))
    keys = ["axis", "layer", "quantity", "later"]  # each has its own steepest step after the first
    beside = standard.assign(later=standard["step"] > 1).set_index(keys)[["slope", "passed"]].add_prefix("control_")
    return table.assign(later=table["step"] > 1).join(beside, on=keys).drop(columns="later")


def all_passed(table: pd.DataFrame) -> bool:
    """Whether every row of a coordinate check that is judged passed."""
    return bool((table["passed"] | table["exempt"]).all())


def verdict(table: pd.DataFrame) -> str:
    """A coordinate check in a sentence: how many slopes were judged, and which lie outside their bands."""
    judged = table[~table["exempt"]]
    wrong = judged[~judged["passed"]]
    if wrong.empty:
        return f"passed: all {len(judged)} slopes lie within their bands"
    told = [f"{row.layer} {row.quantity} at step {row.step} over {row.axis}: {row.slope:+.2f} (band {row.band:g})"
            for row in wrong.itertuples()]
    return f"failed: {len(wrong)} of {len(judged)} slopes lie outside their bands: " + "; ".join(told)


def check_named(name: Literal["sp", "mup", "completep"], widths: Sequence[int], depths: Sequence[int], seeds: int) -> tuple[bool, dict]:
    """(whether it passed, the table and the verdict by name) of a parametrization whose base is the smallest of the networks."""
    by = {"sp": SP(), "mup": MuP(base_width=min(widths)), "completep": CompleteP(base_width=min(widths), base_depth=min(depths))}
    table = coordinate_check(by[name], widths, depths, seeds)
    return all_passed(table), {"coordinates": table.round(4), "verdict": verdict(table)}


def measure_coordinates(parametrization: MuP | CompleteP | SP, widths: Sequence[int] = (64, 128, 256), depths: Sequence[int] = (2,),
                        seeds: int = 3, *, model: Model = MODEL, steps: int = STEPS, peak_lr: float = PEAK_LR, weight_decay: float = 0.0,
                        draws: int = DRAWS, heads: Literal["grow", "held"] = "grow", corpus: Corpus = CORPUS,
                        tamper: Tamper | None = None) -> pd.DataFrame:
    """What networks of the given widths (at the least depth) and depths (at the least width) compute at steps 1 … `steps`.

    Columns axis, width, depth, seed, step, layer, role, quantity, value. Step t is before update t, so that step 1 is initialization.
    "size" and "change" are of held-out tokens; "update" is RMS(w − w at step 1) over RMS(w at step 1), in hidden and expert
    matrices (and a router of that kind) times √columns: μP leaves it alone there, where it is the effect on an aligned input over
    that on any input. Activations of layers are named by layer over widths; over depths by place in the stream (block outputs, which
    may shrink with depth, are left out), and the logits of attention and router are means over layers, as updates always are.
    A value is the geometric mean of `draws` initializations; a seed has a data order and initializations of its own.

    AdamW with a constant rate, ε 1e-12 and no clip. All else of `model` is kept but its width and depth; its ffn_width, key/value
    heads and (`heads` "held": head_dim in place of the number of heads) grow with width. `tamper` (table, scalars, model) → (table,
    scalars) puts a fault in. SP and MuP have no base depth, and over depths are controls. With a head_dim that grows attention's logits
    start smaller in wide networks, and only at a rate of about 2^−6 do ten steps show what training makes of them.
    Raises ValueError for widths that are not multiples of the smallest, of the base or of head_dim, a base above the smallest, too
    few widths, depths or seeds, and a parametrization that is not for AdamW.
    """
    _check(parametrization, widths, depths, seeds, steps, draws, peak_lr)
    axes = _shapes(model, sorted(set(widths)), sorted(set(depths)), heads)
    tokens = prepare(corpus)
    if epoch_sequences(tokens.train_tokens, model.context) < BATCH_SEQUENCES:
        raise ValueError(f"corpus {corpus.source!r} has under {BATCH_SEQUENCES} sequences of {model.context} tokens; take a larger one")
    setting = _Setting(parametrization, tokens, steps, peak_lr, AdamW(weight_decay=weight_decay, eps=EPS, clip_norm=None), draws, tamper)
    measured = {shape: _measured(shape, seeds, setting) for shape in dict.fromkeys(sum(axes.values(), []))}
    return pd.concat([_on_axis(measured[shape], axis, shape) for axis, shapes in axes.items() for shape in shapes], ignore_index=True)


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What all networks of a check share."""

    parametrization: MuP | CompleteP | SP
    tokens: TokenSet
    steps: int
    peak_lr: float
    optimizer: AdamW
    draws: int
    tamper: Tamper | None

    def numbers(self, model: Model) -> tuple[Table, Scalars]:
        """The table and scalars of a shape, with the fault in."""
        told = numbers(self.parametrization, model, self.tokens.vocab), scalars(self.parametrization, model)
        return self.tamper(*told, model) if self.tamper else told

    def start(self, model: Model, seed: int) -> Params:
        """Initial parameters by the table with the fault in."""
        right, table = numbers(self.parametrization, model, self.tokens.vocab), self.numbers(model)[0]
        drawn = decoder.init_parameters(model, self.tokens.vocab, self.parametrization, seed)
        return {name: drawn[name] if row.init_std is None else drawn[name] * (row.init_std / right[name].init_std)
                for name, row in table.items()}


def _check(parametrization, widths, depths, seeds, steps, draws, peak_lr) -> None:
    if not isinstance(parametrization, SP | MuP | CompleteP):
        raise ValueError(f"the coordinate check trains with AdamW and knows SP, MuP and CompleteP; got {type(parametrization).__name__}")
    if len(set(widths)) < 2 and len(set(depths)) < 2 or not len(widths) or not len(depths):
        raise ValueError(f"a slope needs two widths or two depths; got widths {tuple(widths)} and depths {tuple(depths)}")
    if min(*widths, *depths, draws) < 1 or seeds < 2 or steps < 2 or not 0 < peak_lr < float("inf"):
        raise ValueError("the coordinate check needs widths, depths and draws ≥ 1, 2 seeds or more for an interval, 2 steps, a rate > 0; "
                         f"got widths {tuple(widths)}, depths {tuple(depths)}, {draws=}, {seeds=}, {steps=}, {peak_lr=}")
    least = min(widths)
    if wrong := [width for width in widths if width % least]:
        raise ValueError(f"widths {wrong} are not multiples of the smallest, {least}: heads and MLP could not grow alike")
    for axis, base, smallest in (("width", getattr(parametrization, "base_width", None), least),
                                 ("depth", getattr(parametrization, "base_depth", None), min(depths))):
        if base and base > smallest:
            raise ValueError(f"base_{axis} {base} is larger than the smallest {axis} {smallest}; take a base_{axis} of at most {smallest}")
        if base and axis == "width" and least % base:
            raise ValueError(f"width {least} is not a multiple of base_width {base}; take a base_width that divides it")


def _shapes(model: Model, widths: list[int], depths: list[int], heads: str) -> dict[str, list[Model]]:
    """The shapes of each axis that has two or more."""
    least = dataclasses.replace(model, width=widths[0], depth=depths[0], ffn_width=None)
    ffn = least.resolved_ffn_width if model.ffn_width is None else max(1, model.ffn_width * widths[0] // model.width)
    wider = {}
    for width in widths:
        times = width // widths[0]
        kv_heads = None if model.kv_heads is None else model.kv_heads * (times if heads == "grow" else 1)
        wider[width] = dataclasses.replace(least, width=width, ffn_width=ffn * times, kv_heads=kv_heads,
                                           head_dim=model.head_dim * (times if heads == "held" else 1))
    shapes = {"width": list(wider.values()), "depth": [dataclasses.replace(wider[widths[0]], depth=depth) for depth in depths]}
    return {axis: found for axis, found in shapes.items() if len(found) > 1}


def _measured(model: Model, seeds: int, setting: _Setting) -> pd.DataFrame:
    """Columns seed, step, layer, quantity, value (log2, the mean over draws) of one shape."""
    table, by = setting.numbers(model)
    probe_BxT1, _ = next(validation_batches(setting.tokens, model.context, batch_tokens=PROBE_SEQUENCES * model.context))
    probe_BxT = torch.from_numpy(probe_BxT1[:, :-1])
    runs = [(seed, seed * setting.draws + draw) for seed in range(seeds) for draw in range(setting.draws)]
    at_once, rows = max(1, STACK_PARAMETERS // count_parameters(model, setting.tokens.vocab)["total"]), []
    for some in (runs[i : i + at_once] for i in range(0, len(runs), at_once)):
        for step, params in enumerate(_trained(model, some, setting), 1):
            weights = [{name: w[slot] for name, w in params.items()} for slot in range(len(some))]
            found = [activations(w, probe_BxT, model, by) for w in weights]
            if step == 1:
                before, begun = [decoder.unstack(params, slot) for slot in range(len(some))], found
            for slot, (seed, _) in enumerate(some):
                rows += [(seed, step, *told) for told in _sizes(found[slot], begun[slot], step)]
                if step == setting.steps:
                    rows += [(seed, step, *told) for told in _moves(weights[slot], before[slot], table, setting.parametrization)]
    frame = pd.DataFrame(rows, columns=["seed", "step", "layer", "quantity", "value"])
    return _mean_of_logs(frame.assign(value=np.log2(frame["value"].where(frame["value"] > 0))))


def _mean_of_logs(frame: pd.DataFrame) -> pd.DataFrame:
    """Means of rows that are alike but for their value; NaN where one is."""
    alike = frame.groupby(["seed", "step", "layer", "quantity"], sort=False)["value"]
    return alike.mean().where(alike.count() == alike.size()).reset_index()


def _trained(model: Model, runs: list[tuple[int, int]], setting: _Setting) -> Iterator[Params]:
    """The stacked parameters of runs (data seed, initialization) before update 1, 2, … `steps`, as they stand until the next."""
    table, by = setting.numbers(model)
    flat = Flat(table, len(runs), torch.device("cpu"))
    params = {name: view.requires_grad_() for name, view in flat.views(flat.data).items()}
    optimizer, grad_MxP = StackedAdamW(flat), flat.like()
    grads = flat.views(grad_MxP)
    for slot, (_, seed) in enumerate(runs):
        optimizer.configure(slot, setting.optimizer)
        for name, start in setting.start(model, seed).items():
            params[name].data[slot] = start
    lr_M, alive_M = torch.full((len(runs),), setting.peak_lr, dtype=torch.float64), torch.ones(len(runs), dtype=torch.bool)
    for step in range(setting.steps):
        yield {name: view.detach() for name, view in params.items()}
        if step == setting.steps - 1:
            return
        tokens_MxBxT1 = np.stack([batch(setting.tokens.train, model.context, seed, step, BATCH_SEQUENCES) for seed, _ in runs])
        loss_M = decoder.loss(params, torch.from_numpy(tokens_MxBxT1), model, by)
        for view, grad in zip(grads.values(), torch.autograd.grad(loss_M.sum(), list(params.values())), strict=True):
            view.copy_(grad)
        optimizer.step(grad_MxP, lr_M, torch.full((len(runs),), step + 1), alive_M)


def _sizes(found: Params, begun: Params, step: int) -> Iterator[tuple[str, str, float]]:
    """(layer, quantity, value) of a run's activations."""
    for name, x in found.items():
        seen = x.isfinite() if name.endswith("attention_logits") else ...
        yield name, "size", float(x[seen].abs().mean())
        if step > 1:
            yield name, "change", float((x - begun[name])[seen].abs().mean())


def _moves(weights: Params, before: Params, table: Table, parametrization) -> Iterator[tuple[str, str, float]]:
    """(parameter, "update", how far it has moved beside its size) of a run."""
    for name, row in table.items():
        w = before[name]
        yield name, "update", float((weights[name] - w).square().mean().sqrt() / w.square().mean().sqrt()) * _aligned(row, parametrization)


def _aligned(row: ParameterNumbers, parametrization) -> float:
    """√columns where a random matrix's effect has a size of its own, 1 where it may shrink with width or is of a vector."""
    like_hidden = row.role in ("hidden", "expert") or row.role == "router" and getattr(parametrization, "router", "") == "hidden"
    return row.shape[-1] ** 0.5 if like_hidden else 1.0


def _on_axis(measured: pd.DataFrame, axis: str, model: Model) -> pd.DataFrame:
    """Measurements under names that all shapes of an axis have, geometric means where several share one; with their roles."""
    named = measured.assign(layer=[_name(*told, axis, model.depth) for told in zip(measured["layer"], measured["quantity"], strict=True)])
    named = _mean_of_logs(named[named["layer"] != ""])
    named["value"] = np.exp2(named["value"])
    named.insert(2, "role", [_role(layer, model) for layer in named["layer"]])
    return named.assign(axis=axis, width=model.width, depth=model.depth)[list(_COLUMNS)]


_COLUMNS = ("axis", "width", "depth", "seed", "step", "layer", "role", "quantity", "value")


def _name(layer: str, quantity: str, axis: str, depth: int) -> str:
    """The name of an activation or update on an axis; "" where it has no counterpart in other shapes."""
    inner = re.match(r"layers\.(\d+)\.(.+)", layer)
    if inner is None or quantity != "update" and axis == "width":
        return layer
    index, name = int(inner[1]), inner[2]
    if quantity == "update" or name in ("attention_logits", "router"):
        return f"layers.*.{name}"
    places = {depth // 2 - 1 if depth % 2 == 0 else -1: "middle", depth - 1: "last"}
    return f"layers.{places[index]}.stream" if name == "stream" and index in places else ""


def _role(layer: str, model: Model) -> str:
    kind = layer.split(".")[-1]
    if kind in ("router", "embedding"):
        return kind
    if kind.startswith("experts") or kind == "mlp" and model.mixture is not None:
        return "expert"
    return "output" if kind in ("logits", "head") else "norm" if kind.endswith("norm") else "hidden"


def judge_coordinates(measured: pd.DataFrame) -> pd.DataFrame:
    """Slopes of what `measure_coordinates` found, one row an activation and quantity, as `coordinate_check` describes.

    Rows are of step 1 and of the step after it whose slope is steepest; for logits (of the head, attention, a router) of the last step:
    they may start smaller in wider networks, so that step 1 is exempt and the steps after it are on the way. The band is 0.05 octaves
    a doubling of width for the size of hidden activations, and 0.25 for all else, half the slope of a wrong √width. Over depth it is 0.25
    for sizes too: block outputs of independent weights, each over the depth, add up to less in a deeper network, by a share that falls as
    1/depth.
    """
    table = pd.concat([_in_order(_slopes(found, axis)) for axis, found in measured.groupby("axis", sort=False)], ignore_index=True)
    kind, last = table["layer"].str.split(".").str[-1], table["step"].max()
    steep = table["slope"].abs().fillna(np.inf)  # a slope that is no number is steeper than all
    steep = steep.where((table["step"] > 1) & ~(kind.isin(LOGITS) & (table["step"] < last)), -1.0)
    judged = steep.groupby([table[name] for name in ("axis", "layer", "quantity")], sort=False).idxmax()
    table = table.assign(band=np.where((table["axis"] == "width") & (table["quantity"] == "size") & kind.isin(HIDDEN), HIDDEN_BAND, BAND))
    table["passed"] = table["slope"].abs() < table["band"]
    table["exempt"] = (table["step"] == 1) & kind.isin(LOGITS)
    return table[(table["step"] == 1) | table.index.isin(judged)].reset_index(drop=True)


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of an axis by quantity, and within it as the network computes."""
    order = {name: i for i, name in enumerate(("size", "change", "update", *table["layer"].unique()))}
    return table.sort_values(["quantity", "layer", "step"], key=lambda x: x if x.name == "step" else x.map(order), ignore_index=True)


def _slopes(found: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Mean slope of log2 value per doubling over seeds, and its 95 % t interval, of every layer, quantity and step on an axis."""
    keys = ["axis", "layer", "role", "quantity", "step"]
    table = found[keys].drop_duplicates(ignore_index=True)
    value = found.set_index([*keys, "seed", axis])["value"].unstack(axis)
    x_W = np.log2(value.columns.to_numpy(float))
    x_W -= x_W.mean()
    slope = (np.log2(value) @ x_W / (x_W @ x_W)).unstack("seed").reindex(pd.MultiIndex.from_frame(table)).to_numpy()
    half = stats.t.ppf(0.975, slope.shape[1] - 1) * slope.std(axis=1, ddof=1) / slope.shape[1] ** 0.5
    return table.assign(slope=slope.mean(axis=1), low=slope.mean(axis=1) - half, high=slope.mean(axis=1) + half)
