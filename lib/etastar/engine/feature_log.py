"""Stability and feature learning of runs while they train, on a few fixed validation sequences: the columns observe.LOGS["features"].

What is logged follows from the state and the recipe alone and from nothing logged before, so that a branch's curve is the straight
run's. Everything is worked out in float32 from the weights that are validated, whatever precision the run trains in.
"""

import functools
import math

import numpy as np
import torch

from etastar.model.activations import activations
from etastar.model.decoder import init_parameters
from etastar.model.parametrization import Scalars, scalars
from etastar.observe import LOGS
from etastar.optim.adamw import StackedAdamW, in_force
from etastar.recipe import Corpus, Model
from etastar.text.batches import validation_batches
from etastar.text.corpora import prepare

PROBE_TOKENS = 2048
HELD_BYTES = 2**28  # of attention logits at once

Params = dict[str, torch.Tensor]


def slot_features(stack, slots: list[int]) -> list[list[float]]:
    """The columns of some slots of an engine.slots.SlotStack, slot by slot, so that a slot's bits do not depend on its neighbours.

    attention_logit_max: the largest |logit| before the softmax, over layers, heads and causal pairs. stream_rms: root mean square of
    the residual stream after the last layer; stream_delta: that of its change since initialization, over that at initialization.
    feature_rank: `effective_rank` of the normalized stream. update_ratio: `update_ratio`. log_z_max: the largest |log Σ exp logits|,
    which z-loss squares (arXiv 2204.02311 §5). load_imbalance: the largest expert's share of the choices times the experts, of the
    layer where it is largest: 1 is even, experts / experts_per_token the most; NaN without a mixture.
    """
    return [_of_slot(stack, slot) for slot in slots]


@torch.no_grad()
def _of_slot(stack, slot: int) -> list[float]:
    recipe, rows = stack.recipes[slot], slice(slot, slot + 1)
    weights = _unstacked(stack, stack.optimizer.evaluated(rows))
    tokens_BxT = probe_tokens(recipe.corpus, recipe.model.context).to(stack.device)
    start_NxD = _first_stream(recipe.model, recipe.corpus, recipe.parametrization, recipe.seed, stack.device)
    seen = features(weights, start_NxD, tokens_BxT, recipe.model, stack.scalars)
    step = int(stack.step_M[slot])
    if isinstance(stack.optimizer, StackedAdamW) and step:
        moments = (_unstacked(stack, moment_MxP[rows]) for moment_MxP in (stack.optimizer.m_MxP, stack.optimizer.v_MxP))
        seen["update_ratio"] = update_ratio(weights, *moments, stack.flat.table, recipe, step)
    return [float(seen.get(column, math.nan)) for column in LOGS["features"]]


def _unstacked(stack, row_1xP: torch.Tensor) -> Params:
    return {name: view[0] for name, view in stack.flat.views(row_1xP).items()}


@functools.lru_cache(maxsize=16)
def probe_tokens(corpus: Corpus, context: int) -> torch.Tensor:
    """The tokens that are looked at, (B, T): validation sequences spread evenly, at most 2048 tokens of them in all."""
    found = [tokens_BxT for tokens_BxT, _ in validation_batches(prepare(corpus), context, max_tokens=max(PROBE_TOKENS, context))]
    return torch.from_numpy(np.concatenate(found)[:, : min(context, PROBE_TOKENS)])


@functools.lru_cache(maxsize=64)
def _first_stream(model: Model, corpus: Corpus, parametrization, seed: int, device: torch.device) -> torch.Tensor:
    """The last stream (N, D) of a recipe's initial parameters; runs at several rates share it."""
    params = init_parameters(model, prepare(corpus).vocab, parametrization, seed)
    params = {name: start.to(device) for name, start in params.items()}
    return _look(params, probe_tokens(corpus, model.context).to(device), model, scalars(parametrization, model))["stream"]


def features(params: Params, start_NxD: torch.Tensor, tokens_BxT: torch.Tensor, model: Model, by: Scalars) -> dict[str, torch.Tensor]:
    """All columns but update_ratio (and load_imbalance without a mixture), 0-d tensors, of one run's parameters by name.

    `start_NxD` is the last stream of the same tokens (B, T), N = B · T, at initialization.
    """
    seen = _look(params, tokens_BxT, model, by)
    found = {"attention_logit_max": seen["attention_logit"], "log_z_max": seen["log_z"], "stream_rms": _rms(seen["stream"]),
             "stream_delta": _rms(seen["stream"].double() - start_NxD) / _rms(start_NxD),
             "feature_rank": effective_rank(seen["final"])}
    if model.mixture is not None:
        found["load_imbalance"] = torch.stack([imbalance(seen[f"router.{i}"], model) for i in range(model.depth)]).amax()
    return found


def _look(params: Params, tokens_BxT: torch.Tensor, model: Model, by: Scalars) -> dict[str, torch.Tensor]:
    """What the columns need of all activations, gathered over parts of the sequences: attention logits take T² floats a head."""
    a_sequence = 4 * model.depth * model.heads * tokens_BxT.shape[1] ** 2
    parts = [_needed(activations(params, part, model, by), model)
             for part in tokens_BxT.split(max(1, HELD_BYTES // a_sequence))]
    return {name: torch.stack([part[name] for part in parts]).amax(0) if tensor.ndim == 0 else torch.cat([part[name] for part in parts])
            for name, tensor in parts[0].items()}


def _needed(found: dict[str, torch.Tensor], model: Model) -> dict[str, torch.Tensor]:
    layers = range(model.depth)
    seen = {"attention_logit": torch.stack([found[f"layers.{i}.attention_logits"].tril().abs().amax() for i in layers]).amax(),
            "log_z": found["logits"].logsumexp(-1).abs().amax(),
            "stream": found[f"layers.{model.depth - 1}.stream"].flatten(0, 1), "final": found["final"].flatten(0, 1)}
    return seen | ({} if model.mixture is None else {f"router.{i}": found[f"layers.{i}.router"] for i in layers})


def effective_rank(x_NxD: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of p = σ² / Σ σ², σ the singular values of N features minus their mean: D where these vary alike, 1 along a line.

    Roy and Vetterli (EUSIPCO 2007) define it so with p = σ / Σ σ; the squares are shares of the variance. NaN where nothing varies or
    a feature is not finite.
    """
    x_NxD = x_NxD.double()
    x_NxD = x_NxD - x_NxD.mean(0)
    gram = x_NxD @ x_NxD.mT if len(x_NxD) < x_NxD.shape[1] else x_NxD.mT @ x_NxD
    if not (gram.isfinite().all() and gram.trace() > 0):
        return torch.tensor(math.nan)
    variance_D = torch.linalg.eigvalsh(gram).clamp(min=0)
    return torch.special.entr(variance_D / variance_D.sum()).sum().exp()


def update_ratio(params: Params, m: Params, v: Params, table: dict, recipe, step: int) -> float:
    """RMS of the last step of all matrices of the blocks over RMS of these, weight decay apart: of η m̂ / (√v̂ + ε) over w.

    Hidden and expert matrices, taken as one vector, with the rate, β2 and multipliers of step number `step` (arXiv 1711.05101 Alg. 2).
    """
    options, lr = recipe.optimizer, float(recipe.lr()[step - 1])
    beta2, since, carried = in_force(recipe.beta2(), step - 1)
    bias1, bias2 = 1 - options.beta1**step, 1 - carried * beta2 ** (step - since)
    moved = weight = 0.0
    for name, row in table.items():
        if row.role in ("hidden", "expert"):
            root = (v[name] / bias2).sqrt_().add_(options.eps * row.eps_multiplier)
            moved += float((m[name] / root).double().square().sum()) * (lr * row.lr_multiplier / bias1) ** 2
            weight += float(params[name].double().square().sum())
    return math.sqrt(moved / weight) if weight else math.nan


def imbalance(router_NxE: torch.Tensor, model: Model) -> torch.Tensor:
    """The largest expert's share of the choices of N tokens, times the experts; 0-d float64."""
    chosen = router_NxE.topk(model.mixture.experts_per_token, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=model.mixture.experts).amax() / len(chosen) * float(model.mixture.experts)


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().mean().sqrt()
