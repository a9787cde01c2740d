"""Floor 2: optimizers on stacks of runs."""
