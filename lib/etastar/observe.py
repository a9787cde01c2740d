"""What to look at while a run trains; nothing here changes a bit of the run, so it is no part of its id."""

from etastar.values import value


@value
class Observe:
    """Read-outs along the way: validation loss every `val_every_tokens` tokens (None: at the end of the run only)."""

    val_every_tokens: int | None = None

    def check(self):
        if self.val_every_tokens is not None and self.val_every_tokens < 1:
            raise ValueError(f"val_every_tokens must be at least 1; got {self.val_every_tokens}")

    def val_due(self, step: int, batch_tokens: int) -> bool:
        """Whether the state after `step` steps is to be validated."""
        if self.val_every_tokens is None:
            return False
        return step > 0 and step * batch_tokens // self.val_every_tokens > (step - 1) * batch_tokens // self.val_every_tokens

    def covers(self, other: "Observe") -> bool:
        """Whether a run observed so has all that `other` asks for."""
        return other.val_every_tokens is None or other == self
