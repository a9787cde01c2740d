"""A schedule of this kit in anybody's torch training loop."""

from etastar.schedules import Schedule


def to_lambda_lr(
    schedule: Schedule, optimizer, total_steps: int, *, batch_tokens: int = 1, peak_lr: float | None = None
):
    """A torch LambdaLR under which step s (0-based) is taken at exactly `schedule.lr(total_steps, …)[s]`.

    Past the end the last rate holds. `peak_lr` is by default the optimizer's rate. Groups of one rate all get the
    schedule's rates; where groups differ (multipliers), `peak_lr` says which rate is the peak and each keeps its ratio
    to it. Each group's `initial_lr` is set to that ratio, so that LambdaLR multiplies by the rate itself and no bit is
    lost. Raises ValueError for groups that differ without a `peak_lr`, and where the schedule does not fit the run.
    """
    from torch.optim.lr_scheduler import LambdaLR

    group_rates = [float(group["lr"]) for group in optimizer.param_groups]
    alike = len(set(group_rates)) == 1
    if peak_lr is None and not alike:
        raise ValueError(f"the groups have different rates {group_rates}; give peak_lr, the one that is the peak")
    peak_lr = group_rates[0] if peak_lr is None else peak_lr
    rates = schedule.lr(total_steps, peak_lr=peak_lr, batch_tokens=batch_tokens)
    for group, rate in zip(optimizer.param_groups, group_rates, strict=True):
        group["initial_lr"] = 1.0 if alike else rate / peak_lr
    return LambdaLR(optimizer, lambda step: float(rates[min(step, total_steps - 1)]))
