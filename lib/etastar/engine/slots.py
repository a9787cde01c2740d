"""Many runs of one shape in one set of tensors: each slot has its own parameters, learning rate, data and step count.

A slot's bits depend on its own recipe alone: not on its neighbours, their number, or what the slot held before.
"""

import numpy as np
import torch

from etastar.compiling import compiled_alone
from etastar.engine.checkpoint import AVERAGE
from etastar.engine.graph import StepTables, to_host
from etastar.engine.kernels import fix_workspace, kernels
from etastar.model import decoder
from etastar.model.parametrization import numbers, scalars
from etastar.observe import Observe
from etastar.optim.adamw import StackedAdamW, in_force
from etastar.optim.averaging import StackedAverages
from etastar.optim.schedule_free import StackedScheduleFreeAdamW
from etastar.optim.scion import StackedScion
from etastar.optim.stacked import Flat
from etastar.recipe import AdamW, Recipe, ScheduleFreeAdamW, Scion
from etastar.text.batches import batch, validation_batches
from etastar.text.corpora import TokenSet
from etastar.values import digest

VALIDATION_TOKENS = 2**16

OPTIMIZERS = {AdamW: StackedAdamW, ScheduleFreeAdamW: StackedScheduleFreeAdamW, Scion: StackedScion}


def stack_key(recipe: Recipe) -> str:
    """Recipes with equal keys can share a stack: same shapes, data source and way of computing."""
    return digest(recipe.model, recipe.corpus, recipe.parametrization, recipe.execution, type(recipe.optimizer).__name__,
                  getattr(recipe.optimizer, "structure", ()), recipe.lr_ratios, recipe.batch_sequences, recipe.z_loss)


def _way(recipe: Recipe, way: str | None) -> str:
    way = way or ("host" if recipe.execution.device == "cpu" else "graph")
    return "tables" if way == "graph" and recipe.model.mixture is not None else way


class SlotStack:
    """`slots` training states of one shape, trained in step; a slot is loaded, trained, read and loaded again.

    All recipes loaded must have the `stack_key` of the first. Tensors carry a leading slot axis M. `way` is how steps are driven,
    with equal bits: "host" gives each its batch (default on a CPU), "tables" reads it from the device, "graph" replays that as a
    CUDA graph (default on a GPU; a mixture of experts, whose products are as long as its tokens make them, takes "tables" instead).
    `observe` says which averages of the weights to keep; they change no bit of the training.
    """

    def __init__(self, recipe: Recipe, tokens: TokenSet, slots: int = 1, way: str | None = None, observe: Observe | None = None):
        self.key, self.model, self.tokens, self.slots = stack_key(recipe), recipe.model, tokens, slots
        self.execution, self.batch_sequences = recipe.execution, recipe.batch_sequences
        self.z_loss, self.device = recipe.z_loss, torch.device(recipe.execution.device)
        self.way = _way(recipe, way)
        if self.device.type == "cuda" and self.execution.deterministic:
            fix_workspace()  # before anything is put on the GPU
        self.copies = torch.cuda.Stream() if self.device.type == "cuda" else None
        self.scalars = scalars(recipe.parametrization, recipe.model)
        table = numbers(recipe.parametrization, recipe.model, tokens.vocab, recipe.lr_ratios)
        self.flat = Flat(table, slots, self.device)
        self.params = {name: view.requires_grad_() for name, view in self.flat.views(self.flat.data).items()}
        self.grad_MxP = self.flat.like()
        self.grads = self.flat.views(self.grad_MxP)
        self.optimizer = OPTIMIZERS[type(recipe.optimizer)](self.flat, compiled=recipe.execution.compiled)
        self.averages = StackedAverages(self.flat, observe, recipe.batch_tokens) if observe and observe.averages else None
        self.recipes: list[Recipe | None] = [None] * slots
        self.step_M = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self.alive_M = torch.zeros(slots, dtype=torch.bool, device=self.device)
        if recipe.execution.compiled:
            decoder.tell_compiler()
        self.objective = compiled_alone(decoder.objective) if recipe.execution.compiled else decoder.objective
        self.tables = None if self.way == "host" else StepTables(tokens, self.model.context, slots, self.batch_sequences,
                                                                 self.flat.data.device, graphed=self.way == "graph")

    def load(self, slot: int, recipe: Recipe, state: tuple[dict, dict, int] | None) -> None:
        """Fill a slot with a state as `state` gives it, or with the recipe's own initial parameters."""
        if stack_key(recipe) != self.key:
            raise ValueError(f"recipe {recipe.run_id} does not fit this stack: other shapes, data or execution")
        if state is None:
            params = decoder.init_parameters(recipe.model, self.tokens.vocab, recipe.parametrization, recipe.seed)
            state = params, {f"{name}.z": start for name, start in params.items()}, 0  # all else that an optimizer keeps starts at 0
        params, moments, step = state
        given = params | moments
        with torch.no_grad():
            for pattern, rows_MxP in self._rows().items():
                rows_MxP[slot].zero_()
                for name, view in self.flat.views(rows_MxP).items():
                    if (told := given.get(pattern.format(name))) is not None:
                        view[slot].copy_(told)
            for name, held_M in self._memories().items():
                held_M[slot] = given.get(name, 0.0)
        self.grad_MxP[slot].zero_()  # a step that diverged leaves NaN even in the padding, which no gradient overwrites
        self.optimizer.configure(slot, recipe.optimizer)
        self.recipes[slot] = recipe
        self.step_M[slot], self.alive_M[slot] = step, True
        self.set_beta2(slot, step)

    def set_beta2(self, slot: int, step: int) -> None:
        """Put in force what the slot's recipe has as beta2 after `step` steps, in place; whoever trains calls it where that changes."""
        if self.recipes[slot].beta2_changes:
            self.optimizer.set_beta2(slot, *in_force(self.recipes[slot].beta2(), step))

    def _rows(self) -> dict[str, torch.Tensor]:
        """All (M, P) tensors of the state, by the pattern that makes a parameter's name the tensor's: "{}", "{}.m", "average/mean/{}"."""
        moments = {f"{{}}.{name}": getattr(self.optimizer, f"{name}_MxP") for name in self.optimizer.moments}
        averages = self.averages.buffers if self.averages else {}
        return {"{}": self.flat.data} | moments | {f"{AVERAGE}{name}/{{}}": rows_MxP for name, rows_MxP in averages.items()}

    def _memories(self) -> dict[str, torch.Tensor]:
        """The (M,) float64 tensors that the optimizer remembers each slot by."""
        return {name: getattr(self.optimizer, f"{name}_M") for name in self.optimizer.memories}

    @property
    def micro_batch(self) -> int:
        """Sequences of a slot that go through the model at once."""
        return self.execution.micro_batch_sequences or self.batch_sequences

    def clear(self, slot: int) -> None:
        """Leave a slot idle: its bits stay, nothing trains it."""
        self.recipes[slot], self.alive_M[slot] = None, False

    def train(self, lr_MxS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Train every loaded slot for S steps at the given rates and the beta2 in force: train loss and gradient norm, both (M, S).

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
        if self.averages:
            self.averages.update(self.optimizer.evaluated(), self.step_M, self.alive_M)
        nan_M = torch.full_like(loss_M, float("nan"))
        return torch.where(self.alive_M, loss_M, nan_M), torch.where(self.alive_M, norm_M, nan_M)

    def _backward(self, tokens_MxBxT: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of each slot, the gradient of what is trained in `grad_MxP`; slots are summed, so gradients stay apart."""
        share, names = self.micro_batch / self.batch_sequences, list(self.params)
        total_M = torch.zeros(self.slots, device=self.device)
        for part, part_MxbxT in enumerate(tokens_MxBxT.split(self.micro_batch, dim=1)):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.execution.precision == "bf16"):
                trained_M, told_M = self.objective(self.params, part_MxbxT, self.model, self.scalars, self.z_loss)
            found = torch.autograd.grad((trained_M * share).sum(), [self.params[name] for name in names])
            for name, grad in zip(names, found, strict=True):
                self.grads[name].add_(grad) if part else self.grads[name].copy_(grad)
            total_M += told_M.detach() * share
        return total_M

    def state(self, slot: int) -> tuple[dict, dict, int]:
        """(parameters, moments, step) of a slot, copied to the CPU.

        The moments are all that is kept beside the parameters: the optimizer's and, as "average/KIND/NAME", averages.
        """
        patterns, memories = self._rows(), self._memories()
        *found, step = self._to_cpu([held[slot] for held in (*patterns.values(), *memories.values(), self.step_M)])
        rows = found[: len(patterns)]
        told = [self._named(pattern, row) for pattern, row in zip(patterns, rows, strict=True)]
        params, moments = told[0], {name: tensor for part in told[1:] for name, tensor in part.items()}
        return params, moments | dict(zip(memories, found[len(patterns) :], strict=True)), int(step)

    def _to_cpu(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies on the CPU; on a GPU made beside what it does next."""
        return to_host(tensors, self.copies) if self.device.type == "cuda" else [tensor.detach().clone() for tensor in tensors]

    def _named(self, pattern: str, row_P: torch.Tensor) -> dict[str, torch.Tensor]:
        """One tensor a parameter from a row of the layout, each with memory of its own."""
        return {pattern.format(name): view[0].detach().clone() for name, view in self.flat.views(row_P[None]).items()}

    def weights(self, slot: int) -> dict[str, torch.Tensor]:
        """Copies on the CPU of the weights of a slot that are validated: the run's model."""
        return self._named("{}", *self._to_cpu([self.optimizer.evaluated(slice(slot, slot + 1))[0]]))

    def window_mean(self, slot: int) -> dict[str, torch.Tensor]:
        """Copies on the CPU of the mean of a slot's weights over the steps of the window that it stands in."""
        return self._named("{}", *self._to_cpu([self.averages.buffers["mean"][slot]]))

    def is_alive(self, slot: int) -> bool:
        """Whether the slot is loaded and has not diverged."""
        return bool(self.alive_M[slot])

    def validate(self, slot: int) -> tuple[float, np.ndarray, np.ndarray]:
        """Validation loss in nats per token, per-sequence means (float32) and the document each belongs to."""
        views = self.flat.views(self.optimizer.evaluated(slice(slot, slot + 1)))
        return validate({name: view[0] for name, view in views.items()}, self.model, self.scalars, self.tokens)


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
