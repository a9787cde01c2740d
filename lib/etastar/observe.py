"""What to look at while a run trains; nothing here changes a bit of the run, so it is no part of its id."""

import dataclasses

from etastar.values import value

LOGS = {  # what is read off the state of a run while it trains: curve columns of each log
    "norms": ("norm_embedding", "norm_hidden", "norm_output"),
    "features": ("attention_logit_max", "stream_rms", "stream_delta", "feature_rank", "update_ratio", "log_z_max", "load_imbalance"),
}


@value
class Observe:
    """Read-outs along the way: validation losses, averages of the weights, their operator norms, and what its activations do.

    `val_every_tokens`: validation loss every so many tokens (None: at the end of the run only). `ema_horizon_tokens`: one
    exponential average of the weights for each horizon. `average_every_tokens`: the mean of the weights over every so many tokens
    and the weights at the end of each such window, from which SWA and LAWA of any later windows compose (`Run.averages`); a window
    takes two copies of the parameters on disk, shared by all runs that pass through it. `norms_every_tokens`: the norms of the token
    table (1→RMS), of the hidden matrix that has the largest (RMS→RMS) and of the head (RMS→∞), every so many tokens and at the end.
    `features_every_tokens`: likewise what tells stability and feature learning, on a few validation sequences (engine.feature_log).
    Raises ValueError for cadences and horizons below 1 token and for a horizon given twice.
    """

    val_every_tokens: int | None = None
    ema_horizon_tokens: tuple[int, ...] = ()
    average_every_tokens: int | None = None
    norms_every_tokens: int | None = None
    features_every_tokens: int | None = None

    def check(self):
        for name in ("val_every_tokens", "average_every_tokens", "norms_every_tokens", "features_every_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if min(self.ema_horizon_tokens, default=1) < 1 or len(set(self.ema_horizon_tokens)) < len(self.ema_horizon_tokens):
            raise ValueError(f"ema_horizon_tokens must be different numbers of at least 1; got {self.ema_horizon_tokens}")

    @property
    def averages(self) -> bool:
        """Whether any average of the weights is asked for."""
        return bool(self.ema_horizon_tokens) or self.average_every_tokens is not None

    def val_due(self, step: int, batch_tokens: int) -> bool:
        """Whether the state after `step` steps is to be validated."""
        return _passes(step, batch_tokens, self.val_every_tokens)

    @property
    def logs(self) -> tuple[str, ...]:
        """Those of `LOGS` that are asked for."""
        return tuple(log for log in LOGS if self._log_every(log) is not None)

    def log_due(self, log: str, step: int, batch_tokens: int) -> bool:
        """Whether one of `LOGS` is due after `step` steps."""
        return _passes(step, batch_tokens, self._log_every(log))

    def _log_every(self, log: str) -> int | None:
        return {"norms": self.norms_every_tokens, "features": self.features_every_tokens}[log]

    def window_due(self, step: int, batch_tokens: int) -> bool:
        """Whether a window of the weights' average ends after `step` steps."""
        return _passes(step, batch_tokens, self.average_every_tokens)

    def window_ends(self, total_steps: int, batch_tokens: int) -> list[int]:
        """The steps after which windows end, up to `total_steps`."""
        return [step for step in range(1, total_steps + 1) if self.window_due(step, batch_tokens)]

    def covers(self, other: "Observe") -> bool:
        """Whether a run observed so has all that `other` asks for."""
        return (other.val_every_tokens in (None, self.val_every_tokens)
                and other.average_every_tokens in (None, self.average_every_tokens)
                and all(other._log_every(log) in (None, self._log_every(log)) for log in LOGS)
                and set(other.ema_horizon_tokens) <= set(self.ema_horizon_tokens))

    def to_meta(self) -> dict:
        """All fields, for the metadata of a state and for a worker."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_meta(meta: dict) -> "Observe":
        """What `to_meta` put there among other things; what is missing takes its default."""
        return Observe(**{field.name: meta[field.name] for field in dataclasses.fields(Observe) if field.name in meta})


def _passes(step: int, batch_tokens: int, every: int | None) -> bool:
    """Whether step `step` reaches or passes a multiple of `every` tokens."""
    if every is None:
        return False
    return step > 0 and step * batch_tokens // every > (step - 1) * batch_tokens // every


def step_of_window(step, batch_tokens: int, every: int):
    """The place of step `step` (an int or an integer tensor) in the window it belongs to, counted from 1."""
    window = (step - 1) * batch_tokens // every
    return step + -window * every // batch_tokens
