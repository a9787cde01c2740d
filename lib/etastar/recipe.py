"""What a run is: a frozen value from which every bit of the run follows."""

import dataclasses
import functools
import json
from typing import Literal

import numpy as np

from etastar.fingerprint import fingerprint
from etastar.schedules import Schedule
from etastar.values import canonical_json, decode, digest_of_json, value


@value
class Mixture:
    """A mixture of SwiGLU experts in place of the MLP, as granitemoe has it: each token goes through `experts_per_token` of `experts`.

    A token's experts are those of the largest router logits, weighted by a softmax over these logits alone; no token is dropped.
    `balance` and `router_z` multiply the load-balance loss (arXiv 2101.03961 eq. 4, over the top k, of loads and probabilities averaged
    over layers, as transformers has it) and the router's z loss (arXiv 2202.08906 eq. 5, mean over layers); both are added to the loss
    that is trained, never to one that is told.
    Raises ValueError for more experts a token than there are, and for counts below 1 or negative coefficients.
    """

    experts: int
    experts_per_token: int
    balance: float = 0.01
    router_z: float = 0.001

    def check(self):
        if not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"a token cannot go through {self.experts_per_token} of {self.experts} experts: "
                             "take 1 ≤ experts_per_token ≤ experts")
        if min(self.balance, self.router_z) < 0:
            raise ValueError(f"Mixture needs balance and router_z ≥ 0; got {self.balance} and {self.router_z}")


@value
class Model:
    """Shape of a Granite-shaped decoder: RMSNorm, RoPE, SwiGLU, optional grouped-query attention and mixture of experts.

    Widths in units (floats of the residual stream), `context` in tokens. `kv_heads` None means one per query head;
    `ffn_width` None means 8/3 of the width rounded up to a multiple of 16; with a `mixture` it is that of one expert. The vocabulary
    is the corpus's. `normalization` "pre" is RMSNorm with a gain before attention, MLP and head; "everywhere" is RMSNorm without a
    gain on the input of every matrix, and of each head's queries, keys and values (arXiv 2510.03871 §2.2). `qk_norm` is RMSNorm
    without a gain of each head's queries and keys, before they are turned (arXiv 2010.04245).
    Raises ValueError when the width is not a whole number of heads or heads not a multiple of `kv_heads`.
    """

    width: int
    depth: int
    head_dim: int = 64
    context: int = 512
    kv_heads: int | None = None
    ffn_width: int | None = None
    tied: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    normalization: Literal["pre", "everywhere"] = "pre"
    qk_norm: bool = False
    mixture: Mixture | None = None

    def check(self):
        for name in ("width", "depth", "head_dim", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"Model.{name} must be at least 1; got {getattr(self, name)}")
        if self.width % self.head_dim:
            raise ValueError(
                f"width {self.width} is not a multiple of head_dim {self.head_dim}; "
                f"take a head_dim that divides the width, {_largest_divisor(self.width, self.head_dim)} for example"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embeddings turn pairs of units")
        if self.qk_norm and self.normalization == "everywhere":
            raise ValueError('normalization="everywhere" normalizes queries and keys already; leave qk_norm out')
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.width // self.head_dim

    @property
    def resolved_kv_heads(self) -> int:
        """Key/value heads, the number of query heads where none was given."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def resolved_ffn_width(self) -> int:
        """Hidden width of the SwiGLU block."""
        return -(-self.width * 8 // (3 * 16)) * 16 if self.ffn_width is None else self.ffn_width


@value
class Corpus:
    """Where tokens come from: "python", "synthetic", "files:GLOB" or "hf:REPO@COMMIT", and the BPE vocabulary size.

    `options` is a tuple of (name, value) pairs that the source itself understands (see text.corpora); `max_bytes` keeps
    a fixed prefix of the training documents.
    """

    source: str = "python"
    vocab: int = 1024
    max_bytes: int | None = None
    options: tuple = ()

    def check(self):
        if self.source.split(":")[0] not in ("python", "synthetic", "files", "hf"):
            raise ValueError(
                f'unknown corpus {self.source!r}; known: "python", "synthetic", "files:GLOB", "hf:REPO@COMMIT"'
            )
        if not 2 <= self.vocab <= 65_536:
            raise ValueError(f"vocab must lie in 2 … 65536 (tokens are stored in 16 bits); got {self.vocab}")


@value
class AdamW:
    """AdamW (arXiv 1711.05101) as torch.optim.AdamW computes it, with a global gradient-norm clip before it.

    `weight_decay` multiplies the learning rate (torch's convention) and touches matrices only, not norms and not the
    embedding. `clip_norm` None turns clipping off.
    """

    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0

    def check(self):
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"AdamW.{name} must lie in [0, 1); got {getattr(self, name)}")
        if self.weight_decay < 0 or self.eps <= 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise ValueError(
                f"AdamW needs weight_decay ≥ 0, eps > 0 and clip_norm > 0 or None; got weight_decay="
                f"{self.weight_decay}, eps={self.eps}, clip_norm={self.clip_norm}"
            )


@value
class ScheduleFreeAdamW:
    """Schedule-Free AdamW (arXiv 2405.15682) as schedulefree.AdamWScheduleFree computes it, with a gradient-norm clip before it.

    Gradients are taken at y = (1 − beta1) z + beta1 x; what is validated and handed out is x, the mean of z that gives a step the
    weight step^`r` · (highest rate so far)^`weight_lr_power`. The rates are the recipe's schedule's: the package's `warmup_steps`
    is `Constant(warmup_steps=…)`. `weight_decay` is taken at y, multiplies the rate and touches what AdamW's does.
    Raises ValueError for a beta1 of 0 too: x cannot be told from z then.
    """

    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    r: float = 0.0
    weight_lr_power: float = 2.0

    def check(self):
        if not (0 < self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"ScheduleFreeAdamW needs beta1 in (0, 1) and beta2 in [0, 1); got {self.beta1} and {self.beta2}")
        if min(self.weight_decay, self.r, self.weight_lr_power) < 0 or self.eps <= 0 or (
                self.clip_norm is not None and self.clip_norm <= 0):
            raise ValueError(
                f"ScheduleFreeAdamW needs weight_decay, r and weight_lr_power ≥ 0, eps > 0 and clip_norm > 0 or None; got {self}"
            )


@value
class Scion:
    """Scion (arXiv 2502.07529): a step of length lr · radius in each layer's own operator norm, along minus the averaged gradient.

    Token table: each row by its RMS ("rows", 1→RMS norm). Hidden matrices: polar factor by Newton–Schulz (RMS→RMS). Head: each row by
    its length ("rows") or signs, both of unit RMS→∞ norm. Gains: by their RMS. `momentum` m is 1 − β: average = (1 − m) average +
    m gradient, 1 is none. Weights shrink by lr · `weight_decay` a step: 0 is the unconstrained form, 1 the constrained one, which
    keeps every norm within its radius. `hidden_scale` "rms" is √(out/in); with `nesterov` and a momentum of 0.05, "keller",
    √max(1, out/in), and "adamw", 0.2 √max(out, in), are torch.optim.Muon's. `newton_schulz` "auto" is bf16 on a GPU, fp32 on a CPU.
    Raises ValueError for a radius ≤ 0 and a momentum outside (0, 1].
    """

    momentum: float = 1.0
    weight_decay: float = 0.0
    radius_embedding: float = 1.0
    radius_hidden: float = 1.0
    radius_output: float = 1.0
    radius_norm: float = 1.0
    output: Literal["rows", "sign"] = "rows"
    embedding: Literal["rows", "sign"] = "rows"
    nesterov: bool = False
    hidden_scale: Literal["rms", "keller", "adamw"] = "rms"
    newton_schulz: Literal["auto", "fp32", "bf16"] = "auto"
    newton_schulz_steps: int = 5
    clip_norm: float | None = None

    beta2 = 0.0  # it has none; plans ask every optimizer for it

    def check(self):
        if not 0 < self.momentum <= 1:
            raise ValueError(f"Scion.momentum is 1 − β and must lie in (0, 1]; got {self.momentum}: 1 is none, 0.1 is β = 0.9")
        radii = {name: getattr(self, name) for name in ("radius_embedding", "radius_hidden", "radius_output", "radius_norm")}
        if wrong := {name: radius for name, radius in radii.items() if not 0 < radius < float("inf")}:
            raise ValueError(f"a radius of Scion must be positive and finite; got {wrong}: a rate of 0 for a layer is `lr_ratios`")
        if self.weight_decay < 0 or self.newton_schulz_steps < 1 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise ValueError(f"Scion needs weight_decay ≥ 0, newton_schulz_steps ≥ 1 and clip_norm > 0 or None; got {self}")

    @property
    def structure(self) -> tuple:
        """What all slots of a stack must share."""
        rules = self.output, self.embedding, self.nesterov, self.hidden_scale
        return *rules, self.newton_schulz, self.newton_schulz_steps, self.weight_decay > 0


@value
class SP:
    """Standard parametrization: one learning rate for all, init N(0, `init_std`²), output projections over √(2·depth)."""

    init_std: float = 0.02


@value
class MuP:
    """Maximal update parametrization (arXiv 2203.03466 Table 8), m = width / `base_width`.

    Hidden and expert matrices have the learning rate over m and init std over √m, logits are divided by m; embedding, head and gains are
    as in SP, and so are the output projections' √(2·depth). `attention` says what scores are divided by: "head_dim", or its "root". A
    `router` is an output matrix (its logits over m) while the number of experts is held, and a "hidden" one where that grows with width
    (arXiv 2508.09752). Embeddings and block outputs are multiplied by constants, the latter also by depth^−`residual_depth_exponent`: with
    these it is Granite's (arXiv 2408.13359 Table 1, exponent 0) and, with 0.5 and the "root", MiniCPM's form (arXiv 2404.06395).
    `decay` of hidden matrices: "independent" has η·λ the same at every width (λ times m, as arXiv 2405.13698 asks), "coupled" has λ the
    same, so that η·λ falls as 1 / m. `eps` "scaled" is ε over m in the blocks, "fixed" ε everywhere.
    Raises ValueError in a recipe whose width is neither a whole multiple nor a whole part of `base_width`.
    """

    base_width: int
    init_std: float = 0.02
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    decay: Literal["independent", "coupled"] = "independent"
    attention: Literal["head_dim", "root"] = "head_dim"
    residual_depth_exponent: float = 0.0
    eps: Literal["fixed", "scaled"] = "fixed"
    router: Literal["output", "hidden"] = "output"

    def check(self):
        if self.base_width < 1 or min(self.init_std, self.embedding_multiplier, self.residual_multiplier) <= 0:
            raise ValueError(f"MuP needs a base_width of at least 1 and an init_std and multipliers above 0; got {self}")


@value
class CompleteP:
    """μP over width and depth (arXiv 2505.01618 Table 1), m = width / `base_width`, l = depth / `base_depth`, α = `alpha`.

    As μP in width; block outputs are multiplied by l^−α and everything within the blocks has the learning rate times l^(α−1). α = 1 is
    CompleteP, 0.5 and 0 are its controls. ε in the blocks is over m · l^α ("fixed": ε). No other rule of depth: output projections start
    as every hidden matrix does. `decay`, `attention` and `router` are as in MuP.
    Raises ValueError without a base depth, and in a recipe of a width as MuP refuses it or of less than the base depth.
    """

    base_width: int
    base_depth: int | None = None
    alpha: float = 1.0
    init_std: float = 0.02
    decay: Literal["independent", "coupled"] = "independent"
    attention: Literal["head_dim", "root"] = "head_dim"
    eps: Literal["fixed", "scaled"] = "scaled"
    router: Literal["output", "hidden"] = "output"

    def check(self):
        if self.base_depth is None:
            raise ValueError("CompleteP is a rule of depth and needs the depth it starts from: give base_depth")
        if min(self.base_width, self.base_depth) < 1 or self.init_std <= 0 or not 0 <= self.alpha <= 1:
            raise ValueError(f"CompleteP needs base_width and base_depth of at least 1, init_std > 0 and alpha in [0, 1]; got {self}")


@value
class UnitNorm:
    """Initialization by dual norm (arXiv 2510.03871 A.2): every matrix starts with norm 1 in its own operator norm, one rate for all.

    Rows of the token table are Gaussian with RMS 1, rows of the head of length 1/√width; hidden matrices are semi-orthogonal times
    √(out/in), those back into the residual stream also over √(2·depth). It needs an untied head, the two tables having two norms.
    """


@value
class Execution:
    """How the bits are computed; it is part of the run's id because it decides them.

    `micro_batch_sequences` None means the whole batch at once. `deterministic` keeps a GPU to kernels whose bits repeat, at a
    cost in speed; a CPU's always do.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    micro_batch_sequences: int | None = None
    compiled: bool = False
    deterministic: bool = False


@value
class Recipe:
    """One training run: model, data, optimizer, schedule, and everything else its bits depend on.

    `batch_tokens` is tokens per step and `horizon_tokens` tokens in all; both count predicted tokens. `data_seed` None
    means `seed`. `repeat` allows more than one epoch, which bars the run from horizon claims. `beta2_changes` are pairs
    (after_tokens, beta2): from the step after so many tokens on, AdamW's beta2 is this (arXiv 2508.01483 raises it in the cooldown).
    `lr_ratios` multiply the rate of the token table, of all within the blocks (and the last gain), and of an untied head. `z_loss`
    times the mean of (log Σ exp logits)² is added to the loss that is trained (arXiv 2204.02311 §5), never to one that is told.
    Raises ValueError for shapes, batches, horizons, schedules and changes that cannot be.
    """

    model: Model
    corpus: Corpus
    optimizer: AdamW | ScheduleFreeAdamW | Scion
    schedule: Schedule
    peak_lr: float
    batch_tokens: int
    horizon_tokens: int
    parametrization: SP | MuP | CompleteP | UnitNorm = dataclasses.field(default_factory=SP)
    seed: int = 0
    data_seed: int | None = None
    repeat: bool = False
    execution: Execution = dataclasses.field(default_factory=Execution)
    beta2_changes: tuple[tuple[int, float], ...] = ()
    lr_ratios: tuple[float, float, float] = (1.0, 1.0, 1.0)
    z_loss: float = 0.0

    def check(self):
        if not self.peak_lr > 0 or self.peak_lr == float("inf"):
            raise ValueError(f"peak_lr must be positive and finite; got {self.peak_lr}")
        if self.batch_tokens < 1 or self.batch_tokens % self.model.context:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of the context {self.model.context}; "
                f"take {_nearest_multiple(self.batch_tokens, self.model.context)}"
            )
        if self.horizon_tokens < 1 or self.horizon_tokens % self.batch_tokens:
            raise ValueError(
                f"horizon_tokens {self.horizon_tokens} is not a multiple of batch_tokens {self.batch_tokens}; "
                f"take {_nearest_multiple(self.horizon_tokens, self.batch_tokens)}"
            )
        micro = self.execution.micro_batch_sequences
        if micro is not None and (micro < 1 or self.batch_sequences % micro):
            raise ValueError(f"micro_batch_sequences {micro} does not divide the batch of {self.batch_sequences} sequences")
        if not all(0 <= ratio < float("inf") for ratio in self.lr_ratios):
            raise ValueError(f"lr_ratios (input, hidden, output) must be finite and not negative; got {self.lr_ratios}")
        if self.z_loss < 0:
            raise ValueError(f"z_loss must not be negative; got {self.z_loss}")
        self._check_base()
        if self.model.mixture is not None:
            self._check_mixture()
        if isinstance(self.parametrization, UnitNorm) and self.model.tied:
            raise ValueError("UnitNorm gives the token table and the head two norms, and this model ties them; set tied=False")
        self.lr()
        if self.beta2_changes:
            self._check_beta2_changes()

    def _check_base(self):
        """Whether the model is a scaled one of the parametrization's base; small runs for a larger base may lie below it in width."""
        by, model = self.parametrization, self.model
        if base := getattr(by, "base_width", None):
            if max(model.width, base) % min(model.width, base):
                raise ValueError(f"width {model.width} is not a whole multiple of base_width {base}, nor a whole part of it; take a "
                                 f"width of {_nearest_multiple(model.width, base)} or a base_width that divides {model.width}")
        if (base := getattr(by, "base_depth", None)) and model.depth < base:
            raise ValueError(f"depth {model.depth} is below base_depth {base}; take a base_depth of at most {model.depth}")

    def _check_mixture(self):
        if self.execution.compiled:
            raise ValueError("a mixture of experts has products as long as its tokens make them, which are not compiled; set "
                             "Execution(compiled=False)")
        if isinstance(self.parametrization, UnitNorm):
            raise ValueError("UnitNorm has no rule for routers and experts; take SP, MuP or CompleteP for a mixture")

    def _check_beta2_changes(self):
        if not isinstance(self.optimizer, AdamW):
            raise ValueError(f"beta2_changes {self.beta2_changes} are for the optimizer AdamW; got {type(self.optimizer).__name__}: "
                             "leave them out or take AdamW")
        for tokens, beta2 in self.beta2_changes:
            if tokens < 1 or tokens % self.batch_tokens:
                raise ValueError(f"beta2_changes: {tokens} tokens are not a positive multiple of batch_tokens {self.batch_tokens}; "
                                 f"take {_nearest_multiple(tokens, self.batch_tokens)}")
            if tokens >= self.horizon_tokens:
                raise ValueError(f"beta2_changes: {tokens} tokens are not before the end of the run at {self.horizon_tokens} tokens; "
                                 "change earlier or run longer")
            if not 0 <= beta2 < 1:
                raise ValueError(f"beta2_changes: beta2 must lie in [0, 1); got {beta2} after {tokens} tokens")
        after = [tokens for tokens, _ in self.beta2_changes]
        if after != sorted(set(after)):
            raise ValueError(f"beta2_changes must rise in tokens; got {after}: sort them and name each once")

    @property
    def batch_sequences(self) -> int:
        """Sequences per step."""
        return self.batch_tokens // self.model.context

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all."""
        return self.horizon_tokens // self.batch_tokens

    @property
    def resolved_data_seed(self) -> int:
        """Seed of the data order."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def run_id(self) -> str:
        """Stable 16-digit hash of all that decides the run's bits; the name of its folder in a store."""
        return digest_of_json(self._json, canonical_json(self.corpus_fingerprint), canonical_json(NUMERICS))

    @property
    def trunk_id(self) -> str:
        """Hash of everything but the controls: recipes that share it share every step whose rates and beta2 agree."""
        return digest_of_json(*self._fixed_json, *map(canonical_json, (self.resolved_data_seed, self.corpus_fingerprint, NUMERICS)))

    @functools.cached_property
    def _json(self) -> str:
        return canonical_json(self)

    @functools.cached_property
    def _fixed_json(self) -> list[str]:
        return [canonical_json(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in _CONTROLS]

    @property
    def corpus_fingerprint(self) -> str:
        """Content hash of the corpus and its tokenizer."""
        return fingerprint(self.corpus)

    def lr(self):
        """The learning rate applied at each step: float64 (total_steps,)."""
        return self.schedule.lr(self.total_steps, peak_lr=self.peak_lr, batch_tokens=self.batch_tokens)

    def beta2(self):
        """The optimizer's beta2 at each step, `beta2_changes` applied: float64 (total_steps,)."""
        beta2_S = np.full(self.total_steps, self.optimizer.beta2)
        for after_tokens, beta2 in self.beta2_changes:
            beta2_S[after_tokens // self.batch_tokens :] = beta2
        return beta2_S

    def replace(self, **changes) -> "Recipe":
        """A copy with some fields changed; checked like any recipe."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Canonical JSON, defaults left out."""
        return self._json

    @staticmethod
    def from_json(text_or_dict) -> "Recipe":
        """The recipe that `to_json` wrote; unknown keys raise ValueError."""
        body = json.loads(text_or_dict) if isinstance(text_or_dict, str) else text_or_dict
        recipe = decode(body)
        if not isinstance(recipe, Recipe):
            raise ValueError(f"expected a Recipe; got kind {body.get('kind')!r}")
        return recipe


NUMERICS = 2  # of a training step: raise it when the same recipe comes to train other bits, and old runs are not continued

_CONTROLS = ("schedule", "peak_lr", "horizon_tokens", "data_seed", "repeat", "beta2_changes")


def _nearest_multiple(number: int, unit: int) -> int:
    return max(unit, round(number / unit) * unit)


def _largest_divisor(number: int, at_most: int) -> int:
    return max((d for d in range(2, at_most + 1, 2) if number % d == 0), default=number)
