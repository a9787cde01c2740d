"""A run, read from its folder once it is finished; and how a worker writes one."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from etastar.engine.checkpoint import AVERAGE, Damaged, tensor_bytes, tensors_of
from etastar.engine.curve import with_logged
from etastar.engine.plan import Node, build_segments, control_bytes, controls
from etastar.engine.provenance import provenance
from etastar.engine.read_outs import keep_losses, kept_losses
from etastar.engine.slots import validate
from etastar.engine.store import CURVE_COLUMNS, Store, parquet, read_parquet
from etastar.model.decoder import Decoder
from etastar.model.parametrization import scalars
from etastar.model.shapes import count_parameters, flops_per_token
from etastar.observe import Observe, step_of_window
from etastar.optim.averaging import compose
from etastar.recipe import Recipe
from etastar.schedules import Branch
from etastar.text.corpora import prepare
from etastar.values import canonical_json


class Trunk:
    """What a run has before it is finished too: its recipe, stored states, and branches that leave it."""

    def __init__(self, store: Store, recipe: Recipe):
        self.store, self.recipe = store, recipe

    @property
    def stored_tokens(self) -> int:
        """Tokens after which the deepest stored state on its path stands; 0 where none is stored."""
        return stored_steps(self.store, self.recipe) * self.recipe.batch_tokens

    def branch_recipe(self, *, at_tokens: int, schedule, horizon_tokens: int, peak_lr: float | None = None) -> Recipe:
        """A recipe that leaves this run after `at_tokens` and goes on to `horizon_tokens` under another schedule.

        `schedule` runs over the remaining tokens; its peak is `peak_lr`, or the rate this run has at the branch point, which need
        not be reached yet. Changes of β2 after that point are left behind. Raises ValueError for a point beyond the run, or after
        the branch's own end, or within a batch.
        """
        trunk = self.recipe
        branch = Branch(trunk=trunk.schedule, trunk_horizon_tokens=trunk.horizon_tokens, at_tokens=at_tokens, then=schedule,
                        then_peak_lr=peak_lr)
        kept = tuple(change for change in trunk.beta2_changes if change[0] < at_tokens)
        return trunk.replace(schedule=branch, horizon_tokens=horizon_tokens, beta2_changes=kept)


class UnfinishedRun(Trunk):
    """A run that a sweep has begun, or means to, and not finished: all that a Run has beyond its recipe raises ValueError."""

    def __init__(self, store: Store, recipe: Recipe, run_id: str, sweep: str):
        super().__init__(store, recipe)
        self.run_id, self.sweep = run_id, sweep

    def __repr__(self):
        return f"UnfinishedRun({self.run_id}, {self.status}, {self.stored_tokens:,} of {self.recipe.horizon_tokens:,} tokens stored)"

    @property
    def stored_tokens(self) -> int:
        """As of any run; what it left itself counts too where it is trained beside a sweep."""
        own = stored_steps(Store(self.store.beside(self.sweep)), self.recipe) * self.recipe.batch_tokens
        return max(own, super().stored_tokens)

    @property
    def status(self) -> str:
        """"running" while a process is at work on its sweep, else "interrupted"; "finished" once `find_run` gives a Run."""
        if self.store.is_finished(self.run_id):
            return "finished"
        return "running" if self.store.is_running(self.sweep) else "interrupted"

    def __getattr__(self, name: str):
        if not hasattr(Run, name):
            raise AttributeError(f"an unfinished run has no {name!r}")
        raise ValueError(f"run {self.run_id} has no {name}: when es.find_run found it, it was not finished (now {self.status}, "
                         f"{self.stored_tokens:,} of {self.recipe.horizon_tokens:,} tokens stored); es.find_run gives all of it when it is")


class Run(Trunk):
    """One finished run of a store: its losses, its curve and its model."""

    def __init__(self, store: Store, recipe: Recipe, summary: dict):
        super().__init__(store, recipe)
        self.summary = summary

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
        """One row a step: step (after which), tokens, lr, train_loss (before the update), val_loss, grad_norm, and the columns of
        observe.LOGS, operator norms of the weights and features of the activations; what was not observed at a step is NaN there."""
        return read_parquet(self.store.read(self.run_id, "metrics.parquet")).reindex(columns=CURVE_COLUMNS)  # older ones have no norms

    @functools.cached_property
    def validation(self) -> pd.DataFrame:
        """One row a validation sequence: loss in nats per token and the document it comes from."""
        self._refuse_diverged()
        tensors = tensors_of(self.store.read(self.run_id, "validation.safetensors"))
        return pd.DataFrame({name: tensor.numpy() for name, tensor in tensors.items()})

    def model(self) -> Decoder:
        """The trained decoder: an nn.Module from tokens (B, T) int64 to logits (B, T, V)."""
        self._refuse_diverged()
        return self._decoder(tensors_of(self.store.read(self.run_id, "model.safetensors")))

    def halves(self) -> dict[str, float]:
        """val_loss in nats per token, and val_loss_a and val_loss_b, on every other document of validation."""
        return _halved(self.val_loss, self.validation["loss"].to_numpy(), self.validation["document"].to_numpy())

    def averages(self, windows=None) -> pd.DataFrame:
        """Validation losses of all read-outs of the weights at the run's end, worked out when first asked for: one row a read-out.

        read_out "final" (the run's own model), "ema" (horizon_tokens), "swa" (mean over the steps of the last `windows` windows),
        "lawa" (mean of the weights at the ends of the last `windows` windows); from_tokens and to_tokens, what the average spans;
        val_loss in nats per token, and val_loss_a and val_loss_b on every other document of validation, so that what is chosen on
        one half is reported on the other. Only windows that ended count: let `average_every_tokens` divide the horizon. SWA and LAWA
        are read out over every number of windows, or over those in `windows`.
        """
        kept, fresh, rows = kept_losses(self.store.path, self.run_id), {}, []
        for name, given in self._read_outs(windows):
            key = self._key(name, given)
            if name != "final" and key not in kept:
                fresh[key] = _halved(*self.validate(self._averaged(name, **given)))
            losses = self.halves() if name == "final" else (kept | fresh)[key]
            rows.append({"read_out": name, "horizon_tokens": given.get("horizon_tokens"), "windows": given.get("windows"),
                         **self._span(name, given.get("windows")), **losses})
        if fresh:
            keep_losses(self.store.path, self.run_id, kept | fresh)
        return pd.DataFrame(rows).astype({"horizon_tokens": "Int64", "windows": "Int64"})

    def lacks_averages(self, windows=None) -> int:
        """How many losses `averages(windows)` would have to work out, since the store does not keep them yet."""
        kept = kept_losses(self.store.path, self.run_id)
        return sum(name != "final" and self._key(name, given) not in kept for name, given in self._read_outs(windows))

    def _read_outs(self, windows) -> list[tuple[str, dict]]:
        counts = [k for k in range(1, len(self._windows) + 1) if windows is None or k in windows]
        return [("final", {}), *(("ema", {"horizon_tokens": tokens}) for tokens in self.observed.ema_horizon_tokens),
                *((name, {"windows": k}) for name in ("swa", "lawa") for k in counts)]

    def _key(self, name: str, given: dict) -> str:
        """What the store calls the loss of a read-out; how many windows there are follows from their length."""
        if name == "ema":
            return f"ema-{given['horizon_tokens']}"
        return f"{name}-{given.get('windows')}x{self.observed.average_every_tokens}"

    def averaged_model(self, read_out: str, *, horizon_tokens: int | None = None, windows: int | None = None,
                       to_tokens: int | None = None) -> Decoder:
        """The decoder of a read-out: "ema" with `horizon_tokens`, "swa" or "lawa" with `windows`, as `averages` names them.

        SWA and LAWA take the last windows that ended after `to_tokens` at the latest, at the run's end by default.
        Raises ValueError for what was not observed, naming what was.
        """
        return self._decoder(self._averaged(read_out, horizon_tokens, windows, to_tokens))

    @property
    def observed(self) -> Observe:
        """How the run was observed."""
        return Observe(**self.summary["observed"])

    def _averaged(self, read_out, horizon_tokens=None, windows=None, to_tokens=None) -> dict[str, torch.Tensor]:
        self._refuse_diverged()
        if read_out == "final":
            return tensors_of(self.store.read(self.run_id, "model.safetensors"))
        if read_out == "ema" and horizon_tokens in self.observed.ema_horizon_tokens:
            first = f"ema-{horizon_tokens}/"
            held = tensors_of(self.store.read(self.run_id, "averages.safetensors"))
            return {name.removeprefix(first): tensor for name, tensor in held.items() if name.startswith(first)}
        ended = [node for node in self._windows if to_tokens is None or node.step * self.recipe.batch_tokens <= to_tokens]
        if read_out not in ("swa", "lawa") or not 1 <= (windows or 0) <= len(ended):
            raise ValueError(f"run {self.run_id} has no {read_out!r} of horizon_tokens={horizon_tokens}, windows={windows}: it has "
                             f'"ema" of horizon_tokens {self.observed.ema_horizon_tokens}, "swa" and "lawa" of up to {len(ended)} '
                             f"windows of {self.observed.average_every_tokens} tokens; es.run(…, observe=es.Observe(…)) adds others")
        parts = [self._window(node) for node in ended[-windows:]]
        kind = "mean/" if read_out == "swa" else "last/"
        tensors = [{name.removeprefix(kind): t for name, t in part.items() if name.startswith(kind)} for part in parts]
        return compose(tensors, [int(part["steps"]) if read_out == "swa" else 1 for part in parts])

    @functools.cached_property
    def _windows(self) -> list[Node]:
        return window_nodes(self.recipe, self.observed)

    def _window(self, node: Node) -> dict[str, torch.Tensor]:
        if self.store.node_meta(node) is None:
            raise Damaged(f"a window of the averages of run {self.run_id}, {self.store.node_folder(node)}, is missing; "
                          "es.run(…, observe=…) as before makes it again, after `etastar runs gc --states` where it does not")
        return self.store.node_state(node)

    def validate(self, params: dict[str, torch.Tensor]) -> tuple[float, np.ndarray, np.ndarray]:
        """Validation loss of other weights in the run's model, as `engine.slots.validate` gives it."""
        model = self.recipe.model
        return validate(params, model, scalars(self.recipe.parametrization, model), prepare(self.recipe.corpus))

    def _span(self, read_out: str, windows: int | None) -> dict[str, int]:
        """The tokens after which an average's first and last weights stood."""
        batch_tokens, last = self.recipe.batch_tokens, self.summary["steps"]
        first = last
        if read_out == "ema":
            first = 1
        elif windows:
            first, last = self._windows[-windows].step, self._windows[-1].step
            if read_out == "swa":
                first -= step_of_window(first, batch_tokens, self.observed.average_every_tokens) - 1
        return {"from_tokens": first * batch_tokens, "to_tokens": last * batch_tokens}

    def _decoder(self, params: dict[str, torch.Tensor]) -> Decoder:
        return Decoder(self.recipe.model, prepare(self.recipe.corpus).vocab, self.recipe.parametrization, params)

    def _refuse_diverged(self):
        if self.status == "diverged":
            raise ValueError(f"run {self.run_id} diverged after {self.summary['steps']} steps; it has a curve but no model")


def read_run(store: Store, recipe: Recipe, observe: Observe) -> Run | None:
    """The finished run of a recipe, None where there is none or it was not observed as asked."""
    summary = store.summary(recipe.run_id)
    if summary is None or not Observe(**summary["observed"]).covers(observe):
        return None
    if summary["status"] == "done" and any(store.node_meta(node) is None for node in window_nodes(recipe, observe)):
        return None
    return Run(store, recipe, summary)


def window_nodes(recipe: Recipe, observe: Observe) -> list[Node]:
    """Where the store has the windows of the averages of a recipe's run, first to last: as states of a trunk of their own.

    What is in a window follows from the trunk and the controls up to its end, so all runs that share these share it.
    """
    if observe.average_every_tokens is None:
        return []
    moved, hasher, start, nodes = controls(recipe), hashlib.sha256(), 0, []
    for end in observe.window_ends(len(moved), recipe.batch_tokens):
        hasher.update(control_bytes(moved[start:end]))
        nodes.append(Node(_window_trunk(recipe.trunk_id, observe.average_every_tokens), end, hasher.hexdigest()[:16]))
        start = end
    return nodes


def write_window(store: Store, recipe: Recipe, end: Node, every_tokens: int, mean: dict, last: dict) -> None:
    """Put a window that ended at a state where `window_nodes` finds it: the mean of its weights, the last of them, its steps."""
    steps = step_of_window(end.step, recipe.batch_tokens, every_tokens)
    tensors = {f"mean/{name}": t for name, t in mean.items()} | {f"last/{name}": t for name, t in last.items()}
    node = Node(_window_trunk(end.trunk, every_tokens), end.step, end.prefix)
    store.write_node(node, pd.DataFrame(), tensor_bytes(tensors | {"steps": torch.tensor(steps)}), {"kind": "window"})


def _window_trunk(trunk: str, every_tokens: int) -> str:
    return f"{trunk}-windows-{every_tokens}"


def _halved(mean: float, loss_N: np.ndarray, document_N: np.ndarray) -> dict[str, float]:
    """Mean validation loss, and those of the sequences of every other document; NaN for a half without any."""
    odd_N = np.unique(document_N, return_inverse=True)[1] % 2 == 1
    halves = (loss_N[part_N].astype(np.float64) for part_N in (~odd_N, odd_N))
    return {"val_loss": mean} | {name: float(half.mean()) if half.size else float("nan")
                                 for name, half in zip(("val_loss_a", "val_loss_b"), halves, strict=True)}


def find_run(store, run_id: str) -> Run | UnfinishedRun:
    """A run of a store (or of its path) by its id, finished or not; ValueError naming the id where the store knows none."""
    store = Store.at(store)
    unfinished, summary = store.unfinished(), store.summary(run_id)  # in this order, for it may be finished in between
    if summary is not None:
        return Run(store, Recipe.from_json(store.read(run_id, "recipe.json").decode()), summary)
    if run_id not in unfinished:
        raise ValueError(f"no run {run_id!r} in the store {store.path}; `etastar runs list` and `runs list --unfinished` name them")
    sweep, recipe = unfinished[run_id]
    return UnfinishedRun(store, Recipe.from_json(recipe), run_id, sweep)


def stored_steps(store: Store, recipe: Recipe) -> int:
    """Steps after which the deepest state on a recipe's path stands that a run can start from; 0 where none is stored."""
    def stored(trunk):
        return {name: meta["step"] for name, meta in store.stored_nodes(trunk, Observe()).items() if meta["diverged_at"] is None}

    return build_segments([recipe], stored)[0].start


def write_run(store: Store, recipe: Recipe, node: Node, observe: Observe, vocab: int, model=None, validation=None,
              averages: dict | None = None) -> None:
    """Put a run in its folder: its curve along the shared states, its model, validation and EMAs unless it diverged."""
    curve, files = store.curve_to(node).reindex(columns=CURVE_COLUMNS), {}
    if model is not None:
        mean, loss_N, document_N = validation
        curve.loc[len(curve) - 1, "val_loss"] = mean
        files["model.safetensors"] = tensor_bytes(model)
        emas = {name.removeprefix(AVERAGE): t for name, t in (averages or {}).items() if name.startswith(AVERAGE + "ema")}
        if emas:
            files["averages.safetensors"] = tensor_bytes(emas)
        files["validation.safetensors"] = tensor_bytes(
            {"loss": torch.from_numpy(loss_N), "document": torch.from_numpy(np.ascontiguousarray(document_N))})
    files["metrics.parquet"] = parquet(curve)
    files["provenance.json"] = json.dumps(provenance(recipe), indent=1, sort_keys=True).encode()
    store.write_run(recipe, files, summarize(recipe, curve, observe, vocab, None if model is None else mean))


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
        "params_active": parameters["active"],
        "flops": flops_per_token(recipe.model, vocab)["exact"] * recipe.horizon_tokens,
        "observed": {name: given for name, given in observe.to_meta().items() if given},
    }


def curve_frame(recipe: Recipe, start: int, lr, train_loss, grad_norm, val_loss: dict[int, float]) -> pd.DataFrame:
    """Rows of a curve for the steps `start` + 1 …, nothing logged; `val_loss` maps steps to the validation loss after them."""
    steps = np.arange(start + 1, start + 1 + len(lr))
    return with_logged(pd.DataFrame({
        "step": steps,
        "tokens": steps * recipe.batch_tokens,
        "lr": np.asarray(lr, dtype=np.float64),
        "train_loss": np.asarray(train_loss, dtype=np.float32),
        "val_loss": np.array([val_loss.get(int(step), np.nan) for step in steps], dtype=np.float64),
        "grad_norm": np.asarray(grad_norm, dtype=np.float32),
    }), {})[list(CURVE_COLUMNS)]
