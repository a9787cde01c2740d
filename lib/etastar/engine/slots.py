"""Many runs of one shape in one set of tensors: each slot has its own parameters, learning rate, data and step count.

A slot's bits depend on its own recipe alone: not on its neighbours, their number, or what the slot held before.
"""

import numpy as np
import torch

from etastar.compiling import compiled_alone
from etastar.engine.graph import StepTables, to_host
from etastar.engine.kernels import fix_workspace, kernels
from etastar.model import decoder
from etastar.model.parametrization import numbers, scalars
from etastar.optim.adamw import Flat, StackedAdamW
from etastar.recipe import Recipe
from etastar.text.batches import batch, validation_batches
from etastar.text.corpora import TokenSet
from etastar.values import digest

VALIDATION_TOKENS = 2**16


def stack_key(recipe: Recipe) -> str:
    """Recipes with equal keys can share a stack: same shapes, data source and way of computing."""
    return digest(recipe.model, recipe.corpus, recipe.parametrization, recipe.execution, type(recipe.optimizer).__name__,
                  recipe.batch_sequences)


class SlotStack:
    """`slots` training states of one shape, trained in step; a slot is loaded, trained, read and loaded again.

    All recipes loaded must have the `stack_key` of the first. Tensors carry a leading slot axis M. `way` is how steps are driven,
    with equal bits: "host" gives each its batch (default on a CPU), "tables" reads it from the device, "graph" replays that as a
    CUDA graph (default on a GPU).
    """

    def __init__(self, recipe: Recipe, tokens: TokenSet, slots: int = 1, way: str | None = None):
        self.key, self.model, self.tokens, self.slots = stack_key(recipe), recipe.model, tokens, slots
        self.execution, self.batch_sequences = recipe.execution, recipe.batch_sequences
        self.device = torch.device(recipe.execution.device)
        self.way = way or ("host" if self.device.type == "cpu" else "graph")
        if self.device.type == "cuda" and self.execution.deterministic:
            fix_workspace()  # before anything is put on the GPU
        self.copies = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.scalars = scalars(recipe.parametrization, recipe.model)
        table = numbers(recipe.parametrization, recipe.model, tokens.vocab)
        self.flat = Flat(table, slots, self.device)
        self.params = {name: view.requires_grad_() for name, view in self.flat.views(self.flat.data).items()}
        self.grad_MxP = self.flat.like()
        self.grads = self.flat.views(self.grad_MxP)
        self.optimizer = StackedAdamW(self.flat, compiled=recipe.execution.compiled)
        self.recipes: list[Recipe | None] = [None] * slots
        self.step_M = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.alive_M = torch.zeros(slots, dtype=torch.bool, device=self.device)
        if recipe.execution.compiled:
            decoder.tell_compiler()
        self.loss = compiled_alone(decoder.loss) if recipe.execution.compiled else decoder.loss
        self.tables = None if self.way == "host" else StepTables(tokens, self.model.context, slots, self.batch_sequences,
                                                                 self.flat.data.device, graphed=self.way == "graph")

    def load(self, slot: int, recipe: Recipe, state: tuple[dict, dict, int] | None) -> None:
        """Fill a slot with a state (parameters, moments, step), or with the recipe's own initial parameters."""
        if stack_key(recipe) != self.key:
            raise ValueError(f"recipe {recipe.run_id} does not fit this stack: other shapes, data or execution")
        if state is None:
            params = decoder.init_parameters(recipe.model, self.tokens.vocab, recipe.parametrization, recipe.seed)
            state = params, {}, 0
        params, moments, step = state
        with torch.no_grad():
            for name, view in self._buffers().items():
                given = params.get(name) if name in params else moments.get(name)
                view[slot].zero_() if given is None else view[slot].copy_(given)
        self.grad_MxP[slot].zero_()  # a step that diverged leaves NaN even in the padding, which no gradient overwrites
        self.optimizer.configure(slot, recipe.optimizer)
        self.recipes[slot] = recipe
        self.step_M[slot], self.alive_M[slot] = step, True

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Views of the parameters and, under "name.m" and "name.v", of the moments."""
        views = self.flat.views(self.flat.data)
        for suffix, moment in (("m", self.optimizer.m_MxP), ("v", self.optimizer.v_MxP)):
            views |= {f"{name}.{suffix}": view for name, view in self.flat.views(moment).items()}
        return views

    @property
    def micro_batch(self) -> int:
        """Sequences of a slot that go through the model at once."""
        return self.execution.micro_batch_sequences or self.batch_sequences

    def clear(self, slot: int) -> None:
        """Leave a slot idle: its bits stay, nothing trains it."""
        self.recipes[slot], self.alive_M[slot] = None, False

    def train(self, lr_MxS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Train every loaded slot for S steps at the given rates: train loss and gradient norm, both (M, S).

        A slot whose loss or gradient is not finite is frozen as it stood before that step; its entries are NaN from there.
        """
        with kernels(self.execution, self.model, self.slots * self.micro_batch, self.device):
            if self.tables is None:
                return self._train_from_host(lr_MxS)
            seeds = [recipe and recipe.resolved_data_seed for recipe in self.recipes]
            return self.tables.train(self._step, self.alive_M, seeds, self.step_M.tolist(), lr_MxS)

    def _train_from_host(self, lr_MxS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        steps = lr_MxS.shape[1]
        rates_MxS = torch.from_numpy(lr_MxS).to(self.device)
        losses_MxS = torch.empty(self.slots, steps, device=self.device)
        norms_MxS = torch.empty(self.slots, steps, device=self.device)
        first = self.step_M.tolist()
        for s in range(steps):
            loss_M, norm_M = self._step(self._batches([step + s for step in first]), rates_MxS[:, s])
            losses_MxS[:, s], norms_MxS[:, s] = loss_M, norm_M
        return losses_MxS.cpu().numpy(), norms_MxS.cpu().numpy()

    def _batches(self, steps: list[int]) -> torch.Tensor:
        tokens_MxBxT = np.zeros((self.slots, self.batch_sequences, self.model.context + 1), dtype=np.int64)
        for slot, recipe in enumerate(self.recipes):
            if recipe is not None:
                tokens_MxBxT[slot] = batch(self.tokens.train, self.model.context, recipe.resolved_data_seed, steps[slot],
                                           self.batch_sequences)
        return torch.from_numpy(tokens_MxBxT).to(self.device, non_blocking=True)

    def _step(self, tokens_MxBxT: torch.Tensor, lr_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss_M = self._backward(tokens_MxBxT)
        norm_M = self.optimizer.clip(self.grad_MxP)
        self.alive_M &= torch.isfinite(loss_M) & torch.isfinite(norm_M)
        self.step_M += self.alive_M
        self.optimizer.step(self.grad_MxP, lr_M, self.step_M, self.alive_M)
        nan_M = torch.full_like(loss_M, float("nan"))
        return torch.where(self.alive_M, loss_M, nan_M), torch.where(self.alive_M, norm_M, nan_M)

    def _backward(self, tokens_MxBxT: torch.Tensor) -> torch.Tensor:
        """Mean loss of each slot, its gradient in `grad_MxP`; losses of slots are summed, so gradients stay apart."""
        share, names = self.micro_batch / self.batch_sequences, list(self.params)
        total_M = torch.zeros(self.slots, device=self.device)
        for part, part_MxbxT in enumerate(tokens_MxBxT.split(self.micro_batch, dim=1)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.execution.precision == "bf16"):
                loss_M = self.loss(self.params, part_MxbxT, self.model, self.scalars)
            found = torch.autograd.grad((loss_M * share).sum(), [self.params[name] for name in names])
            for name, grad in zip(names, found, strict=True):
                self.grads[name].add_(grad) if part else self.grads[name].copy_(grad)
            total_M += loss_M.detach() * share
        return total_M

    def state(self, slot: int) -> tuple[dict, dict, int]:
        """(parameters, moments, step) of a slot, copied to the CPU; on a GPU beside what it does next."""
        device_rows = [rows[slot] for rows in (self.flat.data, self.optimizer.m_MxP, self.optimizer.v_MxP, self.step_M)]
        if self.device.type == "cuda":
            device_rows = to_host(device_rows, self.copies)
        *rows, step = device_rows
        params, m, v = ({name: view[0].detach().clone() for name, view in self.flat.views(row[None]).items()} for row in rows)
        moments = {f"{name}.m": tensor for name, tensor in m.items()} | {f"{name}.v": tensor for name, tensor in v.items()}
        return params, moments, int(step)

    def is_alive(self, slot: int) -> bool:
        """Whether the slot is loaded and has not diverged."""
        return bool(self.alive_M[slot])

    def validate(self, slot: int) -> tuple[float, np.ndarray, np.ndarray]:
        """Validation loss in nats per token, per-sequence means (float32) and the document each belongs to."""
        return validate({name: t[slot].detach() for name, t in self.params.items()}, self.model, self.scalars, self.tokens)


@torch.no_grad()
def validate(params: dict, model, scalars_, tokens: TokenSet) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss of unstacked parameters on the fixed validation sequences: mean, per-sequence means, document ids."""
    stacked = {name: p[None] for name, p in params.items()}
    device = next(iter(params.values())).device
    losses, documents = [], []
    for tokens_BxT, document_B in validation_batches(tokens, model.context, max_tokens=VALIDATION_TOKENS):
        tokens_1xBxT = torch.from_numpy(tokens_BxT)[None].to(device)
        losses.append(decoder.token_losses(stacked, tokens_1xBxT, model, scalars_)[0].mean(1).cpu().numpy())
        documents.append(document_B)
    loss_N = np.concatenate(losses).astype(np.float32)
    return float(loss_N.astype(np.float64).mean()), loss_N, np.concatenate(documents)
