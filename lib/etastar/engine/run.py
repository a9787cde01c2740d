"""A finished run, read from its folder; and how a worker writes one."""

import functools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from etastar.engine.checkpoint import tensor_bytes, tensors_of
from etastar.engine.plan import Node
from etastar.engine.provenance import provenance
from etastar.engine.store import CURVE_COLUMNS, Store, parquet, read_parquet
from etastar.model.decoder import Decoder
from etastar.model.parametrization import count_parameters, flops_per_token
from etastar.observe import Observe
from etastar.recipe import Recipe
from etastar.schedules import Branch
from etastar.text.corpora import prepare
from etastar.values import canonical_json


class Run:
    """One run of a store: its losses, its curve and its model."""

    def __init__(self, store: Store, recipe: Recipe, summary: dict):
        self.store, self.recipe, self.summary = store, recipe, summary

    def __repr__(self):
        return f"Run({self.run_id}, {self.status}, val_loss={self.val_loss:.4f})"

    @property
    def run_id(self) -> str:
        """The id under which the run was trained, the name of its folder."""
        return self.summary["run_id"]

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.store.path / self.run_id

    @property
    def status(self) -> str:
        """"done", or "diverged" where a loss or gradient was not finite."""
        return self.summary["status"]

    @property
    def val_loss(self) -> float:
        """Final validation loss in nats per token; NaN for a diverged run."""
        return float("nan") if self.summary["val_loss"] is None else self.summary["val_loss"]

    @functools.cached_property
    def curve(self) -> pd.DataFrame:
        """One row a step: step (after which), tokens, lr, train_loss (before the update), val_loss, grad_norm."""
        return read_parquet(self.store.read(self.run_id, "metrics.parquet"))

    @functools.cached_property
    def validation(self) -> pd.DataFrame:
        """One row a validation sequence: loss in nats per token and the document it comes from."""
        self._refuse_diverged()
        tensors = tensors_of(self.store.read(self.run_id, "validation.safetensors"))
        return pd.DataFrame({name: tensor.numpy() for name, tensor in tensors.items()})

    def model(self) -> Decoder:
        """The trained decoder: an nn.Module from tokens (B, T) int64 to logits (B, T, V)."""
        self._refuse_diverged()
        params = tensors_of(self.store.read(self.run_id, "model.safetensors"))
        return Decoder(self.recipe.model, prepare(self.recipe.corpus).vocab, self.recipe.parametrization, params)

    def branch_recipe(self, *, at_tokens: int, schedule, horizon_tokens: int, peak_lr: float | None = None) -> Recipe:
        """A recipe that leaves this run after `at_tokens` and goes on to `horizon_tokens` under another schedule.

        `schedule` runs over the remaining tokens; its peak is `peak_lr`, or the rate this run had at the branch point.
        """
        trunk = self.recipe
        branch = Branch(trunk=trunk.schedule, trunk_horizon_tokens=trunk.horizon_tokens, at_tokens=at_tokens, then=schedule,
                        then_peak_lr=peak_lr)
        return trunk.replace(schedule=branch, horizon_tokens=horizon_tokens)

    def _refuse_diverged(self):
        if self.status == "diverged":
            raise ValueError(f"run {self.run_id} diverged after {self.summary['steps']} steps; it has a curve but no model")


def read_run(store: Store, recipe: Recipe, observe: Observe) -> Run | None:
    """The finished run of a recipe, None where there is none or it was not observed as asked."""
    summary = store.summary(recipe.run_id)
    if summary is None or not Observe(**summary["observed"]).covers(observe):
        return None
    return Run(store, recipe, summary)


def open_run(store: Store, run_id: str) -> Run:
    """A finished run by its id; ValueError naming the id where there is none."""
    summary = store.summary(run_id)
    if summary is None:
        raise ValueError(f"no finished run {run_id!r} in the store {store.path}; `etastar runs list` names them")
    return Run(store, Recipe.from_json(store.read(run_id, "recipe.json").decode()), summary)


def write_run(store: Store, recipe: Recipe, node: Node, observe: Observe, vocab: int, state=None, validation=None) -> None:
    """Put a run in its folder: its curve along the shared states, its model and validation unless it diverged."""
    curve, files = store.curve_to(node), {}
    if state is not None:
        mean, loss_N, document_N = validation
        curve.loc[len(curve) - 1, "val_loss"] = mean
        files["model.safetensors"] = tensor_bytes(state[0])
        files["validation.safetensors"] = tensor_bytes(
            {"loss": torch.from_numpy(loss_N), "document": torch.from_numpy(np.ascontiguousarray(document_N))})
    files["metrics.parquet"] = parquet(curve)
    files["provenance.json"] = json.dumps(provenance(recipe), indent=1, sort_keys=True).encode()
    store.write_run(recipe, files, summarize(recipe, curve, observe, vocab, None if state is None else mean))


def summarize(recipe: Recipe, curve: pd.DataFrame, observe: Observe, vocab: int, val_loss: float | None) -> dict:
    """The summary row of a run: what a table of runs needs without opening any other file."""
    parameters = count_parameters(recipe.model, vocab)
    tail = curve.train_loss.iloc[-max(1, len(curve) // 20):]
    return {
        "status": "diverged" if val_loss is None else "done",
        "val_loss": val_loss,
        "train_loss_last_5_percent": None if val_loss is None else float(tail.mean()),
        "steps": len(curve),
        "horizon_tokens": recipe.horizon_tokens,
        "batch_tokens": recipe.batch_tokens,
        "peak_lr": recipe.peak_lr,
        "seed": recipe.seed,
        "schedule": canonical_json(recipe.schedule),
        "corpus": canonical_json(recipe.corpus),
        "width": recipe.model.width,
        "depth": recipe.model.depth,
        "params_total": parameters["total"],
        "params_non_embedding": parameters["non_embedding"],
        "flops": flops_per_token(recipe.model, vocab)["exact"] * recipe.horizon_tokens,
        "observed": {} if observe == Observe() else {"val_every_tokens": observe.val_every_tokens},
    }


def curve_frame(recipe: Recipe, start: int, lr, train_loss, grad_norm, val_loss: dict[int, float]) -> pd.DataFrame:
    """Rows of a curve for the steps `start` + 1 …; `val_loss` maps steps to validated losses."""
    steps = np.arange(start + 1, start + 1 + len(lr))
    return pd.DataFrame({
        "step": steps,
        "tokens": steps * recipe.batch_tokens,
        "lr": np.asarray(lr, dtype=np.float64),
        "train_loss": np.asarray(train_loss, dtype=np.float32),
        "val_loss": np.array([val_loss.get(int(step), np.nan) for step in steps], dtype=np.float64),
        "grad_norm": np.asarray(grad_norm, dtype=np.float32),
    }, columns=CURVE_COLUMNS)
