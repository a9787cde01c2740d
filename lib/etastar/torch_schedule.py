"""A schedule of this kit in anybody's torch training loop."""

from etastar.schedules import Schedule


def to_lambda_lr(schedule: Schedule, optimizer, total_steps: int, *, batch_tokens: int = 1, peak_lr: float | None = None):
    """A torch LambdaLR under which step s (0-based) is taken at `schedule.lr(total_steps, …)[s]`; past the end the last holds.

    `peak_lr` is by default the optimizer's rate, which must then be the same in all groups; with it given, each group
    keeps its ratio to it. Raises ValueError for groups that disagree.
    """
    from torch.optim.lr_scheduler import LambdaLR

    rates = {group["lr"] for group in optimizer.param_groups}
    if peak_lr is None:
        if len(rates) != 1:
            raise ValueError(f"the optimizer's groups have different rates {sorted(rates)}; say which is the peak with peak_lr=")
        (peak_lr,) = rates
    factors = schedule.lr(total_steps, peak_lr=peak_lr, batch_tokens=batch_tokens) / peak_lr
    return LambdaLR(optimizer, lambda step: float(factors[min(step, total_steps - 1)]))
